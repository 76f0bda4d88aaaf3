"""The padded form that our training is timed against computes what ours computes; the runner over a small log."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from benchmarks.train import ml1m
from benchmarks.train.plain import FORMS, PlainHSTU, pairs, rank_padded
from gr import config as configs
from gr.data.split import PaperConfig, make_split
from gr.data.store import memory_store
from gr.distributed.process import ProcessContext
from gr.errors import UserError
from gr.evaluation.ranking import rank_targets
from gr.training.assemble import assemble, eval_loader, train_loader
from gr.training.run_config import RunConfig

ITEMS = 40
LOG_SECONDS = 18.0  # gaps of up to e**18 s fill time buckets 0 to 59
SMALL = ["--model.dim", "8", "--model.encoder.dim_qk", "6", "--model.encoder.dim_v", "5", "--layout.max_events", "10"]
SMALL += ["--train.batching.batch_size", "16", "--objective.num_negatives", "7", "--evaluation.batch_size", "16"]


@pytest.fixture
def store():
    """30 users with 3 to 25 events: some are cut to 10, no user meets an item twice, times are far apart and tie."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(3, 26, 30)
    items = [rng.permutation(ITEMS)[:n] for n in lengths]
    gaps = [np.exp(rng.uniform(0, LOG_SECONDS, n)).astype(np.int64) * (rng.random(n) < 0.8) for n in lengths]
    return memory_store(items, [np.cumsum(gap) for gap in gaps], num_items=ITEMS)


def built(store, *overrides):
    """(config, split, model, loader) with the shapes of the recipe, only smaller."""
    config = configs.load(RunConfig, ml1m.CONFIG, [*ml1m.EXACT, *SMALL, *overrides])
    split = make_split(PaperConfig(), store)
    model = assemble(config, store, split)
    # Tables of the size that training gives them: at their first values the biases hardly count.
    with torch.no_grad():
        for layer in model.encoder.layers:
            layer.position_table.normal_(std=0.5, generator=torch.Generator().manual_seed(1))
            layer.time_table.normal_(std=0.5, generator=torch.Generator().manual_seed(2))
    return config, split, model, train_loader(config, store, split, ProcessContext())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("heads", ["1", "2"])
def test_loss_and_every_gradient_are_ours_in_float64(store, form, heads, monkeypatch):
    overrides = ("--model.encoder.num_heads", heads, "--model.encoder.backend", "reference")
    # At the recipe's 0.05 losses exceed 20, where torch's softplus drops a term of e**-20, which is 2e-9.
    _, _, ours, loader = built(store, *overrides, "--model.similarity.temperature", "0.2")
    ours = ours.double()
    plain = PlainHSTU(ours, form)
    batch = loader.batch(0, 0, 0)
    assert batch.offsets.diff().unique().numel() > 3
    # Our losses round logits to float32, which would hide differences below 1e-7.
    monkeypatch.setattr(torch.Tensor, "float", lambda self: self)
    losses = [model(batch) for model in (ours, plain)]
    for found in losses:
        found.total.backward()
    torch.testing.assert_close(losses[1].total, losses[0].total, rtol=1e-12, atol=0)
    torch.testing.assert_close(losses[1].weight, losses[0].weight)
    for name, mine, other in pairs(ours, plain):
        scale = mine.grad.abs().max()
        assert scale > 0, name
        torch.testing.assert_close(
            other.grad, mine.grad, rtol=0, atol=1e-9 * float(scale), msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("form", FORMS)
def test_a_step_in_float32_is_ours_with_the_backend_that_training_takes(store, form):
    _, _, ours, loader = built(store)
    plain = PlainHSTU(ours, form)
    for index in range(2):
        batch = loader.batch(0, index, index)
        torch.testing.assert_close(plain(batch).total, ours(batch).total, rtol=1e-5, atol=0)


def test_weights_are_copies(store):
    _, _, ours, _ = built(store)
    before = ours.tables.weights["item"].clone()
    with torch.no_grad():
        for parameter in PlainHSTU(ours).parameters():
            parameter.zero_()
    assert torch.equal(ours.tables.weights["item"], before)


@pytest.mark.parametrize("mask_seen", [False, True])
@pytest.mark.parametrize("by_count", [False, True])
def test_ranks_are_ours(store, mask_seen, by_count):
    config, split, ours, _ = built(store)
    loader = eval_loader(config, store, split.test, ProcessContext())
    found = rank_targets(ours.eval(), loader, mask_seen)
    assert not found.tied.any()
    ranks = rank_padded(PlainHSTU(ours).eval(), loader, mask_seen, by_count)
    assert np.array_equal(ranks, found.better + 1)


@pytest.mark.parametrize(
    "overrides",
    [("--model.encoder.window", "4"), ("--model.encoder.preset", "dlrm_v3"), ("--model.encoder.divisor", "length")],
)
def test_a_model_that_the_plain_form_is_not_is_refused(store, overrides):
    config = configs.load(RunConfig, ml1m.CONFIG, [*SMALL, *overrides])
    with pytest.raises(UserError, match="plain form"):
        PlainHSTU(assemble(config, store, make_split(PaperConfig(), store)))


@pytest.fixture
def table(tmp_path, store):
    """The log as a CSV with MovieLens' columns."""
    users = np.repeat(np.arange(store.num_users), store.lengths)
    rows = zip(users, store.columns["item_id"], store.columns["timestamp"], strict=True)
    lines = ["user_id,item_id,rating,timestamp", *(f"{user},{item},4,{time}" for user, item, time in rows)]
    path = tmp_path / "ratings.csv"
    path.write_text("\n".join(lines))
    return path


def measured(tmp_path, table, *words):
    """Rows that the runner appends."""
    out = tmp_path / "rows.jsonl"
    assert ml1m.main(["--data", str(table), "--json", str(out), *SMALL, *words]) == 0
    return [json.loads(line) for line in out.read_text().splitlines()]


def test_losses_agree_over_training_and_are_reported(tmp_path, table, capsys):
    rows = measured(tmp_path, table, "--parts", "losses", "--loss-steps", "12")
    assert {(r["provider"], r["baseline"]) for r in rows} == {(o, p) for o in ml1m.OURS for p in ml1m.PLAIN}
    for row in rows:
        assert row["steps"] == 12 and row["last_loss"] != row["first_loss"]
        if row["provider"] == "hstu":
            assert row["passed"] and row["largest_relative_difference"] < 1e-4
        else:
            assert row["largest_relative_difference"] > 0 and "passed" not in row
        assert row["environment"]["torch"] and row["config_hash"] and str(tmp_path) not in json.dumps(row)
    assert "largest relative difference" in capsys.readouterr().out


def test_other_losses_fail_the_run(table, monkeypatch):
    monkeypatch.setattr(ml1m, "LOSS_LIMIT", -1.0)
    words = ["--data", str(table), *SMALL, "--parts", "losses", "--loss-steps", "1", "--providers", "hstu", "plain"]
    assert ml1m.main(words) == 1


def test_epoch_and_evaluation_are_ratios_of_alternate_repeats(tmp_path, table):
    words = ("--parts", "epoch", "evaluation", "--repeats", "3", "--eval-after", "2", "--providers", "hstu", "plain")
    epoch, evaluation = measured(tmp_path, table, *words)
    assert epoch["steps"] == epoch["steps_of_an_epoch"] == 2
    assert evaluation["passed"] and evaluation["hits_that_differ"] == 0 and evaluation["targets"] == 30
    for row in (epoch, evaluation):
        assert row["repeats"] == len(row["ratios"]) == 3
        assert 0 < row["ratio"]["low"] <= row["ratio"]["median"] <= row["ratio"]["high"]
    for shares in epoch["shares"].values():
        assert set(shares) == {"loader", "forward", "backward", "optimizer"}
        assert min(shares.values()) > 0 and sum(shares.values()) <= 1.01


def test_memory_is_that_of_a_fresh_process(tmp_path, table):
    (row,) = measured(tmp_path, table, "--parts", "memory", "--providers", "hstu", "--steps", "1")
    assert 0 < row["before_training_gib"] <= row["peak_gib"] < 8


def test_the_committed_recipe_is_the_papers():
    """arXiv 2402.17152, section 4.1.1, and the public code's file for ML-1M."""
    config = configs.load(RunConfig, ml1m.CONFIG)
    encoder, optimizer = config.model.encoder, config.train.optimizer
    assert (config.model.dim, encoder.num_layers, encoder.num_heads, encoder.dim_qk, encoder.dim_v) == (
        50,
        2,
        1,
        50,
        50,
    )
    assert (encoder.preset, encoder.divisor, encoder.dropout, config.model.preprocessor.dropout) == (
        "paper",
        211.0,
        0.2,
        0.2,
    )
    assert (config.layout.kind, config.layout.max_events, config.split.kind) == ("items", 200, "paper")
    assert config.objective.negatives() == type(config.objective.negatives())(kind="uniform", num=128, shared=False)
    assert (optimizer.lr, optimizer.betas, optimizer.weight_decay) == (1e-3, (0.9, 0.98), 0.0)
    assert (config.train.epochs, config.train.batching.batch_size, config.train.schedule.kind) == (101, 128, "constant")
    assert config.train.schedule.warmup_steps == 0 and config.train.clip_norm is None
