"""The oldest Triton supported, in an environment of its own: are kernels right there, and what do tiles compile to?

    python -m benchmarks.kernels.older_triton [--version 3.6.0] [--venv .venv-older] [--out FOLDER/NAME.md]
        [--tests EXPRESSION] [compile's options ...]

Makes the environment if it is not there: that Triton, and a numpy that its interpreter can use, in front of everything
else that the present one holds (torch for CPUs needs no Triton, and none of its parts that would is used). Then, in it:

1. the interpreter's tests, ``tests/kernels/hstu_triton_interpreted.py``; ``--tests`` picks some, as pytest's ``-k``;
2. ``benchmarks.kernels.compile`` with the options given, for instance ``--dims 64 128 --dtypes bfloat16``.

Exit status 1 if a test fails or a kernel is not as it should be. With ``--out`` the table is written there, below what
the tests said; rows already made are kept (``benchmarks.kernels.compile``).
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

from benchmarks.command import check_folder, parser_of
from gr.errors import UserError, run_cli

ROOT = Path(__file__).resolve().parents[2]
TESTS = ROOT / "tests" / "kernels"
NUMPY = "numpy<2.4"
"""triton 3.6.0's interpreter makes scalars of arrays with a dimension, which numpy 2.4 refuses."""
BEHIND = "behind_the_older_triton.pth"


def make(place: Path, version: str) -> Path:
    """Python of the environment: one Triton in front, this environment's packages behind it."""
    python = place / "bin" / "python"
    if not python.exists():
        venv.create(place, with_pip=False)
    packages = Path(sysconfig.get_paths(vars={"base": str(place), "platbase": str(place)})["purelib"])
    behind = sysconfig.get_paths()["purelib"]
    (packages / BEHIND).write_text(f"import site; site.addsitedir({behind!r})\n")
    if not list(packages.glob(f"triton-{version}.dist-info")):
        words = ["install", "-q", "--no-deps", "--no-input", "--target", str(packages), f"triton=={version}", NUMPY]
        done = subprocess.run([sys.executable, "-m", "pip", *words], capture_output=True, text=True)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["nothing was said"])[-1]
            raise UserError(f"--version: pip cannot install triton {version} and {NUMPY}: {last}")
    there = subprocess.run([python, "-c", "import triton; print(triton.__version__)"], capture_output=True, text=True)
    if there.stdout.strip() != version:
        raise UserError(f"--venv: {place} holds triton {there.stdout.strip() or 'none'}, not {version}; remove it")
    return python


def call(python: Path, words: list[str], **environment: str) -> tuple[int, str]:
    """Exit status and last line of a command in that environment; its words are passed on as they come."""
    around = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "PYTHONHOME")}
    around |= {"PYTHONPATH": os.pathsep.join((str(ROOT), str(TESTS)))} | environment
    last = ""
    with subprocess.Popen([python, "-u", *words], cwd=ROOT, env=around, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            print(line, end="", flush=True)
            last = line.strip() or last
    return process.returncode, last


def main(argv: list[str]) -> int:
    parser = parser_of("benchmarks.kernels.older_triton", __doc__)
    parser.add_argument("--version", default="3.6.0")
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv-older")
    parser.add_argument("--out", type=Path, help="a Markdown file")
    parser.add_argument("--tests", default="", help="which of the interpreter's tests: pytest's -k")
    options, compiling = parser.parse_known_args(argv)
    check_folder("--out", options.out)
    python = make(options.venv.resolve(), options.version)
    pick = ["-k", options.tests] if options.tests else []
    words = ["-m", "pytest", "-q", "-p", "no:cacheprovider", *pick, str(TESTS / "hstu_triton_interpreted.py")]
    tested, told = call(python, words, TRITON_INTERPRET="1")
    written = ["--out", str(options.out.resolve())] if options.out else []
    compiled, _ = call(python, ["-m", "benchmarks.kernels.compile", *written, *compiling])
    if options.out:
        heading = f"Interpreter's tests{f' ({options.tests})' if options.tests else ''}: {told.strip('= ')}.\n\n"
        title, rest = options.out.read_text(encoding="utf-8").split("\n\n", 1)
        options.out.write_text(f"{title}\n\n{heading}{rest}", encoding="utf-8")
    return 1 if tested or compiled else 0


if __name__ == "__main__":
    sys.exit(run_cli(main))
