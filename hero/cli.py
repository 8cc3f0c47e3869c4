"""The ``hero`` command: ask a model about an image with all tokens and with the kept ones, and see which."""

from __future__ import annotations

import argparse
import contextlib
import functools
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from ._version import __version__
from .config import DEFAULT_KEEP_RATIO, POLICIES, HeroConfig

__all__ = ["main"]


class _Loaded(NamedTuple):
    """A model ready to be asked, and how it likes to be."""

    model: object
    processor: object
    relevance: object
    is_mini: bool

    def prompt(self, question: str) -> str:
        """The prompt for a question: the processor's chat template where it has one."""
        if self.is_mini:
            # Its vocabulary is small: lower-case words without punctuation.
            return "<image> " + " ".join(
                question.lower().replace("?", " ").replace("color", "colour").split()
            )
        if self.processor.chat_template:
            content = [{"type": "image"}, {"type": "text", "text": question}]
            return self.processor.apply_chat_template(
                [{"role": "user", "content": content}], add_generation_prompt=True
            )
        return f"{self.processor.image_token}\n{question}"


class _Answer(NamedTuple):
    text: str
    visual_tokens: int
    first_token: float  # seconds
    whole: float  # seconds


def _pretrained(argument: str, cls, name: str, **kwargs):
    try:
        return cls.from_pretrained(name, **kwargs)
    except (OSError, ValueError) as error:
        reason = str(error).split("\n")[0]
        raise OSError(
            f"{argument}: expected a folder or hub id of a model, got {name!r}: {reason}"
        ) from error


def _load(name: str | None = None, clip: str | None = None, second_pass: bool = False) -> _Loaded:
    if clip is None and second_pass:
        raise ValueError("--second-pass: expected a --clip model beside it, got none")
    if name is None:
        if clip is not None:
            raise ValueError(
                f"--clip: expected a --model beside it, since the mini model has its own, got {clip!r}"
            )
        from . import mini

        return _Loaded(*mini.load(), is_mini=True)
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer, CLIPModel

    from .relevance import ClipRelevance

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = _pretrained("--model", AutoModelForImageTextToText, name, dtype="auto").to(device).eval()
    processor = _pretrained("--model", AutoProcessor, name)
    relevance = None
    if clip is not None:
        clip_model = _pretrained("--clip", CLIPModel, clip).to(device).eval()
        tokenizer = _pretrained("--clip", AutoTokenizer, clip)
        relevance = ClipRelevance(clip_model, tokenizer, second_pass=second_pass)
    return _Loaded(model, processor, relevance, is_mini=False)


def _quiet() -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _inputs(loaded: _Loaded, image, question: str):
    inputs = loaded.processor(images=image, text=loaded.prompt(question), return_tensors="pt")
    return inputs.to(loaded.model.device, loaded.model.dtype)


def _wait() -> None:
    """Wait for a GPU, if there is one."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _best(function: Callable) -> tuple[object, float]:
    """(result, seconds) of the quickest of three calls, or of as many as begin within two seconds."""
    begin, quickest = time.perf_counter(), None
    for _ in range(3):
        start = time.perf_counter()
        result = function()
        now = time.perf_counter()
        quickest = now - start if quickest is None else min(quickest, now - start)
        if now - begin > 2:
            break
    return result, quickest


def _visual_tokens(loaded: _Loaded, inputs) -> int:
    return int((inputs["input_ids"] == loaded.model.config.image_token_id).sum())


def _answer(loaded: _Loaded, image, question: str, max_new_tokens: int) -> _Answer:
    inputs = _inputs(loaded, image, question)
    length = inputs["input_ids"].shape[1]
    visual = _visual_tokens(loaded, inputs)

    def generate(tokens: int) -> list[int]:
        output = loaded.model.generate(**inputs, max_new_tokens=tokens, do_sample=False, num_beams=1)
        return output[0, length:].tolist()  # waits for an accelerator

    generate(1)  # warm up
    _, first_token = _best(lambda: generate(1))
    answer, whole = _best(lambda: generate(max_new_tokens))
    text = loaded.processor.decode(answer, skip_special_tokens=True).strip()
    return _Answer(text, visual, first_token, whole)


def _stage_times(handle, inputs, text: list[str] | None) -> dict[str, float]:
    """Seconds of each stage of the vision encoder, the quickest of up to three runs."""
    import torch

    encoder, times = handle.encoder, {}

    def timed(name: str, stage: Callable, *args):
        def run():
            result = stage(*args)
            _wait()
            return result

        result, times[name] = _best(run)
        return result

    with torch.inference_mode():
        crops, batch = encoder.prepare(inputs["pixel_values"], inputs["image_sizes"])
        encoded = timed("encode", encoder.encode, crops, batch)
        scored = timed("score", encoder.score, encoded, batch, text)
        budgets = timed("budget", encoder.budget, scored, batch)
        gathered = timed("select", encoder.select, encoded, scored, budgets, batch)
        timed("project", encoder.project, gathered)
    return times


def _attach(loaded: _Loaded, args: argparse.Namespace, relevance):
    """Hero on the loaded model, as the options say."""
    from . import attach

    options = {"keep_tokens": args.tokens} if args.tokens is not None else {"keep_ratio": args.keep}
    config = HeroConfig(policy=args.policy, alpha=args.alpha, **options)
    return attach(loaded.model, loaded.processor, config=config, relevance=relevance)


def _text(handle, loaded: _Loaded, question: str) -> list[str] | None:
    """The question as the encoder takes it, if it weighs in the budgets."""
    from .relevance import question_of

    return [question_of(loaded.prompt(question))] if handle.encoder.needs_text else None


def _save(picture, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)


def _open(path: str):
    from PIL import Image

    return Image.open(path).convert("RGB")


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"


def _ask(loaded: _Loaded, args: argparse.Namespace, image_path: str, question: str, save: Path) -> None:
    """Answer one question with all tokens and with the kept ones; print and save the picture."""
    from . import visualize

    image = _open(image_path)
    full = _answer(loaded, image, question, args.max_new_tokens)
    with _attach(loaded, args, loaded.relevance) as handle:
        kept = _answer(loaded, image, question, args.max_new_tokens)
        stages = _stage_times(handle, _inputs(loaded, image, question), _text(handle, loaded, question))
        selection = handle.last
    _save(visualize(image, selection, title=f"{question} → {kept.text}"), save)

    def line(name: str, answer: _Answer) -> str:
        first, whole = _milliseconds(answer.first_token), _milliseconds(answer.whole)
        times = f"first token {first:>8}, answer {whole:>8}"
        return f"  {name:<13} {answer.visual_tokens:>5} visual tokens, {times}: {answer.text}"

    layout = selection.layout[0]
    thumbnail, tiles = layout.budget(handle.config)
    print(f"{image_path}: {question}")
    print(line("all tokens", full))
    print(line("kept tokens", kept))
    print(
        f"  of these      {thumbnail} of {layout.patches} thumbnail patches, {tiles} of "
        f"{sum(layout.valid_counts)} tile patches, {layout.newline_count} newlines"
    )
    stages["language model"] = max(kept.first_token - sum(stages.values()), 0.0)
    print("  stages        " + ", ".join(f"{name} {_milliseconds(value)}" for name, value in stages.items()))
    print(f"  picture       {save}\n")


def _run_ask(args: argparse.Namespace) -> None:
    _ask(_load(args.model, args.clip, args.second_pass), args, args.image, args.question, Path(args.save))


def _run_demo(args: argparse.Namespace) -> None:
    from . import mini

    loaded = _load()
    for number, demo in enumerate(mini.demo_questions(), 1):
        image, here = demo.image, Path.cwd()
        if image.is_relative_to(here):
            image = image.relative_to(here)
        _ask(loaded, args, str(image), demo.question, Path(args.out) / f"demo_{number}.png")


def _run_show(args: argparse.Namespace) -> None:
    """The picture alone: nothing is generated."""
    import torch

    from . import visualize

    loaded = _load(args.model, args.clip, args.second_pass)
    question = args.question or ""
    image, save = _open(args.image), Path(args.save)
    relevance = loaded.relevance if question else None
    with _attach(loaded, args, relevance) as handle, torch.inference_mode():
        inputs = _inputs(loaded, image, question)
        text = _text(handle, loaded, question)
        selection = handle.encoder(inputs["pixel_values"], inputs["image_sizes"], text)
    _save(visualize(image, selection), save)
    kept, full = sum(selection.lengths), selection.layout[0].full_tokens
    print(f"{kept} of {full} visual tokens kept, picture in {save}")


def _run_bench(args: argparse.Namespace) -> None:
    """Times with all tokens and at several keep ratios, in turns, so that a slow moment hits all alike."""
    import torch

    from . import attach

    if args.rounds < 1:
        raise ValueError(f"--rounds: expected a number >= 1, got {args.rounds}")
    loaded = _load(args.model, args.clip, args.second_pass)
    model, image = loaded.model, _open(args.image)
    relevance = loaded.relevance if args.question is not None else None
    question = "what is in this picture" if args.question is None else args.question

    def once(ratio: float | None) -> tuple[int, float, float]:
        """Visual tokens, seconds of the vision stage and to the first token; attaching is not timed."""
        config = None if ratio is None else HeroConfig(ratio, policy=args.policy, alpha=args.alpha)
        with contextlib.ExitStack() as stack:
            if config is not None:
                given = {"relevance": relevance, "capture": args.capture}
                handle = stack.enter_context(attach(model, loaded.processor, config=config, **given))
            inputs = _inputs(loaded, image, question)
            images = inputs["pixel_values"], inputs["image_sizes"].cpu()
            encode = functools.partial(model.model.get_image_features, *images)
            if config is not None:
                encode = functools.partial(handle.encoder, *images, _text(handle, loaded, question))
            generate = functools.partial(model.generate, **inputs, max_new_tokens=1, do_sample=False)
            seconds = []
            for function in (encode, generate):
                function()  # warm up
                _wait()
                begin = time.perf_counter()
                function()
                _wait()
                seconds.append(time.perf_counter() - begin)
        return _visual_tokens(loaded, inputs), *seconds

    found: dict[float | None, list[tuple[int, float, float]]] = {
        None: [],
        **{ratio: [] for ratio in args.keep},
    }
    with torch.inference_mode():
        for turn in range(args.rounds):
            for ratio in list(found)[:: 1 if turn % 2 == 0 else -1]:
                found[ratio].append(once(ratio))
    medians = {
        ratio: [statistics.median(column) for column in zip(*rounds, strict=True)]
        for ratio, rounds in found.items()
    }
    print(f"{args.image}, {args.rounds} rounds, medians, ratios to all tokens")
    print(f"  {'':<12} {'visual tokens':>13} {'vision stage':>20} {'first token':>20}")
    for ratio, (tokens, *seconds) in medians.items():
        name = "all tokens" if ratio is None else f"keep {ratio:g}"
        times = (
            f"{_milliseconds(value)} ({value / whole:.2f})"
            for value, whole in zip(seconds, medians[None][1:], strict=True)
        )
        print(f"  {name:<12} {tokens:>13.0f} " + " ".join(f"{text:>20}" for text in times))


def _ratios(text: str) -> tuple[float, ...]:
    return tuple(float(word) for word in text.split(","))


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "not installed"


def _run_env(args: argparse.Namespace) -> None:
    """Versions, devices, and what each operation runs on: for bug reports."""
    print(f"hero          {__version__}")
    print(f"python        {platform.python_version()} on {platform.system()} {platform.machine()}")
    for name in ("torch", "triton", "transformers", "einops", "numpy", "pillow"):
        print(f"{name:<13} {_version(name)}")
    try:
        import torch
    except ImportError:
        print("devices       unknown: torch is not installed")
        return
    devices = ["cpu"]
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
        print("GPU           " + ", ".join(names))
        devices.append("cuda")
    else:
        print("GPU           none")
    import hero_kernels as hk
    from hero_kernels._env import SWITCHES

    print(
        f"switches      HERO_REFERENCE={SWITCHES.reference:d} HERO_REQUIRE_KERNEL={SWITCHES.require_kernel:d}"
    )
    for device in devices:
        for operation, path in hk.implementations(device).items():
            print(
                f"{device:<13} {operation:<22} {'Triton kernel' if path == 'kernel' else 'PyTorch reference'}"
            )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hero",
        description="Drop visual tokens before the language model sees them, training-free.",
    )
    parser.add_argument("--version", action="version", version=f"hero {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Callable, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run)
        return sub

    def policy_options(sub: argparse.ArgumentParser) -> None:
        policies = "; ".join(f"{name}: {text}" for name, text in POLICIES.items())
        sub.add_argument("--policy", choices=tuple(POLICIES), default="hero", help=policies)
        sub.add_argument("--alpha", type=float, help="weight of saliency against relevance, 0 to 1")

    def selection_options(sub: argparse.ArgumentParser) -> None:
        keep = sub.add_mutually_exclusive_group()
        keep.add_argument(
            "--keep",
            type=float,
            default=DEFAULT_KEEP_RATIO,
            metavar="R",
            help="keep ratio (default %(default)s)",
        )
        keep.add_argument("--tokens", type=int, metavar="N", help="keep N patch tokens of each image instead")
        policy_options(sub)
        sub.add_argument(
            "--max-new-tokens",
            type=int,
            default=16,
            metavar="N",
            help="length of the answer (default %(default)s)",
        )

    def model_options(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--model", metavar="DIR_OR_HUB_ID", help="default: the bundled mini model, offline")
        sub.add_argument(
            "--clip",
            metavar="DIR_OR_HUB_ID",
            help="CLIP model that weighs tiles by the question (with --model)",
        )
        sub.add_argument(
            "--second-pass",
            action="store_true",
            help="run the --clip model's vision encoder too, where its weights are not the --model's",
        )

    def picture_options(sub: argparse.ArgumentParser) -> None:
        sub.add_argument(
            "--save", default="out/hero.png", metavar="PNG", help="picture (default %(default)s)"
        )

    ask = command(
        "ask",
        _run_ask,
        "answer with all visual tokens and with the kept ones; times are the quickest of up to three runs",
    )
    ask.add_argument("image")
    ask.add_argument("question")
    model_options(ask)
    picture_options(ask)
    selection_options(ask)
    show = command("show", _run_show, "draw which tokens are kept, without generating")
    show.add_argument("image")
    show.add_argument("question", nargs="?", help="weigh tiles by this question")
    model_options(show)
    picture_options(show)
    selection_options(show)
    bench = command("bench", _run_bench, "time the vision stage and the first token at several keep ratios")
    bench.add_argument("image")
    bench.add_argument("question", nargs="?", help="weigh tiles by this question")
    model_options(bench)
    policy_options(bench)
    bench.add_argument(
        "--keep",
        type=_ratios,
        default=(1.0, 0.5, 0.2, 0.1),
        metavar="R,R",
        help="keep ratios (default 1,0.5,0.2,0.1)",
    )
    bench.add_argument("--rounds", type=int, default=5, metavar="N", help="default %(default)s")
    bench.add_argument("--capture", action="store_true", help="encode by CUDA graphs")
    demo = command("demo", _run_demo, "ask the bundled model about a bundled scene, offline")
    demo.add_argument("--out", default="out", metavar="DIR", help="where pictures go (default %(default)s)")
    selection_options(demo)
    command("env", _run_env, "versions, devices and what each operation runs on")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the ``hero`` command; returns the exit status."""
    args = _parser().parse_args(argv)
    try:
        if args.run is not _run_env:
            _quiet()
        args.run(args)
    except (OSError, TypeError, ValueError) as error:
        print(f"hero: {error}", file=sys.stderr)
        return 2
    return 0
