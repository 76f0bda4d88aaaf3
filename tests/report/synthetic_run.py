"""A synthetic run folder, as gr-train leaves it."""

from __future__ import annotations

import json
import math
from pathlib import Path


def interval(mean: float, se: float) -> dict[str, float]:
    return {"mean": mean, "se": se, "low": mean - 1.96 * se, "high": mean + 1.96 * se}


def scores(hr10: float, ndcg10: float, mrr: float, se: float = 0.0061) -> dict:
    return {
        "hr@1": interval(ndcg10 / 3.1, se),
        "hr@5": interval(hr10 * 0.71, se),
        "hr@10": interval(hr10, se),
        "hr@50": interval(min(0.97, hr10 * 1.63), se),
        "ndcg@5": interval(ndcg10 * 0.87, se),
        "ndcg@10": interval(ndcg10, se * 0.6),
        "mrr": interval(mrr, se * 0.55),
    }


def example_results() -> dict:
    shown = [
        "Nausicaä of the Valley of the Wind (1984)",
        "Princess Mononoke (1997)",
        "Porco Rosso (1992)",
        "Castle in the Sky (1986)",
        "My Neighbor Totoro (1988)",
    ]
    return {
        "name": "planted_hstu",
        "config_hash": "3f9c1b20aa41",
        "seed": 7,
        "data": {
            "users": 6040,
            "items": 1682,
            "events": 574321,
            "train_events": 562241,
            "valid_targets": 6040,
            "test_targets": 6040,
            "mean_length": 95.087,
            "median_length": 61,
            "density": 0.05653,
            "has_times": True,
            "caveats": [
                "Events are generated: a real log has drift and bots that this one lacks.",
                "Times have a resolution of one day, so the order within a day is unknown.",
            ],
            "repairs": {"duplicate_events": 1203, "users_with_one_event": 12},
        },
        "protocol": {
            "split": "leave_one_out",
            "ranking": "full",
            "mask_seen": False,
            "ties": "middle rank; metrics averaged over tie order",
            "num_candidates": 1682,
        },
        "model": {
            "label": "HSTU",
            "parameters_dense": 187904,
            "parameters_tables": 107648,
            "best_step": 1800,
            "epochs_run": 12,
            "seconds": 412.7,
            "tokens_per_s": 18211.4,
            "model_flops": 6.1e13,
        },
        "metrics": {
            "HSTU": scores(0.41234567, 0.25517, 0.2231),
            "Popularity": scores(0.0712, 0.0331, 0.0312, 0.0033),
            "ItemKNN": {**scores(0.2219, 0.1313, 0.1187), "setting": "window 5, decay 0.7, damping 0.5"},
            "Markov": {**scores(0.1984, 0.1102, 0.0991), "setting": "back-off 0.1"},
            "RepeatLast": scores(0.0391, 0.0302, 0.0288, 0.0025),
        },
        "ceiling": {
            "hr@1": 0.151,
            "hr@5": 0.318,
            "hr@10": 0.4412,
            "hr@50": 0.712,
            "ndcg@5": 0.242,
            "ndcg@10": 0.2719,
            "mrr": 0.2402,
        },
        "ceiling_without_times": {"hr@10": 0.3311, "ndcg@10": 0.2001, "mrr": 0.1777},
        "comparison": {
            "rival": "ItemKNN",
            "metric": "ndcg@10",
            "difference": 0.12387,
            "low": 0.11851,
            "high": 0.12923,
            "p_value": 0.0,
            "num_users": 6040,
        },
        "baseline_grids": {
            "ItemKNN": [
                {"setting": f"window {w}", "ndcg@10": 0.12 + 0.01 * (w == 5), "users": 3000, "chosen": w == 5}
                for w in (1, 5, 20)
            ],
            "Popularity": [{"setting": "none", "ndcg@10": None, "users": 0, "chosen": True}],
        },
        "audit": [],
        "examples": [
            {
                "user": 42,
                "history": [f"Film number {i} (19{60 + i})" for i in range(14)],
                "target": shown[2],
                "recommended": [{"title": t, "score": 3.1 - 0.27 * i} for i, t in enumerate(shown)],
            },
            {
                "user": 1077,
                "history": ["Alien (1979)", "The Thing (1982)"],
                "target": "Amélie (2001)",
                "recommended": [{"title": t, "score": 2.2 - 0.2 * i} for i, t in enumerate(shown)],
            },
        ],
    }


def example_metric_lines() -> list[dict]:
    lines = []
    for step in range(10, 2401, 10):
        wiggle = 0.05 * math.sin(step * 0.7)
        lines.append(
            {
                "step": step,
                "epoch": step // 200,
                "phase": "train",
                "loss": 2.2 + 5 * math.exp(-step / 500) + wiggle,
                "lr": 1e-3,
                "tokens_per_s": 18000 + 900 * math.sin(step),
                "model_flops": 2.5e10,
            }
        )
        if step % 200 == 0:
            value = 0.26 * (1 - math.exp(-step / 450)) - 2e-9 * max(0, step - 1800) ** 2.4
            lines.append({"step": step, "evaluation": {"hr@10": value * 1.6, "ndcg@10": value}})
    return lines


def write_run(folder: Path, results: dict, lines: list[dict]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "env.json").write_text(
        json.dumps({"python": "3.11.9", "torch": "2.13.0", "device": {"kind": "cpu", "cores": 2}})
    )
    (folder / "config.yaml").write_text("# config_hash: 3f9c1b20aa41\nname: planted_hstu\nseed: 7\n")
    return folder
