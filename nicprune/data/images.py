"""Photographs in folders: found, checked, decoded once into a bounded cache, and cut into patches."""

from __future__ import annotations

import threading
import warnings
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image

from nicprune.common.errors import DataError, FileError
from nicprune.common.files import expand, write_atomically

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".ppm", ".tif", ".tiff"}
SAMPLES = "samples"
"""Folder name that stands for the colour photographs of scikit-image (`pip install 'nicprune[demo]'`)."""

SAMPLE_TEST = ("chelsea.png", "coffee.png", "rocket.jpg")
SAMPLE_TRAIN = ("astronaut.png", "hubble_deep_field.jpg", "ihc.png", "motorcycle_left.png", "motorcycle_right.png", "retina.jpg")


def read_image(path: str | Path) -> Tensor:
    """Decode a photograph to uint8 RGB, upright, as a tensor of shape (3, H, W).

    Raises:
        DataError: the file is empty, damaged or not an image.
    """
    try:
        with Image.open(path) as image:
            return pil_to_tensor(ImageOps.exif_transpose(image).convert("RGB"))
    except FileNotFoundError:
        raise DataError(f"no such image: {path}") from None
    except (OSError, SyntaxError, ValueError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise DataError(f"cannot read {path} as an image: {error or type(error).__name__}") from None


def write_png(image: Tensor, path: str | Path) -> Path:
    """Write an image (3, H, W) with values in [0, 1] as an 8-bit PNG."""
    picture = to_pil_image(image.clamp(0, 1).mul(255).round().byte())
    return write_atomically(path, lambda temporary: picture.save(temporary, format="PNG"))


def sample_photographs(split: str) -> list[Path]:
    """Paths of the photographs that come with scikit-image, `split` being "train" (6) or "test" (3).

    Raises:
        DataError: scikit-image is not installed.
    """
    try:
        import skimage.data
    except ImportError:
        raise DataError("the sample photographs come with scikit-image: pip install 'nicprune[demo]'") from None
    folder = Path(skimage.data.__file__).parent
    return [folder / name for name in (SAMPLE_TRAIN if split == "train" else SAMPLE_TEST)]


def list_images(folder: str | Path | Sequence[str | Path], split: str) -> list[Path]:
    """List the image files below one folder or several, sorted.

    A folder with a sub-folder named `split` ("train" or "test", CompressAI's layout) stands for that sub-folder.
    The name "samples" stands for the photographs of scikit-image; `~` and variables, `${NAME}`, are filled in.

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
    found = sorted(path for path in root.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if not found:
        raise DataError(f"no images in {root} (looked for {', '.join(sorted(SUFFIXES))}, sub-folders included)")
    return found


def usable_images(paths: Iterable[Path], minimum: int = 1) -> list[Path]:
    """Return the paths whose header reads as an image of at least `minimum` pixels each way; warn of the others by name.

    Raises:
        DataError: none is usable.
    """
    usable, refused = [], []
    for path in paths:
        try:
            with Image.open(path) as image:
                if min(image.size) < minimum:
                    refused.append(f"{path.name} ({image.size[0]}x{image.size[1]} is smaller than {minimum})")
                else:
                    usable.append(path)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
            refused.append(f"{path.name} (broken)")
    if not usable:
        raise DataError(f"no usable image: {', '.join(refused[:5])}{', ...' if len(refused) > 5 else ''}")
    if refused:
        more = f" and {len(refused) - 10} more" if len(refused) > 10 else ""
        warnings.warn(f"skipped {len(refused)} images: {', '.join(refused[:10])}{more}", stacklevel=3)
    return usable


def readable(paths: Sequence[Path]) -> Iterator[tuple[Path, Tensor]]:
    """Read images one by one; those whose inside is damaged, though their header is whole, are named and skipped.

    Raises:
        DataError: none can be read.
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


def calibration_images(folder: str | Path | Sequence[str | Path], count: int = 8, largest: tuple[int, int] = (512, 768)) -> list[Tensor]:
    """Whole photographs of a training set, evenly spread over it, cut at the centre to multiples of 64: float32 in [0, 1], (1, 3, H, W) each.

    Raises:
        DataError: none is usable; for "samples" also without scikit-image, whose photographs they are.
    """
    paths = usable_images(list_images(folder, "train"))
    images = []
    for _, image in readable(paths[:: max(1, len(paths) // count)][:count]):
        height, width = (min(side, most) // 64 * 64 for side, most in zip(image.shape[1:], largest, strict=True))
        if height and width:
            top, left = (image.shape[1] - height) // 2, (image.shape[2] - width) // 2
            images.append(image[None, :, top : top + height, left : left + width].float() / 255)
    if not images:
        raise DataError("no photograph of the training set is as large as 64x64 pixels")
    return images


class Patches:
    """Random crops of photographs, each batch a pure function of (seed, step, rank).

    So a run that resumes at step n sees what the uninterrupted run saw, without a state to save.

    Args:
        folder: one folder, several, or "samples" (see `list_images`).
        patch_size: side of the square crops in pixels.
        cache_bytes: decoded photographs kept in memory, as uint8; the least recently used go first.
    """

    def __init__(self, folder: str | Path | Sequence[str | Path], patch_size: int, cache_bytes: int = 4 << 30):
        self.patch_size = patch_size
        self.paths = usable_images(list_images(folder, "train"), patch_size)
        self.cache_bytes = cache_bytes
        self._cache: OrderedDict[Path, Tensor] = OrderedDict()
        self._held = 0
        self._broken: set[Path] = set()
        self._lock = threading.Lock()
        self._ahead: tuple[tuple[int, ...], Future[Tensor]] | None = None
        self._worker: ThreadPoolExecutor | None = None

    def __len__(self) -> int:
        return len(self.paths)

    def image(self, index: int) -> Tensor:
        """Photograph `index` as uint8 (3, H, W), from the cache if it is there."""
        path = self.paths[index]
        with self._lock:
            if path in self._cache:
                self._cache.move_to_end(path)
                return self._cache[path]
        image = read_image(path)
        with self._lock:
            if path not in self._cache and image.numel() <= self.cache_bytes:
                self._cache[path] = image
                self._held += image.numel()
                while self._held > self.cache_bytes:
                    self._held -= self._cache.popitem(last=False)[1].numel()
        return image

    def _skip(self, path: Path, error: DataError) -> None:
        if path not in self._broken:
            self._broken.add(path)
            warnings.warn(f"skipped: {error}", stacklevel=2)
        if len(self._broken) == len(self.paths):
            raise DataError(f"no usable image: every one of {len(self.paths)} is broken")

    def _draw(self, size: int, seed: int, step: int, rank: int) -> Tensor:
        generator = torch.Generator().manual_seed(mix(seed, step, rank))
        side = self.patch_size
        patches: list[Tensor] = []
        while len(patches) < size:
            index, row, column, flip = torch.randint(0, 1 << 31, (4,), generator=generator).tolist()
            try:
                image = self.image(index % len(self.paths))
            except DataError as error:  # whole header, damaged inside: draw another; the same files give the same draws
                self._skip(self.paths[index % len(self.paths)], error)
                continue
            top, left = row % (image.shape[1] - side + 1), column % (image.shape[2] - side + 1)
            patch = image[:, top : top + side, left : left + side]
            patches.append(patch.flip(-1) if flip % 2 else patch)
        return torch.stack(patches).float().div_(255)

    def batch(self, size: int, *, seed: int, step: int, rank: int = 0) -> Tensor:
        """Return the batch of `step`, float32 in [0, 1], shape (size, 3, patch_size, patch_size).

        The next step's batch is drawn meanwhile in a thread (decoding and copying release the interpreter lock).
        """
        key = (size, seed, step, rank)
        if self._worker is None:
            self._worker = ThreadPoolExecutor(1, thread_name_prefix="patches")
        batch = self._ahead[1].result() if self._ahead and self._ahead[0] == key else self._draw(*key)
        following = (size, seed, step + 1, rank)
        self._ahead = (following, self._worker.submit(self._draw, *following))
        return batch

    def close(self) -> None:
        """Stop the thread that draws ahead."""
        if self._worker is not None:
            self._worker.shutdown(wait=True, cancel_futures=True)
        self._worker = self._ahead = None


def mix(*numbers: int) -> int:
    """Hash integers into one 63-bit seed, so that neighbours in (seed, step, rank) are unrelated (splitmix64)."""
    state = 0
    for number in numbers:
        state = (state ^ (number & 0xFFFFFFFFFFFFFFFF)) + 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
        state = (state ^ state >> 27) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state >> 1
