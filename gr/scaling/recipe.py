"""One dial -> a whole run. All formulas of a recipe stand in one frozen, named dataclass; a changed formula is a new
name, so that runs of two recipes are never mixed."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal

from gr.errors import UserError
from gr.scaling.cells import Cell
from gr.training.config import ScheduleConfig
from gr.training.run_config import RunConfig


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """``s`` is the dial, C the budget in model FLOPs, D the width.

    Attributes:
        name: Its name in RECIPES.
        encoder: Kind of encoder it makes: hstu, or transformer with a feed-forward part of width D.
        width_per_scale: D = width_per_scale * s, rounded to whole heads.
        head_width: Heads = D / head_width; d_qk = d_v = head_width.
        depth_base: Layers = depth_base + depth_per_scale * ceil(s / 2).
        depth_per_scale: See depth_base.
        lr: Peak learning rate at width lr_width.
        lr_width: See lr.
        lr_exponent: lr * (D / lr_width) ** -lr_exponent (Yang et al. 2022, arXiv 2203.03466, find 1 for hidden
            matrices under Adam; tables want 0, and one rate serves both here).
        batch_tokens: Tokens of a batch at budget batch_budget.
        batch_budget: See batch_tokens.
        batch_exponent: batch_tokens * (C / batch_budget) ** batch_exponent (0.3: DeepSeek LLM, arXiv 2401.02954,
            equation 1 has 0.3271).
        max_batch_tokens: No batch is larger.
        length_per_scale: Events of a history that are read, at scale 1; they grow with the dial (HSTU's study grows
            length and width in tandem); ``None``: as the base config says.
        warmup: Share of the steps.
        decay: Share of the steps at the end in which the rate falls to 0; before it is constant (warm-up, stable,
            decay).
        chosen: How these numbers came about; printed with every plan.
    """

    name: str
    encoder: Literal["hstu", "transformer"] = "hstu"
    width_per_scale: int
    head_width: int
    depth_base: int = 2
    depth_per_scale: int = 2
    lr: float
    lr_width: int
    lr_exponent: float
    batch_tokens: float
    batch_budget: float
    batch_exponent: float = 0.3
    max_batch_tokens: float = math.inf
    length_per_scale: int | None = None
    warmup: float = 0.02
    decay: float = 0.2
    chosen: str

    def width(self, scale: float) -> int:
        """D: a whole number of heads, at least one."""
        return max(1, round(self.width_per_scale * scale / self.head_width)) * self.head_width

    def layers(self, scale: float) -> int:
        """Layers."""
        return self.depth_base + self.depth_per_scale * math.ceil(scale / 2)

    def apply(self, base: RunConfig, cell: Cell) -> RunConfig:
        """The base config at a scale: model and learning rate; batch and steps are ``finish``'s.

        Raises:
            UserError: The base's encoder is of another kind, or it stops early.
        """
        if base.model.encoder.kind != self.encoder:
            raise UserError(
                f"recipe {self.name} makes an encoder of kind {self.encoder}, the base config {base.name} has "
                f"{base.model.encoder.kind!r}; give one of encoder.kind {self.encoder}"
            )
        if base.train.early_stopping is not None:
            raise UserError(
                f"the base config {base.name} has train.early_stopping; a run of a study ends when its budget "
                "is spent: set it to null"
            )
        dim, layers = self.width(cell.scale), self.layers(cell.scale)
        widths = {"dim_qk": self.head_width, "dim_v": self.head_width} if self.encoder == "hstu" else {"ffn_dim": dim}
        heads = dim // self.head_width
        encoder = dataclasses.replace(base.model.encoder, num_layers=layers, num_heads=heads, **widths)
        optimizer = dataclasses.replace(base.train.optimizer, lr=self.lr * (dim / self.lr_width) ** -self.lr_exponent)
        layout = base.layout
        if self.length_per_scale is not None:
            layout = dataclasses.replace(layout, max_events=max(1, round(self.length_per_scale * cell.scale)))
        return dataclasses.replace(
            base,
            layout=layout,
            model=dataclasses.replace(base.model, dim=dim, encoder=encoder),
            train=dataclasses.replace(base.train, optimizer=optimizer),
        )

    def batch_size(self, budget: float, mean_tokens: float, num_users: int) -> int:
        """Sequences of a batch, at most the users there are."""
        tokens = self.batch_tokens * (budget / self.batch_budget) ** self.batch_exponent
        return min(max(1, round(min(tokens, self.max_batch_tokens) / mean_tokens)), num_users)

    def finish(self, config: RunConfig, steps: int, epochs: int) -> RunConfig:
        """The config with its length and schedule."""
        warmup = min(max(1, round(self.warmup * steps)), max(0, steps - 1))
        schedule = ScheduleConfig(kind="wsd", warmup_steps=warmup, final_ratio=0.0, decay_fraction=self.decay)
        train = dataclasses.replace(config.train, epochs=epochs, max_steps=steps, schedule=schedule)
        return dataclasses.replace(config, train=train)


HSTU_WIDTH_1 = Recipe(
    name="hstu-width-1",
    width_per_scale=8,
    head_width=8,
    depth_base=2,
    depth_per_scale=0,
    lr=0.004,
    lr_width=64,
    lr_exponent=0.5,
    batch_tokens=1100.0,
    batch_budget=1e12,
    max_batch_tokens=16384.0,
    chosen="two layers, the dial is the width; the learning rate is the best of three (a factor 2 apart) at "
    "width 32 and 1e11 FLOPs on a planted world; its change with width and the batch's with budget are taken "
    "from language models",
)

HSTU_WIDTH_2 = dataclasses.replace(
    HSTU_WIDTH_1,
    name="hstu-width-2",
    warmup=0.1,
    chosen="hstu-width-1 with a longer warm-up (with 2 % one of two seeds was 4 % behind at width 96, 1e12 FLOPs); its "
    "rates are within 1.4 % in loss of the best of four, a factor 2 apart, by validation, which lay at an end of the "
    "grid in three of four cells (benchmarks/results/scaling_planted_2/rates.jsonl)",
)

RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            name="hstu-cpu-1",
            width_per_scale=16,
            head_width=16,
            depth_base=1,
            depth_per_scale=1,
            lr=0.004,
            lr_width=64,
            lr_exponent=0.5,
            batch_tokens=1100.0,
            batch_budget=1e12,
            max_batch_tokens=16384.0,
            chosen="the learning rate at its reference width is that of configs/quickstart.yaml; its change with width "
            "and the batch's with budget are taken from language models and not verified here",
        ),
        HSTU_WIDTH_1,
        dataclasses.replace(
            HSTU_WIDTH_1,
            name="hstu-tandem-1",
            length_per_scale=8,
            chosen="as hstu-width-1, and histories grow with the width, 8 events at scale 1; this growth was not tuned",
        ),
        dataclasses.replace(
            HSTU_WIDTH_1,
            name="sasrec-width-1",
            encoder="transformer",
            chosen="as hstu-width-1, the learning rate the better of two in the same search",
        ),
        HSTU_WIDTH_2,
        dataclasses.replace(
            HSTU_WIDTH_2,
            name="sasrec-width-2",
            encoder="transformer",
            chosen="as hstu-width-2; its rates are the best of the same four, or within 1 % of it, at the same cells",
        ),
    )
}


def find_recipe(name: str) -> Recipe:
    """A recipe by name.

    Raises:
        UserError: There is none.
    """
    if name not in RECIPES:
        raise UserError(f"recipe {name!r} is unknown; there are {', '.join(RECIPES)}")
    return RECIPES[name]
