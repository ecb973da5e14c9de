"""Why the policy decided as it did: its decisions, newest first."""

from collections.abc import Iterator, Sequence
from html import escape
from itertools import groupby

from esper.leyline import Explanation
from esper.nissa.report.growth import Decision, GrowthStory
from esper.nissa.report.html import ABSENT, number, table


def why(story: GrowthStory) -> str:
    """Return the list of decisions, as HTML; those to change nothing are gathered in between."""
    parts: list[str] = []
    for is_change, run in groupby(reversed(story.decisions), lambda d: d.is_change):
        found = list(run)
        parts += [_change(decision) for decision in found] if is_change else [_quiet(found)]
    return f'<div class="why">{"".join(parts)}</div>'


def _change(decision: Decision) -> str:
    explanation = decision.explanation
    return (
        f'<details class="decision"><summary><span class="step">step {decision.step:,}</span> '
        f'<span class="rule">{escape(explanation.rule)}</span> {escape(explanation.reason)}'
        f"{_lost(decision)}</summary>{_compared(explanation)}{_otherwise(explanation)}"
        f"{_outcome(decision)}</details>"
    )


def _quiet(decisions: Sequence[Decision]) -> str:
    first, last = decisions[-1].step, decisions[0].step
    times = "once" if len(decisions) == 1 else f"{len(decisions)} times"
    steps = f"step {last:,}" if first == last else f"steps {first:,} to {last:,}"
    rows = [
        (
            f"{decision.step:,}",
            f"{escape(decision.explanation.rule)}{_lost(decision)}",
            escape(decision.explanation.reason),
            escape(decision.explanation.otherwise),
        )
        for decision in decisions
    ]
    head = ("step", "rule", "reason", "what would have changed it")
    return (
        f'<details class="quiet"><summary><span class="step">{steps}</span> '
        f'no change, {times}</summary><div class="scroll">{table(head, rows, "decisions")}</div>'
        "</details>"
    )


def _compared(explanation: Explanation) -> str:
    rows = list(_values(explanation))
    if not rows:
        return ""
    return table(("looked at", "value", "threshold"), rows, "compared")


def _values(explanation: Explanation) -> Iterator[tuple[str, str, str]]:
    values, thresholds = explanation.values, explanation.thresholds
    for name in dict.fromkeys([*values, *thresholds]):
        limit = thresholds.get(name)
        yield (
            f"<code>{escape(name)}</code>",
            number(values.get(name)),
            "" if limit is None and name in values else number(limit),
        )


def _otherwise(explanation: Explanation) -> str:
    if not explanation.otherwise:
        return ""
    return f"<p><b>What would have changed it</b> {escape(explanation.otherwise)}</p>"


def _outcome(decision: Decision) -> str:
    report = decision.outcome
    if report is None:
        return f"<p><b>What came of it</b> {ABSENT}</p>"
    said = "carried out" if report.applied else "refused"
    return f"<p><b>What came of it</b> {said}: {escape(report.detail)}</p>"


def _lost(decision: Decision) -> str:
    return ' <span class="gone">taken back</span>' if decision.lost else ""
