"""Tokenizer, text encoder and transformer of the tiny Wan pipeline, untrained."""

import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

PROMPT_TOKENS = 512  # what WanPipeline pads prompts to


def build_tokenizer(words):
    """A word-level, lower-casing tokenizer that ends every prompt with `</s>`."""
    vocabulary = {word: index for index, word in enumerate(["<pad>", "</s>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(
        Regex(r"\w+|[^\w\s]"), behavior="removed", invert=True
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        "$A </s>", special_tokens=[("</s>", 1)]
    )
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=PROMPT_TOKENS, **special
    )


def build_text_encoder(vocabulary_size):
    return UMT5EncoderModel(
        UMT5Config(
            vocab_size=vocabulary_size,
            d_model=128,
            d_kv=32,
            d_ff=256,
            num_layers=4,
            num_heads=4,
            dropout_rate=0.0,
            pad_token_id=0,
            eos_token_id=1,
            decoder_start_token_id=0,
        )
    )


def build_transformer(channels):
    """8 layers of 4 heads x 64: about 8 million parameters, initialised as Wan was."""
    transformer = WanTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=64,
        in_channels=channels,
        out_channels=channels,
        text_dim=128,
        ffn_dim=768,
        num_layers=8,
        cross_attn_norm=True,
    )
    for module in transformer.modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.xavier_uniform_(module.weight)
            torch.nn.init.zeros_(module.bias)
    for block in transformer.blocks:
        # About 500 of the 512 prompt tokens are padding: sharper logits let the words be heard.
        torch.nn.init.constant_(block.attn2.norm_q.weight, 1.5)
        torch.nn.init.constant_(block.attn2.norm_k.weight, 1.5)
    torch.nn.init.zeros_(transformer.proj_out.weight)
    return transformer


def encode_tokens(tokenizer, text_encoder, prompts):
    """Hidden states `[len(prompts), tokens, 128]` and the mask of real tokens."""
    tokens = tokenizer(
        prompts, padding=True, truncation=True, max_length=PROMPT_TOKENS, return_tensors="pt"
    ).to(text_encoder.device)
    ids, mask = tokens.input_ids, tokens.attention_mask
    return text_encoder(ids, mask).last_hidden_state, mask


def embed_prompts(tokenizer, text_encoder, prompts, tokens=PROMPT_TOKENS):
    """Prompts for a transformer, at the length it was trained with.

    Returns:
        `[len(prompts), tokens, 128]`, zero after the last real token (with 512 tokens, what
        WanPipeline makes of prompts), and the mask of real tokens, `[len(prompts), tokens]`.
    """
    hidden, mask = encode_tokens(tokenizer, text_encoder, prompts)
    hidden, mask = hidden[:, :tokens], mask[:, :tokens]
    missing = tokens - hidden.shape[1]
    hidden = F.pad(hidden * mask.unsqueeze(-1), (0, 0, 0, missing))
    return hidden, F.pad(mask, (0, missing))
