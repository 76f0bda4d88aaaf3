"""Each design plans the runs it says, at the costs it says, also on the lengths of a real log."""

from __future__ import annotations

import csv
import dataclasses
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from gr import config as configs
from gr.data.split import LeaveOneOutConfig, make_split
from gr.data.store import EventStore
from gr.errors import UserError
from gr.scaling.cells import DESIGNS, Cell
from gr.scaling.cli import main
from gr.scaling.design import load_study
from gr.scaling.plan import Bench, make_plan, plan_run
from gr.scaling.recipe import RECIPES, find_recipe
from gr.training.run_config import RunConfig
from small_study import ROOT, write_study

LENGTHS = Path(__file__).with_name("ml-1m_lengths.csv")  # how many users of MovieLens-1M have how many ratings


def ml1m_lengths() -> np.ndarray:
    """(6040,) events of each user."""
    with open(LENGTHS, newline="") as file:
        rows = [(int(row["length"]), int(row["users"])) for row in csv.DictReader(file)]
    return np.random.default_rng(0).permutation(np.repeat(*np.array(rows).T))


@pytest.fixture(scope="module")
def real_lengths() -> Bench:
    """MovieLens-1M's lengths and number of items; which items does not matter to a plan."""
    lengths = ml1m_lengths()
    assert (lengths.size, lengths.sum()) == (6040, 1_000_209)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    columns = {"item_id": np.arange(offsets[-1]) % 3706, "timestamp": np.arange(offsets[-1])}
    items = pa.table({"item_id": np.arange(3706), "title": np.arange(3706).astype(str)})
    manifest = {"content_hash": "0" * 64, "caveats": [], "source": "lengths"}
    store = EventStore(offsets, columns, 3706, 0, manifest, pa.array(np.arange(6040)), items)
    base = configs.load(RunConfig, ROOT / "configs/scaling/tiny_hstu.yaml", ["--layout.max_events=200"])
    return Bench("hstu", find_recipe("hstu-width-1"), base, store, make_split(LeaveOneOutConfig(), store))


@pytest.mark.parametrize(("budget", "scale"), [(1e11, 2), (1e12, 4), (1e13, 6), (1e14, 12)])
def test_a_plan_meets_its_budget_within_a_hundredth_on_real_lengths(real_lengths, budget, scale) -> None:
    study, _ = load_study(
        "configs/scaling/tiny.yaml", ["--limits.flop_tolerance", "0.01", "--limits.max_epochs", "9999"]
    )
    spec = plan_run(study, real_lengths, Cell(scale=scale, budget=budget), 0)
    assert abs(spec.planned["model_flops"] / budget - 1) < 0.01
    # The count is that of the lengths: tokens and pairs of the epochs that it reads, by hand.
    rows = np.minimum(ml1m_lengths() - 3, 200)
    per_epoch = np.array([rows.sum(), (rows * (rows + 1) // 2).sum()])
    read = np.array([spec.planned["tokens"], spec.planned["pairs"]])
    assert np.abs(read / spec.planned["epochs"] / per_epoch - 1).max() < (0.2 if spec.planned["epochs"] < 1 else 0.02)


def test_tokens_of_a_grid_are_read_within_a_hundredth_on_real_lengths(real_lengths) -> None:
    study, _ = load_study("configs/scaling/tiny_grid.yaml", ["--limits.flop_tolerance", "0.01"])
    for tokens in (2e5, 2e6):
        spec = plan_run(study, real_lengths, Cell(scale=4, tokens=tokens), 0)
        assert abs(spec.planned["tokens"] / tokens - 1) < 0.01
        assert abs(spec.planned["model_flops"] / spec.budget - 1) < 0.01


def test_the_dial_of_a_tandem_recipe_makes_histories_longer(real_lengths) -> None:
    study, _ = load_study("configs/scaling/tiny.yaml", ["--limits.max_epochs", "9999"])
    tandem = dataclasses.replace(real_lengths, recipe=RECIPES["hstu-tandem-1"])
    small, large = (plan_run(study, tandem, Cell(scale=s, budget=1e12), 0) for s in (2, 8))
    assert [spec.config["layout"]["max_events"] for spec in (small, large)] == [16, 64]
    assert large.planned["pairs"] / large.planned["tokens"] > 2 * small.planned["pairs"] / small.planned["tokens"]


EXPECTED = {
    "isoflop": ("tiny", [(s, c) for c in (1e9, 2e9, 4e9, 8e9) for s in (1, 2, 3, 4)]),
    "grid": ("tiny_grid", [(s, d) for d in (5e3, 1.5e4, 5e4) for s in (1, 2, 3)]),
    "ladder": ("tiny_ladder", [(1, 5e8), (1, 1e9), (2, 1e9), (2, 2e9), (2, 4e9), (3, 4e9), (3, 8e9)]),
    "length": ("tiny_length", [(s, c, n) for c in (1e9, 2e9, 4e9) for n in (6, 12, 28) for s in (1, 2, 3)]),
    "data": ("tiny_data", [(s, c, u) for c in (1e9, 2e9, 4e9) for u in (100, 200, 298) for s in (1, 2, 3)]),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Every shipped design beside a base of 300 users."""
    folder = tmp_path_factory.mktemp("designs")
    write_study(folder)
    for name, _ in EXPECTED.values():
        text = (ROOT / f"configs/scaling/{name}.yaml").read_text()
        (folder / f"{name}.yaml").write_text(text.replace("[500, 1500, 6000]", "[100, 200, 298]"))
    return folder


@pytest.mark.parametrize("kind", DESIGNS)
def test_a_design_plans_its_cells(kind, place) -> None:
    name, cells = EXPECTED[kind]
    limits = ["--limits.max_epochs", "9999", "--limits.flop_tolerance", "0.2", "--cache", str(place / "cache")]
    study, path = load_study(str(place / f"{name}.yaml"), limits)
    assert study.design.kind == kind
    plan = make_plan(study, path)
    assert not plan.rejected

    def seen(spec) -> tuple:
        config = spec.config
        spent = spec.planned["tokens"] if kind == "grid" else spec.budget
        more = {"length": (config["layout"]["max_events"],), "data": (config["train_users"],)}.get(kind, ())
        return (spec.scale, spent, *more)

    found = [seen(spec) for spec in plan.specs if spec.seed == 0]
    assert np.allclose(found, cells, rtol=0.05 if kind == "grid" else 0)
    held = {spec.budget for spec in plan.specs if spec.holdout}
    assert held == ({8e9} if kind in ("isoflop", "ladder") else held) and bool(held) == (kind not in ("length", "data"))
    hashes = {spec.eval_hash for spec in plan.specs}
    assert len(hashes) == 1  # all are judged alike: on every user, at the same places


def test_fewer_training_users_read_their_data_more_often(place) -> None:
    limits = ["--limits.max_epochs", "9999", "--limits.flop_tolerance", "0.2", "--cache", str(place / "cache")]
    plan = make_plan(*load_study(str(place / "tiny_data.yaml"), limits))
    epochs = {spec.config["train_users"]: spec.planned["epochs"] for spec in plan.specs if spec.scale == 1}
    assert 2.8 < epochs[100] / epochs[298] < 3.2
    assert {spec.config["data"]["num_users"] for spec in plan.specs} == {300}


@pytest.mark.parametrize(
    ("design", "sentence"),
    [
        ({"kind": "isoflop", "budgets": [1e9, 1e9], "scales": [1]}, "design.budgets is [1000000000.0, 1000000000.0]"),
        ({"kind": "grid", "tokens": [], "scales": [1]}, "design.tokens is []; it must be different numbers above 0"),
        ({"kind": "ladder", "budgets": [1e9, 2e9], "scales": [[1]]}, "has 1 lists; a ladder has one for each of its 2"),
        ({"kind": "length", "budgets": [1e9], "scales": [1], "lengths": [0]}, "design.lengths is [0]"),
        ({"kind": "data", "budgets": [1e9], "scales": [1], "users": [5, 5]}, "design.users is [5, 5]"),
        ({"kind": "spiral"}, "spiral"),
        ({"kind": "grid", "tokens": [1e9], "scales": [1], "budgets": [1]}, "unknown field design.budgets"),
    ],
)
def test_designs_that_cannot_be_are_refused(design, sentence, place) -> None:
    import yaml

    raw = yaml.safe_load((place / "tiny.yaml").read_text())
    (place / "wrong.yaml").write_text(yaml.safe_dump({**raw, "design": design, "holdout": {}}))
    with pytest.raises(UserError) as told:
        load_study(str(place / "wrong.yaml"))
    assert sentence in str(told.value)


def test_more_training_users_than_there_are_are_refused(place) -> None:
    with pytest.raises(UserError, match="train_users is 900; 300 users have 2 training events"):
        main(["plan", str(place / "tiny_data.yaml"), "--design.users", "[900]", "--cache", str(place / "cache")])


def test_holding_out_what_is_not_there_or_everything_is_refused() -> None:
    with pytest.raises(UserError, match=r"holdout.budgets has 5e\+09, which is none of the design's"):
        load_study("configs/scaling/tiny.yaml", ["--holdout.budgets", "[5e9]"])
    with pytest.raises(UserError, match="holdout holds every cell of the design"):
        load_study("configs/scaling/tiny_grid.yaml", ["--holdout.tokens", "[5e3, 1.5e4, 5e4]"])
