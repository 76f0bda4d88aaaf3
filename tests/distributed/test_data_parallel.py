"""Two processes train what one would have trained; they stop and fail together."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp

from gr.distributed.process import (
    ProcessContext,
    all_reduce_sum,
    barrier,
    broadcast_object,
    gather_integers,
    main_only_errors,
    process,
    start,
)
from gr.errors import UserError
from gr.training.config import EarlyStoppingConfig
from left_behind import thread_names
from tiny_training import TinyLoader, TinyModel, same, tiny_config, tiny_trainer, weights


class Unused(TinyModel):
    """Has a parameter that no step uses."""

    def __init__(self) -> None:
        super().__init__(0.0)
        self.spare = torch.nn.Linear(3, 3)


def evaluate(model) -> dict[str, float]:
    return {"ndcg@10": float(model.linear.weight.abs().sum())}


CASES = {
    "plain": dict(config=dict(epochs=2), model=dict(dropout=0.0)),
    "accumulated": dict(config=dict(epochs=2, accumulate=3), model=dict(dropout=0.0)),
    "selected": dict(config=dict(epochs=2, early_stopping=EarlyStoppingConfig()), model=dict(dropout=0.0)),
}


def train_case(folder: Path, name: str, ctx: ProcessContext):
    case = CASES[name]
    loader = TinyLoader(rank=ctx.rank, world=ctx.world, batch_size=6)
    trainer = tiny_trainer(
        folder / name,
        tiny_config(**case["config"]),
        model=TinyModel(**case["model"]),
        loader=loader,
        ctx=ctx,
        evaluate=evaluate if name == "selected" else None,
    )
    return trainer.fit(), weights(trainer.model)


def worker(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    path = Path(folder)
    with process("cpu", init_method=f"file://{path}/rendezvous", rank=rank, world=world, timeout_s=60) as ctx:
        # Collectives.
        assert all_reduce_sum(torch.tensor([rank + 1.0]), ctx).item() == 3.0
        assert gather_integers([2**80 + rank, -5], ctx) == [[2**80, -5], [2**80 + 1, -5]]
        assert broadcast_object({"rank": rank}, ctx) == {"rank": 0}
        barrier(ctx)
        try:
            with main_only_errors(ctx) as main:
                if main:
                    raise UserError("only rank 0 knows")
            raise AssertionError("an error of rank 0 must reach everybody")
        except UserError as error:
            assert str(error) == "only rank 0 knows"

        # Training.
        for name in CASES:
            result, state = train_case(path / "two", name, ctx)
            torch.save((result.step, result.total.tokens, result.loss, state), path / f"{name}-{rank}.pt")

        # A parameter that no step uses does not stop data parallelism, and stays as it was.
        trainer = tiny_trainer(
            path / "unused",
            tiny_config(epochs=1),
            model=Unused(),
            loader=TinyLoader(rank=rank, world=world),
            ctx=ctx,
        )
        before = trainer.model.spare.weight.clone()
        trainer.fit()
        assert torch.equal(trainer.model.spare.weight, before)

        # A signal on one rank stops both at the same step; resuming is exact, dropout included.
        def kick(epoch: int, index: int) -> None:
            if rank == 1 and (epoch, index) == (1, 2):
                os.kill(os.getpid(), signal.SIGTERM)

        stopped = tiny_trainer(path / "stop", loader=TinyLoader(rank=rank, world=world, event=kick), ctx=ctx).fit()
        assert stopped.status == "stopped" and 8 <= stopped.step < 16
        steps = [torch.zeros(1, dtype=torch.int64) for _ in range(world)]
        torch.distributed.all_gather(steps, torch.tensor([stopped.step]))
        assert steps[0] == steps[1]
        resumed = tiny_trainer(path / "stop", loader=TinyLoader(rank=rank, world=world), ctx=ctx)
        assert resumed.fit().status == "done"
        whole = tiny_trainer(path / "whole", loader=TinyLoader(rank=rank, world=world), ctx=ctx)
        whole.fit()
        assert same(weights(whole.model), weights(resumed.model))

        # A save that fails on rank 0 ends all ranks with the same sentence.
        (path / "broken").mkdir(exist_ok=True)
        (path / "broken" / "checkpoints").touch()
        try:
            tiny_trainer(path / "broken", loader=TinyLoader(rank=rank, world=world), ctx=ctx).fit()
            raise AssertionError("the save must fail")
        except UserError as error:
            assert "cannot be saved" in str(error), error
        assert [name for name in thread_names() if "gloo" in name]
    # A group that lives on until the interpreter ends may take the process down with it.
    assert not [name for name in thread_names() if "gloo" in name]
    (path / f"finished-{rank}").touch()


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Runs everything in one pair of processes: starting them costs more than all they do."""
    folder = tmp_path_factory.mktemp("two")
    mp.spawn(worker, (2, str(folder)), nprocs=2)
    return folder


def test_collectives_stops_and_failures_reach_both_ranks(two):
    assert (two / "finished-0").exists() and (two / "finished-1").exists()


@pytest.mark.parametrize("name", list(CASES))
def test_two_processes_equal_one(two, tmp_path, name):
    result, state = train_case(tmp_path, name, ProcessContext())
    ranks = [torch.load(two / f"{name}-{rank}.pt") for rank in range(2)]
    for step, tokens, loss, other in ranks:
        assert (step, tokens) == (result.step, result.total.tokens)
        assert loss == pytest.approx(result.loss, rel=1e-5)
        for key, value in state.items():
            torch.testing.assert_close(other[key], value, rtol=1e-4, atol=1e-5)
    assert same(ranks[0][3], ranks[1][3])
    lines = (two / "two" / name / "metrics.jsonl").read_text().splitlines()
    alone = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == len(alone)
    for a, b in zip(map(json.loads, lines), map(json.loads, alone), strict=True):
        assert a["step"] == b["step"] and a.get("tokens") == b.get("tokens") and a.get("pairs") == b.get("pairs")
        if "grad_norm" in a:
            assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
            assert len(a["ranks"]["step_s"]) == 2 and sum(a["ranks"]["tokens"]) == b["ranks"]["tokens"][0]
            assert 1 < a["imbalance"]["cost"] < 2 and b["imbalance"]["cost"] == 1


def test_alone_there_is_no_group():
    with process("cpu") as ctx:
        assert ctx == ProcessContext() and ctx.is_main
        assert not torch.distributed.is_initialized()
        assert gather_integers([2**70], ctx) == [[2**70]] and broadcast_object("x", ctx) == "x"
        barrier(ctx)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RANK": "0"}, "RANK is set but WORLD_SIZE is not"),
        ({"RANK": "0", "WORLD_SIZE": "two", "LOCAL_RANK": "0"}, "WORLD_SIZE='two'.*must be integers"),
        (
            {"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0"},
            "RANK=2 must be at least 0 and below WORLD_SIZE=2",
        ),
    ],
)
def test_half_a_torchrun_environment_is_refused(monkeypatch, environment, message):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        start("cpu")


def test_a_device_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="device 'cuda' needs GPU number 0 but this machine has 0"):
        start("cuda")
    with pytest.raises(UserError, match="device 'tpu' is unknown"):
        start("tpu")
    assert start("auto").device == torch.device("cpu")
