"""Every wrong argument of the operator is refused in a sentence that starts with its name."""

from __future__ import annotations

import pytest
import torch

from gr.kernels.hstu_attention import Mask, RelativeBias, hstu_attention
from gr.kernels.hstu_attention.op import choose_backend

TIMES = torch.arange(5)


def arguments(**changes):
    """A valid call of 5 tokens in 2 rows, with changes."""
    values = {
        "q": torch.zeros(5, 2, 3),
        "k": torch.zeros(5, 2, 3),
        "v": torch.zeros(5, 2, 4),
        "q_offsets": torch.tensor([0, 2, 5]),
        "max_seq_len": 3,
        "divisor": 3.0,
        "alpha": 1.0,
    }
    return values | changes


BAD = [
    ("q ", {"q": None}),
    ("q_offsets", {"q_offsets": [0, 2, 5]}),
    ("alpha", {"alpha": None}),
    ("alpha", {"alpha": float("nan")}),
    ("alpha", {"alpha": torch.rand(5, 1, 1)}),
    ("divisor", {"divisor": float("inf")}),
    ("divisor", {"divisor": torch.tensor([1.0, 0.0])}),
    ("divisor", {"divisor": torch.tensor([True, True])}),
    ("divisor", {"divisor": torch.tensor([1j, 1.0])}),
    ("mask.num_targets", {"mask": Mask(num_targets=[1, 1])}),
    ("q ", {"q": torch.zeros(5, 6)}),
    ("k ", {"k": torch.zeros(5, 1, 3)}),
    ("k ", {"k": torch.zeros(5, 2, 4)}),
    ("k ", {"k": torch.zeros(5, 2, 3, dtype=torch.float64)}),
    ("q ", {"q": torch.zeros(5, 2, 3, dtype=torch.int64)}),
    ("v ", {"v": torch.zeros(4, 2, 4)}),
    ("kv_offsets", {"k": torch.zeros(6, 2, 3), "v": torch.zeros(6, 2, 4)}),
    ("kv_offsets", {"kv_offsets": torch.tensor([0, 5])}),
    ("kv_offsets", {"kv_offsets": torch.tensor([0, 3, 5])}),
    ("q_offsets", {"q_offsets": torch.tensor([0.0, 5.0])}),
    ("q_offsets", {"q_offsets": torch.tensor([0, 4])}),
    ("q_offsets", {"q_offsets": torch.tensor([0, 6, 5])}),
    ("q_offsets", {"q_offsets": torch.tensor([1, 2, 5])}),
    ("max_seq_len", {"max_seq_len": 2}),
    ("max_seq_len", {"max_seq_len": -1}),
    ("max_seq_len", {"max_seq_len": 3.0}),
    ("divisor", {"divisor": 0.0}),
    ("divisor", {"divisor": "length"}),
    ("divisor", {"divisor": torch.ones(3)}),
    ("divisor", {"divisor": None}),
    ("mask.window", {"mask": Mask(window=0)}),
    ("mask.full_tail", {"mask": Mask(window=1, full_tail=-1)}),
    ("mask.target_group", {"mask": Mask(target_group=0)}),
    ("mask.num_targets", {"mask": Mask(num_targets=torch.tensor([1]))}),
    ("mask.num_targets", {"mask": Mask(num_targets=torch.tensor([3, 0]))}),
    ("mask.num_targets", {"mask": Mask(num_targets=torch.tensor([1.0, 0.0]))}),
    ("mask.num_contextual", {"mask": Mask(num_contextual=torch.tensor([-1, 0]))}),
    ("bias.position_table", {"bias": RelativeBias(position_table=torch.zeros(4))}),
    ("bias.position_table", {"bias": RelativeBias(position_table=torch.zeros(3, 5))}),
    ("bias.position_ids", {"bias": RelativeBias(position_table=torch.zeros(5), position_ids="token")}),
    (
        "bias.time_table",
        {"bias": RelativeBias(time_table=torch.zeros(0), key_times=TIMES, query_times=TIMES)},
    ),
    ("bias.query_times", {"bias": RelativeBias(time_table=torch.zeros(4), key_times=TIMES)}),
    (
        "bias.key_times",
        {"bias": RelativeBias(time_table=torch.zeros(4), key_times=TIMES * 1.0, query_times=TIMES)},
    ),
    ("bias.bucket_width", {"bias": RelativeBias(position_table=torch.zeros(5), bucket_width=0.0)}),
    ("backend", {"backend": "cuda"}),
]


@pytest.mark.parametrize(("name", "changes"), BAD, ids=[f"{i}-{name.strip()}" for i, (name, _) in enumerate(BAD)])
def test_a_wrong_argument_is_named(name, changes):
    with pytest.raises(ValueError, match=f"^{name}"):
        hstu_attention(**arguments(**changes))


def test_the_unchanged_call_is_right_with_either_integer_type():
    assert hstu_attention(**arguments()).shape == (5, 2, 4)
    assert hstu_attention(**arguments(q_offsets=torch.tensor([0, 2, 5], dtype=torch.int32))).shape == (
        5,
        2,
        4,
    )


def test_backend_is_the_argument_else_the_environment_else_auto(monkeypatch):
    monkeypatch.delenv("GR_HSTU_BACKEND", raising=False)
    assert choose_backend() == "reference"
    monkeypatch.setenv("GR_HSTU_BACKEND", "nonsense")
    assert choose_backend("reference") == "reference"
    with pytest.raises(ValueError, match="environment variable GR_HSTU_BACKEND must be one of auto, reference"):
        choose_backend()


def test_low_precision_inputs_keep_their_dtype_under_autocast():
    """The dtype of q decides; bf16 autocast around it does not."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert hstu_attention(**arguments()).dtype == torch.float32
        half = {name: arguments()[name].bfloat16() for name in "qkv"}
        assert hstu_attention(**arguments(**half)).dtype == torch.bfloat16
