"""Where a codec comes from stays with it, and only with it."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from pathlib import Path

from helpers import built, state_of

from nicprune.codecs.provenance import Provenance, provenance, set_provenance
from nicprune.methods import attach


def told() -> tuple[object, Provenance]:
    codec = built("bmshj2018-hyperprior")[0]
    record = provenance(codec)
    record.quality = 7
    record.history.append({"methods": [{"name": "magnitude"}]})
    return codec, record


def test_a_codec_is_known_by_its_class() -> None:
    record = provenance(built("mbt2018-mean")[0])
    assert (record.name, record.quality, record.history) == ("mbt2018-mean", None, [])
    assert record.build == {
        "class": "compressai.models.google:MeanScaleHyperprior",
        "kwargs": {"N": 16, "M": 24},
    }


def test_what_is_changed_in_the_record_is_changed_on_the_codec() -> None:
    codec, record = told()
    assert provenance(codec) == record and provenance(codec).quality == 7  # type: ignore[arg-type]
    provenance(codec).quality = 9  # type: ignore[arg-type]
    assert record.quality == 9
    replaced = Provenance("other")
    set_provenance(codec, replaced)  # type: ignore[arg-type]
    replaced.quality = 2
    assert provenance(codec).quality == 2  # type: ignore[arg-type]


def test_copies_have_records_of_their_own() -> None:
    codec, record = told()
    for other in (copy.deepcopy(codec), pickle.loads(pickle.dumps(codec))):
        assert provenance(other) == record
        provenance(other).history.append({})
        provenance(other).quality = 1
        assert record.quality == 7 and len(record.history) == 1


def test_a_record_is_no_part_of_the_state_dict() -> None:
    codec = built("bmshj2018-hyperprior")[0]
    before = state_of(codec).keys()
    provenance(codec)
    assert state_of(codec).keys() == before


def test_a_pickled_codec_needs_no_nicprune(tmp_path: Path) -> None:
    codec, _ = told()
    (tmp_path / "codec.pickle").write_bytes(pickle.dumps(codec))
    script = (
        "import pickle, sys; codec = pickle.load(open(sys.argv[1], 'rb')); assert not [m for m in"
        " sys.modules if m.startswith('nicprune')]"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, str(tmp_path / "codec.pickle")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-800:]


def test_methods_on_a_codec_do_not_hide_its_record() -> None:
    codec, record = told()
    attached = attach(codec, "magnitude", budget={"macs": 0.5}, round_to=1)  # type: ignore[arg-type]
    assert provenance(attached) == provenance(attached.codec) == record
