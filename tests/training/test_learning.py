"""What a step learns from: one normaliser, clipping, groups, selection; and no going on with nonsense."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from gr.distributed.engine import Engine
from gr.distributed.process import ProcessContext
from gr.errors import UserError
from gr.training.checkpoint import find_checkpoint
from gr.training.config import EarlyStoppingConfig, OptimizerConfig, ScheduleConfig
from gr.training.optimizer import make_optimizer, split_parameters
from gr.training.phase import Phase, StepContext
from gr.training.step import run_step
from gr.training.weights import load_weights
from tiny_training import TinyLoader, TinyModel, same, tiny_config, tiny_trainer, weights


def read(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_two_micro_batches_learn_as_one_batch_of_twice_the_size(tmp_path):
    results = {}
    for name, size, accumulate in [("one", 16, 1), ("two", 8, 2), ("uneven", 5, 4)]:
        # 32 sequences: 5 a batch leaves a last step of fewer micro-batches, 20 + 12 sequences, compared on
        # its own.
        loader = TinyLoader(users=20 if name == "uneven" else 32, batch_size=size)
        trainer = tiny_trainer(
            tmp_path / name,
            tiny_config(accumulate=accumulate, log_every_steps=1),
            model=TinyModel(0.0),
            loader=loader,
        )
        results[name] = trainer.fit(), weights(trainer.model), read(tmp_path / name)
    one, two = results["one"], results["two"]
    assert one[0].step == two[0].step == 6
    assert [line["loss"] for line in one[2]] == pytest.approx([line["loss"] for line in two[2]], rel=1e-5)
    assert [line["grad_norm"] for line in one[2]] == pytest.approx([line["grad_norm"] for line in two[2]], rel=1e-4)
    for name, value in one[1].items():
        torch.testing.assert_close(two[1][name], value, rtol=1e-4, atol=1e-5)
    whole = tiny_trainer(
        tmp_path / "whole", tiny_config(), model=TinyModel(0.0), loader=TinyLoader(users=20, batch_size=20)
    )
    whole.fit()
    for name, value in weights(whole.model).items():
        torch.testing.assert_close(results["uneven"][1][name], value, rtol=1e-4, atol=1e-5)


def test_the_gradient_is_that_of_the_weighted_mean():
    model, loader = TinyModel(0.0), TinyLoader(batch_size=8)
    batches = [loader.batch(0, index, 0) for index in range(3)]
    parameters = list(model.parameters())
    losses = [model(batch) for batch in batches]
    mean = sum(item.total for item in losses) / sum(item.weight for item in losses)
    expected = torch.autograd.grad(mean, parameters)
    optimizer = torch.optim.SGD(parameters, lr=0.0)
    result = run_step(
        Engine(model, optimizer, [model.linear.weight, model.linear.bias], ProcessContext()),
        Phase(),
        batches,
        3,
        StepContext(0, 0),
        ProcessContext(),
        bf16=False,
    )
    for parameter, gradient in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
    assert float(result.sums[0] / result.sums[1]) == pytest.approx(mean.item(), rel=1e-6)
    assert float(result.grad_norm) == pytest.approx(float(nn.utils.get_total_norm(expected[1:])), rel=1e-6)


def test_clipping_bounds_dense_parameters_and_leaves_tables_alone():
    model, loader = TinyModel(0.0), TinyLoader(batch_size=8)
    dense, tables = split_parameters(model, list(model.parameters()))
    assert [id(p) for p in tables] == [id(model.table.weight)] and len(dense) == 2
    free = torch.autograd.grad(model(loader.batch(0, 0, 0)).total / model(loader.batch(0, 0, 0)).weight, tables)[0]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    context = StepContext(0, 0)
    batches = [loader.batch(0, 0, 0)]
    engine = Engine(model, optimizer, dense, ProcessContext(), clip_norm=1e-3)
    run_step(engine, Phase(), batches, 1, context, ProcessContext(), bf16=False)
    assert float(nn.utils.get_total_norm([p.grad for p in dense])) == pytest.approx(1e-3, rel=1e-3)
    torch.testing.assert_close(tables[0].grad, free)


def test_only_dense_matrices_are_decayed_and_tables_have_their_own_rate():
    model = TinyModel()
    dense, tables = split_parameters(model, list(model.parameters()))
    optimizer = make_optimizer(dense, tables, OptimizerConfig(lr=0.1, weight_decay=0.3, table_lr_factor=2.0))
    settings = [(len(g["params"]), g["base_lr"], g["weight_decay"]) for g in optimizer.param_groups]
    assert settings == [(1, 0.1, 0.3), (1, 0.1, 0.0), (1, 0.2, 0.0)]


def test_training_lowers_the_loss_and_counts_exactly(tmp_path):
    trainer = tiny_trainer(tmp_path, tiny_config(epochs=20, log_every_steps=8))
    result = trainer.fit()
    lines = read(tmp_path)
    assert lines[-1]["loss"] < 0.7 * lines[0]["loss"]
    loader = TinyLoader()
    tokens = sum(loader.batch(e, i, 0).num_tokens for e in range(20) for i in range(loader.num_batches(e)))
    assert result.total.tokens == lines[-1]["tokens"] == tokens
    assert result.model_flops == lines[-1]["model_flops"] == 3 * (2**62 + 1) * result.step
    assert result.total.pairs == 3 * tokens
    assert lines[0]["parts"]["next_item"] == pytest.approx(lines[0]["loss"], rel=1e-6)
    assert result.seconds > 0 and result.tokens_per_s == tokens / result.seconds


def test_the_seed_decides_everything(tmp_path):
    runs = []
    for number, seed in enumerate([1, 1, 2]):
        trainer = tiny_trainer(tmp_path / str(number), tiny_config(epochs=1), seed=seed)
        trainer.fit()
        runs.append(weights(trainer.model))
    assert same(runs[0], runs[1]) and not same(runs[0], runs[2])


def test_max_steps_ends_training_within_an_epoch(tmp_path):
    result = tiny_trainer(tmp_path, tiny_config(max_steps=11), evaluate=lambda model: {"ndcg@10": 0.5}).fit()
    assert result.step == 11
    assert [line["step"] for line in read(tmp_path) if "evaluation" in line] == [8, 11]


def test_early_stopping_stops_after_patience_and_keeps_the_best_weights(tmp_path):
    values = iter([0.1, 0.4, 0.3, 0.35, 0.9])
    seen = []

    def evaluate(model):
        assert not model.training and not torch.is_grad_enabled()
        seen.append(weights(model))
        return {"ndcg@10": next(values)}

    config = tiny_config(epochs=9, early_stopping=EarlyStoppingConfig(patience=2))
    trainer = tiny_trainer(tmp_path, config, evaluate=evaluate)
    result = trainer.fit()
    assert (len(seen), result.best_step, result.best_metrics) == (4, 16, {"ndcg@10": 0.4})
    assert same(weights(trainer.model), seen[1])
    other = TinyModel()
    assert load_weights(other, tmp_path / "best.pt") == {"step": 16, "metrics": {"ndcg@10": 0.4}}
    assert same(weights(other), seen[1])


def test_patience_zero_only_selects_and_mode_min_prefers_less(tmp_path):
    values = iter([0.4, 0.1, 0.2, 0.3])
    config = tiny_config(epochs=4, early_stopping=EarlyStoppingConfig("ne", patience=0, mode="min"))
    result = tiny_trainer(tmp_path, config, evaluate=lambda model: {"ne": next(values)}).fit()
    assert (result.step, result.best_step) == (32, 16)


def test_without_selection_the_last_weights_are_kept(tmp_path):
    values = iter([0.9, 0.1, 0.2])
    trainer = tiny_trainer(tmp_path, evaluate=lambda model: {"ndcg@10": next(values)})
    result = trainer.fit()
    other = TinyModel()
    assert load_weights(other, tmp_path / "best.pt")["step"] == result.best_step == 24
    assert same(weights(other), weights(trainer.model))


@pytest.mark.parametrize("metrics", [{"hr@10": 0.2}, {"ndcg@10": float("nan")}])
def test_a_metric_that_evaluation_does_not_give_is_named(tmp_path, metrics):
    config = tiny_config(early_stopping=EarlyStoppingConfig())
    with pytest.raises(UserError, match=r"early_stopping.metric 'ndcg@10' has no finite value; evaluation gave"):
        tiny_trainer(tmp_path, config, evaluate=lambda model: metrics).fit()


def test_selection_without_validation_is_refused(tmp_path):
    with pytest.raises(UserError, match="no validation targets; set early_stopping: null"):
        tiny_trainer(tmp_path, tiny_config(early_stopping=EarlyStoppingConfig()))


def test_a_non_finite_loss_names_the_step_and_is_never_saved(tmp_path):
    class Diverging(TinyModel):
        calls = 0

        def forward(self, batch):
            Diverging.calls += 1
            losses = super().forward(batch)
            return replace(losses, total=losses.total * (float("nan") if Diverging.calls == 6 else 1.0))

    advice = r"lower --train.optimizer.lr \(now 0.05\), set --train.clip_norm \(now 0.5\) to 1.0;"
    with pytest.raises(UserError, match=f"diverged at step 6: loss nan.*{advice}"):
        tiny_trainer(tmp_path, tiny_config(checkpoint_every_steps=1), model=Diverging()).fit()
    assert find_checkpoint(tmp_path / "checkpoints").path.name == "step-00000005"


def test_a_loss_without_labels_is_not_silently_a_success(tmp_path):
    class Unlabelled(TinyLoader):
        def batch(self, epoch, index, step):
            batch = super().batch(epoch, index, step)
            return batch.replace(labels=replace(batch.labels, weight=torch.zeros_like(batch.labels.weight)))

    with pytest.raises(UserError, match="held no label to learn from"):
        tiny_trainer(tmp_path / "a", loader=Unlabelled()).fit()
    with pytest.raises(UserError, match="gives no batch"):
        tiny_trainer(tmp_path / "b", loader=TinyLoader(users=0)).fit()


def test_a_warm_up_longer_than_training_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"schedule.warmup_steps is 24 but training has only 24 steps"):
        tiny_trainer(tmp_path, tiny_config(schedule=ScheduleConfig(warmup_steps=24))).fit()


def test_the_loss_in_bf16_is_close_to_fp32(tmp_path):
    losses = []
    for precision in ("fp32", "bf16"):
        config = tiny_config(epochs=1, precision=precision, log_every_steps=8)
        trainer = tiny_trainer(tmp_path / precision, config, model=TinyModel(0.0))
        losses.append(trainer.fit().loss)
        assert all(p.dtype == torch.float32 for p in trainer.model.parameters())
    assert losses[0] != losses[1] and losses[1] == pytest.approx(losses[0], rel=1e-2)


@pytest.mark.parametrize("units", [True, False])
def test_bf16_without_units_for_it_is_said_to_be_slow(tmp_path, monkeypatch, capsys, units):
    monkeypatch.setattr("gr.training.trainer.has_bf16_units", lambda: units)
    tiny_trainer(tmp_path, tiny_config(epochs=1, max_steps=1, precision="bf16")).fit()
    printed = capsys.readouterr()
    assert ("precision fp32 is faster" in printed.out + printed.err) != units
