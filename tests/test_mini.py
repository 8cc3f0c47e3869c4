"""The bundled mini model, its scenes and its demo."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest

import hero.mini
from bench.mini import scenes

LARGEST_COUNT = {2: 4, 4: 5, 6: 6, 9: 6}
"""Tiles -> most objects in a training scene of that size; the least is three."""


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


def draw(seed, grid=(3, 3), n_objects=6, split="test"):
    return scenes.scene(np.random.default_rng(seed), grid, n_objects, split)


def many_scenes(split="train"):
    """Scenes of every grid and of 0 to 9 objects."""
    for seed in range(60):
        yield draw(seed, scenes.GRIDS[seed % len(scenes.GRIDS)], seed // 6, split)


def ask(mini, images, texts):
    """Greedy answers to one question about each image, in one left-padded batch."""
    inputs = mini.processor(
        images=images,
        text=[scenes.prompt(text) for text in texts],
        padding=True,
        padding_side="left",
        return_tensors="pt",
    )
    output = mini.model.generate(**inputs, max_new_tokens=2, do_sample=False)
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
    assert sum(parameter.numel() for parameter in model.parameters()) == 535_296
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


def test_vocabulary_covers_every_question(mini, pictures):
    rng = np.random.default_rng(0)
    texts, kinds = set(), set()
    for split in scenes.SPLITS:
        for picture in many_scenes(split):
            if picture.objects:
                asked = scenes.questions(picture, rng, 40)
                texts |= {scenes.prompt(question.text) for question in asked}
                texts |= {question.answer for question in asked}
                kinds |= {question.kind for question in asked}
    assert kinds == set(scenes.KINDS)
    unknown = mini.processor.tokenizer.unk_token_id
    for text in texts:
        assert unknown not in mini.processor.tokenizer(text).input_ids, text


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
    ids = tokenizer(["what digit", "what digit is on the red square"], padding=True).input_ids
    assert ids[0][:4] == [bos, *tokenizer.convert_tokens_to_ids(["what", "digit"]), eos]
    assert set(ids[0][4:]) == {pad}
    assert ids[1][0] == bos and ids[1][-1] == eos
    long = tokenizer("the " * 50, truncation=True).input_ids
    assert len(long) == 24 and long[-1] == eos


def test_clip_finds_the_tile_asked_about(mini, pictures):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(11)
    clip, tokenizer = hero.mini.build_clip(mini.model), hero.mini.clip_tokenizer()
    images, texts, tiles = [], [], []
    while len(texts) < 60:
        picture = scenes.scene(rng, (3, 3), 5, "test")
        question = scenes.questions(picture, rng, 1)[0]
        if question.tile is not None:
            images.append(picture.image)
            texts.append(question.text)
            tiles.append(question.tile)
    pixels = mini.processor.image_processor(images, return_tensors="pt").pixel_values[:, 1:]
    with torch.inference_mode():
        pooled = clip.vision_model(pixel_values=pixels.flatten(0, 1)).pooler_output
        image_embedding = clip.visual_projection(pooled).unflatten(0, (60, 9))
        text_inputs = tokenizer(texts, padding=True, return_tensors="pt")
        text_embedding = clip.text_projection(clip.text_model(**text_inputs).pooler_output)
    found = torch.cosine_similarity(image_embedding, text_embedding[:, None], dim=-1).argmax(1)
    # 0.93 of 974 questions; chance is 0.11.
    assert (found == torch.tensor(tiles)).float().mean() >= 0.8


# answers


def test_stock_model_answers_fresh_questions(mini, pictures):
    rng = np.random.default_rng(150)
    images, asked = [], []
    for grid in scenes.GRIDS:
        for _ in range(25):
            n_objects = int(rng.integers(3, LARGEST_COUNT[grid[0] * grid[1]] + 1))
            picture = scenes.scene(rng, grid, n_objects, "test")
            images.append(picture.image)
            asked.extend(scenes.questions(picture, rng, 1))
    answers = ask(mini, images, [question.text for question in asked])
    right = np.mean([answer == question.answer for answer, question in zip(answers, asked, strict=True)])
    # 0.845 of 6000 questions; three standard errors of 150 are 0.09.
    assert right >= 0.75


# scenes


def test_same_seed_same_scene(pictures):
    first, second, other = draw(3), draw(3), draw(4)
    assert np.array_equal(np.asarray(first.image), np.asarray(second.image))
    assert first.objects == second.objects
    assert not np.array_equal(np.asarray(first.image), np.asarray(other.image))
    asked = [scenes.questions(first, np.random.default_rng(5), 20) for _ in range(2)]
    assert asked[0] == asked[1]


@pytest.mark.parametrize("grid", [*scenes.GRIDS, (1, 1), (6, 6)])
def test_image_size(grid, pictures):
    picture = draw(0, grid)
    assert picture.image.mode == "RGB"
    assert picture.image.size == (grid[1] * scenes.TILE, grid[0] * scenes.TILE)
    assert picture.grid == grid


def test_objects_lie_within_one_tile_and_apart(pictures):
    for picture in many_scenes():
        for index, thing in enumerate(picture.objects):
            y0, x0, y1, x1 = thing.box
            row, column = divmod(thing.tile, picture.grid[1])
            assert row < picture.grid[0]
            assert row * scenes.TILE <= y0 < y1 <= (row + 1) * scenes.TILE
            assert column * scenes.TILE <= x0 < x1 <= (column + 1) * scenes.TILE
            for other in picture.objects[:index]:
                a0, b0, a1, b1 = other.box
                assert y1 <= a0 or a1 <= y0 or x1 <= b0 or b1 <= x0


def test_objects_are_distinct(pictures):
    for picture in many_scenes():
        assert len({thing.digit for thing in picture.objects}) == len(picture.objects)
        assert len({(thing.colour, thing.shape) for thing in picture.objects}) == len(picture.objects)


def test_objects_are_painted_in_their_box(pictures):
    """The records speak of the pixels: a good part of each box has the object's colour."""
    for picture in many_scenes():
        pixels = np.asarray(picture.image, np.float32)
        for thing in picture.objects:
            y0, x0, y1, x1 = thing.box
            distance = np.abs(pixels[y0:y1, x0:x1] - np.array(scenes.COLOURS[thing.colour])).max(-1)
            near = distance < 4 * 0.04 * 255  # colours jitter by 0.04, one standard deviation
            assert near.mean() > 0.1, thing


def test_scene_holds_the_objects_wanted(pictures):
    assert draw(0, (3, 3), 0).objects == ()
    assert all(len(draw(seed, (3, 3), 6).objects) == 6 for seed in range(30))


def test_splits_share_no_handwriting(pictures):
    digits = scenes._digits()
    train, test = (np.concatenate(digits.indices[split]) for split in scenes.SPLITS)
    assert not set(train) & set(test)
    assert len(train) == 1400 and len(test) == 397
    train_scene, test_scene = draw(0, split="train"), draw(0, split="test")
    assert not np.array_equal(np.asarray(train_scene.image), np.asarray(test_scene.image))


def test_answers_are_true_of_the_scene(pictures):
    rng = np.random.default_rng(1)
    for picture in many_scenes():
        if not picture.objects:
            continue
        for question in scenes.questions(picture, rng, 30):
            words = set(question.text.split())
            if question.kind in scenes.ONE_ATTRIBUTE:
                assert question.objects == tuple(
                    thing for thing in picture.objects if thing.box == question.box
                )
            else:
                assert question.tile is None and question.box is None
            if question.kind == "count":
                assert question.answer == str(len(picture.objects)) and question.objects == picture.objects
                continue
            if question.kind == "background":
                assert question.answer == picture.background and question.objects == ()
                continue
            if question.kind == "relation":
                names = [f"{thing.colour} {thing.shape}" for thing in question.objects]
                _, first, relation, second = re.fullmatch(
                    r"(is) the (.+) (above|left of) the (.+)", question.text
                ).groups()
                assert names == [first, second]
                (y, x), (other_y, other_x) = (
                    ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)
                    for box in (thing.box for thing in question.objects)
                )
                apart = other_y - y if relation == "above" else other_x - x
                assert abs(apart) >= 16 and question.answer == ("yes" if apart > 0 else "no")
                continue
            # Exactly one object fits every colour, shape and digit that the question names.
            fits = [
                thing
                for thing in picture.objects
                if words & set(scenes.COLOURS) <= {thing.colour}
                and words & set(scenes.SHAPES) <= {thing.shape}
                and {word for word in words if word.isdigit()} <= {str(thing.digit)}
            ]
            assert len(fits) == 1, question
            assert question.answer == str(getattr(fits[0], question.kind))
            assert (question.tile, question.box) == (fits[0].tile, fits[0].box)


@pytest.mark.parametrize(
    "arguments, error, named",
    [
        (dict(split="validation"), ValueError, "split"),
        (dict(grid=(0, 3)), ValueError, r"grid\[0\]"),
        (dict(grid=(3, 7)), ValueError, r"grid\[1\]"),
        (dict(grid=(3,)), ValueError, "grid"),
        (dict(grid=9), ValueError, "grid"),
        (dict(grid=(2.0, 2)), TypeError, r"grid\[0\]"),
        (dict(n_objects=-1), ValueError, "n_objects"),
        (dict(n_objects=10), ValueError, "n_objects"),
        (dict(n_objects=True), TypeError, "n_objects"),
        (dict(rng=0), TypeError, "rng"),
    ],
)
def test_scene_names_a_bad_argument(arguments, error, named):
    good = dict(rng=np.random.default_rng(0), grid=(2, 2), n_objects=3, split="test")
    with pytest.raises(error, match=f"^{named}: expected .*, got "):
        scenes.scene(**(good | arguments))


def test_questions_and_prompt_name_a_bad_argument(pictures):
    picture, rng = draw(0), np.random.default_rng(0)
    with pytest.raises(ValueError, match=r"^n: "):
        scenes.questions(picture, rng, -1)
    for kinds in ("digit", [], ["digits"], ["digit", 3]):
        with pytest.raises(ValueError, match=r"^kinds: "):
            scenes.questions(picture, rng, 1, kinds)
    with pytest.raises(ValueError, match=r"^scene: .* relation"):
        scenes.questions(draw(0, n_objects=1), rng, 1, ["relation"])
    with pytest.raises(ValueError, match=r"^scene: "):
        scenes.questions(draw(0, n_objects=0), rng, 1)
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


def test_build_demo_checks_its_seed(tmp_path):
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
