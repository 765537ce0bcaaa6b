"""Listens to a transformer: which step, which guidance branch, which tokens."""

from __future__ import annotations

import inspect
import logging
import weakref
from collections.abc import Callable
from typing import Any

import torch
from diffusers.hooks.hooks import (
    BaseState,
    HookFunctionReference,
    HookRegistry,
    ModelHook,
    StateManager,
)
from torch import Tensor

from .processors import ModelAdapter
from .state import DFSAttnState, Forward, Position
from .text import TextReader

logger = logging.getLogger(__name__)

_MAILBOX = "dfsattn_mailbox"
_DEFAULT_STEPS = 50


class _NoState(BaseState):
    def reset(self) -> None:
        pass


class _Mailbox(ModelHook):
    """Receives what pipelines tell stateful hooks: the cache context, and the end of a run."""

    _is_stateful = True

    def __init__(self, on_reset: Callable[[], None]):
        super().__init__()
        self._manager = StateManager(_NoState)
        self._on_reset = on_reset

    @property
    def context(self):
        return self._manager._context

    def reset_state(self, module: torch.nn.Module) -> torch.nn.Module:
        self._manager.reset()
        self._on_reset()
        return module


class StepClock:
    """Tells the step and branch of each transformer call of one pipeline, without device syncs.

    In order of trust: the step in the host's cache context; the position of the timestep within
    the scheduler's list, of which it is a view; a change of the timestep object. One clock serves
    all transformers of a pipeline, since Wan 2.2 divides one run between two.

    Args:
        pipe: The pipeline, or None where only a transformer is known.
        num_inference_steps: Length of a run where nothing tells it; None is 50 and a warning.
        named_branches: Call branches by the host's names, else by their ordinal within the step.
    """

    def __init__(
        self,
        pipe: Any | None = None,
        num_inference_steps: int | None = None,
        named_branches: bool = True,
    ):
        self._pipe = weakref.ref(pipe) if pipe is not None else lambda: None
        self._num_inference_steps = num_inference_steps
        self._named_branches = named_branches
        self.reset()

    def reset(self) -> None:
        """The run is over: the next call begins another."""
        self._running = False
        self._step = 0
        self._timestep: Any = None
        self._schedule: Any = None
        self._length: int | None = None
        self._seen: set[str] = set()

    def locate(self, context: Any, timestep: Any) -> tuple[Position, bool]:
        """Position of a call, and whether it begins a new run.

        Args:
            context: The host's `CacheContext`, or None.
            timestep: The transformer's timestep argument.
        """
        pipe = self._pipe()
        name = getattr(context, "name", None)
        schedule, index, length = _place_in_schedule(timestep)
        current = getattr(pipe, "_current_timestep", None)
        # A failed run leaves its last timestep behind; a list made since does not hold it.
        if schedule is None and _share_storage(current, _timesteps_of(pipe)):
            timestep = current
            schedule, index, length = _place_in_schedule(timestep, least=1)
        known = getattr(context, "step_index", None)
        index = index if known is None else known

        advance = self._advance(timestep, name) if index is None and self._running else 0
        step = self._step + advance if index is None else index
        new_run = (
            not self._running
            or step < self._step
            or (schedule is not None and schedule != self._schedule)
            or (step == self._step and name is not None and name in self._seen)
        )
        if new_run:
            step, self._length = index or 0, length
        if new_run or step != self._step:
            self._seen.clear()
        ordinal = f"call {len(self._seen)}"
        self._seen.add(ordinal if name is None else name)
        branch = name if name is not None and self._named_branches else ordinal
        self._running, self._step = True, step
        self._timestep, self._schedule = timestep, schedule

        num_steps = getattr(context, "num_inference_steps", None) or self._run_length(pipe)
        return Position(min(step, num_steps - 1), num_steps, branch), new_run

    def _advance(self, timestep: Any, name: str | None) -> int:
        """1 if the step is the next one, 0 if it is the same, -1 if the timesteps start anew."""
        if timestep is self._timestep:
            return 0
        if name is not None and "call 0" not in self._seen:
            return int(name in self._seen)
        # Only where a branch had no name and timesteps are rebuilt does this comparison cost.
        now, before = _value(timestep), _value(self._timestep)
        return (now < before) - (now > before)

    def _run_length(self, pipe: Any | None) -> int:
        timesteps = _timesteps_of(pipe)
        # Modular pipelines have no current timestep; there the scheduler's list has to do.
        is_its_run = _share_storage(self._timestep, timesteps)
        if timesteps is not None and (is_its_run or not hasattr(pipe, "_current_timestep")):
            return len(timesteps)
        if self._length is None and self._num_inference_steps is None:
            logger.warning(
                "Nothing tells how many denoising steps there will be: taking %d. Enable DFSAttn "
                "on the pipeline, or name the number in model.cache_context(...).",
                _DEFAULT_STEPS,
            )
            self._num_inference_steps = _DEFAULT_STEPS
        return self._length or self._num_inference_steps


def _timesteps_of(pipe: Any | None) -> Tensor | None:
    return getattr(getattr(pipe, "scheduler", None), "timesteps", None)


def _share_storage(a: Any, b: Any) -> bool:
    both = isinstance(a, Tensor) and isinstance(b, Tensor)
    return both and a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def _place_in_schedule(timestep: Any, least: int = 2) -> tuple[int | None, int | None, int | None]:
    """Address, index and length of the list that a scalar or expanded timestep is a view of."""
    if not isinstance(timestep, Tensor) or timestep.ndim > 1:
        return None, None, None
    storage = timestep.untyped_storage()
    length = storage.nbytes() // timestep.element_size()
    if length < least or not (timestep.numel() == 1 or timestep.stride(0) == 0):
        return None, None, None
    return storage.data_ptr(), timestep.storage_offset(), length


def _value(timestep: Any) -> float:
    return float(timestep.flatten()[0]) if isinstance(timestep, Tensor) else float(timestep)


class TransformerHook:
    """Ties one transformer to a state and a clock.

    Behaviour sits in torch's own forward hooks: a diffusers `ModelHook` put on after
    `enable_model_cpu_offload` would stop firing after the first run.

    Args:
        transformer: The denoiser.
        adapter: What is known of its class.
        state: Told of every run and forward.
        clock: Of the pipeline.
        name: Of the transformer within the pipeline.
        is_active: Asked before every forward; if it says no, the hook stays out of it.
    """

    def __init__(
        self,
        transformer: torch.nn.Module,
        adapter: ModelAdapter,
        state: DFSAttnState,
        clock: StepClock,
        name: str,
        is_active: Callable[[], bool],
    ):
        self._transformer = transformer
        self._adapter = adapter
        self._state = state
        self._clock = clock
        self._name = name
        self._is_active = is_active
        self._signature = inspect.signature(type(transformer).forward)
        self._mailbox = _Mailbox(self._on_reset)
        self._handles: list = []
        self._text_reader = TextReader()

    def install(self) -> None:
        registry = HookRegistry.check_if_exists_or_initialize(self._transformer)
        # First in line and without wrapping `forward`: others may wrap and unwrap it as they like.
        registry.hooks[_MAILBOX] = self._mailbox
        registry._hook_order.insert(0, _MAILBOX)
        registry._fn_refs.insert(0, HookFunctionReference())
        self._handles = [
            self._transformer.register_forward_pre_hook(self._pre_forward, with_kwargs=True),
            self._transformer.register_forward_hook(self._post_forward),
        ]

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        registry = HookRegistry.check_if_exists_or_initialize(self._transformer)
        index = registry._hook_order.index(_MAILBOX)
        del registry.hooks[_MAILBOX], registry._hook_order[index], registry._fn_refs[index]

    def _on_reset(self) -> None:
        self._clock.reset()
        self._state.drop_maps()

    @torch.compiler.disable
    def _pre_forward(self, module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        if not self._is_active():
            return
        inputs = self._signature.bind(module, *args, **kwargs).arguments
        geometry, text_mask = self._adapter.tokens(module, inputs)
        text = None if text_mask is None else self._text_reader.read(text_mask)
        position, new_run = self._clock.locate(self._mailbox.context, inputs.get("timestep"))
        if new_run:
            self._state.begin_run(position.num_steps)
        device = inputs["hidden_states"].device
        self._state.begin_forward(Forward(self._name, position, geometry, text, device))

    @torch.compiler.disable
    def _post_forward(self, module: torch.nn.Module, args: tuple, output: Any) -> None:
        self._state.end_forward()
