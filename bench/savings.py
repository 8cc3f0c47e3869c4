"""What hero saves by what it does not run, keep or repeat: each thing with it against without, on a CPU.

The vision stage of LLaVA-NeXT-7B at real sizes, CLIP-ViT-L/14-336 and the projector 1024 → 4096 → 4096, with
random weights, in fp32; one picture of 2 × 2 tiles, for batches eight. Both ways of a case run in turns,
their results compared before anything is timed. What is saved is also told as a share of the vision tower's
own time, timed in the same rounds.

``python -m bench.savings --out bench/results/savings.json``; then ``python -m bench.report``.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

import hero
import hero_kernels as hk
from hero.models import clip as clip_tower
from hero.packing import Block
from hero.plan import plan_of

from . import models
from .options import add_threads, positive, use_threads
from .record import environment, write
from .timing import compare, quiet_heap, seconds, summary, take_turns

__all__ = ["Case", "cases", "main", "measure"]

KEEP = 0.2
IMAGES = 8
TOLERANCE = 1e-4  # of the largest element


class Case(NamedTuple):
    """Two ways to the same result.

    Attributes:
        repeats: calls in a timed span, for what takes microseconds.
        of_tower: whether what is saved compares with the tower's time for one picture.
    """

    name: str
    without: Callable[[], object]
    saving: Callable[[], object]
    check: Callable[[object, object], None]
    repeats: int = 1
    of_tower: bool = True


def _close(one: Tensor, other: Tensor) -> None:
    worst = float((one - other).abs().max() / one.abs().max())
    if not worst <= TOLERANCE:
        raise RuntimeError(f"expected equal results to {TOLERANCE:g}, got a difference of {worst:g}")


def _same_plan(one: object, other: object) -> None:
    if one.segments != other.segments or not torch.equal(one.valid, other.valid):
        raise RuntimeError("expected equal plans")


def cases(shape: models.Shape) -> tuple[Callable[[], object], list[Case]]:
    """The tower as the stock model runs it, and the cases."""
    model = models.build_model(shape)
    tower = model.model.vision_tower
    clip = models.build_clip(model, shape)
    tokenizer = models.build_tokenizer()
    size = 2 * shape.crop_size
    sizes = [(size, size)]
    draw = torch.Generator().manual_seed(0)
    pixels = torch.randn(1, 5, 3, shape.crop_size, shape.crop_size, generator=draw)
    encoder = hero.attach(model, keep_ratio=KEEP).encoder
    crops, plan = encoder.prepare(pixels, sizes)
    encoded = encoder.encode(crops, plan)
    scored = encoder.score(encoded, plan)
    budgets = encoder.budget(scored, plan)
    gathered = encoder.select(encoded, scored, budgets, plan)
    layer = tower.encoder.layers[-1]
    hidden = tower(crops, output_hidden_states=True).hidden_states[-2]
    length = hidden.shape[1]
    blocks = (Block(len(hidden), length, True),)
    projector = model.model.multi_modal_projector
    kept = gathered.index[gathered.index >= 0].long()

    # The projector on every token, or on those that stay.
    def project_all() -> Tensor:
        return projector(encoded.features).flatten(0, 1)[kept]

    def project_kept() -> Tensor:
        return projector(gathered.tokens)[gathered.index >= 0]

    # The sequence of all tokens: joined piece by piece as the stock model does, or gathered with newlines.
    whole = replace(encoder.config, keep_ratio=1.0)
    all_of = plan_of(plan.layouts, whole, encoder.depth, plan.device, plan.feature_layer)
    everything = encoder.budget(scored, all_of)
    features = encoded.features.contiguous()
    newline = features.new_ones(features.shape[-1])

    def join() -> Tensor:
        packed, _ = model.model.pack_image_features(
            [features], torch.tensor(sizes), "default", image_newline=newline
        )
        return packed[0]

    def gather() -> Tensor:
        rows = encoder.select(encoded, scored, everything, all_of)
        return torch.where((rows.index < 0)[:, None], newline, rows.tokens)

    # Attention of a layer with its map, or the row of CLS beside it.
    attention = layer.self_attn
    normed = layer.layer_norm1(hidden)
    query, key, value = (
        part(normed).unflatten(-1, (attention.num_heads, attention.head_dim)).transpose(1, 2)
        for part in (attention.q_proj, attention.k_proj, attention.v_proj)
    )

    def with_maps() -> tuple[Tensor, Tensor]:
        maps = (query @ key.mT * attention.scale).softmax(-1)
        return maps @ value, maps[:, :, 0, 1:]

    def with_rows() -> tuple[Tensor, Tensor]:
        output = torch.nn.functional.scaled_dot_product_attention(query, key, value, scale=attention.scale)
        return output, hk.cls_attention(query, key, attention.scale)

    def same_attention(one: tuple, other: tuple) -> None:
        for left, right in zip(one, other, strict=True):
            _close(left, right)

    # Everything after the encoder, image after image or in one pass.
    images = sizes * IMAGES
    many = plan_of(
        encoder.geometry.layouts(images), encoder.config, encoder.depth, plan.device, plan.feature_layer
    )
    tensors = {
        name: getattr(encoded, name) for name in ("features", "cls", "pooled", "scores", "entropy", "ranks")
    }
    repeated = replace(encoded, **{name: torch.cat([value] * IMAGES) for name, value in tensors.items()})

    def chosen(encoded: object, plan: object) -> Tensor:
        return encoder._choose(encoded, plan, None)[0][0]

    # CLIP's view of the tiles: a pass of its own, or the tower's features.
    relevance = hero.ClipRelevance(clip, tokenizer)

    def plan_again() -> object:
        plan_of.cache_clear()
        return encoder.prepare(pixels, sizes)[1]

    found = [
        Case(
            "CLIP's view of the tiles from the tower, not from a pass of its own",
            lambda: relevance.image_embeddings(crops, None),
            lambda: relevance.image_embeddings(None, encoded.pooled),
            _close,
        ),
        Case(
            "the last layer for CLS alone",
            lambda: layer(hidden, attention_mask=None)[:, 0],
            lambda: clip_tower._rows(layer, hidden.flatten(0, 1), blocks, slice(None, None, length)),
            _close,
        ),
        Case("the projector on kept tokens alone", project_all, project_kept, _close),
        Case("attention of a layer with the row of CLS, not its map", with_maps, with_rows, same_attention),
        Case("all tokens gathered with their newline rows, not joined", join, gather, _close),
        Case(
            f"{IMAGES} images in one pass after the encoder",
            lambda: torch.cat([chosen(encoded, plan) for _ in range(IMAGES)]),
            lambda: chosen(repeated, many),
            _close,
            of_tower=False,
        ),
        Case(
            "a plan made once",
            plan_again,
            lambda: encoder.prepare(pixels, sizes)[1],
            _same_plan,
            repeats=20,
        ),
    ]
    return (lambda: tower(crops, output_hidden_states=True)), found


def _repeat(function: Callable[[], object], times: int) -> Callable[[], object]:
    def repeated() -> None:
        for _ in range(times):
            function()

    return repeated


def measure(
    shape: models.Shape, rounds: int, clock: str, progress: Callable[[str], None]
) -> dict[str, object]:
    """Check and time every case; the record without the environment."""
    with torch.inference_mode():
        tower, found = cases(shape)
        for case in found:
            case.check(case.without(), case.saving())
        times = {case.name: {"without": [], "saving": []} for case in found}
        whole: list[float] = []
        with quiet_heap():
            for turn in range(rounds):
                whole.append(seconds(tower, clock))
                for case in found:
                    for way in take_turns(("without", "saving"), turn):
                        spent = seconds(_repeat(getattr(case, way), case.repeats), clock) / case.repeats
                        times[case.name][way].append(spent)
                progress(f"round {turn + 1}/{rounds}")
    rows = []
    for case in found:
        without, saving = times[case.name]["without"], times[case.name]["saving"]
        shares = [(a - b) / t for a, b, t in zip(without, saving, whole, strict=True)]
        rows.append(
            {
                "name": case.name,
                "without": summary(without),
                "saving": summary(saving),
                "ratio": compare(saving, without),
                "of_tower": statistics.median(shares) if case.of_tower else None,
            }
        )
    return {
        "shape": shape.describe(),
        "rounds": rounds,
        "clock": clock,
        "tower": summary(whole),
        "cases": rows,
        "seconds": times,
    }


def main(arguments: Sequence[str]) -> dict:
    """The command: returns the record it wrote."""
    parser = argparse.ArgumentParser(prog="python -m bench.savings", description=__doc__.split("\n")[0])
    parser.add_argument("--out", required=True, help="JSON file to write")
    parser.add_argument("--rounds", type=positive, default=7, help="measured rounds (default 7)")
    add_threads(parser, default=1)
    parser.add_argument("--small", action="store_true", help="tiny shapes, to test the script itself")
    options = parser.parse_args(arguments)
    use_threads(parser, options)
    shape = models.SHAPES["small" if options.small else "7b"]
    # Of the language model only the width is needed, which the projector has.
    shape = replace(shape, text=(1, *shape.text[1:3], shape.text[1] // 4))
    record = {
        "benchmark": "savings",
        "small": options.small,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        **environment("bench.savings", arguments, ("torch", "transformers")),
        "threads": torch.get_num_threads(),
        "keep_ratio": KEEP,
        **measure(shape, options.rounds, options.clock, lambda line: print(line, flush=True)),
    }
    write(options.out, record)
    for row in record["cases"]:
        print(f"{row['ratio']['paired']:.3f}  {row['name']}")
    return record


if __name__ == "__main__":
    main(sys.argv[1:])
