"""A coded video is decoded as it was coded, group by group; damage anywhere ends in one line, and
the frames before it come first.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import built
from helpers_video import HEIGHT, WIDTH, Frames, ResidualCoder, moving
from torch import Tensor, nn

from nicprune.common.errors import DataError, FileError, NicpruneError, RecipeError
from nicprune.methods import attach
from nicprune.methods.video.coder import video_coder
from nicprune.storage import video_container
from nicprune.storage.checkpoint import load, save
from nicprune.storage.coded_video import END, MAGIC, PREDICTED, open_video
from nicprune.storage.container import decode, encode
from nicprune.storage.values import pack, unpack_all
from nicprune.storage.verify import verify
from nicprune.storage.video_container import VideoCoder, decode_video, encode_video


def slimmable() -> nn.Module:
    return attach(built("bmshj2018-hyperprior")[0], "slimmable", widths=[1.0, 0.5], round_to=1)


@pytest.fixture
def predicting(monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """A codec whose P frames hold what changed since the frame before."""
    monkeypatch.setattr(video_container, "video_coder", ResidualCoder)
    return built("bmshj2018-factorized")[0]


def records(path: Path) -> list[tuple[int, int, bytes]]:
    """Where each record of a file begins, its kind and its body."""
    data, at, found = path.read_bytes(), 5, []
    while at < len(data):
        kind, length = struct.unpack_from(">BI", data, at)
        found.append((at, kind, data[at + 5 : at + 5 + length]))
        at += 9 + length
    return found


def sealed(made: list[tuple[int, bytes]], start: bytes = MAGIC + b"\1") -> bytes:
    """A file of these records, with right checksums."""
    data, checksum = start, zlib.crc32(start)
    for kind, body in made:
        record = struct.pack(">BI", kind, len(body)) + body
        checksum = zlib.crc32(record, checksum)
        data += record + checksum.to_bytes(4, "big")
    return data


def until_error(frames: Iterator[Tensor]) -> tuple[list[Tensor], str]:
    """The frames that come before an error, and the error; empty if there is none."""
    found = []
    try:
        for frame in frames:
            found.append(frame)
    except NicpruneError as error:
        assert "\n" not in str(error)
        return found, str(error)
    return found, ""


def test_a_codec_of_images_codes_each_frame_as_an_image(tmp_path: Path, hyperprior: Any) -> None:
    frames = moving(3)
    done = encode_video(
        hyperprior, Frames(frames, Fraction(30000, 1001)), tmp_path / "a.npv", gop=2
    )
    found = list(decode_video(hyperprior, tmp_path / "a.npv"))
    assert (done.frames, done.groups, done.bytes) == (3, 3, (tmp_path / "a.npv").stat().st_size)
    assert done.bpp == 8 * done.bytes / (3 * HEIGHT * WIDTH)
    assert done.kbits == pytest.approx(8 * done.bytes / (3 * 1.001 / 30) / 1000)
    for frame, decoded in zip(frames, found, strict=True):
        assert decoded.dtype == torch.uint8 and decoded.shape == (3, HEIGHT, WIDTH)
        assert torch.equal(decoded, decode(hyperprior, encode(hyperprior, frame)))


def test_each_group_has_a_width_and_predicts_from_its_own_frames(
    tmp_path: Path, predicting: nn.Module
) -> None:
    frames, path = moving(7), tmp_path / "a.npv"
    done = encode_video(predicting, Frames(frames), path, gop=3)
    assert (done.frames, done.groups) == (7, 3)
    with open_video(path) as video:
        coded = list(video.frames())
    assert [frame.intra for frame in coded] == [True, False, False] * 2 + [True]
    assert [frame.group for frame in coded] == [0, 0, 0, 1, 1, 1, 2]
    found = list(decode_video(predicting, path))
    # What the encoder saw: its own loop, by hand.
    coder, latents = ResidualCoder(predicting), None
    for index, frame in enumerate(frames):
        padded, padding = video_container.pad(frame.unsqueeze(0).float() / 255, 64)
        before = latents if index % 3 else None
        strings, shape, latents = coder.compress(padded, before)
        assert strings == coded[index].strings and list(shape) == list(coded[index].shape)
        seen = video_container.crop(coder.codec.g_s(latents).clamp(0, 1), padding)[0]
        assert torch.equal(found[index], seen.detach().mul(255).round().byte())
    sizes = [sum(len(one[0]) for one in frame.strings) for frame in coded]
    assert sizes[1] < sizes[0] and sizes[4] < sizes[3]


def test_widths_are_those_of_the_groups(tmp_path: Path) -> None:
    codec, path = slimmable(), tmp_path / "a.npv"
    frames = Frames(moving(4))
    encode_video(codec, frames, path, gop=1, width=[0, 1, 0])
    with open_video(path) as video:
        assert [frame.width for frame in video.frames()] == [0, 1, 0, 0]
    found = list(decode_video(codec, path))
    for width in (0, 1):
        encode_video(codec, frames, path, width=width)
        alone = list(decode_video(codec, path))
        assert torch.equal(alone[1], found[1]) == (width == 1)
        assert torch.equal(alone[2], found[2]) == (width == 0)
        assert "widths" in str(verify(path))
    with pytest.raises(RecipeError, match="width 2 is not among"):
        encode_video(codec, frames, tmp_path / "b.npv", width=2)
    assert not (tmp_path / "b.npv").exists()


def test_a_saved_codec_decodes_and_another_is_refused(tmp_path: Path, hyperprior: Any) -> None:
    path = tmp_path / "a.npv"
    encode_video(hyperprior, Frames(moving(2)), path)
    again = load(save(hyperprior, tmp_path / "c.safetensors"))
    assert len(list(decode_video(again, path))) == 2
    other = built("mbt2018-mean")[0]
    assert until_error(decode_video(other, path))[1].startswith(
        f"{path} was coded with another codec"
    )
    hyperprior.entropy_bottleneck._quantized_cdf[0, 1] += 1
    assert "other CDF tables" in until_error(decode_video(hyperprior, path))[1]


def lively() -> Any:
    """A codec whose latents do not all round to zero."""
    codec: Any = built("bmshj2018-hyperprior")[0]
    with torch.no_grad():
        y = codec.g_a(moving(1, 64, 64)[0].unsqueeze(0) / 255)
        codec.g_a[-1].weight.mul_(4 / y.std())
    codec.update(force=True)
    return codec


def adapted(form: str) -> Any:
    codec: Any = attach(lively(), "adaptation", form=form, domain="screen")
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in codec.methods[0].form.parameters():
            parameter.add_(torch.rand(parameter.shape, generator=draw), alpha=0.02)
    codec.methods[0].after_step()
    return codec.harden()


def rated() -> Any:
    codec = attach(lively(), "bottleneck_scaling", qualities=[1, 2, 3])
    with torch.no_grad():
        for parameter in codec.methods[0].parameters():
            parameter.add_(torch.arange(parameter.numel()).reshape(parameter.shape) % 3 / 9)
    return codec


POINTS = {
    "domain": (lambda: adapted("decoder_adapter"), [{"domain": "source"}, {"domain": "screen"}]),
    "low rank": (lambda: adapted("low_rank"), [{"domain": "source"}, {"domain": "screen"}]),
    "rate": (rated, [{"level": 0}, {"level": 2}]),
}
"""Codecs of several operating points, and those."""


@pytest.mark.parametrize("name", POINTS)
def test_a_video_says_its_rate_and_domain(name: str, tmp_path: Path) -> None:
    make, points = POINTS[name]
    codec, frames, pictures = make(), Frames(moving(3)), []
    for point in points:
        codec.set_point(codec.point(**point))
        encode_video(codec, frames, tmp_path / f"{len(pictures)}.npv", gop=2)
        pictures.append(list(decode_video(codec, tmp_path / f"{len(pictures)}.npv")))
    # The rate is the highest, whichever images were coded at before.
    assert torch.equal(pictures[0][0], pictures[1][0]) == (name == "rate")
    if name == "rate":  # coders of all that a file may name would fill the memory
        coder = VideoCoder(codec)
        for code in range(4):
            coder._coder(None, (bytes([code, 0]),))
        assert len({id(one) for one in coder._coders.values()}) == 2
    again = load(save(codec, tmp_path / "c.safetensors"))
    for one in (codec, again):
        for number, right in enumerate(pictures):
            found = list(decode_video(one, tmp_path / f"{number}.npv"))
            assert all(map(torch.equal, found, right)), (number, one is again)
            assert "frames" in str(verify(tmp_path / f"{number}.npv"))


def test_an_operating_point_that_the_codec_does_not_have_is_a_line(
    tmp_path: Path, hyperprior: Any
) -> None:
    path = tmp_path / "a.npv"
    encode_video(hyperprior, Frames(moving(1)), path)
    made = [(kind, body) for _, kind, body in records(path)]
    told, *rest = unpack_all(made[1][1], 4)
    for wrong in ([b"\1"], [0, b"x"], [[1]], [{}], [b"\1", 0], b"\1"):
        body = b"".join(map(pack, [wrong, *rest]))
        path.write_bytes(sealed([made[0], (made[1][0], body), *made[2:]]))
        found, error = until_error(decode_video(hyperprior, path))
        assert not found and "frame 0" in error and "\n" not in error, wrong


def test_what_is_changed_later_does_not_count(tmp_path: Path) -> None:
    codec: Any = slimmable()
    frames, paths = Frames(moving(2)), [tmp_path / "a.npv", tmp_path / "b.npv"]
    encode_video(codec, frames, paths[0], width=1)
    coder, right = VideoCoder(codec), list(decode_video(codec, paths[0]))
    with torch.no_grad():
        codec.codec.g_s[0].weight.mul_(0.3)
    coder.encode(frames, paths[1], width=1)
    for path in paths:
        assert all(map(torch.equal, coder.decode(path), right))
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_frames_are_coded_with_the_tables_that_the_file_names(tmp_path: Path) -> None:
    codec: Any = built("bmshj2018-hyperprior")[0]
    codec.update(force=True)
    with torch.no_grad():  # one's own training, without update(force=True)
        codec.entropy_bottleneck.quantiles.add_(0.7)
    encode_video(codec, Frames(moving(2)), path := tmp_path / "a.npv")
    again = load(save(codec, tmp_path / "c.safetensors"))
    for one in (codec, again):
        assert len(list(decode_video(one, path))) == 2


@pytest.mark.parametrize("predicts", [False, True])
def test_a_shape_may_be_a_dictionary(tmp_path: Path, predicts: bool) -> None:
    """As that of ELIC's latents is."""
    codec, path, frames = built("elic2022-chandelier")[0], tmp_path / "a.npv", moving(3)
    if predicts:
        codec = attach(codec, "temporal_entropy_model")
    encode_video(codec, Frames(frames), path, gop=2)
    with open_video(path) as video:
        coded = list(video.frames())
    assert isinstance(coded[0].shape, dict)
    assert [frame.intra for frame in coded] == [True, not predicts, True]
    found = list(decode_video(codec, path))
    assert len(found) == 3 and all(f.shape == (3, HEIGHT, WIDTH) for f in found)
    image = decode(codec, encode(codec, frames[2])) if not predicts else found[2]
    assert torch.equal(found[2], image)


def test_any_number_of_frames_and_any_rate(tmp_path: Path, hyperprior: Any) -> None:
    path = tmp_path / "a.npv"
    encode_video(hyperprior, Frames(moving(5, 64, 64), Fraction(24000, 1001)), path, frames=2)
    with open_video(path) as video:
        assert video.header.fps == Fraction(24000, 1001)
        assert (video.header.width, video.header.height) == (64, 64)
        assert len(list(video.frames())) == 2
    for wrong in ({"gop": 0}, {"frames": 0}):
        with pytest.raises(RecipeError, match="one frame or more"):
            encode_video(hyperprior, Frames(moving(1)), path, **wrong)


def test_an_interrupted_encoding_leaves_the_file_that_was_there(
    tmp_path: Path, hyperprior: Any
) -> None:
    path = tmp_path / "a.npv"
    path.write_bytes(b"before")

    class Broken(Frames):
        def _from(self, start: int) -> Any:
            yield from self._frames[:1]

    with pytest.raises(DataError, match="frame 1 of 3 is missing"):
        encode_video(hyperprior, Broken(moving(3)), path)
    assert path.read_bytes() == b"before"
    assert [p.name for p in tmp_path.iterdir()] == ["a.npv"]


@pytest.fixture
def coded(tmp_path: Path, predicting: nn.Module) -> tuple[VideoCoder, Path, list[Tensor]]:
    """A coder, a file of seven frames in three groups, and what it decodes to."""
    path = tmp_path / "a.npv"
    encode_video(predicting, Frames(moving(7, 64, 64)), path, gop=3)
    coder = VideoCoder(predicting)
    return coder, path, list(coder.decode(path))


def test_a_fault_in_any_byte_of_any_record_ends_in_one_line_after_the_frames_before_it(
    coded: tuple[VideoCoder, Path, list[Tensor]], tmp_path: Path
) -> None:
    coder, path, frames = coded
    data = path.read_bytes()
    starts = [at for at, *_ in records(path)]
    ends = [*starts[1:], len(data)]
    draw = torch.Generator().manual_seed(0)
    damaged = tmp_path / "damaged.npv"
    for number, (start, end) in enumerate(zip(starts, ends, strict=True)):
        places = {start, start + 1, start + 4, start + 5, end - 5, end - 1}
        places |= {int(torch.randint(start, end, (), generator=draw)) for _ in range(3)}
        for place in sorted(places):
            for made in (
                data[:place] + bytes([data[place] ^ 0x81]) + data[place + 1 :],
                data[:place],
                data[:place] + data[place + 1 :],
                data[:place] + bytes([data[place] ^ 0x42]) + data[place:],
            ):
                damaged.write_bytes(made)
                found, told = until_error(coder.decode(damaged))
                assert told.startswith(f"{damaged} is damaged"), (number, place, told)
                whole = max(0, number - 1)  # the first record is the header
                assert len(found) == min(whole, 7), (number, place, told)
                assert all(map(torch.equal, found, frames))
                if 0 < number <= 7:
                    assert f"at frame {whole} (at byte {start:,})" in told
                with pytest.raises(FileError):
                    verify(damaged)


def test_records_that_are_exchanged_repeated_or_missing_are_seen(
    coded: tuple[VideoCoder, Path, list[Tensor]], tmp_path: Path
) -> None:
    coder, path, _ = coded
    data, all_ = path.read_bytes(), records(path)
    cuts = [at for at, *_ in all_] + [len(data)]
    pieces = [data[a:b] for a, b in zip(cuts, cuts[1:], strict=False)]
    for order, whole in (
        ([0, 1, 2, 3, 4, 5, 6, 7], 7),  # no end
        ([0, 4, 5, 6, 7, 8], 0),
        ([0, 1, 3, 2, 4, 5, 6, 7, 8], 1),
        ([0, 1, 2, 3, 1, 2, 3, 8], 3),
        ([0, 1, 2, 8], 2),
        ([0, 1, 2, 3, 4, 5, 6, 7, 8, 8], 7),
        ([1, 2, 3], 0),
    ):
        path.write_bytes(data[:5] + b"".join(pieces[n] for n in order))
        found, told = until_error(coder.decode(path))
        assert told and len(found) == whole, (order, told)
    for made, expected in (
        (b"", "is empty"),
        (b"text", "not a video that nicprune encoded"),
        (MAGIC, "damaged or cut short at its header"),
        (MAGIC + b"\0" + data[5:], "is damaged: it has format version 0"),
        (MAGIC[:2], "not a video that nicprune encoded"),
        (MAGIC + b"\2" + data[5:], "format version 2; this nicprune reads up to 1"),
    ):
        path.write_bytes(made)
        assert expected in until_error(coder.decode(path))[1]


def changed(index: int, change: Callable[[list[Any]], object], count: int) -> Any:
    def apply(made: list[tuple[int, bytes]]) -> None:
        kind, body = made[index]
        values = unpack_all(body, count)
        change(values)
        made[index] = kind, b"".join(map(pack, values))

    return apply


def header(change: Callable[[list[Any]], object]) -> Any:
    def apply(made: list[tuple[int, bytes]]) -> None:
        kind, body = made[0]
        values = unpack_all(body[12:], 5)
        change(values)
        made[0] = kind, body[:12] + b"".join(map(pack, values))

    return apply


def put(index: int, value: Any) -> Callable[[list[Any]], object]:
    return lambda values: values.__setitem__(index, value)


@pytest.mark.parametrize(
    "change, expected, whole",
    [
        (header(put(0, 1 << 20)), "more than the .* that are allowed", 0),
        (header(put(0, 0)), "do not fit together", 0),
        (header(put(3, 0)), "do not fit together", 0),
        (header(put(0, 640)), "do not fit together|expected", 0),
        (changed(2, put(1, (1 << 20, 4)), 3), "frame 1 .* do not fit together", 1),
        (changed(2, put(2, []), 3), "frame 1 ", 1),
        (changed(2, put(2, [[b""]]), 3), "frame 1 .* differ|frame 1 .* cannot be decoded", 1),
        (changed(2, put(2, [b"abc"]), 3), "cannot be decoded at frame 1 ", 1),
        (changed(2, put(2, [[7]]), 3), "frame 1 .* do not fit together", 1),
        (changed(2, put(0, bytes(8)), 3), "frame 1 .* differ from the encoder's", 1),
        (changed(2, put(0, b"abc"), 3), "frame 1 .* do not fit together", 1),
        (changed(4, put(0, [7]), 4), "frame 3 ", 3),
        (changed(4, put(0, [1, 2]), 4), "frame 3 .* do not fit together", 3),
        (changed(4, put(0, {"a": 1}), 4), "frame 3 .* do not fit together", 3),
        (changed(8, put(0, 6), 1), "frame 7 .* do not fit together", 7),
        (lambda made: made.__setitem__(1, (PREDICTED, made[2][1])), "frame 0 .* do not fit", 0),
        (lambda made: made.__setitem__(3, (9, made[3][1])), "frame 2 .* do not fit together", 2),
        (lambda made: made.insert(3, (END, pack(2))), "bytes lie behind its end", 2),
    ],
)  # fmt: skip
def test_contents_made_on_purpose_end_in_one_line(
    change: Callable[[list[tuple[int, bytes]]], object],
    expected: str,
    whole: int,
    coded: tuple[VideoCoder, Path, list[Tensor]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import re

    coder, path, _ = coded
    monkeypatch.setenv("NICPRUNE_MAX_PIXELS", str(1 << 20))
    made = [(kind, body) for _, kind, body in records(path)]
    assert sealed(made) == path.read_bytes()
    change(made)
    path.write_bytes(sealed(made))
    found, told = until_error(coder.decode(path))
    assert re.search(expected, told) and len(found) == whole, told


def test_a_video_that_predicts_is_refused_by_a_codec_that_does_not(
    coded: tuple[VideoCoder, Path, list[Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, path, _ = coded
    monkeypatch.setattr(video_container, "video_coder", video_coder)
    found, told = until_error(decode_video(built("bmshj2018-factorized")[0], path))
    assert len(found) <= 1 and "cannot be decoded at frame" in told


def test_verify_says_what_a_video_is(coded: tuple[VideoCoder, Path, list[Tensor]]) -> None:
    _, path, _ = coded
    found = verify(path, built("bmshj2018-factorized")[0])
    assert found.kind == "coded video"
    assert "64x64 pixels, 7 frames, 25 a second" in found.facts["size"]
    assert found.facts["groups"] == "3 of up to 3 frames; 3 I frames, 4 P frames"
    assert found.facts["decoded"] == "all symbols are the encoder's"
