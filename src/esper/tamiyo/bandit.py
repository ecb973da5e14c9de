"""A contextual bandit that learns when and what to grow, within what the rules allow."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from esper.leyline import (
    AdaptationCommand,
    ConfigError,
    Explanation,
    NoChange,
    Planting,
    ScaleLearningRate,
    SystemState,
)
from esper.tamiyo.careful import CAREFUL
from esper.tamiyo.features import FEATURES, features
from esper.tamiyo.germination import Candidate, forbidden, planted, select
from esper.tamiyo.lifecycle import LIFECYCLE
from esper.tamiyo.limits import RuleLimits
from esper.tamiyo.posterior import Posterior
from esper.tamiyo.rate import may_cut
from esper.tamiyo.rules import Observer, proposal
from esper.tamiyo.view import View, why

Floats = NDArray[np.float64]
WAIT, CUT = "wait", "cut the rate"


@dataclass(frozen=True)
class BanditLimits:
    """How the bandit learns.

    :param horizon: evaluations after which a decision is rewarded.
    :param precision: inverse variance of the weights before any reward.
    :param noise: standard deviation of rewards.
    :param floor: least probability of an arm.
    :param draws: samples that probabilities are estimated from.
    :param remembered: decisions that are kept in the log.
    :param seed: of what is drawn.
    :raises ConfigError: a limit is out of range.
    """

    horizon: int = 3
    precision: float = 400.0
    noise: float = 0.1
    floor: float = 0.02
    draws: int = 500
    remembered: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("horizon", "precision", "noise", "draws", "remembered"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{name} is {getattr(self, name)}; give a number above 0")
        if not 0 <= self.floor <= 1 or self.seed < 0:
            raise ConfigError(f"floor is {self.floor}, seed is {self.seed}; give 0 to 1, and 0 on")


@dataclass(frozen=True)
class Arm:
    """Something that may be done now.

    :param name: the same for the same thing in every state.
    :param expected: reward before any was seen.
    :param price: share of the held-out loss that it costs.
    :param cost: parameters of the model with it over those without, for compute.
    :param candidate: what germinates, if anything does.
    """

    name: str
    expected: float = 0.0
    price: float = 0.0
    cost: float = 1.0
    candidate: Candidate | None = None


class Decision(msgspec.Struct):
    """One choice as it is logged; enough to value another policy by it.

    :ivar evaluation: number of the evaluation that it was made at.
    :ivar propensity: probability with which the arm was chosen.
    :ivar loss: on held-out data at that time.
    :ivar progress: share by which it fell in an epoch then.
    :ivar reward: what came of it; None until the horizon.
    """

    epoch: int
    step: int
    evaluation: int
    arm: str
    propensity: float
    context: list[float]
    expected: float
    price: float
    cost: float
    loss: float
    progress: float
    reward: float | None = None


class _Ledger(msgspec.Struct):
    """What was decided and learned."""

    evaluations: int = 0
    choices: int = 0
    log: list[Decision] = []
    arms: dict[str, Posterior] = {}


class BanditPolicy:
    """Thompson sampling over what may germinate where, a cut of the learning rate, and waiting.

    What becomes of living seeds is left to the rules, and what they forbid is no arm: slots under
    embargo or in quarantine, what is over budget or would not pay back, growth while the model
    over-fits or within the window, a lower rate while it under-fits. (A lower rate looks best over
    any short horizon, whatever it costs later.)

    An arm is rewarded with the share by which the held-out loss falls over the horizon beyond what
    it would have by its trend, per compute, less its price. Before any reward, the rules'
    expectation stands in for it.

    :param limits: of the rules.
    :param bandit: how it learns.
    :param planting: how seeds grow.
    """

    isolation = "thread"
    mode = "wait"

    def __init__(
        self,
        limits: RuleLimits | None = None,
        bandit: BanditLimits | None = None,
        *,
        planting: Planting | None = None,
    ) -> None:
        self.limits = limits or RuleLimits()
        self.bandit = bandit or BanditLimits()
        self._planting = planting
        self._observer = Observer(self.limits)
        self._ledger = _Ledger()
        self._before = _Ledger()

    @property
    def log(self) -> list[Decision]:
        """The newest decisions with their probabilities, and the rewards known so far."""
        return list(self._ledger.log)

    def decide(self, state: SystemState) -> AdaptationCommand:
        """Answer with what the rules decide about living seeds, else with the arm drawn."""
        if self._observer.is_repeated(state):
            self._ledger = self._before
        self._before = _copy(self._ledger)
        view = self._observer.look(state)
        self._learn(view)
        obstacles: list[Explanation] = []
        command = proposal(view, (*CAREFUL, *LIFECYCLE), obstacles) or self._choose(view)
        self._observer.note(command, state)
        return command

    def observe(self, state: SystemState) -> None:
        """Take in a state that somebody else decides about."""
        self._observer.look(state)

    def state_dict(self) -> dict[str, Any]:
        """Return everything needed to decide alike, of JSON types."""
        return {
            "observer": self._observer.state_dict(),
            "ledger": msgspec.to_builtins(self._ledger),
            "before": msgspec.to_builtins(self._before),
        }

    def load_state_dict(self, state_dict: dict[str, Any], /) -> None:
        """Continue from :meth:`state_dict`."""
        self._observer.load_state_dict(state_dict["observer"])
        self._ledger = msgspec.convert(state_dict["ledger"], _Ledger)
        self._before = msgspec.convert(state_dict["before"], _Ledger)

    def _learn(self, view: View) -> None:
        """Reward the decisions whose horizon has come."""
        ledger, now = self._ledger, view.evaluation
        if now is None or now.held_out is None or view.memory.is_stale(view.state):
            return
        # What lies ahead of this step was taken back by a rollback.
        ledger.log = [d for d in ledger.log if d.reward is not None or d.step < now.step]
        ledger.evaluations += 1
        for decision in ledger.log:
            age = ledger.evaluations - decision.evaluation
            if decision.reward is None and age >= self.bandit.horizon:
                reward = decision.reward = _reward(decision, now.epoch, now.held_out)
                context = np.asarray(decision.context, dtype=np.float64)
                surprise = reward - decision.expected
                self._posterior(decision.arm).update(context, surprise, self.bandit.noise)

    def _choose(self, view: View) -> AdaptationCommand:
        ledger, arms, context = self._ledger, list(_arms(view)), features(view)
        random = np.random.default_rng([self.bandit.seed, ledger.choices])
        ledger.choices += 1
        beliefs = [self._posterior(arm.name).predict(context) for arm in arms]
        means = np.asarray([a.expected + m for a, (m, _) in zip(arms, beliefs, strict=True)])
        spread = np.asarray([deviation for _, deviation in beliefs])
        drawn = means + spread * random.standard_normal((self.bandit.draws, len(arms)))
        wins = np.bincount(drawn.argmax(axis=1), minlength=len(arms)) / self.bandit.draws
        floor = min(self.bandit.floor, 1 / len(arms))
        propensities = floor + (1 - floor * len(arms)) * wins
        chosen = int(random.choice(len(arms), p=propensities / propensities.sum()))
        arm, propensity = arms[chosen], float(propensities[chosen])
        now = view.evaluation
        if now is not None and now.held_out is not None:
            entry = Decision(
                view.state.epoch,
                view.state.step,
                ledger.evaluations,
                arm.name,
                propensity,
                context.tolist(),
                arm.expected,
                arm.price,
                arm.cost,
                now.held_out,
                0.0 if view.trend is None else view.trend.slope,
            )
            ledger.log = [*ledger.log, entry][-self.bandit.remembered :]
        return self._command(view, arm, self._tell(view, arms, chosen, means, propensities))

    def _command(self, view: View, arm: Arm, told: Explanation) -> AdaptationCommand:
        if arm.candidate is not None:
            return planted(view, arm.candidate, told, self._planting)
        if arm.name == CUT:
            return ScaleLearningRate(self.limits.rate_factor, told)
        return NoChange(told)

    def _tell(
        self, view: View, arms: list[Arm], chosen: int, means: Floats, propensities: Floats
    ) -> Explanation:
        values: dict[str, float | None] = dict(zip(FEATURES, features(view).tolist(), strict=True))
        for arm, mean, propensity in zip(arms, means, propensities, strict=True):
            values[f"expected.{arm.name}"] = float(mean)
            values[f"propensity.{arm.name}"] = float(propensity)
        others = [i for i in range(len(arms)) if i != chosen]
        if others:
            rival = max(others, key=lambda i: float(propensities[i]))
            otherwise = (
                f"another draw: {arms[rival].name!r} has probability {propensities[rival]:.3g}"
            )
        else:
            barred = forbidden(view)
            refused = () if barred else select(view).refused
            told = barred or next(iter(refused), None)
            otherwise = told.otherwise if told else "a dormant slot outside of the window"
        reason = f"drawn with probability {propensities[chosen]:.3g}: {arms[chosen].name}"
        return why("bandit", reason, values, {}, otherwise)

    def _posterior(self, arm: str) -> Posterior:
        if arm not in self._ledger.arms:
            self._ledger.arms[arm] = Posterior.prior(len(FEATURES), self.bandit.precision)
        return self._ledger.arms[arm]


def _arms(view: View) -> Iterator[Arm]:
    """Yield what the rules allow."""
    yield Arm(WAIT)
    if len(view.memory.evaluations) < view.limits.least_evaluations:
        return
    if view.memory.fit != "under" and may_cut(view):
        yield Arm(CUT)
    if view.window_left or forbidden(view) is not None:
        return
    host = max(1, view.growth.parameters)
    for candidate in select(view).candidates:
        offer = view.growth.seeds[candidate.slot].offers[candidate.blueprint]
        yield Arm(
            f"germinate {candidate.slot} {candidate.blueprint}",
            candidate.score,
            candidate.price,
            1.0 + offer.parameters / host,
            candidate,
        )


def _reward(decision: Decision, epoch: int, held_out: float) -> float:
    """Return what a decision has brought by an epoch, beyond the trend that it found."""
    size = abs(decision.loss) or 1.0
    by_itself = 1.0 - math.exp(-max(0.0, decision.progress) * max(0, epoch - decision.epoch))
    drop = (decision.loss - held_out) / size - by_itself
    return max(-1.0, min(1.0, drop)) / decision.cost - decision.price


def _copy(ledger: _Ledger) -> _Ledger:
    return msgspec.convert(msgspec.to_builtins(ledger), _Ledger)
