"""Images: opened from a path or URL, upright and in RGB as the model sees them, and written."""

from __future__ import annotations

import importlib.util
import io
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.request import Request, urlopen

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ._checks import error
from ._version import __version__
from .tiling import Whole

if TYPE_CHECKING:
    from .selection import Selection

__all__ = ["as_seen", "check_writable", "open_image", "read", "save_image"]


def open_image(source: str | os.PathLike | bytes, size: tuple[int, int] | None = None) -> Image.Image:
    """Open an image and rotate it by its Exif tag, as ``transformers.image_utils.load_image`` does.

    Args:
        source: a path, a URL that begins with ``http://`` or ``https://``, or the bytes of a file.
        size: (height, width) that the model saw. If only the image as it is stored has it, it is not rotated.

    Returns:
        the image in RGB, greys of more than 8 bits scaled; with transparency, in its own mode.

    Raises:
        FileNotFoundError: there is no such file.
        OSError: the file or URL cannot be read or is no complete image. The message, one line, names it.
    """
    try:
        file = io.BytesIO(source) if isinstance(source, bytes) else source
        if isinstance(source, str) and source.startswith(("http://", "https://")):
            # load_image would clip 16-bit greys and take the page of an HTTP error for the image.
            request = Request(source, headers={"User-Agent": f"hero/{__version__}"})
            with urlopen(request, timeout=30) as response:
                file = io.BytesIO(response.read())
        with Image.open(file) as image:
            image.load()
            upright = ImageOps.exif_transpose(image)
            found = image.copy() if upright.size[::-1] != size == image.size[::-1] else upright
            if image.mode == "I" and image.format in ("PNG", "PPM"):  # of 16 bits, whatever Pillow calls them
                found = found.convert("I;16")
            found = _to_8_bit(found)
            return found if found.has_transparency_data else found.convert("RGB")
    except Exception as problem:  # for damaged files Pillow raises exceptions of many kinds
        kind = FileNotFoundError if isinstance(problem, FileNotFoundError) else OSError
        reason = getattr(problem, "strerror", None) or str(problem) or type(problem).__name__
        if isinstance(problem, UnidentifiedImageError):
            reason = "no image format that Pillow knows"
        reason = " ".join(str(reason).split())
        got = f"{len(source)} bytes" if isinstance(source, bytes) else repr(str(source))
        raise kind(f"image: expected an image file or URL, got {got}: {reason}") from problem


def read(image: Any, size: tuple[int, int] | None) -> Image.Image:
    """An image in RGB, with transparency drawn on white.

    Args:
        image: a PIL image, an array of uint8, a path or a URL.
        size: its (height, width); ``None`` if any will do.

    Raises:
        TypeError: another kind of image.
        ValueError: another size.
        OSError: as :func:`open_image`.
    """
    if isinstance(image, (str, os.PathLike)):
        image = open_image(image, size)
    elif isinstance(image, np.ndarray):
        if image.dtype != np.uint8:
            raise TypeError(f"image: expected an array of uint8, got {image.dtype}")
        if image.ndim < 2 or image.shape[2:] not in ((), (2,), (3,), (4,)):
            expected = "an array [height, width] or [height, width, 2 to 4 channels]"
            raise TypeError(f"image: expected {expected}, got shape {image.shape}")
        image = Image.fromarray(image)
    if not isinstance(image, Image.Image):
        kind = type(image).__name__
        raise TypeError(f"image: expected a PIL image, a numpy array, a path or a URL, got {kind}")
    if size is not None and image.size[::-1] != size:
        raise ValueError(
            f"image: expected the selection's, {size[0]} x {size[1]} px (height x width), "
            f"got {image.size[1]} x {image.size[0]}"
        )
    image = _to_8_bit(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _to_8_bit(image: Image.Image) -> Image.Image:
    """Scale greys of 16 bits by their range, and those of 32 bits by their least and largest value.

    Pillow would clip them instead. Other images are returned as they are. NaN is drawn black.
    """
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
    if image.mode not in ("I", "F"):
        return image
    values = np.asarray(image, np.float64)
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    shares = np.nan_to_num(np.clip((values - low) / (high - low or 1.0), 0, 1))
    return Image.fromarray((shares * 255 + 0.5).astype(np.uint8))


def as_seen(image: Image.Image, selection: Selection) -> Image.Image:
    """The part of an image that a model saw: the middle square, for models that take one crop."""
    size = selection.image_sizes[0]
    if size is None or not isinstance(selection.geometry.tiling, Whole):
        return image
    return ImageOps.fit(image, size[::-1])


def check_writable(option: str, path: Path) -> None:
    """Raise unless a picture can be drawn and written to a path. Nothing is written.

    Args:
        option: that the message begins with.
        path: its folder may be missing.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: no suffix of an image format that Pillow writes, or no place to write to.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError(f"{option}: expected matplotlib, got none: pip install 'hero-vlm[plot]'")
    try:  # since not every format has RGB
        Image.new("RGB", (1, 1)).save(io.BytesIO(), Image.registered_extensions()[path.suffix.lower()])
    except (KeyError, OSError, ValueError) as problem:
        expected = "a file name that ends as an image format which Pillow writes, such as .png"
        raise error(ValueError, option, expected, str(path)) from problem
    folder = next(folder for folder in path.absolute().parents if folder.exists())
    if path.is_dir() or not folder.is_dir() or not os.access(path if path.exists() else folder, os.W_OK):
        raise error(ValueError, option, "a file that can be written", str(path))


def save_image(image: Image.Image, path: Path) -> None:
    """Write an image, and make its folder.

    Raises:
        OSError: it cannot be written. The message names the path.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
    except (OSError, ValueError) as problem:
        reason = getattr(problem, "strerror", None) or problem
        raise OSError(f"cannot write {path}: {reason}") from problem
