"""The HSTU encoder (arXiv 2402.17152): one layer, named presets for the two layers that the reference has.

``paper`` is the research code of the paper's public experiments: relative attention bias, SiLU on all of U,
V, Q, K, a gate. ``dlrm_v3`` is the production layer: scaled scores, SiLU on U, affine norms, ``[U, AV, U *
Norm(AV)]``. Each difference between them is one field of :class:`HSTUConfig`; a field left at None takes its
preset's value.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gr import flops
from gr.config import runtime
from gr.errors import UserError
from gr.kernels.hstu_attention import Mask, RelativeBias, choose_backend, hstu_attention, visible_pairs
from gr.modules.stack import run_layers

NORM_EPS = 1e-6


@dataclass(frozen=True, kw_only=True)
class HSTUConfig:
    """A stack of HSTU layers. None in the second group means "as the preset has it".

    Attributes:
        preset: "paper" or "dlrm_v3".
        num_layers: Layers.
        num_heads: H.
        dim_qk: Width of a head's queries and keys.
        dim_v: Width of a head's values.
        dropout: On the input of the output projection.
        num_time_buckets: Rows of the time table.
        window: Largest distance that is seen; None is no limit.
        full_tail: With ``window``, the newest tokens that ignore it.
        target_group: Consecutive targets that see each other; None is 1.
        causal: False lets history see all history.
        input_norm_affine: Weight and bias in the input LayerNorm.
        uvqk_bias: Bias of the first projection (starts at 0).
        uvqk_init: "normal" N(0, 0.02) or "xavier" uniform.
        activated: Which of u, v, q, k pass through SiLU, as a string of these letters.
        alpha: Scale of the scores; for dlrm_v3 1/sqrt(dim_qk).
        position_bias: Learned bias of a score by distance, one table a layer.
        time_bias: Learned bias of a score by time, one table a layer; needs timestamps.
        position_ids: What the position bias counts: tokens, or the mask's ids, where all targets share one.
        divisor: A number, "visible" (keys that the query sees) or "length" (the sequence's own: beware, it
            tells a position how long its future is). None is the longest
            sequence that the model reads, in tokens. The reference's production path
            divides by the batch's own maximum; here a user's output never depends on batch-mates.
        output_norm: "layer" over all heads, or "group", one group a head.
        output_norm_affine: Weight and bias in the output norm (with "group" one entry a head).
        gate_activation: On U where it gates, beyond ``activated``.
        concat: Input of the output projection: "none" U*a, "ua" [U, a, U*a], "u_av_uav" [U, AV, U*a] with AV
            not normalised; a = Norm(AV).
        output_bias: Bias of the output projection.
        contextual_mask: Contextual tokens see each other and all history. The reference's shipped production
            model leaves this off, so there they are ordinary causal tokens.
        backend: Of the attention operator.
        activation_checkpointing: Layers run again in the backward pass instead of keeping what they computed.
        deterministic: The same bits in every run; on a GPU only the triton backend does, and slower.
    """

    kind: str = "hstu"
    preset: Literal["paper", "dlrm_v3"] = "paper"
    num_layers: int = 2
    num_heads: int = 1
    dim_qk: int = 50
    dim_v: int = 50
    dropout: float = 0.2
    num_time_buckets: int = 129
    window: int | None = None
    full_tail: int | None = None
    target_group: int | None = None
    causal: bool = True

    input_norm_affine: bool | None = None
    uvqk_bias: bool | None = None
    uvqk_init: Literal["normal", "xavier"] | None = None
    activated: str | None = None
    alpha: float | None = None
    position_bias: bool | None = None
    time_bias: bool | None = None
    position_ids: Literal["index", "target_clamped"] | None = None
    divisor: float | Literal["visible", "length"] | None = None
    output_norm: Literal["layer", "group"] | None = None
    output_norm_affine: bool | None = None
    gate_activation: Literal["none", "silu", "sigmoid"] | None = None
    concat: Literal["none", "ua", "u_av_uav"] | None = None
    output_bias: bool | None = None
    contextual_mask: bool | None = None

    backend: str = runtime("auto")
    activation_checkpointing: bool = runtime(False)
    deterministic: bool = False

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            raise UserError(f"encoder.preset must be one of {', '.join(PRESETS)}, got {self.preset!r}")
        for name in ("num_layers", "num_heads", "dim_qk", "dim_v", "num_time_buckets"):
            if getattr(self, name) < 1:
                raise UserError(f"encoder.{name} must be at least 1, got {getattr(self, name)}")
        if self.alpha is not None and not math.isfinite(self.alpha):
            raise UserError(f"encoder.alpha must be a finite number, got {self.alpha}")
        for name in ("window", "full_tail", "target_group"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"encoder.{name} must be at least 1, or null for none, got {value}")
        if self.full_tail is not None and self.window is None:
            raise UserError("encoder.full_tail has no effect without encoder.window; set a window or leave it out")
        if not 0.0 <= self.dropout < 1.0:
            raise UserError(f"encoder.dropout must be in [0, 1), got {self.dropout}")
        if isinstance(self.divisor, int | float) and not 0 < self.divisor < math.inf:
            raise UserError(f"encoder.divisor must be positive, 'visible' or 'length', got {self.divisor}")
        if self.activated is not None and (
            not set(self.activated) <= set("uvqk") or len(set(self.activated)) < len(self.activated)
        ):
            raise UserError(f"encoder.activated must be letters of 'uvqk', each at most once, got {self.activated!r}")


# Rows of the table of differences (the reference's two layers); what both share stands in HSTUConfig.
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {
        "input_norm_affine": False,
        "uvqk_bias": False,
        "uvqk_init": "normal",
        "activated": "uvqk",
        "alpha": 1.0,
        "position_bias": True,
        "time_bias": True,
        "position_ids": "index",
        "output_norm": "layer",
        "output_norm_affine": False,
        "gate_activation": "none",
        "concat": "none",
        "output_bias": True,
        "contextual_mask": True,
    },
    "dlrm_v3": {
        "input_norm_affine": True,
        "uvqk_bias": True,
        "uvqk_init": "xavier",
        "activated": "u",
        "alpha": None,  # 1 / sqrt(dim_qk)
        "position_bias": False,
        "time_bias": False,
        "position_ids": "target_clamped",
        "output_norm": "layer",
        "output_norm_affine": True,
        "gate_activation": "none",
        "concat": "u_av_uav",
        "output_bias": False,
        "contextual_mask": False,
    },
}


def resolve(config: HSTUConfig, max_tokens: int) -> HSTUConfig:
    """The same config with no choice left at None. Resolving twice changes nothing."""
    values = {name: value for name, value in PRESETS[config.preset].items() if getattr(config, name) is None}
    if "alpha" in values and values["alpha"] is None:
        values["alpha"] = config.dim_qk**-0.5
    if config.divisor is None:
        values["divisor"] = float(max_tokens)
    return dataclasses.replace(config, **values)


class HSTULayer(nn.Module):
    """``x + f2(gate(U, AV))`` with ``U, V, Q, K = f1(Norm(x))``; takes a resolved config.

    ``project`` and ``combine`` are the layer without its attention, for callers that bring their own
    (caches).
    """

    def __init__(self, config: HSTUConfig, dim: int, max_tokens: int) -> None:
        super().__init__()
        self.config = config
        heads, dim_qk, dim_v = config.num_heads, config.dim_qk, config.dim_v
        self.splits = (heads * dim_v, heads * dim_v, heads * dim_qk, heads * dim_qk)  # U, V, Q, K
        norm_width = heads if config.output_norm == "group" else heads * dim_v
        out_in_dim = heads * dim_v * (1 if config.concat == "none" else 3)
        self.dim = dim

        self.input_norm = _affine(dim, config.input_norm_affine)
        self.uvqk = nn.Linear(dim, sum(self.splits), bias=config.uvqk_bias)
        self.output_norm = _affine(norm_width, config.output_norm_affine)
        self.out = nn.Linear(out_in_dim, dim, bias=config.output_bias)
        self.position_table = nn.Parameter(torch.empty(2 * max_tokens - 1)) if config.position_bias else None
        self.time_table = nn.Parameter(torch.empty(config.num_time_buckets)) if config.time_bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initial values of the reference; the output bias keeps nn.Linear's own."""
        if self.config.uvqk_init == "normal":
            nn.init.normal_(self.uvqk.weight, std=0.02)
        else:
            nn.init.xavier_uniform_(self.uvqk.weight)
        if self.uvqk.bias is not None:
            nn.init.zeros_(self.uvqk.bias)
        nn.init.xavier_uniform_(self.out.weight)
        for table in (self.position_table, self.time_table):
            if table is not None:
                nn.init.normal_(table, std=0.02)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """``(T, D)`` -> U ``(T, H*d_v)``, V ``(T, H, d_v)``, Q and K ``(T, H, d_qk)``."""
        u, v, q, k = self._parts(self._normed(x), "uvqk")
        return u, v, q, k

    def _normed(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, (self.dim,), *_weights(self.input_norm), eps=NORM_EPS)

    def _parts(self, normed: Tensor, names: str) -> list[Tensor]:
        """Some of U, V, Q, K, named by letters of "uvqk" in this order, in the shapes of :meth:`project`."""
        config = self.config
        widths = [width for name, width in zip("uvqk", self.splits, strict=True) if name in names]
        values = self.uvqk(normed) if names == "uvqk" else F.linear(normed, *self._rows(names))
        if set(names) <= set(config.activated):
            # A layer's largest tensor: without gradients there is one of it, not two.
            parts = F.silu(values, inplace=not torch.is_grad_enabled()).split(widths, dim=1)
        else:
            each = zip(names, values.split(widths, dim=1), strict=True)
            parts = [F.silu(part) if name in config.activated else part for name, part in each]
        each = zip(names, parts, strict=True)
        return [part if name == "u" else part.unflatten(1, (config.num_heads, -1)) for name, part in each]

    def _rows(self, names: str) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of some of U, V, Q, K."""
        wanted = ["uvqk".index(name) for name in names]
        both = (self.uvqk.weight, self.uvqk.bias)
        parts = (None if whole is None else whole.split(self.splits) for whole in both)
        weight, bias = (None if part is None else torch.cat([part[i] for i in wanted]) for part in parts)
        return weight, bias

    def combine(self, x: Tensor, u: Tensor, av: Tensor) -> Tensor:
        """Residual ``x`` ``(T, D)``, gate ``(T, H*d_v)``, attention ``(T, H, d_v)`` -> ``(T, D)``."""
        config = self.config
        weight, bias = _weights(self.output_norm)
        if config.output_norm == "group":
            normed = F.group_norm(av, config.num_heads, weight, bias, eps=NORM_EPS).flatten(1)
        else:
            normed = F.layer_norm(av.flatten(1), (self.splits[1],), weight, bias, eps=NORM_EPS)
        gate = u
        if config.gate_activation != "none":
            gate = F.silu(u) if config.gate_activation == "silu" else torch.sigmoid(u)
        y = gate * normed
        if config.concat == "ua":
            y = torch.cat((gate, normed, y), dim=1)
        elif config.concat == "u_av_uav":
            y = torch.cat((gate, av.flatten(1), y), dim=1)
        return x + self.out(F.dropout(y, config.dropout, self.training))

    def bias(self, shared: RelativeBias) -> RelativeBias | None:
        """This layer's tables with what all layers share."""
        if self.position_table is None and self.time_table is None:
            return None
        return dataclasses.replace(shared, position_table=self.position_table, time_table=self.time_table)

    def forward(self, x: Tensor, batch: Any, mask: Mask, divisor: Any, shared: RelativeBias) -> Tensor:
        u, v, q, k = self.project(x)
        return self.combine(x, u, self._attend(q, k, v, batch.offsets, None, batch, mask, divisor, shared))

    def last(self, x: Tensor, batch: Any, mask: Mask, divisor: Any, shared: RelativeBias) -> Tensor:
        """:meth:`forward` at the last token of each row alone, ``(B, D)``; no row may be empty.

        All tokens are still keys and values; a single query a row is the operator's delta form.
        """
        at = batch.offsets[1:] - 1
        normed = self._normed(x)
        v, k = self._parts(normed, "vk")
        u, q = self._parts(normed.index_select(0, at), "uq")
        if isinstance(divisor, Tensor):
            divisor = divisor.index_select(0, at)
        if shared.query_times is not None:
            shared = dataclasses.replace(shared, query_times=shared.query_times.index_select(0, at))
        queries = torch.arange(at.shape[0] + 1, dtype=batch.offsets.dtype, device=at.device)
        av = self._attend(q, k, v, queries, batch.offsets, batch, mask, divisor, shared)
        return self.combine(x.index_select(0, at), u, av)

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        q_offsets: Tensor,
        kv_offsets: Tensor | None,
        batch: Any,
        mask: Mask,
        divisor: Any,
        shared: RelativeBias,
    ) -> Tensor:
        config = self.config
        return hstu_attention(
            q,
            k,
            v,
            q_offsets,
            kv_offsets,
            max_seq_len=batch.max_seq_len,
            divisor=divisor,
            alpha=config.alpha,
            mask=mask,
            bias=self.bias(shared),
            deterministic=config.deterministic,
            backend=config.backend,
        )


class HSTU(nn.Module):
    """A SequenceEncoder: ``(x (T, D), batch) -> (T, D)``."""

    def __init__(self, config: HSTUConfig, dim: int, max_tokens: int) -> None:
        super().__init__()
        try:
            choose_backend(config.backend)
        except ValueError as error:
            raise UserError(f"encoder.backend: {error}") from None
        self.config = resolve(config, max_tokens)
        self.dim, self.max_tokens = dim, max_tokens
        self.layers = nn.ModuleList(HSTULayer(self.config, dim, max_tokens) for _ in range(config.num_layers))

    @property
    def needs_times(self) -> bool:
        """Whether batches must carry timestamps."""
        return bool(self.config.time_bias)

    def pairs(self, batch: Any) -> int:
        """(query, key) pairs that this encoder's mask leaves, exactly."""
        mask = self.mask(batch)
        if not mask.causal:
            return int(visible_pairs(mask, batch.offsets, max_seq_len=batch.max_seq_len).sum())
        return flops.pairs(
            batch.offsets.diff(),
            mask.num_targets,
            mask.num_contextual,
            mask.window,
            full_tail=mask.full_tail,
            target_group=mask.target_group,
        )

    def mask(self, batch: Any) -> Mask:
        """The mask of a batch."""
        config = self.config
        return Mask(
            causal=config.causal,
            window=config.window,
            full_tail=config.full_tail,
            num_contextual=batch.rows.get("num_contextual") if config.contextual_mask else None,
            num_targets=batch.rows.get("num_targets"),
            target_group=config.target_group,
        )

    def forward(self, x: Tensor, batch: Any) -> Tensor:
        """Encodes a batch.

        Args:
            x: ``(T, D)``.
            batch: Gives ``offsets``, ``max_seq_len``, ``tokens`` and ``rows``.

        Returns:
            ``(T, D)``.

        Raises:
            UserError: A time bias without times, or sequences longer than ``max_tokens``.
        """
        shared = self._shared(batch, x.shape[0])
        again = self.config.activation_checkpointing
        return run_layers(self.layers, x, batch, *shared, activation_checkpointing=again)

    def last(self, x: Tensor, batch: Any) -> Tensor:
        """``(B, D)``, :meth:`forward` at the last token of each row; no row may be empty.

        The same but for rounding, and about a layer's cost cheaper: the last layer makes one query a row.
        """
        shared = self._shared(batch, x.shape[0])
        for layer in self.layers[:-1]:
            x = layer(x, batch, *shared)
        return self.layers[-1].last(x, batch, *shared)

    def _shared(self, batch: Any, num_tokens: int) -> tuple[Mask, Any, RelativeBias]:
        """What all layers share: mask, divisor, and the bias without its tables."""
        config = self.config
        if config.position_bias and batch.max_seq_len > self.max_tokens:
            raise UserError(
                f"the model reads sequences of up to {self.max_tokens} tokens but a batch holds one of "
                f"{batch.max_seq_len}; raise layout.max_events"
            )
        times: dict[str, Tensor] = {}
        if config.time_bias:
            if batch.tokens.get("timestamp") is None or batch.tokens.get("query_time") is None:
                raise UserError(
                    "encoder.time_bias needs timestamps and the data has none; set encoder.time_bias to false"
                )
            times = {"key_times": batch.tokens["timestamp"], "query_times": batch.tokens["query_time"]}
        shared = RelativeBias(position_ids=config.position_ids, **times)
        mask = self.mask(batch)
        divisor: Any = config.divisor
        if divisor == "length":
            # (T, 1) is one entry a query whatever T is; (B,) would be ambiguous where B = T.
            lengths = batch.offsets.diff()
            divisor = lengths.clamp(min=1).repeat_interleave(lengths, output_size=num_tokens)[:, None]
        return mask, divisor, shared

    def forward_flops(self, tokens: int, pairs: int) -> dict[str, int]:
        """FLOPs by component (:mod:`gr.flops`)."""
        config = self.config
        return flops.hstu_flops(
            dim=self.dim,
            num_layers=config.num_layers,
            num_heads=config.num_heads,
            dim_qk=config.dim_qk,
            dim_v=config.dim_v,
            tokens=tokens,
            pairs=pairs,
            out_in_dim=self.layers[0].out.in_features,
        )


def build_hstu(config: HSTUConfig, dim: int, max_tokens: int) -> HSTU:
    """Registered in :data:`gr.modules.encoders.ENCODERS` as "hstu"."""
    return HSTU(config, dim, max_tokens)


def _affine(width: int, affine: bool | None) -> nn.ParameterDict:
    """Weight and bias of a norm, or nothing."""
    if not affine:
        return nn.ParameterDict()
    return nn.ParameterDict({"weight": torch.ones(width), "bias": torch.zeros(width)})


def _weights(norm: nn.ParameterDict) -> tuple[Tensor | None, Tensor | None]:
    return (norm["weight"], norm["bias"]) if len(norm) else (None, None)
