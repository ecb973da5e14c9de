"""One use of torch's profiler, kept from meeting another one.

Two profilers that overlap in a process do not raise: torch ends the one in the other's place, and
saving what is left, or leaving the program with one switched on, is a segmentation fault. So there
is one recording at a time, and none while somebody else profiles.
"""

import importlib
import os
import threading
from pathlib import Path

import torch
from torch.autograd import profiler as autograd_profiler
from torch.profiler import ProfilerActivity, record_function
from torch.profiler.profiler import _KinetoProfile

from esper.leyline import EsperError

_one_at_a_time = threading.Lock()
# Above all of kineto's levels: it writes on standard error whenever it starts and stops, which
# tears a progress bar. What can fail is checked and told by us.
_QUIET = "6"


class ProfilerError(EsperError):
    """A profile cannot be recorded or written."""


def preload() -> None:
    """Import what torch's profiler imports when it is first used, which takes about a second."""
    if hasattr(torch, "_inductor"):
        importlib.import_module("torch._inductor.config")


class Recording:
    """Records what torch does on this thread, and on devices, from :meth:`start` to :meth:`stop`.

    All but :meth:`save` has to be called on one and the same thread.

    :raises ProfilerError: another profiler is in use, or torch cannot start one.
    """

    def __init__(self) -> None:
        self.steps = 0
        self.started = False
        self._span: record_function | None = None
        self._thread = threading.get_ident()
        if not _one_at_a_time.acquire(blocking=False):
            raise ProfilerError("another profile of this process is being recorded; wait for it")
        try:
            self._profile = self._prepare()
        except BaseException:
            _one_at_a_time.release()
            raise

    def start(self) -> None:
        """Keep what happens from now on.

        :raises ProfilerError: another profiler has been started meanwhile.
        """
        try:
            _refuse_to_share()
            self._profile.start_trace()
        except Exception as error:
            _one_at_a_time.release()
            raise ProfilerError(f"torch's profiler does not start: {error}") from error
        self.started = True

    def begin_step(self, number: int) -> None:
        """Mark the start of a step, under the name that torch's tools look for."""
        if self.started:
            self._span = record_function(f"ProfilerStep#{number}")
            self._span.__enter__()  # type: ignore[no-untyped-call]

    def end_step(self) -> None:
        """Mark its end."""
        if self._span is not None:
            self._span.__exit__(None, None, None)
            self._span = None
            self.steps += 1

    def stop(self) -> None:
        """End the recording, with what it has.

        :raises ProfilerError: somebody else's profiler has taken its place, it is on another
            thread than it was started on, or nothing was recorded.
        """
        try:
            self._stop()
        except ProfilerError:
            raise
        except Exception as error:
            raise ProfilerError(f"torch's profiler does not stop: {error}") from error
        finally:
            _one_at_a_time.release()

    def save(self, path: Path) -> None:
        """Write the trace, once; on any thread. What kineto cannot write it does not tell."""
        self._profile.export_chrome_trace(str(path))

    def _prepare(self) -> _KinetoProfile:
        _refuse_to_share()
        os.environ.setdefault("KINETO_LOG_LEVEL", _QUIET)
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        profile = _KinetoProfile(activities=activities)
        try:
            profile.prepare_trace()
        except Exception as error:
            raise ProfilerError(f"torch's profiler cannot be prepared: {error}") from error
        return profile

    def _stop(self) -> None:
        self._span = None
        if threading.get_ident() != self._thread:
            self._profile.stop_trace()
            raise ProfilerError(
                "the recording was begun on another thread; let one thread take all steps"
            )
        if not self.started:
            _refuse_to_share()
            # The only way to end a preparation that torch offers.
            self._profile.start_trace()
            self._profile.stop_trace()
            raise ProfilerError("it was ended before its first active step; nothing was recorded")
        if not torch._C._autograd._profiler_enabled():
            raise ProfilerError(
                "another profiler was started and stopped meanwhile, which ended this one; use one "
                "at a time"
            )
        self._profile.stop_trace()


def _refuse_to_share() -> None:
    # The first is of this thread, the second of the process.
    if torch._C._autograd._profiler_enabled() or autograd_profiler._is_profiler_enabled:
        raise ProfilerError("another profiler is in use in this process; stop it first")
