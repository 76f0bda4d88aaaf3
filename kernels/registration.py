"""Registers operators with torch: opaque to compilers, with a fake and a backward.

``torch.library.custom_op`` does the same, but imports the compiler when an op is first called: 3 s of every process.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_LIBRARY = torch.library.Library("gr", "FRAGMENT")


class Op:
    """``gr::<name>``; called like the function that it was made of.

    Args:
        name: Must be new: torch would let a second op of the name take over in silence.
        function: Its annotations give the schema. It changes no argument and returns none, nor a view of one.
    """

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        if hasattr(torch.ops.gr, name):
            raise RuntimeError(f"gr::{name} is registered already")
        self.name = f"gr::{name}"
        schema = torch.library.infer_schema(function, mutates_args=())
        _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
        self._op = getattr(torch.ops.gr, name).default

    def __call__(self, *arguments: Any) -> Any:
        return self._op(*arguments)

    def register_fake(self, function: Callable[..., Any]) -> None:
        """Shapes, dtypes and strides of the outputs, for compilers."""
        torch.library.register_fake(self.name, function, lib=_LIBRARY)

    def register_autograd(self, backward: Callable[..., Any], *, setup_context: Callable[..., None]) -> None:
        """As ``torch.library.register_autograd``."""
        torch.library.register_autograd(self.name, backward, setup_context=setup_context, lib=_LIBRARY)

    def without_derivative(self) -> None:
        """Asking for a gradient through the op is an error, where torch would answer with none."""

        def backward(ctx: Any, *_: Any) -> None:
            raise RuntimeError(f"{self.name} has no derivative of its own")

        self.register_autograd(backward, setup_context=lambda ctx, inputs, output: None)


def op(name: str) -> Callable[[Callable[..., Any]], Op]:
    """Decorator: the function becomes ``gr::<name>``."""
    return lambda function: Op(name, function)
