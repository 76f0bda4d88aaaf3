"""``gr-evaluate RUN``: ranks a run's checkpoint again, on another part or under another rule if asked."""

from __future__ import annotations

import argparse

from gr.errors import Parser, UserError, run_cli


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parse = Parser(
        prog="gr-evaluate",
        description="Judges a run's checkpoint beside the baselines, with intervals and slices; writes "
        "RUN/evaluations/PART-RULE/ and leaves the run's own results as they are.",
        allow_abbrev=False,
    )
    parse.add_argument("run", metavar="RUN", help="run folder, such as runs/NAME, or its name")
    parse.add_argument("--part", choices=("test", "valid"), default="test", help="which held-out events (test)")
    parse.add_argument(
        "--seen",
        choices=("keep", "mask", "window"),
        help="items a user has had: stay candidates, leave, or leave if among the events that the model reads "
        "(default: as in the run's config)",
    )
    parse.add_argument("--ks", metavar="LIST", help="cut-offs, 10 among them: 1,10,50 (default: as in the config)")
    parse.add_argument("--checkpoint", choices=("best", "last"), help="which weights (default: best, else last)")
    parse.add_argument(
        "--baselines", action=argparse.BooleanOptionalAction, default=True, help="judge them, too, tuned (yes)"
    )
    parse.add_argument("--cache", metavar="DIR", help="where prepared data are kept (default: as in the config)")
    parse.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cpu or cuda (cpu)")
    return parse


def main(argv: list[str]) -> int:
    """Returns an exit status: 0 done, 1 the leak audit found something."""
    args = parser().parse_args(argv)
    ks = None if args.ks is None else cut_offs(args.ks)
    import torch

    from gr.recipes.evaluation import evaluate
    from gr.recipes.summary import print_evaluation

    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device is cuda, and this machine has no CUDA device; use cpu")
    results, folder = evaluate(
        args.run,
        part=args.part,
        seen=args.seen,
        ks=ks,
        checkpoint=args.checkpoint,
        baselines=args.baselines,
        cache=args.cache,
        device=args.device,
    )
    print_evaluation(results, folder, ks or (10,))
    return 1 if results["audit"] else 0


def cut_offs(text: str) -> tuple[int, ...]:
    """``1,10,50`` as ascending numbers."""
    try:
        ks = tuple(sorted({int(word) for word in text.split(",")}))
    except ValueError:
        ks = ()
    if not ks or ks[0] < 1 or 10 not in ks:
        raise UserError(f"--ks is {text!r}; it must be positive numbers with 10 among them, such as 1,10,50")
    return ks


def cli() -> int:
    """Console entry point."""
    return run_cli(main)


if __name__ == "__main__":
    raise SystemExit(cli())
