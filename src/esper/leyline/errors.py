"""The error tree: everything Esper raises on purpose derives from :class:`EsperError`."""


class EsperError(Exception):
    """Base of all deliberate errors. The message names the thing, the value and the fix."""


class ConfigError(EsperError):
    """A setting is unknown, of the wrong type or out of range."""


class JobError(EsperError):
    """A training job cannot be built or is not well formed."""


class DataError(EsperError):
    """The data set is empty, or its order cannot be made resumable."""


class LossError(EsperError):
    """The loss function returned something that is not one scalar per task."""


class StateError(EsperError):
    """Training state cannot be captured, or does not fit the live objects."""


class CheckpointError(EsperError):
    """A durable checkpoint cannot be written, found, verified or loaded."""


class RunError(EsperError):
    """A run directory is missing, damaged, or of another job."""


class DivergenceError(EsperError):
    """The divergence guard stopped training after its last remedy failed."""


class GrowthError(EsperError):
    """The model cannot grow as asked; it is as it was."""


class DeadlineExceeded(EsperError, TimeoutError):  # noqa: N818 - the field's own name for it
    """A call did not end by its deadline; whatever it answers later is dropped."""


class CallCancelled(EsperError):  # noqa: N818
    """A call was cancelled before it ended."""


class WorkerFull(EsperError):  # noqa: N818
    """Every slot of the worker is taken; the call was refused at once, not queued."""


class WorkerClosed(EsperError):  # noqa: N818
    """The worker takes no calls any more."""


class ChildDied(EsperError):  # noqa: N818
    """The process that carried out a call ended before it answered."""
