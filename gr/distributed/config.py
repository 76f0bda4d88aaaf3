"""How a run is spread over processes, beyond what the launcher decides."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from gr.config import runtime
from gr.embedding.config import TablesConfig
from gr.errors import UserError


@dataclass(frozen=True, kw_only=True)
class DenseConfig:
    """How the processes of a job share what is not a table. What is learned does not depend on it, but for rounding: a
    run may be taken up again with another kind. One process alone shares nothing: there every kind is the plain model.

    Attributes:
        kind: ``ddp``: every process holds weights, gradients and moments. ``zero1``: moments are divided
            (DeepSpeed). ``zero2``: gradients, too. ``fsdp2``: weights, too; a layer is gathered while it works.
    """

    kind: Literal["ddp", "fsdp2", "zero1", "zero2"] = runtime("ddp")

    def check(self, accumulate: int, compiled: bool) -> None:
        """Refuses what a kind cannot do.

        Args:
            accumulate: Micro-batches per step.
            compiled: Whether the model is to run through torch.compile.

        Raises:
            UserError: As said.
        """
        if self.kind in ("zero1", "zero2") and accumulate > 1:
            raise UserError(
                f"train.accumulate is {accumulate}, but distributed.dense.kind {self.kind!r} divides gradients as they "
                "arrive, when the weight of later batches is not known; set it to 1, or use ddp or fsdp2"
            )
        if self.kind != "ddp" and compiled:
            raise UserError(
                f"train.compile is true, but distributed.dense.kind is {self.kind!r}, which was not made to work with "
                "it; set train.compile to false, or use ddp"
            )


@dataclass(frozen=True, kw_only=True)
class DistributedConfig:
    """Attributes:
    dense: What is not a table: who holds what of it.
    tables: Embedding tables: local or sharded, and how they learn.
    """

    dense: DenseConfig = runtime(DenseConfig())
    tables: TablesConfig = TablesConfig()
