"""Image files: listing folders, checking, decoding."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image

from nicprune.common.errors import DataError, FileError
from nicprune.common.files import expand, write_atomically

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".ppm", ".tif", ".tiff"}

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


def read_image(path: str | Path) -> Tensor:
    """Decode an image file to uint8 RGB of shape (3, H, W), rotated upright by its EXIF
    orientation.

    Raises:
        DataError: the file is missing, empty, damaged or not an image.
    """
    try:
        with Image.open(path) as image:
            return pil_to_tensor(ImageOps.exif_transpose(image).convert("RGB"))
    except FileNotFoundError:
        raise DataError(f"no such image: {path}") from None
    except (
        OSError,
        SyntaxError,
        ValueError,
        UnidentifiedImageError,
        Image.DecompressionBombError,
    ) as error:
        raise DataError(
            f"cannot read {path} as an image: {error or type(error).__name__}"
        ) from None


def write_png(image: Tensor, path: str | Path) -> Path:
    """Write an image of shape (3, H, W) with values in [0, 1] as an 8-bit PNG."""
    picture = to_pil_image(image.clamp(0, 1).mul(255).round().byte())
    return write_atomically(path, lambda temporary: picture.save(temporary, format="PNG"))


def sample_photographs(split: str) -> list[Path]:
    """Return the paths of scikit-image's photographs: 6 for the split "train", 3 for "test".

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
    return [folder / name for name in (SAMPLE_TRAIN if split == "train" else SAMPLE_TEST)]


def list_images(folder: str | Path | Sequence[str | Path], split: str) -> list[Path]:
    """List the image files in one folder or several, sub-folders included, sorted.

    If a folder has a sub-folder named `split` ("train" or "test", CompressAI's layout), only that
    sub-folder is listed. The name "samples" stands for the photographs of scikit-image. `~` and
    environment variables (`${NAME}`) are expanded.

    Raises:
        DataError: a folder is missing or holds no image, or a variable is not set.
    """
    if not isinstance(folder, (str, Path)):
        return [path for one in folder for path in list_images(one, split)]
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
    if (root / split).is_dir():
        root = root / split
    found = sorted(
        path for path in root.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file()
    )
    if not found:
        raise DataError(
            f"no images in {root} (looked for {', '.join(sorted(SUFFIXES))}, sub-folders included)"
        )
    return found


def usable_images(paths: Iterable[Path], minimum: int = 1) -> list[Path]:
    """Return the paths of images that have at least `minimum` pixels in height and width.

    Only headers are read. A warning names the images that are left out.

    Raises:
        DataError: no image is usable.
    """
    usable, refused = [], []
    for path in paths:
        try:
            with Image.open(path) as image:
                if min(image.size) < minimum:
                    refused.append(
                        f"{path.name} ({image.size[0]}x{image.size[1]} is smaller than {minimum})"
                    )
                else:
                    usable.append(path)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
            refused.append(f"{path.name} (broken)")
    if not usable:
        raise DataError(
            f"no usable image: {', '.join(refused[:5])}{', ...' if len(refused) > 5 else ''}"
        )
    if refused:
        more = f" and {len(refused) - 10} more" if len(refused) > 10 else ""
        warnings.warn(
            f"skipped {len(refused)} images: {', '.join(refused[:10])}{more}", stacklevel=3
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
    folder: str | Path | Sequence[str | Path], count: int = 8, largest: tuple[int, int] = (512, 768)
) -> list[Tensor]:
    """Return whole training images for calibration, spread evenly over the set.

    Each is cropped at the centre to multiples of 64 pixels: float32 in [0, 1], shape (1, 3, H, W).

    Args:
        folder: one folder, several, or "samples" (see `list_images`).
        count: number of images.
        largest: largest (height, width) of a crop.

    Raises:
        DataError: no image is usable, or "samples" is asked for without scikit-image.
    """
    paths = usable_images(list_images(folder, "train"))
    images = []
    for _, image in readable(paths[:: max(1, len(paths) // count)][:count]):
        height, width = (
            min(side, most) // 64 * 64 for side, most in zip(image.shape[1:], largest, strict=True)
        )
        if height and width:
            top, left = (image.shape[1] - height) // 2, (image.shape[2] - width) // 2
            images.append(image[None, :, top : top + height, left : left + width].float() / 255)
    if not images:
        raise DataError("no photograph of the training set is as large as 64x64 pixels")
    return images
