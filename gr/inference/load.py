"""Rebuilds the model of a run from its folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gr import config as configs
from gr.data.layout import LayoutConfig
from gr.data.split import Split
from gr.data.store import EventStore
from gr.errors import UserError
from gr.models.recommender import Recommender
from gr.training.checkpoint import find_checkpoint, load_torch
from gr.training.run_folder import RunFolder


@dataclass(frozen=True)
class Loaded:
    """A run, ready to recommend.

    Attributes:
        config: The run's ``RunConfig``.
        store: The log it was trained on.
        split: What was held out.
        layout: How events become tokens.
        model: In evaluation mode, on ``device``.
        device: Where batches go.
    """

    config: Any
    store: EventStore
    split: Split
    layout: LayoutConfig
    model: Recommender
    device: str = "cpu"


def resolve_run(run: str | Path) -> Path:
    """A run folder from its path, or from its name alone when it lies in ``runs/``.

    Raises:
        UserError: There is no such folder.
    """
    path = Path(run)
    if path.is_dir():
        return path
    if len(path.parts) == 1 and (Path("runs") / path).is_dir():
        return Path("runs") / path
    known = sorted(str(p.parent) for p in Path("runs").glob("*/config.yaml"))[:5]
    raise UserError(
        f"run folder {run} does not exist; "
        + (f"there is {', '.join(known)}" if known else "train one with gr-train CONFIG")
    )


def find_weights(run_dir: Path) -> Path:
    """``best.pt``, else the last checkpoint.

    Raises:
        UserError: The folder holds neither.
    """
    folder = RunFolder(run_dir)
    if folder.best.exists():
        return folder.best
    last = find_checkpoint(folder.checkpoints) if folder.checkpoints.is_dir() else None
    if last is None:
        raise UserError(
            f"run folder {run_dir} has no finished model (no best.pt and no checkpoint); "
            "run gr-train with its config first"
        )
    return last


def load_run(run_dir: str | Path, cache_dir: str | Path | None = None, device: str = "cpu") -> Loaded:
    """Rebuilds data and model from a run folder and loads the weights.

    Args:
        run_dir: Folder that gr-train wrote, or its name in ``runs/``.
        cache_dir: Where prepared data are kept; prepared again if not there. ``None``: where the
            config says.
        device: Where the model goes.

    Raises:
        UserError: No such folder, no finished model in it, or weights that do not fit the config.
    """
    from gr.training.assemble import assemble, open_data
    from gr.training.run_config import RunConfig

    folder = RunFolder(resolve_run(run_dir))
    if not folder.config.exists():
        raise UserError(f"run folder {folder.path} has no config.yaml, so gr-train did not write it")
    weights = find_weights(folder.path)  # before the data are prepared, which may take long
    config = configs.load(RunConfig, folder.config)
    store, split = open_data(config, None if cache_dir is None else str(cache_dir))
    model = assemble(config, store, split)
    load_weights(model, weights)
    return Loaded(config, store, split, config.layout, model.to(device).eval(), device)


def load_weights(model: torch.nn.Module, path: Path) -> None:
    """Loads a checkpoint's ``model`` entry.

    Raises:
        UserError: Damaged, without weights, or of another model.
    """
    payload = load_torch(path, "cpu")
    if not isinstance(payload, dict) or not isinstance(payload.get("model"), dict):
        raise UserError(f"{path} holds no model weights; delete it and run gr-train again")
    try:
        model.load_state_dict(payload["model"])
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{path} does not fit the model of its config.yaml ({reason}); the config or the data changed "
            "since it was trained"
        ) from None
