"""Reading a checkpoint for a rollback by way of the engine's one way out of the loop."""

import time

from esper.core.worker import Isolation, Outcome
from esper.leyline import CheckpointError, DeadlineExceeded
from esper.tolaria.dependency import Dependency
from esper.tolaria.rollback import CheckpointInfo, CheckpointStore, ProcessReader, read_checkpoint
from esper.tolaria.state import Capture

_LOOK_EVERY_S = 0.005


class DependencyReader:
    """Reads checkpoints in a process that is killed at the deadline, under a breaker.

    :param reader: is asked; its timeout is the deadline.
    """

    def __init__(self, reader: Dependency) -> None:
        self._reader = reader

    def __call__(
        self, store: CheckpointStore, before_step: int, deadline: float
    ) -> tuple[CheckpointInfo, Capture]:
        """Read the newest valid checkpoint of a step or an earlier one.

        :raises DeadlineExceeded: it does not come in time.
        :raises CheckpointError: it cannot be read, or reading has failed too often of late.
        """
        reader = self._reader
        if reader.closed:
            # The program is ending, and still wants its state.
            return ProcessReader()(store, before_step, deadline)
        while reader.crowded:
            if time.monotonic() >= deadline:
                raise DeadlineExceeded("nobody to read a checkpoint: all slots are taken")
            time.sleep(_LOOK_EVERY_S)
        asked = reader.submit_async(
            read_checkpoint, store.directory, before_step, isolation=Isolation.PROCESS
        )
        answer = reader.wait() if asked else None
        if answer is None:
            raise CheckpointError(f"no checkpoint is read: {reader.why_not()}")
        if answer.outcome in (Outcome.TIMEOUT, Outcome.ABANDONED):
            raise DeadlineExceeded(answer.detail)
        if answer.reply is None:
            raise CheckpointError(answer.detail)
        reply: tuple[CheckpointInfo, Capture] = answer.reply
        return reply
