"""Identity of the codec that reads a coded image: the fingerprint of its decoder, and its CDF
tables.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterable

from torch import Tensor, nn

from nicprune.codecs.anatomy import CDF_BUFFERS, ENCODER_ONLY, transform_of, unwrap
from nicprune.codecs.cdf import coding_parts
from nicprune.codecs.roles import transforms_in
from nicprune.codecs.structure import checksum, structure


def fingerprint(codec: nn.Module, *, encoder: bool = False, by_name: bool = False) -> bytes:
    """Return eight bytes that identify a codec's decoder: its weights, gates and modulators,
    without the CDF tables and the device.

    The encoder's weights do not count, since the original codec decodes what a changed encoder
    writes. With `encoder` they count too, as they did in the first files. With `by_name` only the
    names g_a and h_a say what the encoder is, as they did before modules were watched.
    """
    staying = [part for part in coding_parts(codec) if part.needed_for_decoding or encoder]
    # Methods that decoding does not need do not count.
    state = codec.state_dict() if staying else unwrap(codec).state_dict()
    left_out = set() if encoder else _of_the_encoder(codec, state, by_name)
    digest = hashlib.sha256()
    for key in sorted(state):
        owner, _, last = key.rpartition(".")
        if last in CDF_BUFFERS or key in left_out:
            continue
        value = state[key].float()
        mask = state.get(f"{owner}.mask")
        # Masked convolutions zero their masked weights only when they first run.
        if last == "weight" and mask is not None and mask.shape == value.shape:
            value = value * mask
        digest.update(f"{key} {tuple(value.shape)} ".encode())
        digest.update(_bytes(value))
    for method in staying:
        digest.update(f"{method.name} {method.config.model_dump_json()} ".encode())
    return digest.digest()[:8]


def mark(weights: bytes, codec: nn.Module, *, by_name: bool = False) -> bytes:
    """Combine the fingerprint of a codec's weights with its layers that decode."""
    found = structure(unwrap(codec))
    left_out = _of_the_encoder(unwrap(codec), found, by_name)
    layers = checksum(found, lambda name: name not in left_out)
    return weights[:4] + (int.from_bytes(weights[4:], "big") ^ layers).to_bytes(4, "big")


def earlier_mark(codec: nn.Module) -> bytes:
    """Return the mark that files written by earlier versions have, where another name than g_a or
    h_a is the encoder's.
    """
    return mark(fingerprint(codec, by_name=True), codec, by_name=True)


def _of_the_encoder(codec: nn.Module, names: Iterable[str], by_name: bool) -> set[str]:
    """Return those of the names of a codec's parts, or parameters, that run in encoding alone."""
    if by_name:
        return {name for name in names if transform_of(name) in ENCODER_ONLY}
    prefix = "codec." if unwrap(codec) is not codec else ""
    by_own = {name: name.removeprefix(prefix) for name in names}
    transforms = transforms_in(unwrap(codec), by_own.values())
    return {name for name, own in by_own.items() if transforms[own] in ENCODER_ONLY}


def tables(codec: nn.Module) -> int:
    """Return the CRC-32 of the CDF tables: with other tables, the same weights decode garbage."""
    state = codec.state_dict()
    return zlib.crc32(
        b"".join(
            _bytes(state[key]) for key in sorted(state) if key.rpartition(".")[2] in CDF_BUFFERS
        )
    )


def _bytes(value: Tensor) -> bytes:
    return value.detach().cpu().contiguous().numpy().tobytes()
