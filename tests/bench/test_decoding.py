"""Images are decoded with other kernels and other numbers of threads than they were encoded with:
the symbols are the encoder's, or it is said. Each environment is a process of its own.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import built
from helpers_cli import call, fails

from nicprune.bench import decoding, decoding_worker
from nicprune.bench.decoding import (
    CONDITIONS,
    DecodingReport,
    Decodings,
    measure_decoding,
    named_codec,
    random_codec,
    write_decoding,
)
from nicprune.bench.decoding_worker import EXACT, FLOAT32, FLOAT64, Done, Job, cropped, run_job
from nicprune.codecs.fast_coding import fast_indexes
from nicprune.common.errors import FileError
from nicprune.data.images import write_png
from nicprune.storage import container
from nicprune.storage.checkpoint import save


def pictures(folder: Path, count: int, side: int) -> list[Path]:
    generator = torch.Generator().manual_seed(0)
    return [
        write_png(torch.rand(3, side, side, generator=generator), folder / f"{number}.png")
        for number in range(count)
    ]


def holds(report: DecodingReport) -> None:
    """Every symbol is the encoder's, or the image was refused; pictures differ by rounding alone,
    and not at all if they are exact.
    """
    for one in report.decoded:
        for done in one.done:
            if one.way != FLOAT32:
                assert not done.refused, "float64 is the same everywhere"
            assert "symbols differ" in done.refused or done.largest <= 1 or done.refused
            assert one.way != EXACT or not done.differing


def test_images_are_decoded_alike_or_refused_elsewhere(tmp_path: Path) -> None:
    names = ["bmshj2018-hyperprior", "cheng2020-anchor-checkerboard"]
    said: list[str] = []
    report = measure_decoding(
        {name: built(name)[0] for name in names},
        pictures(tmp_path, 1, 128),
        exact=True,
        conditions=["2 threads"],
        say=said.append,
    )
    holds(report)
    assert said == ["encoding, and decoding: 1 thread", "decoding: 2 threads"]
    assert len(report.decoded) == 2 * 2 * 3 and all(len(one.done) == 1 for one in report.decoded)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["bmshj2018-hyperprior", "mbt2018-mean", "mbt2018", "elic2022-official"]
)
def test_large_images_are_decoded_alike_or_refused_everywhere(name: str, tmp_path: Path) -> None:
    report = measure_decoding({name: built(name)[0]}, pictures(tmp_path, 4, 256), exact=True)
    holds(report)
    # Other computations have been done: the test shows something.
    assert any(done.differing for one in report.decoded for done in one.done)
    assert {one.condition for one in report.decoded} == set(CONDITIONS)


def job(tmp_path: Path, actions: list[str], ways: list[str]) -> Job:
    file = tmp_path / "c.safetensors"
    if not file.exists():
        save(built("bmshj2018-hyperprior")[0], file)
        pictures(tmp_path, 1, 80)
    return Job(actions, {"c": str(file)}, [str(tmp_path / "0.png")], 70, ways, str(tmp_path))


def test_what_a_process_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ways = [FLOAT64, FLOAT32]
    first, second, *references = run_job(job(tmp_path, ["encode", "reference"], [*ways, EXACT]))
    assert (first.pixels, first.way, second.way) == (70 * 70, FLOAT64, FLOAT32)
    files = {way: tmp_path / f"c.0.{way}" for way in ways}
    assert [first.size, second.size] == [files[way].stat().st_size for way in ways]
    assert [one.action for one in references] == ["reference"] * 3
    for done in run_job(job(tmp_path, ["decode"], [*ways, EXACT])):
        assert (done.refused, done.differing, done.largest) == ("", 0, 0)
    real = decoding.torch.Tensor.round
    monkeypatch.setattr(torch.Tensor, "round", lambda x: real(x).clamp(0, 200))
    (done,) = run_job(job(tmp_path, ["decode"], [FLOAT64]))
    assert done.differing and 0 < done.largest <= 55
    files[FLOAT64].write_bytes(files[FLOAT64].read_bytes()[:-1])
    (done,) = run_job(job(tmp_path, ["decode"], [FLOAT64]))
    assert "damaged or cut short" in done.refused


def test_times_do_not_hold_what_is_done_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Coders, which are made and tried at their first image, are there before the first time is
    taken.
    """
    made: list[str] = []
    own, clock = container.Coder, decoding_worker.time.process_time

    def noting(*args: Any, **kwargs: Any) -> Any:
        made.append("coder")
        return own(*args, **kwargs)

    def started() -> float:
        made.append("time")
        return clock()

    monkeypatch.setattr(container, "Coder", noting)
    monkeypatch.setattr(decoding_worker.time, "process_time", started)
    ways = [FLOAT64, FLOAT32, EXACT]
    given = replace(job(tmp_path, ["encode", "reference", "decode"], ways), backends=["torch"])
    list(run_job(given))
    assert made.count("coder") == 4 and "coder" not in made[made.index("time") :]


def test_crops_are_at_the_centre() -> None:
    image = torch.arange(3 * 5 * 7).view(3, 5, 7)
    assert torch.equal(cropped(image, 3), image[:, 1:4, 2:5])
    assert torch.equal(cropped(image, 6), image[:, :, :6])
    assert cropped(image, None) is image


def done(way: str, size: int = 0, seconds: float = 1.0, **more: Any) -> Done:
    return Done("decode", "c", "a.png", way, seconds, size, 100, **more)


def report_of() -> DecodingReport:
    encoded = {
        ("c", FLOAT64): (done(FLOAT64, 50, 3.0),),
        ("c", FLOAT32): (done(FLOAT32, 40, 2.0),),
    }
    decoded = [
        Decodings("c", "1 thread", FLOAT64, (done(FLOAT64, seconds=1.5),)),
        Decodings("c", "1 thread", FLOAT32, (done(FLOAT32),)),
        Decodings("c", "AVX2", FLOAT64, (done(FLOAT64, differing=3, largest=1), done(FLOAT64))),
        Decodings("c", "AVX2", FLOAT32, (done(FLOAT32, refused="no"), done(FLOAT32))),
    ]
    return DecodingReport(encoded, decoded, "Made here.")


def test_the_table_says_what_float64_costs_and_what_became_of_the_images(tmp_path: Path) -> None:
    report = report_of()
    cost, decoded, conditions = report.table().split("\n\n")
    row = [cell.strip() for cell in cost.splitlines()[2].strip("|").split("|")]
    assert row == ["c", "3.2000", "4.0000", "+25.00%", "2.00", "3.00", "+50.00%"] + [
        "1.00", "1.50", "+50.00%",
    ]  # fmt: skip
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in decoded.splitlines()[2:]
    ]
    assert rows[2] == ["c", "AVX2", FLOAT64, "2", "0", "1", "1"]
    assert rows[3] == ["c", "AVX2", FLOAT32, "2", "1", "1", "0"]
    assert conditions == "Made here."
    folder = write_decoding(report, tmp_path / "out", "nicprune bench decoding")
    assert "Made by `nicprune bench decoding`" in (folder / "decoding.md").read_text()
    content = json.loads((folder / "decoding.json").read_text())
    assert content["decoded"][3]["images"][0]["refused"] == "no"
    assert content["cost"][0]["bpp float64"] == 4


def test_random_codecs_use_many_tables() -> None:
    seen: list[torch.Tensor] = []
    codec: Any = random_codec("elic2022-official")
    conditional = next(m for m in codec.modules() if type(m).__name__ == "GaussianConditional")
    with torch.no_grad(), fast_indexes(), pytest.MonkeyPatch.context() as patch:
        own = type(conditional).build_indexes
        patch.setattr(
            type(conditional),
            "build_indexes",
            lambda self, scales: seen.append(own(self, scales)) or seen[-1],
        )
        codec.compress(torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1)))
    assert len(torch.cat([s.flatten() for s in seen]).unique()) > 15
    assert named_codec("demo-hyperprior").state_dict().keys() == (
        named_codec("demo-hyperprior", 3).state_dict().keys()
    )


def test_the_part_of_the_bench_counts_pictures_that_are_off(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(decoding, "CODECS", ("demo-hyperprior",))
    monkeypatch.setattr(decoding, "measure_decoding", lambda *a, **k: report_of())
    first, bpp, encode, decode = decoding.bench_decoding()
    assert first.met and "0 of 3 refused" in first.detail and "by 1 levels" in first.detail
    assert [bpp.value, encode.value, decode.value] == [1.25, 1.5, 1.5]


def test_a_process_that_fails_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding.sys, "executable", "false")
    with pytest.raises(FileError, match="decoding failed: 1"):
        measure_decoding({"c": built("bmshj2018-factorized")[0]}, [tmp_path / "0.png"])


def test_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = save(built("bmshj2018-hyperprior")[0], tmp_path / "c.safetensors")
    (picture,) = pictures(tmp_path, 1, 64)
    given: list[Any] = []
    monkeypatch.setattr(
        decoding,
        "measure_decoding",
        lambda codecs, images, **options: given.append((codecs, images, options)) or report_of(),
    )
    arguments = ["bench", "decoding", "--images", str(picture), "--codec", f"mine={file}"]
    out = call(*arguments, "--crop", "48", "--exact", "--out", str(tmp_path / "out"))
    ((codecs, images, options),) = given
    assert list(codecs) == ["mine"] and images == [picture]
    assert (options["crop"], options["exact"]) == (48, True)
    assert "| AVX2" in out and (tmp_path / "out" / "decoding.md").exists()
    assert "options of: nicprune bench decoding" in fails(
        monkeypatch, capsys, "bench", "attach", "--crop", "48"
    )


def test_images_of_one_name_are_each_decoded(tmp_path: Path) -> None:
    """Sub-folders are searched, so that two images may have one name."""
    images = []
    for folder, side in (("x", 64), ("y", 80)):
        picture = torch.rand(3, side, side, generator=torch.Generator().manual_seed(side))
        images.append(str(write_png(picture, tmp_path / folder / "001.png")))
    file = save(built("bmshj2018-hyperprior")[0], tmp_path / "c.safetensors")

    def job(actions: list[str]) -> Job:
        return Job(actions, {"c": str(file)}, images, None, [FLOAT64], str(tmp_path))

    encoded = [done for done in run_job(job(["encode", "reference"])) if done.action == "encode"]
    decoded = list(run_job(job(["decode"])))
    assert [done.pixels for done in encoded] == [64 * 64, 80 * 80]
    assert [(done.image, done.refused, done.differing) for done in decoded] == [
        (images[0], "", 0),
        (images[1], "", 0),
    ]
    assert len(list(tmp_path.glob("c.*.float64"))) == 2


def test_codecs_of_one_name_are_each_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every run writes codec.safetensors."""
    seen: list[str] = []

    def measured(codecs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        seen.extend(codecs)
        raise FileError("enough")

    monkeypatch.setattr(decoding, "measure_decoding", measured)
    given = []
    for folder in ("a", "b"):
        file = save(built("bmshj2018-hyperprior")[0], tmp_path / folder / "codec.safetensors")
        given += ["--codec", str(file)]
    picture = write_png(torch.rand(3, 64, 64), tmp_path / "0.png")
    with pytest.raises(FileError, match="enough"):
        call("bench", "decoding", "--images", str(picture), *given, "--codec", f"own={given[1]}")
    assert seen == ["codec (1)", "codec (2)", "own"]
