"""Whole models: training steps and inference.

The training step is that of the trainer (``run_step``: autocast, clipping of nothing, fused AdamW) on batches that lie
on the device already; loading is left out. Model FLOPs are 3x forward; NVIDIA's count, attention 3.5x, stands beside.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from benchmarks.gpu_check.correctness import refusal
from benchmarks.gpu_check.plan import Context, Result, Unit
from benchmarks.gpu_check.rates import best
from benchmarks.kernels import device as devices
from benchmarks.kernels.lengths import lengths
from benchmarks.kernels.targets import verdict

ITEMS = 10_000
NEGATIVES = 128
STEPS, WARM_UP = 10, 3


@dataclass(frozen=True)
class Shape:
    """A model and a batch."""

    key: str
    heads: int
    head_dim: int
    layers: int
    width: int
    rows: int
    longest: int
    law: str = "full"


FIXED = {"layers": 8, "width": 1024, "rows": 32, "longest": 4099}
TRAIN = (
    Shape("train-4x256", 4, 256, **FIXED),
    Shape("train-8x128", 8, 128, **FIXED),
    Shape("train-zipf-4x256", 4, 256, law="zipf", **FIXED),
    Shape("train-zipf-8x128", 8, 128, law="zipf", **FIXED),
)
# History of 1 to 2047 tokens, 1024 on average, and 2048 candidates a row: 98 K tokens.
INFERENCE = Shape("inference", 4, 128, layers=5, width=512, rows=32, longest=2047, law="uniform")
CANDIDATES = 2048
TINY = {"layers": 1, "width": 16, "rows": 3, "longest": 9}


def units(context: Context) -> Iterator[Unit]:
    """Training steps, then inference."""
    for shape in TRAIN[:1] if context.dry else TRAIN:
        yield Unit(shape.key, partial(train, shrink(shape, context.dry), context), about_s=30)
    yield Unit("inference", partial(infer, shrink(INFERENCE, context.dry), context), about_s=30)


def shrink(shape: Shape, dry: bool) -> Shape:
    """Tiny in a dry run."""
    return Shape(shape.key, 1, 16, law=shape.law, **TINY) if dry else shape


def refuse(context: Context) -> Result | None:
    """While the operator's checks are red."""
    return refusal(context.kept, best(context), "float16" if context.dry else "bfloat16")


def build(shape: Shape, context: Context) -> Any:
    """NVIDIA's benchmark layer: SiLU on u, v, q, k, norm, gate, projection; no bias of scores. A small item table."""
    from gr.models.objectives import SampledSoftmaxConfig
    from gr.models.retrieval import ModelConfig, RetrievalModel
    from gr.modules.hstu import HSTUConfig
    from gr.modules.preprocess import PreprocessorConfig

    torch.manual_seed(0)
    encoder = HSTUConfig(
        num_layers=shape.layers,
        num_heads=shape.heads,
        dim_qk=shape.head_dim,
        dim_v=shape.head_dim,
        dropout=0.0,
        alpha=shape.head_dim**-0.5,
        position_bias=False,
        time_bias=False,
        backend=best(context),
    )
    config = ModelConfig(dim=shape.width, encoder=encoder, preprocessor=PreprocessorConfig(dropout=0.0))
    objective = SampledSoftmaxConfig(num_negatives=NEGATIVES, shared=True)
    counts = {"num_items": ITEMS, "num_actions": 0, "layout": "items", "max_tokens": shape.longest}
    return RetrievalModel(config, objective, **counts).to(context.device)


def make_batch(shape: Shape, seed: int) -> Any:
    """Random items; every token but the last of a row is a label. On the host."""
    from gr.data.batch import JaggedBatch, Labels, Negatives

    rng = np.random.default_rng(seed)
    sizes = rng.permutation(np.maximum(lengths(shape.law, shape.rows, shape.longest), 2))
    offsets = np.concatenate(([0], np.cumsum(sizes)))
    tokens = int(offsets[-1])
    inside = np.ones(tokens, dtype=bool)
    inside[offsets[1:] - 1] = False
    position = np.flatnonzero(inside)
    items = rng.integers(0, ITEMS, tokens)
    return JaggedBatch(
        offsets=torch.from_numpy(offsets),
        max_seq_len=int(sizes.max()),
        num_tokens=tokens,
        tokens={"item_id": torch.from_numpy(items)},
        rows={"sample_key": torch.arange(shape.rows)},
        index={},
        labels=Labels(torch.from_numpy(position), torch.from_numpy(items[position + 1]), torch.ones(position.shape[0])),
        negatives=Negatives(torch.from_numpy(rng.integers(0, ITEMS, NEGATIVES))),
    )


def train(shape: Shape, context: Context) -> Result:
    """Median time of a step, and what follows from it."""
    from gr.distributed.engine import Engine
    from gr.distributed.process import ProcessContext
    from gr.training.config import OptimizerConfig
    from gr.training.optimizer import make_optimizer
    from gr.training.phase import Phase, StepContext
    from gr.training.step import run_step

    refused = refuse(context)
    if refused is not None:
        return refused
    device = torch.device(context.device)
    model = build(shape, context).train()
    dense = model.dense_parameters()
    optimizer = make_optimizer(dense, model.table_parameters(), OptimizerConfig())
    ctx = ProcessContext(device=device)
    engine = Engine(model, optimizer, dense, ctx)
    hosts = [make_batch(shape, seed) for seed in range(2)]
    costs, batches = [model.step_cost(batch) for batch in hosts], [batch.to(device) for batch in hosts]
    timer, spent = devices.timer(context.device), []
    for number in range(2 if context.dry else WARM_UP + STEPS):
        timer.start()
        run_step(
            engine, Phase(), [batches[number % 2]], 1, StepContext(step=number, seed=0), ctx, bf16=not context.dry,
        )  # fmt: skip
        spent.append(timer.stop())
    if context.dry:
        return {"say": "ran; a CPU gives no figures"}
    seconds = statistics.median(spent[WARM_UP:])
    cost = costs[0]  # both batches hold the same lengths
    attention = shape.layers * 4 * shape.heads * shape.head_dim * cost.pairs
    flops = cost.training_flops
    found = {
        "ms": 1e3 * seconds,
        "ms_spread": [1e3 * min(spent[WARM_UP:]), 1e3 * max(spent[WARM_UP:])],
        "tokens": cost.tokens,
        "tokens_per_s": cost.tokens / seconds,
        "model_tflops": flops / seconds / 1e12,
        "nvidia_count_tflops": (flops + 0.5 * attention) / seconds / 1e12,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
        "clocks": devices.clocks(),
    }
    return found | verdict(shape.key, found["model_tflops"])


def infer(shape: Shape, context: Context) -> Result:
    """The encoder alone in bfloat16: production's layer (``dlrm_v3``), candidates as targets."""
    from gr.data.batch import JaggedBatch
    from gr.modules.hstu import HSTUConfig, build_hstu

    refused = refuse(context)
    if refused is not None:
        return refused
    candidates = 4 if context.dry else CANDIDATES
    sizes = lengths(shape.law, shape.rows, shape.longest) + candidates
    offsets = torch.from_numpy(np.concatenate(([0], np.cumsum(sizes))))
    tokens = int(offsets[-1])
    config = HSTUConfig(
        preset="dlrm_v3", num_layers=shape.layers, num_heads=shape.heads, dim_qk=shape.head_dim,
        dim_v=shape.head_dim, dropout=0.0, backend=best(context),
    )  # fmt: skip
    torch.manual_seed(0)
    dtype = torch.float16 if context.dry else torch.bfloat16
    encoder = build_hstu(config, shape.width, int(sizes.max())).to(context.device, dtype).eval()
    targets = torch.full((shape.rows,), candidates)
    batch = JaggedBatch(offsets, int(sizes.max()), tokens, {}, {"num_targets": targets}, {}).to(context.device)
    x = torch.randn(tokens, shape.width, device=context.device, dtype=dtype)
    timer, spent = devices.timer(context.device), []
    with torch.no_grad():
        for _ in range(1 if context.dry else WARM_UP + STEPS):
            timer.start()
            out = encoder(x, batch)
            spent.append(timer.stop())
    assert bool(out.isfinite().all())
    if context.dry:
        return {"say": "ran; a CPU gives no figures"}
    ms = 1e3 * statistics.median(spent[WARM_UP:])
    return {"ms": ms, "tokens": tokens, "tokens_per_s": 1e3 * tokens / ms} | verdict("inference", ms)
