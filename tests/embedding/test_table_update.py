"""The update rules of tables, against their formulas written out number by number."""

from __future__ import annotations

import pytest
import torch

from gr.embedding.config import TableOptimizerConfig, TablesConfig
from gr.embedding.local import LocalTables
from gr.embedding.spec import TableSpec


@pytest.mark.parametrize("kind", ["sgd", "adagrad", "rowwise_adagrad"])
def test_two_steps_are_the_formulas(kind):
    torch.manual_seed(0)
    optimizer = TableOptimizerConfig(kind=kind, lr=0.1, eps=1e-3)
    tables = LocalTables((TableSpec("item", 4, 3),), TablesConfig(optimizer=optimizer))
    expected = tables.weights["item"].detach().double().clone()
    squares = torch.zeros(4, 3, dtype=torch.float64)
    for factor, ids in ((1.0, [0, 2, 2]), (0.5, [2, 3])):
        tables.set_lr_factor(factor)
        slope = torch.randn(len(ids), 3)
        (tables({"item": torch.tensor(ids)})["item"] * slope).sum().backward()
        tables.update()
        grad = torch.zeros(4, 3, dtype=torch.float64)
        for row, part in zip(ids, slope.double(), strict=True):
            grad[row] += part
        for row in range(4):
            mean = (grad[row] ** 2).mean()
            for col in range(3):
                squares[row, col] += mean if kind == "rowwise_adagrad" else grad[row, col] ** 2
                root = 1.0 if kind == "sgd" else squares[row, col] ** 0.5 + 1e-3
                expected[row, col] -= 0.1 * factor * grad[row, col] / root
    assert tables.weights["item"].grad is None
    torch.testing.assert_close(tables.weights["item"].detach().double(), expected, rtol=1e-6, atol=1e-7)
