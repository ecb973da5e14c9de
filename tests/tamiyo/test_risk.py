import pytest

from esper.leyline import FieldReport, Gate, GateResult, Stage
from esper.tamiyo import RiskEngine, RiskLimits

LIMITS = RiskLimits(half_life_steps=100.0)
ENGINE = RiskEngine(LIMITS)


def report(
    step: int, *, command: str = "seed", applied: bool = True, **more: object
) -> FieldReport:
    values = {"seed": "a", "blueprint": "conv", "step": step, **more}
    return FieldReport(command, applied, "", **values)  # type: ignore[arg-type]


def culled(step: int, **more: object) -> FieldReport:
    return report(step, operation="cull", after=Stage.CULLED, **more)


def refused(step: int, operation: str = "advance", gates: tuple[Gate, ...] = ()) -> FieldReport:
    results = [GateResult(gate, False, "") for gate in gates]
    return report(step, applied=False, operation=operation, gates=results)


def test_what_went_well_counts_nothing() -> None:
    risk = ENGINE.assess([report(0, after=Stage.FOSSILISED), report(1, operation="advance")], 10)
    assert risk.total == 0
    assert not risk.cautious
    assert risk.bar("a", "conv") == ""


def test_a_cull_counts_against_slot_and_blueprint_and_is_forgotten_by_halves() -> None:
    for age, weight in ((0, 1.0), (100, 0.5), (200, 0.25)):
        risk = ENGINE.assess([culled(50)], 50 + age)
        assert risk.penalty("a", "conv") == pytest.approx(2 * weight)
        assert risk.penalty("a", "mlp") == risk.penalty("b", "conv") == pytest.approx(weight)
        assert risk.penalty("b", "mlp") == 0


def test_after_a_cull_the_slot_is_under_embargo_for_every_blueprint() -> None:
    assert "100 steps" in ENGINE.assess([culled(0)], 200).bar("a", "mlp")
    assert ENGINE.assess([culled(0)], 200).bar("b", "conv") == ""
    assert ENGINE.assess([culled(0)], 300).bar("a", "conv") == ""


def test_a_rollback_quarantines_what_had_blended_in_where_it_had() -> None:
    grown = report(0, operation="germinate")
    back = FieldReport("rollback", True, "", seed="a", before=Stage.BLENDING, step=10)
    risk = ENGINE.assess([grown, back], 20)
    assert "2990 steps" in risk.bar("a", "conv")
    assert risk.bar("a", "mlp") == ""
    assert risk.penalty("a", "conv") > ENGINE.assess([culled(10)], 20).penalty("a", "conv")
    assert ENGINE.assess([back], 20).bar("a", "mlp"), "unknown, what it was: all are barred"


@pytest.mark.parametrize("before", [Stage.TRAINING, Stage.GERMINATED, Stage.DORMANT])
def test_a_seed_that_the_model_did_not_contain_is_not_blamed_for_a_rollback(before: Stage) -> None:
    back = FieldReport("rollback", True, "", seed="a", blueprint="conv", before=before, step=10)
    assert ENGINE.assess([back], 10).total == 0


def test_a_failed_gate_counts_a_little_and_a_refused_germination_is_not_tried_again_at_once() -> (
    None
):
    risk = ENGINE.assess([refused(0, gates=(Gate.G2,))], 0)
    assert risk.penalty("a", "conv") == 2 * LIMITS.failed_gate
    assert risk.bar("a", "conv") == ""
    risk = ENGINE.assess([refused(0, "germinate")], 0)
    assert risk.total == 0
    assert risk.bar("a", "conv")
    assert risk.bar("a", "mlp") == ""
    assert ENGINE.assess([refused(0, "germinate")], LIMITS.retry_steps).bar("a", "conv") == ""


def test_many_mishaps_call_for_caution_until_they_have_faded() -> None:
    reports = [culled(n, seed=f"s{n}") for n in range(5)]
    assert ENGINE.assess(reports, 5).cautious
    assert not ENGINE.assess(reports, 105).cautious


def test_reports_from_after_the_present_step_count_as_new() -> None:
    assert ENGINE.assess([culled(500)], 100).penalty("a", "") == pytest.approx(1.0)
