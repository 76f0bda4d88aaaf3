"""A step that is not finite leaves its batch and the weights before it, from which it is computed again."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from torch import nn

from gr.distributed import engine
from gr.distributed.engine import Engine
from gr.distributed.process import ProcessContext, process
from gr.errors import Diverged, UserError
from gr.losses import Losses
from gr.training import guard, trainer
from gr.training.guard import load_evidence, replay
from gr.training.phase import Phase, StepContext
from gr.training.step import run_step
from gr.training.weights import load_weights
from tiny_training import TinyLoader, TinyModel, same, tiny_config, tiny_trainer, weights

EPOCH, INDEX, STEP = 1, 3, 12  # eight batches an epoch: the twelfth step


class Fragile(TinyModel):
    """Breaks on what ``rows["x"]`` says: its loss (1000: an overflow) or its gradient alone (-1: the root of zero)."""

    def __init__(self) -> None:
        super().__init__(0.2)
        self.scale = nn.Parameter(torch.zeros(()))

    def forward(self, batch) -> Losses:
        found, x = super().forward(batch), batch.rows["x"].max()
        total = found.total * (self.scale * 0.0 + x.clamp(min=0.0)).exp() + (self.scale * (x >= 0)).square().sqrt()
        return Losses(total=total, parts={}, weight=found.weight)


class PoisonedLoader(TinyLoader):
    """One batch holds ``x``; on the others it is 0, and there ``Fragile`` adds the size of a scale of one."""

    x, on_rank = 1000.0, 0

    def batch(self, epoch: int, index: int, step: int):
        batch = super().batch(epoch, index, step)
        x = torch.full((batch.num_sequences,), self.x * ((epoch, index, self.rank) == (EPOCH, INDEX, self.on_rank)))
        return batch.replace(rows={**batch.rows, "x": x})


def poisoned(x: float, on_rank: int = 0, **where) -> PoisonedLoader:
    loader = PoisonedLoader(**where)
    loader.x, loader.on_rank = x, on_rank
    return loader


def fragile() -> Fragile:
    model = Fragile()
    with torch.no_grad():
        model.scale.fill_(1.0)
    return model


def again(path: Path) -> list[tuple[float, float]]:
    """A stranger's replay: a new model, and what is on disk."""
    found, model = load_evidence(path), Fragile()
    load_weights(model, path.with_name(guard.WEIGHTS))
    return replay(model.train(), Phase(), found.batches, found.context, found.rank, found.bf16)


def as_on_a_gpu(monkeypatch) -> None:
    """Nobody looks at a step before four are done, and the update is held back by a tensor."""

    monkeypatch.setattr(trainer, "_sync_every", lambda device: 16)
    monkeypatch.setattr(engine, "nobody_waits", lambda numbers: True)


@pytest.mark.parametrize("late", [False, True], ids=["at-once", "flushed-later"])
@pytest.mark.parametrize("x", [1000.0, -1.0], ids=["loss", "gradient"])
def test_the_step_that_went_wrong_is_kept_and_computed_again(tmp_path, monkeypatch, x, late):
    if late:
        as_on_a_gpu(monkeypatch)
    config = tiny_config(log_every_steps=5)
    with pytest.raises(Diverged, match=f"diverged at step {STEP}: ") as raised:
        tiny_trainer(tmp_path, config, model=fragile(), loader=poisoned(x)).fit()
    path = tmp_path / "diverged" / f"step-{STEP:08d}" / "rank-0.pt"
    assert f"the batch is kept in {path}, which gr-replay computes again" in str(raised.value)
    found = load_evidence(path)
    assert (found.context.step, found.context.epoch, found.index, found.context.seed) == (STEP - 1, EPOCH, INDEX, 5)
    made = poisoned(x).batch(EPOCH, INDEX, STEP - 1)
    assert torch.equal(found.batches[0].tokens["item_id"], made.tokens["item_id"])
    ((loss, norm),) = again(path)
    assert not math.isfinite(norm) and math.isfinite(loss) == (x < 0)
    assert not list(tmp_path.rglob("*.tmp"))

    before = tiny_trainer(tmp_path / "before", tiny_config(max_steps=STEP - 1), model=fragile(), loader=poisoned(x))
    before.fit()
    kept = Fragile()
    load_weights(kept, path.with_name(guard.WEIGHTS))
    assert same(weights(kept), weights(before.model))


def test_all_micro_batches_of_the_step_are_kept(tmp_path):
    with pytest.raises(Diverged, match="diverged at step 6: "):
        tiny_trainer(tmp_path, tiny_config(accumulate=2), model=fragile(), loader=poisoned(1000.0)).fit()
    seen = again(tmp_path / "diverged" / "step-00000006" / "rank-0.pt")
    assert [math.isfinite(loss) for loss, _ in seen] == [True, False]


@pytest.mark.parametrize(("x", "learned"), [(0.0, True), (-1.0, False)])
def test_tables_do_not_learn_what_is_not_finite(x, learned):
    class Tables:
        updated = False

        def update(self) -> None:
            self.updated = True

    tables, model, ctx = Tables(), fragile(), ProcessContext()
    engine = Engine(model, torch.optim.AdamW(model.parameters()), list(model.parameters()), ctx)
    batch = poisoned(x).batch(EPOCH, INDEX, 0)
    run_step(engine, Phase(), iter([batch]), 1, StepContext(0, 5), ctx, bf16=False, tables=tables)
    assert tables.updated == learned


@pytest.mark.parametrize(("loss", "learned"), [(2.0, True), (math.inf, False), (math.nan, False)])
def test_a_loss_that_is_not_finite_is_not_learned_from_whatever_its_gradient(loss, learned):
    model = fragile()
    before, parameters = weights(model), list(model.parameters())
    engine = Engine(model, torch.optim.AdamW(parameters), parameters, ProcessContext())
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    norm = engine.update(None, torch.tensor([loss, 1.0], dtype=torch.float64))
    assert float(norm) == pytest.approx(sum(p.numel() for p in parameters) ** 0.5)
    assert same(before, weights(model)) != learned


def worker(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    path = Path(folder)
    with process("cpu", init_method=f"file://{path}/rendezvous", rank=rank, world=world, timeout_s=60) as ctx:
        for name, x in (("loss", 1000.0), ("gradient", -1.0)):
            loader = poisoned(x, on_rank=1, rank=rank, world=world)
            try:
                tiny_trainer(path / name, model=fragile(), loader=loader, ctx=ctx).fit()
            except Diverged as error:
                (path / f"{name}-{rank}").write_text(str(error))


def test_of_two_ranks_the_one_that_is_bad_keeps_its_batch_and_both_name_it(tmp_path):
    mp.spawn(worker, (2, str(tmp_path)), nprocs=2)
    for name in ("loss", "gradient"):
        said = [(tmp_path / f"{name}-{rank}").read_text() for rank in (0, 1)]
        path = tmp_path / name / "diverged" / f"step-{STEP:08d}" / "rank-1.pt"
        assert said[0] == said[1] and f"kept in {path}, which" in said[0]
        assert sorted(p.name for p in path.parent.iterdir()) == ["rank-1.pt", "weights.pt"]
        ((loss, norm),) = again(path)
        assert not math.isfinite(norm) and math.isfinite(loss) == (name == "gradient")


def test_a_full_disk_does_not_hide_that_training_diverged(tmp_path, monkeypatch):
    def full(path, payload):
        raise UserError(f"{path} cannot be saved: No space left on device")

    monkeypatch.setattr(guard, "save_torch", full)
    with pytest.raises(Diverged, match=r"diverged at step 12: .*could not be kept \(.*No space left on device\)"):
        tiny_trainer(tmp_path, model=fragile(), loader=poisoned(1000.0)).fit()


def test_other_files_and_folders_are_no_evidence(tmp_path):
    torch.save({"model": {}}, tmp_path / "weights.pt")
    (tmp_path / "words.pt").write_text("not a checkpoint")
    for name in ("weights.pt", "words.pt"):
        with pytest.raises(
            UserError, match=f"{name} is damaged or holds no batch of a step that diverged; name a rank"
        ):
            load_evidence(tmp_path / name)
    with pytest.raises(UserError, match=r"none.pt does not exist; name a rank-N.pt of a run's diverged/step-N$"):
        load_evidence(tmp_path / "none.pt")
    with pytest.raises(UserError, match=r"is a folder; name a rank-N.pt in it, of a run's diverged/step-N$"):
        load_evidence(tmp_path)
