"""One process among many: who am I, on which device, and the few collectives that training needs.

With one process nothing is initialised and every collective is the identity, so callers never ask how many
there are.
"""

from __future__ import annotations

import atexit
import contextlib
import datetime
import gc
import importlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist

from gr.distributed.network import check_port_free, check_reachable
from gr.errors import PeerLost, UserError

_LIMB = 31
"""Integers cross ranks as two int64 limbs of this many low bits: FLOP counts of a large job exceed 2**63."""

_MEETING_PATIENCE_S = 25.0
"""How long a process waits for rank 0 to listen."""
_when_leaving: list[Callable[[], None]] = []
_DISK_PATIENCE_S = 1800.0
"""How long processes wait for each other's part of a checkpoint: a disk may be slow, but a cut must be noticed."""
# How collectives tell of a peer that is gone: gloo and NCCL raise plain RuntimeErrors, the store DistErrors.
_GONE = re.compile(r"gloo|nccl|Connection (closed|reset|refused)|Broken pipe|Timed out waiting|socket", re.IGNORECASE)


@dataclass(frozen=True)
class ProcessContext:
    """Attributes:
    rank: This process, 0..world-1.
    world: How many processes train together.
    local_rank: This process among those of its machine.
    device: Where the model and the batches live.
    patient: A group whose collectives may wait for days: for ranks that wait while one works alone.
    background: A group for a thread beside the one that trains; see ``in_background``.
    group: What the collectives of this context go over; ``None``: the default group.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    device: torch.device = torch.device("cpu")
    patient: Any = field(default=None, repr=False, compare=False)
    background: Any = field(default=None, repr=False, compare=False)
    group: Any = field(default=None, repr=False, compare=False)

    @property
    def is_main(self) -> bool:
        """True on the one process that writes files and prints."""
        return self.rank == 0

    def in_background(self) -> ProcessContext:
        """The same processes for one thread beside this one: collectives of two threads in one group would mix."""
        assert self.world == 1 or self.background is not None, "made by start alone"
        return replace(self, group=self.background, patient=self.background)


def start(
    device: str = "auto",
    *,
    timeout_s: float = 600.0,
    init_method: str | None = None,
    rank: int | None = None,
    world: int | None = None,
) -> ProcessContext:
    """Joins the group that torchrun announces (RANK, WORLD_SIZE, LOCAL_RANK), or stands alone.

    A default process group that is there already (Ray Train makes one) is taken as it is.

    Args:
        device: "auto" (CUDA where there is one), "cpu" or "cuda".
        timeout_s: After this long without an answer from the others a collective fails, in seconds.
        init_method: Rendezvous such as ``file:///path``; by default torchrun's environment.
        rank: Overrides RANK (and LOCAL_RANK).
        world: Overrides WORLD_SIZE.

    Raises:
        UserError: Half a torchrun environment, an unknown device, fewer GPUs than local processes, rank 0's port in
            use or, for a while, nobody there.
    """
    if rank is None or world is None:
        rank, world, local_rank = _from_environment()
    else:
        local_rank = rank
    chosen = _device(device, local_rank)
    if world > 1:
        # Its functions have the default group of the time of the import as a default argument: imported later (by
        # torchrec, or by AdamW through torch's compiler) it would keep the group and its threads alive until the
        # interpreter ends, where a thread that still wants the interpreter's lock brings the process down.
        importlib.import_module("torch.distributed.nn.functional")
        atexit.register(gc.collect)  # for groups that ``finish`` still saw in use, as an exception's frames use them

        # Both backends on a GPU: host numbers (stop flags, counts) then travel without waiting for the
        # device.
        backend = "gloo" if chosen.type == "cpu" else "cpu:gloo,cuda:nccl"
        if not dist.is_initialized():
            if init_method is None:
                _check_meeting_place(rank)
            dist.init_process_group(
                backend,
                init_method=init_method or "env://",
                rank=rank,
                world_size=world,
                timeout=datetime.timedelta(seconds=timeout_s),
                device_id=chosen if chosen.type == "cuda" else None,
            )
        patient = dist.new_group(backend="gloo", timeout=datetime.timedelta(days=7))
        slow_disk = datetime.timedelta(seconds=max(timeout_s, _DISK_PATIENCE_S))
        background = dist.new_group(backend="gloo", timeout=slow_disk)
        # Nobody goes on before all are connected: one that found a user's mistake at once and left would have
        # another, still connecting, end in a traceback.
        dist.barrier(patient)
        dist.barrier(background)
        return ProcessContext(rank, world, local_rank, chosen, patient, background)
    return ProcessContext(rank, world, local_rank, chosen)


def when_leaving(forget: Callable[[], None]) -> None:
    """Has ``finish`` call ``forget`` first: for libraries that hold on to groups beyond their use."""
    _when_leaving.append(forget)


def finish(ctx: ProcessContext) -> None:
    """Leaves all groups and ends their threads; harmless when there is none. ``ctx`` serves for nothing afterwards.

    A group's threads end when the last reference to it goes. Models that hold one (sharded tables) stand in circles
    of references, which only the collector breaks; here that is done while the interpreter can still lend its lock.
    """
    if ctx.world > 1 and dist.is_initialized():
        while _when_leaving:
            _when_leaving.pop()()
        object.__setattr__(ctx, "patient", None)
        object.__setattr__(ctx, "background", None)
        dist.destroy_process_group()
        gc.collect()


@contextlib.contextmanager
def process(device: str = "auto", **kwargs: Any) -> Iterator[ProcessContext]:
    """``start`` on entry, ``finish`` on exit, whatever happened between; on success nobody leaves before the others.

    Raises:
        PeerLost: In place of what a collective raises when another process is gone. The group is then left as it is:
            ending it would wait for those who do not answer.
    """
    try:
        ctx = start(device, **kwargs)
    except RuntimeError as error:
        raise _as_lost(error) from None
    try:
        yield ctx
        barrier(ctx)
    except RuntimeError as error:
        lost = _as_lost(error)
        if ctx.world > 1 and isinstance(lost, PeerLost):
            raise lost from error
        finish(ctx)
        raise
    except BaseException:
        finish(ctx)
        raise
    finish(ctx)


def _as_lost(error: RuntimeError) -> RuntimeError:
    """A ``PeerLost`` if that is what the error of a collective means; else the error itself."""
    if isinstance(error, PeerLost) or not (isinstance(error, dist.DistError) or _GONE.search(str(error))):
        return error
    reason = str(error).splitlines()[0].split("] ")[-1].strip()
    return PeerLost(f"lost the other processes ({reason}); the same command goes on from the last checkpoint")


def is_lost(error: BaseException) -> bool:
    """Whether an error says that another process, or the way to it, is gone."""
    return isinstance(error, RuntimeError) and isinstance(_as_lost(error), PeerLost)


def all_reduce_sum(tensor: torch.Tensor, ctx: ProcessContext) -> torch.Tensor:
    """Sums ``tensor`` over ranks in place and returns it."""
    if ctx.world > 1:
        dist.all_reduce(tensor, group=ctx.group)
    return tensor


def gather_integers(values: Sequence[int], ctx: ProcessContext) -> list[list[int]]:
    """Every rank's Python integers (each below 2**94 in size, as many on each rank), in rank order, on every rank."""
    if ctx.world == 1:
        return [[int(value) for value in values]]
    mask = (1 << _LIMB) - 1
    limbs = torch.tensor([[int(v) >> _LIMB, int(v) & mask] for v in values], dtype=torch.int64)
    everybody = [torch.empty_like(limbs) for _ in range(ctx.world)]
    dist.all_gather(everybody, limbs, group=ctx.group)
    return [[(high << _LIMB) + low for high, low in told.tolist()] for told in everybody]


def broadcast_object(value: Any, ctx: ProcessContext) -> Any:
    """Rank 0's (picklable) value, on every rank."""
    if ctx.world == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, group=ctx.group, device=torch.device("cpu"))
    return box[0]


def barrier(ctx: ProcessContext) -> None:
    """Waits until every rank is here."""
    gather_integers([0], ctx)


@contextlib.contextmanager
def main_only_errors(ctx: ProcessContext) -> Iterator[bool]:
    """Work for rank 0 whose ``UserError`` becomes everybody's: nobody waits for a rank that gave up.

    Yields:
        True where the work is to be done. Every rank must enter and leave the block.
    """
    message: str | None = None
    try:
        yield ctx.is_main
    except UserError as error:
        message = str(error)
    message = broadcast_object(message, ctx)
    if message is not None:
        raise UserError(message)


def _from_environment() -> tuple[int, int, int]:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    present = [name for name in names if name in os.environ]
    if not present:
        return 0, 1, 0
    missing = [name for name in names if name not in os.environ]
    if missing:
        raise UserError(
            f"environment variable {present[0]} is set but {missing[0]} is not; "
            f"start with torchrun, or unset {present[0]}"
        )
    try:
        rank, world, local_rank = (int(os.environ[name]) for name in names)
    except ValueError:
        values = ", ".join(f"{name}={os.environ[name]!r}" for name in names)
        raise UserError(f"environment variables {values} must be integers, as torchrun sets them") from None
    if not 0 <= rank < world:
        raise UserError(f"environment variable RANK={rank} must be at least 0 and below WORLD_SIZE={world}")
    return rank, world, local_rank


def _check_meeting_place(rank: int) -> None:
    """One sentence in place of what torch's store says of a port in use or an address where nobody is."""
    host, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return  # torchrun has seen to it, and starts again those who do not find each other
    if not host or not port.isdigit():
        raise UserError(
            f"environment variables MASTER_ADDR={host!r} and MASTER_PORT={port!r} must name where rank 0 listens, "
            "as torchrun sets them"
        )
    if rank == 0:
        check_port_free(int(port))
    else:
        check_reachable(host, int(port), _MEETING_PATIENCE_S)


def _device(name: str, local_rank: int) -> torch.device:
    if name not in ("auto", "cpu", "cuda"):
        raise UserError(f"device {name!r} is unknown; it must be 'auto', 'cpu' or 'cuda'")
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if local_rank >= count:
        raise UserError(
            f"device 'cuda' needs GPU number {local_rank} but this machine has {count}; "
            "use device 'cpu' or fewer processes"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def all_gather_object(value: Any, ctx: ProcessContext) -> list[Any]:
    """Every rank's (picklable) value, in rank order, on every rank."""
    if ctx.world == 1:
        return [value]
    gathered: list[Any] = [None] * ctx.world
    dist.all_gather_object(gathered, value, group=ctx.group)
    return gathered


def raise_together(error: UserError | None, ctx: ProcessContext) -> None:
    """Raises on every rank the first ``UserError`` that any rank has; waits as long as the slowest rank takes."""
    message = None if error is None else str(error)
    if ctx.world > 1:
        messages: list[Any] = [None] * ctx.world
        dist.all_gather_object(messages, message, group=ctx.patient)
        message = next((found for found in messages if found is not None), None)
    if message is not None:
        raise UserError(message)
