"""What the training scripts do by themselves: optimizer, few words, several processes."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPTS = Path(__file__).parents[1] / "scripts"
sys.path.insert(0, str(SCRIPTS))
from clip_trainer import LATENT_FRAMES, optimizers_of, stages  # noqa: E402
from muon import Muon, orthogonalise  # noqa: E402
from procedural_clips import PLAIN, RICH, ClipSource  # noqa: E402
from tiny_wan_models import build_transformer, embed_prompts  # noqa: E402
from witness_families import MOST_WORDS, Wan  # noqa: E402
from witnesses import load_tiny_parts  # noqa: E402

CPU = torch.device("cpu")


@pytest.mark.parametrize("shape", [(3, 32, 96), (2, 96, 32), (4, 48, 48)])
def test_singular_values_come_near_one(shape):
    count, least = shape[0], min(shape[1:])
    left, right = (torch.randn(count, size, least) for size in shape[1:])
    values = torch.linspace(0.1, 1, least).diag()
    stack = torch.linalg.qr(left).Q @ values @ torch.linalg.qr(right).Q.mT
    values = torch.linalg.svdvals(orthogonalise(7 * stack).float())
    assert values.min() > 0.6 and values.max() < 1.3


def test_muon_steps_as_torch_does_one_by_one():
    shapes = [(32, 96), (32, 32), (32, 96), (96, 32)]
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    theirs = [torch.nn.Parameter(x.detach().clone()) for x in ours]
    stacked = Muon(ours, lr=0.1, weight_decay=0.01)
    single = torch.optim.Muon(theirs, lr=0.1, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    start = [x.detach().clone() for x in ours]
    for _ in range(3):
        for x, y in zip(ours, theirs):
            x.grad = torch.randn_like(x)
            y.grad = x.grad.clone()
        stacked.step()
        single.step()
    for x, y, before in zip(ours, theirs, start):
        # Both round to bf16, in another order; small singular values feel it most.
        assert (x - y).norm() < 0.08 * (x - before).norm()


def test_every_weight_has_one_optimizer():
    transformer = build_transformer(8)
    muon, adamw = optimizers_of(transformer)
    groups = [group["params"] for group in (*muon.param_groups, *adamw.param_groups)]
    taken = [id(x) for group in groups for x in group]
    assert sorted(taken) == sorted(map(id, transformer.parameters()))
    assert all(x.ndim == 2 for group in muon.param_groups for x in group["params"])


def test_captions_are_shorter_than_the_words_that_training_sees():
    tokenizer, *_ = load_tiny_parts(CPU)
    scenes = [scene for world in (PLAIN, RICH) for scene in ClipSource(0, CPU, world).scenes(2000)]
    captions = [scene.caption for scene in scenes]
    assert max(map(len, tokenizer(captions).input_ids)) < MOST_WORDS


def test_few_words_give_the_loss_of_all_the_padding(monkeypatch):
    """Against the stock cross-attention to 512 tokens."""
    tokenizer, text_encoder, _ = load_tiny_parts(CPU)
    prompts = ["a red circle moves right over a green background", "", "a large blue star turns"]
    with torch.no_grad():
        text = embed_prompts(tokenizer, text_encoder, prompts)
    torch.manual_seed(0)
    transformer = build_transformer(8)
    torch.nn.init.normal_(transformer.proj_out.weight, std=0.3)
    latents, logit = torch.randn(3, 8, 3, 8, 8), torch.randn(3)

    def loss():
        torch.manual_seed(1)
        with torch.no_grad():
            return Wan().loss(transformer, latents, logit, *text)

    with monkeypatch.context() as patch:
        patch.setattr(Wan, "_shorten", lambda self, transformer, text, mask: text)
        stock = loss()
    # All else equal, other words change it by more.
    text = text[0].flip(0), text[1].flip(0)
    others = loss()
    text = text[0].flip(0), text[1].flip(0)
    assert abs(loss() - stock) < 2e-3 * stock < abs(others - stock)


def test_batches_of_a_stage_have_about_as_many_tokens():
    for _, grids, pixels, *_ in stages(1, 1, 1, 1):
        counts = []
        for frames, height, width in grids:
            latents = (frames + 1) // 2
            assert latents <= LATENT_FRAMES
            counts.append(pixels // (latents * height * width) * latents * height * width)
        assert min(counts) > 0.9 * max(counts)


def test_processes_agree_and_share_gradients(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(
        "import torch\n"
        "from training_tools import agreed, average_gradients, join, rank\n"
        "join()\n"
        "x, unused = (torch.nn.Parameter(torch.zeros(2, 3)) for _ in range(2))\n"
        "x.grad = torch.full((2, 3), float(rank()))\n"
        "average_gradients([x, unused])\n"
        "assert (x.grad == 0.5).all(), x.grad\n"
        "assert agreed(rank() + 7.0) == 7.0\n"
        f"open(r'{tmp_path}/' + str(rank()), 'w')\n"
    )
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [sys.executable, *command, str(script)], capture_output=True, text=True, timeout=120,
        env={"PYTHONPATH": str(SCRIPTS), "OMP_NUM_THREADS": "1", "PATH": ""},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "0").exists() and (tmp_path / "1").exists()
