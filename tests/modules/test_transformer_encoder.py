"""The Transformer encoder: jagged equals a hand-written padded form; what it refuses."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from gr.errors import UserError
from gr.modules.transformer import TransformerConfig, build_transformer


def jagged(lengths, **rows):
    return SimpleNamespace(
        offsets=torch.tensor([0, *lengths]).cumsum(0), max_seq_len=max(lengths), tokens={}, rows=rows
    )


def dense_block(layer, x, seen, sasrec):
    """One block over one sequence, heads in a loop."""
    normed = layer.attention_norm(x)
    memory = x if sasrec else normed
    q, (k, v) = layer.query(normed), layer.key_value(memory).chunk(2, dim=1)
    width = x.shape[1] // layer.config.num_heads
    heads = []
    for h in range(layer.config.num_heads):
        part = slice(h * width, (h + 1) * width)
        scores = (q[:, part] @ k[:, part].T / width**0.5).masked_fill(~seen, float("-inf"))
        heads.append(scores.softmax(-1) @ v[:, part])
    x = (normed if sasrec else x) + layer.out(torch.cat(heads, dim=1))
    normed = layer.ffn_norm(x)
    return (normed if sasrec else x) + layer.ffn_out(F.relu(layer.ffn_in(normed)))


@pytest.mark.parametrize("block", ["sasrec", "pre_norm"])
@pytest.mark.parametrize("targets", [None, [2, 0, 1, 0, 3]])
def test_jagged_equals_each_sequence_by_itself(block, targets):
    torch.manual_seed(0)
    lengths = [4, 1, 6, 0, 5]  # the longest two are padded together
    model = build_transformer(TransformerConfig(num_heads=2, ffn_dim=7, block=block), 8, 99).double().eval()
    x = torch.randn(sum(lengths), 8, dtype=torch.float64)
    rows = {} if targets is None else {"num_targets": torch.tensor(targets)}
    out = model(x, jagged(lengths, **rows))
    start = 0
    for row, n in enumerate(lengths):
        seen = torch.ones(n, n).tril().bool()
        if targets is not None:
            first = n - targets[row]
            seen[first:, first:] = torch.eye(targets[row]).bool()
        expected = x[start : start + n]
        for layer in model.layers:
            expected = dense_block(layer, expected, seen, block == "sasrec")
        torch.testing.assert_close(out[start : start + n], expected)
        start += n


@pytest.mark.parametrize(("block", "norms"), [("sasrec", 0), ("pre_norm", 2)])
def test_number_of_parameters_is_that_of_the_formula(block, norms):
    dim, hidden = 12, 20
    config = TransformerConfig(num_layers=3, num_heads=4, ffn_dim=hidden, final_norm=True, block=block)
    model = build_transformer(config, dim, 99)
    each = 4 * (dim * dim + dim) + norms * 2 * dim + dim * hidden + hidden + hidden * dim + dim
    assert sum(p.numel() for p in model.parameters()) == 3 * each + 2 * dim


def test_sasrec_starts_as_in_the_reference():
    """Q, K and V as one (3D, D) Xavier matrix, std sqrt(2 / 4D); biases of the feed-forward part are torch's own."""
    torch.manual_seed(0)
    dim = 256
    block = build_transformer(TransformerConfig(num_layers=1), dim, 99).layers[0]
    for weight in (block.query.weight, block.key_value.weight):
        assert weight.std().item() == pytest.approx((2 / (4 * dim)) ** 0.5, rel=0.02)
    assert block.query.bias.eq(0).all() and block.out.bias.eq(0).all()
    assert 0.5 * dim**-0.5 < block.ffn_in.bias.abs().max() <= dim**-0.5


def test_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(UserError, match="encoder.num_heads must divide the model width 50, got 4"):
        build_transformer(TransformerConfig(num_heads=4), 50, 99)


@pytest.mark.parametrize(
    ("field", "value"), [("num_layers", 0), ("num_heads", 0), ("dropout", 1.0), ("ffn_dim", 0), ("norm_eps", 0.0)]
)
def test_an_impossible_value_names_the_field(field, value):
    with pytest.raises(UserError, match=f"encoder.{field}"):
        TransformerConfig(**{field: value})
