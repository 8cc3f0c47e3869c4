"""Reading the question out of a prompt, and shortening runs of placeholders."""

import pytest
import torch

from hero.prompt import images_of_rows, shrink
from hero.relevance import question_of

IMAGE = 9


@pytest.mark.parametrize(
    ("prompt", "question"),
    [
        ("<image> what digit is on the red square", "what digit is on the red square"),
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
        ("USER: <image> ASSISTANT:", "USER: ASSISTANT:"),
        ("", ""),
    ],
)
def test_question_of(prompt, question):
    assert question_of(prompt) == question


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
