"""Baselines that count and do not learn; every learned number is reported beside them."""

from gr.evaluation.baselines.base import CountingRecommender, setting, top_k
from gr.evaluation.baselines.item_knn import ItemKNN, ItemKNNConfig
from gr.evaluation.baselines.markov import Markov, MarkovConfig
from gr.evaluation.baselines.popularity import Popularity, PopularityConfig
from gr.evaluation.baselines.registry import BASELINES, GRIDS, LABELS, fit
from gr.evaluation.baselines.repeat_last import RepeatLast, RepeatLastConfig
from gr.evaluation.baselines.statistics import TrainingStatistics

__all__ = [
    "BASELINES",
    "GRIDS",
    "LABELS",
    "CountingRecommender",
    "ItemKNN",
    "ItemKNNConfig",
    "Markov",
    "MarkovConfig",
    "Popularity",
    "PopularityConfig",
    "RepeatLast",
    "RepeatLastConfig",
    "TrainingStatistics",
    "fit",
    "setting",
    "top_k",
]
