"""The one line that turns DFSAttn on, the handle it returns, and the way back."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.utils.torch_utils import unwrap_module

from .attachment import Attachment, attachment_of, restore_stock
from .configs import DFSAttnConfig, resolve_config
from .configs.presets import DEFAULT_PRESET
from .hook import StepClock
from .kernels import list_backends
from .processors import adapter_for, list_models
from .report import Report
from .schedule import config_for_cost
from .state import DFSAttnState

_TRANSFORMER_NAMES = ("transformer", "transformer_2")


class DFSAttnHandle:
    """What `enable_dfsattn` returns; also a context manager that disables at its end.

    Attributes:
        config: The settings, as they were given; `state.settings` are those that the latest run
            followed, which short runs have of their own.
        state: What is known of the generation in progress.
    """

    def __init__(self, state: DFSAttnState, clock: StepClock, attachments: list[Attachment]):
        self.state = state
        self._clock = clock
        self._attachments = attachments

    def __repr__(self) -> str:
        what = "enabled" if self.enabled else "disabled"
        return f"DFSAttnHandle({what}, {self.config}, {self.state})"

    def __enter__(self) -> DFSAttnHandle:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.disable()

    @property
    def config(self) -> DFSAttnConfig:
        return self.state.config

    @property
    def enabled(self) -> bool:
        """Whether any transformer still runs with DFSAttn."""
        return any(attachment_of(a.transformer) is a for a in self._attachments)

    def report(self) -> Report:
        """What ran dense and sparse in the latest generations. Waits for the device."""
        return self.state.report()

    def reset(self) -> None:
        """Forget the generation in progress, its block maps, and all reports."""
        self._clock.reset()
        self.state.reset()

    def disable(self) -> None:
        """Put the exact processors back. Reports stay; calling it again does nothing."""
        for attachment in self._attachments:
            if attachment_of(attachment.transformer) is attachment:
                attachment.detach()
        self._clock.reset()
        self.state.drop_maps()


def enable_dfsattn(
    pipe_or_transformer: Any,
    config: str | DFSAttnConfig | Mapping[str, Any] | Path = DEFAULT_PRESET,
    *,
    cost: float | None = None,
    **overrides: Any,
) -> DFSAttnHandle:
    """Switch a pipeline's video attention to DFSAttn.

    Args:
        pipe_or_transformer: A diffusers pipeline, or its transformer alone.
        config: A preset's name (see `list_presets`), a config, a mapping of config fields, or the
            path of a JSON or YAML file.
        cost: Attention work of a run of 50 steps relative to dense, in (0, 1]: dense steps and keep
            ratios of `config` are scaled alike until they meet it.
        **overrides: Config fields that replace those of `config`; `resolve_config` says what they
            imply for short runs.

    Returns:
        A handle with `report()`, `reset()` and `disable()`.

    Raises:
        ValueError: The pipeline is not supported, DFSAttn is on already, or the config is wrong.
    """
    resolved = resolve_config(config, **overrides)
    if cost is not None:
        resolved = config_for_cost(resolved, cost)
    transformers, pipe = _find_transformers(pipe_or_transformer)
    return attach_all(transformers, resolved, StepClock(pipe))


def attach_all(
    transformers: Mapping[str, torch.nn.Module], config: DFSAttnConfig, clock: StepClock
) -> DFSAttnHandle:
    """Attach DFSAttn to the transformers of one pipeline; nothing is touched if one refuses."""
    if config.backend not in ("auto", *list_backends()):
        raise ValueError(
            f"backend must be auto or one of {', '.join(list_backends())}; got "
            f"{config.backend!r}."
        )
    adapters = {name: adapter_for(transformer) for name, transformer in transformers.items()}
    for name, transformer in transformers.items():
        if attachment_of(transformer) is not None or _holds_ours(transformer):
            raise ValueError(
                f"DFSAttn is on already for the pipeline's {name}. Call disable_dfsattn first, or "
                "use the handle that enable_dfsattn returned."
            )
    state = DFSAttnState(config)
    attachments = [
        Attachment(transformer, adapters[name], state, clock, name)
        for name, transformer in transformers.items()
    ]
    for attachment in attachments:
        attachment.attach()
    return DFSAttnHandle(state, clock, attachments)


def disable_dfsattn(pipe_or_transformer: Any) -> None:
    """Undo `enable_dfsattn` or a bare `DFSAttnProcessor`; does nothing where DFSAttn is off."""
    transformers, _ = _find_transformers(pipe_or_transformer)
    for transformer in transformers.values():
        attachment = attachment_of(transformer)
        if attachment is not None:
            attachment.detach()
        elif _holds_ours(transformer):
            restore_stock(transformer)


def _holds_ours(transformer: torch.nn.Module) -> bool:
    processors = getattr(transformer, "attn_processors", {})
    return any(getattr(p, "is_dfsattn", False) for p in processors.values())


def _find_transformers(pipe_or_transformer: Any) -> tuple[dict[str, torch.nn.Module], Any | None]:
    if isinstance(pipe_or_transformer, torch.nn.Module):
        return {"transformer": unwrap_module(pipe_or_transformer)}, None
    found = {
        name: unwrap_module(getattr(pipe_or_transformer, name))
        for name in _TRANSFORMER_NAMES
        if isinstance(getattr(pipe_or_transformer, name, None), torch.nn.Module)
    }
    if not found:
        raise ValueError(
            f"{type(pipe_or_transformer).__name__} has no transformer that DFSAttn could speed up; "
            f"supported transformers are {', '.join(list_models())}."
        )
    return found, pipe_or_transformer
