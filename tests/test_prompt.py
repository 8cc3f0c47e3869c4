"""Reading the question out of a prompt, and shortening runs of placeholders."""

import pytest
import torch
from PIL import Image

import hero
from hero import mini
from hero.prompt import images_of_rows, questions, shrink
from hero.relevance import check_questions, question_of

IMAGE = 9


@pytest.mark.parametrize(
    ("prompt", "question"),
    [
        ("<image> what number is on the red plate", "what number is on the red plate"),
        ("<s>[INST] <image>\nWhat is shown here? [/INST]", "What is shown here?"),
        (
            "A chat between a curious human and an artificial intelligence assistant. USER: <image>\n"
            "How many dogs? ASSISTANT:",
            "How many dogs?",
        ),
        (
            "<|im_start|>system\nAnswer the questions.<|im_end|>"
            "<|im_start|>user\n<image>\nWhat colour?<|im_end|><|im_start|>assistant\n",
            "What colour?",
        ),
        (
            "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n<image>\nWhere is it?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
            "Where is it?",
        ),
        ("USER: <image>\nFirst? ASSISTANT: Yes. USER: And the second? ASSISTANT:", "And the second?"),
        ("[INST] <<SYS>>Be brief.<</SYS>> <image> Which one? [/INST]", "Which one?"),
        ("  two   lines\nof text ", "two lines of text"),
        # Without words: neither the names of the roles nor what others said.
        ("USER: <image> ASSISTANT:", ""),
        ("A chat with an assistant. USER : <image> ASSISTANT :", ""),
        ("<s>[INST] <<SYS>>Be brief.<</SYS>> <image>\n [/INST]", ""),
        (
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n<image><|im_end|>\n"
            "<|im_start|>assistant\n",
            "",
        ),
        ("<|im_start|>user", ""),
        (
            "<|start_header_id|>user<|end_header_id|>\n\n<image><|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
            "",
        ),
        # The last turn of the user that has words.
        ("USER: What is it? ASSISTANT: A dog. USER: <image> ASSISTANT:", "What is it?"),
        ("[INST] First? [/INST] Yes.</s>[INST] Second? [/INST] No.</s>[INST] <image> [/INST]", "Second?"),
        ("", ""),
        ("<image>", ""),
    ],
)
def test_question_of(prompt, question):
    assert question_of(prompt) == question


class Words:
    """A tokenizer that knows these words by number."""

    words = ("", "USER:", "ASSISTANT:", "what", "where", "<pad>")

    def decode(self, ids, skip_special_tokens):
        return " ".join(self.words[number] for number in ids.tolist())


def test_questions_of_images():
    """One for each image, from its row; "" where the row has none."""
    ids = torch.tensor([[1, IMAGE, IMAGE, 3, 2], [5, 1, IMAGE, 2, 2], [1, IMAGE, 4, 2, 5]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 1, 1, 1, 1], [1, 1, 1, 1, 0]])
    assert questions(ids, mask, IMAGE, [0, 0, 1, 2], Words()) == ["what", "what", "", "where"]


@pytest.mark.parametrize("empty", ["", " \n"])
def test_relevance_needs_words(empty):
    message = f"text: expected a question with words for image 1, got {empty!r}"
    with pytest.raises(ValueError) as raised:
        check_questions(["what", empty], 2, required=True)
    assert str(raised.value) == message
    with pytest.raises(ValueError, match="for image 0"):
        check_questions(empty, 2, required=True)
    assert check_questions(["what", empty], 2, required=False) == ["what", empty]


def test_a_prompt_without_words_is_refused_by_those_who_read_it():
    model, processor, relevance = mini.load()
    image = Image.open(mini.demo_questions()[0].image)
    inputs = processor(images=image, text="<image>", return_tensors="pt")
    with hero.attach(model, processor, keep_ratio=0.2, relevance=relevance) as handle:
        with pytest.raises(ValueError, match="text: expected a question with words for image 0, got ''"):
            model(**inputs)
        assert handle.last is None
    with hero.attach(model, processor, keep_ratio=0.2):
        assert model(**inputs).logits.isfinite().all()


def test_images_of_rows():
    is_image = torch.tensor([[1, 1, 1, 0, 0], [0, 0, 0, 0, 0], [1, 0, 1, 1, 1]]).bool()
    assert images_of_rows(is_image, [2, 1, 4]) == [0, 0, 2]
    assert images_of_rows(is_image, [3, 0, 4]) == [0, 0, 2]
    with pytest.raises(ValueError, match="input_ids: expected the 2 placeholders of image 1 in one row"):
        images_of_rows(is_image, [2, 2, 3])


def prompts(side: str):
    """Two rows: text, 4 placeholders, text; and text, 2 + 3 placeholders of adjacent images; padded."""
    rows = [[1, IMAGE, IMAGE, IMAGE, IMAGE, 2, 3], [4, IMAGE, IMAGE, IMAGE, IMAGE, IMAGE, 5, 6, 7]]
    ids, mask = torch.zeros(2, 11, dtype=torch.long), torch.zeros(2, 11, dtype=torch.long)
    for row, words in enumerate(rows):
        place = slice(11 - len(words), 11) if side == "left" else slice(0, len(words))
        ids[row, place] = torch.tensor(words)
        mask[row, place] = 1
    return ids, mask


@pytest.mark.parametrize("side", ["left", "right"])
def test_shrink(side):
    ids, mask = prompts(side)
    labels = torch.where(ids == IMAGE, -100, ids).masked_fill(mask == 0, -100)
    inputs = {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": labels,
        "position_ids": (mask.cumsum(1) - 1).clamp_min(0),
        "other": "kept",
    }
    short = shrink(inputs, IMAGE, [(4, 1), (2, 2), (3, 0)], pad_token_id=8)
    # Two columns of padding are common to both rows and stay.
    if side == "left":
        wanted = [[8, 8, 8, 8, 1, IMAGE, 2, 3], [8, 8, 4, IMAGE, IMAGE, 5, 6, 7]]
        positions = [[0, 0, 0, 0, 0, 1, 2, 3], [0, 0, 0, 1, 2, 3, 4, 5]]
    else:
        wanted = [[1, IMAGE, 2, 3, 8, 8, 8, 8], [4, IMAGE, IMAGE, 5, 6, 7, 8, 8]]
        positions = [[0, 1, 2, 3, 3, 3, 3, 3], [0, 1, 2, 3, 4, 5, 5, 5]]
    assert short["input_ids"].tolist() == wanted
    assert torch.equal(short["attention_mask"], (short["input_ids"] != 8).long())
    assert short["position_ids"].tolist() == positions
    expected = short["input_ids"].masked_fill((short["input_ids"] == IMAGE) | (short["input_ids"] == 8), -100)
    assert torch.equal(short["labels"], expected)
    assert short["other"] == "kept"
    assert torch.equal(inputs["input_ids"], ids)  # a copy


def test_shrink_without_mask_pads_on_the_left():
    ids = torch.tensor([[IMAGE, IMAGE, 1, 2], [IMAGE, 3, 4, 5]])
    short = shrink({"input_ids": ids}, IMAGE, [(2, 1), (1, 1)], pad_token_id=8)
    assert short["input_ids"].tolist() == [[8, IMAGE, 1, 2], [IMAGE, 3, 4, 5]]
    assert torch.equal(short["attention_mask"], (short["input_ids"] != 8).long())


def test_shrink_keeps_the_mask_of_a_cache():
    ids = torch.tensor([[IMAGE, IMAGE, 1, 2]])
    mask = torch.tensor([[0, 1, 1, 1, 1, 1, 1]])  # three positions in the cache before
    short = shrink({"input_ids": ids, "attention_mask": mask}, IMAGE, [(2, 1)], pad_token_id=8)
    assert short["input_ids"].tolist() == [[IMAGE, 1, 2]]
    assert short["attention_mask"].tolist() == [[0, 1, 1, 1, 1, 1]]


def test_shrink_refuses_other_masks():
    ids = torch.tensor([[IMAGE, IMAGE, 1, 2]])
    mask = torch.ones(1, 1, 4, 4)
    with pytest.raises(ValueError, match=r"attention_mask: expected \[B, L\], got shape \(1, 1, 4, 4\)"):
        shrink({"input_ids": ids, "attention_mask": mask}, IMAGE, [(2, 1)], pad_token_id=8)


def test_what_a_cache_holds_stays_at_its_places():
    """Each turn is padded anew: the first fills 2 columns of the cache, the second is shortened unevenly."""
    ids = torch.tensor([[1, IMAGE, IMAGE, 2, IMAGE, IMAGE, IMAGE, 3], [1, IMAGE, IMAGE, 2, 0, 0, IMAGE, 3]])
    mask = (ids > 0).long()
    rows = images_of_rows(ids == IMAGE, [3, 1], [(0, 2), (1, 2)])
    assert rows == [0, 1]
    runs = [(2, 1), (3, 2), (2, 1), (1, 1)]
    short = shrink({"input_ids": ids, "attention_mask": mask}, IMAGE, runs, pad_token_id=0, cached=[2])
    assert short["input_ids"].tolist() == [[1, IMAGE, 0, 2, IMAGE, IMAGE, 3], [1, IMAGE, 2, 0, 0, IMAGE, 3]]
    assert short["attention_mask"].tolist() == [[1, 1, 0, 1, 1, 1, 1], [1, 1, 1, 0, 0, 1, 1]]
