"""The plug-in for vLLM with InternVL, in both of its formats, and LLaVA-OneVision: small random models.

They give the tokens, log-probabilities and answers of transformers with hero attached.
"""

import json

import pytest

pytest.importorskip("vllm", reason="vLLM: `make test-vllm` brings it")

import numpy as np
import torch
import vllm_families
from independent_families import CROP, tiny_picture
from test_vllm import (  # noqa: F401 - engine is a fixture
    _per_image,
    _record,
    _recorded,
    answers,
    assert_same,
    config_of,
    engine,
    model_of,
    processor_of,
    spied,
)
from transformers import AutoProcessor
from vllm import SamplingParams
from vllm.transformers_utils.processors.internvl import InternVLImageProcessor

import hero
from hero.vllm.geometry import geometry_of, largest

FAMILIES = ("internvl", "internvl_chat", "llava_onevision")
# (height, width): one crop, several grids; of OneVision padded grids, resized ones, and one without rows.
SIZES = ((50, 50), (120, 90), (60, 170), (230, 270), (280, 160), (10, 400))
OWN_CODE = {"trust_remote_code": True}


def arguments_of(family):
    return OWN_CODE if family == "internvl_chat" else {}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def checkpoint(family, tmp_path_factory):
    """Folder, model of transformers and arguments of an engine."""
    folder = tmp_path_factory.mktemp("vllm") / family
    model = vllm_families.write(folder, family)
    return folder, model, {"limit_mm_per_prompt": {"image": 4, "video": 1}, **arguments_of(family)}


@pytest.fixture(scope="module")
def folder(checkpoint):
    return checkpoint[0]


@pytest.fixture(scope="module")
def hf_processor(family, checkpoint, tmp_path_factory):
    """Transformers' processor of a checkpoint, which InternVL's own format does not have."""
    folder = checkpoint[0]
    if family == "internvl_chat":
        folder = tmp_path_factory.mktemp("vllm") / "internvl"
        vllm_families.write(folder, "internvl")
    return AutoProcessor.from_pretrained(folder)


@pytest.fixture(scope="module")
def images():
    return [tiny_picture(height, width, seed) for seed, (height, width) in enumerate(SIZES)]


def answered(llm, prompts):
    """Four tokens of each answer, also after an end that random models happen to write."""
    return answers(llm, prompts, SamplingParams(temperature=0, max_tokens=4, logprobs=0, ignore_eos=True))


def text_of(token, count, question="what is in this picture ?"):
    return f"USER : {f'{token} ' * count}{question} ASSISTANT :"


def prompts_of(family, asked, ratios):
    """Prompts of vLLM, each with some images and the ratio of its request."""
    return [
        {
            "prompt": text_of(vllm_families.IMAGE[family], len(images)),
            "multi_modal_data": {"image": list(images)},
            "mm_processor_kwargs": {} if ratio is None else {"hero_keep_ratio": ratio},
        }
        for images, ratio in zip(asked, ratios, strict=True)
    ]


def expected_answers(family, checkpoint, processor, asked, ratios):
    """(token ids, log-probabilities, prompt length) and selection of transformers with hero attached."""
    found, selections = [], []
    model = checkpoint[1]
    for images, ratio in zip(asked, ratios, strict=True):
        with hero.attach(model, processor, keep_ratio=ratio) as handle:
            text = text_of(processor.image_token, len(images))
            inputs = processor(images=list(images), text=text, return_tensors="pt")
            if family == "internvl_chat":  # it resizes crops by Pillow
                own = InternVLImageProcessor(CROP, 1, 12, dynamic_image_size=True, use_thumbnail=True)
                inputs["pixel_values"] = own(list(images))["pixel_values_flat"]
            output = model.generate(
                **inputs, max_new_tokens=4, do_sample=False, output_scores=True, return_dict_in_generate=True
            )
            length = inputs["input_ids"].shape[1]
            tokens = output.sequences[0, length:].tolist()
            scores = [one[0].log_softmax(-1)[token].item() for one, token in zip(output.scores, tokens)]
            found.append((tokens, scores, length))
            selections.append(handle.last)
    return found, selections


def test_answers_and_kept_tokens_are_those_of_transformers(
    family,
    checkpoint,
    hf_processor,
    images,
    engine,  # noqa: F811
):
    """Images of different sizes in one batch; several in a prompt; ratios of requests; videos are whole."""
    more = checkpoint[2]
    one_each = [(image,) for image in images]
    asked = [*one_each, *one_each, *one_each, images[1:4], (images[4], images[0])]
    ratios = [None] * 6 + [0.5] * 6 + [1.0] * 6 + [None, 0.5]
    exact = [0.2 if ratio is None else ratio for ratio in ratios]
    llm = engine({"keep_ratio": 0.2}, **more)
    selections = spied(llm)
    prompts = prompts_of(family, asked, ratios)
    found = answered(llm, prompts)
    expected, own = expected_answers(family, checkpoint, hf_processor, asked, exact)
    assert_same(found, expected)

    # Those of several images in a prompt are in the encoder's cache by then.
    kept = [part.tolist() for one in selections for part in _per_image(one)]
    assert kept == [part.tolist() for one in own[:18] for part in _per_image(one)]
    geometry = own[0].geometry
    counts = [hero.count_tokens(hero.HeroConfig(keep_ratio=0.2), size, geometry=geometry) for size in SIZES]
    assert [len(one) for one in kept[:6]] == counts
    before = len(selections)
    assert_same(answered(llm, prompts[:1]), expected[:1])
    assert len(selections) == before

    video = video_of(family)
    with_video = answered(llm, [video])
    del llm
    stock = engine(**more)
    assert type(model_of(stock)).__module__.startswith("vllm.model_executor.models.")
    assert_same(answered(stock, prompts_of(family, one_each[:4], [None] * 4)), expected[12:16])
    assert_same(with_video, answered(stock, [video]))


def video_of(family):
    """A prompt with a video of four frames."""
    frames = np.stack([np.asarray(tiny_picture(70, 90, seed)) for seed in range(4)])
    data = (frames, {"fps": 1.0, "duration": 4.0, "total_num_frames": 4, "frames_indices": [0, 1, 2, 3]})
    return {
        "prompt": text_of(vllm_families.VIDEO, 1),
        "multi_modal_data": {"video": [data if family == "internvl" else frames]},
    }


def test_two_ranks_keep_the_same_tokens(
    family,
    checkpoint,
    hf_processor,
    images,
    engine,  # noqa: F811
    monkeypatch,
):
    if family == "internvl_chat":
        pytest.skip("its model differs from transformers' format in names alone")
    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")  # to hand the spy to other processes
    more = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    llm = engine({"keep_ratio": 0.2}, **checkpoint[2], **more)
    llm.apply_model(_record)
    asked, ratios = [(image,) for image in images[1:4]], [0.2] * 3
    found = answered(llm, prompts_of(family, asked, [None] * 3))
    expected, own = expected_answers(family, checkpoint, hf_processor, asked, ratios)
    assert_same(found, expected)
    first, second = llm.apply_model(_recorded)
    assert first == second
    assert sum(map(len, first)) == sum(sum(one.lengths) for one in own)


# --- without an engine -----------------------------------------------------------------------------------


def items_of(family, processor, images, **options):
    """What the front end makes of a prompt with images."""
    items = processor.info.parse_mm_data({"image": list(images)})
    text = text_of(vllm_families.IMAGE[family], len(images))
    return processor(text, items, hf_processor_mm_kwargs=options)


def test_budget_and_counts(family, folder):
    """No image has more tokens than the largest; all tokens are as many as vLLM itself counts."""
    info = processor_of(folder, {"keep_ratio": 1}, **arguments_of(family)).info
    few = hero.HeroConfig(keep_ratio=0.3)
    layouts = [info.geometry.layout((h, w)) for h in range(5, 400, 13) for w in range(5, 400, 17)]
    assert max(one.full_tokens for one in layouts) <= largest(info.geometry)
    assert max(one.kept_tokens(few) for one in layouts) <= largest(info.geometry, few)
    if family != "llava_onevision":  # its largest image may be one that no size has
        assert largest(info.geometry) == 13 * 16
    before, after = (
        config_of(folder, options, max_num_batched_tokens=8192, **arguments_of(family)).scheduler_config
        for options in (None, {"keep_ratio": 0.3})
    )
    kept = before.max_num_encoder_input_tokens * largest(info.geometry, few) // largest(info.geometry)
    assert after.max_num_encoder_input_tokens == kept < before.max_num_encoder_input_tokens
    assert [info.get_num_image_tokens(image_height=h, image_width=w) for h, w in SIZES] == [
        info.geometry.layout(size).full_tokens for size in SIZES
    ]


def test_an_image_is_the_same_beside_others(family, folder, images):
    """Counts, crops and hashes of an image do not depend on the images beside it."""
    processor = processor_of(folder, {}, **arguments_of(family))
    together = items_of(family, processor, images)
    for number, image in enumerate(images):
        alone = items_of(family, processor, [image])
        assert alone["mm_hashes"]["image"] == [together["mm_hashes"]["image"][number]]
        one, other = (items["mm_kwargs"]["image"] for items in (alone, together))
        for name, value in one[0].items():
            assert torch.equal(value.data, other[number][name].data), name


def test_options_enter_the_hash(family, folder, images):
    def key(options, **own):
        processor = processor_of(folder, options, **arguments_of(family))
        return items_of(family, processor, images[:1], **own)["mm_hashes"]["image"][0]

    keys = [key(None), key({}), key({"keep_ratio": 0.5}), key({}, hero_keep_ratio=0.5)]
    assert len(set(keys)) == len(keys)
    assert key({}) == key({"keep_ratio": 0.2})


def test_tiles_are_as_the_request_says(family, folder, images):
    """InternVL's number of tiles is an option of its image processor; OneVision's grids are the model's."""
    processor = processor_of(folder, {"keep_ratio": 0.5}, **arguments_of(family))
    if family == "llava_onevision":
        with pytest.raises(ValueError, match=r"^mm_processor_kwargs: expected options that cut an image"):
            items_of(family, processor, images[3:4], crop_size=CROP // 2)
        return
    name = "max_patches" if family == "internvl" else "max_dynamic_patch"
    image, size = images[2], SIZES[2]
    for most in (1, 2, 4):
        if family == "internvl_chat":  # whose video processor, in vLLM itself, refuses the option in requests
            [layout] = processor.info.layouts([size], {name: most})
            assert layout.grid == hero.tiling.NearestAspect(1, most).grid(*size, CROP)
            continue
        items = items_of(family, processor, [image], **{name: most})
        row = items["mm_kwargs"]["image"][0]["hero_images"].data.tolist()
        layout = hero.tiling.NearestAspect(1, most).grid(*size, CROP)
        assert row[2:4] == list(layout)
        [place] = items["mm_placeholders"]["image"]
        count = 8 + 8 * layout[0] * layout[1]
        assert row[6] == count == int(place.is_embed.sum())
    few = config_of(folder, {}, **arguments_of(family), mm_processor_kwargs={name: 2}).model_config
    assert largest(geometry_of(few)) == 3 * 16


def test_refused(family, folder, images):
    own = arguments_of(family)
    processor = processor_of(folder, {}, **own)
    with pytest.raises(ValueError, match=r"^hero: expected an option of the engine"):
        items_of(family, processor, images[:1], hero={"keep_ratio": 0.5})
    with pytest.raises(ValueError, match=r"^hero_policy: expected hero_keep_ratio"):
        items_of(family, processor, images[:1], hero_policy="uniform")
    with pytest.raises(ValueError, match="hf_overrides, hero: cudagraph_mm_encoder: expected False"):
        config_of(folder, {}, compilation_config={"cudagraph_mm_encoder": True}, **own)
    with pytest.raises(ValueError, match=r"hf_overrides, hero: .*\btile_layers\b"):
        config_of(folder, {"tile_layers": [99]}, **own)


@pytest.mark.parametrize(
    ("name", "value"), [("ps_version", "v1"), ("use_thumbnail", False), ("select_layer", 3)]
)
def test_other_models_of_the_own_format_are_refused(name, value, tmp_path):
    vllm_families.write(tmp_path, "internvl_chat")
    config = tmp_path / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), name: value}))
    config_of(tmp_path, **OWN_CODE)
    with pytest.raises(ValueError, match=f"{name} of the model: expected"):
        config_of(tmp_path, {}, **OWN_CODE)
