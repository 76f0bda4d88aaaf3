"""Checkpoints with sharded tables, written in the background: a killed job, damage, a disk that one rank finds full."""

from __future__ import annotations

import json
import resource
import shutil
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp

from gr.distributed.process import ProcessContext, process, raise_together
from gr.errors import UserError
from gr.training import weights
from gr.training.assemble import assemble, open_data
from gr.training.phase import Hooks, StepContext
from gr.training.run_config import RunConfig
from gr.training.weights import load_weights
from left_behind import thread_names
from sharded_runs import SAVED, losses, run_config, train

STEPS = (10, 20, 25)
"""Saved at; the last is the end."""
FIRST, SECOND, LAST = (f"step-{step:08d}" for step in STEPS)


def config_of(folder: Path) -> RunConfig:
    config = run_config(folder, SAVED, "row_wise")
    train = replace(config.train, checkpoint_every_steps=10, batching=replace(config.train.batching, batch_size=16))
    return replace(config, train=train)


def two_workers(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    path = Path(folder)
    with process("cpu", init_method=f"file://{path}/rendezvous", rank=rank, world=world, timeout_s=60) as ctx:
        train(path, "whole", config_of(path), ctx)
        train(path, "killed", config_of(path), ctx)
        damages(path, ctx)
        unsaved(path, ctx)
    (path / f"threads-{rank}").write_text("\n".join(thread_names()))


def damages(path: Path, ctx: ProcessContext) -> None:
    """Damage to what one process reads is told by all, and all go on from the same checkpoint."""
    shard = Path("tables") / "__1_0.distcp"
    if ctx.is_main:
        for name, kept in (("damaged", (FIRST, SECOND)), ("lost", (FIRST,))):
            for step in kept:
                shutil.copytree(path / "whole" / "checkpoints" / step, path / name / "checkpoints" / step)
        flip(path / "damaged" / "checkpoints" / SECOND / shard)
        (path / "lost" / "checkpoints" / FIRST / shard).unlink()
        shutil.copytree(path / "whole" / "best-00000025.tables", path / "bad" / "best-00000025.tables")
        shutil.copy(path / "whole" / "best.pt", path / "bad")
        flip(path / "bad" / "best-00000025.tables" / shard.name)
    raise_together(None, ctx)
    config = config_of(path)
    train(path, "damaged", config, ctx)
    with pytest.raises(UserError, match=r"whole \(step-00000010: tables/__1_0.distcp is missing\); move that folder"):
        train(path, "lost", config, ctx)
    with pytest.raises(UserError, match=r"best-00000025.tables is damaged \(__1_0.distcp has changed\)"):
        load_weights(assemble(config, *open_data(config), ctx), path / "bad" / "best.pt", "cpu", ctx)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def unsaved(path: Path, ctx: ProcessContext) -> None:
    """A rank that cannot write its share ends all with the same sentence, and no part of a checkpoint is left."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if ctx.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2048, hard))
    try:
        with pytest.raises(UserError, match=r"step-00000010.tmp/tables cannot be saved: .*; make room"):
            train(path, "unsaved", config_of(path), ctx)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    if ctx.is_main:
        assert not list((path / "unsaved" / "checkpoints").iterdir())


def doomed_worker(rank: int, world: int, folder: str, ready: Any) -> None:
    """Trains three steps on while the second checkpoint is being written, tells so, and waits to be killed."""
    torch.set_num_threads(1)
    path, writing, save_torch = Path(folder), threading.Event(), weights.save_torch

    def half(target: Path, payload: Any) -> Any:
        if SECOND not in str(target):
            return save_torch(target, payload)
        target.write_bytes(b"half")
        writing.set()
        threading.Event().wait()

    def after_step(model: Any, context: StepContext) -> None:
        if context.step == STEPS[1] + 2:
            if rank == 0:
                writing.wait()
            ready.release()
            threading.Event().wait()

    weights.save_torch = half
    config = config_of(path)
    with process("cpu", init_method=f"file://{path}/rendezvous-killed", rank=rank, world=world) as ctx:
        train(path, "killed", config, ctx, Hooks(after_step=after_step))


def kill_whole_job(folder: Path) -> None:
    spawn = mp.get_context("spawn")
    ready = spawn.Semaphore(0)
    job = [spawn.Process(target=doomed_worker, args=(rank, 2, str(folder), ready)) for rank in range(2)]
    for worker in job:
        worker.start()
    reached = [ready.acquire(timeout=250) for _ in job]
    for worker in job:
        worker.kill()
        worker.join()
    assert all(reached)
    left = sorted(path.name for path in (folder / "killed" / "checkpoints").iterdir())
    assert left == [FIRST, f"{SECOND}.tmp"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    open_data(config_of(folder))  # prepared by one process, not by two at once
    kill_whole_job(folder)
    mp.spawn(two_workers, (2, str(folder)), nprocs=2)
    return folder


def test_a_job_killed_while_a_checkpoint_is_written_leaves_no_trace(runs):
    assert torch.equal(losses(runs / "killed"), losses(runs / "whole"))
    assert not list((runs / "killed").rglob("*.tmp"))
    config = config_of(runs)
    store, split = open_data(config)
    ends = []
    for name in ("killed", "whole"):
        model = assemble(config, store, split)
        load_weights(model, runs / name / "best.pt")
        ends.append(model.state_dict())
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[1])


def test_both_ranks_go_on_from_the_checkpoint_before_a_damaged_one(runs):
    assert torch.equal(losses(runs / "damaged"), losses(runs / "whole")[STEPS[0] :])
    names = {path.name for path in (runs / "damaged" / "checkpoints").iterdir()}
    assert names == {FIRST, SECOND, f"{SECOND}.damaged", LAST}


def test_a_checkpoint_has_a_folder_of_tables_and_no_table_elsewhere(runs):
    checkpoints = runs / "whole" / "checkpoints"
    assert {p.name for p in checkpoints.iterdir()} == {FIRST, SECOND, LAST}
    assert len(list((runs / "whole").glob("best-*.tables"))) == 1
    checkpoint = checkpoints / FIRST
    files = {"state.pt", "tables/.metadata", "tables/__0_0.distcp", "tables/__1_0.distcp"}
    assert set(json.loads((checkpoint / "files.json").read_text())["files"]) == files
    payload = torch.load(checkpoint / "state.pt")
    assert payload["model"] and not any(name.startswith("tables.") for name in payload["model"])


def test_no_group_and_no_writer_lives_on(runs):
    for rank in range(2):
        names = (runs / f"threads-{rank}").read_text().split("\n")
        assert names and not [name for name in names if "gloo" in name or "checkpoint" in name]
