"""The machine and the process: allocator, processor, memory, versions. Does not import torch."""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from importlib import metadata

import psutil

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
PACKAGES = ("nicprune", "torch", "compressai", "torch-pruning", "fvcore", "numpy")
BUSY = 0.15
"""Largest fraction of the processor that other programs may use during a measurement."""


def is_quiet(busy: float | None) -> bool:
    """Return True if times taken while other programs used this fraction of the processor count;
    False where it is not known (None).
    """
    return busy is not None and busy <= BUSY


def tune_allocator() -> bool:
    """Keep large activations in glibc's heap instead of mapping each anew (2x in time at 768x512).

    Returns:
        Whether the allocator was tuned; False where the C library is not glibc.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        libc = ctypes.CDLL("libc.so.6")
        return bool(libc.mallopt(M_MMAP_MAX, 0)) and bool(libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1))
    except (OSError, AttributeError):  # musl
        return False


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that results depend on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "unknown"
    return found


def describe_machine() -> dict[str, str | int | float]:
    """Return processor, cores, memory (GB), system, Python, and device: the GPU if torch is
    imported and sees one, else "cpu".
    """
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count() or 0,
        "memory_gb": round(memory_bytes() / 1e9, 1),
        "platform": platform.platform(terse=True),
        "python": platform.python_version(),
        "device": _device(),
    }


def machine_line() -> str:
    """Return processor, cores, memory and system in one line, for reports."""
    return "{cpu}, {cores} cores, {memory_gb} GB, {platform}".format(**describe_machine())


def _device() -> str:
    torch = sys.modules.get("torch")  # importing it here would make `nicprune --help` wait for it
    return (
        torch.cuda.get_device_name() if torch is not None and torch.cuda.is_available() else "cpu"
    )


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(
                (line.partition(":")[2].strip() for line in file if line.startswith("model name")),
                platform.machine(),
            )
    except OSError:
        return platform.processor() or platform.machine()


def memory_bytes() -> int:
    """Return the memory of this machine in bytes."""
    return int(psutil.virtual_memory().total)


def processor_time() -> tuple[float, float, float] | None:
    """Return processor seconds so far: busy, in total, and of this process. None where the system
    does not report them.
    """
    try:
        times = psutil.cpu_times()
    except (OSError, psutil.Error):
        return None
    guests = getattr(times, "guest", 0.0) + getattr(times, "guest_nice", 0.0)  # in user, nice too
    all_ = sum(times) - guests
    idle = times.idle + getattr(times, "iowait", 0.0)
    own = psutil.Process().cpu_times()
    return all_ - idle, all_, own.user + own.system


def others_share(
    before: tuple[float, float, float] | None, after: tuple[float, float, float] | None
) -> float | None:
    """Return the fraction of the processor (all cores) that other programs used between two
    readings of `processor_time`; None where the system does not report it.
    """
    if before is None or after is None:
        return None
    if after[1] <= before[1]:
        return 0.0
    return max(0.0, (after[0] - before[0]) - (after[2] - before[2])) / (after[1] - before[1])
