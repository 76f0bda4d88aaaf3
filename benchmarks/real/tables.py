"""Tables of runs on real data, for README, and the tests between them.

    python -m benchmarks.real.tables        # makes benchmarks/results/real_comparisons.json anew

A group is one model on one data set and split: its runs differ in their seed alone. Tests are paired over users: each
user's score is the mean over the group's seeds, users are resampled.
"""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.real.record import RANKS, kept_ranks, rows
from benchmarks.written import RESULTS
from gr.evaluation.metrics import per_target
from gr.evaluation.significance import paired_bootstrap

COMPARISONS = RESULTS / "real_comparisons.json"


@dataclass(frozen=True)
class Group:
    """Runs of one model that differ in their seed.

    Attributes:
        label: What the table says.
        runs: Their names without ``-s<seed>``; a baseline is a run and its kind.
        rule: What is masked when it is judged (a name of ``benchmarks.real.record.RULES``).
        published: HR@10 and NDCG@10 as printed elsewhere.
    """

    label: str
    runs: str
    rule: str
    published: tuple[float, float] | None = None

    @property
    def baseline(self) -> str | None:
        """The baseline's kind, where the group is one."""
        return self.runs.partition(":")[2] or None

    def found(self) -> list[dict[str, Any]]:
        """Rows of its runs that are there, by seed."""
        name = self.runs.partition(":")[0]
        mine = [row for row in rows().values() if row["run"].rpartition("-s")[0] == name]
        return sorted(mine, key=lambda row: row["seed"])[: 1 if self.baseline else None]

    def metrics(self, row: dict[str, Any]) -> dict[str, dict[str, float]]:
        """Test metrics of one of its rows."""
        label = {"item_knn": "ItemKNN", "markov": "Markov", "popularity": "Popularity"}.get(self.baseline or "")
        return row["metrics"][self.rule][label or row["label"]]

    def per_user(self, metric: str) -> tuple[str, np.ndarray]:
        """(hash of the targets, (n,) mean over seeds of each one's score)."""
        tail = f".{self.baseline}" if self.baseline else ""
        found = [kept_ranks(RANKS / f"{row['run']}.{self.rule}{tail}.parquet") for row in self.found()]
        assert len({targets for _, targets in found}) == 1, "seeds are judged on the same targets"
        return found[0][1], np.mean([per_target(ranks, metric) for ranks, _ in found], axis=0)


ML1M = (
    Group("HSTU-large", "ml-1m_hstu-large", "window", (0.3294, 0.1893)),
    Group("HSTU, our recipe", "ml-1m_best", "window"),
    Group("HSTU", "ml-1m_hstu", "window", (0.3097, 0.1720)),
    Group("SASRec", "ml-1m_sasrec", "window", (0.2853, 0.1603)),
    Group("HSTU without relative bias", "ml-1m_hstu-norab", "window"),
    Group("HSTU, ties shuffled", "ml-1m_hstu-ties", "window", (0.3097, 0.1720)),
    Group("SASRec, ties shuffled", "ml-1m_sasrec-ties", "window", (0.2853, 0.1603)),
    Group("ItemKNN, default setting", "ml-1m_hstu:item_knn", "window"),
    Group("ItemKNN, default setting, ties shuffled", "ml-1m_hstu-ties:item_knn", "window"),
    Group("Popularity", "ml-1m_hstu:popularity", "window"),
)
BEAUTY = (
    Group("HSTU, our recipe", "beauty_hstu", "mask"),
    Group("ItemKNN", "beauty_hstu:item_knn", "mask"),
    Group("Markov", "beauty_hstu:markov", "mask"),
    Group("Popularity", "beauty_hstu:popularity", "mask"),
    Group("HSTU, our recipe, days shuffled", "beauty_hstu-ties", "mask"),
    Group("ItemKNN, days shuffled", "beauty_hstu-ties:item_knn", "mask"),
    Group("Markov, days shuffled", "beauty_hstu-ties:markov", "mask"),
)
OTHERS = tuple(
    Group(f"{data}: {model}", f"{name}_hstu{kind}", "mask")
    for data, name in (("Sports", "sports"), ("Toys", "toys"), ("Yelp 2019", "yelp"))
    for model, kind in (("HSTU", ""), ("ItemKNN", ":item_knn"), ("Markov", ":markov"))
)
"""Beauty's recipe as it is, on other logs."""


def _ml100k(tail: str) -> tuple[Group, ...]:
    """``tail``: what the names of a split's runs end in."""
    run, counted = f"ml-100k_hstu{tail}", {"ItemKNN": "item_knn", "Markov": "markov", "Popularity": "popularity"}
    return (
        Group("HSTU", run, "mask"),
        Group("HSTU without time bias", f"ml-100k_hstu-notime{tail}", "mask"),
        Group("SASRec", f"ml-100k_sasrec{tail}", "mask"),
        *(Group(label, f"{run}:{kind}", "mask") for label, kind in counted.items()),
    )


ML100K = _ml100k("")
ML100K_TEMPORAL = _ml100k("-temporal")


def named(groups: tuple[Group, ...], label: str) -> Group:
    """The group of that label."""
    return next(group for group in groups if group.label == label)


TESTS = (
    (named(ML1M, "HSTU"), named(ML1M, "SASRec")),
    (named(ML1M, "HSTU"), named(ML1M, "HSTU without relative bias")),
    (named(ML1M, "HSTU, ties shuffled"), named(ML1M, "SASRec, ties shuffled")),
    (named(ML1M, "HSTU, our recipe"), named(ML1M, "HSTU")),
    (BEAUTY[0], BEAUTY[1]),
    (BEAUTY[4], BEAUTY[5]),
    *((OTHERS[i], OTHERS[i + 1]) for i in range(0, len(OTHERS), 3)),
    *(
        (named(groups, one), named(groups, other))
        for groups in (ML100K, ML100K_TEMPORAL)
        for one, other in (
            ("HSTU", "HSTU without time bias"),
            ("HSTU", "SASRec"),
            ("HSTU", "ItemKNN"),
            ("SASRec", "ItemKNN"),
        )
    ),  # fmt: skip
)


def key(one: Group, other: Group) -> str:
    """Name of a test."""
    return f"{one.runs} - {other.runs}"


def comparisons() -> dict[str, Any]:
    """Every test whose runs are all there."""
    made = {}
    for one, other in TESTS:
        if not one.found() or not other.found():
            continue
        for metric in ("hr@10", "ndcg@10"):
            targets, ours = one.per_user(metric)
            also, theirs = other.per_user(metric)
            assert targets == also, "tests are of the same targets"
            found = paired_bootstrap(ours, theirs, metric=metric)  # these splits hold out one event a user
            made.setdefault(key(one, other), {})[metric] = {
                "difference": round(found.difference, 5),
                "low": round(found.low, 5),
                "high": round(found.high, 5),
                "p": round(found.p_value, 5),
                "seeds": [len(one.found()), len(other.found())],
            }
    return made


def table(groups: tuple[Group, ...], ks: tuple[int, ...] = (10, 50)) -> str:
    """Markdown: mean over seeds and their standard deviation."""
    published = any(group.published for group in groups)
    names = ["hr@10", "ndcg@10", *(f"hr@{k}" for k in ks if k != 10)]
    head = ["", "seeds", "HR@10", "sd", "NDCG@10", "sd", *(n.upper() for n in names[2:])]
    head += ["published HR@10", "NDCG@10"] if published else []
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for group in groups:
        found = [group.metrics(row) for row in group.found()]
        if not found:
            continue
        values = {name: [metrics[name]["mean"] for metrics in found] for name in names if name in found[0]}
        spread = {n: f"{statistics.stdev(v):.4f}" if len(v) > 1 else "" for n, v in values.items()}
        cells = [group.label, "-" if group.baseline else str(len(found))]
        for name in names:
            cells.append(f"{statistics.mean(values[name]):.4f}" if name in values else "")
            cells += [spread[name]] if name in ("hr@10", "ndcg@10") else []
        if published:
            cells += [f"{x:.4f}" for x in group.published] if group.published else ["", ""]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def made(one: Group, other: Group) -> bool:
    """Whether a test's result is there."""
    return COMPARISONS.exists() and key(one, other) in json.loads(COMPARISONS.read_text())


def sentence(one: Group, other: Group, metric: str = "ndcg@10") -> str:
    """One line on a test."""
    found = json.loads(COMPARISONS.read_text())[key(one, other)][metric]
    return (
        f"{one.label} less {other.label}, {metric.upper()}: {found['difference']:+.4f} "
        f"(95 % {found['low']:+.4f} to {found['high']:+.4f}, p {_p(found['p'])}; paired over users, for these very "
        f"{found['seeds'][0]} and {found['seeds'][1]} runs: other seeds vary as the sd says)."
    )


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"= {value:.3f}"


def main() -> None:
    COMPARISONS.write_text(json.dumps(comparisons(), indent=1) + "\n")
    parts = [table(ML1M, (10, 50, 200)), *(table(groups, (5, 10, 20)) for groups in (BEAUTY, OTHERS))]
    parts += [table(groups, (10, 50)) for groups in (ML100K, ML100K_TEMPORAL)]
    print(*parts, COMPARISONS.read_text(), sep="\n\n")


if __name__ == "__main__":
    main()
