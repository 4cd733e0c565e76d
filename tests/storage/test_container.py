"""One coded photograph in one file: read back as the codec itself would, refused where it is not
whole or not this codec's.
"""

from __future__ import annotations

import base64
import copy
import sys
import zlib
from pathlib import Path
from typing import Any

import elsewhere
import pytest
import torch
from helpers import ELIC_GROUPS, built, hook_count, same_state, state_of
from torch import Tensor, nn

from nicprune.common.errors import CodecError, DataError, FileError, NicpruneError, RecipeError
from nicprune.data.images import read_image, write_png
from nicprune.evaluation.evaluate import evaluate
from nicprune.evaluation.padding import crop, pad
from nicprune.evaluation.quality import psnr, string_bytes
from nicprune.methods import Attached, attach
from nicprune.storage import container
from nicprune.storage.checkpoint import load, save
from nicprune.storage.coded_image import EARLIER, HEADER, MAGIC, VERSION, read_coded
from nicprune.storage.container import ImageCoder, decode, encode
from nicprune.storage.identity import fingerprint
from nicprune.storage.named import load_codec
from nicprune.storage.values import pack as _pack

LAMBDAS = (0.0018, 0.0067, 0.025)


def photo(height: int = 67, width: int = 130, seed: int = 0) -> Tensor:
    """A soft uint8 picture whose sides are multiples of nothing."""
    small = torch.rand(1, 3, 5, 5, generator=torch.Generator().manual_seed(seed))
    return (
        nn.functional.interpolate(small, size=(height, width), mode="bicubic")[0]
        .clamp(0, 1)
        .mul(255)
        .round()
        .byte()
    )


@torch.no_grad()
def by_hand(codec: Any, picture: Tensor, **rate: float) -> tuple[Tensor, int]:
    """What the codec's own compress and decompress make of the picture, and how many bytes of
    strings.
    """
    padded, padding = pad(picture.unsqueeze(0).float() / 255, 64)
    sent = codec.compress(padded, **rate)
    x_hat = codec.decompress(sent["strings"], sent["shape"])["x_hat"]
    return crop(x_hat, padding)[0].clamp(0, 1).mul(255).round().byte(), string_bytes(
        sent["strings"]
    )


def close(decoded: Tensor, expected: Tensor) -> bool:
    """Whether two pictures are the same but for how float32 rounds to 8 bits."""
    return bool((decoded.int() - expected.int()).abs().max() <= 1)


def ready(name: str) -> Any:
    codec, _ = built(name)
    codec.update(force=True)
    return codec


def modulated(name: str = "bmshj2018-hyperprior") -> Attached:
    """A codec with a modulator whose networks have learnt something."""
    attached = attach(ready(name), "bit_rate_modulator", lambdas=LAMBDAS)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in attached.methods.parameters():
            parameter.add_((torch.rand(parameter.shape, generator=generator) - 0.5) * 0.2)
    return attached


def gated() -> Attached:
    """A codec whose gates close part of the channels, other ones for other images."""
    attached = attach(ready("bmshj2018-hyperprior"), "channel_gating", alpha=1.0, gating_steps=2)
    attached.train()
    for seed in range(3):
        attached(photo(64, 64, seed).unsqueeze(0).float() / 255)
    with torch.no_grad():
        for name, parameter in attached.methods.named_parameters():
            if name.endswith("threshold"):
                parameter.fill_(0.9)
    return attached.eval()


def refused(codec: nn.Module, data: bytes | str | Path, expected: str = "") -> str:
    """Decode what must be refused; return the one line that says why."""
    with pytest.raises(FileError) as caught:
        decode(codec, data)
    assert expected in str(caught.value) and "\n" not in str(caught.value)
    return str(caught.value)


def sealed(body: bytes) -> bytes:
    """With the checksum that belongs to it."""
    return body + zlib.crc32(body).to_bytes(4, "big")


ARCHITECTURES = (
    "bmshj2018-factorized",
    "bmshj2018-hyperprior",
    "mbt2018",
    "cheng2020-attn",
    "cheng2020-anchor-checkerboard",
    "elic2022-chandelier",
    "mbt2018-mean-vbr-eb",
)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_is_read_is_what_the_codec_itself_decodes(name: str) -> None:
    codec, picture = ready(name), photo()
    data = encode(codec, picture)
    expected, size = by_hand(codec, picture)
    decoded = decode(codec, data)
    assert decoded.dtype == torch.uint8 and decoded.shape == picture.shape
    assert close(decoded, expected)
    assert torch.equal(decode(codec, encode(codec, picture, fast=True)), expected)
    assert len(data) - size < (49 if "elic" not in name and "checkerboard" not in name else 119)


@pytest.mark.parametrize("size", [(1, 1), (64, 64), (65, 63), (130, 67)])
def test_any_size_comes_back(size: tuple[int, int], hyperprior: Any) -> None:
    decoded = decode(hyperprior, encode(hyperprior, photo(*size)))
    assert decoded.shape == (3, *size)
    hyperprior.update(force=True)
    expected = by_hand(hyperprior, photo(*size))[0]
    assert close(decoded, expected)
    assert torch.equal(decode(hyperprior, encode(hyperprior, photo(*size), fast=True)), expected)


def test_a_file_is_as_good_as_a_tensor(hyperprior: Any, tmp_path: Path) -> None:
    picture = photo()
    path = write_png(picture.float() / 255, tmp_path / "a.png")
    data = encode(hyperprior, path)
    assert data == encode(hyperprior, picture)
    (tmp_path / "a.nic").write_bytes(data)
    assert torch.equal(decode(hyperprior, tmp_path / "a.nic"), decode(hyperprior, data))
    assert torch.equal(decode(hyperprior, str(tmp_path / "a.nic")), decode(hyperprior, data))


@pytest.mark.parametrize("level", [0.0, 0.5, 2.0])
def test_the_rate_travels_inside(level: float) -> None:
    attached, picture = modulated(), photo()
    expected, size = by_hand(attached, picture, level=level)
    data = encode(attached, picture, level=level)
    attached.levels.assign(1.0)  # type: ignore[union-attr]
    assert close(decode(attached, data), expected)
    fast = encode(attached, picture, level=level, fast=True)
    assert torch.equal(decode(attached, fast), expected)
    assert len(data) - size < 49
    other = encode(attached, picture, level=1.3)
    assert (len(other) > len(data)) == (level < 1.3), "a higher level is a higher rate"
    assert not close(decode(attached, other), expected)


def test_a_rate_may_be_given_as_its_lambda() -> None:
    attached, picture = modulated(), photo()
    assert encode(attached, picture, lmbda=LAMBDAS[1]) == encode(attached, picture, level=1)
    assert encode(attached, picture) == encode(attached, picture, level=2)


def test_gates_are_part_of_the_codec(tmp_path: Path) -> None:
    attached, picture = gated(), photo()
    data = encode(attached, picture)
    expected, _ = by_hand(attached, picture)
    assert any(not bool(m.open.all()) for m in attached.modules() if hasattr(m, "open")), (
        "no gate closed anything: this test shows nothing"
    )
    assert close(decode(attached, data), expected)
    assert torch.equal(decode(attached, encode(attached, picture, fast=True)), expected)
    assert not close(expected, by_hand(ready("bmshj2018-hyperprior"), picture)[0])
    again = load(save(attached, tmp_path / "gated.safetensors"))
    assert torch.equal(decode(again, data), expected)
    refused(ready("bmshj2018-hyperprior"), data, "another codec")


def test_a_saved_modulator_reads_what_was_written_before(tmp_path: Path) -> None:
    attached, picture = modulated("mbt2018-mean"), photo()
    data = encode(attached, picture, level=0.7)
    again = load(save(attached, tmp_path / "c.safetensors"))
    assert isinstance(again, Attached) and torch.equal(decode(again, data), decode(attached, data))
    assert encode(again, picture, level=0.7) == data


def test_the_fingerprint_stays_with_the_weights(tmp_path: Path) -> None:
    for name in ("bmshj2018-hyperprior", "mbt2018", "elic2022-chandelier"):
        codec, _ = built(name)
        for module in codec.modules():  # as an optimiser's step leaves them, until the next forward
            mask = getattr(module, "mask", None)
            if isinstance(mask, Tensor):
                module.weight.data += 0.01 * (1 - mask)
        first = fingerprint(codec)
        assert len(first) == 8
        codec.update(force=True)
        assert fingerprint(codec) == first, f"{name}: changed by update()"
        with torch.no_grad():
            codec(torch.rand(1, 3, 64, 64))
        assert fingerprint(codec) == first, f"{name}: changed by a forward pass"
        assert fingerprint(load(save(codec, tmp_path / f"{name}.safetensors"))) == first, (
            f"{name}: changed by saving"
        )
        assert fingerprint(copy.deepcopy(codec).to(memory_format=torch.channels_last)) == first, (
            f"{name}: changed by the memory format"
        )


def test_the_fingerprint_tells_codecs_apart(hyperprior: Any) -> None:
    seen, with_encoder = {fingerprint(hyperprior)}, {fingerprint(hyperprior, encoder=True)}
    for key, _ in hyperprior.named_parameters():
        changed = copy.deepcopy(hyperprior)
        value = changed.get_parameter(key).data.view(-1)
        value[-1] = torch.nextafter(value[-1], torch.tensor(9.0))
        assert (fingerprint(changed) in seen) == key.startswith(("g_a.", "h_a.")), (
            f"{key}: what another encoder writes, the same decoder reads"
        )
        seen.add(fingerprint(changed))
        with_encoder.add(fingerprint(changed, encoder=True))
    assert len(with_encoder) == 1 + len(list(hyperprior.parameters()))
    names = [nn.ModuleDict({name: nn.Linear(2, 2)}).requires_grad_(False) for name in "ab"]
    shapes = [nn.Linear(*sizes, bias=False).requires_grad_(False) for sizes in ((2, 8), (4, 4))]
    for one, other in (names, shapes):
        for parameter in (*one.parameters(), *other.parameters()):
            parameter.fill_(0.5)
        assert fingerprint(one) != fingerprint(other), (
            "the same numbers elsewhere are another codec"
        )
    attached = modulated()
    before = fingerprint(attached)
    assert before not in seen
    next(attached.methods.parameters()).data.view(-1)[0] += 0.01
    assert fingerprint(attached) != before
    few, many = (
        attach(built("bmshj2018-hyperprior")[0], "bit_rate_modulator", lambdas=lambdas)
        for lambdas in (LAMBDAS, (0.001, 0.01, 0.1))
    )
    many.methods.load_state_dict(few.methods.state_dict())
    assert fingerprint(few) != fingerprint(many), (
        "the same weights at other rates are another codec"
    )


def test_coding_leaves_the_codec_as_it_was() -> None:
    attached, picture = modulated("mbt2018"), photo()
    attached.train()
    attached.levels.assign(0.25)  # type: ignore[union-attr]
    before, hooks = state_of(attached), hook_count(attached)
    decode(attached, encode(attached, picture, level=1.0))
    assert (
        same_state(state_of(attached), before)
        and hook_count(attached) == hooks
        and attached.training
    )
    assert float(attached.levels.now) == 0.25  # type: ignore[union-attr]
    codec, _ = built("bmshj2018-hyperprior")
    before = state_of(codec)
    decode(codec, encode(codec, picture))
    assert same_state(state_of(codec), before), "no tables are made on the codec itself"


def test_the_codec_is_given_back_what_it_gave_in_the_arithmetic_of_its_encoder() -> None:
    codec, seen = ready("elic2022-chandelier"), []

    class Watched(type(codec)):  # type: ignore[misc]
        def compress(self, x: Tensor) -> dict[str, Any]:
            sent = super().compress(x)
            seen.append(
                (
                    sent["strings"],
                    sent["shape"],
                    self.training,
                    x.is_contiguous(),
                    self.g_a[0].weight.is_contiguous(),
                )
            )
            return sent

        def decompress(self, strings: Any, shape: Any) -> dict[str, Any]:
            seen.append((strings, shape, self.training, True, self.g_a[0].weight.is_contiguous()))
            return super().decompress(strings, shape)

    codec.__class__ = Watched
    for fast in (True, False):
        seen.clear()
        data = encode(codec.train().to(memory_format=torch.channels_last), photo(), fast=fast)
        written = seen[-1]
        decode(codec.eval().to(memory_format=torch.contiguous_format), data)
        assert seen[-1][:3] == (*written[:2], False)
        assert all(one[3:] in ((fast, fast), (True, fast)) for one in (written, seen[-1]))
    assert [type(size) for size in seen[-1][1]["y"]] == [torch.Size] * len(ELIC_GROUPS)


def test_the_bytes_do_not_depend_on_how_the_codec_lies_in_memory() -> None:
    codec, picture = ready("elic2022-chandelier"), photo()
    data = encode(codec, picture)
    assert (
        encode(copy.deepcopy(codec).to(memory_format=torch.channels_last).train(), picture) == data
    )
    assert encode(copy.deepcopy(codec).double(), picture) == data


def test_another_codec_is_told_so() -> None:
    data = encode(ready("bmshj2018-hyperprior"), photo())
    other = ready("bmshj2018-hyperprior")
    with torch.no_grad():
        other.h_s[0].weight[0, 0, 0, 0] += 1e-3
    refused(other, data, "another codec")
    refused(ready("mbt2018-mean"), data, "another codec")
    attached = modulated()
    sent = encode(attached, photo(), level=1)
    refused(attached.harden(level=1), sent, "another codec")


@pytest.mark.parametrize(
    ("path", "change"),
    [
        ("g_s.0", {"padding": (1, 1), "output_padding": (0, 0)}),
        ("g_s.1", {"inverse": False}),
        ("h_s.1", nn.LeakyReLU()),
        ("h_s.5", nn.LeakyReLU(0.3)),
        ("g_s.6", {"dilation": (2, 2)}),
    ],
)
def test_a_codec_of_the_same_weights_and_other_layers_is_told_so(path: str, change: Any) -> None:
    codec = ready("bmshj2018-hyperprior")
    data, before = encode(codec, photo()), fingerprint(codec)
    if isinstance(change, dict):
        vars(codec.get_submodule(path)).update(change)
    else:
        codec.get_submodule(path.split(".")[0])[int(path.split(".")[1])] = change
    assert fingerprint(codec) == before
    refused(codec, data, "other types or settings")


def test_an_encoder_of_other_layers_writes_what_the_codec_reads() -> None:
    codec, other = ready("bmshj2018-hyperprior"), ready("bmshj2018-hyperprior")
    other.h_a[1] = nn.LeakyReLU()
    assert decode(codec, encode(other, photo())).shape == photo().shape


def of_version(data: bytes, version: int, mark: bytes) -> bytes:
    """An image that was encoded with `fast`, as an earlier version wrote it."""
    tables = data[len(MAGIC) + 9 : EARLIER.size]
    return sealed(MAGIC + bytes([version]) + mark + tables + data[HEADER.size : -4])


def test_images_of_earlier_versions_are_read(hyperprior: Any) -> None:
    data = encode(hyperprior, photo(), fast=True)
    assert data[len(MAGIC)] == VERSION == 3
    own = fingerprint(hyperprior)
    first = of_version(data, 1, own)
    with_encoder = of_version(data, 1, fingerprint(hyperprior, encoder=True))
    second = of_version(data, 2, data[len(MAGIC) + 1 : len(MAGIC) + 9])
    for earlier in (first, with_encoder, second):
        with pytest.warns(UserWarning, match="carries no digest"):
            assert torch.equal(decode(hyperprior, earlier), decode(hyperprior, data))
    refused(ready("mbt2018-mean"), first, "another codec")
    refused(hyperprior, of_version(data, 2, own), "another codec")
    refused(hyperprior, sealed(data[: len(MAGIC)] + b"\5" + data[5:-4]), "version 5")


SECOND = base64.b85decode(
    b"i%v;H0!0W*$`)k0cFA+uHsArE0SN>I2?g>6*bYByex(8cZm569@WW4P+gfF4-!Eu?o+AYVgZ6Z{!_AQE`USP4pY=bK"
    b"xS5JjmKC-&&I@TzlpF8`oS!5>)5GYGij=QcM+Pb#iGux<#_|0F6id7b7D6ulv8Qj@d}LqIP&bgCr)qGq(sutPj>d1v"
    b"=*SJ%m2F+sBM2zghJR)?PujP8=|<4i4(7<GvX`(AE`zcI0m_n}k2uZx>QWG)W>FEBV16tJNE3$(L{9uF=1Q$V4YUQe"
    b"1tM?jmOO>lNK5p1g;M"
)
"""photo(40, 56) by demo-hyperprior at quality 1, as it was written before version 3."""


def test_an_image_that_was_written_by_the_version_before_is_read() -> None:
    codec = load_codec("demo-hyperprior", 1)
    assert SECOND[len(MAGIC)] == 2
    with pytest.warns(UserWarning, match=r"version 2.* carries no digest"):
        decoded = decode(codec, SECOND)
    assert psnr(photo(40, 56) / 255, decoded / 255) == pytest.approx(20.99, abs=0.02)


def test_a_note_on_a_missing_digest_names_the_file(hyperprior: Any, tmp_path: Path) -> None:
    data = encode(hyperprior, photo(64, 64), fast=True)
    mark = data[len(MAGIC) + 1 : len(MAGIC) + 9]
    (tmp_path / "old.nic").write_bytes(of_version(data, 2, mark))
    with pytest.warns(UserWarning, match=r"old\.nic .* noise|old\.nic .* wrong") as caught:
        decode(hyperprior, tmp_path / "old.nic")
    assert caught[0].filename == __file__


FLAGS = EARLIER.size
"""Place of the flags in a header of version 3."""


def test_entropy_parameters_are_in_float64_unless_told_otherwise(hyperprior: Any) -> None:
    data, fast = (encode(hyperprior, photo(), fast=fast) for fast in (False, True))
    assert (data[FLAGS], fast[FLAGS]) == (3, 2)
    assert close(decode(hyperprior, data), decode(hyperprior, fast))
    # What decodes is what the file says.
    with pytest.MonkeyPatch.context() as patch:
        seen: list[bool] = []
        real = container.Coder
        patch.setattr(
            container,
            "Coder",
            lambda model, float64, **more: seen.append(float64) or real(model, float64=float64),
        )
        decode(hyperprior, data)
        decode(hyperprior, fast)
    assert seen == [True, False]


def test_symbols_that_are_not_the_encoders_are_refused(hyperprior: Any) -> None:
    """A digest that does not fit stands for symbols that do not."""
    for fast in (False, True):
        data = encode(hyperprior, photo(), fast=fast)
        for place in range(FLAGS + 1, HEADER.size):
            changed = bytearray(data[:-4])
            changed[place] ^= 1
            refused(hyperprior, sealed(bytes(changed)), "symbols differ from the encoder's")


@pytest.mark.parametrize("name", ["mbt2018", "elic2022-official"])
def test_other_arithmetic_is_refused_and_never_noise(name: str) -> None:
    """Between encoding and decoding, one weight of those that both sides use changes, which nobody
    notices but the digest.
    """
    codec = ready(name)
    data = encode(codec, photo(128, 128))
    before = decode(codec, data)
    real = container.copy_codec

    def altered(model: Any) -> Any:
        copied = real(model)
        for key, weight in copied.named_parameters():
            if "entropy_parameters" in key:
                weight.data.mul_(1.01)
        return copied

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(container, "fingerprint", lambda model: data[5:13])
        patch.setattr(container, "mark", lambda own, model: data[5:13])
        patch.setattr(container, "copy_codec", altered)
        refused(codec, data, "cannot be decoded here")
    assert torch.equal(decode(codec, data), before)


def test_a_picture_may_be_decoded_exactly(hyperprior: Any) -> None:
    data = encode(hyperprior, photo())
    exact = decode(hyperprior, data, exact=True)
    assert close(exact, decode(hyperprior, data))
    float64 = copy.deepcopy(hyperprior).double()
    float64.update(force=True)
    with torch.no_grad():
        padded, padding = pad(photo().unsqueeze(0).double() / 255, 64)
        sent = float64.compress(padded)
        expected = float64.decompress(sent["strings"], sent["shape"])["x_hat"]
    assert torch.equal(exact, crop(expected, padding)[0].clamp(0, 1).mul(255).round().byte())
    refused_exactly = encode(hyperprior, photo(), fast=True)
    with pytest.raises(FileError, match="cannot be decoded exactly"):
        decode(hyperprior, refused_exactly, exact=True)


def test_a_codec_without_compressais_coder_has_no_digest(hyperprior: Any) -> None:
    class Raw(type(hyperprior)):  # type: ignore[misc]
        def compress(self, x: Tensor) -> dict[str, Any]:
            return {"strings": [[bytes(x[0].mul(255).byte().flatten().tolist())]], "shape": [1]}

        def decompress(self, strings: Any, shape: Any) -> dict[str, Any]:
            side = round((len(strings[0][0]) // 3) ** 0.5)
            values = torch.tensor(list(strings[0][0]), dtype=torch.uint8)
            return {"x_hat": values.view(1, 3, side, side) / 255}

    hyperprior.__class__ = Raw
    data = encode(hyperprior, photo(64, 64))
    with pytest.warns(UserWarning, match="an entropy coder of its own"):
        assert torch.equal(decode(hyperprior, data), photo(64, 64))


def test_one_coder_codes_many_images_at_many_rates() -> None:
    attached = attach(ready("bmshj2018-hyperprior"), "slimmable", widths=[1.0, 0.5], round_to=1)
    attached.update(force=True)
    coder = ImageCoder(attached)
    for options in ({"width": 1}, {}, {"fast": True}, {"width": 1}, {}):
        data = coder.encode(photo(64, 64), **options)  # type: ignore[arg-type]
        assert data == encode(attached, photo(64, 64), **options)  # type: ignore[arg-type]
        coded, _ = read_coded(data)
        assert torch.equal(coder.decode(coded), decode(attached, data))


def test_evaluation_counts_the_strings_that_are_written(tmp_path: Path) -> None:
    for name in ("mbt2018", "elic2022-official"):
        codec = ready(name)
        file = write_png(photo() / 255, tmp_path / "a.png")
        for fast in (False, True):
            coded, _ = read_coded(encode(codec, file, fast=fast))
            score = evaluate(codec, file, fast=fast).images[0]
            assert score.bpp * 67 * 130 == pytest.approx(8 * string_bytes(coded.strings), rel=1e-3)


def test_other_tables_are_told_so() -> None:
    codec = ready("bmshj2018-hyperprior")
    data = encode(codec, photo())
    other = copy.deepcopy(codec)
    other.gaussian_conditional.update_scale_table(torch.linspace(0.2, 60, 40).tolist(), force=True)
    refused(other, data, "CDF tables")
    decode(codec, data)


def test_every_part_cut_off_and_every_byte_changed_is_noticed(hyperprior: Any) -> None:
    data = encode(hyperprior, photo(64, 64))
    for length in range(len(data)):
        refused(
            hyperprior,
            data[:length],
            (
                "damaged or cut short"
                if length >= len(MAGIC)
                else "not an image that nicprune"
                if length
                else "empty"
            ),
        )
    for place in range(len(data)):
        for bit in (0, 7):
            changed = bytearray(data)
            changed[place] ^= 1 << bit
            refused(hyperprior, bytes(changed))
    refused(hyperprior, data + b"\0", "damaged or cut short")
    decode(hyperprior, data)


def test_contents_that_do_not_fit_together_are_refused(hyperprior: Any) -> None:
    """The checksum is right: somebody made this."""
    data = encode(hyperprior, photo(64, 64))
    head, values = data[: HEADER.size], data[HEADER.size : -4]
    places = {
        0,
        2,
        4,
        5,
        6,
        7,
        8,
        len(values) - 1,
    }  # behind each of the first values and tags, and within the last string
    for length in places:
        refused(hyperprior, sealed(head + values[:length]), "do not fit together")
    for length in range(len(MAGIC) + 1, HEADER.size):
        refused(hyperprior, sealed(data[:length]), "damaged or cut short")
    refused(hyperprior, sealed(head + values + b"\0"), "do not fit together")
    refused(
        hyperprior,
        sealed(head + bytes([values[0] | 128, values[1] | 128, *[128] * 8, 0]) + values[2:]),
        "do not fit together",
    )  # 64, at length
    refused(hyperprior, sealed(head + b"\xff" * 40), "do not fit together")
    refused(
        hyperprior,
        sealed(head + _pack(64) + _pack(64) + bytes([1 << 2 | 1]) * 5000),
        "do not fit together",
    )
    refused(hyperprior, sealed(head + _pack(640) + values[2:]), "cannot be decoded here")
    shape = torch.Size([1, 1])
    for odd in ([], [[b""]], {"y": [b""]}, 7, b"text", [7, 7]):
        refused(
            hyperprior,
            sealed(head + _pack(64) + _pack(64) + _pack(shape) + _pack(odd)),
            "cannot be decoded here",
        )
    decode(hyperprior, sealed(head + values))


CRAFTED = """
import sys, torch
from helpers import built
from nicprune.common.errors import FileError
from nicprune.storage.coded_image import HEADER
from nicprune.storage.container import decode, encode
from nicprune.storage.values import pack, unpack_all
import zlib

torch.set_num_threads(1)
for name in sys.argv[1:]:
    codec = built(name)[0]
    codec.update(force=True)
    data = encode(codec, torch.zeros(3, 64, 64, dtype=torch.uint8))
    width, height, shape, strings = unpack_all(data[HEADER.size : -4], 4)

    def every(value, change):
        if isinstance(value, dict):
            return {key: every(item, change) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(every(item, change) for item in value)
        return change(value)

    def scaled(value, factor):
        return every(value, lambda n: n * factor)

    for number, (sizes, shapes) in enumerate((
        ((64, 64), shape), ((64, 64), scaled(shape, 2)), ((192, 192), scaled(shape, 3)),
        ((64, 64), scaled(shape, 16)), ((64, 64), scaled(shape, 10**6)),
        ((64, 64), scaled(shape, 2**40)), ((2**40, 2**40), scaled(shape, 2**40)),
        ((64, 2**24), shape),
    )):
        for text in (b"", b"\\xff" * 8, bytes(range(256)), None)[: 4 if number < 3 else 1]:
            given = strings if text is None else every(strings, lambda s: text)
            body = data[: HEADER.size] + b"".join(map(pack, (*sizes, shapes, given)))
            try:
                decode(codec, body + zlib.crc32(body).to_bytes(4, "big"))
                print("decoded")
            except FileError as error:
                print("refused", str(error).replace(chr(10), "NEWLINE"))
"""


def test_images_made_on_purpose_end_in_one_line_or_a_picture() -> None:
    """CompressAI's decoder does not look where a string ends: some of these were the end of the
    process.
    """
    names = ["bmshj2018-hyperprior", "mbt2018", "cheng2020-anchor-checkerboard"]
    done = elsewhere.run(CRAFTED, *names)
    assert done.returncode == 0, done.stderr[-2000:]
    told = done.stdout.splitlines()
    each = 3 * 4 + 5  # strings of three shapes; the others are not those of the image
    assert len(told) == len(names) * each and "NEWLINE" not in done.stdout
    for number, line in enumerate(told):
        if number % each >= 3 * 4:
            assert line.startswith("refused"), "a shape that is not that of the image"
    assert "decoded" in told


def test_zeros_behind_a_string_change_nothing(hyperprior: Any) -> None:
    from nicprune.codecs.rans import bounded_reads, recorded_symbols

    hyperprior.update(force=True)
    x = photo(64, 64).unsqueeze(0).float() / 255
    with torch.no_grad(), recorded_symbols() as written:
        sent = hyperprior.compress(x)
    assert written.written == 24 * 16 + 16
    with torch.no_grad():
        expected = hyperprior.decompress(sent["strings"], sent["shape"])["x_hat"]
        with bounded_reads(written.written):
            found = hyperprior.decompress(sent["strings"], sent["shape"])["x_hat"]
    assert torch.equal(found, expected)


def test_a_modulated_codec_refuses_a_stream_without_a_rate() -> None:
    attached = modulated()
    data = encode(attached, photo(64, 64))
    plain = attached.codec.compress(photo(64, 64).unsqueeze(0).float() / 255)
    body = data[: HEADER.size] + b"".join(map(_pack, (64, 64, plain["shape"], plain["strings"])))
    refused(attached, sealed(body), "does not start with a rate")


def test_foreign_files_are_refused(hyperprior: Any, tmp_path: Path) -> None:
    png = write_png(torch.rand(3, 64, 64), tmp_path / "a.png")
    refused(hyperprior, png, f"{png} is not an image that nicprune encoded")
    (tmp_path / "empty").touch()
    refused(hyperprior, tmp_path / "empty", "empty is empty")
    refused(hyperprior, tmp_path / "nowhere.nic", "no such file")
    refused(hyperprior, tmp_path, "cannot read")
    data = encode(hyperprior, photo(64, 64))
    newer = data[: len(MAGIC)] + b"\x63" + data[len(MAGIC) + 1 : -4]
    refused(hyperprior, sealed(newer), "format version 99")


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (torch.rand(3, 64, 64), "float32"),
        (torch.zeros(64, 64, 3, dtype=torch.uint8), "(64, 64, 3)"),
        (torch.zeros(1, 3, 64, 64, dtype=torch.uint8), "(1, 3, 64, 64)"),
        (torch.zeros(3, 0, 64, dtype=torch.uint8), "(3, 0, 64)"),
        ("nowhere.png", "no such image"),
    ],
)
def test_what_is_no_image_is_refused(image: Any, expected: str, hyperprior: Any) -> None:
    with pytest.raises(DataError) as caught:
        encode(hyperprior, image)
    assert expected in str(caught.value)


def test_a_rate_that_cannot_be_had_is_refused() -> None:
    picture = photo(64, 64)
    for codec, rate, expected in (
        (ready("bmshj2018-hyperprior"), {"level": 1.0}, "need a modulator"),
        (ready("bmshj2018-hyperprior"), {"lmbda": 0.01}, "need a modulator"),
        (gated(), {"level": 1.0}, "need a modulator"),
        (modulated(), {"level": 3.0}, "level 3 lies outside"),
        (modulated(), {"lmbda": 0.9}, "lmbda 0.9 lies outside"),
        (modulated(), {"level": 1.0, "lmbda": 0.01}, "not both"),
    ):
        with pytest.raises(RecipeError, match=expected):
            encode(codec, picture, **rate)  # type: ignore[arg-type]


def test_what_cannot_code_is_refused(hyperprior: Any) -> None:
    picture, data = photo(64, 64), encode(hyperprior, photo(64, 64))
    masked = attach(
        built("bmshj2018-hyperprior")[0], "mask_decay", budget={"macs": 0.5}, round_to=1
    )
    for codec, expected in (
        (masked, "harden"),
        (modulated().codec, "methods attached"),
        (nn.Linear(1, 1), "CompressionModel"),
        (None, "CompressionModel"),
    ):
        with pytest.raises(CodecError, match=expected):
            encode(codec, picture)  # type: ignore[arg-type]
        with pytest.raises(CodecError, match=expected):
            decode(codec, data)  # type: ignore[arg-type]


def test_a_codec_whose_strings_are_something_else_is_told_so(hyperprior: Any) -> None:
    class Odd(type(hyperprior)):  # type: ignore[misc]
        def compress(self, x: Tensor) -> dict[str, Any]:
            return {**super().compress(x), "shape": [1.5]}

    hyperprior.__class__ = Odd
    with pytest.raises(NicpruneError, match="1.5, which cannot be stored in a file"):
        encode(hyperprior, photo(64, 64))


SCARCE = """
import resource, sys, torch
from helpers import built
from PIL import Image
import nicprune.storage.container as container
from nicprune.common.errors import DataError
from nicprune.data.images import read_image

torch.set_num_threads(1)
Image.new("L", (8000, 6000)).save(sys.argv[1], compress_level=1)
codec = built("bmshj2018-factorized")[0]
container.encode(codec, torch.zeros(3, 64, 64, dtype=torch.uint8))
picture = torch.zeros(3, 3000, 4000, dtype=torch.uint8)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (150 << 20), -1))
for work in (lambda: read_image(sys.argv[1]), lambda: container.encode(codec, picture)):
    try:
        work()
    except DataError as error:
        print(error)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is bounded as Linux does")
def test_more_pixels_than_memory_are_one_line(tmp_path: Path) -> None:
    done = elsewhere.run(SCARCE, str(tmp_path / "large.png"))
    assert done.returncode == 0, done.stderr[-2000:]
    read, coded = done.stdout.splitlines()
    assert "large.png as an image: it needs more memory than there is" in read
    assert "coding an image of 4000x3000 pixels needs more memory than there is" in coded


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: 8 bytes")]
)
def test_running_out_of_memory_is_one_line_everywhere(
    hyperprior: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def scarce(*args: Any, **kwargs: Any) -> None:
        raise error

    data = encode(hyperprior, photo(64, 64))
    file = write_png(photo(64, 64) / 255, tmp_path / "a.png")
    monkeypatch.setattr(type(hyperprior), "decompress", scarce)
    refused(hyperprior, data, "needs more memory than there is")
    monkeypatch.setattr(type(hyperprior), "compress", scarce)
    for work in (lambda: encode(hyperprior, file), lambda: evaluate(hyperprior, file)):
        with pytest.raises(DataError, match="64x64 pixels,? needs more memory than there is"):
            work()


def test_a_decoded_picture_is_written_as_it_is(hyperprior: Any, tmp_path: Path) -> None:
    decoded = decode(hyperprior, encode(hyperprior, photo()))
    assert torch.equal(read_image(write_png(decoded.float() / 255, tmp_path / "a.png")), decoded)
