"""Objectives against slow definitions in fp64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from gr.kernels.full_softmax import full_softmax_loss
from gr.losses import binary_cross_entropy, sampled_softmax

S, R, D, V = 5, 7, 4, 11


def vectors(seed=0):
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    return draw(S, D), draw(V, D), torch.randint(V, (S,), generator=g), torch.randint(V, (S, R), generator=g)


def slow_sampled(query, table, target, drawn, scale, log_q=None):
    losses = []
    for s in range(S):
        correction = 0.0 if log_q is None else log_q[target[s]].item()
        own = scale * float(query[s] @ table[target[s]]) - correction
        terms = [own]
        for item in drawn[s].tolist() if drawn.dim() == 2 else drawn.tolist():
            if item != target[s]:
                correction = 0.0 if log_q is None else log_q[item].item()
                terms.append(scale * float(query[s] @ table[item]) - correction)
        losses.append(math.log(sum(math.exp(t) for t in terms)) - own)
    return torch.tensor(losses, dtype=torch.float64)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("corrected", [False, True])
def test_sampled_softmax_is_its_definition(shared, corrected):
    query, table, target, drawn = vectors()
    drawn = drawn[0] if shared else drawn
    log_q = torch.linspace(-3, -1, V) if corrected else None
    got = sampled_softmax(
        query, table[target], table[drawn], scale=2.0, collision=target[:, None] == drawn,
        log_q=None if log_q is None else log_q[drawn], positive_log_q=None if log_q is None else log_q[target],
    )  # fmt: skip
    torch.testing.assert_close(
        got.double(), slow_sampled(query, table, target, drawn, 2.0, log_q).double(), rtol=1e-5, atol=1e-6
    )


def test_indexed_negatives_are_those_they_point_to():
    query, table, target, drawn = vectors(3)
    gathered = {"scale": 2.0, "collision": target[:, None] == drawn}
    for loss in (sampled_softmax, binary_cross_entropy):
        expected = loss(query, table[target], table[drawn], **gathered)
        torch.testing.assert_close(loss(query, table[target], table, **gathered, index=drawn), expected)


def test_sampled_softmax_over_every_other_item_is_the_full_softmax():
    query, table, target, _ = vectors(1)
    everything = torch.arange(V).expand(S, V)
    sampled = sampled_softmax(
        query, table[target], table[everything], scale=1.0, collision=target[:, None] == everything
    )
    whole = full_softmax_loss(query, table, target, torch.ones(S))
    torch.testing.assert_close(sampled.sum(), whole, rtol=1e-5, atol=1e-6)


def test_logq_correction_makes_the_sampled_gradient_point_to_the_full_one():
    """With many draws from a skewed q, only the corrected loss keeps the direction of the full softmax's gradient."""
    g = torch.Generator().manual_seed(3)
    query, table, target, _ = vectors(2)
    q = torch.softmax(torch.linspace(0, 3, V), 0)
    draws = torch.multinomial(q.expand(S, V), 20_000, replacement=True, generator=g)
    log_q = (q.log() + math.log(20_000)).float()

    def gradient(corrected):
        x = query.clone().requires_grad_()
        loss = sampled_softmax(
            x, table[target], table[draws], scale=1.0, collision=torch.zeros_like(draws, dtype=torch.bool),
            log_q=log_q[draws] if corrected else None, positive_log_q=torch.full((S,), 0.0) if corrected else None,
        )  # fmt: skip
        return torch.autograd.grad(loss.sum(), x)[0]

    full = query.clone().requires_grad_()
    wanted = torch.autograd.grad(full_softmax_loss(full, table, target, torch.ones(S)), full)[0]
    # The positive stands once more beside its own draws, so it counts double in the normaliser: compare directions.
    near, far = (F.cosine_similarity(gradient(c), wanted, dim=1).min().item() for c in (True, False))
    assert near > 0.9 and near > far


def test_bce_is_its_definition_and_leaves_collisions_out():
    query, table, target, drawn = vectors(4)
    drawn[0, 0] = target[0]
    got = binary_cross_entropy(query, table[target], table[drawn], scale=1.0, collision=target[:, None] == drawn)
    for s in range(S):
        others = [float(F.softplus(query[s] @ table[i])) for i in drawn[s].tolist() if i != target[s]]
        own = float(F.softplus(-(query[s] @ table[target[s]])))
        assert got[s].item() == pytest.approx(own + sum(others) / len(others), rel=1e-5)


def test_a_collision_changes_nothing_in_a_sampled_softmax():
    query, table, target, drawn = vectors(5)
    with_copy = torch.cat([drawn, target[:, None]], dim=1)
    args = dict(scale=3.0)
    plain = sampled_softmax(query, table[target], table[drawn], collision=target[:, None] == drawn, **args)
    copied = sampled_softmax(query, table[target], table[with_copy], collision=target[:, None] == with_copy, **args)
    torch.testing.assert_close(plain, copied)


def test_a_loss_of_float64_is_made_in_float64():
    query, table, target, drawn = vectors(6)
    given = {"scale": 20.0, "collision": target[:, None] == drawn}
    for index, negatives in ((drawn, table), (None, table[drawn])):
        got = sampled_softmax(query, table[target], negatives, **given, index=index)
        torch.testing.assert_close(got, slow_sampled(query, table, target, drawn, 20.0), rtol=1e-10, atol=1e-12)
    assert binary_cross_entropy(query, table[target], table, **given, index=drawn).dtype == torch.float64
