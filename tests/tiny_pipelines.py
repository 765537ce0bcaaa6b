"""Real diffusers pipelines with tiny random weights, built from a seed, without downloads.

    pipe = FAMILIES["hunyuan_video"]()            # or tiny_hunyuan_video(head_dim=64)
    latents = run(pipe, steps=4, guidance=True)   # fp32, on a grid of 5 x 9 x 11 tokens
    latents = run(pipe, prompt=["a red circle", "a blue square"], seed=[0, 1])

Every call of a builder makes a fresh pipeline; the same seed gives the same weights.
"""

import math
import string
from collections.abc import Sequence
from functools import partial

import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    AutoencoderKLHunyuanVideo,
    AutoencoderKLWan,
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    LlamaConfig,
    LlamaModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
)

GRID = (5, 9, 11)
PROMPT = "a red circle moves right"
NEGATIVE_PROMPT = "blurry"
TEXT_DIM = 16
TEXT_LENGTH = 41
T5_SIZES = {"d_model": TEXT_DIM, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}


def tiny_wan(
    *,
    two_transformers: bool = False,
    heads: int = 2,
    head_dim: int = 16,
    layers: int = 2,
    seed: int = 0,
) -> WanPipeline:
    """Wan text-to-video; Wan2.2 if `two_transformers`: the second one runs below timestep 875."""

    def transformer():
        return _lively(
            WanTransformer3DModel(
                num_attention_heads=heads,
                attention_head_dim=head_dim,
                text_dim=TEXT_DIM,
                freq_dim=16,
                ffn_dim=32,
                num_layers=layers,
            )
        )

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = _t5_tokenizer()
        config = UMT5Config(vocab_size=len(tokenizer), **T5_SIZES)
        return WanPipeline(
            tokenizer=tokenizer,
            text_encoder=UMT5EncoderModel(config).eval(),
            transformer=transformer(),
            transformer_2=transformer() if two_transformers else None,
            boundary_ratio=0.875 if two_transformers else None,
            vae=AutoencoderKLWan(base_dim=4, num_res_blocks=1).eval(),
            scheduler=UniPCMultistepScheduler(
                prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
            ),
        )


def tiny_hunyuan_video(
    *, heads: int = 2, head_dim: int = 16, layers: int = 1, seed: int = 0
) -> HunyuanVideoPipeline:
    """HunyuanVideo: `layers` dual-stream and `layers` single-stream blocks, one refiner layer.

    Its Llama tokenizer spells the head of the stock prompt template in the 95 tokens that the
    pipeline crops: exactly the prompt and its end mark remain, and each prompt has its own mask.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer, tokenizer_2 = _llama_tokenizer(), _clip_tokenizer()
        llama = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_DIM,
            intermediate_size=32,
            num_hidden_layers=3,
            num_attention_heads=2,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        clip = CLIPTextConfig(
            vocab_size=len(tokenizer_2),
            hidden_size=TEXT_DIM,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            pad_token_id=tokenizer_2.pad_token_id,
            bos_token_id=tokenizer_2.bos_token_id,
            eos_token_id=tokenizer_2.eos_token_id,
        )
        return HunyuanVideoPipeline(
            tokenizer=tokenizer,
            text_encoder=LlamaModel(llama).eval(),
            tokenizer_2=tokenizer_2,
            text_encoder_2=CLIPTextModel(clip).eval(),
            transformer=_lively(
                HunyuanVideoTransformer3DModel(
                    num_attention_heads=heads,
                    attention_head_dim=head_dim,
                    num_layers=layers,
                    num_single_layers=layers,
                    num_refiner_layers=1,
                    mlp_ratio=2.0,
                    text_embed_dim=TEXT_DIM,
                    pooled_projection_dim=TEXT_DIM,
                    rope_axes_dim=(head_dim // 4, head_dim // 8 * 3, head_dim // 8 * 3),
                )
            ),
            vae=AutoencoderKLHunyuanVideo(
                block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4
            ).eval(),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        )


def tiny_cogvideox(
    variant: str = "5b", *, heads: int = 2, head_dim: int = 16, layers: int = 2, seed: int = 0
) -> CogVideoXPipeline:
    """CogVideoX "2b" (sincos positions, DDIM), "5b" (rotary, DPM), "1.5" (two frames per token).

    As in the real one, the text of "2b" has one length: without `run`, pass
    `max_sequence_length=TEXT_LENGTH`.
    """
    frames, height, width = GRID
    differences = {
        "2b": {
            "sample_frames": 4 * frames - 3,
            "sample_height": 2 * height,
            "sample_width": 2 * width,
        },
        "5b": {"use_rotary_positional_embeddings": True},
        "1.5": {
            "use_rotary_positional_embeddings": True,
            "patch_size_t": 2,
            "patch_bias": False,
            "sample_height": 96,
            "sample_width": 170,
        },
    }[variant]
    scheduler = CogVideoXDDIMScheduler if variant == "2b" else CogVideoXDPMScheduler
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = _t5_tokenizer()
        config = T5Config(vocab_size=len(tokenizer), **T5_SIZES)
        return CogVideoXPipeline(
            tokenizer=tokenizer,
            text_encoder=T5EncoderModel(config).eval(),
            transformer=_lively(
                CogVideoXTransformer3DModel(
                    num_attention_heads=heads,
                    attention_head_dim=head_dim,
                    time_embed_dim=16,
                    text_embed_dim=TEXT_DIM,
                    num_layers=layers,
                    max_text_seq_length=TEXT_LENGTH,
                    **differences,
                )
            ),
            vae=AutoencoderKLCogVideoX(
                block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4
            ).eval(),
            scheduler=scheduler(
                prediction_type="v_prediction",
                rescale_betas_zero_snr=True,
                clip_sample=False,
                timestep_spacing="trailing",
                snr_shift_scale=3.0 if variant == "2b" else 1.0,
            ),
        )


FAMILIES = {
    "wan": tiny_wan,
    "wan2.2": partial(tiny_wan, two_transformers=True),
    "hunyuan_video": tiny_hunyuan_video,
    "cogvideox-2b": partial(tiny_cogvideox, "2b"),
    "cogvideox-5b": partial(tiny_cogvideox, "5b"),
    "cogvideox-1.5": partial(tiny_cogvideox, "1.5"),
}


def run(
    pipe: DiffusionPipeline,
    *,
    seed: int | Sequence[int] = 0,
    steps: int = 4,
    guidance: bool = True,
    grid: tuple[int, int, int] = GRID,
    prompt: str | list[str] = PROMPT,
    **kwargs,
) -> torch.Tensor:
    """Generate with `pipe` and return its latents, in the pipeline's own axis order.

    `grid` counts the transformer's video tokens (frames, height, width). A list of seeds gives
    each prompt of a batch its own noise. With `guidance`, Wan and HunyuanVideo (true CFG) run a
    second branch and CogVideoX doubles the batch. `kwargs` go to the pipeline and win.
    """
    single = isinstance(seed, int)
    generators = [torch.Generator().manual_seed(s) for s in ([seed] if single else seed)]
    prompts = [prompt] if isinstance(prompt, str) else prompt
    scale = "true_cfg_scale" if isinstance(pipe, HunyuanVideoPipeline) else "guidance_scale"
    arguments = {
        "prompt": prompts,
        "num_inference_steps": steps,
        "generator": generators[0] if single else generators,
        "max_sequence_length": TEXT_LENGTH,
        "output_type": "latent",
        scale: 5.0 if guidance else 1.0,
        **pixels(pipe, grid),
    }
    if guidance:
        arguments["negative_prompt"] = [NEGATIVE_PROMPT] * len(prompts)
    pipe.set_progress_bar_config(disable=True)
    return pipe(**arguments | kwargs).frames


def transformers(pipe: DiffusionPipeline) -> dict[str, torch.nn.Module]:
    """The denoisers of `pipe` by name: one, or two for Wan2.2."""
    names = ("transformer", "transformer_2")
    return {name: getattr(pipe, name) for name in names if getattr(pipe, name, None) is not None}


def pixels(pipe: DiffusionPipeline, grid: tuple[int, int, int] = GRID) -> dict[str, int]:
    """The size to ask of `pipe` so that its transformer sees `grid` video tokens."""
    config = pipe.transformer.config
    if isinstance(pipe, WanPipeline):
        frame_patch, patch, _ = config.patch_size
    else:
        frame_patch, patch = config.patch_size_t or 1, config.patch_size
    frames, height, width = grid
    return {
        "num_frames": (frames * frame_patch - 1) * pipe.vae_scale_factor_temporal + 1,
        "height": height * patch * pipe.vae_scale_factor_spatial,
        "width": width * patch * pipe.vae_scale_factor_spatial,
    }


def _lively(transformer: torch.nn.Module) -> torch.nn.Module:
    """Move norms off 1 and biases off 0, where mistakes hide, and sharpen attention."""
    with torch.no_grad():
        for parameter in transformer.parameters():
            if parameter.ndim == 1:
                parameter += 0.2 * torch.randn_like(parameter)
        for module in transformer.modules():
            if getattr(module, "norm_q", None) is not None:
                module.norm_q.weight *= 2
    return transformer.eval()


def _t5_tokenizer() -> T5Tokenizer:
    characters = string.ascii_letters + string.digits + string.punctuation
    vocab = [(token, 0.0) for token in ("<pad>", "</s>", "<unk>")]
    vocab += [(token, -math.log(len(characters) + 1)) for token in ("\u2581", *characters)]
    return T5Tokenizer(vocab=vocab, extra_ids=0)


def _clip_tokenizer() -> CLIPTokenizer:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = letters + [letter + "</w>" for letter in letters]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: index for index, token in enumerate(tokens)}, merges=[])


def _llama_tokenizer() -> PreTrainedTokenizerFast:
    begin, end, pad = "<|begin_of_text|>", "<|eot_id|>", "<pad>"
    special = [begin, end, pad, "<|start_header_id|>", "<|end_header_id|>"]
    words = pre_tokenizers.Split(Regex(r" ?\p{L}+|\n+|\S|\s"), "isolated")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    trainer = trainers.BpeTrainer(
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([DEFAULT_PROMPT_TEMPLATE["template"]], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[begin, "$A"], special_tokens=[(begin, tokenizer.token_to_id(begin))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=begin,
        eos_token=end,
        pad_token=pad,
        padding_side="right",
    )
