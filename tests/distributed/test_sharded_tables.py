"""Tables divided among processes learn, score and are saved as those of one process."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor

from gr.distributed.process import ProcessContext, process, raise_together
from gr.errors import UserError
from gr.evaluation.ranking import rank_targets
from gr.evaluation.sharded_ranking import rank_by_shards
from gr.training.assemble import assemble, eval_loader, open_data
from gr.training.phase import Phase
from gr.training.trainer import Trainer
from gr.training.weights import load_weights
from left_behind import thread_names
from sharded_runs import RUNS, SAVED, losses, run_config, train

PROOFS = [
    (sharding, run)
    for run in RUNS
    for sharding in ("row_wise", "table_wise", "column_wise")
    if not (sharding == "column_wise" and "rowwise" in run)
]
TRAINED = f"row_wise-{SAVED}"
AT = 20
SEEN = (False, True, "window")
HASHED_SPANS = ((0, 121), (7, 30), (55, 70), (120, 121))
# What goes on from step AT of the run TRAINED, which two processes made with tables divided by rows.
RESUMED = {"two": "row_wise", "two-table-wise": "table_wise", "three": "row_wise"}


def double(vectors: Tensor) -> Tensor:
    return 2 * vectors


def cut_off(folder: Path, name: str) -> Path:
    """A run folder as it was when step AT had just been saved."""
    step = f"step-{AT:08d}"
    shutil.copytree(folder / TRAINED / "checkpoints" / step, folder / name / "checkpoints" / step)
    return folder / name


def two_workers(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    path = Path(folder)
    with process("cpu", init_method=f"file://{path}/rendezvous-two", rank=rank, world=world, timeout_s=60) as ctx:
        for sharding, run in PROOFS:
            train(path, f"{sharding}-{run}", run_config(path, run, sharding), ctx)
        train(path, "row_wise-fp16", run_config(path, "adagrad_full", "row_wise", rows="fp16"), ctx)
        answers(path, ctx)
        hashed_answers(path, ctx)
        if ctx.is_main:
            for name in RESUMED:
                cut_off(path, name)
        raise_together(None, ctx)
        for name in ("two", "two-table-wise"):
            train(path, name, run_config(path, SAVED, RESUMED[name]), ctx)
    (path / f"threads-{rank}").write_text("\n".join(thread_names()))


def answers(path: Path, ctx: ProcessContext) -> None:
    """What each kind of division says of the same rows."""
    for sharding in ("row_wise", "table_wise", "column_wise"):
        config = run_config(path, "adagrad", sharding)
        store, split = open_data(config)
        model = assemble(config, store, split, ctx)
        load_weights(model, path / f"{sharding}-adagrad" / "best.pt", "cpu", ctx)
        tables = model.tables
        rows = torch.cat([vectors.clone() for _, vectors in tables.iter_vectors("item", block=23)])
        starts = [start for start, _ in tables.iter_vectors("item", block=23)]
        query = torch.randn(3 + ctx.rank, 16, generator=torch.Generator().manual_seed(ctx.rank))
        wanted = ((0, 121), (7, 30), (55, 70), (120, 121))
        logits = [tables.logits(query, "item", span, double) for span in wanted]
        looked_up = tables({"item": torch.tensor([[ctx.rank, 120]]), "action": torch.tensor([1] * ctx.rank).long()})
        found = {"rows": rows, "starts": starts, "query": query, "wanted": wanted, "logits": logits, **looked_up}
        ranks = {}
        for seen in SEEN:
            ranked = rank_by_shards(model, eval_loader(config, store, split.test, ctx), seen, ctx)
            ranks[seen] = np.stack([ranked.better, ranked.tied, ranked.candidates])
        # A phase that freezes tables: the look-up still answers, and nothing is learned.
        before = rows.clone()
        for parameter in tables.parameters():
            parameter.requires_grad_(False)
        frozen = tables({"item": torch.arange(5), "action": torch.arange(2)})["item"]
        assert not frozen.requires_grad
        assert torch.equal(torch.cat([vectors.clone() for _, vectors in tables.iter_vectors("item")]), before)
        torch.save({**found, "ranks": ranks}, path / f"answers-{sharding}-{ctx.rank}.pt")


def hashed_answers(path: Path, ctx: ProcessContext) -> None:
    """Scores and ranks where items share rows."""
    for sharding in ("row_wise", "table_wise"):
        config = run_config(path, "hashed", sharding)
        store, split = open_data(config)
        model = assemble(config, store, split, ctx)
        load_weights(model, path / f"{sharding}-hashed" / "best.pt", "cpu", ctx)
        query = torch.randn(3 + ctx.rank, 16, generator=torch.Generator().manual_seed(ctx.rank))
        logits = [model.tables.logits(query, "item", span, double) for span in HASHED_SPANS]
        loader = eval_loader(config, store, split.test, ctx)
        ranked = rank_by_shards(model, loader, "window", ctx)
        ranks = np.stack([ranked.better, ranked.tied, ranked.candidates])
        torch.save({"query": query, "logits": logits, "ranks": ranks}, path / f"hashed-{sharding}-{ctx.rank}.pt")


def three_workers(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    path = Path(folder)
    with process("cpu", init_method=f"file://{path}/rendezvous-three", rank=rank, world=world, timeout_s=60) as ctx:
        train(path, "three", run_config(path, SAVED, RESUMED["three"]), ctx)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Local runs first, which also prepare the data; then everything two processes do, then what three do."""
    folder = tmp_path_factory.mktemp("sharded")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for run in RUNS:
        train(folder, f"local-{run}", run_config(folder, run, None), ProcessContext())
    train(folder, "local-fp16", run_config(folder, "adagrad_full", None, rows="fp16"), ProcessContext())
    torch.set_num_threads(threads)
    mp.spawn(two_workers, (2, str(folder)), nprocs=2)
    mp.spawn(three_workers, (3, str(folder)), nprocs=3)
    return folder


@pytest.mark.parametrize(("sharding", "run"), PROOFS)
def test_fifty_steps_are_those_of_local_tables(runs, sharding, run):
    local, other = losses(runs / f"local-{run}"), losses(runs / f"{sharding}-{run}")
    share = 0.8 if run == "hashed" else 0.5  # items of one row cannot be told apart
    assert len(local) == len(other) == 50 and local[-1] < share * local[0]
    torch.testing.assert_close(other, local, rtol=1e-6, atol=0)


def test_fp16_rows_learn_as_local_ones_do(runs):
    """To what rounding rows to fp16 changes at all."""
    local, other = losses(runs / "local-fp16"), losses(runs / "row_wise-fp16")
    cost = (local - losses(runs / "local-adagrad_full")).abs().max()
    assert 0 < cost < 0.05
    assert (other - local).abs().max() <= cost


@pytest.mark.parametrize("sharding", ["row_wise", "table_wise", "column_wise"])
def test_look_up_logits_and_all_rows_are_the_tables(runs, sharding):
    for rank in range(2):
        found = torch.load(runs / f"answers-{sharding}-{rank}.pt", weights_only=False)
        rows = found["rows"]
        assert rows.shape == (121, 16) and found["starts"][0] == 0 and len(found["starts"]) > 2
        assert torch.equal(found["item"], rows[torch.tensor([[rank, 120]])])
        assert found["action"].shape == (rank, 16)
        for (lo, hi), logits in zip(found["wanted"], found["logits"], strict=True):
            torch.testing.assert_close(logits, found["query"] @ (2 * rows[lo:hi]).T)


@pytest.mark.parametrize("sharding", ["row_wise", "table_wise", "column_wise"])
def test_ranks_are_those_of_one_process_that_loads_the_same_weights(runs, sharding):
    config = run_config(runs, "adagrad", sharding)
    store, split = open_data(config)
    model = assemble(config, store, split)
    load_weights(model, runs / f"{sharding}-adagrad" / "best.pt")
    assert not model.tables.sharded
    both = [torch.load(runs / f"answers-{sharding}-{rank}.pt", weights_only=False) for rank in range(2)]
    assert torch.equal(both[0]["rows"], model.tables.weights["item"])
    for seen in SEEN:
        ranked = rank_targets(model, eval_loader(config, store, split.test, ProcessContext()), seen)
        expected = np.stack([ranked.better, ranked.tied, ranked.candidates])
        assert ranked.better.max() > 10
        for answer in both:
            np.testing.assert_array_equal(answer["ranks"][seen], expected)


@pytest.mark.parametrize("sharding", ["row_wise", "table_wise"])
def test_items_that_share_rows_are_scored_and_ranked_as_in_one_process(runs, sharding):
    config = run_config(runs, "hashed", None)
    store, split = open_data(config)
    model = assemble(config, store, split)
    load_weights(model, runs / f"{sharding}-hashed" / "best.pt")
    spec = model.tables.specs["item"]
    assert (spec.num_rows, spec.num_ids) == (100, 121)
    items = model.tables.weights["item"][spec.rows_of(torch.arange(121))]
    ranked = rank_targets(model, eval_loader(config, store, split.test, ProcessContext()), "window")
    expected = np.stack([ranked.better, ranked.tied, ranked.candidates])
    assert 0.2 < (ranked.tied > 0).mean() < 1.0
    for rank in range(2):
        found = torch.load(runs / f"hashed-{sharding}-{rank}.pt", weights_only=False)
        np.testing.assert_array_equal(found["ranks"], expected)
        for (lo, hi), logits in zip(HASHED_SPANS, found["logits"], strict=True):
            torch.testing.assert_close(logits, found["query"] @ (2 * items[lo:hi]).T)


@pytest.mark.parametrize("name", ["two", "two-table-wise", "three", "one"])
def test_a_run_goes_on_with_other_processes_and_another_division(runs, name):
    whole = losses(runs / TRAINED)
    if name == "one":
        cut_off(runs, "one")
        train(runs, "one", run_config(runs, SAVED, "row_wise"), ProcessContext())
    resumed = losses(runs / name)
    assert len(resumed) == len(whole) - AT
    if name == "two":
        assert torch.equal(resumed, whole[AT:])
    else:
        torch.testing.assert_close(resumed, whole[AT:], rtol=1e-6, atol=0)


def test_a_missing_folder_and_weights_of_another_kind_are_one_sentence(runs, tmp_path):
    config = run_config(runs, SAVED, "row_wise")
    store, split = open_data(config)
    model = assemble(config, store, split)
    shutil.copy(runs / TRAINED / "best.pt", tmp_path / "best.pt")
    with pytest.raises(UserError, match=r"best-00000050.tables is damaged \(.* is missing\)"):
        load_weights(model, tmp_path / "best.pt")
    model.tables.config = run_config(runs, SAVED, None, optimizer={"kind": "adamw"}).distributed.tables
    with pytest.raises(UserError, match="of another model .it has tables that own their optimizer"):
        load_weights(model, tmp_path / "best.pt")


def test_no_group_lives_on(runs):
    for rank in range(2):
        names = (runs / f"threads-{rank}").read_text().split("\n")
        assert names and not [name for name in names if "gloo" in name]


def test_steps_in_between_are_refused(runs, tmp_path):
    config = run_config(runs, "sgd", None)
    accumulating = replace(config.train, accumulate=2)
    store, split = open_data(config)
    with pytest.raises(UserError, match="train.accumulate is 2, but .*kind is 'sgd', which learns at every backward"):
        Trainer(assemble(config, store, split), [Phase()], None, None, accumulating, ProcessContext(), tmp_path, 0)
