"""Designs: which runs a study is made of, before they are configs. ``design.kind`` chooses one.

::

    isoflop   every budget at every scale                    the surface L(N, D), and parabolas in log N
    grid      every scale with every number of tokens        the surface from runs that share no budget
    ladder    each budget at scales of its own               the compute line, where the best sizes are known
    length    isoflop, at several lengths of history         the term in mean attended history
    data      isoflop, on several numbers of training users  what passes over the same data are worth
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from gr.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One point of a design.

    Attributes:
        scale: The dial of the recipe.
        budget: Model FLOPs to spend; ``None``: what ``tokens`` cost.
        tokens: Tokens to read; ``None``: what ``budget`` buys.
        length: Events of a history that are read; ``None``: as the base config says.
        users: Users that train, an even sample; ``None``: all.
    """

    scale: float
    budget: float | None = None
    tokens: float | None = None
    length: int | None = None
    users: int | None = None

    @property
    def title(self) -> str:
        """For people."""
        said = f"scale {self.scale:g}"
        said += f" at {self.budget:g} FLOPs" if self.budget is not None else f" for {self.tokens:g} tokens"
        said += "" if self.length is None else f", {self.length} events"
        return said + ("" if self.users is None else f", {self.users} users")


def _positive(name: str, values: tuple[float, ...]) -> None:
    if not values or len(set(values)) < len(values) or min(values) <= 0:
        raise UserError(f"design.{name} is {list(values)}; it must be different numbers above 0")


@dataclass(frozen=True, kw_only=True)
class IsoFlop:
    """Every budget at every scale, in the order of the file."""

    kind: str = "isoflop"
    budgets: tuple[float, ...]
    scales: tuple[float, ...]

    def __post_init__(self) -> None:
        _positive("budgets", self.budgets)
        _positive("scales", self.scales)

    def cells(self) -> list[Cell]:
        """All of them."""
        return [Cell(scale=s, budget=c) for c, s in itertools.product(self.budgets, self.scales)]


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Every scale with every number of tokens; each cell is a budget of its own."""

    kind: str = "grid"
    tokens: tuple[float, ...]
    scales: tuple[float, ...]

    def __post_init__(self) -> None:
        _positive("tokens", self.tokens)
        _positive("scales", self.scales)

    def cells(self) -> list[Cell]:
        """All of them."""
        return [Cell(scale=s, tokens=d) for d, s in itertools.product(self.tokens, self.scales)]


@dataclass(frozen=True, kw_only=True)
class Ladder:
    """Rungs: the i-th budget at each of the i-th scales."""

    kind: str = "ladder"
    budgets: tuple[float, ...]
    scales: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        _positive("budgets", self.budgets)
        if len(self.scales) != len(self.budgets):
            have, need = len(self.scales), len(self.budgets)
            raise UserError(f"design.scales has {have} lists; a ladder has one for each of its {need} budgets")
        for i, scales in enumerate(self.scales):
            _positive(f"scales[{i}]", scales)

    def cells(self) -> list[Cell]:
        """Rung by rung."""
        return [Cell(scale=s, budget=c) for c, mine in zip(self.budgets, self.scales, strict=True) for s in mine]


@dataclass(frozen=True, kw_only=True)
class Length(IsoFlop):
    """Every budget at every scale and length of history."""

    kind: str = "length"
    lengths: tuple[int, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        _positive("lengths", self.lengths)

    def cells(self) -> list[Cell]:
        """All of them."""
        every = itertools.product(self.budgets, self.lengths, self.scales)
        return [Cell(scale=s, budget=c, length=n) for c, n, s in every]


@dataclass(frozen=True, kw_only=True)
class Data(IsoFlop):
    """Every budget at every scale and number of training users: where users are few, a budget reads them often."""

    kind: str = "data"
    users: tuple[int, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        _positive("users", self.users)

    def cells(self) -> list[Cell]:
        """All of them."""
        every = itertools.product(self.budgets, self.users, self.scales)
        return [Cell(scale=s, budget=c, users=u) for c, u, s in every]


DESIGNS: dict[str, tuple[type, Callable[..., Any]]] = {
    cls.kind: (cls, cls) for cls in (IsoFlop, Grid, Ladder, Length, Data)
}
