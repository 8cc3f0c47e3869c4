"""Qwen's packed towers with hero attached, against the independent reference and the stock models."""

import functools
import itertools
import random
from contextlib import contextmanager

import pytest
import torch
from independent import CACHE, IGNORE
from independent_qwen import (
    CASES,
    FAMILIES,
    IMAGE,
    TOLERANCE,
    QwenReference,
    Rule,
    batch_of,
    batch_of_rows,
    blocks_of,
    kept_of,
    layers_of,
    tiny_model,
    tiny_processor,
    with_video,
)

import hero

PROCESSORS = ("patched", "stock")
RULES = {
    "0.5": {"keep_ratio": 0.5, "block": 3},
    "0.2": {"keep_ratio": 0.2, "block": 4},
    "0.07": {"keep_ratio": 0.07, "block": 3},
    "0.3, whole": {"keep_ratio": 0.3},
    "9 tokens": {"keep_tokens": 9, "block": 4},
    "1 token": {"keep_tokens": 1, "block": 2},
    "uniform": {"keep_ratio": 0.3, "block": 3, "policy": "uniform"},
    "layers": {"keep_ratio": 0.3, "block": 3, "tile_layers": (1, -1, 0.2, 0.99)},
    "temperature": {"keep_ratio": 0.3, "block": 3, "temperature_cls": 0.02},
    "weights": {
        "keep_ratio": 0.3,
        "block": 3,
        "weights": {"density": 0.2, "saliency": 0.3, "entropy": 0.5},
    },
}
FEW = {"max_new_tokens": 5, "do_sample": False}


FAST = ("qwen2_5_vl", "qwen3_vl", "qwen3_5")  # the others are built alike
EACH = [pytest.param(one, marks=[] if one in FAST else pytest.mark.slow) for one in FAMILIES]


def diagonal(*axes, every=()):
    """Every family with all combinations of the axes' values, of which one or two are fast.

    Args:
        *axes: The values of each axis beside the family.
        every: Values of the last axis that are always fast.
    """

    def chosen(number):
        return tuple(axis[(number + place * (number // 2)) % len(axis)] for place, axis in enumerate(axes))

    found = []
    for number, family in enumerate(FAMILIES):
        fast = {chosen(number), chosen(number + 7 * (family in FAST))}
        for one in itertools.product(*axes):
            marks = [] if one in fast or one[-1] in every else pytest.mark.slow
            found.append(pytest.param(family, *one, marks=marks))
    return found


@functools.cache
def model_of(family):
    return tiny_model(family)


@functools.cache
def reference_of(family):
    return QwenReference(model_of(family))


@functools.cache
def stock_batch(family, case, side="left"):
    return batch_of(tiny_processor(family), family, case, padding_side=side)


def rule_of(options):
    fields = {"keep_ratio": None, **options}
    weights = fields.pop("weights", None)
    if weights is not None:
        fields |= {"density": 0.0, "saliency": 0.0, **weights}
    return Rule(**fields)


@functools.cache
def expected(family, case, rule, side="left"):
    """(rows, images) by the reference."""
    with torch.no_grad():
        return reference_of(family).rows(stock_batch(family, case, side), rule_of(RULES[rule]))


def attached(family, which, model=None, **options):
    """(handle, processor): the processor attached too, or left as it is."""
    processor, model = tiny_processor(family), model_of(family) if model is None else model
    if which == "patched":
        return hero.attach(model, processor, **options), processor
    return hero.attach(model, **options), processor


def kept_tokens(selection):
    """The kept tokens of each image by their numbers in its whole merged grid, from ``handle.last``."""
    mask, block, found = selection.keep_mask(), 0, []
    for layout in selection.layout:
        (top, height), (left, width) = layout.rows, layout.columns
        assert (top, left) == (0, 0)
        kept = []
        for down in range(layout.grid[0]):
            for right in range(layout.grid[1]):
                for place in mask[block].nonzero()[:, 0].tolist():
                    y, x = divmod(place, layout.side)
                    y, x = y + down * layout.side, x + right * layout.side
                    assert y < height and x < width, "a kept token outside the grid"
                    kept.append(y * width + x)
                block += 1
        found.append(sorted(kept))
    assert block == len(mask)
    return found


def assert_selection(selection, images):
    """Budgets, scores, places and numbers of what was kept."""
    side = selection.layout[0].side
    assert [(one.rows[1], one.columns[1]) for one in selection.layout] == [one.grid for one in images]
    assert selection.budgets.tolist() == [budget for one in images for budget in one.budgets]
    assert selection.lengths == [len(one.kept) for one in images]
    assert kept_tokens(selection) == [one.kept for one in images]
    assert selection.scores.shape == selection.keep_mask().shape == (len(selection.budgets), side * side)
    block = 0
    for one in images:
        for tokens in one.blocks:
            width = one.grid[1]
            first = min(tokens)
            places = [(t // width - first // width) * side + t % width - first % width for t in tokens]
            found = selection.scores[block][places].double()
            wanted = torch.tensor([one.scores[token] for token in tokens], dtype=torch.double)
            torch.testing.assert_close(found, wanted, rtol=2e-5, atol=1e-9)
            block += 1


def assert_logits(family, logits, wanted, side="left"):
    """Padded logits [B, L, V] and those of the rows."""
    assert len(logits) == len(wanted)
    for row, want in zip(logits, wanted, strict=True):
        found = row[-len(want) :] if side == "left" else row[: len(want)]
        assert float((found - want).abs().max()) <= TOLERANCE[family] * float(want.abs().max())


@contextmanager
def watched(model):
    """The positions that the language model gets, call by call."""
    seen = []
    hook = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["position_ids"].clone()), with_kwargs=True
    )
    try:
        yield seen
    finally:
        hook.remove()


def assert_positions(seen, rows, side="left"):
    """Those of the full prompt in the first call, then one more in each; a mask's count without gaps."""
    for step, positions in enumerate(seen):
        assert positions.shape[0] in (3, 4) and positions.shape[1] == len(rows)
        for b, row in enumerate(rows):
            wanted, counted = row.positions, list(range(len(row.ids)))
            if step:
                wanted = [[axis + step for axis in row.positions[-1]]]
                counted = [len(row.ids) + step - 1]
            own = positions[:, b, -len(wanted) :] if side == "left" else positions[:, b, : len(wanted)]
            assert own[-3:].T.tolist() == wanted
            if positions.shape[0] == 4:
                assert own[0].tolist() == counted


# ------------------------------------------------------------------------------------- the rules themselves


def test_layers_of_the_reference():
    """Fractions of depth - 1, ties to the lower layer."""
    assert layers_of((0.2, 0.3, 0.4, 0.5), range(6), 6) == [1, 2]
    assert layers_of((0.2, 0.3, 0.4, 0.5), [1, 3, 5], 6) == [1, 3]
    assert layers_of((0.2, 0.3, 0.4, 0.5), [7, 15, 23, 31], 32) == [7, 15]
    assert layers_of((0, -1), range(6), 6) == [0, 5]


def test_blocks_of_the_reference():
    assert blocks_of(3, 5, 2) == [[0, 1, 5, 6], [2, 3, 7, 8], [4, 9], [10, 11], [12, 13], [14]]
    assert blocks_of(2, 2, 12) == [[0, 1, 2, 3]]
    assert [kept_of(Rule(keep_ratio=ratio), 100) for ratio in (0.29, 0.001, 1.0)] == [29, 1, 100]
    assert [kept_of(Rule(keep_tokens=count), 7) for count in (1, 7, 9)] == [1, 7, 7]


@pytest.mark.parametrize(("family", "case"), diagonal(tuple(CASES)))
def test_the_reference_is_the_stock_model(family, case):
    """Where everything is kept."""
    inputs = stock_batch(family, case)
    with torch.no_grad():
        assert_logits(
            family,
            model_of(family)(**inputs).logits,
            reference_of(family).logits(inputs, Rule(keep_ratio=1.0)),
        )


# --------------------------------------------------------------------------------------- everything is kept


@pytest.mark.parametrize(
    ("family", "case", "which", "side"), diagonal(tuple(CASES), PROCESSORS, ("left", "right"))
)
def test_everything_kept_is_the_stock_model(family, case, which, side):
    model, inputs = model_of(family), stock_batch(family, case, side)
    with torch.no_grad():
        stock = model(**inputs).logits
        deltas = model.model.rope_deltas.clone()
        answer = model.generate(**inputs, **FEW) if side == "left" else None
        handle, processor = attached(family, which, keep_ratio=1.0)
        with handle:
            ours = batch_of(processor, family, case, padding_side=side)
            assert set(ours) == set(inputs)
            assert all(torch.equal(ours[name], inputs[name]) for name in inputs)
            assert torch.equal(model(**ours).logits, stock)
            assert torch.equal(model.model.rope_deltas, deltas)
            assert all(
                kept == list(range(len(kept))) for kept in kept_tokens(handle.last)
            )  # selected, not passed by
            if side == "left":
                assert torch.equal(model.generate(**ours, **FEW), answer)
        assert torch.equal(model(**inputs).logits, stock)


@pytest.mark.parametrize("family", EACH)
def test_calls_without_images_are_the_stock_model(family):
    model, processor = model_of(family), tiny_processor(family)
    inputs = processor(text=["USER : what is that ? ASSISTANT :"], return_tensors="pt")
    film = with_video(inputs, family)
    with torch.no_grad():
        stock = [model(**given).logits for given in (inputs, film)]
        answers = [model.generate(**given, **FEW) for given in (inputs, film)]
        with hero.attach(model, processor, keep_ratio=0.2):
            for given, logits, answer in zip((inputs, film), stock, answers, strict=True):
                assert torch.equal(model(**given).logits, logits)
                assert torch.equal(model.generate(**given, **FEW), answer)


# ----------------------------------------------------------------------------------------- less is kept


@pytest.mark.parametrize(
    ("family", "case", "which", "rule"), diagonal(tuple(CASES), PROCESSORS, tuple(RULES))
)
def test_selection_and_logits(family, case, which, rule):
    check_forward(family, case, which, rule, "left")


@pytest.mark.parametrize(("family", "rule"), diagonal(tuple(RULES)))
def test_selection_of_an_image(family, rule):
    check_forward(family, "small and large", "patched", rule, "left")


@pytest.mark.parametrize(("family", "case", "which"), diagonal(tuple(CASES), PROCESSORS))
def test_padding_on_the_right(family, case, which):
    check_forward(family, case, which, "0.5", "right")


def check_forward(family, case, which, rule, side):
    model, (rows, images) = model_of(family), expected(family, case, rule, side)
    reference = reference_of(family)
    handle, processor = attached(family, which, **RULES[rule])
    with handle, torch.no_grad(), watched(model) as seen:
        inputs = batch_of(processor, family, case, padding_side=side)
        assert torch.equal(inputs["image_grid_thw"], stock_batch(family, case)["image_grid_thw"])
        if which == "patched":
            for b, row in enumerate(rows):
                assert inputs["input_ids"][b, inputs["attention_mask"][b].bool()].tolist() == row.ids
        logits = model(**inputs).logits
        assert_selection(handle.last, images)
        assert handle.last.policy == RULES[rule].get("policy", "hero")
        assert model.model.rope_deltas[:, 0].tolist() == [row.delta for row in rows]
        assert_logits(family, logits, [reference._forward(row) for row in rows], side)
    assert_positions(seen, rows, side)


@pytest.mark.parametrize("seeds", [range(2), pytest.param(range(2, 40), marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("family", EACH)
def test_random_batches(family, seeds):
    """Rows of 0 to 3 images of any size, padded on either side, by either prompt."""
    model, reference = model_of(family), reference_of(family)
    for seed in seeds:
        dice, rows = random.Random(f"{family} {seed}"), []
        for _ in range(dice.randint(1, 4)):
            grids = [(dice.randint(1, 11), dice.randint(1, 11)) for _ in range(dice.randint(0, 3))]
            words = [IMAGE] * len(grids) + dice.choices(
                ("what", "is", "that", "w7", "w30"), k=dice.randint(1, 9)
            )
            rows.append((" ".join([*dice.sample(words, len(words)), "w9"]), grids))
        if not any(grids for _, grids in rows):
            continue
        options = {"keep_ratio": dice.uniform(0.03, 1.0), "block": dice.randint(1, 7)}
        options["tile_layers"] = tuple(dice.sample((1, 3, -1), dice.randint(1, 3)))
        options["policy"] = dice.choice(("hero", "hero", "uniform"))
        side, which = dice.choice(("left", "right")), dice.choice(PROCESSORS)
        full = batch_of_rows(tiny_processor(family), family, rows, padding_side=side)
        with torch.no_grad():
            wanted, images = reference.rows(full, rule_of(options))
            handle, processor = attached(family, which, **options)
            with handle, watched(model) as seen:
                logits = model(**batch_of_rows(processor, family, rows, padding_side=side)).logits
                assert kept_tokens(handle.last) == [image.kept for image in images], (seed, rows, options)
                assert model.model.rope_deltas[:, 0].tolist() == [row.delta for row in wanted]
            assert_logits(family, logits, [reference._forward(row) for row in wanted], side)
            assert_positions(seen, wanted, side)


@pytest.mark.parametrize("family", EACH)
def test_both_prompts_with_one_handle(family):
    """The short prompt and the full one are the same call."""
    model, full = model_of(family), stock_batch(family, "a row without an image")
    handle, processor = attached(family, "patched", keep_ratio=0.4, block=3)
    with handle, torch.no_grad():
        short = batch_of(processor, family, "a row without an image")
        assert short["input_ids"].shape[1] < full["input_ids"].shape[1]
        one, answer = model(**short).logits, model.generate(**short, **FEW)
        kept = kept_tokens(handle.last)
        two, again = model(**full).logits, model.generate(**full, **FEW)
        assert kept_tokens(handle.last) == kept
        assert_logits(
            family, two, [row[mask.bool()] for row, mask in zip(one, short["attention_mask"], strict=True)]
        )
    assert torch.equal(answer[:, short["input_ids"].shape[1] :], again[:, full["input_ids"].shape[1] :])
    assert torch.equal(again[:, : full["input_ids"].shape[1]], full["input_ids"])


@pytest.mark.parametrize("family", EACH)
def test_features_that_the_model_returns(family):
    """Of get_image_features: those of the kept tokens, for every DeepStack level."""
    model, inputs = model_of(family), stock_batch(family, "two images in a prompt")
    _, images = expected(family, "two images in a prompt", "0.2")
    with hero.attach(model, **RULES["0.2"]), torch.no_grad():
        found = model.model.get_image_features(
            inputs["pixel_values"], inputs["image_grid_thw"], return_dict=True
        )
    levels, lengths = [], [len(image.kept) for image in images]
    for level in getattr(found, "deepstack_features", None) or ():  # before transformers 5.18 one tensor
        levels.append(level.split(lengths) if isinstance(level, torch.Tensor) else level)
    for number, image in enumerate(images):
        assert len(levels) == len(image.deep)
        own = (found.pooler_output[number], *(level[number] for level in levels))
        for one, stock in zip(own, (image.features, *image.deep), strict=True):
            torch.testing.assert_close(one, stock[image.kept], rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------------ generation


@pytest.mark.parametrize(
    ("family", "case", "which", "rule"),
    diagonal(tuple(CASES), PROCESSORS, ("0.2", "0.5", "0.07", "9 tokens")),
)
def test_greedy_and_positions(family, case, which, rule):
    model, (rows, images) = model_of(family), expected(family, case, rule)
    wanted = reference_of(family).greedy(stock_batch(family, case), rule_of(RULES[rule]), 5, images)
    handle, processor = attached(family, which, **RULES[rule])
    with handle, watched(model) as seen:
        inputs = batch_of(processor, family, case)
        output = model.generate(**inputs, **FEW)
        assert_selection(handle.last, images)
        assert model.model.rope_deltas[:, 0].tolist() == [row.delta for row in rows]
    length = inputs["input_ids"].shape[1]
    assert torch.equal(output[:, :length], inputs["input_ids"])
    assert output[:, length:].tolist() == wanted
    assert len(seen) == 5
    assert all(positions.shape[0] == 4 for positions in seen)
    assert_positions(seen, rows)


@pytest.mark.parametrize(
    ("family", "which", "how"),
    diagonal(PROCESSORS, ("beams", "several", "sampling", "static", "dictionary"), every=("beams",)),
)
def test_ways_of_generating(family, which, how):
    model, case, rule = model_of(family), "two rows", rule_of(RULES["0.5"])
    if how in ("beams", "several"):
        case = "different numbers of images" if how == "beams" else case
    inputs, reference = stock_batch(family, case), reference_of(family)
    options = {
        "beams": {"num_beams": 3},
        "several": {"num_beams": 3, "num_return_sequences": 2},
        "sampling": {"do_sample": True, "temperature": 1.5, "top_k": 0},
        "static": {"cache_implementation": "static"},
        "dictionary": {"return_dict_in_generate": True, "output_scores": True},
    }[how]
    if how in ("beams", "several"):
        wanted = reference.beams(inputs, rule, 5, 3, options.get("num_return_sequences", 1))
    elif how == "sampling":
        wanted = reference.samples(inputs, rule, 5, 1.5, 7)
    else:
        wanted = reference.greedy(inputs, rule, 5)
    handle, processor = attached(family, which, **RULES["0.5"])
    with handle:
        given = batch_of(processor, family, case)
        torch.manual_seed(7)
        output = model.generate(**given, **{**FEW, **options})
    output = output if isinstance(output, torch.Tensor) else output.sequences
    length, times = given["input_ids"].shape[1], options.get("num_return_sequences", 1)
    assert torch.equal(output[:, :length], given["input_ids"].repeat_interleave(times, 0))
    assert output[:, length:].tolist() == wanted


@pytest.mark.parametrize(("family", "which"), diagonal(PROCESSORS))
def test_decoding_by_hand(family, which):
    """Token by token with forward: the model's deltas place them behind the full prompt."""
    model, case = model_of(family), "one image"
    rows, images = expected(family, case, "0.2")
    wanted = reference_of(family).greedy(stock_batch(family, case), rule_of(RULES["0.2"]), 4, images)
    handle, processor = attached(family, which, **RULES["0.2"])
    with handle, torch.no_grad(), watched(model) as seen:
        output, answer = model(**batch_of(processor, family, case), use_cache=True), []
        for _ in range(4):
            answer.append(int(output.logits[0, -1].argmax()))
            given = {CACHE: output[CACHE], "use_cache": True}
            output = model(input_ids=torch.tensor([answer[-1:]]), **given)
    assert answer == wanted[0]
    assert_positions(seen, rows)


# ------------------------------------------------------------------------------------------- videos


@pytest.mark.parametrize(("family", "which", "rule"), diagonal(PROCESSORS, ("0.2", "0.5")))
def test_a_video_beside_images(family, which, rule):
    """The video is kept whole, in front of images that are not."""
    model, case, reference = model_of(family), "two images in a prompt", reference_of(family)
    full = with_video(stock_batch(family, case), family)
    with torch.no_grad():
        rows, images = reference.rows(full, rule_of(RULES[rule]))
        logits = [reference._forward(row) for row in rows]
    wanted = reference.greedy(full, rule_of(RULES[rule]), 5, images)
    handle, processor = attached(family, which, **RULES[rule])
    with handle, torch.no_grad(), watched(model) as seen:
        inputs = with_video(batch_of(processor, family, case), family)
        assert_logits(family, model(**inputs).logits, logits)
        assert_selection(handle.last, images)
        deltas = model.model.rope_deltas[:, 0].tolist()
        output = model.generate(**inputs, **FEW)
    assert deltas == [row.delta for row in rows]
    assert output[:, inputs["input_ids"].shape[1] :].tolist() == wanted
    assert_positions(seen[:1], rows)
    assert_positions(seen[1:], rows)


# ------------------------------------------------------------------------------------------ training


@pytest.mark.parametrize(("family", "which", "side"), diagonal(PROCESSORS, ("left", "right")))
def test_loss_and_gradients(family, which, side):
    model, reference = tiny_model(family), QwenReference(model_of(family))
    reference.model.requires_grad_(True)
    case, rule = "different numbers of images", "0.5"

    def labelled(inputs):
        labels = inputs["input_ids"].clone()
        labels[inputs["attention_mask"] == 0] = IGNORE
        labels[labels == model.config.image_token_id] = IGNORE
        for own, mask in zip(labels, inputs["attention_mask"], strict=True):
            own[int(mask.argmax())] = IGNORE  # which padding on the left would predict
        return {**inputs, "labels": labels}

    wanted = reference.loss(labelled(stock_batch(family, case, side)), rule_of(RULES[rule]))
    wanted.backward()
    handle, processor = attached(family, which, model, **RULES[rule])
    with handle:
        loss = model(**labelled(batch_of(processor, family, case, padding_side=side))).loss
        loss.backward()
    assert float(loss) == pytest.approx(float(wanted), rel=1e-5)
    others = dict(reference.model.named_parameters())
    compared = 0
    for name, parameter in model.named_parameters():
        if "patch_embed" in name or "merger" in name or "qkv" in name or "embed_tokens" in name:
            other = others[name].grad
            assert (parameter.grad is None) == (other is None), name
            if other is not None:
                far = float((parameter.grad - other).abs().max())
                assert far <= 2e-3 * float(other.abs().max()) + 1e-7, name
                compared += 1
    assert compared > 10
