"""The bundled mini model, its scenes and its demo."""

import hashlib
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import hero.mini
from bench.mini import scenes

RIGHT = 0.92
"""Least share of right answers to 150 fresh questions: three standard errors below that of thousands."""
FOUND = 0.6
"""Least share of 60 questions whose tile CLIP finds, likewise."""
PARAMETERS = 599_936


@pytest.fixture(scope="session")
def pictures():
    """Skips where the packages that scenes are drawn from are missing."""
    pytest.importorskip("sklearn")
    pytest.importorskip("skimage")


@pytest.fixture(scope="session")
def mini():
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    return hero.mini.load(relevance=False)


def draw(seed, grid=(3, 3), amounts=(3, 4, 4), split="test", **options):
    return scenes.scene(np.random.default_rng(seed), grid, scenes.Amounts(*amounts), split, **options)


def many_scenes(split="test"):
    """Scenes of every grid, as questions are asked about, and full ones with repetitions."""
    for seed in range(60):
        rng, grid = np.random.default_rng(seed), scenes.GRIDS[seed % len(scenes.GRIDS)]
        yield scenes.scene(rng, grid, scenes.amounts(rng, grid[0] * grid[1]), split)
    for seed in range(10):
        yield draw(seed, amounts=(9, 9, 5), split=split, repeat=True)


def named(picture):
    """What questions may be about, by name."""
    found = {f"{thing.colour} {thing.shape}": thing for thing in picture.things if thing.sort != "clutter"}
    assert len(found) == sum(thing.sort != "clutter" for thing in picture.things)
    return found


def ask(mini, images, texts):
    """Greedy answers to one question about each image, in one left-padded batch."""
    inputs = mini.processor(
        images=images,
        text=[scenes.prompt(text) for text in texts],
        padding=True,
        padding_side="left",
        return_tensors="pt",
    )
    output = mini.model.generate(**inputs, max_new_tokens=4, do_sample=False)
    answers = mini.processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [answer.strip() for answer in answers]


# weights


def test_import_loads_no_heavy_package():
    code = (
        "import sys, hero; before = set(sys.modules); import hero.mini; hero.mini.demo_questions()\n"
        "new = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        "heavy = new & {'torch', 'transformers', 'sklearn', 'skimage', 'numpy', 'PIL'}\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_weights_load_strictly():
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model, report = transformers.LlavaNextForConditionalGeneration.from_pretrained(
        hero.mini.WEIGHTS, dtype=torch.float32, output_loading_info=True
    )
    assert not any(report.values()), report
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_load_gives_eval_mode_and_dtype(mini):
    torch = pytest.importorskip("torch")
    assert mini.relevance is None
    assert not mini.model.training
    assert {parameter.dtype for parameter in mini.model.parameters()} == {torch.float32}
    half = hero.mini.load(torch.bfloat16, relevance=False).model
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}


def test_load_checks_its_arguments():
    torch = pytest.importorskip("torch")
    with pytest.raises(TypeError, match="dtype"):
        hero.mini.load("float32")
    with pytest.raises(TypeError, match="dtype"):
        hero.mini.load(torch.int64)
    with pytest.raises(TypeError, match="relevance"):
        hero.mini.load(relevance="yes")


def test_load_with_relevance():
    relevance = pytest.importorskip("hero.relevance")
    pytest.importorskip("torch")
    loaded = hero.mini.load()
    assert isinstance(loaded.relevance, relevance.ClipRelevance)


def test_processor_comes_from_the_folder(mini):
    assert type(mini.processor).__name__ == "LlavaNextProcessor"
    assert type(mini.processor.image_processor).__name__.startswith("LlavaNextImageProcessor")
    assert mini.processor.patch_size == scenes.PATCH
    assert mini.model.config.vision_config.image_size == scenes.TILE
    pinpoints = [[rows * scenes.TILE, columns * scenes.TILE] for rows, columns in scenes.GRIDS]
    assert [list(size) for size in mini.model.config.image_grid_pinpoints] == pinpoints


def test_words_are_the_vocabulary(mini):
    assert mini.processor.tokenizer.get_vocab() == {word: index for index, word in enumerate(scenes.WORDS)}


# CLIP


def test_clip_is_strict_and_holds_the_towers_parameters(mini):
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file

    before = torch.get_rng_state()
    clip = hero.mini.build_clip(mini.model)
    assert torch.equal(torch.get_rng_state(), before)
    assert not clip.training

    head = load_file(hero.mini.WEIGHTS / "clip_head.safetensors")
    tower = dict(mini.model.model.vision_tower.named_parameters())
    parameters = dict(clip.named_parameters())
    assert set(parameters) == set(head) | {f"vision_model.{name}" for name in tower}
    for name, value in head.items():
        assert torch.equal(parameters[name], value.float()), name
    for name, parameter in tower.items():
        assert parameters[f"vision_model.{name}"] is parameter, name


def test_clip_tokenizer_frames_like_clip():
    pytest.importorskip("transformers")
    tokenizer = hero.mini.clip_tokenizer()
    bos, eos, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    ids = tokenizer(["what number", "what number is on the red plate"], padding=True).input_ids
    assert ids[0][:4] == [bos, *tokenizer.convert_tokens_to_ids(["what", "number"]), eos]
    assert set(ids[0][4:]) == {pad}
    assert ids[1][0] == bos and ids[1][-1] == eos
    long = tokenizer("the " * 50, truncation=True).input_ids
    assert len(long) == 24 and long[-1] == eos


def test_clip_finds_the_tile_asked_about(mini, pictures):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(11)
    clip, tokenizer = hero.mini.build_clip(mini.model), hero.mini.clip_tokenizer()
    drawn = [scenes.scene(rng, (3, 3), scenes.amounts(rng, 9), "test") for _ in range(60)]
    asked = [scenes.questions(picture, rng, 1, ("number", "nth", "digit"))[0] for picture in drawn]
    images = [picture.image for picture in drawn]
    pixels = mini.processor.image_processor(images, return_tensors="pt").pixel_values[:, 1:]
    with torch.inference_mode():
        pooled = clip.vision_model(pixel_values=pixels.flatten(0, 1)).pooler_output
        image_embedding = clip.visual_projection(pooled).unflatten(0, (60, 9))
        text_inputs = tokenizer([question.text for question in asked], padding=True, return_tensors="pt")
        text_embedding = clip.text_projection(clip.text_model(**text_inputs).pooler_output)
    found = torch.cosine_similarity(image_embedding, text_embedding[:, None], dim=-1).argmax(1).tolist()
    right = [tile in question.things[0].tiles((3, 3)) for tile, question in zip(found, asked, strict=True)]
    assert np.mean(right) >= FOUND


# answers


def test_stock_model_answers_fresh_questions(mini, pictures):
    rng = np.random.default_rng(150)
    images, asked = [], []
    for number in range(150):
        grid = scenes.GRIDS[number % len(scenes.GRIDS)]
        picture = scenes.scene(rng, grid, scenes.amounts(rng, grid[0] * grid[1]), "test")
        images.append(picture.image)
        asked.extend(scenes.questions(picture, rng, 1))
    answers = ask(mini, images, [question.text for question in asked])
    right = [answer == question.answer for answer, question in zip(answers, asked, strict=True)]
    assert np.mean(right) >= RIGHT


# scenes


def fingerprint():
    """Of scenes of both splits and of questions about one."""
    plates, mixed = draw(3, amounts=(3, 0, 2), split="train"), draw(3)
    asked = scenes.questions(mixed, np.random.default_rng(5), 20)
    parts = [
        plates.image.tobytes(),
        mixed.image.tobytes(),
        repr((plates.things, mixed.things, asked)).encode(),
    ]
    return hashlib.sha256(b"".join(parts)).hexdigest()


def test_same_seed_same_scene_in_every_process(pictures):
    code = "import test_mini; print(test_mini.fingerprint())"
    paths = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])])
    environment = {**os.environ, "PYTHONPATH": paths, "PYTHONHASHSEED": "1"}
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=True)
    assert ran.stdout.decode().strip() == fingerprint() == fingerprint()
    assert draw(3).image.tobytes() != draw(4).image.tobytes() != draw(4, split="train").image.tobytes()


@pytest.mark.parametrize("grid", [*scenes.GRIDS, (1, 1), (6, 6)])
def test_image_size(grid, pictures):
    picture = draw(0, grid)
    assert picture.image.mode == "RGB" and picture.grid == grid
    assert picture.image.size == (grid[1] * scenes.TILE, grid[0] * scenes.TILE)


def test_things_lie_in_the_picture_and_apart(pictures):
    """Painted one by one with a border of two px: none meets another. Plates alone cross tiles, sideways."""
    crossing = 0
    for picture in many_scenes():
        width, height = picture.image.size
        taken = np.zeros((height + 4, width + 4), bool)
        for thing in picture.things:
            y0, x0, y1, x1 = thing.box
            assert 0 <= y0 < y1 <= height and 0 <= x0 < x1 <= width
            assert not taken[y0 : y1 + 4, x0 : x1 + 4].any()
            taken[y0 + 2 : y1 + 2, x0 + 2 : x1 + 2] = True
            touched = {y // 48 * picture.grid[1] + x // 48 for y in range(y0, y1) for x in range(x0, x1)}
            assert thing.tiles(picture.grid) == sorted(touched)
            assert len(touched) == 1 or thing.sort != "object"
            if thing.sort == "plate":
                crossing += len(touched) > 1
                assert y0 // 48 == (y1 - 1) // 48
    assert crossing > 10


def test_digits_stand_on_their_things_each_in_one_tile(pictures):
    """Left to right; a border of two tiles runs between two digits of a plate."""
    for picture in many_scenes():
        for thing in picture.things:
            count = {"plate": 3, "object": 1, "clutter": 0}[thing.sort]
            assert len(thing.digits) == len(thing.digit_boxes) == count
            right = thing.box[1]
            for y0, x0, y1, x1 in thing.digit_boxes:
                assert thing.box[0] <= y0 < y1 <= thing.box[2] and right <= x0 < x1 <= thing.box[3]
                assert x0 // 48 == (x1 - 1) // 48 and y0 // 48 == (y1 - 1) // 48
                right = x1


def test_the_record_says_what_the_pixels_show(pictures):
    """Boxes have the thing's colour, and each digit is a handwriting of that digit, of the test split."""
    digits = scenes._digits()
    hands = np.concatenate(digits.indices["test"])
    values = np.repeat(np.arange(10), [len(some) for some in digits.indices["test"]])
    for picture in many_scenes():
        pixels = np.asarray(picture.image, np.float32)
        for thing in picture.things:
            if thing.sort == "clutter":
                continue
            y0, x0, y1, x1 = thing.box
            area = pixels[y0:y1, x0:x1]
            near = np.abs(area - np.array(scenes.COLOURS[thing.colour])).max(-1) < 4 * 0.04 * 255  # jitter
            assert near.mean() > 0.1, thing
            if thing.shape not in ("plate", "square"):
                continue  # digits reach over the edge
            colour = area[1, 1].sum()
            for digit, (top, left, bottom, end) in zip(thing.digits, thing.digit_boxes, strict=True):
                ink = (1 - pixels[top:bottom, left:end].sum(-1) / colour) / 0.92
                distance = np.abs(digits.pixels[bottom - top][hands] - ink).mean((1, 2))
                assert values[distance.argmin()] == digit and distance.min() < 0.01, thing


def test_colours_and_digits_are_distinct_without_repetition(pictures):
    for picture in many_scenes():
        colours = [thing.colour for thing in picture.things if thing.sort != "clutter"]
        digits = [thing.digits for thing in picture.of("object")]
        if len(picture.things) < 14:
            assert len(set(colours)) == len(colours) <= 7 and len(set(digits)) == len(digits)
        else:
            assert len(set(colours)) < len(colours)


def test_scene_holds_what_is_wanted(pictures):
    assert draw(0, amounts=(0, 0, 0)).things == ()
    for seed in range(30):
        for thing, wanted in (("plate", 2), ("object", 3), ("clutter", 2)):
            assert len(draw(seed, amounts=(2, 3, 2)).of(thing)) == wanted
    assert 0 < len(draw(0, (1, 1), (7, 0, 9)).things) < 16  # what finds no place is left out


def test_splits_share_no_handwriting(pictures):
    digits = scenes._digits()
    train, test = (np.concatenate(digits.indices[split]) for split in scenes.SPLITS)
    assert not set(train) & set(test)
    assert len(train) == 1400 and len(test) == 397


# questions


def check_answer(picture, question):
    """Whether text, answer and boxes fit the scene, read from the text alone."""
    things, text, answer = named(picture), question.text, question.answer
    if question.kind == "number":
        plate = things[re.fullmatch("what number is on the (.+)", text)[1]]
        assert answer.split() == [str(digit) for digit in plate.digits]
        return plate.digit_boxes
    if question.kind == "nth":
        word, name = re.fullmatch("what is the (first|second|third) digit on the (.+ plate)", text).groups()
        place = {"first": 0, "second": 1, "third": 2}[word]
        assert answer == str(things[name].digits[place])
        return things[name].digit_boxes[place : place + 1]
    if question.kind == "digit":
        thing = things[re.fullmatch("what digit is on the (.+)", text)[1]]
        assert thing.sort == "object" and answer == str(*thing.digits)
        return (thing.box,)
    if question.kind == "larger":
        names = re.fullmatch("what is the larger digit on the (.+) and the (.+)", text).groups()
        pair = [things[name] for name in names]
        assert names[0] != names[1] and {thing.sort for thing in pair} == {"object"}
        assert answer == max(str(*thing.digits) for thing in pair)
        return tuple(thing.box for thing in pair)
    if question.kind == "relation":
        one, word, other = re.fullmatch("is the (.+) (above|left of) the (.+)", text).groups()
        axis = 0 if word == "above" else 1
        middles = [(things[name].box[axis] + things[name].box[axis + 2]) / 2 for name in (one, other)]
        assert abs(middles[0] - middles[1]) >= 36
        assert answer == ("yes" if middles[0] < middles[1] else "no")
    else:
        assert (text, answer) == ("what is in the background", picture.background)
    return ()


def test_answers_are_true_of_the_scene(mini, pictures):
    rng, unknown = np.random.default_rng(1), mini.processor.tokenizer.unk_token_id
    asked = []
    for picture in itertools.islice(many_scenes(), 60):
        for question in scenes.questions(picture, rng, 30):
            assert question.boxes == check_answer(picture, question), question
            texts = [scenes.prompt(question.text), question.answer]
            assert all(unknown not in ids for ids in mini.processor.tokenizer(texts).input_ids), texts
            asked.append(question)
    assert {question.kind for question in asked} == set(scenes.KINDS)
    assert {question.answer for question in asked if question.kind == "relation"} == {"yes", "no"}


def test_kinds_are_drawn_in_their_proportions(pictures):
    picture, rng = draw(0), np.random.default_rng(0)
    kinds = [question.kind for question in scenes.questions(picture, rng, 4000)]
    assert all(abs(kinds.count(kind) / 4000 - share) < 0.03 for kind, share in scenes.KINDS.items())
    assert {question.kind for question in scenes.questions(picture, rng, 50, ("nth", "digit"))} == {
        "nth",
        "digit",
    }


@pytest.mark.parametrize(
    "arguments, error, named",
    [
        (dict(split="validation"), ValueError, "split"),
        (dict(grid=(0, 3)), ValueError, r"grid\[0\]"),
        (dict(grid=(3, 7)), ValueError, r"grid\[1\]"),
        (dict(grid=(3,)), ValueError, "grid"),
        (dict(grid=9), ValueError, "grid"),
        (dict(grid=(2.0, 2)), TypeError, r"grid\[0\]"),
        (dict(amounts=3), ValueError, "amounts"),
        (dict(amounts=(1, 2)), ValueError, "amounts"),
        (dict(amounts=(4, 4, 0)), ValueError, "amounts"),
        (dict(amounts=(-1, 2, 0)), ValueError, "amounts.plates"),
        (dict(amounts=(1, True, 0)), TypeError, "amounts.objects"),
        (dict(amounts=(1, 2, 0.0)), TypeError, "amounts.clutter"),
        (dict(rng=0), TypeError, "rng"),
    ],
)
def test_scene_names_a_bad_argument(arguments, error, named):
    good = dict(rng=np.random.default_rng(0), grid=(2, 2), amounts=(1, 2, 1), split="test")
    with pytest.raises(error, match=f"^{named}: expected .*, got "):
        scenes.scene(**(good | arguments))


def test_questions_and_prompt_name_a_bad_argument(pictures):
    picture, rng = draw(0), np.random.default_rng(0)
    with pytest.raises(ValueError, match=r"^n: "):
        scenes.questions(picture, rng, -1)
    for kinds in ("digit", [], ["digits"], ["digit", 3]):
        with pytest.raises(ValueError, match=r"^kinds: "):
            scenes.questions(picture, rng, 1, kinds)
    for kind, amounts in {
        "number": (0, 2, 1),
        "digit": (2, 0, 1),
        "larger": (1, 1, 0),
        "relation": (1, 0, 3),
    }.items():
        with pytest.raises(ValueError, match=f"^scene: .* {kind}"):
            scenes.questions(draw(0, amounts=amounts), rng, 1, [kind])
    with pytest.raises(TypeError, match=r"^scene: "):
        scenes.questions(picture.image, rng, 1)
    with pytest.raises(TypeError, match=r"^rng: "):
        scenes.questions(picture, 0, 1)
    with pytest.raises(TypeError, match=r"^question_text: "):
        scenes.prompt(None)


@pytest.mark.parametrize(
    "package, load", [("sklearn.datasets", scenes._digits), ("skimage", scenes._photographs)]
)
def test_missing_package_says_what_to_install(package, load, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=r"pip install 'hero-vlm\[bench\]'"):
        load.__wrapped__()


# demo


def test_demo_regenerates(tmp_path, pictures):
    from PIL import Image

    scenes.build_demo(scenes.DEMO_SEED, tmp_path)
    for name in {question.image.name for question in hero.mini.demo_questions()}:
        bundled, fresh = (np.asarray(Image.open(folder / name)) for folder in (hero.mini.DEMO, tmp_path))
        assert np.array_equal(bundled, fresh)
    bundled, fresh = (folder / "questions.json" for folder in (hero.mini.DEMO, tmp_path))
    assert json.loads(bundled.read_text()) == json.loads(fresh.read_text())


def test_build_demo_asks_of_three_tiles(tmp_path, pictures):
    """A number, one of its digits and an object's digit; a seed whose scene has no such three is refused."""
    refused = 0
    for seed in range(20):
        try:
            scenes.build_demo(seed, tmp_path)
        except ValueError as problem:
            assert str(problem).startswith("seed: ")
            refused += 1
            continue
        asked = json.loads((tmp_path / "questions.json").read_text())
        things = named(draw(seed))
        assert len({record["tile"] for record in asked}) == 3
        texts = [record["question"] for record in asked]
        starts = ("what number", "what is the", "what digit")
        assert all(sum(text.startswith(start) for text in texts) == 1 for start in starts)
        for record in asked:
            thing = things[" ".join(record["question"].split()[-2:])]
            assert thing.tiles((3, 3)) == [record["tile"]]
            assert set(record["answer"].split()) <= {str(digit) for digit in thing.digits}
    assert 0 < refused < 20
    with pytest.raises(ValueError, match=r"^seed: "):
        scenes.build_demo(-1, tmp_path)


def test_demo_is_answered(mini):
    from PIL import Image

    asked = hero.mini.demo_questions()
    assert len(asked) == 3 and len({question.tile for question in asked}) == 3
    images = [Image.open(question.image) for question in asked]
    assert {image.size for image in images} == {(144, 144)}
    answers = ask(mini, images, [question.question for question in asked])
    assert answers == [question.answer for question in asked]
