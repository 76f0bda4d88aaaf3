"""However processes share the dense part, they learn what one process learns, and each takes up what another saved."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp

from dense_runs import cut_off, dense_config, train_dense
from gr.distributed.config import DenseConfig
from gr.distributed.engine import Engine
from gr.distributed.engines import make_engine
from gr.distributed.process import ProcessContext, process, raise_together
from gr.errors import UserError
from gr.training.run_config import RunConfig
from left_behind import thread_names
from sharded_runs import losses

KINDS = ("ddp", "fsdp2", "zero1", "zero2")
SHARDED = ("ddp", "fsdp2", "zero2")
CHAIN = (("zero2", 10), ("fsdp2", 20), ("ddp", 30))
"""Who goes on from which step of the one before; the first from a run under ddp."""


FEW = {"epochs": 1, "max_steps": 6, "early_stopping": None, "checkpoint_every_steps": 0}


def worker(rank: int, world: int, folder: str, slow: bool) -> None:
    torch.set_num_threads(1)
    path = Path(folder)
    with process("cpu", init_method=f"file://{path}/rendezvous", rank=rank, world=world, timeout_s=120) as ctx:
        (slow_part if slow else quick_part)(path, ctx)
    (path / f"threads-{rank}").write_text("\n".join(thread_names()))


def quick_part(path: Path, ctx: ProcessContext) -> None:
    """Local tables."""
    for kind in KINDS:
        trainer = train_dense(path, f"local-{kind}", dense_config(path, kind, sharded=False), ctx)
        torch.save(trainer.model.state_dict(), path / f"weights-{kind}-{ctx.rank}.pt")
    hand_over(path, "local", ctx)
    for kind in ("ddp", "fsdp2"):
        config = dense_config(path, kind, sharded=False, accumulate=2, **FEW)
        train_dense(path, f"accumulated-{kind}", config, ctx)


def slow_part(path: Path, ctx: ProcessContext) -> None:
    """Sharded tables, bfloat16, and what DDP does with a model that is compiled or checkpoints activations."""
    for kind in SHARDED:
        train_dense(path, f"sharded-{kind}", dense_config(path, kind, sharded=True), ctx)
    hand_over(path, "sharded", ctx)
    train_dense(path, "plain-ddp", dense_config(path, "ddp", sharded=False, **FEW), ctx)
    for kind in ("ddp", "fsdp2", "zero2"):
        train_dense(path, f"bf16-{kind}", dense_config(path, kind, sharded=False, precision="bf16", **FEW), ctx)
    for kind in ("ddp", "fsdp2", "zero2"):
        config = dense_config(path, kind, sharded=False, dropout=0.3, **FEW)
        train_dense(path, f"kept-{kind}", config, ctx)
        encoder = replace(config.model.encoder, activation_checkpointing=True)
        again = replace(config, model=replace(config.model, encoder=encoder))
        train_dense(path, f"again-{kind}", again, ctx)
    train_dense(path, "compiled-ddp", dense_config(path, "ddp", sharded=False, compile=True, **FEW), ctx)


def hand_over(path: Path, tables: str, ctx: ProcessContext) -> None:
    """Each of ``CHAIN`` goes on from what the one before saved."""
    source = f"{tables}-ddp"
    for kind, step in CHAIN:
        name = f"{tables}-chain-{kind}"
        if ctx.is_main:
            cut_off(path, source, step, name)
        raise_together(None, ctx)
        train_dense(path, name, dense_config(path, kind, tables == "sharded"), ctx)
        source = name


def make_runs(folder: Path, slow: bool) -> Path:
    """One process alone first, which also prepares the data; then everything that two processes do."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    train_dense(folder, "alone", dense_config(folder, "ddp", sharded=slow), ProcessContext())
    torch.set_num_threads(threads)
    mp.spawn(worker, (2, str(folder), slow), nprocs=2)
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return make_runs(tmp_path_factory.mktemp("dense"), slow=False)


@pytest.fixture(scope="module")
def slow_runs(tmp_path_factory):
    return make_runs(tmp_path_factory.mktemp("dense-slow"), slow=True)


def equal_losses(folder: Path, name: str, expected: str, rtol: float, steps: int = 50) -> None:
    """The last steps of the expected run, if it has more."""
    found, wanted = losses(folder / name), losses(folder / expected)
    assert len(found) == steps
    torch.testing.assert_close(found, wanted[-steps:], rtol=rtol, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_fifty_steps_are_those_of_one_process(runs, kind):
    equal_losses(runs, f"local-{kind}", "alone", 1e-5)
    alone = losses(runs / "alone")
    assert alone[-1] < 0.8 * alone[0]


@pytest.mark.parametrize("kind", KINDS)
def test_the_bare_model_and_the_best_file_hold_the_same_whole_weights(runs, kind):
    best = torch.load(runs / f"local-{kind}" / "best.pt")
    expected = torch.load(runs / "alone" / "best.pt")
    assert best["step"] == expected["step"]
    assert best["metrics"]["ndcg@10"] == pytest.approx(expected["metrics"]["ndcg@10"], rel=0.02)
    for rank in range(2):
        found = torch.load(runs / f"weights-{kind}-{rank}.pt")
        assert found.keys() == best["model"].keys()
        for name, weight in expected["model"].items():
            assert torch.equal(found[name], best["model"][name])
            torch.testing.assert_close(found[name], weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("kind", "step"), CHAIN)
def test_a_run_goes_on_under_another_kind(runs, kind, step):
    equal_losses(runs, f"local-chain-{kind}", "local-ddp", 1e-5, 50 - step)


def test_micro_batches_add_up(runs):
    equal_losses(runs, "accumulated-fsdp2", "accumulated-ddp", 1e-5, FEW["max_steps"])


def test_no_group_lives_on(runs):
    for rank in range(2):
        names = (runs / f"threads-{rank}").read_text().split("\n")
        assert names and not [name for name in names if "gloo" in name]


@pytest.mark.slow
@pytest.mark.parametrize("kind", SHARDED)
def test_with_sharded_tables_fifty_steps_are_those_of_one_process(slow_runs, kind):
    equal_losses(slow_runs, f"sharded-{kind}", "alone", 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "step"), CHAIN)
def test_with_sharded_tables_a_run_goes_on_under_another_kind(slow_runs, kind, step):
    equal_losses(slow_runs, f"sharded-chain-{kind}", "sharded-ddp", 1e-5, 50 - step)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fsdp2", "zero2"])
def test_products_in_bfloat16_stay_so(slow_runs, kind):
    """They are as near to DDP's as DDP's are far from those in float32, or nearer."""
    full, ddp, other = (losses(slow_runs / name) for name in ("plain-ddp", "bf16-ddp", f"bf16-{kind}"))
    assert (ddp - full).abs().max() > 1e-4
    torch.testing.assert_close(other, ddp, rtol=2e-4, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp2", "zero2"])
def test_activation_checkpointing_changes_no_loss_dropout_included(slow_runs, kind):
    equal_losses(slow_runs, f"again-{kind}", f"kept-{kind}", 1e-6, FEW["max_steps"])


@pytest.mark.slow
def test_a_compiled_model_learns_the_same_under_ddp(slow_runs):
    equal_losses(slow_runs, "compiled-ddp", "plain-ddp", 1e-5, FEW["max_steps"])


@pytest.mark.parametrize("kind", KINDS)
def test_one_process_alone_has_nothing_to_share(kind):
    model = torch.nn.Linear(2, 2)
    parts = list(model.parameters()), (), lambda dense, tables: torch.optim.AdamW([*dense, *tables])
    engine = make_engine(DenseConfig(kind=kind), model, *parts, ProcessContext(), clip_norm=None, accumulate=True)
    assert type(engine) is Engine and engine.model is model


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("zero1", {"accumulate": 2}, "train.accumulate is 2, but distributed.dense.kind 'zero1' divides gradients"),
        ("zero2", {"accumulate": 2}, "train.accumulate is 2, but distributed.dense.kind 'zero2' divides gradients"),
        ("fsdp2", {"compile": True}, "train.compile is true, but distributed.dense.kind is 'fsdp2'"),
        ("zero2", {"compile": True}, "train.compile is true, but distributed.dense.kind is 'zero2'"),
    ],
)
def test_what_a_kind_cannot_do_is_refused_before_anything_is_made(kind, changes, message):
    config = RunConfig()
    distributed = replace(config.distributed, dense=DenseConfig(kind=kind))
    with pytest.raises(UserError, match=message):
        replace(config, distributed=distributed, train=replace(config.train, **changes))


def test_zero_without_deepspeed_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    model, context = torch.nn.Linear(2, 2), ProcessContext(0, 2)
    with pytest.raises(UserError, match="kind is zero1 or zero2, which need deepspeed .* set it to ddp or fsdp2"):
        make_engine(
            DenseConfig(kind="zero2"), model, list(model.parameters()), (), None, context,
            clip_norm=None, accumulate=False,
        )  # fmt: skip
