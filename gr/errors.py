"""What a user gets when something is wrong: one sentence, exit status 2, no traceback."""

from __future__ import annotations

import sys
from collections.abc import Callable


class UserError(ValueError):
    """A mistake the user can mend: names the file, field or value and says what would be right."""


def run_cli(main: Callable[[list[str]], int | None], argv: list[str] | None = None) -> int:
    """Runs a command: a ``UserError`` becomes one sentence on stderr and exit status 2.

    Args:
        main: Takes the arguments after the program name; returns an exit status (``None`` is 0).
        argv: Arguments; defaults to ``sys.argv[1:]``.

    Returns:
        The process exit status: 0 done, 2 for a user's mistake. Other exceptions keep their traceback.
    """
    try:
        return main(sys.argv[1:] if argv is None else argv) or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
