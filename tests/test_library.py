"""The operations as operators of torch: schemas, fakes, gradients, ``torch.compile``, CUDA graphs.

With ``TRITON_INTERPRET=1`` the operators run the kernels, otherwise the reference.
"""

import inspect

import pytest
import torch
from cases import SLOW_IN_INTERPRETER, slow_in_interpreter
from oracles import generator
from torch.nn.attention import SDPBackend, sdpa_kernel

import hero_kernels as hk
from hero_kernels import Segment, Segments, TileBudgets, TileSignal, _library, reference
from hero_kernels.testing import assert_accurate, offset, same_bits, tensors_in

OPERATORS = torch.ops.hero_kernels
NAMES = {
    name.partition("::")[2].partition(".")[0]
    for name in torch._C._dispatch_get_all_op_names()
    if name.startswith("hero_kernels::")
}
SEGMENTS = Segments((Segment(3, 0, 2, 2, 5, (0, 3)), Segment(2, 1, 1, 2, 3, (1, 2), True)), 3)
T, P = SEGMENTS.crops, SEGMENTS.patches
BOUNDS = torch.tensor([0, 4, 4, P + 1], dtype=torch.int32)  # of segments of the tokens of one crop
IMAGES = torch.tensor([0, 3, T], dtype=torch.int32)


def inputs(device="cpu", seed=0):
    """What :func:`vision` takes: a layer's q, k, v, features, tile signals, and two buffers."""
    draw = generator("library", seed)
    query, key, value = (torch.randn(T, 2, P + 1, 16, generator=draw).to(device) for _ in range(3))
    valid = torch.rand(T, P, generator=draw) < 0.8
    return {
        "query": query,
        "key": key,
        "value": value,
        "features": torch.randn(T, P, 6, generator=draw).to(device),
        "values": torch.rand(2, T, generator=draw).to(device),
        "valid": valid.to(device),
        "weight": (torch.arange(T) % 3 * 0.5).to(device),
        "rows": torch.zeros(T, 2, P, device=device),
        "cu_seqlens": BOUNDS.to(device),
        "cu_crops": IMAGES.to(device),
    }


def vision(query, key, value, features, values, valid, weight, rows, cu_seqlens, cu_crops):
    """Every operation in one function, in each of its forms; buffers are added to in place."""
    scale = query.shape[-1] ** -0.5
    hk.cls_attention(query, key, scale, out=rows)
    more = hk.cls_attention(query[:, :, :1], key, scale, weight=weight, second_softmax=True)
    output, _ = hk.attention_with_cls(query, key, value, scale, weight=weight, out=rows)
    plain, again = hk.attention_with_cls(query, key, value, scale)
    received = hk.received_attention(query, key, scale, weight=weight)
    hk.received_attention(query, key, scale, out=received)
    hk.received_attention(query, key, scale, out=received, lse=(query @ key.mT * scale).logsumexp(-1))
    bounds = {"cu_seqlens": cu_seqlens, "max_seqlen": P + 1}
    packed = hk.received_attention(query[:1], key[:1], scale, weight=weight[:3], **bounds)
    hk.received_attention(query[:1], key[:1], scale, out=packed, **bounds)
    finalized = hk.finalize_scores(rows, valid=valid, rank=True)
    unranked = hk.finalize_scores(rows)
    counts = valid.sum(1, dtype=torch.int32)
    signals = [
        TileSignal(values[0], 0.3),
        TileSignal(values[1], 0.7, 0.2),
        TileSignal(finalized.entropy, 1.0),
    ]
    budgets = hk.tile_budgets(signals, counts, SEGMENTS)
    keep = hk.segmented_topk(finalized.scores, budgets.budgets, valid)
    at_once = hk.segmented_topk_gather(
        *(features, finalized.scores, SEGMENTS),
        valid=valid,
        signals=signals,
        ranks=finalized.ranks,
        valid_counts=counts,
    )
    in_steps = hk.segmented_topk_gather(features, finalized.scores, SEGMENTS, valid=valid, budgets=budgets)
    segments = {"cu_crops": cu_crops, "max_crops": 3, "valid": valid}
    diverse = [
        hk.segmented_diverse_topk(features, budgets.budgets, rule="max_min", valid=valid),
        hk.segmented_diverse_topk(features, budgets.budgets, rule="dpp", quality=finalized.scores),
        hk.segmented_diverse_topk(features, counts[:2], rule="coverage", **segments),
    ]
    rare = hk.rarity(features, SEGMENTS, valid), hk.rarity(features, SEGMENTS)
    return {
        "rows": [rows, more, again, received, packed, output, plain],
        "scores": [*finalized[:2], *unranked[:2], budgets.shares, *rare],
        "selected": [finalized.ranks, *diverse, keep, budgets.budgets, at_once.index, in_steps.index],
        "tokens": [at_once.tokens, in_steps.tokens, at_once.tokens * 2],
        "lengths": [at_once.lengths, in_steps.lengths],
    }


def check_same(result, expected):
    """Selections exactly, numbers to fp32 rounding (compiled code may fuse what surrounds the operators)."""
    assert result["lengths"] == expected["lengths"]
    for part in ("rows", "scores"):
        for got, want in zip(result[part], expected[part], strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    for part in ("selected", "tokens"):
        for got, want in zip(result[part], expected[part], strict=True):
            assert same_bits(got, want)


# --- operators -------------------------------------------------------------------------------------------

LAYOUT = (list(SEGMENTS.numbers), SEGMENTS.side, SEGMENTS.table(torch.device("cpu")))


def calls():
    """``(operator, arguments)``, each operator in all its forms."""
    given = inputs()
    query, key, value, features, valid = (
        given[name] for name in ("query", "key", "value", "features", "valid")
    )
    one = query[:1], key[:1]
    weights, rows, plain = given["weight"], torch.zeros(T, 2, P), torch.zeros(T, 2, P + 1)
    signals = (list(given["values"]), [0.3, 0.7], [0.0, 0.2])
    counts = valid.sum(1, dtype=torch.int32)
    budgets = torch.arange(T, dtype=torch.int32)
    ranks = torch.arange(P, dtype=torch.int16).expand(T, P).contiguous()
    scores = torch.rand(T, P, generator=generator("scores"))
    no_signals = ([], [], [])
    return [
        ("cls_attention", (query, key, 0.3, 0.5, None, False)),
        ("cls_attention", (offset(query), offset(key), 0.3, 0.0, weights, False)),
        ("cls_attention", (query.bfloat16(), key.bfloat16(), 0.3, 0.0, weights, True)),
        ("cls_attention_", (rows, query, key, 0.3, 0.5, None, False)),
        ("cls_attention_", (rows.mT.clone().mT, offset(query), offset(key), 0.3, 0.0, weights, True)),
        ("attention_with_cls", (query, key, value, 0.3, 0.5, None, False)),
        ("attention_with_cls", (offset(query), offset(key), offset(value), 0.3, 0.0, weights, True)),
        ("received_attention", (query, key, 0.3, 0.0, weights, None, None, None)),
        ("received_attention", (offset(query), offset(key), 0.3, 0.5, None, query[..., 0], None, None)),
        ("received_attention", (*one, 0.3, 0.0, weights[:3], None, BOUNDS, 6)),
        ("received_attention_", (plain, query, key, 0.3, 0.0, weights, query[..., 0], None, None)),
        ("received_attention_", (plain.mT.clone().mT, query, key, 0.3, 0.5, None, None, None, None)),
        (
            "received_attention_",
            (plain[:1], query[:1], key[:1], 0.3, 0.5, None, query[:1, ..., 0], BOUNDS, 9),
        ),
        ("finalize_scores", (query[..., 1:, 0], valid, True)),
        ("finalize_scores", (query[..., 1:, 0].contiguous(), None, False)),
        ("rarity", (features, *LAYOUT, valid)),
        ("rarity", (features.mT.contiguous().mT.half(), *LAYOUT, None)),
        ("tile_budgets", (*signals, counts, *LAYOUT, "exact")),
        ("tile_budgets", (*signals, counts.long(), *LAYOUT, "floor")),
        ("segmented_topk", (scores, budgets, valid)),
        ("segmented_topk", (scores.T.contiguous().T.half(), budgets.long(), None)),
        ("segmented_diverse_topk", (features, budgets, "max_min", None, valid, None, None)),
        ("segmented_diverse_topk", (features.half(), budgets.long(), "dpp", scores, None, None, None)),
        ("segmented_diverse_topk", (features, budgets[3:], "coverage", scores, valid, IMAGES, 4)),
        (
            "segmented_topk_gather",
            (features, scores, *LAYOUT, valid, None, *signals, "exact", None, counts),
        ),
        (
            "segmented_topk_gather",
            (features.half(), scores, *LAYOUT, None, budgets, *no_signals, "exact", ranks, None),
        ),
    ]


CALLS = [pytest.param(*each, id=f"{n}-{each[0]}") for n, each in enumerate(calls())]


def test_every_operator_is_checked():
    assert {name for name, _ in calls()} == NAMES


@slow_in_interpreter
@pytest.mark.parametrize(("name", "arguments"), CALLS)
def test_opcheck(name, arguments):
    """Schema, mutation, fake results, autograd registration, AOT dispatch with dynamic shapes."""
    torch.library.opcheck(getattr(OPERATORS, name).default, arguments)


@slow_in_interpreter
@pytest.mark.parametrize(("name", "number"), [("attention_with_cls", 3), ("segmented_topk_gather", 1)])
def test_opcheck_with_gradients(name, number):
    for operator, arguments in calls():
        if operator == name:
            arguments = [x.clone().requires_grad_() if n < number else x for n, x in enumerate(arguments)]
            torch.library.opcheck(getattr(OPERATORS, name).default, arguments)


@pytest.mark.parametrize(("name", "arguments"), CALLS)
def test_fake_strides(name, arguments):
    """The fake promises the shape, dtype and strides of the real result, views as input included."""
    operator = getattr(OPERATORS, name)
    real = list(tensors_in(operator(*arguments)))
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        faked = [
            [mode.from_tensor(y) for y in x] if isinstance(x, list) and x and torch.is_tensor(x[0]) else x
            for x in (mode.from_tensor(x) if torch.is_tensor(x) else x for x in arguments)
        ]
        fake = list(tensors_in(operator(*faked)))
    for got, want in zip(fake, real, strict=True):
        assert (got.shape, got.dtype, got.stride()) == (want.shape, want.dtype, want.stride())


# --- compiled --------------------------------------------------------------------------------------------


@slow_in_interpreter
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled(backend):
    torch._dynamo.reset()
    compiled = torch.compile(vision, fullgraph=True, backend=backend)
    for seed in (0, 1):
        check_same(compiled(**inputs(seed=seed)), vision(**inputs(seed=seed)))


@pytest.mark.parametrize("operation", ["tile_budgets", "segmented_topk_gather"])
def test_compiled_without_a_length(operation):
    """``floor`` makes lengths depend on content: budgets compile, the gather refuses."""
    given = inputs()
    signals = [TileSignal(given["values"][0], 1.0)]

    def budgets():
        return hk.tile_budgets(signals, given["valid"].sum(1), SEGMENTS, allocation="floor")

    def gather():
        features, scores = given["features"], torch.zeros(T, P)
        return hk.segmented_topk_gather(features, scores, SEGMENTS, signals=signals, allocation="floor")

    torch._dynamo.reset()
    if operation == "tile_budgets":
        got = torch.compile(budgets, fullgraph=True, backend="eager")()
        assert all(same_bits(*pair) for pair in zip(got, budgets()))
    else:
        with pytest.raises(Exception, match="allocation: expected 'exact' under"):
            torch.compile(gather, fullgraph=True, backend="eager")()


def test_compiled_lengths_are_those_promised():
    """Fewer valid patches than promised: the image ends in empty rows, of index −2."""
    given = inputs()
    valid = torch.zeros(T, P, dtype=torch.bool)
    valid[:, 0] = True
    signals = [TileSignal(given["values"][0], 1.0)]
    budgets = hk.tile_budgets(signals, valid.sum(1), SEGMENTS)

    def gather(features, scores, budgets):
        return hk.segmented_topk_gather(features, scores, SEGMENTS, valid=valid, budgets=budgets)

    torch._dynamo.reset()
    compiled = torch.compile(gather, fullgraph=True, backend="eager")
    for served in (budgets, TileBudgets(torch.full((T,), 7), *budgets[1:])):  # too few, too many
        exact = reference.segmented_topk_gather(
            given["features"], torch.zeros(T, P), SEGMENTS, valid=valid, budgets=served
        )
        result = compiled(given["features"], torch.zeros(T, P), served)
        assert result.lengths == SEGMENTS.lengths and len(result.index) == sum(SEGMENTS.lengths)
        images = zip(result.index.split(result.lengths), exact.index.split(exact.lengths))
        for index, want in images:
            kept = min(len(index), len(want))
            assert torch.equal(index[:kept], want[:kept]) and (index[kept:] == -2).all()
        assert (result.tokens[result.index < 0] == 0).all()


# --- gradients -------------------------------------------------------------------------------------------


def gradients(function, *tensors):
    """The result of a function, and the gradients of a fixed weighted sum of it."""
    tensors = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    result = function(*tensors)
    weight = torch.randn(result.shape, generator=generator("gradient"), dtype=torch.float64)
    return result, torch.autograd.grad((result * weight.to(result)).sum(), tensors)


FORMS = ["eager", "operator", pytest.param("compiled", marks=SLOW_IN_INTERPRETER)]


def formed(form, name):
    """An operation called in one of the forms that gradients run through."""
    function = getattr(hk, name)
    if form == "operator":

        def operator(*given, **options):
            bound = inspect.signature(function).bind(*given, **options)
            bound.apply_defaults()
            return _library.call(name, torch.device("cpu"), **bound.arguments)

        return operator
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager") if form == "compiled" else function


@pytest.mark.parametrize("served", ["signals", "budgets"])
@pytest.mark.parametrize("form", FORMS)
def test_gradient_of_the_gather(form, served):
    """Each kept row's gradient goes where the row came from; the others' are zero."""
    given, function = inputs(), formed(form, "segmented_topk_gather")
    signals = [TileSignal(given["values"][0], 1.0)]
    scores = given["query"][:, 0, 1:, 0]
    options = {"valid": given["valid"], "signals": signals, "budgets": None, "ranks": None}
    options.update(allocation="exact", valid_counts=None)
    if served == "budgets":
        budgets = hk.tile_budgets(signals, given["valid"].sum(1), SEGMENTS)
        options.update(signals=None, budgets=budgets)

    def tokens(function):
        return lambda features: function(features, scores, SEGMENTS, **options).tokens

    result, (got,) = gradients(tokens(function), given["features"])
    expected, (want,) = gradients(tokens(reference.segmented_topk_gather), given["features"])
    assert same_bits(result, expected) and same_bits(got, want)
    assert (want == 0).any() and (want != 0).any()


@pytest.mark.parametrize("form", FORMS)
def test_gradient_of_attention(form):
    given, function = inputs(), formed(form, "attention_with_cls")
    tensors = [given[name] for name in ("query", "key", "value")]
    options = {"weight": 1.0, "out": None, "second_softmax": False}

    def output(function):
        return lambda *tensors: function(*tensors, 0.3, **options)[0]

    def attend(query, key, value):
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, scale=0.3)

    exact, exact_gradients = gradients(attend, *[tensor.double() for tensor in tensors])
    peer, peer_gradients = gradients(output(reference.attention_with_cls), *tensors)
    result, got = gradients(output(function), *tensors)
    assert_accurate(result, exact, peer)
    for name, *each in zip(("query", "key", "value"), got, exact_gradients, peer_gradients):
        assert_accurate(*each, name)


@pytest.mark.parametrize("form", ["eager", "operator"])  # PyTorch refuses to compile second gradients
def test_second_gradient_of_attention(form):
    """Of all three, shared or alone: those of plain attention in float64."""
    given, function = inputs(), formed(form, "attention_with_cls")
    options = {"weight": 1.0, "out": None, "second_softmax": False}

    def attend(query, key, value):
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, scale=0.3)

    def second(function, *tensors):
        tensors = [x.detach().clone().requires_grad_() for x in tensors]
        with sdpa_kernel(SDPBackend.MATH):
            result = function(*tensors)
            first = torch.autograd.grad(result.pow(2).sum(), tensors, create_graph=True)
            return torch.autograd.grad(sum(x.pow(2).sum() for x in first), tensors)

    def output(query, key, value):
        return function(query, key, value, 0.3, **options)[0]

    tensors = [given[name] for name in ("query", "key", "value")]
    for some in (1, 3):  # all from one tensor, and each its own
        for got, want in zip(
            second(lambda *x: output(*(x * 3)[:3]), *tensors[:some]),
            second(lambda *x: attend(*(x * 3)[:3]), *[x.double() for x in tensors[:some]]),
            strict=True,
        ):
            assert (got - want).abs().max() < 1e-3 * want.abs().max()  # in fp32


@pytest.mark.parametrize("form", ["eager", "operator"])
def test_second_gradient_of_the_gather(form):
    """Twice that of each kept feature."""
    given, function = inputs(), formed(form, "segmented_topk_gather")
    options = {"valid": None, "budgets": None, "ranks": None, "allocation": "exact", "valid_counts": None}
    options["signals"] = [TileSignal(given["values"][0], 1.0)]
    features = given["features"].requires_grad_()
    result = function(features, torch.zeros(T, P), SEGMENTS, **options)
    (first,) = torch.autograd.grad(result.tokens.pow(2).sum(), features, create_graph=True)
    (got,) = torch.autograd.grad(first.sum(), features)
    kept = torch.zeros(T * P)
    kept[result.index[result.index >= 0].long()] = 2.0
    assert torch.equal(got, kept.view(T, P, 1).expand_as(got))


@slow_in_interpreter
@pytest.mark.parametrize("bad", ["expanded", "gradient"])
def test_compiled_code_refuses_a_buffer(bad):
    given = inputs()
    rows = given["rows"]
    rows = rows[:1, :1, :1].expand_as(rows) if bad == "expanded" else rows.requires_grad_()
    torch._dynamo.reset()
    compiled = torch.compile(hk.cls_attention, fullgraph=True, backend="eager")
    with pytest.raises(Exception, match="out: expected "):
        compiled(given["query"], given["key"], 0.3, out=rows)


@slow_in_interpreter
def test_compiled_for_any_size():
    torch._dynamo.reset()
    compiled = torch.compile(hk.cls_attention, fullgraph=True, backend="eager", dynamic=True)
    for crops, tokens in ((2, 5), (3, 5), (4, 9)):
        query = torch.randn(crops, 2, tokens, 4)
        for out in (torch.zeros(crops, 2, tokens - 1), torch.zeros(crops, tokens - 1, 2).mT):
            assert compiled(query, query, 0.3, out=out) is out
            assert same_bits(out, hk.cls_attention(query, query, 0.3) + 0.0)


@slow_in_interpreter
def test_compiled_for_any_segments():
    """Neither their number nor the longest is a constant of compiled code."""
    torch._dynamo.reset()
    graphs = []

    def backend(module, inputs):
        graphs.append(module)
        return module

    compiled = torch.compile(hk.received_attention, fullgraph=True, backend=backend)
    for lengths in ((5, 3), (2, 7), (4, 4, 4), (9, 0, 2, 6), (11, 2)):
        query = torch.randn(1, 2, sum(lengths), 4, generator=generator("segments", lengths))
        bounds = torch.tensor([0, *lengths]).cumsum(0).int()
        given = {"cu_seqlens": bounds, "max_seqlen": max(lengths)}
        got = compiled(query, query, 0.3, **given)
        assert same_bits(got, hk.received_attention(query, query, 0.3, **given))
    assert len(graphs) <= 3


@slow_in_interpreter
def test_compiled_for_any_segments_of_crops():
    torch._dynamo.reset()
    compiled = torch.compile(hk.segmented_diverse_topk, fullgraph=True, backend="eager", dynamic=True)
    for lengths in ((2, 3), (1, 4, 0), (6,)):
        features = torch.randn(sum(lengths), P, 5, generator=generator("crops", lengths))
        bounds = torch.tensor([0, *lengths]).cumsum(0).int()
        given = {"rule": "coverage", "cu_crops": bounds, "max_crops": max(lengths)}
        budgets = torch.arange(len(lengths)) + 4
        got = compiled(features, budgets, **given)
        assert same_bits(got, hk.segmented_diverse_topk(features, budgets, **given))


def test_no_gradient_runs_through_scores():
    given = {name: x.requires_grad_() if x.is_floating_point() else x for name, x in inputs().items()}
    query, key, value, features = (given[name] for name in ("query", "key", "value", "features"))
    rows = hk.cls_attention(query, key, 0.3)
    scores = hk.attention_with_cls(query, key, value, 0.3)[1].mean(1)
    signals = [TileSignal(given["values"][0], 1.0)]
    gathered = hk.segmented_topk_gather(features, scores, SEGMENTS, signals=signals)
    finalized = hk.finalize_scores(given["rows"], rank=True)
    scored = (rows, scores, hk.received_attention(query, key, 0.3), finalized.scores, finalized.entropy)
    assert [x.requires_grad for x in scored] == [False] * 5
    chosen = hk.segmented_diverse_topk(features, gathered.budgets.budgets, rule="dpp", quality=scores.exp())
    assert not chosen.requires_grad and not hk.rarity(features, SEGMENTS).requires_grad
    assert not any(x.requires_grad for x in (*gathered.budgets, gathered.index))
    assert gathered.tokens.requires_grad


# --- on a GPU --------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_graph_replay_with_other_inputs():
    """Captured once, replayed on new contents of the same memory: nothing was read on the host."""
    memory = inputs("cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        vision(**memory)  # compile kernels, copy tables
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = vision(**memory)
    for seed in (1, 2):
        fresh = inputs("cuda", seed)
        for name, values in fresh.items():
            memory[name].copy_(values)
        graph.replay()
        check_same(captured, vision(**fresh))


@pytest.mark.gpu
@pytest.mark.parametrize("form", ["eager", "compiled"])
def test_no_synchronisation(form):
    torch._dynamo.reset()
    function = torch.compile(vision, fullgraph=True) if form == "compiled" else vision
    for seed in (0, 1):
        function(**inputs("cuda", seed))
    given = inputs("cuda", 2)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        function(**given)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_compiled_on_a_gpu():
    torch._dynamo.reset()
    compiled = torch.compile(vision, fullgraph=True)
    for seed in (0, 1):
        check_same(compiled(**inputs("cuda", seed)), vision(**inputs("cuda", seed)))


@pytest.mark.gpu
def test_floor_synchronises_for_its_lengths_and_no_more():
    """``floor`` reads the budgets back once; the lengths are those of the reference."""
    given, cpu = inputs("cuda"), inputs()
    results = [
        hk.segmented_topk_gather(
            *(x["features"], x["values"][:1].T * torch.arange(P, device=x["values"].device), SEGMENTS),
            valid=x["valid"],
            signals=[TileSignal(x["values"][0], 1.0)],
            allocation="floor",
        )
        for x in (given, cpu)
    ]
    assert results[0].lengths == results[1].lengths
    assert torch.equal(results[0].index.cpu(), results[1].index)
