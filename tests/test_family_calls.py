"""Counts, options of a call, policies, refusals and quantised models, for the families beside LLaVA-NeXT."""

import functools
import math
import random
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from independent import (
    CHAT_TEMPLATE,
    CROP,
    ImageResult,
    Rule,
    allocate_exact,
    allocate_floor,
    numbers,
    quantised,
    select,
    tiny_image,
)
from independent_families import (
    PAIR,
    TWO,
    InternVLReference,
    batch_of,
    independent_of,
    tiny_model,
    tiny_picture,
)
from independent_policies import PEERS, IndependentPeers, IndependentPlus, PeerRule, counts
from PIL import Image
from test_families import RUN_PER_CROP as IDEFICS
from test_families import processor_or_skip as processor_of
from test_llava_next import assert_rows_equal, config_of, rule_of
from transformers import pipeline
from transformers.image_utils import SizeDict

import hero
from hero import calls
from hero.layout import Geometry
from hero.policies import POLICIES
from hero.tiling import LongestEdge, NearestAspect, Pinpoints, Whole

OURS = ("internvl", "llava_onevision", *IDEFICS)
SLOW = pytest.mark.slow


@functools.cache
def model_of(family):
    return tiny_model(family=family)


@functools.cache
def reference_of(family):
    return independent_of(model_of(family))


def ask(processor, text, *images, **options):
    """The processor's output for one prompt with ``<image>``."""
    images = [list(images)] if hasattr(processor, "image_seq_len") else list(images)
    text = [text.replace("<image>", processor.image_token)]
    return processor(images=images, text=text, return_tensors="pt", **options)


# ------------------------------------------------------------------------------------------------- counts


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
            inputs = ask(processor, TWO, tiny_image(*size, seed))
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


# ------------------------------------------------------------------------------------------------- options

OPTIONS = [
    *(("internvl", given) for given in ({"max_patches": 4}, {"crop_to_patches": False}, {"min_patches": 4})),
    *(
        (family, given)
        for family in IDEFICS
        for given in ({"do_image_splitting": False}, {"size": {"longest_edge": 2 * CROP}})
    ),
]


@pytest.mark.parametrize(("family", "options"), OPTIONS)
def test_options_of_a_call(family, options):
    """Of the image processor. The stock prompt with the same options is shortened to the same."""
    model, reference, sizes = model_of(family), reference_of(family), ((120, 100), (60, 170))
    images = [tiny_picture(*size, seed) for seed, size in enumerate(sizes)]
    stock, processor = processor_of(family), processor_of(family)
    given = ask(stock, PAIR, *images, **options)
    assert given["pixel_values"].shape != ask(stock, PAIR, *images)["pixel_values"].shape
    rule = rule_of({"keep_ratio": 0.3})
    _, results, _ = reference._rows(given, rule, None, None)
    logits = reference.logits(given, rule)
    with hero.attach(model, processor, config=config_of({"keep_ratio": 0.3})) as handle, torch.no_grad():
        written = ask(processor, PAIR, *images, **options)
        kept = sum(len(result.index) for result in results)
        assert int((written["input_ids"] == handle.image_token_id).sum()) == kept
        for inputs in (written, given):
            output = model(**inputs).logits
            assert handle.last.index.tolist() == [place for result in results for place in result.index]
            assert_rows_equal(output, logits, 5e-5)
    with hero.attach(model, tokenizer=stock.tokenizer, config=config_of({"keep_ratio": 0.3})):
        assert_rows_equal(model(**given).logits.detach(), logits, 5e-5)


@pytest.mark.parametrize(
    ("keep", "options"),
    [
        *((keep, {"max_patches": 4}) for keep in ({"keep_tokens": 15}, {"keep_ratio": 0.05})),
        *(({"policy": "hired"}, options) for family, options in OPTIONS if family == "internvl"),
        ({"policy": "globalcom2"}, {"max_patches": 4}),
    ],
    ids=str,
)
def test_internvl_cut_otherwise_than_attached(keep, options):
    """The model is told the grids of the call, where runs of placeholders do not tell them."""
    model, processor = model_of("internvl"), processor_of("internvl")
    images = [tiny_picture(*size, seed) for seed, size in enumerate(((120, 100), (60, 170), (112, 168)))]
    text = TWO.replace("<image>", "<image> <image> <image>")
    with hero.attach(model, processor, **keep) as handle, torch.no_grad():
        otherwise = ask(processor, text, *images, **options)
        first = model(**otherwise).logits
        layouts = handle.last.layout
        assert [one.image_size for one in layouts] == [image.size[::-1] for image in images]
    for name, value in options.items():
        setattr(processor.image_processor, name, value)
    options = {} if options.get("crop_to_patches", True) else options  # the processor's default wins
    with hero.attach(model, processor, **keep) as handle, torch.no_grad():
        assert torch.equal(model(**ask(processor, text, *images, **options)).logits, first)
        assert handle.last.layout == layouts


@pytest.mark.parametrize("family", OURS)
def test_kinds_of_images(family):
    """Files, arrays and tensors are counted as pictures are."""
    picture, processor = tiny_picture(120, 90), processor_of(family)
    pixels = np.array(picture)
    kinds = [picture, pixels, pixels.transpose(2, 0, 1), torch.tensor(pixels).permute(2, 0, 1)]
    with hero.attach(model_of(family), processor, keep_ratio=0.3):
        wanted, *others = [ask(processor, TWO, image)["input_ids"] for image in kinds]
    assert all(torch.equal(one, wanted) for one in others)


def test_internvl_with_less_than_a_token_a_tile():
    """5 tiles have as many tokens as 6 then: the attached processor tells the size."""
    model, processor = model_of("internvl"), processor_of("internvl")
    images = tiny_image(112, 168), tiny_image(60, 170, 1)
    given = ask(processor, PAIR, *images)
    reference, rule = reference_of("internvl"), rule_of({"keep_ratio": 0.05})
    logits = reference.logits(given, rule)
    with hero.attach(model, processor, config=config_of({"keep_ratio": 0.05})) as handle, torch.no_grad():
        own = ask(processor, PAIR, *images)
        assert sum(handle.count_tokens(image.size[::-1]) for image in images) < 14
        assert_rows_equal(model(**own).logits, logits, 5e-5)
    with hero.attach(model, config=config_of({"keep_ratio": 0.05})), torch.no_grad():
        assert_rows_equal(model(**given).logits, logits, 5e-5)  # runs of the stock length tell it too
        del own["image_sizes"]
        for call in (model, model.generate):
            with pytest.raises(ValueError, match=r"^keep_ratio: expected at least 0.0625, or a processor"):
                call(**own)


# ------------------------------------------------------------------------------------------------ policies


class InternVLPeers(InternVLReference, IndependentPeers):
    """The peers on InternVL, whose thumbnail is last, and whose tokens stand for four patches.

    Set ``grids``, (rows, columns) of tiles of each image, before use.
    """

    def _read(self, inputs):
        layouts, crops = super()._read(inputs)
        for layout, (rows, columns) in zip(layouts, self.grids, strict=True):
            for y in range(rows * self.side):
                places = [(y // self.side * columns + x // self.side, x) for x in range(columns * self.side)]
                line = [(1 + tile, y % self.side * self.side + x % self.side) for tile, x in places]
                layout.rows.append(line)
        return layouts, crops

    def _image(self, crops, layout, rule, first, text_embedding, image_embeddings):
        last = len(self.vision_tower.encoder.layer) - 1
        scores, _, features = self._encoded(
            crops, layout, Rule(tile_layers=(last,), thumbnail_layers=(last,))
        )
        early, _, _ = self._encoded(crops, layout, Rule(tile_layers=(0,), thumbnail_layers=(0,)))
        valid = [self.patches] * (layout.crops - 1)
        thumbnail, total, multiplier = counts(rule, self.patches, valid)
        shares = self._shares(rule, layout, scores[0], early[0]) if valid else []
        if rule.allocation == "exact":
            budgets = [thumbnail, *allocate_exact(quantised(shares), valid, total)]
        else:
            budgets = [thumbnail, *(allocate_floor(quantised(shares), valid, multiplier) if valid else [])]
        if rule.policy == "globalcom2" and valid:
            scores = self._half_global(layout, scores)
        kept, own = [], []
        for crop in range(layout.crops):
            place = layout.valid[crop]
            if rule.policy == "visionzip":
                keys = self._keys(crops[layout.number(crop)], last)
                picked, means = self._visionzip(scores[crop], keys, features[crop], place, budgets[crop])
            else:
                picked, means = select(scores[crop], place, budgets[crop]), {}
            kept.append(picked)
            own.append({token: means.get(token, features[crop][token]) for token in picked})
        index, tokens = self._sequence(layout, first, kept, own)
        listed = (layout.in_order(values) for values in (budgets, [0.0, *shares], scores))
        return ImageResult(index, *listed, tokens)

    def _keys(self, pixels, number):
        """The key of each token: the mean over heads, then over its patches."""
        layer = self.vision_tower.encoder.layer[number]
        hidden = self.vision_tower(pixels[None], output_hidden_states=True).hidden_states[number]
        keys = layer.attention.k_norm(layer.attention.k_proj(layer.layernorm_before(hidden)))[0, 1:]
        keys = keys.unflatten(-1, (layer.attention.num_heads, -1)).double().mean(1)
        return [numbers(keys[self.patches_of(token)].mean(0)) for token in range(self.patches)]


class InternVLPlus(InternVLReference, IndependentPlus):
    pass


@functools.cache
def peers():
    return InternVLPeers(model_of("internvl"))


KEEPS = {"0.3": {"keep_ratio": 0.3}, "30 tokens": {"keep_tokens": 30}}
KEEPS |= {"0.9": {"keep_ratio": 0.9}, "floor": {"keep_ratio": 0.5, "allocation": "floor"}}


def listed(results, name):
    return [value for result in results for value in getattr(result, name)]


@pytest.mark.parametrize(
    "keep", [keep if keep == "0.3" else pytest.param(keep, marks=SLOW) for keep in KEEPS]
)
@pytest.mark.parametrize("case", ["two sizes", "two images in a prompt", "one crop"])
@pytest.mark.parametrize("policy", [*PEERS, "hero+"])
def test_policies_on_internvl(policy, case, keep):
    model, processor, options = model_of("internvl"), processor_of("internvl"), KEEPS[keep]
    given = batch_of(processor, "internvl", case)
    if policy == "hero+":
        rule, reference = rule_of({**options, "tile_layers": (1, 2)}), InternVLPlus(model)
    else:
        ratio = options.get("keep_ratio")
        rule = PeerRule(policy, **{**options, "keep_ratio": None if ratio is None else str(ratio)})
        reference = peers()
    config = config_of(options | {"policy": policy}) if policy == "hero+" else None
    config = config or hero.HeroConfig(policy=policy, **options)
    with hero.attach(model, processor, config=config) as handle, torch.no_grad():
        inputs = batch_of(processor, "internvl", case)
        reference.grids = inputs["image_sizes"][:, 2:].tolist()
        rows, results, _ = reference._rows(given, rule, None, None)
        logits = [reference._forward(row.embeds) for row in rows]
        output, last = model(**inputs).logits, handle.last
        counts_of = [handle.count_tokens(cut[:2]) for cut in inputs["image_sizes"].tolist()]
    shares = torch.tensor(listed(results, "shares"))
    torch.testing.assert_close(last.shares, shares, rtol=0, atol=3e-5)
    assert last.budgets.tolist() == listed(results, "budgets")
    assert last.index.tolist() == listed(results, "index")
    if "floor" not in keep:
        assert last.lengths == counts_of
    assert_rows_equal(output, logits, 5e-5)


@pytest.mark.parametrize("which", ["patched", "stock"])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("family", OURS)
def test_every_policy(family, policy, which):
    """It runs, twice alike, or is refused by name."""
    model, processor = model_of(family), processor_of(family)
    own = {"processor": processor} if which == "patched" else {"tokenizer": processor.tokenizer}
    if family != "internvl" and POLICIES[policy].requires_cls:
        with pytest.raises(ValueError, match=rf"^policy: expected one of 'hero', .* got '{policy}'"):
            hero.attach(model, **own, policy=policy, keep_ratio=0.3)
        return
    with hero.attach(model, **own, policy=policy, keep_ratio=0.3) as handle, torch.no_grad():
        inputs = batch_of(processor, family, "two images in a prompt")
        if which == "stock" and policy in ("hired", "globalcom2"):
            with pytest.raises(ValueError, match=r"^processor: expected one with hero attached for a policy"):
                model(**inputs)
            return
        first, once = model(**inputs).logits, handle.last
        assert torch.equal(model(**inputs).logits, first)
        assert torch.equal(handle.last.index, once.index)
        if which == "patched" or family not in IDEFICS:  # whose processor tells the longest edge
            assert once.lengths == [handle.count_tokens(size) for size in ((100, 60), (50, 50))]


@pytest.mark.parametrize("family", OURS[1:])
def test_what_needs_cls_is_refused(family):
    for options, message in (
        ({"second_softmax": True}, "second_softmax: expected False for an encoder without CLS"),
        ({"attention": "fused"}, "attention: expected 'native' for an encoder without CLS"),
    ):
        with pytest.raises(ValueError, match=f"^{message}"):
            hero.attach(model_of(family), **options)


# ---------------------------------------------------------------------------------------------------- ties


@pytest.mark.parametrize("which", ["patched", "stock"])
@pytest.mark.parametrize("family", OURS)
def test_exact_ties(family, which):
    """Images of one colour, and heads that attend to all patches alike: the first ones are kept."""
    model = tiny_model(family=family)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "q_proj" in name and "vision" in name:
                parameter.zero_()
    reference, rule = independent_of(model), rule_of({"keep_ratio": 0.3})
    processor = processor_of(family)
    images = [Image.new("RGB", size, colour) for size, colour in (((90, 120), "red"), ((170, 60), "blue"))]
    given = _rows_of(processor, images)
    _, results, _ = reference._rows(given, rule, None, None)
    logits = reference.logits(given, rule)
    own = {"processor": processor} if which == "patched" else {"tokenizer": processor.tokenizer}
    with hero.attach(model, **own, config=config_of({"keep_ratio": 0.3})) as handle, torch.no_grad():
        output = model(**_rows_of(processor, images)).logits
    assert handle.last.index.tolist() == listed(results, "index")
    assert_rows_equal(output, logits, 5e-5)


def _rows_of(processor, images):
    """One image a row, the second padded."""
    texts = [
        text.replace("<image>", processor.image_token) for text in (TWO, PAIR.replace("and <image>", ""))
    ]
    nested = [[image] for image in images] if hasattr(processor, "image_seq_len") else images
    return processor(images=nested, text=texts, padding=True, return_tensors="pt")


# ------------------------------------------------------------------------------- chat template and pipeline


@pytest.mark.parametrize("family", OURS)
def test_chat_template_and_pipeline(family):
    model, processor, image = model_of(family), processor_of(family), tiny_picture(120, 90)
    if family == "smolvlm":  # of which the template's method reads defaults, and which wants torchvision
        processor.video_processor = SimpleNamespace(num_frames=1, fps=1, size={}, video_sampling={})
    processor.chat_template = CHAT_TEMPLATE.replace("<image>", processor.image_token)
    words = {"type": "text", "text": "what is this ?"}
    chat = [{"role": "user", "content": [{"type": "image", "image": image}, words]}]
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
    reference, rule = reference_of(family), rule_of({"keep_ratio": 0.3})
    wanted = reference.greedy(processor.apply_chat_template(chat, **options), rule, 5)
    with hero.attach(model, processor, config=config_of({"keep_ratio": 0.3})) as handle:
        inputs = processor.apply_chat_template(chat, **options)
        assert int((inputs["input_ids"] == handle.image_token_id).sum()) == handle.count_tokens((120, 90))
        output = model.generate(**inputs, max_new_tokens=5, do_sample=False)
        assert output[:, inputs["input_ids"].shape[1] :].tolist() == wanted
        answer = pipeline("image-text-to-text", model=model, processor=processor)(
            text=chat, max_new_tokens=5, return_full_text=False, do_sample=False
        )
        assert handle.last.lengths == [handle.count_tokens((120, 90))]
    text = processor.tokenizer.decode(wanted[0], skip_special_tokens=True)
    assert answer[0]["generated_text"].split() == text.split()


# ------------------------------------------------------------------------------------------------ refusals

READ = ("internvl", *IDEFICS)
"""Families of which only the prompt tells the crops of an image."""


@pytest.mark.parametrize("family", READ)
def test_calls_without_the_prompt_are_refused(family):
    model, processor = model_of(family), processor_of(family)
    with hero.attach(model, processor, keep_ratio=0.3), torch.no_grad():
        inputs = ask(processor, TWO, tiny_image(60, 170))
        for owner in (model, model.model):
            with pytest.raises(ValueError, match=r"^pixel_values: expected a call of generate or forward"):
                owner.get_image_features(inputs["pixel_values"])
        embedded = dict(inputs)
        embedded["inputs_embeds"] = model.get_input_embeddings()(embedded.pop("input_ids"))
        for call in (model, model.generate):
            with pytest.raises(ValueError, match=r"^input_ids: expected the prompt, which tells which crops"):
                call(**embedded)
        encoded = {name: value for name, value in inputs.items() if "pixel" not in name}
        encoded["mm_encoder_outputs"] = {"image": type("Output", (), {"pooler_output": [torch.zeros(5, 64)]})}
        with pytest.raises(ValueError, match=r"^mm_encoder_outputs: expected None: pixel_values, from which"):
            model(**encoded)


@pytest.mark.parametrize("family", IDEFICS)
def test_separators_need_a_tokenizer(family):
    model = model_of(family)
    inputs = ask(processor_of(family), TWO, tiny_image(60, 170))
    with hero.attach(model, keep_ratio=0.3):
        for call in (model, model.generate):
            with pytest.raises(ValueError, match=r"^tokenizer: expected the language model's tokenizer"):
                call(**inputs)


@pytest.mark.parametrize("family", ["internvl", "smolvlm"])
def test_videos_are_refused(family):
    """Their frames come as images and would be thinned."""
    processor = processor_of(family)
    text = [TWO.replace("<image>", processor.video_token)]
    videos = [[np.zeros((2, 30, 30, 3), dtype=np.uint8)]]
    with (
        hero.attach(model_of(family), processor, keep_ratio=0.3),
        pytest.raises(ValueError, match=r"^videos: expected None with hero attached to"),
    ):
        processor(text=text, videos=videos, return_tensors="pt")


@pytest.mark.parametrize("other", [*OURS, "llava", "llava_next"])
@pytest.mark.parametrize("family", OURS)
def test_the_processor_of_another_family_is_refused(family, other):
    if family == other or {family, other} == set(IDEFICS):
        return
    with pytest.raises(TypeError, match=r"^processor: expected an? .*Processor.*, got "):
        hero.attach(model_of(family), processor_of(other))


SETTINGS = {
    "internvl": {"image_seq_length": 9, "size": {"height": 28, "width": 28}},
    "llava_onevision": {
        "num_image_tokens": 9,
        "size": {"height": 28, "width": 28},
        "vision_aspect_ratio": "anyres_max_4",
        "image_grid_pinpoints": [[CROP, 2 * CROP]],
        "vision_feature_select_strategy": "default",
    },
    "smolvlm": {"image_seq_len": 9, "max_image_size": {"longest_edge": 28}},
    "idefics3": {"image_seq_len": 9, "max_image_size": {"longest_edge": 28}},
}


@pytest.mark.parametrize(("family", "name"), [(family, name) for family in OURS for name in SETTINGS[family]])
def test_a_processor_with_other_settings_is_refused(family, name):
    processor, value = processor_of(family), SETTINGS[family][name]
    owner = processor if hasattr(processor, name) else processor.image_processor
    setattr(owner, name, value)
    with pytest.raises(ValueError, match=rf"^{name} of the processor: expected "):
        hero.attach(model_of(family), processor)


@pytest.mark.parametrize("family", OURS)
def test_a_foreign_class_of_the_same_name_is_refused(family):
    foreign = type(type(model_of(family)).__name__, (torch.nn.Module,), {})()
    with pytest.raises(ValueError, match=r"^model: expected a supported model \("):
        hero.attach(foreign)


@pytest.mark.parametrize("version", [(5, 17), (5, 18), (5, 19)])
@pytest.mark.parametrize("case", ["one image", "two images in a prompt", "one crop"])
@pytest.mark.parametrize("family", OURS)
def test_beams_that_older_transformers_mix_up(family, case, version, monkeypatch):
    if case == "one crop" and family != "internvl":
        return
    monkeypatch.setattr(calls, "_transformers_version", lambda: version)
    wrong = version == (5, 18) if family in IDEFICS else version < (5, 19)
    if case == "one crop" or (family == "llava_onevision" and case == "one image"):
        wrong = False
    model, processor = model_of(family), processor_of(family)
    options = {"max_new_tokens": 2, "do_sample": False}
    with hero.attach(model, processor, keep_ratio=0.3):
        inputs = batch_of(processor, family, case)
        model.generate(**inputs, **options)
        for more in ({"num_beams": 2}, {"num_return_sequences": 2, "do_sample": True}):
            if wrong:
                with pytest.raises(ValueError, match=r"^num_beams, num_return_sequences: expected 1 for"):
                    model.generate(**inputs, **{**options, **more})
            elif version == (5, 19):
                model.generate(**inputs, **{**options, **more})


# --------------------------------------------------------------------------------------- quantised weights


@SLOW
@pytest.mark.parametrize("family", ["llava_next", "internvl"])
def test_quantised_weights(family):
    """With torchao's int8 weights, everything kept is the quantised stock model, and 0.3 its reference."""
    quantization = pytest.importorskip("torchao.quantization")
    model = tiny_model(family=family)
    for part in (model.model.vision_tower, model.model.language_model):
        quantization.quantize_(part, quantization.Int8WeightOnlyConfig())
    processor, full = processor_of(family), tiny_model(family=family)
    inputs = batch_of(processor, family, "two sizes")
    options = {"max_new_tokens": 4, "do_sample": False}
    with torch.no_grad():
        stock, answer = model(**inputs).logits, model.generate(**inputs, **options)
        assert not torch.equal(stock, full(**inputs).logits)
        with hero.attach(model, keep_ratio=1.0):
            torch.testing.assert_close(model(**inputs).logits, stock, rtol=0, atol=1e-6)
            assert torch.equal(model.generate(**inputs, **options), answer)
    reference, rule = independent_of(model), rule_of({"keep_ratio": 0.3})
    rows, results, _ = reference._rows(inputs, rule, None, None)
    logits = [reference._forward(row.embeds) for row in rows]
    with hero.attach(model, config=config_of({"keep_ratio": 0.3})) as handle, torch.no_grad():
        output = model(**inputs).logits
        answer = model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]
    assert handle.last.index.tolist() == listed(results, "index")
    assert_rows_equal(output, logits, 5e-5)
    assert answer.tolist() == reference.greedy(inputs, rule, 4)
