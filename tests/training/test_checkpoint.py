"""A checkpoint is whole, or one sentence says that it is not and what to do."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from gr.distributed.process import ProcessContext
from gr.errors import UserError
from gr.files import write_atomic
from gr.training.checkpoint import find_checkpoint, load_torch, set_aside
from gr.training.config import EarlyStoppingConfig
from gr.training.signals import ask_to_stop
from gr.training.weights import load_weights, write_step
from tiny_training import TinyLoader, TinyModel, same, tiny_config, tiny_trainer, weights


def save(folder, step, keep_last=2):
    state = {"model": {"x": torch.full((1000,), float(step))}, "optimizer": None, "tables": None}
    write_step(state, folder, step, {"flops": 2**70, "name": "a"}, keep_last, ProcessContext())


def save_three(folder):
    for step in (2, 4, 6):
        save(folder, step)
    return folder / "step-00000006"


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_what_is_saved_is_read_and_old_ones_are_removed(tmp_path):
    path = save_three(tmp_path)
    assert names(tmp_path) == ["step-00000004", "step-00000006"] and names(path) == ["files.json", "state.pt"]
    found = find_checkpoint(tmp_path)
    assert found.path == path and not found.damaged
    payload = load_torch(path / "state.pt")
    assert payload["model"]["x"].tolist() == [6.0] * 1000 and payload["flops"] == 2**70
    assert find_checkpoint(tmp_path / "absent").path is None


def flip(data: bytes) -> bytes:
    return data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :]


DAMAGE = [
    ("state.pt", lambda data: data[: len(data) // 2], r"state.pt has \d+ bytes of \d+"),
    ("state.pt", lambda data: b"", r"state.pt has 0 bytes of \d+"),
    ("state.pt", flip, "state.pt has changed"),
    ("state.pt", None, "state.pt is missing"),
    ("files.json", None, "files.json is missing"),
    ("files.json", lambda data: data[: len(data) // 2], "files.json is unreadable"),
    ("files.json", lambda data: b"[]", "files.json is unreadable"),
    ("files.json", lambda data: data.replace(b"state", b"stave"), "files.json does not name state.pt"),
    ("files.json", lambda data: data.replace(b"\n  ]", b"1\n  ]"), "state.pt has changed"),
]


def stop_at(epoch, index):
    return lambda e, i: ask_to_stop() if (e, i) == (epoch, index) else None


def damage(path, change):
    if change is None:
        path.unlink()
    else:
        data = path.read_bytes()
        assert change(data) != data
        path.write_bytes(change(data))


@pytest.mark.parametrize(("name", "change", "words"), DAMAGE)
def test_each_damage_is_seen_and_the_checkpoint_before_found(tmp_path, name, change, words):
    path = save_three(tmp_path)
    damage(path / name, change)
    found = find_checkpoint(tmp_path)
    assert found.path == tmp_path / "step-00000004" and list(found.damaged) == [path]
    assert re.match(words, found.damaged[path])
    assert names(tmp_path) == ["step-00000004", "step-00000006"]  # looking changes nothing


def test_without_a_whole_checkpoint_there_is_one_sentence_and_nothing_changes(tmp_path):
    save_three(tmp_path)
    for path in tmp_path.glob("*/state.pt"):
        damage(path, flip)
    words = "is whole .step-00000006: state.pt has changed; step-00000004: state.pt has changed.; move that folder away"
    with pytest.raises(UserError, match=words):
        find_checkpoint(tmp_path)
    assert names(tmp_path) == ["step-00000004", "step-00000006"]


def test_checkpoints_of_an_earlier_layout_are_refused_not_begun_over(tmp_path):
    (tmp_path / "step-00000040.pt").touch()
    with pytest.raises(UserError, match="holds checkpoints of an earlier version"):
        find_checkpoint(tmp_path)


def test_what_was_cut_off_is_never_read_and_goes_with_the_next_save(tmp_path):
    save_three(tmp_path)
    shutil.copytree(tmp_path / "step-00000006", tmp_path / "step-00000008.tmp")
    assert find_checkpoint(tmp_path).path.name == "step-00000006"
    save(tmp_path, 10)
    assert names(tmp_path) == ["step-00000006", "step-00000010"]


def test_a_step_saved_again_replaces_the_first_and_a_death_in_between_loses_neither(tmp_path, monkeypatch):
    save_three(tmp_path)
    before = (tmp_path / "step-00000006" / "files.json").stat().st_ino
    save(tmp_path, 6)
    assert names(tmp_path) == ["step-00000004", "step-00000006"]
    assert (tmp_path / "step-00000006" / "files.json").stat().st_ino != before

    class Death(BaseException):
        pass

    def rename(path, target, whole=Path.rename):
        if path.suffix == ".tmp":
            raise Death
        return whole(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", rename)
        with pytest.raises(Death):
            save(tmp_path, 6)
    assert names(tmp_path) == ["step-00000004", "step-00000006.old", "step-00000006.tmp"]
    assert find_checkpoint(tmp_path).path.name == "step-00000006.old"
    save(tmp_path, 6)
    assert names(tmp_path) == ["step-00000004", "step-00000006"]


def test_a_damaged_checkpoint_set_aside_neither_counts_nor_is_overwritten(tmp_path):
    path = save_three(tmp_path)
    assert set_aside(path).name == "step-00000006.damaged"
    save(tmp_path, 6)
    assert set_aside(path).name == "step-00000006.damaged2"
    for step in (6, 8, 10):
        save(tmp_path, step)
    kept = ["step-00000006.damaged", "step-00000006.damaged2", "step-00000008", "step-00000010"]
    assert names(tmp_path) == kept and find_checkpoint(tmp_path).path.name == "step-00000010"


@pytest.mark.parametrize("background", [False, True])
def test_a_run_goes_on_from_the_checkpoint_before_and_ends_the_same(tmp_path, capsys, background):
    config = tiny_config(checkpoint_every_steps=5, keep_last=2, checkpoint_async=background)
    whole = tiny_trainer(tmp_path / "whole", config)
    whole.fit()
    checkpoints = tmp_path / "run" / "checkpoints"
    tiny_trainer(tmp_path / "run", config, loader=TinyLoader(event=stop_at(1, 3))).fit()
    before, newest = sorted(checkpoints.iterdir())
    damage(newest / "state.pt", flip)
    trainer = tiny_trainer(tmp_path / "run", config)
    trainer.fit()
    assert same(weights(trainer.model), weights(whole.model))
    step = int(before.name.removeprefix("step-"))
    told = f"warning: checkpoint {newest} is damaged (state.pt has changed); it is kept as {newest.name}.damaged, "
    assert told + f"and training goes on from the one before, step {step}\n" in capsys.readouterr().out
    assert names(checkpoints) == [f"{newest.name}.damaged", "step-00000020", "step-00000024"]


def test_best_weights_newer_than_the_checkpoint_gone_on_from_tell_their_own_step(tmp_path):
    """A repeat that is not bit-exact may find worse ones; best.pt then holds those of before."""
    config = tiny_config(epochs=2, early_stopping=EarlyStoppingConfig(patience=9))
    before = iter([0.4, 0.9])
    told = tiny_trainer(tmp_path, config, evaluate=lambda model: {"ndcg@10": next(before)}).fit()
    assert (told.best_step, told.best_metrics) == (16, {"ndcg@10": 0.9})
    _, newest = sorted((tmp_path / "checkpoints").iterdir())
    damage(newest / "state.pt", flip)
    again = tiny_trainer(tmp_path, config, evaluate=lambda model: {"ndcg@10": 0.1}).fit()
    assert (again.best_step, again.best_metrics) == (16, {"ndcg@10": 0.9})


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
    assert names(tmp_path / "checkpoints") == ["step-00000002"]
