"""What linear regression knows of one arm: a normal distribution over its weights."""

import math

import msgspec
import numpy as np
from numpy.typing import NDArray


class Posterior(msgspec.Struct):
    """Weights of an arm after some rewards; of JSON types, so that it is saved exactly.

    Source: Agrawal and Goyal, "Thompson Sampling for Contextual Bandits with Linear Payoffs", 2013.

    :ivar precision: inverse covariance, features by features.
    :ivar moment: precision times mean.
    :ivar rewards: how many were taken in.
    """

    precision: list[list[float]]
    moment: list[float]
    rewards: int = 0

    @classmethod
    def prior(cls, size: int, precision: float) -> "Posterior":
        """Return what is known before any reward.

        :param size: number of features.
        :param precision: inverse variance of each weight around 0.
        """
        return cls((precision * np.eye(size)).tolist(), [0.0] * size)

    def predict(self, context: NDArray[np.float64]) -> tuple[float, float]:
        """Return mean and standard deviation of the reward that is expected of a context."""
        solved = np.linalg.solve(np.asarray(self.precision), context)
        return float(solved @ np.asarray(self.moment)), math.sqrt(max(0.0, float(solved @ context)))

    def update(self, context: NDArray[np.float64], reward: float, noise: float) -> None:
        """Take in one reward.

        :param context: features of the decision.
        :param reward: beyond what was expected without any.
        :param noise: standard deviation of rewards.
        """
        precision = np.asarray(self.precision) + np.outer(context, context) / noise**2
        moment = np.asarray(self.moment) + context * (reward / noise**2)
        self.precision, self.moment = precision.tolist(), moment.tolist()
        self.rewards += 1
