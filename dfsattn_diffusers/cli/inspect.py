"""Generate once and look inside: recall, its estimate and its bound, by layer, head and step."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline

from dfsattn_diffusers import enable_dfsattn, list_presets
from dfsattn_diffusers.analysis import (
    MEASURES,
    AttentionRecord,
    average,
    record_attention,
    to_rows,
)
from dfsattn_diffusers.cli.demo import TINY_WAN, table
from dfsattn_diffusers.cli.pictures import block_map, heat_map
from dfsattn_diffusers.cli.video import write_image
from dfsattn_diffusers.configs.presets import DEFAULT_PRESET

_COLUMNS = ("density", "recall", "estimate", "error", "bound", "bound_convex", "bound_tiles")
_LAYER = ("model", "layer")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m dfsattn_diffusers.cli.inspect",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--model", default=str(TINY_WAN), help="pipeline folder or hub id")
    parser.add_argument(
        "--prompt", default="a large orange square bounces over a blue background", help="a caption"
    )
    parser.add_argument("--seed", type=int, default=1, help="of the noise and of the samples")
    parser.add_argument("--steps", type=int, default=16, help="denoising steps")
    parser.add_argument("--guidance", type=float, default=4.0, help="guidance scale; 1 is off")
    parser.add_argument(
        "--preset", default=DEFAULT_PRESET, choices=list_presets(), help="sparse attention preset"
    )
    parser.add_argument("--height", type=int, default=128, help="pixels")
    parser.add_argument("--width", type=int, default=128, help="pixels")
    parser.add_argument("--frames", type=int, default=33, help="frames")
    parser.add_argument("--queries", type=int, default=4, help="query blocks measured per call")
    parser.add_argument("--layer", type=int, default=0, help="layer of the block map pictures")
    parser.add_argument("--head", type=int, default=0, help="head of the block map pictures")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="torch device"
    )
    parser.add_argument("--output", type=Path, default=Path("outputs/inspect"), help="folder")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    dtype = torch.bfloat16 if args.device.startswith("cuda") else torch.float32
    pipe = DiffusionPipeline.from_pretrained(args.model, dtype=dtype).to(args.device)
    with enable_dfsattn(pipe, args.preset) as handle:
        views = [(args.layer, args.head)]
        with record_attention(handle, queries=args.queries, seed=args.seed, views=views) as records:
            pipe(
                args.prompt,
                height=args.height,
                width=args.width,
                num_frames=args.frames,
                num_inference_steps=args.steps,
                guidance_scale=args.guidance,
                generator=torch.Generator("cpu").manual_seed(args.seed),
                output_type="latent",
            )
        run = handle.report().runs[-1]
    if not records:
        raise SystemExit(f"No attention call was sparse, so there is nothing to inspect.\n{run}")

    rows = to_rows(records)
    args.output.mkdir(parents=True, exist_ok=True)
    write_json(args.output / "recall.json", args, handle.state.settings.to_dict(), rows)
    written = [args.output / "recall.json", *draw(args.output, records, rows)]
    print(f"prompt: {args.prompt}\n{args.steps} steps, preset {args.preset}, seed {args.seed}")
    print(f"{len(records)} sparse calls, {args.queries} query blocks measured in each\n")
    print(layer_table(rows))
    if not any(record.views for record in records):
        print(f"\nlayer {args.layer} had no sparse call, so no block map of it was drawn")
    print("\n" + "\n".join(f"wrote {path}" for path in written))


def write_json(path: Path, args: argparse.Namespace, config: dict, rows: list[dict]) -> None:
    """Everything behind the pictures, as plain data."""
    names = ("density", *MEASURES, "error")
    columns = {name: average(rows, name, by=_LAYER) for name in names}
    layers = [
        {"model": model, "layer": layer, **{name: columns[name][model, layer] for name in names}}
        for model, layer in columns["recall"]
    ]
    run = {key: str(v) if isinstance(v, Path) else v for key, v in vars(args).items()}
    content = {"run": run, "config": config, "layers": layers, "records": rows}
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def layer_table(rows: list[dict[str, Any]]) -> str:
    """Means of every layer, and of all, as text."""
    columns = [average(rows, name, by=_LAYER) for name in _COLUMNS]
    total = [average(rows, name, by=())[()] for name in _COLUMNS]
    labels = _layer_labels(rows)
    lines = [("layer", *_COLUMNS)]
    lines += [(labels[key], *(f"{c[key]:.4f}" for c in columns)) for key in columns[0]]
    return table([*lines, ("all", *(f"{value:.4f}" for value in total))])


def draw(folder: Path, records: Sequence[AttentionRecord], rows: list[dict]) -> list[Path]:
    """Write all pictures; returns their paths."""
    steps = [(step,) for step in range(records[0].position.num_steps)]
    heads = sorted({(row["head"],) for row in rows})
    pictures = {}
    for name, title in (("recall", "recall"), ("error", "estimate less recall")):
        pictures[f"{name}_layer_step"] = _layer_map(rows, name, title, "step", steps)
        pictures[f"{name}_layer_head"] = _layer_map(rows, name, title, "head", heads)
    viewed = [record for record in records if record.views]
    for record in {r.position.step: r for r in (viewed[:1] + viewed[-1:])}.values():
        for head, view in record.views.items():
            where = f"layer {record.layer}, head {head}, step {record.position.step}"
            name = f"map_layer{record.layer}_head{head}_step{record.position.step}"
            recall = float(record.measures.recall[0, head].mean())
            pictures[name] = block_map(
                view.mask[0].numpy(),
                view.scores[0].numpy(),
                title=f"{where}: recall {recall:.2f}, density {float(record.density[0, head]):.2f}",
                row_lines=[slot / view.query_block for slot in view.frames],
                column_lines=[slot / view.key_block for slot in view.frames],
                text_row=view.text and view.text / view.query_block,
                text_column=view.text and view.text / view.key_block,
            )
    for name, picture in pictures.items():
        write_image(folder / f"{name}.png", picture)
    return [folder / f"{name}.png" for name in pictures]


def _layer_map(
    rows: list[dict], name: str, title: str, column: str, columns: Sequence[tuple]
) -> np.ndarray:
    means, labels = average(rows, name, by=(*_LAYER, column)), _layer_labels(rows)
    values = [[means.get((*key, *c), np.nan) for c in columns] for key in labels]
    return heat_map(
        np.array(values),
        title=f"{title} by layer and {column}",
        row_axis="layer",
        column_axis=column,
        row_labels=list(labels.values()),
        column_labels=[str(c) for (c,) in columns],
    )


def _layer_labels(rows: list[dict]) -> dict[tuple[str, int], str]:
    """Layers by number, and by transformer where there are two."""
    layers = sorted({(row["model"], row["layer"]) for row in rows})
    alone = len({model for model, _ in layers}) == 1
    return {key: str(key[1]) if alone else f"{key[0]} {key[1]}" for key in layers}


if __name__ == "__main__":
    main()
