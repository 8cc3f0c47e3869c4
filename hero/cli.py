"""The ``hero`` command: ask a model about an image, draw which tokens are kept, measure times."""

from __future__ import annotations

import argparse
import contextlib
import io
import platform
import re
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ._checks import check_integer, error
from ._version import __version__
from .batch import add_command as add_batch
from .checkpoints import Loaded, load
from .config import DEFAULT_KEEP_RATIO, HeroConfig
from .evaluate import add_command as add_evaluate
from .options import list_of, options_named, policy_name
from .policies import POLICIES

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["main"]


class _Answer(NamedTuple):
    text: str
    visual_tokens: int
    first_token: float  # seconds
    whole: float  # seconds


def _load(args: argparse.Namespace) -> Loaded:
    """The model that the options name, by default the bundled one."""
    return load(args.model, args.clip, second_pass=args.second_pass)


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


def _answer(loaded: Loaded, image, question: str, max_new_tokens: int) -> _Answer:
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
        crops, plan = encoder.prepare(*handle.crops(inputs))
        encoded = timed("encode", encoder.encode, crops, plan)
        scored = timed("score", encoder.score, encoded, plan, text)
        budgets = timed("budget", encoder.budget, scored, plan)
        gathered = timed("select", encoder.select, encoded, scored, budgets, plan)
        project = partial(encoder.project, is_projected=encoded.is_projected)
        timed("project", project, gathered.tokens, gathered.index)
    return times


def _configs(args: argparse.Namespace, loaded: Loaded | None = None) -> list[HeroConfig]:
    """The configurations that the options describe, one for each value of --keep.

    A policy gets only those of its options that are given.
    """
    options = {} if args.alpha is None else {"alpha": args.alpha}
    default = DEFAULT_KEEP_RATIO if loaded is None else loaded.keep_ratio
    ratios = args.keep if isinstance(args.keep, tuple) else [default if args.keep is None else args.keep]
    keeps = (
        [{"keep_ratio": ratio} for ratio in ratios] if args.tokens is None else [{"keep_tokens": args.tokens}]
    )
    has_model = args.model is None or args.clip is not None
    with options_named():
        configs = [HeroConfig(**keep, policy=args.policy, **options) for keep in keeps]
        configs[0].policy.needs(has_model and getattr(args, "question", "") is not None)
    return configs


def _check(args: argparse.Namespace) -> None:
    """Raise if an option cannot be used; neither torch nor a model is loaded."""
    from .images import check_writable

    if "policy" in args:
        _configs(args)
    if "max_new_tokens" in args:
        check_integer("--max-new-tokens", args.max_new_tokens)
    if "rounds" in args:
        check_integer("--rounds", args.rounds)
    question = getattr(args, "question", None)
    if question is not None and not re.search(r"\w", question):
        raise error(ValueError, "question", "words", question)
    if args.second_pass and args.clip is None:
        raise ValueError("--second-pass: expected a --clip model beside it, got none")
    if args.clip is not None and args.model is None:
        raise error(ValueError, "--clip", "a --model beside it, since the mini model has its own", args.clip)
    if "save" in args:
        check_writable("--save", Path(args.save))
        if Path(args.save).resolve() == Path(args.image).resolve():
            raise error(ValueError, "--save", "another file than the image", args.save)
    if "out" in args:
        check_writable("--out", Path(args.out) / "demo_1.png")


def _attach(loaded: Loaded, config: HeroConfig, relevance, **options):
    from . import attach

    with options_named():
        return attach(loaded.model, loaded.processor, config=config, relevance=relevance, **options)


def _text(handle, loaded: Loaded, question: str) -> list[str] | None:
    """The question as the encoder takes it, if the policy reads it."""
    from .relevance import question_of

    return [question_of(loaded.prompt(question))] if handle.encoder.needs_text else None


def _open(source: str) -> Image.Image:
    """The image of a path or URL, upright and in RGB."""
    from .images import open_image

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, about large images and on the way to an error
        return open_image(source).convert("RGB")


def _duration(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"


def _ask(
    loaded: Loaded, args: argparse.Namespace, name: str, image: Image.Image, question: str, save: Path
) -> None:
    """Answer one question with all tokens and with the kept ones; print both and save the picture."""
    from . import visualize
    from .images import as_seen, save_image

    with _attach(loaded, _configs(args, loaded)[0], loaded.relevance) as handle:
        kept = _answer(loaded, image, question, args.max_new_tokens)
        stages = _stage_times(handle, loaded.inputs(image, question), _text(handle, loaded, question))
        selection = handle.last
    full = _answer(loaded, image, question, args.max_new_tokens)  # last, since errors come from the above
    stages["language model"] = max(kept.first_token - sum(stages.values()), 0.0)
    print(f"{name}: {question}")
    for name, answer in (("all tokens", full), ("kept tokens", kept)):
        first, whole = _duration(answer.first_token), _duration(answer.whole)
        times = f"first token {first:>8}, answer {whole:>8}"
        print(f"  {name:<13} {answer.visual_tokens:>5} visual tokens, {times}: {answer.text}")
    layout = selection.layout[0]
    if not layout.is_whole:
        thumbnail, tiles = layout.budget(handle.config)
        print(
            f"  of these      {thumbnail} of {layout.patches} thumbnail patches, {tiles} of "
            f"{sum(layout.valid_counts)} tile patches, {layout.newline_count} newlines"
        )
    print("  stages        " + ", ".join(f"{name} {_duration(seconds)}" for name, seconds in stages.items()))
    # Last, so that the answer is out if the picture cannot be written.
    picture = visualize(as_seen(image, selection), selection, title=f"{question} → {kept.text}")
    save_image(picture, save)
    print(f"  picture       {save}\n")


def _run_ask(args: argparse.Namespace) -> None:
    image = _open(args.image)
    _ask(_load(args), args, args.image, image, args.question, Path(args.save))


def _run_demo(args: argparse.Namespace) -> None:
    from . import mini

    loaded = _load(args)
    for number, demo in enumerate(mini.demo_questions(), 1):
        image, here = demo.image, Path.cwd()
        if image.is_relative_to(here):
            image = image.relative_to(here)
        save = Path(args.out) / f"demo_{number}.png"
        _ask(loaded, args, str(image), _open(str(demo.image)), demo.question, save)


def _run_show(args: argparse.Namespace) -> None:
    """Draw the picture without generating an answer."""
    image, save = _open(args.image), Path(args.save)  # before torch, whose import takes seconds
    import torch

    from . import visualize
    from .images import as_seen, save_image

    loaded = _load(args)
    relevance = loaded.relevance if args.question else None
    with _attach(loaded, _configs(args, loaded)[0], relevance) as handle:
        inputs = loaded.inputs(image, args.question or "")
        text = _text(handle, loaded, args.question or "")
        with torch.inference_mode():
            selection = handle.encoder(*handle.crops(inputs), text)
    save_image(visualize(as_seen(image, selection), selection), save)
    kept, full = sum(selection.lengths), selection.layout[0].full_tokens
    print(f"{kept} of {full} visual tokens kept, picture in {save}")


def _run_bench(args: argparse.Namespace) -> None:
    """Measure with all tokens and at several keep ratios, alternating, so that load affects all alike."""
    image, configs = _open(args.image), _configs(args)  # before torch, whose import takes seconds
    import torch

    if args.cuda_graphs and not torch.cuda.is_available():
        raise ValueError("--cuda-graphs: expected a GPU, got none")
    loaded = _load(args)
    model = loaded.model
    relevance = loaded.relevance if args.question is not None else None
    question = "what is in this picture" if args.question is None else args.question

    def once(config: HeroConfig | None) -> tuple[float, ...]:
        """Visual tokens, seconds of the vision stage and to the first token; attaching is not timed."""
        with contextlib.ExitStack() as stack:
            handle = None
            if config is not None:
                attached = _attach(loaded, config, relevance, cuda_graphs=args.cuda_graphs or "auto")
                handle = stack.enter_context(attached)
            inputs = loaded.inputs(image, question)
            if handle is None:
                names = ("pixel_values", "image_sizes", "image_grid_thw")
                given = {name: inputs[name] for name in names if name in inputs}
                vision = partial(model.model.get_image_features, **given)
            else:
                vision = partial(handle.encoder, *handle.crops(inputs), _text(handle, loaded, question))
            seconds = []
            for function in (vision, lambda: model.generate(**inputs, max_new_tokens=1, do_sample=False)):
                for _ in range(3):  # the second call records a CUDA graph
                    function()
                seconds.append(_timed(function)[1])
        return loaded.visual_tokens(inputs), *seconds

    found: dict[HeroConfig | None, list] = {config: [] for config in (None, *configs)}
    with torch.inference_mode():
        for turn in range(args.rounds):
            for config in list(found)[:: 1 if turn % 2 == 0 else -1]:
                found[config].append(once(config))
    medians = {config: [statistics.median(column) for column in zip(*rows)] for config, rows in found.items()}
    print(f"{args.image}, {args.rounds} rounds, medians, ratios to all tokens")
    print(f"  {'':<12} {'visual tokens':>13} {'vision stage':>20} {'first token':>20}")
    for config, (tokens, *seconds) in medians.items():
        name = "all tokens" if config is None else f"keep {config.keep_ratio:g}"
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


def _parser() -> argparse.ArgumentParser:
    def group(*parents: argparse.ArgumentParser) -> argparse.ArgumentParser:
        """Options that several commands share."""
        return argparse.ArgumentParser(add_help=False, parents=parents)

    policy = group()
    summaries = "; ".join(f"{name}: {found.summary}" for name, found in POLICIES.items())
    text = f"a name, or module:Class of your own policy (default %(default)s). {summaries}"
    policy.add_argument("--policy", type=policy_name, default="hero", metavar="NAME", help=text)
    policy.add_argument(
        "--alpha",
        type=float,
        help="of hero: weight of saliency against relevance, 0 to 1; of scope: an exponent",
    )

    selection = group(policy)
    keep = selection.add_mutually_exclusive_group()
    text = "keep ratio (default: 0.2, of Qwen's models 0.7)"
    keep.add_argument("--keep", type=float, metavar="R", help=text)
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
    image.add_argument("image", help="path or http(s) URL")
    question = group(image)
    question.add_argument("question", nargs="?", help="weight tiles by this question")
    picture = group()
    text = "picture (default %(default)s)"
    picture.add_argument("--save", default="out/hero.png", metavar="PNG", help=text)

    parser = argparse.ArgumentParser(
        prog="hero", description="Drop visual tokens before the language model sees them, without training."
    )
    parser.set_defaults(model=None, clip=None, second_pass=False, tokens=None)  # of commands without these
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
    bench.add_argument("--keep", type=list_of(float), default=(1.0, 0.5, 0.2, 0.1), metavar="R,R", help=text)
    bench.add_argument("--rounds", type=int, default=5, metavar="N", help="default %(default)s")
    bench.add_argument(
        "--cuda-graphs",
        action="store_true",
        help="raise an error where the vision tower cannot be replayed from CUDA graphs",
    )
    demo = command(_run_demo, "ask the bundled model about a bundled scene, offline", selection, answer)
    demo.add_argument("--out", default="out", metavar="DIR", help="folder of pictures (default %(default)s)")
    add_batch(command, model, selection, answer)
    add_evaluate(command, model)
    command(_run_env, "versions, devices and what each operation runs on")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the ``hero`` command; returns the exit status."""
    args = _parser().parse_args(argv)
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(
            errors="backslashreplace"
        )  # an answer that the terminal cannot show is no error
    try:
        if args.run is not _run_env:
            _check(args)
        args.run(args)
    except (ImportError, OSError, TypeError, ValueError) as problem:
        print("hero:", " ".join(str(problem).split()), file=sys.stderr)
        return 2
    return 0
