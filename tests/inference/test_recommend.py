"""What is asked, what is assumed, what is shown; with a model whose scores are known."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import torch

from gr.data.layout import LayoutConfig
from gr.data.split import LeaveOneOutConfig, make_split
from gr.data.store import EventStore
from gr.errors import UserError
from gr.inference import Loaded, recommend
from gr.inference.recommend import typical_gap
from gr.models.recommender import Ranked

TITLES = ["Alien", "Aliens", "Heat", "Ran", "[red]Brazil[/red]", "Solaris"]
DAY = 86_400


class NextItem:
    """Scores (B, V): the item after the last token's has 10, the next 9, ...; remembers the batch."""

    num_items = len(TITLES)

    def __init__(self) -> None:
        self.batch = None

    def scores(self, batch, item_range):
        self.batch = batch
        last = batch.tokens["item_id"][batch.last_positions()]
        distance = (torch.arange(self.num_items)[None] - last[:, None] - 1) % self.num_items
        return (10.0 - distance)[:, item_range[0] : item_range[1]]

    def recommend(self, batch, k, exclude=None):
        scores = self.scores(batch, (0, self.num_items))
        if exclude is not None:
            scores = scores.masked_fill(exclude, float("-inf"))
        best, items = scores.topk(min(k, self.num_items), dim=1)
        return Ranked(items.masked_fill(best == float("-inf"), -1), best)


def loaded(
    *,
    times: bool = True,
    actions: bool = False,
    kind: str = "items",
    mask_seen: bool | str = False,
    max_events: int = 50,
) -> Loaded:
    """Users 'ann' (items 0 1 2 3 4) and 'bob' (2 2): one event a day; bob is too short to be held out."""
    columns = {"item_id": np.array([0, 1, 2, 3, 4, 2, 2])}
    if times:
        columns["timestamp"] = np.array([0, 1, 2, 3, 4, 3, 7]) * DAY
    if actions:
        columns["action"] = np.array([1, 1, 0, 1, 1, 0, 1])
    store = EventStore(
        offsets=np.array([0, 5, 7]),
        columns=columns,
        num_items=6,
        num_actions=2 if actions else 0,
        manifest={"source": "test", "caveats": []},
        user_ids=pa.array(["ann", "bob"]),
        items=pa.table({"item_id": pa.array([10, 11, 12, 13, 14, 15]), "title": TITLES}),
    )
    config = SimpleNamespace(evaluation=SimpleNamespace(mask_seen=mask_seen))
    return Loaded(
        config,
        store,
        make_split(LeaveOneOutConfig(), store),
        LayoutConfig(kind=kind, max_events=max_events),
        NextItem(),
    )


def test_a_user_is_asked_with_the_history_before_the_held_out_event():
    run = loaded()
    found = recommend(run, user="ann", k=3)
    assert [e.title for e in found.history] == TITLES[:4]
    assert [e.ago for e in found.history] == [4 * DAY, 3 * DAY, 2 * DAY, DAY]
    assert found.query_time == 4 * DAY
    assert run.model.batch.tokens["query_time"][-1] == 4 * DAY
    assert [(r.rank, r.item_id, r.title, r.held_out) for r in found] == [
        (1, 14, TITLES[4], True),
        (2, 15, "Solaris", False),
        (3, 10, "Alien", False),
    ]
    assert (found.held_out.title, found.held_out.rank, found.held_out.part) == (TITLES[4], 1, "test")
    assert len(found) == 3 and found.to_dicts()[2]["seen"]


@pytest.mark.parametrize(
    ("mask_seen", "include_seen", "titles"),
    [
        (False, None, ["[red]Brazil[/red]", "Solaris", "Alien"]),
        (True, None, ["[red]Brazil[/red]", "Solaris"]),
        (True, True, ["[red]Brazil[/red]", "Solaris", "Alien"]),
        (False, False, ["[red]Brazil[/red]", "Solaris"]),
    ],
)
def test_seen_items_are_shown_as_the_run_was_evaluated_unless_said_otherwise(mask_seen, include_seen, titles):
    found = recommend(loaded(mask_seen=mask_seen), user="ann", k=3, include_seen=include_seen)
    assert [row.title for row in found] == titles
    assert found.held_out.candidates == (6 if len(titles) == 3 else 2)


def test_with_a_window_only_what_the_model_reads_is_hidden():
    run = loaded(mask_seen="window", max_events=2)  # of Alien, Aliens, Heat, Ran it reads the last two
    found = recommend(run, user="ann", k=6)
    assert [row.title for row in found] == ["[red]Brazil[/red]", "Solaris", "Alien", "Aliens"]
    assert [row.seen for row in found] == [False, False, True, True] and found.held_out.candidates == 4
    assert len(recommend(run, user="ann", k=6, include_seen=False)) == 2


def test_a_user_as_of_a_time_has_only_earlier_events():
    found = recommend(loaded(), user="ann", at=3 * DAY)
    assert [e.title for e in found.history] == TITLES[:3]
    assert found.held_out.part == "validation" and found.held_out.title == "Ran"
    early = recommend(loaded(), user="ann", at=2 * DAY)
    assert len(early.history) == 2 and early.held_out is None
    assert any("trained on this user's later events" in note for note in early.notes)
    late = recommend(loaded(), user="ann", at=99 * DAY)
    assert late.held_out.part == "test" and late.query_time == 99 * DAY, "the held-out event never enters the history"


def test_a_user_without_held_out_events_is_asked_with_everything():
    found = recommend(loaded(), user="bob")
    assert len(found.history) == 2 and found.held_out is None and found.query_time == 7 * DAY
    assert any("Nothing was held out" in note for note in found.notes)


def test_ties_give_the_middle_rank():
    run = loaded()
    run.model.scores = lambda batch, span: torch.zeros(1, span[1] - span[0])
    assert recommend(run, user="ann").held_out.rank == 3.5


def test_a_typed_history_states_the_times_and_actions_it_assumes():
    run = loaded(actions=True, kind="added")
    found = recommend(run, history=["alien", "12"], k=1)
    assert [r.title for r in found] == ["Ran"] and found.user is None and found.held_out is None
    assert found.query_time == 7 * DAY and [e.ago for e in found.history] == [2 * DAY, DAY]
    assert run.model.batch.tokens["action"].tolist() == [1, 1]
    assert any("every 1 day" in note for note in found.notes) and any("Assumed actions: 1" in n for n in found.notes)
    assert recommend(run, history=[12], at=50).query_time == 50


def test_a_log_without_times_is_asked_without_times():
    run = loaded(times=False)
    found = recommend(run, user="ann")
    assert found.query_time is None and "timestamp" not in run.model.batch.tokens
    assert {e.ago for e in found.history} == {None}
    assert recommend(run, history=["Heat"]).notes == []
    with pytest.raises(UserError, match="needs times"):
        recommend(run, user="ann", at=5)


def test_typical_gap_is_taken_within_users_only():
    assert typical_gap(np.array([0, 2, 4]), np.array([0, 10, 1000, 1010])) == 10
    assert typical_gap(np.array([0, 1, 2]), np.array([5, 900])) == 1
    assert typical_gap(np.array([0, 0, 2, 2]), np.array([5, 9])) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"user": "anne"}, "did you mean 'ann'"),
        ({"history": ["Alienn"]}, "did you mean 'Aliens', 'Alien'|did you mean 'Alien', 'Aliens'"),
        ({"history": []}, "history is empty"),
        ({"history": ["", " "]}, "history is empty"),
        ({"user": "ann", "k": 0}, "k is 0"),
        ({"user": "ann", "history": ["Heat"]}, "not both"),
        ({}, "not neither"),
        ({"user": "ann", "at": -5}, "no event before"),
    ],
)
def test_mistakes_are_said_in_one_sentence(arguments, message):
    with pytest.raises(UserError, match=message) as caught:
        recommend(loaded(), **arguments)
    assert "\n" not in str(caught.value)


def test_scores_that_are_no_numbers_are_refused():
    run = loaded()
    run.model.scores = lambda batch, span: torch.full((1, span[1] - span[0]), float("nan"))
    with pytest.raises(UserError, match="not numbers"):
        recommend(run, user="ann")
