"""Rebuilds the model of a run from its folder."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gr import config as configs
from gr.data.layout import LayoutConfig
from gr.data.prepare import prepare
from gr.data.split import Split
from gr.data.store import EventStore, read_store
from gr.errors import UserError
from gr.models.recommender import Recommender
from gr.training.checkpoint import STATE, Found, find_checkpoint
from gr.training.run_folder import RunFolder
from gr.training.weights import load_weights


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
        weights: Which weights, in words.
    """

    config: Any
    store: EventStore
    split: Split
    layout: LayoutConfig
    model: Recommender
    device: str = "cpu"
    weights: str = ""


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


def find_weights(run_dir: Path, checkpoint: str | None = None) -> Path:
    """The file of a run's weights.

    Args:
        run_dir: The run folder.
        checkpoint: ``best`` for ``best.pt``, ``last`` for the last checkpoint; ``None``: the best, else the last.

    Raises:
        UserError: The folder does not hold it.
    """
    folder = RunFolder(run_dir)
    if checkpoint != "last" and folder.best.exists():
        return folder.best
    found = find_checkpoint(folder.checkpoints) if checkpoint != "best" and folder.checkpoints.is_dir() else Found()
    for damaged, wrong in found.damaged.items():
        print(f"warning: checkpoint {damaged} is damaged ({wrong}); the one before is read", file=sys.stderr)
    if found.path is None:
        lacking = {None: "finished model (no best.pt and no checkpoint)", "best": "best.pt", "last": "checkpoint"}
        raise UserError(f"run folder {run_dir} has no {lacking[checkpoint]}; run gr-train with its config first")
    return found.path / STATE


def load_run(
    run_dir: str | Path, cache_dir: str | Path | None = None, device: str = "cpu", checkpoint: str | None = None
) -> Loaded:
    """Rebuilds data and model from a run folder and loads the weights.

    Args:
        run_dir: Folder that gr-train wrote, or its name in ``runs/``.
        cache_dir: Where prepared data are kept; prepared again if not there. ``None``: where the
            config says.
        device: Where the model goes.
        checkpoint: As in ``find_weights``.

    Raises:
        UserError: No such folder, no finished model in it, or weights that do not fit the config.
    """
    from gr.training.assemble import assemble

    folder = RunFolder(resolve_run(run_dir))
    config = load_config(folder)
    weights = find_weights(folder.path, checkpoint)  # before the data are prepared, which may take long
    store, split = open_log(folder, config, cache_dir)
    model = assemble(config, store, split)
    found = load_weights(model, weights)
    name = weights.parent.name if weights.name == STATE else weights.name
    words = name if found["step"] is None else f"{name}, step {found['step']}"
    return Loaded(config, store, split, config.layout, model.to(device).eval(), device, words)


def load_config(folder: RunFolder) -> Any:
    """The run's ``RunConfig``.

    Raises:
        UserError: The folder was not written by gr-train.
    """
    from gr.training.run_config import RunConfig

    if not folder.config.exists():
        raise UserError(f"run folder {folder.path} has no config.yaml, so gr-train did not write it")
    return configs.load(RunConfig, folder.config)


def log_of(folder: RunFolder) -> tuple[str, str | None]:
    """(content hash of the run's log, folder of its prepared form or ``None``).

    Raises:
        UserError: ``data.json`` is missing or damaged.
    """
    try:
        known = json.loads(folder.data.read_text(encoding="utf-8"))
        return known["content_hash"], known["folder"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"run folder {folder.path} lacks a whole data.json; run gr-train with its config again"
        ) from None


def open_log(folder: RunFolder, config: Any, cache_dir: str | Path | None = None) -> tuple[EventStore, Split]:
    """The very log of the run: from where it was prepared, or prepared again and compared."""
    from gr.training.assemble import split_of

    digest, place = log_of(folder)
    if cache_dir is None and place is not None and Path(place).is_dir():
        store = read_store(place)
    else:
        store = prepare(config.data, cache_dir or config.cache)
    if store.manifest["content_hash"] != digest:
        raise UserError(
            f"the log has changed since run {folder.path} was trained, and its prepared form is gone; "
            "train again under another name"
        )
    return store, split_of(config, store)
