"""Full-corpus ranking: for every target, how many items score better and how many score the same.

Ties are counted exactly: an item ties with the target when the two scores are equal in the dtype that the
recommender returns, and the target's own score is read from the very block that it is compared in. A
recommender that gives every item one score thus gets what a random order would get, never more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from gr.data.batch import JaggedBatch
from gr.embedding.spec import TableSpec
from gr.errors import UserError

# Scores of one batch up to this size are kept between the two passes rather than computed twice.
KEEP_BYTES = 2**28
# Scores asked of a scorer at a time; larger temporaries cost more in page faults than in arithmetic.
SPAN_SCORES = 2**21
# Most items in a block: counts are added up in float32, which holds every integer up to here.
LARGEST_BLOCK = 2**24
# (row, item) pairs of a batch up to which repeats are found by a table of all of them, 64 MiB, and not by sorting.
TABLE_PAIRS = 2**24
Gather = Callable[[list[Any]], list[list[Any]]]
Scores = Callable[[tuple[int, int]], Tensor]
DIVERGED = "{} gave NaN scores; training has diverged, try a smaller learning rate"
# Which earlier items of a user leave the candidates: none, all, or those among the events that the encoder reads.
SeenRule = Literal[False, True, "window"]


@dataclass(frozen=True)
class Ranks:
    """Where each target stands, (n,) int64 arrays in the order of the targets.

    Attributes:
        user: The user's index in the store.
        position: The target's position in the user's log.
        target: The target's dense item index.
        better: Candidates that score strictly higher than the target.
        tied: Candidates other than the target whose score equals the target's.
        candidates: Items that were ranked, the target included: V, less the masked ones.
        num_items: V.
    """

    user: np.ndarray
    position: np.ndarray
    target: np.ndarray
    better: np.ndarray
    tied: np.ndarray
    candidates: np.ndarray
    num_items: int

    def __len__(self) -> int:
        return len(self.user)

    @property
    def rank(self) -> np.ndarray:
        """(n,) float64 middle rank, 1 is best: ``better + tied / 2 + 1``, the mean over all orders."""
        return self.better + self.tied / 2.0 + 1.0

    def where(self, rows: np.ndarray) -> Ranks:
        """The targets at ``rows`` (indices or a mask) alone."""
        return Ranks(**{name: getattr(self, name)[rows] for name in COLUMNS}, num_items=self.num_items)


COLUMNS = tuple(field.name for field in fields(Ranks) if field.name != "num_items")


def rank_targets(
    recommender: Any,
    loader: Any,
    mask_seen: SeenRule,
    *,
    block: int = 65536,
    device: torch.device | str | None = None,
    gather: Gather | None = None,
) -> Ranks:
    """Ranks every target of a loader among all items.

    Args:
        recommender: Has ``num_items`` and ``scores(batch, (lo, hi)) -> (B, hi - lo)`` floats. If it also has
            ``scorer(batch) -> ((lo, hi) -> (B, hi - lo))``, that is used, so that histories are encoded once
            a batch. If items share rows of a table (``item_rows`` is not ``None``), the rows are scored, by
            ``row_scorer(batch)``, and each counts as all of its items: these tie exactly, whatever rounding does.
        loader: Iterates over (rows (B,) into ``loader.targets``, JaggedBatch); ``loader.targets`` has
            ``user`` and ``position``, (n,) int64, and ``loader.store`` is the log, the source of targets and
            of what was seen.
        mask_seen: Whether items of the user's log before the target leave the candidates: they would not be
            shown. ``True``: all of it, also what a batch cuts off; ``"window"``: the last ``max_events`` of
            ``loader.layout``. A target that is masked so is a miss, ranked behind all candidates (freeing it
            alone from the mask would tell the model which item it is).
        block: Items scored at a time, fewer with a ``scorer``, for which a further block costs little.
        device: Where batches are moved to; ``None`` leaves them where they are.
        gather: Collects a list from every process of a job into a list of such lists; ``None``: one process.
            Every process then returns the ranks of all targets.

    Returns:
        The ranks, in the order of ``loader.targets``.

    Raises:
        UserError: Scores that are NaN, of a wrong shape or not floats; item counts that differ.
    """
    store, targets = loader.store, loader.targets
    name = type(recommender).__name__
    if recommender.num_items != store.num_items:
        raise UserError(
            f"{name} scores {recommender.num_items} items but the log has {store.num_items}; train it on it"
        )
    user, position = np.asarray(targets.user), np.asarray(targets.position)
    if len(user) == 0:
        raise UserError("there is no target to rank; the split must hold out at least one event")
    truth = np.asarray(store.columns["item_id"])[np.asarray(store.offsets)[user] + position]

    shared = getattr(recommender, "item_rows", None)
    window = masked_events(mask_seen, loader.layout) if mask_seen else None
    found: list[np.ndarray] = []
    with evaluating(recommender), torch.no_grad():
        for rows, batch in loader:
            rows = np.arange(len(user))[rows] if isinstance(rows, slice) else np.asarray(rows)
            masked, missed, candidates = None, None, np.full(len(rows), store.num_items)
            if mask_seen:
                row, item = seen_pairs(store, user[rows], position[rows], window)
                own = item == truth[rows][row]
                masked, missed = (row[~own], item[~own]), row[own]
                candidates -= np.bincount(masked[0], minlength=len(rows))
            batch = batch if device is None else batch.to(device)
            spans, scores = _spans(recommender, batch, len(rows), block, name, shared)
            higher, at_least, nan = count(spans, scores, truth[rows], masked, shared=shared)
            if nan:
                raise UserError(DIVERGED.format(name))
            better = higher.cpu().numpy()
            tied = (at_least - higher).cpu().numpy() - 1
            if missed is not None:
                better[missed], tied[missed] = candidates[missed] - 1, 0
            found.append(np.stack([rows, better, tied, candidates]))
    counts = np.concatenate(found, axis=1) if found else np.zeros((4, 0), dtype=np.int64)
    if gather is not None:
        counts = np.concatenate([part for parts in gather([counts]) for part in parts], axis=1)
    rows, better, tied, candidates = counts[:, np.argsort(counts[0], kind="stable")]
    assert np.array_equal(rows, np.arange(len(user))), "every target must be ranked by exactly one process"
    return Ranks(user, position, truth, better, tied, candidates, int(store.num_items))


@contextmanager
def evaluating(recommender: Any) -> Iterator[None]:
    """Evaluation mode (no dropout) for the time being."""
    training = isinstance(recommender, nn.Module) and recommender.training
    if training:
        recommender.eval()
    try:
        yield
    finally:
        if training:
            recommender.train()


def masked_events(mask_seen: SeenRule, layout: Any) -> int | None:
    """How many of the latest events a mask reaches back over; ``None``: all."""
    return layout.max_events if mask_seen == "window" else None


def seen_pairs(
    store: Any, user: np.ndarray, position: np.ndarray, window: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Distinct (row, item) pairs of each row's events before its position; two (m,) int64, rows ascending.

    Args:
        store: The log.
        user: (n,) user of each row.
        position: (n,) events before it are seen.
        window: Only the last so many of them; ``None``: all.
    """
    count = position if window is None else np.minimum(position, window)
    row = np.repeat(np.arange(len(user)), count)
    first = np.asarray(store.offsets)[user] + position - count
    event = np.arange(len(row)) + (first - (np.cumsum(count) - count))[row]
    item = np.asarray(store.columns["item_id"])[event]
    pair = row * np.int64(store.num_items) + item
    size = len(user) * store.num_items
    if size > TABLE_PAIRS:
        pair = np.unique(pair)
        return pair // store.num_items, pair % store.num_items
    # Every event writes its number; that of one event of each pair remains. What was there before is never read.
    number = np.arange(len(pair), dtype=np.int32)
    table = np.empty(size, dtype=np.int32)
    table[pair] = number
    first = table[pair] == number
    return (row, item) if first.all() else (row[first], item[first])


def seen_mask(store: Any, user: np.ndarray, position: np.ndarray, window: int | None = None) -> Tensor:
    """The same as a (B, V) bool, the ``exclude`` of ``Recommender.recommend``."""
    mask = torch.zeros(len(user), store.num_items, dtype=torch.bool)
    mask[seen_pairs(store, user, position, window)] = True
    return mask


def _spans(
    recommender: Any, batch: JaggedBatch, size: int, block: int, name: str, shared: TableSpec | None
) -> tuple[list[tuple[int, int]], Scores]:
    """Ranges that cover all items, or rows that these share, and their (B, hi - lo) scores of a batch of ``size``
    rows."""
    scorer = None
    if shared is not None:
        scorer = recommender.row_scorer(batch)
        block = min(block, max(1, SPAN_SCORES // size))
    elif hasattr(recommender, "scorer"):
        scorer = recommender.scorer(batch)
        block = min(block, max(1, SPAN_SCORES // size))

    def scores(span: tuple[int, int]) -> Tensor:
        values = scorer(span) if scorer is not None else recommender.scores(batch, span)
        if tuple(values.shape) != (size, span[1] - span[0]) or not values.is_floating_point():
            raise UserError(
                f"{name}.scores gave {values.dtype} of shape {tuple(values.shape)}; "
                f"floats of shape {(size, span[1] - span[0])} are right"
            )
        return values

    return ranges(0, recommender.num_items if shared is None else shared.num_rows, block), scores


def ranges(first: int, last: int, block: int) -> list[tuple[int, int]]:
    """Spans of at most ``block`` items, and of no more than can be counted, that cover first..last-1."""
    block = min(block, LARGEST_BLOCK)
    return [(lo, min(lo + block, last)) for lo in range(first, last, block)]


def count(
    spans: list[tuple[int, int]],
    scores: Scores,
    truth: np.ndarray,
    masked: tuple[np.ndarray, np.ndarray] | None,
    share: Callable[[Tensor], Tensor] | None = None,
    shared: TableSpec | None = None,
) -> tuple[Tensor, Tensor, bool]:
    """How many items of some spans score higher than each row's target, and how many at least as high.

    Args:
        spans: Ranges of items, none empty, in order and without gaps.
        scores: Their (B, hi - lo) scores.
        truth: (B,) int64 targets.
        masked: (row, item) pairs that do not count.
        share: Makes of (B,) scores of targets, 0 where these lie in no span, the scores of all of them; ``None``: the
            spans hold all.
        shared: The table whose rows items share: spans are of its rows, each of which counts as all of its items.
            ``None``: spans are of items.

    Returns:
        Two (B,) int64, and whether a score was NaN.
    """
    weight = None
    if shared is not None:
        truth = shared.rows_of(torch.from_numpy(truth)).numpy()
        masked = None if masked is None else (masked[0], shared.rows_of(torch.from_numpy(masked[1])).numpy())
        weight = torch.from_numpy(shared.row_counts).double()
    size, (first, last) = len(truth), (spans[0][0], spans[-1][1])
    kept: dict[tuple[int, int], Tensor] = {}
    keep = len(spans) == 1 or size * (last - first) * 8 <= KEEP_BYTES

    def values_of(span: tuple[int, int]) -> Tensor:
        values = kept[span] if span in kept else scores(span)
        if keep:
            kept[span] = values
        return values

    own: Tensor | None = None
    target = torch.from_numpy(truth)
    for span in spans:  # first pass: each target's own score, from the block that holds it
        inside = (target >= span[0]) & (target < span[1])
        if inside.any() or (own is None and share is not None):
            values = values_of(span)
            own = values.new_zeros(size) if own is None else own
            at = inside.nonzero()[:, 0].to(values.device)
            own[at] = values[at, target[inside].to(values.device) - span[0]]
    assert own is not None
    own = own if share is None else share(own)

    better = torch.zeros(size, dtype=torch.int64, device=own.device)
    at_least = torch.zeros_like(better)
    total = own.new_zeros(())
    if masked is not None and (len(spans) > 1 or share is not None):
        within = (masked[1] >= first) & (masked[1] < last)
        masked = masked[0][within], masked[1][within]
    for span in spans:
        values = values_of(span)
        total += values.sum()
        flags = torch.empty(values.shape, dtype=values.dtype, device=values.device)
        each = None if weight is None else weight[span[0] : span[1]].to(own.device)
        better += _add_up(torch.gt(values, own[:, None], out=flags), each)
        at_least += _add_up(torch.ge(values, own[:, None], out=flags), each)
        if masked is not None:  # what was seen is counted with the rest, and taken off
            row, item = masked
            if len(spans) > 1 or share is not None:
                inside = (item >= span[0]) & (item < span[1])
                row, item = row[inside], item[inside] - span[0]
            row, item = (torch.from_numpy(index).to(own.device) for index in (row, item))
            seen, bar = values[row, item], own.index_select(0, row)
            better.index_add_(0, row, (seen > bar).long(), alpha=-1)
            at_least.index_add_(0, row, (seen >= bar).long(), alpha=-1)
    # A NaN makes the total NaN; so do two infinities. One device sync a batch, not one a block.
    nan = bool(torch.isnan(total)) and any(bool(torch.isnan(values_of(span)).any()) for span in spans)
    return better, at_least, nan


def _add_up(flags: Tensor, weight: Tensor | None) -> Tensor:
    """(B,) int64 sums of (B, n) ones and zeros, floats: torch compares and adds several times as fast in them as in
    bools; weighted by (n,) float64 whole numbers, if any."""
    if weight is not None:
        return (flags.double() @ weight).long()
    return flags.sum(1, dtype=torch.promote_types(flags.dtype, torch.float32)).long()
