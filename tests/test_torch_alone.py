"""The library works with torch alone: no torchrec, fbgemm, triton, ray or deepspeed, as on a bare machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from import_scan import module_name, python_files

ROOT = Path(__file__).resolve().parent.parent
ABSENT = ("torchrec", "fbgemm_gpu", "triton", "ray", "deepspeed")
# Kernels in triton_*.py are triton; their operators import them when a GPU asks for them.
HOMES_OF_ABSENT = ("triton_",)

PRELUDE = f"""
import sys
from importlib.machinery import PathFinder

ABSENT = {ABSENT!r}


class Hiding(PathFinder):
    # Answers as if the packages were not installed: `import` fails and `find_spec` says None.
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in ABSENT else PathFinder.find_spec(name, path, target)


sys.meta_path[:] = [Hiding if finder is PathFinder else finder for finder in sys.meta_path]
"""


def run_bare(script: str, timeout_s: int = 200) -> str:
    """Runs Python code in a fresh process that cannot see the packages in ``ABSENT``; returns its output."""
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + script],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_the_packages_are_really_hidden() -> None:
    script = """
import importlib.util
for name in ABSENT:
    assert importlib.util.find_spec(name) is None, name
    try:
        __import__(name)
    except ModuleNotFoundError:
        continue
    raise SystemExit(f"{name} is visible")
import torch
print(torch.ones(2).sum().item())
"""
    assert run_bare(script).strip() == "2.0"


def test_every_module_imports_without_them() -> None:
    files = [path for path in python_files(ROOT) if not path.name.startswith(HOMES_OF_ABSENT)]
    modules = [module_name(ROOT, path) for path in files]
    assert "gr.errors" in modules and "gr.launch.cli" in modules
    script = f"""
import importlib, json, traceback
failed = {{}}
for name in {modules!r}:
    try:
        importlib.import_module(name)
    except Exception:
        failed[name] = traceback.format_exc(limit=-2)
print("@", json.dumps(failed))
"""
    line = next(line for line in run_bare(script).splitlines() if line.startswith("@ "))
    failed = json.loads(line[2:])
    assert not failed, "\n".join(f"{name}: {trace}" for name, trace in failed.items())


def test_a_run_trains_judges_reports_and_recommends_without_them(tmp_path: Path) -> None:
    config = tmp_path / "bare.yaml"
    config.write_text(
        "{name: bare, data: {kind: planted, num_users: 150, num_items: 60, num_topics: 2, subtopics: 2}, "
        "model: {dim: 8, encoder: {kind: hstu, num_layers: 1, dim_qk: 8, dim_v: 8}}, "
        "train: {epochs: 1, tensorboard: false}, evaluation: {baselines: [popularity]}}"
    )
    script = f"""
import os
os.chdir({str(tmp_path)!r})
from gr.inference.cli import main as recommend
from gr.train import main as train
assert train(["bare.yaml"]) == 0
assert recommend(["runs/bare", "--k", "2"]) == 0
assert not {{name.split(".")[0] for name in sys.modules}} & set(ABSENT)
"""
    out = run_bare(script)
    assert "leak audit: nothing found" in out and "Recommended" in out
