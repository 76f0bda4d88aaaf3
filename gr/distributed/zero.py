"""DeepSpeed's ZeRO, stages 1 and 2: every process holds the weights; moments (and gradients) are divided.

DeepSpeed is given the dense parameters alone: it broadcasts and flattens what it is given, which divided tables do not
survive. Tables that every process holds keep an optimizer of their own.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gr.distributed.dense import PlainOutput, Wrapped
from gr.distributed.engine import Engine, MakeOptimizer, average_gradients, known_broken, table_parameters
from gr.distributed.process import ProcessContext, when_leaving
from gr.errors import UserError

MOMENTS = ("exp_avg", "exp_avg_sq")


class ZeroEngine(Engine):
    """See the module; arguments as of ``make_engine``, and ZeRO's ``stage``."""

    scale_first = True  # a gradient is out of reach once it is divided

    def __init__(
        self,
        model: nn.Module,
        dense: Sequence[nn.Parameter],
        tables: Sequence[nn.Parameter],
        make_optimizer: MakeOptimizer,
        ctx: ProcessContext,
        *,
        clip_norm: float | None,
        stage: int,
    ) -> None:
        deepspeed = _deepspeed(ctx)
        self._tables = table_parameters(model)
        self._of_tables = make_optimizer((), tables) if tables else None
        self._marks = {parameter: set(vars(parameter)) for parameter in dense}
        plain = PlainOutput(model)
        with _local_rank(ctx):
            self._deepspeed, self._zero, _, _ = deepspeed.initialize(
                model=_DenseOnly(plain, dense),
                optimizer=make_optimizer(dense, ()),
                config={
                    "train_micro_batch_size_per_gpu": 1,
                    "gradient_clipping": clip_norm or 0.0,
                    "zero_optimization": {"stage": stage},
                    "zero_allow_untested_optimizer": True,
                    "steps_per_print": sys.maxsize,
                },
            )
        # Holds parameters as one process alone would, for the layout of checkpoints; its state is empty.
        layout = make_optimizer(dense, tables)
        called = Wrapped(_WithAutocast(self._deepspeed, ctx.device), plain)
        super().__init__(called, layout, dense, ctx, clip_norm=clip_norm)
        self._make_moments()

    def _wrap(self, model: nn.Module, accumulate: bool) -> nn.Module:
        assert not accumulate
        return model

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """See ``Engine``: the dense groups are DeepSpeed's."""
        return [*self._zero.param_groups, *(self._of_tables.param_groups if self._of_tables else ())]

    def zero_grad(self) -> None:
        """See ``Engine``."""
        self._deepspeed.zero_grad()
        for parameter in self._tables:
            parameter.grad = None

    def backward(self, loss: Tensor) -> None:
        """See ``Engine``."""
        self._deepspeed.backward(loss)

    def update(self, scale: Tensor | None, sums: Tensor) -> Tensor:
        """See ``Engine``; ``scale`` must be ``None``.

        DeepSpeed tells the norm when it has applied the gradients: a norm alone that is not finite does not hold them
        back. On a GPU nobody waits for ``sums``, and nothing does.
        """
        assert scale is None
        if known_broken(sums):
            return torch.full((), torch.nan, device=self.ctx.device)
        average_gradients(self._tables, self.ctx)
        self._deepspeed.step()
        norm = torch.as_tensor(self._deepspeed.get_global_grad_norm(), device=self.ctx.device)
        if self._of_tables is not None and not known_broken(norm):
            self._of_tables.step()
        return norm

    # Between steps ------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """See ``Engine``."""
        from deepspeed.utils import safe_get_full_optimizer_state as whole

        state = self.optimizer.state
        for group, flat in self._divided():
            step = self._zero.optimizer.state[flat]["step"]
            for parameter in group["params"]:
                # A count of each one's own: a shared one, loaded elsewhere, would go up once for each parameter.
                state[parameter] = {"step": step.clone(), **{name: whole(parameter, name) for name in MOMENTS}}
        if self._of_tables is not None:
            state.update(self._of_tables.state)
        for group, used in zip(self.optimizer.param_groups, self.param_groups, strict=True):
            group["lr"] = used["lr"]
        found = self.optimizer.state_dict()
        state.clear()
        return found

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See ``Engine``."""
        from deepspeed.utils import safe_set_full_optimizer_state as put

        self.optimizer.load_state_dict(state)
        given = self.optimizer.state
        for group, flat in self._divided():
            for parameter in group["params"]:
                if parameter in given:  # not if no step has used it
                    self._zero.optimizer.state[flat]["step"].copy_(given[parameter]["step"])
                    for name in MOMENTS:
                        put(parameter, given[parameter][name], name)
        if self._of_tables is not None:
            self._of_tables.state.update(
                {p: given[p] for g in self._of_tables.param_groups for p in g["params"] if p in given}
            )
        given.clear()

    def close(self) -> None:
        """See ``Engine``: parameters are as DeepSpeed found them, but for their values."""
        self._deepspeed.destroy()
        for parameter, before in self._marks.items():
            parameter.data = parameter.data.clone()  # no longer a view of a flat buffer
            for name in set(vars(parameter)) - before:
                delattr(parameter, name)
        self.model = self._deepspeed = self._zero = None

    def _divided(self) -> list[tuple[dict[str, Any], Tensor]]:
        """Each dense group of parameters with this process's part of all of them, end to end."""
        return list(zip(self.optimizer.param_groups, self._zero.single_partition_of_fp32_groups, strict=False))

    def _make_moments(self) -> None:
        """Moments before the first step, for which DeepSpeed would not wait long enough to find all of them.

        It looks for them once, after the first group's first update (0.19.8).
        """
        for group, flat in self._divided():
            self._zero.optimizer.state[flat] = {
                "step": torch.zeros((), device=flat.device if group["fused"] else "cpu"),
                **{name: torch.zeros_like(flat) for name in MOMENTS},
            }
        self._zero._lazy_init_hp_params_optimizer_state()


class _DenseOnly(nn.Module):
    """The model to whoever calls it; its dense parameters to whoever looks for parameters."""

    def __init__(self, plain: PlainOutput, dense: Sequence[nn.Parameter]) -> None:
        super().__init__()
        self._plain = (plain,)
        names = {parameter: name for name, parameter in plain.named_parameters()}
        for parameter in dense:
            self.register_parameter(names[parameter].replace(".", "/"), parameter)

    def forward(self, batch: Any, bf16: bool) -> Any:
        # DeepSpeed switches an autocast off that it did not order.
        with torch.autocast(next(self.parameters()).device.type, dtype=torch.bfloat16, enabled=bf16):
            return self._plain[0](batch)


class _WithAutocast(nn.Module):
    """Hands an autocast from outside of DeepSpeed to its inside."""

    def __init__(self, engine: nn.Module, device: torch.device) -> None:
        super().__init__()
        self.engine, self.device = engine, device

    def forward(self, batch: Any) -> Any:
        return self.engine(batch, torch.is_autocast_enabled(self.device.type))


def _deepspeed(ctx: ProcessContext) -> ModuleType:
    """DeepSpeed, set to use the process group that is there."""
    if ctx.device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        import deepspeed
    except ImportError as error:
        raise UserError(
            f"distributed.dense.kind is zero1 or zero2, which need deepspeed ({error}); "
            "run make setup, or set it to ddp or fsdp2"
        ) from None
    # torch 2.13 renames a function that DeepSpeed calls.
    warnings.filterwarnings("ignore", "`torch.distributed.all_gather_into_tensor` is deprecated", FutureWarning)
    # On a CPU it would compile an all-reduce of its own over shared memory, for up to a minute.
    backend = sys.modules["deepspeed.comm.torch"]
    build, backend.build_shm_op = backend.build_shm_op, lambda: None
    try:
        deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
    finally:
        backend.build_shm_op = build
    when_leaving(_forget_groups)
    return deepspeed


def _forget_groups() -> None:
    """DeepSpeed keeps its groups in module variables."""
    from deepspeed.comm import comm
    from deepspeed.comm.torch import TorchBackend
    from deepspeed.utils import groups

    comm.cdb = None
    for method in (TorchBackend.barrier, TorchBackend.monitored_barrier):  # their default is the group of the import
        inspect.unwrap(method).__defaults__ = (None, *inspect.unwrap(method).__defaults__[1:])
    for name, value in vars(groups).items():
        if isinstance(value, dist.ProcessGroup):
            setattr(groups, name, None)


@contextlib.contextmanager
def _local_rank(ctx: ProcessContext) -> Iterator[None]:
    """DeepSpeed insists on the variable, which other variables must accompany elsewhere (``process.start``)."""
    alone = "LOCAL_RANK" not in os.environ
    os.environ.setdefault("LOCAL_RANK", str(ctx.local_rank))
    yield
    if alone:
        del os.environ["LOCAL_RANK"]
