"""The preprocessor: layouts, scale, positions, and what it refuses."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from gr.errors import UserError
from gr.modules.preprocess import Preprocessor, PreprocessorConfig, positions


def batch_of(lengths, token_type=None):
    index = {} if token_type is None else {"token_type": torch.tensor(token_type)}
    return SimpleNamespace(offsets=torch.tensor([0, *lengths]).cumsum(0), max_seq_len=max(lengths), index=index)


def test_positions_count_from_zero_in_each_sequence():
    assert positions(torch.tensor([0, 3, 3, 5]), 5).tolist() == [0, 1, 2, 0, 1]
    assert positions(torch.tensor([0]), 0).tolist() == []


def test_items_are_scaled_and_get_their_position():
    module = Preprocessor(PreprocessorConfig(), 9, 4).eval()
    item = torch.randn(5, 9)
    out = module({"item": item}, batch_of([3, 2]))
    torch.testing.assert_close(out, 3.0 * item + module.position[[0, 1, 2, 0, 1]])


def test_scale_and_positions_can_be_off():
    module = Preprocessor(PreprocessorConfig(scale=False, position="none"), 9, 4).eval()
    item = torch.randn(5, 9)
    assert torch.equal(module({"item": item}, batch_of([5])), item)
    assert list(module.parameters()) == []


def test_layouts_take_actions_as_they_say():
    item, action = torch.randn(4, 2), torch.randn(4, 2)
    batch = batch_of([4], token_type=[0, 1, 0, 1])

    def run(layout):
        config = PreprocessorConfig(scale=False, position="none")
        return Preprocessor(config, 2, 8, layout).eval()({"item": item, "action": action}, batch)

    torch.testing.assert_close(run("added"), item + action)
    torch.testing.assert_close(run("interleaved"), torch.stack([item[0], action[1], item[2], action[3]]))
    torch.testing.assert_close(run("items"), item)


@pytest.mark.parametrize(("init", "std"), [("truncated_normal", 0.88 * 0.25), ("xavier", (2 / 216) ** 0.5)])
def test_position_init_is_that_of_the_reference(init, std):
    torch.manual_seed(0)
    module = Preprocessor(PreprocessorConfig(position_init=init), 16, 200)
    assert module.position.std().item() == pytest.approx(std, rel=0.05)


def test_dropout_acts_on_the_input_in_training_only():
    module = Preprocessor(PreprocessorConfig(dropout=0.5, scale=False, position="none"), 64, 200)
    item = torch.ones(8, 64)
    assert set(module({"item": item}, batch_of([8])).unique().tolist()) == {0.0, 2.0}
    assert torch.equal(module.eval()({"item": item}, batch_of([8])), item)


def test_too_long_a_sequence_and_missing_actions_are_refused():
    with pytest.raises(UserError, match="up to 2 tokens .* one of 3"):
        Preprocessor(PreprocessorConfig(), 4, 2)({"item": torch.zeros(3, 4)}, batch_of([3]))
    with pytest.raises(UserError, match="layout 'added' needs actions and the data has none"):
        Preprocessor(PreprocessorConfig(), 4, 3, "added")({"item": torch.zeros(3, 4)}, batch_of([3]))


@pytest.mark.parametrize(("field", "value"), [("dropout", 1.0), ("dropout", -0.1)])
def test_an_impossible_preprocessor_value_names_the_field(field, value):
    with pytest.raises(UserError, match=f"preprocessor.{field}"):
        PreprocessorConfig(**{field: value})
