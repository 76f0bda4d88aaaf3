"""A checkpoint is whole, or one sentence says that it is not and what to do."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from gr.errors import UserError
from gr.files import write_atomic
from gr.training.checkpoint import find_checkpoint, load_torch, save_checkpoint
from gr.training.weights import load_weights
from tiny_training import TinyModel, tiny_config, tiny_trainer


def save_three(folder):
    for step in (2, 4, 6):
        save_checkpoint(folder, step, {"x": torch.full((1000,), float(step)), "flops": 2**70, "name": "a"}, 2)


def test_what_is_saved_is_read_and_old_ones_are_removed(tmp_path):
    save_three(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last.json", "step-00000004.pt", "step-00000006.pt"]
    payload = load_torch(find_checkpoint(tmp_path))
    assert payload["x"].tolist() == [6.0] * 1000 and payload["flops"] == 2**70
    assert find_checkpoint(tmp_path / "absent") is None


def test_a_truncated_checkpoint_is_refused_and_the_previous_one_offered(tmp_path):
    save_three(tmp_path)
    path = tmp_path / "step-00000006.pt"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"step-00000006.pt is damaged .*delete it to resume from step-00000004.pt"):
        find_checkpoint(tmp_path)
    path.unlink()
    assert load_torch(find_checkpoint(tmp_path))["x"][0] == 4.0


def test_a_flipped_byte_is_noticed(tmp_path):
    save_three(tmp_path)
    path = tmp_path / "step-00000006.pt"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="its content changed"):
        find_checkpoint(tmp_path)


@pytest.mark.parametrize("keep", [0, 1, 100, 2000])
def test_damaged_weights_are_one_sentence(tmp_path, keep):
    path = tmp_path / "best.pt"
    torch.save({"model": TinyModel().state_dict(), "step": 1, "metrics": {}}, path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match="best.pt is damaged"):
        load_weights(TinyModel(), path)
    path.unlink()
    with pytest.raises(UserError, match="best.pt does not exist"):
        load_weights(TinyModel(), path)


def test_a_damaged_pointer_is_one_sentence(tmp_path):
    save_three(tmp_path)
    for text in ("", "[]", '{"step": 6}'):
        (tmp_path / "last.json").write_text(text)
        with pytest.raises(UserError, match=r"last.json is damaged; delete it"):
            find_checkpoint(tmp_path)
    (tmp_path / "last.json").unlink()
    assert find_checkpoint(tmp_path).name == "step-00000006.pt"


def test_a_checkpoint_cannot_run_code(tmp_path):
    path = tmp_path / "best.pt"
    torch.save({"model": nn.Linear(2, 2)}, path)
    with pytest.raises(UserError, match="damaged"):
        load_torch(path)


def test_a_failed_write_leaves_the_old_file_and_nothing_beside_it(tmp_path):
    path = tmp_path / "file"
    write_atomic(path, lambda file: file.write(b"old"))

    def full(file):
        file.write(b"new")
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="file cannot be saved: No space left on device; make room"):
        write_atomic(path, full)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_a_checkpoint_of_another_model_or_other_settings_is_refused(tmp_path):
    tiny_trainer(tmp_path, tiny_config(max_steps=2)).fit()
    other = TinyModel()
    other.linear = nn.Linear(8, 5)
    with pytest.raises(UserError, match=r"is of another model \(size mismatch"):
        tiny_trainer(tmp_path, tiny_config(max_steps=2), model=other).fit()
    with pytest.raises(UserError, match="other training settings"):
        tiny_trainer(tmp_path, tiny_config(max_steps=3)).fit()
    last = json.loads((tmp_path / "checkpoints" / "last.json").read_text())
    assert last["step"] == 2 and last["file"] == "step-00000002.pt"
