"""CUDA graphs of the vision stage. Without a GPU, a stand-in runs the step again into the same memory."""

import contextlib
import copy
import dataclasses
import pickle
import threading

import pytest
import torch
from independent import tiny_clip, tiny_image, tiny_model, tiny_processor, tiny_tokenizer
from test_launches import BATCHES, ONE, encoder_of, pixels, tower

import hero
from hero.cuda_graphs import LIMIT, CudaGraphs

GPU = pytest.param("cuda", marks=pytest.mark.gpu)
DEVICES = ["cpu", GPU]


def overwrite(old, new) -> None:
    """Tensors of a nest written into those of the same nest."""
    if isinstance(old, torch.Tensor):
        with torch.inference_mode():
            old.copy_(new)
    elif dataclasses.is_dataclass(old):
        for field in dataclasses.fields(old):
            overwrite(getattr(old, field.name), getattr(new, field.name))
    elif isinstance(old, dict):
        for name in old:
            overwrite(old[name], new[name])
    elif isinstance(old, (tuple, list)):
        for one, other in zip(old, new, strict=True):
            overwrite(one, other)


class OnCpu(CudaGraphs):
    """As on a GPU, save that the stand-in records what a graph cannot tell: how often it was made."""

    devices = ("cpu",)

    def __init__(self, limit=LIMIT):
        super().__init__(limit)
        self.made = 0

    def record(self, step, state, value, pool):
        self.made += 1
        result = step(state, value)
        return lambda: overwrite(result, step(state, value)), result


def with_graphs(encoder, device) -> hero.HeroVisionEncoder:
    encoder.cuda_graphs = OnCpu() if device == "cpu" else CudaGraphs()
    return encoder


def assert_same(one, other) -> None:
    for name in ("tokens", "index", "budgets", "shares", "scores", "cu_seqlens"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    assert (one.lengths, one.layout, one.policy) == (other.lengths, other.layout, other.policy)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_replays_are_the_same(device, mode):
    """Of layouts in turn, with other pixels each time; what was returned before is not overwritten."""
    encoder = encoder_of(device)
    batches = [
        (pixels(encoder, sizes, device) * (1 + turn), sizes)
        for turn in range(2)
        for sizes in (ONE, *BATCHES.values())
    ]
    with torch.no_grad():
        plain = [encoder(*batch) for batch in batches]
    with_graphs(encoder, device)
    with mode():
        replayed = [encoder(*batch) for batch in batches]
    for one, other in zip(plain, replayed, strict=True):
        assert_same(one, other)
    assert len(encoder.cuda_graphs) == 1 + len(BATCHES)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shared", [True, False], ids=["shared weights", "second pass"])
def test_questions_between_two_graphs(device, shared):
    clip = tiny_clip().to(device).requires_grad_(False)
    own = clip.vision_model if shared else tower(clip.config.vision_config.num_hidden_layers)
    relevance = hero.ClipRelevance(clip, tiny_tokenizer(), second_pass=not shared)
    encoder = encoder_of(device, relevance=relevance, vision_tower=own)
    images = pixels(encoder, ONE * 2, device)
    words = [["w1 w2", "w3"], ["describe", "what is in this picture ?"], ["w1 w2", "w3"]]
    with torch.no_grad():
        plain = [encoder(images, ONE * 2, text) for text in words]
        with_graphs(encoder, device)
        again = [encoder(images, ONE * 2, text) for text in words]
        given = encoder(images, ONE * 2, relevance.text_embeddings(words[0]))
    for one, other in zip(plain, again, strict=True):
        assert_same(one, other)
    assert_same(given, plain[0])
    assert not torch.equal(plain[0].shares, plain[1].shares)
    assert len(encoder.cuda_graphs) == 1


def test_the_cache_is_bounded():
    encoder = encoder_of()
    graphs = encoder.cuda_graphs = OnCpu(limit=2)
    sizes = {number: [(112, 112)] * number for number in (1, 2, 3)}
    with torch.no_grad():
        for number, made in ((1, 1), (2, 2), (1, 2), (3, 3), (1, 3), (2, 4), (1, 4)):
            encoder(pixels(encoder, sizes[number]), sizes[number])
            assert (graphs.made, len(graphs)) == (made, min(made, 2))
    graphs.clear()
    assert len(graphs) == 0


def test_a_graph_is_made_anew_when_it_would_be_wrong():
    encoder = with_graphs(encoder_of(), "cpu")
    images = pixels(encoder, ONE)
    with torch.no_grad():
        encoder(images, ONE)
        encoder.vision_tower.to(torch.float64)  # moved: other memory
        encoder.projector.to(torch.float64)
        encoder.image_newline = encoder.image_newline.double()
        assert encoder(images.double(), ONE).tokens.dtype == torch.float64
        assert encoder.cuda_graphs.made == 2
        encoder.vision_tower.set_attn_implementation("eager")
        encoder(images.double(), ONE)
        assert encoder.cuda_graphs.made == 3
        encoder.vision_tower.to(torch.float32).to(torch.float64)  # the same key, other memory
        encoder(images.double(), ONE)
        assert encoder.cuda_graphs.made == 4
        before = encoder(images.double(), ONE).tokens
        encoder.projector[2].bias.add_(1.0)  # in place: the graph reads it
        assert encoder.cuda_graphs.made == 4
        after = encoder(images.double(), ONE)
        patches = after.index >= 0
        torch.testing.assert_close(after.tokens[patches], before[patches] + 1.0)
        weights = {name: value.clone() for name, value in encoder.projector.state_dict().items()}
        weights["2.bias"] += 1.0
        encoder.projector.load_state_dict(weights, assign=True)  # other memory, while the old lives on
        again = encoder(images.double(), ONE).tokens
        torch.testing.assert_close(again[patches], after.tokens[patches] + 1.0)
        assert encoder.cuda_graphs.made == 5


def test_copies_start_without_graphs():
    encoder = with_graphs(encoder_of(), "cpu")
    with torch.no_grad():
        plain = encoder(pixels(encoder, ONE), ONE)
        other = copy.deepcopy(encoder)
        assert (len(encoder.cuda_graphs), len(other.cuda_graphs)) == (1, 0)
        assert_same(other(pixels(encoder, ONE), ONE), plain)
    assert len(pickle.loads(pickle.dumps(encoder.cuda_graphs))) == 0
    encoder.remove()
    assert len(encoder.cuda_graphs) == 0


@pytest.mark.parametrize("device", DEVICES)
def test_threads_share_graphs(device):
    encoder = encoder_of(device)
    images = {number: pixels(encoder, ONE * 2, device) * number for number in range(1, 5)}
    with torch.no_grad():
        plain = {number: encoder(values, ONE * 2) for number, values in images.items()}
    with_graphs(encoder, device)
    wrong = []

    def work(number):
        stream = torch.cuda.stream(torch.cuda.Stream()) if device == "cuda" else contextlib.nullcontext()
        with torch.no_grad(), stream:
            for _ in range(5):
                again = encoder(images[number], ONE * 2)
                if not torch.equal(again.tokens, plain[number].tokens):
                    wrong.append(number)

    with torch.no_grad():
        encoder(images[1], ONE * 2)  # recorded before threads launch beside it
    threads = [threading.Thread(target=work, args=(number,)) for number in images]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and len(encoder.cuda_graphs) == 1


def test_refusals():
    encoder = encoder_of()
    with pytest.raises(TypeError, match=r"^cuda_graphs: expected a bool, got 1"):
        hero.HeroVisionEncoder(tower(), cuda_graphs=1)
    with pytest.raises(ValueError, match=r"^cuda_graphs: expected False with allocation='floor'"):
        hero.HeroVisionEncoder(tower(), config=hero.HeroConfig(allocation="floor"), cuda_graphs=True)
    encoder.cuda_graphs = CudaGraphs()
    with (
        torch.no_grad(),
        pytest.raises(ValueError, match=r"^cuda_graphs: expected pixel_values on a CUDA device, got cpu"),
    ):
        encoder(pixels(encoder, ONE), ONE)
    with_graphs(encoder, "cpu")
    with pytest.raises(ValueError, match=r"^cuda_graphs: expected torch.no_grad"):
        encoder(pixels(encoder, ONE), ONE)
    with (
        torch.no_grad(),
        pytest.raises(ValueError, match=r"^cuda_graphs: expected no arguments for the vision tower"),
    ):
        encoder.run(pixels(encoder, ONE), ONE, output_hidden_states=True)
    encoder.projector.to("meta")
    with (
        torch.no_grad(),
        pytest.raises(ValueError, match=r"^cuda_graphs: expected all weights on cpu, got some on"),
    ):
        encoder(pixels(encoder, ONE), ONE)


@pytest.mark.parametrize("device", DEVICES)
def test_attached(device):
    model, processor = tiny_model().to(device), tiny_processor()
    images = [tiny_image(100, 80, 0), tiny_image(60, 170, 1)]
    answers = []
    for cuda_graphs in (False, True):
        with hero.attach(model, processor, keep_ratio=0.3, cuda_graphs=cuda_graphs) as handle:
            assert (handle.encoder.cuda_graphs is not None) == cuda_graphs
            if cuda_graphs:
                with_graphs(handle.encoder, device)
            text = ["USER : <image> describe ASSISTANT :"] * 2
            inputs = processor(images=images, text=text, padding=True, return_tensors="pt").to(device)
            answers.append([model.generate(**inputs, max_new_tokens=4, do_sample=False) for _ in range(2)])
    for one, other in zip(*answers, strict=True):
        assert torch.equal(one, other)
