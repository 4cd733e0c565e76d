"""The codec itself learns the target domain: its files are no longer read, or show another picture,
and it does worse on the source domain (Katakol et al., "DANICE", CLIC at CVPR 2021, arXiv
2104.09370). Replayed source images reduce this (Duan et al., 2024, arXiv 2402.18862).
"""

from __future__ import annotations

from nicprune.codecs.roles import on_side
from nicprune.methods.adaptation.form import Form


class FinetuneAll(Form):
    """All parameters learn."""

    stays = False


class FinetuneDecoder(Form):
    """Layers that run when decoding alone learn. Bitstreams stay as they were; pictures do not."""

    stays = False

    def trains(self, name: str) -> bool:
        return on_side(self.codec, name, "decoder")
