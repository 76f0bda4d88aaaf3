"""Slow controls on the default world's law; `make test-all` runs them."""

from __future__ import annotations

import numpy as np
import pytest

from gr import config as configs
from gr.distributed.process import ProcessContext
from gr.evaluation.baselines import fit
from gr.evaluation.baselines.popularity import PopularityConfig
from gr.evaluation.controls import shuffle_targets
from gr.evaluation.metrics import per_target
from gr.evaluation.ranking import rank_targets
from gr.training.assemble import assemble, eval_loader, open_data, train_loader
from gr.training.phase import Phase
from gr.training.run_config import RunConfig
from gr.training.trainer import Trainer
from tiny_runs import ROOT

ALONE = ProcessContext()


@pytest.mark.slow
def test_on_the_planted_world_with_shuffled_targets_hstu_is_no_better_than_popularity(tmp_path):
    overrides = ["--data.num_users=6000", "--train.epochs=4", "--train.early_stopping=null", f"--cache={tmp_path}"]
    config = configs.load(RunConfig, ROOT / "configs" / "quickstart.yaml", overrides)
    store, split = open_data(config)
    shuffled = shuffle_targets(store, split, 0)
    popularity = rank_targets(
        fit(PopularityConfig(), store, split), eval_loader(config, store, split.test, ALONE), False
    )

    def hits(log, folder):
        model = assemble(config, log, split)
        loader = train_loader(config, log, split, ALONE)
        Trainer(model, [Phase()], loader, None, config.train, ALONE, tmp_path / folder, 0).fit()
        return per_target(rank_targets(model, eval_loader(config, store, split.test, ALONE), False), "hr@10")

    bar = per_target(popularity, "hr@10")
    control = hits(shuffled, "control") - bar
    learned = hits(store, "real") - bar
    error = control.std() / np.sqrt(len(control))
    assert control.mean() < 3 * error
    assert learned.mean() > 10 * error
