"""The plug-in for vLLM with InternVL, in both of its formats, and LLaVA-OneVision: small random models.

They give the tokens, log-probabilities and answers of transformers with hero attached.
"""

import pytest

pytest.importorskip("vllm", reason="vLLM: `make test-vllm` brings it")

import numpy as np
import torch
import vllm_families
from independent_families import CROP, PINPOINTS, tiny_picture
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
from hero.vllm.geometry import largest

FAMILIES = ("internvl", "internvl_chat", "llava_onevision")
# (height, width): one crop, several grids; of OneVision padded grids, resized ones, and one without rows.
SIZES = ((50, 50), (120, 90), (60, 170), (230, 270), (280, 160), (10, 400))
OWN_CODE = {"trust_remote_code": True}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def checkpoint(family, tmp_path_factory):
    """Folder, model of transformers and arguments of an engine."""
    folder = tmp_path_factory.mktemp("vllm") / family
    model = vllm_families.write(folder, family)
    chat = {"limit_mm_per_prompt": {"image": 4}, **OWN_CODE} if family == "internvl_chat" else {}
    return folder, model, {"limit_mm_per_prompt": {"image": 4, "video": 1}, **chat}


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
    family, checkpoint, hf_processor, images, engine  # noqa: F811
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

    video = None if family == "internvl_chat" else video_of(family)
    with_video = None if video is None else answered(llm, [video])
    del llm
    stock = engine(**more)
    assert type(model_of(stock)).__module__.startswith("vllm.model_executor.models.")
    assert_same(answered(stock, prompts_of(family, one_each[:4], [None] * 4)), expected[12:16])
    if video is not None:
        assert_same(with_video, answered(stock, [video]))


def video_of(family):
    """A prompt with a video of four frames."""
    frames = np.stack([np.asarray(tiny_picture(70, 90, seed)) for seed in range(4)])
    data = (frames, {"fps": 1.0, "duration": 4.0, "total_num_frames": 4, "frames_indices": [0, 1, 2, 3]})
    return {
        "prompt": text_of(vllm_families.VIDEO, 1),
        "multi_modal_data": {"video": [frames if family == "llava_onevision" else data]},
    }
