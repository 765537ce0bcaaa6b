"""Where every token of one transformer forward lies, in the model's order and in curve order."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .curves import inverse_order, visiting_order


@dataclass(frozen=True)
class TokenGeometry:
    """The tokens of one forward as the model lays them out.

    Attributes:
        grid: Frames, height and width of the video, in tokens.
        text_tokens: Text tokens in the same sequence, padding included; 0 without joint text.
        text_first: Whether text precedes the video.
    """

    grid: tuple[int, int, int]
    text_tokens: int = 0
    text_first: bool = False

    @property
    def video_tokens(self) -> int:
        return math.prod(self.grid)

    @property
    def tokens(self) -> int:
        return self.video_tokens + self.text_tokens

    def slots(self, block: int) -> int:
        """Rows in curve order: video and text, each padded to whole blocks."""
        return _padded(self.video_tokens, block) + _padded(self.text_tokens, block)


@dataclass(frozen=True)
class TokenLayout:
    """A `TokenGeometry` cut into blocks along a curve, or along several to choose from.

    Curve order is video along the curve, then text. Each of the two is padded to whole blocks, so
    that no block mixes them: `P` slots in all, padding at the same slots along every curve. Build
    it with `TokenLayout.build`. Where an argument is called `choice`, it is `[B, H]` int64, the
    curve of each head, or None, the first one for all.

    Attributes:
        targets: `[C, P]` int32, the model's position of each slot along each curve; -1 for padding.
        restores: `[C, N]` int32, the slot of each of the model's positions.
    """

    geometry: TokenGeometry
    tile_size: int
    query_block: int
    key_block: int
    targets: Tensor
    restores: Tensor
    # By size: the text lengths last asked for and the answer, which all layers of a forward share.
    _lengths: dict = field(default_factory=dict, init=False, repr=False, compare=False)

    @classmethod
    def build(
        cls,
        geometry: TokenGeometry,
        *,
        order: str | Sequence[str],
        tile_size: int,
        query_block: int,
        key_block: int,
        device: torch.device | str = "cpu",
    ) -> TokenLayout:
        """Lay out `geometry` along every `order`, on `device`. One block divides the other."""
        block = max(query_block, key_block)
        targets, restores = [], []
        for name in [order] if isinstance(order, str) else order:
            video = visiting_order(name, geometry.grid)
            text = torch.arange(geometry.text_tokens, device="cpu")
            if geometry.text_first:
                video = video + geometry.text_tokens
            else:
                text = text + geometry.video_tokens
            target = torch.cat([_pad(video, block), _pad(text, block)])
            targets.append(target)
            real = torch.nonzero(target >= 0).flatten()
            restores.append(real[inverse_order(torch.cat([video, text]))])
        return cls(
            geometry,
            tile_size,
            query_block,
            key_block,
            *(torch.stack(x).to(device, torch.int32) for x in (targets, restores)),
        )

    @property
    def video_slots(self) -> int:
        return _padded(self.geometry.video_tokens, max(self.query_block, self.key_block))

    @property
    def slots(self) -> int:
        return self.targets.shape[1]

    @property
    def video_key_blocks(self) -> int:
        """Leading key blocks that hold video tokens."""
        return -(-self.geometry.video_tokens // self.key_block)

    @property
    def full_key_blocks(self) -> int:
        """Leading key blocks without padding, whatever the text lengths."""
        return self.geometry.video_tokens // self.key_block

    def target(self, choice: Tensor | None = None) -> Tensor:
        """`[P]`, or `[B, H, P]` by choice: rows of `targets`."""
        return self.targets[0 if choice is None else choice]

    def restore(self, choice: Tensor | None = None) -> Tensor:
        """`[N]`, or `[B, H, N]` by choice: rows of `restores`."""
        return self.restores[0 if choice is None else choice]

    def to_curve(self, x: Tensor, choice: Tensor | None = None) -> Tensor:
        """Model order `[B, N, H, D]` to curve order `[B, H, P, D]`; padding repeats a token."""
        return _gather(x.transpose(1, 2), self.target(choice).clamp(min=0))

    def from_curve(self, x: Tensor, choice: Tensor | None = None) -> Tensor:
        """Curve order `[B, H, P, D]` back to model order `[B, N, H, D]`; drops padding."""
        return _gather(x, self.restore(choice)).transpose(1, 2)

    def lengths(self, size: int, text_lengths: Tensor | None = None) -> Tensor:
        """Number of real tokens in each run of `size` slots.

        Args:
            size: Slots per run: a tile or a block; divides the padded segments.
            text_lengths: `[B]` integers, valid text tokens per batch row; None means all. Must not
                change in place: the same tensor gets the same answer.

        Returns:
            `[B, P / size]` int32, with `B = 1` where `text_lengths` is None. Do not write to it.
        """
        known = self._lengths.get(size)
        if known is None or known[0] is not text_lengths:
            known = self._lengths[size] = text_lengths, self._make_lengths(size, text_lengths)
        return known[1]

    def _make_lengths(self, size: int, text_lengths: Tensor | None) -> Tensor:
        start = torch.arange(0, self.slots, size, device=self.targets.device, dtype=torch.int32)
        is_text = start >= self.video_slots
        if text_lengths is None:
            text_end = start.new_full((1, 1), self.geometry.text_tokens)
        else:
            text_end = text_lengths.to(torch.int32).clamp(max=self.geometry.text_tokens)[:, None]
        end = torch.where(is_text, text_end + self.video_slots, self.geometry.video_tokens)
        return (end - start).clamp(0, size).to(torch.int32)


def _gather(x: Tensor, positions: Tensor) -> Tensor:
    """Rows of `[B, H, R, D]` at `[R']` or `[B, H, R']`."""
    if positions.ndim == 1:
        return x.index_select(2, positions)
    return x.gather(2, positions[..., None].long().expand(-1, -1, -1, x.shape[-1]))


def _padded(tokens: int, block: int) -> int:
    return -(-tokens // block) * block


def _pad(positions: Tensor, block: int) -> Tensor:
    missing = _padded(positions.numel(), block) - positions.numel()
    return torch.cat([positions, positions.new_full((missing,), -1)])
