"""What a dependency of a run may be asked to do; importable from a process."""

import time


def double(value: int) -> int:
    return 2 * value


def fail(message: str) -> None:
    raise ValueError(message)


def spin() -> None:
    while True:
        pass


def sleep(seconds: float) -> str:
    time.sleep(seconds)
    return "slept"
