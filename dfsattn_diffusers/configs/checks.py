"""Checks of values, with messages that say what was wanted."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import DFSAttnConfig


def as_tuple(name: str, value: Any, of: str = "numbers") -> tuple:
    if isinstance(value, (str, bytes)) or not hasattr(value, "__iter__"):
        raise TypeError(f"{name} must be a sequence of {of}; got {value!r}.")
    return tuple(value)


def check_number(name: str, value: Any, least: float) -> None:
    _check_is_number(name, value)
    if not least <= value <= sys.float_info.max:
        raise ValueError(f"{name} must be at least {least}, and finite; got {value!r}.")


def check_flag(name: str, value: Any) -> None:
    """Raise unless a value is a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False; got {value!r}.")


def check_fraction(name: str, value: Any, zero_allowed: bool = False) -> None:
    _check_is_number(name, value)
    if not (0 < value <= 1 or (zero_allowed and value == 0)):
        interval = "[0, 1]" if zero_allowed else "(0, 1]"
        raise ValueError(f"{name} must lie in {interval}; got {value!r}.")


def check_int(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be a whole number; got {value!r}.")
    if value < least:
        raise ValueError(f"{name} must be at least {least}; got {value}.")


def _check_is_number(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number; got {value!r}.")


def check_ratios(name: str, ratios: tuple[float, ...]) -> None:
    """Refuse what is no falling sequence of shares in (0, 1]."""
    if not ratios:
        raise ValueError(f"{name} must hold at least one value in (0, 1]; got none.")
    for ratio in ratios:
        check_fraction(name, ratio)
    if any(later > earlier for earlier, later in zip(ratios, ratios[1:])):
        raise ValueError(
            f"{name} must not rise along the run; got {ratios}. Put the largest first."
        )


def check_blocks(config: DFSAttnConfig) -> None:
    """Refuse sizes of tiles, blocks and pools that do not divide each other."""
    for name in ("tile_size", "query_block", "key_block", "tail_pool"):
        check_int(name, getattr(config, name), least=1)
    for name in ("query_block", "key_block"):
        if getattr(config, name) % config.tile_size:
            raise ValueError(
                f"tile_size must divide {name}; got tile_size {config.tile_size} and {name} "
                f"{getattr(config, name)}."
            )
    if config.tail is not None and config.key_block % config.tail_pool:
        raise ValueError(
            f"tail_pool must divide key_block; got tail_pool {config.tail_pool} and key_block "
            f"{config.key_block}."
        )
    small, large = sorted((config.query_block, config.key_block))
    if large % small:
        raise ValueError(
            "One of query_block and key_block must divide the other; got "
            f"{config.query_block} and {config.key_block}."
        )
