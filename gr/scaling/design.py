"""What a study is: its variants, the cells of its design, its limits. Read from YAML; needs no torch."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from gr import config as configs
from gr.config import runtime
from gr.errors import UserError

INSTALLED = Path(__file__).resolve().parent.parent / "configs"


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One point of a design, before it is a run.

    Attributes:
        scale: The dial of the recipe.
        budget: Model FLOPs to spend.
    """

    scale: float
    budget: float


def _positive(name: str, values: tuple[float, ...]) -> None:
    if not values or len(set(values)) < len(values) or min(values) <= 0:
        raise UserError(f"{name} is {list(values)}; it must be different numbers above 0")


@dataclass(frozen=True, kw_only=True)
class Design:
    """Every budget at every scale: steps follow from the budget."""

    budgets: tuple[float, ...]
    scales: tuple[float, ...]

    def __post_init__(self) -> None:
        _positive("design.budgets", self.budgets)
        _positive("design.scales", self.scales)

    def cells(self) -> list[Cell]:
        """In the order of the file."""
        return [Cell(scale=s, budget=c) for c, s in itertools.product(self.budgets, self.scales)]


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A model of the study.

    Attributes:
        base: Config of ``gr-train`` with everything that the recipe does not derive; looked for beside the study's
            file, where the command runs, and among the installed ones.
        recipe: Name in ``gr.scaling.recipe.RECIPES``.
        overrides: As on the command line of ``gr-train``, for instance ``--data.num_users=4000``.
    """

    base: str
    recipe: str
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Seeds:
    """How many seeds a cell has; those of the smallest budget tell the noise."""

    default: int = 1
    smallest_budget: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.default <= self.smallest_budget:
            raise UserError(
                f"seeds are default {self.default}, smallest_budget {self.smallest_budget}; "
                "need 1 <= default <= smallest_budget"
            )


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Cells beyond these are left out of the plan, with the reason.

    Attributes:
        min_steps: Shorter runs are mostly warm-up.
        max_epochs: Longer runs repeat their data more often.
        flop_tolerance: How far a run may be from its budget, relative.
    """

    min_steps: int = 100
    max_epochs: float = 8.0
    flop_tolerance: float = 0.01


@dataclass(frozen=True, kw_only=True)
class Holdout:
    """Runs of these budgets are predicted, never fitted."""

    budgets: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Judging:
    """How every run of the study is judged, the same for all.

    Attributes:
        users: Test targets, an even sample; 0: all.
        ks: Cut-offs of HR and NDCG.
    """

    users: int = 0
    ks: tuple[int, ...] = (10, 50)

    def __post_init__(self) -> None:
        if self.users < 0 or not self.ks or min(self.ks) < 1:
            raise UserError(f"judging has users {self.users}, ks {list(self.ks)}; users >= 0 and ks positive")


@dataclass(frozen=True, kw_only=True)
class Study:
    """A study. ``variants``, ``design``, ``seeds``, ``limits`` and ``judging`` decide what is run.

    Attributes:
        name: Its folder is ``<out>/<name>``.
        variants: Name -> model; each is fitted by itself.
        design: Which cells.
        seeds: How many of each.
        limits: What is left out.
        holdout: What is predicted only.
        judging: How runs are judged.
        executor: ``inline``: in the driver's process, one after the other; ``local``: a process a run.
        max_parallel: Processes at a time.
        flops_per_s: Model FLOP/s of a device, for prices before anything was measured; ``None``: unknown.
        out: Folder of studies.
        cache: Folder of prepared data.
        device: As in a run's config.
    """

    name: str
    variants: dict[str, Variant]
    design: Design
    seeds: Seeds = field(default_factory=Seeds)
    limits: Limits = field(default_factory=Limits)
    holdout: Holdout = field(default_factory=Holdout)
    judging: Judging = field(default_factory=Judging)
    executor: Literal["inline", "local"] = runtime("local")
    max_parallel: int = runtime(1)
    flops_per_s: float | None = runtime(None)
    out: str = runtime("runs/scaling")
    cache: str = runtime("cache")
    device: Literal["auto", "cpu", "cuda"] = runtime("auto")

    def __post_init__(self) -> None:
        configs.check_name(self.name, "study")
        if not self.variants:
            raise UserError("variants is empty; a study needs at least one model")
        if self.max_parallel < 1 or (self.flops_per_s is not None and self.flops_per_s <= 0):
            raise UserError("max_parallel must be at least 1, and flops_per_s above 0 or null")
        budgets = self.design.budgets
        strange = [c for c in self.holdout.budgets if c not in budgets]
        if strange:
            raise UserError(f"holdout.budgets has {strange[0]:g}, which is none of design.budgets; take one of those")
        if not set(budgets) - set(self.holdout.budgets):
            raise UserError("holdout.budgets holds every budget of the design; leave some to fit")

    @property
    def folder(self) -> Path:
        """Where its files lie."""
        return Path(self.out) / self.name


def load_study(name: str, overrides: tuple[str, ...] | list[str] = ()) -> tuple[Study, Path]:
    """A study and the file it came from; ``configs/scaling/x.yaml`` works outside a checkout, too.

    Raises:
        UserError: No such file, or wrong fields.
    """
    path = Path(name)
    if not path.exists():
        inside = INSTALLED / "scaling" / path.name
        if inside.exists() and path.parent.name in ("scaling", ""):
            path = inside
        elif path.suffix not in (".yaml", ".yml"):
            raise UserError(f"{name!r} is not a study; give a .yaml file, for instance configs/scaling/tiny.yaml")
    return configs.load(Study, path, overrides), path


def find_base(name: str, study_file: Path) -> Path:
    """The file of a variant's base config.

    Raises:
        UserError: It is nowhere.
    """
    places = [study_file.parent / name, Path(name), INSTALLED / "scaling" / Path(name).name]
    for place in [*places, INSTALLED / Path(name).name]:
        if place.is_file():
            return place
    raise UserError(f"{study_file}: base {name!r} is neither beside it, nor here, nor among the installed configs")
