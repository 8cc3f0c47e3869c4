"""The ``hero`` command: ask a model about an image, draw which tokens are kept, measure times."""

from __future__ import annotations

import argparse
import contextlib
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from ._version import __version__
from .config import DEFAULT_KEEP_RATIO, HeroConfig
from .policies import POLICIES

__all__ = ["main"]


class _Loaded(NamedTuple):
    """A model with its processor and, if there is one, its relevance model."""

    model: Any
    processor: Any
    relevance: Any
    is_mini: bool

    def prompt(self, question: str) -> str:
        """The prompt for a question, by the processor's chat template if it has one."""
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

    def inputs(self, image, question: str):
        """The model's inputs, on its device."""
        inputs = self.processor(images=image, text=self.prompt(question), return_tensors="pt")
        return inputs.to(self.model.device, self.model.dtype)

    def visual_tokens(self, inputs) -> int:
        return int((inputs["input_ids"] == self.model.config.image_token_id).sum())


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


def _load(args: argparse.Namespace) -> _Loaded:
    """The model that the options name, by default the bundled one."""
    name, clip = getattr(args, "model", None), getattr(args, "clip", None)
    if clip is None and getattr(args, "second_pass", False):
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
        relevance = ClipRelevance(clip_model, tokenizer, second_pass=args.second_pass)
    return _Loaded(model, processor, relevance, is_mini=False)


def _quiet() -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _synchronize() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _timed(function: Callable) -> tuple[Any, float]:
    """(result, seconds) of one call, work on a GPU included."""
    _synchronize()
    start = time.perf_counter()
    result = function()
    _synchronize()
    return result, time.perf_counter() - start


def _best(function: Callable) -> tuple[Any, float]:
    """(result, seconds) of the fastest of three calls, or of as many as begin within two seconds."""
    begin, fastest = time.perf_counter(), float("inf")
    for _ in range(3):
        result, seconds = _timed(function)
        fastest = min(fastest, seconds)
        if time.perf_counter() - begin > 2:
            break
    return result, fastest


def _answer(loaded: _Loaded, image, question: str, max_new_tokens: int) -> _Answer:
    inputs = loaded.inputs(image, question)
    length = inputs["input_ids"].shape[1]

    def generate(tokens: int) -> list[int]:
        output = loaded.model.generate(**inputs, max_new_tokens=tokens, do_sample=False, num_beams=1)
        return output[0, length:].tolist()

    generate(1)  # warm up
    _, first_token = _best(lambda: generate(1))
    answer, whole = _best(lambda: generate(max_new_tokens))
    text = loaded.processor.decode(answer, skip_special_tokens=True).strip()
    return _Answer(text, loaded.visual_tokens(inputs), first_token, whole)


def _stage_times(handle, inputs, text: list[str] | None) -> dict[str, float]:
    """Seconds of each stage of the vision encoder, the fastest of up to three runs."""
    import torch

    encoder, times = handle.encoder, {}

    def timed(name: str, stage: Callable, *args):
        result, times[name] = _best(lambda: stage(*args))
        return result

    with torch.inference_mode():
        crops, plan = encoder.prepare(inputs["pixel_values"], inputs["image_sizes"])
        encoded = timed("encode", encoder.encode, crops, plan)
        scored = timed("score", encoder.score, encoded, plan, text)
        budgets = timed("budget", encoder.budget, scored, plan)
        gathered = timed("select", encoder.select, encoded, scored, budgets, plan)
        timed("project", encoder.project, gathered)
    return times


def _config(args: argparse.Namespace, **keep) -> HeroConfig:
    """The configuration that the options describe; a policy gets only those of its options that are given."""
    options = {} if args.alpha is None else {"alpha": args.alpha}
    return HeroConfig(**keep, policy=args.policy, **options)


def _attach(loaded: _Loaded, args: argparse.Namespace, relevance):
    from . import attach

    keep = {"keep_ratio": args.keep} if args.tokens is None else {"keep_tokens": args.tokens}
    return attach(loaded.model, loaded.processor, config=_config(args, **keep), relevance=relevance)


def _text(handle, loaded: _Loaded, question: str) -> list[str] | None:
    """The question as the encoder takes it, if the policy reads it."""
    from .relevance import question_of

    return [question_of(loaded.prompt(question))] if handle.encoder.needs_text else None


def _open(path: str):
    from PIL import Image

    return Image.open(path).convert("RGB")


def _save(picture, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)


def _duration(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"


def _ask(loaded: _Loaded, args: argparse.Namespace, image_path: str, question: str, save: Path) -> None:
    """Answer one question with all tokens and with the kept ones; print both and save the picture."""
    from . import visualize

    image = _open(image_path)
    full = _answer(loaded, image, question, args.max_new_tokens)
    with _attach(loaded, args, loaded.relevance) as handle:
        kept = _answer(loaded, image, question, args.max_new_tokens)
        stages = _stage_times(handle, loaded.inputs(image, question), _text(handle, loaded, question))
        selection = handle.last
    _save(visualize(image, selection, title=f"{question} → {kept.text}"), save)

    layout = selection.layout[0]
    thumbnail, tiles = layout.budget(handle.config)
    stages["language model"] = max(kept.first_token - sum(stages.values()), 0.0)
    print(f"{image_path}: {question}")
    for name, answer in (("all tokens", full), ("kept tokens", kept)):
        first, whole = _duration(answer.first_token), _duration(answer.whole)
        times = f"first token {first:>8}, answer {whole:>8}"
        print(f"  {name:<13} {answer.visual_tokens:>5} visual tokens, {times}: {answer.text}")
    print(
        f"  of these      {thumbnail} of {layout.patches} thumbnail patches, {tiles} of "
        f"{sum(layout.valid_counts)} tile patches, {layout.newline_count} newlines"
    )
    print("  stages        " + ", ".join(f"{name} {_duration(seconds)}" for name, seconds in stages.items()))
    print(f"  picture       {save}\n")


def _run_ask(args: argparse.Namespace) -> None:
    _ask(_load(args), args, args.image, args.question, Path(args.save))


def _run_demo(args: argparse.Namespace) -> None:
    from . import mini

    loaded = _load(args)
    for number, demo in enumerate(mini.demo_questions(), 1):
        image, here = demo.image, Path.cwd()
        if image.is_relative_to(here):
            image = image.relative_to(here)
        _ask(loaded, args, str(image), demo.question, Path(args.out) / f"demo_{number}.png")


def _run_show(args: argparse.Namespace) -> None:
    """Draw the picture without generating an answer."""
    import torch

    from . import visualize

    loaded = _load(args)
    image, save = _open(args.image), Path(args.save)
    with _attach(loaded, args, loaded.relevance if args.question else None) as handle:
        inputs = loaded.inputs(image, args.question or "")
        text = _text(handle, loaded, args.question or "")
        with torch.inference_mode():
            selection = handle.encoder(inputs["pixel_values"], inputs["image_sizes"], text)
    _save(visualize(image, selection), save)
    kept, full = sum(selection.lengths), selection.layout[0].full_tokens
    print(f"{kept} of {full} visual tokens kept, picture in {save}")


def _run_bench(args: argparse.Namespace) -> None:
    """Measure with all tokens and at several keep ratios, alternating, so that load affects all alike."""
    import torch

    from . import attach

    if args.rounds < 1:
        raise ValueError(f"--rounds: expected a number >= 1, got {args.rounds}")
    loaded = _load(args)
    model, image = loaded.model, _open(args.image)
    relevance = loaded.relevance if args.question is not None else None
    question = "what is in this picture" if args.question is None else args.question

    def once(ratio: float | None) -> tuple[float, ...]:
        """Visual tokens, seconds of the vision stage and to the first token; attaching is not timed."""
        with contextlib.ExitStack() as stack:
            handle = None
            if ratio is not None:
                given = {"relevance": relevance, "cuda_graphs": args.cuda_graphs}
                config = _config(args, keep_ratio=ratio)
                handle = stack.enter_context(attach(model, loaded.processor, config=config, **given))
            inputs = loaded.inputs(image, question)
            images = inputs["pixel_values"], inputs["image_sizes"].cpu()
            text = None if handle is None else _text(handle, loaded, question)
            seconds = []
            for function in (
                lambda: handle.encoder(*images, text) if handle else model.model.get_image_features(*images),
                lambda: model.generate(**inputs, max_new_tokens=1, do_sample=False),
            ):
                function()  # warm up
                seconds.append(_timed(function)[1])
        return loaded.visual_tokens(inputs), *seconds

    found: dict[float | None, list] = {ratio: [] for ratio in (None, *args.keep)}
    with torch.inference_mode():
        for turn in range(args.rounds):
            for ratio in list(found)[:: 1 if turn % 2 == 0 else -1]:
                found[ratio].append(once(ratio))
    medians = {ratio: [statistics.median(column) for column in zip(*found[ratio])] for ratio in found}
    print(f"{args.image}, {args.rounds} rounds, medians, ratios to all tokens")
    print(f"  {'':<12} {'visual tokens':>13} {'vision stage':>20} {'first token':>20}")
    for ratio, (tokens, *seconds) in medians.items():
        name = "all tokens" if ratio is None else f"keep {ratio:g}"
        times = [
            f"{_duration(value)} ({value / whole:.2f})" for value, whole in zip(seconds, medians[None][1:])
        ]
        print(f"  {name:<12} {tokens:>13.0f} " + " ".join(f"{text:>20}" for text in times))


def _run_env(args: argparse.Namespace) -> None:
    """Versions, devices and what each operation runs on, for bug reports."""

    def line(name: str, text: str) -> None:
        print(f"{name:<13} {text}")

    line("hero", __version__)
    line("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    for name in ("torch", "triton", "transformers", "einops", "numpy", "pillow", "matplotlib"):
        try:
            line(name, metadata.version(name))
        except metadata.PackageNotFoundError:
            line(name, "not installed")
    try:
        import torch
    except ImportError:
        return line("devices", "unknown: torch is not installed")
    import hero_kernels as hk
    from hero_kernels._env import SWITCHES

    gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    line("GPU", ", ".join(gpus) or "none")
    line("switches", f"HERO_REFERENCE={SWITCHES.reference:d} HERO_REQUIRE_KERNEL={SWITCHES.require_kernel:d}")
    for device in ["cpu", "cuda"] if gpus else ["cpu"]:
        for operation, path in hk.implementations(device).items():
            line(
                device,
                f"{operation:<22} {'Triton kernel' if path == 'kernel' else 'PyTorch reference'}",
            )


def _policy(name: str) -> str:
    """A policy's name, or ``module:Class``, where the module may also be in the current folder."""
    if ":" in name:
        if "" not in sys.path:
            sys.path.append("")
    elif name not in POLICIES:
        raise argparse.ArgumentTypeError(
            f"expected one of {', '.join(POLICIES)} or module:Class, got {name!r}"
        )
    return name


def _ratios(text: str) -> tuple[float, ...]:
    return tuple(float(word) for word in text.split(","))


def _parser() -> argparse.ArgumentParser:
    def group(*parents: argparse.ArgumentParser) -> argparse.ArgumentParser:
        """Options that several commands share."""
        return argparse.ArgumentParser(add_help=False, parents=parents)

    policy = group()
    summaries = "; ".join(f"{name}: {found.summary}" for name, found in POLICIES.items())
    text = f"a name, or module:Class of your own policy (default %(default)s). {summaries}"
    policy.add_argument("--policy", type=_policy, default="hero", metavar="NAME", help=text)
    policy.add_argument("--alpha", type=float, help="of hero: weight of saliency against relevance, 0 to 1")

    selection = group(policy)
    keep = selection.add_mutually_exclusive_group()
    text = "keep ratio (default %(default)s)"
    keep.add_argument("--keep", type=float, default=DEFAULT_KEEP_RATIO, metavar="R", help=text)
    keep.add_argument("--tokens", type=int, metavar="N", help="keep N patch tokens of each image instead")

    answer = group()
    text = "length of the answer (default %(default)s)"
    answer.add_argument("--max-new-tokens", type=int, default=16, metavar="N", help=text)

    model = group()
    model.add_argument("--model", metavar="DIR_OR_HUB_ID", help="default: the bundled mini model, offline")
    text = "CLIP model that weights tiles by the question (with --model)"
    model.add_argument("--clip", metavar="DIR_OR_HUB_ID", help=text)
    text = "also run the --clip model's vision encoder, for weights that differ from those of --model"
    model.add_argument("--second-pass", action="store_true", help=text)

    image = group()
    image.add_argument("image")
    question = group(image)
    question.add_argument("question", nargs="?", help="weight tiles by this question")
    picture = group()
    text = "picture (default %(default)s)"
    picture.add_argument("--save", default="out/hero.png", metavar="PNG", help=text)

    parser = argparse.ArgumentParser(
        prog="hero", description="Drop visual tokens before the language model sees them, without training."
    )
    parser.add_argument("--version", action="version", version=f"hero {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(run: Callable, text: str, *parents: argparse.ArgumentParser) -> argparse.ArgumentParser:
        name = run.__name__.removeprefix("_run_")
        sub = commands.add_parser(name, help=text, description=text, parents=parents)
        sub.set_defaults(run=run)
        return sub

    text = "answer with all visual tokens and with the kept ones; times are the fastest of up to three runs"
    command(_run_ask, text, image, model, picture, selection, answer).add_argument("question")
    command(_run_show, "draw which tokens are kept, without generating", question, model, picture, selection)
    text = "time the vision stage and the first token at several keep ratios"
    bench = command(_run_bench, text, question, model, policy)
    text = "keep ratios (default 1,0.5,0.2,0.1)"
    bench.add_argument("--keep", type=_ratios, default=(1.0, 0.5, 0.2, 0.1), metavar="R,R", help=text)
    bench.add_argument("--rounds", type=int, default=5, metavar="N", help="default %(default)s")
    bench.add_argument("--cuda-graphs", action="store_true", help="replay the vision stage from CUDA graphs")
    demo = command(_run_demo, "ask the bundled model about a bundled scene, offline", selection, answer)
    demo.add_argument("--out", default="out", metavar="DIR", help="folder of pictures (default %(default)s)")
    command(_run_env, "versions, devices and what each operation runs on")
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
