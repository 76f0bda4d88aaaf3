"""Impossible training settings are one sentence naming the field and the value."""

from __future__ import annotations

import pytest

from gr.config import config_hash, from_dict, to_dict
from gr.errors import UserError
from gr.training.config import EarlyStoppingConfig, OptimizerConfig, ScheduleConfig, TrainConfig


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"epochs": 0}, r"epochs is 0; it must be at least 1"),
        ({"max_steps": 0}, r"max_steps is 0; it must be at least 1, or null"),
        ({"clip_norm": -1.0}, r"clip_norm is -1.0; it must be above 0"),
        ({"accumulate": 0}, r"accumulate is 0"),
        ({"evaluate_every_epochs": 0}, r"evaluate_every_epochs is 0"),
        ({"keep_last": 0}, r"keep_last is 0"),
        ({"log_every_steps": 0}, r"log_every_steps is 0"),
        ({"checkpoint_every_steps": -1}, r"checkpoint_every_steps is -1"),
        ({"precision": "fp16"}, r"precision is 'fp16'"),
        ({"optimizer": {"lr": 0.0}}, r"train.yaml: optimizer: lr is 0.0; it must be above 0"),
        ({"optimizer": {"lr": float("nan")}}, r"lr is nan"),
        ({"optimizer": {"betas": [0.9, 1.0]}}, r"betas is \(0.9, 1.0\)"),
        ({"optimizer": {"eps": 0.0}}, r"eps is 0.0"),
        ({"optimizer": {"weight_decay": -0.1}}, r"weight_decay is -0.1"),
        ({"optimizer": {"table_lr_factor": -1}}, r"table_lr_factor is -1"),
        ({"schedule": {"kind": "cosin"}}, r"did you mean 'cosine'"),
        ({"schedule": {"warmup_steps": -1}}, r"warmup_steps is -1"),
        ({"schedule": {"final_ratio": 1.5}}, r"final_ratio is 1.5"),
        ({"schedule": {"decay_fraction": 2.0}}, r"decay_fraction is 2.0"),
        ({"early_stopping": {"patience": -1}}, r"patience is -1"),
        ({"early_stopping": {"min_delta": -1.0}}, r"min_delta is -1.0"),
    ],
)
def test_an_impossible_value_is_named(raw, message):
    with pytest.raises(UserError, match=message):
        from_dict(TrainConfig, raw, "train.yaml")


def test_a_config_survives_its_own_yaml_form():
    config = TrainConfig(
        optimizer=OptimizerConfig(betas=(0.9, 0.95)),
        schedule=ScheduleConfig("wsd", 10),
        early_stopping=EarlyStoppingConfig(),
        max_steps=7,
    )
    assert from_dict(TrainConfig, to_dict(config)) == config


def test_settings_that_change_nothing_learned_are_left_out_of_the_hash():
    base = config_hash(TrainConfig())
    assert config_hash(TrainConfig(keep_last=9, log_every_steps=1, checkpoint_every_steps=5, tensorboard=False)) == base
    assert config_hash(TrainConfig(accumulate=2)) != base
