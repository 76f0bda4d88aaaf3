"""Weights into files and back: everything in one file, but for tables that own their optimizer, which have a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gr.distributed.process import ProcessContext, broadcast_object, main_only_errors
from gr.distributed.table_files import SUFFIX, load_tables, save_tables
from gr.errors import UserError
from gr.training.checkpoint import load_torch, remove_folders, save_checkpoint, save_torch

PREFIX = "tables."
BEST_TABLES = "best-*" + SUFFIX


def own_tables(model: nn.Module) -> Any | None:
    """The model's tables if they update themselves, else ``None``."""
    tables = getattr(model, "tables", None)
    return tables if getattr(tables, "own_optimizer", False) else None


def save_step(
    model: nn.Module, folder: Path, step: int, payload: dict[str, Any], keep_last: int, ctx: ProcessContext
) -> None:
    """Writes ``step-XXXXXXXX.pt`` with the model beside ``payload``, and its tables' folder before; a collective."""
    tables = _save_tables(model, folder / f"step-{step:08d}{SUFFIX}", ctx, sums=True)
    with main_only_errors(ctx) as main:
        if main:
            save_checkpoint(folder, step, {"model": _held(model), **tables, **payload}, keep_last)


def save_best(model: nn.Module, path: Path, step: int, metrics: dict[str, float], ctx: ProcessContext) -> None:
    """Writes ``best.pt``, and its tables' folder before; a collective."""
    tables = _save_tables(model, path.with_name(BEST_TABLES.replace("*", f"{step:08d}")), ctx, sums=False)
    with main_only_errors(ctx) as main:
        if main:
            save_torch(path, {"model": _held(model), **tables, "step": step, "metrics": metrics})
            remove_folders(path.parent, BEST_TABLES, keep=tables["tables"]["folder"] if tables else "")


def load_weights(
    model: nn.Module, path: Path, device: torch.device | str = "cpu", ctx: ProcessContext | None = None
) -> dict[str, Any]:
    """Loads ``best.pt`` (or a checkpoint) into a model; a collective where tables are sharded.

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
        load_tables(tables, path.with_name(found["folder"]), found["files"], ctx, sums)


def find_together(find: Any, ctx: ProcessContext) -> Path | None:
    """What ``find()`` gives on rank 0, on every rank."""
    path: Path | None = None
    with main_only_errors(ctx) as main:
        if main:
            path = find()
    return broadcast_object(path, ctx)


def _held(model: nn.Module) -> dict[str, Tensor]:
    """The state dict without what has a folder of its own."""
    state = model.state_dict()
    return state if own_tables(model) is None else {k: v for k, v in state.items() if not k.startswith(PREFIX)}


def _save_tables(model: nn.Module, folder: Path, ctx: ProcessContext, sums: bool) -> dict[str, Any]:
    tables = own_tables(model)
    if tables is None:
        return {}
    return {"tables": {"folder": folder.name, "files": save_tables(tables, folder, ctx, sums)}}
