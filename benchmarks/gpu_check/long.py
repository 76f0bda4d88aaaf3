"""A training step of HSTU against one of a softmax Transformer, at N = 8192; three factors, each printed apart.

- kernel: both on full rows.
- raggedness: HSTU on jagged rows against HSTU on full ones. The Transformer pads, so its step stays what it is.
  A Transformer that does not pad would gain this factor too.
- stochastic length (arXiv 2402.17152, section 3.2): HSTU on rows cut as it cuts them, against HSTU on whole rows.

Encoders alone, forward and backward, bfloat16, without dropout, both as eager torch around their attention. The
Transformer is pre-norm with a feed-forward part of four times its width and torch's flash kernel.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu_check.models import refuse
from benchmarks.gpu_check.plan import Context, Result, Unit
from benchmarks.gpu_check.rates import best
from benchmarks.kernels import device as devices
from benchmarks.kernels.lengths import lengths
from benchmarks.kernels.targets import verdict

REPEATS = 5
ALPHA = 1.6
"""Of stochastic length: a row longer than N^(alpha/2) is cut to that, except with probability N^alpha / length^2."""


@dataclass(frozen=True)
class Size:
    """Of both encoders and their batch."""

    layers: int
    width: int
    heads: int
    rows: int
    longest: int
    law: str = "uniform"


# Width and heads are the paper's encoder benchmark's.
FULL = Size(layers=4, width=512, heads=8, rows=16, longest=8192)
TINY = Size(layers=1, width=32, heads=2, rows=2, longest=20)


def units(context: Context) -> Iterator[Unit]:
    """One."""
    yield Unit("end-to-end-8192", partial(compare, TINY if context.dry else FULL, context), about_s=40)


class Block(nn.Module):
    """A Transformer's layer: ``x + attention(norm(x))``, then ``x + ffn(norm(x))``."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, N, D)`` to the same."""
        q, k, v = self.qkv(self.norms[0](x)).unflatten(-1, (3, self.heads, -1)).transpose(1, 3).unbind(2)
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norms[1](x))))


def cut(sizes: np.ndarray, longest: int, seed: int) -> np.ndarray:
    """``(B,)`` lengths after stochastic length."""
    kept = int(longest ** (ALPHA / 2))
    whole = np.random.default_rng(seed).random(len(sizes)) < longest**ALPHA / np.maximum(sizes, 1) ** 2.0
    return np.where((sizes <= kept) | whole, sizes, kept)


def compare(size: Size, context: Context) -> Result:
    """Times the Transformer on full rows, and HSTU on full, jagged and cut ones, in turn."""
    from gr.data.batch import JaggedBatch
    from gr.modules.hstu import HSTUConfig, build_hstu

    refused = refuse(context)
    if refused is not None:
        return refused
    device, dtype = context.device, torch.float16 if context.dry else torch.bfloat16
    head = size.width // size.heads
    config = HSTUConfig(
        num_layers=size.layers, num_heads=size.heads, dim_qk=head, dim_v=head, dropout=0.0, position_bias=False,
        time_bias=False, alpha=head**-0.5, backend=best(context),
    )  # fmt: skip
    torch.manual_seed(0)
    ours = build_hstu(config, size.width, size.longest).to(device, dtype).train()
    theirs = nn.Sequential(*(Block(size.width, size.heads) for _ in range(size.layers))).to(device, dtype).train()

    def step(model: nn.Module, x: Tensor, *more: JaggedBatch) -> None:
        out = model(x, *more)
        torch.autograd.grad(out, [x, *model.parameters()], torch.ones_like(out), allow_unused=True)

    def jagged(sizes: np.ndarray) -> Callable[[], None]:
        offsets = torch.from_numpy(np.concatenate(([0], np.cumsum(sizes))))
        batch = JaggedBatch(offsets, int(sizes.max()), int(offsets[-1]), {}, {}, {}).to(torch.device(device))
        x = torch.randn(batch.num_tokens, size.width, device=device, dtype=dtype, requires_grad=True)
        return partial(step, ours, x, batch)

    full, mixed = (lengths(law, size.rows, size.longest) for law in ("full", size.law))
    short = cut(mixed, size.longest, seed=0)
    x = torch.randn(size.rows, size.longest, size.width, device=device, dtype=dtype, requires_grad=True)
    calls = {
        "transformer": partial(step, theirs, x), "hstu": jagged(full), "hstu jagged": jagged(mixed),
        "hstu cut": jagged(short),
    }  # fmt: skip
    timer = devices.timer(device)
    spent: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(-1, 0 if context.dry else REPEATS):
        for name, call in calls.items():
            timer.start()
            call()
            took = timer.stop()
            if repeat >= 0:
                spent[name].append(took)
    if context.dry:
        return {"say": "ran; a CPU gives no figures"}
    ms = {name: 1e3 * statistics.median(each) for name, each in spent.items()}
    factors = {
        "kernel": ms["transformer"] / ms["hstu"],
        "raggedness": ms["hstu"] / ms["hstu jagged"],
        "stochastic length": ms["hstu jagged"] / ms["hstu cut"],
    }
    tokens = {"full": int(full.sum()), "jagged": int(mixed.sum()), "cut": int(short.sum())}
    found = verdict("end-to-end-8192", ms["transformer"] / ms["hstu cut"])
    told = ", ".join(f"{name} {value:.2f}x" for name, value in factors.items())
    return found | {"ms": ms, "factors": factors, "tokens": tokens, "say": f"{found['say']} ({told})"}
