"""The planted world: a seeded log whose law is known, so that the best possible score is known too.

Law, for user u with hidden interest z (fixed, one of ``num_interests``), events e_1, e_2, ...:

1. Items lie in leaf topics: ``num_topics`` topics, each with ``subtopics`` leaves. Within a leaf an item is drawn with
   Zipf weight ``rank ** -popularity_exponent``.
2. The gap between two events is log-uniform between ``shortest_gap`` and ``longest_gap`` seconds. With probability
   ``c(gap) = exp(-gap / memory)`` the next event *continues*, otherwise it *restarts*.
3. Continuing: the next topic follows an order-2 transition given the topics of the last two events (the second event
   takes the first for both), the next subtopic an order-1 transition given the last subtopic and the new topic. Both
   are permutations blurred by a little noise, and the order-2 one is a Latin square: knowing one of the two topics
   alone says almost nothing.
4. Restarting: the leaf is drawn from the interest's own distribution over leaves (a few favourites).

Switches for later studies: ``actions`` (a like that depends on interest and leaf), ``item_arrival`` (items appear
over the year) and ``rich_get_richer`` (a restart prefers leaves the user has visited, a Polya urn).

Whether an event continued, and z, are hidden. Both are finite, so the posterior of the next item given the *visible*
history and the time of the query is exact; ranking by it is the best that any model can do, and the expected HR, NDCG
and MRR of that ranking is the ceiling (gr.data.ceiling).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa

from gr.data.store import Chunk, write_store
from gr.errors import UserError

BLOCK = 1024  # users generated from one seed; part of the law: user u is the same in a log of any size
YEAR = 360 * 86400
EPOCH_START = 1_600_000_000
CAVEAT = "generated data: it shows that a model learns what there is to learn, not how it fares with real users"
TOPIC_WORDS = (
    "Noir", "Space", "Jazz", "Garden", "Chess", "Ocean", "Baking", "Trail", "Opera", "Robots", "Poetry", "Racing",
    "Castles", "Winter", "Magic", "Cinema",
)  # fmt: skip
LEAF_WORDS = ("Classics", "Stories", "Basics", "Masters", "Secrets", "Journeys", "Workshop", "Weekly")


@dataclass(frozen=True, kw_only=True)
class PlantedConfig:
    """A world. ``seed`` fixes the law and every user; size only says how many users are drawn from it."""

    kind: str = "planted"
    seed: int = 1
    num_users: int = 20_000
    num_items: int = 2_000
    num_topics: int = 8
    subtopics: int = 4
    num_interests: int = 12
    favourites: int = 3
    """Leaves that an interest likes; they share 1 - ``blur`` of its restarts."""
    min_events: int = 12
    max_events: int = 28
    popularity_exponent: float = 1.2
    blur: float = 0.08
    """Probability mass that every transition and interest spreads over everything."""
    shortest_gap: int = 20
    longest_gap: int = 2_000_000
    """Seconds. Gaps are log-uniform between the two."""
    memory: float = 10_000.0
    """Seconds after which the chance to continue has fallen to 1/e."""
    actions: bool = False
    item_arrival: bool = False
    rich_get_richer: float = 0.0

    def __post_init__(self) -> None:
        for name in ("num_users", "num_topics", "subtopics", "num_interests", "favourites", "shortest_gap"):
            if getattr(self, name) < 1:
                raise UserError(f"planted world: {name} is {getattr(self, name)}; it must be at least 1")
        if self.num_items < self.num_leaves:
            raise UserError(
                f"planted world: num_items is {self.num_items}; {self.num_leaves} leaves need as many items"
            )
        if not 2 <= self.min_events <= self.max_events:
            raise UserError(
                f"planted world: need 2 <= min_events <= max_events, not {self.min_events}, {self.max_events}"
            )
        if self.favourites > self.num_leaves:
            raise UserError(f"planted world: favourites is {self.favourites}; there are only {self.num_leaves} leaves")
        if self.longest_gap < self.shortest_gap or self.memory <= 0 or not 0 < self.blur < 1:
            raise UserError("planted world: need shortest_gap <= longest_gap, memory > 0 and 0 < blur < 1")
        if self.rich_get_richer < 0:
            raise UserError(f"planted world: rich_get_richer is {self.rich_get_richer}; it must not be negative")

    @property
    def num_leaves(self) -> int:
        return self.num_topics * self.subtopics


@dataclass(frozen=True)
class Law:
    """The world's probabilities, float64. Leaf l is subtopic ``l % subtopics`` of topic ``l // subtopics``.

    Attributes:
        config: Where it came from.
        order: (V,) items sorted by (leaf, arrival); the items that have arrived are a prefix of their leaf.
        leaf: (V,) leaf of each item.
        leaf_start: (L+1,) where each leaf starts in ``order``.
        weight: (V,) unnormalised item weights, by item.
        arrival: (V,) first second at which an item exists, by item.
        mass: (V+1,) cumulative weight along ``order``, starting with 0.
        topic_next: (A, A, A) P(next topic | topic before last, last topic).
        sub_next: (A, S, S) P(next subtopic | next topic, last subtopic).
        interest: (K, L) P(leaf | interest) of a restart.
        interest_prior: (K,) P(interest).
        like: (K, L) P(action = 1 | interest, leaf).
    """

    config: PlantedConfig
    order: np.ndarray
    leaf: np.ndarray
    leaf_start: np.ndarray
    weight: np.ndarray
    arrival: np.ndarray
    mass: np.ndarray
    topic_next: np.ndarray
    sub_next: np.ndarray
    interest: np.ndarray
    interest_prior: np.ndarray
    like: np.ndarray

    def continues(self, gap: np.ndarray) -> np.ndarray:
        """P(continue | gap seconds)."""
        return np.exp(-np.asarray(gap, dtype=np.float64) / self.config.memory)

    def follow(self, before: np.ndarray, last: np.ndarray) -> np.ndarray:
        """(n, L) P(next leaf | the two last leaves (n,)) of an event that continues."""
        cfg = self.config
        topic = self.topic_next[before // cfg.subtopics, last // cfg.subtopics]  # (n, A)
        sub = self.sub_next[:, last % cfg.subtopics].transpose(1, 0, 2)  # (n, A, S)
        return (topic[:, :, None] * sub).reshape(len(last), cfg.num_leaves)

    def restart(self, counts: np.ndarray) -> np.ndarray:
        """(n, K, L) P(next leaf | interest, restart) given how often each leaf (n, L) was visited."""
        g = self.config.rich_get_richer
        if g == 0.0:
            return np.broadcast_to(self.interest, (len(counts), *self.interest.shape))
        total = 1.0 + g * counts.sum(1)
        return (self.interest[None] + g * counts[:, None, :]) / total[:, None, None]

    def available(self, time: np.ndarray) -> np.ndarray:
        """(n, L) number of items of each leaf that exist at ``time`` (n,)."""
        if not self.config.item_arrival:
            return np.broadcast_to(np.diff(self.leaf_start), (len(time), self.config.num_leaves))
        arrived = self.arrival[self.order]
        return np.stack(
            [np.searchsorted(arrived[lo:hi], time, side="right") for lo, hi in _pairs(self.leaf_start)], axis=1
        )


def _pairs(starts: np.ndarray) -> list[tuple[int, int]]:
    return list(zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True))


def _uniform(seed: tuple[int, ...], *shape: int) -> np.ndarray:
    """Uniforms in [0, 1). Only ``random`` of PCG64 is used anywhere: its stream is fixed across numpy versions."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed))).random(shape)


def _permutation(seed: tuple[int, ...], n: int) -> np.ndarray:
    return np.argsort(_uniform(seed, n), kind="stable")


@lru_cache(maxsize=8)
def make_law(cfg: PlantedConfig) -> Law:
    """The law of a world; independent of ``num_users``, ``min_events`` and ``max_events``."""
    a, s, leaves, items = cfg.num_topics, cfg.subtopics, cfg.num_leaves, cfg.num_items
    leaf = np.arange(items) % leaves
    rank = np.arange(items) // leaves
    weight = (rank + 1.0) ** -cfg.popularity_exponent
    arrival = np.full(items, -(2**62), dtype=np.int64)
    if cfg.item_arrival:  # the best item of a leaf is always there; the others come over the year
        late = EPOCH_START + (_uniform((cfg.seed, 5), items) * YEAR).astype(np.int64)
        arrival = np.where(rank == 0, arrival, late)
    order = np.lexsort((np.arange(items), arrival, leaf))
    leaf_start = np.searchsorted(leaf[order], np.arange(leaves + 1))

    # topic_next: for each last topic the map from the topic before it to the next one is a permutation, and so it is
    # the other way round (a Latin square), so that one of the two topics alone does not help.
    rows, cols, names = (_permutation((cfg.seed, 1, i), a) for i in range(3))
    square = names[(rows[:, None] + cols[None, :]) % a]
    topic_next = np.full((a, a, a), cfg.blur / a)
    np.put_along_axis(topic_next, square[:, :, None], 1.0 - cfg.blur + cfg.blur / a, axis=2)
    shuffles = np.stack([_permutation((cfg.seed, 2, i), s) for i in range(a)])  # (A, S)
    sub_next = np.full((a, s, s), cfg.blur / s)
    np.put_along_axis(sub_next, shuffles[:, :, None], 1.0 - cfg.blur + cfg.blur / s, axis=2)

    interest = np.full((cfg.num_interests, leaves), cfg.blur / leaves)
    shares = 0.5 ** np.arange(cfg.favourites)
    shares *= (1.0 - cfg.blur) / shares.sum()
    like = np.full((cfg.num_interests, leaves), 0.2)
    for z in range(cfg.num_interests):
        chosen = _permutation((cfg.seed, 3, z), leaves)[: cfg.favourites]
        interest[z, chosen] += shares
        like[z, chosen] = 0.8
    prior = 1.0 + _uniform((cfg.seed, 4), cfg.num_interests)
    return Law(
        config=cfg,
        order=order,
        leaf=leaf,
        leaf_start=leaf_start,
        weight=weight,
        arrival=arrival,
        mass=np.concatenate([[0.0], np.cumsum(weight[order])]),
        topic_next=topic_next,
        sub_next=sub_next,
        interest=interest,
        interest_prior=prior / prior.sum(),
        like=like,
    )


def _draw(probabilities: np.ndarray, uniform: np.ndarray) -> np.ndarray:
    """Index drawn from each row of (n, k) probabilities by inverse transform."""
    cumulative = np.cumsum(probabilities, axis=1)
    picked = (cumulative < (uniform * cumulative[:, -1])[:, None]).sum(1)
    return np.minimum(picked, probabilities.shape[1] - 1)


@dataclass(frozen=True)
class Users:
    """Generated users: flat events in time order.

    Attributes:
        offsets: (n+1,) int64.
        item_id, timestamp, action: (E,) int64; ``action`` is ``None`` unless the world has actions.
        interest: (n,) hidden; never written to a log, kept for tests.
    """

    offsets: np.ndarray
    item_id: np.ndarray
    timestamp: np.ndarray
    action: np.ndarray | None
    interest: np.ndarray


def generate(cfg: PlantedConfig) -> Iterator[Users]:
    """Streams the world's users, ``BLOCK`` at a time."""
    law = make_law(cfg)
    for block in range(-(-cfg.num_users // BLOCK)):
        yield _generate_block(law, block, min(BLOCK, cfg.num_users - block * BLOCK))


def _generate_block(law: Law, block: int, keep: int) -> Users:
    cfg, n, steps = law.config, BLOCK, law.config.max_events
    draws = _uniform((cfg.seed, 6, block), 3, n)
    per_step = _uniform((cfg.seed, 7, block), steps, 5, n)
    length = cfg.min_events + (draws[0] * (cfg.max_events - cfg.min_events + 1)).astype(np.int64)
    z = _draw(np.broadcast_to(law.interest_prior, (n, cfg.num_interests)), draws[1])
    time = EPOCH_START + (draws[2] * YEAR).astype(np.int64)
    counts = np.zeros((n, cfg.num_leaves))
    users = np.arange(n)
    before = last = np.zeros(n, dtype=np.int64)
    items, times, actions = (np.zeros((n, steps), dtype=np.int64) for _ in range(3))
    ratio = np.log(cfg.longest_gap / cfg.shortest_gap)
    for t in range(steps):
        gap_u, mode_u, leaf_u, item_u, like_u = per_step[t]
        own = law.restart(counts)[users, z]  # (n, L)
        if t == 0:
            probabilities = own
        else:
            gap = np.rint(cfg.shortest_gap * np.exp(gap_u * ratio)).astype(np.int64)
            time = time + gap
            follow = law.follow(before, last)
            probabilities = np.where((mode_u < law.continues(gap))[:, None], follow, own)
        leaf = _draw(probabilities, leaf_u)
        lo = law.leaf_start[leaf]
        hi = lo + law.available(time)[users, leaf]
        point = law.mass[lo] + item_u * (law.mass[hi] - law.mass[lo])
        place = np.clip(np.searchsorted(law.mass, point, side="right") - 1, lo, hi - 1)
        items[:, t], times[:, t] = law.order[place], time
        actions[:, t] = like_u < law.like[z, leaf]
        counts[users, leaf] += 1
        before, last = (leaf, leaf) if t == 0 else (last, leaf)
    inside = np.arange(steps)[None, :] < length[:keep, None]
    return Users(
        offsets=np.concatenate([[0], np.cumsum(length[:keep])]),
        item_id=items[:keep][inside],
        timestamp=times[:keep][inside],
        action=actions[:keep][inside] if cfg.actions else None,
        interest=z[:keep],
    )


def item_titles(cfg: PlantedConfig) -> list[str]:
    """A readable title for each item: topic, subtopic, popularity rank within the leaf."""
    titles = []
    for item in range(cfg.num_items):
        leaf, rank = item % cfg.num_leaves, item // cfg.num_leaves
        topic, sub = divmod(leaf, cfg.subtopics)
        word = TOPIC_WORDS[topic % len(TOPIC_WORDS)] + (f" {topic // len(TOPIC_WORDS) + 1}" if topic >= 16 else "")
        titles.append(f"{word} {LEAF_WORDS[sub % len(LEAF_WORDS)]}{'+' * (sub // len(LEAF_WORDS))} No. {rank + 1}")
    return titles


class Planted:
    """The source: writes a world as a prepared log, block by block."""

    def __init__(self, cfg: PlantedConfig) -> None:
        self.cfg = cfg

    def prepare(self, folder: Path) -> None:
        """Writes the store; memory holds ``BLOCK`` users at a time."""
        cfg = self.cfg
        items = pa.table({"item_id": pa.array(np.arange(cfg.num_items)), "title": item_titles(cfg)})
        manifest = {"source": "planted", "num_actions": 2 if cfg.actions else 0, "caveats": [CAVEAT]}
        write_store(folder, self._chunks(), items, manifest)

    def _chunks(self) -> Iterator[Chunk]:
        first = 0
        for users in generate(self.cfg):
            columns = {"item_id": users.item_id, "timestamp": users.timestamp}
            if users.action is not None:
                columns["action"] = users.action
            count = len(users.offsets) - 1
            yield Chunk(pa.array(np.arange(first, first + count)), users.offsets, columns)
            first += count
