"""Writes measured figures into README.md, so that none is typed by hand.

    python -m benchmarks.readme

Between ``<!-- begin NAME -->`` and ``<!-- end NAME -->`` README holds what ``SECTIONS[NAME]`` makes of the files in
``benchmarks/results/``. A test fails when they differ.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable

from benchmarks.real import tables
from benchmarks.written import RESULTS, ROOT


def quickstart() -> str:
    """What ``make train`` printed, as it was (the end of it: the table and what follows)."""
    lines = (RESULTS / "quickstart.txt").read_text().rstrip().splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("quickstart:"))
    return "```\n" + "\n".join(line.rstrip() for line in lines[first:]) + "\n```"


def quality() -> str:
    """The table of ``benchmarks.train.quality``."""
    return "\n".join(line for line in (RESULTS / "planted_quality.md").read_text().splitlines() if line[:1] == "|")


PADDED = ("plain_gemm", "plain_lean", "plain")
ALLOCATORS = {"kept": "freed memory kept", "default": "usual allocator"}


def cpu() -> str:
    """Ratios on a CPU: training and evaluation (``benchmarks.train.ml1m``), attention (``benchmarks.kernels.run``)."""
    trained = [json.loads(line) for line in (RESULTS / "cpu_ml1m_epyc_20261123.jsonl").read_text().splitlines()]
    kernels = [json.loads(line) for line in (RESULTS / "cpu_kernels_epyc_20261123.jsonl").read_text().splitlines()]
    lines = ["| times as fast as | strongest padded form | lean padded form | padded as the public code has it |"]
    lines.append("|---|---|---|---|")
    for part, title in (("epoch", "training, fp32"), ("evaluation", "evaluation")):
        for allocator, words in ALLOCATORS.items():
            found = [row for row in trained if (row["measurement"], row["provider"]) == (part, "hstu")]
            found = {row["baseline"]: _spread(row["ratio"]) for row in found if row["allocator"] == allocator}
            lines.append(f"| {title}, {words} | " + " | ".join(found.get(name, "as lean") for name in PADDED) + " |")
    facts = [
        f"Attention alone, forward and backward, against the operator's padded definition: "
        f"{_spread(row['ratio'])} times as fast ({ALLOCATORS[row['allocator']]})."
        for row in kernels
        if [row[k] for k in ("operator", "case", "direction", "provider")]
        == ["hstu_attention", "ml1m", "fwd+bwd", "native"]
    ]
    epochs = [row for row in trained if row["measurement"] == "epoch"]
    steps = {ALLOCATORS[row["allocator"]]: row["steps"] for row in epochs}
    facts.append(
        "Training was timed over "
        + " and ".join(f"{count} ({words})" for words, count in steps.items())
        + f" of an epoch's {epochs[0]['steps_of_an_epoch']} steps, in each of {epochs[0]['repeats']} epochs."
    )
    for row in trained:
        if row["measurement"] == "losses":
            facts.append(
                f"Largest relative difference of the first {row['steps']} losses from those of `{row['baseline']}`: "
                f"{row['largest_relative_difference']:.0e}."
            )
    memory = {row["provider"]: row["peak_gib"] for row in trained if row["measurement"] == "memory"}
    facts.append(
        f"Peak memory of a process that trains an epoch: {memory.pop('hstu'):.2f} GiB ("
        + ", ".join(f"`{name}` {peak:.2f}" for name, peak in memory.items())
        + ")."
    )
    for row in epochs:
        if (row["provider"], row["baseline"], row["allocator"]) == ("hstu_bf16", "plain_lean", "kept"):
            facts.append(
                f"bfloat16 on this processor, which has no units for it: {_spread(row['ratio'])} times the lean form's "
                "speed in fp32, so slower than our own fp32; its HR@10 was not measured."
            )
    return "\n".join(lines) + "\n\n" + "\n".join(f"- {fact}" for fact in facts)


def _spread(ratio: dict[str, float]) -> str:
    return "{median:.2f} ({low:.2f} to {high:.2f})".format(**ratio)


def ml1m() -> str:
    """Runs of the paper's recipe, the published figures beside them."""
    return tables.table(tables.ML1M, (10, 50, 200)) + _sentences(tables.ML1M)


def beauty() -> str:
    """Our recipe on Amazon's Beauty, with the baselines that count."""
    return tables.table(tables.BEAUTY, (5, 10, 20)) + _sentences(tables.BEAUTY)


def others() -> str:
    """The same recipe, untouched, on three other logs."""
    return tables.table(tables.OTHERS, (5, 10, 20)) + _sentences(tables.OTHERS)


def ml100k() -> str:
    """MovieLens-100K, leave-one-out."""
    return tables.table(tables.ML100K, (10, 50)) + _sentences(tables.ML100K)


def ml100k_temporal() -> str:
    """MovieLens-100K, one cut in time for all."""
    users = tables.ML100K_TEMPORAL[0].found()[0]["data"]["test_targets"]
    count = f"\n- {users} test users."
    return tables.table(tables.ML100K_TEMPORAL, (10, 50)) + _sentences(tables.ML100K_TEMPORAL) + count


def _sentences(groups: tuple[tables.Group, ...]) -> str:
    found = [tables.sentence(*test) for test in tables.TESTS if set(test) <= set(groups) and tables.made(*test)]
    return "\n\n" + "\n".join(f"- {sentence}" for sentence in found) if found else ""


def preparation() -> str:
    """One sentence on the largest log that was prepared (``benchmarks.data.out_of_core``)."""
    rows = [json.loads(line) for line in (RESULTS / "out_of_core_20261125.jsonl").read_text().splitlines()]
    row = max(rows, key=lambda found: found["rows"])
    counts = row["counts"]
    return (
        f"a generated log of {counts['rows_read']:,} events, {counts['users']:,} users and {counts['items']:,} items "
        f"({row['parameters']['files']} Parquet files) was prepared with a peak of "
        f"{row['prepare']['peak_rss_gib']:.2f} GiB of memory (`python -m benchmarks.data.out_of_core`)."
    )


SECTIONS: dict[str, Callable[[], str]] = {
    "quickstart": quickstart,
    "ml1m": ml1m,
    "beauty": beauty,
    "others": others,
    "ml100k": ml100k,
    "ml100k_temporal": ml100k_temporal,
    "preparation": preparation,
    "quality": quality,
    "cpu": cpu,
}


def render(text: str) -> str:
    """README with every marked section made anew."""
    for name, make in SECTIONS.items():
        pattern = re.compile(rf"(?<=<!-- begin {name} -->\n).*?(?=<!-- end {name} -->)", re.DOTALL)
        found = pattern.search(text)
        if found is None:
            raise SystemExit(f"README.md lacks the markers of section {name}")
        text = text[: found.start()] + make() + "\n" + text[found.end() :]
    return text


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(render(path.read_text()))
