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
from gr.distributed.engine import Engine, make_engine
from gr.distributed.process import ProcessContext, process, raise_together
from gr.errors import UserError
from gr.training.run_config import RunConfig
from left_behind import thread_names
from sharded_runs import losses

KINDS = ("ddp", "fsdp2", "zero1", "zero2")
SHARDED = ("ddp", "fsdp2", "zero2")
CHAIN = (("zero2", 10), ("fsdp2", 20), ("ddp", 30))
"""Who goes on from which step of the one before; the first from a run under ddp."""


def worker(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    path = Path(folder)
    with process("cpu", init_method=f"file://{path}/rendezvous", rank=rank, world=world, timeout_s=120) as ctx:
        for kind in KINDS:
            trainer = train_dense(path, f"local-{kind}", dense_config(path, kind, sharded=False), ctx)
            assert type(trainer.model).__name__ == "RetrievalModel"
            torch.save(trainer.model.state_dict(), path / f"weights-{kind}-{rank}.pt")
        for kind in SHARDED:
            train_dense(path, f"sharded-{kind}", dense_config(path, kind, sharded=True), ctx)
        for tables, sharded in (("local", False), ("sharded", True)):
            source = f"{tables}-ddp"
            for kind, step in CHAIN:
                name = f"{tables}-chain-{kind}"
                if ctx.is_main:
                    cut_off(path, source, step, name)
                raise_together(None, ctx)
                train_dense(path, name, dense_config(path, kind, sharded), ctx)
                source = name
        few = {"epochs": 1, "max_steps": 6, "early_stopping": None, "checkpoint_every_steps": 0}
        for kind in ("ddp", "fsdp2"):
            config = dense_config(path, kind, sharded=False, accumulate=2, **few)
            train_dense(path, f"accumulated-{kind}", config, ctx)
        for kind in ("ddp", "fsdp2", "zero2"):
            config = dense_config(path, kind, sharded=False, precision="bf16", **few)
            train_dense(path, f"bf16-{kind}", config, ctx)
        del trainer
    (path / f"threads-{rank}").write_text("\n".join(thread_names()))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One process alone first, which also prepares the data; then everything that two processes do."""
    folder = tmp_path_factory.mktemp("dense")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for tables, sharded in (("local", False), ("sharded", True)):
        train_dense(folder, f"{tables}-alone", dense_config(folder, "ddp", sharded), ProcessContext())
    torch.set_num_threads(threads)
    mp.spawn(worker, (2, str(folder)), nprocs=2)
    return folder


@pytest.mark.parametrize("name", [*(f"local-{kind}" for kind in KINDS), *(f"sharded-{kind}" for kind in SHARDED)])
def test_fifty_steps_are_those_of_one_process(runs, name):
    alone, other = losses(runs / f"{name.split('-')[0]}-alone"), losses(runs / name)
    assert len(alone) == len(other) == 50 and alone[-1] < 0.8 * alone[0]
    torch.testing.assert_close(other, alone, rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_the_bare_model_and_the_best_file_hold_the_same_whole_weights(runs, kind):
    best, expected = (torch.load(runs / f"local-{one}" / "best.pt") for one in (kind, "alone"))
    assert best["step"] == expected["step"]
    assert best["metrics"]["ndcg@10"] == pytest.approx(expected["metrics"]["ndcg@10"], rel=0.02)
    for rank in range(2):
        found = torch.load(runs / f"weights-{kind}-{rank}.pt")
        assert found.keys() == best["model"].keys()
        for name, weight in expected["model"].items():
            assert torch.equal(found[name], best["model"][name])
            torch.testing.assert_close(found[name], weight, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("tables", ["local", "sharded"])
@pytest.mark.parametrize(("kind", "step"), CHAIN)
def test_a_run_goes_on_under_another_kind(runs, tables, kind, step):
    whole, resumed = losses(runs / f"{tables}-ddp"), losses(runs / f"{tables}-chain-{kind}")
    assert len(resumed) == 50 - step
    torch.testing.assert_close(resumed, whole[step:], rtol=1e-5, atol=0)


def test_micro_batches_add_up(runs):
    ddp, fsdp2 = losses(runs / "accumulated-ddp"), losses(runs / "accumulated-fsdp2")
    assert len(ddp) == 6
    torch.testing.assert_close(fsdp2, ddp, rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", ["fsdp2", "zero2"])
def test_products_in_bfloat16_stay_so(runs, kind):
    full, ddp, other = (losses(runs / name)[:6] for name in ("local-ddp", "bf16-ddp", f"bf16-{kind}"))
    assert (ddp - full).abs().max() > 1e-4  # it makes a difference
    torch.testing.assert_close(other, ddp, rtol=2e-4, atol=0)


def test_no_group_lives_on(runs):
    for rank in range(2):
        names = (runs / f"threads-{rank}").read_text().split("\n")
        assert names and not [name for name in names if "gloo" in name]


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
