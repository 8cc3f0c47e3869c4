"""The models that the command line names, loaded only if they are of a supported type and complete."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from ._checks import error

__all__ = ["Loaded", "load", "outline"]


class Loaded(NamedTuple):
    """A model with its processor and, if there is one, its relevance model."""

    model: Any
    processor: Any
    relevance: Any
    is_mini: bool

    def prompt(self, question: str) -> str:
        """The prompt for a question, by the processor's chat template if it has one.

        Raises:
            ValueError: a question with an image placeholder.
        """
        if self.processor.image_token in question:
            expected = f"text without {self.processor.image_token}, which stands for an image"
            raise error(ValueError, "question", expected, question)
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

    @property
    def keep_ratio(self) -> float:
        """What is kept by default."""
        from .models import adapter_for

        return adapter_for(self.model).keep_ratio

    def inputs(self, image, question: str):
        """The model's inputs, on its device."""
        inputs = self.processor(images=image, text=self.prompt(question), return_tensors="pt")
        return inputs.to(self.model.device, self.model.dtype)

    def batch(self, images: Sequence, questions: Sequence[str]):
        """The model's inputs for several questions, each about its own image, padded on the left.

        Raises:
            ValueError: a question with an image placeholder.
        """
        from .models import adapter_for

        # Idefics3 and SmolVLM take a flat list as the images of one prompt.
        shown = [[image] for image in images] if adapter_for(self.model).has_run_per_crop else list(images)
        tokenizer = self.processor.tokenizer
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        inputs = self.processor(
            images=shown,
            text=[self.prompt(question) for question in questions],
            padding=True,
            padding_side="left",
            return_tensors="pt",
        )
        return inputs.to(self.model.device, self.model.dtype)

    def visual_tokens(self, inputs) -> int:
        return int((inputs["input_ids"] == self.model.config.image_token_id).sum())


def load(name: str | None, clip: str | None = None, *, second_pass: bool = False) -> Loaded:
    """A model in eval mode, on the GPU if there is one, with its processor.

    Args:
        name: folder or hub id of the model; ``None`` for the bundled one, which has a relevance model.
        clip: folder or hub id of the CLIP model of a relevance model.
        second_pass: as of :class:`hero.ClipRelevance`.

    Raises:
        OSError: a checkpoint that is missing or damaged. The message begins with ``--model`` or ``--clip``.
        ValueError: one of another type, or without all weights; likewise.
    """
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if name is None:
        from . import mini

        return Loaded(*mini.load(), is_mini=True)
    from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer, CLIPModel

    from .relevance import ClipRelevance

    # Types first, since reading weights takes long.
    _check_types(name, clip)
    model = _model("--model", AutoModelForImageTextToText, name, dtype="auto")
    processor = _pretrained("--model", AutoProcessor, name)
    relevance = None
    if clip is not None:
        tokenizer = _pretrained("--clip", AutoTokenizer, clip)
        relevance = ClipRelevance(_model("--clip", CLIPModel, clip), tokenizer, second_pass=second_pass)
    return Loaded(model, processor, relevance, is_mini=False)


def outline(name: str | None, clip: str | None = None) -> Loaded:
    """What :func:`load` would return, without memory for weights: their types and sizes, and the processor.

    Whether ``hero.attach`` takes them can be tried in seconds. Their relevance model has a second pass, since
    there are no weights to compare.

    Raises:
        OSError, ValueError: as :func:`load`, apart from missing or damaged weights.
    """
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer, CLIPModel

    from . import mini
    from .relevance import ClipRelevance

    folder = str(mini.WEIGHTS) if name is None else name
    _check_types(folder, clip)
    config, relevance = _pretrained("--model", AutoConfig, folder), None
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
        if clip is not None:
            tokenizer = _pretrained("--clip", AutoTokenizer, clip)
            clip_model = CLIPModel(_pretrained("--clip", AutoConfig, clip))
            relevance = ClipRelevance(clip_model, tokenizer, second_pass=True)
        elif name is None:
            clip_model = CLIPModel(mini.clip_config(config.text_config, config.vision_config))
            relevance = ClipRelevance(clip_model, mini.clip_tokenizer(), second_pass=True)
    processor = _pretrained("--model", AutoProcessor, folder)
    return Loaded(model, processor, relevance, is_mini=name is None)


def _pretrained(argument: str, cls, name: str, **kwargs):
    try:
        return cls.from_pretrained(name, **kwargs)
    except Exception as problem:  # for damaged files transformers raises exceptions of many kinds
        reason = (str(problem).strip() or type(problem).__name__).split("\n")[0]
        expected = f"{argument}: expected a folder or hub id of a model, got {name!r}"
        raise OSError(f"{expected}: {reason}") from problem


def _check_types(model: str, clip: str | None) -> None:
    """Raise unless a checkpoint is of a supported family, and the other, if there is one, a CLIP model."""
    from .models import supported_types

    _check_type("--model", model, supported_types())
    if clip is not None:
        _check_type("--clip", clip, ["clip"])


def _check_type(argument: str, name: str, types: Sequence[str]) -> None:
    """Raise unless a checkpoint is of one of these types; its weights are not read."""
    from transformers import AutoConfig

    found = _pretrained(argument, AutoConfig, name).model_type
    if found not in types:
        expected = f"{argument}: expected a checkpoint of type {' or '.join(types)}"
        raise ValueError(f"{expected}, got {name!r} of type {found}")


def _model(argument: str, cls, name: str, **kwargs):
    """A model in eval mode, on the GPU if there is one; raise if the checkpoint lacks weights."""
    import torch

    model, report = _pretrained(argument, cls, name, output_loading_info=True, **kwargs)
    # Old checkpoints may or may not hold position_ids, which follow from the configuration.
    missing = sorted(weight for weight in report["missing_keys"] if not weight.endswith("position_ids"))
    if missing:  # transformers has drawn them at random
        got = f"{name!r} without {len(missing)} of them, such as {missing[0]}"
        raise ValueError(f"{argument}: expected a checkpoint with all weights of {cls.__name__}, got {got}")
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
