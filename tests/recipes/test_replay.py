"""A run that diverged is computed again by ``gr-replay``, from its folder alone."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

from gr import replay
from gr.errors import UserError, run_cli
from tiny_runs import run_here

TABLES = {"tables": {"kind": "local", "optimizer": {"kind": "sgd", "lr": 1e30}}}


@pytest.mark.parametrize("distributed", [{}, TABLES], ids=["adamw", "tables-that-own-their-optimizer"])
def test_gr_replay_finds_the_number_that_ended_the_run(tmp_path, capsys, distributed):
    # A table row of 1e30 squares to infinity in the first norm that meets it.
    rate = () if distributed else ("--train.optimizer.lr", "1e30")
    with pytest.raises(UserError, match="diverged at step .* loss nan") as raised:
        run_here(tmp_path, *rate, distributed=distributed, evaluation={"baselines": []})
    (path,) = re.findall(r"kept in (\S+), which gr-replay computes again", str(raised.value))
    assert run_cli(replay.main, [path]) == 0
    first, again = capsys.readouterr().out.splitlines()[-2:]
    assert re.search(r"step \d+, epoch 1, loader batch \d+, seed 0, rank 0 of 1: loss nan", first)
    assert again.startswith("again: loss nan, ") and not math.isfinite(replay.replay_file(path)[0][0])

    assert run_cli(replay.main, [str(Path(path).parent)]) == 2
    assert re.fullmatch(r"error: \S+ is a folder; name a rank-N.pt in it, .*\n", capsys.readouterr().err)

    config = tmp_path / "runs" / "tiny" / "config.yaml"
    config.write_text(config.read_text().replace("\nseed: 0", "\nseed: 1"))
    assert run_cli(replay.main, [path]) == 2
    assert "keep the file in the folder of its run" in capsys.readouterr().err
