"""What dropping costs in answers, on the bundled mini model and scenes it has never seen."""

import contextlib

import numpy as np
import pytest
import torch

import hero
from hero import mini

pytest.importorskip("sklearn")
pytest.importorskip("skimage")

GRID = (3, 3)


@pytest.fixture(scope="module")
def loaded():
    loaded = mini.load()
    loaded.processor.tokenizer.padding_side = "left"
    return loaded


@pytest.fixture(scope="module")
def asked():
    """500 (scene, question) pairs, each question about one object."""
    from hero.mini import scenes

    rng = np.random.default_rng(20260209)
    pairs = []
    while len(pairs) < 500:
        scene = scenes.scene(rng, GRID, int(rng.integers(3, 7)), split="test")
        question = scenes.questions(scene, rng, 1)[0]
        if question.tile is not None:
            pairs.append((scene, question))
    return pairs


def answers(loaded, asked, **options):
    """(right answers [n] bool, tile with the largest budget [n]), hero attached where options say so."""
    from hero.mini import scenes

    right, largest = [], []
    attach = hero.attach(loaded.model, loaded.processor, **options) if options else contextlib.nullcontext()
    with attach as handle, torch.inference_mode():
        for start in range(0, len(asked), 25):
            part = asked[start : start + 25]
            inputs = loaded.processor(
                images=[scene.image for scene, _ in part],
                text=[scenes.prompt(question.text) for _, question in part],
                padding=True,
                return_tensors="pt",
            )
            output = loaded.model.generate(**inputs, max_new_tokens=1, do_sample=False)
            words = loaded.processor.batch_decode(output[:, -1:], skip_special_tokens=True)
            right += [
                word.strip() == question.answer for word, (_, question) in zip(words, part, strict=True)
            ]
            if handle is not None:
                budgets = handle.last.budgets.view(len(part), -1)[:, 1:]
                largest += budgets.argmax(1).tolist()
    return np.array(right), largest


def test_relevance_finds_the_tile(loaded, asked):
    """The tile that holds the answer gets the largest budget in at least 85 % of 200 scenes."""
    part = asked[:200]
    _, largest = answers(loaded, part, keep_ratio=0.2, relevance=loaded.relevance)
    hits = [tile == question.tile for tile, (_, question) in zip(largest, part, strict=True)]
    assert np.mean(hits) >= 0.85
    _, blind = answers(loaded, part, keep_ratio=0.2)
    assert np.mean([tile == question.tile for tile, (_, question) in zip(blind, part, strict=True)]) < 0.5


def test_answers_stay(loaded, asked):
    """A fifth of the tokens costs at most 3 points of 500 answers, and choosing at random costs more."""
    full, _ = answers(loaded, asked)
    kept, _ = answers(loaded, asked, keep_ratio=0.2, relevance=loaded.relevance)
    assert full.mean() > 0.8
    assert kept.mean() >= full.mean() - 0.03
    random, _ = answers(loaded, asked[:250], keep_ratio=0.2, policy="random")
    assert random.mean() < kept[:250].mean() - 0.05
