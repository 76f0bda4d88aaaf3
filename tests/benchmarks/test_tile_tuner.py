"""The tuner of tiles: what it tries, what it keeps, and where; clocks are made up, compiling is real."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest
import torch

from benchmarks.kernels import tune
from gr.errors import run_cli
from gr.kernels.hstu_attention import triton_tiles as tiles
from gr.kernels.hstu_attention.triton_tiles import Key, Tile

KEY = Key(90, "forward", True, 128, "", 1 << 62)
SLOW, FAST, SPILLS = Tile(64, 64, 4, 2), Tile(128, 64, 8, 2), Tile(128, 128, 4, 3)


@pytest.fixture
def user_file(tmp_path, monkeypatch):
    """An own table, forgotten afterwards."""
    path = tmp_path / "folder" / "tiles.json"
    monkeypatch.setenv(tiles.FILE_VARIABLE, str(path))
    tiles._user_table.cache_clear()
    yield path
    tiles._user_table.cache_clear()


def made_up(seconds: dict[Tile, float]):
    return lambda tile: seconds[tile]


def test_keys_are_those_that_the_launcher_launches_and_each_has_a_length_that_reaches_it():
    found = tune.keys(90, ("forward", "backward"), (128, 64), (4096, 512, 64))
    kernels = {key.kernel for key in found}
    assert kernels == set(tiles.KERNELS)
    for key, longest in found.items():
        direction = "forward" if key.kernel.startswith("forward") else "backward"
        call = {"half": True, "dim": key.dim, "bias": key.bias, "max_seq_len": longest}
        assert key in tiles.keys_of(direction, architecture=90, **call)
    order = list(found)
    assert order[0] == KEY and [key.bias for key in order] == sorted(key.bias for key in order)


@pytest.mark.parametrize("key", list(tune.keys(90, ("forward", "backward"), (128, 256, 16), (4096, 64))), ids=str)
def test_tiles_that_are_tried_are_candidates_that_a_call_reaches(key):
    longest = 64 if key.kernel.endswith("_packed") else 4096
    every, some = (tune.worth_trying(key, longest, thorough) for thorough in (True, False))
    assert some and set(some) <= set(every) <= set(tiles.candidates(key)) and len(some) <= 36
    if key.kernel.endswith("_packed"):
        assert min(tile.block_m for tile in every) == 64


@pytest.mark.parametrize(("fast", "wanted"), [(0.5, FAST), (0.97, FAST), (0.985, SLOW), (1.5, SLOW)])
def test_the_tile_in_use_is_left_for_a_gain_alone(fast, wanted):
    found, medians = tune.best([FAST], SLOW, made_up({SLOW: 1.0, FAST: fast}))
    assert found == wanted and medians == {SLOW: 1.0, FAST: fast}


def test_a_tile_that_cannot_be_launched_is_passed_over_and_any_other_fault_is_not():
    def clock(words: str, at: Tile):
        def seconds(tile: Tile) -> float:
            if tile == at:
                raise RuntimeError(words)
            return 1.0

        return seconds

    found, medians = tune.best([FAST], SLOW, clock("out of resource: shared memory", FAST))
    assert found == SLOW and medians == {SLOW: 1.0}
    for words, at in (("illegal memory access", FAST), ("out of resource: shared memory", SLOW)):
        with pytest.raises(RuntimeError, match=words):
            tune.best([FAST], SLOW, clock(words, at))


def test_the_median_of_alternate_runs_decides_and_the_first_round_does_not_count():
    order, times = [], {SLOW: iter([9.0, 1.0, 1.0, 1.0]), FAST: iter([0.1, 2.0, 0.1, 2.0])}
    found, medians = tune.best([FAST], SLOW, lambda tile: order.append(tile) or next(times[tile]))
    assert found == SLOW and medians == {SLOW: 1.0, FAST: 2.0} and order == [SLOW, FAST] * 4


def test_what_is_found_goes_into_the_users_table_which_the_operator_reads(user_file):
    other = Key(80, "backward", False, 64, "wide", 512)
    tiles.write({other: FAST}, user_file)
    found = tune.tune(KEY, SLOW, [FAST, SPILLS], {SPILLS: ["spills"]}, made_up({SLOW: 2.0, FAST: 1.0}))
    assert found["tile"] == asdict(FAST) and found["gain"] == 2.0
    assert found["dropped"] == [{**asdict(SPILLS), "wrong": ["spills"]}]
    assert tiles.read(user_file) == {other: FAST, KEY: FAST} and tiles.choose(KEY) == FAST
    tune.tune(KEY, FAST, [SLOW], {}, made_up({SLOW: 2.0, FAST: 1.0}))
    assert tiles.read(user_file) == {other: FAST, KEY: FAST}
    # Another architecture and another length keep their own.
    elsewhere = Key(80, "forward", True, 128, "", 0)
    assert tiles.choose(replace(elsewhere, length=1 << 62)) == tiles.shipped()[elsewhere]
    shorter = replace(KEY, length=512)
    assert tiles.choose(shorter) == tiles.shipped()[replace(KEY, length=0)] != FAST


@pytest.fixture
def gpu(monkeypatch):
    """A machine that has a GPU whose fastest tile is always ``FAST``, and a compiler that refuses ``SPILLS``."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(tiles, "architecture", lambda device: 90)
    monkeypatch.setattr(tune, "clock", lambda *_: lambda tile: 1.0 if tile == FAST else 2.0)
    refuse = lambda key, some, *_: {tile: ["spills"] if tile == SPILLS else [] for tile in some}  # noqa: E731
    monkeypatch.setattr(tune, "compiled", refuse)


WORDS = ["--directions", "forward", "--dims", "128", "--lengths", "4096"]


def test_the_command_tunes_key_after_key_and_emits_what_it_found(gpu, user_file, capsys):
    assert run_cli(tune.main, WORDS) == 0
    told = capsys.readouterr().out
    assert f"into {user_file}" in told and "('forward', True, '') dim 128, length every: (128, 64, 8, 2)" in told
    assert {key.bias for key in tiles.read(user_file)} == {"", "narrow"}
    assert run_cli(tune.main, ["--emit"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "90: ('forward', True, '') dim 128, length every: (128, 64, 8, 2)" and len(lines) == 2


def test_it_stops_at_its_time_and_keeps_nothing_if_it_only_compiles(gpu, user_file, capsys, monkeypatch):
    assert run_cli(tune.main, [*WORDS, "--minutes", "1e-9"]) == 0
    assert "time is up: 2 keys are left" in capsys.readouterr().out and not user_file.exists()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run_cli(tune.main, [*WORDS, "--compile-only", "--thorough", "--architecture", "80"]) == 0
    told = capsys.readouterr().out
    assert "80: ('forward', True, '') dim 128, length every: (128, 128, 4, 3): spills" in told
    assert ": (128, 64, 8, 2): right" in told and not user_file.exists()
    assert run_cli(tune.main, WORDS) == 2
    assert "torch sees none; without one: --compile-only" in capsys.readouterr().err


def test_a_process_that_compiles_answers_for_each_tile_or_is_named(monkeypatch):
    class Answers:
        def __init__(self, words, **_):
            self._told = json.loads(words[-1])["tiles"]

        def communicate(self, timeout=None):
            assert timeout is None or timeout > 0
            first = self._told[0]
            return json.dumps({"tile": first, "wrong": [] if first["num_warps"] == 8 else ["spills"]}) + "\n", None

    monkeypatch.setattr(tune.subprocess, "Popen", Answers)
    found = tune.compiled(KEY, [SLOW, FAST, SPILLS], processes=2)
    assert found == {SLOW: ["spills"], FAST: [], SPILLS: ["its compilation did not end"]}
