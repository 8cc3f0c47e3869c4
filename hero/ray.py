"""Questions about images, answered in batches on many workers by Ray Data; see docs/batch.md.

Ray is imported only where workers are started, so :class:`Answerer` works without it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ._checks import check_integer, error
from .config import HeroConfig

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["Answerer"]

OPENERS = 8  # threads that open the images of a batch


class Answered(NamedTuple):
    """What becomes of a row. The fields are the columns that :class:`Answerer` adds."""

    answer: str = ""
    visual_tokens: int = 0
    stock_visual_tokens: int = 0
    seconds: float = 0.0
    error: str = ""


_DTYPES = (object, np.int64, np.int64, np.float64, object)


class Answerer:
    """A model with hero attached that answers batches of rows, for ``ray.data.Dataset.map_batches``.

    Each worker loads the model and attaches hero once::

        answered = dataset.map_batches(
            hero.ray.Answerer,
            fn_constructor_kwargs={"model": "llava-hf/llava-1.5-7b-hf", "keep_ratio": 0.2},
            batch_size=16,
            num_gpus=1,
            compute=ray.data.ActorPoolStrategy(size=4),
        )

    A call takes a batch as ``batch_format="numpy"`` has it, two columns of which are read:

    - ``question_column``: str, with at least one letter or digit. The checkpoint's chat template makes it a
      prompt.
    - ``image_column``: one image a row: a path or URL (str), the bytes of a file (bytes), a mapping with
      ``bytes`` or ``path`` (as Hugging Face datasets store images), or an array of uint8
      ``[height, width]`` or ``[height, width, 2 to 4 channels]``.

    It returns the other columns as they are, without the image, and adds:

    - ``answer``: str, without special tokens; empty if the row failed.
    - ``visual_tokens``: int64, the visual tokens that the language model saw; 0 if the row failed.
    - ``stock_visual_tokens``: int64, those of the stock model; 0 if the row failed.
    - ``seconds``: float64, wall-clock seconds of the batch, from opening images to decoded answers, divided
      by its number of rows.
    - ``error``: str, why the row failed; empty otherwise.

    The rows of a batch go through one ``generate``, greedily, padded on the left. If that fails, they are
    answered one by one, so that only rows that fail alone have an error.

    Args:
        model: folder or hub id of a checkpoint of a supported family; ``None`` for the bundled mini model.
        clip: folder or hub id of a CLIP model, which weights tiles by the question.
        second_pass: as of :class:`hero.ClipRelevance`.
        question_column, image_column: names of columns.
        image_folder: folder that relative paths begin at; ``None`` for the worker's current folder.
        max_new_tokens: length of the answer, in tokens.
        options: arguments of :func:`hero.attach`, such as ``keep_ratio`` and ``policy``.

    Attributes:
        handle: what :func:`hero.attach` returned.

    Raises:
        OSError, TypeError, ValueError: a model that cannot be loaded or is not supported, options out of
            range; by name. A call raises ``ValueError`` for a batch that lacks a column, or has one of those
            that are added.
        torch.AcceleratorError: in a call, the GPU fails. Then the worker is of no use.
    """

    def __init__(
        self,
        model: str | None = None,
        *,
        clip: str | None = None,
        second_pass: bool = False,
        question_column: str = "question",
        image_column: str = "image",
        image_folder: str | os.PathLike | None = None,
        max_new_tokens: int = 16,
        **options,
    ):
        from .checkpoints import load
        from .handle import attach

        self.max_new_tokens = check_integer("max_new_tokens", max_new_tokens)
        self.question_column, self.image_column = question_column, image_column
        self.image_folder = "" if image_folder is None else os.fspath(image_folder)
        self._loaded = load(model, clip, second_pass=second_pass)
        model_, processor, relevance, _ = self._loaded
        self.handle = attach(model_, processor, relevance=relevance, **options)

    @staticmethod
    def check(model: str | None = None, clip: str | None = None, **options) -> HeroConfig:
        """The configuration of these arguments of the constructor, checked without loading weights.

        Raises:
            OSError, TypeError, ValueError: what the constructor would raise, apart from damaged weights and
                a CLIP model that does not fit the tower.
        """
        from .checkpoints import outline
        from .handle import attach

        found = outline(model, clip)
        return attach(found.model, found.processor, relevance=found.relevance, **options).config

    def __call__(self, batch: Mapping[str, Sequence]) -> dict[str, Any]:
        """Answer a batch: columns in, columns out; see the class."""
        self._check(batch)
        start = time.perf_counter()
        questions, images = batch[self.question_column], batch[self.image_column]
        with ThreadPoolExecutor(OPENERS) as threads:
            rows = list(threads.map(self._read, questions, images))
        answers = iter(self._answers([row for row in rows if not isinstance(row, Answered)]))
        answered = [row if isinstance(row, Answered) else next(answers) for row in rows]
        seconds = (time.perf_counter() - start) / max(len(rows), 1)
        answered = [row._replace(seconds=seconds) for row in answered]
        added = {
            name: np.array([getattr(row, name) for row in answered], dtype=dtype)
            for name, dtype in zip(Answered._fields, _DTYPES)
        }
        return {name: column for name, column in batch.items() if name != self.image_column} | added

    def _check(self, batch: Mapping[str, Sequence]) -> None:
        names = ", ".join(map(str, batch))
        for argument in ("question_column", "image_column"):
            if getattr(self, argument) not in batch:
                raise error(ValueError, argument, f"one of the columns {names}", getattr(self, argument))
        taken = [name for name in Answered._fields if name in batch and name != self.image_column]
        if taken:
            expected = f"no column {taken[0]!r}, which is added (Dataset.rename_columns changes its name)"
            raise ValueError(f"batch: expected {expected}, got {names}")

    def _read(self, question: Any, image: Any) -> tuple[str, Image.Image] | Answered:
        """Question and image of a row, or its error."""
        try:
            if not isinstance(question, str) or not re.search(r"\w", question):
                raise error(ValueError, "question", "words", question)
            self._loaded.prompt(question)  # raises for a placeholder of an image
            return question, self._open(image)
        except Exception as problem:
            return Answered(error=_line(problem))

    def _open(self, image: Any) -> Image.Image:
        """The image of a row, upright and in RGB."""
        from .images import open_image, read

        if isinstance(image, Mapping):
            image = next((image[key] for key in ("bytes", "path") if image.get(key) is not None), None)
        if isinstance(image, str) and not image.startswith(("http://", "https://")):
            image = os.path.join(self.image_folder, image)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, about large images and on the way to an error
            if isinstance(image, (str, bytes)):
                return open_image(image).convert("RGB")
            if image is None:
                raise error(ValueError, "image", "a path, a URL, the bytes of a file or an array", image)
            return read(image, None)

    def _answers(self, asked: Sequence) -> list[Answered]:
        """Answers to pairs (question, image)."""
        if not asked:
            return []
        try:
            return self._generate(*zip(*asked))
        except Exception as problem:
            if type(problem).__name__ == "AcceleratorError":  # newer than the oldest torch
                raise
            failed = Answered(error=_line(problem))
        if len(asked) == 1:
            return [failed]
        return [self._answers([one])[0] for one in asked]

    def _generate(self, questions: Sequence[str], images: Sequence[Image.Image]) -> list[Answered]:
        import torch

        model, processor = self._loaded.model, self._loaded.processor
        inputs = self._loaded.batch(images, questions)
        length = inputs["input_ids"].shape[1]
        with torch.inference_mode():
            output = model.generate(
                **inputs, max_new_tokens=self.max_new_tokens, do_sample=False, num_beams=1
            )
        texts = processor.batch_decode(output[:, length:], skip_special_tokens=True)
        selection = self.handle.last
        assert selection is not None
        return [
            Answered(text.strip(), int(kept), int(layout.full_tokens))
            for text, kept, layout in zip(texts, selection.lengths, selection.layout, strict=True)
        ]


def _line(problem: Exception) -> str:
    """An exception in one line that UTF-8 can hold."""
    text = " ".join(str(problem).split()) or type(problem).__name__
    if not isinstance(problem, (OSError, TypeError, ValueError)) and text != type(problem).__name__:
        text = f"{type(problem).__name__}: {text}"
    return text.encode("utf-8", "backslashreplace").decode()


@contextlib.contextmanager
def cluster(option: str, workers: int | None) -> Iterator[tuple[int, float]]:
    """Ray, started or joined where a cluster is there: (number of workers, GPUs of each).

    What was started here ends with the context.

    Args:
        option: that errors begin with.
        workers: ``None`` for one on each GPU, or one without GPUs.

    Raises:
        ImportError: Ray is not installed.
        ValueError: more workers than the cluster has room for.
    """
    try:
        import ray
        import ray.data
    except ImportError as problem:
        extra = "pip install 'hero-vlm[ray]'; without Ray --workers 0 runs in this process"
        raise ImportError(f"{option}: expected Ray, got none ({problem}): {extra}") from problem
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    starts = not ray.is_initialized()
    if starts:
        ray.init(include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False)
    try:
        found = ray.cluster_resources()
        kind = "GPU" if found.get("GPU", 0) else "CPU"
        room = int(found.get(kind, 0))
        if workers is None:
            workers = room if kind == "GPU" else 1
        if workers > room:
            has = f"as many as the cluster has {kind}s"
            raise error(ValueError, option, f"at most {room}, {has}", workers)
        yield workers, float(kind == "GPU")
    finally:
        if starts:
            ray.shutdown()


def spread(worker: type, job: Any, items: Sequence[Mapping], workers: int, gpus: float) -> Iterator[dict]:
    """What ``worker(job)`` returns for each item, as results come, from several processes.

    Ray Data starts a worker that dies again, and repeats its call as often as it takes. So a call must have
    the same effect when it is repeated.

    Args:
        worker: a class for ``map_batches`` whose calls take and return batches of one item. If the returned
            ``problem`` is not empty, the run ends.
        items: with the same keys and with values that Arrow can hold.

    Raises:
        ValueError: the ``problem``.
        ray.exceptions.RayError: what a worker raised.
    """
    import ray

    context = ray.data.DataContext.get_current()
    bars, context.enable_progress_bars = context.enable_progress_bars, False
    try:
        data = ray.data.from_items(list(items), override_num_blocks=len(items)).map_batches(
            worker,
            fn_constructor_args=(job,),
            batch_size=1,
            num_cpus=1,
            num_gpus=gpus,
            # One call at a time, so that none waits behind a slow one while another worker is idle.
            compute=ray.data.ActorPoolStrategy(size=workers, max_tasks_in_flight_per_actor=1),
        )
        for result in data.iter_rows():
            if result["problem"]:
                raise ValueError(result["problem"])
            yield result
    finally:
        context.enable_progress_bars = bars
