"""The baselines by name, and the settings that tuning tries for each."""

from __future__ import annotations

from typing import Any

from gr.config import Registry, build
from gr.evaluation.baselines.base import CountingRecommender
from gr.evaluation.baselines.item_knn import ItemKNN, ItemKNNConfig
from gr.evaluation.baselines.markov import Markov, MarkovConfig
from gr.evaluation.baselines.popularity import Popularity, PopularityConfig
from gr.evaluation.baselines.repeat_last import RepeatLast, RepeatLastConfig
from gr.evaluation.baselines.statistics import TrainingStatistics

BASELINES: Registry = {
    "popularity": (PopularityConfig, Popularity),
    "repeat_last": (RepeatLastConfig, RepeatLast),
    "markov": (MarkovConfig, Markov),
    "item_knn": (ItemKNNConfig, ItemKNN),
}
LABELS = {"popularity": "Popularity", "repeat_last": "RepeatLast", "markov": "Markov", "item_knn": "ItemKNN"}

# 24 settings of ItemKNN: what stood near the last few items, over direction, reach and damping; and long
# memories, from the sequence-aware form to the cosine form. Window 10 is the longest, since pairs cost memory.
GRIDS: dict[str, list[Any]] = {
    "popularity": [PopularityConfig()],
    "repeat_last": [RepeatLastConfig()],
    "markov": [MarkovConfig(backoff=w) for w in (0.1, 1.0, 10.0, 100.0, 1000.0)],
    "item_knn": [
        ItemKNNConfig(window=window, history=window, direction=direction, popularity_exponent=damping)
        for direction in ("after", "both")
        for window in (5, 3, 10)
        for damping in (0.25, 0.5)
    ]
    + [
        ItemKNNConfig(
            window=10,
            history=50,
            decay=decay,
            direction=direction,
            popularity_exponent=target,
            source_exponent=source,
        )
        for direction in ("after", "both")
        for decay in (0.8, 0.9, 1.0)
        for target, source in ((0.25, 0.0), (0.5, 0.5))
    ],
}


def fit(config: Any, store: Any, split: Any, statistics: TrainingStatistics | None = None) -> CountingRecommender:
    """Fits a baseline on training events only.

    The same fit serves validation and test: at test a history holds the validation event, but nothing is
    counted from it, exactly as the model does not train on it.
    """
    return build(BASELINES, config, statistics or TrainingStatistics(store, split))
