"""A study's runs are planned to their budget, run, and taken up again where a driver was killed."""

from __future__ import annotations

import copy
import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gr.errors import UserError, run_cli
from gr.scaling import selftest
from gr.scaling.cli import main
from gr.scaling.design import load_study
from gr.scaling.driver import run_plan
from gr.scaling.plan import make_plan
from gr.scaling.store import run_dir
from gr.train import main as train
from gr.training.assemble import assemble, open_data, train_loader
from small_study import study_args, write_study


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    place = tmp_path_factory.mktemp("study")
    file, *args = study_args(write_study(place), place / "out")
    study, path = load_study(file, args)
    return study, make_plan(study, path)


def test_planned_flops_are_those_of_the_batches_that_training_will_see(planned) -> None:
    from gr import config as configs
    from gr.distributed.process import ProcessContext
    from gr.training.run_config import RunConfig

    study, plan = planned
    for spec in plan.specs:
        config = configs.from_dict(RunConfig, spec.config)
        store, split = open_data(config)
        model = assemble(config, store, split)
        loader = train_loader(config, store, split, ProcessContext())
        keys = [(epoch, i) for epoch in range(config.train.epochs) for i in range(loader.num_batches(epoch))]
        spent = sum(model.step_cost(loader.batch(*key)).training_flops for key in keys[: config.train.max_steps])
        assert spent == spec.planned["model_flops"]
        assert abs(spent / spec.budget - 1) <= study.limits.flop_tolerance


def test_a_sweep_spends_what_was_planned_and_goes_on_where_it_was_cut(planned) -> None:
    study, plan = planned
    specs = [spec for spec in plan.specs if spec.seed == 0]
    assert len(specs) == 4
    first = run_plan(study, specs[:2], say=lambda line: None)
    assert (len(first.ran), first.already, first.failed) == (2, 0, {})
    second = run_plan(study, specs, say=lambda line: None)
    assert (len(second.ran), second.already, second.failed) == (2, 2, {})
    for spec in specs:
        result = run_dir(study.folder, spec.run_id).result()
        assert result["status"] == "done"
        assert result["measured"]["model_flops"] == spec.planned["model_flops"]
        assert result["measured"]["loss_floor"] < result["metrics"]["loss"]
    # A folder that is deleted is run again, to the same numbers.
    gone = run_dir(study.folder, specs[0].run_id)
    before = gone.result()["metrics"]
    shutil.rmtree(gone.path)
    run_plan(study, specs, say=lambda line: None)
    assert gone.result()["metrics"] == before


def test_a_run_of_another_log_fails_with_its_reason(planned) -> None:
    study, plan = planned
    spec = next(spec for spec in plan.specs if spec.seed == 1)
    folder = run_dir(study.folder, spec.run_id)
    folder.write_spec(spec)
    raw = json.loads(folder.spec_file.read_text()) | {"data_hash": "0" * 64}
    folder.spec_file.write_text(json.dumps(raw))
    from gr.scaling.worker import work_here

    assert work_here(folder.path) == "failed"
    assert "plan the study again" in folder.reason() and folder.state() == "failed"


def driver_and_workers_killed(args: list[str], folder: Path) -> None:
    """Starts a sweep and ends all its processes with SIGKILL once a run is done and the next has begun."""
    driver = subprocess.Popen([sys.executable, "-m", "gr.scaling.cli", "run", *args])
    workers = []
    while not (workers and any(folder.glob("runs/*/result.json"))):
        assert driver.poll() is None, "the sweep ended before it was killed"
        time.sleep(0.01)
        workers = [beat for beat in folder.glob("runs/*/heartbeat.json") if not (beat.parent / "result.json").exists()]
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    for beat in folder.glob("runs/*/heartbeat.json"):
        os.kill(json.loads(beat.read_text())["pid"], signal.SIGKILL)


@pytest.mark.timeout(900)  # it starts five processes, which take long where others compute
def test_a_killed_sweep_goes_on_to_the_same_table_and_ends_in_a_config_that_trains(planned, tmp_path, capsys) -> None:
    file = Path(planned[0].cache).parent / "tiny.yaml"
    whole = study_args(file, tmp_path / "whole", holdout="[4e8]")
    cut = study_args(file, tmp_path / "cut", holdout="[4e8]")
    assert main(["run", *whole]) == 0
    driver_and_workers_killed([*cut, "--executor", "local"], tmp_path / "cut" / "tiny")
    done = len(list((tmp_path / "cut").glob("tiny/runs/*/result.json")))
    capsys.readouterr()
    assert 1 <= done < 6 and main(["run", *cut]) == 0
    assert f"{6 - done} ran, {done} were done, 0 failed" in capsys.readouterr().out
    for args in (whole, cut):
        assert main(["collect", *args]) == 0
    tables = [tmp_path / name / "tiny" / "runs.csv" for name in ("whole", "cut")]
    assert tables[0].read_bytes() == tables[1].read_bytes()
    assert len(tables[0].read_text().splitlines()) == 7
    assert "train_seconds" not in tables[0].read_text()
    with open(tables[0].with_name("timings.csv"), newline="") as times:
        assert all(float(row["train_seconds"]) > 0 and row["code"] for row in csv.DictReader(times))

    # Without the held-out runs there are too few; fitted, too, they are enough.
    assert run_cli(main, ["fit", str(tables[0])]) == 2
    assert "at least 6 finished runs, and this table has 4" in capsys.readouterr().err
    opened = study_args(file, tmp_path / "whole")
    assert main(["run", *opened]) == 0 and main(["collect", *opened]) == 0
    assert main(["fit", str(tables[0])]) == 0
    out = tmp_path / "next.yaml"
    capsys.readouterr()
    assert main(["predict", str(tables[0]), "--flops", "6e8", "--config", str(out), "--study", *opened]) == 0
    assert f"gr-train {out}" in capsys.readouterr().out
    assert train([str(out), "--runs", str(tmp_path / "runs")]) == 0


def test_a_run_that_diverges_is_a_result_and_is_kept(planned) -> None:
    study, plan = planned
    spec = copy.deepcopy(plan.specs[-1])
    spec.config["train"]["optimizer"]["lr"] = 1e38
    shutil.rmtree(run_dir(study.folder, spec.run_id).path, ignore_errors=True)
    outcome = run_plan(study, [spec], say=lambda line: None)
    folder = run_dir(study.folder, spec.run_id)
    assert outcome.ran == {spec.run_id: "diverged"} and folder.state() == "diverged"
    assert "training diverged at step" in folder.result()["reason"]
    assert "diverged/step-" not in folder.result()["reason"]  # nothing that depends on where the study lies
    assert run_plan(study, [spec], say=lambda line: None).already == 1
    assert folder.reason() == folder.result()["reason"]


def test_a_selftest_with_one_failed_check_says_which_and_ends_with_1(monkeypatch, capsys, tmp_path) -> None:
    assert selftest.recovered() < 1e-3
    monkeypatch.setattr(selftest, "checks", lambda folder: iter([("runs", True), (f"fits in {folder.name}", False)]))
    assert main(["selftest", "--out", str(tmp_path / "kept")]) == 1
    assert capsys.readouterr().out == "ok     runs\nFAILED fits in kept\n"
    with pytest.raises(UserError, match="unknown argument '--fast'; see gr-scaling selftest --help"):
        main(["selftest", "--fast"])
