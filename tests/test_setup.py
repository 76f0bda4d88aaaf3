"""Set-up chooses what belongs to the torch it finds, keeps that torch, and knows when it is done."""

from __future__ import annotations

import json
import subprocess
import sys
import venv as stdlib_venv
from pathlib import Path

import pytest

from gr.launch import setup_env
from gr.launch.setup_env import Setup, SetupError, choose_fbgemm, pins_beside

ROOT = Path(__file__).resolve().parent.parent

MACHINES = [
    pytest.param(
        ("2.13.0+cpu", None, "Linux", "x86_64"),
        ["fbgemm-gpu-cpu==1.8.0", "torchrec==1.8.0", "triton==3.7.1"],
        "without CUDA",
        id="linux-cpu",
    ),
    pytest.param(
        ("2.13.0", "13.0", "Linux", "x86_64"),
        ["fbgemm-gpu==1.8.0", "torchrec==1.8.0", "triton==3.7.1"],
        "CUDA 13.0",
        id="linux-cuda13",
    ),
    pytest.param(("2.13.0", None, "Darwin", "arm64"), [], "Linux only", id="macos-arm64"),
    pytest.param(
        ("2.11.0+cu130", "13.0", "Linux", "x86_64"),
        ["fbgemm-gpu==1.6.0", "torchrec==1.6.1", "triton==3.6.0"],
        "CUDA 13.0",
        id="torch-2.11-cuda",
    ),
]


@pytest.mark.parametrize(("machine", "expected", "reason"), MACHINES)
def test_the_build_follows_the_torch_that_is_there(machine, expected, reason) -> None:
    choice = choose_fbgemm(*machine)
    assert choice.requirements(with_triton=True) == expected
    assert reason in choice.reason


def test_torch_2_12_pairs_with_1_7() -> None:
    assert choose_fbgemm("2.12.1", None, "Linux", "aarch64").requirements(with_triton=False) == [
        "fbgemm-gpu-cpu==1.7.0",
        "torchrec==1.7.0",
    ]


@pytest.mark.parametrize("version", ["2.10.0", "2.14.1+cpu", "3.0.0", "2.1.3"])
def test_an_unsupported_torch_is_refused_in_one_sentence(version: str) -> None:
    with pytest.raises(SetupError) as refused:
        choose_fbgemm(version, None, "Linux", "x86_64")
    said = str(refused.value)
    assert version in said and "2.11, 2.12, 2.13" in said and "\n" not in said


def test_setup_py_admits_exactly_the_torch_that_set_up_has_pairs_for() -> None:
    from packaging.requirements import Requirement

    line = next(x for x in (ROOT / "setup.py").read_text().splitlines() if '"torch>' in x)
    admitted = Requirement(line.strip().strip('",')).specifier
    minors = [f"2.{minor}" for minor in range(8, 20) if admitted.contains(f"2.{minor}.0")]
    assert minors == list(setup_env.PAIRS)


def test_the_committed_pins_are_those_of_the_pinned_torch() -> None:
    pins = (ROOT / "constraints.txt").read_text()
    torch = setup_env.pinned(pins, "torch").split("==")[1]
    for requirement in choose_fbgemm(torch, None, "Linux", "x86_64").requirements(with_triton=True):
        assert requirement in pins.splitlines()


def test_every_pin_is_exact_and_stands_once() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    names = [line.split("==")[0] for line in lines if line and not line.startswith("#")]
    assert all("==" in line for line in lines if line and not line.startswith("#"))
    assert len(names) == len(set(names)) and len(names) > 60


def test_the_torch_that_is_there_is_pinned_to_its_very_build() -> None:
    pins = "# note\ntorch==2.13.0\ntriton==3.7.1\nfbgemm-gpu==1.8.0\nnumpy==2.0.0\n"
    choice = choose_fbgemm("2.11.0+cu130", "13.0", "Linux", "x86_64")
    lines = pins_beside(pins, "2.11.0+cu130", "3.6.9", choice).splitlines()
    assert "torch==2.11.0+cu130" in lines and "torch==2.13.0" not in lines
    assert "triton==3.6.9" in lines, "a triton that came with torch must stay"
    assert "fbgemm-gpu==1.6.0" in lines and "numpy==2.0.0" in lines
    assert len([line for line in lines if line.startswith("triton==")]) == 1


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A root with the watched files and an environment that looks finished but for the stamp."""
    for name in setup_env.WATCHED:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"# {name}\ntorch==2.13.0\n")
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "python").write_text("")
    (tmp_path / ".venv" / "lib/python3.11/site-packages/torch-2.13.0+cpu.dist-info").mkdir(parents=True)
    return tmp_path


def stamp(root: Path) -> Path:
    venv = root / ".venv"
    (venv / setup_env.STAMP).write_text(json.dumps({"fingerprint": setup_env.fingerprint(root, venv)}))
    return venv


def test_a_finished_environment_is_recognised(checkout: Path) -> None:
    assert not setup_env.is_done(checkout, checkout / ".venv")
    assert setup_env.is_done(checkout, stamp(checkout))


@pytest.mark.parametrize("name", setup_env.WATCHED)
def test_a_changed_file_asks_for_set_up_again(checkout: Path, name: str) -> None:
    venv = stamp(checkout)
    with (checkout / name).open("a") as file:
        file.write("\n")
    assert not setup_env.is_done(checkout, venv)


def test_another_torch_a_lost_python_and_a_torn_stamp_ask_for_set_up_again(checkout: Path) -> None:
    venv = stamp(checkout)
    site = venv / "lib/python3.11/site-packages"
    (site / "torch-2.13.0+cpu.dist-info").rename(site / "torch-2.12.0.dist-info")
    assert not setup_env.is_done(checkout, venv)
    venv = stamp(checkout)
    (venv / "bin/python").unlink()
    assert not setup_env.is_done(checkout, venv)
    (venv / "bin/python").write_text("")
    (venv / setup_env.STAMP).write_text('{"finger')
    assert not setup_env.is_done(checkout, venv)


def test_a_failing_step_names_itself_and_ends_with_what_was_said(checkout: Path, capsys) -> None:
    setup = Setup(checkout, checkout / ".venv")
    script = "import sys; [print(f'line {i}') for i in range(50)]; sys.exit(3)"
    with pytest.raises(SetupError, match="failed at the step 'the thirteenth'") as failed:
        setup.run("the thirteenth", [sys.executable, "-c", script])
    assert "line 49" in str(failed.value) and "line 30" not in str(failed.value)
    assert "the thirteenth ... failed" in capsys.readouterr().out


def test_a_folder_that_is_no_environment_is_left_alone(checkout: Path) -> None:
    with pytest.raises(SetupError, match="no virtual environment"):
        Setup(checkout, checkout / "launch").make_venv()


def test_torch_comes_from_the_users_index_and_only_then_unpinned(checkout: Path, monkeypatch) -> None:
    venv = checkout / "fresh"
    stdlib_venv.create(venv, with_pip=False)
    commands: list[list[str]] = []

    def run(self, title: str, command: list[str], hint: str = "") -> str:
        commands.append(command)
        return 'a warning of torch\n["2.13.0+cpu", null]\n'

    monkeypatch.setattr(Setup, "run", run)
    monkeypatch.delenv("TORCH_INDEX_URL", raising=False)
    assert Setup(checkout, venv).torch() == ("2.13.0+cpu", None)
    assert commands[0][-3:] == ["-c", "constraints.txt", "torch==2.13.0"] and "--index-url" not in commands[0]
    commands.clear()
    monkeypatch.setenv("TORCH_INDEX_URL", "file:///wheels")
    Setup(checkout, venv).torch()
    assert commands[0][-3:] == ["--index-url", "file:///wheels", "torch==2.13.0"]


def test_torch_that_is_there_is_not_installed_again(checkout: Path, monkeypatch) -> None:
    titles: list[str] = []

    def run(self, title: str, command: list[str], hint: str = "") -> str:
        titles.append(title)
        return '["2.13.0+cpu", null]'

    monkeypatch.setattr(Setup, "run", run)
    Setup(checkout, checkout / ".venv").torch()
    assert titles == ["which torch"]


def test_the_script_needs_nothing_but_the_standard_library(tmp_path: Path) -> None:
    script = ROOT / "launch" / "setup_env.py"
    command = [sys.executable, "-I", "-S", str(script), "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "--venv" in done.stdout, done.stderr


def test_outside_a_checkout_the_script_says_so(tmp_path: Path) -> None:
    alone = tmp_path / "launch" / "setup_env.py"
    alone.parent.mkdir()
    alone.write_text((ROOT / "launch" / "setup_env.py").read_text())
    done = subprocess.run([sys.executable, str(alone)], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert "runs in a checkout only" in done.stderr


def test_make_says_so_when_no_python_is_new_enough() -> None:
    command = ["make", "-s", "setup", "PY="]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "no Python 3.11 or newer found" in done.stderr
