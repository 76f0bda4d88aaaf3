"""From looked-up vectors to the encoder's input: layout of items and actions, scale, positions, dropout."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gr.errors import UserError


@dataclass(frozen=True, kw_only=True)
class PreprocessorConfig:
    """Input of the encoder.

    Attributes:
        scale: Multiply the vectors by sqrt(D) before positions are added, as both reference paths do.
        position: "absolute": a learned vector for each index within the sequence; "none".
        position_init: "xavier" (the reference's HSTU) or "truncated_normal" with deviation sqrt(1/D) (its
            SASRec).
        dropout: On the input.
    """

    scale: bool = True
    position: Literal["absolute", "none"] = "absolute"
    position_init: Literal["xavier", "truncated_normal"] = "xavier"
    dropout: float = 0.2

    def __post_init__(self) -> None:
        if not 0.0 <= self.dropout < 1.0:
            raise UserError(f"preprocessor.dropout must be in [0, 1), got {self.dropout}")


def positions(offsets: Tensor, num_tokens: int) -> Tensor:
    """Index of each token within its sequence: ``(B+1,)`` offsets -> ``(T,)`` int64."""
    starts = offsets[:-1].repeat_interleave(offsets.diff(), output_size=num_tokens)
    return torch.arange(num_tokens, device=offsets.device) - starts


class Preprocessor(nn.Module):
    """``(vectors, batch) -> (T, D)``.

    Args:
        config: See there.
        dim: D.
        max_tokens: Rows of the position table: the longest sequence, in tokens.
        layout: "items": a token is an item. "added": item vector + action vector. "interleaved": tokens with
            ``token_type`` 0 are items, those with 1 are actions.
    """

    def __init__(
        self,
        config: PreprocessorConfig,
        dim: int,
        max_tokens: int,
        layout: Literal["items", "added", "interleaved"] = "items",
    ) -> None:
        super().__init__()
        self.config, self.max_tokens, self.layout = config, max_tokens, layout
        self.scale = math.sqrt(dim) if config.scale else 1.0
        self.position: nn.Parameter | None = None
        if config.position == "absolute":
            self.position = nn.Parameter(torch.empty(max_tokens, dim))
            if config.position_init == "xavier":
                nn.init.xavier_normal_(self.position)
            else:
                std = dim**-0.5
                nn.init.trunc_normal_(self.position, std=std, a=-2 * std, b=2 * std)

    def forward(self, vectors: dict[str, Tensor], batch: Any) -> Tensor:
        """Makes the encoder's input.

        Args:
            vectors: "item" ``(T, D)`` and, for two of the layouts, "action" ``(T, D)``.
            batch: Gives ``offsets``, ``max_seq_len``, ``index["token_type"]`` (T,) for the interleaved
                layout.

        Returns:
            ``(T, D)``.

        Raises:
            UserError: The layout needs actions and there are none, or a sequence exceeds the position table.
        """
        x = self._merge(vectors, batch)
        if self.scale != 1.0:
            x = x * self.scale
        if self.position is not None:
            if batch.max_seq_len > self.max_tokens:
                raise UserError(
                    f"the model reads sequences of up to {self.max_tokens} tokens but a batch holds one of "
                    f"{batch.max_seq_len}; raise layout.max_events"
                )
            x = x + F.embedding(positions(batch.offsets, x.shape[0]), self.position).to(x.dtype)
        return F.dropout(x, self.config.dropout, self.training)

    def _merge(self, vectors: dict[str, Tensor], batch: Any) -> Tensor:
        item, action = vectors["item"], vectors.get("action")
        if self.layout == "items":
            return item
        if action is None:
            raise UserError(
                f"layout {self.layout!r} needs actions and the data has none; use 'items' or data with actions"
            )
        if self.layout == "added":
            return item + action
        return torch.where((batch.index["token_type"] == 0)[:, None], item, action)
