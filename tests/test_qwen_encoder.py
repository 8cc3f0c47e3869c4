"""Packed images in the encoder: blocks as CLIP sees them, ratios of a call, pictures, refusals."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from independent import CACHE, tiny_clip
from independent import tiny_tokenizer as clip_tokenizer
from independent_qwen import FAMILIES, ONE, batch_of, picture, tiny_model, tiny_processor
from test_qwen import model_of
from transformers.cache_utils import DynamicCache
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import hero
from hero import packed

KEEP = {"keep_ratio": 0.3, "block": 4}
OTHER = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.5, 0.6, 0.7]}
ENCODERS = ("qwen2_5_vl", "qwen3_vl")  # with windows, and with DeepStack


def encoder_of(family, **options):
    return hero.HeroVisionEncoder(model_of(family).model.visual, None, hero.HeroConfig(**{**KEEP, **options}))


@pytest.mark.parametrize("family", ENCODERS)
def test_pixels_of_blocks(family):
    """Patches in the processor's order are put together to the picture again, cut into blocks."""
    processor = tiny_processor(family, do_normalize=False)
    token = 2 * FAMILIES[family][2]
    shot = picture(family, (9, 6))
    inputs = processor(images=[shot], text=[ONE])
    encoder = encoder_of(family)
    patches = torch.as_tensor(inputs["pixel_values"])
    blocks = packed.pixels_of_blocks(encoder, *encoder.prepare(patches, inputs["image_grid_thw"]))
    encoder.remove()
    whole = torch.from_numpy(np.array(shot)).permute(2, 0, 1) / 255
    assert blocks.shape == (6, 3, 4 * token, 4 * token)
    for number, block in enumerate(blocks):
        y, x = (4 * token * place for place in divmod(number, 2))
        part = whole[:, y : y + 4 * token, x : x + 4 * token]
        assert torch.allclose(block[:, : part.shape[1], : part.shape[2]], part, atol=1e-6)
        assert not block[:, part.shape[1] :].any() and not block[:, :, part.shape[2] :].any()


@pytest.mark.parametrize("family", ENCODERS)
def test_relevance_of_blocks(family):
    """CLIP gets each block normalised as its own; shares follow from the cosine with the question."""
    model, processor = model_of(family), tiny_processor(family, **OTHER)
    clip = tiny_clip()
    relevance = hero.ClipRelevance(clip, clip_tokenizer(), second_pass=True)
    inputs = batch_of(processor, family, "one image")
    options = {"relevance": relevance, "weights": {"relevance": 1.0}}
    with hero.attach(model, processor, **KEEP, **options) as handle, torch.no_grad():
        model(**inputs)
        encoder, shares = handle.encoder, handle.last.shares
        pixels = packed.pixels_of_blocks(
            encoder, *encoder.prepare(inputs["pixel_values"], inputs["image_grid_thw"])
        )
        mean, std, own_mean, own_std = (
            torch.tensor(values)[:, None, None]
            for values in (OTHER["image_mean"], OTHER["image_std"], OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)
        )
        image = relevance.image_embeddings((pixels * std + mean - own_mean) / own_std, None)
        text = relevance.text_embeddings(["what is in this picture ?"])
    wanted = ((image * text).sum(-1) / 0.05).softmax(0)
    assert torch.allclose(shares, wanted, atol=1e-5)
    with pytest.raises(ValueError, match="second_pass"):
        hero.attach(model, processor, relevance=hero.ClipRelevance(clip, clip_tokenizer()))


@pytest.mark.parametrize("family", ENCODERS)
def test_ratios_of_a_call(family):
    """For each image, from the attached processor or with a stock prompt; later turns need none."""
    model, processor = model_of(family), tiny_processor(family)
    few = {"max_new_tokens": 3, "do_sample": False}
    with hero.attach(model, processor, **KEEP) as handle, torch.no_grad():
        inputs = batch_of(processor, family, "two images in a prompt", keep_ratio=[0.5, 0.1])
        answer = model.generate(**inputs, **few)
        full = [layout.full_tokens for layout in handle.last.layout]
        assert handle.last.lengths == [int(0.5 * full[0]), int(0.1 * full[1])]
        stock = batch_of(tiny_processor(family), family, "two images in a prompt")
        again = model.generate(**stock, keep_ratios=[0.5, 0.1], **few)
        assert torch.equal(again[:, -3:], answer[:, -3:])
        with pytest.raises(ValueError, match=r"^keep_ratios: "):
            model.generate(**stock, keep_ratios=[0.5], **few)


@pytest.mark.parametrize("family", ENCODERS)
def test_the_encoder_alone(family):
    """It takes the grids as the processor returns them, and what does not fit is refused by name."""
    inputs = batch_of(tiny_processor(family), family, "two images in a prompt")
    pixels, grids = inputs["pixel_values"], inputs["image_grid_thw"]
    encoder = encoder_of(family)
    with torch.no_grad():
        selection = encoder(pixels, grids)
        assert selection.path.reason == "packed images" and selection.image_sizes == [None, None]
        for number, (_, rows, columns) in enumerate(grids.tolist()):
            alone = encoder(pixels.split(grids.prod(1).tolist())[number], [(1, rows, columns)])
            assert torch.equal(alone.tokens, selection.per_image()[number])
    for name, wrong in {
        "pixel_values": (pixels[1:], grids),
        "pixel_values: ": (pixels[:, 1:], grids),
        "image_grid_thw": (pixels, grids[:, 1:]),
        "image_grid_thw: ": (pixels, grids * torch.tensor([2, 1, 1])),
        "image_grid_thw:  ": (pixels, grids + torch.tensor([0, 1, 0])),
    }.items():
        with pytest.raises((TypeError, ValueError), match=rf"^{name.strip()}"):
            encoder(*wrong)
    broken = pixels.clone()
    broken[-1, 0] = torch.nan
    with pytest.raises(ValueError, match=r"^pixel_values: .* in image 1 "), torch.no_grad():
        encoder(broken, grids)
    encoder.remove()
    for options, name in ({"cuda_graphs": True}, "cuda_graphs"), ({"geometry": hero.Geometry()}, "geometry"):
        with pytest.raises(ValueError, match=rf"^{name}: "):
            hero.HeroVisionEncoder(model_of(family).model.visual, **options)


@pytest.mark.parametrize("family", ENCODERS)
def test_threads_do_not_see_one_another(family):
    model, processor = model_of(family), tiny_processor(family)
    few = {"max_new_tokens": 4, "do_sample": False}
    with hero.attach(model, processor, **KEEP):
        batches = [batch_of(processor, family, case) for case in ("one image", "two rows")] * 2
        alone = [model.generate(**batch, **few) for batch in batches]
        with ThreadPoolExecutor(4) as pool:
            for _ in range(3):
                found = pool.map(lambda batch: model.generate(**batch, **few), batches)
                assert all(map(torch.equal, found, alone))


def test_a_picture_of_blocks():
    family = "qwen2_5_vl"
    model, processor = model_of(family), tiny_processor(family)
    inputs = batch_of(processor, family, "one image")
    with hero.attach(model, processor, **KEEP) as handle, torch.no_grad():
        model(**inputs)
    layout = handle.last.layout[0]
    drawn = hero.visualize(picture(family, (layout.rows[1], layout.columns[1])), handle.last)
    assert drawn.size[0] == 1000 and drawn.size[1] > 300


def test_count_tokens_without_a_model():
    """With the pixel limits of the published checkpoints; without a processor, refused."""
    for token, limits, count in (28, (3136, 12_845_056), 999), (32, (65_536, 16_777_216), 768):
        geometry = hero.Geometry(12 * token, token, hero.tiling.Blocks(*limits), "none", newlines=False)
        assert hero.count_tokens(hero.HeroConfig(0.7), (768, 1024), geometry=geometry) == int(0.7 * count)
    with hero.attach(model_of("qwen3_vl")) as handle, pytest.raises(ValueError, match=r"^processor: "):
        handle.count_tokens((768, 1024))
    with pytest.raises(ValueError, match="aspect ratio"):
        geometry.layout((10, 3000))


@pytest.mark.parametrize("family", ENCODERS)
def test_conversations_in_turns(family):
    """Where positions go on is noted on each cache: a call in between, which replaces it, changes nothing."""
    model, processor = model_of(family), tiny_processor(family)
    few = {"max_new_tokens": 3, "do_sample": False}
    words = processor.tokenizer("USER : and that one ? ASSISTANT :", return_tensors="pt")["input_ids"]
    with hero.attach(model, processor, **KEEP):
        found = []
        for between in (False, True):
            cache = DynamicCache(config=model.config.text_config)
            first = model.generate(**batch_of(processor, family, "one image"), **few, **{CACHE: cache})
            if between:
                model.generate(**batch_of(processor, family, "two rows"), **few)
            found.append(model.generate(input_ids=torch.cat([first, words], 1), **few, **{CACHE: cache}))
    assert torch.equal(*found)


@pytest.mark.parametrize("family", ENCODERS)
def test_caches_cropped_within_a_turn(family):
    """Before or within an image: refused, wherever in its turn it stands; behind it: as without the cache."""
    model, processor = model_of(family), tiny_processor(family)
    few = {"max_new_tokens": 3, "do_sample": False}
    with hero.attach(model, processor, **KEEP):
        inputs = batch_of(processor, family, "two images in a prompt")
        ids = inputs["input_ids"]
        begin, *_, end = (ids[0] == model.config.image_token_id).nonzero()[:, 0].tolist()
        wanted = model.generate(**inputs, **few)
        text = {"input_ids": ids, "attention_mask": inputs["attention_mask"]}
        for length in (2, begin + 1, begin + 20, end, end + 1, end + 2):
            cache = DynamicCache(config=model.config.text_config)
            model.generate(**inputs, **few, **{CACHE: cache})
            cache.crop(length - cache.get_seq_length())
            if length > end:
                assert torch.equal(model.generate(**text, **few, **{CACHE: cache}), wanted)
            else:
                with pytest.raises(ValueError, match=r"^past_key_values: "):
                    model.generate(**text, **few, **{CACHE: cache})


@pytest.mark.parametrize("family", ENCODERS)
def test_grids_that_do_not_fit_a_call(family):
    model, processor = model_of(family), tiny_processor(family)
    few = {"max_new_tokens": 3, "do_sample": False}
    inputs = batch_of(processor, family, "two images in a prompt")
    with hero.attach(model, processor, **KEEP):
        for error, wrong in (TypeError, inputs["image_grid_thw"].tolist()), (ValueError, None):
            with pytest.raises(error, match=r"^image_grid_thw: "):
                model.generate(**{**inputs, "image_grid_thw": wrong}, **few)
        with pytest.raises(ValueError, match=r"^image_grid_thw: "):
            model.model.get_image_features(inputs["pixel_values"])
        full = torch.zeros(3, 1, 500, dtype=torch.long)
        with pytest.raises(ValueError, match=r"^position_ids: "):
            model.generate(**inputs, position_ids=full, **few)


@pytest.mark.slow
def test_models_of_two_families_compile_in_one_process():
    """The stages run uncompiled; numbers of the first model are symbols when the second is compiled."""
    torch._dynamo.reset()
    for family in ENCODERS:
        model, processor = tiny_model(family), tiny_processor(family)
        inputs = batch_of(processor, family, "one image")
        with hero.attach(model, processor, **KEEP), torch.no_grad():
            inputs = batch_of(processor, family, "one image")
            wanted = model(**inputs).logits
            found = torch.compile(model.forward, backend="eager")(**inputs).logits
        assert torch.allclose(found, wanted, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("family", ENCODERS)
def test_packed_attention_on_a_gpu(family):
    """PyTorch's varlen attention under a name with "flash" scores as SDPA does, without synchronising."""
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    if not torch.cuda.is_available():
        pytest.skip("no GPU")

    def attend(module, query, key, value, attention_mask, *, cu_seq_lens_q, max_length_q, scaling, **kwargs):
        packed_qkv = (one[0].transpose(0, 1).contiguous() for one in (query, key, value))
        places = cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q
        return varlen.varlen_attn(*packed_qkv, *places)[None], None

    if "flash_of_pytorch" not in ALL_ATTENTION_FUNCTIONS:
        type(ALL_ATTENTION_FUNCTIONS).register("flash_of_pytorch", attend)
    model = tiny_model(family).to("cuda", torch.bfloat16)
    tower = model.model.visual
    inputs = batch_of(tiny_processor(family), family, "two images in a prompt")
    pixels = inputs["pixel_values"].to("cuda", torch.bfloat16)
    found = []
    for name in ("sdpa", "flash_of_pytorch"):
        for module in tower.modules():
            if hasattr(module, "config"):
                module.config._attn_implementation_internal = name
        encoder = hero.HeroVisionEncoder(tower, None, hero.HeroConfig(**KEEP))
        with torch.no_grad():
            encoder(pixels, inputs["image_grid_thw"])
            torch.cuda.set_sync_debug_mode("error")
            try:
                found.append(encoder(pixels, inputs["image_grid_thw"]))
            finally:
                torch.cuda.set_sync_debug_mode("default")
        encoder.remove()
    assert torch.allclose(found[0].scores, found[1].scores, rtol=0.05, atol=1e-5)
