"""A token bucket: how often something may be done, with some at once."""

import time
from collections.abc import Callable


class TokenBucket:
    """Gives out tokens at a steady rate, and up to a minute's worth at once.

    :param per_minute: tokens a minute.
    :param clock: seconds that never run backwards.
    :raises ValueError: the rate is below 1.
    """

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        if per_minute < 1:
            raise ValueError(f"per_minute is {per_minute}; give 1 or more")
        self._capacity = self._tokens = float(per_minute)
        self._per_second = per_minute / 60
        self._clock = clock
        self._filled = clock()

    def take(self) -> bool:
        """Take a token; False when there is none."""
        now = self._clock()
        self._tokens = min(self._capacity, self._tokens + (now - self._filled) * self._per_second)
        self._filled = now
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True
