"""The rows that figures are judged by: what peers publish for one H100 in bfloat16, the floor and the target of each.

Rows of the operator name a case and a direction of :mod:`benchmarks.kernels.hstu_attention`; rows of whole models have
a unit of their own in :mod:`benchmarks.gpu_check.models` and ``long``. Sources of the peers' figures: tables that the
projects publish for their own kernels (Meta's generative-recommenders and tritonbench, NVIDIA's recsys-examples,
flash-attention 3), causal and at full length.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Target:
    """One row.

    Attributes:
        what: For people.
        unit: Of all figures.
        peers: Published figures.
        floor: What is owed.
        target: What is wanted.
        higher: Whether more is better.
        case: The operator's case, or None for a row of whole models.
        direction: "fwd", "bwd" or "fwd+bwd".
        measure: Of the measured row: "tflops"; "per_pair", the cost of a pair relative to that of the case's
            ``against``; "speed", its inverse (a bias leaves the pairs as they are).
    """

    what: str
    unit: str = "TFLOP/s"
    peers: str
    floor: float
    target: float
    higher: bool = True
    case: str | None = None
    direction: str = "fwd"
    measure: str = "tflops"

    def judge(self, value: float) -> str:
        """ "target", "floor" or "below"."""
        reaches = (lambda bar: value >= bar) if self.higher else (lambda bar: value <= bar)
        return "target" if reaches(self.target) else "floor" if reaches(self.floor) else "below"

    def value(self, row: dict[str, Any]) -> float:
        """What is judged of a row of :mod:`benchmarks.kernels.rows`."""
        of: dict[str, Callable[[], float]] = {
            "tflops": lambda: row["tflops"]["median"],
            "per_pair": lambda: row["per_pair"]["median"],
            "speed": lambda: 1 / row["per_pair"]["median"],
        }
        return of[self.measure]()


_STEP = "8-layer training step, hidden 1024, B 32"
_FIXED = {"peers": "NVIDIA CUTLASS 342 at 4x256 (34.5 % MFU, attention counted 3.5x)", "floor": 230, "target": 400}
_ZIPF = {"peers": "NVIDIA Triton 116 balanced, CUTLASS 310", "floor": 230, "target": 350}
_LONG = "against an SDPA-flash Transformer at N 8192, training step"

TARGETS = {
    "fwd-4096-4x128": Target(
        what="attention fwd, 4x128, N 4096, B 32", case="full-4096-4x128",
        peers="Meta Triton 362, CUTLASS 528, FA3 softmax 579", floor=450, target=560,
    ),
    "fwd-4096-4x64": Target(
        what="attention fwd, 4x64, N 4096, B 32", case="full-4096-4x64", peers="CUTLASS 416", floor=400, target=440
    ),
    "bwd-4096-4x128": Target(
        what="attention bwd, 4x128, N 4096, B 32", case="full-4096-4x128", direction="bwd", peers="CUTLASS 440",
        floor=350, target=450,
    ),
    "bwd-512-4x128": Target(
        what="attention bwd, 4x128, N 512, B 512", case="full-512-4x128", direction="bwd",
        peers="CUTLASS 201 (a third of the memory limit)", floor=280, target=400,
    ),
    "bias-4096-4x128": Target(
        what="fwd+bwd with position and time bias, N 4096, speed relative to none", unit="x", case="bias-4096-4x128",
        direction="fwd+bwd", measure="speed", peers="nobody maintains one", floor=0.65, target=0.80,
    ),
    "composed-4096-4x128": Target(
        what="window, context and targets at once, cost of a pair relative to plain", unit="x", higher=False,
        case="composed-4096-4x128", direction="fwd+bwd", measure="per_pair", peers="forbidden everywhere", floor=1.25,
        target=1.10,
    ),
    "train-4x256": Target(what=f"{_STEP}, T 4099, 4x256", **_FIXED),
    "train-8x128": Target(what=f"{_STEP}, T 4099, 8x128", **_FIXED),
    "train-zipf-4x256": Target(what=f"{_STEP}, Zipf 1.2 lengths to 4099, 4x256", **_ZIPF),
    "train-zipf-8x128": Target(what=f"{_STEP}, Zipf 1.2 lengths to 4099, 8x128", **_ZIPF),
    "inference": Target(
        what="inference, 5 layers, hidden 512, 99 K jagged tokens", unit="ms", peers="Meta 9.30", floor=9.3, target=6.0,
        higher=False,
    ),
    "end-to-end-8192": Target(
        what=f"{_LONG}, with stochastic length", unit="x", peers="paper 5.3 to 15.2", floor=5.3, target=15.2
    ),
}  # fmt: skip
ATTENTION = {key: target for key, target in TARGETS.items() if target.case is not None}


def verdict(key: str, value: float) -> dict[str, Any]:
    """A value beside its floor and target."""
    target = TARGETS[key]
    reached = target.judge(value)
    told = f"{value:.3g} {target.unit} (floor {target.floor:g}, target {target.target:g}): {reached}"
    return {"value": value, "unit": target.unit, "floor": target.floor, "target": target.target, "peers": target.peers,
            "what": target.what, "reached": reached, "say": told}  # fmt: skip


def of_row(row: dict[str, Any]) -> dict[str, Any] | None:
    """The verdict on a measured row of the operator, where it has a target."""
    for key, target in ATTENTION.items():
        if (target.case, target.direction) == (row["case"], row["direction"]):
            return verdict(key, target.value(row))
    return None
