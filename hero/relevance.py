"""Relevance: CLIP's similarity of each tile to the question, and the question in a prompt."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hero_kernels.segments import to_device

from ._checks import error
from .cuda_graphs import CudaGraphs
from .models import is_untouched, unwrapped

__all__ = [
    "ClipRelevance",
    "check_questions",
    "check_relevance",
    "question_of",
    "renormalization",
    "renormalized",
]

# The markers around the user's words in the chat templates of published checkpoints: (begin, end).
_TEMPLATES = (
    ("<|im_start|>user", "<|im_end|>"),  # ChatML: Qwen, Yi, Hermes, InternVL, LLaVA-OneVision
    ("<|user|>", "<|assistant|>"),  # Granite
    ("<|start_header_id|>user<|end_header_id|>", "<|eot_id|>"),  # Llama 3
    ("[INST]", "[/INST]"),  # Mistral, Llama 2
    ("USER:", "ASSISTANT:"),  # Vicuna
    ("USER :", "ASSISTANT :"),
    ("User:", "<end_of_utterance>"),  # SmolVLM, Idefics3
)
_SPECIAL = re.compile(
    r"<\|[^|<>]*\|>|</?s>|<(?:pad|unk|bos|eos|image)>|<<SYS>>.*?<</SYS>>"
    r"|</?img>|<IMG_CONTEXT>|<fake_token_around_image>|<global-img>|<row_\d+_col_\d+>",
    re.DOTALL,
)


def question_of(prompt: str) -> str:
    """The user's last question in a prompt, without chat template, special tokens and image tokens.

    Knows the markers of ChatML, Llama 2 and 3, Mistral, Vicuna, Granite and Idefics3; a prompt with none of
    them is taken whole. Of several turns it is the last one with words, since the answer is to that one;
    ``""`` if none has words.
    """
    for begin, end in _TEMPLATES:
        _, *turns = prompt.split(begin)
        if turns:
            questions = (_clean(turn.split(end)[0]) for turn in reversed(turns))
            return next(filter(None, questions), "")
    return _clean(prompt)


def _clean(text: str) -> str:
    return " ".join(_SPECIAL.sub(" ", text).split())


def check_questions(
    text: str | Sequence[str] | Tensor | None, images: int, *, required: bool
) -> Sequence[str] | Tensor | None:
    """``text`` as one question, or its embedding, for each image.

    Raises:
        TypeError: not a string, a sequence or a tensor.
        ValueError: ``required``, and not one for each image, or one without words.
    """
    if isinstance(text, str):
        text = [text] * images
    if text is not None and not isinstance(text, (Sequence, Tensor)):
        raise error(TypeError, "text", "a string, one an image, or their embeddings", text)
    if required and (text is None or len(text) != images):
        got = "none" if text is None else f"{len(text)}"
        raise ValueError(f"text: expected a question for each of {images} images, got {got}")
    if required and text is not None and not isinstance(text, Tensor):
        for image, question in enumerate(text):
            if isinstance(question, str) and not question.strip():
                raise ValueError(f"text: expected a question with words for image {image}, got {question!r}")
    return text


class ClipRelevance:
    """CLIP score of a tile and the question: the cosine of their projected embeddings (docs/method.md, 2).

    Args:
        clip_model: a transformers ``CLIPModel``. If its vision weights are those of the model's own vision
            tower, which is checked, tile embeddings are projected from the tower's features.
        tokenizer: the CLIP tokenizer.
        second_pass: if the weights differ, also run CLIP's vision encoder on all crops, which costs about as
            much as the vision tower itself. Without it, such a model raises an error.

    A question longer than CLIP's text encoder takes is cut into windows, whose embeddings are averaged
    by length.

    Raises:
        TypeError: ``clip_model`` has no text and image side, or ``tokenizer`` is no tokenizer.
        ValueError: ``tokenizer`` has no token to begin or end a text with.
    """

    def __init__(self, clip_model: nn.Module, tokenizer, *, second_pass: bool = False):
        for name in ("text_model", "vision_model", "visual_projection", "get_text_features"):
            if not hasattr(clip_model, name):
                raise TypeError(
                    f"clip_model: expected a transformers CLIPModel, got {type(clip_model).__name__}"
                )
        if not callable(tokenizer) or not hasattr(tokenizer, "convert_tokens_to_ids"):
            raise TypeError(f"tokenizer: expected the CLIP model's tokenizer, got {type(tokenizer).__name__}")
        for name in ("bos_token_id", "eos_token_id"):
            if getattr(tokenizer, name, None) is None:
                raise ValueError(
                    f"tokenizer: expected one with {name}, got {type(tokenizer).__name__} without"
                )
        if not isinstance(second_pass, bool):
            raise error(TypeError, "second_pass", "a bool", second_pass)
        self.clip_model = clip_model
        self.tokenizer = tokenizer
        self.second_pass = second_pass
        self._graphs = CudaGraphs()

    @property
    def device(self) -> torch.device:
        """Where CLIP runs."""
        return self.clip_model.device

    @property
    def side(self) -> int:
        """Patches along one side of a crop, as CLIP sees it."""
        config = self.clip_model.config.vision_config
        return config.image_size // config.patch_size

    def shares_weights(self, vision_tower: nn.Module) -> bool:
        """Whether ``vision_tower`` has the weights of CLIP's vision encoder, equal up to a dtype cast.

        Weights that cannot be read, since they are offloaded or sharded, count as different with
        ``second_pass``.

        Raises:
            ValueError: weights that cannot be read, without ``second_pass``.
        """
        own = self.clip_model.vision_model.state_dict(keep_vars=True)
        other = unwrapped(vision_tower).state_dict(keep_vars=True)

        def same(one: Tensor, two: Tensor) -> bool:
            if one is two:
                return True
            if one.shape != two.shape:
                return False
            if one.is_meta or two.is_meta or type(one.data) is not Tensor or type(two.data) is not Tensor:
                if self.second_pass:
                    return False
                raise ValueError(
                    "relevance: expected weights that can be compared with those of the vision tower, got "
                    "offloaded or sharded ones: attach first, or use ClipRelevance(..., second_pass=True)"
                )
            two = two.to(one.device)
            return torch.equal(one, two.to(one.dtype)) or torch.equal(one.to(two.dtype), two)

        return own.keys() == other.keys() and all(same(own[name], other[name]) for name in own)

    def text_embeddings(self, texts: Sequence[str]) -> Tensor:
        """Unit embeddings ``[n, E]`` fp32 of texts of any length."""
        return self._embed(self._tokens(texts))

    def start(self, texts: Sequence[str], *, cuda_graphs: bool = False) -> Callable[[], Tensor]:
        """:meth:`text_embeddings` in two steps: tokenized now, embedded when the result is called.

        Args:
            cuda_graphs: replay the text encoder from a CUDA graph, where that is possible.

        On a GPU the embedding runs on a stream of its own, beside the work that was launched between the two
        steps. The stream that is current when the result is called waits for the embeddings.
        """
        tokens = self._tokens(texts)
        if self.device.type != "cuda":
            return lambda: self._embed(tokens, cuda_graphs)
        before = torch.cuda.current_stream(self.device).record_event()

        def join() -> Tensor:
            current, own = torch.cuda.current_stream(self.device), torch.cuda.Stream(self.device)
            own.wait_event(before)
            with torch.cuda.stream(own):
                embeddings = self._embed(tokens, cuda_graphs)
            current.wait_stream(own)
            embeddings.record_stream(current)
            return embeddings

        return join

    def _tokens(self, texts: Sequence[str]) -> tuple[Tensor, Tensor, Tensor, int]:
        """On the CPU: windows ``[W, longest]`` of tokens, text and length of each; the number of texts."""
        length = self.clip_model.config.text_config.max_position_embeddings
        begin, end = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        windows, owners = [], []
        for number, text in enumerate(texts):
            if not isinstance(text, str):
                raise error(TypeError, "text", "a string an image", text)
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            for start in range(0, max(len(ids), 1), length - 2):
                windows.append([begin, *ids[start : start + length - 2], end])
                owners.append(number)
        # On a GPU at full length, which costs nothing there: then one CUDA graph serves all questions.
        longest = length if self.device.type == "cuda" else max(map(len, windows))
        # Padded with the end token: attention is causal and the first end is read, so no mask is needed.
        tokens = torch.tensor([window + [end] * (longest - len(window)) for window in windows])
        words = torch.tensor([max(len(window) - 2, 1) for window in windows])
        return tokens, torch.tensor(owners), words, len(texts)

    def _embed(self, tokens: tuple[Tensor, Tensor, Tensor, int], cuda_graphs: bool = False) -> Tensor:
        """Embeddings of what :meth:`_tokens` returned: means over windows, weighted by their lengths."""
        windows, owners, words = (to_device(values, self.device) for values in tokens[:3])
        with torch.no_grad():
            features = self._text_features(windows) if cuda_graphs else None
            if features is None:
                features = _pooled(self.clip_model.get_text_features(input_ids=windows))
        features = F.normalize(features.float(), dim=-1)
        sums = features.new_zeros((tokens[3], features.shape[-1]))
        sums.index_add_(0, owners, features * words[:, None])
        return F.normalize(sums, dim=-1)

    def _text_features(self, windows: Tensor) -> Tensor | None:
        """``get_text_features``, its encoder replayed from a CUDA graph; ``None`` if it cannot be."""
        clip, encoder = self.clip_model, self.clip_model.text_model

        def is_plain() -> bool:
            plain = type(clip).__name__ == "CLIPModel" and type(encoder).__name__ == "CLIPTextModel"
            return plain and all(map(is_untouched, (clip, *encoder.modules())))

        if self._graphs.refusal(encoder, is_plain, windows, {}):
            return None

        def encode(windows: Tensor) -> Tensor:
            return _pooled(encoder(input_ids=windows))

        key = encoder.config._attn_implementation
        pooled, _ = self._graphs.run(key, encode, (windows,), (), torch.clone)
        return None if pooled is None else clip.text_projection(pooled)

    def image_embeddings(self, pixel_values: Tensor | None, pooled: Tensor | None) -> Tensor:
        """Unit embeddings ``[T, E]`` fp32 of crops.

        Args:
            pixel_values: ``[T, 3, S, S]`` crops, normalised as CLIP's; resized if CLIP's own size differs.
            pooled: ``[T, C]`` CLS features, after the final layer norm, of a tower that shares CLIP's
                weights; replaces the second pass.
        """
        with torch.no_grad():
            if pooled is not None:
                pooled = pooled.to(self.device, self.clip_model.dtype)
                features = self.clip_model.visual_projection(pooled)
            else:
                pixel_values = self._resized(pixel_values)
                features = _pooled(self.clip_model.get_image_features(pixel_values=pixel_values))
        return F.normalize(features.float(), dim=-1)

    def patch_embeddings(self, pixel_values: Tensor | None, patches: Tensor | None) -> Tensor:
        """Unit embeddings ``[T, P, E]`` fp32 of patches: CLIP's final norm and projection on each of them.

        Args:
            pixel_values: as in :meth:`image_embeddings`.
            patches: ``[T, P, C]`` last layer, at the patches, of a tower that shares CLIP's weights; replaces
                the second pass.
        """
        vision = self.clip_model.vision_model
        with torch.no_grad():
            if patches is None:
                patches = vision(pixel_values=self._resized(pixel_values)).last_hidden_state[:, 1:]
            patches = patches.to(self.device, self.clip_model.dtype)
            features = self.clip_model.visual_projection(vision.post_layernorm(patches))
        return F.normalize(features.float(), dim=-1)

    def _resized(self, pixel_values: Tensor) -> Tensor:
        size = self.clip_model.config.vision_config.image_size
        pixel_values = pixel_values.to(self.device, self.clip_model.dtype)
        if pixel_values.shape[-1] == size:
            return pixel_values
        resized = F.interpolate(pixel_values.float(), (size, size), mode="bicubic", antialias=True)
        return resized.to(pixel_values.dtype)

    def __call__(
        self, text: Tensor, crop_images: Tensor, pixel_values: Tensor | None, pooled: Tensor | None
    ) -> Tensor:
        """Cosine ``[T]`` fp32 of each crop with the question of its image.

        Args:
            text: ``[B, E]`` unit embedding of the question of each image.
            crop_images: ``[T]`` int64, the image of each crop.
            pixel_values, pooled: as in :meth:`image_embeddings`.
        """
        image = self.image_embeddings(pixel_values, pooled)
        return (image * text[crop_images.to(text.device)]).sum(-1).to(crop_images.device)

    def of_patches(
        self, text: Tensor, crop_images: Tensor, pixel_values: Tensor | None, patches: Tensor | None
    ) -> Tensor:
        """Cosine ``[T, P]`` fp32 of each patch with the question of its image.

        Args:
            text, crop_images: as in :meth:`__call__`.
            pixel_values, patches: as in :meth:`patch_embeddings`.
        """
        patch = self.patch_embeddings(pixel_values, patches)
        return (patch @ text[crop_images.to(text.device)][..., None])[..., 0].to(crop_images.device)


def _pooled(output) -> Tensor:
    """The embedding in what ``get_*_features`` returned: a tensor, or an output that holds it."""
    return output if isinstance(output, Tensor) else output.pooler_output


def renormalization(
    normalization: tuple[Sequence[float], Sequence[float]],
) -> tuple[Tensor, Tensor] | None:
    """Factor and summand ``[3, 1, 1]`` that turn pixels of another (mean, standard deviation) into CLIP's.

    ``None`` if these are CLIP's own.

    Raises:
        TypeError, ValueError: not two times three numbers, the second > 0.
    """
    from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

    given = torch.tensor(normalization, dtype=torch.float64)
    own = torch.tensor([OPENAI_CLIP_MEAN, OPENAI_CLIP_STD], dtype=torch.float64)
    if given.shape != own.shape or not bool((given[1] > 0).all()):
        expected = "mean and standard deviation > 0 of three channels"
        raise error(ValueError, "normalization", expected, normalization)
    if torch.allclose(given, own):
        return None
    factor, summand = given[1] / own[1], (given[0] - own[0]) / own[1]
    return factor.float()[:, None, None], summand.float()[:, None, None]


def renormalized(pixel_values: Tensor, factor: Tensor, summand: Tensor) -> Tensor:
    """``factor · pixel_values + summand``, in fp32."""
    factor, summand = (to_device(one, pixel_values.device) for one in (factor, summand))
    return torch.addcmul(summand, pixel_values.float(), factor)


def check_relevance(
    relevance: ClipRelevance | None, policy: str, patches_side: int | None, *, shared: bool
) -> None:
    """Raise ``ValueError`` unless a relevance model can serve a policy.

    Args:
        policy: the name of the policy, which needs relevance.
        patches_side: patches along one side of a crop, if the policy compares patches with the question.
        shared: whether CLIP has the vision weights of the model's own tower.
    """
    if relevance is None:
        raise ValueError(f"relevance: expected a hero.ClipRelevance for policy {policy!r}, got None")
    if patches_side is not None and relevance.side != patches_side:
        raise ValueError(
            f"relevance: expected a CLIP model of {patches_side} × {patches_side} patches a crop for policy "
            f"{policy!r}, got one of {relevance.side} × {relevance.side}"
        )
    if not shared and not relevance.second_pass:
        raise ValueError(
            "relevance: expected a CLIP model with the vision weights of the model's own tower, or "
            "ClipRelevance(..., second_pass=True), which runs CLIP's vision encoder too, got others"
        )
