"""``gr-recommend RUN``: a user's history, what they would be shown, and where the truth ranks; or a file for many."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gr.errors import Parser, UserError, run_cli

if TYPE_CHECKING:
    from gr.inference.recommend import Recommendations

SHOWN = 10  # events of the history


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parse = Parser(prog="gr-recommend", description="Shows what a trained run recommends.", allow_abbrev=False)
    parse.add_argument("run", metavar="RUN", help="run folder, such as runs/NAME, or its name")
    whom = parse.add_mutually_exclusive_group()
    whom.add_argument("--user", metavar="ID", help="a user of the log (default: the first with a held-out event)")
    whom.add_argument("--history", metavar="LIST", help='titles or ids, oldest first: "Alien; id:318; Heat"')
    whom.add_argument("--users", metavar="WHO", help="all, a file with one id a line, or ids with commas; with --out")
    parse.add_argument("--out", metavar="FILE", help="with --users: the Parquet file of user_id, items and scores")
    parse.add_argument("--titles", action="store_true", help="with --users: writes titles, too")
    parse.add_argument("--k", type=int, default=10, help="how many items to show (10)")
    parse.add_argument("--at", metavar="TIME", help="as of this time: seconds since 1970 or 2001-05-03T18:30 (UTC)")
    parse.add_argument(
        "--whole-history",
        dest="whole",
        action="store_true",
        help="the history is all that the log has of a user, held-out events too, as a service would have it",
    )
    seen = parse.add_mutually_exclusive_group()
    seen.add_argument(
        "--include-seen",
        dest="include_seen",
        action="store_true",
        default=None,
        help="items of the history may be shown (default: as the run was evaluated)",
    )
    seen.add_argument("--exclude-seen", dest="include_seen", action="store_false", help="they may not")
    parse.add_argument("--cache", metavar="DIR", help="where prepared data are kept (default: as in the config)")
    parse.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cpu or cuda (cpu)")
    return parse


def main(argv: list[str]) -> int:
    """Parses, loads, asks, prints."""
    args = parser().parse_args(argv)
    import torch
    from rich.console import Console

    from gr.inference.load import load_run
    from gr.inference.lookup import parse_time
    from gr.inference.recommend import recommend

    at = None if args.at is None else parse_time(args.at)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device is cuda, and this machine has no CUDA device; use cpu")
    if args.k < 1:
        raise UserError(f"--k is {args.k}; it must be at least 1")
    if (args.users is None) != (args.out is None):
        raise UserError("--users and --out go together: many users' recommendations are written to a file")
    if args.titles and args.users is None:
        raise UserError("--titles goes with --users; recommendations for one user show titles anyway")
    if args.out is not None and not Path(args.out).resolve().parent.is_dir():
        raise UserError(f"--out {args.out} cannot be written: its folder does not exist")
    if args.whole and args.history is not None:
        raise UserError("--whole-history is about users of the log; a typed history is whole as it is")
    loaded = load_run(args.run, args.cache, args.device)
    if args.users is not None:
        return _write(loaded, args, at)
    history = None if args.history is None else [part.strip() for part in args.history.split(";")]
    if args.user is None and history is None:
        args.user = loaded.store.user_ids[int(loaded.split.test.user[0])].as_py()
    found = recommend(
        loaded, user=args.user, history=history, k=args.k, at=at, include_seen=args.include_seen, whole=args.whole
    )
    show(found, Console(highlight=False), loaded.store.manifest.get("caveats", []))
    return 0


def _write(loaded: Any, args: argparse.Namespace, at: int | None) -> int:
    from gr.inference.batch import find_users, recommend_all

    if at is not None:
        loaded.store.require_times("a recommendation at a given time")
    users = find_users(loaded, args.users)
    options = {"k": args.k, "at": at, "include_seen": args.include_seen, "titles": args.titles, "whole": args.whole}
    empty = recommend_all(loaded, users, args.out, **options)
    print(f"{args.out}: {len(users):,} users, up to {args.k} items each")
    if empty:
        print(f"{empty:,} of them had no event before --at, so their lists are empty")
    return 0


def show(found: Recommendations, console: Any, caveats: list[str]) -> None:
    """Prints recommendations; titles are printed as they are, never read as markup."""
    from rich.text import Text

    console.print()
    console.print(Text(f"User {found.user}" if found.user is not None else "Your history", style="bold"))
    console.print(_history(found))
    console.print()
    console.print(Text("Recommended", style="bold"))
    if found.rows:
        console.print(_rows(found))
    else:
        console.print(Text("  nothing: every item is in the history; --include-seen shows them", style="dim"))
    if found.held_out is not None:
        console.print()
        console.print(_verdict(found.held_out))
    for note in [*found.notes, *(f"Caveat: {caveat}" for caveat in caveats)]:
        console.print(Text(note, style="dim"))
    console.print()


def _grid(*columns: tuple[str, dict[str, Any]]) -> Any:
    from rich.table import Table

    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0), pad_edge=False)
    for _, options in columns:
        table.add_column(**options)
    return table


def _history(found: Recommendations) -> Any:
    from rich.text import Text

    from gr.inference.lookup import show_span

    table = _grid(("title", {"overflow": "fold"}), ("time", {"style": "dim", "no_wrap": True}))
    hidden = len(found.history) - SHOWN
    if hidden > 0:
        table.add_row(Text(f"  … {hidden} earlier", style="dim"), "")
    for event in found.history[-SHOWN:]:
        ago = "" if event.ago is None else "same moment" if event.ago == 0 else f"{show_span(event.ago)} before"
        table.add_row(Text(f"  {event.title}"), ago)
    return table


def _rows(found: Recommendations) -> Any:
    from rich.text import Text

    table = _grid(
        ("rank", {"justify": "right", "style": "dim", "min_width": 4}),
        ("title", {"overflow": "fold"}),
        ("score", {"justify": "right", "style": "dim"}),
        ("mark", {"no_wrap": True}),
    )
    for row in found.rows:
        mark = "← came next" if row.held_out else "seen" if row.seen else ""
        style = "bold green" if row.held_out else ""
        table.add_row(
            str(row.rank),
            Text(row.title, style=style),
            f"{row.score:.3f}",
            Text(mark, style="green" if row.held_out else "dim"),
        )
    return table


def _verdict(held_out: Any) -> Any:
    from rich.text import Text

    return Text.assemble(
        "What came next (",
        held_out.part,
        "): ",
        (held_out.title, "bold"),
        ", ranked ",
        (f"{held_out.rank:,g}", "bold"),
        f" of {held_out.candidates:,}.",
    )


def cli() -> int:
    """Console entry point."""
    return run_cli(main)
