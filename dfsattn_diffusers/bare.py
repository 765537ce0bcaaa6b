"""The low-level way: one processor, given to `set_attn_processor`, without a pipeline."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.utils.torch_utils import unwrap_module
from torch.nn.modules.module import register_module_forward_pre_hook

from .attachment import restore_stock
from .configs import DFSAttnConfig, resolve_config
from .configs.presets import DEFAULT_PRESET
from .hook import StepClock
from .pipeline import DFSAttnHandle, attach_all
from .processors import list_models


class DFSAttnProcessor:
    """Attention processor for `transformer.set_attn_processor(DFSAttnProcessor())`.

    It knows neither model nor pipeline yet: on the transformer's first call it puts the model's
    own processors in its place, video attention sparse and the rest stock, and repeats that call
    through them. `disable_dfsattn(transformer)` brings the stock processors back. One object
    serves one transformer.

    Args:
        config: As in `enable_dfsattn`; None means the default preset.
        num_inference_steps: Denoising steps of a run. Used only where neither the pipeline's cache
            context nor its timesteps tell.

    Attributes:
        handle: As `enable_dfsattn` returns it; None before the first call.

    Raises:
        ValueError: The config is wrong, or `num_inference_steps` is not positive.
    """

    is_dfsattn = True
    _attention_backend = None
    _parallel_config = None

    def __init__(
        self,
        config: DFSAttnConfig | Mapping[str, Any] | str | Path | None = None,
        num_inference_steps: int = 50,
    ):
        if num_inference_steps < 1:
            raise ValueError(f"num_inference_steps must be at least 1; got {num_inference_steps}.")
        self.config = resolve_config(DEFAULT_PRESET if config is None else config)
        self.handle: DFSAttnHandle | None = None
        self._num_inference_steps = num_inference_steps
        # torch's global hooks would keep this object alive for ever, so they know its mark. A
        # compiler that traces other models through them cannot do with a weak reference.
        this, mark = weakref.ref(self), object()
        self._mark = mark

        def find_root(module: torch.nn.Module, args: tuple) -> None:
            processors = getattr(module, "attn_processors", None) or {}
            found = [p for p in processors.values() if getattr(p, "_mark", None) is mark]
            if found:
                listener.remove()
                found[0]._bind(unwrap_module(module))
            elif not torch.compiler.is_compiling() and this() is None:
                listener.remove()

        listener = register_module_forward_pre_hook(find_root)

    def __call__(
        self,
        attn: torch.nn.Module,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> torch.Tensor:
        raise RuntimeError(
            "DFSAttnProcessor ran before its transformer did. It works on whole transformers, "
            f"called as such ({', '.join(list_models())}), one object for each."
        )

    def _bind(self, transformer: torch.nn.Module) -> None:
        # A former attachment notices by itself that its processors are gone.
        restore_stock(transformer)

        # The call in progress has passed the point where hooks on it would fire: it runs with
        # stock processors, and once more with ours.
        def repeat(module: torch.nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
            once.remove()
            # This first call was announced before anything of ours could hear its branch's name.
            clock = StepClock(
                num_inference_steps=self._num_inference_steps, named_branches=False
            )
            self.handle = attach_all({"transformer": module}, self.config, clock)
            return module(*args, **kwargs)

        once = transformer.register_forward_hook(repeat, with_kwargs=True)
