"""The process and the machine it runs on: its allocator, its name, its versions. Imports nothing
heavy.
"""

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
"""Share of the processor that others may use during a sample."""


def tune_allocator() -> bool:
    """Keep glibc from mapping and faulting every large activation anew (2x in time at 768x512); say
    whether it was done.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        libc = ctypes.CDLL("libc.so.6")
        return bool(libc.mallopt(M_MMAP_MAX, 0)) and bool(libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1))
    except (OSError, AttributeError):  # musl
        return False


def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "unknown"
    return found


def describe_machine() -> dict[str, str | int | float]:
    """The processor, cores, memory (GB), system, Python, and device: the GPU where torch is loaded
    and sees one, else "cpu".
    """
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count() or 0,
        "memory_gb": _memory_gb(),
        "platform": platform.platform(terse=True),
        "python": platform.python_version(),
        "device": _device(),
    }


def machine_line() -> str:
    """The processor, cores, memory and system in one line, for reports."""
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


def _memory_gb() -> float:
    return round(psutil.virtual_memory().total / 1e9, 1)


def processor_time() -> tuple[float, float, float] | None:
    """(busy, all, own) processor seconds so far; None where the system does not say."""
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
    """Share of the processor, all its cores, that other programs used between two readings; None
    where the system does not say.
    """
    if before is None or after is None:
        return None
    if after[1] <= before[1]:
        return 0.0
    return max(0.0, (after[0] - before[0]) - (after[2] - before[2])) / (after[1] - before[1])
