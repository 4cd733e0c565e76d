"""Training progress: a bar on a terminal, otherwise a line every 15 seconds."""

from __future__ import annotations

import sys
import time
from typing import Any

from tqdm import tqdm

LINE_EVERY_S = 15.0
SHOWN = ("loss", "bpp", "psnr", "macs")


class Progress:
    """Show progress over `total` steps on stderr; print nothing unless `enabled`."""

    def __init__(self, total: int, label: str = "", *, enabled: bool = True):
        self.total, self.label, self.enabled = total, label, enabled
        self._bar: tqdm[Any] | None = None
        self._text = ""
        self._printed = self._started = 0.0
        self._first = 0

    def start(self, step: int) -> None:
        """Start at `step`, which is above 0 in a resumed run."""
        self._started = self._printed = time.monotonic()
        self._first = step
        if self.enabled and sys.stderr.isatty():
            self._bar = tqdm(
                total=self.total,
                initial=step,
                desc=self.label or None,
                leave=True,
                dynamic_ncols=True,
            )

    def show(self, step: int, values: dict[str, float] | None = None) -> None:
        """Show that `step` steps are done, with the given metrics (or the last ones)."""
        if values:
            self._text = "  ".join(f"{k} {values[k]:.4g}" for k in SHOWN if k in values)
        if self._bar is not None:
            self._bar.update(step - self._bar.n)
            if values:
                self._bar.set_postfix_str(self._text)
            return
        now = time.monotonic()
        if self.enabled and (now - self._printed >= LINE_EVERY_S or step == self.total):
            rate = (step - self._first) / max(now - self._started, 1e-9)
            print(
                f"{self.label + '  ' if self.label else ''}{step}/{self.total}  {self._text} "
                f" {rate:.2g} steps/s",
                file=sys.stderr,
                flush=True,
            )
            self._printed = now

    def close(self) -> None:
        """Close the bar and leave it on the screen."""
        if self._bar is not None:
            self._bar.close()
