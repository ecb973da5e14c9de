"""What came of an export."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Form = Literal["safetensors", "torch", "onnx"]
Origin = Literal["fx", "export"]
Batch = Literal["dynamic", "static"]


@dataclass(frozen=True)
class ExportReport:
    """What was written, and how well it agrees with the model.

    :param directory: all files are in it.
    :param paths: files by form.
    :param bytes: sizes of a form's files together.
    :param differences: largest absolute difference between the outputs of the model and of what was
        loaded again; None where it was not verified.
    :param generated: where ``model.py`` comes from: ``fx``, a trace of the model's own modules, or
        ``export``, the operations of ``torch.export``; None when there is none.
    :param batch: whether each form takes batches of other sizes.
    :param notes: what else a user has to know.
    """

    directory: Path
    paths: Mapping[Form, tuple[Path, ...]]
    bytes: Mapping[Form, int]
    differences: Mapping[Form, float | None]
    generated: Origin | None
    batch: Mapping[Form, Batch]
    notes: tuple[str, ...] = ()

    @property
    def total_bytes(self) -> int:
        """Sizes of all files together."""
        return sum(self.bytes.values())
