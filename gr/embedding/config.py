"""What tables are told: where their rows live, in which precision, and by which rule they learn."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from gr.config import runtime
from gr.errors import UserError

Sharding = Literal["row_wise", "table_wise", "column_wise"]
OWN_OPTIMIZERS = ("sgd", "adagrad", "rowwise_adagrad")


@dataclass(frozen=True, kw_only=True)
class TableOptimizerConfig:
    """The update rule of the tables; a step is ``-lr * factor * gradient / root``, with the schedule's factor.

    Attributes:
        kind: ``adamw``: a group of the dense parameters' AdamW, at ``train.optimizer.table_lr_factor``; local tables
            only. ``sgd``: root 1. ``adagrad``: root of the sum of squares of each number, plus eps.
            ``rowwise_adagrad``: that of the row's mean of squares, one number a row.
        lr: Peak learning rate of all but ``adamw``.
        eps: Added to the root.
    """

    kind: Literal["adamw", "sgd", "adagrad", "rowwise_adagrad"] = "adamw"
    lr: float = 0.02
    eps: float = 1e-8

    def __post_init__(self) -> None:
        if not 0 < self.lr < math.inf:
            raise UserError(f"lr is {self.lr!r}; it must be above 0")
        if not 0 < self.eps < math.inf:
            raise UserError(f"eps is {self.eps!r}; it must be above 0")


@dataclass(frozen=True, kw_only=True)
class TablesConfig:
    """Tables. What is learned depends, up to rounding, on ``rows`` and ``optimizer`` only: a run may be taken up again
    with another ``kind`` or ``sharding``.

    Attributes:
        kind: ``local``: every process holds all rows. ``sharded``: the processes of a job divide them; one process
            alone holds all.
        sharding: How a table is divided: by rows, whole tables among ranks, or by columns.
        constraints: Other choices for single tables, by name.
        rows: Precision in which rows are kept; gradients and sums of squares are fp32.
        optimizer: The update rule.
    """

    kind: Literal["local", "sharded"] = runtime("local")
    sharding: Sharding = runtime("row_wise")
    constraints: dict[str, Sharding] = field(default_factory=dict, metadata={"runtime": True})
    rows: Literal["fp32", "fp16"] = "fp32"
    optimizer: TableOptimizerConfig = TableOptimizerConfig()

    def __post_init__(self) -> None:
        kind = self.optimizer.kind
        if self.kind == "sharded" and kind == "adamw":
            raise UserError(
                f"optimizer.kind is {kind!r}, but sharded tables learn while gradients arrive, by "
                f"{', '.join(OWN_OPTIMIZERS[:-1])} or {OWN_OPTIMIZERS[-1]} (the Adam family has no such CPU kernel)"
            )
        if self.rows == "fp16" and kind == "adamw":
            raise UserError(
                f"rows is 'fp16', but optimizer.kind is {kind!r}, which would round what it learns to nothing; "
                f"it must be one of {', '.join(OWN_OPTIMIZERS)}"
            )
        divided = [name for name, how in self.constraints.items() if how == "column_wise"]
        if self.kind == "sharded" and kind == "rowwise_adagrad" and (divided or self.sharding == "column_wise"):
            raise UserError(
                "sharding is 'column_wise', but optimizer.kind is 'rowwise_adagrad', whose one number a row would "
                "differ between the parts of a row; use row_wise or table_wise, or adagrad"
            )

    @property
    def own_optimizer(self) -> bool:
        """Whether tables update themselves rather than through the dense parameters' optimizer."""
        return self.optimizer.kind != "adamw"

    def sharding_of(self, table: str) -> Sharding:
        """How a table is to be divided."""
        return self.constraints.get(table, self.sharding)
