"""Everything a run is made of: one frozen dataclass, one YAML file."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from gr.config import OneOf, check_name, runtime, unhashed_default
from gr.data.layout import LayoutConfig
from gr.data.planted import PlantedConfig
from gr.data.sources import SOURCES
from gr.data.split import SPLITS, LeaveOneOutConfig
from gr.distributed.config import DistributedConfig
from gr.errors import UserError
from gr.evaluation.baselines import BASELINES
from gr.evaluation.metrics import metric_names
from gr.evaluation.ranking import SeenRule
from gr.models.objectives import OBJECTIVES, FullSoftmaxConfig
from gr.models.retrieval import ModelConfig
from gr.training.config import TrainConfig


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """How a model is judged.

    Attributes:
        ks: Cut-offs of HR and NDCG.
        mask_seen: Which items that the user has already had leave the candidates: ``false`` none, ``true`` all,
            ``window`` those among the last ``layout.max_events`` events, which are what the encoder reads (as
            arXiv 2402.17152's public code does). Right for logs in which nobody repeats an item; wrong where
            people do.
        batch_size: Histories encoded at a time. Part of the protocol: with it the ranks are the same on any
            number of processes, bit for bit.
        validation_users: Validation targets used during training, an even sample; 0: all.
        baselines: Judged beside the model, tuned on validation.
    """

    ks: tuple[int, ...] = (1, 5, 10, 50)
    mask_seen: SeenRule = False
    batch_size: int = 256
    validation_users: int = 0
    baselines: tuple[str, ...] = ("popularity", "repeat_last", "markov", "item_knn")

    def __post_init__(self) -> None:
        if not self.ks or min(self.ks) < 1 or 10 not in self.ks:
            raise UserError(f"evaluation.ks is {list(self.ks)}; it must be positive and include 10")
        if self.batch_size < 1 or self.validation_users < 0:
            raise UserError("evaluation.batch_size must be at least 1 and evaluation.validation_users at least 0")
        for name in self.baselines:
            if name not in BASELINES:
                raise UserError(f"evaluation.baselines has {name!r}; known are {', '.join(BASELINES)}")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A run.

    Attributes:
        name: Its folder is ``<runs>/<name>``.
        seed: Of weights, order, dropout and negatives. The data have a seed of their own.
        data: Where the log comes from.
        split: What trains and what is held out.
        train_users: So many users train, an even sample, and all are judged: for studies of how much data does; 0: all.
        layout: How events become tokens.
        model: The network.
        objective: The loss and its negatives.
        train: Optimizer, schedule, length, checkpoints.
        evaluation: How the model is judged.
        distributed: How processes share the tables and the rest of the model.
        runs: Folder of run folders.
        cache: Folder of prepared data.
        device: ``auto`` is CUDA where there is one.
        timeout_s: After so many seconds without an answer from the other processes a step counts as failed, and the
            launcher starts all of them again. A few times the slowest step.
    """

    name: str = runtime("run")
    seed: int = 0
    data: Annotated[Any, OneOf(SOURCES)] = field(default_factory=PlantedConfig)
    split: Annotated[Any, OneOf(SPLITS, default="leave_one_out")] = field(default_factory=LeaveOneOutConfig)
    train_users: int = unhashed_default(0)
    layout: LayoutConfig = field(default_factory=LayoutConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    objective: Annotated[Any, OneOf(OBJECTIVES)] = field(default_factory=FullSoftmaxConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    distributed: DistributedConfig = unhashed_default(DistributedConfig())
    runs: str = runtime("runs")
    cache: str = runtime("cache")
    device: Literal["auto", "cpu", "cuda"] = runtime("auto")
    timeout_s: float = runtime(600.0)

    def __post_init__(self) -> None:
        check_name(self.name, "run")
        if not 0 <= self.seed < 2**63:
            raise UserError(f"seed is {self.seed}; it must be at least 0 and below 2**63")
        if self.train_users < 0:
            raise UserError(f"train_users is {self.train_users}; it must be at least 0")
        if not 1 <= self.timeout_s <= 86_400:
            raise UserError(f"timeout_s is {self.timeout_s}; it must be from 1 to 86400 seconds")
        self.distributed.dense.check(self.train.accumulate, self.train.compile)
        stopping = self.train.early_stopping
        if stopping is not None and stopping.metric not in metric_names(self.evaluation.ks):
            raise UserError(
                f"train.early_stopping.metric is {stopping.metric!r}; it must be one of "
                f"{', '.join(metric_names(self.evaluation.ks))}"
            )
        if getattr(self.model.encoder, "causal", True) is False:
            raise UserError(
                "model.encoder.causal is false; every position of these layouts is supervised by the event after it, "
                "which a non-causal encoder would read; it must be true"
            )
