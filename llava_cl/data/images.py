"""Image files to normalised pixel arrays, the way LLaVA-1.5 feeds CLIP: padded to a square, bicubic, no EXIF turn."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from einops import rearrange
from PIL import Image, ImageFile, UnidentifiedImageError

from llava_cl.errors import InputError
from llava_cl.listing import other_spelling
from llava_cl.parsing import foreign, shown

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
MAX_SIDE = 16_384
"""Longest side of an image file in pixels."""
_ROWS = 1024
"""Rows that are resized at once."""
_THIN = 64
"""A longer side of so many shorter ones is cut before it is resized to a given shorter side."""
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
"""Formats that are read, by Pillow's names; its other readers are little used, and that of EPS starts a program."""


def preprocess_image(
    image: Image.Image,
    *,
    size: int = 336,
    mean: Sequence[float] = CLIP_MEAN,
    std: Sequence[float] = CLIP_STD,
) -> np.ndarray:
    """Pad to a square with the mean colour, resize bicubically, scale to [0, 1] and normalise.

    Args:
        image: any mode; converted to RGB (transparency is dropped, not blended, and of 16 bits the upper eight are
            kept). EXIF orientation is not applied.
        size: side of the result in pixels.
        mean, std: per channel, of values in [0, 1].

    Returns:
        float32 `[3, size, size]`, channels R, G, B.
    """
    return normalise(_padded(to_rgb(image), size, tuple(int(255 * channel) for channel in mean)), mean, std)


def to_rgb(image: Image.Image) -> Image.Image:
    """The image in RGB, of 16 bits the upper eight."""
    if image.mode.startswith("I"):
        # Pillow would make every value above 255 white.
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert("RGB")


def resize_and_crop(
    image: Image.Image, size: int, resize: int | tuple[int, int], resampling: Image.Resampling
) -> Image.Image:
    """Resize an image and cut a square out of its centre, as torchvision's Resize and CenterCrop do.

    Args:
        image: any mode; converted to RGB. Of a very long and thin one the ends, which are cut off, are not resized.
        size: side of the square in pixels.
        resize: the short side's new length, the ratio of the sides kept; or height and width. At least `size`.
        resampling: how pixels are computed.
    """
    width, height = image.size
    if isinstance(resize, int):
        short = min(width, height)
        if width > _THIN * short or height > _THIN * short:
            left, top = (max(0, side - _THIN * short) // 2 for side in image.size)
            image = image.crop((left, top, width - left, height - top))
            width, height = image.size
        target = (int(resize * width / short), int(resize * height / short))
    else:
        target = (resize[1], resize[0])
    resized = to_rgb(image).resize(target, resampling)
    left, top = round((target[0] - size) / 2), round((target[1] - size) / 2)
    return resized.crop((left, top, left + size, top + size))


def normalise(image: Image.Image, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """An RGB image as float32 `[3, height, width]`, scaled to [0, 1], less the mean, over the standard deviation."""
    pixels = (np.asarray(image) * (1 / 255)).astype(np.float32)  # scaled in float64, as the CLIP processor does
    normalised = (pixels - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)
    return np.ascontiguousarray(rearrange(normalised, "height width colour -> colour height width"))


def load_image(path: str, root: Path) -> Image.Image:
    """Decode the image file `root / path` completely.

    Args:
        path: relative to `root`, as in a record, or absolute.
        root: the data set's image folder. A path that leaves it, also through a symbolic link, is refused.

    Returns:
        An RGB image: the first of an animation, of 16 bits the upper eight, not turned by EXIF orientation.

    Raises:
        InputError: the file is missing, outside `root`, larger than `MAX_SIDE`, of a kind that is not read, or damaged.
    """
    with _opened(path, root) as image:
        return to_rgb(image)


def load_thumbnail(path: str, root: Path, side: int) -> Image.Image:
    """The image at most `side` pixels wide and high; takes and raises what `load_image` does."""
    with _opened(path, root) as image:
        image.draft(None, (2 * side, 2 * side))  # a JPEG is decoded at a fraction of its size
        small = to_rgb(image)
    small.thumbnail((side, side))
    return small


def check_image(path: str, root: Path) -> None:
    """Raises what `load_image` would; a JPEG is read to its end but decoded at an eighth of its size, for speed."""
    with _opened(path, root) as image:
        image.draft(None, (max(1, image.width // 8), max(1, image.height // 8)))
        image.load()


@contextlib.contextmanager
def _opened(path: str, root: Path) -> Iterator[Image.Image]:
    """An image file, opened but not decoded yet; what is wrong with it is an InputError, also inside the block."""
    file = resolve_image(path, root)
    ImageFile.LOAD_TRUNCATED_IMAGES = False  # what another library may have asked for
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # below its error, the limit is MAX_SIDE
            with Image.open(file, formats=FORMATS) as opened:
                if max(opened.size) > MAX_SIDE:
                    width, height = opened.size
                    raise InputError(
                        f"image {file} has {width} x {height} pixels, more than {MAX_SIDE} on a side: shrink it or "
                        "remove its record"
                    )
                if opened.mode == "F" or (opened.mode == "I" and opened.format != "PNG"):
                    raise InputError(
                        f"image {file} has values of 32 bits, whose black and white nothing states: save it with 8 or "
                        "16 bits"
                    )
                if opened.format == "PNG":
                    # The checksums of pixels, which decoding passes over.
                    with Image.open(file, formats=("PNG",)) as whole:
                        whole.verify()
                yield opened
    except Image.DecompressionBombError as error:
        raise InputError(f"image {file} is too large ({error}): shrink it or remove its record") from error
    except InputError:
        raise
    except UnidentifiedImageError as error:
        with file.open("rb") as stream:
            what = foreign(stream.read(512)) or f"none of {', '.join(FORMATS)}, or damaged; replace it"
        raise InputError(f"image {file} cannot be decoded: {what}") from error
    except Exception as error:  # what Pillow raises for damaged bytes is neither documented nor few
        raise InputError(f"image {file} cannot be decoded ({error}): replace the file or remove its record") from error


def resolve_image(path: str, root: Path) -> Path:
    """The file `root / path`, checked to lie inside `root` and to exist, without opening it.

    Raises:
        InputError: `path` leaves `root`, or names no file.
    """
    try:
        folder = Path(root).resolve()
        file = (folder / path).resolve()
        there = file.is_file()
    except (OSError, RuntimeError, ValueError) as error:  # too long, a link to itself, a zero byte
        raise InputError(f"image path {shown(path)} in {root} is no path that can be used ({error})") from error
    if not file.is_relative_to(folder):
        raise InputError(
            f"image path {shown(path)} leaves the image folder {root}: give a path that stays in it, symbolic links "
            "included"
        )
    if not there:
        near = other_spelling(file)
        raise InputError(f"image {file} does not exist: check the image folder and the record's path.{near}")
    return file


def _padded(image: Image.Image, size: int, colour: tuple[int, ...]) -> Image.Image:
    """The image padded to a square and resized, of which Pillow does rows before columns, without making the square."""
    width, height = image.size
    side = max(image.size)
    left, top = (side - width) // 2, (side - height) // 2
    begin, end = 0, size
    if side > 4096 and 16 * width < side:
        # Columns of the result that the image does not reach have the colour; four more are within the filter's reach.
        begin, end = max(0, left * size // side - 4), min(size, (left + width) * size // side + 5)
    first, last = begin * side / size, end * side / size
    edge = int(first)
    rows_done = Image.new("RGB", (size, side), colour)
    for row in range(0, height, _ROWS):
        rows = min(_ROWS, height - row)
        strip = Image.new("RGB", (min(side, int(last) + 1) - edge, rows), colour)
        strip.paste(image.crop((0, row, width, row + rows)), (left - edge, 0))
        box = (first - edge, 0, last - edge, rows)
        resized = strip.resize((end - begin, rows), Image.Resampling.BICUBIC, box)
        rows_done.paste(resized, (begin, top + row))
    return rows_done.resize((size, size), Image.Resampling.BICUBIC)
