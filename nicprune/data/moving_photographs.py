"""Clips made of photographs, for those who have no videos: a camera that moves over a photograph,
and an object in front of it.

A frame depends on the files and its index alone, not on what was read before.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from nicprune.common.errors import DataError
from nicprune.common.files import content_digest
from nicprune.data.images import list_images, read_image, upright_size, usable_images
from nicprune.data.patches import mix

LARGEST_SIDE = 768
"""Pixels along a side of a frame; of a larger photograph a part is filmed."""

STATIC_CAMERAS = 0.4
"""Fraction of the clips whose camera stands still, as in much of real video."""
MOTION = 6 / 256
"""Largest translation between two frames, as a fraction of the frame's shorter side, and at most
that of 512 pixels. Most are slower: the speed is this times u^2, u uniform in [0, 1].
"""
ZOOM = 0.015
"""Largest change of scale between two frames."""
ROTATION = math.radians(0.5)
"""Largest rotation between two frames."""
OBJECTS = 0.5
"""Fraction of the clips with an object in front."""
OBJECT_SIZES = (0.1, 0.5)
"""Sides of an object, as fractions of the frame's shorter side."""
FADES = 0.2
"""Fraction of the clips whose brightness and contrast change."""
NOISY = 0.5
"""Fraction of the clips with sensor noise."""
NOISE = 2.5
"""Largest standard deviation of sensor noise, in levels of 255."""

VERSION = 1
"""Part of the clips' digests: raised when frames come out otherwise."""


@dataclass(frozen=True)
class Camera:
    """A similarity motion of constant speed.

    Attributes:
        velocity: pixels of the frame by which the content moves from a frame to the next, (x, y).
        zoom: change of scale from a frame to the next.
        rotation: radians from a frame to the next.
    """

    velocity: tuple[float, float] = (0.0, 0.0)
    zoom: float = 0.0
    rotation: float = 0.0


@dataclass(frozen=True)
class MovingObject:
    """A piece of a photograph that moves in front of another.

    Attributes:
        source: the photograph it is cut from.
        size: (width, height) in pixels.
        centre: where its centre is in the middle of the clip, (x, y) in pixels.
        velocity: pixels from a frame to the next, (x, y).
        cut_from: centre of the piece in its photograph, (x, y) as fractions.
        ellipse: False for a rectangle.
        softness: pixels over which its edge goes from opaque to transparent.
        mirrored: whether it is turned from left to right.
    """

    source: Path
    size: tuple[float, float]
    centre: tuple[float, float]
    velocity: tuple[float, float]
    cut_from: tuple[float, float]
    ellipse: bool
    softness: float
    mirrored: bool


class MovingPhotograph:
    """A clip of a camera that moves over a photograph: in 40 % of the clips not at all, else with a
    translation, zoom and rotation of constant speed, in fractions of a pixel too. Half of the clips
    have an object in front that moves on its own, half have sensor noise, some fade.

    A frame is as large as the photograph (at most 768 pixels along a side). Where the camera sees
    beyond the photograph's border, it sees the photograph mirrored at it: cutting the border off
    instead would take up to 70 of 512 pixels, and photographs of 256 would have no patch of 256.
    Speeds are in proportion to the shorter side.

    Args:
        path: the photograph.
        count: number of frames.
        others: photographs that an object may be cut from; of itself where there is no other one.

    Attributes:
        name: of the file.
        height, width: of every frame, in pixels.
        camera: its motion.
        object: what moves in front; None in half of the clips.
        fade: (contrast, brightness): changes from a frame to the next, as a factor less 1 and in
            levels of 255.
        noise: standard deviation of sensor noise, in levels of 255.

    Raises:
        DataError: the file is missing, damaged or not an image.
    """

    def __init__(self, path: Path, count: int, others: Sequence[Path] = ()):
        self.path, self.name, self.count = path, path.name, count
        self._photograph_size = upright_size(path)
        self.width, self.height = (min(side, LARGEST_SIDE) for side in self._photograph_size)
        self._seed = int(content_digest(path)[:15], 16)
        self._generator = torch.Generator().manual_seed(mix(self._seed, VERSION))
        draw = self._draw
        self._corner = tuple(
            math.floor(draw() * (whole - side + 1))
            for whole, side in zip(self._photograph_size, (self.width, self.height), strict=True)
        )
        shorter = min(self.width, self.height)
        self._fastest = MOTION * min(shorter, 512)
        moves, camera = draw() >= STATIC_CAMERAS, self._draw_camera()
        self.camera = camera if moves else Camera()
        has, drawn = draw() < OBJECTS, self._draw_object(others, shorter)
        self.object = drawn if has else None
        fades, contrast, brightness = draw() < FADES, draw(-0.01, 0.01), draw(-1.5, 1.5)
        self.fade = (contrast, brightness) if fades else (0.0, 0.0)
        noisy, noise = draw() < NOISY, draw(0, NOISE)
        self.noise = noise if noisy else 0.0

    def __len__(self) -> int:
        """Return the number of frames."""
        return self.count

    def digest(self) -> str:
        """Return a hash of what the frames are made of."""
        files = [self.path] if self.object is None else [self.path, self.object.source]
        made_of = [VERSION, self.count, *(content_digest(path) for path in files)]
        return hashlib.sha256(repr(made_of).encode()).hexdigest()

    def read(self, indices: Sequence[int]) -> list[Tensor]:
        """Return the frames of these indices, in this order: uint8 RGB, shape (3, H, W).

        Raises:
            DataError: the clip has no such frame, or a photograph is damaged.
        """
        for index in indices:
            if not 0 <= index < self.count:
                raise DataError(f"{self.name} has {self.count} frames, and none of index {index}")
        photograph = source = read_image(self.path).float()
        if self.object is not None and self.object.source != self.path:
            source = read_image(self.object.source).float()
        return [self._frame(photograph, source, index) for index in indices]

    # -- what is drawn ----------------------------------------------------------------------------

    def _draw(self, low: float = 0.0, high: float = 1.0) -> float:
        drawn = torch.rand((), dtype=torch.float64, generator=self._generator)
        return low + (high - low) * float(drawn)

    def _draw_velocity(self) -> tuple[float, float]:
        speed, angle = self._fastest * self._draw() ** 2, self._draw(0, 2 * math.pi)
        return speed * math.cos(angle), speed * math.sin(angle)

    def _draw_camera(self) -> Camera:
        """Draw a motion; zoom and rotation are slow in most clips, as translation is."""
        velocity = self._draw_velocity()
        zoom, rotation = (self._draw(-1, 1) ** 3 for _ in range(2))
        return Camera(velocity, ZOOM * zoom, ROTATION * rotation)

    def _draw_object(self, others: Sequence[Path], shorter: int) -> MovingObject:
        draw = self._draw
        index, source = math.floor(draw() * len(others)), self.path
        if others:
            source = others[index]
            if source == self.path:
                source = others[(index + 1) % len(others)]
        low, high = OBJECT_SIZES
        return MovingObject(
            source=source,
            size=(shorter * draw(low, high), shorter * draw(low, high)),
            centre=(draw(0, self.width), draw(0, self.height)),
            velocity=self._draw_velocity(),
            cut_from=(draw(0.25, 0.75), draw(0.25, 0.75)),
            ellipse=draw() < 0.5,
            softness=draw(1, 6),
            mirrored=draw() < 0.5 or source == self.path,
        )

    # -- frames -----------------------------------------------------------------------------------

    def _frame(self, photograph: Tensor, source: Tensor, index: int) -> Tensor:
        time = index - (self.count - 1) / 2
        frame = self._background(photograph, time)
        if self.object is not None:
            self._put_in_front(frame, self.object, source, time)
        contrast, brightness = self.fade
        if contrast or brightness:
            frame = (frame - 128) * (1 + contrast * time) + (128 + brightness * time)
        if self.noise:
            generator = torch.Generator().manual_seed(mix(self._seed, VERSION, index))
            frame = frame + self.noise * torch.randn(frame.shape, generator=generator)
        return frame.round().clamp_(0, 255).byte()

    def _background(self, photograph: Tensor, time: float) -> Tensor:
        """Return what the camera sees, float32 levels of shape (3, H, W)."""
        (left, top), camera = self._corner, self.camera
        if camera == Camera():
            bottom, right = top + self.height, left + self.width
            return photograph[:, top:bottom, left:right].clone()
        x = torch.arange(self.width) + 0.5 - self.width / 2
        y = torch.arange(self.height) + 0.5 - self.height / 2
        x, y = x - camera.velocity[0] * time, y[:, None] - camera.velocity[1] * time
        scale, angle = (1 + camera.zoom) ** -time, -camera.rotation * time
        cosine, sine = scale * math.cos(angle), scale * math.sin(angle)
        middle = (left + self.width / 2, top + self.height / 2)
        return _sampled(
            photograph, middle[0] + cosine * x - sine * y, middle[1] + sine * x + cosine * y
        )

    def _put_in_front(
        self, frame: Tensor, thing: MovingObject, source: Tensor, time: float
    ) -> None:
        """Blend the object into a frame, in place."""
        centre = [c + v * time for c, v in zip(thing.centre, thing.velocity, strict=True)]
        sides = (self.width, self.height)
        spans = []
        for at, size, side in zip(centre, thing.size, sides, strict=True):
            reach = size / 2 + thing.softness
            spans.append((max(0, math.floor(at - reach)), min(side, math.ceil(at + reach))))
        (left, right), (top, bottom) = spans
        if left >= right or top >= bottom:
            return
        x = torch.arange(left, right) + 0.5 - centre[0]
        y = (torch.arange(top, bottom) + 0.5 - centre[1])[:, None]
        half_width, half_height = (size / 2 for size in thing.size)
        if thing.ellipse:
            radius = ((x / half_width) ** 2 + (y / half_height) ** 2).sqrt()
            inside = (1 - radius) * min(half_width, half_height)
        else:
            inside = torch.minimum(half_width - x.abs(), half_height - y.abs())
        opacity = (inside / thing.softness + 0.5).clamp(0, 1)
        across = -x if thing.mirrored else x
        u = thing.cut_from[0] * source.shape[2] + across
        v = thing.cut_from[1] * source.shape[1] + y
        piece = _sampled(source, *torch.broadcast_tensors(u, v))
        frame[:, top:bottom, left:right].lerp_(piece, opacity)


def moving_photographs(
    folder: str | Path | Sequence[str | Path], count: int, smallest: int = 1
) -> list[MovingPhotograph]:
    """Return a clip for each photograph of a folder, in the order of `list_images`.

    Args:
        folder: one folder, several, or "samples" (see `list_images`).
        count: number of frames of a clip.
        smallest: pixels that the sides of a photograph have at least; a warning names those that
            are left out.

    Raises:
        DataError: a folder is missing or holds no image, or no image is usable.
    """
    paths = usable_images(list_images(folder, "train"), smallest)
    return [MovingPhotograph(path, count, paths) for path in paths]


def _sampled(image: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Return the levels of a float32 image at positions in pixels, of shape (H, W) each, by bicubic
    interpolation: float32, shape (3, H, W). Beyond its border the image is mirrored.
    """
    height, width = image.shape[1:]
    grid = torch.stack((x * (2 / width) - 1, y * (2 / height) - 1), -1)
    return F.grid_sample(image[None], grid[None], "bicubic", "reflection", align_corners=False)[
        0
    ].clamp_(0, 255)
