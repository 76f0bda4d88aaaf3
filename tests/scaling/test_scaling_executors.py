"""Every executor does the same runs; what would be run is printed; money and memory that do not suffice are met."""

from __future__ import annotations

import json
import os
import shutil
import subprocess

import pytest
import torch

from gr.errors import UserError, run_cli
from gr.scaling.cli import main
from gr.scaling.design import Resources, load_study
from gr.scaling.driver import run_plan
from gr.scaling.executors import Local
from gr.scaling.plan import make_plan
from gr.scaling.ray_executor import check_size
from gr.scaling.slurm_executor import Slurm, script
from gr.scaling.store import driving, run_dir
from gr.training import trainer
from small_study import study_args, write_study

TWO = ("--design.budgets", "[4e8]", "--seeds.smallest_budget", "1")


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """A study of two runs, done inline: (its file, the folder of its results)."""
    place = tmp_path_factory.mktemp("swept")
    file = write_study(place)
    args = study_args(file, place / "inline", *TWO)
    assert main(["run", *args]) == 0 and main(["collect", *args]) == 0
    return file, place / "inline" / "tiny"


def results(folder) -> dict:
    return {path.parent.name: json.loads(path.read_text()) for path in sorted(folder.glob("runs/*/result.json"))}


@pytest.mark.timeout(900)
def test_ray_gives_the_same_table(swept, tmp_path) -> None:
    ray = pytest.importorskip("ray")
    args = study_args(swept[0], tmp_path, *TWO, "--executor", "ray", "--max_parallel", "2")
    try:
        assert main(["run", *args]) == 0
    finally:
        ray.shutdown()
    assert main(["collect", *args]) == 0
    assert (tmp_path / "tiny/runs.csv").read_bytes() == (swept[1] / "runs.csv").read_bytes()


def test_more_than_all_of_ray_has_is_refused() -> None:
    check_size({"CPU": 2, "GPU": 0.0}, {"CPU": 2.0})
    with pytest.raises(UserError, match="a run asks for 1 GPU and all of this Ray has 0; lower resources.gpus"):
        check_size({"CPU": 2, "GPU": 1.0}, {"CPU": 2.0})


SBATCH = """#!/bin/bash
cat > "$0.script"
bash "$0.script" >&2
echo "$?" > "$0.status"
echo 17
"""


def test_a_slurm_job_does_the_run_and_one_in_the_queue_is_not_submitted_again(swept, tmp_path, monkeypatch) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, text in (("sbatch", SBATCH), ("squeue", '#!/bin/bash\ncat "$0.jobs"\n')):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    (tools / "squeue.jobs").write_text("17\n")
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    monkeypatch.setattr("gr.scaling.slurm_executor.LOOK_EVERY_S", 0.0)
    study, path = load_study(*_split(study_args(swept[0], tmp_path, *TWO, "--executor", "slurm")))
    spec = make_plan(study, path).specs[0]
    folder = run_dir(study.folder, spec.run_id)
    folder.write_spec(spec)
    (folder.path / "job.json").write_text('{"slurm": "17"}')
    queue = Slurm(1, study.resources)
    queue.start(folder.path)
    assert queue.ended() == [] and not (tools / "sbatch.script").exists()
    (tools / "squeue.jobs").write_text("")
    assert queue.ended() == [(folder.path, "failed")]  # cancelled before it had begun
    outcome = run_plan(study, [spec], say=lambda line: None)
    assert (tools / "sbatch.status").read_text() == "0\n" and outcome.ran == {spec.run_id: "done"}
    assert results(study.folder)[spec.run_id]["metrics"] == results(swept[1])[spec.run_id]["metrics"]


def _split(args):
    return args[0], args[1:]


def test_a_slurm_script_asks_for_what_the_study_says_and_refuses_what_slurm_does_not_know(tmp_path) -> None:
    asked = Resources(threads=3, gpus=1, time="4:00:00", warn_s=60, sbatch=("partition=gpu",))
    text = script(tmp_path / "abc", asked)
    for line in ("cpus-per-task=3", "gpus-per-node=1", "time=4:00:00", "signal=B:USR1@60", "partition=gpu", "requeue"):
        assert f"#SBATCH --{line}\n" in text
    assert "OMP_NUM_THREADS=3\n" in text and f"gr.scaling.worker {tmp_path}/abc &\n" in text
    with pytest.raises(UserError, match="resources.time soon: must be minutes"):
        script(tmp_path, Resources(time="soon"))


def test_the_printed_command_does_a_run_and_a_dry_run_writes_nothing(swept, tmp_path, capsys) -> None:
    args = study_args(swept[0], tmp_path, *TWO)
    assert main(["run", *args, "--dry-run"]) == 0
    assert capsys.readouterr().out.endswith("# 2 to do, 0 done\n") and not (tmp_path / "tiny").exists()
    assert main(["run", *args, "--executor", "print", "--resources.threads", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line[0] for line in lines] == ["#", "O", "#", "O", "#"]
    assert subprocess.run(lines[1], shell=True, capture_output=True).returncode == 0
    ((run_id, result),) = results(tmp_path / "tiny").items()
    assert run_id in lines[1] and result["metrics"] == results(swept[1])[run_id]["metrics"]
    assert main(["run", *args, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "# 1 to do, 1 done" in said and run_id not in said


def test_only_the_runs_asked_for_are_done_and_others_are_refused(swept, tmp_path, capsys) -> None:
    args, name = study_args(swept[0], tmp_path, *TWO), sorted(results(swept[1]))[0]
    assert main(["run", *args, "--dry-run", "--only", name]) == 0
    assert "# 1 to do, 0 done" in capsys.readouterr().out
    assert run_cli(main, ["run", *args, "--only", "abc"]) == 2
    assert "--only abc: the plan has no such run" in capsys.readouterr().err


def test_processes_have_cores_of_their_own_where_there_are_enough(monkeypatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    assert Local(2, 3)._free == [{0, 1, 2}, {3, 4, 5}] and Local(2, 3).env["OMP_NUM_THREADS"] == "3"
    assert Local(3, 4)._free == [set(range(8))] * 3
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert Local(4).env["OMP_NUM_THREADS"] == "2"


def test_a_second_driver_is_refused(swept, tmp_path, capsys) -> None:
    args = study_args(swept[0], tmp_path, *TWO)
    with driving(tmp_path / "tiny"):
        assert run_cli(main, ["run", *args]) == 2
    assert "is being run by another gr-scaling" in capsys.readouterr().err


def test_a_sweep_that_would_spend_too_much_is_refused_before_it_begins(swept, tmp_path, capsys) -> None:
    args = study_args(swept[0], tmp_path, *TWO)
    assert run_cli(main, ["run", *args, "--limits.total_flops", "3e8"]) == 2
    first, said = capsys.readouterr().err.splitlines()
    assert first.startswith("planning tiny: ")  # which may take minutes
    assert said.startswith("error: ") and "has spent 0 model FLOPs and what is left would spend 8" in said
    assert not (tmp_path / "tiny").exists()
    # What earlier designs have spent counts.
    more = study_args(swept[0], swept[1].parent, "--seeds.smallest_budget", "1")
    assert run_cli(main, ["run", *more, "--limits.total_flops", "1e9"]) == 2
    assert "has spent 8e+08 model FLOPs and what is left would spend 3.9" in capsys.readouterr().err
    assert run_cli(main, ["run", *more, "--limits.total_flops", "1e9", "--dry-run"]) == 2
    assert "has spent" in capsys.readouterr().err
    assert main(["run", *more, "--limits.total_flops", "1.3e9", "--dry-run"]) == 0


def test_a_run_that_does_not_fit_into_memory_learns_the_same_in_parts_and_says_so(
    swept, tmp_path, monkeypatch, capsys
) -> None:
    real, seen = trainer.run_step, []

    def small_device(engine, phase, batches, *rest, **more):
        batches = list(batches)
        seen.append(max(batch.num_sequences for batch in batches))
        if seen[-1] > most:
            raise torch.OutOfMemoryError("as a small device would")
        return real(engine, phase, iter(batches), *rest, **more)

    monkeypatch.setattr(trainer, "run_step", small_device)
    args = study_args(swept[0], tmp_path, *TWO)
    (run_id, whole), *_ = results(swept[1]).items()
    assert whole["timings"]["batch_size"] == 6
    most = 2
    assert main(["run", *args, "--only", run_id]) == 0
    assert "out of memory at first" in capsys.readouterr().out
    parted = results(tmp_path / "tiny")[run_id]
    assert seen[:3] == [6, 3, 1] and (parted["timings"]["batch_size"], parted["timings"]["accumulate"]) == (1, 6)
    for name in ("steps", "tokens", "model_flops"):
        assert parted["measured"][name] == whole["measured"][name]
    assert abs(parted["metrics"]["loss"] / whole["metrics"]["loss"] - 1) < 1e-4
    # A device on which nothing fits ends it.
    most = 0
    shutil.rmtree(tmp_path / "tiny/runs" / run_id)
    assert main(["run", *args, "--only", run_id]) == 1
    assert "out of device memory at step 1" in capsys.readouterr().out
