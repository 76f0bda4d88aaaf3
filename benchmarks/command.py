"""The command line of a benchmark: a mistake is one sentence and status 2 (``gr.errors.run_cli``)."""

from __future__ import annotations

from argparse import RawDescriptionHelpFormatter
from pathlib import Path

from gr.errors import Parser, UserError


def parser_of(module: str, about: str | None) -> Parser:
    """What reads the arguments of ``python -m module``, whose help begins with its docstring as it stands."""
    return Parser(
        prog=f"python -m {module}",
        description=about,
        formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def check_folder(option: str, path: Path | None) -> None:
    """Refuses a file that could not be written when all is measured.

    Raises:
        UserError: Its folder does not exist.
    """
    if path is not None and not path.resolve().parent.is_dir():
        raise UserError(f"{option}: there is no folder for {path}")
