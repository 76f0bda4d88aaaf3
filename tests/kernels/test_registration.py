"""Operators as torch knows them."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from gr.kernels.registration import Op, op


def test_an_op_without_a_derivative_says_so_and_a_name_is_taken_once():
    def twice(x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    made = op("test_twice")(twice)
    made.without_derivative()
    x = torch.ones(3, requires_grad=True)
    with pytest.raises(RuntimeError, match="gr::test_twice has no derivative"):
        made(x).sum().backward()
    with pytest.raises(RuntimeError, match="gr::test_twice is registered already"):
        Op("test_twice", twice)


def test_a_first_call_forward_and_backward_does_not_wait_for_the_compiler_to_be_imported():
    script = """
import sys, torch
from gr.kernels.full_softmax import full_softmax_loss
from gr.kernels.hstu_attention import hstu_attention
from gr.kernels.sampled_logits import sampled_softmax_loss
q = torch.randn(4, 1, 2, requires_grad=True)
hstu_attention(q, q, q, torch.tensor([0, 4]), max_seq_len=4, divisor=4.0, alpha=1.0).sum().backward()
x = torch.randn(3, 2, requires_grad=True)
full_softmax_loss(x, torch.randn(5, 2), torch.tensor([0, 1, 2]), torch.ones(3)).backward()
sampled_softmax_loss(x, x, x, torch.zeros(3, 4, dtype=torch.int64)).sum().backward()
raise SystemExit("torch._dynamo" in sys.modules)
"""
    subprocess.run([sys.executable, "-c", script], check=True)
