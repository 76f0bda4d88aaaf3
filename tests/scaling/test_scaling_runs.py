"""A study's runs are planned to their budget, run, and taken up again where a driver was killed."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pytest

from gr.errors import UserError, run_cli
from gr.scaling import selftest
from gr.scaling.cli import main
from gr.scaling.design import load_study
from gr.scaling.driver import run_plan
from gr.scaling.executors import Local
from gr.scaling.plan import make_plan
from gr.scaling.store import RunDir, run_dir
from gr.train import main as train
from gr.training.assemble import assemble, open_data, train_loader

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["--design.budgets", "[2e8, 4e8]", "--design.scales", "[1, 2]", "--holdout.budgets", "[]"]


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    place = tmp_path_factory.mktemp("study")
    base = (ROOT / "configs/scaling/tiny_hstu.yaml").read_text().replace("num_users: 6000", "num_users: 300")
    (place / "tiny_hstu.yaml").write_text(base)
    shutil.copy(ROOT / "configs/scaling/tiny.yaml", place / "tiny.yaml")
    places = ["--out", str(place / "out"), "--cache", str(place / "cache")]
    study, path = load_study(str(place / "tiny.yaml"), [*SMALL, *places, "--limits.max_epochs", "40"])
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
    assert "plan the study again" in folder.error()["message"] and folder.state() == "failed"


class Killed(BaseException):
    """Stands for SIGKILL: nothing after it is written."""


def study_args(study, tmp_path) -> list[str]:
    """The same study with a folder of its own."""
    small = [*SMALL[:4], "--holdout.budgets", "[4e8]", "--limits.max_epochs", "40"]
    base = f"--variants.hstu.base={Path(study.cache).parent / 'tiny_hstu.yaml'}"
    return [str(ROOT / "configs/scaling/tiny.yaml"), *small, base, "--cache", study.cache, "--out", str(tmp_path)]


def test_a_killed_sweep_goes_on_to_the_same_table_and_ends_in_a_config_that_trains(
    planned, tmp_path, monkeypatch, capsys
) -> None:
    study = planned[0]
    whole, cut = study_args(study, tmp_path / "whole"), study_args(study, tmp_path / "cut")
    assert main(["run", *whole]) == 0
    real, written = RunDir.write_result, []

    def die_before_the_third(self, result):
        if len(written) == 2:
            raise Killed
        written.append(self.path)
        real(self, result)

    monkeypatch.setattr(RunDir, "write_result", die_before_the_third)
    with pytest.raises(Killed):
        main(["run", *cut])
    monkeypatch.setattr(RunDir, "write_result", real)
    capsys.readouterr()
    assert main(["run", *cut]) == 0
    assert "4 ran, 2 were done, 0 failed" in capsys.readouterr().out
    for args in (whole, cut):
        assert main(["collect", *args]) == 0
    tables = [tmp_path / name / "tiny" / "runs.csv" for name in ("whole", "cut")]
    assert tables[0].read_bytes() == tables[1].read_bytes()
    assert len(tables[0].read_text().splitlines()) == 7
    assert "train_seconds" not in tables[0].read_text() and (tables[0].parent / "timings.csv").exists()

    # Without the held-out runs there are too few; fitted, too, they are enough.
    assert run_cli(main, ["fit", str(tables[0])]) == 2
    assert "4 finished runs to fit" in capsys.readouterr().err
    opened = study_args(study, tmp_path / "whole")
    opened[opened.index("--holdout.budgets") + 1] = "[]"
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
    assert run_plan(study, [spec], say=lambda line: None).already == 1


def test_a_process_a_run_gives_the_same_numbers(planned) -> None:
    study, plan = planned
    spec = plan.specs[0]
    folder = run_dir(study.folder, spec.run_id)
    run_plan(study, [spec], say=lambda line: None)
    here = folder.result()["metrics"]
    shutil.rmtree(folder.path)
    outcome = run_plan(study, [spec], Local(1), say=lambda line: None)
    assert outcome.ran == {spec.run_id: "done"} and folder.result()["metrics"] == here


def test_a_selftest_with_one_failed_check_says_which_and_ends_with_1(monkeypatch, capsys, tmp_path) -> None:
    assert selftest.recovered() < 1e-3
    monkeypatch.setattr(selftest, "checks", lambda folder: iter([("runs", True), (f"fits in {folder.name}", False)]))
    assert main(["selftest", "--out", str(tmp_path / "kept")]) == 1
    assert capsys.readouterr().out == "ok     runs\nFAILED fits in kept\n"
    with pytest.raises(UserError, match="unknown argument '--fast'; see gr-scaling selftest --help"):
        main(["selftest", "--fast"])
