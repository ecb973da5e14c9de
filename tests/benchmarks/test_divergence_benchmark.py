import math
import subprocess
import sys
from pathlib import Path

import pytest

from divergence_runs.faults import FAULTS
from divergence_runs.recording import HEALTHY, Trace, record
from divergence_runs.replay import replay
from divergence_runs.rules import RULES, Seen
from divergence_runs.setups import SETUPS
from divergence_runs.synthetic import synthetic_runs

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "divergence.py"


@pytest.mark.timeout(120)
def test_the_quick_form_compares_every_rule_and_the_endings() -> None:
    done = subprocess.run(
        [sys.executable, str(BENCHMARK), "--quick"], capture_output=True, text=True, timeout=110
    )
    assert done.returncode == 0, done.stderr
    for title in ("real runs", "synthetic traces", "| caught of |", "| alone | with Esper |"):
        assert title in done.stdout
    assert all(done.stdout.count(f"| {name} |") == 3 for name in RULES)
    assert "| Esper | 0.0 | 5 of 5 |" in done.stdout


def test_esper_raises_no_alarm_in_a_healthy_run_and_catches_each_fault() -> None:
    score = replay([record(SETUPS[0], HEALTHY, 3, -1, 400)], RULES["Esper"])
    assert (score.healthy_steps, score.false_alarms, score.faults) == (400, 0, 0)
    score = replay((record(SETUPS[0], fault, 3, 150, 200) for fault in FAULTS), RULES["Esper"])
    assert (score.false_alarms, score.caught) == (0, len(FAULTS))


def test_two_tasks_are_recorded_by_name() -> None:
    trace = record(SETUPS[2], HEALTHY, 0, -1, 3)
    assert [list(losses) for losses in trace.losses] == [["left", "right"]] * 3
    assert all(norm > 0 for norm in trace.norms)


def test_synthetic_traces_are_the_same_each_time() -> None:
    first, second = (list(synthetic_runs(1, 2, seed=4)) for _ in range(2))
    assert first == second
    assert [trace.onset >= 0 for trace in first] == [True, True, False] * 3


@pytest.mark.parametrize(
    ("name", "tail", "caught"),
    [
        ("Lightning, SpikeDetection", [4.0], True),
        ("Lightning, SpikeDetection", [2.0], False),
        ("Composer, NaNMonitor", [math.nan], True),
        ("Composer, NaNMonitor", [math.inf], False),
        ("llm-foundry, KillLossSpike", [3.0] * 5, True),
        ("llm-foundry, KillLossSpike", [3.0] * 4, False),
        ("OLMo-core, SkipStep", [2.0], True),
        ("OLMo-core, SkipStep", [1.2], False),
        ("OLMo-core, SkipStep", [math.nan], True),
        ("ZClip", [1.5], True),
        ("ZClip", [1.0], False),
    ],
)
def test_a_rule_acts_as_it_is_described(name: str, tail: list[float], caught: bool) -> None:
    rule = RULES[name]()
    values = [1.0 + 0.1 * (-1) ** step for step in range(150)]
    assert not any(rule.alarms(Seen(value, value, {"loss": value})) for value in values)
    assert any(rule.alarms(Seen(value, value, {"loss": value})) for value in tail) is caught


def test_an_alarm_before_the_fault_is_a_false_one_and_a_late_one_does_not_count() -> None:
    trace = Trace("test", "made up", 200)
    trace.losses = [{"loss": math.nan if step in (100, 310) else 1.0} for step in range(320)]
    trace.norms = [1.0] * 320
    score = replay([trace], RULES["Composer, NaNMonitor"])
    assert (score.healthy_steps, score.false_alarms, score.faults, score.caught) == (200, 1, 1, 0)
    assert score.delay == "-"
