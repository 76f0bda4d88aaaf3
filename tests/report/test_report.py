"""The report says what the run folder says, in one file that loads nothing."""

from __future__ import annotations

import copy
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from gr.errors import UserError
from gr.report import write_report
from gr.report.run_data import read_run
from gr.report.words import headline
from synthetic_run import example_metric_lines, example_results, write_run


@pytest.fixture
def results() -> dict:
    return example_results()


@pytest.fixture
def metric_lines() -> list[dict]:
    return example_metric_lines()


@pytest.fixture
def run_dir(tmp_path: Path, results: dict, metric_lines: list[dict]) -> Path:
    return write_run(tmp_path / "planted_hstu", results, metric_lines)


VOID = {"meta", "link", "br", "img", "input", "hr"}


class Page(HTMLParser):
    """Tags, ids, the text, and every number in a <data value=...>."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.open: list[str] = []
        self.data: list[tuple[str, str]] = []
        self.text: list[str] = []
        self._value: str | None = None
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "data":
            self._value = dict(attrs)["value"]

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes another tag"

    def handle_data(self, data):
        if self.open and self.open[-1] in ("style", "title"):
            return
        self.text.append(data)
        if self._value is not None:
            self.data.append((self._value, data))
            self._value = None


def page(run_dir: Path) -> Page:
    return Page(write_report(run_dir).read_text(encoding="utf-8"))


def words(run_dir: Path) -> str:
    return " ".join("".join(page(run_dir).text).split())


def test_report_is_one_well_formed_file_that_loads_nothing(run_dir):
    html = write_report(run_dir).read_text(encoding="utf-8")
    found = Page(html)
    assert found.open == []
    assert "http://" not in html and "https://" not in html and "@import" not in html
    assert not {tag for tag, _ in found.tags} & {"script", "link", "iframe", "img", "object", "embed"}
    for _, attributes in found.tags:
        assert "src" not in attributes and not any(name.startswith("on") for name in attributes)
        for name in ("href", "xlink:href", "clip-path"):
            assert attributes.get(name, "#").startswith(("#", "url(#")), attributes
    assert not list(run_dir.glob(".report*")), "no file aside is left"


def test_ids_are_unique_and_every_reference_has_its_target(run_dir):
    found = page(run_dir)
    ids = [a["id"] for _, a in found.tags if "id" in a]
    assert len(ids) == len(set(ids))
    for _, attributes in found.tags:
        for name in ("href", "clip-path"):
            if name in attributes:
                assert re.sub(r"url\(|[#)]", "", attributes[name]) in ids


def test_every_number_in_the_tables_equals_results_json(run_dir, results):
    shown = page(run_dir).data
    expected = []
    for scores in results["metrics"].values():
        for metric, score in scores.items():
            if metric != "setting":
                expected += [score[part] for part in ("mean", "low", "high")] * (
                    2 if metric in ("hr@10", "ndcg@10", "mrr") else 1
                )
    for metric, value in results["ceiling"].items():
        expected += [value] * (2 if metric in ("hr@10", "ndcg@10", "mrr") else 1)
    for value in results["ceiling_without_times"].values():
        expected += [value] * 2
    expected += [row["ndcg@10"] for row in results["baseline_grids"]["ItemKNN"]]
    assert sorted(float(value) for value, _ in shown) == sorted(expected)
    for value, text in shown:
        assert text == f"{float(value):.4f}"


def test_headline_says_the_result_in_plain_words(run_dir):
    assert (
        "HSTU finds the next item among its top 10 for 41 % of users; the best counting baseline for 22 %, "
        "and nothing could do better than 44 % on this data." in words(run_dir)
    )


def test_headline_admits_that_a_baseline_is_better(tmp_path, results, metric_lines):
    results["metrics"]["ItemKNN"]["hr@10"] = {"mean": 0.43, "se": 0.001, "low": 0.428, "high": 0.432}
    text = words(write_run(tmp_path / "r", results, metric_lines))
    assert "the best counting baseline, ItemKNN, does better with 43 %" in text


def test_overlapping_intervals_are_said_to_overlap_where_no_paired_comparison_was_made(tmp_path, results):
    results["comparison"] = None
    results["metrics"]["ItemKNN"]["hr@10"] = {"mean": 0.409, "se": 0.006, "low": 0.397, "high": 0.421}
    assert "The 95 % intervals of HSTU and ItemKNN overlap" in words(write_run(tmp_path / "r", results, []))


def test_the_paired_comparison_is_said_in_a_sentence(tmp_path, results):
    assert (
        "On the same 6,040 users, the NDCG@10 of HSTU is 0.1239 higher than that of ItemKNN "
        "(95 % interval 0.1185 to 0.1292"
    ) in words(write_run(tmp_path / "a", results, []))
    results["comparison"].update(difference=-0.002, low=-0.005, high=0.001)
    text = words(write_run(tmp_path / "b", results, []))
    assert "0.0020 lower than" in text and "-0.0050 to +0.0010" in text
    assert "HSTU and ItemKNN cannot be told apart by NDCG@10" in text


def test_headline_counts_events_where_a_user_may_have_several(run_dir, results, metric_lines):
    results["protocol"]["split"] = "temporal"
    text = "".join(text for text, _ in headline(read_run(write_run(run_dir, results, metric_lines))))
    assert "41 % of held-out events" in text


@pytest.mark.parametrize("how", ["null", "absent"])
def test_no_ceiling_means_no_word_of_it(tmp_path, results, metric_lines, how):
    results["ceiling"] = results["ceiling_without_times"] = None
    if how == "absent":
        del results["ceiling"], results["ceiling_without_times"]
    html = write_report(write_run(tmp_path / "r", results, metric_lines)).read_text(encoding="utf-8")
    body = html[html.index("</style>") :].replace("var(--ceiling)", "")
    assert "ceiling" not in body.lower()
    assert "nothing could do better" not in body


def test_a_run_without_validation_or_steps_still_reports(tmp_path, results, metric_lines):
    only_steps = [line for line in metric_lines if "evaluation" not in line]
    text = words(write_run(tmp_path / "a", results, only_steps))
    assert "Validation" in text and "Validation NDCG@10" not in text and "Training loss" in text
    assert "No training steps were logged." in words(write_run(tmp_path / "b", results, []))


def test_loss_that_became_null_is_left_out_of_the_curve(tmp_path, results, metric_lines):
    metric_lines[3]["loss"] = None
    assert "Training loss" in words(write_run(tmp_path / "r", results, metric_lines))


def test_only_the_fields_that_make_a_result_are_needed(tmp_path):
    small = {
        "name": "small",
        "data": {},
        "protocol": {},
        "model": {"label": "HSTU"},
        "metrics": {"HSTU": {"mrr": {"mean": 0.2, "se": 0.1, "low": 0.004, "high": 0.396}}},
    }
    text = words(write_run(tmp_path / "r", small, []))
    assert "HSTU reaches a MRR of 0.200" in text and "No baseline was measured" in text
    assert "leak audit was not run" in text


def test_text_from_the_data_is_escaped_everywhere(tmp_path, results, metric_lines):
    evil = "<script>alert(1)</script> & \"quotes\" $x$ 'y'"
    results["name"] = evil
    results["data"]["caveats"] = [evil]
    results["data"]["repairs"] = {evil: 1}
    results["audit"] = [{"name": evil, "detail": evil}]
    results["examples"][0]["history"] = [evil]
    results["examples"][0]["target"] = evil
    results["examples"][0]["recommended"][0]["title"] = evil
    results["baseline_grids"] = {evil: [{"setting": evil, "ndcg@10": 0.1}]}
    results["metrics"][evil] = {**copy.deepcopy(results["metrics"]["Markov"]), "setting": evil}
    run = write_run(tmp_path / "r", results, metric_lines)
    (run / "config.yaml").write_text(f"name: {evil}\n")
    (run / "env.json").write_text(json.dumps({evil: evil}))
    html = write_report(run).read_text(encoding="utf-8")
    assert "<script" not in html
    assert "<script>alert(1)</script>" in "".join(Page(html).text)


def test_the_target_is_marked_where_it_was_recommended(run_dir):
    html = write_report(run_dir).read_text(encoding="utf-8")
    hits = re.findall(r'<li class="hit"><i>(\d+)</i><span>([^<]*)', html)
    assert hits == [("3", "Porco Rosso (1992)")]
    assert "not among the items shown" in html


def test_findings_of_the_audit_stand_above_the_numbers(tmp_path, results, metric_lines):
    assert "Nothing found" in words(write_run(tmp_path / "clean", results, metric_lines))
    results["audit"] = [{"name": "train_test_overlap", "detail": "3 test targets are training events"}]
    text = words(write_run(tmp_path / "leaky", results, metric_lines))
    assert "Nothing found" not in text
    assert text.index("Do not rely on these numbers") < text.index("How good it is")
    assert "train_test_overlap: 3 test targets are training events" in text


def test_caveats_stand_with_the_headline_the_scores_and_the_data(run_dir, results):
    text = words(run_dir)
    for caveat in results["data"]["caveats"]:
        assert text.count(caveat) == 3
    assert "duplicate events" in text and "1,203" in text


def test_the_same_run_gives_the_same_bytes(run_dir):
    first = write_report(run_dir).read_bytes()
    assert write_report(run_dir).read_bytes() == first


@pytest.mark.parametrize("name", ["results.json", "metrics.jsonl", "env.json", "config.yaml"])
def test_a_missing_file_is_named(run_dir, name):
    (run_dir / name).unlink()
    with pytest.raises(UserError, match=re.escape(name)):
        write_report(run_dir)
    assert not (run_dir / "report.html").exists()


@pytest.mark.parametrize("name", ["results.json", "metrics.jsonl", "env.json"])
def test_a_half_written_file_is_named_with_its_line(run_dir, name):
    text = (run_dir / name).read_text()
    (run_dir / name).write_text(text[: len(text) - 5])
    with pytest.raises(UserError, match=rf"{re.escape(name)} line \d+"):
        write_report(run_dir)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda r: r.pop("metrics"), "metrics"),
        (lambda r: r["model"].update(label="SASRec"), "SASRec"),
        (lambda r: r["metrics"]["HSTU"]["hr@10"].pop("low"), "metrics.HSTU.hr@10.low"),
        (lambda r: r["metrics"]["HSTU"]["mrr"].update(mean=float("nan")), "metrics.HSTU.mrr.mean"),
        (lambda r: r["ceiling"].update({"hr@10": "high"}), "ceiling.hr@10"),
    ],
)
def test_a_field_that_is_missing_or_no_number_is_named(tmp_path, results, metric_lines, change, field):
    change(results)
    with pytest.raises(UserError, match=re.escape(field)):
        write_report(write_run(tmp_path / "r", results, metric_lines))


def test_a_folder_that_does_not_exist_is_a_users_mistake(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        write_report(tmp_path / "nowhere")
