"""The picture of what was kept: nothing cut, nothing outside, kept and dropped told apart."""

import subprocess
import sys
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image, ImageOps

import hero
from hero import mini, picture
from hero.images import read
from hero.layout import Geometry
from hero.selection import Selection

SMALL = {"crop_size": 32, "patch_size": 8}  # 16 patches a crop
GEOMETRIES = {
    "default": Geometry(),
    "single": Geometry(**SMALL, tiling=((32, 32),)),
    "no tiles": Geometry(**SMALL, tiling=()),
    "no thumbnail": Geometry(**SMALL, tiling=((64, 64),), thumbnail="none"),
    "thumbnail last": Geometry(**SMALL, tiling=((64, 64),), thumbnail="last"),
    "not stitched": Geometry(**SMALL, tiling=((64, 64),), stitched=False, newlines=False),
    "portrait": Geometry(**SMALL, tiling=((96, 64),)),
    "wide": Geometry(**SMALL, tiling=((32, 256),)),
    "wide, no thumbnail": Geometry(**SMALL, tiling=((32, 256),), thumbnail="none"),
    "tall": Geometry(**SMALL, tiling=((256, 32),)),
    "tall, no thumbnail": Geometry(**SMALL, tiling=((256, 32),), thumbnail="none"),
    "7 x 9": Geometry(**SMALL, tiling=((7 * 32, 9 * 32),)),
    "1 x 63": Geometry(**SMALL, tiling=((32, 63 * 32),)),
    "36 patches": Geometry(48, 8, ((144, 144),)),
    "63 x 1": Geometry(**SMALL, tiling=((63 * 32, 32),)),
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
                top, bottom, left, right = layout.tile_rectangles[layout.tile_crops.index(number)]
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
    sizes = [layout.image_size for layout in layouts]
    geometry = next(one for one in GEOMETRIES.values() if one.layouts(sizes) == layouts)
    return Selection(
        tokens=None,
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32),
        index=parts["index"].int(),
        budgets=parts["budgets"].int(),
        shares=parts["shares"],
        scores=parts["scores"],
        images=sizes,
        geometry=geometry,
        config=hero.HeroConfig(),
        counts=lengths,
    )


def photograph(size, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
    return Image.fromarray(pixels)


def page(image, selection, width=1000):
    """The figure that is drawn, with its axes by the first line of their headings."""
    figure = Figure((width / 72, 1), 72)
    picture._Page(figure, image, picture._Kept(selection, 0), width).draw(None)
    axes = {axes.get_title("left").split("\n")[0].partition(",")[0]: axes for axes in figure.axes}
    return figure, axes


def inside(figure, axes):
    """The pixels of an axes, ``[height, width, 3]``."""
    pixels = np.asarray(figure.canvas.buffer_rgba())[..., :3]
    box = axes.get_window_extent()
    top, bottom = (round(len(pixels) - y) for y in (box.y1, box.y0))
    return pixels[top:bottom, round(box.x0) : round(box.x1)]


def count(image, colour):
    """Pixels of exactly this colour."""
    return int((np.asarray(image) == colour).all(-1).sum())


# every layout


@pytest.mark.parametrize(
    ("name", "size"),
    [
        pytest.param(name, size, marks=[] if (one + two) % 4 == 0 else pytest.mark.slow, id=f"{name}-{size}")
        for one, name in enumerate(GEOMETRIES)
        for two, size in enumerate(SIZES)
    ],
)
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
    drawn = hero.visualize(photograph((60, 60)), selection, width=width)
    assert drawn.width == width
    notes = [page(photograph((60, 60)), selection, at)[0].texts[-1] for at in (1000, width)]
    sizes = [note.get_fontsize() for note in notes]
    assert sizes[1] == pytest.approx(sizes[0] * width / 1000, abs=3)


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
    figure, axes = page(solid, selection)
    dim = tuple(inside(figure, axes["Tiles"])[-20, -20].tolist())
    assert sum(dim) < 0.6 * sum(RED)

    everything = select(layout, keep=1.0)
    drawn = hero.visualize(solid, everything)
    assert count(drawn, dim) == 0
    whole = count(drawn, RED)

    # The third tile of four: the lower left quarter of the panel.
    index = torch.arange(2 * 16, 3 * 16, dtype=torch.int32)
    third = Selection(**{**vars(everything), "index": index, "counts": [16]})
    kept = np.argwhere((np.asarray(hero.visualize(solid, third)) == RED).all(-1))
    panel = np.argwhere((np.asarray(drawn) == RED).all(-1))
    middle = (panel.min(0) + panel.max(0)) / 2
    assert kept[:, 0].min() > middle[0] and kept[:, 1].max() <= middle[1]
    assert len(kept) == pytest.approx(whole / 4, rel=0.15)


@pytest.mark.parametrize("colour", [(0, 0, 0), (255, 255, 255), (128, 128, 128)], ids=str)
def test_patches_of_one_colour_are_told_apart(colour):
    """Also black ones, by an outline around the kept patch, whose pixels stay as they are."""
    selection = select(GEOMETRIES["single"].layout((32, 32)), keep=0.0)
    index = torch.tensor([16 + 6], dtype=torch.int32)  # row 1, column 2 of the tile
    kept = Selection(**{**vars(selection), "index": index})
    figure, axes = page(Image.new("RGB", (32, 32), colour), kept)
    pixels = inside(figure, axes["Tiles"])
    side = len(pixels) / 4

    def part(top, bottom, left, right):
        return pixels[round(top * side) : round(bottom * side), round(left * side) : round(right * side)]

    assert (part(1.05, 1.95, 2.05, 2.95) == colour).all()
    for edge in (part(0.95, 1.05, 2.1, 2.9), part(1.95, 2.05, 2.1, 2.9)):
        assert (edge.min(-1) >= 215).any(0).all()
    for edge in (part(1.1, 1.9, 1.95, 2.05), part(1.1, 1.9, 2.95, 3.05)):
        assert (edge.min(-1) >= 215).any(1).all()
    assert (part(3.1, 3.9, 0.1, 0.9) != colour).any()


def test_padding_is_hatched_and_the_image_lies_between():
    layout = GEOMETRIES["no thumbnail"].layout((64, 32))
    assert layout.columns == (2, 6)
    selection = select(layout, keep=1.0)
    figure, axes = page(Image.new("RGB", (32, 64), RED), selection)
    pixels = inside(figure, axes["Tiles"])
    size = len(pixels)
    red = (pixels == RED).all(-1)
    assert not red[:, : size // 4 - 1].any() and not red[:, 3 * size // 4 + 1 :].any()
    assert red[round(0.75 * size) : round(0.97 * size), round(0.28 * size) : round(0.47 * size)].all()
    hatching = pixels[round(0.6 * size) : round(0.97 * size), 2 : size // 4 - 2].reshape(-1, 3)
    assert len(np.unique(hatching, axis=0)) > 1 and hatching.min() > 200


def test_second_image_of_a_batch_is_drawn_as_if_alone():
    geometry = GEOMETRIES["thumbnail last"]
    first, second = geometry.layout((60, 90)), geometry.layout((80, 60))
    batch = select(first, second)
    patches = first.crops * 16
    end = batch.lengths[0]
    index = batch.index[end:]
    alone = Selection(
        tokens=None,
        cu_seqlens=batch.cu_seqlens[1:] - end,
        index=torch.where(index < 0, index, index - patches),
        budgets=batch.budgets[first.crops :],
        shares=batch.shares[first.crops :],
        scores=batch.scores[first.crops :],
        images=[second.image_size],
        geometry=geometry,
        config=batch.config,
        counts=batch.lengths[1:],
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
    kept = picture._Kept(select(GEOMETRIES["36 patches"].layout((144, 144)), keep=0.2), 0)
    assert (
        kept.summary()
        == "88 of 378 tokens kept (23 %): 7 of 36 thumbnail, 63 of 324 tile patches, 18 newlines"
    )
    kept = picture._Kept(select(GEOMETRIES["no tiles"].layout((9, 9)), keep=0.25), 0)
    assert kept.summary() == "5 of 17 tokens kept (29 %): 4 of 16 thumbnail, 1 newline"


@pytest.mark.parametrize("width", [400, 1000])
@pytest.mark.parametrize("name", [name for name in GEOMETRIES if name != "no tiles"])
def test_labels_lie_in_their_tiles_or_in_a_table(name, width):
    layout = GEOMETRIES[name].layout((60, 60))
    kept = picture._Kept(select(layout), 0)
    figure, axes = page(photograph((60, 60)), select(layout), width)
    tiles, labels = axes["Tiles"].get_window_extent(), axes["Tiles"].texts
    rows, columns = layout.grid
    assert [label.get_text() for label in labels] == (kept.labels if labels else [])
    boxes = [label.get_bbox_patch().get_window_extent() for label in labels]
    for tile, box in enumerate(boxes):
        row, column = divmod(tile, columns)
        across, down = tiles.width / columns, tiles.height / rows
        assert column * across - 1 <= box.x0 - tiles.x0 < box.x1 - tiles.x0 <= (column + 1) * across + 1
        assert row * down - 1 <= tiles.y1 - box.y1 < tiles.y1 - box.y0 <= (row + 1) * down + 1
    for one, other in combinations(boxes, 2):
        assert one.x1 <= other.x0 or other.x1 <= one.x0 or one.y1 <= other.y0 or other.y1 <= one.y0
    written = " ".join(text.get_text() for text in figure.texts).replace("\u00a0", " ")
    for tile, label in enumerate(kept.labels):
        place = f"{tile // columns + 1},{tile % columns + 1}: {label}"
        assert (place in written) != bool(labels)
    for text in figure.texts:
        assert text.get_window_extent().x1 <= width


@pytest.mark.parametrize(
    "title",
    [
        "x" * 500,
        "W" * 500,
        "many short words " * 40,
        "two\nlines",
        "Übermaß – “漢字” → \u0301",
        " ",
        "a\tb",
        "$5, $6_7",
    ],
)
@pytest.mark.filterwarnings("ignore:Glyph .* missing from font")
def test_titles_stay_inside(title):
    selection = select(GEOMETRIES["single"].layout((32, 32)))
    drawn = hero.visualize(photograph((32, 32)), selection, title=title, width=500)
    assert (np.asarray(drawn)[:, -13:] == 255).all()
    bare = hero.visualize(photograph((32, 32)), selection, width=500)
    assert drawn.height > bare.height or not title.strip()


# scores


@pytest.mark.parametrize(
    ("scores", "scale"),
    [
        ([0.5, 0.6], (0.5, 0.6, False)),
        ([0.001, 0.1], (0.001, 0.1, True)),
        ([0.0, 0.1], (0.0001, 0.1, True)),
        ([-1.0, 1.0], (-1.0, 1.0, False)),
        ([0.25, 0.25], (0.25, 0.25, False)),
        ([0.0, 0.0], (0.0, 0.0, False)),
        ([float("nan"), 0.5, 0.6, float("inf")], (0.5, 0.6, False)),
        ([float("nan")], None),
    ],
)
def test_scale(scores, scale):
    assert picture._scale(np.array(scores)) == scale


def test_ends_of_the_colour_scale_are_written():
    selection = select(GEOMETRIES["single"].layout((32, 32)))
    selection.scores[:] = torch.linspace(0, 0.5, 16)
    texts = [text.get_text() for axes in page(photograph((32, 32)), selection)[0].axes for text in axes.texts]
    assert texts.count("< 0.0005") == texts.count("0.5") == 2


@pytest.mark.parametrize("scores", [0.0, 0.01, 3.0, float("nan"), float("inf"), float("-inf")])
@pytest.mark.filterwarnings("error")
def test_scores_without_contrast(scores):
    selection = select(GEOMETRIES["single"].layout((40, 32)), scores=scores)
    hero.visualize(photograph((40, 32)), selection)


def test_tiles_and_thumbnail_have_scales_of_their_own():
    selection = select(GEOMETRIES["single"].layout((32, 32)))
    image = photograph((32, 32))
    scaled = selection.scores.clone()
    scaled[1] *= 0.125
    both = page(image, selection), page(image, Selection(**{**vars(selection), "scores": scaled}))
    for name in ("Thumbnail scores", "Tile scores"):  # only the numbers below differ
        before, after = (inside(figure, axes[name]) for figure, axes in both)
        assert (before == after).all()
    ends = [[text.get_text() for axes in figure.axes for text in axes.texts] for figure, _ in both]
    assert ends[0] != ends[1]


# images


def same(image, reference, selection):
    return hero.visualize(image, selection).tobytes() == hero.visualize(reference, selection).tobytes()


def test_kinds_of_images_give_one_picture(tmp_path):
    image = photograph((40, 60))
    selection = select(GEOMETRIES["single"].layout((40, 60)))
    image.save(tmp_path / "image.png")
    pixels = np.asarray(image)
    opaque = np.concatenate([pixels, np.full((40, 60, 1), 255, np.uint8)], 2)
    kinds = [tmp_path / "image.png", str(tmp_path / "image.png"), pixels, opaque]
    kinds += [image.convert("RGBA"), pixels[::-1][::-1]]
    for kind in kinds:
        assert same(kind, image, selection)
    grey = image.convert("L")
    assert same(np.asarray(grey), grey, selection)


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "P", "PA", "RGBA", "CMYK", "YCbCr", "HSV", "I", "F", "I;16"]
)
def test_modes(mode):
    image = photograph((40, 60))
    image = image.convert("L").convert("I").convert(mode) if mode == "I;16" else image.convert(mode)
    hero.visualize(image, select(GEOMETRIES["single"].layout((40, 60))))


@pytest.mark.parametrize("dtype", ["<u2", ">u2"])
def test_greys_of_16_bits_keep_their_brightness(dtype):
    grey = np.tile(np.arange(60, dtype=np.uint16), (40, 1))
    deep = Image.fromarray((grey * 257).astype(dtype))
    assert (np.asarray(read(deep, (40, 60))) == grey[..., None]).all()


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        (np.array([-1.0, 0.0, 1.0]), [0, 128, 255]),
        (np.array([0, 500_000, 1_000_000]), [0, 128, 255]),
        (np.array([7, 7, 7]), [0, 0, 0]),
        (np.array([np.nan, 0.0, 2.0]), [0, 0, 255]),
        (np.array([-np.inf, 0.0, np.inf]), [0, 0, 255]),
        (np.full(3, np.nan), [0, 0, 0]),
    ],
)
@pytest.mark.filterwarnings("error")
def test_greys_of_32_bits_are_scaled_by_their_extremes(values, wanted):
    values = values.astype(np.int32 if values.dtype.kind == "i" else np.float32)
    assert np.asarray(read(Image.fromarray(values[None]), (1, 3)))[0, :, 0].tolist() == wanted


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


def test_url(tmp_path, server):
    """As a path, also if it is to be turned or has transparency."""
    image = photograph((40, 60))
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    exif = Image.Exif()
    exif[0x0112] = 8
    image.save(tmp_path / "image.png", exif=exif)
    address = f"{server}/image.png"
    for size in ((40, 60), (60, 40)):
        selection = select(GEOMETRIES["single"].layout(size))
        assert same(address, tmp_path / "image.png", selection)
    with pytest.raises(
        OSError, match=f"image: expected an image file or URL, got '{address}x': HTTP Error 404"
    ):
        hero.visualize(address + "x", selection)


def test_a_broken_file_is_named(tmp_path):
    path, selection = tmp_path / "image.png", select(GEOMETRIES["single"].layout((40, 60)))
    photograph((40, 60)).save(path)
    for damaged in (path.read_bytes()[:500], b"no image", b""):
        path.write_bytes(damaged)
        with pytest.raises(OSError, match=f"image: expected an image file or URL, got '{path}': "):
            hero.visualize(path, selection)


# errors


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"selection": None}, TypeError, "selection: expected hero.Selection, got None"),
        ({"image": None}, TypeError, "image: expected a PIL image, .* or a URL, got NoneType"),
        ({"image": torch.zeros(3, 40, 60)}, TypeError, "image: expected .* got Tensor"),
        ({"image": photograph((60, 40))}, ValueError, r"image: expected .* 40 x 60 px .* got 60 x 40"),
        ({"image": np.zeros((40, 60), np.int64)}, TypeError, "image: .* got int64"),
        ({"image": np.zeros((40, 60, 3))}, TypeError, "image: expected an array of uint8, got float64"),
        ({"image": np.zeros((3, 40, 60), np.uint8)}, TypeError, r"image: .* got shape \(3, 40, 60\)"),
        ({"image": np.zeros(60, np.uint8)}, TypeError, r"image: .* got shape \(60,\)"),
        ({"image_index": 1}, ValueError, r"image_index: expected an integer in \[0, 1\), got 1"),
        ({"image_index": -1}, ValueError, r"image_index: expected an integer in \[0, 1\), got -1"),
        ({"image_index": True}, TypeError, "image_index: expected an integer"),
        ({"image_index": 0.0}, TypeError, "image_index: expected an integer"),
        ({"width": 399}, ValueError, "width: expected an integer >= 400, got 399"),
        ({"width": 1000.0}, TypeError, "width: expected an integer >= 400, got 1000.0"),
        ({"title": 3}, TypeError, "title: expected a string or None, got 3"),
        ({"image": "no such file.png"}, FileNotFoundError, "got 'no such file.png': No such file"),
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
    kept = picture._Kept(handle.last, 0)
    assert kept.length == (inputs["input_ids"] == processor.image_token_id).sum()
    labels = page(image, handle.last)[1]["Tiles"].texts
    assert sum(int(label.get_text().split(" ")[0]) for label in labels) == kept.counts()["tile patches"][0]


def test_hero_imports_no_pillow():
    code = "import sys, hero; assert 'PIL' not in sys.modules; assert 'visualize' in dir(hero)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_matplotlib_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'hero-vlm\[plot\]'"):
        hero.visualize(photograph((40, 60)), select(GEOMETRIES["single"].layout((40, 60))))


def test_global_state_of_matplotlib_is_left_alone():
    """Neither read nor changed: the user's style gives the same picture, and pyplot is not imported."""
    code = (
        "import sys, numpy as np, matplotlib, test_picture as t, hero\n"
        "size = (40, 60); selection = t.select(t.GEOMETRIES['single'].layout(size))\n"
        "first = hero.visualize(t.photograph(size), selection).tobytes()\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
        "matplotlib.rcParams.update({'font.size': 30, 'font.family': 'serif', 'axes.facecolor': 'red'})\n"
        "assert hero.visualize(t.photograph(size), selection).tobytes() == first\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent)
