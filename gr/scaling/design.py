"""What a study is: its variants, its design, its limits. Read from YAML; needs no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from gr import config as configs
from gr.config import OneOf, runtime
from gr.errors import UserError
from gr.scaling.cells import DESIGNS, Cell

INSTALLED = Path(__file__).resolve().parent.parent / "configs"


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
        total_flops: No run is begun that would have the study spend more model FLOPs than these, its earlier runs
            counted; ``None``: no limit.
    """

    min_steps: int = 100
    max_epochs: float = 8.0
    flop_tolerance: float = 0.01
    total_flops: float | None = runtime(None)

    def __post_init__(self) -> None:
        if self.total_flops is not None and self.total_flops <= 0:
            raise UserError(f"limits.total_flops is {self.total_flops:g}; it must be above 0, or null")


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What a run is given, and what a cluster must be told.

    Attributes:
        threads: Threads and cores of a run; ``None``: under ``local`` the machine's shared among ``max_parallel``,
            else 1. Losses of other numbers of threads may differ in their last digits. Where other work keeps the
            cores busy, several threads want OMP_WAIT_POLICY=PASSIVE in the environment, or they wait by spinning.
        gpus: GPUs of a run under ``ray`` (which takes shares) and ``slurm``.
        address: ``HOST:PORT`` of a running Ray; empty: one of our own on this machine.
        retries: Under ``ray``, how often a run is begun again whose machine was lost.
        time: Limit of a Slurm job, for instance 4:00:00; it saves ahead of it and goes back into the queue.
        warn_s: Seconds before that limit at which a run saves.
        sbatch: Further options of sbatch, without the dashes, for instance ``partition=gpu``.
    """

    threads: int | None = None
    gpus: float = 0.0
    address: str = ""
    retries: int = 3
    time: str = ""
    warn_s: int = 180
    sbatch: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if (self.threads is not None and self.threads < 1) or self.gpus < 0 or self.retries < 0 or self.warn_s < 1:
            raise UserError(
                f"threads is {self.threads}, gpus {self.gpus:g}, retries {self.retries}, warn_s {self.warn_s}; need "
                "threads and warn_s of at least 1, gpus and retries of at least 0"
            )


@dataclass(frozen=True, kw_only=True)
class Holdout:
    """Runs of these are predicted, never fitted.

    Attributes:
        budgets: Of the design's.
        tokens: Of a grid's.
    """

    budgets: tuple[float, ...] = ()
    tokens: tuple[float, ...] = ()

    def holds(self, cell: Cell) -> bool:
        """Whether a cell is one of them."""
        return cell.budget in self.budgets or cell.tokens in self.tokens


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
        executor: ``inline``: in the driver's process, one after the other; ``local``: a process a run; ``ray``: a task
            a run; ``slurm``: a job a run; ``print``: prints a command a run and runs nothing.
        resources: What a run is given.
        max_parallel: Runs at a time.
        flops_per_s: Model FLOP/s of a device, for prices before anything was measured; ``None``: unknown.
        out: Folder of studies.
        cache: Folder of prepared data.
        device: As in a run's config.
    """

    name: str
    variants: dict[str, Variant]
    design: Annotated[Any, OneOf(DESIGNS, default="isoflop")]
    seeds: Seeds = field(default_factory=Seeds)
    limits: Limits = field(default_factory=Limits)
    holdout: Holdout = field(default_factory=Holdout)
    judging: Judging = field(default_factory=Judging)
    executor: Literal["inline", "local", "ray", "slurm", "print"] = runtime("local")
    resources: Resources = runtime(Resources())
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
        cells = self.design.cells()
        for name, axis in (("budgets", "budget"), ("tokens", "tokens")):
            has = {getattr(cell, axis) for cell in cells}
            strange = [value for value in getattr(self.holdout, name) if value not in has]
            if strange:
                raise UserError(f"holdout.{name} has {strange[0]:g}, which is none of the design's; take one of those")
        if all(self.holdout.holds(cell) for cell in cells):
            raise UserError("holdout holds every cell of the design; leave some to fit")

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
