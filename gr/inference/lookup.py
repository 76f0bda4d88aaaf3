"""From what a person types to indices: users, items, times; and times back to words."""

from __future__ import annotations

import difflib
from datetime import UTC, datetime

import pyarrow as pa
import pyarrow.compute as pc

from gr.data.store import EventStore
from gr.errors import UserError

MAX_COMPARED = 20_000  # difflib needs about 10 us a candidate


def find_user(store: EventStore, user: str | int) -> int:
    """Index of a user from the original id.

    Raises:
        UserError: No such user; names close ones.
    """
    ids, text = store.user_ids, str(user).strip()
    try:
        value = pa.scalar(int(text), ids.type) if pa.types.is_integer(ids.type) else pa.scalar(text, ids.type)
        index = pc.index(ids, value).as_py()
    except (ValueError, OverflowError, pa.ArrowException):
        index = -1
    if index < 0:
        raise UserError(f"user {text!r} is not in the log{_near(text, ids.cast(pa.string()))}")
    return index


def find_item(store: EventStore, wanted: str | int) -> int:
    """Dense index of an item from its id, its title, or a part of its title that only one item has.

    ``id:`` before an id says that it is one, should it also be the title of another item.

    Raises:
        UserError: No such item, or several; names close ones.
    """
    text = str(wanted).strip()
    ids = _strings(store.items["item_id"])
    if text.startswith("id:"):
        index = pc.index(ids, text[3:].strip()).as_py()
        if index < 0:
            raise UserError(f"item id {text[3:].strip()!r} is not in the log{_near(text[3:].strip(), ids)}")
        return index
    titles = _strings(store.items["title"])
    lowered = pc.utf8_lower(titles)
    by_id = pc.index(ids, text).as_py()
    exact = _where(pc.equal(lowered, text.lower()))
    found = sorted({*exact, *([by_id] if by_id >= 0 else [])})
    if not found and text:
        found = _where(pc.match_substring(lowered, text.lower()))
    if len(found) == 1:
        return found[0]
    if not found:
        raise UserError(f"item {text!r} is neither a title nor an id in the log{_near(text, titles)}")
    some = ", ".join(f"{titles[i].as_py()!r} (id:{ids[i].as_py()})" for i in found[:5])
    more = f" and {len(found) - 5} more" if len(found) > 5 else ""
    raise UserError(f"item {text!r} fits {len(found)} items, write one of their ids instead: {some}{more}")


def item_id(store: EventStore, item: int) -> str | int:
    """Original id of a dense item index."""
    return store.items["item_id"][item].as_py()


def item_title(store: EventStore, item: int) -> str:
    """Title of a dense item index; its id as text where the log has no title."""
    title = store.items["title"][item].as_py()
    return str(item_id(store, item)) if title is None else title


def parse_time(text: str) -> int:
    """Seconds since 1970 from digits, or from a date such as 2001-05-03T18:30 (UTC unless it says).

    Raises:
        UserError: Neither, or beyond 2**53 seconds.
    """
    try:
        seconds = int(text)
    except ValueError:
        seconds = None
    if seconds is not None:
        if abs(seconds) >= 2**53:
            raise UserError(f"--at {text} is out of range; seconds since 1970 must stay within 2**53")
        return seconds
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise UserError(
            f"--at {text!r} is not a time; write seconds since 1970 or a date such as 2001-05-03T18:30"
        ) from None
    return int((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp())


def show_time(seconds: int) -> str:
    """Date and minute in UTC; the number itself where it is no date."""
    try:
        return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M} UTC"
    except (ValueError, OverflowError, OSError):
        return f"second {seconds}"


def show_span(seconds: int) -> str:
    """A length of time in its largest unit: '3 days'."""
    for size, unit in (
        (31_557_600, "year"),
        (2_629_800, "month"),
        (86_400, "day"),
        (3_600, "hour"),
        (60, "minute"),
    ):
        if seconds >= size:
            count = seconds // size
            return f"{count} {unit}{'s' if count > 1 else ''}"
    return f"{seconds} second{'' if seconds == 1 else 's'}"


def _strings(column: pa.ChunkedArray | pa.Array) -> pa.ChunkedArray | pa.Array:
    return column.cast(pa.string())


def _where(mask: pa.ChunkedArray | pa.Array) -> list[int]:
    return pc.indices_nonzero(pc.fill_null(mask, False)).to_pylist()


def _near(text: str, names: pa.ChunkedArray | pa.Array) -> str:
    """'; did you mean ...?' with up to three close names."""
    if len(names) > MAX_COMPARED:  # a large log: compare what shares the longest beginning
        for stop in range(len(text), 0, -1):
            alike = names.filter(pc.starts_with(names, text[:stop], ignore_case=True))
            if len(alike):
                names = alike
                break
    candidates = {name.lower(): name for name in reversed(names.slice(0, MAX_COMPARED).to_pylist()) if name}
    near = difflib.get_close_matches(text.lower(), candidates, n=3, cutoff=0.5)
    if not near:
        first = [name for name in names.slice(0, 3).to_pylist() if name]
        return f"; it has, for example, {', '.join(map(repr, first))}" if first else ""
    return f"; did you mean {', '.join(repr(candidates[name]) for name in near)}?"
