"""What the runner knows of an operator: data (cases, costs) and a few small functions.

An operator's module holds ``OPERATOR``; its name stands in ``OPERATORS``. Providers are the operator's own backends,
read when they are asked for, so that a new backend is measured without a change here; functions of others that compute
the operator too (``package.module:function``); and other functions of the same shape (:class:`Other`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from gr.errors import UserError

OPERATORS = {
    "hstu_attention": "benchmarks.kernels.hstu_attention",
    "sampled_logits": "benchmarks.kernels.sampled_logits",
}
BASELINE = "reference"
"""The provider that defines the operator: what others are checked against and, on a CPU, compared with."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A named choice of shapes; operators add their own fields.

    Attributes:
        name: One case. Asked for by name it runs on any device.
        family: Name shared by the cases of several sizes; asked for by family, those for the device run.
        device: "cpu" or "cuda": where its size makes sense. "none": it runs by name only, to try the tools.
        against: Another case of the operator; it is timed alternately with this one, and their times per pair compared.
    """

    name: str
    family: str
    device: str
    against: str | None = None


@dataclass(frozen=True, eq=False)
class Inputs:
    """Arguments of one call.

    Attributes:
        leaves: Float tensors that get gradients.
        fixed: Everything else.
        grad: The gradient of the output.
    """

    leaves: dict[str, Tensor]
    fixed: dict[str, Any]
    grad: Tensor

    def to(self, dtype: torch.dtype) -> Inputs:
        """The same numbers in another dtype, as new leaves."""
        leaves = {name: leaf.detach().to(dtype).requires_grad_() for name, leaf in self.leaves.items()}
        return Inputs(leaves, self.fixed, self.grad.to(dtype))


@dataclass(frozen=True, eq=False)
class Call:
    """What is timed: arguments are ready.

    Attributes:
        run: Gives the output.
        leaves: What the backward pass gives gradients of.
        grad: The gradient of the output.
    """

    run: Callable[[], Tensor]
    leaves: list[Tensor]
    grad: Tensor


@dataclass(frozen=True)
class Other:
    """A function that people would use in the operator's place, and that computes something else.

    It is held to no definition here, and its figures count the operator's FLOPs, so that times are what is compared.

    Attributes:
        name: As a provider.
        about: What it computes, and how its FLOPs are counted.
        prepare: inputs -> call; a case that it cannot do is a ValueError starting with "backend".
    """

    name: str
    about: str
    prepare: Callable[[Inputs], Call]


@dataclass(frozen=True)
class Cost:
    """What one call must compute and move at least.

    Attributes:
        tokens: Rows of the output.
        pairs: (query, key) pairs that are not masked, or scores.
        flops: "fwd" and "bwd": a multiply-add is 2, matrix products only.
        bytes: "fwd" and "bwd": every argument read once, every result written once.
    """

    tokens: int
    pairs: int
    flops: dict[str, int]
    bytes: dict[str, int]


@dataclass(frozen=True)
class Operator:
    """An operator to be measured.

    Attributes:
        name: Key in ``OPERATORS``.
        cases: Their names are unique.
        providers: Names for ``run``, ``BASELINE`` among them.
        make: (case, device, dtype, seed) -> inputs. Sizes and costs are the case's alone; order of rows, values and
            times depend on the seed, so that nothing a provider remembers from another call is of use.
        run: (inputs, provider) -> output. A provider that the device lacks is a ValueError starting with "backend".
        shorten: (inputs, scores) -> (the same with fewer rows, about that many scores if padded; ``(rows,)`` int64, the
            rows of the output that are left).
        by_row: Leaves with a row for each row of the output, so that their gradients can be compared row by row.
        cost: inputs -> cost.
        others: Other functions to time beside it.
    """

    name: str
    cases: tuple[Case, ...]
    providers: Callable[[], tuple[str, ...]]
    make: Callable[[Any, str, torch.dtype, int], Inputs]
    run: Callable[[Inputs, str], Tensor]
    shorten: Callable[[Inputs, int], tuple[Inputs, Tensor]]
    by_row: tuple[str, ...]
    cost: Callable[[Inputs], Cost]
    others: tuple[Other, ...] = ()

    def other(self, provider: str) -> Other | None:
        """The other function of that name: one of ``others``, or an :class:`Other` that a dotted name leads to."""
        if ":" in provider:
            found = external(provider)
            return found if isinstance(found, Other) else None
        return next((other for other in self.others if other.name == provider), None)

    def call(self, inputs: Inputs, provider: str) -> Call:
        """A provider on these inputs, ready to be timed."""
        other = self.other(provider)
        if other is not None:
            return other.prepare(inputs)
        return Call(lambda: self.run(inputs, provider), list(inputs.leaves.values()), inputs.grad)

    def case(self, name: str) -> Case:
        """The case of that name, which exists."""
        return next(case for case in self.cases if case.name == name)

    def select(self, words: list[str] | None, device: str) -> list[Case]:
        """Cases by name, or by family and device; None: all cases for the device.

        Raises:
            UserError: A word is neither.
        """
        if words is None:
            return [case for case in self.cases if case.device == device]
        found: list[Case] = []
        for word in words:
            named = [case for case in self.cases if case.name == word]
            some = named or [case for case in self.cases if case.family == word and case.device == device]
            if not some:
                known = ", ".join(case.name for case in self.cases)
                raise UserError(f"--cases: {self.name} has no case or family {word!r} for {device}; cases are {known}")
            found += [case for case in some if case not in found]
        return found


def external(name: str) -> Any:
    """What ``package.module:name`` leads to: a function, or an :class:`Other`.

    Raises:
        UserError: There is none.
    """
    module, _, attribute = name.partition(":")
    try:
        return getattr(import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"--providers: {name!r} names nothing that can be imported: {error}") from error


def load(name: str) -> Operator:
    """The operator of that name.

    Raises:
        UserError: There is none.
    """
    if name not in OPERATORS:
        raise UserError(f"there is no operator {name!r} to measure; there are {', '.join(OPERATORS)}")
    return import_module(OPERATORS[name]).OPERATOR
