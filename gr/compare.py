"""``gr-compare A B``: is one run better than another, and where?"""

from __future__ import annotations

import argparse
from pathlib import Path

from gr.errors import Parser, UserError, run_cli

ABOUT = """A and B are each RUN, RUN@EVALUATION (what gr-evaluate wrote, such as runs/x@test-mask), either with
:BASELINE (runs/x:item_knn), or several seeds of one model with commas between them: their mean by target."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parse = Parser(
        prog="gr-compare",
        description=f"Compares two rankings of the same targets by a paired bootstrap over users. {ABOUT}",
        allow_abbrev=False,
    )
    parse.add_argument("a", metavar="A")
    parse.add_argument("b", metavar="B")
    parse.add_argument("--metric", default="ndcg@10", help="hr@K, ndcg@K or mrr (ndcg@10)")
    parse.add_argument("--slices", action="store_true", help="also by history, popularity and repeats; reads the log")
    parse.add_argument("--samples", type=int, default=10_000, help="bootstrap samples (10000)")
    parse.add_argument("--json", metavar="FILE", help="writes the whole result there")
    parse.add_argument("--cache", metavar="DIR", help="where prepared data are kept (default: as in the config)")
    return parse


def main(argv: list[str]) -> int:
    """Parses, compares, prints."""
    args = parser().parse_args(argv)
    if args.samples < 100:
        raise UserError(f"--samples is {args.samples}; it must be at least 100")
    from gr.files import write_json
    from gr.recipes.comparison import compare_runs
    from gr.recipes.summary import print_comparison

    found = compare_runs(args.a, args.b, args.metric, args.slices, args.samples, args.cache)
    print_comparison(found)
    if args.json:
        try:
            write_json(Path(args.json), found)
        except OSError as error:
            raise UserError(f"--json {args.json} cannot be written: {error.strerror}") from None
    return 0


def cli() -> int:
    """Console entry point."""
    return run_cli(main)


if __name__ == "__main__":
    raise SystemExit(cli())
