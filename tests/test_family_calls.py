"""Calls of the families beside LLaVA-NeXT: options, pipelines, what is refused, and quantised weights."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from independent import CACHE, CHAT_TEMPLATE, CROP, tiny_image
from independent_families import PAIR, TWO, batch_of, independent_of, tiny_model, tiny_picture
from test_families import RUN_PER_CROP as IDEFICS
from test_families import model_of, prompt_of, reference_of
from test_families import processor_or_skip as processor_of
from test_llava_next import assert_rows_equal, config_of, rule_of
from transformers import pipeline
from transformers.cache_utils import DynamicCache

import hero
from hero import calls

OURS = ("internvl", "llava_onevision", *IDEFICS)
SLOW = pytest.mark.slow


# ------------------------------------------------------------------------------------------- options

OPTIONS = [
    *(("internvl", given) for given in ({"max_patches": 4}, {"crop_to_patches": False}, {"min_patches": 4})),
    *(
        (family, given)
        for family in IDEFICS
        for given in ({"do_image_splitting": False}, {"size": {"longest_edge": 2 * CROP}})
    ),
]


@pytest.mark.parametrize(("family", "options"), OPTIONS)
def test_options_of_a_call(family, options):
    """Of the image processor. The stock prompt with the same options is shortened to the same."""
    model, reference, sizes = model_of(family), reference_of(family), ((120, 100), (60, 170))
    images = [tiny_picture(*size, seed) for seed, size in enumerate(sizes)]
    stock, processor = processor_of(family), processor_of(family)
    given = prompt_of(family, stock, PAIR, *images, **options)
    assert given["pixel_values"].shape != prompt_of(family, stock, PAIR, *images)["pixel_values"].shape
    rule = rule_of({"keep_ratio": 0.3})
    _, results, _ = reference._rows(given, rule, None, None)
    logits = reference.logits(given, rule)
    with hero.attach(model, processor, config=config_of({"keep_ratio": 0.3})) as handle, torch.no_grad():
        written = prompt_of(family, processor, PAIR, *images, **options)
        kept = sum(len(result.index) for result in results)
        assert int((written["input_ids"] == handle.image_token_id).sum()) == kept
        for inputs in (written, given):
            output = model(**inputs).logits
            assert handle.last.index.tolist() == [place for result in results for place in result.index]
            assert_rows_equal(output, logits, 5e-5)
    with hero.attach(model, tokenizer=stock.tokenizer, config=config_of({"keep_ratio": 0.3})):
        assert_rows_equal(model(**given).logits.detach(), logits, 5e-5)


@pytest.mark.parametrize(
    ("keep", "options"),
    [
        *((keep, {"max_patches": 4}) for keep in ({"keep_tokens": 15}, {"keep_ratio": 0.05})),
        *(({"policy": "hired"}, options) for family, options in OPTIONS if family == "internvl"),
        ({"policy": "globalcom2"}, {"max_patches": 4}),
    ],
    ids=str,
)
def test_internvl_cut_otherwise_than_attached(keep, options):
    """The model is told the grids of the call, where runs of placeholders do not tell them."""
    model, processor = model_of("internvl"), processor_of("internvl")
    images = [tiny_picture(*size, seed) for seed, size in enumerate(((120, 100), (60, 170), (112, 168)))]
    text = TWO.replace("<image>", "<image> <image> <image>")
    with hero.attach(model, processor, **keep) as handle, torch.no_grad():
        otherwise = prompt_of("internvl", processor, text, *images, **options)
        first = model(**otherwise).logits
        layouts = handle.last.layout
        assert [one.image_size for one in layouts] == [image.size[::-1] for image in images]
    for name, value in options.items():
        setattr(processor.image_processor, name, value)
    options = {} if options.get("crop_to_patches", True) else options  # the processor's default wins
    with hero.attach(model, processor, **keep) as handle, torch.no_grad():
        assert torch.equal(model(**prompt_of("internvl", processor, text, *images, **options)).logits, first)
        assert handle.last.layout == layouts


@pytest.mark.parametrize("family", OURS)
def test_kinds_of_images(family):
    """Files, arrays and tensors are counted as pictures are."""
    picture, processor = tiny_picture(120, 90), processor_of(family)
    pixels = np.array(picture)
    kinds = [picture, pixels, pixels.transpose(2, 0, 1), torch.tensor(pixels).permute(2, 0, 1)]
    with hero.attach(model_of(family), processor, keep_ratio=0.3):
        wanted, *others = [prompt_of(family, processor, TWO, image)["input_ids"] for image in kinds]
    assert all(torch.equal(one, wanted) for one in others)


def test_internvl_with_less_than_a_token_a_tile():
    """5 tiles have as many tokens as 6 then: the attached processor tells the size."""
    model, processor = model_of("internvl"), processor_of("internvl")
    images = tiny_image(112, 168), tiny_image(60, 170, 1)
    given = prompt_of("internvl", processor, PAIR, *images)
    reference, rule = reference_of("internvl"), rule_of({"keep_ratio": 0.05})
    logits = reference.logits(given, rule)
    with hero.attach(model, processor, config=config_of({"keep_ratio": 0.05})) as handle, torch.no_grad():
        own = prompt_of("internvl", processor, PAIR, *images)
        assert sum(handle.count_tokens(image.size[::-1]) for image in images) < 14
        assert_rows_equal(model(**own).logits, logits, 5e-5)
    with hero.attach(model, config=config_of({"keep_ratio": 0.05})), torch.no_grad():
        assert_rows_equal(model(**given).logits, logits, 5e-5)  # runs of the stock length tell it too
        del own["image_sizes"]
        for call in (model, model.generate):
            with pytest.raises(
                ValueError,
                match=r"^processor: expected one with hero attached, or a keep ratio of at least 0.0625",
            ):
                call(**own)


@pytest.mark.parametrize("family", OURS)
def test_a_prefill_in_chunks(family):
    model, processor = model_of(family), processor_of(family)
    options = {"max_new_tokens": 4, "do_sample": False}
    with hero.attach(model, processor, keep_ratio=0.3):
        inputs = prompt_of(family, processor, TWO, tiny_image(120, 90))
        whole = model.generate(**inputs, **options)
        options["prefill_chunk_size"] = 7
        if calls._transformers_version() < (5, 23):
            with pytest.raises(ValueError, match=r"^prefill_chunk_size: expected None for images with"):
                model.generate(**inputs, **options)
        else:
            assert torch.equal(model.generate(**inputs, **options), whole)


# ------------------------------------------------------------------------ chat template and pipeline


@pytest.mark.parametrize("family", OURS)
def test_chat_template_and_pipeline(family):
    model, processor, image = model_of(family), processor_of(family), tiny_picture(120, 90)
    if family == "smolvlm":  # of which the template's method reads defaults, and which wants torchvision
        processor.video_processor = SimpleNamespace(num_frames=1, fps=1, size={}, video_sampling={})
    processor.chat_template = CHAT_TEMPLATE.replace("<image>", processor.image_token)
    words = {"type": "text", "text": "what is this ?"}
    chat = [{"role": "user", "content": [{"type": "image", "image": image}, words]}]
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
    reference, rule = reference_of(family), rule_of({"keep_ratio": 0.3})
    wanted = reference.greedy(processor.apply_chat_template(chat, **options), rule, 5)
    with hero.attach(model, processor, config=config_of({"keep_ratio": 0.3})) as handle:
        inputs = processor.apply_chat_template(chat, **options)
        assert int((inputs["input_ids"] == handle.image_token_id).sum()) == handle.count_tokens((120, 90))
        output = model.generate(**inputs, max_new_tokens=5, do_sample=False)
        assert output[:, inputs["input_ids"].shape[1] :].tolist() == wanted
        answer = pipeline("image-text-to-text", model=model, processor=processor)(
            text=chat, max_new_tokens=5, return_full_text=False, do_sample=False
        )
        assert handle.last.lengths == [handle.count_tokens((120, 90))]
    text = processor.tokenizer.decode(wanted[0], skip_special_tokens=True)
    assert answer[0]["generated_text"].split() == text.split()


# ------------------------------------------------------------------------------------------ refusals

READ = ("internvl", *IDEFICS)
"""Families of which only the prompt tells the crops of an image."""


@pytest.mark.parametrize("family", READ)
def test_calls_without_the_prompt_are_refused(family):
    model, processor = model_of(family), processor_of(family)
    with hero.attach(model, processor, keep_ratio=0.3), torch.no_grad():
        inputs = prompt_of(family, processor, TWO, tiny_image(60, 170))
        for owner in (model, model.model):
            with pytest.raises(ValueError, match=r"^pixel_values: expected a call of generate or forward"):
                owner.get_image_features(inputs["pixel_values"])
        embedded = dict(inputs)
        embedded["inputs_embeds"] = model.get_input_embeddings()(embedded.pop("input_ids"))
        for call in (model, model.generate):
            with pytest.raises(ValueError, match=r"^input_ids: expected the prompt, which tells which crops"):
                call(**embedded)
        encoded = {name: value for name, value in inputs.items() if "pixel" not in name}
        encoded["mm_encoder_outputs"] = {"image": type("Output", (), {"pooler_output": [torch.zeros(5, 64)]})}
        with pytest.raises(ValueError, match=r"^mm_encoder_outputs: expected None: pixel_values, from which"):
            model(**encoded)


@pytest.mark.parametrize("family", IDEFICS)
def test_separators_need_a_tokenizer(family):
    with pytest.raises(ValueError, match=r"^tokenizer: expected the language model's tokenizer"):
        hero.attach(model_of(family), keep_ratio=0.3)


@pytest.mark.parametrize("family", ["internvl", "smolvlm"])
def test_videos_are_refused(family):
    """Their frames come as images and would be thinned."""
    processor = processor_of(family)
    text = [TWO.replace("<image>", processor.video_token)]
    videos = [[np.zeros((2, 30, 30, 3), dtype=np.uint8)]]
    with (
        hero.attach(model_of(family), processor, keep_ratio=0.3),
        pytest.raises(ValueError, match=r"^videos: expected None with hero attached to"),
    ):
        processor(text=text, videos=videos, return_tensors="pt")


@pytest.mark.parametrize("other", [*OURS, "llava", "llava_next"])
@pytest.mark.parametrize("family", OURS)
def test_the_processor_of_another_family_is_refused(family, other):
    if family == other or {family, other} == set(IDEFICS):
        return
    with pytest.raises(TypeError, match=r"^processor: expected an? .*Processor.*, got "):
        hero.attach(model_of(family), processor_of(other))


SETTINGS = {
    "internvl": {"image_seq_length": 9, "size": {"height": 28, "width": 28}},
    "llava_onevision": {
        "num_image_tokens": 9,
        "size": {"height": 28, "width": 28},
        "vision_aspect_ratio": "anyres_max_4",
        "image_grid_pinpoints": [[CROP, 2 * CROP]],
        "vision_feature_select_strategy": "default",
    },
    "smolvlm": {"image_seq_len": 9, "max_image_size": {"longest_edge": 28}},
    "idefics3": {"image_seq_len": 9, "max_image_size": {"longest_edge": 28}},
}


@pytest.mark.parametrize(("family", "name"), [(family, name) for family in OURS for name in SETTINGS[family]])
def test_a_processor_with_other_settings_is_refused(family, name):
    processor, value = processor_of(family), SETTINGS[family][name]
    owner = processor if hasattr(processor, name) else processor.image_processor
    setattr(owner, name, value)
    with pytest.raises(ValueError, match=rf"^{name} of the processor: expected "):
        hero.attach(model_of(family), processor)


@pytest.mark.parametrize("family", OURS)
def test_a_foreign_class_of_the_same_name_is_refused(family):
    foreign = type(type(model_of(family)).__name__, (torch.nn.Module,), {})()
    with pytest.raises(ValueError, match=r"^model: expected a supported model \("):
        hero.attach(foreign)


@pytest.mark.parametrize("version", [(5, 17), (5, 18), (5, 19)])
@pytest.mark.parametrize("case", ["one image", "two images in a prompt", "one crop"])
@pytest.mark.parametrize("family", OURS)
def test_beams_that_older_transformers_mix_up(family, case, version, monkeypatch):
    if case == "one crop" and family != "internvl":
        return
    monkeypatch.setattr(calls, "_transformers_version", lambda: version)
    wrong = version == (5, 18) if family in IDEFICS else version < (5, 19)
    if case == "one crop" or (family == "llava_onevision" and case == "one image"):
        wrong = False
    model, processor = model_of(family), processor_of(family)
    options = {"max_new_tokens": 2, "do_sample": False}
    with hero.attach(model, processor, keep_ratio=0.3):
        inputs = batch_of(processor, family, case)
        model.generate(**inputs, **options)
        for more in ({"num_beams": 2}, {"num_return_sequences": 2, "do_sample": True}):
            if wrong:
                with pytest.raises(ValueError, match=r"^num_beams, num_return_sequences: expected 1 for"):
                    model.generate(**inputs, **{**options, **more})
            elif version == (5, 19):
                model.generate(**inputs, **{**options, **more})


# --------------------------------------------------------------------------------- quantised weights


@SLOW
@pytest.mark.parametrize("family", ["llava_next", "internvl"])
def test_quantised_weights(family):
    """With torchao's int8 weights, everything kept is the quantised stock model, and 0.3 its reference."""
    quantization = pytest.importorskip("torchao.quantization")
    model = tiny_model(family=family)
    for part in (model.model.vision_tower, model.model.language_model):
        quantization.quantize_(part, quantization.Int8WeightOnlyConfig())
    processor, full = processor_of(family), tiny_model(family=family)
    inputs = batch_of(processor, family, "two sizes")
    options = {"max_new_tokens": 4, "do_sample": False}
    with torch.no_grad():
        stock, answer = model(**inputs).logits, model.generate(**inputs, **options)
        assert not torch.equal(stock, full(**inputs).logits)
        with hero.attach(model, keep_ratio=1.0):
            torch.testing.assert_close(model(**inputs).logits, stock, rtol=0, atol=1e-6)
            assert torch.equal(model.generate(**inputs, **options), answer)
    reference, rule = independent_of(model), rule_of({"keep_ratio": 0.3})
    rows, results, _ = reference._rows(inputs, rule, None, None)
    logits = [reference._forward(row.embeds) for row in rows]
    with hero.attach(model, config=config_of({"keep_ratio": 0.3})) as handle, torch.no_grad():
        output = model(**inputs).logits
        answer = model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]
    assert handle.last.index.tolist() == [place for result in results for place in result.index]
    assert_rows_equal(output, logits, 5e-5)
    assert answer.tolist() == reference.greedy(inputs, rule, 4)


def test_a_video_beside_an_image():
    """LLaVA-OneVision keeps videos whole: their placeholders are others."""
    model, processor = model_of("llava_onevision"), processor_of("llava_onevision")
    frames = torch.randn(1, 3, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    video = torch.full((1, 3 * 4 + 1), model.config.video_token_id)  # 2 × 2 tokens a frame, and a newline

    def asked() -> dict:
        inputs = prompt_of("llava_onevision", processor, TWO, tiny_image(60, 170))
        ids = torch.cat([inputs["input_ids"], video], dim=1)
        return {
            **inputs,
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "pixel_values_videos": frames,
        }

    with torch.no_grad():
        stock = model(**asked()).logits
        with hero.attach(model, processor, keep_ratio=1.0):
            assert torch.equal(model(**asked()).logits, stock)
        with hero.attach(model, processor, keep_ratio=0.3) as handle:
            inputs = asked()
            kept = int((inputs["input_ids"] == handle.image_token_id).sum())
            assert model(**inputs).logits.shape[1] == inputs["input_ids"].shape[1] < stock.shape[1]
            assert handle.last.lengths == [kept]


@pytest.mark.parametrize("family", IDEFICS)
def test_crops_that_the_prompt_does_not_show_are_refused(family):
    """Such as all images of a conversation beside a cache, a cut prompt, padding first, or a hidden crop."""
    model, processor = model_of(family), processor_of(family)
    one, two = tiny_image(60, 170), tiny_image(120, 90, 1)
    first, both = (prompt_of(family, processor, *given) for given in ((TWO, one), (PAIR, one, two)))
    pixels, mask = first["pixel_values"], first["pixel_attention_mask"]
    none = {"pixel_attention_mask": None}
    padded = torch.cat([torch.zeros_like(pixels[:, :1]), pixels], dim=1)
    hidden, part = mask.clone(), mask.clone()
    hidden[:, 0], part[:, 0, 0] = 0, 0
    wrong = [
        {name: both[name] for name in ("pixel_values", "pixel_attention_mask")},
        {"pixel_values": both["pixel_values"], **none},
        {"pixel_values": padded, **none},
        {"pixel_values": pixels[:, 1:], "pixel_attention_mask": mask[:, 1:]},
        {"pixel_values": pixels[0], **none},
        {"pixel_values": torch.cat([pixels, pixels]), **none},
        {"pixel_attention_mask": hidden},
        {"pixel_attention_mask": part},
    ]
    with hero.attach(model, tokenizer=processor.tokenizer, keep_ratio=0.3), torch.no_grad():
        for change in wrong:
            for call in (model, model.generate):
                with pytest.raises(ValueError, match=r"^pixel_values"):
                    call(**{**first, **change})
        cache = DynamicCache()
        answer = model.generate(**first, max_new_tokens=2, **{CACHE: cache})
        words = torch.cat([answer, prompt_of(family, processor, TWO, two)["input_ids"]], dim=1)
        again = {**both, "input_ids": words, "attention_mask": torch.ones_like(words)}
        with pytest.raises(ValueError, match=r"^pixel_values"):
            model.generate(**again, max_new_tokens=2, **{CACHE: cache})
        ids = torch.cat([first["input_ids"], torch.full((1, 1), model.config.image_token_id)], dim=1)
        with pytest.raises(ValueError, match=r"^input_ids: expected .* in the runs of images"):
            model(**{**first, "input_ids": ids, "attention_mask": torch.ones_like(ids)})


def test_internvl_refuses_sizes_of_other_images():
    model, processor = model_of("internvl"), processor_of("internvl")
    with hero.attach(model, processor, keep_ratio=0.3), torch.no_grad():
        inputs = prompt_of("internvl", processor, PAIR, tiny_image(60, 170), tiny_image(120, 90, 1))
        sizes = inputs["image_sizes"]
        for change in (
            {"image_sizes": sizes[:1]},
            {"image_sizes": [(56, 56), (56, 56)]},
            {"image_grids": [[3, 2], [3, 4]]},
            {"image_grids": [[1, 3]]},
            {"pixel_values": inputs["pixel_values"].tolist()},
        ):
            with pytest.raises((TypeError, ValueError), match=rf"^{'|'.join(change)}|^image_sizes"):
                model(**{**inputs, **change})
