"""What is installed is what was meant: the pinned versions, the wheel's contents, and the wheel in use.

The slow tests build a wheel from a copy of the source tree and install it into environments of their own,
one empty and one that also sees this environment's packages (so that torch is not downloaded again).
"""

import ast
import email
import graphlib
import importlib.util
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
NOT_SOURCE = shutil.ignore_patterns(
    ".git",
    ".venv*",
    "venv",
    ".triton",
    ".lmms",
    ".ray",
    "out",
    "build",
    "dist",
    "*.egg-info",
    "__pycache__",
    ".*_cache",
    ".hypothesis",
)
MINI_WEIGHTS = "hero/mini/weights"
MINI_DEMO = "hero/mini/demo"


def run(*command: str | Path, cwd: Path) -> str:
    """Run a command outside the source tree, without the paths and settings of this process; its stdout."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    env |= {"HF_HUB_OFFLINE": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1"}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, f"{command} exited {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def imports_of(file: Path) -> set[str]:
    """Names that a file imports, in functions too; of ``from a import b`` both ``a`` and ``a.b``."""
    folders = file.relative_to(ROOT).with_suffix("").parts[:-1]
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = folders[: len(folders) + 1 - node.level] if node.level else ()
            base = ".".join(filter(None, (*parents, node.module)))
            names |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    return names


def test_structure_of_the_packages():
    """No import cycles; kernels need no ``hero``; ``hero`` itself knows no model family; no long file."""
    files = [file for package in ("hero", "hero_kernels") for file in ROOT.glob(f"{package}/**/*.py")]
    named = {".".join(file.relative_to(ROOT).with_suffix("").parts): file for file in files}
    imported = {name.removesuffix(".__init__"): imports_of(file) for name, file in named.items()}
    within = {name: {other for other in names if other in imported} for name, names in imported.items()}
    for name, names in within.items():  # of a.b.c, not of the packages it lies in
        names -= {other for other in names if any(more.startswith(f"{other}.") for more in names)} | {name}
    graphlib.TopologicalSorter(within).prepare()  # raises CycleError
    for name, names in imported.items():
        if name.startswith("hero_kernels"):
            assert not {other.split(".")[0] for other in names} & {"hero", "transformers"}, name
        elif name.split(".")[1:2] not in (["models"], ["lmms_eval"], ["mini"], ["vllm"]):
            hero_families = {other for other in imported if other.startswith("hero.models.")}
            assert not names & hero_families, name
            assert not [other for other in names if other.startswith("transformers.models.")], name
    assert not [name for name, file in named.items() if len(file.read_text("utf-8").splitlines()) > 450]


def test_the_page_on_models_quotes_the_code():
    """Each block of Python names its file in the first line, and is in it."""
    page = (ROOT / "docs" / "adding-a-model.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n# (hero/\S+)\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == page.count("```python") == 4
    for file, code in blocks:
        assert code in (ROOT / file).read_text(encoding="utf-8"), file


# --- requirements and pins -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def metadata() -> dict:
    """The keywords that setup.py passes to ``setup``."""
    setuptools = pytest.importorskip("setuptools")
    keywords = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setuptools, "setup", lambda **given: keywords.update(given))
        runpy.run_path(str(ROOT / "setup.py"))
    return keywords


def read_pins(*names: str) -> dict[str, str]:
    """Name → exact version; a file's line wins over the same name's line in the files after it."""
    pins: dict[str, str] = {}
    for name in names:
        own: dict[str, str] = {}
        for line in (ROOT / name).read_text(encoding="utf-8").splitlines():
            if line and not line.startswith("#"):
                project, version = line.split("==")
                assert project == canonicalize_name(project), f"{name}: write {canonicalize_name(project)}"
                assert project not in own, f"{name}: {project} is pinned twice"
                own[project] = version
        pins = own | pins
    return pins


@pytest.mark.parametrize(
    "files", [("constraints.txt",), ("constraints-lowest.txt", "constraints.txt")], ids=["newest", "lowest"]
)
def test_ranges_admit_pins(metadata, files):
    pins = read_pins(*files)
    required = [*metadata["install_requires"], *metadata["extras_require"]["dev"]]
    for requirement in map(Requirement, required):
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), requirement


def test_lmms_eval_is_added_to_the_tested_environment(metadata):
    """The additions replace nothing that is there, and are the lmms-eval that the extra asks for."""
    added = read_pins("requirements-lmms.txt")
    assert added.keys() & read_pins("constraints.txt").keys() == set()
    [requirement] = map(Requirement, metadata["extras_require"]["lmms"])
    assert requirement.specifier.contains(added[requirement.name])


def test_ray_is_added_to_the_tested_environment(metadata):
    """As for lmms-eval."""
    added = read_pins("requirements-ray.txt")
    assert added.keys() & read_pins("constraints.txt").keys() == set()
    [requirement] = map(Requirement, metadata["extras_require"]["ray"])
    assert requirement.specifier.contains(added[requirement.name])


def test_both_environments_pin_the_same_torch():
    assert read_pins("constraints.txt")["torch"] == read_pins("constraints-lowest.txt")["torch"]


def test_lowest_environment_has_the_lowest_transformers(metadata):
    [requirement] = [r for r in map(Requirement, metadata["install_requires"]) if r.name == "transformers"]
    [lowest] = [bound.version for bound in requirement.specifier if bound.operator == ">="]
    pins = read_pins("constraints-lowest.txt")
    assert SpecifierSet(f"=={lowest}").contains(pins["transformers"])
    assert SpecifierSet("<2").contains(pins["huggingface-hub"])


def test_version_is_read_from_the_package(metadata):
    from hero._version import __version__

    assert metadata["version"] == __version__


# --- the wheel -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    work = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT, work / "source", ignore=NOT_SOURCE)
    build = ["wheel", "--no-deps", "-w", work / "dist"]
    if importlib.util.find_spec("setuptools"):
        build.append("--no-build-isolation")
    run(sys.executable, "-m", "pip", *build, work / "source", cwd=work)
    [path] = (work / "dist").iterdir()
    return path


@pytest.fixture(scope="module")
def contents(wheel) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if not name.endswith("/")}


def dist_info(names: set[str]) -> str:
    [name] = {name.split("/")[0] for name in names if name.split("/")[0].endswith(".dist-info")}
    return name


@pytest.mark.slow
def test_wheel_carries_code_weights_demo_and_licence(contents):
    expected = {
        "hero/__init__.py",
        "hero/cli.py",
        "hero/_version.py",
        "hero/py.typed",
        "hero_kernels/__init__.py",
        "hero_kernels/py.typed",
        f"{MINI_WEIGHTS}/model.safetensors",
        f"{MINI_WEIGHTS}/clip_head.safetensors",
        f"{MINI_DEMO}/questions.json",
        f"{dist_info(contents)}/licenses/LICENSE",
        f"{dist_info(contents)}/entry_points.txt",
    }
    questions = json.loads((ROOT / MINI_DEMO / "questions.json").read_text(encoding="utf-8"))
    expected |= {f"{MINI_DEMO}/{Path(question['image']).name}" for question in questions}
    assert expected - contents == set()


@pytest.mark.slow
def test_wheel_carries_every_module_and_data_file(contents):
    patterns = [
        ("hero", "**/*.py"),
        ("hero_kernels", "**/*.py"),
        ("hero_kernels", "configs/*.json"),
        (MINI_WEIGHTS, "**/*"),
        (MINI_DEMO, "**/*"),
    ]
    in_tree = {
        path.relative_to(ROOT).as_posix()
        for folder, pattern in patterns
        for path in (ROOT / folder).glob(pattern)
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert in_tree - contents == set()


@pytest.mark.slow
def test_wheel_carries_nothing_else(contents):
    assert {name.split("/")[0] for name in contents} == {"hero", "hero_kernels", dist_info(contents)}
    known = re.compile(r"\.(py|json|safetensors|md|png)$|/py\.typed$|\.dist-info/")
    assert [name for name in contents if not known.search(name)] == []
    # What made the mini model stays in bench/mini.
    assert [name for name in contents if re.search(r"scenes?\.py$|train|card", Path(name).name)] == [
        f"{MINI_WEIGHTS}/training.json"
    ]


@pytest.mark.slow
def test_wheel_is_at_most_3_megabytes(wheel):
    assert wheel.stat().st_size <= 3_000_000


@pytest.mark.slow
def test_wheel_metadata(wheel, contents):
    with zipfile.ZipFile(wheel) as archive:
        head = email.message_from_bytes(archive.read(f"{dist_info(contents)}/METADATA"))
        scripts = archive.read(f"{dist_info(contents)}/entry_points.txt").decode()
    assert (head["Name"], head["License-Expression"]) == ("hero-vlm", "Apache-2.0")
    assert set(head.get_all("Provides-Extra")) == {
        "plot",
        "processors",
        "bench",
        "test",
        "dev",
        "lmms",
        "vllm",
        "ray",
    }
    assert (head["Requires-Python"], "Typing :: Typed" in head.get_all("Classifier")) == (">=3.10", True)
    assert "hero = hero.cli:main" in scripts
    assert "[lmms_eval.models]" in scripts


# --- the wheel in use ------------------------------------------------------------------------------------


def make_environment(folder: Path, wheel: Path) -> Path:
    """A new environment that holds the wheel and nothing else; the path of its ``bin``."""
    venv.EnvBuilder(with_pip=False, symlinks=True).create(folder)
    python = folder / "bin" / "python"
    install = ["install", "--quiet", "--no-index", "--no-deps", wheel]
    run(sys.executable, "-m", "pip", "--python", python, *install, cwd=folder)
    return folder / "bin"


@pytest.fixture(scope="module")
def empty_environment(wheel, tmp_path_factory) -> Path:
    return make_environment(tmp_path_factory.mktemp("empty"), wheel)


@pytest.fixture(scope="module")
def full_environment(wheel, tmp_path_factory) -> Path:
    """As the empty one, but it finds in this environment what it has not itself."""
    bin_folder = make_environment(tmp_path_factory.mktemp("full"), wheel)
    outer = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    [site_packages] = bin_folder.parent.glob("lib/python*/site-packages")
    (site_packages / "outer.pth").write_text("\n".join(outer) + "\n", encoding="utf-8")
    return bin_folder


@pytest.mark.slow
def test_tokens_are_counted_with_the_standard_library_alone(empty_environment, tmp_path):
    import hero

    code = """
import importlib.util
assert not any(map(importlib.util.find_spec, ["torch", "numpy", "transformers", "PIL", "einops"]))
import hero
print(hero.count_tokens(hero.HeroConfig(keep_ratio=0.2), (480, 640)))
"""
    counted = int(run(empty_environment / "python", "-c", code, cwd=tmp_path))
    assert counted == hero.count_tokens(hero.HeroConfig(keep_ratio=0.2), (480, 640)) > 0


@pytest.mark.slow
def test_kernels_without_torch_name_what_is_missing(empty_environment, tmp_path):
    code = """
try:
    import hero_kernels
except ImportError as error:
    assert "torch" in str(error), error
"""
    run(empty_environment / "python", "-c", code, cwd=tmp_path)


@pytest.mark.slow
def test_installed_package_loads_its_model(full_environment, tmp_path):
    code = """
import hero, hero_kernels, hero.mini
hero.mini.load()
print(hero.__file__, hero_kernels.__file__, sep="\\n")
"""
    files = run(full_environment / "python", "-c", code, cwd=tmp_path).split()[-2:]
    assert all(Path(file).is_relative_to(full_environment.parent) for file in files), files


@pytest.mark.slow
def test_console_script_reports_the_environment(full_environment, tmp_path):
    assert run(full_environment / "hero", "env", cwd=tmp_path).strip()
