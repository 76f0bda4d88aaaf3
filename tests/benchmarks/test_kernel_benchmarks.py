"""The runner of kernel benchmarks: what it counts, what its rows hold, and that it refuses wrong operators."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks.kernels import agreement, device, hstu_attention, registry, rows, run, sampled_logits, timing
from benchmarks.kernels.hstu_attention import AttentionCase
from benchmarks.kernels.lengths import ML1M, lengths
from benchmarks.kernels.sampled_logits import LogitsCase
from gr.errors import run_cli
from gr.kernels.hstu_attention import op as attention_op
from gr.kernels.hstu_attention import visible_pairs

SHAPE = {"rows": 5, "longest": 12, "heads": 2, "dim_qk": 3, "dim_v": 4, "law": "uniform"}
MASK = {"window": 2, "full_tail": 1, "context": 2, "targets": 2}
TINY = {
    "hstu_attention": (
        AttentionCase(name="plain-12", family="plain", device="cpu", **SHAPE),
        AttentionCase(
            name="all-12", family="all", device="cpu", against="plain-12", position=True, time=True, **MASK, **SHAPE
        ),
        AttentionCase(name="plain-gpu", family="plain", device="cuda", **SHAPE),
    ),
    "sampled_logits": (
        LogitsCase(name="few", family="few", device="cpu", positions=9, candidates=4, vectors=6, dim=3),
        LogitsCase(
            name="more", family="more", device="cpu", positions=9, candidates=5, vectors=6, dim=3, against="few"
        ),
    ),
}
MODULES = {"hstu_attention": hstu_attention, "sampled_logits": sampled_logits}
ENVIRONMENT = {"cpu", "threads", "torch", "git_commit"}


@pytest.fixture
def tiny(monkeypatch):
    """Both operators with tiny cases, and a part of two rows for the check."""
    monkeypatch.setattr(agreement, "SCORES", 1)
    for name, module in MODULES.items():
        monkeypatch.setattr(module, "OPERATOR", replace(module.OPERATOR, cases=TINY[name]))


def call(capsys, *argv: str) -> tuple[int, str, str]:
    status = run_cli(run.main, list(argv))
    return status, *capsys.readouterr()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", list(MODULES))
def test_rows_say_what_was_measured_and_on_a_cpu_only_ratios(tiny, tmp_path, capsys, name, dtype):
    path = tmp_path / "rows.jsonl"
    argv = (name, "--repeats", "3", "--layers", "2", "--dtype", dtype, "--json", str(path))
    status, out, err = call(capsys, *argv)
    assert status == 0, err
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    first, second = (case for case in TINY[name] if case.device == "cpu")
    providers = set(MODULES[name].OPERATOR.providers())
    fast = {provider for provider in providers if any(row["provider"] == provider for row in rows)} - {"reference"}
    assert "cpu" in fast
    expected = {(first.name, d, p) for d in timing.DIRECTIONS for p in fast}
    expected |= {(second.name, d, p) for d in timing.DIRECTIONS for p in fast | {"reference"}}
    assert {(row["case"], row["direction"], row["provider"]) for row in rows} == expected and len(rows) == len(expected)
    for row in rows:
        assert row["operator"] == name and row["dtype"] == dtype and row["device"] == "cpu"
        assert row["repeats"] == 3 and row["layers"] == 2 and row["allocator"] == "default"
        assert row["parameters"]["name"] == row["case"]
        assert min(row[key] for key in ("tokens", "pairs", "flops", "bytes")) > 0
        assert 0 <= row["agreement"]["worst"] <= 1
        assert set(row["environment"]) >= ENVIRONMENT
        assert not {"ms", "tflops", "gbs"} & set(row)
        if row["provider"] != "reference":
            assert row["baseline"] == "reference" and len(row["ratios"]) == 3
            assert row["ratio"]["low"] <= row["ratio"]["median"] <= row["ratio"]["high"]
        if row["case"] == second.name:
            assert row["per_pair"]["against"] == first.name
    assert len(out.splitlines()) == 2 + len(rows) and " ms" not in out


def scaled(run_right):
    return lambda inputs, provider: run_right(inputs, "reference") * (1.001 if provider == "wrong" else 1)


def wrong_gradient(run_right):
    def run_wrong(inputs, provider):
        out = run_right(inputs, "reference")
        return out + 0.01 * (out - out.detach()) if provider == "wrong" else out

    return run_wrong


def not_a_number(run_right):
    return lambda inputs, provider: run_right(inputs, "reference") + (float("nan") if provider == "wrong" else 0)


def wrong_in_large_batches(run_right):
    def run_wrong(inputs, provider):
        out = run_right(inputs, "reference")
        return out * 2 if provider == "wrong" and len(inputs.grad) > 20 else out

    return run_wrong


def wrong_table_gradient(run_right):
    def run_wrong(inputs, provider):
        if provider == "wrong" and "time_table" in inputs.leaves:
            table = inputs.leaves["time_table"]
            wrong = table + 0.01 * (table - table.detach())
            inputs = registry.Inputs({**inputs.leaves, "time_table": wrong}, inputs.fixed, inputs.grad)
        return run_right(inputs, "reference")

    return run_wrong


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        (scaled, "output"),
        (wrong_gradient, "gradient of q"),
        (not_a_number, "output"),
        (wrong_in_large_batches, "output"),
        (wrong_table_gradient, "gradient of time_table"),
    ],
)
def test_no_figures_of_an_operator_that_disagrees_with_its_definition(
    tiny, tmp_path, capsys, monkeypatch, wrong, named
):
    right = hstu_attention.OPERATOR
    wrong_operator = replace(right, run=wrong(right.run), providers=lambda: ("reference", "wrong"))
    monkeypatch.setattr(hstu_attention, "OPERATOR", wrong_operator)
    path = tmp_path / "rows.jsonl"
    status, out, err = call(capsys, "hstu_attention", "--repeats", "1", "--json", str(path))
    assert (status, out) == (2, "") and not path.exists()
    assert err.startswith("error: provider 'wrong' of hstu_attention disagrees with its definition on case ")
    assert f"{named} is off by" in err and len(err.splitlines()) == 1
    assert call(capsys, "hstu_attention", "--repeats", "1", "--providers", "reference")[0] == 0


def test_the_case_that_another_is_compared_with_is_checked_too(tiny, capsys, monkeypatch):
    right = hstu_attention.OPERATOR

    def wrong_without_bias(inputs, provider):
        out = right.run(inputs, "reference")
        return out * 2 if provider == "wrong" and "time_table" not in inputs.leaves else out

    operator = replace(right, run=wrong_without_bias, providers=lambda: ("reference", "wrong"))
    monkeypatch.setattr(hstu_attention, "OPERATOR", operator)
    status, out, err = call(capsys, "hstu_attention", "--repeats", "1", "--cases", "all-12")
    assert (status, out) == (2, "") and "on case plain-12" in err


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["attention"], "there is no operator 'attention' to measure; there are hstu_attention, sampled_logits"),
        (["hstu_attention", "--cases", "huge"], "no case or family 'huge' for cpu; cases are plain-12"),
        (["sampled_logits", "--providers", "fast"], "sampled_logits has no provider 'fast'; it has reference"),
        (["sampled_logits", "--repeats", "0"], "--repeats must be at least 1, got 0"),
        (["sampled_logits", "--layers", "0"], "--layers must be at least 1, got 0"),
        (["sampled_logits", "--json", "no/such/folder/out.jsonl"], "--json: there is no folder for"),
    ],
)
def test_a_mistake_is_one_sentence_and_status_2(tiny, capsys, argv, words):
    status, out, err = call(capsys, *argv)
    assert (status, out) == (2, "") and words in err and err.count("\n") == 1


def test_without_a_gpu_cuda_is_refused(tiny, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    status, _, err = call(capsys, "hstu_attention", "--device", "cuda")
    assert status == 2 and "--device cuda needs an NVIDIA GPU" in err


def test_a_backend_that_the_device_lacks_is_left_out_unless_asked_for(tiny, capsys, monkeypatch):
    right = hstu_attention.OPERATOR

    def lacking(inputs, provider):
        if provider == "cpu":
            raise ValueError("backend must be reference here, got 'cpu'")
        return right.run(inputs, provider)

    operator = replace(right, run=lacking, providers=lambda: ("reference", "cpu"))
    monkeypatch.setattr(hstu_attention, "OPERATOR", operator)
    assert timing.available(operator, operator.cases[0], None, "cpu", torch.float32) == ["reference"]
    status, _, err = call(capsys, "hstu_attention", "--providers", "cpu")
    assert status == 2 and "'cpu' does not run on cpu: backend must be reference" in err


def test_providers_are_the_operators_backends_and_the_baseline_is_among_them(monkeypatch):
    operator = hstu_attention.OPERATOR
    assert operator.providers() == tuple(attention_op.BACKENDS) and operator.providers()[0] == "reference"
    assert sampled_logits.OPERATOR.providers()[0] == "reference"
    monkeypatch.setattr(attention_op, "BACKENDS", ("reference", "cpu", "new"))
    assert operator.providers() == ("reference", "cpu", "new")
    case = TINY["hstu_attention"][0]
    assert timing.available(operator, case, ["cpu"], "cpu", torch.float32) == ["reference", "cpu"]


def test_a_name_runs_anywhere_and_a_family_where_it_is_meant_to(tiny):
    operator = hstu_attention.OPERATOR
    names = lambda words, where: [case.name for case in operator.select(words, where)]  # noqa: E731
    assert names(["plain"], "cpu") == ["plain-12"] and names(["plain"], "cuda") == ["plain-gpu"]
    assert names(["plain-gpu", "plain-gpu", "plain"], "cpu") == ["plain-gpu", "plain-12"]
    assert names(None, "cuda") == ["plain-gpu"]


def test_attention_counts_of_a_batch_done_by_hand():
    sizes = {"rows": 2, "heads": 2, "dim_qk": 3, "dim_v": 5, "longest": 3, "law": "full", "position": True}
    case = AttentionCase(name="x", family="x", device="cpu", time=True, **sizes)
    cost = hstu_attention.cost(hstu_attention.make(case, "cpu", torch.bfloat16, 0))
    # Two sequences of 3: 6 causal pairs each. q and k are 6 x 2 x 3 numbers, v and out 6 x 2 x 5; 5 + 129 table
    # entries; two times of 4 bytes a token.
    assert (cost.tokens, cost.pairs) == (6, 12)
    assert cost.flops == {"fwd": 2 * 2 * (3 + 5) * 12, "bwd": 5 * 2 * (3 + 5) * 12}
    forward = 2 * (36 + 36 + 60 + 60 + 134) + 48
    backward = 2 * (36 + 36 + 60 + 60 + 36 + 36 + 60 + 134 + 134) + 48
    assert cost.bytes == {"fwd": forward, "bwd": backward}


def test_logits_counts_of_a_batch_done_by_hand():
    cost = sampled_logits.cost(sampled_logits.make(TINY["sampled_logits"][0], "cpu", torch.float32, 0))
    assert (cost.tokens, cost.pairs) == (9, 36)
    assert cost.flops == {"fwd": 2 * 36 * 3, "bwd": 4 * 36 * 3}
    assert cost.bytes == {"fwd": 4 * (27 + 18 + 36) + 8 * 36, "bwd": 4 * (27 + 18 + 36 + 27 + 18) + 8 * 36}


@pytest.mark.parametrize("name", ["ml1m", "ml1m-no-bias", "zipf", "composed"])
def test_pairs_are_those_that_the_mask_shows_and_the_seed_changes_order_not_work(name):
    case = hstu_attention.OPERATOR.case(name)
    one, two = (hstu_attention.make(case, "cpu", torch.float32, seed) for seed in (1, 2))
    shown = visible_pairs(one.fixed["mask"], one.fixed["offsets"], max_seq_len=case.longest)
    cost = hstu_attention.cost(one)
    assert cost.pairs == int(shown.sum()) and cost == hstu_attention.cost(two)
    assert not torch.equal(one.fixed["offsets"], two.fixed["offsets"])
    assert not torch.equal(one.leaves["q"], two.leaves["q"])


def test_a_part_of_a_batch_is_its_rows():
    case = TINY["hstu_attention"][1]
    whole = hstu_attention.make(case, "cpu", torch.float64, 3)
    part, kept = hstu_attention.shorten(whole, 1)
    sizes = whole.fixed["lengths"]
    assert sorted(part.fixed["lengths"]) == [sizes.min(), sizes.max()]
    few, everything = (agreement.results(hstu_attention.OPERATOR, x, "reference") for x in (part, whole))
    for name in ("output", "gradient of q", "gradient of k", "gradient of v"):
        torch.testing.assert_close(few[name], everything[name][kept])


def test_length_mixes_are_those_of_their_laws():
    assert lengths("full", 3, 7).tolist() == [7, 7, 7]
    assert lengths("uniform", 4, 8).tolist() == [1, 3, 5, 7]
    mix = lengths("ml1m", 128, 200)
    assert mix.mean() == pytest.approx(656_566 / 6_040, rel=2e-3) and mix.max() == 200 and list(mix[::2]) == list(ML1M)
    # np.random draws from the same unbounded law.
    drawn = np.minimum(np.random.default_rng(0).zipf(1.2, 200_000), 512)
    assert lengths("zipf", 10_000, 512).mean() == pytest.approx(drawn.mean(), rel=0.02)
    for law in ("uniform", "zipf", "ml1m"):
        assert (np.diff(found := lengths(law, 50, 40)) >= 0).all() and found.min() >= 1 and found[-1] <= 40


def test_times_rise_within_a_sequence_and_the_query_time_is_that_of_the_next_event():
    sizes = np.array([4, 1, 30])
    own, following = hstu_attention.event_times(np.random.default_rng(0), sizes)
    assert own.dtype == following.dtype == np.int64 and (following >= own).all()
    start = 0
    for size in sizes:
        assert (following[start : start + size - 1] == own[start + 1 : start + size]).all()
        start += size
    gaps = np.diff(hstu_attention.event_times(np.random.default_rng(0), np.array([5_000]))[0])
    assert np.median(gaps) < 60 and gaps.max() > 86_400 and (gaps == 0).any()


@pytest.mark.parametrize("name", list(MODULES))
def test_shipped_cases_name_each_other_rightly(name):
    operator = registry.load(name)
    names = [case.name for case in operator.cases]
    assert operator.name == name and len(set(names)) == len(names)
    for case in operator.cases:
        assert case.device in ("cpu", "cuda", "none")
        assert case.against is None or operator.case(case.against).device == case.device


def test_rows_of_a_gpu_hold_rates_and_their_shares_of_what_the_gpu_does_at_best():
    case = replace(TINY["hstu_attention"][2], against="half")
    costs = {
        case.name: registry.Cost(10, 200, {"fwd": 4 * 10**12, "bwd": 10**13}, {"fwd": 10**9, "bwd": 2 * 10**9}),
        "half": registry.Cost(10, 100, {}, {}),
    }
    times = {
        (case.name, "new", "fwd+bwd"): [0.1, 0.07, 0.2],
        ("half", "new", "fwd+bwd"): [0.05, 0.05, 0.05],
    }
    best = {"matmul_tflops": 700.0, "copy_gbs": 3000.0}
    (row,) = rows.rows_of(
        hstu_attention.OPERATOR, case, ["new"], ["fwd+bwd"], times, costs, "cuda", torch.bfloat16, best
    )
    assert row["ms"] == pytest.approx({"median": 100, "low": 70, "high": 200})
    assert row["tflops"] == pytest.approx({"median": 140, "low": 70, "high": 200})
    assert row["gbs"]["median"] == pytest.approx(30) and row["share_of_copy"] == pytest.approx(0.01)
    assert row["share_of_matmul"] == pytest.approx(0.2) and "ratio" not in row
    assert row["per_pair"] == pytest.approx({"against": "half", "median": 1.0, "low": 0.7, "high": 2.0})
    assert "140.0 TFLOP/s (20%)" in rows.say(row) and "per pair 1.00 (0.70 to 2.00) of half" in rows.say(row)


def test_clocks_are_read_from_what_nvidia_smi_says():
    assert device.parse_clocks("1755, 2619, 612.33, 54\n") == {
        "sm_mhz": 1755, "memory_mhz": 2619, "watts": 612.33, "celsius": 54
    }  # fmt: skip
    assert device.parse_clocks("1755, [N/A], [N/A], 54\n") == {"sm_mhz": 1755, "celsius": 54}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_on_a_gpu_rows_are_absolute_beside_the_ceilings(tiny, tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    status, out, err = call(capsys, "hstu_attention", "--device", "cuda", "--repeats", "2", "--json", str(path))
    assert status == 0, err
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert rows and all(row["ms"]["median"] > 0 and row["ceilings"]["matmul_tflops"] > 1 for row in rows)
    assert "at best: copy" in out
