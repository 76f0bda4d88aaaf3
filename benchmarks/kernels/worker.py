"""The operator of another commit, in a process of its own, timed on demand.

The commit is checked out into a temporary folder (``git worktree``). Its ``gr`` is imported, but this checkout's
``benchmarks``: both commits are asked the same questions by the same code. Both sides are such processes, so that
neither has an advantage.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
LINKED = ("gr", "kernels", "launch", "configs")
MARK = "answer:"


class Remote:
    """A worker process: ask it for ``available``, ``check`` or seconds."""

    def __init__(self, root: Path, arguments: dict[str, Any]) -> None:
        environment = os.environ | {"PYTHONPATH": str(root)}
        command = [sys.executable, "-m", "benchmarks.kernels.worker", json.dumps(arguments)]
        self._process = subprocess.Popen(
            command, cwd=root, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, **question: Any) -> Any:
        """One question, one answer.

        Raises:
            UserError: The worker refuses, in its own words.
        """
        from gr.errors import UserError

        assert self._process.stdin and self._process.stdout
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith(MARK):
                answer = json.loads(line.removeprefix(MARK))
                if "refused" in answer:
                    raise UserError(answer["refused"])
                return answer["value"]
        raise UserError(f"--base: the process that measures it ended with status {self._process.wait()}")

    def timed(self, case: str, provider: str, direction: str, seed: int) -> float:
        """Seconds, as :data:`benchmarks.kernels.timing.Timed`."""
        return self.ask(what="seconds", case=case, provider=provider, direction=direction, seed=seed)

    def close(self) -> None:
        """Ends the process."""
        if self._process.stdin:
            self._process.stdin.close()
        self._process.wait(timeout=60)


@contextlib.contextmanager
def remotes(ref: str, arguments: dict[str, Any]) -> Iterator[tuple[dict[str, Remote], str]]:
    """Workers "here" and "base", and the base's full commit hash.

    Args:
        ref: A commit, branch or tag of this repository.
        arguments: "operator", "device", "dtype", "layers", "threads".

    Raises:
        UserError: There is no such commit.
    """
    with tempfile.TemporaryDirectory() as folder, worktree(ref, Path(folder)) as (tree, commit):
        found: dict[str, Remote] = {}
        try:
            for name, source in (("here", ROOT), ("base", tree)):
                found[name] = Remote(import_root(Path(folder) / name, source), arguments)
            yield found, commit
        finally:
            for remote in found.values():
                remote.close()


def import_root(folder: Path, source: Path) -> Path:
    """A folder to import from: ``gr`` of ``source``, ``benchmarks`` of this checkout."""
    folder.mkdir()
    for name in LINKED:
        (folder / name).symlink_to(source / name)
    (folder / "benchmarks").symlink_to(ROOT / "benchmarks")
    return folder


@contextlib.contextmanager
def worktree(ref: str, folder: Path) -> Iterator[tuple[Path, str]]:
    """A checkout of ``ref`` below ``folder``, and its commit."""
    from gr.errors import UserError

    done = _git("rev-parse", "--verify", "--quiet", f"{ref}^{{commit}}")
    if done.returncode:
        raise UserError(f"--base: this repository has no commit {ref!r}")
    commit, tree = done.stdout.strip(), folder / "tree"
    added = _git("worktree", "add", "--detach", "--force", str(tree), commit)
    if added.returncode:
        raise UserError(f"--base: {ref!r} could not be checked out: {added.stderr.strip()}")
    try:
        yield tree, commit
    finally:
        _git("worktree", "remove", "--force", str(tree))


def _git(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=False)


def serve(arguments: dict[str, Any]) -> None:
    """Answers questions on standard input until it is closed."""
    import torch

    from benchmarks.kernels import timing
    from benchmarks.kernels.agreement import check
    from benchmarks.kernels.registry import load
    from gr.errors import UserError

    if arguments["threads"]:
        torch.set_num_threads(arguments["threads"])
    operator, device, dtype = load(arguments["operator"]), arguments["device"], timing.DTYPES[arguments["dtype"]]
    clock = timing.here(operator, device, dtype, arguments["layers"])
    for line in sys.stdin:
        question = json.loads(line)
        what, case = question.pop("what"), operator.case(question["case"])
        try:
            if what == "seconds":
                value: Any = clock(**question)
            elif what == "available":
                value = timing.available(operator, case, question["providers"], device, dtype)
            else:
                strangers = {other.name for other in operator.others}
                held = [name for name in question["providers"] if name not in strangers]
                value = sorted({*check(operator, case, held, device, dtype), *strangers})
            answer = {"value": value}
        except UserError as error:
            answer = {"refused": str(error)}
        print(MARK + json.dumps(answer), flush=True)


if __name__ == "__main__":
    serve(json.loads(sys.argv[1]))
