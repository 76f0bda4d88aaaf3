"""Trains one config through several backends of HSTU attention and compares the losses, step by step.

    TRITON_INTERPRET=1 python -m benchmarks.train.backends [--data ml-100k.zip] [--config configs/ml-100k_hstu.yaml]
        [--backends triton] [--steps 50] [--part.field value ...] [--out FOLDER/NAME.md]

Every backend is compared with ``cpu``. All get the same data, first weights, batches and optimizer, in float32 and with
dropout 0 (dropout draws in another order would be another function); they differ in attention alone, forward and
backward. Nothing is evaluated, nothing is saved. Without a GPU the triton backend runs in Triton's interpreter, with
tiles of 128 by 128: it is slow by the program, not by the product.

The limit of each step's relative difference is twice the largest that the definition (``reference``) has had against
``cpu`` until then, or ``LEAST``. No fixed number would do: both are right and differ in the order of sums, Adam divides
by the size of gradients, and training at a large rate amplifies what differs from step to step.

Exit status 1 if a loss differs by more.
"""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import numpy as np

from benchmarks.command import check_folder, parser_of
from benchmarks.train.ml1m import Bench
from benchmarks.written import ROOT
from gr import config as configs
from gr.errors import UserError, run_cli
from gr.kernels.hstu_attention import op, triton_tiles
from gr.kernels.hstu_attention.triton_tiles import Tile
from gr.training.environment import describe
from gr.training.run_config import RunConfig

AGAINST, CONTROL = "cpu", "reference"
LEAST = 1e-5
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


def judge(found: dict[str, np.ndarray]) -> tuple[str, bool]:
    """Markdown of every backend's losses beside those of ``AGAINST`` and ``CONTROL``, and whether all are right."""
    apart = {name: np.abs(own - found[AGAINST]) / np.abs(found[AGAINST]) for name, own in found.items()}
    limit = np.maximum(2 * np.maximum.accumulate(apart[CONTROL]), LEAST)
    text, right = "| backend | first loss | last loss | largest relative difference by step ", True
    steps = sorted({min(step, len(limit)) for step in (10, 20, 30, 40, 50, len(limit))})
    text += (
        " | ".join(map(str, steps)) + " | largest share of the limit | verdict |\n" + "|---" * (5 + len(steps)) + "|\n"
    )
    for name, own in found.items():
        share = float((apart[name] / limit).max())
        good = name in (AGAINST, CONTROL) or share <= 1  # NaN is not
        right &= good
        words = [f"{apart[name][:step].max():.1e}" for step in steps]
        verdict = {AGAINST: "compared with", CONTROL: "gives the limit"}.get(name, "within" if good else "BEYOND")
        text += f"| {name} | {own[0]:.6f} | {own[-1]:.6f} | {' | '.join(words)} | {share:.2f} | {verdict} |\n"
    return text, right


def main(argv: list[str]) -> int:
    parser = parser_of("benchmarks.train.backends", __doc__)
    parser.add_argument("--data", help="the data set's file, for instance GroupLens' ml-100k.zip")
    parser.add_argument("--config", default=str(ROOT / "configs" / "ml-100k_hstu.yaml"))
    parser.add_argument("--backends", nargs="+", choices=op.BACKENDS, default=["triton"])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--out", type=Path, help="a Markdown file")
    options, overrides = parser.parse_known_args(argv)
    if options.steps < 1:
        raise UserError(f"--steps must be at least 1, got {options.steps}")
    check_folder("--out", options.out)
    environment = describe(["benchmarks.train.backends", *argv])
    found = {}
    for backend in dict.fromkeys((AGAINST, CONTROL, *options.backends)):
        data = ["--data.path", options.data] if options.data else []
        given = [*data, *EXACT, "--model.encoder.backend", backend, *overrides]
        config = configs.load(RunConfig, Path(options.config), given)
        found[backend] = losses(config, backend, options.steps)
    text, right = judge(found)
    text = (
        f"# {config.name}, {options.steps} steps: losses of each backend against `{AGAINST}`\n\n"
        f"Commit {environment.get('git_commit', 'unknown')}, triton {environment.get('triton')}, torch "
        f"{environment['torch']}; float32, dropout 0; overrides: {' '.join(overrides) or 'none'}.\n\n{text}"
    )
    print(text)
    if options.out:
        options.out.write_text(text, encoding="utf-8")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(run_cli(main))
