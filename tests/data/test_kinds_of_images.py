"""Images of every kind: the right values, or one line that says why not."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from nicprune.common.errors import DataError
from nicprune.data.images import (
    FORMATS,
    SUFFIXES,
    UNREAD_SUFFIXES,
    calibration_images,
    list_images,
    read_image,
    readable,
    to_rgb,
    usable_images,
    write_png,
)
from nicprune.data.patches import Patches
from nicprune.evaluation.evaluate import evaluate
from nicprune.storage.container import encode

PIXELS: list[tuple[str, Any, tuple[int, int, int]]] = [
    ("1", 0, (0, 0, 0)),
    ("1", 1, (255, 255, 255)),
    ("L", 7, (7, 7, 7)),
    ("LA", (9, 0), (9, 9, 9)),
    ("La", (10, 51), (50, 50, 50)),
    ("P", 3, (30, 20, 10)),
    ("PA", (3, 0), (30, 20, 10)),
    ("RGB", (1, 2, 3), (1, 2, 3)),
    ("RGBA", (1, 2, 3, 0), (1, 2, 3)),
    ("RGBa", (10, 20, 30, 51), (50, 100, 150)),
    ("RGBX", (1, 2, 3, 4), (1, 2, 3)),
    ("CMYK", (0, 0, 0, 0), (255, 255, 255)),
    ("CMYK", (255, 0, 0, 0), (0, 255, 255)),
    ("CMYK", (0, 0, 0, 255), (0, 0, 0)),
    ("YCbCr", (200, 128, 128), (200, 200, 200)),
    ("HSV", (0, 255, 200), (200, 0, 0)),
    ("I;16", 0, (0, 0, 0)),
    ("I;16", 65535, (255, 255, 255)),
    ("I;16", 32768, (128, 128, 128)),
    ("I;16", 128, (0, 0, 0)),
    ("I;16", 129, (1, 1, 1)),
    ("I;16L", 25700, (100, 100, 100)),
    ("I;16B", 25700, (100, 100, 100)),
    ("I;16N", 25700, (100, 100, 100)),
    ("F", 0.0, (0, 0, 0)),
    ("F", 1.0, (255, 255, 255)),
    ("F", 0.5, (128, 128, 128)),
]
REFUSED: list[tuple[str, Any, str]] = [
    ("LAB", (255, 0, 0), "its colours are CIELAB"),
    ("I", 5, "32-bit or signed integers"),
    ("F", 1.01, r"must lie in \[0, 1\] \(found 1.01 to 1.01\)"),
    ("F", -0.01, r"must lie in \[0, 1\]"),
    ("F", float("nan"), r"must lie in \[0, 1\]"),
    ("F", float("inf"), r"must lie in \[0, 1\]"),
]


def pillow(mode: str, pixel: Any) -> Image.Image:
    """A picture of one colour, in memory."""
    if mode in ("P", "PA"):
        image = Image.new("P", (5, 4), pixel if mode == "P" else pixel[0])
        image.putpalette([0] * 9 + [30, 20, 10])
        return image.convert("PA") if mode == "PA" else image
    image = Image.new(mode, (5, 4))
    image.paste(pixel, (0, 0, 5, 4)) if not mode.startswith("I;16") else [
        image.putpixel((x, y), pixel) for x in range(5) for y in range(4)
    ]
    return image


@pytest.mark.parametrize(("mode", "pixel", "expected"), PIXELS)
def test_every_mode_of_pillow(mode: str, pixel: Any, expected: tuple[int, ...]) -> None:
    found = to_rgb(pillow(mode, pixel))
    assert found.dtype == torch.uint8 and found.shape == (3, 4, 5)
    assert all(tuple(found[:, y, x].tolist()) == expected for x in range(5) for y in range(4))


@pytest.mark.parametrize(("mode", "pixel", "expected"), REFUSED)
def test_values_whose_white_is_not_known(mode: str, pixel: Any, expected: str) -> None:
    with pytest.raises(DataError, match=expected) as told:
        to_rgb(pillow(mode, pixel))
    assert "\n" not in str(told.value)


def test_no_mode_is_forgotten() -> None:
    known = {mode for mode, _, _ in PIXELS} | {mode for mode, _, _ in REFUSED}
    for mode in Image.MODES:
        assert mode in known, f"{mode}: say what its values stand for"


def tiff(bits: int, data: bytes, *, sample: int = 1, photometric: int = 1, e: str = "<") -> bytes:
    """A grey TIFF of 2x1 pixels, as other programs write it."""
    tags = [(256, 2), (257, 1), (258, bits), (259, 1), (262, photometric), (273, 8), (277, 1)]
    tags += [(278, 1), (279, len(data)), (339, sample)]
    data += b"\0" * (len(data) % 2)
    out = (b"II*\0" if e == "<" else b"MM\0*") + struct.pack(f"{e}I", 8 + len(data)) + data
    out += struct.pack(f"{e}H", len(tags))
    for tag, value in tags:
        out += struct.pack(f"{e}HHIHH", tag, 3, 1, value, 0)
    return out + bytes(4)


def chunk(name: bytes, data: bytes) -> bytes:
    """A chunk of a PNG."""
    crc = zlib.crc32(name + data)
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", crc)


def png(depth: int, colour: int, row: bytes) -> bytes:
    """A PNG of one row."""
    channels = {0: 1, 2: 3, 4: 2, 6: 4}[colour]
    head = struct.pack(">IIBBBBB", 8 * len(row) // depth // channels, 1, depth, colour, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(b"\0" + row))
        + chunk(b"IEND", b"")
    )


FILES: dict[str, tuple[bytes, list[tuple[int, ...]]]] = {
    "16-bit.png": (png(16, 0, struct.pack(">HH", 25700, 65535)), [(100,) * 3, (255,) * 3]),
    "16-bit-alpha.png": (png(16, 4, struct.pack(">HH", 25700, 9)), [(100,) * 3]),
    "16-bit-rgb.png": (png(16, 2, struct.pack(">HHH", 257, 65535, 25700)), [(1, 255, 100)]),
    "4-bit.png": (png(4, 0, bytes([0x0F])), [(0,) * 3, (255,) * 3]),
    "1-bit.png": (png(1, 0, bytes([0x40])), [(0,) * 3, (255,) * 3, *[(0,) * 3] * 6]),
    "16-bit.tif": (tiff(16, struct.pack("<HH", 25700, 65535)), [(100,) * 3, (255,) * 3]),
    "16-bit-big.tif": (
        tiff(16, struct.pack(">HH", 25700, 65535), e=">"),
        [(100,) * 3, (255,) * 3],
    ),
    "16-bit-white-is-zero.tif": (
        tiff(16, struct.pack("<HH", 0, 65535), photometric=0),
        [(255,) * 3, (0,) * 3],
    ),
    "8-bit-white-is-zero.tif": (tiff(8, bytes([0, 255]), photometric=0), [(255,) * 3, (0,) * 3]),
    "12-bit.tif": (tiff(12, bytes([0x80, 0x0F, 0xFF])), [(128,) * 3, (255,) * 3]),
    "float.tif": (tiff(32, struct.pack("<ff", 0.2, 1.0), sample=3), [(51,) * 3, (255,) * 3]),
    "float-white-is-zero.tif": (
        tiff(32, struct.pack("<ff", 0.2, 1.0), sample=3, photometric=0),
        [(204,) * 3, (0,) * 3],
    ),
    "16-bit.pgm": (b"P5 2 1 65535\n" + struct.pack(">HH", 25700, 65535), [(100,) * 3, (255,) * 3]),
    "10-bit.pgm": (b"P5 2 1 1000\n" + struct.pack(">HH", 0, 1000), [(0,) * 3, (255,) * 3]),
    "16-bit.ppm": (b"P6 1 1 65535\n" + struct.pack(">HHH", 257, 65535, 25700), [(1, 255, 100)]),
}


@pytest.mark.parametrize("name", sorted(FILES))
def test_files_of_other_depths(name: str, tmp_path: Path) -> None:
    data, expected = FILES[name]
    (tmp_path / name).write_bytes(data)
    found = read_image(tmp_path / name)
    assert [tuple(found[:, 0, x].tolist()) for x in range(found.shape[2])] == expected


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (tiff(32, struct.pack("<II", 5, 4000000000)), "32-bit or signed integers"),
        (tiff(32, struct.pack("<ii", 5, 70000), sample=2), "32-bit or signed integers"),
        (tiff(16, struct.pack("<hh", 5, 700), sample=2), "32-bit or signed integers"),
        (tiff(32, struct.pack("<ff", 0, 255), sample=3), r"found 0 to 255"),
        (tiff(64, struct.pack("<dd", 0, 1), sample=3), "cannot identify"),
    ],
)
def test_files_whose_white_is_not_known(data: bytes, expected: str, tmp_path: Path) -> None:
    file = tmp_path / "a.tif"
    file.write_bytes(data)
    with pytest.raises(DataError, match=f"cannot read .*a.tif.*{expected}") as told:
        read_image(file)
    assert "\n" not in str(told.value)


def test_every_use_reads_the_same(tmp_path: Path, hyperprior: Any) -> None:
    """Training, calibration, evaluation and coding see the values of the 8-bit file."""
    grey = torch.randint(0, 256, (64, 64), generator=torch.Generator().manual_seed(0))
    (tmp_path / "8").mkdir()
    (tmp_path / "16").mkdir()
    write_png(grey.expand(3, 64, 64) / 255, tmp_path / "8" / "a.png")
    Image.fromarray((grey * 257).numpy().astype(np.uint16)).save(tmp_path / "16" / "a.png")
    patches = [Patches(tmp_path / depth, 64) for depth in ("8", "16")]
    assert torch.equal(*(p.batch(1, seed=0, step=0) for p in patches))
    for p in patches:
        p.close()
    assert torch.equal(*(calibration_images(tmp_path / depth)[0] for depth in ("8", "16")))
    assert encode(hyperprior, tmp_path / "8" / "a.png") == encode(
        hyperprior, tmp_path / "16" / "a.png"
    )
    scores = [evaluate(hyperprior, tmp_path / depth).images[0] for depth in ("8", "16")]
    assert (scores[0].psnr_db, scores[0].bpp) == (scores[1].psnr_db, scores[1].bpp)


def test_an_image_of_a_kind_that_is_refused_is_named_and_skipped(tmp_path: Path) -> None:
    write_png(torch.rand(3, 8, 8), tmp_path / "a.png")
    (tmp_path / "b.tif").write_bytes(tiff(32, struct.pack("<II", 5, 7)))
    with pytest.warns(UserWarning, match=r"skipped: cannot read .*b.tif: its samples are 32-bit"):
        assert [p.name for p, _ in readable(list_images(tmp_path, "test"))] == ["a.png"]


def test_upright_whatever_the_depth(tmp_path: Path) -> None:
    picture = (np.arange(6).reshape(2, 3) * 5140).astype(np.uint16)
    image, exif = Image.fromarray(picture), Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    image.save(tmp_path / "a.png", exif=exif)
    assert read_image(tmp_path / "a.png").shape == (3, 3, 2)
    assert read_image(tmp_path / "a.png")[0].tolist() == [[60, 0], [80, 20], [100, 40]]


def test_an_image_larger_than_allowed_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hyperprior: Any
) -> None:
    write_png(torch.rand(3, 8, 9), tmp_path / "a.png")
    write_png(torch.rand(3, 80, 9), tmp_path / "b.png")
    monkeypatch.setenv("NICPRUNE_MAX_PIXELS", "100")
    read_image(tmp_path / "a.png")
    for refused in (read_image, lambda path: encode(hyperprior, path)):
        with pytest.raises(DataError, match="9x80 pixels, more than the 100 .*NICPRUNE_MAX_PIXELS"):
            refused(tmp_path / "b.png")
    with pytest.raises(DataError, match="64x64 pixels, more than the 100"):
        encode(hyperprior, torch.zeros(3, 64, 64, dtype=torch.uint8))
    with pytest.warns(UserWarning, match="skipped 1 image: b.png has 9x80 pixels"):
        assert len(usable_images(list_images(tmp_path, "test"))) == 1
    monkeypatch.setenv("NICPRUNE_MAX_PIXELS", "many")
    with pytest.raises(DataError, match="NICPRUNE_MAX_PIXELS is a number"):
        read_image(tmp_path / "a.png")


def test_decompression_bombs_are_one_line(tmp_path: Path) -> None:
    """A few bytes that say they are billions of pixels."""
    for side, expected in (
        (11_000, "more than the 89,478,485|decompression bomb"),
        (60_000, "bomb"),
    ):
        bomb = bytearray(png(8, 0, bytes(1)))
        bomb[16:24] = struct.pack(">II", side, side)
        bomb[29:33] = struct.pack(">I", zlib.crc32(bytes(bomb[12:29])))
        (tmp_path / "a.png").write_bytes(bomb)
        with pytest.raises(DataError, match=expected) as told:
            read_image(tmp_path / "a.png")
        assert "\n" not in str(told.value)


def test_links_to_folders_are_followed_once(tmp_path: Path) -> None:
    elsewhere, photos = tmp_path / "elsewhere", tmp_path / "photos"
    for folder in (elsewhere / "deep", photos / "own"):
        folder.mkdir(parents=True)
    for path in (elsewhere / "deep" / "a.png", photos / "own" / "b.png"):
        write_png(torch.rand(3, 8, 8), path)
    (photos / "another").symlink_to(elsewhere)
    (photos / "another too").symlink_to(elsewhere)
    (photos / "a link to own").symlink_to(photos / "own")
    (elsewhere / "circle").symlink_to(photos)
    (photos / "self").symlink_to(photos)
    (photos / "c.png").symlink_to(photos / "own" / "b.png")
    (photos / "broken").symlink_to(photos / "nowhere")
    assert [str(p.relative_to(photos)) for p in list_images(photos, "test")] == [
        "another/deep/a.png",
        "c.png",
        "own/b.png",
    ]
    (tmp_path / "all").symlink_to(photos)
    assert len(list_images(tmp_path / "all", "test")) == 3


@pytest.mark.parametrize("place", ["checksum", "pixels"])
def test_damaged_pixels_of_a_png_are_seen(place: str, tmp_path: Path) -> None:
    """Those that unpack all the same, which Pillow's decoder takes."""
    whole = png(8, 2, bytes(range(30)))
    packed, other = (zlib.compress(b"\0" + bytes(range(n, 30 + n))) for n in (0, 1))
    assert whole.count(packed) == 1 and len(packed) == len(other)
    data = bytearray(whole)
    if place == "checksum":
        data[whole.index(packed) + len(packed)] ^= 1
    else:
        data = data.replace(packed, other)
    path = tmp_path / "a.png"
    path.write_bytes(data)
    with Image.open(path) as image:
        assert image.convert("RGB").size == (10, 1), "Pillow takes it"
    with pytest.raises(DataError, match="broken PNG file"):
        read_image(path)
    path.write_bytes(whole)
    assert read_image(path).flatten(1).T.flatten().tolist() == [*range(30)]


def test_formats_that_start_other_programs_are_not_opened(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"
    )
    with Image.open(path) as image:
        assert image.format == "EPS"
    with pytest.raises(DataError, match="cannot identify image file"):
        read_image(path)
    with pytest.raises(DataError, match="no usable image"):
        usable_images([path])


def test_pngs_whose_chunks_are_out_of_order_are_one_line(tmp_path: Path) -> None:
    """Pillow raises IndexError on some of them."""
    path, whole = tmp_path / "a.png", png(8, 2, bytes(range(30)))
    head, packed = (
        chunk(name, whole[whole.index(name) + 4 :][:length])
        for name, length in ((b"IHDR", 13), (b"IDAT", len(zlib.compress(bytes(range(31))))))
    )
    end = chunk(b"IEND", b"")
    for order in ([head, end, packed], [end, head, packed], [packed, head, end], [head, end]):
        path.write_bytes(whole[:8] + b"".join(order))
        with pytest.raises(DataError, match="cannot read .* as an image") as told:
            read_image(path)
        assert "\n" not in str(told.value)


# -- images of a folder ---------------------------------------------------------------------------

ENDINGS = ".png .jpg .jpeg .jfif .webp .bmp .dib .gif .tif .tiff .ppm .pgm .pnm .jp2 .j2k".split()
"""Written out, so that one that is no longer listed is missed."""
LOSSLESS = {".png", ".bmp", ".dib", ".tif", ".tiff", ".ppm", ".pnm", ".jp2", ".j2k"}


@pytest.mark.parametrize("ending", ENDINGS)
def test_what_can_be_read_is_found_in_a_folder(ending: str, tmp_path: Path) -> None:
    picture = Image.new("L" if ending == ".pgm" else "RGB", (8, 8), 100)
    picture.save(tmp_path / f"a{ending.upper()}", format=Image.registered_extensions()[ending])
    (path,) = list_images(tmp_path, "train")
    image = read_image(path)
    assert image.shape == (3, 8, 8)
    if ending in LOSSLESS:
        assert image.eq(100)[0].all()


def test_links_to_missing_images_are_told(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name in ("a.png", "in/b.png", "in/notes.txt"):
        (tmp_path / name).symlink_to(tmp_path / "moved" / name)
    with pytest.raises(DataError, match=r"no images in .*; it has 2 links to missing files, such"):
        list_images(tmp_path, "train")
    write_png(torch.rand(3, 8, 8), tmp_path / "c.png")
    with pytest.warns(UserWarning, match=r"skipped in .*: 2 links to missing files, such as [ab]"):
        assert [path.name for path in list_images(tmp_path, "train")] == ["c.png"]


@pytest.mark.parametrize("ending", sorted(UNREAD_SUFFIXES))
def test_what_cannot_be_read_is_told(ending: str, tmp_path: Path) -> None:
    (tmp_path / f"a{ending}").write_bytes(b"photograph")
    with pytest.raises(DataError, match=rf"no images in .*; \{ending} cannot be read: convert"):
        list_images(tmp_path, "train")
    write_png(torch.rand(3, 8, 8), tmp_path / "b.png")
    with pytest.warns(UserWarning, match=rf"skipped 1 image in .*: \{ending} cannot be read"):
        assert [path.name for path in list_images(tmp_path, "train")] == ["b.png"]


def test_every_format_that_is_opened_has_endings() -> None:
    known = Image.registered_extensions()
    assert set(ENDINGS) == SUFFIXES
    assert {known[ending] for ending in SUFFIXES} == set(FORMATS)
    assert not UNREAD_SUFFIXES & SUFFIXES
