"""Weights into files and back: everything in one file, but for tables that own their optimizer, which have a folder.

Saving has three steps: the state is gathered (a collective, at a step boundary), copied where training goes on
meanwhile (``gr.training.saver``), and written.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gr.distributed.engine import Engine
from gr.distributed.process import ProcessContext, broadcast_object, main_only_errors, raise_together
from gr.distributed.table_files import load_tables, rows_alone, write_tables
from gr.errors import UserError
from gr.files import first_damage
from gr.training.checkpoint import STATE, TABLES, aside_of, begin, commit, discard, load_torch, save_torch

PREFIX = "tables."
BEST_TABLES = "best-{}.tables"

State = dict[str, Any]
"""``model`` and ``optimizer``: what rank 0 writes; ``tables``: what every rank writes a share of, or ``None``."""


def own_tables(model: nn.Module) -> Any | None:
    """The model's tables if they update themselves, else ``None``."""
    tables = getattr(model, "tables", None)
    return tables if getattr(tables, "own_optimizer", False) else None


# Gathering ----------------------------------------------------------------------------------------------------


def gather(model: nn.Module, optimizer: Engine | None, ctx: ProcessContext) -> State:
    """Everything that learns, as it is now, in the memory where it learns; a collective."""
    tables = own_tables(model)
    return {
        "model": gather_weights(model, ctx),
        "optimizer": None if optimizer is None else gather_optimizer(optimizer, ctx),
        "tables": None if tables is None else tables.saved(),
    }


def gather_weights(model: nn.Module, ctx: ProcessContext) -> dict[str, Tensor]:
    """On rank 0 the whole state dict without what has a folder of its own, elsewhere nothing; a collective."""
    state = model.state_dict()
    if own_tables(model) is not None:
        state = {name: tensor for name, tensor in state.items() if not name.startswith(PREFIX)}
    return state if ctx.is_main else {}


def gather_optimizer(optimizer: Engine, ctx: ProcessContext) -> dict[str, Any]:
    """On rank 0 the whole state dict, elsewhere nothing; a collective."""
    state = optimizer.state_dict()
    return state if ctx.is_main else {}


# Writing ------------------------------------------------------------------------------------------------------


def write_step(
    state: State, folder: Path, step: int, header: Mapping[str, Any], keep_last: int, ctx: ProcessContext
) -> None:
    """Writes a checkpoint; a collective at whose end it is there for all, or for none.

    Args:
        state: From ``gather``.
        folder: Of the checkpoints.
        step: It is named after it.
        header: What else ``state.pt`` holds.
        keep_last: How many checkpoints stay.
        ctx: The processes.

    Raises:
        UserError: On every rank; the checkpoints are as they were.
    """
    aside = aside_of(folder, step)
    try:
        with main_only_errors(ctx) as main:
            if main:
                begin(aside)
        sums: dict[str, Any] = {}
        if state["tables"] is not None:
            files = write_tables(state["tables"], aside / TABLES, ctx)
            sums = {f"{TABLES}/{name}": seen for name, seen in files.items()}
            header = {**header, "tables": {"folder": TABLES}}
        with main_only_errors(ctx) as main:
            if main:
                payload = {**header, "model": state["model"], "optimizer": state["optimizer"]}
                commit(aside, {**sums, STATE: save_torch(aside / STATE, payload)}, keep_last)
    except UserError:
        if ctx.is_main:
            discard(aside)
        raise


def write_best(state: State, path: Path, step: int, metrics: Mapping[str, float], ctx: ProcessContext) -> None:
    """Writes ``best.pt``, before it a folder of tables' rows that it names; a collective, as ``write_step``."""
    payload: dict[str, Any] = {"model": state["model"], "step": step, "metrics": dict(metrics)}
    if state["tables"] is not None:
        name = broadcast_object(_free_name(path, step) if ctx.is_main else None, ctx)
        files = write_tables(rows_alone(state["tables"]), path.with_name(name), ctx)
        payload["tables"] = {"folder": name, "files": files}
    with main_only_errors(ctx) as main:
        if main:
            for cut_off in path.parent.glob(f".{path.name}.*.tmp"):
                cut_off.unlink(missing_ok=True)
            save_torch(path, payload)
            for folder in path.parent.glob(BEST_TABLES.format("*")):
                if folder.name != payload.get("tables", {}).get("folder"):
                    shutil.rmtree(folder, ignore_errors=True)


def _free_name(path: Path, step: int) -> str:
    """Of a folder that no ``best.pt`` names: the one in use stays until the next ``best.pt`` is there."""
    name, number = BEST_TABLES.format(f"{step:08d}"), 1
    while path.with_name(name).exists():
        number += 1
        name = BEST_TABLES.format(f"{step:08d}-{number}")
    return name


# Reading ------------------------------------------------------------------------------------------------------


def load_weights(
    model: nn.Module, path: Path, device: torch.device | str = "cpu", ctx: ProcessContext | None = None
) -> dict[str, Any]:
    """Loads ``best.pt`` (or a checkpoint's ``state.pt``) into a model; a collective where tables are sharded.

    Returns:
        {"step", "metrics"} of these weights.

    Raises:
        UserError: Missing, damaged, or of another model.
    """
    payload = load_torch(path, device)
    if not isinstance(payload, dict) or not isinstance(payload.get("model"), dict):
        raise UserError(f"{path} holds no model weights; delete it and run gr-train again")
    restore(model, payload, path, ctx or ProcessContext(), sums=False)
    return {"step": payload.get("step"), "metrics": payload.get("metrics")}


def restore(model: nn.Module, payload: dict[str, Any], path: Path, ctx: ProcessContext, sums: bool) -> None:
    """Takes over a payload's weights, tables' sums of squares among them if asked for; a collective.

    Raises:
        UserError: Of another model, or its tables' folder is missing or damaged.
    """
    tables, found = own_tables(model), payload.get("tables")
    if (tables is None) != (found is None):
        other = "no tables that own their optimizer" if found is None else "tables that own their optimizer"
        raise UserError(f"checkpoint {path} is of another model (it has {other}); use the config it was trained with")
    weights: dict[str, Tensor] = payload["model"]
    if tables is not None:  # they stay as they are, so that every other key is still looked at
        weights = weights | {k: v for k, v in model.state_dict().items() if k.startswith(PREFIX)}
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        lines = str(error).splitlines()
        reason = lines[1].strip() if len(lines) > 1 else str(error)
        raise UserError(
            f"checkpoint {path} is of another model ({reason}); use the config it was trained with"
        ) from None
    if tables is not None:
        folder = path.with_name(found["folder"])
        if "files" in found:  # a checkpoint's were read by ``find_checkpoint``
            _check_best(folder, found["files"], ctx)
        load_tables(tables, folder, ctx, sums)


def _check_best(folder: Path, files: Mapping[str, Any], ctx: ProcessContext) -> None:
    wrong = first_damage(folder, files, ctx.rank, ctx.world)
    advice = "delete it and best.pt, and run gr-train again"
    raise_together(None if wrong is None else UserError(f"{folder} is damaged ({wrong}); {advice}"), ctx)
