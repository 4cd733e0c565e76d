"""The text of `nicprune profile`: channel groups, the layers that they couple, and costs; and what
methods on the codec add.
"""

from __future__ import annotations

from typing import cast

from torch import nn

from nicprune.channels.groups import Groups
from nicprune.codecs.anatomy import sides_of
from nicprune.codecs.provenance import provenance
from nicprune.methods.composition import Attached
from nicprune.methods.contract import Method
from nicprune.pruning.cost import COUNTER, CostModel
from nicprune.pruning.uncalled import in_words

SIZE = (512, 768)


def profile_text(codec: nn.Module, groups: Groups, cost: CostModel) -> str:
    """Return a description of a codec in three tables: groups, transforms, encoder and decoder."""
    record, totals = provenance(codec), cost.totals()
    height, width = SIZE
    lines = [
        (
            f"{record.name}{f' quality {record.quality}' if record.quality else ''}"
            f" ({type(codec).__name__})"
        ),
        "",
    ]

    per_channel = cost.per_channel()
    free = groups.prunable(latents=True)
    pinned = f", {len(groups) - len(free)} cannot" if len(groups) > len(free) else ""
    lines.append(f"{len(free)} channel groups can shrink{pinned}; y and z only with latents: true")
    lines.append(
        f"{'group':34}{'width':>6}  {'kMAC/px per channel':>19}  {'layers that it couples'}"
    )
    for group in groups:
        share = per_channel[cost.names.index(group.name)] / 4096 / 1000
        coupled = " ".join(str(m) for m in group.members)
        mark = f"[{group.latent}] " if group.latent else ""
        note = f"  (unprunable: {group.pinned})" if group.pinned else ""
        lines.append(f"{group.name:34}{group.width:>6}  {share:>19.4f}  {mark}{coupled}{note}")

    if groups.uncalled:
        lines.append(
            f"no run called {in_words(groups.uncalled)}: which channels reach them is unknown"
        )

    lines += ["", f"{'transform':22}{'runs when':18}{'GMAC':>10}{'kMAC/px':>10}{'params':>14}"]
    for name, (macs, params) in cost.by_transform().items():
        encodes, decodes = sides_of(name)
        when = (
            "encoding, decoding" if encodes and decodes else "encoding" if encodes else "decoding"
        )
        lines.append(
            f"{name:22}{when:18}{macs * height * width / 4096 / 1e9:>10.3f}"
            f"{macs / 4096 / 1000:>10.3f}{params:>14,}"
        )
    for name in ("macs", "encoder", "decoder"):
        label = "all" if name == "macs" else f"{name} (shared parts included)"
        params_text = f"{totals.params:>14,}" if name == "macs" else ""
        lines.append(
            f"{label:40}{totals.gmac(height, width, name):>10.3f}"
            f"{totals.kmac_per_pixel(name):>10.3f}{params_text}"
        )
    lines.append(
        f"MACs: counted by {COUNTER} at 64x64, GMAC for {width}x{height}; a multiply-add is one"
        " MAC, GDN counts as its 1x1 convolution"
    )
    if record.original:
        before = cost.original
        fewer = (
            f"{before.macs / totals.macs:.2f}x fewer MACs, {before.params / totals.params:.2f}x"
            " fewer params"
        )
        lines.append(
            f"original: {before.kmac_per_pixel():.3f} kMAC/px, {before.params:,} params; this is"
            f" {fewer}"
        )
    for number, entry in enumerate(record.history, 1):
        names = ", ".join(m["name"] for m in entry.get("methods", []))
        verified = f"; {entry['verified']}" if entry.get("verified") else ""
        lines.append(
            f"history {number}: {names}: {entry['macs_before'] / entry['macs_after']:.2f}x fewer"
            f" MACs{verified}"
        )
    return "\n".join(lines)


def methods_text(attached: Attached) -> str:
    """Return a table of the cost of a codec with its methods: a row for each width, level or
    domain.
    """
    names = ", ".join(method.name for method in cast("list[Method]", list(attached.methods)))
    lines = [
        "",
        f"the tables above are of the codec alone; with {names} on it:",
        f"{'kMAC/px':22}{'all':>10}{'encoder':>10}{'decoder':>10}{'params':>14}",
    ]

    def add(name: str) -> None:
        now = attached.totals()
        costs = "".join(
            f"{now.kmac_per_pixel(side):>10.3f}" for side in ("macs", "encoder", "decoder")
        )
        lines.append(f"{name:22}{costs}{now.params:>14,}")

    widths = attached.widths
    if widths is None:
        add("as it codes")
    else:
        for value in widths.points():
            with attached.at_width(value):
                add(widths.name(value))
    if attached.roles.gating:
        lines.append(
            "with all channels open: gates close channels image by image, and nicprune time counts"
            " what is left for an image"
        )
    return "\n".join(lines)
