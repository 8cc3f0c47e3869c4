"""Scores as a by-product of the encoder's own attention, whichever implementation the user chose.

One attention function is registered with transformers' ``AttentionInterface`` when capture is first
installed. Each chosen attention module gets a private copy of its configuration that names it; the
original stays beside it and decides, call by call, which implementation does the attention. The
function adds the CLS row of the call to the collectors of the current context and otherwise stays out
of the way, so attention is never forced to be eager and results do not mix between threads.

Under ``torch.compile`` a context variable cannot be read: there each module keeps its row until
:func:`collect` fetches it. Like transformers' own output capture, that is not safe to run from several
threads at once.
"""

from __future__ import annotations

import contextlib
import contextvars
import copy
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

import hero_kernels as hk

__all__ = ["Collector", "KeyCollector", "collect", "fetch", "install", "installed", "remove", "uncaptured"]

NAME = "hero_capture"
_STATE = "_hero_capture"
_collectors: contextvars.ContextVar[tuple] = contextvars.ContextVar("hero_collectors", default=())


class Collector:
    """Attention rows of one pass of the encoder, accumulated over layers; heads are averaged at the end.

    One collector is one map; a pass may fill several.

    Args:
        weights: of each captured layer, ``[T]`` fp32 or a number: its weight in the mean over layers,
            one a crop, since thumbnails and tiles are scored by different layers.
        second_softmax: as in :func:`hero_kernels.cls_attention`.
        received: score by received attention, for encoders without CLS.
    """

    def __init__(
        self,
        weights: Mapping[int, Tensor],
        *,
        second_softmax: bool = False,
        received: bool = False,
    ):
        self.weights = weights
        self.second_softmax = second_softmax
        self.received = received
        self.seen: set[int] = set()
        self.rows: Tensor | None = None  # [T, H, P] fp32
        self.whole: tuple[Tensor, Tensor] | None = None  # rows of all crops, and which of them go on

    def add(self, layer: int, query: Tensor, key: Tensor, scale: float) -> None:
        """Add the rows of one layer; query and key are ``[T, H, N, D]``, query at least at CLS."""
        if layer not in self.weights:
            return
        query, key = query.detach(), key.detach()  # selection is discrete: no gradient runs through scores
        options = self._options(layer, query.device)
        if self.received:
            rows = hk.received_attention(query, key, scale, **options)
        else:
            rows = hk.cls_attention(query, key, scale, second_softmax=self.second_softmax, **options)
        self._take(layer, rows, options["out"])

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Attention ``[T, H, N, D]`` of one layer, its rows added on the way."""
        options = self._options(layer, query.device)
        output, rows = hk.attention_with_cls(
            query, key, value, scale, second_softmax=self.second_softmax, **options
        )
        self._take(layer, rows, options["out"])
        return output

    def add_rows(self, layer: int, rows: Tensor) -> None:
        """Add the unweighted rows ``[T, H, P]`` of one layer."""
        if layer not in self.weights:
            return
        weight = self.weights[layer]
        if isinstance(weight, Tensor):
            weight = weight.to(rows.device)[:, None, None]
        self._take(layer, rows * weight, None)

    def fetch(self, state: _State) -> None:
        """Add the rows that a compiled call left behind, unless they are here already."""
        if state.rows is not None and state.layer not in self.seen:
            self.add_rows(state.layer, state.rows)

    def _options(self, layer: int, device: torch.device) -> dict[str, object]:
        weight = self.weights[layer]
        # Layers may sit on several devices: the rows stay on the first one's.
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

    def narrow(self, crops: Tensor, weights: Mapping[int, float]) -> None:
        """From here on, some of the crops are all that this collector sees.

        Args:
            crops: ``[G]`` int64, these.
            weights: of the layers to come.

        Raises:
            RuntimeError: the encoder ran without passing the captured layers before.
        """
        self._check(set(self.weights) - set(weights))
        self.whole = self.rows, crops
        self.rows = self.rows.index_select(0, crops)
        self.weights = weights
        if not len(crops):
            self.seen.update(weights)  # with nothing left to see

    def _check(self, layers: Iterable[int]) -> None:
        missing = sorted(set(layers) - self.seen)
        if missing:
            raise RuntimeError(f"the vision encoder did not run its attention in layers {missing}")

    def result(self) -> Tensor:
        """The rows ``[T, H, P]`` fp32, for :func:`hero_kernels.finalize_scores`.

        Raises:
            RuntimeError: the encoder ran without passing the captured layers.
        """
        self._check(self.weights)
        if self.whole is not None:
            rows, crops = self.whole
            self.rows, self.whole = rows.index_copy_(0, crops, self.rows), None
        return self.rows


class KeyCollector:
    """Keys of one layer in one pass of the encoder, averaged over heads.

    Args:
        layer: the layer.
    """

    def __init__(self, layer: int):
        self.weights = {layer: 1.0}
        self.keys: Tensor | None = None  # [T, P, D] fp32

    def add(self, layer: int, query: Tensor, key: Tensor, scale: float) -> None:
        """Take the keys ``[T, H, N, D]``, if they are of the layer."""
        if layer in self.weights:
            self.keys = _mean_keys(key)

    def fetch(self, state: _State) -> None:
        """Take the keys that a compiled call left behind, unless they are here already."""
        if state.layer in self.weights and state.keys is not None and self.keys is None:
            self.keys = state.keys

    def result(self) -> Tensor:
        """The keys ``[T, P, D]`` fp32, without CLS.

        Raises:
            RuntimeError: the encoder ran without passing the layer.
        """
        if self.keys is None:
            raise RuntimeError(f"the vision encoder did not run its attention in layers {[*self.weights]}")
        return self.keys


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


class _State:
    """What capture keeps on an attention module."""

    def __init__(
        self,
        module: nn.Module,
        layer: int,
        received: bool,
        second_softmax: bool,
        fused: bool,
        keeps_keys: bool,
    ):
        self.config = module.config
        self.view = _View(module, module.config)
        self.layer = layer
        self.received = received
        self.second_softmax = second_softmax
        self.fused = fused
        self.keeps_keys = keeps_keys
        self.rows: Tensor | None = None  # of a compiled call, until fetched
        self.keys: Tensor | None = None


def _base(module: nn.Module, config: object):
    """The attention function that a configuration names."""
    name = config._attn_implementation
    if name in (None, "eager"):
        return sys.modules[type(module).__module__].eager_attention_forward
    return _interface()[name]


def uncaptured(module, query, key, value, attention_mask, **kwargs):
    """Attention of a module, captured or not, that no collector sees."""
    state = module.__dict__.get(_STATE)
    config, view = (module.config, module) if state is None else (state.config, state.view)
    return _base(module, config)(view, query, key, value, attention_mask, **kwargs)


def _attention(module, query, key, value, attention_mask, **kwargs):
    """The registered attention function: the user's implementation, and scores for the collector."""
    state = module.__dict__[_STATE]
    base = _base(module, state.config)
    compiling = torch.compiler.is_compiling()
    collectors = () if compiling else _collectors.get()
    scale = kwargs.get("scaling")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    attending = None
    if state.fused and not compiling:
        rows = (one for one in collectors if isinstance(one, Collector) and state.layer in one.weights)
        attending = next(rows, None)
    if compiling and state.keeps_keys:
        state.keys = _mean_keys(key)
    if state.fused and query.shape == key.shape and (compiling or attending is not None):
        if attention_mask is not None or kwargs.get("dropout"):
            raise ValueError(
                "attention: expected 'native' for an encoder with an attention mask or dropout, got 'fused'"
            )
        if compiling:
            second = state.second_softmax
            output, state.rows = hk.attention_with_cls(query, key, value, scale, second_softmax=second)
        else:
            output = attending.attend(state.layer, query, key, value, scale)
        output = output.transpose(1, 2), None
    else:
        attending = None
        output = base(state.view, query, key, value, attention_mask, **kwargs)
        if compiling and state.received:
            state.rows = hk.received_attention(query, key, scale)
        elif compiling:
            second = state.second_softmax
            state.rows = hk.cls_attention(query, key, scale, second_softmax=second)
    for collector in collectors:
        if collector is not attending:
            collector.add(state.layer, query, key, scale)
    return output


def _interface():
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    return ALL_ATTENTION_FUNCTIONS


def install(
    modules: Mapping[int, nn.Module],
    *,
    received: bool = False,
    second_softmax: bool = False,
    fused: bool = False,
    keys: Sequence[int] = (),
) -> None:
    """Capture the given attention modules, ``{layer: module}``.

    ``fused`` has them run attention that yields the rows, instead of their own with the rows beside it;
    ``keys`` are the layers whose keys are wanted of a compiled encoder.

    Raises:
        ValueError: one of them is captured already.
    """
    if any(installed(module) for module in modules.values()):
        raise ValueError(
            "vision_tower: expected an encoder without hero attached, got one with; remove() first"
        )
    if NAME not in _interface():
        type(_interface()).register(NAME, _attention)
    for layer, module in modules.items():
        module.__dict__[_STATE] = _State(module, layer, received, second_softmax, fused, layer in keys)
        module.config = copy.copy(module.config)
        module.config._attn_implementation_internal = NAME


def installed(module: nn.Module) -> bool:
    """Whether an attention module is captured."""
    return _STATE in module.__dict__


def remove(modules: Mapping[int, nn.Module]) -> None:
    """Undo :func:`install`, exactly."""
    for module in modules.values():
        module.config = module.__dict__.pop(_STATE).config


def fetch(collectors: Iterable[Collector | KeyCollector], modules: Mapping[int, nn.Module]) -> None:
    """Have collectors take what a compiled pass left on the modules so far."""
    for collector in collectors:
        for module in modules.values():
            collector.fetch(module.__dict__[_STATE])


@contextlib.contextmanager
def collect(
    collectors: Collector | Sequence[Collector | KeyCollector], modules: Mapping[int, nn.Module]
) -> Iterator[None]:
    """Send what the passes inside the block score to ``collectors``, one or several."""
    collectors = (collectors,) if isinstance(collectors, Collector) else tuple(collectors)
    token = None if torch.compiler.is_compiling() else _collectors.set(collectors)
    try:
        yield
        fetch(collectors, modules)
    finally:
        if token is not None:
            _collectors.reset(token)
        for module in modules.values():
            state = module.__dict__[_STATE]
            state.rows = state.keys = None
