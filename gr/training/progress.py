"""What a person sees while training: a bar in a terminal, plain lines elsewhere; only rank 0 speaks."""

from __future__ import annotations

import sys
import time
from typing import Any, TextIO

_LINE_EVERY_S = 10.0


class Progress:
    """Shows steps as they pass.

    Args:
        enabled: False on ranks other than 0.
        stream: Where to; a bar if it is a terminal.
    """

    def __init__(self, enabled: bool = True, stream: TextIO | None = None) -> None:
        self._stream = sys.stdout if stream is None else stream
        self._enabled = enabled
        self._bar: Any = None
        self._task: Any = None
        self._last = 0.0

    def start(self, name: str, done: int, total: int) -> None:
        """A phase begins, or goes on after ``done`` steps."""
        self._last = time.monotonic()
        if not (self._enabled and self._stream.isatty()):
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._bar = Bar(*columns, TextColumn("{task.fields[text]}"), console=Console(file=self._stream))
        self._bar.start()
        self._task = self._bar.add_task(name, total=total, completed=done, text="")

    def step(
        self, done: int, total: int, epoch: int, loss: float, tokens_per_s: float, seconds_per_step: float
    ) -> None:
        """``done`` of ``total`` steps of the phase; lines come at most every ten seconds."""
        if not self._enabled:
            return
        text = f"epoch {epoch + 1}  loss {loss:.4f}  {tokens_per_s:,.0f} tokens/s"
        if self._bar:
            self._bar.update(self._task, completed=done, text=text)
        elif time.monotonic() - self._last >= _LINE_EVERY_S:
            self._last = time.monotonic()
            self.note(f"step {done}/{total}  {text}  {format_time((total - done) * seconds_per_step)} left")

    def note(self, text: str) -> None:
        """One line, above the bar where there is one."""
        if not self._enabled:
            return
        if self._bar:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=self._stream, flush=True)

    def close(self) -> None:
        """Ends the bar."""
        if self._bar:
            self._bar.stop()
            self._bar = None


def format_time(seconds: float) -> str:
    """``45 s``, ``3 min 20 s`` or ``2 h 5 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
