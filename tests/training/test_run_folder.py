"""One folder, one config; and what is written there about the machine."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from gr.config import config_hash, runtime
from gr.errors import UserError
from gr.training.config import OptimizerConfig, TrainConfig
from gr.training.environment import command_line, git_state
from gr.training.run_folder import RunFolder, claim, read_hash


@dataclass(frozen=True)
class WholeConfig:
    name: str = "x"
    seed: int = 1
    train: TrainConfig = field(default_factory=TrainConfig)
    folder: str = runtime("runs")


def test_the_same_config_resumes_even_if_runtime_fields_differ(tmp_path):
    first = claim(tmp_path / "run", WholeConfig(), ["gr-train", "x.yaml"])
    assert not first.resumed
    again = claim(tmp_path / "run", WholeConfig(folder="elsewhere", train=TrainConfig(keep_last=7)))
    assert again.resumed and "folder: elsewhere" in again.config.read_text()
    assert first.config.read_text() != "" and read_hash(first.config) == config_hash(WholeConfig())


def test_another_config_is_refused_with_both_hashes_and_the_first_differences(tmp_path):
    old = WholeConfig()
    claim(tmp_path / "run", old).best.write_bytes(b"weights")
    new = WholeConfig(seed=2, folder="b", train=TrainConfig(keep_last=9, optimizer=OptimizerConfig(lr=0.5)))
    with pytest.raises(UserError) as caught:
        claim(tmp_path / "run", new)
    text = str(caught.value)
    assert config_hash(old) in text and config_hash(new) in text
    assert "(seed 1 -> 2, train.optimizer.lr 0.001 -> 0.5)" in text
    many = dataclasses.replace(new, name="y", train=TrainConfig(epochs=99, accumulate=3))
    with pytest.raises(UserError, match=r"\(name x -> y, seed 1 -> 2, train.epochs 10 -> 99 and 1 more\)"):
        claim(tmp_path / "run", many)


def test_an_attempt_that_ended_before_its_first_checkpoint_does_not_hold_the_name(tmp_path):
    first = claim(tmp_path / "run", WholeConfig(seed=1))
    first.metrics.write_text("{}\n")
    with first.lock(), pytest.raises(UserError, match="in use by another process"):
        claim(tmp_path / "run", WholeConfig(seed=2))
    again = claim(tmp_path / "run", WholeConfig(seed=2))
    assert not again.resumed and not again.metrics.exists()
    assert read_hash(again.config) == config_hash(WholeConfig(seed=2))


def test_a_folder_that_is_no_run_is_left_alone(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="holds files but no config.yaml"):
        claim(tmp_path / "mine", WholeConfig())
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file is a file"):
        claim(tmp_path / "file", WholeConfig())
    with pytest.raises(UserError, match="cannot be"):
        claim(tmp_path / "file" / "run", WholeConfig())
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "config.yaml").write_text("a: 1\n")
    with pytest.raises(UserError, match="does not begin with '# config_hash: '"):
        claim(tmp_path / "foreign", WholeConfig())


def test_two_processes_do_not_share_a_folder(tmp_path):
    folder = RunFolder(tmp_path / "run")
    with folder.lock(), pytest.raises(UserError, match="in use by another process"), folder.lock():
        pass
    with folder.lock():
        pass


def test_env_json_names_versions_and_machine_but_no_private_folder(tmp_path):
    home = str(Path.home())
    argv = [
        f"{home}/bin/gr-train",
        f"{Path.cwd()}/configs/a.yaml",
        f"--data.path={home}/log.csv",
        "--name",
        "a b",
    ]
    folder = claim(tmp_path / "run", WholeConfig(), argv)
    env = json.loads(folder.env.read_text())
    for key in ("python", "torch", "numpy", "platform", "cpu", "cores", "threads", "command"):
        assert env[key]
    assert "cuda" in env and env["devices"] is not None
    assert env["command"] == "gr-train configs/a.yaml --data.path=~/log.csv --name 'a b'"
    assert command_line(argv) == env["command"]


def test_the_commit_is_told_in_a_checkout_and_nothing_elsewhere(tmp_path):
    assert git_state(tmp_path) == {}
    quiet = {**os.environ, "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull}
    for words in (
        ["init", "-q"],
        ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q", "--allow-empty", "-m", "x"],
    ):
        subprocess.run(["git", "-C", str(tmp_path), *words], check=True, env=quiet)
    state = git_state(tmp_path)
    assert len(state["git_commit"]) == 40 and state["git_dirty"] is False
