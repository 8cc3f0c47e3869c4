"""Attention rows, computed beside the encoder's own attention, whichever implementation the user chose.

One attention function is registered with transformers' ``AttentionInterface`` on first use. Each attention
module that scores patches gets a private copy of its configuration that names this function. The original
configuration decides, at each call, which implementation computes the attention. The function then adds the
call's rows to the collectors of the current context. Attention is never forced to be eager, and threads do
not see one another's rows.

``torch.compile`` cannot read a context variable: there each module stores its rows until :func:`collect`
takes them. Like transformers' own output capturing, that is not safe to run from several threads at once.

Received attention needs the log-sum-exp of every query. Where SDPA would run PyTorch's flash attention, that
kernel is called directly, since it returns its log-sum-exp too. The output is the same, bit for bit.

Encoders that pack images into one sequence call attention once a layer only under a name with "flash" in it,
and otherwise once an image. So their function has such a name, and divides the sequence itself.
"""

from __future__ import annotations

import contextlib
import contextvars
import copy
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import BuiltinFunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend

import hero_kernels as hk

from .patches import put, restore

__all__ = ["Collector", "KeyCollector", "Packed", "collect", "install", "installed", "remove"]

NAME = "hero_attention_rows"
PACKED = "hero_flash_attention_rows"
_STATE = "_hero_attention_rows"
_collectors: contextvars.ContextVar[tuple] = contextvars.ContextVar("hero_collectors", default=())
# By device: the flash attention behind SDPA. On a CPU the reference is no faster with a log-sum-exp.
_FLASH = {"cuda": "_scaled_dot_product_flash_attention"}


class Packed(NamedTuple):
    """Images one after another in one sequence, as packed encoders take them.

    Attributes:
        lengths: patches of each image.
        cu_seqlens: ``[B + 1]`` int32, where each image begins, on the device of the encoder.
    """

    lengths: tuple[int, ...]
    cu_seqlens: Tensor


class Collector:
    """Attention rows of one pass of the encoder, accumulated over layers. Heads are averaged at the end.

    Args:
        weights: of each layer, ``[T]`` fp32 or a number: its weight in the mean over layers, one for each
            crop, since thumbnails and tiles are scored by different layers.
        second_softmax: as in :func:`hero_kernels.cls_attention`.
        received: score by received attention, for encoders without CLS.
        packed: the images of a packed encoder.
    """

    def __init__(
        self,
        weights: Mapping[int, Tensor | float],
        *,
        second_softmax: bool = False,
        received: bool = False,
        packed: Packed | None = None,
    ):
        self.weights = weights
        self.second_softmax = second_softmax
        self.received = received
        self.packed = packed
        self.seen: set[int] = set()
        self.fused = False  # whether a layer ran attention that returns the rows
        self.rows: Tensor | None = None  # [T, H, P] fp32

    def add(self, layer: int, query: Tensor, key: Tensor, scale: float, lse: Tensor | None = None) -> None:
        """Add the rows of one layer; query and key are ``[T, H, N, D]``, query at least at CLS.

        Args:
            lse: as in :func:`hero_kernels.received_attention`, if its attention returned it.
        """
        if layer not in self.weights:
            return
        options = self._options(layer, query.device)
        if self.packed is not None:
            options |= {"cu_seqlens": self.packed.cu_seqlens.to(query.device)}
            options |= {"max_seqlen": max(self.packed.lengths)}
        if self.received:
            rows = hk.received_attention(query, key, scale, lse=lse, **options)
        else:
            rows = hk.cls_attention(query, key, scale, second_softmax=self.second_softmax, **options)
        self._take(layer, rows, options["out"])

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Attention ``[T, H, N, D]`` of one layer; its rows are added."""
        self.fused = True
        options = self._options(layer, query.device)
        output, rows = hk.attention_with_cls(
            query, key, value, scale, second_softmax=self.second_softmax, **options
        )
        self._take(layer, rows, options["out"])
        return output

    def fetch(self, state: _State) -> None:
        """Add the rows that a compiled call stored, unless they were added before."""
        layer, rows = state.layer, state.rows
        self.fused |= state.ran_fused
        if rows is None or layer in self.seen or layer not in self.weights:
            return
        weight = self.weights[layer]
        if isinstance(weight, Tensor):
            weight = weight.to(rows.device)[:, None, None]
        self._take(layer, rows * weight, None)

    def _options(self, layer: int, device: torch.device) -> dict[str, Any]:
        weight = self.weights[layer]
        # Layers may be on several devices: the rows stay on the first one's.
        local = self.rows is not None and self.rows.device == device
        return {
            "weight": weight.to(device) if isinstance(weight, Tensor) else weight,
            "out": self.rows if local else None,
        }

    def _take(self, layer: int, rows: Tensor, added: Tensor | None) -> None:
        self.seen.add(layer)
        if self.rows is None:
            self.rows = rows
        elif added is None:
            self.rows += rows.to(self.rows.device)

    def result(self) -> Tensor:
        """The rows ``[T, H, P]`` fp32, for :func:`hero_kernels.finalize_scores`.

        Raises:
            RuntimeError: the encoder did not run the attention of all its layers.
        """
        _check_ran(set(self.weights) - self.seen)
        return self.rows


class KeyCollector:
    """Keys of one layer in one pass of the encoder, averaged over heads.

    Args:
        layer: the layer.
    """

    def __init__(self, layer: int):
        self.weights = {layer: 1.0}
        self.keys: Tensor | None = None  # [T, P, D] fp32

    def add(self, layer: int, query: Tensor, key: Tensor, scale: float, lse: Tensor | None = None) -> None:
        """Take the keys ``[T, H, N, D]``, if they are of the layer."""
        if layer in self.weights:
            self.keys = _mean_keys(key)

    def fetch(self, state: _State) -> None:
        """Take the keys that a compiled call stored, unless they were taken before."""
        if state.layer in self.weights and state.keys is not None and self.keys is None:
            self.keys = state.keys

    def result(self) -> Tensor:
        """The keys ``[T, P, D]`` fp32, without CLS.

        Raises:
            RuntimeError: the encoder did not run the attention of the layer.
        """
        _check_ran(self.weights if self.keys is None else ())
        return self.keys


def _check_ran(missing) -> None:
    if missing:
        raise RuntimeError(f"the vision encoder did not run its attention in layers {sorted(missing)}")


def _mean_keys(key: Tensor) -> Tensor:
    return key.detach()[:, :, 1:].float().mean(1)


class _View:
    """An attention module as the base implementation must see it: with the user's own configuration.

    FlashAttention reads the name of its implementation from ``module.config``.
    """

    def __init__(self, module: nn.Module, config: object):
        self._module = module
        self.config = config

    def __getattr__(self, name: str):
        if name.startswith("__") or "_module" not in self.__dict__:  # while being copied or unpickled
            raise AttributeError(name)
        return getattr(self._module, name)


@dataclass
class _State:
    """What :func:`install` keeps on an attention module."""

    config: Any  # the user's
    view: _View
    layer: int
    received: bool
    second_softmax: bool
    attention: str  # "auto", "native" or "fused"
    keeps_keys: bool
    ran_fused: bool = False  # of a compiled call, until fetched
    rows: Tensor | None = field(default=None, repr=False)  # likewise
    keys: Tensor | None = field(default=None, repr=False)


def _base(module: nn.Module, config: Any):
    """The attention function that a configuration names."""
    name = config._attn_implementation
    if name in (None, "eager"):
        return sys.modules[type(module).__module__].eager_attention_forward
    return _interface()[name]


def _is_fused(
    module: nn.Module, state: _State, query: Tensor, key: Tensor, mask: object, kwargs: dict
) -> bool:
    """Whether to run attention that returns the rows: by the arguments and the module alone, so that a call
    that is computed again, as by gradient checkpointing, takes the same way.

    Raises:
        ValueError: it was asked for, and there is a mask or dropout.
    """
    if state.attention == "native" or query.shape != key.shape:
        return False
    masked = mask is not None or bool(kwargs.get("dropout"))
    if state.attention == "fused":
        if masked:
            raise ValueError(
                "attention: expected 'native' for an encoder with an attention mask or dropout, got 'fused'"
            )
        return True
    if masked or module.training or state.config._attn_implementation != "sdpa":
        return False
    return hk.fused_attention_is_faster(query.device, query.dtype, query.shape[-1], query.shape[-2])


def _runs_flash(
    base: Any, query: Tensor, key: Tensor, value: Tensor, mask: object, kwargs: Mapping[str, object]
) -> bool:
    """Whether transformers' "sdpa" would run PyTorch's flash attention as :func:`_flash` calls it: without
    mask, dropout, gradients and conversions, and with nothing replaced in between.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    sdpa, name = nn.functional.scaled_dot_product_attention, _FLASH.get(query.device.type, "")
    others = {key: value for key, value in kwargs.items() if key != "scaling" and value is not None}
    return (
        base is sdpa_attention_forward
        and isinstance(sdpa, BuiltinFunctionType)  # some packages put their own in its place
        and hasattr(torch.ops.aten, name)
        and hasattr(torch, "_fused_sdp_choice")
        and torch.version.hip is None  # not tried
        and mask is None
        and others.get("is_causal") is False
        and all(isinstance(one, (bool, int, float)) and not one for one in others.values())
        and type(query) is type(key) is type(value) is Tensor
        and query.shape == key.shape == value.shape
        and query.shape[-1] % 8 == 0  # SDPA pads other heads
        and not torch.is_autocast_enabled(query.device.type)  # SDPA would cast
        and not (torch.is_grad_enabled() and any(one.requires_grad for one in (query, key, value)))
        and torch._fused_sdp_choice(query, key, value, None, 0.0, False, scale=kwargs.get("scaling"))
        == SDPBackend.FLASH_ATTENTION.value
    )


def _flash(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> tuple[Any, Tensor | None]:
    """What transformers' "sdpa" returns, and the log-sum-exp, or ``None`` if it has another form."""
    kernel = getattr(torch.ops.aten, _FLASH[query.device.type])
    output, lse, *_ = kernel(query, key, value, 0.0, False, scale=scale)
    fits = lse.shape == query.shape[:3] and lse.dtype == torch.float32
    return (output.transpose(1, 2).contiguous(), None), lse if fits else None


def _attention(module, query, key, value, attention_mask, **kwargs):
    """The registered attention function: the user's implementation, and rows for the collectors."""
    state = module.__dict__[_STATE]
    base = _base(module, state.config)
    compiling = torch.compiler.is_compiling()
    collectors = () if compiling else _collectors.get()
    scale = kwargs.get("scaling")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if compiling and state.keeps_keys:
        state.keys = _mean_keys(key)
    attending = lse = None
    if _is_fused(module, state, query, key, attention_mask, kwargs):
        rows = (one for one in collectors if isinstance(one, Collector) and state.layer in one.weights)
        attending = next(rows, None)
        if attending is not None:
            output = attending.attend(state.layer, query, key, value, scale)
        else:
            second = state.second_softmax
            output, found = hk.attention_with_cls(query, key, value, scale, second_softmax=second)
            state.rows, state.ran_fused = (found, True) if compiling else (None, False)
        output = output.transpose(1, 2), None
    elif collectors and state.received and _runs_flash(base, query, key, value, attention_mask, kwargs):
        output, lse = _flash(query, key, value, kwargs.get("scaling"))
    else:
        output = base(state.view, query, key, value, attention_mask, **kwargs)
        if compiling and state.received:
            state.rows = hk.received_attention(query, key, scale)
        elif compiling:
            state.rows = hk.cls_attention(query, key, scale, second_softmax=state.second_softmax)
    for collector in collectors:
        if collector is not attending:
            collector.add(state.layer, query, key, scale, lse)
    return output


def _packed_attention(module, query, key, value, attention_mask, **kwargs):
    """The registered attention function of packed encoders; query, key and value are ``[1, H, N, D]``."""
    state, collectors = module.__dict__[_STATE], _collectors.get()
    base, lse = _base(module, state.config), None
    if "flash" in (state.config._attn_implementation or ""):
        output = base(state.view, query, key, value, attention_mask, **kwargs)
    else:  # what the module does under other names, with lengths that are known already
        places, *_ = (kwargs.pop(f"{name}_{side}") for name in ("cu_seq_lens", "max_length") for side in "qk")
        lengths = collectors[0].packed.lengths if collectors else places.diff().tolist()
        parts, sums = [], []
        for one in zip(*(tensor.split(lengths, 2) for tensor in (query, key, value)), strict=True):
            if collectors and _runs_flash(base, *one, attention_mask, kwargs):
                (part, _), part_lse = _flash(*one, kwargs["scaling"])
            else:
                part, part_lse = base(state.view, *one, attention_mask, **kwargs)[0], None
            parts.append(part)
            sums.append(part_lse)
        output = torch.cat(parts, 1), None
        if all(one is not None for one in sums):
            lse = torch.cat(sums, 2)
    for collector in collectors:
        collector.add(state.layer, query, key, kwargs["scaling"], lse)
    return output


def _interface():
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    return ALL_ATTENTION_FUNCTIONS


def install(
    modules: Mapping[int, nn.Module],
    *,
    received: bool = False,
    second_softmax: bool = False,
    attention: str = "native",
    keys: Sequence[int] = (),
    packed: bool = False,
) -> None:
    """Make the attention modules ``{layer: module}`` compute rows for the collectors of each pass.

    Args:
        modules: the attention modules of the layers that score patches.
        received, second_softmax: as in :class:`Collector`.
        attention: ``"fused"`` runs attention that returns the rows, ``"native"`` the module's own with the
            rows beside it, ``"auto"`` what was measured to be faster.
        keys: layers whose keys are read.
        packed: whether the encoder packs images into one sequence.

    Raises:
        ValueError: one of the modules has hero attached already.
    """
    if any(installed(module) for module in modules.values()):
        raise ValueError(
            "vision_tower: expected an encoder without hero attached, got one with: call hero.detach first"
        )
    name, function = (PACKED, _packed_attention) if packed else (NAME, _attention)
    if name not in _interface():
        type(_interface()).register(name, function)
    for layer, module in modules.items():
        view = _View(module, module.config)
        state = _State(module.config, view, layer, received, second_softmax, attention, layer in keys)
        put(module, _STATE, state)
        put(module, "config", copy.copy(module.config))
        module.config._attn_implementation_internal = name


def installed(module: nn.Module) -> bool:
    """Whether :func:`install` was called on an attention module."""
    return _STATE in module.__dict__


def remove(modules: Mapping[int, nn.Module]) -> None:
    """Undo :func:`install` exactly."""
    for module in modules.values():
        restore(module)


@contextlib.contextmanager
def collect(
    collectors: Collector | Sequence[Collector | KeyCollector], modules: Mapping[int, nn.Module]
) -> Iterator[None]:
    """Send the rows of the passes inside the block to one or several collectors."""
    collectors = (collectors,) if isinstance(collectors, Collector) else tuple(collectors)
    token = None if torch.compiler.is_compiling() else _collectors.set(collectors)
    states = [module.__dict__[_STATE] for module in modules.values()]
    try:
        yield
        for collector in collectors:
            for state in states:
                collector.fetch(state)
    finally:
        if token is not None:
            _collectors.reset(token)
        for state in states:
            state.rows = state.keys = None
            state.ran_fused = False
