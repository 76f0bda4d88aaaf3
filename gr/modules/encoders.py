"""The sequence encoders by name: ``kind`` -> (config class, builder ``(config, dim, max_tokens) -> Module``).

A SequenceEncoder is called as ``encoder(x, batch)`` with ``x`` ``(T, D)`` and returns ``(T, D)``;
``encoder.last(x, batch)``, if it has that, ``(B, D)``: the same but for rounding at the last token of each row alone.
Of the batch it reads ``offsets``, ``max_seq_len``, ``tokens["timestamp"]`` and ``tokens["query_time"]`` (only with a
time bias), ``rows["num_targets"]`` and ``rows["num_contextual"]`` (if there are any). It also says what it
costs: ``encoder.forward_flops(tokens, encoder.pairs(batch))``; and whether it ``needs_times``. ``max_tokens`` is
the longest sequence that the layout writes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from gr.modules.hstu import HSTUConfig, build_hstu
from gr.modules.transformer import TransformerConfig, build_transformer

ENCODERS: dict[str, tuple[type, Callable[[Any, int, int], nn.Module]]] = {
    "hstu": (HSTUConfig, build_hstu),
    "transformer": (TransformerConfig, build_transformer),
}
