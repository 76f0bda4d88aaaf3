"""Strict configs: what is accepted, what is refused, and in which words."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import pytest

from gr import config as configs
from gr.config import OneOf, runtime
from gr.errors import UserError, run_cli


@dataclass(frozen=True)
class Small:
    kind: str = "small"
    width: int = 4


@dataclass(frozen=True)
class Large:
    kind: str = "large"
    depth: int = 2
    rate: float = 0.5

    def __post_init__(self):
        if self.depth < 1:
            raise UserError(f"depth is {self.depth}; it must be at least 1")


class Mine:
    @dataclass(frozen=True)
    class Config:
        kind: str
        colour: str = "red"

    def __init__(self, cfg):
        self.cfg = cfg


PARTS = {"small": (Small, lambda c: ("small", c.width)), "large": (Large, lambda c: ("large", c.depth))}


@dataclass(frozen=True)
class Inner:
    lr: float = 0.1
    betas: tuple[float, float] = (0.9, 0.99)
    mode: Literal["a", "b"] = "a"
    names: tuple[str, ...] = ()
    limit: int | None = None
    on: bool = False


@dataclass(frozen=True)
class Root:
    name: str
    inner: Inner = field(default_factory=Inner)
    part: Annotated[Any, OneOf(PARTS, default="small")] = field(default_factory=Small)
    extra: dict[str, int] = field(default_factory=dict)
    path: str = runtime("here")


def load(tmp_path, text, *overrides):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    return configs.load(Root, path, overrides)


def test_yaml_and_overrides_meet_in_frozen_dataclasses(tmp_path):
    got = load(
        tmp_path, "name: x\ninner: {lr: 1e-3, betas: [0, 1], limit: null}\npart: {kind: large}\n",
        "--inner.mode", "b", "--inner.on=true", "--inner.names", "[p, q]", "--part.depth", "3", "--inner.limit", "7",
    )  # fmt: skip
    assert got.inner == Inner(0.001, (0.0, 1.0), "b", ("p", "q"), 7, True)
    assert got.part == Large(depth=3)
    assert isinstance(got.inner.betas[0], float)
    with pytest.raises(AttributeError):
        got.name = "y"


@pytest.mark.parametrize(
    ("text", "overrides", "words"),
    [
        ("name: x\ninner: {lrr: 1}", (), ["c.yaml", "inner.lrr", "did you mean inner.lr?"]),
        ("name: x", ("--iner.lr", "1"), ["unknown field iner", "did you mean inner?"]),
        ("name: x\ninner: {lr: fast}", (), ["inner.lr", "'fast'", "float"]),
        ("name: x\ninner: {limit: 1.5}", (), ["inner.limit", "1.5", "int"]),
        ("name: x\ninner: {on: 1}", (), ["inner.on", "bool"]),
        ("name: x\ninner: {limit: true}", (), ["inner.limit", "True", "int"]),
        ("name: x\ninner: {mode: c}", (), ["inner.mode", "'c'", "'a', 'b'"]),
        ("name: x\ninner: {betas: [1, 2, 3]}", (), ["inner.betas", "3 values", "2"]),
        ("name: x\ninner: 3", (), ["inner", "3", "mapping"]),
        ("name: 3", (), ["name", "3", "str"]),
        ("inner: {}", (), ["field name is missing"]),
        ("name: x\npart: {kind: larg}", (), ["part.kind", "'larg'", "did you mean 'large'?"]),
        ("name: x\npart: {kind: large, width: 3}", (), ["part.width", "depth"]),
        ("name: x\npart: {kind: large, depth: 0}", (), ["part", "depth is 0", "at least 1"]),
        ("name: x\npart: {kind: 'no.such:Thing'}", (), ["part.kind", "cannot be imported"]),
        ("name: x\nname: y", (), ["'name' stands twice"]),
        ("name: [x", (), ["c.yaml", "not valid YAML"]),
        ("- name", (), ["mapping"]),
        ("name: x", ("lr", "1"), ["unexpected argument 'lr'"]),
        ("name: x", ("--inner.lr",), ["--inner.lr needs a value"]),
        ("name: x", ("--name.lr", "1"), ["name is a value"]),
    ],
)
def test_each_mistake_is_one_sentence_that_names_the_field(tmp_path, text, overrides, words):
    with pytest.raises(UserError) as caught:
        load(tmp_path, text, *overrides)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


def test_a_missing_file_suggests_its_neighbour(tmp_path):
    (tmp_path / "quickstart.yaml").write_text("")
    with pytest.raises(UserError, match=r"quickstrat.yaml does not exist; did you mean .*quickstart.yaml"):
        configs.load(Root, tmp_path / "quickstrat.yaml")


def test_overriding_a_kind_starts_from_that_kind_s_defaults(tmp_path):
    got = load(tmp_path, "name: x\npart: {kind: small, width: 9}", "--part.depth", "5", "--part.kind", "large")
    assert got.part == Large(depth=5)


def test_a_users_own_part_is_imported_and_built(tmp_path):
    got = load(tmp_path, "name: x\npart: {kind: 'test_config:Mine', colour: blue}")
    assert got.part.colour == "blue"
    assert isinstance(configs.build(PARTS, got.part), configs.find({}, "test_config:Mine", "part")[1])
    assert configs.build(PARTS, Large(depth=7)) == ("large", 7)


def test_a_dumped_config_loads_back_to_itself(tmp_path):
    first = load(tmp_path, "name: x\ninner: {lr: 1e-5, names: [a]}\npart: {kind: large, rate: 2}\nextra: {k: 1}")
    assert load(tmp_path, configs.dump(first)) == first


def test_the_hash_ignores_runtime_fields_and_nothing_else(tmp_path):
    base = load(tmp_path, "name: x")
    assert configs.config_hash(base) == configs.config_hash(load(tmp_path, "name: x\npath: there"))
    assert configs.config_hash(base) == configs.config_hash(load(tmp_path, "{part: {width: 4}, name: x}"))
    for other in ("name: y", "name: x\ninner: {lr: 0.2}", "name: x\npart: {kind: large}"):
        assert configs.config_hash(base) != configs.config_hash(load(tmp_path, other))
    assert len(configs.config_hash(base)) == 12


def test_a_users_mistake_is_one_line_on_stderr_and_status_2(capsys):
    def main(argv):
        raise UserError("the file is missing; give one")

    assert run_cli(main, []) == 2
    out, err = capsys.readouterr()
    assert (out, err) == ("", "error: the file is missing; give one\n")
    with pytest.raises(ZeroDivisionError):  # our own mistakes keep their traceback
        run_cli(lambda argv: 1 // 0, [])
