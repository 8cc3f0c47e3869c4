"""Properties of ``segmented_diverse_topk``; ``test_kernels.py`` compares it with an oracle on all cases."""

import numpy as np
import pytest
import torch
from cases import DIVERSE, RULES, Diverse, slow_in_interpreter
from oracles import generator
from test_kernels import HUGE, INT32, orders_of, vast  # noqa: F401

import hero_kernels as hk
from hero_kernels import Segment, Segments, TileBudgets, _dispatch, _diverse, _launch
from hero_kernels.testing import same_bits

NAN, INF = float("nan"), float("inf")
FAST = {case.name: case for case in DIVERSE if not case.slow}
SMALL = Diverse("small", 3, 20, 12, (5, 0, 4), mask=0.8)


def choose(way, case, rule, crops=None, **change):
    """The ranks of some crops of a case, each one a segment unless ``cu_crops`` are given."""
    given = case.given(rule, "cpu") | change
    if crops is not None:
        given = {name: x[crops] if name in ("quality", "valid") else x for name, x in given.items()}
    features = case.draw_features() if crops is None else case.draw_features()[crops]
    given = {name: x.to(way.device) if isinstance(x, torch.Tensor) else x for name, x in given.items()}
    return way.run("segmented_diverse_topk", case.seen(features, way.device), **given)


# --- the papers' formulas --------------------------------------------------------------------------------


def values_of(rule, cosines, chosen, quality):
    """The value of each candidate by the formula of its paper, in float64, and its error by rounding."""
    n = len(cosines)
    if rule == "max_min":
        distance = 1 - cosines
        if not chosen:
            return (distance + 9 * np.eye(n)).min(1), 5e-4
        return distance[chosen].min(0), 5e-4
    if rule == "coverage":
        covered = cosines[chosen].max(0, initial=0.0)
        return quality * np.maximum(cosines - covered, 0).sum(1), 5e-4 * n
    kernel = quality[:, None] * cosines * quality  # the determinant by which a candidate multiplies that of c
    if not chosen:
        return kernel.diagonal().copy(), 1e-3
    inverse = np.linalg.inv(kernel[np.ix_(chosen, chosen)])
    return kernel.diagonal() - np.einsum("ci,cd,di->i", kernel[chosen], inverse, kernel[chosen]), 3e-3


@pytest.mark.parametrize("rule", RULES)
def test_each_choice_is_the_best_by_the_papers_formula(rule, way):
    """On cosines that nothing rounded, up to the rounding of ours."""
    draw = generator("papers")
    features = torch.randn(1, 90, 200, generator=draw) + torch.randn(200, generator=draw)
    quality = None if rule == "max_min" else 0.5 + torch.rand(1, 90, generator=draw)
    given = {"budgets": torch.tensor([25]), "quality": quality}
    given = {name: None if x is None else x.to(way.device) for name, x in given.items()}
    (order,) = orders_of(way.run("segmented_diverse_topk", features.to(way.device), rule=rule, **given).cpu())
    x = features[0].double().numpy()
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    weight = np.ones(90) if quality is None else quality[0].double().numpy()
    gaps = []
    for step, chosen in enumerate(order):
        values, error = values_of(rule, x @ x.T, order[:step], weight)
        values[order[:step]] = -INF
        assert values[chosen] >= values.max() - error
        gaps.append(values.max() - np.sort(values)[-20])
    assert len(order) == 25 and np.mean(gaps) > 4 * error  # the tolerance decides little


@pytest.mark.parametrize("width", [1, 24, 1024, 8192])
def test_rounded_vectors_keep_their_cosines(width):
    """Lengths stay below 4096, so that products do below 2²⁴; also of vectors with one large element."""
    draw = generator("rounded", width)
    features = (
        torch.randn(60, width, generator=draw) * torch.rand(60, 1, generator=draw).mul(60).sub(30).exp()
    )
    features[::3, 0] *= 300
    x = _diverse.rounded(features).double()
    assert torch.equal(x, x.round()) and x.norm(dim=1).max() < 4096
    exact = features.double() / features.double().norm(dim=1, keepdim=True)
    error = x @ x.mT / _diverse.LENGTH**2 - exact @ exact.mT
    assert error.std() < 1.5e-4 and error.abs().max() < 1e-3


# --- ties, and nothing left to choose --------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
def test_equal_candidates_go_by_index(rule, way):
    features = torch.ones(2, 12, 5, device=way.device)
    budgets = torch.tensor([HUGE, 7], device=way.device)
    ranks = way.run("segmented_diverse_topk", features, budgets, rule=rule)
    assert ranks.tolist() == [list(range(12)), [*range(7), *[32767] * 5]]


def test_of_candidates_without_variance_the_best_come_first(way):
    """Six directions, forty candidates: quality decides once the six are chosen."""
    case = FAST["low rank"]
    quality = torch.rand(1, 40, generator=generator("variance"))
    (order,) = orders_of(choose(way, case, "dpp", budgets=torch.tensor([40]), quality=quality).cpu())
    rest = order[5:]
    assert rest == sorted(rest, key=lambda i: -float(quality[0, i]))


def test_vectors_that_are_not_finite_count_as_zero(way):
    case = SMALL
    features, given = case.draw_features(), case.given("dpp", way.device)
    bad, zero = features.clone(), features.clone()
    for patch, value in ((3, NAN), (5, INF), (8, -INF)):
        bad[:, patch, 2], zero[:, patch] = value, 0.0
    given["quality"][0, :5] = 0.0
    got, want = (way.run("segmented_diverse_topk", x.to(way.device), **given) for x in (bad, zero))
    assert torch.equal(got, want)
    given["quality"][0, :5] = NAN
    assert torch.equal(way.run("segmented_diverse_topk", zero.to(way.device), **given), want)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("shape", [(0, 9, 4), (3, 0, 4)])
def test_choice_of_nothing(shape, rule, way):
    features = torch.ones(shape, device=way.device)
    budgets = torch.ones(shape[0], dtype=torch.int32, device=way.device)
    assert hk.segmented_diverse_topk(features, budgets, rule=rule).shape == shape[:2]
    bounds = torch.tensor([0, shape[0]], dtype=torch.int32, device=way.device)
    given = {"cu_crops": bounds, "max_crops": shape[0]}
    assert hk.segmented_diverse_topk(features, bounds[:1], rule=rule, **given).shape == shape[:2]


# --- the same everywhere ---------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
def test_a_segment_does_not_depend_on_its_batch(rule, way):
    """Alone, in another order, in wider segments; a crop as a segment of one."""
    case = SMALL
    whole = choose(way, case, rule)
    budgets = case.given(rule, "cpu")["budgets"]
    for order in ([2, 0, 1], [0]):
        assert torch.equal(choose(way, case, rule, order, budgets=budgets[order]), whole[order])
    bounds = {"cu_crops": torch.arange(4, dtype=torch.int32), "max_crops": 4}
    assert torch.equal(choose(way, case, rule, **bounds), whole)


@slow_in_interpreter
@pytest.mark.parametrize("rule", RULES)
def test_budgets_cut_one_order(rule, way):
    """A choice is the beginning of a longer one."""
    case = SMALL
    long = choose(way, case, rule, budgets=torch.full((3,), 8))
    short = choose(way, case, rule, budgets=torch.full((3,), 4))
    assert torch.equal(short, long.masked_fill(long >= 4, 32767))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("options", [{"BLOCK": 16, "PANELS": 2, "UNROLL": 1, "ROWS": 1}], ids=["small"])
def test_blocks_decide_nothing(options, rule, kernel, monkeypatch):
    whole = choose(kernel, SMALL, rule)
    configuration = _launch.configuration

    def varied(name, size, device):
        row = configuration(name, size, device)
        return row | {option: value for option, value in options.items() if option in row}

    monkeypatch.setattr(_launch, "configuration", varied)
    assert torch.equal(choose(kernel, SMALL, rule), whole)


# --- memory and launches ---------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
def test_launches(rule, kernel, monkeypatch):
    """As many for any number of crops and any budgets; the features are not copied."""
    launched, seen = [], []

    def launch(function, grid, **arguments):
        launched.append(function.fn.__name__)
        seen.append(arguments.get("features"))

    monkeypatch.setattr(_launch, "launch", launch)
    counts = []
    for crops, budget in ((1, 0), (5, 9), (40, 16)):
        hidden = torch.zeros(crops, 17, 24, device=kernel.device)
        budgets = torch.full((crops,), budget, device=kernel.device)
        hk.segmented_diverse_topk(hidden[:, 1:], budgets, rule=rule)
        assert seen[0].data_ptr() == hidden[:, 1:].data_ptr()
        counts.append(launched[:])
        launched.clear(), seen.clear()
    assert counts[0] == counts[1] == counts[2]
    assert len(counts[0]) == 3 if rule != "dpp" else len(counts[0]) > 3


@pytest.mark.parametrize("rule", RULES)
def test_wrong_bounds_stay_within_memory(rule, kernel):
    """They are clamped: no access outside, and right segments are right."""
    case = SMALL
    run = _dispatch.launcher("segmented_diverse_topk")
    features = case.seen(case.draw_features(), kernel.device)
    given = {"rule": rule, "quality": None, "valid": None, "max_crops": 2}

    def ranks(bounds):
        bounds = torch.tensor(bounds, dtype=torch.int32, device=kernel.device)
        budgets = torch.full((len(bounds) - 1,), 5, device=kernel.device)
        return run(features, budgets, cu_crops=bounds, **given)

    wanted = ranks([0, 2, 3])
    assert same_bits(ranks([-9, 2, 99]), wanted)
    assert same_bits(ranks([0, 2, 3, INT32.max, INT32.min]), wanted)
    assert same_bits(ranks([0, 3])[:2], wanted[:2])  # longer than it was said to be


@pytest.mark.slow
@pytest.mark.parametrize("dimension", [0, 1, 2])
def test_features_far_apart(dimension, kernel, vast):  # noqa: F811
    case = FAST["ties"]
    features, given = case.draw_features(), case.given("max_min", kernel.device)
    far = vast(features, dimension, "features")
    want = hk.segmented_diverse_topk(features.to(kernel.device), **given)
    assert torch.equal(hk.segmented_diverse_topk(far, **given), want)


def test_ranks_select(way):
    """The gather takes them as they are."""
    segments = Segments((Segment(3, 0, 2, 4, 9, (0, 4)),), 4)
    draw = generator("gather")
    features = torch.randn(3, 16, 6, generator=draw).to(way.device)
    budgets = torch.tensor([4, 6, 3], dtype=torch.int32, device=way.device)
    ranks = way.run("segmented_diverse_topk", features, budgets, rule="coverage")
    given = {"budgets": TileBudgets(budgets, budgets.float(), budgets)}
    zeros = torch.zeros(3, 16, device=way.device)
    got = way.run("segmented_topk_gather", features, zeros, segments, ranks=ranks, **given)
    want = way.run("segmented_topk_gather", features, -ranks.float(), segments, **given)
    assert same_bits(got.tokens, want.tokens) and torch.equal(got.index, want.index)
    kept = sorted(16 * crop + patch for crop, order in enumerate(orders_of(ranks.cpu())) for patch in order)
    assert sorted(got.index[got.index >= 0].tolist()) == kept
