"""The devices and packages of this machine that training needs."""

from __future__ import annotations

from typing import Any

from lightning_fabric import Fabric as Fabric
from lightning_fabric.utilities.exceptions import MisconfigurationException

from nicprune.common.errors import TrainingError
from nicprune.common.machine import memory_bytes
from nicprune.training.settings import TrainSettings


def check_environment(options: TrainSettings) -> None:
    """Raise unless this machine has the devices and packages that training needs.

    Raises:
        TrainingError: the accelerator is unknown or missing, TensorBoard is not installed, or a
            batch alone takes more memory than there is.
    """
    if options.devices == 1:  # several are started as processes
        make_fabric(options)
    batch = 4 * 3 * options.batch_size * options.patch_size**2
    if batch > (memory := memory_bytes()):
        raise TrainingError(
            f"a batch of {options.batch_size} patches of {options.patch_size} pixels square takes"
            f" {batch / 1e9:,.0f} GB, and this machine has {memory / 1e9:,.0f}"
        )
    if options.tensorboard:
        summary_writer()


def summary_writer() -> Any:
    """Return TensorBoard's writer class.

    Raises:
        TrainingError: TensorBoard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise TrainingError("tensorboard is not installed: pip install 'nicprune[track]'") from None
    return SummaryWriter


def make_fabric(options: TrainSettings) -> Fabric:
    """Return Lightning Fabric for the devices that are asked for, launched if they are several.

    Raises:
        TrainingError: this machine does not have them.
    """
    try:
        fabric = Fabric(
            accelerator=options.accelerator,
            devices=options.devices,
            strategy="ddp" if options.devices > 1 else "auto",
        )
        if options.devices > 1:
            fabric.launch()
    except (RuntimeError, ValueError, ImportError, MisconfigurationException) as error:
        raise TrainingError(
            f"cannot train on {options.devices} x {options.accelerator!r}:"
            f" {str(error).splitlines()[0]}"
        ) from None
    return fabric
