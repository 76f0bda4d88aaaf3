"""What metrics.jsonl says of the processes: pace, balance, padding, memory; and never more than is known."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from gr.data.loader import predicted_cost
from gr.distributed.process import ProcessContext
from gr.training import watch
from gr.training.watch import Stopwatch, Waited, Watch, Work, peak_memory, slots
from tiny_training import TinyLoader, tiny_config, tiny_trainer


class Took:
    """A stopwatch that was read."""

    def __init__(self, ns: int) -> None:
        self.ns = ns

    def nanoseconds(self) -> int:
        return self.ns


def told(works: list[Work], seconds: float) -> list[int]:
    return Watch(ProcessContext(), False).numbers(works, seconds, Waited(int(4e8)))


def two_ranks() -> Watch:
    """Two steps of two ranks; each has the dearer batch once, so that sums over the steps would look balanced."""
    small, large = (10, 55, 10**12), (30, 465, 3 * 10**12)
    steps = [[(small, 100), (large, 300)], [(large, 300), (small, 100)]]
    seen = Watch(ProcessContext(), False)
    for step in steps:
        works = [Work(*cost, cost[0], 2 * cost[0], Took(ns)) for cost, ns in step]
        seen.add([told([work], seconds) for work, seconds in zip(works, (1.0, 3.0), strict=True)])
    return seen


def test_balance_is_of_each_step_not_of_sums_over_steps():
    line = two_ranks().line()
    costs = [predicted_cost(10, 55), predicted_cost(30, 465)]
    assert line["imbalance"] == {"cost": pytest.approx(2 * costs[1] / sum(costs)), "forward": 1.5}
    assert line["ranks"]["tokens"] == [40, 40] and line["ranks"]["pairs"] == [520, 520]
    assert line["step_s"] == {"min": 1.0, "mean": 2.0, "max": 3.0}
    assert line["ranks"]["step_s"] == [1.0, 3.0] and line["ranks"]["waited_for_data_s"] == [0.4, 0.4]
    assert line["ranks"]["forward_s"] == [2e-7, 2e-7]
    assert line["padding"] == {"tokens": 0.0, "if_dense": 0.5}


def test_flops_are_three_times_the_forwards_and_a_share_only_of_a_known_peak(monkeypatch):
    seen = two_ranks()
    line = seen.line()
    assert line["achieved_tflops"] == pytest.approx(3 * 8 / 6) and "mfu" not in line  # 8e12 forward in 2 x 3 s
    assert seen.line() == {}
    monkeypatch.setattr(watch, "_peak", lambda device, bf16: 100e12)
    assert two_ranks().line()["mfu"] == pytest.approx(3 * 8 / (6 * 100 * 2))


def test_a_processor_has_no_peak_and_a_gpu_has_that_of_its_precision(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    assert watch._peak(torch.device("cpu"), True) is None
    assert watch._peak(torch.device("cuda"), True) == pytest.approx(989.4e12)
    assert watch._peak(torch.device("cuda"), False) == pytest.approx(66.9e12)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert watch._peak(torch.device("cuda"), False) == pytest.approx(494.7e12)


def test_a_stopwatch_adds_up_and_waiting_is_told_once():
    clock = Stopwatch(torch.device("cpu"))
    assert clock.nanoseconds() == 0
    for _ in range(2):
        with clock:
            pass
    assert 0 < clock.nanoseconds() < 10**9
    waited = Waited()
    assert list(waited.over(iter([1, 2]))) == [1, 2] and waited.ns > 0
    Watch(ProcessContext(), False).numbers([], 0.0, waited)
    assert waited.ns == 0


def test_slots_are_counted_not_assumed():
    batch = TinyLoader().batch(0, 0, 0)
    rows, dense = slots(batch)
    assert rows == batch.num_tokens < dense == batch.num_sequences * batch.max_seq_len
    padded = batch.replace(tokens={"item_id": torch.zeros(dense, dtype=torch.int64)})
    assert slots(padded) == (dense, dense)


def test_memory_is_the_process_own_peak():
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("only Linux tells it in a second way")
    (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    # The kernel counts pages of running threads a little late.
    assert peak_memory(torch.device("cpu")) == pytest.approx(int(line.split()[1]) * 1024, rel=0.02)


def test_a_run_writes_these_numbers_for_every_window(tmp_path):
    tiny_trainer(tmp_path, tiny_config(epochs=1, log_every_steps=3)).fit()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [3, 6, 8]
    for line in lines:
        assert line["imbalance"] == {"cost": 1.0, "forward": 1.0} and "mfu" not in line
        (step_s,) = line["ranks"]["step_s"]
        assert line["ranks"]["forward_s"][0] < step_s == line["step_s"]["max"]
        assert line["padding"]["tokens"] == 0.0 < line["padding"]["if_dense"] < 1
        assert 0.05 < line["memory_gib"] < 100 and line["achieved_tflops"] > 0
    assert sum(line["ranks"]["tokens"][0] for line in lines) == lines[-1]["tokens"]
