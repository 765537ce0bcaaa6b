"""How many text tokens of each batch row are real."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary


@dataclass(frozen=True)
class TextLengths:
    """Valid text tokens of each batch row, which padding follows.

    Attributes:
        rows: `[B]` int32, on the device.
        shortest, longest: Of the rows, on the host.
    """

    rows: Tensor
    shortest: int
    longest: int


class TextReader:
    """Reads masks of valid text; a run shows the same one in every step and waits for it once."""

    def __init__(self):
        self._known = WeakTensorKeyDictionary()

    def read(self, mask: Tensor) -> TextLengths:
        """Lengths of a `[B, text tokens]` mask."""
        # Inference tensors count no versions; pipelines do not change their masks in place.
        version = None if mask.is_inference() else mask._version
        known = self._known.get(mask)
        if known is None or known[0] != version:
            rows = mask.sum(1, dtype=torch.int32)
            lengths = TextLengths(rows, *torch.stack(rows.aminmax()).tolist())
            known = self._known[mask] = version, lengths
        return known[1]
