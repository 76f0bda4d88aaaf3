"""The recipe from end to end on a tiny world, in this process."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from gr import config as configs
from gr.data.planted import PlantedConfig
from gr.data.split import LeaveOneOutConfig, make_split
from gr.data.store import memory_store
from gr.distributed.process import ProcessContext
from gr.errors import UserError
from gr.evaluation.controls import shuffle_targets
from gr.evaluation.metrics import means
from gr.evaluation.ranking import rank_targets
from gr.evaluation.saved_ranks import load_ranks
from gr.recipes import retrieval
from gr.recipes.stage import Stage, run_stage
from gr.training.assemble import assemble, eval_loader, open_data, train_loader
from gr.training.checkpoint import load_torch
from gr.training.phase import Phase
from gr.training.run_config import RunConfig
from gr.training.trainer import Trainer
from tiny_runs import WORLD, config, run_here

ALONE = ProcessContext()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    return folder, run_here(folder)


def test_a_run_leaves_config_environment_metrics_weights_ranks_results_and_report(finished):
    folder, results = finished
    run_dir = folder / "runs" / "tiny"
    for name in (
        "config.yaml",
        "env.json",
        "metrics.jsonl",
        "best.pt",
        "ranks_test.parquet",
        "results.json",
        "report.html",
    ):
        assert (run_dir / name).stat().st_size > 0, name
    assert json.loads((run_dir / "results.json").read_text()) == json.loads(json.dumps(results))
    assert results["audit"] == []
    found = means(load_ranks(run_dir / "ranks_test.parquet"))
    assert found["hr@10"] == pytest.approx(results["metrics"]["HSTU"]["hr@10"]["mean"])
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 10 and losses[-1] < losses[0]
    assert all(line["pairs"] > 0 and line["model_flops"] > 0 for line in lines if "loss" in line)


def test_the_resolved_config_of_a_run_loads_to_the_same_run(finished):
    folder, results = finished
    again = configs.load(RunConfig, folder / "runs" / "tiny" / "config.yaml")
    assert configs.config_hash(again) == results["config_hash"] == configs.config_hash(config(folder))


def test_a_finished_run_is_not_run_again(finished, monkeypatch):
    folder, results = finished
    for name in ("_train", "_baselines", "_evaluate"):
        monkeypatch.setattr(retrieval, name, lambda *a: pytest.fail("ran again"))
    assert run_here(folder) == json.loads(json.dumps(results))


def test_a_lost_output_is_made_again_from_the_stage_that_makes_it(finished, monkeypatch):
    folder, results = finished
    (folder / "runs" / "tiny" / "report.html").unlink()
    monkeypatch.setattr(retrieval, "_train", lambda *a: pytest.fail("trained again"))
    run_here(folder)
    assert (folder / "runs" / "tiny" / "report.html").exists()


def test_lost_weights_of_a_finished_run_come_back_from_its_last_checkpoint(finished):
    folder, _ = finished
    best = folder / "runs" / "tiny" / "best.pt"
    before = load_torch(best)["model"]
    best.unlink()
    run_here(folder)
    after = load_torch(best)["model"]
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_run_folder_of_another_config_is_refused(finished):
    folder, results = finished
    with pytest.raises(UserError, match=r"holds config \w{12}, this is config \w{12} .*seed 0 -> 5"):
        run_here(folder, "--seed", "5")


def events(path, users, length=8):
    rows = [f"u{u},i{(u * 7 + p * p) % 11},{1_600_000_000 + 600 * p}" for u in range(users) for p in range(length)]
    path.write_text("user_id,item_id,timestamp\n" + "\n".join(rows) + "\n")
    return {"kind": "table", "path": str(path)}


def test_a_log_that_changed_is_refused_and_not_judged_with_the_old_weights(tmp_path):
    """Two events less a user: what was trained on would now be held out."""
    data = events(tmp_path / "log.csv", 12)
    run_here(tmp_path, data=data)
    weights = (tmp_path / "runs" / "tiny" / "best.pt").read_bytes()
    events(tmp_path / "log.csv", 12, length=6)
    with pytest.raises(UserError, match="the log has changed since run .* was begun"):
        run_here(tmp_path, data=data)
    assert (tmp_path / "runs" / "tiny" / "best.pt").read_bytes() == weights
    from gr.inference.load import load_run

    loaded = load_run(tmp_path / "runs" / "tiny")  # the log that it was trained on still lies in the cache
    assert loaded.store.num_events == 12 * 8


def test_what_cannot_train_claims_no_run_folder(tmp_path):
    for overrides, words in (
        (("--split.kind", "paper"), "set train.early_stopping to null"),
        (("--layout.kind", "added"), "reads actions"),
    ):
        with pytest.raises(UserError, match=words):
            run_here(tmp_path, *overrides)
        assert not (tmp_path / "runs").exists()
    results = run_here(tmp_path, "--split.kind", "paper", "--train.early_stopping", "null")
    assert results["data"]["valid_targets"] == 0


def test_with_seen_items_masked_the_ceiling_is_that_of_masked_ranking_and_nothing_is_called_a_leak(tmp_path):
    results = run_here(tmp_path, "--evaluation.mask_seen", "true")
    plain = run_here(tmp_path, "--name", "plain")
    assert results["audit"] == [] and results["ceiling"]["hr@10"] < plain["ceiling"]["hr@10"]
    assert any("count as missed" in caveat for caveat in results["data"]["caveats"])
    for example in results["examples"]:
        assert not {row["title"] for row in example["recommended"]} & set(example["history"])


def test_a_stage_is_done_only_with_the_same_inputs_and_whole_outputs(tmp_path):
    calls = []

    def work(folder):
        calls.append(1)
        (tmp_path / "out.txt").write_text("x")
        return {"n": len(calls)}

    def go(value):
        return run_stage(Stage("s", {"v": value}, work, outputs=("out.txt",)), tmp_path, ALONE)["n"]

    assert [go(1), go(1), go(2), go(2)] == [1, 1, 2, 2]
    (tmp_path / "out.txt").unlink()
    assert go(2) == 3
    (tmp_path / "stages" / "s" / "artifact.json").write_text("{half")
    assert go(2) == 4


def train_on(folder, store, split, cfg):
    trainer = Trainer(
        assemble(cfg, store, split),
        [Phase()],
        train_loader(cfg, store, split, ALONE),
        None,
        cfg.train,
        ALONE,
        folder,
        0,
    )
    trainer.fit()
    trainer.model.eval()
    return rank_targets(trainer.model, eval_loader(cfg, store, split.test, ALONE), False)


def test_with_shuffled_targets_hstu_falls_to_popularity_and_without_it_does_not(tmp_path):
    """On a log where item i is always followed by i + 1; on the planted world the quality benchmark shows the same."""
    num_items, rng = 50, np.random.default_rng(0)
    rows = [(start + np.arange(8)) % num_items for start in rng.integers(0, num_items, 500)]
    times = [1_600_000_000 + np.arange(8) * 3600 for _ in rows]
    store = memory_store(rows, times, num_items=num_items)
    split = make_split(LeaveOneOutConfig(), store)
    cfg = config(tmp_path, "--train.epochs", "8", "--train.early_stopping", "null", "--train.batching.batch_size", "16")
    learned = means(train_on(tmp_path / "a", store, split, cfg))["hr@10"]
    control = means(train_on(tmp_path / "b", shuffle_targets(store, split, 0), split, cfg))["hr@10"]
    chance = 10 / num_items  # every item is as popular as every other
    assert learned > 0.9
    assert abs(control - chance) < 4 * math.sqrt(chance * (1 - chance) / len(split.test))


def test_a_planted_leak_is_found_by_the_run_itself(tmp_path, monkeypatch):
    """A split that trains on the test event: the audit sees the overlap, and the score may pass the ceiling."""
    real = retrieval.open_data

    def leaking(cfg):
        store, split = real(cfg)
        return store, type(split)(store.lengths.copy(), split.valid, split.test, split.kind)

    monkeypatch.setattr(retrieval, "open_data", leaking)
    names = {finding["name"] for finding in run_here(tmp_path)["audit"]}
    assert "train_test_overlap" in names


OBJECTIVES = (
    {"kind": "full_softmax"},
    {"kind": "sampled_softmax", "num_negatives": 16},
    {"kind": "sampled_softmax", "sampler": "popularity", "shared": True, "correct": True},
    {"kind": "in_batch"},
    {"kind": "bce", "num_negatives": 4},
)
ENCODERS = (
    {"kind": "hstu", "num_heads": 2, "dim_qk": 8, "dim_v": 8},
    {"kind": "hstu", "preset": "dlrm_v3", "dim_qk": 8, "dim_v": 8},
    {"kind": "transformer"},
)
CASES = [  # every objective, layout, encoder and similarity, each with several of the others
    (OBJECTIVES[i % 5], ("items", "interleaved", "added")[i % 3], ENCODERS[(i // 2) % 3], ("cosine", "dot")[i % 2])
    for i in range(10)
]


@pytest.mark.parametrize(("objective", "layout", "encoder", "similarity"), CASES)
def test_every_part_learns_with_every_other(tmp_path, objective, layout, encoder, similarity):
    cfg = config(
        tmp_path, "--layout.kind", layout, "--train.max_steps", "12", "--train.early_stopping", "null",
        data={**WORLD, "actions": True}, objective=objective,
        model={"dim": 16, "encoder": encoder, "similarity": {"kind": similarity}},
    )  # fmt: skip
    store, split = open_data(cfg)
    model = assemble(cfg, store, split)
    loader = train_loader(cfg, store, split, ALONE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    torch.manual_seed(0)
    losses = []
    for _ in range(12):
        found = model(loader.batch(0, 0, 0))
        (found.total / found.weight).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
        losses.append((found.total / found.weight).item())
    assert losses[-1] < losses[0]
    ranks = rank_targets(model, eval_loader(cfg, store, split.test, ALONE), True)
    assert (ranks.better >= 0).all() and (ranks.candidates < store.num_items).all()


def test_a_log_without_times_and_a_time_bias_are_one_sentence(tmp_path):
    (tmp_path / "log.csv").write_text(
        "user_id,item_id,position\n" + "".join(f"u{u},i{(u * 7 + p) % 9},{p}\n" for u in range(12) for p in range(5))
    )
    data = {"kind": "table", "path": str(tmp_path / "log.csv"), "timestamp": None, "position": "position"}
    with pytest.raises(UserError, match="time bias needs times"):
        run_here(tmp_path, data=data)
    results = run_here(tmp_path, "--model.encoder.time_bias", "false", "--name", "blind", data=data)
    assert any("no times" in caveat for caveat in results["data"]["caveats"])
    assert "no times" in (tmp_path / "runs" / "blind" / "report.html").read_text()


class LastItem(torch.nn.Module):
    """A user's own encoder: the last item, mapped. What an encoder must have, and no more."""

    @dataclass(frozen=True)
    class Config:
        kind: str
        bias: bool = True

    needs_times = False

    def __init__(self, config, dim, max_tokens):
        super().__init__()
        self.linear = torch.nn.Linear(dim, dim, bias=config.bias)

    def forward(self, x, batch):
        return self.linear(x)

    def pairs(self, batch):
        return batch.num_tokens

    def forward_flops(self, tokens, pairs):
        return {"linear": 2 * tokens * self.linear.weight.numel()}


def test_a_users_own_encoder_is_named_in_the_config_and_trained(tmp_path):
    encoder = {"kind": "test_retrieval_recipe:LastItem", "bias": False}
    results = run_here(tmp_path, model={"dim": 16, "encoder": encoder})
    assert results["metrics"]["test_retrieval_recipe:LastItem"]["hr@10"]["mean"] > 0
    assert results["model"]["parameters_dense"] == 16 * 16 + 12 * 16


def test_ids_that_no_float_can_hold_come_back_from_a_run_as_they_went_in(tmp_path):
    base = 2**53 + 1  # float64 would round it, int32 and float32 would lose it altogether
    rows = [f"{base + 2 * u},{base + 2 * ((u + p) % 9)},{1_600_000_000 + 60 * p}" for u in range(12) for p in range(6)]
    (tmp_path / "log.csv").write_text("user_id,item_id,timestamp\n" + "\n".join(rows) + "\n")
    results = run_here(tmp_path, data={"kind": "table", "path": str(tmp_path / "log.csv")})
    wanted = {str(base + 2 * i) for i in range(9)}
    for example in results["examples"]:
        assert {row["title"] for row in example["recommended"]} == wanted
        assert set(example["history"]) | {example["target"]} <= wanted
    assert results["data"]["items"] == 9 and results["data"]["users"] == 12


def test_weights_on_disk_are_the_weights_that_were_judged(finished):
    folder, results = finished
    cfg = config(folder)
    store, split = open_data(cfg)
    model = assemble(cfg, store, split)
    model.load_state_dict(load_torch(folder / "runs" / "tiny" / "best.pt")["model"])
    ranks = rank_targets(model, eval_loader(cfg, store, split.test, ALONE), False)
    saved = load_ranks(folder / "runs" / "tiny" / "ranks_test.parquet")
    np.testing.assert_array_equal(ranks.better, saved.better)
    assert (
        isinstance(cfg.data, PlantedConfig)
        and results["ceiling"]["hr@10"] > results["metrics"]["HSTU"]["hr@10"]["mean"] - 0.1
    )
