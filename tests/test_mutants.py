"""Mutation tests: with one line of a kernel or of the reference wrong, a check of ``test_kernels`` must fail.

The package is copied, one snippet replaced, and a forked child imports the copy and runs the check; the
unchanged copy must pass every check. Kernels need ``TRITON_INTERPRET=1``, the reference is tested without.
"""

import os
import shutil
import signal
import sys
import traceback
from pathlib import Path
from typing import NamedTuple

import pytest

import hero_kernels
from hero_kernels._env import SWITCHES

PACKAGE = Path(hero_kernels.__file__).parent
TESTS = Path(__file__).parent
SECONDS = 120  # a mutant may never end
SURVIVED, NOTICED, BROKEN = 0, 1, 2
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def way():
    from cases import Way

    return Way("interpreter" if SWITCHES.interpret else "reference")


def attention(operation, name, options="plain"):
    def check(tests, cases):
        case = next(case for case in cases.ATTENTION if case.name == name)
        function = getattr(tests, f"test_{operation}")
        if operation == "cls_attention":
            function(case, options, False, way())
        else:
            function(case, options, way())

    return check


def selection(test, name, *more):
    def check(tests, cases):
        case = next(case for case in cases.SELECTION if case.name == name)
        getattr(tests, f"test_{test}")(case, *more, way())

    return check


def diverse(name, rule):
    def check(tests, cases):
        case = next(case for case in cases.DIVERSE if case.name == name)
        tests.test_segmented_diverse_topk(case, rule, way())

    return check


CHECKS = {
    "cls": attention("cls_attention", "P 36", "plain"),
    "cls, added": attention("cls_attention", "P 36", "added"),
    "cls, NaN": attention("cls_attention", "P 36", "per crop"),
    "attention": attention("attention_with_cls", "narrow"),
    "received": attention("received_attention", "narrow"),
    "received, split": attention("received_attention", "odd sizes"),
    "received, lse": attention("received_with_lse", "odd sizes"),
    "segments": lambda tests, cases: tests.test_received_of_segments(cases.PACKED[0], "plain", False, way()),
    "rarity": selection("rarity", "thumbnail last"),
    "rarity, blocks": selection("rarity", "P 36"),
    "order": lambda tests, cases: tests.test_the_order_of_tiles_does_not_change_shares(way()),
    "softmax": lambda tests, cases: tests.test_budgets_do_not_depend_on_larger_images(False, way()),
    "finalized": selection("finalize_scores", "stitched 2 × 2", 3, True),
    "budgets": selection("tile_budgets", "K from 0 to 40", "exact"),
    "caps": selection("tile_budgets", "everything kept", "exact"),
    "filled": selection("tile_budgets", "stitched 2 × 3, padding rows", "exact"),
    "floor": selection("tile_budgets", "stitched 2 × 3, padding rows", "floor"),
    "topk": selection("segmented_topk", "ragged"),
    "max_min": diverse("ties", "max_min"),
    "max_min, blocks": diverse("two blocks", "max_min"),
    "coverage": diverse("ties", "coverage"),
    "coverage, images": diverse("images", "coverage"),
    "coverage, blocks": diverse("two blocks", "coverage"),
    "dpp": diverse("ties", "dpp"),
    "dpp, low rank": diverse("low rank", "dpp"),
    "dpp, images": diverse("images", "dpp"),
    "gather": selection("segmented_topk_gather", "thumbnail last, newline", "signals"),
    "gather, padding": selection("segmented_topk_gather", "stitched 2 × 3, padding rows", "signals"),
    "gather, too few": selection("segmented_topk_gather", "everything kept", "signals"),
}


class Mutant(NamedTuple):
    """``file`` with ``old``, which occurs once, replaced by ``new``; a check must fail."""

    name: str
    file: str
    old: str
    new: str
    check: str
    slow: bool = True


KERNELS = [
    Mutant(
        "ties to the higher index",
        "segmented_topk",
        "tied, -patch + LIMIT, 0",
        "tied, patch + 1, 0",
        "topk",
        False,
    ),
    Mutant(
        "one patch too many",
        "segmented_topk",
        "keep = key >= threshold",
        "keep = key >= threshold - 1",
        "topk",
    ),
    Mutant("NaN above numbers", "common", "tl.full([], 1, tl.uint32)", "tl.full([], -2, tl.int32)", "topk"),
    Mutant("−0 below +0", "common", "tl.where(magnitude == 0, 0, bits)", "bits", "topk"),
    Mutant("mask ignored", "common", "mask=inside, other=0) != 0", "mask=inside, other=0) >= 0", "topk"),
    Mutant(
        "rank ties reversed",
        "finalize_scores",
        "p[None, :] < q[:, None]",
        "p[None, :] > q[:, None]",
        "finalized",
    ),
    Mutant("no entropy of nothing", "finalize_scores", "value, tl.log(count)", "value, count", "finalized"),
    Mutant("padding counts", "rarity", "count += ok.to(tl.int32)", "count += 1", "rarity", False),
    Mutant("the thumbnail is first", "rarity", "begin = tl.maximum(thumbnail, 0)", "begin = 0", "rarity"),
    Mutant("one block a crop", "rarity", "row < crops * slots", "row < crops", "rarity, blocks"),
    Mutant("remainder ties reversed", "tile_budgets", "weight.shape[0] - 1 - lane", "lane", "budgets", False),
    Mutant("one remainder too many", "tile_budgets", "before < left", "before <= left", "budgets"),
    Mutant(
        "cap off by one", "tile_budgets", "budget = tl.where(full, cap, budget)", "budget += full", "caps"
    ),
    Mutant("thumbnail without cap", "tile_budgets", "tl.minimum(thumbnail_tokens, cap)", "cap", "budgets"),
    Mutant("shares rounded down", "tile_budgets", "scaled - whole >= 0.5", "scaled < whole", "budgets"),
    Mutant("floor without cap", "tile_budgets", "tl.minimum(quota, cap), 0)", "quota, 0)", "floor"),
    Mutant("CLS not in the sum", "cls_attention", " + tl.exp2((first - top) * UNITS)", "", "cls", False),
    Mutant("CLS not dropped", "cls_attention", "(here + 1).to", "here.to", "cls"),
    Mutant(
        "buffer overwritten",
        "cls_attention",
        "    if ADD:\n        p += ",
        "    if ADD:\n        ",
        "cls, added",
    ),
    Mutant("weight ignored", "cls_attention", "    p = p * weight\n", "", "cls, added"),
    Mutant(
        "weight 0 computed",
        "cls_attention",
        "    if w != 0.0:\n        q = ",
        "    if True:\n        q = ",
        "cls, NaN",
    ),
    Mutant("keys beyond the last", "attention_with_cls", "if not EVEN:", "if EVEN:", "attention", False),
    Mutant(
        "CLS key left out",
        "attention_with_cls",
        "tl.full([BLOCK_M], 1.0, tl.float32)",
        "tl.zeros([BLOCK_M], tl.float32)",
        "attention",
    ),
    Mutant("queries beyond the last", "received_attention", 'other=float("inf")', "other=0.0", "received"),
    Mutant("sum for mean", "received_attention", "w / count", "w", "received"),
    Mutant("all at token 0", "received_attention", "head + first * strides[2]", "head", "segments"),
    Mutant("mean over all", "received_attention", "w / count", "w / tokens", "segments"),
    Mutant("order of sums", "tile_budgets", "exact_sum(e, most).to(tl.float32)", "tl.sum(e, 0)", "order"),
    Mutant(
        "lse to another base",
        "received_attention",
        "log_sum * TO_UNITS",
        "log_sum / UNITS",
        "received, lse",
    ),
    Mutant(
        "rest of the head left out",
        "received_attention",
        "    if REST:\n        s = ",
        "    if REST > 99:\n        s = ",
        "received, split",
    ),
    Mutant(
        "ties to the higher index",
        "segmented_diverse_topk",
        "(LAST - i)\n        chosen",
        "i\n        chosen",
        "max_min",
        False,
    ),
    Mutant(
        "a candidate is its own neighbour",
        "segmented_diverse_topk",
        "ok & (i[:, None] != j[None, :])",
        "ok",
        "max_min, blocks",
    ),
    Mutant(
        "the first block alone",
        "segmented_diverse_topk",
        "gain += tl.load(starts + b * pitch",
        "gain += tl.load(starts",
        "coverage, blocks",
    ),
    Mutant(
        "not valid, but covered",
        "segmented_diverse_topk",
        "tl.where(left, 0, NOT_CHOSEN)",
        "tl.zeros_like(i)",
        "coverage, images",
    ),
    Mutant(
        "a rise left out",
        "segmented_diverse_topk",
        "mask=r < number, other=0)",
        "mask=r < number - 1, other=0)",
        "coverage",
    ),
    Mutant(
        "quality once", "segmented_diverse_topk", "FLOOR) * weight * weight", "FLOOR) * weight", "dpp, images"
    ),
    Mutant(
        "rounding decides",
        "segmented_diverse_topk",
        "tl.maximum(variance, FLOOR) * w",
        "tl.maximum(variance, 0.0) * w",
        "dpp, low rank",
    ),
    Mutant("a panel not subtracted", "segmented_diverse_topk", "rest -= e_i", "rest += 0.0 * e_i", "dpp"),
    Mutant(
        "all segments from crop 0",
        "segmented_diverse_topk",
        "return first.to(tl.int64) * patches",
        "return 0 * patches",
        "dpp, images",
    ),
    Mutant(
        "newline first",
        "segmented_topk_gather",
        "(r == side - 1) & (thumbnail_newline",
        "(r == 0) & (thumbnail_newline",
        "gather",
        False,
    ),
    Mutant(
        "a newline too many",
        "segmented_topk_gather",
        "(top + r < newline_end)",
        "(top + r <= newline_end)",
        "gather, padding",
    ),
    Mutant(
        "empty rows are newlines",
        "segmented_topk_gather",
        "tl.full([FILL], -2, tl.int32)",
        "tl.full([FILL], -1, tl.int32)",
        "gather, too few",
    ),
    Mutant(
        "patches of the first tile",
        "segmented_topk_gather",
        "source = (first + lead + i)",
        "source = (first + lead)",
        "gather, padding",
    ),
    Mutant(
        "newline rows not empty",
        "segmented_topk_gather",
        "(source >= 0)[:, None] & in_d, other=0.0",
        "(source >= 0)[:, None] & in_d, other=1.0",
        "gather",
    ),
]
REFERENCE = [
    Mutant("padding counts", "reference", "counted.sum(1,", "(counted > -1).sum(1,", "rarity", False),
    Mutant("the thumbnail is a tile", "reference", "lanes.image + (", "lanes.image + 0 * (", "rarity"),
    Mutant("order of softmax", "reference", "torch.where(few, first, ", "(", "softmax", False),
    Mutant("mean over all", "reference", "/= max(end - begin, 1)", "/= key.shape[2]", "segments"),
    Mutant(
        "remainder ties reversed",
        "reference",
        "(product % whole)",
        "(product % whole * 64 + torch.arange(product.shape[1]))",
        "budgets",
        False,
    ),
    Mutant(
        "cap off by one",
        "reference",
        "budgets = weighted * spills",
        "budgets = (weighted - 1).clamp_min(0) * spills",
        "caps",
    ),
    Mutant("cap not seen", "reference", "torch.minimum(reached, reached.mT)", "reached", "filled"),
    Mutant("left as before", "reference", "left = left - filled", "left = left - 0 * filled", "filled"),
    Mutant("shares rounded down", "reference", "FIXED_POINT + 0.5", "FIXED_POINT", "budgets"),
    Mutant(
        "floor without cap",
        "reference",
        "torch.minimum(total * weights // weights.sum(1, keepdim=True).clamp_min(1), caps)",
        "total * weights // weights.sum(1, keepdim=True).clamp_min(1)",
        "floor",
    ),
    Mutant("lowest first", "reference", "keys.argsort(dim=1, descending=True", "keys.argsort(dim=1", "topk"),
    Mutant(
        "ties to the higher index",
        "reference",
        "order = keys.argsort(",
        "order = keys.shape[1] - 1 - keys.flip(1).argsort(",
        "topk",
    ),
    Mutant("mask ignored", "reference", "last = last.masked_fill(~valid, 2)", "pass", "topk", False),
    Mutant(
        "NaN as −inf",
        "reference",
        "scores.isnan().to(torch.uint8)",
        "torch.zeros_like(scores, dtype=torch.uint8)",
        "topk",
    ),
    Mutant(
        "CLS not in the sum",
        "reference",
        "logits.softmax(-1)[..., 1:]",
        "logits[..., 1:].softmax(-1)",
        "cls",
        False,
    ),
    Mutant("weight 0 computed", "reference", ".masked_fill(weight == 0, 0.0)", "", "cls, NaN"),
    Mutant("no entropy of nothing", "reference", "count.clamp_min(1.0).log()", "count", "finalized"),
    Mutant(
        "mean over keys",
        "reference",
        "maps = logits.softmax(-1) if lse is None else (logits - lse[:, head",
        "maps = logits.softmax(-2) if lse is None else (logits - lse[:, head",
        "received",
    ),
    Mutant("lse left out", "reference", "(logits - lse[:, head, :, None])", "logits", "received, lse"),
    Mutant(
        "a candidate is its own neighbour",
        "_diverse",
        "valid[:, None] & ~torch.eye",
        "valid[:, None] | torch.eye",
        "max_min",
        False,
    ),
    Mutant(
        "not valid, but covered",
        "_diverse",
        "torch.where(valid, 0, NOT_CHOSEN)",
        "torch.where(valid, 0, 0)",
        "coverage, images",
    ),
    Mutant("quality once", "_diverse", "variance * quality * quality", "variance * quality", "dpp, images"),
    Mutant("rounding decides", "_diverse", "clamp_min(FLOOR)", "clamp_min(0.0)", "dpp, low rank"),
    Mutant(
        "the first crop alone", "_diverse", "crop.clamp_max(crops - 1)", "crop.clamp_max(0)", "dpp, images"
    ),
    Mutant(
        "a newline too many",
        "reference",
        "rows = stitched[begin:end]",
        "rows = stitched[begin : (end := end + 1)]",
        "gather, padding",
        False,
    ),
    Mutant(
        "thumbnail always first", "reference", "if image.thumbnail <= 0 else", "if image.crops else", "gather"
    ),
    Mutant(
        "newline rows not empty", "reference", "tokens = tokens.index_fill_", "tokens.index_fill", "gather"
    ),
]
MUTANTS = KERNELS if SWITCHES.interpret else REFERENCE


def path_of(folder: Path, mutant: Mutant) -> Path:
    file = folder / PACKAGE.name / f"{mutant.file}.py"
    return file if file.exists() else file.parent / "kernels" / file.name


def outcome(folder: Path, names) -> int:
    """Run checks on the package in a folder, in a child of this process."""
    child = os.fork()
    if not child:
        code = BROKEN
        try:
            signal.alarm(SECONDS)
            code = attempt(folder, names)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def attempt(folder: Path, names) -> int:
    """Import the package of the folder, and the tests anew with it."""
    sys.modules["hero_kernels._library"]._LIBRARY._destroy()
    ours = {PACKAGE.name, *(file.stem for file in TESTS.glob("*.py"))} - {Path(__file__).stem}
    for name in list(sys.modules):
        if name.partition(".")[0] in ours:
            del sys.modules[name]
    sys.path[:0] = [str(folder), str(TESTS)]
    import cases
    import test_kernels

    assert Path(sys.modules[PACKAGE.name].__file__).is_relative_to(folder)
    for name in names:
        try:
            CHECKS[name](test_kernels, cases)
        except AssertionError:
            traceback.print_exc(limit=-1)
            return NOTICED
    return SURVIVED


@pytest.fixture
def copy(tmp_path):
    shutil.copytree(PACKAGE, tmp_path / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def test_the_package_as_it_is_passes(copy):
    assert outcome(copy, dict.fromkeys(mutant.check for mutant in MUTANTS)) == SURVIVED


@pytest.mark.parametrize(
    "mutant",
    [pytest.param(m, id=f"{m.file}: {m.name}", marks=[pytest.mark.slow] if m.slow else []) for m in MUTANTS],
)
def test_a_mutant_is_noticed(mutant, copy):
    file = path_of(copy, mutant)
    text = file.read_text(encoding="utf-8")
    assert text.count(mutant.old) == 1, f"{mutant.old!r} occurs {text.count(mutant.old)} times: write it anew"
    file.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")
    assert outcome(copy, [mutant.check]) == NOTICED
