"""Tables and the drawing of the fidelity benchmark's data."""

import math
from collections import Counter
from html import escape
from itertools import product
from statistics import mean

import torch
from benchmark_tools import CHANGES

RESAMPLES = 10_000
PLOT, LEGEND = 500, 320  # widths
COLOURS = {"ours": "#1f77b4", "rival": "#d62728", "paper": "#2ca02c"}
HEADER = ["variant", "cost", "PSNR", "worst", "SSIM", "to the paper", "recall"]


def groups(data):
    """Runs with results by (witness, grid), in the order of the file."""
    found = {}
    for run in data["runs"]:
        if run["cases"]:
            found.setdefault((run["witness"], tuple(run["grid"])), []).append(run)
    return found


def rows_of(runs):
    """One row of texts under `HEADER` for each run of a group."""
    by_name = {run["variant"]: run for run in runs}
    rows = []
    for run in runs:
        cases = run["cases"]
        rows.append(
            [
                run["variant"],
                f"{_cost(run):.3f}",
                f"{_psnr(run):.2f}",
                f"{min(case['psnr'] for case in cases):.2f}",
                f"{mean(case['ssim'] for case in cases):.4f}",
                _difference(run, by_name.get(run["reference"])),
                _recall(cases),
            ]
        )
    return rows


def _recall(cases):
    """As estimated; where it was measured, in brackets, what it was and what it was sure to be."""

    def average(name):
        values = [case[name] for case in cases if case.get(name) is not None]
        return f"{mean(values):.3f}" if values else ""

    sampled, bound = average("recall_sampled"), average("recall_bound")
    return average("recall") + (f" ({sampled}, {bound})" if sampled else "")


def _difference(run, reference):
    """Mean paired difference of PSNR and its 95 % interval, over the cases that both have."""
    if reference is None or reference is run or run["config"] is None:
        return ""
    pairs = zip(run["cases"], reference["cases"])
    differences = [ours["psnr"] - theirs["psnr"] for ours, theirs in pairs]
    low, high = interval(differences)
    return f"{mean(differences):+.2f} [{low:+.2f}, {high:+.2f}]"


def interval(values):
    """95 % percentile bootstrap of the mean; the same values give the same interval."""
    values = torch.tensor(values, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randint(len(values), (RESAMPLES, len(values)), generator=generator)
    means = values[chosen].mean(1)
    return tuple(means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist())


def losses_in_8_bits(data):
    """Header and rows: how 8 bits change the PSNR of a preset, by witness and grid."""
    lines, places = {}, {}
    for place, runs in groups(data).items():
        by_name = {run["variant"]: run for run in runs}
        presets = [name for name in by_name if name.startswith("preset ")]
        for name, bits in product(presets, CHANGES):
            if changed := by_name.get(f"{name}, {bits}"):
                places[place] = _place(*place)
                lines.setdefault((name, bits), {})[place] = _difference(changed, by_name[name])
    rows = [
        [f"`{name.removeprefix('preset ')}`", bits, *(line.get(place, "-") for place in places)]
        for (name, bits), line in lines.items()
    ]
    return ["preset", "8 bits", *places.values()], rows


def _place(witness, grid):
    return f"{witness}, {' x '.join(map(str, grid))}"


def title_of(witness, grid, runs):
    tokens = grid[0] * grid[1] * grid[2]
    cases = {len(run["cases"]) for run in runs}
    count = f"{min(cases)} to {max(cases)}" if len(cases) > 1 else f"{max(cases)}"
    return f"{_place(witness, grid)} = {tokens:,} tokens, {count} cases"


def print_table(data):
    for (witness, grid), runs in groups(data).items():
        rows = [HEADER, *rows_of(runs)]
        widths = [max(map(len, column)) for column in zip(*rows)]
        print(f"\n{title_of(witness, grid, runs)}")
        for first, *rest in rows:
            cells = [first.ljust(widths[0]), *map(str.rjust, rest, widths[1:])]
            print("  ".join(cells).rstrip())


def drawing(data):
    """SVG of quality against cost: one panel for each witness and grid, a number for each run."""
    panels = groups(data)
    height = 13 * max(map(len, panels.values())) + 80
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{PLOT + LEGEND}" '
        f'height="{height * len(panels)}" font-family="sans-serif" font-size="10">',
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    for index, ((witness, grid), runs) in enumerate(panels.items()):
        # The noise floor is far above and costs 1: it is a line of text, not a dot.
        dots = [run for run in runs if run["config"] is not None]
        floor = [run for run in runs if run["config"] is None]
        title = title_of(witness, grid, runs)
        if floor:
            title += f"; noise floor {_psnr(floor[0]):.1f} dB"
        parts.append(f'<g transform="translate(0 {index * height})">')
        parts.append(f'<text x="40" y="18" font-size="13">{escape(title)}</text>')
        if dots:
            parts += _panel(dots, usual_steps(data), height)
        parts.append("</g>")
    return "\n".join([*parts, "</svg>"]) + "\n"


def usual_steps(data):
    """The denoising steps of most runs."""
    return Counter(run["steps"] for run in data["runs"]).most_common(1)[0][0]


def _psnr(run):
    return mean(case["psnr"] for case in run["cases"])


def _cost(run):
    return mean(case["cost"] for case in run["cases"])


def _panel(runs, steps, height):
    points = [(_cost(run), _psnr(run), run) for run in runs]
    lowest, highest = (f(y for _, y, _ in points) for f in (min, max))
    span, bottom = max(highest - lowest, 1.0), height - 40
    right = 0.1 * math.ceil(10 * max(cost for cost, _, _ in points) + 0.5)

    def x_at(cost):
        return 40 + (PLOT - 60) * cost / right

    def y_at(value):
        return bottom - 15 - (bottom - 60) * (value - lowest) / span

    lines = [
        f'<path d="M40 30V{bottom}H{PLOT - 20}" fill="none" stroke="#444"/>',
        f'<text x="{PLOT // 2 - 80}" y="{height - 8}">attention work relative to dense</text>',
        '<text x="8" y="34">dB</text>',
    ]
    for tenth in range(round(10 * right) + 1):
        lines.append(
            f'<text x="{x_at(tenth / 10) - 6:.0f}" y="{bottom + 14}">{tenth / 10:g}</text>'
        )
    for part in range(5):
        value = lowest + span * part / 4
        lines.append(f'<text x="8" y="{y_at(value) + 3:.0f}">{value:.1f}</text>')
    points.sort(key=lambda point: -point[1])
    for number, (cost, value, run) in enumerate(points, 1):
        kind = "rival" if run["rival"] else "paper" if run["variant"] == "paper" else "ours"
        few = "" if run["steps"] == steps else f", {run['steps']} steps"
        name = run["variant"] + (few if few not in run["variant"] else "")
        fill, x, y = f'fill="{COLOURS[kind]}"', x_at(cost), y_at(value)
        lines += [
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" {fill}/>',
            f'<text x="{x + 5:.1f}" y="{y + 3.5:.1f}" {fill}>{number}</text>',
            f'<text x="{PLOT}" y="{26 + 13 * number}" {fill}>{number}</text>',
            f'<text x="{PLOT + 20}" y="{26 + 13 * number}" {fill}>{escape(name)}</text>',
        ]
    return lines
