"""lmms-eval's own ``llava_hf`` with hero attached: same loading, same prompts, same generation settings.

Apart from the dropped tokens there are two differences: answers are generated in batches, and an error during
generation is raised, while ``llava_hf`` scores an empty answer.
"""

from __future__ import annotations

import inspect
import json
import time
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
from accelerate import PartialState
from lmms_eval import utils
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.models.chat.llava_hf import LlavaHf
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from lmms_eval.protocol import ChatMessages
from tqdm import tqdm
from transformers import AutoConfig, AutoTokenizer, CLIPModel

import hero
from hero import mini

__all__ = ["HeroLlavaNext"]

CHECKPOINT = "llava-hf/llava-v1.6-vicuna-7b-hf"
MINI = "mini"
# The mini model has no chat template. Its prompts are the words of the question.
MINI_TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}{% if not loop.first %} {% endif %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endfor %}"
)
_LOADING = tuple(
    name
    for name, parameter in inspect.signature(LlavaHf.__init__).parameters.items()
    if name != "self" and parameter.kind is not inspect.Parameter.VAR_KEYWORD
)


class Chosen(NamedTuple):
    """What the arguments of :class:`HeroLlavaNext` ask for."""

    config: hero.HeroConfig
    loading: dict[str, Any]  # arguments of llava_hf
    pretrained: str  # what transformers loads
    relevance: str | None
    own: bool  # relevance is the mini model's
    template: str | None


class HeroLlavaNext(LlavaHf):
    """A LLaVA-NeXT checkpoint that keeps only the visual tokens that the policy selects.

    Args:
        pretrained: folder or hub id of a checkpoint of ``LlavaNextForConditionalGeneration``; ``"mini"`` is
            the bundled mini model.
        relevance: folder or hub id of a CLIP model, which weights tiles by the question; ``"mini"`` is the
            mini model's own, ``"none"`` uses no CLIP model.
        second_pass: as in :class:`hero.ClipRelevance`.
        batch_size: questions answered at once.
        dtype: ``"auto"`` or a floating-point dtype of torch by name, for both models.
        chat_template: a Jinja template, or the path of a file that holds one, instead of the checkpoint's.
        arguments: the other arguments of lmms-eval's ``llava_hf``, such as ``device``, and those of
            :class:`hero.HeroConfig`, such as ``keep_ratio``, ``policy`` (a name or ``module:Class``) and the
            parameters of the policy. Sequences and mappings are JSON.

    Attributes:
        handle: what ``hero.attach`` returned; ``None`` after :meth:`clean`.

    Raises:
        ValueError: an unknown argument or an argument out of range, by name. Raised before any weights are
            loaded, except for layers that the encoder does not have.
    """

    def __init__(
        self,
        pretrained: str = CHECKPOINT,
        relevance: str | None = None,
        second_pass: bool = False,
        batch_size: int = 1,
        dtype: str | torch.dtype = "auto",
        chat_template: str | None = None,
        **arguments,
    ) -> None:
        chosen = self.check(pretrained, relevance, second_pass, batch_size, dtype, chat_template, **arguments)
        arguments = chosen.loading
        if PartialState().num_processes == 1:
            # llava_hf's own default is an empty string, which transformers 5 rejects.
            arguments.setdefault("device_map", arguments.get("device", "cuda"))
        super().__init__(chosen.pretrained, batch_size=batch_size, dtype=dtype, **arguments)
        processor = self._image_processor
        if chosen.template is not None:
            processor.chat_template = chosen.template
        elif processor.chat_template is None:
            raise ValueError(f"chat_template: expected one, since {pretrained!r} has none, got None")
        self.chat_template = processor.chat_template
        self._model.eval()
        clip = None
        if chosen.own:
            clip = hero.ClipRelevance(mini.build_clip(self.model), mini.clip_tokenizer())
        elif chosen.relevance is not None:
            tower = self.model.model.vision_tower
            clip_model = CLIPModel.from_pretrained(chosen.relevance, dtype=tower.dtype)
            tokenizer = AutoTokenizer.from_pretrained(chosen.relevance)
            clip = hero.ClipRelevance(clip_model.to(tower.device).eval(), tokenizer, second_pass=second_pass)
        self.handle: hero.Handle | None = hero.attach(
            self.model, processor, config=chosen.config, relevance=clip
        )

    @staticmethod
    def check(
        pretrained: str = CHECKPOINT,
        relevance: str | None = None,
        second_pass: bool = False,
        batch_size: int | str = 1,
        dtype: str | torch.dtype = "auto",
        chat_template: str | None = None,
        **arguments,
    ) -> Chosen:
        """What the arguments of the class ask for. Reads configurations, loads no weights.

        Raises:
            ValueError: an unknown argument or an argument out of range, by name.
        """
        relevance = None if relevance in (None, "none") else relevance
        if not isinstance(second_pass, bool):
            raise ValueError(f"second_pass: expected True or False, got {second_pass!r}")
        config = _config({name: arguments.pop(name) for name in [*arguments] if name not in _LOADING})
        config.policy.needs(with_relevance=relevance is not None)
        if isinstance(batch_size, bool) or not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise ValueError(f"batch_size: expected an integer >= 1, got {batch_size!r}")
        floating = dtype if isinstance(dtype, torch.dtype) else getattr(torch, str(dtype), None)
        if dtype != "auto" and not (isinstance(floating, torch.dtype) and floating.is_floating_point):
            raise ValueError(f"dtype: expected 'auto' or a floating-point dtype of torch, got {dtype!r}")
        template = None if chat_template is None else _template(chat_template)
        try:
            torch.device(arguments.get("device", "cuda"))
        except (RuntimeError, TypeError) as error:
            raise ValueError(f"device: expected a torch device, got {arguments['device']!r}") from error
        pretrained, bundled = _folder(pretrained)
        _check_type("pretrained", pretrained, "llava_next", revision=arguments.get("revision", "main"))
        own = False
        if relevance is not None:
            relevance, own = _folder(relevance)
            if own and not bundled:
                raise ValueError(f"relevance: expected a CLIP model for {pretrained!r}, got the mini model's")
            if not own:
                _check_type("relevance", relevance, "clip")
        if template is None and bundled:
            template = MINI_TEMPLATE
        return Chosen(config, arguments, pretrained, relevance, own, template)

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """Answers in the order of the requests.

        The run's ``throughput`` also reports the visual tokens kept per image and those of the stock model,
        both on average.

        Raises:
            ValueError: a request with a video.
        """
        results: list[GenerationResult] = []
        kept: list[int] = []
        stock: list[int] = []
        seconds = 0.0
        # Requests are (context, doc_to_messages, settings, doc id, task, split). A batch has one setting.
        order = utils.Collator(
            [request.args for request in requests],
            lambda arguments: (arguments[4], arguments[3]),
            group_fn=lambda arguments: arguments[2],
            grouping=True,
        )
        with tqdm(total=len(requests), disable=self.rank != 0, desc="Model Responding") as progress:
            for chunk in order.get_batched(n=self.batch_size):
                inputs = self._inputs(chunk)
                start = time.perf_counter()
                output = self.model.generate(**inputs, **self._settings(chunk[0][2]))
                answers = output[:, inputs["input_ids"].shape[1] :].tolist()  # synchronises with the device
                seconds += time.perf_counter() - start
                if "pixel_values" in inputs and self.handle is not None and self.handle.last is not None:
                    kept += self.handle.last.lengths
                    stock += [layout.full_tokens for layout in self.handle.last.layout]
                for text, asked, answer in zip(
                    self.tokenizer.batch_decode(answers, skip_special_tokens=True),
                    inputs["attention_mask"].sum(1).tolist(),
                    answers,
                    strict=True,
                ):
                    end = answer.index(self.eot_token_id) + 1 if self.eot_token_id in answer else len(answer)
                    results.append(GenerationResult(text, TokenCounts(input_tokens=asked, output_tokens=end)))
                progress.update(len(chunk))
        generated = sum(result.token_counts.output_tokens for result in results)
        counts = {"rank": self.rank}
        if kept:
            counts |= {"visual_tokens": fmean(kept), "stock_visual_tokens": fmean(stock)}
        log_metrics(seconds, generated, generated / seconds if seconds else 0.0, additional_metrics=counts)
        return order.get_original(results)

    def _inputs(self, chunk):
        """A batch for ``generate``, on the model's device."""
        texts, images = [], []
        for _, doc_to_messages, _, number, task, split in chunk:
            messages = ChatMessages(messages=doc_to_messages(self.task_dict[task][split][number]))
            pictures, videos, _ = messages.extract_media()
            if videos:
                raise ValueError(f"{task}: expected a task on images, got one with videos")
            images += pictures
            texts.append(
                self._image_processor.apply_chat_template(
                    messages.model_dump()["messages"], tokenize=False, add_generation_prompt=True
                )
            )
        inputs = self._image_processor(images=images or None, text=texts, padding=True, return_tensors="pt")
        return inputs.to(self.device, self.model.dtype)

    def _settings(self, task: dict) -> dict:
        """Arguments of ``generate``, read from a task as ``llava_hf`` does. ``until`` is ignored."""
        temperature = task.get("temperature", 0)
        return {
            "do_sample": temperature > 0,
            "temperature": temperature if temperature > 0 else None,
            "top_p": task.get("top_p"),
            "num_beams": task.get("num_beams", 1),
            "max_new_tokens": task.get("max_new_tokens", 1024),
            "use_cache": self.use_cache,
            "pad_token_id": self.eot_token_id,
            "eos_token_id": self.eot_token_id,
        }

    def clean(self) -> None:
        """Remove hero and free the model. lmms-eval calls this when it has all answers."""
        if self.handle is not None:
            self.handle.remove()
            self.handle = None
        super().clean()


def _config(options: dict) -> hero.HeroConfig:
    """The configuration of options from a command line, where sequences and mappings are text."""
    for name, value in options.items():
        text = value.strip("'") if isinstance(value, str) else ""
        if text.startswith(("[", "{")):
            try:
                options[name] = json.loads(text)
            except json.JSONDecodeError as error:
                raise ValueError(f"{name}: expected JSON, got {value!r}: {error}") from error
    try:
        return hero.HeroConfig(**options)
    except TypeError as error:  # all arguments come as text: a wrong type is a wrong value
        raise ValueError(str(error)) from error


def _folder(name: str) -> tuple[str, bool]:
    """The folder or hub id that transformers loads, and whether it is the mini model."""
    bundled = name == MINI or Path(str(name)).resolve() == mini.WEIGHTS.resolve()
    return str(mini.WEIGHTS) if bundled else name, bundled


def _check_type(argument: str, name: str, expected: str, **kwargs) -> None:
    try:
        found = AutoConfig.from_pretrained(name, **kwargs).model_type
    except (OSError, TypeError, ValueError) as error:
        reason = str(error).split("\n")[0]
        raise ValueError(f"{argument}: expected a folder or hub id, got {name!r}: {reason}") from error
    if found != expected:
        raise ValueError(f"{argument}: expected a model of type {expected}, got {name!r} of type {found}")


def _template(given: str) -> str:
    """A Jinja template, given as text or as the path of a file."""
    if not isinstance(given, str):
        raise ValueError(f"chat_template: expected a Jinja template or a file that holds one, got {given!r}")
    if "{" in given:
        return given
    try:
        return Path(given).read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(
            f"chat_template: expected a Jinja template or a file that holds one, got {given!r}"
        ) from error
