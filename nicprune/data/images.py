"""Image files: listing folders, checking, decoding."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image

from nicprune.common.config import cut
from nicprune.common.errors import DataError, FileError
from nicprune.common.files import check_regular, expand, write_atomically
from nicprune.common.wording import counted

SUFFIXES = {
    *(".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".dib", ".gif", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pnm", ".jp2", ".j2k"),
}
"""Endings of the files that a folder's images are, in lower case: those of `FORMATS`."""

UNREAD_SUFFIXES = {
    *(".avif", ".heic", ".heif", ".jxl", ".exr", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf"),
}
"""Endings of photographs that cannot be read; a folder that has some is warned of."""

SAMPLES = "samples"
"""Folder name that stands for the colour photographs of scikit-image (`pip install
'nicprune[demo]'`).
"""

SAMPLE_TEST = ("chelsea.png", "coffee.png", "rocket.jpg")

SAMPLE_TRAIN = (
    "astronaut.png",
    "hubble_deep_field.jpg",
    "ihc.png",
    "motorcycle_left.png",
    "motorcycle_right.png",
    "retina.jpg",
)


INSTEAD = {"validation": ("train",)}
"""The sub-folder that is listed where a folder has none of a split's own name."""

MAX_PIXELS = 89_478_485
"""Pixels of the largest image that is decoded, Pillow's own bound."""

MAX_PIXELS_VARIABLE = "NICPRUNE_MAX_PIXELS"
"""Environment variable that sets another bound; --max-pixels sets it for one command."""

FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "DIB", "PPM", "GIF", "JPEG2000")
"""Formats that are opened, whatever a file is called. Pillow knows others, of which EPS would start
another program.
"""

SWAPPED_SIDES = (5, 6, 7, 8)
"""EXIF orientations in which rows are stored as columns."""
ORIENTATION = 0x0112
"""Number of the EXIF tag."""

SIXTEEN_BIT = ("I;16", "I;16B", "I;16L", "I;16N")
PREMULTIPLIED = {"La": "LA", "RGBa": "RGBA"}


def read_image(path: str | Path) -> Tensor:
    """Decode an image file to uint8 RGB of shape (3, H, W), rotated upright by its EXIF
    orientation; see `to_rgb`.

    Raises:
        DataError: the file is missing, empty, damaged, too large or not an image, or has values
            whose white is not known.
    """
    try:
        check_regular(path, "image")
    except FileError as error:
        raise DataError(str(error)) from None
    try:
        with _opened(path) as image:
            check_size(*image.size, str(path))
            image.verify()  # of a PNG, checksums that Pillow does not look at when it decodes
        with _opened(path) as image:
            return to_rgb(image)
    except DataError as error:
        raise DataError(f"cannot read {path}: {error}") from None
    except Exception as error:  # Pillow raises errors of any kind on damaged files
        raise DataError(f"cannot read {path} as an image: {_reason(error)}") from None


def is_transparent(path: str | Path) -> bool:
    """Return whether an image that `read_image` reads has transparency, which it leaves out."""
    with _opened(path) as image:
        return image.mode in TRANSPARENT or "transparency" in image.info


TRANSPARENT = ("RGBA", "LA", "PA", "RGBa", "La")
"""Pillow's modes with an alpha channel."""


@contextmanager
def _opened(path: str | Path) -> Iterator[Image.Image]:
    """Open an image of any size: it is `check_size` that bounds it, and not Pillow."""
    before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        with Image.open(path, formats=FORMATS) as image:
            yield image
    finally:
        Image.MAX_IMAGE_PIXELS = before


def _reason(error: BaseException) -> str:
    if isinstance(error, MemoryError):
        return "it needs more memory than there is"
    return cut(str(error) or type(error).__name__, 200)


def max_pixels() -> int:
    """Pixels of the largest image that is read or coded.

    Raises:
        DataError: NICPRUNE_MAX_PIXELS is no such number.
    """
    given = os.environ.get(MAX_PIXELS_VARIABLE) or str(MAX_PIXELS)
    if not given.isascii() or not given.isdecimal() or not int(given):
        raise DataError(f"{MAX_PIXELS_VARIABLE} is a number of pixels (got {given!r:.40})")
    return int(given)


def check_size(width: int, height: int, what: str) -> None:
    """Raise DataError if an image is larger than `max_pixels`."""
    if width * height > (most := max_pixels()):
        raise DataError(
            f"{what} has {width}x{height} pixels, more than the {most:,} that are allowed;"
            f" --max-pixels or {MAX_PIXELS_VARIABLE} allows more"
        )


def upright_size(path: Path) -> tuple[int, int]:
    """Return the (width, height) of an image as `read_image` returns it. Most formats say it in
    their header; of a PNG, what turns it may stand behind the pixels.

    Raises:
        DataError: the file is missing, damaged, too large or not an image.
    """
    try:
        with _opened(check_regular(path, "image")) as image:
            width, height = image.size
            check_size(width, height, str(path))
            # Pillow turns the size of a TIFF itself.
            turned = image.format != "TIFF" and image.getexif().get(ORIENTATION) in SWAPPED_SIDES
    except DataError:
        raise
    except FileError as error:
        raise DataError(str(error)) from None
    except Exception:  # Pillow raises errors of any kind on damaged files
        height, width = read_image(path).shape[1:]
        return width, height
    return (height, width) if turned else (width, height)


def to_rgb(image: Image.Image) -> Tensor:
    """Convert a Pillow image of any mode to uint8 RGB, upright, shape (3, H, W).

    Samples of 16 bits are scaled by 255/65535 and rounded (Pillow itself gives the upper byte of
    those of 16-bit RGB), floating-point samples are taken to be in [0, 1]. Grey becomes RGB,
    palettes and CMYK are converted by Pillow, without colour profiles. Transparency is left out: a
    transparent pixel has the colour that is stored for it.

    Raises:
        DataError: 32-bit integers, whose white is not known, floating-point samples outside
            [0, 1], or CIELAB.
    """
    bits, white_is_zero = 16, False
    tags: Any = getattr(image, "tag_v2", None)  # a TIFF's
    if tags is not None:
        bits = (tags.get(BITS_PER_SAMPLE) or (16,))[0]
        white_is_zero = tags.get(PHOTOMETRIC) == 0
    kind, mode = image.format, image.mode
    upright = ImageOps.exif_transpose(image)
    if mode in SIXTEEN_BIT or (mode == "I" and kind in ("PNG", "PPM")):
        values = np.asarray(upright, dtype=np.float64) / ((1 << bits) - 1)
    elif mode == "LAB":
        raise DataError("its colours are CIELAB; save it as RGB")
    elif mode == "I":
        raise DataError(
            "its samples are 32-bit or signed integers, and what value is white is not known; save"
            " it with 8 or 16 bits"
        )
    elif mode == "F":
        values = np.asarray(upright, dtype=np.float64)
        if not values.size or not (values.min() >= 0 and values.max() <= 1):
            raise DataError(
                "its floating-point samples must lie in [0, 1] (found"
                f" {values.min():.4g} to {values.max():.4g}); scale them, or save it with 8 or 16"
                " bits"
            )
    else:
        return pil_to_tensor(upright.convert(PREMULTIPLIED.get(mode, mode)).convert("RGB"))
    if white_is_zero:  # Pillow turns round those of 8 bits only
        values = 1 - values
    grey = torch.from_numpy(np.floor(values * 255 + 0.5).astype(np.uint8))
    return grey.expand(3, *grey.shape).contiguous()


LUMA = (19595, 38470, 7471)
"""Weights of R, G and B in 65536ths: ITU-R BT.601's, as Pillow has them."""


def to_channels(image: Tensor, channels: int) -> Tensor:
    """Return an image (..., C, H, W), uint8 or floating-point, with so many channels: the grey of
    RGB where one is asked for, and what it is where it has them.

    Raises:
        DataError: there is no such image.
    """
    if image.shape[-3] == channels:
        return image
    if image.shape[-3] != 3 or channels != 1:
        raise DataError(
            f"the codec takes images of {channels} channels, this one has {image.shape[-3]}"
        )
    weights = torch.tensor(LUMA, device=image.device).view(3, 1, 1)
    if image.is_floating_point():
        return (image * (weights / 65536).to(image)).sum(-3, keepdim=True)
    grey = (image.int() * weights).sum(-3, keepdim=True) + (1 << 15)
    return (grey >> 16).to(image.dtype)


BITS_PER_SAMPLE, PHOTOMETRIC = 258, 262
"""Numbers of TIFF tags."""


def given_image(image: Tensor | str | Path, channels: int) -> Tensor:
    """Return a uint8 image (C, H, W) for a codec of so many channels, read from its file if it is
    one.

    Raises:
        DataError: it has another shape or type, is too large, or cannot be read.
    """
    if not isinstance(image, Tensor):
        if not isinstance(image, (str, os.PathLike)):
            raise DataError(
                f"expected a uint8 tensor of shape ({channels}, H, W), or the path of an image, got"
                f" {type(image).__name__}"
            )
        image = read_image(image)
    fits = image.ndim == 3 and image.shape[0] in (3, channels)
    if image.dtype != torch.uint8 or not fits or not image.numel():
        raise DataError(
            f"expected a uint8 image of shape ({channels}, H, W), got"
            f" {str(image.dtype).removeprefix('torch.')} of shape {tuple(image.shape)}"
        )
    check_size(image.shape[2], image.shape[1], "the image")
    return to_channels(image, channels)


def write_png(image: Tensor, path: str | Path) -> Path:
    """Write an image of shape (3, H, W) or (1, H, W) with values in [0, 1] as an 8-bit PNG, which
    says that it was written here; see `is_own_png`.
    """
    picture, told = to_pil_image(image.clamp(0, 1).mul(255).round().byte()), PngInfo()
    told.add_text("Software", "nicprune")
    return write_atomically(
        path, lambda temporary: picture.save(temporary, format="PNG", pnginfo=told)
    )


def is_own_png(start: bytes) -> bool:
    """Return whether a file that starts so is a PNG of `write_png`."""
    return start.startswith(b"\x89PNG") and start[37:].startswith(b"tEXtSoftware\0nicprune")


def sample_photographs(split: str) -> list[Path]:
    """Return the paths of scikit-image's photographs: 3 for the split "test", 6 for others.

    Raises:
        DataError: scikit-image is not installed.
    """
    try:
        import skimage.data
    except ImportError:
        raise DataError(
            "the sample photographs come with scikit-image: pip install 'nicprune[demo]'"
        ) from None
    folder = Path(skimage.data.__file__).parent
    return [folder / name for name in (SAMPLE_TEST if split == "test" else SAMPLE_TRAIN)]


def list_images(folder: str | Path | Sequence[str | Path], split: str) -> list[Path]:
    """List the image files in one folder or several, sub-folders included, sorted.

    If a folder has a sub-folder named `split` ("train" or "test", CompressAI's layout, or
    "validation"), only that sub-folder is listed; for "validation" one named train, if it has none.
    The name "samples" stands for the photographs of scikit-image. `~` and environment variables
    (`${NAME}`) are expanded.

    Raises:
        DataError: no folder is given, one is missing or holds no image, or a variable is not set.
    """
    if isinstance(folder, (list, tuple, set, Iterator)):
        given = list(folder)
        if not given:
            raise DataError("no images: the list of folders and files is empty")
        return [path for one in given for path in list_images(one, split)]
    if not isinstance(folder, (str, os.PathLike)):
        raise DataError(
            f'expected a folder of images, files or "samples", got {type(folder).__name__}'
        )
    if str(folder) == SAMPLES:
        return sample_photographs(split)
    try:
        root = expand(folder)
    except FileError as error:
        raise DataError(str(error)) from None
    if not root.exists():
        raise DataError(f"no such folder: {root}")
    if root.is_file():
        return [root]
    root = listed_folder(root, split)
    below = list(files_below(root))
    files = [path for path in below if path.is_file()]
    lost = [p.name for p in below if p.suffix.lower() in SUFFIXES and not p.exists()]
    links = f"{counted(len(lost), 'link')} to missing files, such as {lost[0]}" if lost else ""
    found = sorted(path for path in files if path.suffix.lower() in SUFFIXES)
    unread = [path for path in files if path.suffix.lower() in UNREAD_SUFFIXES]
    kinds = ", ".join(sorted({path.suffix.lower() for path in unread}))
    if not found:
        raise DataError(
            f"no images in {root} (looked for {', '.join(sorted(SUFFIXES))}, sub-folders included)"
            + (f"; {kinds} cannot be read: convert them to PNG" if unread else "")
            + (f"; it has {links}" if links else "")
        )
    if links:
        warnings.warn(f"skipped in {root}: {links}", stacklevel=2)
    if unread:
        warnings.warn(
            f"skipped {counted(len(unread), 'image')} in {root}: {kinds} cannot be read, convert"
            " them to PNG",
            stacklevel=2,
        )
    return found


def listed_folder(root: Path, split: str) -> Path:
    """Return the folder whose images are listed: a sub-folder for this split, or `root` itself."""
    inside = (root / name for name in (split, *INSTEAD.get(split, ())))
    return next((folder for folder in inside if folder.is_dir()), root)


def files_below(root: Path) -> Iterator[Path]:
    """Yield the files below a folder, those behind links to folders included; each folder once, so
    that links may go in a circle, by its own place rather than a link's if it has one.
    """
    entered: set[Path] = set()
    folders, links = [root], list[Path]()
    while folders or links:
        folder = folders.pop() if folders else links.pop(0)
        if (real := folder.resolve()) in entered:
            continue
        entered.add(real)
        try:
            inside = sorted(folder.iterdir())
        except OSError as error:
            raise DataError(f"cannot read the folder {folder}: {error.strerror or error}") from None
        for path in inside:
            if not path.is_dir():
                yield path
            else:
                (links if path.is_symlink() else folders).append(path)


def usable_images(paths: Iterable[Path], minimum: int = 1) -> list[Path]:
    """Return the paths of images that have at least `minimum` pixels in height and width.

    Only headers are read. A warning names the images that are left out.

    Raises:
        DataError: no image is usable.
    """
    usable, refused = [], []
    for path in paths:
        try:
            with _opened(path) as image:
                check_size(*image.size, path.name)
                if min(image.size) < minimum:
                    refused.append(
                        f"{path.name} ({image.size[0]}x{image.size[1]} is smaller than {minimum})"
                    )
                else:
                    usable.append(path)
        except DataError as error:
            refused.append(str(error))
        except Exception:  # of any kind; see read_image
            refused.append(f"{path.name} (broken)")
    if not usable:
        raise DataError(
            f"no usable image: {', '.join(refused[:5])}{', ...' if len(refused) > 5 else ''}"
        )
    if refused:
        more = f" and {len(refused) - 10} more" if len(refused) > 10 else ""
        warnings.warn(
            f"skipped {counted(len(refused), 'image')}: {', '.join(refused[:10])}{more}",
            stacklevel=3,
        )
    return usable


def readable(paths: Sequence[Path]) -> Iterator[tuple[Path, Tensor]]:
    """Decode images one by one; an image with damaged pixel data is skipped with a warning.

    Raises:
        DataError: no image can be decoded.
    """
    found = 0
    for path in paths:
        try:
            image = read_image(path)
        except DataError as error:
            warnings.warn(f"skipped: {error}", stacklevel=2)
            continue
        found += 1
        yield path, image
    if not found:
        raise DataError(f"no usable image: every one of {len(paths)} is broken")


def calibration_images(
    folder: str | Path | Sequence[str | Path],
    count: int = 8,
    largest: tuple[int, int] = (512, 768),
    *,
    multiple: int = 64,
    split: str = "train",
) -> list[Tensor]:
    """Return whole training images for calibration, spread evenly over the set: float32 in [0, 1],
    shape (1, 3, H, W), cropped at the centre.

    Args:
        folder: one folder, several, or "samples" (see `list_images`).
        count: number of images.
        largest: largest (height, width) of a crop.
        multiple: height and width are multiples of this many pixels. Codecs of a total stride above
            64 need theirs.
        split: sub-folder that is listed, where there is one (see `list_images`).

    Raises:
        DataError: no image is usable, or "samples" is asked for without scikit-image.
    """
    paths = usable_images(list_images(folder, split))
    spread = [paths[i * len(paths) // count] for i in range(count)] if count < len(paths) else paths
    images = []
    for _, image in readable(spread):
        height, width = (
            min(side, most) // multiple * multiple
            for side, most in zip(image.shape[1:], largest, strict=True)
        )
        if height and width:
            top, left = (image.shape[1] - height) // 2, (image.shape[2] - width) // 2
            images.append(image[None, :, top : top + height, left : left + width].float() / 255)
    if not images:
        raise DataError(
            f"no photograph of the training set is as large as {multiple}x{multiple} pixels"
        )
    return images
