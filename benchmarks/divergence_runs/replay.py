"""Replaying traces through rules, and what comes of it."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from statistics import median

from divergence_runs.recording import Trace
from divergence_runs.rules import Rule, Seen

# A fault counts as caught when the rule acts within so many steps of its onset.
WITHIN = 100


@dataclass
class Score:
    """How one rule did on several traces."""

    healthy_steps: int = 0
    false_alarms: int = 0
    faults: int = 0
    delays: list[int] = field(default_factory=list)

    @property
    def caught(self) -> int:
        return len(self.delays)

    @property
    def false_alarms_in_10_000(self) -> float:
        return 1e4 * self.false_alarms / max(1, self.healthy_steps)

    @property
    def delay(self) -> str:
        return f"{median(self.delays):.0f}" if self.delays else "-"


def replay(traces: Iterable[Trace], make: Callable[[], Rule]) -> Score:
    """Show every trace to a rule of its own and score its alarms.

    The steps before a fault are healthy ones. The first alarm from the onset on counts as the
    rule's answer to the fault.
    """
    score = Score()
    for trace in traces:
        alarms = _alarms(trace, make())
        onset = trace.onset if trace.onset >= 0 else len(trace.losses)
        score.healthy_steps += onset
        score.false_alarms += sum(step < onset for step in alarms)
        if trace.onset >= 0:
            score.faults += 1
            late = [step - onset for step in alarms if onset <= step < onset + WITHIN]
            score.delays += late[:1]
    return score


def _alarms(trace: Trace, rule: Rule) -> list[int]:
    steps = zip(trace.totals(), trace.norms, trace.losses, strict=True)
    return [step for step, values in enumerate(steps) if rule.alarms(Seen(*values))]
