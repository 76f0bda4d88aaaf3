"""An order within ties that all users share is noticed; one that they do not share is not."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

from gr.data.out_of_core import prepare_log
from gr.data.store import read_store
from gr.data.table import TableConfig, read_log
from gr.data.tie_order import TieOrder


def log(order: str, users: int = 60, tied: int = 4) -> list[tuple[int, int, int]]:
    """(user, time, item): each user has two moments of ``tied`` items each."""
    rng = np.random.default_rng(3)
    events = []
    for user, moment in itertools.product(range(users), range(2)):
        items = rng.choice(12, tied, replace=False)
        if order != "random":
            items = sorted(items, key=lambda i: i if order == "by id" else i * 7 % 12)
        events += [(user, moment, int(item)) for item in items]
    return events


def counted(events: list[tuple[int, int, int]], parts: int = 1) -> TieOrder:
    found = TieOrder(12)
    for part in np.array_split(np.array(events), parts):
        found.add(*part.T)
    return found


@pytest.mark.parametrize("order", ["by id", "odd"])
def test_any_order_that_users_share_is_noticed(order):
    found = counted(log(order))
    assert found.share() == 0.75 and found.agreement()[0] == 1.0
    assert "75% of events" in found.caveat() and "100% of cases" in found.caveat()


def test_random_order_agrees_half_the_time_and_is_no_caveat():
    found = counted(log("random", users=500))
    assert found.agreement()[0] == pytest.approx(0.5, abs=0.03) and found.caveat() is None


def test_agreement_is_that_of_all_pairs_of_sightings_counted_one_by_one():
    events = log("random", users=9)
    found = counted(events)
    seen: dict[tuple[int, int], list[bool]] = {}
    for (user, moment, item), (also, then, other) in itertools.pairwise(events):
        if (user, moment) == (also, then):
            seen.setdefault((min(item, other), max(item, other)), []).append(item < other)
    total = weight = 0.0
    for directions in seen.values():
        if len(directions) > 1:
            same = [a == b for a, b in itertools.combinations(directions, 2)]
            total += len(directions) * sum(same) / len(same)
            weight += len(directions)
    assert found.agreement() == (pytest.approx(total / weight), weight)


def test_few_ties_or_few_sightings_are_no_caveat():
    assert counted([(u, 10 * u + i, i) for u in range(60) for i in range(4)]).caveat() is None
    assert counted(log("by id", users=3)).caveat() is None
    assert TieOrder(3).caveat() is None


def test_one_user_in_several_parts_loses_only_the_pair_at_the_cut():
    whole, cut = counted(log("by id")), counted(log("by id"), parts=2)
    assert cut.caveat() == whole.caveat()


@pytest.mark.parametrize("bucket_rows", [1 << 22, 40])
def test_a_prepared_log_carries_the_caveat_however_it_was_cut_and_shuffled_ties_do_not(tmp_path: Path, bucket_rows):
    path = tmp_path / "log.csv"
    path.write_text("user_id,item_id,timestamp\n" + "".join(f"{u},{i},{t}\n" for u, t, i in log("odd")))
    for ties, wanted in (("file", 1), ("shuffled", 0)):
        config = TableConfig(path=str(path), ties=ties)
        prepare_log(read_log(config), config, tmp_path / ties, bucket_rows=bucket_rows)
        assert len(read_store(tmp_path / ties).manifest["caveats"]) == wanted
