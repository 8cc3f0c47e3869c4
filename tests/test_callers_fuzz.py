"""Callers of an attached model, drawn at random, against the reference and the stock model.

A draw is a caller: a model, changed in some way before hero is attached, prompts, and calls. It gets what the
stock model answers for the tokens that the reference keeps, and leaves no trace. ``check(seed)`` repeats one.
"""

import copy
import functools
import importlib.util
import io
import random
from collections import Counter
from itertools import chain
from types import SimpleNamespace

import pytest
import torch
from independent import CACHE, Independent, tiny_clip, tiny_image, tiny_model, tiny_processor, tiny_tokenizer
from independent_policies import IndependentPeers, PeerRule
from test_llava_next import LAYERS, _old_transformers, embeddings, rule_of, snapshot
from transformers.cache_utils import DynamicCache

import hero

DRAWS, FAST, CHUNK = 500, 25, 5
FORMS = {"one image": [1], "two images": [2], "two sizes": [1, 1], "adjacent images": [2, 1]}
FORMS |= {"no image in the first": [0, 1], "no image in the second": [1, 0]}  # images in each row
DECODINGS = {
    "greedy": {},
    "beams": {"num_beams": 2},
    "beams, 2 sequences": {"num_beams": 2, "num_return_sequences": 2},
    "sampling": {"do_sample": True, "temperature": 1.5},
    "sampling, 2 sequences": {"do_sample": True, "num_return_sequences": 2},
    "prompt lookup": {"prompt_lookup_num_tokens": 2},
    "static cache": {"cache_implementation": "static"},
}
TURNS = {"none": [], "text": [0], "image": [1], "image, text": [1, 0]}  # later ones: images in each row
PATHS = ("model(...)", "model.forward(...)", "model.model(...)", "generate")
NEEDS = {"lora": "peft", "offloaded": "accelerate", "tower offloaded": "accelerate"}
ORDERS = ("as it is", "saved", "copied before", "copied after", "hooked", "hidden states before", "twice")
ORDERS += tuple(name for name, package in NEEDS.items() if importlib.util.find_spec(package))
MODES = {"inference": torch.inference_mode, "no grad": torch.no_grad, "grad": torch.enable_grad}


class EqualShares(Independent):
    def tile_shares(self, rule, layout, scores, cls, text_embedding, image_embeddings):
        return [1.0 / (layout.crops - 1)] * (layout.crops - 1)


REFERENCES = {"hero": Independent, "uniform": EqualShares, "fastervlm": IndependentPeers}


def draw_of(seed: int) -> SimpleNamespace:
    """The draw of a seed. What stock transformers or the reference cannot do is not drawn."""
    rng = random.Random(seed)
    one = rng.choice
    draw = SimpleNamespace(seed=seed, form=one(list(FORMS)), order=one(ORDERS))
    rows = FORMS[draw.form]
    draw.processor = one(("patched", "stock"))
    draw.keep_ratio = one((1.0, 0.5, 0.3, 0.2, 0.05))
    draw.allocation = one(("exact", "floor"))
    draw.policy = one(("hero", "hero", "uniform", "fastervlm"))
    # Weights that are offloaded, or no longer CLIP's, are not shared.
    draw.relevance = one(("none", "second pass", "second pass" if draw.order in NEEDS else "shared"))
    draw.dtype = one((torch.float32, torch.float32, torch.float32, torch.bfloat16))
    # Of a model that is offloaded as a whole, stock generate fails.
    draw.path = one(PATHS[:3] if draw.order == "offloaded" else (*PATHS, "generate", "generate"))
    generates = draw.path == "generate"
    draw.cache = one((True, True, False))
    draw.turn = one(list(TURNS)) if draw.cache else "none"
    if len(rows) > 1 and not generates and (draw.processor, draw.allocation) != ("patched", "exact"):
        draw.turn = "none"  # the caller cannot know the padding of prompts that were shortened
    draw.sizes = one((True, False))  # whether a turn of text comes with the sizes of the images before
    draw.side = "left" if generates or draw.cache else one(("left", "right"))
    draw.multiple = one((None, None, 8)) if draw.turn == "none" else None  # of the length of prompts
    draw.mask = one((True, True, False))  # whether it is given
    draw.positions = not generates and (one((True, False)) or (len(rows) > 1 and draw.turn != "none"))
    draw.labels = one(("none", "text", "all")) if draw.path in PATHS[:2] else "none"
    decodings = set(DECODINGS) if generates else {"greedy"}
    decodings -= {"prompt lookup"} if len(rows) > 1 else set()
    decodings -= {"static cache"} if draw.cache else set()
    if draw.turn != "none":
        decodings &= {"greedy", "sampling", "prompt lookup"}
    if max(rows) > 1 and _old_transformers():
        decodings -= {"beams", "beams, 2 sequences", "sampling, 2 sequences"}
    draw.decoding = one(sorted(decodings))
    draw.earlier = one(("none", "none", *MODES))  # the mode of a call before
    draw.mode = one(list(MODES))
    return draw


# --- prompts and models ----------------------------------------------------------------------------------


class Turn:
    """A turn of each row: pieces of text around its images."""

    def __init__(self, rng: random.Random, counts: list[int], adjacent: bool = False):
        self.rows, self.images = [], []
        for count in counts:
            pieces = [rng.randint(0, 4) * (not adjacent) for _ in range(count)] + [rng.randint(1, 5)]
            self.rows.append([" ".join(f"w{rng.randrange(60)}" for _ in range(words)) for words in pieces])
            sizes = [(rng.randint(24, 200), rng.randint(24, 200)) for _ in range(count)]
            self.images.append([tiny_image(*size, rng.randrange(99)) for size in sizes])
        texts = [" ".join(" ".join(pieces).split()) for pieces in self.rows]
        self.questions = [[text] * count for text, count in zip(texts, counts, strict=True)]  # of each image

    def processed(self, processor, draw, **kwargs):
        processor.tokenizer.padding_side = draw.side
        texts = [f"USER : {' <image> '.join(pieces)} ASSISTANT :" for pieces in self.rows]
        images = list(chain(*self.images)) or None
        return processor(images=images, text=texts, padding=True, return_tensors="pt", **kwargs).to(
            draw.dtype
        )


def labels_of(draw, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    labels = ids.masked_fill((mask == 0) | ((ids == 4) & (draw.labels != "all")), -100)
    labels[torch.arange(len(ids)), mask.long().argmax(1)] = -100  # nothing stands before it
    return labels


def changed(draw, pixels: torch.Tensor):
    """(model to attach to, what is called, stock model of the same weights, calls of a hooked module)."""
    model = tiny_model().to(draw.dtype)
    called, stock, fired = model, model, []
    if draw.order == "saved":
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        called = model = torch.load(file, weights_only=False)
    elif draw.order == "copied before":
        called = model = copy.deepcopy(model)
    elif draw.order == "lora":
        import peft

        options = {"target_modules": ["q_proj", "v_proj", "linear_1"], "init_lora_weights": False}
        with torch.random.fork_rng():
            torch.manual_seed(draw.seed)
            called = peft.get_peft_model(model, peft.LoraConfig(r=2, lora_alpha=1, **options)).eval()
        model, stock = called.get_base_model(), copy.deepcopy(called).merge_and_unload()
    elif draw.order in NEEDS:
        import accelerate

        stock = copy.deepcopy(model)
        part = model if draw.order == "offloaded" else model.model.vision_tower
        accelerate.cpu_offload(part, execution_device=torch.device("cpu"))
    elif draw.order == "hooked":
        modules = [module for name, module in model.model.vision_tower.named_modules() if "layers." in name]
        random.Random(draw.seed).choice(modules).register_forward_hook(lambda *call: fired.append(1))
    elif draw.order == "hidden states before":
        with torch.no_grad():
            model.model.vision_tower(pixels.flatten(0, 1), output_hidden_states=True)
    return model, called, stock, fired


@functools.cache
def plain_reference(policy: str, dtype: torch.dtype) -> Independent:
    return REFERENCES[policy](tiny_model().to(dtype))


# --- a draw ----------------------------------------------------------------------------------------------


def check(seed: int) -> None:
    draw = draw_of(seed)
    try:
        run(draw)
    except Exception as error:
        raise AssertionError(f"check({seed}): {vars(draw)}") from error


def run(draw) -> None:
    rng, counts = random.Random(f"{draw.seed} prompts"), FORMS[draw.form]
    first = Turn(rng, counts, draw.form == "adjacent images")
    turns = [first, *(Turn(rng, [images] * len(counts)) for images in TURNS[draw.turn])]
    full = first.processed(tiny_processor(), draw)
    model, called, stock, fired = changed(draw, full["pixel_values"])
    reference = plain_reference(draw.policy, draw.dtype)
    if draw.order == "lora":
        reference = REFERENCES[draw.policy](stock)
    reference.model.generation_config = copy.deepcopy(model.generation_config)
    clip = None if draw.relevance == "none" else tiny_clip()
    if draw.relevance == "shared":
        clip.vision_model.load_state_dict(stock.model.vision_tower.state_dict())
    relevance = clip and hero.ClipRelevance(clip, tiny_tokenizer(), second_pass=True)
    with torch.no_grad():
        before = called(**full).logits
    state = {} if draw.order in ("offloaded", "tower offloaded") else snapshot(model)
    processor = tiny_processor()
    layers = {} if draw.policy == "fastervlm" else LAYERS
    config = hero.HeroConfig(draw.keep_ratio, policy=draw.policy, allocation=draw.allocation, **layers)
    given = (model, processor) if draw.processor == "patched" else (model,)
    if draw.order == "twice":
        hero.attach(*given, keep_ratio=0.4).remove()
    handle = hero.attach(*given, config=config, relevance=relevance, tokenizer=processor.tokenizer)
    users = copy.deepcopy(called) if draw.order == "copied after" else called
    own = users._hero if draw.order == "copied after" else handle
    fired.clear()
    Caller(draw, own, users, processor, reference, clip).converse(turns)
    assert fired or draw.order != "hooked"
    own.remove()
    handle.remove()
    with torch.no_grad():
        assert torch.equal(called(**full).logits, before) and torch.equal(users(**full).logits, before)
    assert torch.equal(first.processed(processor, draw)["input_ids"], full["input_ids"])
    model.__dict__.pop("_previous_max_cache_length", None)  # of a stock static cache
    assert not state or snapshot(model) == state


class Caller:
    def __init__(self, draw, handle, model, processor, reference, clip):
        self.draw, self.handle, self.model, self.processor = draw, handle, model, processor
        self.reference, self.clip = reference, clip
        self.exact, self.same = draw.dtype == torch.float32, True
        self.tolerance = 1e-5 if self.exact else 0.1

    def converse(self, turns: list[Turn]) -> None:
        draw, answers = self.draw, []
        ids = mask = held = None
        options = {CACHE: DynamicCache()} if draw.cache else {}
        for number, turn in enumerate(turns):
            inputs = turn.processed(self.processor, draw, pad_to_multiple_of=draw.multiple)
            wanted = self.wanted(turns[: number + 1], answers)
            if number == 0 and draw.earlier != "none":
                with MODES[draw.earlier]():
                    self.model(**inputs)
            if number:
                mask = torch.cat([mask, inputs["attention_mask"]], dim=1)
                inputs["attention_mask"] = mask
                if draw.path == "generate":
                    inputs["input_ids"] = torch.cat([ids, inputs["input_ids"]], dim=1)
                if "pixel_values" not in inputs and draw.sizes:
                    inputs["image_sizes"] = wanted["image_sizes"]
            ids, mask = inputs["input_ids"], inputs["attention_mask"]
            with MODES[draw.mode]():
                answer = self.call({**inputs, **options}, wanted, held)
            held = wanted["lengths"]
            if answer is not None and draw.turn != "none":
                answers.append(answer.tolist())
                ids, mask = torch.cat([ids, answer], 1), torch.cat([mask, torch.ones_like(answer)], 1)
            elif draw.cache and len(ids) == 1:  # as many as were kept
                mask = mask.new_ones(1, options[CACHE].get_seq_length())

    def wanted(self, turns: list[Turn], answers: list[list[list[int]]]) -> dict:
        """What the reference keeps of the whole conversation; ``answers`` to each row, turn by turn."""
        draw, processor, found = self.draw, tiny_processor(), ()
        rows = [[] for _ in turns[0].rows]
        for number, turn in enumerate(turns):
            stock = turn.processed(processor, draw)
            for b, ids in enumerate(stock["input_ids"]):
                rows[b] += ids[stock["attention_mask"][b].bool()].tolist()
                rows[b] += answers[number][b] if number < len(answers) else []
        inputs = processor.tokenizer.pad({"input_ids": rows}, return_tensors="pt", padding_side=draw.side)
        images = list(chain(*chain(*zip(*(turn.images for turn in turns), strict=True))))
        questions = list(chain(*chain(*zip(*(turn.questions for turn in turns), strict=True))))
        inputs |= processor.image_processor(images, return_tensors="pt").to(draw.dtype)
        inputs["labels"] = labels_of(draw, inputs["input_ids"], inputs["attention_mask"])
        options = {"keep_ratio": draw.keep_ratio, "allocation": draw.allocation}
        if draw.policy == "fastervlm":
            rule = PeerRule("fastervlm", str(draw.keep_ratio), allocation=draw.allocation)
        elif draw.policy == "hero" and self.clip is not None:
            rule = rule_of({**options, "weights": {"density": 0.2, "saliency": 0.4, "relevance": 0.4}})
            layouts = [self.reference.layout(size) for size in inputs["image_sizes"]]
            crops = torch.stack(self.reference.crop_list(inputs["pixel_values"], layouts)).float()
            found = embeddings(self.clip, tiny_tokenizer(), None, crops, questions)
        else:
            rule = rule_of(options)
        return {**self.reference.inputs(inputs, rule, *found), "image_sizes": inputs["image_sizes"]}

    def call(self, inputs: dict, wanted: dict, held: list[int] | None) -> torch.Tensor | None:
        """Call and check; the answer, if there is one. ``held``: tokens of each row in the cache."""
        draw, ids, mask = self.draw, inputs["input_ids"], inputs["attention_mask"]
        given = {name: wanted[name] for name in ("inputs_embeds", "attention_mask")}
        if not draw.mask and (draw.path == "generate" or bool(mask.all())):  # generate infers it from padding
            del inputs["attention_mask"]
        if draw.path == "generate":
            options = {"max_new_tokens": 3, "suppress_tokens": [1, 4], "do_sample": False}
            options |= DECODINGS[draw.decoding]
            if held is not None:  # stock prompt lookup reads the whole prompt again, beside the cache
                options.pop("prompt_lookup_num_tokens", None)
            torch.manual_seed(0)
            output = self.model.generate(**inputs, **options)
            options.pop("prompt_lookup_num_tokens", None)  # greedy as well
            torch.manual_seed(0)
            expected = self.reference.model.generate(**given, **options)
            prompts = ids.repeat_interleave(len(output) // len(ids), 0)
            assert torch.equal(output[:, : ids.shape[1]], prompts)
            answer = output[:, ids.shape[1] :]
            self.check_selection(wanted, held)
            assert answer.shape == expected.shape
            assert not self.exact or answer.tolist() == expected.tolist()
            return answer
        if draw.positions:
            inputs["position_ids"] = (mask.cumsum(1) - 1).clamp_min(0)[:, -ids.shape[1] :]
        if draw.labels != "none" and held is None:
            inputs["labels"] = labels_of(draw, ids, mask)
        head = torch.nn.Identity()
        model = self.model if draw.path != "model.forward(...)" else self.model.forward
        if draw.path == "model.model(...)":
            model, head = self.handle.model.model, self.reference.model.lm_head
        output = model(**inputs)
        logits = head(getattr(output, "logits", output[0])).detach()
        with torch.no_grad():
            expected = self.reference.model(**given, labels=wanted["labels"])
        self.check_selection(wanted, held)
        assert logits.isfinite().all()
        assert draw.multiple or held or not self.same or logits.shape[1] == max(wanted["lengths"])
        for b, ours in enumerate(logits if self.same else ()):
            new = expected.logits[b, given["attention_mask"][b].bool()][0 if held is None else held[b] :]
            ours = ours[-len(new) :] if draw.side == "left" else ours[: len(new)]
            torch.testing.assert_close(ours, new, rtol=0, atol=self.tolerance)
        if "labels" in inputs and self.same:
            assert output.loss.item() == pytest.approx(expected.loss.item(), abs=self.tolerance)
        if "labels" in inputs and draw.mode == "grad":
            output.loss.backward()
        return None

    def check_selection(self, wanted: dict, held: list[int] | None) -> None:
        """In half precision a few patches may differ, and then logits do."""
        kept = self.handle.last.index.tolist()
        if _old_transformers() and {"num_beams", "num_return_sequences"} & set(DECODINGS[self.draw.decoding]):
            return  # which encodes images once for each of them
        if held is not None:
            self.same &= self.exact or self.draw.turn == "text"
            return
        index = [place for result in wanted["results"] for place in result.index]
        self.same = kept == index
        assert self.same or (not self.exact and len(set(index) - set(kept)) <= max(2, len(index) // 10))
        budgets = [budget for result in wanted["results"] for budget in result.budgets]
        assert not self.exact or self.handle.last.budgets.tolist() == budgets


SEEDS = [pytest.param(n, marks=[pytest.mark.slow] if n >= FAST else []) for n in range(0, DRAWS, CHUNK)]


@pytest.mark.parametrize("begin", SEEDS)
def test_callers(begin):
    for seed in range(begin, begin + CHUNK):
        check(seed)


def test_every_choice_is_drawn():
    draws = [vars(draw_of(seed)) for seed in range(DRAWS)]
    for name in set(draws[0]) - {"seed"}:
        counts = Counter(draw[name] for draw in draws)
        assert len(counts) > 1 and min(counts.values()) >= 5, (name, counts)
    assert {draw["order"] for draw in draws} == set(ORDERS)
    assert {draw["decoding"] for draw in draws} == set(DECODINGS)
