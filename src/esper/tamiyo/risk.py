"""What went wrong with growth lately, and what must not be tried again for now.

A pure function of the field reports: it has no memory, so that a policy that was restored, or a
server that was started anew, judges alike.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from esper.leyline import ConfigError, FieldReport, SeedOperation, Stage

_ROLLBACK = "rollback"
_ANY = ""
# The model does not contain a seed at these stages: whatever diverged, it was not that.
_BLAMELESS = frozenset(
    {
        Stage.DORMANT,
        Stage.GERMINATED,
        Stage.TRAINING,
        Stage.CULLED,
        Stage.EMBARGOED,
        Stage.RESETTING,
    }
)


@dataclass(frozen=True)
class RiskLimits:
    """What each mishap counts, and for how long.

    :param half_life_steps: steps after which a mishap counts half.
    :param cull: what a culled seed counts against its slot and its blueprint.
    :param failed_gate: what a command counts that a gate refused.
    :param rollback: what a rollback counts that found a seed blended into the model.
    :param embargo_steps: steps after a cull in which nothing may germinate in the slot.
    :param quarantine_steps: steps after a rollback in which the same blueprint must not germinate
        in the same slot.
    :param retry_steps: the same after a refused germination.
    :param caution: sum of all penalties from which on nothing germinates at all.
    :raises ConfigError: a limit is out of range.
    """

    half_life_steps: float = 600.0
    cull: float = 1.0
    failed_gate: float = 0.25
    rollback: float = 2.0
    embargo_steps: int = 300
    quarantine_steps: int = 3000
    retry_steps: int = 150
    caution: float = 4.0

    def __post_init__(self) -> None:
        for spec in dataclasses.fields(self):
            value = getattr(self, spec.name)
            if not 0 <= value < math.inf:
                raise ConfigError(f"{spec.name} is {value}; give a finite number from 0 on")
        if self.half_life_steps == 0:
            raise ConfigError("half_life_steps is 0; give a number of steps above 0")


@dataclass(frozen=True)
class Mishap:
    """One thing that went wrong.

    :param slot: where.
    :param blueprint: with what; empty where that is not known.
    :param weight: what it counts by now.
    :param barred_steps: steps for which it still bars germination.
    :param whole_slot: whether it bars the slot for every blueprint.
    :param why: in words.
    """

    slot: str
    blueprint: str
    weight: float
    barred_steps: int
    whole_slot: bool
    why: str


@dataclass(frozen=True)
class Risk:
    """The judgement at one step.

    :param slots: penalty by slot.
    :param blueprints: penalty by blueprint.
    :param total: sum of what all mishaps count.
    :param cautious: whether so much went wrong that nothing should germinate.
    :param mishaps: those behind it.
    """

    slots: dict[str, float] = field(default_factory=dict)
    blueprints: dict[str, float] = field(default_factory=dict)
    total: float = 0.0
    cautious: bool = False
    mishaps: tuple[Mishap, ...] = ()

    def penalty(self, slot: str, blueprint: str) -> float:
        """Return what slot and blueprint have against them together."""
        return self.slots.get(slot, 0.0) + self.blueprints.get(blueprint, 0.0)

    def bar(self, slot: str, blueprint: str) -> str:
        """Return why a blueprint must not germinate in a slot now; empty where it may."""
        barring = [
            mishap
            for mishap in self.mishaps
            if mishap.slot == slot
            and mishap.barred_steps > 0
            and (mishap.whole_slot or mishap.blueprint in (blueprint, _ANY))
        ]
        if not barring:
            return ""
        longest = max(barring, key=lambda mishap: mishap.barred_steps)
        return f"{longest.why}; barred for {longest.barred_steps} steps"


class RiskEngine:
    """Judges field reports.

    :param limits: what each mishap counts.
    """

    def __init__(self, limits: RiskLimits | None = None) -> None:
        self.limits = limits or RiskLimits()

    def assess(self, reports: Sequence[FieldReport], step: int) -> Risk:
        """Return what the reports tell against slots and blueprints.

        :param reports: newest last.
        :param step: the present one. A report from after it, which a rollback left, counts as new.
        """
        mishaps = tuple(self._mishaps(reports, step))
        slots: dict[str, float] = {}
        blueprints: dict[str, float] = {}
        for mishap in mishaps:
            slots[mishap.slot] = slots.get(mishap.slot, 0.0) + mishap.weight
            if mishap.blueprint:
                before = blueprints.get(mishap.blueprint, 0.0)
                blueprints[mishap.blueprint] = before + mishap.weight
        total = sum(mishap.weight for mishap in mishaps)
        return Risk(slots, blueprints, total, total >= self.limits.caution, mishaps)

    def _mishaps(self, reports: Sequence[FieldReport], step: int) -> Iterator[Mishap]:
        grown: dict[str, str] = {}
        for report in reports:
            if report.seed:
                if report.blueprint:
                    grown[report.seed] = report.blueprint
                mishap = self._judge(report, grown.get(report.seed, _ANY), step)
                if mishap is not None:
                    yield mishap

    def _judge(self, report: FieldReport, blueprint: str, step: int) -> Mishap | None:
        limits = self.limits
        if report.command == _ROLLBACK:
            if report.before in _BLAMELESS:
                return None
            found = (limits.rollback, limits.quarantine_steps, "training diverged with it")
        elif report.applied:
            if report.after is not Stage.CULLED:
                return None
            found = (limits.cull, limits.embargo_steps, "a seed was culled here")
        else:
            found = self._refusal(report)
        weight, steps, why = found
        age = max(0, step - report.step)
        decayed = weight * 0.5 ** (age / limits.half_life_steps)
        culled = report.command != _ROLLBACK and report.applied
        return Mishap(report.seed, blueprint, decayed, max(0, steps - age), culled, why)

    def _refusal(self, report: FieldReport) -> tuple[float, int, str]:
        germinating = report.operation == SeedOperation.GERMINATE
        steps = self.limits.retry_steps if germinating else 0
        failed = [gate.gate.value for gate in report.gates if not gate.passed]
        if failed:
            return self.limits.failed_gate, steps, f"gate {failed[0]} refused it"
        return 0.0, steps, "it was refused"
