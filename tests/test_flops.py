"""Counting: pairs against the operator's mask, FLOPs against torch's own counter on dense cases."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from gr import flops
from gr.kernels.hstu_attention import Mask, visible_pairs
from gr.modules.hstu import HSTUConfig, build_hstu
from gr.modules.transformer import TransformerConfig, build_transformer

aten = torch.ops.aten


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.lists(st.tuples(*[st.integers(0, 6)] * 3), max_size=4),
    *[st.none() | st.integers(1, 8)] * 3,
)
def test_pairs_are_those_of_the_mask(rows, window, full_tail, group):
    context, targets = ([row[i] for row in rows] for i in (0, 2))
    lengths = [sum(row) for row in rows]
    mask = Mask(
        window=window,
        full_tail=full_tail,
        target_group=group,
        num_contextual=torch.tensor(context, dtype=torch.int64),
        num_targets=torch.tensor(targets, dtype=torch.int64),
    )
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    expected = int(visible_pairs(mask, offsets, max_seq_len=18).sum())
    assert flops.pairs(lengths, targets, context, window, full_tail=full_tail, target_group=group) == expected


def test_pairs_have_their_textbook_values():
    assert flops.pairs([5]) == 15
    assert flops.pairs([]) == 0
    assert flops.pairs([0, 3]) == 6
    h, m, c = 10, 4, 3
    assert flops.pairs([h + m], [m]) == h * (h + 1) // 2 + m * (h + 1)
    assert flops.pairs([c + h + m], [m], [c]) == c * (c + h) + h * c + h * (h + 1) // 2 + m * (c + h + 1)
    assert flops.pairs([2_000_000]) == 2_000_000 * 2_000_001 // 2


def dense_batch(rows: int, n: int):
    times = torch.arange(rows * n)
    return SimpleNamespace(
        offsets=torch.arange(rows + 1) * n,
        max_seq_len=n,
        tokens={"timestamp": times, "query_time": times},
        rows={},
    )


def counted(model, x, batch):
    """FLOPs that torch counts in the forward, of (projections, attention)."""
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(x, batch)
    by_op = counter.get_flop_counts()["Global"]
    return sum(by_op.get(op, 0) for op in (aten.mm, aten.addmm)), by_op.get(aten.bmm, 0)


@pytest.mark.parametrize("preset", ["paper", "dlrm_v3"])
def test_hstu_flops_are_torchs_where_every_pair_is_computed(preset):
    rows, n, dim = 3, 7, 10
    config = HSTUConfig(preset=preset, num_layers=2, num_heads=2, dim_qk=3, dim_v=5, backend="reference")
    model = build_hstu(config, dim, n)
    ours = model.forward_flops(tokens=rows * n, pairs=rows * n * n)  # the padded form computes masked pairs too
    projections, attention = counted(model, torch.randn(rows * n, dim), dense_batch(rows, n))
    assert ours["uvqk"] + ours["out"] == projections
    assert ours["attention_qk"] + ours["attention_av"] == attention


def test_transformer_flops_are_torchs_where_every_pair_is_computed():
    rows, n, dim = 3, 7, 10
    model = build_transformer(TransformerConfig(num_layers=2, num_heads=2, ffn_dim=16), dim, n).eval()
    ours = model.forward_flops(tokens=rows * n, pairs=rows * n * n)
    projections, attention = counted(model, torch.randn(rows * n, dim), dense_batch(rows, n))
    assert ours["qkv"] + ours["out"] + ours["ffn"] == projections
    assert ours["attention_qk"] + ours["attention_av"] == attention


def test_square_hstu_has_the_papers_constants():
    dim, tokens, pairs = 64, 100, 1000
    ours = flops.hstu_flops(dim=dim, num_layers=1, num_heads=4, dim_qk=16, dim_v=16, tokens=tokens, pairs=pairs)
    assert sum(ours.values()) == 10 * tokens * dim**2 + 4 * dim * pairs


def test_heads_training_and_bytes():
    assert flops.sampled_softmax_flops(supervised=10, dim=8, negatives=127) == 2 * 10 * 8 * 128
    assert flops.full_softmax_flops(supervised=10, dim=8, num_items=1000) == 2 * 10 * 8 * 1000
    assert flops.training_flops(7) == 21
    assert flops.hardware_training_flops({"attention_qk": 2, "attention_av": 3, "out": 5}) == 3 * 10 + 2
    assert flops.lookup_bytes(rows=4, dim=8, itemsize=2) == 64


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H200", 989.4),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA A10", 125.0),
        ("NVIDIA L4", 121.0),
        ("NVIDIA L40S", 362.0),
        ("Tesla V100-SXM2-16GB", 125.0),
    ],
)
def test_a_device_is_known_by_its_drivers_name(name, tflops):
    assert flops.device_peak_flops(name) == pytest.approx(tflops * 1e12)


def test_a_cpu_or_an_unknown_device_has_no_peak_and_no_utilisation():
    assert flops.device_peak_flops("cpu") is None
    assert flops.device_peak_flops("NVIDIA L40") is None
    assert flops.utilisation(1e12, 1.0, None) is None
    assert flops.utilisation(1e12, 2.0, 1e12, num_devices=2) == 0.25


def test_counting_needs_no_torch():
    code = "import sys; sys.modules['torch'] = None; import gr.flops; print(gr.flops.pairs([3]))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "6"
