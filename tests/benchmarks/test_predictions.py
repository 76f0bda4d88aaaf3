"""Predictions are counts: each count is done again here by hand or by looking at every pair."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks.kernels import predict
from benchmarks.kernels.hstu_attention import AttentionCase, event_times
from benchmarks.kernels.predict import Prediction, Work
from benchmarks.kernels.targets import ATTENTION
from gr.errors import run_cli
from gr.kernels.hstu_attention import triton_tiles as tiles
from gr.kernels.hstu_attention.time_buckets import time_bucket
from gr.kernels.hstu_attention.triton_tiles import Tile

SMALL = {"name": "x", "family": "x", "device": "none", "rows": 3, "heads": 2, "dim_qk": 16, "dim_v": 32}
LONG = AttentionCase(longest=640, **SMALL)
SHORT = AttentionCase(longest=200, **SMALL)


def test_tiles_that_hold_a_visible_pair():
    seen = torch.ones(5, 5, dtype=torch.bool).tril()
    assert predict.visited(seen, Tile(2, 2, 4, 1)).sum() == 6 and predict.visited(seen, Tile(4, 2, 4, 1)).sum() == 5
    seen[4, :4] = False
    assert predict.visited(seen, Tile(2, 2, 4, 1)).tolist() == [[1, 0, 0], [1, 1, 0], [0, 0, 1]]


def test_edges_inside_tiles_are_those_between_the_buckets_of_every_pair():
    own, following = event_times(np.random.default_rng(1), np.array([41]))
    tile = Tile(8, 4, 4, 1)
    there = predict.visited(torch.ones(41, 41, dtype=torch.bool).tril(), tile)
    buckets = time_bucket(torch.from_numpy(following[:, None] - own[None]).abs(), 0.301, 129).numpy()
    expected = 0
    for m, k in np.argwhere(there):
        part = buckets[8 * m : 8 * m + 8, 4 * k : 4 * k + 4]
        expected += part.max() - part.min()
    found = predict.edges_within(own, following, there, tile)
    # A tile's ends bound its times; where its times cross, the bound is the smallest distance there can be.
    assert expected <= found <= 1.3 * expected


def test_work_of_a_long_and_of_a_short_batch_by_hand():
    forward = Tile(64, 64, 4, 2)
    with tiles.forced("forward", forward):
        found = predict.predict(LONG, "fwd")
    pairs, computed = 3 * 640 * 641 // 2, 3 * 2 * 55 * 64 * 64  # ten blocks a row: 55 tiles on and below the diagonal
    assert (found.pairs, found.flops) == (pairs, 2 * 2 * 48 * pairs)
    assert found.work.matrix == 2 * 48 * computed and found.work.special == computed and found.work.atomics == 0
    assert found.work.memory == 2 * 3 * 640 * 2 * 2 * 48  # q, k, v and the output, two bytes each
    assert found.kernels == {"forward": (forward, pytest.approx(computed / 2 / pairs))}

    long = predict.predict(LONG, "bwd")  # dQ is added: 3 products of d_qk, 2 of d_v
    (tile, share) = long.kernels["backward"]
    computed = share * 2 * pairs
    assert set(long.kernels) == {"backward"} and long.flops == 5 * 2 * 48 * pairs
    assert long.work.matrix == pytest.approx(2 * (3 * 16 + 2 * 32) * computed)
    assert long.work.atomics == pytest.approx(4 * 16 * computed / tile.block_n)
    assert long.work.memory == 3 * 640 * 2 * 2 * (4 * 16 + 3 * 32) + 10 * 3 * 640 * 2 * 16

    short = predict.predict(SHORT, "bwd")  # dQ has a kernel of its own
    both = [short.kernels[name][1] * 2 * short.pairs for name in ("backward", "backward_query")]
    assert short.work.atomics == 0 and short.work.special == pytest.approx(sum(both))
    assert short.work.matrix == pytest.approx(2 * (2 * 16 + 2 * 32) * both[0] + 2 * (2 * 16 + 32) * both[1])


def test_the_bounds_are_the_longest_unit_and_the_sum_of_all():
    found = Prediction(Work(memory=3e9, matrix=1580e9, special=0.0), 1, 1, {})
    assert found.bounds() == pytest.approx((2e-3, 3e-3))


def test_every_row_with_a_target_has_a_prediction_that_says_so(tmp_path):
    assert run_cli(predict.main, ["--out", str(tmp_path / "table.md")]) == 0
    rows = [line for line in (tmp_path / "table.md").read_text().splitlines() if line.startswith("| ")][1:]
    assert len(rows) == len(ATTENTION) and all(row.endswith("| predicted, unmeasured |") for row in rows)
    for row, target in zip(rows, ATTENTION.values(), strict=True):
        assert f"| {target.what}, {target.direction} |" in row and f"| {target.floor:g} | {target.target:g} |" in row
    assert rows[0].split("|")[4].split()[-1] == "TFLOP/s"


def test_a_table_that_could_not_be_written_is_refused_before_it_is_made(tmp_path, capsys):
    assert run_cli(predict.main, ["--out", str(tmp_path / "absent" / "table.md")]) == 2
    assert capsys.readouterr().err.startswith("error: --out: there is no folder for ")
