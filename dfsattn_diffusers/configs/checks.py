"""Checks of single values, with messages that say what was wanted."""

from __future__ import annotations

import sys
from typing import Any


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
