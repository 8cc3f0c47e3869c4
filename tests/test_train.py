"""The training of the mini model: what it is told is true, what it computes is the model, and it learns."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image

import hero
import hero.mini
from bench.mini import scenes

pytest.importorskip("sklearn")
pytest.importorskip("skimage")

from bench.mini import train

TINY = train.Schedule(6, 4, 6, clip_batch=8, answer_tokens=300, questions=3)


def rng(seed=0):
    return np.random.default_rng(seed)


def run(folder, schedule=TINY, **options):
    return train.Run(folder, 0, schedule, torch.device("cpu"), quiet=True, **options)


# what it is told


def test_patch_labels_are_what_the_patches_show():
    """Recounted pixel by pixel."""
    for seed in range(20):
        picture = scenes.scene(rng(seed), (1, 1), 3)
        labels = train._patch_labels(picture, thumbnail=False).reshape(6, 6, 3)
        for row in range(6):
            for column in range(6):
                area = np.zeros(len(picture.objects))
                for number, thing in enumerate(picture.objects):
                    y0, x0, y1, x1 = thing.box
                    area[number] = sum(
                        y0 <= y < y1 and x0 <= x < x1
                        for y in range(row * 8, row * 8 + 8)
                        for x in range(column * 8, column * 8 + 8)
                    )
                if area.max(initial=0) < 32:
                    assert labels[row, column].tolist() == [len(train.COLOURS), train.NOTHING, train.NOTHING]
                    continue
                thing = picture.objects[area.argmax()]
                colour, shape, digit = labels[row, column]
                assert train.WORDS_OF[0][colour] == thing.colour
                assert train.WORDS_OF[1][shape] == thing.shape
                assert train.WORDS_OF[2][digit] == str(thing.digit)


def test_labels_of_a_thumbnail_follow_the_scale():
    picture = scenes.scene(rng(3), (2, 2), 6)
    labels = train._patch_labels(picture, thumbnail=True).reshape(6, 6, 3)
    assert (labels[..., 2] == train.NOTHING).all()
    for thing in picture.objects:
        y, x = (thing.box[0] + thing.box[2]) // 2 // 16, (thing.box[1] + thing.box[3]) // 2 // 16
        near = labels[max(0, y - 1) : y + 2, max(0, x - 1) : x + 2, 0]
        assert train.COLOURS.index(thing.colour) in near


def test_captions_are_true_and_known_words():
    for seed in range(300):
        generator = rng(seed)
        picture = scenes.scene(generator, (1, 1), int(generator.integers(0, 4)))
        text, facts = train._caption(generator, picture.objects, digits=bool(seed % 2))
        assert train._fits(picture.objects, facts)
        assert set(text.split()) <= set(scenes.WORDS)
        assert not facts or not train._fits((), facts)
        assert seed % 2 or "digit" not in str(facts)


def test_batches_depend_on_seed_and_step_alone():
    for batches in (train.ClipBatches(0, TINY, "clip"), train.AnswerBatches(0, TINY)):
        first, again, other = batches[3], batches[3], batches[4]
        assert all(torch.equal(first[key], again[key]) for key in first)
        assert not torch.equal(first["text"], other["text"])
    assert not torch.equal(
        train.ClipBatches(1, TINY, "clip")[3]["text"], train.ClipBatches(0, TINY, "clip")[3]["text"]
    )


def test_pictures_are_cut_as_the_processor_cuts_them():
    processor = train.build_processor()
    for grid in scenes.GRIDS:
        picture = scenes.scene(rng(1), grid, 3)
        ours = np.concatenate([train._thumbnail(picture)[None], train._tiles(picture)])
        theirs = processor.image_processor(picture.image, return_tensors="pt").pixel_values[0].numpy()
        # A processor with torchvision squashes the thumbnail with another bicubic filter.
        np.testing.assert_allclose(ours[1:], theirs[1:], atol=1e-5)
        assert abs(ours[0] - theirs[0]).mean() < 0.02


# what it computes


def test_the_answer_loss_is_the_models():
    """Many questions on one picture at once give the logits of each question asked alone."""
    _, model = train.new_models(0)
    batch = train.AnswerBatches(0, TINY)[0]
    losses = train.answer_loss(model, TINY, batch)
    grid = tuple(batch["grid"].tolist())
    size = torch.tensor([[grid[0] * scenes.TILE, grid[1] * scenes.TILE]])
    wrong, right, total = [], 0, 0
    for pixels, texts, labels in zip(batch["pixels"], batch["text"], batch["labels"], strict=True):
        for text, label in zip(texts.view(TINY.questions, -1), labels.view(TINY.questions, -1), strict=True):
            visual = len(train._sequence(model, grid))
            ids = torch.tensor([[train.BOS] + [train.IDS["<image>"]] * visual + text.tolist()])
            with torch.no_grad():
                logits = model(
                    input_ids=ids,
                    pixel_values=pixels[None],
                    image_sizes=size,
                    attention_mask=torch.ones_like(ids),
                ).logits[0, -len(text) :]
            asked = label != train.NOTHING
            wrong.append(torch.nn.functional.cross_entropy(logits[asked], label[asked], reduction="none"))
            answer = asked & (label != train.EOS)
            right += int((logits.argmax(-1) == label)[answer].sum())
            total += int(answer.sum())
    assert losses["answer"].item() == pytest.approx(torch.cat(wrong).mean().item(), abs=1e-5)
    assert losses["right"].item() == pytest.approx(right / total)


def test_the_tower_stays_frozen_after_its_stage(tmp_path):
    train.train(run(tmp_path))
    clip = torch.load(tmp_path / "clip.pt", weights_only=True)["modules"]["clip"]
    model = torch.load(tmp_path / "answer.pt", weights_only=True)["modules"]["model"]
    tower = "model.vision_tower."
    for name, value in model.items():
        if name.startswith(tower):
            assert torch.equal(value, clip[f"vision_model.{name.removeprefix(tower)}"]), name


class Stopped(Exception):
    """What a loss raises where a run is to stop."""


@pytest.mark.parametrize(("stage", "step"), [("clip", 5), ("align", 3), ("answer", 4)])
def test_a_run_that_was_stopped_ends_at_the_same_weights(stage, step, tmp_path, monkeypatch):
    whole = train.train(run(tmp_path / "whole"))
    loss, calls = getattr(train, f"{stage}_loss"), []

    def stopping(*arguments):
        calls.append(None)
        if len(calls) == step:
            raise Stopped
        return loss(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(train, f"{stage}_loss", stopping)
        with pytest.raises(Stopped):
            train.train(run(tmp_path / "parts", save_every=2))
    assert train.train(run(tmp_path / "parts")) == whole
    for name in ("model.safetensors", hero.mini.CLIP_HEAD):
        one, other = ((tmp_path / part / "model" / name).read_bytes() for part in ("whole", "parts"))
        assert one == other


def test_a_run_does_not_go_on_with_other_settings(tmp_path, capsys):
    (tmp_path / "run.json").write_text(json.dumps({"settings": {"seed": 1}}))
    with pytest.raises(SystemExit):
        train.main(["--out", str(tmp_path), "--schedule", "short"])
    assert "--out: expected a new folder" in capsys.readouterr().err


# that it learns


@pytest.mark.slow
def test_the_short_schedule_learns_and_writes_a_model(tmp_path):
    train.main(["--out", str(tmp_path), "--schedule", "short", "--questions", "20", "--device", "cpu"])
    record = json.loads((tmp_path / "model" / "training.json").read_text())
    losses = record["losses"]
    assert losses["clip"][0]["patches"] > 5.0 > 4.3 > losses["clip"][-1]["patches"]
    assert losses["clip"][-1]["background"] < 0.75 * losses["clip"][0]["background"]
    assert losses["answer"][0]["answer"] > 3.0 > 2.1 > losses["answer"][-1]["answer"]
    assert record["settings"] == {"schedule": "short", "seed": 0} | json.loads(
        json.dumps(dataclasses.asdict(train.SCHEDULES["short"]))
    )
    assert set(record["accuracy"]["kinds"]) == set(scenes.KINDS)
    card = (tmp_path / "model" / "README.md").read_text()
    assert "--schedule short --seed 0" in card and "{" not in card.replace("```", "")
    loaded = hero.mini.load(weights=tmp_path / "model")
    picture = scenes.scene(rng(), (3, 3), 4, "test").image
    with hero.attach(loaded.model, loaded.processor, relevance=loaded.relevance, keep_ratio=0.2):
        inputs = loaded.processor(
            images=picture, text=scenes.prompt("what is in the background"), return_tensors="pt"
        )
        assert loaded.model.generate(**inputs, max_new_tokens=1).shape[1] == inputs["input_ids"].shape[1] + 1


def test_evaluate_counts_right_answers():
    """Asked again, the bundled weights answer as their card says, within four standard errors."""
    said = json.loads((hero.mini.WEIGHTS / "training.json").read_text())["accuracy"]
    found = train.evaluate(hero.mini.WEIGHTS, 40, seed=5, quiet=True)
    for group, cells in said.items():
        assert list(found[group]) == list(cells)
        for name, value in cells.items():
            error = max(value * (1 - value), 0.02) / 40
            assert abs(found[group][name] - value) < 4 * error**0.5, (group, name)


def test_load_names_a_folder_that_is_none(tmp_path):
    Image.new("RGB", (1, 1)).save(tmp_path / "picture.png")
    with pytest.raises(ValueError, match=r"^weights: "):
        hero.mini.load(weights=tmp_path)
