"""What a user gets when something is wrong: one sentence, exit status 2, no traceback."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from typing import NoReturn

STOPPED = 3
"""Exit status: asked to stop, saved; the same command goes on. Launchers and schedulers read it."""
LOST = 4
"""Exit status: another process of this run, or the way to it, is gone; to be started again from the last checkpoint."""


class UserError(ValueError):
    """A mistake the user can mend: names the file, field or value and says what would be right."""


class Diverged(UserError):
    """Training met a loss or a gradient that is not finite.

    Args:
        reason: What was met, at which step, and what may help.
        kept: Where the batch is, in words.

    Attributes:
        reason: The first half of the sentence, the same wherever the run's folder lies.
    """

    def __init__(self, reason: str, kept: str) -> None:
        super().__init__(f"{reason}; {kept}")
        self.reason = reason


class OutOfMemory(UserError):
    """A step did not fit into the device's memory."""


class PeerLost(RuntimeError):
    """Another process of this run no longer answers. Nobody's mistake: a launcher starts all of them again."""


class Parser(argparse.ArgumentParser):
    """A wrong argument is one sentence, as every mistake is."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.prog}: {message}; see {self.prog} --help")


def run_cli(main: Callable[[list[str]], int | None], argv: list[str] | None = None) -> int:
    """Runs a command: a ``UserError`` becomes one sentence on stderr and exit status 2.

    Args:
        main: Takes the arguments after the program name; returns an exit status (``None`` is 0).
        argv: Arguments; defaults to ``sys.argv[1:]``.

    Returns:
        The process exit status: 0 done, 2 for a user's mistake, 4 where other processes are gone, 130 for Ctrl-C. Other
        exceptions keep their traceback.
    """
    try:
        return main(sys.argv[1:] if argv is None else argv) or 0
    except UserError as error:
        rank = os.environ.get("RANK", "0")  # other ranks mostly repeat what rank 0 says, but not always
        _say(f"{'' if rank == '0' else f'[rank {rank}] '}error: {error}")
        return 2
    except PeerLost as error:
        _say(f"[rank {os.environ.get('RANK', '0')}] {error}")
        return LOST
    except KeyboardInterrupt:
        _say("stopped")
        return 130


def _say(sentence: str) -> None:
    """A line on stderr in one write: ``print`` ends it with a second one, and another process may speak in between."""
    sys.stderr.write(f"{sentence}\n")
    sys.stderr.flush()
