"""What any backend wrote, every other reads to the same latents: a digest of the symbols is in each
file, so that anything else is refused.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from helpers import ARCHITECTURES, built

import nicprune as nip
from nicprune.bench import decoding
from nicprune.bench.decoding import AVX2, SSE41, measure_decoding
from nicprune.bench.decoding_worker import pairs
from nicprune.common.errors import FileError
from nicprune.data.images import write_png
from nicprune.runtime import layer_forms
from nicprune.runtime.backends import BACKENDS
from nicprune.storage.coded_image import read_coded

IMAGE = (torch.rand(3, 100, 150, generator=torch.Generator().manual_seed(0)) * 255).byte()


def installed() -> list[str]:
    found = []
    for name in BACKENDS:
        try:
            for package in BACKENDS[name].packages:
                __import__(package)
        except ImportError:
            continue
        found.append(name)
    return found


@pytest.fixture(autouse=True)
def unmeasured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Layers as they are: which form is fastest does not matter here."""
    monkeypatch.setenv("NICPRUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(
        layer_forms, "seconds_of_forms", lambda forms, *rest: dict.fromkeys(forms, 1.0)
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_backend_reads_what_any_wrote(name: str) -> None:
    codec = built(name)[0]
    codecs = {"eager": codec} | {
        backend: nip.accelerate(codec, backend, image=IMAGE[:, :64, :64]) for backend in installed()
    }
    written = {backend: nip.encode(one, IMAGE) for backend, one in codecs.items()}
    for writer, reader in itertools.product(codecs, codecs):
        assert read_coded(written[writer])[0].digest, "which is compared when it is read"
        # Refused unless the latents are the encoder's, bit for bit.
        picture = nip.decode(codecs[reader], written[writer]).int()
        same = nip.decode(codec, written[writer]).int()
        assert int((picture - same).abs().max()) <= 1


def test_other_latents_are_refused() -> None:
    """If what both sides compute were computed otherwise, it would be noticed."""
    codec = built("bmshj2018-hyperprior")[0]
    data = nip.encode(codec, IMAGE)
    fast = nip.accelerate(codec, "torch", image=IMAGE[:, :64, :64])
    fast.h_s.register_forward_hook(lambda module, args, output: output * 1.5)
    with pytest.raises(FileError, match="symbols differ|cannot be decoded"):
        nip.decode(fast, data)


ELSEWHERE = {
    "1 thread": {},
    "2 threads": {"OMP_NUM_THREADS": "2"},
    "AVX2": AVX2,
    "SSE4.1": SSE41,
    "AVX2, 2 threads": {**AVX2, "OMP_NUM_THREADS": "2"},
    "SSE4.1, 2 threads": {**SSE41, "OMP_NUM_THREADS": "2"},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_everywhere(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "CONDITIONS", ELSEWHERE)
    image = write_png(IMAGE[:, :64, :128].float() / 255, tmp_path / "a.png")
    report = measure_decoding(
        {name: built(name)[0]}, [image], conditions=list(ELSEWHERE), backends=installed()
    )
    ways = {f"{writer} > {reader}" for writer, reader in pairs(installed())}
    found = [one for one in report.decoded if one.way in ways]
    assert len(found) == len(ways) * len(ELSEWHERE)
    for one in found:
        assert not one.refused, f"{one.way}, {one.condition}: {one.done[0].refused}"
        assert one.largest <= 1


def test_a_process_codes_by_backends(tmp_path: Path) -> None:
    image = write_png(IMAGE[:, :64, :64].float() / 255, tmp_path / "a.png")
    report = measure_decoding(
        {"c": built("bmshj2018-hyperprior")[0]}, [image], conditions=[], backends=["torch"]
    )
    assert ("c", "torch") in report.encoded
    ways = {one.way: one for one in report.decoded}
    for way in ("eager > torch", "torch > eager", "torch > torch"):
        assert len(ways[way].done) == 1 and not ways[way].refused
        assert f"| {way}" in report.table()
    assert "eager > eager" not in ways
