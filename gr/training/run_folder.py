"""``runs/<name>/``: one folder, one config. The same config resumes there, another is refused."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gr.config import config_hash, dump, parse_yaml, to_dict
from gr.data.store import EventStore
from gr.errors import UserError
from gr.files import locked, write_json, write_text
from gr.training.environment import describe

_HEADER = "# config_hash: "
_MISSING = "nothing"


@dataclass(frozen=True)
class RunFolder:
    """Where the files of a run are.

    Attributes:
        path: The folder.
        resumed: True if it already held this config.
    """

    path: Path
    resumed: bool = False

    @property
    def config(self) -> Path:
        """The resolved config; its first line holds its hash."""
        return self.path / "config.yaml"

    @property
    def env(self) -> Path:
        """What the run ran on."""
        return self.path / "env.json"

    @property
    def data(self) -> Path:
        """Content hash of the log, and where its prepared form lies."""
        return self.path / "data.json"

    @property
    def metrics(self) -> Path:
        """One JSON object a line."""
        return self.path / "metrics.jsonl"

    @property
    def tensorboard(self) -> Path:
        """Event files."""
        return self.path / "tensorboard"

    @property
    def checkpoints(self) -> Path:
        """A folder each; see ``gr.training.checkpoint``."""
        return self.path / "checkpoints"

    @property
    def best(self) -> Path:
        """The weights to use."""
        return self.path / "best.pt"

    @property
    def diverged(self) -> Path:
        """Batches and weights of steps whose loss or gradient was not finite."""
        return self.path / "diverged"

    @property
    def results(self) -> Path:
        """The recipe's results."""
        return self.path / "results.json"

    @property
    def report(self) -> Path:
        """The report made of them."""
        return self.path / "report.html"

    def lock(self) -> AbstractContextManager[None]:
        """Keeps a second process from training into the same folder.

        Raises:
            UserError: Another process holds it, or the folder cannot be written.
        """
        return locked(
            self.path / ".lock", f"run folder {self.path} is in use by another process; wait, or choose another name"
        )


def claim(
    path: str | Path, config: Any, argv: Sequence[str] | None = None, store: EventStore | None = None
) -> RunFolder:
    """Creates the run's folder, or takes it up again if it holds the same config. Call on one process only.

    Args:
        path: ``runs/<name>``.
        config: The whole config, a dataclass; its ``runtime`` fields may differ between claims.
        argv: The command line for ``env.json``, which tells of the first claim; defaults to ``sys.argv``.
        store: The log; its content hash must be that of the first claim, and ``data.json`` tells where it lies.

    Raises:
        UserError: The folder holds another config, was made from another log, or something else, or cannot be written.
    """
    path = Path(path)
    folder = RunFolder(path)
    digest = config_hash(config)
    resumed = False
    try:
        if path.exists() and not path.is_dir():
            raise UserError(f"run folder {path} is a file; choose another name")
        if folder.config.exists() and not _began(folder) and read_hash(folder.config) != digest:
            with folder.lock():  # not while one is training towards its first checkpoint
                _forget(folder)  # an attempt that ended before it does not hold the name
        if folder.config.exists():
            _check_same(folder.config, digest, config)
            resumed = True
        elif path.exists() and any(not p.name.endswith(".tmp") and p.name != ".lock" for p in path.iterdir()):
            raise UserError(f"run folder {path} holds files but no config.yaml, so it is no run; choose another name")
        path.mkdir(parents=True, exist_ok=True)
        write_text(folder.config, f"{_HEADER}{digest}\n{dump(config)}")
        if not folder.env.exists():
            write_json(folder.env, describe(argv))
        if store is not None:
            _claim_data(folder, store)
    except OSError as error:
        raise UserError(f"run folder {path} cannot be written: {error.strerror or error}") from None
    return dataclasses.replace(folder, resumed=resumed)


def _began(folder: RunFolder) -> bool:
    return folder.best.exists() or any(path.suffix != ".tmp" for path in folder.checkpoints.glob("step-*"))


def _forget(folder: RunFolder) -> None:
    """Removes what a claim and a training that ended before its first checkpoint leave behind, and nothing else."""
    for path in (folder.metrics, folder.data, folder.env, folder.config):
        path.unlink(missing_ok=True)
    for path in (folder.tensorboard, folder.path / "stages", folder.checkpoints, folder.diverged):
        shutil.rmtree(path, ignore_errors=True)


def _claim_data(folder: RunFolder, store: EventStore) -> None:
    digest = store.manifest["content_hash"]
    try:
        known = json.loads(folder.data.read_text(encoding="utf-8"))["content_hash"]
    except FileNotFoundError:
        known = digest
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{folder.data} is damaged; delete it and run the same command again") from None
    if known != digest:
        raise UserError(
            f"the log has changed since run {folder.path} was begun (content {known[:12]}, now {digest[:12]}); "
            "choose another name, or delete the folder to start again"
        )
    place = None if store.folder is None else str(store.folder.resolve())
    write_json(folder.data, {"content_hash": digest, "folder": place})


def read_hash(path: Path) -> str:
    """The hash in the first line of a run's ``config.yaml``."""
    try:
        first = path.read_text(encoding="utf-8").partition("\n")[0]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    if not first.startswith(_HEADER):
        raise UserError(f"{path} does not begin with {_HEADER!r}, so it is not a run's config; choose another run name")
    return first.removeprefix(_HEADER).strip()


def _check_same(path: Path, digest: str, config: Any) -> None:
    found = read_hash(path)
    if found == digest:
        return
    old = _flatten(parse_yaml(path.read_text(encoding="utf-8"), str(path)) or {})
    new, ignored = _flatten(to_dict(config)), _runtime_paths(config)
    changed = [
        key for key in [*new, *(k for k in old if k not in new)] if old.get(key, _MISSING) != new.get(key, _MISSING)
    ]
    changed = [key for key in changed if not any(key == p or key.startswith(f"{p}.") for p in ignored)]
    first = ", ".join(f"{key} {old.get(key, _MISSING)} -> {new.get(key, _MISSING)}" for key in changed[:3])
    more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
    raise UserError(
        f"run folder {path.parent} holds config {found}, this is config {digest} ({first}{more}); "
        "choose another name, or delete the folder to start again"
    )


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict) and value:
        flat: dict[str, Any] = {}
        for key, item in value.items():
            flat.update(_flatten(item, f"{prefix}.{key}" if prefix else str(key)))
        return flat
    return {prefix: value}


def _runtime_paths(config: Any, prefix: str = "") -> list[str]:
    paths = []
    for f in dataclasses.fields(config):
        name = f"{prefix}.{f.name}" if prefix else f.name
        value = getattr(config, f.name)
        if f.metadata.get("runtime"):
            paths.append(name)
        elif dataclasses.is_dataclass(value):
            paths.extend(_runtime_paths(value, name))
    return paths
