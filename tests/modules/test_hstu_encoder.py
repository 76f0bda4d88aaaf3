"""The HSTU encoder: its presets, its formula, causality, and what it refuses."""

from __future__ import annotations

from dataclasses import fields
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from gr.errors import UserError
from gr.modules.encoders import ENCODERS
from gr.modules.hstu import PRESETS, HSTUConfig, HSTULayer, build_hstu, resolve


def make_batch(lengths, max_seq_len=None, **rows):
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    times = torch.cat([torch.arange(n) * 3600 + 10 * n for n in lengths]) if lengths else torch.zeros(0).long()
    return SimpleNamespace(
        offsets=offsets,
        max_seq_len=max(lengths) if max_seq_len is None else max_seq_len,
        tokens={"timestamp": times, "query_time": times + 1800},
        rows={name: torch.tensor(values) for name, values in rows.items()},
    )


def small(preset="paper", **changes) -> HSTUConfig:
    return HSTUConfig(preset=preset, **{"num_heads": 2, "dim_qk": 3, "dim_v": 4, **changes})


def shaken(module):
    """Parameters away from their special initial values (zeros, ones), so that each one matters."""
    torch.manual_seed(0)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return module.double().eval()


@pytest.mark.parametrize("preset", ["paper", "dlrm_v3"])
def test_resolving_leaves_no_choice_open_and_is_idempotent(preset):
    explicit = resolve(HSTUConfig(preset=preset, dim_qk=64), 211)
    open_fields = {f.name for f in fields(explicit) if getattr(explicit, f.name) is None}
    assert open_fields == {"window", "full_tail", "target_group"}
    assert resolve(explicit, 5) == explicit
    assert explicit.divisor == 211.0
    assert explicit.alpha == (1.0 if preset == "paper" else 0.125)


def test_presets_are_the_two_columns_of_the_reference():
    differ = {name for name in PRESETS["paper"] if PRESETS["paper"][name] != PRESETS["dlrm_v3"][name]}
    assert differ == set(PRESETS["paper"]) - {"output_norm", "gate_activation"}
    assert set(PRESETS["paper"]) == set(PRESETS["dlrm_v3"])
    paper, production = resolve(HSTUConfig(preset="paper"), 12), resolve(HSTUConfig(preset="dlrm_v3"), 12)
    assert (paper.activated, production.activated) == ("uvqk", "u")
    assert (paper.position_bias, paper.time_bias) == (True, True)
    assert (production.position_bias, production.time_bias) == (False, False)
    assert (paper.concat, production.concat) == ("none", "u_av_uav")


def test_a_field_given_wins_over_its_preset():
    explicit = resolve(HSTUConfig(preset="dlrm_v3", alpha=2.0, uvqk_bias=False, divisor="visible", time_bias=True), 12)
    assert (explicit.alpha, explicit.uvqk_bias, explicit.divisor, explicit.time_bias) == (
        2.0,
        False,
        "visible",
        True,
    )


def test_parameters_are_those_of_the_formula():
    dim, inner = 10, 2 * (2 * 3 + 2 * 4)
    paper = HSTULayer(resolve(small(), 12), dim, 12)
    assert {name: tuple(p.shape) for name, p in paper.named_parameters()} == {
        "uvqk.weight": (inner, dim),
        "out.weight": (dim, 8),
        "out.bias": (dim,),
        "position_table": (23,),
        "time_table": (129,),
    }
    production = HSTULayer(resolve(small("dlrm_v3", output_norm="group"), 12), dim, 12)
    assert {name: tuple(p.shape) for name, p in production.named_parameters()} == {
        "input_norm.weight": (dim,),
        "input_norm.bias": (dim,),
        "uvqk.weight": (inner, dim),
        "uvqk.bias": (inner,),
        "output_norm.weight": (2,),
        "output_norm.bias": (2,),
        "out.weight": (dim, 24),
    }


def test_initial_values_are_those_of_the_reference():
    torch.manual_seed(1)
    layer = HSTULayer(resolve(HSTUConfig(num_heads=4, dim_qk=64, dim_v=64), 200), 256, 200)
    for values in (layer.uvqk.weight, layer.position_table, layer.time_table):
        assert values.std().item() == pytest.approx(0.02, rel=0.2)
    bound = (6 / (256 + 256)) ** 0.5
    assert layer.out.weight.abs().max().item() == pytest.approx(bound, rel=0.01)


def test_a_paper_layer_is_its_dense_formula():
    n, dim = 5, 6
    encoder = shaken(build_hstu(small(num_layers=1, divisor=7.0), dim, 12))
    layer, batch = encoder.layers[0], make_batch([n])
    x = torch.randn(n, dim, dtype=torch.float64)

    normed = (x - x.mean(1, keepdim=True)) / (x.var(1, unbiased=False, keepdim=True) + 1e-6).sqrt()
    u, v, q, k = F.silu(normed @ layer.uvqk.weight.T).split([8, 8, 6, 6], dim=1)
    i, j = torch.meshgrid(torch.arange(n), torch.arange(n), indexing="ij")
    seconds = (batch.tokens["query_time"][:, None] - batch.tokens["timestamp"][None, :]).abs().clamp(min=1)
    bias = layer.position_table[j - i + 11] + layer.time_table[(seconds.double().log() / 0.301).floor().long()]
    heads = []
    for h in range(2):
        scores = q[:, 3 * h : 3 * h + 3] @ k[:, 3 * h : 3 * h + 3].T + bias
        heads.append((F.silu(scores) * (j <= i)) @ v[:, 4 * h : 4 * h + 4] / 7.0)
    gated = u * F.layer_norm(torch.cat(heads, dim=1), (8,), eps=1e-6)
    torch.testing.assert_close(encoder(x, batch), x + gated @ layer.out.weight.T + layer.out.bias)


@pytest.mark.parametrize("norm", ["layer", "group"])
def test_a_production_layer_is_its_dense_formula(norm):
    n, dim = 5, 6
    encoder = shaken(build_hstu(small("dlrm_v3", num_layers=1, output_norm=norm), dim, 12))
    layer = encoder.layers[0]
    x = torch.randn(n, dim, dtype=torch.float64)

    normed = F.layer_norm(x, (dim,), layer.input_norm["weight"], layer.input_norm["bias"], eps=1e-6)
    u, v, q, k = (normed @ layer.uvqk.weight.T + layer.uvqk.bias).split([8, 8, 6, 6], dim=1)
    u = F.silu(u)
    heads = []
    for h in range(2):
        scores = q[:, 3 * h : 3 * h + 3] @ k[:, 3 * h : 3 * h + 3].T / 3**0.5
        heads.append(F.silu(scores).tril() @ v[:, 4 * h : 4 * h + 4] / 12.0)
    av = torch.stack(heads, dim=1)  # (n, H, d_v)
    weight, bias = layer.output_norm["weight"], layer.output_norm["bias"]
    if norm == "group":
        a = (F.layer_norm(av, (4,), eps=1e-6) * weight[:, None] + bias[:, None]).flatten(1)
    else:
        a = F.layer_norm(av.flatten(1), (8,), weight, bias, eps=1e-6)
    expected = x + torch.cat([u, av.flatten(1), u * a], dim=1) @ layer.out.weight.T
    torch.testing.assert_close(encoder(x, make_batch([n])), expected)


def test_concat_ua_and_gate_activation_are_their_formulas():
    x, u, av = (torch.randn(3, width, dtype=torch.float64) for width in (6, 8, 8))
    layer = shaken(HSTULayer(resolve(small(concat="ua", gate_activation="sigmoid"), 12), 6, 12))
    a, gate = F.layer_norm(av, (8,), eps=1e-6), u.sigmoid()
    expected = x + torch.cat([gate, a, gate * a], dim=1) @ layer.out.weight.T + layer.out.bias
    torch.testing.assert_close(layer.combine(x, u, av.view(3, 2, 4)), expected)


ENCODER_CASES = {
    "paper": ("hstu", small()),
    "paper_visible": ("hstu", small(divisor="visible", window=3, full_tail=1)),
    "dlrm_v3": ("hstu", small("dlrm_v3")),
    "transformer": ("transformer", ENCODERS["transformer"][0](num_heads=2)),
    "transformer_pre_norm": ("transformer", ENCODERS["transformer"][0](block="pre_norm", final_norm=True)),
}


@pytest.fixture(params=ENCODER_CASES.values(), ids=ENCODER_CASES.keys())
def encoder(request):
    kind, config = request.param
    return shaken(ENCODERS[kind][1](config, 6, 12)).float()


def test_a_users_output_does_not_depend_on_batch_mates(encoder):
    torch.manual_seed(2)
    x = torch.randn(16, 6)
    together = encoder(x, make_batch([4, 0, 12]))
    alone = encoder(x[:4], make_batch([4]))
    torch.testing.assert_close(together[:4], alone, rtol=1e-4, atol=1e-5)


def test_the_past_does_not_change_with_the_future(encoder):
    torch.manual_seed(3)
    x = torch.randn(9, 6)
    batch = make_batch([9])
    changed = x.clone()
    changed[6:] = torch.randn(3, 6)
    before, after = encoder(x, batch), encoder(changed, batch)
    torch.testing.assert_close(after[:6], before[:6], rtol=1e-6, atol=1e-6)
    assert not torch.allclose(after[6:], before[6:])


def test_targets_do_not_see_each_other(encoder):
    torch.manual_seed(4)
    x = torch.randn(12, 6)
    batch = make_batch([7, 5], num_targets=[3, 1], num_contextual=[1, 2])
    changed = x.clone()
    changed[5] = torch.randn(6)  # the second of three targets
    before, after = encoder(x, batch), encoder(changed, batch)
    others = [i for i in range(12) if i != 5]
    torch.testing.assert_close(after[others], before[others], rtol=1e-6, atol=1e-6)


def test_gradients_reach_every_parameter_and_an_empty_batch_is_no_error(encoder):
    encoder(torch.randn(5, 6), make_batch([2, 3])).square().sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in encoder.parameters())
    assert encoder(torch.zeros(0, 6), make_batch([0, 0])).shape == (0, 6)
    assert encoder(torch.zeros(0, 6), make_batch([], max_seq_len=0)).shape == (0, 6)


LAST_CASES = ENCODER_CASES | {
    "paper_length": ("hstu", small(divisor="length", num_layers=3)),
    "paper_window": ("hstu", small(window=3, full_tail=2, target_group=2)),
    "paper_one_layer": ("hstu", small(num_layers=1, activated="vq", uvqk_bias=True)),
    "paper_not_causal": ("hstu", small(causal=False)),
    "paper_clamped": ("hstu", small(position_ids="target_clamped")),
    "dlrm_v3_biased": ("hstu", small("dlrm_v3", position_bias=True, time_bias=True, contextual_mask=True)),
}


@pytest.mark.parametrize("rows", [{}, {"num_targets": [2, 0, 1, 3], "num_contextual": [1, 0, 0, 2]}])
@pytest.mark.parametrize(("kind", "config"), LAST_CASES.values(), ids=LAST_CASES.keys())
def test_the_last_tokens_alone_are_those_of_the_whole_output(kind, config, rows):
    encoder = shaken(ENCODERS[kind][1](config, 6, 12))
    torch.manual_seed(5)
    batch = make_batch([4, 1, 5, 12], **rows)
    x = torch.randn(22, 6, dtype=torch.float64)
    whole, last = encoder(x, batch), encoder.last(x, batch)
    torch.testing.assert_close(last, whole[batch.offsets[1:] - 1])
    with torch.no_grad():
        torch.testing.assert_close(encoder.last(x, batch), last)


@pytest.mark.parametrize("lengths", [[0, 2], [1, 1, 1], [2, 1, 0]])
def test_a_sequences_length_divides_where_there_are_as_many_rows_as_tokens(lengths):
    encoder = shaken(build_hstu(small(divisor="length"), 6, 12))
    torch.manual_seed(6)
    x = torch.randn(sum(lengths), 6, dtype=torch.float64)
    expected = torch.cat(
        [
            shaken(build_hstu(small(divisor=float(n)), 6, 12))(part, make_batch([n]))
            for part, n in zip(x.split(lengths), lengths, strict=True)
            if n
        ]
    )
    batch = make_batch(lengths)
    batch.tokens = {  # each sequence's own, as in the batches of one
        name: torch.cat([make_batch([n]).tokens[name] for n in lengths if n]) for name in batch.tokens
    }
    torch.testing.assert_close(encoder(x, batch), expected)


def test_contextual_tokens_are_ordinary_in_the_production_preset_as_shipped():
    batch = make_batch([6], num_contextual=[2])
    assert build_hstu(small("dlrm_v3"), 6, 12).mask(batch).num_contextual is None
    assert build_hstu(small("dlrm_v3", contextual_mask=True), 6, 12).mask(batch).num_contextual is not None


def test_dropout_acts_in_training_only():
    encoder = shaken(build_hstu(small(dropout=0.5), 6, 12))
    x, batch = torch.randn(5, 6, dtype=torch.float64), make_batch([5])
    assert torch.equal(encoder(x, batch), encoder(x, batch))
    encoder.train()
    assert not torch.equal(encoder(x, batch), encoder(x, batch))


def test_a_time_bias_without_times_is_refused():
    batch = make_batch([3])
    batch.tokens = {}
    with pytest.raises(UserError, match="encoder.time_bias needs timestamps"):
        build_hstu(small(), 6, 12)(torch.zeros(3, 6), batch)
    build_hstu(small(time_bias=False), 6, 12)(torch.zeros(3, 6), batch)


def test_a_sequence_longer_than_the_position_table_is_refused():
    with pytest.raises(UserError, match="up to 12 tokens .* one of 13; raise layout.max_events"):
        build_hstu(small(), 6, 12)(torch.zeros(13, 6), make_batch([13]))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_layers", 0),
        ("window", 0),
        ("full_tail", 3),
        ("dropout", 1.0),
        ("divisor", 0.0),
        ("activated", "ux"),
    ],
)
def test_an_impossible_value_is_one_sentence_that_names_the_field(field, value):
    with pytest.raises(UserError, match=f"encoder.{field}"):
        HSTUConfig(**{field: value})
