"""Similarity: scores are scale * query(x) @ item(e).T."""

from __future__ import annotations

import pytest
import torch

from gr.errors import UserError
from gr.modules.similarity import Similarity, SimilarityConfig


def test_cosine_is_the_cosine_over_the_temperature():
    similarity = Similarity(SimilarityConfig())
    x, e = torch.randn(3, 8), torch.randn(5, 8)
    scores = similarity.scale * similarity.query(x) @ similarity.item(e).T
    expected = torch.nn.functional.cosine_similarity(x[:, None], e[None], dim=-1) / 0.05
    torch.testing.assert_close(scores, expected)


def test_a_zero_vector_scores_zero_and_has_a_finite_gradient():
    similarity = Similarity(SimilarityConfig())
    x = torch.zeros(1, 4, requires_grad=True)
    similarity.query(x).sum().backward()
    assert torch.equal(similarity.query(x), torch.zeros(1, 4))
    assert torch.isfinite(x.grad).all()


def test_dot_changes_nothing():
    similarity = Similarity(SimilarityConfig(kind="dot"))
    x = torch.randn(2, 3)
    assert similarity.scale == 1.0
    assert similarity.query(x) is x and similarity.item(x) is x


def test_a_temperature_must_be_positive():
    with pytest.raises(UserError, match="similarity.temperature must be positive"):
        SimilarityConfig(temperature=0.0)
