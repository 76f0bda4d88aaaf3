"""What the steps of a phase run on: the model as it is called, its optimizer, and how gradients of processes meet.

Outside stands one rule for all kinds: a step's gradient is that of a loss that was multiplied by ``world`` over the
global weight and averaged over ranks. Checkpoints know nothing of kinds: the model's weights and the moments of each
parameter go in and out whole.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gr.distributed.dense import no_sync, wrap
from gr.distributed.process import ProcessContext

MakeOptimizer = Callable[[Sequence[nn.Parameter], Sequence[nn.Parameter]], torch.optim.Optimizer]
"""``(dense, tables) -> optimizer``; its state is by parameter."""


class Engine:
    """Every process holds everything: data parallelism (DDP), or one process alone.

    Args:
        model: The bare model; ``forward(batch) -> Losses``.
        optimizer: Of its parameters that learn.
        dense: Those of them whose gradient is measured and clipped.
        ctx: Rank, world and device.
        clip_norm: Largest norm of their gradient; ``None``: not clipped.
        accumulate: Whether there are several micro-batches a step.
    """

    scale_first = False
    """Whether a loss must be scaled before ``backward``, rather than its gradient by ``update``."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        dense: Sequence[nn.Parameter],
        ctx: ProcessContext,
        *,
        clip_norm: float | None = None,
        accumulate: bool = False,
    ) -> None:
        self.optimizer, self.dense, self.ctx, self.clip_norm = optimizer, list(dense), ctx, clip_norm
        self.model = self._wrap(model, accumulate)

    def _wrap(self, model: nn.Module, accumulate: bool) -> nn.Module:
        return wrap(model, self.ctx, accumulate)

    # A step -------------------------------------------------------------------------------------------------

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The optimizer's; setting a group's ``lr`` sets it."""
        return self.optimizer.param_groups

    def zero_grad(self) -> None:
        """Forgets all gradients."""
        self.optimizer.zero_grad(set_to_none=True)

    def micro_batch(self, last: bool) -> contextlib.AbstractContextManager[None]:
        """Within it one forward and backward pass; gradients of all but the last only accumulate."""
        return contextlib.nullcontext() if last else no_sync(self.model)

    def backward(self, loss: Tensor) -> None:
        """Gradients of a () loss."""
        loss.backward()

    def update(self, scale: Tensor | None, sums: Tensor) -> Tensor:
        """Scales and clips the gradients and applies them, if ``sums`` and their norm (ZeRO: ``sums``) are finite.

        Args:
            scale: () what they are multiplied by; ``None``: the loss was.
            sums: (n,) float64 of the step, the same on every rank.

        Returns:
            () norm of the dense gradient before clipping.
        """
        if scale is not None:
            for group in self.param_groups:
                grads = [_local(p.grad) for p in group["params"] if p.grad is not None]
                if grads:
                    torch._foreach_mul_(grads, scale.to(grads[0].dtype))
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.dense if p.grad is not None])
        if self.clip_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self.dense, self.clip_norm, norm)
        norm = (norm.full_tensor() if hasattr(norm, "full_tensor") else norm).to(self.ctx.device)
        numbers = torch.cat([sums, norm.double().reshape(1)])
        if nobody_waits(numbers):
            _hold(self.optimizer, numbers)
        if not known_broken(numbers):
            self.optimizer.step()
        return norm

    # Between steps ------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def whole(self) -> Iterator[None]:
        """Within it the bare model holds all weights, to be read: evaluation, saving. A collective on entry."""
        yield

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's state as one process alone would have it: whole tensors by parameter. A collective."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what ``state_dict`` of any kind gave; all ranks hold all of it."""
        self.optimizer.load_state_dict(state)

    def close(self) -> None:
        """Gives the bare model all weights for good. A collective; the engine serves for nothing afterwards."""


def average_gradients(parameters: Sequence[nn.Parameter], ctx: ProcessContext) -> None:
    """Averages gradients over ranks in place, for parameters that every process holds and no wrapper looks after.

    A rank without a gradient has a gradient of zeros.
    """
    for parameter in parameters:
        if parameter.requires_grad and parameter.numel():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad)
            parameter.grad.div_(ctx.world)


def table_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Those of a model that has ``table_parameters()``; none of another."""
    return list(model.table_parameters()) if hasattr(model, "table_parameters") else []


def _local(tensor: Tensor) -> Tensor:
    """This process's part of a divided tensor, over the same memory."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def nobody_waits(numbers: Tensor) -> bool:
    """Whether a step goes on before its numbers are known: on a GPU."""
    return numbers.device.type != "cpu"


def known_broken(numbers: Tensor) -> bool:
    """Whether one of ``numbers`` is known not to be finite."""
    return not nobody_waits(numbers) and not bool(torch.isfinite(numbers).all())


def _hold(optimizer: torch.optim.Optimizer, numbers: Tensor) -> None:
    """From a step on of which one of ``numbers`` is not finite, a fused optimizer of plain tensors updates nothing.

    The next steps are taken before anybody looks; torch's gradient scaling asks for the same.
    """
    plain = not any(hasattr(p, "to_local") for group in optimizer.param_groups for p in group["params"])
    if plain and optimizer.defaults.get("fused"):
        broken = (~torch.isfinite(numbers).all()).float()
        before = getattr(optimizer, "found_inf", None)
        optimizer.found_inf = broken if before is None else torch.maximum(before, broken)
