"""Numbers and sentences of the report, in plain words."""

from __future__ import annotations

from typing import Any

from gr.report.run_data import RunData, metric_names

# ``evaluation.mask_seen`` in words.
SEEN_RULES = {
    False: "items already seen stay in",
    True: "items already seen are left out",
    "window": "items among the latest events, which the model reads, are left out",
}


def percent(value: float) -> str:
    """0.4123 -> '41 %'; below ten per cent one decimal is kept."""
    digits = 0 if abs(value) >= 0.0995 else 1
    return f"{100 * value:.{digits}f} %"


def metric_label(name: str) -> str:
    """'hr@10' -> 'HR@10'."""
    return name.upper()


def metric_help(name: str) -> str:
    """What a metric says, for the note under the table."""
    kind, _, cut = name.partition("@")
    if kind == "hr":
        return f"{metric_label(name)}: share of held-out items found among the top {cut}"
    if kind == "ndcg":
        return f"{metric_label(name)}: the same with a hit at rank r counting 1 / log2(r + 1)"
    if kind == "mrr":
        return f"{metric_label(name)}: mean of 1 / rank"
    return metric_label(name)


def headline_metric(run: RunData) -> str:
    """HR@10 where it was measured, else the hit rate nearest to it, else the first metric."""
    names = metric_names(run.results["metrics"][run.model])
    hits = [n for n in names if n.startswith("hr@")]
    return min(hits, key=lambda n: abs(int(n[3:]) - 10)) if hits else names[0]


def best_baseline(run: RunData, metric: str) -> str | None:
    """The baseline with the highest mean; ``None`` if none measured the metric."""
    scored = [name for name in run.baselines if metric in run.results["metrics"][name]]
    return max(scored, key=lambda name: run.results["metrics"][name][metric]["mean"]) if scored else None


def whom(run: RunData) -> str:
    """What one score counts: a user where each user has one held-out event, else a held-out event."""
    data = run.results["data"]
    one_each = "temporal" not in str(run.results["protocol"].get("split", ""))
    return "users" if one_each and data.get("test_targets", 0) <= data.get("users", 0) else "held-out events"


def headline(run: RunData) -> list[tuple[str, bool]]:
    """The result in one sentence, as (text, emphasised) pieces."""
    metric = headline_metric(run)
    scores = run.results["metrics"]
    mine = scores[run.model][metric]["mean"]
    if not metric.startswith("hr@"):
        pieces = [(f"{run.model} reaches a {metric_label(metric)} of ", False), (f"{mine:.3f}", True)]
        value = "{:.3f}".format
    else:
        cut = metric.partition("@")[2]
        where = "as its first suggestion" if cut == "1" else f"among its top {cut}"
        pieces = [
            (f"{run.model} finds the next item {where} for ", False),
            (percent(mine), True),
            (f" of {whom(run)}", False),
        ]
        value = percent
    rival = best_baseline(run, metric)
    if rival is not None:
        theirs = scores[rival][metric]["mean"]
        if theirs > mine:
            pieces += [
                (f"; the best counting baseline, {rival}, does better with ", False),
                (value(theirs), True),
            ]
        else:
            pieces += [
                (
                    "; the best counting baseline for " if value is percent else "; the best counting baseline ",
                    False,
                ),
                (value(theirs), True),
            ]
    if metric in run.ceiling:
        joint = ", and " if rival is not None else "; "
        pieces += [
            (f"{joint}nothing could do better than ", False),
            (value(run.ceiling[metric]), True),
            (" on this data", False),
        ]
    return [*pieces, (".", False)]


def doubts(run: RunData) -> list[str]:
    """Reasons not to believe the headline that the numbers themselves give."""
    metric = headline_metric(run)
    mine = run.results["metrics"][run.model][metric]
    rival = best_baseline(run, metric)
    found = []
    paired = run.results.get("comparison")
    if paired and paired["low"] <= 0 <= paired["high"]:
        found.append(
            f"On the same users {run.model} and {paired['rival']} cannot be told apart by "
            f"{metric_label(paired['metric'])}."
        )
    elif paired:
        pass  # the same users were compared, which says more than two intervals do
    elif rival is not None:
        theirs = run.results["metrics"][rival][metric]
        if mine["low"] <= theirs["high"] and theirs["low"] <= mine["high"]:
            found.append(
                f"The 95 % intervals of {run.model} and {rival} overlap: at {metric_label(metric)} this run "
                "alone does not show which of the two is better."
            )
    else:
        found.append("No baseline was measured: there is nothing to compare these numbers with.")
    return found


def comparison(run: RunData) -> str:
    """The paired comparison with the best baseline in one sentence; empty where none was made."""
    paired = run.results.get("comparison")
    if not paired:
        return ""
    low, high = sorted((abs(paired["low"]), abs(paired["high"])))
    sides = "higher" if paired["difference"] >= 0 else "lower"
    if paired["low"] <= 0 <= paired["high"]:
        span = f"{paired['low']:+.4f} to {paired['high']:+.4f}"
    else:
        span = f"{low:.4f} to {high:.4f}"
    users, metric = count(paired.get("num_users")), metric_label(paired["metric"])
    return (
        f"On the same {users} users, the {metric} of {run.model} is "
        f"{abs(paired['difference']):.4f} {sides} than that of {paired['rival']} (95 % interval {span}, "
        "paired bootstrap over users)."
    )


def count(value: Any) -> str:
    """1234567 -> '1,234,567'; other values as they are; a missing one is a dash."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) or (isinstance(value, float) and value.is_integer() and abs(value) >= 1):
        return f"{int(value):,}"
    if isinstance(value, float):
        return f"{value:,.1f}" if abs(value) >= 10 else f"{value:.3g}"
    return str(value)


def duration(seconds: float | None) -> str:
    """200 -> '3 min 20 s'."""
    if seconds is None:
        return "–"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def with_unit(value: float | None, unit: str) -> str:
    """1.2e13 -> '12 T' + unit."""
    if value is None:
        return "–"
    for size, prefix in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}"
