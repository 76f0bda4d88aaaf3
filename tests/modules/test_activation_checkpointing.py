"""Activation checkpointing changes what is kept, not what is learned: dropout included, bit for bit."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from gr.modules.hstu import HSTUConfig, build_hstu
from gr.modules.transformer import TransformerConfig, build_transformer

DIM, NUM_LAYERS = 16, 3
BUILDERS = {
    "hstu": lambda switch: build_hstu(
        HSTUConfig(num_layers=NUM_LAYERS, num_heads=2, dim_qk=8, dim_v=8, dropout=0.3, activation_checkpointing=switch),
        DIM,
        12,
    ),
    "transformer": lambda switch: build_transformer(
        TransformerConfig(num_layers=NUM_LAYERS, num_heads=2, dropout=0.3, activation_checkpointing=switch), DIM, 12
    ),
}


def ragged_batch() -> SimpleNamespace:
    lengths = torch.tensor([5, 1, 12])
    times = torch.randint(10**9, 2 * 10**9, (int(lengths.sum()),)).sort().values
    return SimpleNamespace(
        offsets=torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]),
        max_seq_len=12,
        num_tokens=int(lengths.sum()),
        tokens={"timestamp": times, "query_time": times + 60},
        rows={},
        index={},
    )


def learn(kind: str, switch: bool) -> tuple[list[torch.Tensor], int]:
    """(output and all gradients, how often layers ran)."""
    torch.manual_seed(0)
    encoder, batch = BUILDERS[kind](switch).train(), ragged_batch()
    runs = 0

    def count(*_: object) -> None:
        nonlocal runs
        runs += 1

    for layer in encoder.layers:
        layer.register_forward_pre_hook(count)
    x = torch.randn(batch.num_tokens, DIM, requires_grad=True)
    out = encoder(x, batch)
    out.square().sum().backward()
    gradients = [p.grad for p in encoder.parameters() if p.grad is not None]
    assert gradients
    return [out, x.grad, *gradients], runs


@pytest.mark.parametrize("kind", list(BUILDERS))
def test_outputs_and_gradients_are_the_same_and_layers_run_twice(kind):
    (plain, once), (kept, twice) = learn(kind, False), learn(kind, True)
    assert (once, twice) == (NUM_LAYERS, 2 * NUM_LAYERS)
    assert len(plain) == len(kept) and all(map(torch.equal, plain, kept))


@pytest.mark.parametrize("kind", list(BUILDERS))
def test_without_gradients_nothing_runs_twice(kind):
    encoder, batch = BUILDERS[kind](True).eval(), ragged_batch()
    runs: list[object] = []
    encoder.layers[0].register_forward_pre_hook(lambda *_: runs.append(1))
    with torch.no_grad():
        encoder(torch.randn(batch.num_tokens, DIM), batch)
    assert len(runs) == 1
