"""Does one run of a study: ``python -m gr.scaling.worker RUN_FOLDER``. The same command again resumes."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from gr import config as configs
from gr import flops
from gr.data.split import Split, Targets
from gr.data.store import EventStore
from gr.distributed.process import ProcessContext, process
from gr.errors import STOPPED, Diverged, OutOfMemory, UserError, run_cli
from gr.files import write_json
from gr.models.retrieval import RetrievalModel
from gr.scaling.judge import judge, loss_floor
from gr.scaling.plan import eval_hash, judged_targets, matrix_parameters
from gr.scaling.store import RunDir, RunSpec, read_json
from gr.training.assemble import assemble, open_data, train_loader
from gr.training.environment import commit_label, describe
from gr.training.phase import Phase
from gr.training.run_config import RunConfig
from gr.training.run_folder import RunFolder, claim
from gr.training.trainer import Trainer

DIVERGED_RATIO = 1.5  # of the first logged training loss
TOO_LARGE = "out of memory"


def work(folder: Path, ctx: ProcessContext) -> str:
    """Runs the spec in a folder to its end, in this process alone.

    Returns:
        ``done``, ``diverged``, ``stopped`` (saved; the same call goes on), ``out of memory`` (the same call tries with
        smaller parts of its batches, which learn the same) or ``failed`` (see error.json).
    """
    run = RunDir(folder)
    spec = run.spec()
    with run.heartbeat():
        try:
            return _work(run, spec, ctx)
        except Exception as error:
            if isinstance(error, OutOfMemory) and _divide(run, spec):
                return TOO_LARGE
            last = traceback.format_exc().strip().splitlines()[-3:]
            message = str(error) if isinstance(error, UserError) else " | ".join(line.strip() for line in last)
            run.write_error(type(error).__name__, message)
            if not isinstance(error, UserError):
                traceback.print_exc()
            return "failed"


def _divide(run: RunDir, spec: RunSpec) -> bool:
    """Has the next attempt take a step's sequences in twice as many parts (an odd number of them: in as few as divide
    it), so that it learns from the same sequences in the same order; False where one at a time did not fit, or where
    a part would learn something else: in_batch takes its negatives from it."""
    train = spec.config["train"]
    if spec.config["objective"]["kind"] == "in_batch":
        return False
    now = run.batches() or {"batch_size": train["batching"]["batch_size"], "accumulate": train["accumulate"]}
    size = now["batch_size"]
    parts = next((p for p in range(2, size + 1) if size % p == 0), None)
    if parts is None:
        return False
    shutil.rmtree(run.model, ignore_errors=True)  # begun with other batches; first, for a death between the two
    run.write_batches(size // parts, now["accumulate"] * parts)
    return True


def _config(run: RunDir, spec: RunSpec) -> RunConfig:
    """The spec's, in this folder, with batches that fit."""
    config = configs.from_dict(RunConfig, spec.config, str(run.spec_file))
    fits = run.batches()
    if fits is not None:
        batching = dataclasses.replace(config.train.batching, batch_size=fits["batch_size"])
        train = dataclasses.replace(config.train, batching=batching, accumulate=fits["accumulate"])
        config = dataclasses.replace(config, train=train)
    return dataclasses.replace(config, name=run.model.name, runs=str(run.path))


def _work(run: RunDir, spec: RunSpec, ctx: ProcessContext) -> str:
    config = _config(run, spec)
    store, split = open_data(config)
    _same_data(config, store, split, spec)
    claim(run.model, config, ["gr-scaling", "run", spec.study], store)
    model = assemble(config, store, split)
    loader = train_loader(config, store, split, ctx)
    trainer = Trainer(model, [Phase("train")], loader, None, config.train, ctx, run.model, config.seed)
    try:
        trained = trainer.fit()
    except Diverged as diverged:
        run.write_result(_record(spec, ctx, model, trainer, 0.0, diverged.reason, {}, None))
        return "diverged"
    if trained.status == "stopped":
        return "stopped"
    begin = time.perf_counter()
    targets = judged_targets(split, spec.judging["users"])
    metrics = judge(config, ctx, store, targets, model, spec.judging["ks"])
    judged = time.perf_counter() - begin
    reason = _went_up(RunFolder(run.model).metrics)
    run.write_result(
        _record(spec, ctx, model, trainer, judged, reason, metrics, _floor(run, spec, config, store, targets))
    )
    return "diverged" if reason else "done"


def _same_data(config: RunConfig, store: EventStore, split: Split, spec: RunSpec) -> None:
    found = store.manifest["content_hash"]
    if found != spec.data_hash:
        raise UserError(
            f"run {spec.run_id} was planned on a log of content {spec.data_hash[:12]}, here it is {found[:12]}; "
            "plan the study again"
        )
    judged = eval_hash(config, split, spec.judging["users"], spec.judging["ks"], found)
    if judged != spec.eval_hash:
        raise UserError(
            f"run {spec.run_id} was planned to be judged on {spec.eval_hash}, here it would be on {judged}; "
            "plan the study again"
        )


def _floor(run: RunDir, spec: RunSpec, config: RunConfig, store: EventStore, targets: Targets) -> float | None:
    """``loss_floor``, which is the same for every run that is judged alike: the first to need it writes it down."""
    known = run.path.parent.parent / f"floor_{spec.eval_hash}.json"
    found = read_json(known)
    if isinstance(found, dict) and "loss" in found:
        return found["loss"]
    floor = loss_floor(config, store, targets)
    write_json(known, {"loss": floor})
    return floor


def _went_up(metrics: Path) -> str | None:
    """Why a finished run counts as diverged, or ``None``."""
    losses = [line["loss"] for line in map(json.loads, metrics.read_text().splitlines()) if "loss" in line]
    if losses and losses[-1] > DIVERGED_RATIO * losses[0]:
        return f"the training loss rose from {losses[0]:.3f} to {losses[-1]:.3f}"
    return None


def _record(
    spec: RunSpec,
    ctx: ProcessContext,
    model: RetrievalModel,
    trainer: Trainer,
    judge_seconds: float,
    reason: str | None,
    metrics: dict[str, float],
    floor: float | None,
) -> dict[str, Any]:
    """What ``result.json`` holds."""
    total = trainer.state.total
    device = torch.cuda.get_device_name(ctx.device) if ctx.device.type == "cuda" else "cpu"
    peak = flops.device_peak_flops(device, "bf16" if trainer.config.precision == "bf16" else "tf32")
    about = describe(["gr-scaling", "run", spec.study])
    return {
        "status": "diverged" if reason else "done",
        "reason": reason,
        "measured": {
            "steps": total.steps,
            "tokens": total.tokens,
            "pairs": total.pairs,
            "model_flops": total.model_flops,
            "train_loss": total.mean_loss,
            "loss_floor": floor,
            **_shares(model, total.tokens, total.pairs, total.forward_flops),
            **_parameters(model),
        },
        "metrics": metrics,
        "code": commit_label(about),
        "timings": {
            "train_seconds": total.seconds,
            "judge_seconds": judge_seconds,
            "tokens_per_s": total.tokens_per_s,
            "mfu": flops.utilisation(total.model_flops, total.seconds, peak, 1),
            "device": device,
            "batch_size": trainer.config.batching.batch_size,
            "accumulate": trainer.config.accumulate,
        },
        "env": {name: about.get(name) for name in ("python", "torch", "cpu", "threads", "cuda", "platform")},
    }


def _shares(model: RetrievalModel, tokens: int, pairs: int, forward: int) -> dict[str, int]:
    """Model FLOPs of the encoder's products, of attention, and of the scores."""
    parts = model.encoder.forward_flops(tokens, pairs)
    attention = sum(count for name, count in parts.items() if name.startswith("attention"))
    inside = sum(parts.values())
    return {
        "flops_dense": flops.training_flops(inside - attention),
        "flops_attention": flops.training_flops(attention),
        "flops_head": flops.training_flops(forward - inside),
    }


def _parameters(model: RetrievalModel) -> dict[str, int]:
    """Counts by group; the analyst says which of them is N."""
    dense = sum(p.numel() for p in model.dense_parameters())
    return {
        "n_encoder": matrix_parameters(model.encoder),
        "n_dense": dense,
        "n_sparse": sum(p.numel() for p in model.table_parameters()),
        "bytes_per_lookup": model.cfg.dim * 4,
    }


@contextlib.contextmanager
def _no_log() -> Iterator[None]:
    """A run in the driver's own process says nothing of its steps."""
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        yield


def work_here(folder: Path, device: str = "auto") -> str:
    """``work`` in this process."""
    state = TOO_LARGE
    with process(device) as ctx, _no_log():
        while state == TOO_LARGE:
            state = work(folder, ctx)
    return state


def main(argv: list[str]) -> int:
    """Exit status: 0 done or diverged, 3 stopped and saved, 1 failed."""
    if len(argv) != 1:
        raise UserError("usage: python -m gr.scaling.worker RUN_FOLDER")
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.default_int_handler)
    device = RunDir(Path(argv[0])).spec().config["device"]
    try:
        with process(device) as ctx:
            state = work(Path(argv[0]), ctx)
    except KeyboardInterrupt:
        state = "stopped"  # outside of training: what is done is on disk
    print(state, flush=True)
    if state == TOO_LARGE:  # in a process whose memory is whole
        os.execv(sys.executable, [sys.executable, "-m", "gr.scaling.worker", *argv])
    return {"done": 0, "diverged": 0, "stopped": STOPPED}.get(state, 1)


if __name__ == "__main__":
    sys.exit(run_cli(main))
