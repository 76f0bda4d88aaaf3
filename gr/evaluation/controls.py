"""Controls: data on which an honest pipeline must find nothing."""

from __future__ import annotations

import dataclasses
import hashlib

import numpy as np

from gr.data.split import Split, training_events
from gr.data.store import EventStore


def shuffle_targets(store: EventStore, split: Split, seed: int) -> EventStore:
    """The log with the items of all training events permuted across users and places.

    Item counts, lengths, times and every held-out event stay as they are, so popularity is what is left to
    learn: a model trained on the result must fall to the popularity baseline on held-out targets. If it stays
    above, something other than training data reaches it.

    Args:
        store: The log.
        split: Says which events train.
        seed: Of the permutation.

    Returns:
        A store in memory (``folder`` is ``None``) whose manifest names the shuffle among its caveats.
    """
    item = np.array(store.columns["item_id"])
    train = training_events(store, split)
    item[train] = np.random.default_rng(seed).permutation(item[train])
    caveat = f"items of training events were shuffled across users (control, seed {seed})"
    was = str(store.manifest.get("content_hash", ""))
    manifest = dict(store.manifest) | {
        "content_hash": hashlib.sha256(f"{was} shuffled {seed}".encode()).hexdigest()[: len(was) or 64],
        "caveats": [*store.manifest.get("caveats", []), caveat],
    }
    return dataclasses.replace(store, columns=store.columns | {"item_id": item}, manifest=manifest, folder=None)
