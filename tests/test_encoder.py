"""The drop-in encoder on its own: stages, interfaces for other families, attention rows."""

import numpy as np
import pytest
import torch
from cases import SLOW_IN_INTERPRETER, slow_in_interpreter
from independent import (
    ONE,
    Independent,
    Rule,
    tiny_clip,
    tiny_image,
    tiny_model,
    tiny_processor,
    tiny_tokenizer,
)
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, SiglipVisionConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import hero
import hero_kernels as hk
from hero import attention_rows, policies, signals
from hero.layout import Geometry, ImageLayout
from hero.plan import make_plan
from hero_kernels.testing import same_bits

LAYERS = {"tile_layers": (1, 2), "thumbnail_layers": (4,)}
SIZES = [(120, 90), (60, 170)]


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def inputs():
    images = [tiny_image(height, width, seed) for seed, (height, width) in enumerate(SIZES)]
    return tiny_processor()(images=images, text=[ONE, ONE], padding=True, return_tensors="pt")


@pytest.fixture
def encoder(model):
    geometry = Geometry(56, 14, tuple(map(tuple, model.config.image_grid_pinpoints)))
    encoder = hero.HeroVisionEncoder(
        model.model.vision_tower,
        model.model.multi_modal_projector,
        hero.HeroConfig(keep_ratio=0.3, **LAYERS),
        geometry=geometry,
        image_newline=model.model.image_newline,
    )
    yield encoder
    encoder.remove()


def test_drop_in_module(model, encoder, inputs):
    with torch.no_grad():
        selection = encoder(inputs["pixel_values"], inputs["image_sizes"])
        results = Independent(model).images(
            inputs["pixel_values"], inputs["image_sizes"], Rule(keep_ratio=0.3, **LAYERS)
        )
    assert selection.index.tolist() == [place for result in results for place in result.index]
    torch.testing.assert_close(selection.tokens, torch.cat([result.tokens for result in results]))
    assert selection.cu_seqlens.tolist() == [0, *np.cumsum(selection.lengths).tolist()]
    assert (selection.index.dtype, selection.budgets.dtype) == (torch.int32, torch.int32)
    assert (selection.shares.dtype, selection.scores.dtype) == (torch.float32, torch.float32)
    kept = selection.keep_mask()
    assert torch.equal(kept.sum(1).int(), selection.budgets)
    assert [len(tokens) for tokens in selection.per_image()] == selection.lengths


def test_stages_are_the_whole(encoder, inputs):
    with torch.no_grad():
        whole = encoder(inputs["pixel_values"], inputs["image_sizes"])
        crops, plan = encoder.prepare(inputs["pixel_values"], inputs["image_sizes"])
        encoded = encoder.encode(crops, plan)
        scored = encoder.score(encoded, plan)
        budgets = encoder.budget(scored, plan)
        gathered = encoder.select(encoded, scored, budgets, plan)
        tokens = encoder.project(gathered.tokens, gathered.index)
        fused = hk.segmented_topk_gather(
            encoded.features,
            scored.scores,
            plan.segments,
            valid=plan.valid,
            signals=scored.signals,
        )
    assert torch.equal(tokens, whole.tokens)
    assert torch.equal(fused.tokens, gathered.tokens)
    assert torch.equal(fused.index, whole.index)


def test_a_stage_can_be_replaced(encoder, inputs):
    """The first patches of every tile, by another score stage: the later stages don't notice."""

    def score(encoded, layouts, text=None):
        falling = -torch.arange(16.0).expand(len(encoded.features), 16)
        return policies.Scored(falling, (hk.TileSignal(torch.ones(len(falling)), 1.0),))

    encoder.score = score
    with torch.no_grad():
        selection = encoder(inputs["pixel_values"][:1], inputs["image_sizes"][:1])
    valid = encoder.prepare(inputs["pixel_values"][:1], inputs["image_sizes"][:1])[1].valid
    for keep, allowed, budget in zip(selection.keep_mask(), valid, selection.budgets, strict=True):
        assert keep.nonzero()[:, 0].tolist() == allowed.nonzero()[:, 0].tolist()[:budget]


def test_without_projector_and_newlines(model, inputs):
    tower = model.model.vision_tower
    encoder = hero.HeroVisionEncoder(tower, config=hero.HeroConfig(keep_ratio=0.3, **LAYERS))
    try:
        assert encoder.geometry.tiling.sizes == ((56, 112), (112, 56), (112, 112), (168, 56), (56, 168))
        crops = encoder.geometry.layout(SIZES[0]).crops
        with torch.no_grad():
            pixels = inputs["pixel_values"][0][:crops]
            selection = encoder(pixels, SIZES[:1])
            hidden = tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
        assert selection.index.min() >= 0
        assert torch.equal(selection.tokens, hidden.flatten(0, 1)[selection.index.long()])
        assert selection.lengths == [encoder.geometry.layout(SIZES[0]).kept_tokens(encoder.config)]
    finally:
        encoder.remove()


def test_module_protocol(model):
    """Parameters are those of tower, projector and newline; a plain tensor as newline moves along."""
    encoder = hero.HeroVisionEncoder(
        model.model.vision_tower, model.model.multi_modal_projector, image_newline=torch.zeros(64)
    )
    encoder.remove()
    names = {name.split(".")[0] for name in encoder.state_dict()}
    assert names == {"vision_tower", "projector"}
    assert encoder.to(torch.float64).image_newline.dtype == torch.float64
    model.float()


@pytest.mark.parametrize("name", ["uniform", pytest.param("random", marks=SLOW_IN_INTERPRETER)])
def test_policies(model, inputs, name):
    own = LAYERS if name == "uniform" else {}
    with hero.attach(model, keep_ratio=0.3, policy=name, **own) as handle, torch.no_grad():
        both = handle.encoder(inputs["pixel_values"], inputs["image_sizes"])
        alone = handle.encoder(inputs["pixel_values"][1:], inputs["image_sizes"][1:])
    first, second = both.layout
    offset = first.crops * first.patches
    theirs = both.index[both.lengths[0] :]
    assert torch.equal(torch.where(theirs < 0, theirs, theirs - offset), alone.index)
    for layout, shares in zip(both.layout, both.shares.split([first.crops, second.crops]), strict=True):
        torch.testing.assert_close(shares[1:], torch.full((layout.tiles,), 1 / layout.tiles))


def test_images_without_thumbnail_use_entropy():
    layout = ImageLayout((112, 56), (2, 1), 4, (0, 8), (0, 4), thumbnail="none", newlines=False)
    patches = hk.finalize_scores(torch.rand(2, 1, 16), rank=True)
    policy = policies.Hero()
    plan = make_plan((layout,), hero.HeroConfig(0.5), policy.rows(6, 4), torch.device("cpu"))
    observed = policies.Observed(
        features=torch.randn(2, 16, 8),
        attention={"patches": patches},
        valid=torch.ones(2, 16, dtype=torch.bool),
        cls=torch.randn(2, 8),
        layouts=(layout,),
        places=plan.places,
        segments=plan.segments,
        pools=plan.pools,
        constants=plan.constants,
    )
    density, concentration = policy.score(observed).signals
    assert (density.weight, concentration.weight) == (pytest.approx(0.2), pytest.approx(0.8))
    torch.testing.assert_close(concentration.values, signals.concentration(patches.entropy, observed.valid))


def test_plan_of_other_families():
    """Thumbnail last, tiles one after another, no newlines: what the next families need."""
    geometry = Geometry(56, 14, ((56, 112), (112, 112)), thumbnail="last", stitched=False, newlines=False)
    config = hero.HeroConfig(keep_ratio=0.5, **LAYERS)
    layout = geometry.layout((100, 100))
    plan = make_plan((layout,), config, config.policy.rows(6, 4), torch.device("cpu"))
    segment = plan.segments.images[0]
    assert (segment.crops, segment.thumbnail, segment.grid_width, segment.newlines) == (5, 4, 1, 0)
    assert plan.weights["patches"][1].tolist() == [0.5, 0.5, 0.5, 0.5, 0.0]
    assert plan.weights["patches"][4].tolist() == [0.0, 0.0, 0.0, 0.0, 1.0]
    gathered = hk.segmented_topk_gather(
        torch.zeros(5, 16, 1),
        torch.rand(5, 16),
        plan.segments,
        valid=plan.valid,
        signals=[hk.TileSignal(torch.ones(5), 1.0)],
    )
    crops = (gathered.index // 16).tolist()
    assert crops == sorted(crops) and crops.count(4) == 8
    thumbnail_only = Geometry(56, 14, ()).layout((100, 30))
    assert (thumbnail_only.crops, thumbnail_only.tiles) == (1, 0)
    assert thumbnail_only.full_tokens == 17
    assert thumbnail_only.kept_tokens(config) == 9
    plan = make_plan((thumbnail_only,), config, config.policy.rows(6, 4), torch.device("cpu"))
    assert plan.segments.images[0].thumbnail_newline


class _Attention(nn.Module):
    """A bare attention module that dispatches like those of transformers."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.is_causal = False

    def forward(self, query, key, value):
        name = self.config._attn_implementation
        return AttentionInterface().get_interface(name, None)(self, query, key, value, None, scaling=0.3)[0]


class _Config:
    _attn_implementation_internal = "sdpa"

    @property
    def _attn_implementation(self):
        return self._attn_implementation_internal


def test_rows_of_encoders_without_cls():
    module = _Attention(_Config())
    query, key, value = torch.randn(3, 2, 4, 9, 8).unbind(0)
    attention_rows.install({0: module}, received=True)
    plain = attention_rows.Collector({0: 1.0}, received=True)
    with attention_rows.collect(plain, {0: module}):
        output = module(query, key, value)
    attention_rows.remove({0: module})
    assert "_hero_attention_rows" not in module.__dict__
    torch.testing.assert_close(plain.result(), hk.received_attention(query, key, 0.3))
    wanted = nn.functional.scaled_dot_product_attention(query, key, value, scale=0.3).transpose(1, 2)
    torch.testing.assert_close(output, wanted)


FLASH_ON_CPU = {"cpu": "_scaled_dot_product_flash_attention_for_cpu"}


def attended(monkeypatch, query, key, value, *, base="sdpa", mask=None, **kwargs):
    """Attention of a module without CLS, and whether its rows were computed with its log-sum-exp."""
    module = _Attention(SiglipVisionConfig(attn_implementation=base))
    given = {"scaling": 0.3, "dropout": 0.0, "is_causal": False, **kwargs}
    seen = []
    received = hk.received_attention
    monkeypatch.setattr(
        hk, "received_attention", lambda *x, lse, **y: seen.append(lse) or received(*x, lse=lse, **y)
    )
    attention_rows.install({0: module}, received=True)
    collector = attention_rows.Collector({0: 1.0}, received=True)
    with attention_rows.collect(collector, {0: module}):
        function = AttentionInterface().get_interface(module.config._attn_implementation, None)
        output = function(module, query, key, value, mask, **given)[0]
    attention_rows.remove({0: module})
    return output, collector.result(), seen[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scaling", [0.3, None])
def test_rows_take_the_log_sum_exp_of_flash_attention(scaling, dtype, monkeypatch):
    """On a GPU; here the flash attention of the CPU takes its place. The output is SDPA's, bit for bit."""
    qkv = [x.transpose(1, 2) for x in torch.randn(3, 2, 9, 4, 8).to(dtype).unbind(0)]
    given = {"scaling": scaling, "is_causal": False}
    stock = sdpa_attention_forward(nn.Module(), *qkv, None, **given)[0]
    plain, rows, lse = attended(monkeypatch, *qkv, **given)
    assert lse is None and same_bits(plain, stock)
    monkeypatch.setattr(attention_rows, "_FLASH", FLASH_ON_CPU)
    output, same, lse = attended(monkeypatch, *qkv, **given)
    logits = (qkv[0].double() @ qkv[1].double().mT) * (8**-0.5 if scaling is None else scaling)
    torch.testing.assert_close(lse.double(), logits.logsumexp(-1), rtol=1e-5, atol=1e-5)
    assert same_bits(output, stock) and output.stride() == stock.stride()
    torch.testing.assert_close(same, rows, rtol=1e-5, atol=1e-6)


def test_a_whole_encoder_with_the_log_sum_exp_of_flash_attention(monkeypatch):
    """The features are the same bit for bit, the scores up to rounding."""
    tower = tiny_model(tower="siglip").model.vision_tower
    encoder = hero.HeroVisionEncoder(tower, config=hero.HeroConfig(0.3))
    pixels, sizes, ran = torch.randn(5, 3, 56, 56), [(112, 112)], []
    flash = attention_rows._flash
    monkeypatch.setattr(attention_rows, "_flash", lambda *x: ran.append(flash(*x)) or ran[-1])
    found = []
    for table in ({}, FLASH_ON_CPU):
        monkeypatch.setattr(attention_rows, "_FLASH", table)
        with torch.no_grad():
            crops, plan = encoder.prepare(pixels, sizes)
            found.append(encoder.encode(crops, plan))
    assert ran and same_bits(found[0].features, found[1].features)
    for name, one in found[0].attention.items():
        torch.testing.assert_close(found[1].attention[name].scores, one.scores, rtol=1e-5, atol=1e-7)
    encoder.remove()


@pytest.mark.gpu
def test_flash_attention_of_a_gpu_returns_its_log_sum_exp(monkeypatch):
    qkv = torch.randn(3, 5, 729, 16, 72, device="cuda", dtype=torch.bfloat16).transpose(2, 3).unbind(0)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION), torch.no_grad():
        stock = sdpa_attention_forward(nn.Module(), *qkv, None, scaling=0.1, is_causal=False)[0]
        output, rows, lse = attended(monkeypatch, *qkv, scaling=0.1)
    logits = (qkv[0].double() @ qkv[1].double().mT) * 0.1
    torch.testing.assert_close(lse.double(), logits.logsumexp(-1), rtol=1e-5, atol=1e-5)
    assert same_bits(output, stock) and output.stride() == stock.stride()
    torch.testing.assert_close(rows.double(), logits.softmax(-1).mean(2), rtol=1e-4, atol=1e-7)


NO_FLASH = {
    "mask": {"mask": torch.zeros(2, 1, 9, 9)},
    "dropout": {"dropout": 0.5},
    "causal": {"is_causal": True},
    "perhaps causal": {"is_causal": None},
    "an argument of SDPA": {"position_bias": torch.zeros(2, 4, 9, 9)},
    "an argument of eager attention": {"output_attentions": True},
}


def no_flash_in(monkeypatch, qkv, **options):
    monkeypatch.setattr(attention_rows, "_FLASH", FLASH_ON_CPU)
    assert attended(monkeypatch, *qkv, **options)[2] is None


@pytest.mark.parametrize("case", NO_FLASH)
def test_no_log_sum_exp_where_attention_differs(case, monkeypatch):
    no_flash_in(monkeypatch, torch.randn(3, 2, 4, 9, 8).unbind(0), **NO_FLASH[case])


def test_no_log_sum_exp_where_sdpa_does_not_run_flash_attention(monkeypatch):
    qkv = torch.randn(3, 2, 4, 9, 8).unbind(0)
    with sdpa_kernel(SDPBackend.MATH):
        no_flash_in(monkeypatch, qkv)
    with torch.autocast("cpu", torch.bfloat16):
        no_flash_in(monkeypatch, qkv)
    no_flash_in(monkeypatch, [x.requires_grad_() for x in qkv])
    no_flash_in(monkeypatch, torch.randn(3, 2, 4, 9, 9).unbind(0))
    AttentionInterface.register("wrapped_for_test", lambda *x, **y: sdpa_attention_forward(*x, **y))
    no_flash_in(monkeypatch, torch.randn(3, 2, 4, 9, 8).unbind(0), base="wrapped_for_test")
    with monkeypatch.context() as patch:
        stock = nn.functional.scaled_dot_product_attention
        patch.setattr(nn.functional, "scaled_dot_product_attention", lambda *x, **y: stock(*x, **y))
        no_flash_in(monkeypatch, torch.randn(3, 2, 4, 9, 8).unbind(0))
    with monkeypatch.context() as patch:  # as with another PyTorch
        patch.delattr(torch, "_fused_sdp_choice")
        no_flash_in(monkeypatch, torch.randn(3, 2, 4, 9, 8).unbind(0))
    monkeypatch.setattr(attention_rows, "_FLASH", {"cpu": "_no_such_attention"})
    assert attended(monkeypatch, *torch.randn(3, 2, 4, 9, 8).unbind(0))[2] is None


@slow_in_interpreter
def test_base_attention_sees_the_users_configuration(model, inputs):
    """FlashAttention reads its own name from ``module.config``: it must find it."""
    seen = []

    def custom(module, *args, **kwargs):
        seen.append((module.config._attn_implementation, module.embed_dim, hasattr(module, "nothing")))
        return sdpa_attention_forward(module, *args, **kwargs)

    AttentionInterface.register("custom_for_test", custom)
    model = tiny_model()
    model.model.vision_tower.set_attn_implementation("custom_for_test")
    with hero.attach(model, keep_ratio=0.3, **LAYERS) as handle, torch.no_grad():
        handle.encoder(inputs["pixel_values"], inputs["image_sizes"])
    assert seen == [("custom_for_test", 32, False)] * 6
    assert all(
        layer.self_attn.config is model.model.vision_tower.config
        for layer in model.model.vision_tower.encoder.layers
    )


def test_a_tower_that_skips_layers_is_an_error():
    collector = attention_rows.Collector({3: 1.0})
    with pytest.raises(RuntimeError, match=r"did not run its attention in layers \[3\]"):
        collector.result()


def test_processor_counts_for_servers(model):
    """``_get_num_multimodal_tokens`` is how serving frameworks ask for the number of placeholders."""
    processor = tiny_processor()
    stock = processor._get_num_multimodal_tokens(image_sizes=SIZES)["num_image_tokens"]
    with hero.attach(model, processor, keep_ratio=0.3, **LAYERS) as handle:
        counts = processor._get_num_multimodal_tokens(image_sizes=SIZES)["num_image_tokens"]
        assert counts == [handle.count_tokens(size) for size in SIZES]
    assert processor._get_num_multimodal_tokens(image_sizes=SIZES)["num_image_tokens"] == stock


def test_clip_of_another_size(model, encoder, inputs):
    """A CLIP model of another resolution sees the crops resized."""
    clip = tiny_clip()
    relevance = hero.ClipRelevance(clip, tiny_tokenizer())
    crops, _ = encoder.prepare(inputs["pixel_values"], inputs["image_sizes"])
    larger = nn.functional.interpolate(crops, (112, 112), mode="bicubic")
    with torch.no_grad():
        small = nn.functional.interpolate(larger, (56, 56), mode="bicubic", antialias=True)
        output = clip.get_image_features(pixel_values=small)
        wanted = nn.functional.normalize(getattr(output, "pooler_output", output), dim=-1)
        torch.testing.assert_close(relevance.image_embeddings(larger, None), wanted)


LAST = {"keep_ratio": 0.3, "tile_layers": (1, 2), "thumbnail_layers": (5,)}
NEEDS = {
    # options of the config: (feature layer, layers run whole, whether the last layer runs at CLS)
    "saliency": ({**LAYERS}, -2, 5, True),
    "no saliency": ({**LAYERS, "weights": {"density": 1.0}}, -2, 5, False),
    "early features": (
        {"tile_layers": (0,), "thumbnail_layers": (1,), "weights": {"density": 1.0}},
        1,
        2,
        False,
    ),
    "no signal at all": ({"tile_layers": (0,), "thumbnail_layers": (1,), "policy": "uniform"}, -4, 3, False),
    "last layer scored": ({**LAST, "weights": {"density": 1.0}}, -2, 5, True),
    "last layer scored, saliency": (LAST, -2, 5, True),
    "features of the last layer": ({**LAYERS}, -1, 6, False),
    "embeddings and last": ({**LAYERS}, [0, 6], 6, False),
}
LAST_SCORED = ("saliency", "last layer scored, saliency")  # by a kernel, from one query in place of all


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=[] if case in LAST_SCORED else SLOW_IN_INTERPRETER) for case in NEEDS],
)
def test_the_tower_runs_no_more_than_it_must(monkeypatch, inputs, case):
    """The layers skipped change nothing: a tower run whole gives the same."""
    options, layer, whole, cls_only = NEEDS[case]
    model = tiny_model(vision_feature_layer=layer)
    tower = model.model.vision_tower
    ran = []
    blocks = list(tower.encoder.layers)
    for part, modules in (("layer", blocks), ("mlp", [block.mlp for block in blocks])):
        stock = type(modules[0]).forward

        def record(module, *args, part=part, modules=modules, stock=stock, **kwargs):
            ran.append((modules.index(module), part))
            return stock(module, *args, **kwargs)

        monkeypatch.setattr(type(modules[0]), "forward", record)  # not by hooks: with those, all layers run
    with hero.attach(model, config=hero.HeroConfig(**options)) as handle, torch.no_grad():
        pixels, sizes = inputs["pixel_values"], inputs["image_sizes"]
        short = handle.encoder(pixels, sizes)
        wanted = [(number, part) for number in range(whole) for part in ("layer", "mlp")]
        assert ran == wanted + [(5, "mlp")] * cls_only
        # Something of the user's on the tower: it must run, so the tower runs as it is.
        seen = []
        hook = tower.register_forward_hook(lambda *args: seen.append(1))
        long = handle.encoder(pixels, sizes)
        hook.remove()
        assert seen == [1]
    assert torch.equal(short.index, long.index)
    torch.testing.assert_close(short.scores, long.scores, rtol=0, atol=1e-6)
    torch.testing.assert_close(short.shares, long.shares, rtol=0, atol=1e-6)
    torch.testing.assert_close(short.tokens, long.tokens, rtol=0, atol=1e-5)


@slow_in_interpreter
def test_hidden_states_come_along_when_asked_for(model, inputs):
    pixels, sizes = inputs["pixel_values"], inputs["image_sizes"]
    with torch.no_grad(), hero.attach(model, keep_ratio=0.3, **LAYERS) as handle:
        counts = [handle.encoder.geometry.layout(size).crops for size in sizes.tolist()]
        crops = torch.cat([image[:count] for image, count in zip(pixels, counts, strict=True)])
        stock = model.model.vision_tower(crops, output_hidden_states=True)
        plain = model.model.get_image_features(pixels, sizes)
        rich = model.model.get_image_features(pixels, sizes, output_hidden_states=True)
    torch.testing.assert_close(plain.last_hidden_state, stock.last_hidden_state)
    assert torch.equal(rich.last_hidden_state, stock.last_hidden_state)
    assert all(
        torch.equal(one, other) for one, other in zip(rich.hidden_states, stock.hidden_states, strict=True)
    )
    for one, other in zip(plain.pooler_output, rich.pooler_output, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def test_fused_attention_gives_the_same_tokens(model, inputs):
    """Attention that yields the rows, in place of the encoder's own and rows beside it."""
    tower, sizes = model.model.vision_tower, inputs["image_sizes"]
    results = {}
    for attention in ("native", "fused"):
        encoder = hero.HeroVisionEncoder(tower, config=hero.HeroConfig(0.3, attention=attention, **LAYERS))
        with torch.no_grad():
            results[attention] = encoder(inputs["pixel_values"], sizes)
        encoder.remove()
    native, fused = results.values()
    assert torch.equal(native.index, fused.index)
    torch.testing.assert_close(native.scores, fused.scores)
    torch.testing.assert_close(native.tokens, fused.tokens)


def test_auto_attention_runs_what_was_measured_to_be_faster(model, inputs, monkeypatch):
    tower = model.model.vision_tower
    measured = []

    def is_faster(*shape):
        measured.append(shape)
        return True

    monkeypatch.setattr(hk, "fused_attention_is_faster", is_faster)

    def ran(keep=0.3, implementation="sdpa", compiles=False, **options):
        tower.set_attn_implementation(implementation)
        encoder = hero.HeroVisionEncoder(tower, config=hero.HeroConfig(keep, **LAYERS, **options))
        try:
            with torch.no_grad():
                selection = encoder(inputs["pixel_values"], inputs["image_sizes"])
                if compiles:
                    compiled = torch.compile(encoder, fullgraph=True, backend="eager")
                    same = compiled(inputs["pixel_values"], inputs["image_sizes"])
                    assert same.path == (False, "compiled code", selection.path.attention)
                    assert torch.equal(same.index, selection.index)
        finally:
            encoder.remove()
            torch._dynamo.reset()
        return selection.path.attention

    assert ran(compiles=True) == "fused"
    config = tower.config
    width, tokens = (
        config.hidden_size // config.num_attention_heads,
        (config.image_size // config.patch_size) ** 2 + 1,
    )
    assert set(measured) == {(torch.device("cpu"), torch.float32, width, tokens)}
    assert ran(keep=1.0) == "native"
    assert ran(attention="native") == "native"
    assert ran(implementation="eager") == "native"
    tower.train()
    assert ran() == "native"
    tower.eval()
    monkeypatch.undo()
    assert ran() == "native"  # the CPU has no kernel
    tower.set_attn_implementation("sdpa")


def test_fused_attention_runs_instead(model, inputs, monkeypatch):
    """In the layers that score patches and run as a whole, and nowhere else; the last runs at CLS alone."""
    layers, attend = [], attention_rows.Collector.attend

    def spy(self, layer, *tensors):
        layers.append(layer)
        return attend(self, layer, *tensors)

    monkeypatch.setattr(attention_rows.Collector, "attend", spy)
    config = hero.HeroConfig(0.3, attention="fused", tile_layers=(1, 2), thumbnail_layers=(-1,))
    encoder = hero.HeroVisionEncoder(model.model.vision_tower, config=config)
    with torch.no_grad():
        encoder(inputs["pixel_values"], inputs["image_sizes"])
    encoder.remove()
    assert layers == [1, 2]


def test_fused_attention_has_no_mask_and_no_dropout():
    module = _Attention(_Config())
    query, key, value = torch.randn(3, 2, 4, 9, 8).unbind(0)
    attention_rows.install({0: module}, attention="fused")
    attend = attention_rows._attention
    with attention_rows.collect(attention_rows.Collector({0: 1.0}), {0: module}):
        for mask, dropout in ((torch.zeros(2, 1, 9, 9), 0.0), (None, 0.1)):
            with pytest.raises(ValueError, match=r"attention: expected 'native'"):
                attend(module, query, key, value, mask, scaling=0.3, dropout=dropout)
    attention_rows.remove({0: module})
