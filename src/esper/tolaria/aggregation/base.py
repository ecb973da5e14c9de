"""What every aggregator is: a map from the Gramian of the task gradients to task weights."""

from typing import Protocol

from torch import Tensor


class Aggregator(Protocol):
    """Turns conflicting task gradients into one update, in task space.

    With ``J`` the matrix whose rows are the task gradients, the update is ``weights @ J``, and the
    weights depend on ``J`` through its Gramian ``J @ J.T`` alone.
    """

    def weights(self, gramian: Tensor) -> Tensor:
        """Return the weight of each task gradient.

        :param gramian: inner products of the task gradients, n by n, float64.
        :returns: n weights, float64, on the device of the Gramian.
        """
        ...
