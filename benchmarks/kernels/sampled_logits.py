"""Sampled logits to be measured: a training step's shapes of ML-1M, and of a larger catalogue."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.kernels.registry import Case, Cost, Inputs, Operator
from gr.kernels.sampled_logits import op, sampled_logits


@dataclass(frozen=True, kw_only=True)
class LogitsCase(Case):
    """One batch: S supervised positions with R candidates each, of U vectors of width D."""

    positions: int
    candidates: int
    vectors: int
    dim: int


def _case(name: str, device: str, positions: int, candidates: int, vectors: int, dim: int) -> LogitsCase:
    shape = {"positions": positions, "candidates": candidates, "vectors": vectors, "dim": dim}
    return LogitsCase(name=name, family=name.removesuffix("-gpu"), device=device, **shape)


CASES = (
    _case("ml1m", "cpu", 13_000, 128, 3_706, 50),
    _case("large", "cpu", 2_000, 128, 100_000, 64),
    _case("ml1m-gpu", "cuda", 13_000, 128, 3_706, 50),
    _case("large-gpu", "cuda", 20_000, 512, 100_000, 64),
)


def make(case: LogitsCase, device: str, dtype: torch.dtype, seed: int) -> Inputs:
    """Normal vectors, candidates drawn uniformly with repetition."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    leaves = {"query": normal(case.positions, case.dim), "vectors": normal(case.vectors, case.dim)}
    shape = (case.positions, case.candidates)
    index = torch.randint(case.vectors, shape, generator=generator, device=device)
    leaves = {name: leaf.requires_grad_() for name, leaf in leaves.items()}
    return Inputs(leaves, {"index": index}, normal(*shape))


def run(inputs: Inputs, provider: str) -> Tensor:
    """The public operator with that backend."""
    return sampled_logits(inputs.leaves["query"], inputs.leaves["vectors"], inputs.fixed["index"], backend=provider)


def shorten(inputs: Inputs, scores: int) -> tuple[Inputs, Tensor]:
    """Evenly spaced positions, the first and the last among them."""
    index = inputs.fixed["index"]
    wanted = min(max(scores // max(index.shape[1], 1), 2), index.shape[0])
    kept = torch.linspace(0, index.shape[0] - 1, wanted, dtype=torch.float64).round().long().to(index.device)
    query, vectors = inputs.leaves["query"].detach()[kept], inputs.leaves["vectors"].detach().clone()
    leaves = {"query": query.requires_grad_(), "vectors": vectors.requires_grad_()}
    return Inputs(leaves, {"index": index[kept]}, inputs.grad[kept]), kept


def cost(inputs: Inputs) -> Cost:
    """One product forward, two of its size backward; every vector moves once, however often it is drawn."""
    query, vectors, index = inputs.leaves["query"], inputs.leaves["vectors"], inputs.fixed["index"]
    forward = 2 * index.numel() * query.shape[1]
    item = query.element_size()
    matrices, scores = (query.numel() + vectors.numel()) * item, index.numel() * item
    read = index.numel() * index.element_size()
    moved = {"fwd": matrices + read + scores, "bwd": 2 * matrices + read + scores}
    return Cost(index.shape[0], index.numel(), {"fwd": forward, "bwd": 2 * forward}, moved)


OPERATOR = Operator(
    name="sampled_logits",
    cases=CASES,
    providers=lambda: tuple(op.BACKENDS),
    make=make,
    run=run,
    shorten=shorten,
    by_row=("query",),
    cost=cost,
)
