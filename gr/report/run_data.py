"""Reads what a finished run left behind, and checks it before anything is drawn."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gr.errors import UserError

INTERVAL = ("mean", "se", "low", "high")


@dataclass(frozen=True)
class RunData:
    """A run folder's contents.

    Attributes:
        folder: The run folder.
        results: ``results.json``, its required fields checked.
        steps: Lines of ``metrics.jsonl`` with a training loss, in order.
        evaluations: Lines of ``metrics.jsonl`` with an ``evaluation``, in order.
        env: ``env.json``.
        config_text: ``config.yaml`` as it stands.
    """

    folder: Path
    results: dict[str, Any]
    steps: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    env: dict[str, Any]
    config_text: str

    @property
    def model(self) -> str:
        """Label of the trained model, a key of ``results["metrics"]``."""
        return self.results["model"]["label"]

    @property
    def baselines(self) -> list[str]:
        """Every other scored recommender, in the file's order."""
        return [name for name in self.results["metrics"] if name != self.model]

    @property
    def ceiling(self) -> dict[str, float]:
        """The best expected score per metric, empty where it is not known."""
        return self.results.get("ceiling") or {}


def read_run(run_dir: str | Path) -> RunData:
    """Reads and checks a run folder.

    Raises:
        UserError: The folder or one of its files is missing, half-written, or lacks a field.
    """
    folder = Path(run_dir)
    if not folder.is_dir():
        raise UserError(f"run folder {folder} does not exist; give a folder that gr-train wrote, such as runs/NAME")
    results = _json(folder / "results.json")
    _check_results(results, folder / "results.json")
    steps, evaluations = _metric_lines(folder / "metrics.jsonl")
    return RunData(folder, results, steps, evaluations, _json(folder / "env.json"), _text(folder / "config.yaml"))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path} is missing; run the same gr-train command again to finish the run") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(_text(path))
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path} line {error.lineno} is not valid JSON ({error.msg}), so it was not written to its "
            "end; run the same gr-train command again"
        ) from None
    if not isinstance(value, dict):
        raise UserError(f"{path} must hold a JSON object, not {type(value).__name__}")
    return value


def _metric_lines(path: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    steps, evaluations = [], []
    for number, line in enumerate(_text(path).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(
                f"{path} line {number} is not valid JSON ({error.msg}), so it was not written to its end; "
                "run the same gr-train command again"
            ) from None
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            raise UserError(f"{path} line {number} has no integer field step")
        if isinstance(row.get("evaluation"), dict):
            evaluations.append(row)
        if isinstance(row.get("loss"), (int, float)):
            steps.append(row)
    return steps, evaluations


def _check_results(results: dict[str, Any], path: Path) -> None:
    for name, kind in (("name", str), ("data", dict), ("protocol", dict), ("model", dict), ("metrics", dict)):
        if not isinstance(results.get(name), kind):
            raise UserError(f"{path}: field {name} is missing or not a {kind.__name__}")
    label = results["model"].get("label")
    if label not in results["metrics"]:
        raise UserError(
            f"{path}: metrics has no entry for model.label {label!r}; it has {', '.join(results['metrics']) or 'none'}"
        )
    for name, metrics in results["metrics"].items():
        if not isinstance(metrics, dict):
            raise UserError(f"{path}: metrics.{name} must be a mapping of metric names")
        for metric in metric_names(metrics):
            for part in INTERVAL:
                _check_number(metrics[metric].get(part), f"metrics.{name}.{metric}.{part}", path)
    if not metric_names(results["metrics"][label]):
        raise UserError(f"{path}: metrics.{label} holds no metric; it must hold at least one, such as hr@10")
    ceiling = results.get("ceiling")
    if ceiling is not None and not isinstance(ceiling, dict):
        raise UserError(f"{path}: ceiling must be null or a mapping of metric names to numbers")
    for part in ("difference", "low", "high") if results.get("comparison") else ():
        _check_number(results["comparison"].get(part), f"comparison.{part}", path)
    for metric, value in (ceiling or {}).items():
        _check_number(value, f"ceiling.{metric}", path)


def _check_number(value: Any, field: str, path: Path) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise UserError(f"{path}: field {field} is {value!r}; it must be a finite number")


def metric_names(metrics: dict[str, Any]) -> list[str]:
    """Names of a recommender's metrics, HR then NDCG then the rest, by cut-off; settings are left out."""

    def order(name: str) -> tuple[int, int, str]:
        kind, _, cut = name.partition("@")
        rank = {"hr": 0, "ndcg": 1, "mrr": 2}.get(kind, 3)
        return rank, int(cut) if cut.isdigit() else 0, name

    return sorted((name for name, value in metrics.items() if isinstance(value, dict)), key=order)
