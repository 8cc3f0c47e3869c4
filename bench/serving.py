"""Times of vLLM with and without dropped tokens, side by side, for docs/serving.md.

    .venv-vllm/bin/python -m bench.serving requests [--keep 0.2] [--rounds 3]
    .venv-vllm/bin/python -m bench.serving vision [--keep 0.2] [--rounds 3]

The models are small LLaVA-NeXTs with random weights. ``requests`` asks for a fixed number of tokens. With all
tokens its language model costs about eight times as much as its vision stage, that of LLaVA-NeXT-7B about
eighteen times. ``vision`` times the vision stage alone, with the tower of CLIP-ViT-B: vLLM's own against
transformers' with hero. Both engines are alive at once and take turns, so that what else the machine does
affects both. Every image is new, so that no cache helps.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median

import numpy as np
from PIL import Image

from hero import mini

TEXT = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 64,
    "max_position_embeddings": 4096,
}
VISION = {
    "hidden_size": 384,
    "intermediate_size": 1536,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "image_size": 336,
    "patch_size": 14,
}
CLIP_B = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
}
SIZE = (640, 480)


def write(folder: Path, vision: dict) -> Path:
    """The configuration, processor and tokenizer of the model, without weights."""
    shutil.copytree(mini.WEIGHTS, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((folder / "config.json").read_text())
    processor = json.loads((folder / "processor_config.json").read_text())
    config["text_config"] |= TEXT
    config["vision_config"] |= VISION | vision
    crop, images = VISION["image_size"], processor["image_processor"]
    pinpoints = [[crop * rows, crop * columns] for rows, columns in ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))]
    config["image_grid_pinpoints"] = images["image_grid_pinpoints"] = pinpoints
    images |= {"crop_size": {"height": crop, "width": crop}, "size": {"shortest_edge": crop}}
    processor["patch_size"] = VISION["patch_size"]
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "processor_config.json").write_text(json.dumps(processor))
    return folder


def engines(path: Path, keep: float, **arguments) -> list:
    """An engine that keeps all tokens, and one that drops some."""
    import vllm

    return [
        vllm.LLM(
            str(path),
            load_format="dummy",
            dtype="float32",
            enforce_eager=True,
            max_model_len=4096,
            max_num_batched_tokens=8192,
            hf_overrides=overrides,
            **arguments,
        )
        for overrides in ({}, {"hero": {"keep_ratio": keep}})
    ]


def image(random: np.random.Generator) -> Image.Image:
    return Image.fromarray(random.integers(0, 256, (*SIZE[::-1], 3), dtype=np.uint8))


def compare(rounds: int, make: Callable, works: Sequence[Callable]) -> list[list[float]]:
    """Seconds of each work in each round, on what ``make`` returned for the round; one more warms up."""
    times = []
    for _ in range(rounds + 1):
        given, both = make(), []
        for work in works:
            start = time.perf_counter()
            work(given)
            both.append(time.perf_counter() - start)
        times.append(both)
    return times[1:]


def report(name: str, times: Sequence[Sequence[float]], requests: int) -> None:
    rates = [requests / median(each) for each in zip(*times, strict=True)]
    ratios = [stock / dropped for stock, dropped in times]
    spread = f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
    print(f"{name}: {rates[0]:.3f} and {rates[1]:.3f} a second, ratio {spread}", flush=True)


def time_requests(path: Path, given: argparse.Namespace) -> None:
    import vllm

    answer = vllm.SamplingParams(temperature=0, max_tokens=given.new_tokens, ignore_eos=True)
    random, question = np.random.default_rng(0), f"<image> {mini.demo_questions()[0].question}"

    def prompts() -> list[dict]:
        images = [image(random) for _ in range(given.requests)]
        return [{"prompt": question, "multi_modal_data": {"image": one}} for one in images]

    for concurrency in given.concurrency:
        both = engines(path, given.keep, max_num_seqs=concurrency)
        works = [partial(one.generate, sampling_params=answer, use_tqdm=False) for one in both]
        times = compare(given.rounds, prompts, works)
        report(f"requests at concurrency {concurrency}", times, given.requests)
        del both, works


def time_vision(path: Path, given: argparse.Namespace) -> None:
    import torch

    both, random = engines(path, given.keep, max_num_seqs=1), np.random.default_rng(0)

    def encode(llm, picture: Image.Image) -> None:
        processor = llm.llm_engine.renderer.get_mm_processor()
        items = processor.info.parse_mm_data({"image": picture})
        inputs = processor("<image>", items)["mm_kwargs"].get_data()
        [model] = llm.apply_model(lambda model: model)
        with torch.inference_mode():
            model.embed_multimodal(**inputs)

    times = compare(given.rounds, partial(image, random), [partial(encode, llm) for llm in both])
    report("images through the vision stage", times, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("requests", "vision"))
    parser.add_argument("--keep", type=float, default=0.2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=4, help="in a round")
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 4])
    given = parser.parse_args()
    is_vision = given.what == "vision"
    os.environ.update(VLLM_CPU_KVCACHE_SPACE="1", VLLM_CPU_OMP_THREADS_BIND="nobind")
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = str(int(not is_vision))
    print(", ".join(f"{name} {version(name)}" for name in ("vllm-cpu", "torch", "transformers")), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder) / "model", CLIP_B if is_vision else {})
        (time_vision if is_vision else time_requests)(path, given)


if __name__ == "__main__":
    main()
