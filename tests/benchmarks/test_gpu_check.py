"""The unattended check: its dry run goes through every slice; its clock, its memory and its judgement."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.gpu_check import __main__ as command
from benchmarks.gpu_check import correctness, long, models, plan, rates, sync
from benchmarks.gpu_check.plan import Context, Kept, Slice, Unit
from benchmarks.gpu_check.report import Report
from benchmarks.kernels import rows, targets
from benchmarks.kernels.hstu_attention import OPERATOR
from gr.errors import run_cli

ROOT = Path(__file__).resolve().parents[2]


def context(tmp_path: Path, **more) -> Context:
    return Context(**{"device": "cpu", "deadline": time.time() + 60, "folder": tmp_path, **more})


class OnAGpu(Context):
    """A CPU that is taken for a GPU: everything but the device's own calls runs as it does there."""

    dry = False


def test_without_a_gpu_it_is_one_sentence_and_status_2(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    out = str(tmp_path / "report.json")
    assert run_cli(command.main, ["--out", out]) == 2
    err = capsys.readouterr().err
    assert "this checks an NVIDIA GPU, and torch sees none" in err and err.count("\n") == 1
    for argv, words in (
        (["--minutes", "0"], "--minutes must be positive, got 0"),
        (["--slices", "speed"], "invalid choice: 'speed'"),
        (["--out", str(tmp_path / "none" / "x.json")], "--out: there is no folder for"),
    ):
        assert run_cli(command.main, argv) == 2 and words in capsys.readouterr().err
    assert not (tmp_path / "report.json").exists()


def test_on_a_cpu_it_goes_through_every_slice_and_says_what_it_cannot(tmp_path):
    """On a machine that has torch and numpy only, besides triton if it is installed."""
    out = tmp_path / "report.json"
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "from importlib.machinery import PathFinder\n"
        "class Hiding(PathFinder):\n"
        "    @classmethod\n"
        "    def find_spec(cls, name, path=None, target=None):\n"
        "        bare = name.split('.')[0] not in ('yaml', 'pyarrow', 'pytest', 'hypothesis', 'pandas', 'matplotlib')\n"
        "        return PathFinder.find_spec(name, path, target) if bare else None\n"
        "sys.meta_path[:] = [Hiding if finder is PathFinder else finder for finder in sys.meta_path]\n"
    )
    path = os.pathsep.join((str(tmp_path), str(ROOT)))
    environment = {name: value for name, value in os.environ.items() if name != command.TILES}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu_check", "--device", "cpu", "--minutes", "20", "--out", str(out)],
        cwd=ROOT, env=environment | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    report = json.loads(out.read_text())
    assert report["device"] == "cpu" and report["status"] == 0
    assert report["counts"]["failed"] == report["counts"]["left"] == 0
    assert tuple(report["slices"]) == command.NAMES
    assert {name: len(found["cannot"]) for name, found in report["slices"].items()} == {
        "correctness": 0, "ceilings": 1, "rates": 4, "models": 0, "long": 0, "sync": 1, "sanitizer": 1, "tuning": 0
    }  # fmt: skip
    assert all(found["units"] for name, found in report["slices"].items() if not found["cannot"])
    assert {"torch", "git_commit"} <= set(report["environment"]) or not (ROOT / ".git").exists()
    assert set(targets.ATTENTION) <= set(report["slices"]["rates"]["units"])
    assert "ms" not in json.dumps(report["slices"]["rates"])  # a CPU gives no figures
    assert not (tmp_path / "tiles.json").exists() and len(report["tiles"]) == 1


def test_every_target_has_a_unit_and_every_figure_is_judged_by_its_own():
    own = {shape.key for shape in models.TRAIN} | {"inference", "end-to-end-8192"}
    assert set(targets.ATTENTION) | own == set(targets.TARGETS)
    assert all(OPERATOR.case(target.case).device == "cuda" for target in targets.ATTENTION.values())
    assert targets.verdict("fwd-4096-4x128", 561)["reached"] == "target"
    assert targets.verdict("fwd-4096-4x128", 450)["reached"] == "floor"
    assert targets.verdict("fwd-4096-4x128", 449)["reached"] == "below"
    assert targets.verdict("inference", 6.0)["reached"] == "target"
    assert targets.verdict("inference", 9.4)["reached"] == "below"
    row = {"case": "bias-4096-4x128", "direction": "fwd+bwd", "per_pair": {"median": 1.25}}
    assert targets.of_row(row)["value"] == 0.8 and targets.of_row(row | {"direction": "fwd"}) is None


@pytest.fixture
def made_up(tmp_path, monkeypatch):
    """Units of all slices with figures, on tiny shapes, as they run on a GPU; the backend is "cpu"."""
    tiny = rates.tiny()
    kept = {
        ("correctness", "cpu/bfloat16/edges"): {"say": "right"},
        ("ceilings", "device"): {"copy_gbs": 3000.0, "matmul_tflops": 700.0, "clocks": None},
    }
    monkeypatch.setattr(rates, "OPERATOR", tiny)
    monkeypatch.setattr(rates, "REPEATS", 1)
    monkeypatch.setattr(rates.devices, "clocks", lambda: {"sm_mhz": 1755.0})
    monkeypatch.setattr(rates, "rows_of", lambda *some: rows.rows_of(*some[:6], "cuda", *some[7:]))
    for module in (rates, models, long):
        monkeypatch.setattr(module, "best", lambda _: "cpu")
    small = [models.shrink(shape, dry=True) for shape in models.TRAIN]
    monkeypatch.setattr(models, "TRAIN", small)
    monkeypatch.setattr(models, "INFERENCE", models.shrink(models.INFERENCE, dry=True))
    monkeypatch.setattr(models, "CANDIDATES", 4)
    monkeypatch.setattr(long, "FULL", long.TINY)
    return OnAGpu(device="cpu", deadline=time.time() + 600, kept=kept, folder=tmp_path)


def test_as_on_a_gpu_every_row_with_a_target_gets_a_figure_and_a_verdict(made_up):
    units = {unit.key: unit for part in (rates, models, long) for unit in part.units(made_up)}
    assert set(targets.TARGETS) <= set(units)
    for key, target in targets.TARGETS.items():
        found = units[key].run()
        assert found["value"] > 0 and found["floor"] == target.floor and found["reached"] in found["say"]
    row = units["bwd-512-4x128"].run()["row"]
    assert row["tflops"]["median"] > 0 and row["gbs"]["median"] > 0 and row["direction"] == "bwd"
    assert units["end-to-end-8192"].run()["factors"].keys() == {"kernel", "raggedness", "stochastic length"}
    # Another function needs no check of ours; what it cannot do is said.
    assert units["sdpa_flash/fwd/full-4096-4x128"].run()["row"]["function"].startswith("torch's flash softmax")
    assert "no kernel off a GPU" in units["sdpa_varlen/bwd/full-512-4x128"].run()["cannot"]
    laws = {OPERATOR.case(key.split("/")[2]).law for key in units if key.startswith("cpu/fwd/")}
    assert laws == {"full", "uniform", "zipf"}


def test_figures_are_refused_while_a_check_of_their_dtype_is_red_or_none_was_made(made_up):
    units = {unit.key: unit for part in (rates, models, long) for unit in part.units(made_up)}
    made_up.kept["correctness", "cpu/float16/edges"] = {"ok": False}
    assert "value" in units["fwd-4096-4x64"].run()
    made_up.kept["correctness", "cpu/bfloat16/bias-edges"] = {"error": plan.NEVER_ENDED}
    for key in targets.TARGETS:
        assert units[key].run()["left"].startswith("figures are refused: cpu failed 1 checks in bfloat16, first cpu/")
    for unit in [unit for unit in made_up.kept if unit[0] == "correctness"]:
        del made_up.kept[unit]
    assert units["inference"].run()["left"] == "figures are refused: cpu was not checked in bfloat16"
    made_up.kept["correctness", "cpu/bfloat16/edges"] = {"say": "right"}
    del made_up.kept["ceilings", "device"]
    assert units["fwd-4096-4x64"].run()["left"] == "figures are refused: the ceilings were not measured"


def test_stochastic_length_cuts_long_rows_and_keeps_the_rest():
    sizes = np.repeat([100, 1351, 1352, 8192], 1000)
    short = long.cut(sizes, 8192, seed=0)
    assert set(short[:2000]) == {100, 1351} and set(short[2000:]) == {1351, 1352, 8192}
    # 8192^1.6 / 8192^2 = 0.0272 of the longest stay whole.
    assert (short[3000:] == 8192).mean() == pytest.approx(0.0272, abs=0.015)


def test_a_step_that_waits_for_the_device_is_an_error(tmp_path, monkeypatch):
    """The watched part, with torch's switch replaced by one that refuses ``Tensor.item``."""
    modes = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(models, "best", lambda _: "cpu")
    assert "cannot" in sync.without_waiting(context(tmp_path)) and modes == []
    sync.watched(True, lambda: None)
    assert modes == ["error", "default"]
    with pytest.raises(RuntimeError, match="waited"):
        sync.watched(True, lambda: (_ for _ in ()).throw(RuntimeError("waited")))
    assert modes == ["error", "default"] * 2


def test_done_units_are_not_done_again_and_those_that_were_left_are(tmp_path):
    kept, ran = Kept(tmp_path / "units.jsonl", "this code"), []

    def unit(key: str, about_s: float = 0.0) -> Unit:
        return Unit(key, lambda: ran.append(key) or {"say": key}, about_s)

    part = Slice("s", "a slice", lambda _: [unit("a"), unit("b"), unit("c", about_s=1e6), unit("d"), unit("e")], 1.0)
    kept.keep("s", "b", {"ok": False, "say": "wrong"})
    kept.keep("s", "d", {"left": "ended by the clock"})
    kept.keep("s", "e", {"cannot": "no such thing here"})
    Kept(kept.path, "other code").keep("s", "a", {"say": "a"})
    with kept.path.open("a") as file:
        file.write('{"code": "this code", "slice": "s", "key": "a", "resu')  # cut off in the middle of a line
        file.write("\n")
    assert plan.run_slice(part, OnAGpu(device="cpu", deadline=time.time() + 60), kept) == 0
    assert ran == ["a", "d"]  # b failed before, e cannot be done, for c there is no time
    results = kept.results()
    assert plan.failed(results["s", "b"]) and results["s", "c"]["left"].startswith("it may take 1e+06 s")
    assert kept.planned() == {"s": ["a", "b", "c", "d", "e"]}


def test_a_failure_is_kept_with_its_place_and_a_fault_of_the_device_ends_the_process(tmp_path):
    def boom(words: str):
        def run():
            raise RuntimeError(words)

        return run

    kept, fatal = Kept(tmp_path / "units.jsonl"), "CUDA error: an illegal memory access was encountered"
    units = [Unit("x", boom("no such luck")), Unit("y", boom(fatal)), Unit("z", lambda: {})]
    part = Slice("s", "a slice", lambda _: units, 1.0)
    assert plan.run_slice(part, context(tmp_path), kept) == plan.POISONED
    results = kept.results()
    assert results["s", "x"]["error"].startswith("RuntimeError: no such luck\ntest_gpu_check.py:")
    assert str(ROOT) not in results["s", "x"]["error"] and ("s", "z") not in results
    # Another process goes on behind what failed.
    assert plan.run_slice(part, context(tmp_path), kept) == 0
    assert not plan.failed(kept.results()["s", "z"]) and plan.failed(kept.results()["s", "y"])


def test_a_slice_that_is_broken_is_one_failure_and_the_next_call_tries_it_again(tmp_path):
    kept, out = Kept(tmp_path / "units.jsonl"), tmp_path / "report.json"
    assert plan.run_slice(Slice("rates", "", command.of("no_such_module"), 1.0), context(tmp_path), kept) == 0
    report = Report(out, ["rates"], "cpu", kept)
    assert report.write() == 1
    found = json.loads(out.read_text())["slices"]["rates"]
    assert found["failed"] == ["process 0"] and "no_such_module" in found["units"]["process 0"]["error"]
    assert found["left"] == {"all": "its turn did not come"}
    kept.forget(["rates"], faults=True)
    assert report.write() == 3 and kept.results() == {}


def test_a_part_does_every_nth_unit(tmp_path):
    kept, ran = Kept(tmp_path / "units.jsonl"), []
    part = Slice("s", "", lambda _: [Unit(k, lambda k=k: ran.append(k) or {}) for k in "abcde"], 1.0)
    for number in range(2):
        plan.run_slice(part, context(tmp_path, part=(number, 2)), kept)
    assert ran == ["a", "c", "e", "b", "d"]


@pytest.mark.parametrize("fault", ["nan", "large", "table", "unwritten"])
def test_a_wrong_backend_is_seen_and_its_figures_are_refused(monkeypatch, fault):
    shape = correctness.shapes(dry=True)[1]
    right = correctness.run

    def wrong(inputs, backend, deterministic=False):
        out = right(inputs, "reference")
        if backend == "reference":
            return out
        if fault == "nan":
            return out + torch.zeros_like(out).index_fill(0, torch.tensor([3]), float("nan"))
        if fault == "large":
            return out * 1.01
        if fault == "unwritten":
            return torch.empty_like(out).index_copy(0, torch.arange(1, len(out)), out[1:])
        inputs.leaves["time_table"].register_hook(lambda grad: grad * 1.01)
        return out

    def held(name: str) -> dict:
        results = correctness.partial(correctness.by_shape, shape, device="cpu")
        return correctness.held(results, name, "float32")

    assert held("cpu")["ok"]
    monkeypatch.setattr(correctness, "run", wrong)
    found = held("cpu")
    assert found["ok"] is False and not found["worst"] <= 1
    assert fault == "large" or found["tensor"] == ("time_table" if fault == "table" else "out")
    kept = {("correctness", "cpu/float32/edges"): found}
    assert correctness.red(kept, "cpu", "float32") == ["cpu/float32/edges"]
    assert correctness.red(kept, "cpu", "float16") == correctness.red(kept, "triton", "float32") == []


def test_two_runs_that_differ_are_told(monkeypatch):
    shape = correctness.shapes(dry=True)[0]
    assert correctness.deterministic(shape, "cpu", "cpu", "float32")["ok"]
    right, calls = correctness.run, []

    def restless(inputs, backend, deterministic=False):
        calls.append(deterministic)
        return right(inputs, backend) * (1 + 1e-6 * len(calls))

    monkeypatch.setattr(correctness, "run", restless)
    found = correctness.deterministic(shape, "cpu", "cpu", "float32")
    assert calls == [True, True] and found["ok"] is False and "two runs differ in out, q" in found["say"]


HANG = [sys.executable, "-c", "import time; time.sleep(600)"]


def hanging(monkeypatch, kept: Kept, ends_by: float, stop_after: int = 99) -> list[subprocess.Popen]:
    """Children that begin a unit and never end; after some of them, children that have nothing to do."""
    popen, started = subprocess.Popen, []

    def start(words: list[str], **more) -> subprocess.Popen:
        rest = len(started) >= stop_after
        process = popen([sys.executable, "-c", ""] if rest else HANG, **more)
        started.append(process)
        if not rest:
            kept.keep("rates", "a", {"error": plan.NEVER_ENDED, "process": process.pid, "ends_by": ends_by})
        return process

    monkeypatch.setattr(command.subprocess, "Popen", start)
    return started


def test_what_the_clock_ends_is_left_for_the_next_call(tmp_path, monkeypatch):
    kept = Kept(tmp_path / "report.units.jsonl")
    options = command.options_of(["--out", str(tmp_path / "report.json"), "--device", "cpu"])
    kept.plan("rates", ["a", "b"])
    with monkeypatch.context() as patch:
        started = hanging(patch, kept, ends_by=time.time() + 1e6)
        patch.setattr(command, "GRACE_S", 0)
        command.supervise([Slice("rates", "", lambda _: [], 1.0)], time.time() + 0.5, options, kept)
    assert [process.returncode for process in started] == [-signal.SIGKILL]
    assert kept.results()["rates", "a"] == {"left": "ended by the clock"}
    report = Report(options.out, ["rates"], "cpu", kept)
    assert report.write() == 3 and "(--resume goes on)" in report.told()
    left = {"a": "ended by the clock", "b": "its turn did not come"}
    assert json.loads(options.out.read_text())["slices"]["rates"]["left"] == left


def test_a_unit_that_hangs_is_ended_alone_and_stays_a_failure(tmp_path, monkeypatch):
    kept = Kept(tmp_path / "report.units.jsonl")
    options = command.options_of(["--out", str(tmp_path / "report.json"), "--device", "cpu"])
    with monkeypatch.context() as patch:
        started = hanging(patch, kept, ends_by=time.time() - 1, stop_after=1)
        command.supervise([Slice("rates", "", lambda _: [], 1.0)], time.time() + 60, options, kept)
    assert [process.returncode for process in started] == [-signal.SIGKILL, 0]
    assert kept.results()["rates", "a"]["error"] == plan.NEVER_ENDED
    assert plan.patience_s(Unit("x", dict, about_s=20)) == 90


def test_a_slice_can_be_done_again_alone(tmp_path):
    kept = Kept(tmp_path / "units.jsonl")
    for name in ("rates", "models"):
        kept.keep(name, "a", {"say": "done"})
    kept.forget(["rates"])
    assert list(kept.results()) == [("models", "a")]
