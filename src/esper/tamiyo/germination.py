"""The rule that lets something germinate: when, where and what."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from esper.leyline import (
    Explanation,
    Offer,
    Planting,
    SeedCommand,
    SeedOperation,
    SeedState,
    Stage,
)
from esper.tamiyo.price import expected_share, payback_steps, price_share
from esper.tamiyo.view import Found, View, above, below, several, why

_RULE = "germinate"
_ALIKE = 0.95


@dataclass(frozen=True)
class Candidate:
    """A blueprint that may germinate in a slot.

    :param slot: where.
    :param blueprint: what.
    :param residual: how strongly the loss pulls at the slot.
    :param expected: share of the held-out loss that it can be expected to take away.
    :param price: share that it must take away.
    :param payback: steps after which it has paid for itself.
    :param tried: how often the blueprint was germinated before.
    """

    slot: str
    blueprint: str
    residual: float
    expected: float
    price: float
    payback: float
    tried: int

    @property
    def score(self) -> float:
        """What it can be expected to gain beyond its price."""
        return self.expected - self.price

    @property
    def promise(self) -> float:
        """The score in proportion to how much there is to gain at the slot, to first order."""
        return self.residual * self.score


@dataclass(frozen=True)
class Selection:
    """What may germinate, and what may not.

    :param candidates: the most promising first.
    :param refused: why others may not, nearest to being allowed first.
    """

    candidates: tuple[Candidate, ...]
    refused: tuple[Explanation, ...]

    @property
    def chosen(self) -> Candidate | None:
        """The one to germinate: of those about as promising as the best, the least tried."""
        if not self.candidates:
            return None
        least = _ALIKE * self.candidates[0].promise
        alike = [candidate for candidate in self.candidates if candidate.promise >= least]
        return min(alike, key=lambda candidate: candidate.tried)


def forbidden(view: View) -> Explanation | None:
    """Return why nothing at all may germinate now; None where something may."""
    limits, memory, risk = view.limits, view.memory, view.risk
    live = float(view.live)
    if memory.fit == "over":
        return why(
            _RULE,
            "the model is over-fitting",
            {"gap": view.gap},
            {"gap": limits.under_fit_gap},
            below("gap between held-out and training loss", view.gap, limits.under_fit_gap),
        )
    if risk.cautious:
        return why(
            _RULE,
            f"too much went wrong lately: {'; '.join(m.why for m in risk.mishaps[-3:])}",
            {"risk": risk.total},
            {"risk": limits.risk.caution},
            below("risk", risk.total, limits.risk.caution),
        )
    blended = [name for name, _, _ in view.seeds(Stage.BLENDING, Stage.HOLDING)]
    if blended:
        return why(
            _RULE,
            f"seed {blended[0]!r} is about to be judged",
            {"blended": float(len(blended))},
            {"blended": 0.0},
            f"seed {blended[0]!r} is fossilised or culled",
        )
    if live >= limits.most_live:
        return why(
            _RULE,
            f"{several(live, 'seed')} already at work",
            {"live": live},
            {"live": float(limits.most_live)},
            below("number of live seeds", live, float(limits.most_live)),
        )
    return None


def select(view: View) -> Selection:
    """Sort out what may germinate by slot, budget, price, time and what went wrong before."""
    allowed: list[Candidate] = []
    refused: list[Explanation] = []
    for name, seed, _ in view.seeds(Stage.DORMANT):
        for blueprint, offer in sorted(seed.offers.items()):
            candidate = _candidate(view, name, seed, blueprint, offer)
            refusal = _refusal(view, candidate, seed, offer)
            if refusal is None:
                allowed.append(candidate)
            else:
                refused.append(refusal)
    allowed.sort(key=lambda c: (-c.promise, -c.score, c.slot, c.blueprint))
    return Selection(tuple(allowed), tuple(refused))


def germinate(view: View, planting: Planting | None = None) -> Iterator[Found]:
    """Grow what promises most, while the model under-fits or progress is slow."""
    told = forbidden(view) or _unwanted(view)
    if told is not None:
        yield told
        return
    selection = select(view)
    chosen = selection.chosen
    if chosen is not None:
        yield planted(view, chosen, _reasons(view, chosen, selection), planting)
    elif selection.refused:
        yield selection.refused[0]
    else:
        yield why(_RULE, "no slot is dormant", {}, {}, "a dormant slot that offers a blueprint")


def planted(
    view: View, candidate: Candidate, told: Explanation, planting: Planting | None
) -> SeedCommand:
    """Return the command that germinates a candidate."""
    return SeedCommand(
        candidate.slot,
        SeedOperation.GERMINATE,
        blueprint=candidate.blueprint,
        planting=planting or Planting(),
        version=view.growth.version,
        explanation=told,
    )


def _unwanted(view: View) -> Explanation | None:
    """Return why growth is not called for; None when it is."""
    limits, memory, trend = view.limits, view.memory, view.trend
    count = len(memory.evaluations)
    high = None if trend is None else trend.high
    values = {
        "gap": view.gap,
        "progress": None if trend is None else trend.slope,
        "progress.high": high,
        "steady": float(memory.steady),
        "evaluations": float(count),
    }
    thresholds = {
        "gap": limits.under_fit_gap,
        "progress.high": limits.slow_progress,
        "steady": float(limits.steady_evaluations),
        "evaluations": float(limits.least_evaluations),
    }
    if count < limits.least_evaluations:
        lacks = f"{several(limits.least_evaluations - count, 'evaluation')} more"
        return why(_RULE, "too little was seen of this run", values, thresholds, lacks)
    if memory.steady == 0:
        lacks = (
            below("gap", view.gap, limits.under_fit_gap)
            + " or "
            + below("progress.high", high, limits.slow_progress)
        )
        reason = "the model does not under-fit, and may still progress fast enough"
        return why(_RULE, reason, values, thresholds, lacks)
    if memory.steady < limits.steady_evaluations:
        missing = limits.steady_evaluations - memory.steady
        lacks = f"{several(missing, 'evaluation')} more that call for it"
        return why(_RULE, "growth was not called for long enough", values, thresholds, lacks)
    return None


def _candidate(view: View, name: str, seed: SeedState, blueprint: str, offer: Offer) -> Candidate:
    growth, limits, memory = view.growth, view.limits, view.memory
    residual = seed.residual if seed.residual is not None and math.isfinite(seed.residual) else 0.0
    expected = expected_share(offer.parameters, growth.parameters, limits)
    expected *= memory.skill(blueprint) * 0.5 ** view.risk.penalty(name, blueprint)
    price = price_share(offer.parameters, offer.flops, growth.parameters, limits)
    per_evaluation = memory.steps_per_evaluation() or 0.0
    life = max(float(limits.training_steps + limits.ramp_steps), 3 * per_evaluation)
    outcome = memory.outcomes.get(blueprint)
    return Candidate(
        slot=name,
        blueprint=blueprint,
        residual=residual,
        expected=expected,
        price=price,
        payback=payback_steps(life, price, expected),
        tried=0 if outcome is None else outcome.tried,
    )


def _refusal(view: View, candidate: Candidate, seed: SeedState, offer: Offer) -> Explanation | None:
    growth, name = view.growth, f"{candidate.blueprint!r} in {candidate.slot!r}"
    total, budget, left = (
        growth.parameters + offer.parameters,
        growth.parameter_budget,
        growth.steps_left,
    )
    bar = view.risk.bar(candidate.slot, candidate.blueprint)
    if seed.embargo_left > 0 or bar:
        values = {"embargo_left": float(seed.embargo_left)}
        reason = f"{name} is barred: {bar or 'the slot is under embargo'}"
        steps = max([seed.embargo_left, *_barred(view, candidate)])
        return why(_RULE, reason, values, {"embargo_left": 0.0}, f"{several(steps, 'step')} more")
    if budget is not None and total > budget:
        values, thresholds = {"parameters": float(total)}, {"parameters": float(budget)}
        lacks = f"a budget of {total:,} parameters, {total - budget:,} more"
        return why(_RULE, f"{name} is over budget", values, thresholds, lacks)
    values = {
        "expected": candidate.expected,
        "price": candidate.price,
        "payback": candidate.payback,
    }
    if candidate.expected <= candidate.price:
        lacks = above("expected gain", candidate.expected, candidate.price)
        thresholds = {"expected": candidate.price}
        return why(_RULE, f"{name} costs more than it can gain", values, thresholds, lacks)
    if left is not None and candidate.payback > left:
        thresholds = {"payback": float(left)}
        lacks = f"{several(candidate.payback - left, 'step')} more until the end"
        return why(_RULE, f"{name} would not pay back in time", values, thresholds, lacks)
    return None


def _barred(view: View, candidate: Candidate) -> list[int]:
    return [
        mishap.barred_steps
        for mishap in view.risk.mishaps
        if mishap.slot == candidate.slot
        and (mishap.whole_slot or mishap.blueprint in (candidate.blueprint, ""))
    ]


def _reasons(view: View, chosen: Candidate, selection: Selection) -> Explanation:
    """Tell why just this germinates, and what would have been chosen instead."""
    limits, trend = view.limits, view.trend
    under = view.memory.fit == "under"
    need = "the model under-fits" if under else "progress is slow"
    rival = next((c for c in selection.candidates if c is not chosen), None)
    otherwise = (
        above("gap", view.gap, limits.under_fit_gap)
        if under
        else above("progress.high", None if trend is None else trend.high, limits.slow_progress)
    )
    if rival is not None:
        lacks = above("promise", rival.promise, chosen.promise)
        otherwise += f"; or {rival.blueprint!r} in {rival.slot!r} with {lacks}"
    left = view.growth.steps_left
    values = {
        "gap": view.gap,
        "progress": None if trend is None else trend.slope,
        "progress.high": None if trend is None else trend.high,
        "residual": chosen.residual,
        "promise": chosen.promise,
        "expected": chosen.expected,
        "price": chosen.price,
        "payback": chosen.payback,
        "risk": view.risk.penalty(chosen.slot, chosen.blueprint),
    }
    thresholds = {
        "gap": limits.under_fit_gap,
        "progress.high": limits.slow_progress,
        "expected": chosen.price,
    }
    if left is not None:
        thresholds["payback"] = float(left)
    reason = f"{need}; {chosen.blueprint!r} promises most, in {chosen.slot!r}"
    return why(_RULE, reason, values, thresholds, otherwise)
