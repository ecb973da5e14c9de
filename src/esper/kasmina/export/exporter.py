"""Saves a model in forms that are read without Esper."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

import torch
from torch import nn

from esper.kasmina.export.architecture import ARCHITECTURE, describe_model, encode
from esper.kasmina.export.comparison import Reference
from esper.kasmina.export.directory import check_target, whole_directory
from esper.kasmina.export.exported import operations_class
from esper.kasmina.export.intact import left_as_found, on_cpu, unchanged
from esper.kasmina.export.nodes import Untraceable
from esper.kasmina.export.onnx_form import ONNX, check_installed, open_onnx, write_onnx
from esper.kasmina.export.program import Program, export_program
from esper.kasmina.export.report import Batch, ExportReport, Form, Origin
from esper.kasmina.export.sample import Inputs, sample_of
from esper.kasmina.export.source import (
    CONSTANTS,
    MODEL,
    WEIGHTS,
    introduction,
    load_generated,
    render,
)
from esper.kasmina.export.traced import Code, trace_classes
from esper.kasmina.export.trees import map_leaves
from esper.kasmina.export.weights import Weights, digest, write_tensors
from esper.leyline import GrowthError

PROGRAM = "model.pt2"
FORMS: tuple[Form, ...] = get_args(Form)
_SLOT = "esper_slot"


def export_model(
    model: nn.Module,
    sample: Any,  # noqa: ANN401 - a tensor, a tuple, a dict or a Sample
    directory: str | Path,
    *,
    formats: Sequence[str] = FORMS,
    metadata: Mapping[str, Any] | None = None,
    tolerance: float = 1e-4,
    overwrite: bool = False,
) -> ExportReport:
    """Write a model in forms that are read without Esper, and compare each with the model.

    ``safetensors`` writes the weights, ``architecture.json`` and a ``model.py`` that needs torch
    and safetensors alone. ``torch`` writes ``model.pt2``, which ``torch.export.load`` reads without
    any code of the model. ``onnx`` writes ``model.onnx``.

    The model is exported in evaluation mode, and left as it was found. The directory appears whole
    or not at all.

    :param model: that has finished growing.
    :param sample: example inputs: one tensor, a tuple of arguments, a dict of keyword arguments, or
        a :class:`Sample` of both. Arguments without a tensor are built in.
    :param directory: to make.
    :param formats: some of ``safetensors``, ``torch`` and ``onnx``.
    :param metadata: of JSON types; kept in ``architecture.json``.
    :param tolerance: largest difference of an output, over its largest magnitude.
    :param overwrite: replace a directory that is there.
    :raises GrowthError: a form cannot be written or gives other outputs, a package is missing, the
        model still has slots, or the directory is not empty; nothing was written then.
    """
    forms = _forms(formats)
    target = Path(directory).absolute()
    check_target(target, overwrite=overwrite)
    facts = dict(metadata or {})
    encode(facts)
    if "onnx" in forms:
        check_installed()
    if "safetensors" in forms:
        _refuse_slots(model)
    given = sample_of(sample)
    with left_as_found(model):
        live = on_cpu(model)
        args, kwargs = map_leaves((given.args, given.kwargs), _on_cpu)
        inputs = Inputs(live, type(given)(args, kwargs))
        export = _Export(live, inputs, facts, tolerance)
        if live is not model:
            export.note("exported from a copy on the CPU")
        with whole_directory(target) as folder:
            for form in forms:
                export.write(form, folder)
            return export.report(target, folder)


class _Export:
    """One model on its way to several forms."""

    def __init__(
        self, model: nn.Module, inputs: Inputs, metadata: dict[str, Any], tolerance: float
    ) -> None:
        self.notes: list[str] = []
        self._model = model
        self._inputs = inputs
        self._metadata = metadata
        self._reference = Reference(model, inputs, tolerance)
        self._files: dict[Form, list[str]] = {}
        self._differences: dict[Form, float | None] = {}
        self._batch: dict[Form, Batch] = {}
        self._origin: Origin | None = None
        built_in = ", ".join(f"{name}={value!r}" for name, value in inputs.built_in.items())
        if built_in:
            self.note(f"built in: {built_in}")

    def note(self, text: str) -> None:
        """Tell something, once."""
        if text not in self.notes:
            self.notes.append(text)

    def write(self, form: Form, folder: Path) -> None:
        """Write one form and compare it with the model."""
        {
            "safetensors": self._write_plain,
            "torch": self._write_program,
            "onnx": self._write_onnx,
        }[form](folder)

    def report(self, target: Path, folder: Path) -> ExportReport:
        """Return what was done."""
        sizes = {
            form: sum((folder / name).stat().st_size for name in names)
            for form, names in self._files.items()
        }
        return ExportReport(
            directory=target,
            paths={form: tuple(target / n for n in names) for form, names in self._files.items()},
            bytes=sizes,
            differences=self._differences,
            generated=self._origin,
            batch=self._batch,
            notes=tuple(self.notes),
        )

    @cached_property
    def _program(self) -> Program:
        program = export_program(self._model, self._reference)
        if program.note:
            self.note(f"static batch: {program.note}")
        return program

    def _write_plain(self, folder: Path) -> None:
        weights = Weights(self._model)
        write_tensors(weights.saved, folder / WEIGHTS)
        try:
            code = self._trace(weights, folder)
        except (Untraceable, GrowthError) as error:
            self.note(f"model.py holds operations instead of modules: {error}")
            code = self._operations(weights, folder)
        batch = self._inputs.batch if self._batch["safetensors"] == "dynamic" else None
        described = describe_model(
            self._model, weights, self._inputs, self._reference.outputs, batch
        )
        described["weights"] = {"file": WEIGHTS, "sha256": digest(folder / WEIGHTS)}
        described["generated"] = self._origin
        described["metadata"] = self._metadata
        (folder / ARCHITECTURE).write_text(encode(described), encoding="utf-8")
        constants = [CONSTANTS] if code.constants else []
        self._files["safetensors"] = [WEIGHTS, *constants, MODEL, ARCHITECTURE]

    def _trace(self, weights: Weights, folder: Path) -> Code:
        dynamic = self._reference.dynamic
        intro = self._introduction(dynamic=dynamic)
        with unchanged(self._model):
            code = trace_classes(self._model, self._inputs, weights, intro)
        self._settle(code, weights, folder, "fx", dynamic=dynamic)
        if not dynamic:
            self.note(f"static batch: {self._reference.fixed}")
        return code

    def _operations(self, weights: Weights, folder: Path) -> Code:
        program = self._program
        dynamic = program.batch == "dynamic"
        try:
            code = operations_class(
                program.exported,
                type(self._model).__name__,
                self._inputs,
                self._reference.outputs,
                weights,
                self._introduction(dynamic=dynamic),
            )
        except Untraceable as error:
            raise GrowthError(
                f"{type(self._model).__name__} has no form as plain Python: {error}; leave out the "
                "format safetensors"
            ) from error
        self._settle(code, weights, folder, "export", dynamic=dynamic)
        return code

    def _introduction(self, *, dynamic: bool) -> list[str]:
        batch = self._inputs.batch if dynamic else None
        return introduction(self._model, self._inputs, self._reference.outputs, batch)

    def _settle(
        self, code: Code, weights: Weights, folder: Path, origin: Origin, *, dynamic: bool
    ) -> None:
        """Write code, load it again, and compare what it does."""
        text = render(code, self._inputs, weights, readable=origin == "fx")
        (folder / MODEL).write_text(text, encoding="utf-8")
        if code.constants:
            write_tensors(code.constants, folder / CONSTANTS)
        else:
            (folder / CONSTANTS).unlink(missing_ok=True)
        generated = load_generated(folder)
        self._differences["safetensors"] = self._reference.check(
            lambda inputs: generated(**inputs.given), dynamic=dynamic, what=MODEL
        )
        self._origin = origin
        self._batch["safetensors"] = "dynamic" if dynamic else "static"

    def _write_program(self, folder: Path) -> None:
        program = self._program
        torch.export.save(program.exported, folder / PROGRAM)
        module: Any = torch.export.load(folder / PROGRAM).module()
        self._differences["torch"] = self._reference.check(
            lambda inputs: module(*inputs.sample.args, **inputs.sample.kwargs),
            dynamic=program.batch == "dynamic",
            what=PROGRAM,
        )
        self._batch["torch"] = program.batch
        self._files["torch"] = [PROGRAM]

    def _write_onnx(self, folder: Path) -> None:
        program, outputs = self._program, self._reference.outputs
        before = set(folder.iterdir())
        write_onnx(program, self._inputs, outputs, folder / ONNX)
        self._files["onnx"] = sorted(path.name for path in set(folder.iterdir()) - before)
        self._batch["onnx"] = program.batch
        answer = open_onnx(folder / ONNX, outputs)
        if answer is None:
            self._differences["onnx"] = None
            self.note(f"{ONNX} was not verified: onnxruntime is not installed")
            return
        self._differences["onnx"] = self._reference.check(
            answer, dynamic=program.batch == "dynamic", what=ONNX
        )


def _forms(formats: Sequence[str]) -> list[Form]:
    wanted = [formats] if isinstance(formats, str) else list(formats)
    for name in wanted:
        if name not in FORMS:
            raise GrowthError(f"there is no format {name!r}; give some of {', '.join(FORMS)}")
    if not wanted:
        raise GrowthError(f"no format is given; give some of {', '.join(FORMS)}")
    return [form for form in FORMS if form in wanted]


def _refuse_slots(model: nn.Module) -> None:
    found = [path for path, _ in model.named_modules() if path.rpartition(".")[2] == _SLOT]
    if found:
        places = ", ".join(path.rpartition(".")[0] or "the model itself" for path in found)
        raise GrowthError(
            f"the model still has seed slots, at {places}; fold or cull their seeds and take the "
            "slots off first, or leave out the format safetensors"
        )


def _on_cpu(leaf: Any) -> Any:  # noqa: ANN401
    return leaf.detach().cpu() if isinstance(leaf, torch.Tensor) else leaf
