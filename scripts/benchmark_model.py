"""Time whole video transformers, dense and with DFSAttn, and add the steps up to whole runs.

Weights and inputs are random, shapes and calls those of the published models. A step is all calls
of the transformer in one denoising step; what is not right is not timed. Every number is written as
soon as it is there: run again to go on where time was up. See `dfsattn_diffusers.schedule`.
"""

import gc
import statistics
import sys
import time
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser
from contextlib import ExitStack
from pathlib import Path

import torch
from benchmark_tools import BASELINES, CHANGES, OutOfTime, Record, config_named, milliseconds
from diffusers.models.attention_dispatch import attention_backend
from model_report import profile_rows
from step_profile import profile
from video_models import MODELS, TINY, Denoising

from dfsattn_diffusers import enable_dfsattn, list_presets
from dfsattn_diffusers.schedule import decisions

# Reaches less than the presets' `min_tokens`, blocks that suit it, and few steps like many.
TINY_CHANGES = dict(
    min_tokens=0, tile_size=8, query_block=32, key_block=32, tail_pool=16, few_step_ratios=None
)  # fmt: skip


def config_of(label, tiny):
    """What the label names, or the same at sizes that suit models of no size."""
    return config_named(label).replace(**TINY_CHANGES if tiny else {})


def baseline(run, name):
    """Context of a dense baseline."""
    backend, trimmed = BASELINES[name]
    # Or the recompilations for all baselines would add up to dynamo's limit.
    torch.compiler.reset()
    stack = ExitStack()
    stack.enter_context(attention_backend(backend))
    if trimmed:
        stack.enter_context(run.trimmed())
    return stack


def baselines_of(run):
    """Names of the baselines that exist here and differ."""
    names = set(BASELINES)
    if run.family.valid_text is None:
        names.remove("dense, as shipped")
    if not torch.cuda.is_available():
        names.remove("dense, cuDNN")
    return [name for name in BASELINES if name in names]


def gate(run, changes):
    """Exit unless keeping every block errs no more than twice as much as another dense kernel."""
    gpu = torch.cuda.is_available()
    videos = []
    for backend in ("_native_cudnn", "_native_flash") if gpu else ("native", "_native_math"):
        torch.compiler.reset()
        with attention_backend(backend), run.trimmed():
            videos.append([x.float().cpu() for x in run.step(0)])
    torch.compiler.reset()
    with enable_dfsattn(run, dict(dense_fraction=0, keep_ratios=(1.0,)), **changes) as handle:
        ours = [x.float().cpu() for x in run.step(0)]
        calls = handle.state.report().runs[-1].calls
    if calls["dense"] or not calls["refresh"]:
        sys.exit(f"keeping everything ran {calls}; nothing was timed")

    def error(outputs):
        pairs = list(zip(outputs, videos[0]))
        return max(float((x - y).norm() / y.norm()) for x, y in pairs)

    finite = all(x.isfinite().all() for x in (*videos[0], *ours))
    result = dict(ours=error(ours), other_dense=error(videos[1]))
    # Two kernels may agree by chance to the last bit; one rounding is always allowed.
    allowed = 2 * max(result["other_dense"], torch.finfo(run.transformer.dtype).eps)
    if not (finite and result["ours"] <= allowed):
        sys.exit(f"error to dense {result}, allowed {allowed:.2e}, finite {finite}; not timed")
    return result


def plan(config, steps):
    """What each step does: "dense", or "refresh 0.3", "reuse 0.3", as the schedule decides."""
    return [
        "dense" if now.mode == "dense" else f"{now.mode} {now.keep_ratio:g}"
        for now in decisions(config, steps)
    ]


def warm_ups(kinds):
    """One kind per mode: keep ratios share kernels, but a reuse needs the map just before it."""
    reuse = next((i for i, kind in enumerate(kinds) if kind.startswith("reuse")), len(kinds))
    return list({kind.split()[0]: kind for kind in kinds[: reuse + 1]}.values())


def key_of(kind, preset, config):
    """Under what a kind of step is kept; dense ones of a precision are alike in all presets."""
    if kind != "dense":
        return f"{preset} {kind}"
    precision = config.dense_precision
    return "ours dense" if precision == "full" else f"ours dense, {precision}"


def sample(run, preset, config, steps, record):
    """Time the first step of each kind, in order, until there are enough samples of all."""
    record.follow(preset, config.to_dict())
    kinds = plan(config, steps)
    first = {kind: kinds.index(kind) for kind in kinds}
    keys = {kind: key_of(kind, preset, config) for kind in first}
    if not any(map(record.lacks, keys.values())):
        return
    # Dense steps cost most and are the same with every preset.
    if "dense" in first and not record.lacks(keys["dense"]):
        del first["dense"]
    torch.compiler.reset()
    with enable_dfsattn(run, config), record.peak_memory(preset):
        for kind in warm_ups(list(first)):
            record.check_time()
            run.step(first[kind])
        while any(map(record.lacks, keys.values())):
            for kind, step in first.items():
                if kind != "dense" or record.lacks(keys[kind]):
                    record.time(keys[kind], lambda step=step: run.step(step))


def sample_dense(run, record):
    for name in filter(record.lacks, baselines_of(run)):
        with baseline(run, name), record.peak_memory(name):
            record.check_time()
            run.step(0)
            while record.lacks(name):
                record.time(name, lambda: run.step(0))


def composed(run, preset, config, steps, record):
    """Seconds of a whole run, from its steps: of each baseline, and ours."""
    ms = {key: statistics.median(samples) for key, samples in record.data["ms"].items()}
    kinds = plan(config, steps)
    ours = sum(ms[key_of(kind, preset, config)] for kind in kinds)
    seconds = {name: steps * ms[name] for name in baselines_of(run)} | {"ours": ours}
    return {name: value / 1000 for name, value in seconds.items()}


def whole(run, configs, steps, record):
    """Really run all steps, scheduler included, with each preset; dense steps are all alike."""
    times = record.data.setdefault("whole_run_s", {})
    for name, config in configs.items():
        if name in times:
            continue
        record.check_time()
        torch.compiler.reset()
        with enable_dfsattn(run, config):
            for step in (0, steps - 1):
                run.step(step)
            times[name] = milliseconds(run.whole_run, 1, warmup=0) / 1000
        if not run.latents.isfinite().all():
            sys.exit(f"the whole run, {name}, is not finite")
        record.save()


def profile_steps(run, name, configs, steps, record):
    """What a step's time goes into: of the best dense baseline, and of each kind of ours."""
    best, parts = baselines_of(run)[-1], record.data.get("profile", {})
    if best not in parts:
        with baseline(run, best):
            dense = profile(run, 0)
        record.save(profile=parts | {best: {"dense": dense}})
    for label, config in configs.items():
        record.check_time()
        record.follow(label, config.to_dict())
        kinds = plan(config, steps)
        torch.compiler.reset()
        with enable_dfsattn(run, config):
            ours = {kind: profile(run, kinds.index(kind)) for kind in dict.fromkeys(kinds)}
        record.save(profile=record.data["profile"] | {label: ours})
    for label in (best, *configs):
        for row in profile_rows(name, label, record.data["profile"][label]):
            print(f"| {' | '.join(row)} |", flush=True)


def benchmark(model, name, args):
    """Measure one model, as far as time allows, and print what is complete."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    changes = TINY_CHANGES if args.tiny else {}
    labels = [f"{preset}, {args.change}" if args.change else preset for preset in args.presets]
    configs = {label: config_of(label, args.tiny) for label in labels}
    record = Record(args.output, name, args.deadline, args.iters)
    record.check_time()
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    run = Denoising(model, device, dtype, args.steps)
    if args.compile:
        run.compile_blocks(args.compile)
    record.save(source=run.model.source, size=run.model.size, steps=args.steps)
    if "gate" not in record.data:
        record.save(gate=gate(run, changes))
    if args.profile:
        profile_steps(run, name, configs, args.steps, record)
        return
    sample_dense(run, record)
    for preset, config in configs.items():
        sample(run, preset, config, args.steps, record)
        runs = record.data.get("composed_s", {})
        runs[preset] = composed(run, preset, config, args.steps, record)
        record.save(composed_s=runs)
        print_row(name, preset, runs[preset])
    if args.whole_run:
        whole(run, configs, args.steps, record)
        for preset in configs:
            print(f"{name}, {preset}, really run: {record.data['whole_run_s'][preset]:.1f} s")


def print_row(name, preset, seconds):
    ours = seconds["ours"]
    dense = (f"{k} {v:.1f} s, x{v / ours:.2f}" for k, v in seconds.items() if k != "ours")
    print(f"| {name} | {preset} | {ours:.1f} s | {'; '.join(dense)} |", flush=True)


def main(argv=None):
    parser = ArgumentParser(description=__doc__, formatter_class=ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--models", nargs="+", choices=MODELS, default=list(MODELS), help="what to time")
    add("--presets", nargs="+", choices=list_presets(), default=["paper"], help="of DFSAttn")
    add("--change", choices=CHANGES, help="of the presets: attention in 8 bits, dense and sparse")
    add("--steps", type=int, default=50, help="denoising steps of a whole run")
    add("--iters", type=int, default=3, help="samples of each kind of step")
    add("--seconds", type=float, default=540, help="begin nothing new after so long")
    add("--whole-run", action="store_true", help="also really run all steps with each preset")
    add("--compile", nargs="?", const="inductor", metavar="BACKEND",
        help="torch.compile the blocks, dense and sparse, each as one graph")
    add("--profile", action="store_true", help="instead, measure where a step's time goes")
    add("--tiny", action="store_true", help="the same on models of no size, also without a GPU")
    add("--output", type=Path, default=Path("benchmarks/model.json"), help="JSON, added to")
    args = parser.parse_args(argv)
    if not (args.tiny or torch.cuda.is_available()):
        parser.error("this needs a CUDA GPU, and torch sees none; --tiny does not")
    args.deadline = time.monotonic() + args.seconds
    models = TINY if args.tiny else MODELS
    print("| model | preset | ours | dense, speed-up |\n|---|---|---|---|")
    try:
        for name in args.models:
            if name in models:
                title = f"{name}, compiled" if args.compile else name
                benchmark(models[name], title, args)
                gc.collect()
                torch.cuda.empty_cache()
    except OutOfTime:
        print(f"{args.seconds:g} s are over; run again to go on", file=sys.stderr)


if __name__ == "__main__":
    main()
