"""Ideas beyond the presets, patched into the library from outside: one function for each.

Each is a context manager. Those that spend a baseline's budget in another way take its `Probe`;
those whose cost depends on a number take that, and cost less the larger it is.
"""

import math
from bisect import bisect_right
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from unittest import mock

import torch

from dfsattn_diffusers import attention, curves, schedule, selection
from dfsattn_diffusers.kernels.prologue import pool_qk, pool_tiles, prepare_qkv
from dfsattn_diffusers.processors import base
from dfsattn_diffusers.state import DFSAttnState

LEAST, MOST = 0.5, 2.0  # of what a group kept before, about
NOISE = 0.01  # part of the greatest need that every group has
GOLDEN = 0.618  # multiples of it lie evenly
BLOCK = 128  # tokens


@contextmanager
def deciding(change):
    """`change(decision, state, layer, batch)` replaces what the schedule says of a sparse call."""
    decide = DFSAttnState.decide

    def changed(state, layer, batch):
        decision = decide(state, layer, batch)
        return decision if decision.reason else change(decision, state, layer, batch)

    with mock.patch.object(DFSAttnState, "decide", changed):
        yield


# Which calls have a share of the budget in common.


def of_layer(decision, layer, branch):
    return layer


def of_interval(decision, layer, branch):
    return decision.segment


def of_branch(decision, layer, branch):
    return branch


def budget_by_loss(probe, group):
    """What layers, intervals or branches keep follows what is lost if one alone keeps half."""
    return _rationed(probe, group, probe.losses(group))


def budget_by_error(probe, of_residual):
    """What layers keep follows their own errors in refreshes: dropped mass, or the residual."""
    return _rationed(probe, of_layer, probe.errors(of_residual))


@contextmanager
def _rationed(probe, group, need):
    """Make the sum of `need / kept` least at the baseline's total of kept blocks.

    Args:
        probe: Of the baseline.
        group: Of a call.
        need: Of each group, at what the baseline keeps.
    """
    work, calls = Counter(), Counter()
    for decision, layer, branch in probe.calls:
        at = group(decision, layer, branch)
        calls[at, layer, decision.keep_ratio] += 1
        work[at] += probe.budget(decision.keep_ratio)
    least = NOISE * max(need[at] for at in work)
    if len(work) < 2 or least <= 0:
        raise ValueError(f"nothing to share: needs {dict(need)}, blocks {dict(work)}")
    wish = {at: math.sqrt(max(need[at], least) / work[at]) for at in work}
    mean = sum(wish.values()) / len(wish)
    weight = {at: min(MOST, max(LEAST, wish[at] / mean)) for at in work}

    def share(at, layer, ratio, scale):
        # Blocks are whole: layers round at different places, so that the total has small steps.
        return min(1.0, ratio * weight[at] * scale + layer * GOLDEN % 1 / probe.blocks)

    low, high = LEAST / MOST, MOST / LEAST
    for _ in range(40):
        scale = (low + high) / 2
        kept = sum(count * probe.budget(share(*call, scale)) for call, count in calls.items())
        low, high = (scale, high) if kept <= sum(work.values()) else (low, scale)

    def change(decision, state, layer, batch):
        at = group(decision, layer, state.forward.position.branch)
        return replace(decision, keep_ratio=share(at, layer, decision.keep_ratio, low))

    with deciding(change):
        yield {str(at): round(weight[at] * low, 3) for at in sorted(weight)}


@contextmanager
def one_threshold(knob):
    """Budget over layers and steps: a block is kept where its error is above what is so in all."""
    highest = selection._keep_highest

    def keep(scores, kept_per_row, budget):
        if budget == "row":  # what a curve is chosen by
            return highest(scores, kept_per_row, budget)
        sure = max(1, int(kept_per_row * selection._ROW_FLOOR))
        return highest(scores, sure, "row") | (scores >= knob)

    with mock.patch.object(selection, "_keep_highest", keep):
        yield


@contextmanager
def refresh_on_drift(knob, drift):
    """Each layer refreshes when its pooled queries and keys, or its map, have drifted so far."""
    attend, marks, projections = base.LayerProcessor.attend_now, {}, []

    def look(processor, streams, rotary, *masks):
        projections[:] = streams, rotary
        return attend(processor, streams, rotary, *masks)

    def change(decision, state, layer, batch):
        device, key = projections[0][0].q.device, state._key(layer, batch)
        layout, text = state.layout(device), state.forward.text_lengths(device)
        lengths = layout.lengths(layout.tile_size, text)
        tiles = pool_qk(*projections, layout.target(), lengths)
        cached = state._cached(layer, batch)
        if drift is map_drift:
            tiles = _map_of(tiles, layout, text, decision.keep_ratio)
        # The one wait for the device.
        if cached is not None and float(drift(tiles, marks[key])) <= knob:
            return replace(decision, mode="reuse", segment=cached.segment)
        marks[key] = tiles
        segment = 0 if cached is None else cached.segment + 1
        return replace(decision, mode="refresh", segment=segment)

    with mock.patch.object(base.LayerProcessor, "attend_now", look), deciding(change):
        yield


def tile_drift(now, before):
    """Of pooled queries and keys, squared and relative."""
    parts = [(x - y).square().sum() / y.square().sum() for x, y in zip(now, before)]
    return sum(parts) / len(parts)


def map_drift(now, before):
    """Part of the kept blocks that are no longer kept."""
    return 1 - (now & before).sum() / before.sum()


def _map_of(tiles, layout, text, keep_ratio):
    """What the layer would keep by mass along the first curve, a stand-in for its own."""
    scores = attention._score(*tiles, layout, text)[..., : layout.video_key_blocks]
    kept = selection.row_budget(keep_ratio, layout.video_key_blocks)
    return selection._keep_highest(scores, kept, "row")


@contextmanager
def second_moment_scores(probe, of_queries):
    """Blocks are scored by a tile's mean logit and half its logits' variance.

    Of independent dimensions that is of keys `q^2 var(k)`, of pairs `E q^2 E k^2 - q^2 k^2`: a
    product of longer tiles, so that scoring stays as it is.
    """

    def augmented(q, k, lengths):
        half, (q_mean, k_mean) = q.shape[-1] ** -0.5 / 2, (pool_tiles(x, lengths) for x in (q, k))
        q_square, k_square = (pool_tiles(x.float().square(), lengths) for x in (q, k))
        if of_queries:
            q_parts = q_mean, q_square, q_mean.square()
            k_parts = k_mean, half * k_square, -half * k_mean.square()
        else:
            q_parts = q_mean, q_mean.square()
            k_parts = k_mean, half * (k_square - k_mean.square())
        # Scores are scaled by the length of a tile.
        return math.sqrt(len(q_parts)) * torch.cat(q_parts, -1), torch.cat(k_parts, -1)

    def pool(streams, rotary, source, lengths):
        x = prepare_qkv(streams, rotary, source)
        return augmented(x.q, x.k, lengths)

    def prepare(*args, tile_lengths=None, **options):
        x = prepare_qkv(*args, **options)
        if tile_lengths is None:
            return x
        q_tiles, k_tiles = augmented(x.q, x.k, tile_lengths)
        return replace(x, q_tiles=q_tiles, k_tiles=k_tiles)

    with mock.patch.multiple(attention, pool_qk=pool, prepare_qkv=prepare):
        yield


@contextmanager
def last_refresh_at_the_end(probe):
    """The last step is dense: intervals between refreshes are stretched until one lies there."""
    steps_of = schedule.refresh_steps

    def moved(config, num_steps):
        first, *_, last = due = steps_of(config, num_steps)
        factor = (num_steps - 1 - first) / (last - first)
        return tuple(first + round((step - first) * factor) for step in due)

    with mock.patch.object(schedule, "refresh_steps", moved):
        yield


def staggered(probe, group):
    """Residuals are renewed between dense steps: half of the layers, or a branch, at a time.

    Half of the groups refresh a quarter of an interval earlier, the others a quarter later.
    """
    names = sorted({group(*call) for call in probe.calls})
    if len(names) < 2:
        raise ValueError(f"nothing to stagger: {group.__name__} knows {names} alone")

    def change(decision, state, layer, batch):
        position = state.forward.position
        side = names.index(group(decision, layer, position.branch)) % 2 - 0.5
        due = schedule.refresh_steps(state.settings, position.num_steps)
        own = [due[0], *(step + side * (step - past) / 2 for past, step in zip(due, due[1:]))]
        segment, cached = bisect_right(own, position.step) - 1, state._cached(layer, batch)
        mode = "reuse" if cached is not None and cached.segment == segment else "refresh"
        return replace(decision, mode=mode, segment=segment)

    return deciding(change)


@contextmanager
def other_hilbert(probe, curve):
    """Another space-time curve: other axes first, or one made for sizes that are awkward."""
    with mock.patch.dict(curves._CURVES, hilbert3d=curve):
        curves.visiting_order.cache_clear()
        try:
            yield
        finally:
            curves.visiting_order.cache_clear()


def width_first(f, h, w, grid):
    """Hilbert's curve with its axes the other way round."""
    return curves._hilbert_index([w, h, f])


def height_first(f, h, w, grid):
    """Hilbert's curve with its axes moved on by one."""
    return curves._hilbert_index([h, w, f])


def stretched(f, h, w, grid):
    """Generalised: every axis fills the cube, so that none ends in a slice of its own."""
    side = 1 << max(size - 1 for size in grid).bit_length()
    return curves._hilbert_index([x * side // size for x, size in zip((f, h, w), grid)])


def squeezed(f, h, w, grid):
    """Generalised: every axis has the nearest multiple of 4 places; tokens of one stay together."""
    places = [max(4, 4 * round(size / 4)) for size in grid]
    index = curves._hilbert_index([x * n // s for x, n, s in zip((f, h, w), places, grid)])
    return index * len(f) + curves._raster(f, h, w, grid)


def halved(f, h, w, grid):
    """No curve: boxes, halved across their longest side, at whole blocks, down to one token."""
    axes, order, sizes = torch.stack([f, h, w]), torch.arange(f.numel()), torch.tensor([f.numel()])
    while sizes.max() > 1:
        box = torch.repeat_interleave(torch.arange(len(sizes)), sizes)
        x = axes[:, order]
        low, high = (
            x.new_full((3, len(sizes)), start).scatter_reduce(1, box.expand_as(x), x, how)
            for how, start in (("amin", max(grid)), ("amax", 0))
        )
        key = box
        for axis in torch.argsort(low - high, dim=0, stable=True):  # the longest first
            key = key * max(grid) + x.gather(0, axis[box][None])[0]
        order = order[key.argsort()]
        blocks = -(-sizes // BLOCK)
        power = 2 ** torch.log2((sizes - 1).clamp(min=1)).floor().long()
        first = torch.where(sizes > BLOCK, (blocks + 1) // 2 * BLOCK, power)
        sizes = torch.stack([first, sizes - first], 1).flatten()
        sizes = sizes[sizes > 0]
    return curves.inverse_order(order)


def unchanged(probe):
    """The config says it all."""
    return deciding(lambda decision, *_: decision)
