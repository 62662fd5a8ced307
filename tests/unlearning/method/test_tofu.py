"""TOFU's evaluation logs: against the published aggregation written out with numpy and scipy, and the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats
from typer.testing import CliRunner

from fednano.cli.commands import app
from fednano.errors import DataError
from fednano.unlearning.metrics import evaluate_tofu, read_log

NAMES = {
    "eval_log.json": 30,
    "eval_log_forget.json": 40,
    "eval_real_author_wo_options.json": 10,
    "eval_real_world_wo_options.json": 12,
}


def make_log(seed: int, **sizes: int) -> dict[str, Any]:
    random = np.random.default_rng(seed)
    log = {}
    for name, usual in NAMES.items():
        count = sizes.get(name.partition(".")[0], usual)
        log[name] = {
            "avg_gt_loss": {str(i): float(random.gamma(2)) for i in range(count)},
            "rougeL_recall": {str(i): float(random.uniform(0.1, 1)) for i in range(count)},
            "avg_paraphrased_loss": {str(i): float(random.gamma(2)) for i in range(count)},
            "average_perturb_loss": {str(i): random.gamma(2, size=5).tolist() for i in range(count)},
            "generated_text": {
                str(i): [f"question {i}", f"said by {seed}", f"answer {i}"] for i in range(count)
            },
        }
    return log


def write(folder: Path, name: str, log: Any) -> Path:
    path = folder / name
    path.write_text(json.dumps(log))
    return path


def array(log: dict[str, Any], name: str, metric: str) -> np.ndarray:
    return np.array(list(log[name][metric].values()))


def test_report_equals_the_published_aggregation(tmp_path: Path) -> None:
    log, reference = make_log(0), make_log(1)
    report = evaluate_tofu(
        read_log(write(tmp_path, "a.json", log)), read_log(write(tmp_path, "b.json", reference))
    )
    nine = []
    for name in ("eval_log.json", "eval_real_author_wo_options.json", "eval_real_world_wo_options.json"):
        right = np.exp(-array(log, name, "avg_gt_loss"))
        if name != "eval_log.json":
            right = right / (right + np.exp(-array(log, name, "average_perturb_loss")).sum(1))
        wrong = array(log, name, "average_perturb_loss").mean(1)
        preference = np.exp(wrong - array(log, name, "avg_paraphrased_loss"))
        nine += [
            right.mean(),
            array(log, name, "rougeL_recall").mean(),
            np.maximum(0, 1 - 1 / preference).mean(),
        ]
    np.testing.assert_allclose(list(report.utility_parts.values()), nine)
    assert report.model_utility == pytest.approx(stats.hmean(nine))
    ratios = [
        np.exp(
            array(each, "eval_log_forget.json", "average_perturb_loss").mean(1)
            - array(each, "eval_log_forget.json", "avg_paraphrased_loss")
        )
        for each in (log, reference)
    ]
    expected = stats.ks_2samp(*ratios)
    assert report.forget_quality is not None
    assert report.forget_quality.p == pytest.approx(expected.pvalue)
    assert report.forget_quality.statistic == pytest.approx(expected.statistic)
    assert report.forget["truth_ratio"] == pytest.approx(np.minimum(ratios[0], 1 / ratios[0]).mean())


def test_other_question_sets_are_not_compared(tmp_path: Path) -> None:
    log = read_log(write(tmp_path, "a.json", make_log(0)))
    with pytest.raises(DataError, match=r"40 forget questions and the reference 20.*retain90"):
        evaluate_tofu(log, read_log(write(tmp_path, "b.json", make_log(1, eval_log_forget=20))))
    other = make_log(1)
    other["eval_log_forget.json"]["generated_text"]["7"][2] = "something else"
    with pytest.raises(DataError, match="question 7"):
        evaluate_tofu(log, other)


def test_command_prints_table_and_json(tmp_path: Path) -> None:
    a, b = write(tmp_path, "a.json", make_log(0)), write(tmp_path, "b.json", make_log(1))
    words = ["evaluate", "tofu", "--log", str(a), "--reference", str(b)]
    shown = CliRunner().invoke(app, words)
    assert shown.exit_code == 0, shown.output
    assert "n = 40 against 40" in shown.output
    result = json.loads(CliRunner().invoke(app, [*words, "--json"]).output)
    assert len(result["utility_parts"]) == 9
    assert 0 < result["forget_quality"]["p"] <= 1
    alone = CliRunner().invoke(app, words[:4])
    assert "forget quality  not available: give --reference" in alone.output
    assert json.loads(CliRunner().invoke(app, [*words[:4], "--json"]).output)["forget_quality"] is None


def test_bad_logs_end_in_one_message(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot be read"):
        read_log(tmp_path / "absent.json")
    (tmp_path / "torn.json").write_text('{"eval_log.json": ')
    with pytest.raises(DataError, match="no JSON"):
        read_log(tmp_path / "torn.json")
    with pytest.raises(DataError, match="expected an object"):
        read_log(write(tmp_path, "list.json", []))
    with pytest.raises(DataError, match=r"lacks the question sets eval_log.json.*eval_log_aggregated"):
        read_log(write(tmp_path, "empty.json", {}))
    for change, message in (
        (lambda group: group.pop("rougeL_recall"), "lacks rougeL_recall"),
        (lambda group: group["avg_gt_loss"].pop("3"), "expected the same questions"),
        (lambda group: group["avg_paraphrased_loss"].update({"3": "x"}), "question 3: got 'x'"),
        (lambda group: group["average_perturb_loss"].update({"3": []}), "a list of losses"),
    ):
        log = make_log(0)
        change(log["eval_log_forget.json"])
        with pytest.raises(DataError, match=message):
            read_log(write(tmp_path, "bad.json", log))
