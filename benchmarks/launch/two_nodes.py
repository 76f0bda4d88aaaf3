"""Two machines as two network namespaces: training over both, and a cut of the link that ends in the same weights.

    python -m benchmarks.launch.two_nodes --steps 120 --cut 40          (as root, Linux)

Each namespace has an interface of its own on one bridge, and nothing else: what passes between the machines passes
there. The second run is cut for a while in the middle; its processes miss an answer for ``timeout_s``, end, and are
started again when the machines see each other.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.launch.common import (
    CONFIG,
    environment,
    gr_launch,
    overrides,
    wait_for_step,
    weights_hash,
)
from benchmarks.written import write_page

BRIDGE = "grbr0"
TIMEOUT_S = 15


def ip(words: str) -> None:
    """One command of iproute2."""
    subprocess.run(["ip", *words.split()], check=True)


@contextlib.contextmanager
def network() -> Iterator[None]:
    """Namespaces grn0 and grn1 with addresses 10.99.0.1 and 10.99.0.2."""
    ip(f"link add {BRIDGE} type bridge")
    ip(f"link set {BRIDGE} up")
    try:
        for i in (0, 1):
            ip(f"netns add grn{i}")
            ip(f"link add grv{i} type veth peer name eth0 netns grn{i}")
            ip(f"link set grv{i} master {BRIDGE} up")
            ip(f"-n grn{i} addr add 10.99.0.{i + 1}/24 dev eth0")
            ip(f"-n grn{i} link set eth0 up")
            ip(f"-n grn{i} link set lo up")
        yield
    finally:
        for words in ("netns del grn0", "netns del grn1", f"link del {BRIDGE}"):
            subprocess.run(["ip", *words.split()])


def train(folder: Path, name: str, steps: int, cut_s: float) -> tuple[float, list[str]]:
    """Runs on both machines; (seconds, what each said)."""
    begin = time.monotonic()
    processes, logs = [], []
    for i in (0, 1):
        command = gr_launch(
            *("torchrun", "--nnodes", "2", "--node-rank", str(i), "--rdzv", "10.99.0.1:29511", "--nproc", "1"),
            *("--max-restarts", "10", "--wait", "120"),
            *(CONFIG, *overrides(name, steps), "--timeout_s", str(TIMEOUT_S)),
        )
        logs.append(folder / f"{name}-{i}.log")
        with open(logs[-1], "w") as log:
            inside = ["ip", "netns", "exec", f"grn{i}", *command]
            processes.append(subprocess.Popen(inside, cwd=folder, env=environment(), stdout=log, stderr=log))
    try:
        if cut_s:
            wait_for_step(folder / "runs" / name, steps // 2, processes)
            ip("link set grv1 down")
            time.sleep(cut_s)
            ip("link set grv1 up")
        for process in processes:
            assert process.wait(timeout=900) == 0, "\n".join(log.read_text()[-3000:] for log in logs)
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
    return time.monotonic() - begin, [log.read_text() for log in logs]


def main() -> None:
    """Both runs, and the comparison."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--cut", type=float, default=40.0, help="seconds")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, network():
        folder = Path(name)
        seconds, _ = train(folder, "whole", options.steps, 0)
        cut_seconds, said = train(folder, "cut", options.steps, options.cut)
        resumed = re.findall(r"resuming from step (\d+)", "".join(said))
        lost = [re.findall(r"lost the other processes \(([^)]*)\)", text) for text in said]
        hashes = [weights_hash(folder / "runs" / run) for run in ("whole", "cut")]
        assert resumed and any(lost), said
        assert hashes[0] == hashes[1], hashes
    write_page(
        "two_nodes",
        f"python -m benchmarks.launch.two_nodes --steps {options.steps} --cut {options.cut:g}",
        [
            ("run", f"quick-start, {options.steps} steps, one process on each of two network namespaces, gloo, fp32"),
            ("undisturbed", f"{seconds:.0f} s, weights {hashes[0]}"),
            ("link cut", f"for {options.cut:g} s at step {options.steps // 2}, timeout_s {TIMEOUT_S}"),
            ("what followed", f"machine 0 lost the other {len(lost[0])} times, machine 1 {len(lost[1])} times; "
                              f"resumed from steps {', '.join(resumed)}"),
            ("with the cut", f"{cut_seconds:.0f} s, weights {hashes[1]}: bit-identical"),
        ],
    )  # fmt: skip


if __name__ == "__main__":
    main()
