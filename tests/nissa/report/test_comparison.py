import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from esper.leyline import RunError
from esper.nissa.report import Story, render, write_report
from esper.nissa.report.comparison import (
    ARMS,
    ArmRun,
    Comparison,
    Measure,
    difference_text,
    failures,
    interval_text,
    measures,
    read_comparison,
    verdicts,
    write_comparison,
)
from esper.nissa.report.comparison_page import comparison_section

TARGETS = {arm: f"job:{arm}" for arm in ARMS}
# Grown is better than small in every pair, and no better than large.
SCORES = {"grown": [0.90, 0.91, 0.93], "small": [0.80, 0.82, 0.82], "large": [0.91, 0.90, 0.93]}


def comparison(
    scores: dict[str, list[float]], metric: str = "accuracy", **more: dict[str, str]
) -> Comparison:
    runs = [
        ArmRun(arm, seed, "completed", {metric: score}, 100, 2.5e9, 3.0)
        for arm, given in scores.items()
        for seed, score in enumerate(given)
    ]
    return Comparison(TARGETS, [0, 1, 2], runs, **more)


def measure(found: Comparison, name: str = "accuracy") -> Measure:
    return next(each for each in measures(found) if each.name == name)


def words(found: Comparison, name: str = "accuracy") -> list[str]:
    return [difference.verdict for difference in measure(found, name).differences]


def test_differences_are_taken_in_pairs() -> None:
    small, large = measure(comparison(SCORES)).differences
    assert small.interval is not None
    # 0.10, 0.09 and 0.11: mean 0.1, deviation 0.01, t of two degrees of freedom 4.3027.
    assert small.interval.mean == pytest.approx(0.1)
    assert small.interval.reach == pytest.approx(4.3027 * 0.01 / 3**0.5, abs=1e-5)
    assert large.interval is not None
    assert large.interval.low < 0 < large.interval.high


def test_verdicts_follow_from_the_intervals() -> None:
    assert words(comparison(SCORES)) == ["better than small", "no benefit over large is shown"]
    less = comparison(SCORES, "validation.loss")
    assert words(less, "validation.loss") == [
        "worse than small",
        "no benefit over large is shown",
    ]
    told = comparison(SCORES, directions={"accuracy": "min"})
    assert words(told)[0] == "worse than small"
    same = {arm: [0.5, 0.5] for arm in ARMS}
    assert words(comparison(same)) == [
        "no benefit over small is shown",
        "no benefit over large is shown",
    ]
    assert list(verdicts(comparison(SCORES))) == [
        "accuracy, grown: better than small; no benefit over large is shown"
    ]


def test_one_seed_shows_nothing_and_no_pair_is_not_compared() -> None:
    one = {"grown": [0.9], "small": [0.1]}
    assert words(comparison(one)) == [
        "one seed does not tell it from small",
        "not compared with large",
    ]


def test_a_training_that_failed_leaves_its_pair_out_and_is_told() -> None:
    found = comparison(SCORES)
    runs = [run for run in found.runs if (run.arm, run.seed) != ("small", 2)]
    runs.append(ArmRun("small", 2, "failed", error="out of memory"))
    found = Comparison(TARGETS, [0, 1, 2], runs)
    small, large = measure(found).differences
    assert small.interval is not None
    assert large.interval is not None
    assert (small.interval.count, large.interval.count) == (2, 3)
    assert list(failures(found)) == ["small, seed 2 failed: out of memory; its pairs are left out"]
    assert "out of memory" in comparison_section(found)


def test_a_metric_that_an_arm_lacks_is_not_made_up() -> None:
    found = comparison(SCORES)
    extra = ArmRun("grown", 3, "completed", {"other": 1.0}, 100)
    found = Comparison(TARGETS, [0, 1, 2, 3], [*found.runs, extra])
    assert words(found, "other") == ["not compared with small", "not compared with large"]
    assert measure(found).values["grown"].keys() == {0, 1, 2}
    assert measure(found, "operations").values["grown"].keys() == {0, 1, 2}


def test_numbers_are_told_with_the_digits_that_their_interval_settles() -> None:
    found = comparison(SCORES)
    assert interval_text(measure(found).intervals["grown"]) == "0.913 ± 0.038"
    assert interval_text(measure(found, "operations").intervals["grown"]) == "2.500 ± 0.000 G"
    small = measure(found).differences[0]
    assert difference_text(small.interval) == "+0.100 (+0.075 to +0.125)"
    assert difference_text(None) == "no pair"


def test_the_comparison_is_kept_with_the_run_and_drawn_in_its_report(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").write_text("")
    assert read_comparison(tmp_path) is None
    assert "What growth has brought" not in write_report(tmp_path).read_text()
    write_comparison(tmp_path, comparison(SCORES))
    assert read_comparison(tmp_path) == comparison(SCORES)
    page = write_report(tmp_path).read_text()
    assert "What growth has brought" in page
    assert "accuracy, grown: better than small; no benefit over large is shown" in page


def test_a_damaged_comparison_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").write_text("")
    (tmp_path / "baselines.json").write_text('{"targets": 3}')
    with pytest.raises(RunError, match=r"baselines\.json cannot be read"):
        write_report(tmp_path)


@pytest.mark.parametrize(
    "scores",
    [
        SCORES,
        {arm: [0.5, 0.5, 0.5] for arm in ARMS},
        {arm: [0.0] for arm in ARMS},
        {"grown": [1e-12, 3e9, -5.0], "small": [2.0]},
    ],
    ids=["usual", "equal", "zero", "odd"],
)
def test_plots_lie_within_their_frame(scores: dict[str, list[float]]) -> None:
    text = comparison_section(comparison(scores))
    plots = text.split("<svg")[1:]
    assert len(plots) == 2
    for plot in plots:
        root = ET.fromstring("<svg" + plot[: plot.index("</svg>") + 6])
        places = [float(dot.get("cx", "")) for dot in root.iter("circle")]
        assert places
        assert all(100 < x < 520 for x in places)
        assert 2 <= sum(tick.get("class") == "tick" for tick in root.iter("text")) <= 8


def test_hostile_names_are_text() -> None:
    name = "</svg><b>bold</b>"
    page = render(Story(), "r", "", comparison(SCORES, name))
    assert "<b>bold" not in page
