"""Identity of the codec that reads a coded image: the fingerprint of its decoder, and its CDF
tables.
"""

from __future__ import annotations

import hashlib
import zlib

from torch import Tensor, nn

from nicprune.codecs.anatomy import CDF_BUFFERS, ENCODER_ONLY, transform_of, unwrap
from nicprune.codecs.cdf import coding_parts
from nicprune.codecs.structure import checksum, structure


def fingerprint(codec: nn.Module, *, encoder: bool = False) -> bytes:
    """Return eight bytes that identify a codec's decoder: its weights, gates and modulators,
    without the CDF tables and the device.

    The encoder's weights do not count, since the original codec decodes what a changed encoder
    writes. With `encoder` they count too, as they did in the first files.
    """
    staying = [part for part in coding_parts(codec) if part.needed_for_decoding or encoder]
    # Methods that decoding does not need do not count.
    state = codec.state_dict() if staying else unwrap(codec).state_dict()
    digest = hashlib.sha256()
    for key in sorted(state):
        owner, _, last = key.rpartition(".")
        if last in CDF_BUFFERS or (not encoder and transform_of(key) in ENCODER_ONLY):
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


def mark(weights: bytes, codec: nn.Module) -> bytes:
    """Combine the fingerprint of a codec's weights with its layers that decode."""
    layers = checksum(structure(unwrap(codec)), lambda name: transform_of(name) not in ENCODER_ONLY)
    return weights[:4] + (int.from_bytes(weights[4:], "big") ^ layers).to_bytes(4, "big")


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
