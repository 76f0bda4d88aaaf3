"""Golden losses: the first 50 training losses of each preset and model, on a tiny planted world.

python tests/golden/golden_cases.py      # writes tests/golden/losses/*.txt; look at the difference before committing
"""

from __future__ import annotations

import hashlib
import os
import platform
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from gr import config as configs
from gr.distributed.process import ProcessContext
from gr.training.assemble import assemble, open_data, train_loader
from gr.training.phase import Phase
from gr.training.run_config import RunConfig
from gr.training.trainer import Trainer

FOLDER = Path(__file__).parent / "losses"
STEPS = 50
HSTU = {"kind": "hstu", "num_heads": 2, "dim_qk": 8, "dim_v": 8}
SAMPLED = {"kind": "sampled_softmax", "num_negatives": 32}
CASES: dict[str, dict[str, Any]] = {
    "hstu_paper": {"encoder": HSTU, "objective": SAMPLED},
    "hstu_paper_full_softmax": {"encoder": HSTU, "objective": {"kind": "full_softmax"}},
    "hstu_dlrm_v3": {"encoder": {**HSTU, "preset": "dlrm_v3"}, "objective": SAMPLED},
    "hstu_interleaved_in_batch": {"encoder": HSTU, "objective": {"kind": "in_batch"}, "layout": "interleaved"},
    "sasrec": {"encoder": {"kind": "transformer", "num_heads": 2}, "objective": SAMPLED},
    "sasrec_bce": {"encoder": {"kind": "transformer"}, "objective": {"kind": "bce", "num_negatives": 1}},
}


def machine() -> str:
    """What must be the same for losses to be the same bit for bit."""
    lines = (
        Path("/proc/cpuinfo").read_text().split("\n\n")[0] if Path("/proc/cpuinfo").exists() else platform.processor()
    )
    kind = [line for line in lines.splitlines() if line.split(":")[0].strip() in CPU_FIELDS]
    digest = hashlib.sha256("\n".join(kind).encode()).hexdigest()[:12]
    return f"cpu {digest}, {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}"


CPU_FIELDS = ("vendor_id", "cpu family", "model", "stepping", "flags")


def losses(case: str, native: bool = False) -> list[float]:
    """The first ``STEPS`` losses, one thread; without compiled operators, whose bits depend on the compiler too."""
    parts = CASES[case]
    raw = {
        "data": {
            "kind": "planted",
            "num_users": 400,
            "num_items": 120,
            "num_topics": 4,
            "subtopics": 2,
            "actions": True,
        },
        "layout": {"kind": parts.get("layout", "items"), "max_events": 28},
        "model": {"dim": 16, "encoder": parts["encoder"]},
        "objective": parts["objective"],
        "train": {
            "epochs": 10,
            "max_steps": STEPS,
            "batching": {"batch_size": 32},
            "log_every_steps": 1,
            "clip_norm": 1.0,
            "tensorboard": False,
            "schedule": {"kind": "cosine", "warmup_steps": 5},
        },
    }
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, {} if native else {"GR_NATIVE": "0"}):
            config = configs.from_dict(RunConfig, {**raw, "cache": folder}, case)
            store, split = open_data(config)
            ctx = ProcessContext()
            seen: list[float] = []

            def objective(model, batch, context):
                found = model(batch)
                seen.append(float((found.total / found.weight).detach()))
                return found

            loader = train_loader(config, store, split, ctx)
            model = assemble(config, store, split)
            Trainer(model, [Phase(objective=objective)], loader, None, config.train, ctx, Path(folder) / "run", 0).fit()
            return seen
    finally:
        torch.set_num_threads(threads)


def read(case: str) -> tuple[str, list[float]]:
    """(machine, losses) as committed."""
    head, *lines = (FOLDER / f"{case}.txt").read_text().splitlines()
    return head.removeprefix("# "), [float(line.split()[1]) for line in lines]


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name in CASES:
        text = "".join(f"{step} {loss!r}\n" for step, loss in enumerate(losses(name), 1))
        (FOLDER / f"{name}.txt").write_text(f"# {machine()}\n{text}")
        print(name, text.splitlines()[0], text.splitlines()[-1])
