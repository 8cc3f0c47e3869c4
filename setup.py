"""Package metadata. Nothing here imports the package or looks at the machine it is built on."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).resolve().parent


def read_version() -> str:
    text = (HERE / "hero" / "_version.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__ = "([^"]+)"$', text, re.MULTILINE)
    if match is None:
        raise RuntimeError("hero/_version.py does not define __version__")
    return match.group(1)


def read_readme() -> str:
    readme = HERE / "README.md"
    return readme.read_text(encoding="utf-8") if readme.exists() else ""


PLOT = ["matplotlib>=3.9"]
# Transformers' video processors, which some processors hold, need torchvision; SmolVLM's needs num2words.
# No ranges: each torchvision requires one torch by itself, and the tests run without both.
PROCESSORS = ["torchvision", "num2words"]
# scikit-learn and scikit-image bring the digits and photographs that bench/mini draws its scenes from.
BENCH = [*PLOT, "pytest", "pytest-benchmark", "scikit-learn", "scikit-image", "tqdm"]
TEST = [*BENCH, "pytest-xdist", "hypothesis", "packaging", "accelerate", "peft"]
DEV = [*TEST, "torchao", "ruff", "mypy", "build"]  # torchao: quantised models, with the newest torch alone
# hero_llava_next subclasses lmms-eval's llava_hf, which imports decord.
LMMS = ["lmms-eval[video-legacy]>=0.7.3"]
VLLM = ["vllm>=0.31"]  # older ones need transformers before 5.17
# Batch inference on several workers; Ray Data brings pyarrow, which reads Parquet.
RAY = ["ray[data]>=2.60,<3"]

setup(
    name="hero-vlm",
    version=read_version(),
    description="HERO visual token dropping for high-resolution vision-language models, with Triton kernels",
    long_description=read_readme(),
    long_description_content_type="text/markdown",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=find_packages(str(HERE), include=["hero", "hero.*", "hero_kernels", "hero_kernels.*"]),
    package_data={
        "hero": ["py.typed"],
        "hero.mini": [f"weights/*.{kind}" for kind in ("json", "safetensors", "md")]
        + [f"demo/*.{kind}" for kind in ("png", "json")],
        "hero_kernels": ["py.typed", "fused_attention.json", "configs/*.json"],
    },
    install_requires=[
        "torch>=2.7",
        'triton>=3.3; platform_system == "Linux"',
        "transformers>=5.17,<6",
        "einops",
        "numpy",
        "pillow>=10.1",
    ],
    extras_require={
        "plot": PLOT,
        "processors": PROCESSORS,
        "bench": BENCH,
        "test": TEST,
        "dev": DEV,
        "lmms": LMMS,
        "vllm": VLLM,
        "ray": RAY,
    },
    entry_points={
        "console_scripts": ["hero = hero.cli:main"],
        "lmms_eval.models": ["hero_llava_next = hero.lmms_eval:manifest"],
        "vllm.general_plugins": ["hero = hero.vllm:register"],
    },
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Scientific/Engineering :: Image Recognition",
        "Typing :: Typed",
    ],
)
