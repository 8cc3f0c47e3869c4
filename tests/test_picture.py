"""The picture of what was kept: nothing cut, nothing outside, kept and dropped told apart."""

import subprocess
import sys
from itertools import combinations

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

import hero
from hero import mini, picture
from hero.encoder import Selection
from hero.layout import Geometry

SMALL = {"crop_size": 32, "patch_size": 8}  # 16 patches a crop
GEOMETRIES = {
    "default": Geometry(),
    "single": Geometry(**SMALL, pinpoints=((32, 32),)),
    "no tiles": Geometry(**SMALL, pinpoints=()),
    "no thumbnail": Geometry(**SMALL, pinpoints=((64, 64),), thumbnail="none"),
    "thumbnail last": Geometry(**SMALL, pinpoints=((64, 64),), thumbnail="last"),
    "not stitched": Geometry(**SMALL, pinpoints=((64, 64),), stitched=False, newlines=False),
    "portrait": Geometry(**SMALL, pinpoints=((96, 64),)),
    "wide": Geometry(**SMALL, pinpoints=((32, 256),)),
    "wide, no thumbnail": Geometry(**SMALL, pinpoints=((32, 256),), thumbnail="none"),
    "tall": Geometry(**SMALL, pinpoints=((256, 32),)),
    "tall, no thumbnail": Geometry(**SMALL, pinpoints=((256, 32),), thumbnail="none"),
    "7 x 9": Geometry(**SMALL, pinpoints=((7 * 32, 9 * 32),)),
    "1 x 63": Geometry(**SMALL, pinpoints=((32, 63 * 32),)),
    "63 x 1": Geometry(**SMALL, pinpoints=((63 * 32, 32),)),
}
SIZES = [(60, 60), (400, 50), (50, 400), (1, 300)]
RED = (200, 60, 40)


def select(*layouts, keep=0.2, scores=None):
    """A selection as the encoder makes it: of each crop the best valid patches by score."""
    generator = torch.Generator().manual_seed(0)
    parts = {name: [] for name in ("index", "budgets", "shares", "scores")}
    lengths, crop = [], 0
    for layout in layouts:
        length = layout.newline_count
        for number in range(layout.crops):
            values = torch.rand(layout.patches, generator=generator) ** 4
            values = values / values.sum() if scores is None else torch.full_like(values, scores)
            valid = torch.ones(layout.side, layout.side, dtype=torch.bool)
            share = 0.0
            if number != layout.thumbnail_crop:
                top, bottom, left, right = layout.tile_rectangles[number - layout.first_tile]
                valid.zero_()[top:bottom, left:right] = True
                share = 1 / layout.tiles
            best = torch.where(valid.flatten(), values.nan_to_num(), -1.0).argsort(descending=True)
            best = best[: round(keep * int(valid.sum()))].sort().values
            parts["index"].append((crop + number) * layout.patches + best)
            parts["budgets"].append(torch.tensor([len(best)]))
            parts["shares"].append(torch.tensor([share]))
            parts["scores"].append(values[None])
            length += len(best)
        parts["index"].append(torch.full((layout.newline_count,), -1))
        lengths.append(length)
        crop += layout.crops
    parts = {name: torch.cat(tensors) for name, tensors in parts.items()}
    return Selection(
        tokens=None,
        lengths=lengths,
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32),
        index=parts["index"].int(),
        budgets=parts["budgets"].int(),
        shares=parts["shares"],
        scores=parts["scores"],
        layout=layouts,
    )


def photograph(size, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
    return Image.fromarray(pixels)


def page(image, selection, width=1000):
    return picture._Page(image, picture._Kept.of(selection, 0), picture._Type(width))


def count(image, colour):
    """Pixels of exactly this colour."""
    return int((np.asarray(image) == colour).all(-1).sum())


# every layout


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", GEOMETRIES)
def test_every_layout_fills_its_width_and_keeps_its_margin(name, size):
    selection = select(GEOMETRIES[name].layout(size))
    for width in (400, 700):
        drawn = hero.visualize(photograph(size), selection, width=width, title="what is it ? a cup")
        assert drawn.mode == "RGB"
        assert drawn.width == width
        assert drawn.height < 2.6 * width
        pixels, margin = np.asarray(drawn), round(0.026 * width)
        for edge in (pixels[:margin], pixels[-margin:], pixels[:, :margin], pixels[:, -margin:]):
            assert (edge == 255).all()


@pytest.mark.parametrize("width", [600, 2000])
def test_type_grows_with_the_width(width):
    selection = select(GEOMETRIES["default"].layout((60, 60)))
    small, large = (page(photograph((60, 60)), selection, at).type for at in (1000, width))
    assert large.body == pytest.approx(small.body * width / 1000, abs=2)
    drawn = hero.visualize(photograph((60, 60)), selection, width=width)
    assert drawn.width == width


@pytest.mark.parametrize(
    ("name", "size"),
    [
        *(
            (name, size)
            for name in ("default", "7 x 9", "no tiles")
            for size in ((400, 50), (50, 400), (64, 64))
        ),
        ("wide, no thumbnail", (50, 400)),
        ("wide, no thumbnail", (64, 64)),
        ("tall, no thumbnail", (400, 50)),
        ("tall, no thumbnail", (64, 64)),
    ],
)
def test_the_whole_image_is_shown(name, size):
    """Its four quarters, in four colours, take the same room in the picture."""
    colours = np.array([[(250, 0, 0), (0, 250, 0)], [(0, 0, 250), (250, 0, 250)]], np.uint8)
    quarters = colours.repeat(size[0] // 2, 0).repeat(size[1] // 2, 1)
    drawn = hero.visualize(quarters, select(GEOMETRIES[name].layout(size), keep=1.0))
    areas = [count(drawn, colour) for colour in colours.reshape(4, 3)]
    # Labels lie on the upper left quarter rather than on the others, and colours blend where they meet.
    assert min(areas) > 0.6 * max(areas) > 0


# kept and dropped


def test_kept_patches_stand_out_and_only_they():
    size = (64, 64)
    layout = GEOMETRIES["no thumbnail"].layout(size)
    selection = select(layout, keep=0.0)
    solid = Image.new("RGB", size, RED)
    assert count(hero.visualize(solid, selection), RED) == 0
    dim = tuple(picture._dim(np.array(RED, float)).tolist())
    assert sum(dim) < 0.6 * sum(RED)

    everything = select(layout, keep=1.0)
    drawn = hero.visualize(solid, everything)
    assert count(drawn, dim) < 100  # the key's swatch is of another colour
    whole = count(drawn, RED)

    # The third tile of four: the lower left quarter of the panel.
    index = torch.arange(2 * 16, 3 * 16, dtype=torch.int32)
    third = Selection(**{**vars(everything), "index": index, "lengths": [16]})
    kept = np.argwhere((np.asarray(hero.visualize(solid, third)) == RED).all(-1))
    panel = np.argwhere((np.asarray(drawn) == RED).all(-1))
    middle = (panel.min(0) + panel.max(0)) / 2
    assert kept[:, 0].min() > middle[0] and kept[:, 1].max() <= middle[1]
    assert len(kept) == pytest.approx(whole / 4, rel=0.15)


@pytest.mark.parametrize("colour", [(0, 0, 0), (255, 255, 255), (128, 128, 128)], ids=str)
def test_patches_of_one_colour_are_told_apart(colour):
    """Also black ones, by an outline outside the kept patch, whose pixels stay as they are."""
    kind = picture._Type(1000)
    keep = np.zeros((4, 4), bool)
    keep[1, 2] = True
    image = Image.new("RGB", (40, 40), colour)
    pixels = picture._photograph(image, keep, np.ones((4, 4), bool), (400, 400), kind)
    assert (pixels[100:200, 200:300] == colour).all()
    for row, column in ((99, 250), (200, 250), (150, 199), (150, 300)):
        assert (pixels[row, column] == picture._OUTLINE).all()
    assert (pixels[20, 20] != colour).any()


def test_padding_is_hatched_and_the_image_lies_between():
    layout = GEOMETRIES["no thumbnail"].layout((64, 32))
    assert layout.columns == (2, 6)
    selection = select(layout, keep=1.0)
    pixels = np.asarray(page(Image.new("RGB", (32, 64), RED), selection).tiles_picture((400, 400)))
    inside = (pixels == RED).all(-1)
    assert not inside[:, :100].any() and not inside[:, 300:].any()
    assert inside[300:390, 110:190].all()
    hatching = {tuple(colour) for colour in pixels[250:390, 2:98].reshape(-1, 3).tolist()}
    assert hatching == set(picture._HATCH)


def test_second_image_of_a_batch_is_drawn_as_if_alone():
    geometry = GEOMETRIES["thumbnail last"]
    first, second = geometry.layout((60, 90)), geometry.layout((80, 60))
    batch = select(first, second)
    patches = first.crops * 16
    end = batch.lengths[0]
    index = batch.index[end:]
    alone = Selection(
        tokens=None,
        lengths=batch.lengths[1:],
        cu_seqlens=batch.cu_seqlens[1:] - end,
        index=torch.where(index < 0, index, index - patches),
        budgets=batch.budgets[first.crops :],
        shares=batch.shares[first.crops :],
        scores=batch.scores[first.crops :],
        layout=(second,),
    )
    image = photograph((80, 60))
    drawn = hero.visualize(image, batch, image_index=1)
    assert drawn.tobytes() == hero.visualize(image, alone).tobytes()
    with pytest.raises(ValueError, match="image: expected the selection's, 60 x 90"):
        hero.visualize(image, batch)


def test_same_bytes_every_time():
    selection = select(GEOMETRIES["default"].layout((60, 90)))
    drawn = [hero.visualize(photograph((60, 90)), selection, title="a b").tobytes() for _ in range(2)]
    assert drawn[0] == drawn[1]


# words


def test_header_counts():
    layout = Geometry(48, 8, ((144, 144),)).layout((144, 144))
    kept = picture._Kept.of(select(layout, keep=0.2), 0)
    said = kept.summary().replace("\u00a0", " ")
    assert said == "88 of 378 tokens kept (23 %): 7 of 36 thumbnail, 63 of 324 tile patches, 18 newlines"
    kept = picture._Kept.of(select(GEOMETRIES["no tiles"].layout((9, 9)), keep=0.25), 0)
    assert kept.summary().replace("\u00a0", " ") == "5 of 17 tokens kept (29 %): 4 of 16 thumbnail, 1 newline"


@pytest.mark.parametrize("width", [400, 1000])
@pytest.mark.parametrize("name", [name for name in GEOMETRIES if name != "no tiles"])
def test_labels_lie_in_their_tiles_or_in_a_table(name, width):
    layout = GEOMETRIES[name].layout((60, 60))
    drawing = page(photograph((60, 60)), select(layout), width)
    rows, columns = layout.grid
    for size in ((width // 2, width * rows // columns // 2 or 1), (width, width), (70, 70), (3, 500)):
        chips = drawing.chips(size)
        assert len(chips) in (0, layout.tiles)
        for tile, chip in enumerate(chips):
            row, column = divmod(tile, columns)
            left, top, right, bottom = chip.box
            assert column * size[0] / columns - 1 <= left < right <= (column + 1) * size[0] / columns + 1
            assert row * size[1] / rows - 1 <= top < bottom <= (row + 1) * size[1] / rows + 1
            assert drawing.type.length(chip.text, chip.size) <= right - left
        for one, other in combinations((chip.box for chip in chips), 2):
            assert one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] or other[3] <= one[1]
        table = drawing.legend(size, width)
        complete = bool(chips) and all("·" in chip.text for chip in chips)
        assert bool(table) != complete
        assert all(block.width <= width for block in table)


def test_labels_make_way_for_what_was_kept():
    layout = GEOMETRIES["single"].layout((32, 32))
    selection = select(layout, keep=0.0)
    size = (400, 400)

    def corner(*patches):
        index = torch.tensor([16 + patch for patch in patches], dtype=torch.int32)
        kept = Selection(**{**vars(selection), "index": index})
        left, top, *_ = page(photograph((32, 32)), kept).chips(size)[0].box
        return top > 200, left > 200

    assert corner() == (False, False)
    assert corner(0) == (False, True)
    assert corner(0, 3) == (True, False)
    assert corner(0, 3, 12) == (True, True)


@pytest.mark.parametrize(
    "title", ["x" * 500, "many short words " * 40, "two\nlines", "Übermaß – “漢字” → \u0301", " ", "a\tb"]
)
def test_titles_stay_inside(title):
    selection = select(GEOMETRIES["single"].layout((32, 32)))
    drawn = hero.visualize(photograph((32, 32)), selection, title=title, width=500)
    assert (np.asarray(drawn)[:, -13:] == 255).all()
    bare = hero.visualize(photograph((32, 32)), selection, width=500)
    assert drawn.height > bare.height or not title.strip()


def test_letters_that_the_font_lacks_are_replaced():
    assert picture._printable("Maß – “漢” é →") == 'Mass - "?" e ->'
    assert picture._printable("34 · 47 %") == "34 · 47 %"


# scores


def test_viridis_orders_by_lightness():
    colours = picture._Scale(0.0, 1.0, False, False).colours(np.linspace(0, 1, 64)).astype(float)
    lightness = colours @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(lightness) > 0).all()
    assert tuple(colours[0]) == (68, 1, 84) and tuple(colours[-1]) == (253, 231, 37)


@pytest.mark.parametrize(
    ("scores", "logarithmic", "ends"),
    [
        ([0.5, 0.6], False, ("0.5", "0.6")),
        ([0.001, 0.1], True, ("0.001", "0.1")),
        ([0.0, 0.1], True, ("< 0.0001", "0.1")),
        ([-1.0, 1.0], False, ("-1", "1")),
        ([0.25, 0.25], False, ("all 0.25", "")),
        ([0.0, 0.0], False, ("all 0", "")),
        ([float("nan"), 0.5, 0.6, float("inf")], False, ("0.5", "0.6")),
    ],
)
def test_scale(scores, logarithmic, ends):
    scale = picture._Scale.of(np.array(scores))
    assert scale.logarithmic == logarithmic
    assert scale.ends() == ends
    assert scale.bar(50).shape == (50, 3)
    assert picture._Scale.of(np.array([np.nan])) is None


@pytest.mark.parametrize("scores", [0.0, 0.01, 3.0, float("nan"), float("inf"), float("-inf")])
@pytest.mark.filterwarnings("error")
def test_scores_without_contrast(scores):
    selection = select(GEOMETRIES["single"].layout((40, 32)), scores=scores)
    hero.visualize(photograph((40, 32)), selection)


def test_tiles_and_thumbnail_have_scales_of_their_own():
    selection = select(GEOMETRIES["single"].layout((32, 32)))
    image = photograph((32, 32))
    before = page(image, selection)
    scaled = selection.scores.clone()
    scaled[1] *= 0.125
    after = page(image, Selection(**{**vars(selection), "scores": scaled}))
    assert before.thumbnail_scores(200).tobytes() == after.thumbnail_scores(200).tobytes()
    maps = [np.asarray(each.tile_scores((200, 200))) for each in (before, after)]
    changed = np.flatnonzero((maps[0] != maps[1]).any((1, 2)))
    assert changed.min() > 200  # only the numbers below


# images


def same(image, reference, selection):
    return hero.visualize(image, selection).tobytes() == hero.visualize(reference, selection).tobytes()


def test_kinds_of_images_give_one_picture(tmp_path):
    image = photograph((40, 60))
    selection = select(GEOMETRIES["single"].layout((40, 60)))
    image.save(tmp_path / "image.png")
    pixels = np.asarray(image)
    opaque = np.concatenate([pixels, np.full((40, 60, 1), 255, np.uint8)], 2)
    kinds = [tmp_path / "image.png", str(tmp_path / "image.png"), pixels, pixels / 255, opaque]
    kinds += [image.convert("RGBA"), (pixels / 255).astype(np.float32), pixels[::-1][::-1]]
    for kind in kinds:
        assert same(kind, image, selection)
    grey = image.convert("L")
    assert same(np.asarray(grey), grey, selection)
    assert same(np.asarray(grey)[..., None], grey, selection)


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "P", "PA", "RGBA", "CMYK", "YCbCr", "HSV", "I", "F", "I;16"]
)
def test_modes(mode):
    image = photograph((40, 60))
    image = image.convert("L").convert("I").convert(mode) if mode == "I;16" else image.convert(mode)
    hero.visualize(image, select(GEOMETRIES["single"].layout((40, 60))))


def test_deep_greys_are_scaled_not_clipped():
    ramp = np.tile(np.arange(60, dtype=np.uint16) * 1000, (40, 1))
    read = np.asarray(picture._read(Image.fromarray(ramp), (40, 60)))
    assert read[0, 0, 0] == 0 and read[0, -1, 0] == 255
    assert (np.diff(read[0, :, 0].astype(int)) > 0).all()


def test_transparency_is_white():
    selection = select(GEOMETRIES["single"].layout((40, 60)))
    clear = Image.new("RGBA", (60, 40), (10, 20, 30, 0))
    assert same(clear, Image.new("RGB", (60, 40), (255, 255, 255)), selection)


def test_path_is_turned_upright_as_transformers_does(tmp_path):
    image = photograph((40, 60))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    image.save(tmp_path / "turned.png", exif=exif)
    upright = ImageOps.exif_transpose(Image.open(tmp_path / "turned.png"))
    assert upright.size == (40, 60)
    geometry = GEOMETRIES["single"]
    assert same(tmp_path / "turned.png", upright, select(geometry.layout((60, 40))))
    # A selection made of the file as it lies, by PIL.Image.open alone.
    assert same(tmp_path / "turned.png", image, select(geometry.layout((40, 60))))


# errors


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"selection": None}, TypeError, "selection: expected hero.Selection, got None"),
        ({"image": None}, TypeError, "image: expected a PIL image, a numpy array or a path, got NoneType"),
        ({"image": torch.zeros(3, 40, 60)}, TypeError, "image: expected .* got Tensor"),
        ({"image": photograph((60, 40))}, ValueError, r"image: expected .* 40 x 60 px .* got 60 x 40"),
        ({"image": np.zeros((3, 40, 60), np.uint8)}, ValueError, r"image: .* got shape \(3, 40, 60\)"),
        ({"image": np.zeros((40, 60, 2), np.uint8)}, ValueError, r"image: .* got shape \(40, 60, 2\)"),
        ({"image": np.zeros((0, 60), np.uint8)}, ValueError, r"image: .* got shape \(0, 60\)"),
        ({"image": np.zeros((40, 60), np.int64)}, TypeError, "image: .* got int64"),
        ({"image": np.full((40, 60), 2.0)}, ValueError, r"image: expected floating values in \[0, 1\]"),
        ({"image": np.full((40, 60), np.nan)}, ValueError, r"image: expected floating values in \[0, 1\]"),
        ({"image_index": 1}, ValueError, r"image_index: expected an integer in \[0, 1\), got 1"),
        ({"image_index": -1}, ValueError, r"image_index: expected an integer in \[0, 1\), got -1"),
        ({"image_index": True}, TypeError, "image_index: expected an integer"),
        ({"image_index": 0.0}, TypeError, "image_index: expected an integer"),
        ({"width": 399}, ValueError, "width: expected an integer >= 400, got 399"),
        ({"width": 1000.0}, TypeError, "width: expected an integer >= 400, got 1000.0"),
        ({"title": 3}, TypeError, "title: expected a string or None, got 3"),
        ({"image": "no such file.png"}, FileNotFoundError, "no such file"),
    ],
)
def test_errors(change, error, message):
    selection = select(GEOMETRIES["single"].layout((40, 60)))
    arguments = {"image": photograph((40, 60)), "selection": selection, **change}
    with pytest.raises(error, match=message):
        hero.visualize(**arguments)


# the whole


def test_demo_model():
    model, processor, relevance = mini.load()
    question = mini.demo_questions()[0]
    image = Image.open(question.image)
    with hero.attach(model, processor, keep_ratio=0.2, relevance=relevance) as handle:
        text = f"<image> {question.question}"
        inputs = processor(images=image, text=text, return_tensors="pt")
        model.generate(**inputs, max_new_tokens=2, do_sample=False)
        drawn = hero.visualize(question.image, handle.last, title=question.question)
    assert drawn.size[0] == 1000
    kept = picture._Kept.of(handle.last, 0)
    assert kept.length == (inputs["input_ids"] == processor.image_token_id).sum()
    labelled = sum(int(chip.text.split(" ")[0]) for chip in page(image, handle.last).chips((600, 600)))
    assert labelled == kept.tile_patches()[0]


def test_hero_imports_no_pillow():
    code = "import sys, hero; assert 'PIL' not in sys.modules; assert 'visualize' in dir(hero)"
    subprocess.run([sys.executable, "-c", code], check=True)
