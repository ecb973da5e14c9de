import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from esper.leyline import SeedCommand, SeedOperation, Stage
from esper.tamiyo.fixed import Entry, NoPolicy, SchedulePolicy
from growing import rival
from growing.arms import ARMS, LARGE, arms_of, fixed_epochs, growing_plan, planting, random_epochs
from growing.cost import HOST, HOSTS, ratios
from growing.figures import interval, paired, table, verdict
from growing.meter import Meter
from growing.robust import ending_of, one_seed, poison_seed
from growing.search import search
from growing.signals import make
from growing.study import Outcome, Study, describe, study
from growing.task import Growth, Split, Task, parameters
from growing.tasks import TASKS, convolution, later_digits, overlaid
from growing.text import DecoderLayer, language_model, text
from growing.training import Plan, Run, Setting, train

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "growth.py"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(BENCHMARK), *arguments], capture_output=True, text=True, timeout=170
    )


def small_data() -> Split:
    random = torch.Generator().manual_seed(0)
    sets = []
    for count in (128, 64, 64):
        inputs = torch.randn(count, 8, generator=random)
        labels = (inputs[:, 0] * inputs[:, 1] > 0).long()
        sets.append(torch.utils.data.TensorDataset(inputs, labels))
    return Split(*sets)


def network(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, 2))


TINY = Task(
    "T",
    "a tiny task of two classes",
    lambda: network(4),
    lambda: network(8),
    small_data,
    Growth(("0>2",), "widen", {"width": 4}),
    epochs=4,
    batch=16,
    target=0.3,
    sizes=(("4", lambda: network(4)), ("8", lambda: network(8))),
)
SETTING = Setting(1e-2, 0.0)


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_a_study_prints_every_arm_and_prints_it_again_from_its_file(tmp_path: Path) -> None:
    few = ("--epochs", "2", "--seeds", "2", "--folder", str(tmp_path))
    done = run("tasks", "--task", "E", *few)
    assert done.returncode == 0, done.stderr
    assert all(f"| {name} |" in done.stdout for name in arms_of(TASKS["E"]))
    kept = tmp_path / "tasks-E-2-seeds.json"
    again = run("tasks", "--from", str(kept))
    assert again.stdout.strip() in done.stdout
    assert "| static, large |" in again.stdout


@pytest.mark.timeout(60)
def test_what_cannot_be_measured_is_refused() -> None:
    assert run("nonsense").returncode == 2
    assert run("cost", "--rounds", "0").returncode == 2


def test_signals_are_alike_each_time_and_of_all_classes() -> None:
    (waves, labels), (again, _) = make(200, 3), make(200, 3)
    assert waves.shape == (200, 40)
    assert np.array_equal(waves, again)
    assert not np.array_equal(waves, make(200, 4)[0])
    assert np.bincount(labels).tolist() == [20] * 10


@pytest.mark.parametrize("key", sorted(TASKS))
def test_a_task_is_what_its_arms_need(key: str) -> None:
    task = TASKS[key]
    assert parameters(task.small()) < parameters(task.large())
    split = task.data()
    batch = [tensor[: task.batch] for tensor in split.validation.tensors]
    losses = task.loss(task.small(), batch)
    total = sum(losses.values()) if isinstance(losses, dict) else losses
    assert bool(torch.isfinite(total))
    assert len(split.training) % task.batch == 0  # type: ignore[arg-type]
    assert not any(
        torch.equal(row, other)
        for row in split.validation.tensors[0][:20]
        for other in split.test.tensors[0]
    )


def test_two_digits_of_the_test_set_are_in_no_other_set() -> None:
    split = overlaid()
    seen = {image[0, :4, :8].numpy().tobytes() for image in split.training.tensors[0]}  # type: ignore[attr-defined]
    tested = [image[0, :4, :8].numpy().tobytes() for image in split.test.tensors[0]]
    # What lies free of the second digit may look the same in two scans, but rarely does.
    assert sum(part in seen for part in tested) / len(tested) < 0.05


def test_later_digits_hold_ten_samples_of_each_earlier_class() -> None:
    labels = later_digits().training.tensors[1]  # type: ignore[attr-defined]
    counts = torch.bincount(labels)
    assert counts[:6].max() <= 10
    assert counts[6:].min() > 80


def test_a_grown_convolution_has_the_parameters_of_the_large_one() -> None:
    task = TASKS["A"]
    block = parameters(convolution(2)) - parameters(convolution(1))
    assert parameters(task.large()) == parameters(task.small()) + 3 * block


def test_a_language_layer_does_not_look_ahead() -> None:
    torch.manual_seed(0)
    model = language_model(4).eval()
    inputs = text().validation.tensors[0][:2].clone()
    before = model(inputs)
    inputs[:, 40:] = 0
    assert torch.allclose(model(inputs)[:, :40], before[:, :40], atol=1e-5)
    assert DecoderLayer.name == TASKS["D"].growth.blueprint


def test_operations_are_counted_on_some_steps_and_carried_over_to_the_others() -> None:
    model, inputs = nn.Linear(8, 4), torch.randn(16, 8)
    with FlopCounterMode(display=False) as counter:
        model(inputs).sum().backward()
    one, meter = counter.get_total_flops(), Meter(before=7)
    for _ in range(9):
        meter.step("plain", lambda: model(inputs).sum().backward())
    assert meter.flops() == 7 + 9 * one
    assert meter.flops(2) == 7 + 2 * one
    assert meter.seconds() > 0


def test_what_is_measured_apart_is_not_counted() -> None:
    model, inputs, meter = nn.Linear(8, 4), torch.randn(16, 8), Meter()

    def step() -> None:
        model(inputs)
        with meter.apart():
            model(inputs)

    meter.step("both", step)
    assert meter.flops() == 2 * 16 * 8 * 4


def test_a_static_run_takes_three_passes_a_step() -> None:
    found = train(TINY, Plan(), SETTING, 0)
    forward = 2 * 16 * (8 * 4 + 4 * 2)
    # The gradient of the input is not needed.
    backward = 2 * forward - 2 * 16 * 8 * 4
    assert found.flops == 4 * 8 * (forward + backward)
    assert len(found.validation) == 4
    assert found.parameters == parameters(network(4))
    assert found.to_target is not None
    assert found.to_target[0] <= found.flops


def test_a_grown_run_counts_the_second_pass_and_ends_as_the_large_model() -> None:
    command = SeedCommand(
        "0>2", SeedOperation.GERMINATE, "widen", planting=planting(TINY, "insert")
    )
    policy = SchedulePolicy([Entry(command, 0)])
    found = train(TINY, growing_plan(TINY, policy), SETTING, 0)
    plain = train(TINY, growing_plan(TINY, NoPolicy()), SETTING, 0)
    assert any("dormant -> blending" in line for line in found.story)
    assert found.parameters == parameters(network(8))
    assert plain.parameters == parameters(network(4))
    assert found.flops > plain.flops > train(TINY, Plan(), SETTING, 0).flops


def test_the_same_seed_gives_the_same_run() -> None:
    first, second = (train(TINY, Plan(large=True), SETTING, 3) for _ in range(2))
    assert (first.test, first.validation) == (second.test, second.validation)


@pytest.mark.timeout(60)
def test_every_arm_runs_and_is_tuned_with_as_many_trials() -> None:
    found = study(TINY, [0, 1], epochs=2)
    assert [outcome.arm for outcome in found.outcomes] == arms_of(TINY)
    assert {outcome.trials for outcome in found.outcomes} == {4}
    told = describe(found)
    assert all(f"| {outcome.arm} |" in told for outcome in found.outcomes)


def test_tables_tell_what_a_difference_shows() -> None:
    def outcome(arm: str, scores: list[float]) -> Outcome:
        runs = [Run(score, [score], 10, 10**9, 1.0) for score in scores]
        return Outcome(arm, SETTING, 4, runs)

    outcomes = [
        outcome(LARGE, [0.8, 0.82, 0.84]),
        outcome("up", [0.9, 0.921, 0.94]),
        outcome("as good", [0.81, 0.81, 0.84]),
    ]
    found = Study("T", "a task", False, 0.9, [0, 1, 2], outcomes)
    told = describe(msgspec.json.decode(msgspec.json.encode(found), type=Study))
    assert "| up | 92.0 ± 5.0 | +10.0 ± 0.1 | better |" in told
    assert "no benefit" in told
    assert "never" in told


def test_intervals_are_those_of_students_t() -> None:
    mean, reach = interval([1.0, 2.0, 3.0])
    assert mean == pytest.approx(2.0)
    assert reach == pytest.approx(4.303 / math.sqrt(3))
    assert paired([2.0, 3.0], [1.0, 2.0]) == (1.0, 0.0)
    assert verdict(1.0, 2.0) == "no benefit"
    assert verdict(-1.0, 0.5) == "worse"
    assert verdict(-1.0, 0.5, less_is_better=True) == "better"
    assert verdict(1.0, math.inf) == "one seed shows nothing"
    assert table(["a", "b"], [["x", "1"]]) == "| a | b |\n|---|---:|\n| x | 1 |"


def test_times_of_growth_lie_within_the_run() -> None:
    task = TASKS["B"]
    assert fixed_epochs(task) == sorted(set(fixed_epochs(task)))
    assert fixed_epochs(task)[-1] < task.epochs / 2
    assert random_epochs(task, 1) == random_epochs(task, 1) != random_epochs(task, 2)
    assert len(random_epochs(task, 1)) == 4


@pytest.mark.timeout(60)
def test_the_cost_of_each_way_is_a_ratio_to_the_host() -> None:
    found = ratios(HOSTS[2], 1)
    assert found["a seed in isolation, early"][0] > 1
    assert len(found) == 9 + 2
    assert 0 < found[HOST][0] < 1


@pytest.mark.timeout(90)
def test_a_bad_seed_in_isolation_leaves_the_host_as_it_is_to_the_bit() -> None:
    task = replace(TASKS["A"], epochs=7)
    calm = ending_of(task, NoPolicy())
    fast = ending_of(task, one_seed(task, "shadow"), rate=100.0)
    poisoned = ending_of(task, one_seed(task, "shadow"), fault=poison_seed(Stage.TRAINING))
    joined = ending_of(task, one_seed(task, "insert"), rate=100.0)
    assert calm.digest == fast.digest == poisoned.digest != joined.digest
    assert Stage.TRAINING in fast.stages
    assert Stage.EMBARGOED in poisoned.stages


def test_a_sweep_costs_the_sum_of_its_sizes() -> None:
    told = search(TINY, [0, 1], epochs=2)
    assert "| sweep of 4, 8 |" in told
    assert told.count("grown") == 3


@pytest.mark.skipif(not rival.installed(), reason="gromo is in the bench extra")
def test_gromo_ends_at_the_size_of_the_large_model() -> None:
    task = replace(TASKS["B"], epochs=10)
    found = ARMS["GroMo, fixed period"](task, SETTING, 0)
    assert parameters(task.small()) < found.parameters <= parameters(task.large())
    assert len(found.story) == 4
    assert found.test > 0.15
