"""The trainer: phases in order, epochs in a phase, steps in an epoch; saves, evaluates, stops and resumes
exactly.

A resumed run is bit-identical to an undisturbed one: batches are functions of (seed, epoch, index, step),
torch is reseeded at every step, and a checkpoint holds everything else. (On three or more ranks the order in
which gradients are summed may change after a resume, and on a GPU some kernels add in no fixed order: there,
equal to rounding.)
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from gr.config import config_hash
from gr.data.batch import JaggedBatch
from gr.distributed.config import DenseConfig
from gr.distributed.engine import Engine
from gr.distributed.engines import make_engine
from gr.distributed.process import ProcessContext, broadcast_object, gather_integers, main_only_errors
from gr.errors import Diverged, OutOfMemory, UserError
from gr.kernels.native import has_bf16_units
from gr.training.checkpoint import STATE, find_checkpoint, load_torch, set_aside
from gr.training.config import TrainConfig
from gr.training.guard import Taken, keep_evidence
from gr.training.log import MetricsLog
from gr.training.optimizer import make_optimizer, set_lr, split_parameters
from gr.training.phase import Phase, StepContext
from gr.training.prefetch import prefetch
from gr.training.progress import Progress, format_time
from gr.training.run_folder import RunFolder, read_hash
from gr.training.saver import Saver
from gr.training.schedule import check_schedule, lr_factor
from gr.training.signals import Interrupted, StopSignal
from gr.training.state import Best, Counts, TrainState
from gr.training.step import run_step
from gr.training.watch import Waited, Watch
from gr.training.weights import State, gather, load_weights, own_tables, restore, write_best, write_step

FORMAT = 1
_SYNC_EVERY_STEPS = 16
"""On a GPU losses and stop flags are read this often: reading them at each step would leave it idle."""

Evaluate = Callable[[nn.Module], dict[str, float]]


class Loader(Protocol):
    """What the trainer asks of a loader; both methods are pure."""

    def num_batches(self, epoch: int) -> int:
        """Batches in an epoch, the same on every rank."""
        ...

    def batch(self, epoch: int, index: int, step: int) -> JaggedBatch:
        """This rank's share of a global batch, with negatives keyed by the optimizer step."""
        ...


@dataclass(frozen=True)
class TrainResult:
    """How training ended.

    Attributes:
        status: "done", or "stopped" by a signal (saved; the same command resumes).
        step: Optimizer steps done.
        epochs: Epochs completed in the last phase.
        best_step: Step of the weights in ``best.pt``.
        best_metrics: Their validation metrics; empty without validation.
        loss: Mean loss per label over the whole run.
        total: Exact counts over the whole run, including time before a resume.
    """

    status: str
    step: int
    epochs: int
    best_step: int
    best_metrics: dict[str, float]
    loss: float
    total: Counts

    @property
    def seconds(self) -> float:
        """Time in the step loop, without evaluation and saving."""
        return self.total.seconds

    @property
    def tokens_per_s(self) -> float:
        """Tokens per second of that time, all ranks together."""
        return self.total.tokens_per_s

    @property
    def model_flops(self) -> int:
        """Three times the forward FLOPs of everything learned from; 0 if the model does not count them."""
        return self.total.model_flops


@dataclass
class _PhaseRun:
    """A phase while it runs."""

    phase: Phase
    engine: Engine
    counts: list[int]
    total_steps: int


class Trainer:
    """Trains a model through a list of phases.

    After ``fit`` ends with status "done" the model holds the weights of ``best.pt``: the best on validation
    where ``early_stopping`` selects, the last ones otherwise.

    Args:
        model: ``forward(batch) -> Losses``. Optional: ``table_parameters()``, ``step_cost(batch)`` (an object
            with integers ``tokens``, ``pairs``, ``forward_flops``), ``blocks()``, ``find_unused_parameters``.
        phases: At least one.
        loader: Training batches.
        evaluate: ``bare model -> metrics``, called in eval mode without gradients on every rank; ``None``: no
            validation.
        config: How to train.
        ctx: Rank, world and device.
        run_dir: Where files go; every rank must see it (rank 0 writes, all read on resume).
        seed: Of everything drawn in training.
        dense: How processes share what is not a table; ``None``: each has all of it.
    """

    def __init__(
        self,
        model: nn.Module,
        phases: Sequence[Phase],
        loader: Loader,
        evaluate: Evaluate | None,
        config: TrainConfig,
        ctx: ProcessContext,
        run_dir: str | Path,
        seed: int,
        dense: DenseConfig | None = None,
    ) -> None:
        assert phases, "training needs a phase"
        if config.early_stopping is not None and evaluate is None:
            raise UserError("early_stopping is set but the split has no validation targets; set early_stopping: null")
        if own_tables(model) is not None:
            _check_own_tables(model.tables, config)
        self.dense = dense or DenseConfig()
        self.dense.check(config.accumulate, config.compile)
        self.model = model.to(ctx.device)
        self.phases = list(phases)
        self.loader = loader
        self.evaluate = evaluate
        self.config = config
        self.ctx = ctx
        self.folder = RunFolder(Path(run_dir))
        self.seed = seed
        self.state = TrainState()
        self._stop = StopSignal()
        self._stopping = False
        self._pending: list[Taken] = []
        self._mark = 0.0
        self._grad_norm = 0.0
        self._watch, self._waited = Watch(ctx, config.precision == "bf16"), Waited()
        self._best_due: tuple[int, dict[str, float]] | None = None
        self._saver = Saver(ctx, background=False)
        self._log: MetricsLog | None = None
        self._progress = Progress(enabled=ctx.is_main)
        self._optimizer_state: dict[str, Any] | None = None
        names = "/".join(phase.name for phase in self.phases)
        self._fingerprint = hashlib.sha256(f"{config_hash(config)}/{seed}/{names}".encode()).hexdigest()[:12]

    def fit(self) -> TrainResult:
        """Trains from the last checkpoint, or from the model as it is, to the end.

        Returns:
            The result; on every rank the same.

        Raises:
            UserError: Non-finite loss, no training batch, a checkpoint that cannot be written or read.
        """
        with contextlib.ExitStack() as stack:
            with main_only_errors(self.ctx) as main:
                if main:
                    stack.enter_context(self.folder.lock())
            self._stop = stack.enter_context(StopSignal())
            # Copies of shards that lie on a GPU have not been tried: there the save is waited for.
            untried = self.ctx.device.type == "cuda" and getattr(own_tables(self.model), "sharded", False)
            self._saver = stack.enter_context(Saver(self.ctx, self.config.checkpoint_async and not untried))
            stack.callback(self._progress.close)
            stack.enter_context(_kept_requires_grad(self.model))
            self._stopping = False
            self._pending.clear()
            self._best_due = None
            self._resume()
            with main_only_errors(self.ctx) as main:
                if main:
                    events = self.folder.tensorboard if self.config.tensorboard else None
                    self._log = MetricsLog(self.folder.metrics, events, self.state.step, self._progress.note)
                    stack.callback(self._log.close)
            if self.config.precision == "bf16" and self.ctx.device.type == "cpu" and not has_bf16_units():
                self._progress.note(
                    "this processor multiplies bfloat16 more slowly than float32; precision fp32 is faster"
                )
            if self.config.compile:
                self.model.compile(dynamic=True)
            while self.state.phase < len(self.phases):
                if not self._run_phase():
                    self._saver.wait()
                    self._progress.note(f"saved at step {self.state.step}; the same command resumes")
                    return self._result("stopped")
            self._saver.wait()
            self._load_best()
            return self._result("done")

    # Phases and epochs --------------------------------------------------------------------------------------

    def _run_phase(self) -> bool:
        """Runs the current phase to its end; False if stopped (and saved) before."""
        state, config = self.state, self.config
        run = self._begin_phase()
        self._progress.start(run.phase.name, state.phase_step, run.total_steps)
        while state.phase_step < run.total_steps or state.index > 0:
            self._run_epoch(run)
            if self._stopping:
                return self._stop_phase(run)
            if state.total.weight <= 0:
                raise UserError(
                    f"epoch {state.epoch + 1} held no label to learn from; the log needs users with two training events"
                )
            last = state.phase_step >= run.total_steps
            due = last or (state.epoch + 1) % config.evaluate_every_epochs == 0
            if self.evaluate is not None and due and not self._evaluate(run):
                return self._stop_phase(run)
            state.epoch, state.index = state.epoch + 1, 0
            if last or state.best.exhausted(config.early_stopping):
                break
            self._save(run.engine)
        self._end_phase(run)
        return True

    def _stop_phase(self, run: _PhaseRun) -> bool:
        self._save(run.engine)
        run.engine.close()
        return False

    def _begin_phase(self) -> _PhaseRun:
        state, config = self.state, self.config
        phase = self.phases[state.phase]
        chosen = list(phase.parameters(self.model))
        assert chosen, f"phase {phase.name} trains no parameter"
        learning = {id(parameter) for parameter in chosen}
        for parameter in self.model.parameters():
            parameter.requires_grad_(id(parameter) in learning)
        counts = [self.loader.num_batches(epoch) for epoch in range(phase.epochs or config.epochs)]
        limit = phase.max_steps or config.max_steps
        total_steps = sum(-(-count // config.accumulate) for count in counts)
        total_steps = total_steps if limit is None else min(total_steps, limit)
        if total_steps == 0:
            raise UserError("the training data gives no batch; the log needs users with at least two training events")
        check_schedule(total_steps, config.schedule)
        if state.phase_step == 0 and phase.hooks.before_phase is not None:
            phase.hooks.before_phase(self.model)
        dense, tables = split_parameters(self.model, chosen)
        if own_tables(self.model) is not None:
            tables = []
            if not dense:
                raise UserError(f"phase {phase.name} trains tables alone; tables that own their optimizer need others")
        engine = make_engine(
            self.dense,
            self.model,
            dense,
            tables,
            partial(make_optimizer, cfg=config.optimizer),
            self.ctx,
            clip_norm=config.clip_norm,
            accumulate=config.accumulate > 1,
        )
        if self._optimizer_state is not None:
            engine.load_state_dict(self._optimizer_state)
            self._optimizer_state = None
        return _PhaseRun(phase, engine, counts, total_steps)

    def _end_phase(self, run: _PhaseRun) -> None:
        """Keeps the phase's weights (the best, where they are selected) and moves on to the next phase."""
        state = self.state
        run.engine.close()
        if self.evaluate is None:
            state.best.update(state.step, {}, None)
            self._best_due = (state.step, {})
        elif self.config.early_stopping is not None and self._best_due is None:
            self._saver.wait()
            self._load_best()
        state.phase += 1
        state.window = Counts()
        self._watch.line()
        if state.phase < len(self.phases):
            state.phase_step = state.epoch = state.index = 0
            state.best = Best()
        self._save(None)

    def _run_epoch(self, run: _PhaseRun) -> None:
        """Steps until the epoch or the phase ends, or a stop is asked for."""
        state, config = self.state, self.config
        count = run.counts[state.epoch]
        if state.index == 0 and run.phase.hooks.before_epoch is not None:
            with run.engine.whole():
                run.phase.hooks.before_epoch(self.model, state.epoch)
        self.model.train()
        run.engine.model.train()
        stop = min(count, state.index + (run.total_steps - state.phase_step) * config.accumulate)
        first, step, epoch = state.index, state.step, state.epoch
        keys = ((epoch, i, step + (i - first) // config.accumulate) for i in range(first, stop))
        sync_every = min(_sync_every(self.ctx.device), config.log_every_steps)
        self._mark = time.perf_counter()
        with prefetch(self._make_batch, keys) as made:
            batches = self._waited.over(made)
            while state.index < stop and not self._stopping:
                self._step(run, batches, min(config.accumulate, count - state.index))
                over = state.index == stop
                if over or state.step % sync_every == 0 or state.step % config.log_every_steps == 0:
                    self._flush(run)
                if state.step % config.log_every_steps == 0 or state.phase_step == run.total_steps:
                    self._flush(run)
                    self._write_line(run)
                every = config.checkpoint_every_steps
                if every and state.step % every == 0 and not over and not self._stopping:
                    self._flush(run)
                    self._save(run.engine)
                    self._mark = time.perf_counter()

    def _make_batch(self, epoch: int, index: int, step: int) -> JaggedBatch:
        batch = self.loader.batch(epoch, index, step)
        return batch.pin_memory() if self.ctx.device.type == "cuda" else batch

    # Steps --------------------------------------------------------------------------------------------------

    def _step(self, run: _PhaseRun, batches: Iterator[JaggedBatch], num_batches: int) -> None:
        state, config = self.state, self.config
        context = StepContext(state.step, self.seed, state.epoch, run.phase.name)
        factor = lr_factor(state.phase_step, run.total_steps, config.schedule)
        set_lr(run.engine, factor)
        tables = own_tables(self.model)
        if tables is not None:
            tables.set_lr_factor(factor)
        try:
            result = run_step(
                run.engine,
                run.phase,
                islice(batches, num_batches),
                num_batches,
                context,
                self.ctx,
                bf16=config.precision == "bf16",
                step_cost=getattr(self.model, "step_cost", None),
                tables=tables,
            )
        except torch.OutOfMemoryError:
            raise OutOfMemory(
                f"out of device memory at step {state.step + 1}; lower batching.batch_size "
                "or batching.tokens_per_batch, and raise accumulate to learn from as many sequences a step"
            ) from None
        if run.phase.hooks.after_step is not None:
            with run.engine.whole():
                run.phase.hooks.after_step(self.model, context)
        state.step += 1
        state.phase_step += 1
        state.index += num_batches
        self._pending.append(Taken(context, state.index - num_batches, num_batches, result))

    def _flush(self, run: _PhaseRun) -> None:
        """Reads the steps since the last flush from the device, checks, counts; agrees on stopping."""
        pending, self._pending = self._pending, []
        if not pending:
            return
        results = [taken.result for taken in pending]
        rows = torch.stack([torch.cat([r.sums, r.grad_norm.double().reshape(1)]) for r in results]).tolist()
        spent = time.perf_counter() - self._mark
        told = self._watch.numbers([result.work for result in results], spent, self._waited)
        everybody = gather_integers([self._stop.requested, self._saver.failed, *told], self.ctx)
        stopping, failed = (sum(told[place] for told in everybody) for place in (0, 1))
        if failed:
            self._saver.wait()  # which raises on every rank what it met on one
        done = self._watch.add([told[2:] for told in everybody])
        now = time.perf_counter()
        for taken, (loss, weight, *parts, norm) in zip(pending, rows, strict=True):
            if not (math.isfinite(loss) and math.isfinite(weight) and math.isfinite(norm)):
                self._refuse(run, taken, loss / weight if weight else loss, norm)
            for counts in (self.state.window, self.state.total):
                counts.steps += 1
                counts.loss += loss
                counts.weight += weight
                for name, value in zip(taken.result.parts, parts, strict=True):
                    counts.parts[name] = counts.parts.get(name, 0.0) + value
            self._grad_norm = norm
        for counts in (self.state.window, self.state.total):
            counts.tokens += done["tokens"]
            counts.pairs += done["pairs"]
            counts.forward_flops += done["forward_flops"]
            counts.seconds += now - self._mark
        self._mark = now
        self._stopping = stopping > 0
        state, window = self.state, self.state.window
        pace = window.seconds / max(1, window.steps)
        self._progress.step(state.phase_step, run.total_steps, state.epoch, window.mean_loss, window.tokens_per_s, pace)

    def _refuse(self, run: _PhaseRun, taken: Taken, loss: float, norm: float) -> None:
        step, first, config = taken.context.step, taken.index, self.config
        batches = [self.loader.batch(taken.context.epoch, first + i, step) for i in range(taken.num_batches)]
        known = self.folder.config.exists()
        facts = {
            "bf16": config.precision == "bf16",
            "loss": loss,
            "grad_norm": norm,
            "config_hash": read_hash(self.folder.config) if known else config_hash(config),
        }
        with run.engine.whole():
            kept = keep_evidence(self.folder.diverged, self.model, run.phase, taken, batches, facts, self.ctx)
        precision = ", or use --train.precision fp32" if config.precision == "bf16" else ""
        raise Diverged(
            f"training diverged at step {step + 1}: loss {loss}, gradient norm {norm}; lower --train.optimizer.lr "
            f"(now {config.optimizer.lr}), set --train.clip_norm (now {config.clip_norm}) to 1.0{precision}",
            kept,
        )

    def _write_line(self, run: _PhaseRun) -> None:
        state, window = self.state, self.state.window
        if window.steps:
            line = {
                "step": state.step,
                "epoch": state.epoch,
                "phase": run.phase.name,
                "loss": window.mean_loss,
                "lr": run.engine.param_groups[0]["lr"],
                "grad_norm": self._grad_norm,
                "tokens_per_s": window.tokens_per_s,
                "tokens": state.total.tokens,
                "pairs": state.total.pairs,
                "model_flops": state.total.model_flops,
                "seconds": state.total.seconds,
            }
            if window.parts:
                line["parts"] = {name: value / (window.weight or 1.0) for name, value in window.parts.items()}
            line |= self._watch.line()
            self._record(line)
        state.window = Counts()

    def _record(self, line: dict[str, Any]) -> None:
        with main_only_errors(self.ctx):
            if self._log is not None:
                self._log.write(line)

    # Evaluation ---------------------------------------------------------------------------------------------

    def _evaluate(self, run: _PhaseRun) -> bool:
        """Validates and keeps the weights if they are the ones to keep; False if a stop cut it short."""
        with run.engine.whole():
            return self._evaluate_whole(run)

    def _evaluate_whole(self, run: _PhaseRun) -> bool:
        state, config = self.state, self.config
        assert self.evaluate is not None
        begin = time.perf_counter()
        self.model.eval()
        try:
            # Alone, evaluation is dropped at once on a stop and done again on resume; others would wait for us.
            with torch.no_grad(), self._stop.interruptible(self.ctx.world == 1):
                metrics = {name: float(value) for name, value in self.evaluate(self.model).items()}
        except Interrupted:
            return False
        metrics = broadcast_object(metrics, self.ctx)
        selection = config.early_stopping
        if selection is not None and not math.isfinite(metrics.get(selection.metric, math.nan)):
            known = ", ".join(f"{name} {value:g}" for name, value in metrics.items())
            raise UserError(f"early_stopping.metric {selection.metric!r} has no finite value; evaluation gave {known}")
        self._record({"step": state.step, "epoch": state.epoch, "phase": run.phase.name, "evaluation": metrics})
        state.evaluation = metrics
        kept = state.best.update(state.step, metrics, selection)
        if kept:
            self._best_due = (state.step, dict(metrics))
        brief = {selection.metric if selection else "", "hr@10", "ndcg@10"} & metrics.keys() or metrics.keys()
        shown = "  ".join(f"{name} {value:.4f}" for name, value in metrics.items() if name in brief)
        star = "  best so far" if kept and selection is not None else ""
        took = format_time(time.perf_counter() - begin)
        self._progress.note(
            f"epoch {state.epoch + 1}  step {state.step}  validation {shown}{star}  (evaluated in {took})"
        )
        return True

    # Saving and resuming ------------------------------------------------------------------------------------

    def _save(self, engine: Engine | None) -> None:
        """A checkpoint, and the weights to keep if these are they."""
        assert not self._pending, "steps must be checked before they are saved"
        header = {"format": FORMAT, "fingerprint": self._fingerprint, "state": self.state.to_dict()}
        folder, step, keep_last = self.folder, self.state.step, self.config.keep_last
        best, self._best_due = self._best_due, None

        def write(state: State, ctx: ProcessContext) -> None:
            if best is not None:
                write_best(state, folder.best, *best, ctx)
            write_step(state, folder.checkpoints, step, header, keep_last, ctx)

        with contextlib.nullcontext() if engine is None else engine.whole():
            self._saver.submit(gather(self.model, engine, self.ctx), write)

    def _load_best(self) -> None:
        finished, best = self.state.phase >= len(self.phases), self.state.best
        if finished and not broadcast_object(self.folder.best.exists(), self.ctx):
            # Removed by hand; a finished run's last checkpoint holds the same weights.
            write_best(gather(self.model, None, self.ctx), self.folder.best, best.step, best.metrics, self.ctx)
        loaded = load_weights(self.model, self.folder.best, self.ctx.device, self.ctx)
        # After a damaged checkpoint the one gone on from may be older than the best weights.
        best.step, best.metrics = loaded["step"], loaded["metrics"]

    def _resume(self) -> None:
        found = find_checkpoint(self.folder.checkpoints, self.ctx)
        if found.path is None:
            self.state = TrainState()
            return
        path = found.path / STATE
        payload = load_torch(path, self.ctx.device)
        if payload.get("format") != FORMAT:
            raise UserError(f"checkpoint {path} has format {payload.get('format')}; this version reads format {FORMAT}")
        if payload["fingerprint"] != self._fingerprint:
            raise UserError(
                f"checkpoint {path} was made with other training settings, seed or phases; choose another run folder"
            )
        restore(self.model, payload, path, self.ctx, sums=True)
        self._optimizer_state = payload["optimizer"]
        self.state = TrainState.from_dict(payload["state"])
        self._set_aside(found.damaged)
        if self.state.phase < len(self.phases):
            self._progress.note(f"resuming from step {self.state.step}")

    def _set_aside(self, damaged: Mapping[Path, str]) -> None:
        with main_only_errors(self.ctx) as main:
            for path, wrong in damaged.items() if main else ():
                kept = set_aside(path)
                self._progress.note(
                    f"warning: checkpoint {path} is damaged ({wrong}); it is kept as {kept.name}, and training goes on "
                    f"from the one before, step {self.state.step}"
                )

    def _result(self, status: str) -> TrainResult:
        state = self.state
        return TrainResult(
            status,
            state.step,
            state.epoch,
            state.best.step,
            dict(state.best.metrics),
            state.total.mean_loss,
            state.total,
        )


def _sync_every(device: torch.device) -> int:
    return 1 if device.type == "cpu" else _SYNC_EVERY_STEPS


def _check_own_tables(tables: Any, config: TrainConfig) -> None:
    if config.accumulate > 1:
        raise UserError(
            f"train.accumulate is {config.accumulate}, but distributed.tables.optimizer.kind is "
            f"{tables.config.optimizer.kind!r}, which learns at every backward pass; it must be 1"
        )
    if tables.sharded and config.compile:
        raise UserError("train.compile is true, but the look-up in sharded tables cannot be compiled; set it to false")


@contextlib.contextmanager
def _kept_requires_grad(model: nn.Module) -> Iterator[None]:
    """Phases freeze parameters; afterwards all are as before."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
