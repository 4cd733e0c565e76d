"""Records as a run writes them, for tests of reports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010802000000907753de0000000c49444154789c63606060000000040001f61738550000000049454e44ae426082"
)

PSNR = {1: 28.0, 2: 30.0, 3: 32.0, 4: 34.0}

BPP = {1: 0.2, 2: 0.35, 3: 0.6, 4: 1.0}


def record(
    role: str = "original",
    quality: int = 1,
    *,
    drop: float = 0.0,
    rate: float = 1.0,
    label: str | None = None,
    **other: Any,
) -> dict[str, Any]:
    """A plausible record: `drop` dB below the original at `rate` times its bpp; a pruned one costs
    half.
    """
    share = 2 if role == "pruned" else 1
    original = {
        "macs": 40_960_000,
        "encoder": 24_576_000,
        "decoder": 20_480_000,
        "params": 1_000_000,
    }
    cost = {
        "macs": 40_960_000 // share,
        "encoder": 24_576_000 // (4 if share == 2 else 1),
        "decoder": 20_480_000 // share,
        "params": 1_000_000 // share,
    }
    bpp, psnr = BPP[quality] * rate, PSNR[quality] - drop
    images = [
        {
            "name": f"{n}.png",
            "width": 8,
            "height": 8,
            "bpp": bpp,
            "bpp_estimated": bpp,
            "psnr_db": psnr,
            "ms_ssim": 0.9,
            "encode_s": 0.2,
            "decode_s": 0.4,
        }
        for n in "ab"
    ]
    return {
        "format": "nicprune-record",
        "version": 1,
        "codec": "demo-hyperprior",
        "quality": quality,
        "metric": "mse",
        "lmbda": 0.01,
        "method": "none" if share == 1 else "mask_decay",
        "label": label or ("mask_decay" if role == "pruned" else role),
        "role": role,
        "seed": 0,
        "steps": 0 if role == "original" else 100,
        "cost": cost,
        "original_cost": original,
        "widths": {"g_a.0": [64, 32], "y": [96, 96]} if share == 2 else {},
        "by_transform": {"g_a": [cost["encoder"], 10], "g_s": [cost["decoder"], 10]},
        "bpp": bpp,
        "bpp_estimated": bpp,
        "psnr_db": psnr,
        "ms_ssim": 0.9,
        "encode_s": 0.2 / share,
        "decode_s": 0.4 / share,
        "images": images,
        "test": "samples",
        "crops": [],
        "file": "codec.safetensors",
        "recipe": "quickstart",
        "recipe_sha256": "ab" * 32,
        "recipe_text": "version: 1\n",
        "counter": "fvcore",
        "threads": 2,
        "device": "cpu",
        "versions": {"torch": "2.15.0"},
        "machine": "box",
        "busy": 0.0,
        "date": "2026-11-21T10:00:00",
    } | other


def sweep(qualities: tuple[int, ...] = (1, 2, 3), **pruned: Any) -> list[dict[str, Any]]:
    """Original, control and one pruned arm at each quality."""
    pruned = {"drop": 0.7} | pruned
    return [
        r
        for q in qualities
        for r in (
            record("original", q),
            record("control", q, drop=-0.1),
            record("pruned", q, **pruned),
        )
    ]


def store(folder: Path, records: list[dict[str, Any]], crops: bool = True) -> Path:
    """Write record.json files, each with a crop, as a run does."""
    for n, content in enumerate(records):
        here = folder / f"part{n}"
        (here / "crops").mkdir(parents=True)
        if crops:
            (here / "crops/x-original.png").write_bytes(PNG)
            (here / "crops/x.png").write_bytes(PNG + bytes([n]))
            entry = {
                "image": "x.png",
                "original": "crops/x-original.png",
                "decoded": "crops/x.png",
                "bpp": 0.4321,
                "psnr_db": 29.87,
            }
            content = content | {"crops": [entry]}
        (here / "record.json").write_text(json.dumps(content))
    return folder
