"""Local tables: the specification that sharded ones will be held to."""

from __future__ import annotations

import torch

from gr.embedding.local import LocalTables
from gr.embedding.spec import TableSpec


def tables():
    torch.manual_seed(0)
    return LocalTables((TableSpec("item", 10, 4), TableSpec("action", 3, 4, init_std=0.5)))


def test_one_look_up_serves_several_tables_and_any_shape():
    t = tables()
    out = t({"item": torch.tensor([[1, 2], [9, 1]]), "action": torch.tensor([2])})
    assert out["item"].shape == (2, 2, 4) and out["action"].shape == (1, 4)
    assert torch.equal(out["item"][0, 0], out["item"][1, 1])
    out["item"].sum().backward()
    assert t.weights["item"].grad[1].eq(2).all() and t.weights["item"].grad[0].eq(0).all()


def test_logits_over_ranges_join_to_the_logits_over_all():
    t, query = tables(), torch.randn(5, 4)
    double = lambda v: 2 * v  # noqa: E731
    whole = t.logits(query, "item", (0, 10), double)
    parts = torch.cat([t.logits(query, "item", r, double) for r in ((0, 3), (3, 10))], dim=1)
    torch.testing.assert_close(whole, parts)
    torch.testing.assert_close(whole, query @ (2 * t.weights["item"]).T)


def test_iter_vectors_covers_each_row_once_and_initial_values_are_truncated():
    t = tables()
    rows = [(lo, v.shape[0]) for lo, v in t.iter_vectors("item", block=4)]
    assert rows == [(0, 4), (4, 4), (8, 2)]
    assert t.weights["item"].abs().max() <= 0.04 and t.weights["action"].abs().max() <= 1.0


def test_rows_beyond_two_to_the_24_are_their_own():
    """An id that passed through float32 would come back as its even neighbour."""
    big = 2**24 + 3
    t = LocalTables((TableSpec("item", big + 1, 1),))
    with torch.no_grad():
        t.weights["item"][big - 2 :, 0] = torch.tensor([1.0, 2.0, 3.0])
    out = t({"item": torch.tensor([big - 2, big - 1, big])})
    assert out["item"][:, 0].tolist() == [1.0, 2.0, 3.0]
    assert t.logits(torch.ones(1, 1), "item", (big - 1, big + 1), lambda v: v).tolist() == [[2.0, 3.0]]
