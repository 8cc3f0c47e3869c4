"""What hero adds to the vision tower and takes off the time to first token, on a CPU.

The vision half has the real shape: CLIP-ViT-L/14-336 on one photograph at full tiling, five crops (a
thumbnail and 2 × 2 tiles), fp32, transformers' SDPA. The language model is a small Llama, so that a run
takes minutes; weights are random, which no time depends on. Everything compared is measured in the same
run, interleaved (:mod:`bench.timing`):

1. ``tower``: the vision tower as the stock model calls it; with hero attached (``attached``), which
   captures scores and runs the last layer for CLS alone; running just what stock runs while scores are
   captured (``captured``), which shows what capture costs; and with eager attention and
   ``output_attentions``, which the released method needs. The stock call is timed twice a round: its ratio
   to itself shows what the machine can resolve.
2. ``vision``: ``get_image_features`` whole: tower, projector and packing against tower, selection and
   projector, at each keep ratio. ``stages`` splits what hero does.
3. ``ttft``: ``generate`` of one token, from processed inputs; ``prefill``: the language model alone on as
   many random embeddings. A run must take ``vision + prefill`` for its number of tokens; what it takes
   more is lost between the parts.

``python -m bench.cpu_vision --out bench/results/cpu.json``; then ``python -m bench.report``.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import resource
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from unittest import mock

import torch
from PIL import Image
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    PreTrainedTokenizerFast,
)

import hero
from hero import capture
from hero.layout import grid_pinpoints

from .options import keep_ratios, positive
from .record import ROOT, environment, write
from .timing import CLOCKS, compare, quiet_heap, seconds, summary, take_turns

__all__ = ["SMALL", "REAL", "Shape", "build_model", "build_processor", "main", "measure"]

PHOTOGRAPH = "bench/data/astronaut.jpg"
PROMPT = "USER : <image> what is in this picture ? ASSISTANT :"
KEEP = (1.0, 0.5, 0.2, 0.1)
STAGES = ("prepare", "encode", "score", "budget", "select", "project")


@dataclass(frozen=True)
class Shape:
    """Sizes of a model. Vision: layers, width, heads, mlp; text: the same; pixels of crop and patch."""

    vision: tuple[int, int, int, int]
    text: tuple[int, int, int, int]
    crop_size: int
    patch_size: int
    vocabulary: int = 1000

    @property
    def pinpoints(self) -> list[list[int]]:
        return [list(pinpoint) for pinpoint in grid_pinpoints(self.crop_size)]

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) of a picture of 2 × 2 tiles without padding."""
        return 2 * self.crop_size, 2 * self.crop_size

    def describe(self) -> dict[str, object]:
        names = ("layers", "hidden", "heads", "mlp")
        return {
            "vision": dict(zip(names, self.vision)),
            "text": dict(zip(names, self.text), vocabulary=self.vocabulary),
            "crop_size": self.crop_size,
            "patch_size": self.patch_size,
            "pinpoints": self.pinpoints,
        }


REAL = Shape(vision=(24, 1024, 16, 4096), text=(8, 1024, 16, 2816), crop_size=336, patch_size=14)
SMALL = Shape(vision=(4, 64, 4, 128), text=(2, 64, 4, 128), crop_size=56, patch_size=14)


def build_model(shape: Shape) -> LlavaNextForConditionalGeneration:
    """A random fp32 model with SDPA, weights from a fixed seed."""
    layers, hidden, heads, mlp = shape.vision
    vision = CLIPVisionConfig(
        num_hidden_layers=layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        intermediate_size=mlp,
        image_size=shape.crop_size,
        patch_size=shape.patch_size,
    )
    layers, hidden, heads, mlp = shape.text
    text = LlamaConfig(
        num_hidden_layers=layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        intermediate_size=mlp,
        vocab_size=shape.vocabulary,
        max_position_embeddings=4096,
        pad_token_id=1,
        bos_token_id=2,
        eos_token_id=3,
    )
    config = LlavaNextConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=4,
        image_grid_pinpoints=shape.pinpoints,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    config._attn_implementation = "sdpa"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlavaNextForConditionalGeneration(config).float().eval().requires_grad_(False)
    model.generation_config.pad_token_id = 1
    model.generation_config.bos_token_id = 2
    model.generation_config.eos_token_id = None
    return model


def build_processor(shape: Shape) -> LlavaNextProcessor:
    """A processor for :func:`build_model`: a Pillow image processor and a tokenizer of a few words."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    try:
        from transformers import LlavaNextImageProcessorPil as ImageProcessor
    except ImportError:
        from transformers import LlavaNextImageProcessor as ImageProcessor

    words = ["<unk>", "<pad>", "<s>", "</s>", "<image>"]
    words += [word for word in PROMPT.split() if word not in words]
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return LlavaNextProcessor(
        ImageProcessor(
            size={"shortest_edge": shape.crop_size},
            crop_size={"height": shape.crop_size, "width": shape.crop_size},
            image_grid_pinpoints=shape.pinpoints,
        ),
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            unk_token="<unk>",
            pad_token="<pad>",
            bos_token="<s>",
            eos_token="</s>",
            additional_special_tokens=["<image>"],
            padding_side="left",
            model_input_names=["input_ids", "attention_mask"],
        ),
        patch_size=shape.patch_size,
        vision_feature_select_strategy="default",
        image_token="<image>",
        num_additional_image_tokens=1,
    )


class _TimedCollector(capture.Collector):
    """A collector that knows how long it took."""

    seconds = 0.0
    now = staticmethod(time.perf_counter)

    def add(self, *args, **kwargs) -> None:
        begin = self.now()
        super().add(*args, **kwargs)
        type(self).seconds += self.now() - begin


class Bench:
    """The model under test and everything measured of it.

    Attributes:
        times: ``{group: {variant: seconds of each round}}``. A variant of ``vision``, ``ttft`` and
            ``stages`` is a keep ratio or ``stock``, one of ``prefill`` a number of tokens.
        prompt_tokens, visual_tokens: ``{variant: tokens}``.
    """

    def __init__(self, shape: Shape, keep: Sequence[float], clock: str):
        self.shape = shape
        self.clock = clock
        self.keep = {f"{ratio:g}": ratio for ratio in keep}
        self.model = build_model(shape)
        self.processor = build_processor(shape)
        with Image.open(ROOT / PHOTOGRAPH) as photograph:
            height, width = shape.image_size
            self.image = photograph.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
        self.inputs = {"stock": self._process()}
        for name, ratio in self.keep.items():
            with self._attached(ratio):
                self.inputs[name] = self._process()
        image_token = self.model.config.image_token_id
        ids = {name: inputs["input_ids"] for name, inputs in self.inputs.items()}
        self.prompt_tokens = {name: ids.shape[1] for name, ids in ids.items()}
        self.visual_tokens = {name: int((ids == image_token).sum()) for name, ids in ids.items()}
        self.pixels = self.inputs["stock"]["pixel_values"]
        self.crops = self.pixels.flatten(0, 1) if self.pixels.dim() == 5 else self.pixels
        self.sizes = self.inputs["stock"]["image_sizes"]
        self.embeddings = {
            tokens: torch.randn(
                1, tokens, self.shape.text[1], generator=torch.Generator().manual_seed(tokens)
            )
            for tokens in sorted(set(self.prompt_tokens.values()), reverse=True)
        }
        self.tower_options = self._tower_options()
        self.times: dict[str, dict[str, list]] = defaultdict(lambda: defaultdict(list))

    # What is measured.

    @property
    def tower(self) -> torch.nn.Module:
        return self.model.model.vision_tower

    def _process(self) -> dict:
        return dict(self.processor(images=self.image, text=PROMPT, return_tensors="pt"))

    @contextlib.contextmanager
    def _attached(self, ratio: float | None) -> Iterator[hero.Handle | None]:
        """Hero attached at a keep ratio; the stock model where ``None``."""
        if ratio is None:
            yield None
        else:
            with hero.attach(self.model, self.processor, keep_ratio=ratio) as handle:
                yield handle

    def _tower_options(self) -> dict:
        """What the stock ``get_image_features`` asks of the tower."""
        seen = {}
        hook = self.tower.register_forward_pre_hook(
            lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True
        )
        try:
            self.features()
        finally:
            hook.remove()
        return {name: seen[name] for name in ("output_hidden_states", "output_attentions") if name in seen}

    def stock_tower(self) -> object:
        return self.tower(self.crops, return_dict=True, **self.tower_options)

    def eager_tower(self) -> object:
        return self.tower(self.crops, return_dict=True, output_hidden_states=True, output_attentions=True)

    def features(self) -> list[torch.Tensor]:
        """The vision stage, stock or attached."""
        return self.model.model.get_image_features(self.pixels, self.sizes, return_dict=True).pooler_output

    def first_token(self, name: str) -> torch.Tensor:
        return self.model.generate(**self.inputs[name], max_new_tokens=1, do_sample=False)

    def prefill(self, tokens: int) -> torch.Tensor:
        hidden = self.model.model.language_model(
            inputs_embeds=self.embeddings[tokens],
            attention_mask=torch.ones(1, tokens, dtype=torch.long),
            use_cache=True,
        ).last_hidden_state
        return self.model.lm_head(hidden[:, -1:])

    # Rounds.

    def warm_up(self) -> None:
        """Run what :meth:`check` has not run yet."""
        self.first_token("stock")
        self._round_stages(0)
        self.times.clear()

    def check(self) -> None:
        """That what is timed is right, before any time is reported.

        Raises:
            RuntimeError: a wrong number of tokens, or features that are not the stock model's.
        """
        (full,) = self.features()
        with self._attached(1.0) as handle:
            (same,) = self.features()
            layouts = handle.encoder.prepare(self.pixels, self.sizes)[1].layouts
        worst = float((full - same).abs().max() / full.abs().max()) if full.shape == same.shape else None
        if worst is None or worst > 1e-5:
            raise RuntimeError(f"keep_ratio=1: expected the stock features to 1e-5, got {worst}")
        geometry = handle.encoder.geometry
        for name, ratio in {"stock": 1.0, **self.keep}.items():
            count = hero.count_tokens(
                hero.HeroConfig(keep_ratio=ratio), layouts[0].image_size, geometry=geometry
            )
            if self.visual_tokens[name] != count:
                raise RuntimeError(f"{name}: expected {count} placeholders, got {self.visual_tokens[name]}")

    def _time(self, group: str, variant: str, function: Callable[[], object]) -> None:
        self.times[group][variant].append(seconds(function, self.clock))

    def round(self, turn: int) -> None:
        """Measure everything once; the tower twice, there and back."""
        groups = (self._round_tower, self._round_vision, self._round_first_token, self._round_stages)
        for group in take_turns(groups, turn):
            group(turn)

    def _round_tower(self, turn: int) -> None:
        default = next(iter(self.keep.values()))  # neither scores nor layers depend on the ratio
        order = take_turns(("stock", "attached", "captured"), turn)
        for variant in (*order, *reversed(order)):
            with self._attached(None if variant == "stock" else default) as handle:
                call = self.stock_tower
                if handle is not None:
                    crops, layouts = handle.encoder.prepare(self.pixels, self.sizes)
                    whole = self.tower_options if variant == "captured" else {}
                    call = functools.partial(handle.encoder.encode, crops, layouts, **whole)
                self._time("tower", variant, call)
        self.tower.set_attn_implementation("eager")
        try:
            self._time("tower", "eager", self.eager_tower)
        finally:
            self.tower.set_attn_implementation("sdpa")

    def _variants(self, turn: int) -> Iterator[str]:
        """``stock`` and each keep ratio, with hero on the model accordingly."""
        for name in take_turns(("stock", *self.keep), turn):
            with self._attached(self.keep.get(name)):
                yield name

    def _round_vision(self, turn: int) -> None:
        for name in self._variants(turn):
            self._time("vision", name, self.features)

    def _round_first_token(self, turn: int) -> None:
        for name in self._variants(turn):
            self._time("ttft", name, functools.partial(self.first_token, name))
        for tokens in take_turns(tuple(self.embeddings), turn):
            self._time("prefill", str(tokens), functools.partial(self.prefill, tokens))

    def _round_stages(self, turn: int) -> None:
        """Hero's stages one by one; encoded once, since the keep ratio matters only afterwards."""
        encoded, now = None, CLOCKS[self.clock]
        for name in take_turns(tuple(self.keep), turn):
            with self._attached(self.keep[name]) as handle:
                encoder, stages = handle.encoder, self.times["stages"]
                if encoded is None:
                    _TimedCollector.seconds, _TimedCollector.now = 0.0, staticmethod(now)
                    with mock.patch.object(capture, "Collector", _TimedCollector):
                        begin = now()
                        crops, layouts = encoder.prepare(self.pixels, self.sizes)
                        prepared = now()
                        encoded = encoder.encode(crops, layouts)
                        ended = now()
                    stages["prepare"].append(prepared - begin)
                    stages["encode"].append(ended - prepared)
                    stages["capture"].append(_TimedCollector.seconds)
                clock = [now()]
                scored = encoder.score(encoded, layouts)
                clock.append(now())
                budgets = encoder.budget(scored, layouts)
                clock.append(now())
                gathered = encoder.select(encoded, scored, budgets, layouts)
                clock.append(now())
                encoder.project(gathered)
                clock.append(now())
                for stage, begin, end in zip(STAGES[2:], clock, clock[1:], strict=False):
                    stages[f"{stage} {name}"].append(end - begin)


def _summarise(bench: Bench) -> dict[str, object]:
    """What the raw times say."""
    times = bench.times
    tower, vision, ttft, prefill = (times[group] for group in ("tower", "vision", "ttft", "prefill"))
    # Two calls a round of all but the eager one, there and back: the nth of each are a pair.
    halves = {name: (tower[name][0::2], tower[name][1::2]) for name in ("stock", "attached")}
    once = {name: [sum(pair) / 2 for pair in zip(*half, strict=True)] for name, half in halves.items()}
    stages = times["stages"]
    shares = [part / whole for part, whole in zip(stages["capture"], stages["encode"], strict=True)]
    attached, captured = (compare(tower[name], tower["stock"]) for name in ("attached", "captured"))
    result = {
        "tower_ratio": attached["paired"],
        "capture_ratio": captured["paired"],
        "tower": {
            "attached": attached,
            "captured": captured,
            "eager": compare(tower["eager"], once["stock"]),
            "eager_to_attached": compare(tower["eager"], once["attached"]),
            "control": compare(*halves["stock"]),
            "capture_share": summary(shares),
        },
        "vision": {name: compare(vision[name], vision["stock"]) for name in bench.keep},
        "ttft": {},
        "times": {
            group: {name: summary(values) for name, values in variants.items()}
            for group, variants in times.items()
        },
    }
    full = [v + p for v, p in zip(vision["stock"], prefill[str(bench.prompt_tokens["stock"])], strict=True)]
    for name in ("stock", *bench.keep):
        alone = prefill[str(bench.prompt_tokens[name])]
        parts = [v + p for v, p in zip(vision[name], alone, strict=True)]
        free = [v + p for v, p in zip(vision["stock"], alone, strict=True)]
        result["ttft"][name] = {
            "to_stock": compare(ttft[name], ttft["stock"]),
            "predicted_to_stock": compare(parts, full),  # vision as measured + prefill of so many tokens
            "free_to_stock": compare(free, full),  # the same if dropping cost and saved nothing in vision
            "to_predicted": compare(ttft[name], parts),
        }
    return result


def measure(
    shape: Shape, keep: Sequence[float], rounds: int, clock: str, progress: Callable[[str], None]
) -> dict:
    """Run the benchmark; the record without the environment."""
    load = [os.getloadavg()[0]]
    with torch.inference_mode(), contextlib.ExitStack() as heap:
        bench = Bench(shape, keep, clock)
        bench.check()
        heap.enter_context(quiet_heap())
        bench.warm_up()
        for turn in range(rounds):
            bench.round(turn)
            attached = compare(bench.times["tower"]["attached"], bench.times["tower"]["stock"])
            low, high = attached["interval"]
            progress(
                f"round {turn + 1}/{rounds}: tower attached / stock {attached['paired']:.4f} "
                f"({low:.4f} to {high:.4f})"
            )
    load.append(os.getloadavg()[0])
    height, width = shape.image_size
    return {
        "shape": shape.describe(),
        "image": {"file": PHOTOGRAPH, "height": height, "width": width, "crops": len(bench.crops)},
        "dtype": str(bench.model.dtype).removeprefix("torch."),
        "attention": "sdpa",
        "clock": clock,
        "rounds": rounds,
        "visual_tokens": bench.visual_tokens,
        "prompt_tokens": bench.prompt_tokens,
        "tower_options": {name: repr(value) for name, value in bench.tower_options.items()},
        "load_average": load,
        "peak_memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "summary": _summarise(bench),
        "seconds": bench.times,
    }


def main(arguments: Sequence[str]) -> dict:
    """The command: returns the record it wrote."""
    parser = argparse.ArgumentParser(prog="python -m bench.cpu_vision", description=__doc__.split("\n")[0])
    parser.add_argument("--out", required=True, help="JSON file to write")
    parser.add_argument("--rounds", type=positive, default=6, help="measured rounds (default 6)")
    parser.add_argument("--keep", type=keep_ratios, default=KEEP, help="keep ratios (default 1,0.5,0.2,0.1)")
    parser.add_argument("--threads", type=positive, help="threads of torch (default: torch's own)")
    parser.add_argument("--clock", choices=sorted(CLOCKS), default="wall", help="with --threads 1 alone: cpu")
    parser.add_argument("--small", action="store_true", help="tiny shapes, to test the script itself")
    options = parser.parse_args(arguments)
    if options.clock == "cpu" and options.threads != 1:
        parser.error("--clock cpu: expected --threads 1, since waiting threads count too")
    if options.threads:
        torch.set_num_threads(options.threads)
    shape = SMALL if options.small else REAL
    record = {
        "benchmark": "cpu_vision",
        "small": options.small,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        **environment("bench.cpu_vision", arguments, ("torch", "transformers", "tokenizers", "numpy")),
        "threads": torch.get_num_threads(),
        **measure(shape, options.keep, options.rounds, options.clock, lambda line: print(line, flush=True)),
    }
    write(options.out, record)
    return record


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])
