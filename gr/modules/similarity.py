"""Score of a query against an item: ``scale * query(x) @ item(e).T``, the same for every caller."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from gr.errors import UserError

# Smallest norm divided by, as in the reference.
NORM_EPS = 1e-6


@dataclass(frozen=True, kw_only=True)
class SimilarityConfig:
    """How vectors are compared.

    Attributes:
        kind: "cosine" compares directions and divides by the temperature; "dot" is the plain product.
        temperature: Of the cosine; 0.05 in the paper's public experiments. "dot" has none.
    """

    kind: Literal["cosine", "dot"] = "cosine"
    temperature: float = 0.05

    def __post_init__(self) -> None:
        if not 0 < self.temperature < math.inf:
            raise UserError(f"similarity.temperature must be positive, got {self.temperature!r}")


class Similarity:
    """Transforms both sides so that a matrix product is the score. Has no parameters."""

    def __init__(self, config: SimilarityConfig) -> None:
        self.config = config
        self.scale = 1.0 / config.temperature if config.kind == "cosine" else 1.0

    def query(self, x: Tensor) -> Tensor:
        """``(..., D)`` -> ``(..., D)``."""
        return F.normalize(x, dim=-1, eps=NORM_EPS) if self.config.kind == "cosine" else x

    def item(self, e: Tensor) -> Tensor:
        """``(..., D)`` -> ``(..., D)``; may be applied once to a whole catalogue."""
        return F.normalize(e, dim=-1, eps=NORM_EPS) if self.config.kind == "cosine" else e
