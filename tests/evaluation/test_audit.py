"""The audit catches each planted leak and finds nothing in clean data."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from gr.data.layout import LayoutConfig
from gr.data.loader import BatchingConfig, EvalLoader, TrainLoader
from gr.data.split import LeaveOneOutConfig, PaperConfig, Targets, TemporalConfig, make_split, training_counts
from gr.evaluation.audit import audit, audit_ceiling, audit_evaluation, audit_split, audit_training, repeated_targets
from gr.evaluation.controls import shuffle_targets
from gr.evaluation.metrics import Estimate

V = 13
ITEMS = LayoutConfig(max_events=4)


@pytest.fixture
def world(make_store, random_users):
    store = make_store(random_users(21, V, shortest=5), V, actions=True)
    return store, make_split(LeaveOneOutConfig(), store)


def training_batches(store, split, layout=ITEMS):
    loader = TrainLoader(store, split, layout, BatchingConfig(batch_size=8), None, seed=0)
    return [loader.batch(0, i) for i in range(loader.num_batches(0))]


class Tampered:
    """A loader whose batches pass through ``change``."""

    def __init__(self, loader: EvalLoader, change) -> None:
        self.store, self.targets, self.loader, self.change = loader.store, loader.targets, loader, change

    def __iter__(self):
        for rows, batch in self.loader:
            yield rows, self.change(batch)


def with_token(batch, name, change):
    values = batch.tokens[name].clone()
    change(values, batch.last_positions())
    return batch.replace(tokens={**batch.tokens, name: values})


def names(findings) -> set[str]:
    return {finding.name for finding in findings}


@pytest.mark.parametrize(
    "layout", [ITEMS, LayoutConfig("interleaved", 4), LayoutConfig("added", 50)], ids=lambda x: x.kind
)
@pytest.mark.parametrize(
    "split_config", [LeaveOneOutConfig(), PaperConfig(), TemporalConfig(valid_time=1300, test_time=1400)]
)
def test_clean_data_has_no_finding(world, layout, split_config):
    store, _ = world
    split = make_split(split_config, store)
    estimates = {"model": {"hr@10": Estimate(0.52, 0.01, 0.5, 0.54, 2500)}}
    for targets in (split.test, split.valid):
        if targets is not None:
            findings = audit(
                store,
                split,
                EvalLoader(store, targets, layout, 6),
                training_batches(store, split, layout),
                estimates,
                {"hr@10": 0.5, "mrr": 0.1},
            )
            assert findings == []


def test_a_log_without_times_has_no_finding(make_store, random_users):
    store = make_store(random_users(9, V, shortest=5), V, times=False)
    split = make_split(LeaveOneOutConfig(), store)
    assert audit(store, split, EvalLoader(store, split.test, ITEMS), training_batches(store, split)) == []


def test_an_input_that_holds_the_target_event_is_caught(world):
    store, split = world
    loader = Tampered(EvalLoader(store, split.test, ITEMS), lambda batch: batch)
    # The histories then reach one event too far.
    loader.targets = Targets(split.test.user, split.test.position - 1)
    assert "target_in_input" in names(audit_evaluation(loader))


def test_a_target_hidden_under_an_earlier_event_number_is_caught(world):
    store, split = world

    def put_target_last(batch):
        def change(values, last):
            values[last] = batch.labels.item_id

        return with_token(batch, "item_id", change)

    found = audit_evaluation(Tampered(EvalLoader(store, split.test, ITEMS), put_target_last))
    assert names(found) == {"input_not_from_log"} and "first ones (user " in found[0].detail


@pytest.mark.parametrize(("shift", "expected"), [(-100, {"query_time"}), (5, {"query_time", "later_than_target"})])
def test_a_query_time_other_than_the_targets_is_caught(world, shift, expected):
    store, split = world

    def change(values, last):
        values[last] += shift

    loader = Tampered(EvalLoader(store, split.test, ITEMS), lambda batch: with_token(batch, "query_time", change))
    assert names(audit_evaluation(loader)) == expected


def test_labels_other_than_the_target_are_caught(world):
    store, split = world

    def change(batch):
        return batch.replace(labels=dataclasses.replace(batch.labels, item_id=(batch.labels.item_id + 1) % V))

    assert names(audit_evaluation(Tampered(EvalLoader(store, split.test, ITEMS), change))) == {"label_not_target"}


def test_rows_of_another_user_are_caught(world):
    store, split = world
    loader = Tampered(
        EvalLoader(store, split.test, ITEMS),
        lambda batch: batch.replace(rows={"sample_key": batch.rows["sample_key"] + 1}),
    )
    assert names(audit_evaluation(loader)) == {"row_of_other_user"}


def test_training_on_held_out_events_is_caught(world):
    store, split = world
    # Trains on the validation events too.
    greedy = dataclasses.replace(split, train_stop=split.train_stop + 1)
    found = audit_training(store, split, training_batches(store, greedy))
    assert names(found) == {"train_test_overlap"}
    assert found[0].detail.startswith(f"{len(split.valid)} held-out events")
    assert names(audit_split(store, greedy)) == {"train_test_overlap"}


def test_training_past_the_split_is_caught_where_no_target_stands(make_store):
    store = make_store([[0, 1, 2, 3, 4, 5]] * 3, V)
    split = make_split(TemporalConfig(valid_time=1200, test_time=1400), store)
    loose = dataclasses.replace(split, test=Targets(split.test.user, split.test.position + 1))
    loose = dataclasses.replace(loose, valid=None)
    greedy = dataclasses.replace(loose, train_stop=loose.train_stop + 2)
    assert names(audit_training(store, loose, training_batches(store, greedy))) == {"trained_beyond_split"}


def test_training_labels_that_are_not_the_next_event_are_caught(world):
    store, split = world
    batch = training_batches(store, split)[0]
    labels = dataclasses.replace(batch.labels, item_id=torch.roll(batch.labels.item_id + 1, 1) % V)
    assert names(audit_training(store, split, [batch.replace(labels=labels)])) == {"label_not_next"}


def test_a_target_held_out_twice_is_caught(world):
    store, split = world
    again = Targets(
        np.append(split.test.user, split.test.user[-1]),
        np.append(split.test.position, split.test.position[-1]),
    )
    assert names(audit_split(store, dataclasses.replace(split, test=again))) == {"duplicate_target"}


def test_a_target_that_names_no_event_is_caught(world):
    store, split = world
    outside = Targets(split.test.user, split.test.position + 1)
    assert names(audit_split(store, dataclasses.replace(split, test=outside))) == {"target_outside_log"}


def test_targets_seen_before_are_counted_and_no_leak(make_store):
    store = make_store([[0, 1, 2, 3], [4, 5, 5, 6, 5], [1, 5, 5, 6]], V)
    store.columns["timestamp"][6:9] = 5000  # user 1 ends with items 5, 6, 5 in one second
    split = make_split(LeaveOneOutConfig(), store)
    assert audit_split(store, split) == []
    assert repeated_targets(store, split.test) == (1, 1)
    store.columns["timestamp"][8] += 1
    assert repeated_targets(store, split.test) == (1, 0)


def test_a_score_above_the_ceiling_and_three_standard_errors_is_caught():
    ceiling = {"hr@10": 0.5, "ndcg@10": 0.3}
    just_below = {"hr@10": Estimate(0.529, 0.01, 0, 1, 2500), "ndcg@10": Estimate(0.2, 0.01, 0, 1, 2500)}
    above = just_below | {"hr@10": Estimate(0.531, 0.01, 0, 1, 2500)}
    assert audit_ceiling(just_below, ceiling) == []
    found = audit_ceiling(above, ceiling, "HSTU")
    assert names(found) == {"above_ceiling"} and "HSTU has hr@10 0.5310" in found[0].detail


def test_shuffled_targets_keep_counts_and_held_out_events_and_break_transitions(make_store):
    store = make_store([[i % V for i in range(u, u + 12)] for u in range(60)], V)  # item + 1 always follows
    split = make_split(LeaveOneOutConfig(), store)
    control = shuffle_targets(store, split, seed=1)
    np.testing.assert_array_equal(training_counts(control, split), training_counts(store, split))
    for targets in (split.valid, split.test):
        at = store.offsets[targets.user] + targets.position
        np.testing.assert_array_equal(control.columns["item_id"][at], store.columns["item_id"][at])
    np.testing.assert_array_equal(control.columns["timestamp"], store.columns["timestamp"])
    train = control.columns["item_id"].reshape(60, 12)[:, :10]
    assert ((train[:, 1:] - train[:, :-1]) % V == 1).mean() < 3 / V
    assert "shuffled" in control.manifest["caveats"][-1]
    assert control.manifest["content_hash"] != store.manifest["content_hash"] and store.manifest["caveats"] == []
    again = shuffle_targets(store, split, seed=1)
    np.testing.assert_array_equal(again.columns["item_id"], control.columns["item_id"])
    assert audit(control, split, EvalLoader(control, split.test, ITEMS), training_batches(control, split)) == []
