"""The ``hero`` command, as a user types it."""

import os
import re
import shutil
import subprocess
import sys
import warnings

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers.image_utils import load_image

from hero import checkpoints, cli, images, mini
from hero.cli import main
from hero.models import supported_types

DEMO = mini.demo_questions()
IMAGE, QUESTION = str(DEMO[0].image), DEMO[0].question


def run(capsys, *argv: str) -> str:
    assert main(argv) == 0
    return capsys.readouterr().out


def test_ask(capsys, tmp_path):
    question = DEMO[1]
    picture = tmp_path / "deep" / "out.png"
    out = run(capsys, "ask", str(question.image), question.question, "--save", str(picture))
    lines = dict(re.findall(r"^  (all tokens|kept tokens|of these|stages|picture) +(.*)$", out, re.MULTILINE))
    assert lines["all tokens"].split()[0] == "378"
    assert lines["kept tokens"].split()[0] == "89"
    assert lines["all tokens"].endswith(f": {question.answer}")
    assert lines["kept tokens"].endswith(f": {question.answer}")
    assert lines["of these"].startswith("7 of 36 thumbnail patches, 64 of 324 tile patches, 18 newlines")
    stages = re.findall(
        r"(encode|score|budget|select|project|language model) [\d.]+ (?:ms|s)", lines["stages"]
    )
    assert stages == ["encode", "score", "budget", "select", "project", "language model"]
    assert lines["picture"] == str(picture)
    with Image.open(picture) as image:
        assert image.width == 1000


def test_question_as_a_person_writes_it(capsys, tmp_path):
    save = ("--save", str(tmp_path / "out.png"))
    *words, colour, last = DEMO[1].question.split()
    asked = f"{' '.join(words).capitalize()} {colour.capitalize()} {last}?"
    out = run(capsys, "ask", str(DEMO[1].image), asked, *save)
    assert out.count(f": {DEMO[1].answer}\n") == 2


@pytest.mark.parametrize("policy", ["uniform", "visionzip", "cdpruner"])
def test_count_and_policy(capsys, tmp_path, policy):
    save = ("--save", str(tmp_path / "out.png"))
    out = run(
        capsys, "ask", str(DEMO[0].image), DEMO[0].question, "--tokens", "40", "--policy", policy, *save
    )
    assert re.search(r"kept tokens +58 visual tokens", out)  # and 18 newlines


OWN_POLICY = """
from dataclasses import dataclass
from hero.policies import Uniform

@dataclass(frozen=True)
class Corner(Uniform):
    alpha: float = 0.0

    def divide(self, keep_ratio, keep_tokens, thumbnail, tiles):
        return int(self.alpha * 10), 20
"""


def test_policy_of_a_module(capsys, tmp_path, monkeypatch):
    """``module:Class`` from the current folder, with an option that the class has."""
    (tmp_path / "own_policy.py").write_text(OWN_POLICY, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    for options, tokens in (((), 38), (("--alpha", "0.5"), 43)):  # of which 18 newlines
        out = run(capsys, "show", str(DEMO[0].image), "--policy", "own_policy:Corner", *options)
        assert out.startswith(f"{tokens} of 378 visual tokens kept")


def test_model_from_a_folder(capsys, tmp_path):
    save = ("--save", str(tmp_path / "out.png"))
    out = run(capsys, "ask", str(DEMO[0].image), DEMO[0].question, "--model", str(mini.WEIGHTS), *save)
    assert re.search(r"kept tokens +89 visual tokens", out)


def test_bench(capsys):
    """Every keep ratio once a round, against all tokens; times are the machine's, counts are ours."""
    image = str(DEMO[0].image)
    out = run(capsys, "bench", image, DEMO[0].question, "--keep", "1,0.2", "--rounds", "2")
    lines = re.findall(
        r"^  (all tokens|keep [\d.]+) +(\d+) +[\d.]+ m?s \(([\d.]+)\) +[\d.]+ m?s \(([\d.]+)\)$", out, re.M
    )
    assert [line[:2] for line in lines] == [("all tokens", "378"), ("keep 1", "378"), ("keep 0.2", "89")]
    assert lines[0][2:] == ("1.00", "1.00")
    assert image in out and "2 rounds" in out


def test_show(capsys, tmp_path):
    picture = tmp_path / "out.png"
    for question in ((), (DEMO[0].question,)):
        out = run(capsys, "show", str(DEMO[0].image), *question, "--keep", "0.5", "--save", str(picture))
        assert out.startswith("198 of 378 visual tokens kept")
        with Image.open(picture) as image:
            assert image.width == 1000


def test_demo(capsys, tmp_path):
    out = run(capsys, "demo", "--out", str(tmp_path))
    for number, question in enumerate(DEMO, 1):
        assert question.question in out
        assert (tmp_path / f"demo_{number}.png").is_file()
    assert len({question.tile for question in DEMO}) == len(DEMO) == 3


def test_env(capsys):
    out = run(capsys, "env")
    for word in ("hero", "torch", "transformers", "segmented_topk_gather", "PyTorch reference"):
        assert word in out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("ask", "nowhere.png", "what"), "nowhere.png"),
        (
            ("ask", str(DEMO[0].image), "what", "--keep", "1.5"),
            r"--keep: expected a number in \(0, 1\], got 1.5",
        ),
        (("show", str(DEMO[0].image), "--tokens", "0"), "--tokens: expected an integer >= 1, got 0"),
        (
            ("ask", str(DEMO[0].image), "what", "--model", "nowhere"),
            "--model: expected a folder .* got 'nowhere'",
        ),
        (("ask", str(DEMO[0].image), "what", "--clip", "some"), "--clip: expected a --model beside it"),
        (("ask", str(DEMO[0].image), "what", "--second-pass"), "--second-pass: expected a --clip model"),
        (
            ("show", str(DEMO[0].image), "--policy", "fastervlm", "--alpha", "0.9"),
            "--alpha: expected .* of policy 'fastervlm'",
        ),
        (
            ("show", str(DEMO[0].image), "--policy", "nowhere:Class"),
            "--policy: expected .* got 'nowhere:Class'",
        ),
        (("bench", str(DEMO[0].image), "--rounds", "0"), "--rounds: expected an integer >= 1, got 0"),
        (
            ("bench", str(DEMO[0].image), "--keep", "0.2,2"),
            "--keep: expected a number in",
        ),
    ],
)
def test_errors_are_one_line(capsys, argv, message):
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert re.fullmatch(f"hero: .*{message}.*\n", captured.err)


def test_unknown_policy(capsys):
    with pytest.raises(SystemExit):
        main(["ask", "image.png", "what", "--policy", "nothing"])
    message = capsys.readouterr().err
    assert "--policy" in message and all(name in message for name in ("nothing", "hero", "uniform", "random"))


def refused(capsys, *argv: str) -> str:
    """What a command that fails prints on stderr: one line."""
    assert main(argv) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("hero: ")
    return line


# images


@pytest.mark.parametrize(
    ("suffix", "orientation"),
    [
        pytest.param(suffix, turn, marks=[] if turn in (1, 6) or suffix == "jpg" else pytest.mark.slow)
        for suffix in ("jpg", "png", "tif", "webp")
        for turn in range(1, 9)
    ],
)
def test_images_are_opened_as_transformers_does(tmp_path, server, suffix, orientation):
    exif, name = Image.Exif(), f"image.{suffix}"
    exif[0x0112] = orientation
    Image.open(IMAGE).crop((0, 0, 90, 60)).save(tmp_path / name, exif=exif)
    for source in (str(tmp_path / name), f"{server}/{name}"):
        opened, wanted = cli._open(source), load_image(source)
        assert opened.mode == "RGB" and opened.size == wanted.size
        assert opened.tobytes() == wanted.tobytes()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr"])
def test_modes_are_opened_as_transformers_does(tmp_path, mode):
    path = str(tmp_path / "image.tif")
    Image.open(IMAGE).convert(mode).save(path)
    assert cli._open(path).tobytes() == load_image(path).tobytes()


@pytest.mark.parametrize(("size", "grid"), [((144, 96), "of 216 tile"), ((96, 144), "of 216 tile")])
def test_a_photograph_is_asked_upright(capsys, tmp_path, size, grid):
    """The answer and the tokens are those of the image that is turned, and the picture shows it turned."""
    exif = Image.Exif()
    exif[0x0112] = 6
    upright = Image.open(IMAGE).convert("RGB").crop((0, 0, *size))
    upright.save(tmp_path / "upright.png")
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "phone.png", exif=exif)
    pictures = []
    for name in ("upright", "phone"):
        save = tmp_path / f"{name} drawn.png"
        out = run(capsys, "ask", str(tmp_path / f"{name}.png"), QUESTION, "--save", str(save))
        assert grid in out
        pictures.append(Image.open(save).tobytes())
    assert pictures[0] == pictures[1]


@pytest.mark.parametrize("name", ["deep.png", "deep.pgm", "deep.tif"])
@pytest.mark.parametrize("span", [(0, 255), (40, 90)])
def test_greys_of_16_bits_keep_their_brightness(tmp_path, server, name, span):
    grey = np.asarray(Image.open(IMAGE).convert("L")).clip(*span)
    exif, stored = Image.Exif(), grey
    if name == "deep.png":
        exif[0x0112], stored = 3, grey[::-1, ::-1]  # upside down
    Image.fromarray(stored.astype(np.uint16) * 257).save(tmp_path / name, exif=exif)
    for source in (str(tmp_path / name), f"{server}/{name}"):
        assert (np.asarray(cli._open(source)) == grey[..., None]).all()


@pytest.mark.parametrize("values", [np.float32, np.int32])
def test_greys_of_32_bits_are_scaled_by_their_extremes(tmp_path, values):
    ramp = np.tile(np.linspace(-70000, 70000, 256).astype(values), (2, 1))
    Image.fromarray(ramp).save(tmp_path / "deep.tif")
    opened = np.asarray(cli._open(str(tmp_path / "deep.tif")))
    assert np.abs(opened[0, :, 0].astype(int) - np.arange(256)).max() <= 1


def broken(folder, name: str) -> str:
    """The path of a file that is no complete image."""
    path = folder / name
    whole = Image.open(IMAGE).convert("RGB")
    if name == "folder.png":
        path.mkdir()
    elif name.startswith(("empty", "text")):
        path.write_text("no image" * name.startswith("text"))
    elif name == "huge.png":
        whole.save(path)
        data = bytearray(path.read_bytes())
        data[16:24] = b"\x00\x01\x00\x00" * 2  # 65,536 x 65,536 pixels
        path.write_bytes(data)
    elif name == "checksum.png":
        whole.save(path)
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 255
        path.write_bytes(data)
    elif name != "missing.png":
        whole.save(path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return str(path)


BROKEN = ["missing.png", "folder.png", "empty.png", "text.jpg", "huge.png", "checksum.png"]
BROKEN += [f"cut.{suffix}" for suffix in ("png", "jpg", "gif", "webp", "tif", "bmp", "ico", "jp2", "tga")]


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_image_is_one_line_before_anything_is_loaded(capsys, monkeypatch, tmp_path, name):
    monkeypatch.setattr(cli, "load", None)
    path = broken(tmp_path, name)
    for argv in (("ask", path, QUESTION), ("show", path), ("bench", path)):
        line = refused(capsys, *argv)
        assert line.startswith(f"hero: image: expected an image file or URL, got {path!r}: ")
        assert "object at 0x" not in line


def test_a_large_image_is_no_warning(capsys, monkeypatch, tmp_path):
    """Pillow warns above a size, which a phone's photograph may have, and refuses twice of it."""
    whole = Image.open(IMAGE).convert("RGB")
    pixels = np.prod(whole.size)
    argv = ("show", IMAGE, "--save", str(tmp_path / "out.png"))
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", int(pixels * 0.9))
        image = cli._open(IMAGE)
    assert image.tobytes() == whole.tobytes()
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", int(pixels * 0.4))
    assert "exceeds limit" in refused(capsys, *argv)


def test_url(capsys, server, tmp_path):
    shutil.copy(IMAGE, tmp_path / "scene.png")
    url = f"{server}/scene.png"
    out = run(capsys, "ask", url, QUESTION, "--save", str(tmp_path / "out.png"))
    assert out.startswith(f"{url}: {QUESTION}\n") and out.count(f": {DEMO[0].answer}\n") == 2


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("{}/missing.png", "HTTP Error 404"),
        ("{}/page.html", "no image format that Pillow knows"),
        ("http://127.0.0.1:9/image.png", "refused"),
        ("http://127.0.0.1:none/image.png", "port"),
        ("http://a b/image.png", "control characters"),
        ("https://", "host"),
    ],
)
def test_an_address_without_an_image_is_one_line(capsys, monkeypatch, server, tmp_path, address, reason):
    monkeypatch.setattr(cli, "load", None)
    (tmp_path / "page.html").write_text("<html>")
    url = address.format(server)
    line = refused(capsys, "ask", url, QUESTION)
    assert f"image: expected an image file or URL, got {url!r}: " in line and reason in line


@pytest.mark.slow
def test_a_file_name_that_is_no_text(tmp_path):
    """Its bytes are not UTF-8, which a terminal may refuse to show."""
    name = b"\xff.png"
    shutil.copy(IMAGE, bytes(tmp_path) + b"/" + name)
    argv = [sys.executable, "-m", "hero", "ask", name, QUESTION]
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}
    done = subprocess.run(argv, capture_output=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0 and done.stdout.startswith(b"\\udcff.png: ")


# options


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("ask", "IMAGE", "QUESTION", "--keep", "0"), r"--keep: expected a number in \(0, 1\], got 0.0"),
        (("ask", "IMAGE", "QUESTION", "--keep", "nan"), r"--keep: expected a number in \(0, 1\], got nan"),
        (("demo", "--keep", "-1"), r"--keep: expected a number in \(0, 1\], got -1.0"),
        (("bench", "IMAGE", "--keep", "0.5,2"), r"--keep: expected a number in \(0, 1\], got 2.0"),
        (("show", "IMAGE", "--tokens", "-3"), "--tokens: expected an integer >= 1, got -3"),
        (("ask", "IMAGE", "QUESTION", "--alpha", "2"), r"--alpha: expected .*, got 2.0"),
        (("show", "IMAGE", "--alpha", "0.5"), "question, --clip: expected .* relevance 0.4"),
        (("ask", "IMAGE", "QUESTION", "--model", "some", "--alpha", "0.5"), "question, --clip: expected"),
        (("show", "IMAGE", "--policy", "cdpruner"), "question, --clip: expected"),
        (("show", "IMAGE", "--policy", "no:Class"), "--policy: expected .*, got 'no:Class'"),
        (("show", "IMAGE", "--policy", "os:path"), "--policy: expected"),
        (("ask", "IMAGE", "QUESTION", "--max-new-tokens", "0"), "--max-new-tokens: expected an integer >= 1"),
        (("demo", "--max-new-tokens", "-1"), "--max-new-tokens: expected an integer >= 1, got -1"),
        (("bench", "IMAGE", "--rounds", "0"), "--rounds: expected an integer >= 1, got 0"),
        (("ask", "IMAGE", ""), "question: expected words, got ''"),
        (("ask", "IMAGE", " ?\n"), "question: expected words, got"),
        (("show", "IMAGE", ""), "question: expected words, got ''"),
        (("bench", "IMAGE", " "), "question: expected words, got ' '"),
        (("ask", "IMAGE", "QUESTION", "--clip", "some"), "--clip: expected a --model beside it"),
        (("show", "IMAGE", "--second-pass"), "--second-pass: expected a --clip model beside it, got none"),
        (("ask", "IMAGE", "QUESTION", "--save", "answer"), "--save: expected .* such as .png, got 'answer'"),
        (("ask", "IMAGE", "QUESTION", "--save", "IMAGE"), "--save: expected another file than the image"),
        (("show", "IMAGE", "--save", "a.txt"), "--save: expected .* such as .png, got 'a.txt'"),
        (("show", "IMAGE", "--save", "a.xbm"), "--save: expected .* such as .png, got 'a.xbm'"),  # no RGB
        (("show", "IMAGE", "--save", "a.psd"), "--save: expected .* such as .png, got 'a.psd'"),  # read only
        (("show", "IMAGE", "--save", ""), "--save: expected .* such as .png, got '.'"),
        (("show", "IMAGE", "--save", "folder.png"), "--save: expected a file that can be written"),
        (("show", "IMAGE", "--save", "file/a.png"), "--save: expected a file that can be written"),
        (("demo", "--out", "file"), "--out: expected a file that can be written, got 'file/demo_1.png'"),
    ],
)
def test_options_are_checked_before_anything_is_loaded(capsys, monkeypatch, tmp_path, argv, message):
    monkeypatch.setattr(cli, "load", None)
    monkeypatch.setattr(cli, "_open", None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").touch()
    argv = tuple({"IMAGE": IMAGE, "QUESTION": QUESTION}.get(word, word) for word in argv)
    assert re.search(f"^hero: {message}", refused(capsys, *argv))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.png"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("ask", IMAGE, "is <image> red ?"), "question: expected text without <image>"),
        (("bench", IMAGE, "--cuda-graphs"), "--cuda-graphs: expected a GPU, got none"),
    ],
)
def test_what_only_the_model_or_the_machine_can_tell(capsys, monkeypatch, argv, message):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert re.search(f"^hero: {message}", refused(capsys, *argv))


def test_a_file_without_permission_is_refused(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(cli, "_open", None)
    monkeypatch.setattr(images.os, "access", lambda path, mode: path != tmp_path)
    for path in (tmp_path / "a.png", tmp_path / "new" / "deep" / "a.png"):
        line = refused(capsys, "show", IMAGE, "--save", str(path))
        assert line == f"hero: --save: expected a file that can be written, got {str(path)!r}"


def test_matplotlib_is_looked_for_first(capsys, monkeypatch):
    monkeypatch.setattr(cli, "_open", None)
    monkeypatch.setattr(images.importlib.util, "find_spec", lambda name: None)
    assert "pip install 'hero-vlm[plot]'" in refused(capsys, "ask", IMAGE, QUESTION)


def test_errors_load_neither_torch_nor_transformers():
    code = (
        "import sys; from hero.cli import main\n"
        "show = ['show', 'no.png']\n"
        "for argv in (show, show + ['--save', 'x'], show + ['--keep', '2'], ['bench', 'no.png']):\n"
        "    assert main(argv) == 2\n"
        "assert not {'torch', 'transformers', 'matplotlib'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("suffix", ["PNG", "jpg", "webp", "pdf"])
def test_suffixes(capsys, tmp_path, suffix):
    save = tmp_path / f"out.{suffix}"
    run(capsys, "show", IMAGE, "--save", str(save))
    assert save.stat().st_size > 1000


@pytest.mark.parametrize(
    "command", [("ask", IMAGE, QUESTION, "--save", "file/a.png"), ("demo", "--out", "file")]
)
def test_the_answer_is_printed_although_the_picture_is_not_saved(capsys, monkeypatch, tmp_path, command):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(images, "check_writable", lambda *_: (tmp_path / "file").touch())  # it comes too late
    assert main(command) == 2
    out, err = capsys.readouterr()
    assert out.count(f": {DEMO[0].answer}\n") == 2
    assert re.fullmatch(r"hero: cannot write file/\w+.png: .*\n", err)


# checkpoints


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """The folder of the mini model's CLIP model."""
    folder = tmp_path_factory.mktemp("clip")
    mini.build_clip(mini.load(relevance=False).model).save_pretrained(folder)
    mini.clip_tokenizer().save_pretrained(folder)
    return folder


def without(folder, copy, name: str):
    """A copy of a checkpoint without one of its weights."""
    shutil.copytree(folder, copy)
    weights = load_file(copy / "model.safetensors")
    del weights[name]
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    return copy


def test_clip_from_a_folder(capsys, tmp_path, clip):
    checkpoints = ("--model", str(mini.WEIGHTS), "--clip", str(clip))
    out = run(capsys, "ask", IMAGE, QUESTION, *checkpoints, "--save", str(tmp_path / "out.png"))
    assert out.count(f": {DEMO[0].answer}\n") == 2


def test_another_clip_model_is_refused_before_an_answer(capsys, monkeypatch, tmp_path, clip):
    """Its vision weights are others, and there is no --second-pass."""
    monkeypatch.setattr(cli, "_answer", None)
    copy = tmp_path / "clip"
    shutil.copytree(clip, copy)
    weights = load_file(copy / "model.safetensors")
    weights["vision_model.post_layernorm.bias"] += 1
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    checkpoints = ("--model", str(mini.WEIGHTS), "--clip", str(copy))
    assert "question, --clip: expected a CLIP model with" in refused(
        capsys, "ask", IMAGE, QUESTION, *checkpoints
    )
    run(capsys, "show", IMAGE, QUESTION, *checkpoints, "--second-pass", "--save", str(tmp_path / "out.png"))


def test_only_a_clip_checkpoint_is_a_clip_model(capsys, monkeypatch):
    monkeypatch.setattr(checkpoints, "_model", None)  # weights are not read
    line = refused(
        capsys,
        "ask",
        IMAGE,
        QUESTION,
        "--model",
        str(mini.WEIGHTS),
        "--clip",
        str(mini.WEIGHTS),
        "--second-pass",
    )
    assert "--clip: expected a checkpoint of type clip, got " in line and line.endswith("of type llava_next")


def test_other_models_are_refused_by_type(capsys, monkeypatch, clip):
    monkeypatch.setattr(checkpoints, "_model", None)
    line = refused(capsys, "show", IMAGE, "--model", str(clip))
    types = " or ".join(supported_types())
    assert types.startswith("llava or llava_next or ") and " or qwen2_5_vl or " in types
    assert line == f"hero: --model: expected a checkpoint of type {types}, got {str(clip)!r} of type clip"


def test_checkpoints_lack_no_weights(capsys, tmp_path, clip):
    name = "text_model.final_layer_norm.weight"
    copy = without(clip, tmp_path / "clip", name)
    line = refused(capsys, "show", IMAGE, QUESTION, "--model", str(mini.WEIGHTS), "--clip", str(copy))
    assert line.startswith("hero: --clip: expected a checkpoint with all weights of CLIPModel, got ")
    assert line.endswith(f"without 1 of them, such as {name}")
    weights = load_file(mini.WEIGHTS / "model.safetensors")
    name = next(name for name in weights if "image_newline" in name)
    copy = without(mini.WEIGHTS, tmp_path / "model", name)
    line = refused(capsys, "show", IMAGE, "--model", str(copy))
    assert line.startswith("hero: --model: expected a checkpoint with all weights of ")
    assert "image_newline" in line


@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "tokenizer.json", "processor_config.json"]
)
def test_a_damaged_checkpoint_is_one_line(capsys, tmp_path, name):
    copy = tmp_path / "model"
    shutil.copytree(mini.WEIGHTS, copy)
    (copy / name).write_bytes((copy / name).read_bytes()[:100])
    assert f"--model: expected a folder or hub id of a model, got {str(copy)!r}: " in refused(
        capsys, "show", IMAGE, "--model", str(copy)
    )
