"""Tables and the drawing of the fidelity benchmark's data."""

from html import escape
from statistics import mean

import torch

RESAMPLES = 10_000
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
        recalls = [case["recall"] for case in cases if case["recall"] is not None]
        rows.append(
            [
                run["variant"],
                f"{mean(case['cost'] for case in cases):.3f}",
                f"{mean(case['psnr'] for case in cases):.2f}",
                f"{min(case['psnr'] for case in cases):.2f}",
                f"{mean(case['ssim'] for case in cases):.4f}",
                _difference(run, by_name.get(run["reference"])),
                f"{mean(recalls):.3f}" if recalls else "",
            ]
        )
    return rows


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


def title_of(witness, grid, runs):
    tokens = grid[0] * grid[1] * grid[2]
    cases = {len(run["cases"]) for run in runs}
    count = f"{min(cases)} to {max(cases)}" if len(cases) > 1 else f"{max(cases)}"
    return f"{witness}, {' x '.join(map(str, grid))} = {tokens:,} tokens, {count} cases"


def print_table(data):
    for (witness, grid), runs in groups(data).items():
        rows = [HEADER, *rows_of(runs)]
        widths = [max(map(len, column)) for column in zip(*rows)]
        print(f"\n{title_of(witness, grid, runs)}")
        for first, *rest in rows:
            cells = [first.ljust(widths[0]), *map(str.rjust, rest, widths[1:])]
            print("  ".join(cells).rstrip())


def drawing(data, width=760, height=460):
    """SVG of quality against cost: one panel for each witness and grid, every variant a dot."""
    panels = groups(data)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" '
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
        parts.append(f'<text x="50" y="18" font-size="13">{escape(title)}</text>')
        if dots:
            parts += _panel(dots, width, height)
        parts.append("</g>")
    return "\n".join([*parts, "</svg>"]) + "\n"


def _psnr(run):
    return mean(case["psnr"] for case in run["cases"])


def _panel(runs, width, height):
    points = [(mean(case["cost"] for case in run["cases"]), _psnr(run), run) for run in runs]
    lowest, highest = (f(y for _, y, _ in points) for f in (min, max))
    span = max(highest - lowest, 1.0) * 1.1

    def x_at(cost):
        return 50 + (width - 260) * min(cost, 1.0)

    def y_at(value):
        return height - 50 - (height - 90) * (value - lowest + 0.05 * span) / span

    lines = [
        f'<path d="M50 30V{height - 40}H{width - 210}" fill="none" stroke="#444"/>',
        f'<text x="{width // 2 - 130}" y="{height - 10}">attention work relative to dense</text>',
        '<text x="6" y="30">dB</text>',
    ]
    for tenth in range(0, 11, 2):
        x = x_at(tenth / 10)
        lines.append(f'<text x="{x:.0f}" y="{height - 26}">{tenth / 10:g}</text>')
    for part in range(5):
        value = lowest + (highest - lowest) * part / 4
        lines.append(f'<text x="16" y="{y_at(value) + 3:.0f}">{value:.1f}</text>')
    lines += _labelled(points, x_at, y_at, height)
    return lines


def _labelled(points, x_at, y_at, height):
    """Dots, each with its name at the right, names pushed apart where they would overlap."""
    lines, below = [], 30.0
    for cost, value, run in sorted(points, key=lambda point: -point[1]):
        x, y = x_at(cost), y_at(value)
        below = max(y + 3, below + 11)
        kind = "rival" if run["rival"] else "paper" if run["variant"] == "paper" else "ours"
        few = "" if run["steps"] == 50 else f", {run['steps']} steps"
        name = run["variant"] + (few if few not in run["variant"] else "")
        lines += [
            f'<path d="M{x + 4:.1f} {y:.1f}L{x + 16:.1f} {below - 3:.1f}" stroke="#ccc"/>',
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{COLOURS[kind]}"/>',
            f'<text x="{x + 18:.1f}" y="{below:.1f}" fill="{COLOURS[kind]}">{escape(name)}</text>',
        ]
    return lines
