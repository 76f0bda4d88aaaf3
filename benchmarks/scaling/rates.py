"""Learning rates of a study's models, on its log's validation targets: the same grid for every model.

    python -m benchmarks.scaling.rates STUDY.yaml --cells 3:1e11 6:1e11 [--rates 0.002 0.004 0.008 0.016]
        [--json OUT.jsonl]

A cell is SCALE:BUDGET. Each run is the study's own (recipe, batch, steps, schedule, seed 0) but for its peak rate, and
is judged by the cross-entropy of the validation targets over the whole catalogue; no test target is looked at. Prints
a row a run and the best rate of each cell; one at an end of the grid is said to be so.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
import time
from pathlib import Path

from benchmarks.written import append_row
from gr import config as configs
from gr.distributed.process import process
from gr.scaling.design import Cell, load_study
from gr.scaling.judge import cross_entropy
from gr.scaling.plan import Bench, open_bench, plan_run
from gr.training.assemble import assemble, sample_targets, train_loader
from gr.training.environment import commit_label, git_state
from gr.training.phase import Phase
from gr.training.run_config import RunConfig
from gr.training.run_folder import claim
from gr.training.trainer import Trainer


def valid_loss(config: RunConfig, bench: Bench, users: int) -> float:
    """Trains and judges by the validation targets."""
    assert bench.split.valid is not None, "a study that is tuned needs a split with validation targets"
    with process("cpu") as ctx, tempfile.TemporaryDirectory() as folder:
        config = dataclasses.replace(config, name="rate", runs=folder)
        run = Path(folder) / "rate"
        claim(run, config, ["rates"], bench.store)
        model = assemble(config, bench.store, bench.split)
        loader = train_loader(config, bench.store, bench.split, ctx)
        Trainer(model, [Phase("train")], loader, None, config.train, ctx, run, config.seed).fit()
        model.eval()
        targets = sample_targets(bench.split.valid, users)
        return float(cross_entropy(config, ctx, bench.store, targets, model).mean())


def main() -> None:
    """Command line."""
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument("study")
    parse.add_argument("--cells", nargs="+", required=True, metavar="SCALE:BUDGET")
    parse.add_argument("--rates", nargs="+", type=float, default=[0.002, 0.004, 0.008, 0.016])
    parse.add_argument("--variants", nargs="+")
    parse.add_argument("--json", type=Path)
    args, rest = parse.parse_known_args()
    study, path = load_study(args.study, rest)
    for name in args.variants or study.variants:
        bench = open_bench(study, path, name)
        for cell in args.cells:
            scale, budget = (float(x) for x in cell.split(":"))
            spec = plan_run(study, bench, Cell(scale=scale, budget=budget), 0, limited=False)
            base = configs.from_dict(RunConfig, spec.config, str(path))
            seen = {}
            for rate in args.rates:
                optimizer = dataclasses.replace(base.train.optimizer, lr=rate)
                config = dataclasses.replace(base, train=dataclasses.replace(base.train, optimizer=optimizer))
                began = time.perf_counter()
                seen[rate] = valid_loss(config, bench, study.judging.users)
                row = {"variant": name, "scale": scale, "width": config.model.dim, "budget": budget, "lr": rate,
                       "steps": spec.planned["steps"], "valid_loss": seen[rate], "data_hash": spec.data_hash[:12],
                       "seconds": round(time.perf_counter() - began, 1), "code": commit_label(git_state())}  # fmt: skip
                print(json.dumps(row), flush=True)
                if args.json:
                    append_row(args.json, row)
            best = min(seen, key=lambda rate: seen[rate])
            end = ", an end of the grid" if best in (args.rates[0], args.rates[-1]) else ""
            print(f"{name} scale {scale:g} at {budget:g}: best {best:g}{end}", flush=True)


if __name__ == "__main__":
    main()
