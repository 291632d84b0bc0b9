"""One image: from bytes or foreign objects to an array (h, w, c), and from there to a size."""

from __future__ import annotations

import io
import warnings
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from modicum.errors import InvalidInput

Pixels = NDArray[Any]
"""(h, w, c): uint8 from 0 to 255, or float32 as it came."""

Box = tuple[float, float, float, float]
"""left, top, right, bottom in pixels of the image."""

Layout = Literal["hwc", "chw"]
Interpolation = Literal["bilinear", "bicubic"]

SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".ppm", ".webp"})
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "WEBP")
MAX_FILE_BYTES = 256 << 20
"""An image file beyond this is refused unread."""

_FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


def decode(data: bytes, where: str, shrink: int | None = None) -> Pixels:
    """uint8 (h, w, 1) of a grey image, (h, w, 3) of any other; the first frame of several.

    Turned upright where the camera noted how; transparency is dropped.  With `shrink` an image
    whose shorter side is longer than that is made smaller at once.  Raises InvalidInput.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
        if image.mode[0] in "IF":
            raise InvalidInput(
                f"{where} has more than 8 bits per channel",
                why=f"its mode is {image.mode}; 256 levels would not hold it",
                hint="convert it to 8 bits, or give the images as floats in an .npz",
            )
        if shrink is not None:
            image.draft(None, (shrink, shrink))
        image.load()
        image = _upright(image).convert("L" if image.mode in ("1", "L", "LA") else "RGB")
        if shrink is not None and min(image.size) > shrink:
            w, h = (round(side * shrink / min(image.size)) for side in image.size)
            image = image.resize((w, h), Image.Resampling.BILINEAR)
        pixels = np.asarray(image)
    except InvalidInput:
        raise
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise InvalidInput(
            f"{where} has too many pixels",
            why=str(error),
            hint="make it smaller; PIL.Image.MAX_IMAGE_PIXELS is the limit",
        ) from None
    except Exception as error:  # decoders raise whatever they like on broken bytes
        raise InvalidInput(
            f"{where} cannot be read as an image",
            why=_why(error, data),
            hint="replace it, or leave it out: ignore=(...)",
        ) from None
    return pixels[:, :, None] if pixels.ndim == 2 else pixels


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # notes that cannot be read say nothing about the pixels
        return image


def _why(error: Exception, data: bytes) -> str:
    if not data:
        return "the file is empty"
    if isinstance(error, UnidentifiedImageError):
        return f"it begins with {data[:8]!r}, which none of {', '.join(FORMATS)} does"
    return f"{type(error).__name__}: {error}"


def as_pixels(value: Any, where: str, layout: Layout | None = None) -> Pixels:
    """(h, w, c) of a PIL image, a tensor (c, h, w) or (h, w), or an array of either layout.

    uint8, or whole numbers from 0 to 255, become uint8; floats become float32.
    """
    if isinstance(value, Image.Image):
        layout = "hwc"
        if value.mode[0] not in "IF":
            value = value.convert("L" if value.mode in ("1", "L", "LA") else "RGB")
    elif layout is None and type(value).__module__.partition(".")[0] == "torch":
        layout = "chw"
    try:
        pixels = np.asarray(value)
    except Exception as error:
        raise InvalidInput(f"{where} is not an image", why=str(error)) from None
    return numbers(channels_last(pixels, where, layout), where)


def channels_last(pixels: Pixels, where: str, layout: Layout | None, batch: int = 0) -> Pixels:
    """(..., h, w, c) of images, each (h, w), (h, w, c) or (c, h, w), behind `batch` axes.

    Without a layout, the axis of size 1 or 3 is that of the channels.
    """
    if pixels.ndim == batch + 2:
        pixels, layout = pixels[..., None], "hwc"
    shape = pixels.shape[batch:]
    if len(shape) != 3 or 0 in shape:
        raise InvalidInput(
            f"{where} has shape {pixels.shape}",
            hint="(height, width), (height, width, channels) or (channels, height, width)",
        )
    if layout is None:
        first, last = shape[0] in (1, 3), shape[2] in (1, 3)
        if first == last:
            raise InvalidInput(
                f"{where} has shape {pixels.shape}: which axis is the channels'?",
                hint="load(..., layout='hwc') or layout='chw'",
            )
        layout = "hwc" if last else "chw"
    return np.moveaxis(pixels, batch, -1) if layout == "chw" else pixels


def numbers(pixels: Pixels, where: str) -> Pixels:
    """The same as contiguous uint8 or finite float32.  Raises InvalidInput."""
    if pixels.dtype.kind in "iu":
        if pixels.dtype != np.uint8 and pixels.size and (pixels.min() < 0 or pixels.max() > 255):
            raise InvalidInput(
                f"{where} has whole numbers from {pixels.min()} to {pixels.max()}",
                why="whole numbers are taken for levels from 0 to 255",
                hint="give other values as floats",
            )
        return np.ascontiguousarray(pixels, dtype=np.uint8)
    if pixels.dtype.kind != "f":
        raise InvalidInput(f"{where} has values of type {pixels.dtype}", hint="uint8 or floats")
    with np.errstate(over="ignore"):
        pixels = np.ascontiguousarray(pixels, dtype=np.float32)
    if not np.isfinite(pixels).all():
        raise InvalidInput(f"{where} has values that are not finite in float32")
    return pixels


def with_channels(pixels: Pixels, wanted: int, where: str) -> Pixels:
    """(h, w, wanted): grey is repeated, colour becomes its luma (ITU-R BT.601).

    A repeated grey image stays (h, w, 1): assigning it broadcasts.
    """
    have = pixels.shape[2]
    if have in (1, wanted):
        return pixels
    if (have, wanted) == (3, 1):
        if pixels.dtype == np.uint8:
            return np.asarray(Image.fromarray(pixels).convert("L"))[:, :, None]
        return pixels @ np.array([[0.299], [0.587], [0.114]], np.float32)
    raise InvalidInput(f"{where} has {have} channels, the preprocessing makes {wanted}")


def resample(pixels: Pixels, box: Box, size: tuple[int, int], how: Interpolation) -> Pixels:
    """What lies in `box`, at size (height, width), of the same type.

    Filtered over as many pixels as one of the result covers (antialiased), as pillow does.
    """
    left, top, right, bottom = box
    if (bottom - top, right - left) == size and left == int(left) and top == int(top):
        return pixels[int(top) : int(bottom), int(left) : int(right)]
    channels = pixels.shape[2]
    shape = (size[1], size[0])
    if pixels.dtype == np.uint8 and channels in (1, 3):
        image = Image.fromarray(pixels if channels == 3 else pixels[:, :, 0])
        made = np.asarray(image.resize(shape, _FILTERS[how], box))
        return made if channels == 3 else made[:, :, None]
    planes = [Image.fromarray(pixels[:, :, c].astype(np.float32)) for c in range(channels)]
    return np.stack([np.asarray(p.resize(shape, _FILTERS[how], box)) for p in planes], 2)
