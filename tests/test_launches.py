"""Launches, host-device synchronisations and memory of the vision stage, counted without a GPU.

The ``meta`` device stands in for one: a value cannot be read there, and what is copied to it from the host
is seen. What a GPU has to add, its own count of launches and ``set_sync_debug_mode``, is marked gpu.
"""

import copy
import random

import independent_qwen
import pytest
import torch
from independent import tiny_clip, tiny_image, tiny_model, tiny_processor, tiny_tokenizer
from torch import nn
from transformers import AttentionInterface, CLIPVisionConfig, CLIPVisionModel, LlamaConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import hero
from hero.policies import POLICIES
from hero_kernels.testing import OperationCounter, peak_bytes

ONE = [(112, 112)]  # 5 crops
BATCHES = {
    "8 images": ONE * 8,
    "ragged": [(112, 168), (56, 56), (40, 112), (300, 20)],
    "40 crops and one": [*ONE * 8, (20, 20)],
}
ALL = {**{policy: {"policy": policy} for policy in POLICIES}, "fused": {"attention": "fused"}}
ALL |= {"divprune crop": {"policy": "divprune", "pool": "crop"}}
ALL |= {"scope image": {"policy": "scope", "pool": "image"}}
WIDTH = 96


def tower(layers: int = 4, width: int = 64, size: int = 56, **options) -> CLIPVisionModel:
    config = CLIPVisionConfig(
        num_hidden_layers=layers,
        hidden_size=width,
        num_attention_heads=width // 16,
        intermediate_size=2 * width,
        image_size=size,
        patch_size=14,
        **options,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return CLIPVisionModel(config).eval().requires_grad_(False)


def encoder_of(device="cpu", *, relevance=None, vision_tower=None, **options) -> hero.HeroVisionEncoder:
    vision_tower = (vision_tower or tower()).to(device)
    if options.get("policy") == "cdpruner":
        relevance = hero.ClipRelevance(tiny_clip().to(device), tiny_tokenizer(), second_pass=True)
    width = vision_tower.config.hidden_size
    with torch.random.fork_rng():
        torch.manual_seed(1)
        projector = nn.Sequential(nn.Linear(width, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH)).to(device)
    return hero.HeroVisionEncoder(
        vision_tower,
        projector.requires_grad_(False),
        hero.HeroConfig(keep_ratio=0.3, **options),
        image_newline=torch.ones(WIDTH, device=device),
        relevance=relevance,
    )


def pixels(encoder, sizes, device="cpu"):
    crops = sum(layout.crops for layout in encoder.geometry.layouts(sizes))
    size = encoder.geometry.crop_size
    return torch.randn(crops, 3, size, size, generator=torch.Generator().manual_seed(2)).to(device)


def words(encoder, sizes, device="cpu") -> tuple[torch.Tensor, ...]:
    """Embeddings of a question an image, if the policy reads it."""
    return (torch.randn(len(sizes), 16).to(device),) if encoder.needs_text else ()


def count(encoder, sizes, device, *text) -> OperationCounter:
    """Operations of a call with the plan made; a counter that makes operations count as one saw it made."""
    images, text = pixels(encoder, sizes, device), text or words(encoder, sizes, device)
    with torch.no_grad():
        with OperationCounter():
            encoder(images, sizes, *text)
        with OperationCounter() as counter:
            encoder(images, sizes, *text)
    return counter


def test_the_counter_counts():
    """It sees a launch, a synchronisation, a copy; and neither views nor allocations."""
    values = torch.rand(4, 4)
    with OperationCounter() as counter:
        assert (values[1:].mT + 1).shape == (4, 3)
        values.new_empty(3)
    assert counter.operations == ["add"] and not counter.waits
    for synchronise in (
        lambda: float(values.sum()),
        lambda: values[values > 0.5],
        lambda: values.nonzero(),
        lambda: bool((values > 2).any()),
        lambda: values.to("meta"),
        lambda: torch.tensor([1.0], device="meta"),
        lambda: torch.empty(4, 4, device="meta").copy_(values),
        lambda: torch.arange(3).repeat_interleave(torch.tensor([1, 2, 3])),
    ):
        with OperationCounter() as counter:
            synchronise()
        assert counter.waits, counter.operations
    with OperationCounter() as counter:
        values.to("meta", non_blocking=True)
    assert counter.operations and not counter.waits


@pytest.mark.parametrize("case", ALL)
def test_no_synchronisation_and_launches_do_not_grow(case):
    """Neither with the number of tiles nor of images, whatever their grids."""
    encoder = encoder_of("meta", **ALL[case])
    one = count(encoder, ONE, "meta")
    assert one.waits == [] and {"segmented_topk_gather", "tile_budgets"} <= set(one.operations)
    for sizes in BATCHES.values():
        many = count(encoder, sizes, "meta")
        assert many.waits == [] and sorted(many.operations) == sorted(one.operations)


@pytest.mark.parametrize("layouts", [1, 8])
def test_a_new_layout_is_planned_without_synchronisation(layouts):
    """The first batch of its sizes: more copies to the device, none that synchronises."""
    encoder = encoder_of("meta")
    sizes = [(112, 100 + number) for number in range(layouts)]
    images = pixels(encoder, sizes, "meta")
    with OperationCounter() as counter, torch.no_grad():
        encoder(images, sizes)
    assert counter.waits == []


def test_padded_pixels_are_packed_in_one_operation():
    encoder = encoder_of("meta")
    counts = []
    for images in (2, 8):
        sizes = ONE * (images - 1) + [(20, 20)]
        padded = torch.empty(images, 5, 3, 56, 56, device="meta")
        with torch.no_grad():
            for _ in range(2):
                with OperationCounter() as counter:
                    encoder(padded, sizes)
        assert counter.waits == []
        counts.append(len(counter.operations))
    assert counts[0] == counts[1] == len(count(encoder, ONE, "meta").operations) + 1


@pytest.mark.parametrize("shared", [True, False], ids=["shared weights", "second pass"])
def test_relevance_does_not_synchronise(shared):
    clip = tiny_clip()
    own = tower(
        clip.config.vision_config.num_hidden_layers,
        clip.config.vision_config.hidden_size,
        clip.config.vision_config.image_size,
    )
    relevance = hero.ClipRelevance(clip, tiny_tokenizer(), second_pass=not shared)
    encoder = encoder_of(relevance=relevance, vision_tower=clip.vision_model if shared else own)
    assert encoder._shared == shared
    clip.to("meta")
    encoder.to("meta")
    text = "what is in this picture ?"
    two = count(encoder, ONE * 2, "meta", text)  # the text of one takes fewer copies
    assert two.waits == []
    for sizes in BATCHES.values():
        many = count(encoder, sizes, "meta", [f"{text} {number}" for number in range(len(sizes))])
        assert many.waits == [] and sorted(many.operations) == sorted(two.operations)
    without = count(encoder_of("meta", vision_tower=tower()), ONE, "meta")
    assert len(two.operations) > len(without.operations)


class OnlyLong:
    """Sizes that may be counted, not read: as if they were on a GPU."""

    def __len__(self):
        return 2

    def __getattr__(self, name):
        raise AssertionError(f"{name}: read once more")


def test_sizes_are_read_once_a_call(monkeypatch):
    """By the hook before the model's forward; the encoder behind it takes them from there."""
    model, processor = tiny_model(), tiny_processor()
    images = [tiny_image(100, 80, 0), tiny_image(60, 170, 1)]
    with hero.attach(model, processor, keep_ratio=0.3) as handle, torch.no_grad():
        text = ["USER : <image> describe ASSISTANT :"] * 2
        inputs = processor(images=images, text=text, padding=True, return_tensors="pt")
        wanted, selection = model(**inputs).logits, handle.last
        tokens = handle.image_tokens
        monkeypatch.setattr(
            handle, "image_tokens", lambda pixels, sizes, **given: tokens(pixels, OnlyLong(), **given)
        )
        assert torch.equal(model(**inputs).logits, wanted)
        assert torch.equal(handle.last.index, selection.index)
        with pytest.raises(AssertionError, match="read once more"):
            model.model.get_image_features(inputs["pixel_values"], inputs["image_sizes"])


@pytest.mark.parametrize("case", ALL)
def test_operations_on_the_cpu_do_not_grow(case):
    encoder = encoder_of(**ALL[case])
    one = count(encoder, ONE, "cpu")
    for sizes in BATCHES.values():
        many = count(encoder, sizes, "cpu")
        assert many.waits == [] and sorted(many.operations) == sorted(one.operations)


ALL_BUT_ONE = [case for case in ALL if case != "visionzip"]
SMALL_BATCHES = {"one image": ONE, "another": [(112, 168)], "ragged": BATCHES["ragged"]}


@pytest.mark.parametrize(
    "case", ["visionzip", *(pytest.param(case, marks=pytest.mark.slow) for case in ALL_BUT_ONE)]
)
def test_the_encoder_compiles_whole(case):
    """In one graph, ``fullgraph=True``, and with the same results."""
    torch._dynamo.reset()
    encoder = encoder_of(**ALL[case])
    compiled = torch.compile(encoder, fullgraph=True, backend="eager")
    for sizes in (*SMALL_BATCHES.values(), ONE):
        given = pixels(encoder, sizes), sizes, *words(encoder, sizes)
        with torch.no_grad():
            same_selections(encoder(*given), compiled(*given))


def same_selections(plain, same):
    for name in ("tokens", "index", "budgets", "shares", "scores", "cu_seqlens"):
        assert torch.equal(getattr(plain, name), getattr(same, name)), name
    assert (same.lengths, same.layout, same.policy) == (plain.lengths, plain.layout, plain.policy)


@pytest.mark.parametrize(
    ("form", "padded"),
    [
        (torch.tensor, True),
        *(
            pytest.param(*one, marks=pytest.mark.slow)
            for one in ((torch.tensor, False), (list, True), (list, False))
        ),
    ],
)
def test_compiled_code_serves_all_sizes(form, padded):
    """The number of compilations does not grow with the number of sizes, and a copy finds its own encoder."""
    torch._dynamo.reset()
    graphs = []

    def backend(module, inputs):
        graphs.append(module)
        return module

    encoder = encoder_of(vision_tower=tower(layers=3))
    compiled = torch.compile(encoder, fullgraph=True, backend=backend)
    draw = random.Random(0)
    for number in range(24):
        sizes = [(draw.randrange(20, 300), draw.randrange(20, 300)) for _ in range(draw.choice((1, 1, 2, 3)))]
        images = pixels(encoder, sizes)
        if padded:
            images = in_batch(encoder, sizes, images, torch.nan)
        with torch.no_grad():
            same_selections(encoder(images, sizes), compiled(images, form(sizes)))
        assert len(graphs) <= 6, number
    other = copy.deepcopy(encoder)
    other.config = hero.HeroConfig(keep_ratio=0.6, policy="uniform")
    with torch.no_grad():
        same_selections(
            other(images, sizes), torch.compile(other, fullgraph=True, backend=backend)(images, sizes)
        )


@pytest.mark.slow
@pytest.mark.parametrize("case", ["hero", "scope", "scope image", "divprune"])
def test_gradients_of_compiled_code(case):
    torch._dynamo.reset()
    encoder = encoder_of(vision_tower=tower(layers=3), **ALL[case])
    compiled = torch.compile(encoder, fullgraph=True, backend="aot_eager")
    for sizes in (ONE, BATCHES["ragged"]):
        images = in_batch(encoder, sizes, pixels(encoder, sizes)).requires_grad_()
        wanted, got = (
            torch.autograd.grad(run(images, given).tokens.square().sum(), images)[0]
            for run, given in ((encoder, sizes), (compiled, torch.tensor(sizes)))
        )
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "text", "message"),
    [
        ({}, "a question", "text: expected embeddings"),
        ({"allocation": "floor"}, None, "allocation: expected 'exact'"),
        ({"policy": "visionzip"}, None, "policy 'visionzip': expected eager code or torch.no_grad"),
    ],
)
def test_what_compiled_code_cannot_do(options, text, message):
    torch._dynamo.reset()
    encoder = encoder_of(**options)
    images = pixels(encoder, ONE).requires_grad_()
    compiled = torch.compile(encoder, fullgraph=True, backend="eager")
    with pytest.raises((TypeError, ValueError, torch._dynamo.exc.Unsupported), match=message):
        compiled(images, ONE, text)


def test_compiled_code_checks_the_sizes_of_each_call():
    torch._dynamo.reset()
    encoder = encoder_of()
    compiled = torch.compile(encoder, fullgraph=True, backend="eager")
    images = pixels(encoder, ONE)
    with torch.no_grad():
        compiled(images, torch.tensor(ONE))
        with pytest.raises(ValueError, match="expected the sizes of 5 crops, got those of 4"):
            compiled(images, torch.tensor([(20, 150)]))


def test_the_encoder_compiles_with_embedded_questions():
    torch._dynamo.reset()
    clip = tiny_clip()
    relevance = hero.ClipRelevance(clip, tiny_tokenizer())
    encoder = encoder_of(relevance=relevance, vision_tower=clip.vision_model)
    compiled = torch.compile(encoder, fullgraph=True, backend="eager")
    sizes = BATCHES["ragged"]
    images, words = pixels(encoder, sizes), [f"w{number}" for number in range(len(sizes))]
    with torch.no_grad():
        plain = encoder(images, sizes, words)
        same = compiled(images, sizes, relevance.text_embeddings(words))
    assert torch.equal(plain.index, same.index) and torch.equal(plain.tokens, same.tokens)


@pytest.mark.slow
@pytest.mark.parametrize("form", [list, torch.tensor])
@pytest.mark.parametrize("padded", [False, True])
def test_the_encoder_compiles_with_inductor(padded, form):
    """Forward and backward, of crops one after another and of padded batches as processors return them."""
    torch._dynamo.reset()
    encoder = encoder_of(vision_tower=tower(layers=3))
    compiled = torch.compile(encoder, fullgraph=True)
    for sizes in (ONE, BATCHES["ragged"]):
        images = (in_batch if padded else lambda _, sizes, images: images)(
            encoder, sizes, pixels(encoder, sizes)
        )
        with torch.no_grad():
            plain, same = encoder(images, sizes), compiled(images, form(sizes))
        torch.testing.assert_close(same.scores, plain.scores, rtol=1e-4, atol=1e-6)
        assert torch.equal(same.index, plain.index)
        torch.testing.assert_close(same.tokens, plain.tokens, rtol=1e-4, atol=1e-5)
        images.requires_grad_()
        wanted, got = (
            torch.autograd.grad(run(images, given).tokens.square().sum(), images)[0]
            for run, given in ((encoder, sizes), (compiled, form(sizes)))
        )
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-5)


def in_batch(encoder, sizes, images, padding=0.0):
    """``[B, most crops, 3, S, S]`` of crops one after another."""
    counts = [layout.crops for layout in encoder.geometry.layouts(sizes)]
    return nn.utils.rnn.pad_sequence(images.split(counts), batch_first=True, padding_value=padding)


CROP, HEADS, TOKENS, LAYERS = 336, 4, 577, 4  # real numbers of tokens, at a fraction of the width


@pytest.fixture(scope="module")
def stage():
    """A model whose vision stage has real proportions: many tokens, a language model 4 times as wide."""
    vision = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        image_size=CROP,
        patch_size=14,
    )
    text = LlamaConfig(hidden_size=256, intermediate_size=512, num_hidden_layers=1, num_attention_heads=4)
    text.vocab_size, text.num_key_value_heads = 100, 4
    return tiny_model(vision_config=vision, text_config=text, image_grid_pinpoints=[[2 * CROP, 2 * CROP]])


def peaks(model, images, device="cpu") -> dict[str, int]:
    """The most bytes held in the vision stage: stock, hero at R = 0.2, and stock with attention maps."""
    values = torch.randn(images, 5, 3, CROP, CROP, device=device)
    sizes = [[2 * CROP, 2 * CROP]] * images
    tower = model.model.vision_tower
    held = peak_bytes if device == "cpu" else peak_of_gpu

    def call():
        return model.model.get_image_features(values, torch.tensor(sizes)).pooler_output

    with torch.no_grad():
        result = {"stock": held(call)}
        with hero.attach(model, keep_ratio=0.2) as handle:  # as within a call of the model
            result["hero"] = held(lambda: handle.encoder(values, sizes))
        tower.set_attn_implementation("eager")
        result["maps"] = held(lambda: tower(values.flatten(0, 1), output_attentions=True))
        tower.set_attn_implementation("sdpa")
    return result


def peak_of_gpu(function) -> int:
    function()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_memory_of_the_vision_stage(stage, device):
    """Never above stock's; at 40 crops far below one layer's attention maps, and no more a crop than at 5."""
    stage.to(device)
    few, many = peaks(stage, 1, device), peaks(stage, 8, device)
    one_layer = 40 * HEADS * TOKENS**2 * 4
    assert few["hero"] <= few["stock"] and many["hero"] <= many["stock"]
    assert many["hero"] < one_layer / 2 and many["maps"] > LAYERS * one_layer
    assert many["hero"] <= 8.1 * few["hero"]


# What only a GPU can tell.


def on_gpu(sizes, **options):
    """A tower of some width in bf16, and its input: (encoder, pixels)."""
    encoder = encoder_of("cuda", vision_tower=tower(6, 256), **options).to(torch.bfloat16)
    return encoder, pixels(encoder, sizes, "cuda").to(torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("case", ALL)
def test_no_synchronisation_on_a_gpu(case):
    for sizes in (ONE, *BATCHES.values()):
        encoder, images = on_gpu(sizes, **ALL[case])
        text = words(encoder, sizes, "cuda")
        with torch.no_grad():
            encoder(images, sizes, *text)  # compiles kernels
            encoder.plans.clear()
            torch.cuda.set_sync_debug_mode("error")
            try:
                for _ in range(2):  # once planning, once planned
                    encoder(images, sizes, *text)
            finally:
                torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_no_synchronisation_on_a_gpu_with_a_question():
    clip = tiny_clip().to("cuda")
    relevance = hero.ClipRelevance(clip, tiny_tokenizer())
    encoder = encoder_of("cuda", relevance=relevance, vision_tower=clip.vision_model)
    sizes = BATCHES["ragged"]
    images, words = pixels(encoder, sizes, "cuda"), [f"w{number}" for number in range(len(sizes))]
    with torch.no_grad():
        plain = encoder(images, sizes, relevance.text_embeddings(words))
        torch.cuda.set_sync_debug_mode("error")
        try:
            beside = encoder(images, sizes, words)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(plain.index, beside.index) and torch.equal(plain.tokens, beside.tokens)


@pytest.mark.gpu
def test_launches_of_a_gpu_do_not_grow():
    from torch.profiler import ProfilerActivity, profile

    counts = []
    for sizes in (ONE * 2, ONE * 8, ONE * 16):
        encoder, images = on_gpu(sizes)
        with torch.no_grad():
            encoder(images, sizes)
            with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
                encoder(images, sizes)
                torch.cuda.synchronize()
        counts.append(
            sum(
                event.name.startswith("cuLaunch") or "LaunchKernel" in event.name
                for event in profiler.events()
            )
        )
    assert counts[0] == counts[1] == counts[2] > 0


@pytest.mark.gpu
def test_the_encoder_compiles_whole_on_a_gpu():
    torch._dynamo.reset()
    sizes = BATCHES["ragged"]
    encoder, images = on_gpu(sizes)
    encoder, images = encoder.float(), images.float()
    compiled = torch.compile(encoder, fullgraph=True)
    with torch.no_grad():
        plain, same = encoder(images, sizes), compiled(images, sizes)
    torch.testing.assert_close(same.scores, plain.scores, rtol=1e-3, atol=1e-5)
    assert same.lengths == plain.lengths


def qwen_tower(family: str, attention: str) -> nn.Module:
    """On the meta device, with an attention that takes all images in one call, or one an image."""
    tower = independent_qwen.tiny_model(family).model.visual.to("meta")
    tower.set_attn_implementation("sdpa")
    if attention != "sdpa":
        if attention not in ALL_ATTENTION_FUNCTIONS:
            AttentionInterface.register(attention, lambda _, q, *rest, **more: (q.transpose(1, 2), None))
        for module in tower.modules():
            if hasattr(module, "config"):
                module.config._attn_implementation_internal = attention
    return tower


@pytest.mark.parametrize("attention", ["flash_that_packs", "sdpa"])
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_packed_images(family, attention):
    """No synchronisation with either; with one call a layer, launches do not depend on the images."""
    tower = qwen_tower(family, attention)
    encoder = hero.HeroVisionEncoder(tower, None, hero.HeroConfig(keep_ratio=0.3, block=4))
    channels = 3 * tower.config.temporal_patch_size * tower.config.patch_size**2
    counts = []
    for grids in ([(1, 8, 10)], [(1, 8, 10), (1, 20, 6), (1, 2, 2)], [(1, 12, 12)] * 8):
        patches = torch.empty(sum(rows * columns for _, rows, columns in grids), channels, device="meta")
        with torch.no_grad():
            for _ in range(2):  # the first one makes the plan
                with OperationCounter() as counter:
                    selection = encoder(patches, grids)
        assert counter.waits == [] and len(selection.layout) == len(grids)
        counts.append(sorted(counter.operations))
    encoder.remove()
    if attention != "sdpa":
        assert counts[0] == counts[1] == counts[2]
