"""HeroConfig: defaults, round trips, layers, weights, and a table of everything it must refuse."""

import dataclasses
import json
import re
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pytest

from hero import HeroConfig, SignalWeights
from hero.config import ALLOCATIONS, DEFAULT_KEEP_RATIO
from hero.policies import POLICIES, Hero, Policy
from hero.policies.base import resolve_layers

ROOT = Path(__file__).resolve().parents[1]
NAN, INF = float("nan"), float("inf")

GIVEN = {
    "defaults": {},
    "ratio": {"keep_ratio": 0.37},
    "everything": {"keep_ratio": 1},
    "count": {"keep_tokens": 640},
    "layers": {"tile_layers": [0, 5, -2], "thumbnail_layers": (0.5, -1)},
    "mapping": {"weights": {"saliency": 3, "entropy": 1}},
    "named": {"weights": SignalWeights(density=1, relevance=2)},
    "alpha": {"alpha": 0},
    "temperatures": {"temperature_cls": 1, "temperature_clip": 1e-3},
    "released": {"allocation": "floor", "second_softmax": True},
    "object": {"policy": Hero(alpha=0.7, tile_layers=(1,))},
    "class": {"policy": "hero.policies.hero_plus:HeroPlus", "temperature_clip": 0.2},
    **{name: {"policy": name} for name in POLICIES},
}


@pytest.fixture(params=GIVEN, ids=list(GIVEN))
def given(request):
    return GIVEN[request.param]


# --- values ----------------------------------------------------------------------------------------------


def test_defaults():
    config = HeroConfig()
    assert (config.keep_ratio, config.keep_tokens) == (DEFAULT_KEEP_RATIO, None) == (0.2, None)
    policy = config.policy
    assert (policy.name, config.allocation, policy.second_softmax) == ("hero", "exact", False)
    assert (policy.weights, policy.alpha) == (None, None)
    # The paper: tiles by low to middle layers, the thumbnail by deep ones, whatever the depth.
    for depth in (6, 12, 24):
        tile = resolve_layers("tile_layers", policy.tile_layers, depth)
        thumbnail = resolve_layers("thumbnail_layers", policy.thumbnail_layers, depth)
        assert max(tile) <= depth // 2 < depth * 3 // 4 <= min(thumbnail) <= max(thumbnail) < depth


def test_count_replaces_ratio():
    config = HeroConfig(keep_tokens=640)
    assert (config.keep_tokens, config.keep_ratio) == (640, None)


def test_frozen(given):
    config = HeroConfig(**given)
    for one in (config, config.policy):
        for field in dataclasses.fields(one):
            with pytest.raises(dataclasses.FrozenInstanceError):
                setattr(one, field.name, getattr(one, field.name))


def test_equal_configs_have_equal_hashes(given):
    config = HeroConfig(**given)
    assert config == HeroConfig(**given)
    assert hash(config) == hash(HeroConfig(**given))
    other = dataclasses.replace(config, policy=Hero(temperature_cls=0.123))
    assert len({config, HeroConfig(**given), other}) == 2


def test_values_are_plain(given):
    """One representation of a value, so that equal configurations compare and print alike."""
    config = HeroConfig(**given)
    assert isinstance(config.policy, Policy)
    values = {**vars(config), **vars(config.policy)}
    for name in ("keep_ratio", "alpha", "temperature_cls", "temperature_clip"):
        assert type(values.get(name)) in (float, type(None))
    assert type(config.keep_tokens) in (int, type(None))
    for layers in (values.get("tile_layers", ()), values.get("thumbnail_layers", ())):
        assert type(layers) is tuple and {type(layer) for layer in layers} <= {int, float}
    assert type(values.get("weights")) in (SignalWeights, type(None))


def test_other_number_types():
    numpy = pytest.importorskip("numpy")
    config = HeroConfig(
        keep_ratio=Fraction(1, 4), tile_layers=[numpy.int64(3), numpy.float32(0.5)], alpha=numpy.float64(0.5)
    )
    assert config == HeroConfig(keep_ratio=0.25, tile_layers=(3, 0.5), alpha=0.5)
    assert json.loads(json.dumps(config.to_dict()))["tile_layers"] == [3, 0.5]


def test_json_round_trip(given):
    config = HeroConfig(**given)
    values = config.to_dict()
    fields = [field.name for one in (config, config.policy) for field in dataclasses.fields(one)]
    assert sorted(values) == sorted(fields)
    read = HeroConfig.from_dict(json.loads(json.dumps(values, allow_nan=False)))
    assert read == config
    assert hash(read) == hash(config)
    assert read.to_dict() == values


def test_from_dict_takes_part_of_the_fields():
    assert HeroConfig.from_dict({}) == HeroConfig()
    assert HeroConfig.from_dict({"keep_tokens": 9}) == HeroConfig(keep_tokens=9)


def test_to_dict_shares_nothing_with_the_config():
    config = HeroConfig(weights={"density": 1.0})
    values = config.to_dict()
    values["weights"]["density"] = 7.0
    values["tile_layers"].append(0)
    assert config == HeroConfig(weights={"density": 1.0})


# --- layers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "depth", "expected"),
    [
        ((0,), 1, (0,)),
        ((3, 1, 2), 6, (1, 2, 3)),
        ((-1,), 24, (23,)),
        ((-24, 23), 24, (0, 23)),
        ((2, 2, -22, 2), 24, (2,)),  # each once
        ((0.0, 1.0), 24, (0, 23)),
        ((0.0, 0.5, 1.0), 1, (0,)),
        ((0.2, 0.3, 0.4, 0.5), 24, (5, 7, 9, 12)),  # 4.6, 6.9, 9.2, 11.5
        ((0.85, 0.95), 24, (20, 22)),  # 19.55, 21.85
        ((0.2, 0.3, 0.4, 0.5), 6, (1, 2, 3)),  # 1, 1.5, 2, 2.5: the half goes up
        ((1, 1.0), 24, (1, 23)),  # an index is not a fraction
        ((0, 0.0, -24), 24, (0,)),
    ],
)
def test_resolve_layers(layers, depth, expected):
    assert resolve_layers("tile_layers", layers, depth) == expected


@pytest.mark.parametrize(("layers", "depth"), [((6,), 6), ((-7,), 6), ((0, 99), 6), ((1,), 1)])
def test_layer_outside_the_encoder(layers, depth):
    with pytest.raises(ValueError) as error:
        resolve_layers("thumbnail_layers", layers, depth)
    expected = f"indices in [{-depth}, {depth}) for an encoder of {depth} layers"
    assert str(error.value) == f"thumbnail_layers: expected {expected}, got {max(layers, key=abs)}"


# --- weights ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "with_relevance", "expected"),
    [
        ({}, False, (0.2, 0.8, 0.0, 0.0)),
        ({}, True, (0.2, 0.4, 0.4, 0.0)),
        ({"alpha": 1.0}, False, (0.2, 0.8, 0.0, 0.0)),
        ({"alpha": 1.0}, True, (0.2, 0.8, 0.0, 0.0)),
        ({"alpha": 0.0}, True, (0.2, 0.0, 0.8, 0.0)),
        ({"alpha": 0.25}, True, (0.2, 0.2, 0.6, 0.0)),
        ({"weights": {"entropy": 5}}, False, (0.0, 0.0, 0.0, 1.0)),
        ({"weights": {"density": 1, "saliency": 3}}, True, (0.25, 0.75, 0.0, 0.0)),
        ({"weights": {"relevance": 2, "entropy": 2}}, True, (0.0, 0.0, 0.5, 0.5)),
    ],
)
def test_signal_weights(fields, with_relevance, expected):
    weights = HeroConfig(**fields).policy.signal_weights(with_relevance=with_relevance)
    assert isinstance(weights, SignalWeights)
    assert weights == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize("fields", [{"alpha": 0.99}, {"alpha": 0.0}, {"weights": {"relevance": 1e-9}}])
def test_weight_of_relevance_needs_a_relevance_model(fields):
    with pytest.raises(ValueError, match=r"^relevance: expected .*, got None$"):
        HeroConfig(**fields).policy.signal_weights(with_relevance=False)


# --- refusals --------------------------------------------------------------------------------------------

NUMBERS = {  # what no field that holds a number takes
    "NaN": (NAN, ValueError),
    "inf": (INF, ValueError),
    "-inf": (-INF, ValueError),
    "bool": (True, TypeError),
    "string": ("0.5", TypeError),
    "list": ([0.5], TypeError),
    "complex": (0.5j, TypeError),
}
LAYERS = {
    "empty": ((), ValueError),
    "above 1": ((0.5, 1.01), ValueError),
    "below 0": ((-0.01,), ValueError),
    "NaN": ((NAN,), ValueError),
    "inf": ((INF,), ValueError),
    "string": ("12", TypeError),
    "bytes": (b"12", TypeError),
    "strings": (("1",), TypeError),
    "bool": ((True,), TypeError),
    "None within": ((None,), TypeError),
    "nested": (((1, 2),), TypeError),
    "number": (3, TypeError),
    "None": (None, TypeError),
    "set": ({1, 2}, TypeError),
}
WEIGHTS = {
    "negative": ({"density": 1, "saliency": -0.1}, ValueError),
    "all zero": ({"density": 0, "saliency": 0.0}, ValueError),
    "empty": ({}, ValueError),
    "unknown key": ({"density": 1, "size": 1}, ValueError),
    "NaN": ({"density": NAN}, ValueError),
    "inf": ({"density": INF}, ValueError),
    "bool": ({"density": True}, TypeError),
    "string": ({"density": "1"}, TypeError),
    "None within": ({"density": None}, TypeError),
    "tuple": ((0.2, 0.8, 0.0, 0.0), TypeError),
    "number": (1.0, TypeError),
    "text": ("density", TypeError),
    "negative, named": (SignalWeights(density=-1.0, saliency=2.0), ValueError),
    "all zero, named": (SignalWeights(), ValueError),
}
CHOICES = {
    "unknown": ("best", ValueError),
    "empty": ("", ValueError),
    "capital": ("EXACT", ValueError),
    "None": (None, TypeError),
    "list": (["hero"], TypeError),
    "number": (1, TypeError),
}
FIELDS = {
    "keep_ratio": {
        **NUMBERS,
        "zero": (0.0, ValueError),
        "negative": (-0.2, ValueError),
        "above 1": (1.0000001, ValueError),
        "percent": (20, ValueError),
        "false": (False, TypeError),
    },
    "keep_tokens": {
        "zero": (0, ValueError),
        "negative": (-5, ValueError),
        "float": (64.0, TypeError),
        "NaN": (NAN, TypeError),
        "bool": (True, TypeError),
        "string": ("64", TypeError),
    },
    "alpha": {**NUMBERS, "negative": (-0.01, ValueError), "above 1": (1.01, ValueError)},
    **{
        name: {
            **NUMBERS,
            "zero": (0.0, ValueError),
            "negative": (-0.1, ValueError),
            "None": (None, TypeError),
        }
        for name in ("temperature_cls", "temperature_clip")
    },
    "tile_layers": LAYERS,
    "thumbnail_layers": LAYERS,
    "weights": WEIGHTS,
    "policy": CHOICES,
    "allocation": CHOICES,
    "second_softmax": {
        "number": (1, TypeError),
        "zero": (0, TypeError),
        "string": ("yes", TypeError),
        "None": (None, TypeError),
    },
}
REFUSED = [
    pytest.param({field: value}, kind, (field,), id=f"{field}: {case}")
    for field, cases in FIELDS.items()
    for case, (value, kind) in cases.items()
] + [
    pytest.param(
        {"keep_ratio": 0.2, "keep_tokens": 64},
        ValueError,
        ("keep_ratio", "keep_tokens"),
        id="ratio and count",
    ),
    pytest.param(
        {"weights": {"density": 1.0}, "alpha": 0.5}, ValueError, ("weights", "alpha"), id="weights and alpha"
    ),
]


@pytest.mark.parametrize("build", [HeroConfig, lambda **fields: HeroConfig.from_dict(fields)])
@pytest.mark.parametrize(("fields", "kind", "names"), REFUSED)
def test_refused(fields, kind, names, build):
    with pytest.raises((TypeError, ValueError)) as error:
        build(**fields)
    assert error.type is kind
    name, _, rest = str(error.value).partition(": ")
    assert name.split("[")[0] == ", ".join(names)  # weights['density'] names its entry
    assert rest.startswith("expected ") and ", got " in rest


@pytest.mark.parametrize("field", ["keep_ratio", "temperature_cls"])
def test_integer_beyond_floats(field):
    with pytest.raises(ValueError, match=f"^{field}: expected "):
        HeroConfig(**{field: 10**400})


@pytest.mark.parametrize(
    ("fields", "value"),
    [
        ({"keep_ratio": 1.5}, "1.5"),
        ({"keep_tokens": -5}, "-5"),
        ({"policy": "best"}, "'best'"),
        ({"allocation": "ceil"}, "'ceil'"),
        ({"temperature_cls": NAN}, "nan"),
        ({"tile_layers": (1, 2.5)}, "(1, 2.5)"),
        ({"weights": {"size": 1}}, "{'size': 1}"),
        ({"weights": {"density": "much"}}, "'much'"),
        ({"keep_ratio": 0.2, "keep_tokens": 64}, "0.2 and 64"),
    ],
)
def test_message_ends_with_what_was_given(fields, value):
    with pytest.raises((TypeError, ValueError)) as error:
        HeroConfig(**fields)
    assert str(error.value).endswith(f", got {value}")


def test_message_lists_the_choices():
    for field, choices in (("policy", POLICIES), ("allocation", ALLOCATIONS)):
        with pytest.raises(ValueError) as error:
            HeroConfig(**{field: "best"})
        assert all(repr(choice) in str(error.value) for choice in choices)


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({"keep": 0.2}, "keep"),
        ({"keep_ratio": 0.2, "layers": [1]}, "layers"),
        ([("keep_ratio", 0.2)], "values"),
        ("keep_ratio", "values"),
        (None, "values"),
        ({"keep": 0.2, 3: 4}, "values"),
    ],
)
def test_from_dict_refuses(values, name):
    with pytest.raises(TypeError) as error:
        HeroConfig.from_dict(values)
    assert str(error.value).startswith(f"{name}: expected ") and ", got " in str(error.value)


def test_unknown_field():
    with pytest.raises(TypeError, match="keep_rate"):
        HeroConfig(keep_rate=0.2)


@pytest.mark.parametrize("policy", POLICIES)
def test_parameters_that_a_policy_does_not_have(policy):
    fields = {field.name for field in dataclasses.fields(POLICIES[policy])}
    everything = {"alpha": 0.5, "weights": None, "temperature_cls": 1.0, "temperature_clip": 1.0}
    everything |= {"tile_layers": (0,), "thumbnail_layers": (0,), "second_softmax": True}
    for name, value in everything.items():
        if name in fields:
            assert name in HeroConfig(policy=policy, **{name: value}).to_dict()
            continue
        with pytest.raises(TypeError, match=rf"^{name}: expected .* of policy '{re.escape(policy)}'.*, got "):
            HeroConfig(policy=policy, **{name: value})


def test_parameters_beside_a_policy_object():
    with pytest.raises(TypeError, match=r"^alpha: expected .* of the policy object, got "):
        HeroConfig(policy=Hero(), alpha=0.5)


@pytest.mark.parametrize(
    ("policy", "kind"),
    [
        ("nowhere:Hero", ValueError),
        ("hero.policies:Heron", ValueError),
        ("hero.config:HeroConfig", TypeError),
    ],
)
def test_policies_by_class(policy, kind):
    assert HeroConfig(policy="hero.policies:Hero", alpha=0.3) == HeroConfig(alpha=0.3)
    with pytest.raises(kind, match=r"^policy: expected one of 'hero', .*, got "):
        HeroConfig(policy=policy)


# --- imports ---------------------------------------------------------------------------------------------


def test_counting_imports_nothing_heavy():
    code = (
        "import sys, hero\n"
        "count = hero.count_tokens(hero.HeroConfig(keep_ratio=0.2), (480, 640))\n"
        "heavy = {'torch', 'numpy', 'transformers', 'einops', 'PIL'} & set(sys.modules)\n"
        "print(count, sorted(heavy))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    # 2 × 2 tiles of 576 patches, of which 24 · 0.75 · 2 = 36 rows of 48 are image
    assert done.stdout.strip() == f"{115 + 460 + 36} []"
