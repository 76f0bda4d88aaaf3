"""What the law of a planted study's world scores on the study's own targets, with and without seeing times.

    python -m benchmarks.scaling.best_possible STUDY.yaml [--variant NAME]

Prints its loss, its HR and NDCG on the targets as they fell, and what is expected of it; no model is trained.
"""

from __future__ import annotations

import argparse

import numpy as np

from gr.data.ceiling import ceiling, ideal_scores
from gr.data.planted import PlantedConfig
from gr.evaluation.metrics import summarise
from gr.evaluation.ranking import Ranks
from gr.scaling.design import load_study
from gr.scaling.plan import judged_targets, open_bench


def main() -> None:
    """Command line."""
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument("study")
    parse.add_argument("--variant")
    args, rest = parse.parse_known_args()
    study, path = load_study(args.study, rest)
    bench = open_bench(study, path, args.variant or next(iter(study.variants)))
    targets, world, ks = judged_targets(bench.split, study.judging.users), bench.base.data, tuple(study.judging.ks)
    assert isinstance(world, PlantedConfig), "the world's law is known of a planted log only"
    items = bench.store.num_items
    for see_times in (True, False):
        losses, better = ideal_scores(bench.store, world, targets, see_times)
        wanted = bench.store.columns["item_id"][bench.store.offsets[targets.user] + targets.position]
        ranks = Ranks(
            user=targets.user, position=targets.position, target=wanted, better=better,
            tied=np.zeros_like(better), candidates=np.full_like(better, items), num_items=items,
        )  # fmt: skip
        seen = {name: round(found.mean, 4) for name, found in summarise(ranks, ks).items()}
        expected = {k: round(v, 4) for k, v in ceiling(bench.store, world, targets, ks, see_times).items()}
        print(f"{'with' if see_times else 'without'} times: loss {losses.mean():.4f}, {seen}; expected {expected}")


if __name__ == "__main__":
    main()
