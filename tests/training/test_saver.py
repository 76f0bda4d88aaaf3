"""Saving in the background: what is written is the state of its step, one at a time, and nothing is lost or hidden."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
import torch

from gr.distributed.host_copy import HostBuffers
from gr.distributed.process import ProcessContext
from gr.errors import UserError
from gr.training import weights as files
from gr.training.checkpoint import find_checkpoint
from gr.training.phase import Hooks, Phase
from gr.training.saver import Saver
from gr.training.signals import ask_to_stop
from tiny_training import same, tiny_config, tiny_trainer, weights

ALONE = ProcessContext()
CONFIG = tiny_config(checkpoint_every_steps=5, keep_last=10, checkpoint_async=True)


def after(actions):
    """A phase that calls ``actions[n](model)`` when n steps are done."""

    def after_step(model, context):
        if context.step + 1 in actions:
            actions[context.step + 1](model)

    return [Phase(hooks=Hooks(after_step=after_step))]


@pytest.fixture
def slow_disk(monkeypatch):
    """Files of step 5 are written once ``go`` is set; ``begun`` tells that their turn has come."""
    begun, go, save_torch = threading.Event(), threading.Event(), files.save_torch

    def slow(path, payload):
        if "step-00000005" in str(path):
            begun.set()
            assert go.wait(60)
        return save_torch(path, payload)

    monkeypatch.setattr(files, "save_torch", slow)
    yield begun, go
    go.set()


def test_later_steps_do_not_leak_into_what_is_written(tmp_path, slow_disk):
    begun, go = slow_disk
    at_5, at_7 = {}, {}

    def release(model):
        assert begun.wait(60)
        at_7.update(weights(model))
        go.set()

    phases = after({5: lambda model: at_5.update(weights(model)), 7: release})
    tiny_trainer(tmp_path / "run", CONFIG, phases=phases).fit()
    tiny_trainer(tmp_path / "whole", replace(CONFIG, checkpoint_async=False)).fit()
    found, right = (torch.load(tmp_path / name / "checkpoints/step-00000005/state.pt") for name in ("run", "whole"))
    assert same(found["model"], at_5) and not same(found["model"], at_7)
    assert same(found["model"], right["model"]) and found["state"]["step"] == 5
    assert found["optimizer"]["param_groups"] == right["optimizer"]["param_groups"]
    assert found["optimizer"]["state"]
    for number, moments in right["optimizer"]["state"].items():
        assert same(found["optimizer"]["state"][number], moments)


def test_a_second_state_waits_until_the_first_is_written():
    order, go = [], threading.Event()

    def write(state, ctx):
        order.append(state["x"].tolist())

    def first(state, ctx):
        assert go.wait(60)
        write(state, ctx)

    saver, x = Saver(ALONE, background=True), torch.zeros(2)
    saver.submit({"x": x}, first)
    x.fill_(1)
    second = threading.Thread(target=saver.submit, args=({"x": x}, write))
    second.start()
    assert order == []
    go.set()
    second.join()
    saver.wait()
    assert order == [[0.0, 0.0], [1.0, 1.0]]


def test_buffers_are_used_again_and_follow_a_change_of_shape():
    buffers, x, y = HostBuffers(), torch.zeros(3), torch.zeros(2, 5).T
    first = buffers.copy({"a": [x, (y, 7)], "b": None}, ALONE)
    assert first["a"][0] is not x and first["a"][1][1] == 7 and first["b"] is None
    x.fill_(2)
    again = buffers.copy({"a": [x, (y[1:], 7)]}, ALONE)
    assert again["a"][0].data_ptr() == first["a"][0].data_ptr() and again["a"][0].tolist() == [2.0] * 3
    assert again["a"][1][0].shape == (4, 2)


def test_an_error_of_the_writer_is_told_at_the_next_step(tmp_path, monkeypatch):
    def full(path, payload):
        raise UserError(f"{path} cannot be saved: No space left on device; make room")

    monkeypatch.setattr(files, "save_torch", full)

    def meanwhile(model):
        trainer._saver._thread.join()

    trainer = tiny_trainer(tmp_path, CONFIG, phases=after({6: meanwhile}))
    with pytest.raises(UserError, match=r"step-00000005.tmp/state.pt cannot be saved: No space left"):
        trainer.fit()
    assert trainer.state.step == 6 and not list((tmp_path / "checkpoints").iterdir())
    assert "checkpoint" not in {thread.name for thread in threading.enumerate()}


def test_an_error_of_the_last_save_is_told_too(tmp_path, monkeypatch):
    save_torch = files.save_torch

    def full(path, payload):
        if "step-00000024" in str(path):
            raise UserError(f"{path} cannot be saved: No space left on device; make room")
        return save_torch(path, payload)

    monkeypatch.setattr(files, "save_torch", full)
    with pytest.raises(UserError, match=r"step-00000024.tmp/state.pt cannot be saved"):
        tiny_trainer(tmp_path, CONFIG).fit()
    assert find_checkpoint(tmp_path / "checkpoints").path.name == "step-00000020"


@pytest.mark.parametrize("end", ["stopped", "accident"])
def test_a_run_that_ends_during_a_save_ends_after_it(tmp_path, slow_disk, end):
    begun, go = slow_disk

    class Accident(Exception):
        pass

    def meanwhile(model):
        assert begun.wait(60)
        thread = trainer._saver._thread
        join = thread.join
        thread.join = lambda: (go.set(), join())  # the disk answers only once somebody waits for it
        if end == "accident":
            raise Accident
        ask_to_stop()

    trainer = tiny_trainer(tmp_path, CONFIG, phases=after({7: meanwhile}))
    if end == "accident":
        with pytest.raises(Accident):
            trainer.fit()
    else:
        assert trainer.fit().status == "stopped"
    left = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert left == ["step-00000005", *(["step-00000007"] if end == "stopped" else [])]
    assert find_checkpoint(tmp_path / "checkpoints").damaged == {}
    whole, again = tiny_trainer(tmp_path / "whole", CONFIG), tiny_trainer(tmp_path, CONFIG)
    whole.fit()
    again.fit()
    assert same(weights(whole.model), weights(again.model))
