"""Sets the environment up: ``python3 launch/setup_env.py [--venv .venv]``, or ``make setup``.

Runs with the standard library alone, before anything is installed. Its one decision is ``choose_fbgemm``:
which build of fbgemm and which torchrec belong to the torch that is there. The order matters. torch comes
first and is then held fixed by a constraint; torchrec comes without its dependencies, since its metadata
asks for the CUDA build of fbgemm by name.

A stamp written last lets the next call end at once, until a file named in ``WATCHED``, the torch
installed, or the place of the checkout changes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WATCHED = ("setup.py", "pyproject.toml", "constraints.txt", "launch/setup_env.py")
STAMP = "hstu-gr-setup.json"
MIN_PYTHON = (3, 11)
# torchrec's own needs, which a --no-deps install leaves out.
TORCHREC_NEEDS = ("tqdm", "pyre-extensions", "tensordict", "iopath", "torchmetrics==1.0.3", "psutil")
IMPORTS = ("torch", "triton", "fbgemm_gpu", "torchrec", "deepspeed", "ray", "gr")


class SetupError(Exception):
    """Set-up cannot go on; the message is what the user reads."""


@dataclass(frozen=True)
class Pair:
    """Releases made for one torch minor version (torchrec 1.6.0 was never published)."""

    fbgemm: str
    torchrec: str
    triton: str


PAIRS = {
    "2.11": Pair("1.6.0", "1.6.1", "3.6.0"),
    "2.12": Pair("1.7.0", "1.7.0", "3.7.1"),
    "2.13": Pair("1.8.0", "1.8.0", "3.7.1"),
}


@dataclass(frozen=True)
class Choice:
    """What to install beside a given torch; ``None`` means: not on this machine."""

    package: str | None
    version: str | None
    torchrec: str | None
    triton: str | None
    reason: str

    def requirements(self, *, with_triton: bool) -> list[str]:
        """Exact requirements for one ``pip install --no-deps``."""
        wanted = [(self.package, self.version), ("torchrec", self.torchrec)]
        if with_triton:
            wanted.append(("triton", self.triton))
        return [f"{name}=={version}" for name, version in wanted if name and version]


def choose_fbgemm(torch_version: str, cuda_version: str | None, system: str, arch: str) -> Choice:
    """Chooses the fbgemm build, torchrec and triton for an installed torch.

    Args:
        torch_version: ``torch.__version__``, for instance ``2.13.0+cpu``.
        cuda_version: ``torch.version.cuda``; ``None`` for a build without CUDA.
        system: ``platform.system()``: Linux, Darwin, Windows.
        arch: ``platform.machine()``: x86_64, aarch64, arm64, ...

    Raises:
        SetupError: No release of fbgemm and torchrec is made for this torch.
    """
    minor = ".".join(torch_version.split(".")[:2])
    pair = PAIRS.get(minor)
    if pair is None:
        raise SetupError(
            f"torch {torch_version} is not supported: install one of {', '.join(PAIRS)} instead "
            "(or remove the environment and let set-up choose)"
        )
    if system != "Linux":
        why = f"fbgemm {pair.fbgemm} is published for Linux only, so on {system} sharded tables are left out"
        return Choice(None, None, None, None, why)
    if arch not in ("x86_64", "aarch64"):
        why = f"fbgemm {pair.fbgemm} is not published for {arch}, so sharded tables are left out"
        return Choice(None, None, None, None, why)
    if cuda_version is None:
        why = f"torch {torch_version} is built without CUDA"
        return Choice("fbgemm-gpu-cpu", pair.fbgemm, pair.torchrec, pair.triton, why)
    why = f"torch {torch_version} is built for CUDA {cuda_version}"
    return Choice("fbgemm-gpu", pair.fbgemm, pair.torchrec, pair.triton, why)


def pins_beside(pins: str, torch: str, triton: str | None, choice: Choice) -> str:
    """constraints.txt with the lines of torch and its companions replaced by what fits the torch there.

    Args:
        pins: Text of constraints.txt.
        torch: Version installed, the local part (``+cpu``) included: pip must not swap one build for another.
        triton: Version installed, which wins (a CUDA build of torch brings its own), or ``None``.
        choice: What goes with this torch.
    """
    exact = {"torch": torch, "triton": triton or choice.triton, "torchrec": choice.torchrec}
    exact |= {"fbgemm-gpu": choice.version, "fbgemm-gpu-cpu": choice.version}
    kept = [line for line in pins.splitlines() if line.split("==")[0].strip().lower() not in exact]
    return "\n".join([*kept, *(f"{name}=={version}" for name, version in exact.items() if version)]) + "\n"


def pinned(pins: str, name: str) -> str:
    """The line ``name==version`` of constraints.txt."""
    for line in pins.splitlines():
        if re.match(rf"{re.escape(name)}==\S+$", line.strip()):
            return line.strip()
    raise SetupError(f"constraints.txt: no line {name}==VERSION; it must pin {name} exactly")


def installed(venv: Path, name: str) -> str | None:
    """Version of a distribution in ``venv``, read from its folder name: no interpreter is started."""
    for found in venv.glob(f"lib/python3.*/site-packages/{name}-*.dist-info"):
        return found.name[len(name) + 1 : -len(".dist-info")]
    return None


def fingerprint(root: Path, venv: Path) -> str:
    """Hash of all that decides whether the environment is still the right one."""
    digest = hashlib.sha256()
    for name in WATCHED:
        digest.update((root / name).read_bytes() + b"\0")
    # An editable install and the scripts in bin/ hold absolute paths: a moved checkout is set up again.
    for fact in (root, venv.absolute(), installed(venv, "torch")):
        digest.update(f"{fact}\0".encode())
    return digest.hexdigest()


def is_done(root: Path, venv: Path) -> bool:
    """Whether the stamp says that this very environment was finished."""
    try:
        stamp = json.loads((venv / STAMP).read_text())
    except (OSError, ValueError):
        return False
    return stamp.get("fingerprint") == fingerprint(root, venv) and (venv / "bin" / "python").exists()


def has_nvidia_gpu() -> bool:
    """Whether an NVIDIA driver is there, asked without torch."""
    return shutil.which("nvidia-smi") is not None or Path("/proc/driver/nvidia/version").exists()


class Setup:
    """The steps in order; each prints one line with its seconds."""

    def __init__(self, root: Path, venv: Path) -> None:
        self.root, self.venv = root, venv
        self.python = venv / "bin" / "python"
        self.pins = (root / "constraints.txt").read_text()

    def run(self, title: str, command: list[str], hint: str = "") -> str:
        """Runs one step; returns its output.

        Raises:
            SetupError: The command failed; the message holds the step and the last lines it printed.
        """
        print(f"  {title} ... ", end="", flush=True)
        started = time.monotonic()
        # A PYTHONPATH or an activated environment of the caller must not leak into the one being made.
        env = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
        try:
            done = subprocess.run(
                command, cwd=self.root, env=env, stdin=subprocess.DEVNULL, text=True, errors="replace",
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
            )  # fmt: skip
        except OSError as error:
            print("failed", flush=True)
            raise SetupError(f"set-up failed at the step '{title}'{hint}: {error}") from None
        if done.returncode:
            print("failed", flush=True)
            lines = [line for line in done.stdout.splitlines() if line.strip() and "WARNING" not in line]
            last = "\n".join(f"    {line}" for line in lines[-12:])
            raise SetupError(f"set-up failed at the step '{title}'{hint}; it said:\n{last}")
        print(f"{time.monotonic() - started:.1f} s", flush=True)
        return done.stdout

    def pip(self, title: str, *arguments: str) -> None:
        """One ``pip install``; bytecode is left to the first import, which needs only some of it."""
        self.run(
            title,
            [str(self.python), "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-input",
             "--no-compile", *arguments],
        )  # fmt: skip

    def make_venv(self) -> None:
        """A virtual environment with pip in it; an existing one is kept."""
        if self.venv.exists() and any(self.venv.iterdir()) and not (self.venv / "pyvenv.cfg").exists():
            raise SetupError(f"{self.venv} is a folder but no virtual environment: name another, VENV=PATH")
        if not (self.python.exists() and installed(self.venv, "pip")):
            hint = " (on Debian and Ubuntu the package python3-venv may be missing)"
            self.run(f"environment {self.venv}", [sys.executable, "-m", "venv", str(self.venv)], hint)
        ask = "import sys; print(sys.version_info >= (3, 11))"
        answer = subprocess.run([self.python, "-c", ask], capture_output=True, text=True, check=False).stdout
        if answer.strip() != "True":
            raise SetupError(f"{self.venv} holds no Python 3.11 or newer: remove it and run make setup again")

    def torch(self) -> tuple[str, str | None]:
        """Installs torch unless one is there; returns its version and its CUDA version."""
        if installed(self.venv, "torch") is None:
            wanted, index = pinned(self.pins, "torch"), os.environ.get("TORCH_INDEX_URL", "")
            if index:
                # That index serves its own choice of torch's dependencies, so only torch is pinned here; the
                # project's step moves the rest to their pins.
                self.pip(f"{wanted} from TORCH_INDEX_URL", "--index-url", index, wanted)
            else:
                if platform.system() == "Linux" and not has_nvidia_gpu():
                    print("  no NVIDIA GPU: TORCH_INDEX_URL=<index of the CPU wheels> avoids a CUDA build")
                self.pip(wanted, "-c", "constraints.txt", wanted)
        ask = "import json, torch; print(json.dumps([torch.__version__, torch.version.cuda]))"
        answer = self.run("which torch", [str(self.python), "-c", ask])
        version, cuda = json.loads(answer.strip().splitlines()[-1])
        return version, cuda

    def everything_else(self, torch_version: str, choice: Choice) -> None:
        """torchrec, fbgemm and triton without dependencies; then the project with its own."""
        triton = installed(self.venv, "triton")
        pins = self.venv / "constraints.txt"
        pins.write_text(pins_beside(self.pins, torch_version, triton, choice))
        exact = choice.requirements(with_triton=triton is None)
        if exact:
            self.pip(" ".join(exact), "--no-deps", "-c", str(pins), *exact)
        support = TORCHREC_NEEDS if choice.torchrec else ()
        wanted = ("setuptools", *support, "-e", ".[dev]")
        self.pip("the project and what it needs", "-c", str(pins), *wanted)

    def verify(self, torch_version: str, choice: Choice) -> None:
        """Imports everything once; torch and the project must be as expected, the others are reported."""
        ask = (
            "import importlib, json, sys\n"
            "for name in sys.argv[1:]:\n"
            "    try:\n"
            "        module = importlib.import_module(name)\n"
            "        got = [getattr(module, '__version__', '?'), getattr(module, '__variant__', ''), '']\n"
            "    except Exception as error:\n"
            "        got = ['', '', f'{type(error).__name__}: {error}'.splitlines()[0]]\n"
            "    print('@', json.dumps([name, *got]), flush=True)\n"
        )
        output = self.run("imports", [str(self.python), "-c", ask, *IMPORTS])
        rows = [json.loads(line[2:]) for line in output.splitlines() if line.startswith("@ ")]
        found = {name: (version, variant, error) for name, version, variant, error in rows}
        now = found["torch"][0]
        if now != torch_version:
            raise SetupError(f"torch was {torch_version} and is now {now}: remove {self.venv} and try again")
        if found["gr"][2]:
            raise SetupError(f"the project itself does not import: {found['gr'][2]}")
        variant = "cpu" if choice.package == "fbgemm-gpu-cpu" else "cuda"
        for name, (_, got_variant, error) in found.items():
            if error:
                print(f"  {name} does not import ({error}); what needs it is unavailable, the rest works")
            elif name == "fbgemm_gpu" and got_variant != variant:
                raise SetupError(f"fbgemm_gpu is the {got_variant} build, {variant} belongs to this torch")

    def all(self) -> None:
        """Every step, and the stamp last."""
        started = time.monotonic()
        print(f"Setting up {self.venv} (once; a few minutes)", flush=True)
        (self.venv / STAMP).unlink(missing_ok=True)
        self.make_venv()
        version, cuda = self.torch()
        choice = choose_fbgemm(version, cuda, platform.system(), platform.machine())
        chosen = " ".join(choice.requirements(with_triton=False)) or "neither fbgemm nor torchrec"
        print(f"  chosen: {chosen}, because {choice.reason}", flush=True)
        self.everything_else(version, choice)
        self.verify(version, choice)
        stamp = {"fingerprint": fingerprint(self.root, self.venv), "torch": version, "cuda": cuda}
        aside = self.venv / (STAMP + ".part")
        aside.write_text(json.dumps(stamp))
        aside.replace(self.venv / STAMP)
        print(f"Ready in {time.monotonic() - started:.0f} s: torch {version} in {self.venv}", flush=True)


def main(argv: list[str] | None = None) -> int:
    """Returns 0 when the environment is ready, 2 with a reason when it is not."""
    parser = argparse.ArgumentParser(description="Set the environment up, or do nothing when it is.")
    parser.add_argument("--venv", default=os.environ.get("VENV") or ".venv", help="where (default: .venv)")
    parser.add_argument("--quiet", action="store_true", help="say nothing when there is nothing to do")
    options = parser.parse_args(argv)
    venv = Path(os.path.relpath(ROOT / options.venv)) if Path.cwd() == ROOT else ROOT / options.venv
    try:
        if sys.version_info < MIN_PYTHON:
            raise SetupError(
                f"Python {platform.python_version()} is too old, 3.11 or newer is needed: "
                "name one with make PY=/path/to/python3.11"
            )
        missing = [name for name in WATCHED if not (ROOT / name).is_file()]
        if missing:
            raise SetupError(f"{ROOT} holds no {missing[0]}: set-up runs in a checkout only")
        if not is_done(ROOT, venv):
            Setup(ROOT, venv).all()
        elif not options.quiet:
            print(f"Nothing to do: {venv} is ready (torch {installed(venv, 'torch')}).")
            if os.environ.get("TORCH_INDEX_URL"):
                print(f"TORCH_INDEX_URL is not used, torch is there: remove {venv} to choose another.")
        return 0
    except SetupError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2


if __name__ == "__main__":
    sys.exit(main())
