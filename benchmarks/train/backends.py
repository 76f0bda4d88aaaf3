"""Trains one config through several backends of HSTU attention and compares the losses, step by step.

    TRITON_INTERPRET=1 python -m benchmarks.train.backends [--data ml-100k.zip] [--config configs/ml-100k_hstu.yaml]
        [--backends triton reference] [--steps 50] [--part.field value ...] [--out FOLDER/NAME.md]

Every backend is compared with ``cpu``. All get the same data, first weights, batches and optimizer, in float32 and with
dropout 0 (dropout draws in another order would be another function); they differ in attention alone, forward and
backward. Nothing is evaluated, nothing is saved. Without a GPU the triton backend runs in Triton's interpreter, with
tiles of 128 by 128: it is slow by the program, not by the product.

The limit is a relative difference of ``LIMIT`` in every step's loss. Why not 0: sums are made in another order, and
Adam divides by the size of gradients, so that an entry whose gradient is all rounding moves by a whole step. The
definition (``reference``) against ``cpu``, two forms that are both right, shows how much that is.

Exit status 1 if a loss differs by more.
"""

from __future__ import annotations

import contextlib
import sys
from argparse import RawDescriptionHelpFormatter
from pathlib import Path

import numpy as np

from benchmarks.train.ml1m import Bench
from gr import config as configs
from gr.errors import Parser, UserError, run_cli
from gr.kernels.hstu_attention import op, triton_tiles
from gr.kernels.hstu_attention.triton_tiles import Tile
from gr.training.environment import describe
from gr.training.run_config import RunConfig

ROOT = Path(__file__).resolve().parents[2]
AGAINST = "cpu"
LIMIT = 1e-5
EXACT = ["--model.encoder.dropout", "0", "--model.preprocessor.dropout", "0", "--train.precision", "fp32"]
TILE = Tile(128, 128, 4, 1)


def losses(config: RunConfig, backend: str, steps: int) -> np.ndarray:
    """``(steps,)`` mean loss of each step's batch; ``config`` names the backend."""
    seen = []
    with contextlib.ExitStack() as stack:
        if backend == "triton":
            for kernel in triton_tiles.KERNELS:
                stack.enter_context(triton_tiles.forced(kernel, TILE))
        bench = Bench(config, ["hstu"])
        learner, loader = bench.learner("hstu"), bench.loader
        for number in range(steps):
            batch = loader.batch(*divmod(number, loader.num_batches(0)), number)
            total, weight = learner.train(lambda batch=batch: batch, number).sums[:2].tolist()
            seen.append(total / weight)
            print(f"{backend} {number + 1}/{steps} {seen[-1]:.7f}", flush=True)
    return np.array(seen)


def main(argv: list[str]) -> int:
    parser = Parser(
        prog="python -m benchmarks.train.backends",
        description=__doc__,
        formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--data", help="the data set's file, for instance GroupLens' ml-100k.zip")
    parser.add_argument("--config", default=str(ROOT / "configs" / "ml-100k_hstu.yaml"))
    parser.add_argument("--backends", nargs="+", choices=op.BACKENDS, default=["triton", "reference"])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--out", type=Path, help="a Markdown file")
    options, overrides = parser.parse_known_args(argv)
    if options.steps < 1:
        raise UserError(f"--steps must be at least 1, got {options.steps}")
    if options.out and not options.out.resolve().parent.is_dir():
        raise UserError(f"--out: there is no folder for {options.out}")
    environment = describe(["benchmarks.train.backends", *argv])
    found = {}
    for backend in (AGAINST, *options.backends):
        data = ["--data.path", options.data] if options.data else []
        given = [*data, *EXACT, "--model.encoder.backend", backend, *overrides]
        config = configs.load(RunConfig, Path(options.config), given)
        found[backend] = losses(config, backend, options.steps)
    wanted = found.pop(AGAINST)
    text = (
        f"# {config.name}, {options.steps} steps: losses of each backend against `{AGAINST}`\n\n"
        f"Commit {environment.get('git_commit', 'unknown')}, triton {environment.get('triton')}, torch "
        f"{environment['torch']}; float32, dropout 0; overrides: {' '.join(overrides) or 'none'}. Loss of `{AGAINST}`: "
        f"{wanted[0]:.6f} at the first step, {wanted[-1]:.6f} at the last. Limit: {LIMIT:g} relative, each step.\n\n"
        "| backend | first loss | last loss | largest relative difference | at step | verdict |\n" + "|---" * 6 + "|\n"
    )
    right = True
    for backend, own in found.items():
        apart = np.abs(own - wanted) / np.abs(wanted)
        good = bool(apart.max() <= LIMIT)  # NaN is not
        right &= good
        text += f"| {backend} | {own[0]:.6f} | {own[-1]:.6f} | {apart.max():.2e} | {int(apart.argmax()) + 1} | "
        text += f"{'within' if good else 'BEYOND'} |\n"
    print(text)
    if options.out:
        options.out.write_text(text, encoding="utf-8")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(run_cli(main))
