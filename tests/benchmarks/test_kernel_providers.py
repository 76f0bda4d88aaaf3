"""What stands beside the operator in its tables: other functions, other implementations, another commit."""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_block_mask

from benchmarks.kernels import agreement, figures, flex, hstu_attention, others, run, softmax, timing, worker
from benchmarks.kernels.hstu_attention import AttentionCase
from benchmarks.kernels.registry import Inputs, Other
from gr.errors import UserError, run_cli
from gr.kernels.hstu_attention import Mask, RelativeBias, visible_pairs
from gr.kernels.hstu_attention import hstu_attention as attention
from gr.kernels.hstu_attention.time_buckets import time_bucket

SHAPE = {"rows": 4, "longest": 11, "heads": 2, "dim_qk": 8, "dim_v": 8, "law": "uniform"}
PLAIN = AttentionCase(name="plain", family="plain", device="cpu", **SHAPE)
MASK = {"window": 3, "full_tail": 1, "context": 2, "targets": 2}
ALL = AttentionCase(name="all", family="all", device="cpu", position=True, time=True, **MASK, **SHAPE)


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(agreement, "SCORES", 1)
    operator = replace(hstu_attention.OPERATOR, cases=(PLAIN, ALL))
    monkeypatch.setattr(hstu_attention, "OPERATOR", operator)
    return operator


def plain_softmax(inputs) -> list[torch.Tensor]:
    """The output of each row ``(H, n, d)``, by the definition of softmax attention with the case's mask and bias."""
    leaves, fixed, found = inputs.leaves, inputs.fixed, []
    seen = visible_pairs(fixed["mask"], fixed["offsets"], max_seq_len=fixed["longest"])
    for row, (start, n) in enumerate(zip(fixed["offsets"].tolist(), fixed["lengths"].tolist(), strict=False)):
        q, k, v = (leaves[name][start : start + n].transpose(0, 1) for name in "qkv")
        scores = fixed["alpha"] * q @ k.transpose(1, 2)
        at = torch.arange(n)
        if "position_table" in leaves:
            scores = scores + leaves["position_table"][at[None] - at[:, None] + fixed["longest"] - 1]
        if "time_table" in leaves:
            bias = fixed["bias"]
            apart = bias.query_times[start : start + n, None] - bias.key_times[None, start : start + n]
            scores = scores + leaves["time_table"][time_bucket(apart, bias.bucket_width, len(leaves["time_table"]))]
        scores = scores.masked_fill(~seen[row, :n, :n], float("-inf"))
        found.append(scores.softmax(-1) @ v)
    return found


LONG = replace(PLAIN, name="long", longest=300)
SIZES = np.array([300, 1, 77, 130, 128, 4])
NO_MASK = replace(ALL, context=0, targets=0, window=None, full_tail=None)


def batch(case: AttentionCase, sizes: np.ndarray | None = None) -> Inputs:
    """Times are whole numbers of 5000 seconds and a minute: far from every bucket's edge."""
    inputs = hstu_attention.make(case, "cpu", torch.float32, 0, sizes=sizes)
    bias = inputs.fixed["bias"]
    if case.time:
        times = {"key_times": bias.key_times // 5000 * 5000, "query_times": bias.query_times // 5000 * 5000 + 60}
        inputs.fixed["bias"] = replace(bias, **times)
    return inputs


def windowed(q, k, v, cu_q, cu_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):
    """A plain stand-in of torch's varlen_attn, which has no kernel on a CPU."""
    assert cu_q.dtype == cu_k.dtype == torch.int32 and max_q == max_k and window_size == (-1, 0)
    rows = zip(cu_q.tolist(), cu_q.tolist()[1:], strict=False)
    parts = [[each[a:b].transpose(0, 1) for each in (q, k, v)] for a, b in rows]
    return torch.cat(
        [F.scaled_dot_product_attention(*part, is_causal=True, scale=scale).transpose(0, 1) for part in parts]
    )


def older(q, k, v, cu_q, cu_k, max_q, max_k, is_causal=False):
    """As torch 2.10 had it."""
    assert is_causal
    return windowed(q, k, v, cu_q, cu_k, max_q, max_k, window_size=(-1, 0))


FORMS = {
    "sdpa_flash": (softmax.sdpa_flash, PLAIN),
    "varlen": (lambda inputs: softmax.varlen_call(inputs, windowed), PLAIN),
    "varlen older": (lambda inputs: softmax.varlen_call(inputs, older), replace(PLAIN, dim_qk=9)),
    "flex": (lambda inputs: flex.padded_call(inputs, gradients=False), PLAIN),
    "flex masks bias": (lambda inputs: flex.padded_call(inputs, gradients=False), ALL),
    "packed": (lambda inputs: flex.packed_call(inputs, gradients=False), PLAIN),
    "packed bias": (lambda inputs: flex.packed_call(inputs, gradients=False), NO_MASK),
}


@pytest.mark.parametrize("form", list(FORMS))
def test_the_other_functions_are_softmax_attention_with_the_cases_own_mask_and_bias(form):
    prepare, case = FORMS[form]
    inputs = batch(case)
    call = prepare(inputs)
    out, starts = call.run(), inputs.fixed["offsets"].tolist()
    for row, truth in enumerate(plain_softmax(inputs)):
        n = truth.shape[1]
        if form.startswith("varlen"):
            got = out[starts[row] : starts[row] + n].transpose(0, 1)
        elif form.startswith("packed"):
            got = out[0, :, starts[row] : starts[row] + n]
        else:
            got = out[row, :, :n]
        torch.testing.assert_close(got, truth, rtol=0, atol=2e-6)
    assert len(call.leaves) == len(inputs.leaves) and call.grad.shape == out.shape
    if "flex" not in form and "packed" not in form:  # torch has no backward pass of it on a CPU
        assert all(bool(g.any()) for g in torch.autograd.grad(out, call.leaves, call.grad))


MASKS = [{}, MASK, {"window": 4}, {"context": 3}, {"targets": 3}, {"window": 3, "full_tail": 2, "targets": 3}]


@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_flex_sees_the_pairs_that_the_operator_sees(mask):
    inputs = batch(replace(PLAIN, rows=7, longest=13, **mask))
    truth = visible_pairs(inputs.fixed["mask"], inputs.fixed["offsets"], max_seq_len=13)
    b, i, j = torch.meshgrid(torch.arange(7), torch.arange(13), torch.arange(13), indexing="ij")
    assert torch.equal(flex.visible(inputs)(b, torch.tensor(0), i, j), truth)


def test_packed_blocks_are_those_that_torch_finds_by_looking_at_every_pair():
    offsets = torch.from_numpy(np.concatenate(([0], np.cumsum(SIZES))))
    ours = flex.packed_blocks(offsets)
    tokens = int(offsets[-1])
    theirs = create_block_mask(ours.mask_mod, None, None, tokens, tokens, device="cpu")
    assert ours.seq_lengths == theirs.seq_lengths == (tokens, tokens)
    for listed in ("kv", "full_kv", "q", "full_q"):
        counts, found = (getattr(each, f"{listed}_num_blocks") for each in (ours, theirs))
        assert torch.equal(counts, found) and found.any()
        mine, others = (getattr(each, f"{listed}_indices")[0, 0].tolist() for each in (ours, theirs))
        for n, own, other in zip(found[0, 0].tolist(), mine, others, strict=True):
            assert sorted(own[:n]) == sorted(other[:n])


def test_a_function_that_cannot_do_a_case_says_so():
    inputs, plain = batch(ALL), batch(PLAIN)
    for name, given, words in (
        ("sdpa_flash", inputs, "does causal attention only"),
        ("sdpa_flash", batch(NO_MASK), "does attention without bias only"),
        ("sdpa_cudnn", plain, "has no kernel off a GPU"),
        ("sdpa_varlen", plain, "has no kernel off a GPU"),
        ("flex", inputs, "has no backward pass on a CPU"),
        ("flex_packed", plain, "has no backward pass on a CPU"),
    ):
        with pytest.raises(ValueError, match=f"^backend {name} {words}"):
            hstu_attention.OPERATOR.call(given, name)
    with pytest.raises(ValueError, match="^backend flex_packed does causal attention only"):
        flex.packed_call(inputs, gradients=False)


def test_other_functions_are_marked_wherever_they_are_shown_and_left_out_where_they_cannot_run(tiny, tmp_path, capsys):
    words = ["hstu_attention", "--repeats", "2", "--providers", "cpu", "sdpa_flash", "--directions", "fwd"]
    status = run_cli(run.main, [*words, "--out", str(tmp_path / "out")])
    out, err = capsys.readouterr()
    assert status == 0, err
    assert "all: left out sdpa_flash: backend sdpa_flash does causal attention only" in out
    rows = [json.loads(line) for line in (tmp_path / "out" / "rows.jsonl").read_text().splitlines()]
    (other,) = (row for row in rows if row["provider"] == "sdpa_flash")
    assert other["function"].startswith("torch's flash softmax attention, not HSTU's") and "agreement" not in other
    assert all("function" not in row for row in rows if row["provider"] == "cpu")
    table = (tmp_path / "out" / "table.md").read_text()
    assert "| plain | fwd | sdpa_flash * |" in table and f"\\* sdpa_flash: {other['function']}" in table
    assert "TFLOP/s |" not in table and (tmp_path / "out" / "fwd.png").stat().st_size > 1000


def third(q, k, v, offsets, *, max_seq_len, divisor, alpha, position_table, time_table, query_times, key_times, **mask):
    """An implementation from elsewhere, as README asks for it."""
    mask = Mask(**mask)
    bias = RelativeBias(
        position_table=position_table, time_table=time_table, query_times=query_times, key_times=key_times
    )
    return attention(
        q, k, v, offsets, max_seq_len=max_seq_len, divisor=divisor, alpha=alpha, mask=mask, bias=bias, backend="cpu"
    )


def wrong(q, k, v, offsets, **rest):
    """The same, a little too large."""
    return third(q, k, v, offsets, **rest) * 1.01


THEIRS = Other("theirs", "a softmax from elsewhere", softmax.sdpa_flash)


def test_a_function_from_elsewhere_is_held_to_the_definition(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    words = ["hstu_attention", "--repeats", "1", "--directions", "fwd+bwd", "--json", str(tmp_path / "rows.jsonl")]
    right = "test_kernel_providers:third"
    assert run_cli(run.main, [*words, "--providers", right]) == 0, capsys.readouterr().err
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert {row["case"] for row in rows if row["provider"] == right} == {"plain", "all"}
    (tmp_path / "rows.jsonl").unlink()
    assert run_cli(run.main, [*words, "--cases", "plain", "--providers", "test_kernel_providers:THEIRS"]) == 0
    (row,) = map(json.loads, (tmp_path / "rows.jsonl").read_text().splitlines())
    assert row["function"] == "a softmax from elsewhere" and "agreement" not in row
    assert run_cli(run.main, [*words, "--providers", "test_kernel_providers:wrong"]) == 2
    assert "provider 'test_kernel_providers:wrong' of hstu_attention disagrees" in capsys.readouterr().err
    assert run_cli(run.main, [*words, "--providers", "test_kernel_providers:none"]) == 2
    assert "names nothing that can be imported" in capsys.readouterr().err


def test_gb_per_second_stand_beside_tflops_where_sequences_are_short():
    def row(longest: int) -> dict:
        values = {"ms": 1.0, "tflops": 2.0, "gbs": 3.0}
        return {
            "operator": "x", "case": f"n{longest}", "direction": "fwd", "provider": "p", "share_of_matmul": 0.5,
            "parameters": {"longest": longest}, "share_of_copy": 0.25,
            **{name: dict.fromkeys(("median", "low", "high"), value) for name, value in values.items()},
        }  # fmt: skip

    lines = figures.table([row(512), row(4096)], "a GPU").splitlines()
    assert lines[-2].startswith("| n512 | fwd | p | 1.000 | 2.0 | 50% | 3 | 25% |")
    assert lines[-1].startswith("| n4096 | fwd | p | 1.000 | 2.0 | 50% |  |  |")


def repository() -> bool:
    done = subprocess.run(["git", "-C", str(worker.ROOT), "rev-parse", "HEAD"], capture_output=True, check=False)
    return done.returncode == 0


@pytest.mark.skipif(not repository(), reason="needs a git checkout")
def test_another_commit_is_timed_alternately_by_the_same_code(tmp_path, capsys):
    words = ["hstu_attention", "--cases", "trial", "--providers", "cpu", "--directions", "fwd", "--repeats", "2"]
    status = run_cli(run.main, [*words, "--base", "HEAD", "--threads", "1", "--json", str(tmp_path / "rows.jsonl")])
    out, err = capsys.readouterr()
    assert status == 0, err
    rows = {row["provider"]: row for row in map(json.loads, (tmp_path / "rows.jsonl").read_text().splitlines())}
    assert set(rows) == {"reference", "cpu"} and len(rows["cpu"]["base"]["ratios"]) == 2
    assert len(rows["cpu"]["ratios"]) == 2 and rows["cpu"]["environment"]["git_commit"].startswith(
        out.split("base: commit ")[1].split()[0]
    )
    trees = subprocess.run(["git", "-C", str(worker.ROOT), "worktree", "list"], capture_output=True, text=True)
    assert "/base" not in trees.stdout and "/tree" not in trees.stdout
    assert run_cli(run.main, [*words, "--base", "no-such-branch"]) == 2
    assert "--base: this repository has no commit 'no-such-branch'" in capsys.readouterr().err


@pytest.mark.slow
def test_the_base_is_imported_from_its_own_tree_and_refusals_come_back(tmp_path):
    """The worker's ``gr`` is the one of the folder named, whatever is installed or current."""
    other = tmp_path / "other"
    for name in worker.LINKED:
        (other / name).mkdir(parents=True)
    (other / "gr" / "__init__.py").write_text("raise SystemExit(7)")
    remote = worker.Remote(worker.import_root(tmp_path / "root", other), {"operator": "hstu_attention"})
    with pytest.raises(UserError, match="ended with status 7"):
        remote.ask(what="available", case="trial", providers=None)
    remote.close()
    arguments = {"operator": "hstu_attention", "device": "cpu", "dtype": "float32", "layers": 1, "threads": 1}
    here = worker.Remote(worker.import_root(tmp_path / "here", worker.ROOT), arguments)
    with pytest.raises(UserError, match="has no provider 'fast'"):
        here.ask(what="available", case="trial", providers=["fast"])
    assert here.timed("trial", "cpu", "fwd", 1) > 0
    here.close()


def test_without_names_a_cpu_times_the_operators_own_backends_only(tiny):
    found = timing.available(tiny, PLAIN, None, "cpu", torch.float32)
    assert found[0] == "reference" and not set(found) & {other.name for other in others.OTHERS}
