"""One window, carried through step by step."""

from esper.tolaria.profiler.recording import ProfilerError, Recording
from esper.tolaria.profiler.window import Phase, Window


class Course:
    """Opens and ends recordings as a window says.

    :param window: how many steps of each kind.
    """

    def __init__(self, window: Window) -> None:
        self._window = window
        self._position = 0
        self._recording: Recording | None = None
        self._held = False

    @property
    def over(self) -> bool:
        """Whether all cycles are done."""
        return self._window.phase(self._position) is Phase.DONE

    def enter(self, step: int, *, ready: bool) -> None:
        """Begin a step.

        :param step: number that it goes by in the trace.
        :param ready: False holds the window before its next recording.
        :raises ProfilerError: the profiler cannot be switched on; the cycle is given up.
        """
        position = self._position
        self._held = self._window.opens(position) and not ready
        if self._held:
            return
        try:
            if self._window.opens(position):
                self._recording = Recording()
            recording = self._recording
            if recording is None:
                return
            if self._window.phase(position) is Phase.ACTIVE and not recording.started:
                recording.start()
            recording.begin_step(step)
        except ProfilerError:
            self._recording = None
            raise

    def leave(self) -> Recording | None:
        """End the step; return the recording that is complete with it.

        :raises ProfilerError: it cannot be used.
        """
        if self._held:
            return None
        position = self._position
        self._position += 1
        if self._recording is not None:
            self._recording.end_step()
        return self.close() if self._window.closes(position) else None

    def close(self) -> Recording | None:
        """End the recording under way, if there is one, and return it.

        :raises ProfilerError: it cannot be used.
        """
        recording, self._recording = self._recording, None
        if recording is not None:
            recording.stop()
        return recording
