"""Arguments and options that several commands share."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer


def _level(text: str) -> float | str:
    try:
        return text if text == "best" else float(text)
    except ValueError:
        raise typer.BadParameter(f"a level is a number, or best (got {text!r})") from None


def _frame_size(text: str) -> tuple[int, int]:
    width, cross, height = text.lower().partition("x")
    if not (cross and width.isdecimal() and height.isdecimal() and int(width) and int(height)):
        raise typer.BadParameter(f"a size is WIDTHxHEIGHT, as 1920x1080 (got {text!r})")
    return int(width), int(height)


def refuse(what: str, options: Mapping[str, Any]) -> None:
    """Raise RecipeError if one of these options is given, which `what` has no use for."""
    from nicprune.common.errors import RecipeError

    if given := [name for name, value in options.items() if value is not None]:
        raise RecipeError(f"{what} has no {given[0]}: leave it out")


def load_one(codec: str, quality: int | None, metric: str, weights: str) -> Any:
    """Load the one codec of a command, as `load_codec` does."""
    from nicprune.storage.named import load_codec

    refuse_for_files([codec], quality, metric, weights)
    return load_codec(codec, quality, metric=metric, weights=weights)


def refuse_for_files(codecs: Sequence[str], quality: int | None, metric: str, weights: str) -> None:
    """Raise RecipeError if a quality, a metric or weights are given and every codec is a file,
    which holds its own.
    """
    if all(codec.endswith(".safetensors") for codec in codecs):
        refuse(f"{codecs[0]}, a codec in a file,", of_a_learned_codec(quality, metric, weights))


def of_a_learned_codec(quality: int | None, metric: str, weights: str) -> dict[str, Any]:
    """Return the options that choose a codec of the zoo, for `refuse`: None where not given."""
    return {
        "--quality": quality,
        "--metric": None if metric == "mse" else metric,
        "--weights": None if weights == "official" else weights,
    }


def _bound_images(context: typer.Context, pixels: int | None) -> int | None:
    """Set the bound on images for as long as the command runs."""
    if pixels is None:
        return None
    from nicprune.data.images import MAX_PIXELS_VARIABLE as NAME

    before = os.environ.get(NAME)
    os.environ[NAME] = str(pixels)

    @context.call_on_close
    def restore() -> None:
        if before is None:
            os.environ.pop(NAME, None)
        else:
            os.environ[NAME] = before

    return pixels


Codec = Annotated[str, typer.Argument(help="Name, file, or package.module:factory.")]
Quality = Annotated[
    int | None, typer.Option("--quality", "-q", help="Quality level, for named codecs.")
]
Weights = Annotated[str, typer.Option(help="official, none (random), or a file.")]
Metric = Annotated[
    str, typer.Option(help="Metric that the official weights were trained for: mse or ms-ssim.")
]
Level = Annotated[
    Any,
    typer.Option(
        parser=_level,
        metavar="LEVEL",
        help=(
            "With a modulator: the rate, from 0 (lowest); fractions lie between two rates. With a"
            " scalable encoder: the number of encoders beside the first, or best (the cheapest in"
            " rate-distortion cost for each image)."
        ),
    ),
]
Lmbda = Annotated[float | None, typer.Option(help="With a modulator: the rate, by its lambda.")]
Width = Annotated[
    int | None, typer.Option(help="With a slimmable codec: the width; 0 is the widest.")
]
Gop = Annotated[
    int | None,
    typer.Option(
        "--gop", min=1, help="Video: frames in a group of pictures, an I frame each; by default 32."
    ),
]
Frames = Annotated[
    int | None, typer.Option("--frames", min=1, help="Video: so many frames, from the first.")
]
FrameSize = Annotated[
    Any,
    typer.Option(
        "--size",
        parser=_frame_size,
        metavar="WIDTHxHEIGHT",
        help="Size of the frames of a .yuv whose name does not say it.",
    ),
]
Domain = Annotated[
    str | None, typer.Option(help="With an adaptation: the domain, source or the target's name.")
]
MaxPixels = Annotated[
    int | None,
    typer.Option(
        "--max-pixels",
        min=1,
        callback=_bound_images,
        help="Refuse images of more pixels; by default those of more than 89,478,485.",
    ),
]
Fast = Annotated[
    bool,
    typer.Option(
        "--fast",
        help=(
            "Entropy parameters in float32. Elsewhere, with another processor, number of threads"
            " or software, some images then do not decode."
        ),
    ),
]
Force = Annotated[
    bool, typer.Option("--force", help="Replace an existing file of another kind too.")
]
NoImport = Annotated[
    bool,
    typer.Option(
        "--no-import",
        help="Refuse a recipe that runs code of its own, by codec: package.module:factory.",
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", help="Override a recipe key: key=value, e.g. finetune.steps=100."),
]

Backend = Annotated[
    str | None,
    typer.Option(
        help=(
            "Backend that runs the transforms: torch, openvino or onnxruntime. Files are read by"
            " every backend."
        )
    ),
]
