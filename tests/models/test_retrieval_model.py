"""The whole model: one look-up, independence of batch-mates, ids that stay integers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from gr.data.layout import LayoutConfig, evaluation_batch, training_batch
from gr.data.loader import BatchingConfig, TrainLoader
from gr.data.negatives import make_sampler
from gr.data.split import LeaveOneOutConfig, make_split
from gr.data.store import memory_store
from gr.models.objectives import BCEConfig, FullSoftmaxConfig, SampledSoftmaxConfig
from gr.models.retrieval import ModelConfig, RetrievalModel
from gr.modules.encoders import ENCODERS
from gr.modules.similarity import SimilarityConfig

LENGTHS = (4, 9, 30, 3, 12)
ENCODER_CASES = {
    "paper": {"kind": "hstu", "preset": "paper", "num_heads": 2, "dim_qk": 8, "dim_v": 8},
    "visible": {"kind": "hstu", "divisor": "visible", "num_heads": 2, "dim_qk": 8, "dim_v": 8},
    "dlrm_v3": {"kind": "hstu", "preset": "dlrm_v3", "num_heads": 2, "dim_qk": 8, "dim_v": 8},
    "transformer": {"kind": "transformer", "num_heads": 2},
}


def world(num_items=40):
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, num_items, n) for n in LENGTHS]
    times = [1_600_000_000 + np.cumsum(rng.integers(1, 10**6, n)) for n in LENGTHS]
    actions = [rng.integers(0, 2, n) for n in LENGTHS]
    store = memory_store(rows, times, actions, num_items=num_items)
    return store, make_split(LeaveOneOutConfig(), store)


def make_model(encoder, layout, objective=None, num_items=40, **model):
    kind = ENCODERS[encoder["kind"]][0]
    torch.manual_seed(0)
    cfg = ModelConfig(dim=16, encoder=kind(**encoder), **model)
    built = RetrievalModel(
        cfg, objective or FullSoftmaxConfig(), num_items=num_items, num_actions=2, layout=layout.kind,
        max_tokens=layout.max_tokens,
    )  # fmt: skip
    with torch.no_grad():  # away from the near-zero initial state, where a mistake would be invisible
        for parameter in built.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return built.eval()


@pytest.mark.parametrize("layout", ["items", "interleaved", "added"])
@pytest.mark.parametrize("encoder", ENCODER_CASES)
def test_a_users_scores_do_not_change_with_batch_mates(encoder, layout):
    store, split = world()
    layout = LayoutConfig(layout, 30)
    model = make_model(ENCODER_CASES[encoder], layout)
    together = model.scores(evaluation_batch(store, split.test, np.arange(5), layout), (0, 40))
    alone = torch.cat(
        [model.scores(evaluation_batch(store, split.test, np.array([i]), layout), (0, 40)) for i in range(5)]
    )
    # fp32 rounding of sums over at most 60 tokens and 16 channels
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5 * float(alone.abs().max()))


@pytest.mark.parametrize("encoder", ENCODER_CASES)
def test_what_comes_later_does_not_change_an_earlier_loss(encoder):
    store, split = world()
    layout = LayoutConfig("items", 30)
    model = make_model(ENCODER_CASES[encoder], layout)
    batch = training_batch(store, split, layout, np.array([2]))
    with torch.no_grad():
        whole, _ = model.encode(batch)
        items = batch.tokens["item_id"].clone()
        items[-1] = (items[-1] + 1) % 40
        changed, _ = model.encode(batch.replace(tokens={**batch.tokens, "item_id": items}))
    torch.testing.assert_close(whole[:-1], changed[:-1])
    assert not torch.allclose(whole[-1], changed[-1])


def test_tokens_labels_and_negatives_are_looked_up_at_once_and_full_range_scores_join():
    store, split = world()
    layout = LayoutConfig("items", 30)
    model = make_model(ENCODER_CASES["paper"], layout, SampledSoftmaxConfig(num_negatives=3))
    calls = []
    model.tables.register_forward_pre_hook(lambda module, args: calls.append(args[0]))
    sampler = make_sampler(SampledSoftmaxConfig(num_negatives=3).negatives(), store, split)
    batch = TrainLoader(store, split, layout, BatchingConfig(batch_size=8), sampler, 0).batch(0, 0, 0)
    model(batch)
    assert len(calls) == 1
    supervised = batch.labels.item_id.numel()
    assert 3 * supervised > 40, "more draws than items: each item is looked up once"
    assert calls[0]["item"].numel() == batch.num_tokens + supervised + 40

    batch = evaluation_batch(store, split.test, np.arange(5), layout)
    score = model.scorer(batch)
    parts = torch.cat([score((lo, lo + 10)) for lo in range(0, 40, 10)], dim=1)
    torch.testing.assert_close(parts, model.scores(batch, (0, 40)))
    torch.testing.assert_close(model.recommend(batch, 5).scores, parts.topk(5).values)


@pytest.mark.parametrize("objective", [SampledSoftmaxConfig(num_negatives=3), BCEConfig(num_negatives=3)])
def test_the_loss_is_the_same_whether_draws_are_looked_up_or_index_the_catalogue(objective):
    store, split = world()
    layout = LayoutConfig("items", 30)
    model = make_model(ENCODER_CASES["paper"], layout, objective).double().eval()
    sampler = make_sampler(objective.negatives(), store, split)
    batch = TrainLoader(store, split, layout, BatchingConfig(batch_size=8), sampler, 0).batch(0, 0, 0)
    table = model.tables.weights["item"]

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        loss = model(batch).total
        return loss.detach(), torch.autograd.grad(loss, table)[0]

    indexed = run()
    model.num_items = batch.negatives.ids.numel() + 1
    for one, other in zip(indexed, run(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_excluded_items_are_not_recommended_and_too_few_leave_minus_one():
    store, split = world()
    layout = LayoutConfig("items", 30)
    model = make_model(ENCODER_CASES["paper"], layout)
    batch = evaluation_batch(store, split.test, np.arange(2), layout)
    exclude = torch.ones(2, 40, dtype=torch.bool)
    exclude[0, 7] = False
    ranked = model.recommend(batch, 3, exclude)
    assert ranked.items[0].tolist() == [7, -1, -1] and ranked.items[1].tolist() == [-1, -1, -1]


def test_step_cost_counts_the_pairs_of_the_mask_and_the_scores_of_the_objective():
    store, split = world()
    layout = LayoutConfig("items", 30)
    model = make_model(ENCODER_CASES["paper"], layout, similarity=SimilarityConfig(kind="dot"))
    batch = training_batch(store, split, layout, np.arange(5)[split.train_stop >= 2])
    lengths = batch.offsets.diff().tolist()
    cost = model.step_cost(batch)
    assert cost.tokens == sum(lengths)
    assert cost.pairs == sum(n * (n + 1) // 2 for n in lengths)
    encoder = 2 * (2 * cost.tokens * 16 * (4 * 16) + 2 * 2 * 16 * cost.pairs + 2 * cost.tokens * 16 * 16)
    assert cost.forward_flops == encoder + 2 * cost.tokens * 16 * 40


class HashedTables(nn.Module):
    """Stands for a table of 2**40 rows: keeps the exact ids that it was asked for."""

    def __init__(self, dim):
        super().__init__()
        self.small = nn.Parameter(torch.randn(97, dim))
        self.asked = []

    def forward(self, ids, full_softmax=()):
        self.asked.append(ids["item"].clone())
        return {name: self.small[rows % 97] for name, rows in ids.items()}


def test_ids_above_two_to_the_24_and_31_reach_the_tables_as_they_are():
    ids = np.array([2**24 + 1, 2**24 + 3, 2**31 + 1, 2**33 + 5, 2**40 - 1])
    store = memory_store([ids[[i % 5, (i + 1) % 5, (i + 2) % 5, (i + 3) % 5, (i + 4) % 5]] for i in range(6)],
                         [np.arange(5) * 100 for _ in range(6)], num_items=2**40)  # fmt: skip
    split = make_split(LeaveOneOutConfig(), store)
    layout = LayoutConfig("items", 8)
    model = make_model(ENCODER_CASES["paper"], layout, SampledSoftmaxConfig(num_negatives=50), num_items=40)
    model.tables, model.num_items = HashedTables(16), store.num_items
    sampler = make_sampler(SampledSoftmaxConfig(num_negatives=50).negatives(), store, split)
    batch = TrainLoader(store, split, layout, BatchingConfig(batch_size=8), sampler, 0).batch(0, 0, 0)
    model(batch)
    asked = model.tables.asked[0]
    supervised = batch.labels.item_id.numel()
    tokens, labels, negatives = asked.split([batch.num_tokens, supervised, 50 * supervised])
    assert set(tokens.tolist()) <= set(ids.tolist()) and set(labels.tolist()) <= set(ids.tolist())
    assert {2**24 + 1, 2**31 + 1} & set(tokens.tolist())
    assert negatives.max() > 2**31 and (negatives % 2 == 1).any() and negatives.min() >= 0
