"""CUDA graphs of the vision stage. Without a GPU, a stand-in runs the step again into the same memory."""

import contextlib
import copy
import dataclasses
import pickle
import threading

import independent_families as families
import pytest
import torch
from independent import tiny_clip, tiny_image, tiny_model, tiny_processor, tiny_tokenizer
from test_families import processor_or_skip
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

    def __init__(self, required=True, limit=LIMIT):
        super().__init__(required, limit)
        self.made = 0

    def record(self, step, values, pool):
        self.made += 1
        result = step(*values)
        return lambda: overwrite(result, step(*values)), result


def with_graphs(encoder, device, required=True) -> hero.HeroVisionEncoder:
    encoder.cuda_graphs = OnCpu(required) if device == "cpu" else CudaGraphs(required)
    return encoder


def assert_same(one, other) -> None:
    for name in ("tokens", "index", "budgets", "shares", "scores", "cu_seqlens"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    assert (one.lengths, one.layout, one.policy) == (other.lengths, other.layout, other.policy)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_replays_are_the_same(device, mode):
    """Of layouts in turn, with other pixels each time; what was returned before is not overwritten. One graph
    serves all images that are cut into as many crops."""
    encoder = encoder_of(device)
    batches = [
        (pixels(encoder, sizes, device) * (1 + turn), sizes)
        for turn in range(2)
        for sizes in (ONE, *BATCHES.values(), [(112, 90)], [(90, 112)])
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
def test_questions(device, shared):
    clip = tiny_clip().to(device).requires_grad_(False)
    own = clip.vision_model if shared else tower(clip.config.vision_config.num_hidden_layers)
    relevance = hero.ClipRelevance(clip, tiny_tokenizer(), second_pass=not shared)
    encoder = encoder_of(device, relevance=relevance, vision_tower=own)
    images = pixels(encoder, ONE * 2, device)
    words = [["w1 w2", "w3"], ["describe", "what is in this picture ?"], ["w1 w2", "w3"]]
    with torch.no_grad():
        plain = [encoder(images, ONE * 2, text) for text in words]
        with_graphs(encoder, device)
        if device == "cpu":
            relevance._graphs = OnCpu(required=False)
        again = [encoder(images, ONE * 2, text) for text in words * 2]
        given = encoder(images, ONE * 2, relevance.text_embeddings(words[0]))
    for one, other in zip(plain * 2, again, strict=True):
        assert_same(one, other)
    assert_same(given, plain[0])
    assert not torch.equal(plain[0].shares, plain[1].shares)
    # Those of the questions differ by their length, where they are not padded.
    assert (len(encoder.cuda_graphs), len(relevance._graphs)) == (1, 2 if device == "cpu" else 1)


def test_auto():
    """Eager at the first call of a kind and where something prevents a graph; the selection tells why."""
    encoder = with_graphs(encoder_of(), "cpu", required=False)
    encoder.vision_tower.requires_grad_(False)
    images = pixels(encoder, ONE)

    def ran(images=images, sizes=ONE, **kwargs):
        selection = encoder.run(images, sizes, **kwargs)[0]
        assert selection.path.attention == "native" and selection.path.cuda_graph != bool(
            selection.path.reason
        )
        return selection.path.reason

    assert ran() == "gradients enabled"
    with torch.no_grad():
        assert ran() == "the first call of this kind"
        assert ran() == ""
        assert ran(pixels(encoder, [(90, 112)]), [(90, 112)]) == ""
        many = [(112, 112)] * 4
        assert ran(pixels(encoder, many), many) == "20 crops"
        assert ran(output_hidden_states=True) == "output_hidden_states"
        assert ran(whole=True) == "whole"
        assert ran() == ""
        seen = []
        hook = encoder.vision_tower.encoder.layers[0].register_forward_hook(lambda *_: seen.append(1))
        assert ran() == ran() == "hooks, wrappers or replaced methods"
        assert seen
        hook.remove()
        assert ran() == "the first call of this kind" and ran() == ""
        hook = torch.nn.modules.module.register_module_forward_hook(lambda *_: seen.append(2))
        assert ran() == "global hooks" and 2 in seen
        hook.remove()
        assert ran() == ""
        encoder.vision_tower.train()
        assert ran() == "training mode"
        encoder.vision_tower.eval()
        assert ran() == ""

        def fail(*_):
            raise RuntimeError("operation not permitted\nwhen stream is capturing")

        encoder.cuda_graphs.clear()
        encoder.cuda_graphs.record = fail
        plain = [ran(), ran(), ran()]
    assert plain == ["the first call of this kind", *["recording failed: operation not permitted"] * 2]
    encoder.cuda_graphs = None
    assert ran() == "cuda_graphs=False"


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


def replace_module(tower):
    tower.encoder.layers[0].mlp = copy.deepcopy(tower.encoder.layers[0].mlp)


def replace_weight(tower):
    tower.encoder.layers[0].mlp.fc1.bias = torch.nn.Parameter(tower.encoder.layers[0].mlp.fc1.bias + 1.0)


def assign_data(tower):
    tower.encoder.layers[0].mlp.fc1.bias.data = tower.encoder.layers[0].mlp.fc1.bias + 1.0


def load(tower):
    weights = {name: value * 1.5 for name, value in tower.state_dict().items()}
    tower.load_state_dict(weights, assign=True)


@pytest.mark.parametrize(
    "change",
    [
        replace_module,
        replace_weight,
        assign_data,
        load,
        lambda tower: tower.to(torch.float64).to(torch.float32),  # the same values in other memory
        lambda tower: tower.set_attn_implementation("eager"),
    ],
)
def test_a_graph_is_made_anew_when_it_would_be_wrong(change):
    encoder, images = with_graphs(encoder_of(), "cpu"), pixels(encoder_of(), ONE)
    with torch.no_grad():
        before = encoder(images, ONE)
        change(encoder.vision_tower)
        after = encoder(images, ONE)
        assert encoder.cuda_graphs.made == 2
        encoder(images, ONE)
        assert encoder.cuda_graphs.made == 2
        encoder.cuda_graphs = None
        assert_same(after, encoder(images, ONE))
    assert before.tokens.shape == after.tokens.shape


def test_what_follows_the_graph_is_read_at_each_call():
    """Weights changed in place, the projector and the newline are no reason to record again."""
    encoder, images = with_graphs(encoder_of(), "cpu"), pixels(encoder_of(), ONE)
    with torch.no_grad():
        before = encoder(images, ONE)
        patches = before.index >= 0
        encoder.projector = copy.deepcopy(encoder.projector)
        encoder.projector[2].bias.add_(1.0)
        encoder.image_newline = encoder.image_newline * 2.0
        after = encoder(images, ONE)
        torch.testing.assert_close(after.tokens[patches], before.tokens[patches] + 1.0)
        assert torch.equal(after.tokens[~patches], before.tokens[~patches] * 2.0)
        encoder.vision_tower.encoder.layers[0].mlp.fc1.bias.add_(1.0)  # in place: the graph reads it
        again = encoder(images, ONE)
        assert encoder.cuda_graphs.made == 1
        encoder.cuda_graphs = None
        assert_same(again, encoder(images, ONE))


def test_floor_follows_the_graph():
    encoder, images = encoder_of(allocation="floor"), pixels(encoder_of(), ONE)
    with torch.no_grad():
        plain = encoder(images, ONE)
        assert_same(with_graphs(encoder, "cpu")(images, ONE), plain)


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
    for wrong in (1, "yes", None):
        with pytest.raises(TypeError, match=r"^cuda_graphs: expected 'auto', True or False, got "):
            hero.HeroVisionEncoder(tower(), cuda_graphs=wrong)
    encoder.cuda_graphs = CudaGraphs(required=True)
    images = pixels(encoder, ONE)
    with (
        torch.no_grad(),
        pytest.raises(ValueError, match=r"^cuda_graphs: expected pixel_values on a CUDA device, got cpu"),
    ):
        encoder(images, ONE)
    with_graphs(encoder, "cpu")
    with pytest.raises(ValueError, match=r"^cuda_graphs: expected torch.no_grad"):
        encoder(images, ONE)
    with torch.no_grad():
        with pytest.raises(ValueError, match=r"^cuda_graphs: expected no arguments for the vision tower"):
            encoder.run(images, ONE, output_hidden_states=True)
        encoder.vision_tower.encoder.layers[1].mlp.register_forward_pre_hook(lambda *_: None)
        with pytest.raises(ValueError, match=r"^cuda_graphs: expected a module that runs its class's code"):
            encoder(images, ONE)
        encoder = with_graphs(encoder_of(), "cpu")
        encoder.vision_tower.post_layernorm.to("meta")
        with pytest.raises(ValueError, match=r"^cuda_graphs: expected all weights on cpu, got some on meta"):
            encoder(images, ONE)


@pytest.mark.parametrize("device", DEVICES)
def test_attached(device):
    model, processor = tiny_model().to(device), tiny_processor()
    images = [tiny_image(100, 80, 0), tiny_image(60, 170, 1)]
    answers = []
    for cuda_graphs in (False, "auto", True):
        with hero.attach(model, processor, keep_ratio=0.3, cuda_graphs=cuda_graphs) as handle:
            assert (handle.encoder.cuda_graphs is not None) == bool(cuda_graphs)
            if cuda_graphs:
                with_graphs(handle.encoder, device, required=cuda_graphs is True)
            text = ["USER : <image> describe ASSISTANT :"] * 2
            inputs = processor(images=images, text=text, padding=True, return_tensors="pt").to(device)
            answers += [model.generate(**inputs, max_new_tokens=4, do_sample=False) for _ in range(2)]
            assert handle.last.path.cuda_graph == bool(cuda_graphs), handle.last.path
    for answer in answers[1:]:
        assert torch.equal(answer, answers[0])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("family", ["internvl", "llava_onevision", "smolvlm"])
def test_other_families(family, device):
    """Features after the last norm, merged patches and resized grids are replayed too."""
    model, processor = families.tiny_model(family=family).to(device), processor_or_skip(family)
    case = "resized and not" if family == "llava_onevision" else "two sizes"
    inputs = families.batch_of(processor, family, case).to(device)
    with hero.attach(model, cuda_graphs=False, tokenizer=processor.tokenizer) as handle, torch.no_grad():
        wanted, stock = model(**inputs).logits, handle.last
        with_graphs(handle.encoder, device)
        for _ in range(3):
            assert torch.equal(model(**inputs).logits, wanted)
            assert torch.equal(handle.last.index, stock.index) and handle.last.path.cuda_graph


def test_recording_leaves_no_weights_to_autocast():
    """Its cache is dropped at the end of the context, while the graph would go on reading from it."""
    encoder = with_graphs(encoder_of(), "cpu")
    encoder.vision_tower.requires_grad_(True)
    seen, record = [], encoder.cuda_graphs.record
    encoder.cuda_graphs.record = lambda *args: seen.append(torch.is_autocast_cache_enabled()) or record(*args)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        encoder(pixels(encoder, ONE), ONE)
        assert torch.is_autocast_cache_enabled() and seen == [False]
