"""Every wrong argument of the operator is refused in a sentence that starts with its name."""

from __future__ import annotations

import pytest
import torch

from gr.kernels.hstu_attention import Mask, RelativeBias, hstu_attention
from gr.kernels.hstu_attention.op import BACKENDS, choose_backend
from hstu_cases import CASES

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


def position(**changes):
    return {"bias": RelativeBias(**({"position_table": torch.zeros(5)} | changes))}


def time(**changes):
    return {
        "bias": RelativeBias(**({"time_table": torch.zeros(4), "key_times": TIMES, "query_times": TIMES} | changes))
    }


META = {"device": "meta"}

# The name a message starts with, and what is wrong.
BAD = [
    # tensors
    ("q ", {"q": None}),
    ("q ", {"q": torch.zeros(5, 6)}),
    ("q ", {"q": torch.zeros(5, 2, 3, dtype=torch.int64)}),
    ("k ", {"k": [1.0]}),
    ("k ", {"k": torch.zeros(5, 1, 3)}),
    ("k ", {"k": torch.zeros(5, 2, 4)}),
    ("k ", {"k": torch.zeros(5, 2, 3, dtype=torch.float64)}),
    ("k ", {"k": torch.zeros(5, 2, 3, **META)}),
    ("v ", {"v": torch.zeros(4, 2, 4)}),
    ("v ", {"v": torch.zeros(5, 3, 4)}),
    ("v ", {"v": torch.zeros(5, 2, 4, dtype=torch.bfloat16)}),
    ("v ", {"v": torch.zeros(5, 2, 4, **META)}),
    # offsets
    ("q_offsets", {"q_offsets": [0, 2, 5]}),
    ("q_offsets", {"q_offsets": torch.tensor([0.0, 5.0])}),
    ("q_offsets", {"q_offsets": torch.tensor([], dtype=torch.int64)}),
    ("q_offsets", {"q_offsets": torch.tensor([[0, 2, 5]])}),
    ("q_offsets", {"q_offsets": torch.zeros(3, dtype=torch.int64, **META)}),
    ("q_offsets", {"q_offsets": torch.tensor([0, 4])}),
    ("q_offsets", {"q_offsets": torch.tensor([0, 6, 5])}),
    ("q_offsets", {"q_offsets": torch.tensor([1, 2, 5])}),
    ("kv_offsets", {"k": torch.zeros(6, 2, 3), "v": torch.zeros(6, 2, 4)}),
    ("kv_offsets", {"kv_offsets": [0, 2, 5]}),
    ("kv_offsets", {"kv_offsets": torch.tensor([0, 5])}),
    ("kv_offsets", {"kv_offsets": torch.tensor([0, 2, 4])}),
    ("kv_offsets", {"kv_offsets": torch.tensor([0, 6, 5])}),
    ("kv_offsets", {"kv_offsets": torch.tensor([0, 3, 5])}),
    ("kv_offsets", {"kv_offsets": torch.zeros(3, dtype=torch.int64, **META)}),
    # numbers
    ("alpha", {"alpha": None}),
    ("alpha", {"alpha": True}),
    ("alpha", {"alpha": float("nan")}),
    ("alpha", {"alpha": torch.rand(5, 1, 1)}),
    ("max_seq_len", {"max_seq_len": 2}),
    ("max_seq_len", {"max_seq_len": -1}),
    ("max_seq_len", {"max_seq_len": 3.0}),
    ("max_seq_len", {"max_seq_len": True}),
    # divisor
    ("divisor", {"divisor": None}),
    ("divisor", {"divisor": True}),
    ("divisor", {"divisor": 0.0}),
    ("divisor", {"divisor": -1}),
    ("divisor", {"divisor": float("inf")}),
    ("divisor", {"divisor": float("nan")}),
    ("divisor", {"divisor": "length"}),
    ("divisor", {"divisor": torch.ones(3)}),
    ("divisor", {"divisor": torch.ones(5, 2)}),
    ("divisor", {"divisor": torch.tensor(2.0)}),
    ("divisor", {"divisor": torch.ones(2, **META)}),
    ("divisor", {"divisor": torch.tensor([1.0, 0.0])}),
    ("divisor", {"divisor": torch.tensor([1.0, float("nan")])}),
    ("divisor", {"divisor": torch.tensor([1, -1])}),
    ("divisor", {"divisor": torch.tensor([True, True])}),
    ("divisor", {"divisor": torch.tensor([1j, 1.0])}),
    ("divisor", {"divisor": torch.ones(2, requires_grad=True)}),
    # mask
    ("mask ", {"mask": {"causal": True}}),
    ("mask.causal", {"mask": Mask(causal=1)}),
    ("mask.window", {"mask": Mask(window=0)}),
    ("mask.window", {"mask": Mask(window=-3)}),
    ("mask.window", {"mask": Mask(window=2.0)}),
    ("mask.window", {"mask": Mask(window=True)}),
    ("mask.full_tail", {"mask": Mask(window=1, full_tail=-1)}),
    ("mask.target_group", {"mask": Mask(target_group=0)}),
    ("mask.num_targets", {"mask": Mask(num_targets=[1, 1])}),
    ("mask.num_targets", {"mask": Mask(num_targets=torch.tensor([1]))}),
    ("mask.num_targets", {"mask": Mask(num_targets=torch.tensor([3, 0]))}),
    ("mask.num_targets", {"mask": Mask(num_targets=torch.tensor([1.0, 0.0]))}),
    ("mask.num_targets", {"mask": Mask(num_targets=torch.zeros(2, dtype=torch.int64, **META))}),
    ("mask.num_targets", {"mask": Mask(num_contextual=torch.tensor([1, 2]), num_targets=torch.tensor([1, 2]))}),
    ("mask.num_contextual", {"mask": Mask(num_contextual=torch.tensor([-1, 0]))}),
    ("mask.num_contextual", {"mask": Mask(num_contextual=torch.tensor([0, 4]))}),
    # bias
    ("bias ", {"bias": torch.zeros(2, 2, 3, 3)}),
    ("bias.position_table", position(position_table=[0.0] * 5)),
    ("bias.position_table", position(position_table=torch.zeros(4))),
    ("bias.position_table", position(position_table=torch.zeros(3, 5))),
    ("bias.position_table", position(position_table=torch.zeros(5, dtype=torch.int64))),
    ("bias.position_table", position(position_table=torch.zeros(5, **META))),
    ("bias.position_table", position(position_table=torch.zeros(3))),
    ("bias.position_table", position(position_table=torch.zeros(2, 3))),
    ("bias.position_table", position() | {"max_seq_len": 4}),
    ("bias.clamp_positions", position(clamp_positions=None)),
    ("bias.position_ids", position(position_ids="token")),
    ("bias.bucket_width", position(bucket_width=0.0)),
    ("bias.bucket_width", position(bucket_width=float("nan"))),
    ("bias.bucket_width", position(bucket_width="wide")),
    ("bias.time_table", time(time_table=torch.zeros(0))),
    ("bias.time_table", time(time_table=torch.zeros(1, 2, 4))),
    ("bias.query_times", time(query_times=None)),
    ("bias.query_times", time(query_times=TIMES[:4])),
    ("bias.query_times", time(query_times=TIMES.int())),
    ("bias.key_times", time(key_times=TIMES * 1.0)),
    ("bias.key_times", time(key_times=TIMES.to("meta"))),
    ("backend", {"backend": "cuda"}),
]


@pytest.mark.parametrize(("name", "changes"), BAD, ids=[f"{i}-{name.strip()}" for i, (name, _) in enumerate(BAD)])
def test_a_wrong_argument_is_named(name, changes):
    with pytest.raises(ValueError, match=f"^{name}"):
        hstu_attention(**arguments(**changes))


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_the_unchanged_call_is_right_with_either_integer_type(backend):
    for integers in (torch.int64, torch.int32):
        offsets = torch.tensor([0, 2, 5], dtype=integers)
        assert hstu_attention(**arguments(q_offsets=offsets), backend=backend).shape == (5, 2, 4)


def test_a_position_table_may_be_short_where_the_caller_says_so():
    short = position(position_table=torch.tensor([1.0, 2.0, 3.0]), clamp_positions=True)
    whole = position(position_table=torch.tensor([1.0, 1.0, 2.0, 3.0, 3.0]))
    torch.manual_seed(0)
    values = {name: torch.randn(5, 2, 3) for name in "qkv"}
    by_short, by_whole = (hstu_attention(**arguments(**values, **bias)) for bias in (short, whole))
    assert torch.equal(by_short, by_whole)


def test_a_divisor_that_may_mean_rows_or_queries_is_refused_unless_both_mean_the_same():
    """Three rows of 1, 0 and 2 tokens: as many rows as queries."""
    torch.manual_seed(0)
    values = {name: torch.randn(3, 2, 4) for name in "qkv"} | {"q_offsets": torch.tensor([0, 1, 1, 3])}
    with pytest.raises(ValueError, match=r"^divisor of shape \(3,\) may mean a row or a query"):
        hstu_attention(**arguments(**values, divisor=torch.tensor([2.0, 3.0, 4.0])))
    by_number, same = (hstu_attention(**arguments(**values, divisor=d)) for d in (4.0, torch.full((3,), 4.0)))
    assert torch.equal(by_number, same)
    column = hstu_attention(**arguments(**values, divisor=torch.tensor([[2.0], [4.0], [8.0]])))
    torch.testing.assert_close(column, by_number * torch.tensor([2.0, 1.0, 0.5])[:, None, None])
    ones = values | {"q_offsets": torch.tensor([0, 1, 2, 3])}  # rows of one token each: no question
    assert hstu_attention(**arguments(**ones, divisor=torch.tensor([2.0, 3.0, 4.0]))).shape == (3, 2, 4)


NAN, INF = float("nan"), float("inf")
DEEP = [
    ("q ", {"q": torch.full((5, 2, 3), NAN)}),
    ("k ", {"k": torch.full((5, 2, 3), INF)}),
    ("v ", {"v": torch.full((5, 2, 4), -INF)}),
    ("bias.position_table", position(position_table=torch.full((5,), NAN))),
    ("bias.time_table", time(time_table=torch.tensor([0.0, 1.0, INF]))),
    ("bias.query_times", time(query_times=TIMES + 2**53)),
    ("bias.query_times", time(key_times=TIMES - 2**62, query_times=TIMES + 2**62)),
    ("bias.query_times", time(key_times=TIMES.int(), query_times=TIMES.int() - 100)),
    ("bias.key_times", time(key_times=TIMES.int() + (2**31 - 5), query_times=TIMES.int())),
]


@pytest.mark.parametrize(("name", "changes"), DEEP, ids=[f"{i}-{name.strip()}" for i, (name, _) in enumerate(DEEP)])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_checked_mode_looks_at_every_value(name, changes, backend, monkeypatch):
    monkeypatch.setenv("GR_CHECKED", "0")
    hstu_attention(**arguments(**changes), backend=backend)
    monkeypatch.setenv("GR_CHECKED", "1")
    with pytest.raises(ValueError, match=f"^{name}"):
        hstu_attention(**arguments(**changes), backend=backend)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_checked_mode_lets_right_calls_through_unchanged(case, monkeypatch):
    monkeypatch.delenv("GR_CHECKED", raising=False)
    plain = hstu_attention(**case.arguments())
    monkeypatch.setenv("GR_CHECKED", "1")
    assert torch.equal(hstu_attention(**case.arguments()), plain)


def test_checked_mode_is_on_or_off(monkeypatch):
    monkeypatch.setenv("GR_CHECKED", "yes")
    with pytest.raises(ValueError, match="GR_CHECKED must be 0 or 1, got 'yes'"):
        hstu_attention(**arguments())


def test_backend_is_the_argument_else_the_environment_else_auto(monkeypatch):
    monkeypatch.delenv("GR_HSTU_BACKEND", raising=False)
    assert choose_backend() in BACKENDS
    monkeypatch.setenv("GR_HSTU_BACKEND", "reference")
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
