"""Counts of the families beside LLaVA-NeXT: those of published models, of real images, and without torch."""

import functools
import math
import random
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from independent import tiny_image
from independent_families import TWO, tiny_model
from test_families import RUN_PER_CROP as IDEFICS
from test_families import model_of, prompt_of
from test_families import processor_or_skip as processor_of
from transformers.image_utils import SizeDict

import hero
from hero.layout import Geometry
from hero.tiling import LongestEdge, NearestAspect, Pinpoints, Whole

OURS = ("internvl", "llava_onevision", *IDEFICS)
SLOW = pytest.mark.slow


def draw(generator):
    """(height, width), often far from a square."""
    if generator.random() < 0.5:
        return generator.randint(1, 2400), generator.randint(1, 2400)
    return tuple(round(math.exp(generator.uniform(0, math.log(6000)))) for _ in range(2))


def share(ratio, count):
    return math.floor(Fraction(ratio) * count)


class Blank:
    """Images of one colour without memory: what image processors cut, at any size."""

    def __init__(self, height, width):
        self.pixels = np.broadcast_to(np.uint8(0), (3, height, width))

    @staticmethod
    def resize(image, size, resample=None, **kwargs):
        if size.longest_edge:
            module = sys.modules[transformers.Idefics3ImageProcessorPil.__module__]
            height, width = module.get_resize_output_image_size(image, size.longest_edge)
        else:
            height, width = size.height, size.width
        return Blank(height, width).pixels


def idefics_crops(images, size):
    """Crops by the image processor's own steps, whose helper for counting is wrong for some sizes."""
    crop, pixels = images.max_image_size["longest_edge"], Blank(*size).pixels
    edges = SizeDict(longest_edge=images.size["longest_edge"])
    stub = type("Stub", (type(images),), {"resize": staticmethod(Blank.resize)})()
    limits = {"longest_edge": crop}
    pixels = stub.resize_for_vision_encoder(stub.resize(pixels, edges), crop)
    _, rows, columns = stub.split_images(pixels, max_image_size=limits)
    return 1 + rows * columns


def published_internvl(most):
    square = {"height": 448, "width": 448}
    processor = processor_of("internvl", size=square, max_patches=most)
    processor.image_seq_length = 256
    model = tiny_model(family="internvl", vision={"image_size": [448, 448], "patch_size": [14, 14]})

    def count(size, ratio):
        crops = processor.image_processor.get_number_of_image_patches(*size, {"crop_to_patches": True})
        return share(ratio, 256) + (share(ratio, 256 * (crops - 1)) if crops > 1 else 0)

    return model, processor, count


def published_idefics(family, crop, edges, patch, scale):
    limits = {"size": {"longest_edge": edges}, "max_image_size": {"longest_edge": crop}}
    processor = processor_of(family, **limits)
    patches = (crop // patch // scale) ** 2
    processor.image_seq_len = patches
    vision = {"image_size": crop, "patch_size": patch}
    model = tiny_model(family=family, vision=vision, scale_factor=scale)

    def count(size, ratio):
        tiles = idefics_crops(processor.image_processor, size) - 1
        return share(ratio, patches) + share(ratio, patches * tiles)

    return model, processor, count


def stitched(processor, pinpoints, crop, size, ratio):
    """Of LLaVA-NeXT and LLaVA-OneVision, by their processors' own two functions."""
    height, width = transformers.image_processing_utils.select_best_resolution(list(size), pinpoints)
    side, grid = crop // 14, (height // crop, width // crop)
    given = (processor, *size, side, side, *grid)
    valid, newlines = type(processor)._get_unpadded_features(*given)
    whole, _ = transformers.LlavaNextProcessor._get_unpadded_features(*given)
    room = side * side * grid[0] * grid[1] if whole == valid else valid  # or resized
    kept = share(ratio, side * side) + min(share(ratio, room), valid) + newlines
    if ratio == 1:
        assert kept == processor._get_number_of_features(*size, crop, crop)
    return kept


def published_onevision():
    pinpoints = [[384 * rows, 384 * columns] for rows in range(1, 7) for columns in range(1, 7)]
    square = {"height": 384, "width": 384}
    processor = processor_of("llava_onevision", size=square, image_grid_pinpoints=pinpoints)
    processor.num_image_tokens = 729
    vision = {"image_size": 384, "patch_size": 14}
    model = tiny_model(family="llava_onevision", vision=vision, image_grid_pinpoints=pinpoints)
    return model, processor, functools.partial(stitched, processor, pinpoints, 384)


def granite():
    """LLaVA-NeXT with SigLIP and grids of up to 10 tiles; without a model."""
    grids = [(rows, columns) for rows in range(1, 11) for columns in range(1, 11) if rows * columns <= 10]
    pinpoints = [[384 * rows, 384 * columns] for rows, columns in grids]
    processor = processor_of("llava_next", "siglip")
    processor.image_processor.image_grid_pinpoints = pinpoints
    geometry = Geometry(384, 14, Pinpoints(tuple(map(tuple, pinpoints))))
    return geometry, processor, functools.partial(stitched, processor, pinpoints, 384)


PUBLISHED = {
    "InternVL, 12 tiles": functools.partial(published_internvl, 12),
    "InternVL, 6 tiles": functools.partial(published_internvl, 6),
    "LLaVA-OneVision": published_onevision,
    "granite-vision": granite,
    "Idefics3": functools.partial(published_idefics, "idefics3", 364, 4 * 364, 14, 2),
    "SmolVLM 512": functools.partial(published_idefics, "smolvlm", 512, 4 * 512, 16, 4),
    "SmolVLM 384": functools.partial(published_idefics, "smolvlm", 384, 3 * 384, 14, 3),
    "SmolVLM, no multiple": functools.partial(published_idefics, "smolvlm", 512, 1500, 16, 4),
}


@pytest.mark.parametrize("sizes", [100, pytest.param(3000, marks=SLOW)])
@pytest.mark.parametrize("name", PUBLISHED)
def test_counts_of_published_models(name, sizes):
    model, processor, count = PUBLISHED[name]()
    generator = random.Random(f"{name} {sizes}")
    images = [draw(generator) for _ in range(sizes)]
    images += [(1, 1), (1, 9000), (9000, 1), (2, 5000), (4097, 64)]
    for ratio in ("1", "0.3"):
        config = hero.HeroConfig(keep_ratio=float(ratio))
        geometry = model
        if not isinstance(model, Geometry):
            with hero.attach(model, processor, config=config) as handle:
                geometry = handle.parts.geometry
                assert [handle.count_tokens(size) for size in images[:9]] == [
                    count(size, Fraction(ratio)) for size in images[:9]
                ]
        ours = [hero.count_tokens(config, size, geometry=geometry) for size in images]
        assert ours == [count(size, Fraction(ratio)) for size in images]


@pytest.mark.parametrize("sizes", [12, pytest.param(60, marks=SLOW)])
@pytest.mark.parametrize(
    ("family", "options"),
    [*((family, {}) for family in OURS), *((family, {"size": {"longest_edge": 150}}) for family in IDEFICS)],
)
def test_counts_of_real_images(family, options, sizes):
    """What the attached processor plans and writes is the count, and what the model packs."""
    generator, model = random.Random(family), model_of(family)
    processor = processor_of(family, **options)
    words = len(processor.tokenizer(TWO.replace("<image>", ""))["input_ids"])
    with hero.attach(model, processor, keep_ratio=0.3) as handle, torch.no_grad():
        for seed in range(sizes):
            size = generator.randint(1, 400), generator.randint(1, 400)
            if seed % 3 == 0:
                size = (size[0] % 9 + 1, size[1]) if seed % 2 else (size[0], size[1] % 9 + 1)
            inputs = prompt_of(family, processor, TWO, tiny_image(*size, seed))
            wanted = handle.count_tokens(size)
            assert int((inputs["input_ids"] == handle.image_token_id).sum()) == wanted
            if family != "smolvlm":  # which cannot plan
                [planned] = processor._get_num_multimodal_tokens([size])["num_image_tokens"]
                # transformers plans newlines between rows of tiles, which the tiny tokenizer drops.
                rows = handle.parts.geometry.layout(size).grid[0] if family == "idefics3" else 0
                assert planned == inputs["input_ids"].shape[1] - words + max(rows - 1, 0)
            assert model(**inputs).logits.isfinite().all()
            assert handle.last.lengths == [wanted]


def test_counting_needs_no_torch():
    code = """
import sys
sys.modules.update(dict.fromkeys(("torch", "transformers", "numpy")))
import hero
from hero.layout import Geometry
from hero.tiling import LongestEdge, NearestAspect, Pinpoints, Whole
own = dict(thumbnail="last", stitched=False, newlines=False)
for geometry in (
    Geometry(448, 28, NearestAspect(1, 12), **own), Geometry(512, 64, LongestEdge(2048), **own),
    Geometry(384, 14, Pinpoints(((384, 384), (384, 768), (1152, 1536))), resized_beyond=9),
    Geometry(336, 14, Whole(), newlines=False),
):
    print(hero.count_tokens(hero.HeroConfig(keep_ratio=0.3), (900, 1300), geometry=geometry))
"""
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    tilings = NearestAspect(1, 12), LongestEdge(2048), Pinpoints(((384, 384), (384, 768), (1152, 1536)))
    grids = [one.grid(900, 1300, crop) for one, crop in zip(tilings, (448, 512, 384), strict=True)]
    assert grids == [(2, 3), (3, 4), (3, 4)] and Whole().grid(900, 1300, 336) == (0, 0)
    wanted = [76 + share("0.3", 6 * 256), 19 + share("0.3", 12 * 64)]
    assert [int(line) for line in done.stdout.split()][:2] == wanted
    assert int(done.stdout.split()[3]) == share("0.3", 576)
