"""Typed words find users, items and times, or say what is close."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from gr.data.store import EventStore
from gr.errors import UserError
from gr.inference.lookup import find_item, find_user, item_title, parse_time, show_span, show_time


def store(users: pa.Array, ids: list, titles: list) -> EventStore:
    return EventStore(
        offsets=np.zeros(len(users) + 1, np.int64),
        columns={"item_id": np.zeros(0, np.int64)},
        num_items=len(ids),
        num_actions=0,
        manifest={},
        user_ids=users,
        items=pa.table({"item_id": ids, "title": pa.array(titles, pa.string())}),
    )


FILMS = store(
    pa.array([7, 42, 1077]),
    [1, 2, 3, 1984, 5, 6],
    ["Alien (1979)", "Aliens (1986)", "1984", "Brazil", "Heat", "Heat"],
)


def test_users_are_found_by_integer_or_text_ids():
    assert find_user(FILMS, "42") == 1 and find_user(FILMS, 1077) == 2
    assert find_user(store(pa.array(["u1", "u2"]), [1], ["x"]), "u2") == 1


@pytest.mark.parametrize("user", ["8", "ann", "", "99999999999999999999999", "4 2"])
def test_an_unknown_user_is_named(user):
    with pytest.raises(UserError, match=f"user {user!r} is not in the log"):
        find_user(FILMS, user)


@pytest.mark.parametrize(
    ("text", "item"),
    [
        ("alien (1979)", 0),
        ("ALIENS", 1),
        ("brazil", 3),
        ("2", 1),
        (5, 4),
        ("id:1984", 3),
        ("id: 3", 2),
        ("zil", 3),
    ],
)
def test_items_are_found_by_id_title_or_part_of_a_title(text, item):
    assert find_item(FILMS, text) == item


@pytest.mark.parametrize("text", ["Heat", "alien", "1984"])
def test_an_ambiguous_item_lists_the_ids_that_tell_them_apart(text):
    with pytest.raises(UserError, match=r"fits 2 items.*id:\d+.*id:\d+"):
        find_item(FILMS, text)


def test_an_unknown_item_names_close_titles_and_ids():
    with pytest.raises(UserError, match="did you mean 'Brazil'"):
        find_item(FILMS, "Brasil")
    with pytest.raises(UserError, match="did you mean '1984'"):
        find_item(FILMS, "id:1985")
    with pytest.raises(UserError, match="it has, for example, 'Alien"):
        find_item(FILMS, "qqqqqqqq")


def test_close_names_are_found_in_a_large_log_too():
    many = store(pa.array([f"user{i:06d}" for i in range(60_000)]), [1], ["x"])
    with pytest.raises(UserError, match="did you mean 'user05999"):
        find_user(many, "user059990x")


def test_an_item_without_a_title_goes_by_its_id():
    assert item_title(store(pa.array([1]), [77], [None]), 0) == "77"


def test_times_are_seconds_or_dates_in_utc():
    assert parse_time("86400") == 86_400
    assert parse_time("1970-01-02") == 86_400
    assert parse_time("1970-01-02T01:00+01:00") == 86_400
    assert show_time(86_400) == "1970-01-02 00:00 UTC"
    assert show_time(10**18) == f"second {10**18}"
    with pytest.raises(UserError, match="'tomorrow' is not a time"):
        parse_time("tomorrow")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 seconds"),
        (1, "1 second"),
        (60, "1 minute"),
        (7200, "2 hours"),
        (86_399, "23 hours"),
        (200_000, "2 days"),
    ],
)
def test_spans_are_said_in_their_largest_unit(seconds, text):
    assert show_span(seconds) == text
