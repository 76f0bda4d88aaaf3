"""A query is the model's output at a history's last token, whatever the encoder leaves out to get it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gr.data.layout import LayoutConfig, evaluation_batch
from gr.data.loader import EvalLoader
from gr.data.split import LeaveOneOutConfig, make_split
from gr.data.store import memory_store
from gr.evaluation.ranking import rank_targets
from gr.models.objectives import FullSoftmaxConfig
from gr.models.retrieval import ModelConfig, RetrievalModel
from gr.modules.encoders import ENCODERS

LENGTHS = (4, 9, 25, 3, 12)
ENCODER_CASES = {
    "paper": {"kind": "hstu", "preset": "paper", "num_heads": 2, "dim_qk": 8, "dim_v": 8, "num_layers": 3},
    "length": {"kind": "hstu", "divisor": "length", "dim_qk": 8, "dim_v": 8},
    "dlrm_v3": {"kind": "hstu", "preset": "dlrm_v3", "num_heads": 2, "dim_qk": 8, "dim_v": 8},
    "transformer": {"kind": "transformer", "num_heads": 2},
}


@pytest.mark.parametrize("kind", ["items", "interleaved", "added"])
@pytest.mark.parametrize("encoder", ENCODER_CASES.values(), ids=ENCODER_CASES.keys())
def test_a_query_is_the_whole_output_at_the_last_token(encoder, kind):
    rng = np.random.default_rng(0)
    store = memory_store(
        [rng.integers(0, 40, n) for n in LENGTHS],
        [1_600_000_000 + np.cumsum(rng.integers(1, 10**6, n)) for n in LENGTHS],
        [rng.integers(0, 2, n) for n in LENGTHS],
        num_items=40,
    )
    split, layout = make_split(LeaveOneOutConfig(), store), LayoutConfig(kind, 20)
    torch.manual_seed(0)
    cfg = ModelConfig(dim=16, encoder=ENCODERS[encoder["kind"]][0](**encoder))
    sizes = {"num_items": 40, "num_actions": 2, "max_tokens": layout.max_tokens}
    model = RetrievalModel(cfg, FullSoftmaxConfig(), layout=kind, **sizes).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    model.double()
    batch = evaluation_batch(store, split.test, np.arange(5), layout)
    with torch.no_grad():
        encoded, _ = model.encode(batch)
        expected = model.similarity.query(encoded[batch.last_positions()])
    torch.testing.assert_close(model.query(batch), expected)

    ranks = rank_targets(model, EvalLoader(store, split.test, layout, 2), mask_seen=False)
    scores = model.logits(expected, (0, 40))
    own = scores.gather(1, torch.from_numpy(ranks.target)[:, None])
    np.testing.assert_array_equal(ranks.better, (scores > own).sum(1).numpy())
