"""The one batch type: jagged columns over tokens, columns over rows, labels and negatives.

::

    offsets      0        3  4           7          B = 3 sequences of lengths 3, 1, 3
    tokens       a0 a1 a2 b0 c0 c1 c2               every column is (T, ...), T = 7
    rows         A        B  C                      every column is (B, ...)
    labels       position = [0, 1, 4, ...]          indices into tokens, S of them
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Labels:
    """What is to be predicted, and where.

    Attributes:
        position: (S,) int64, token index whose output vector predicts ``item_id``.
        item_id: (S,) int64, dense item index in 0..V-1.
        weight: (S,) float32, contribution to the loss.
    """

    position: Tensor
    item_id: Tensor
    weight: Tensor


@dataclass(frozen=True)
class Negatives:
    """Items drawn before look-up.

    Attributes:
        ids: (R,) shared by all positions or (S, R) per position, int64.
        log_q: Log of each one's expected draw count, same shape, float32; ``None``: no correction.
        positive_log_q: (S,) float32, the same for the labels; ``None`` as above.
    """

    ids: Tensor
    log_q: Tensor | None = None
    positive_log_q: Tensor | None = None


@dataclass(frozen=True)
class JaggedBatch:
    """B sequences of T tokens in all.

    Attributes:
        offsets: (B+1,) int64, row starts; ``offsets[-1] == T``.
        max_seq_len: N, longest row, a host int (no device sync).
        num_tokens: T, a host int.
        tokens: (T, ...) columns: ``item_id``, ``timestamp`` (seconds: int32 where all of the batch's times lie in
            [0, 2^31 - 1), else int64), ``query_time`` (the same of the event to be predicted from this token),
            ``action``. Columns that the log lacks are absent.
        rows: (B, ...) columns: ``sample_key`` (int64, the user's index), ``num_targets``, ``num_contextual``,
            ``context``.
        index: (T,) int64 columns written by the layout, the only source for masks and positions:
            ``item_index`` (which event of the row), ``token_type`` (0 item, 1 action), ``segment``,
            ``event`` (position of the event in the user's whole log, for the leak audit).
        labels: What is predicted; ``None`` when only recommending.
        negatives: Drawn by the loader; ``None`` for full softmax and evaluation.
        views: Further batches of the same users (contrastive, text).
    """

    offsets: Tensor
    max_seq_len: int
    num_tokens: int
    tokens: Mapping[str, Tensor]
    rows: Mapping[str, Tensor]
    index: Mapping[str, Tensor]
    labels: Labels | None = None
    negatives: Negatives | None = None
    views: Mapping[str, JaggedBatch] = field(default_factory=dict)

    @property
    def num_sequences(self) -> int:
        """B."""
        return self.offsets.numel() - 1

    def replace(self, **changes: object) -> JaggedBatch:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    def to(self, device: torch.device | str, non_blocking: bool = True) -> JaggedBatch:
        """The batch with every tensor on ``device``."""
        return _map(self, lambda t: t.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> JaggedBatch:
        """The batch in page-locked memory, so that ``to`` overlaps with compute."""
        return _map(self, lambda t: t.pin_memory())

    def last_positions(self) -> Tensor:
        """(B,) int64 token index of each row's last token; rows must not be empty."""
        return self.offsets[1:] - 1


def _map(value, function):
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Mapping):
        return {key: _map(item, function) for key, item in value.items()}
    if dataclasses.is_dataclass(value):
        changes = {f.name: _map(getattr(value, f.name), function) for f in dataclasses.fields(value)}
        return dataclasses.replace(value, **changes)
    return value
