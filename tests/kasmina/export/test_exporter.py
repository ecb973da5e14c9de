import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from esper.jobs.digits import TwoDigitReader
from esper.kasmina import attach
from esper.kasmina.export import Sample, export_model
from esper.leyline import GrowthError
from kasmina.export.models import FROM_OPERATIONS, MODELS, digits, tied, two_inputs, undecided

ELSEWHERE = Path(__file__).parent / "elsewhere.py"
# Attention without gradients takes another path in eager mode than torch.export records.
NEARLY_EXACT = {"encoder"}
# Converting takes seconds.
AS_ONNX = {"grown_digits", "tied", "two_inputs", "any_number"}


class Counting(nn.Module):
    """Answers differently each time."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * self.calls


class Counted(nn.Module):
    """Counts in a buffer how often it is called."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 2)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.linear(x)


class Twice(nn.Module):
    """One module at two places, and a parameter that is wrapped a second time."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
        self.second = self.first
        self.third = nn.Linear(3, 3)
        first: Any = self.first[0]
        self.third.weight = nn.Parameter(first.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.third(self.second(self.first(x)))


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def answer(model: nn.Module, sample: Any) -> Any:
    model.eval()
    with torch.no_grad():
        if isinstance(sample, dict):
            return model(**sample)
        return model(*sample) if isinstance(sample, tuple) else model(sample)


def load_elsewhere(directory: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """Load what was written where ``esper`` cannot be imported, and compare the outputs."""
    return subprocess.run(
        [sys.executable, "-W", "error", str(ELSEWHERE), str(directory), *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )


@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", MODELS)
def test_every_form_gives_the_same_outputs_where_esper_is_not_installed(
    name: str, tmp_path: Path
) -> None:
    model, sample = MODELS[name]()
    expected = answer(model, sample)
    formats = ["safetensors", "torch", *(["onnx"] if name in AS_ONNX else [])]
    report = export_model(model, sample, tmp_path / "out", formats=formats)
    assert report.batch == dict.fromkeys(formats, "static" if name == "fixed_batch" else "dynamic")
    assert report.generated == ("export" if name in FROM_OPERATIONS else "fx")
    assert report.differences["safetensors"] == 0
    torch.save((sample, expected), tmp_path / "expected.pt")
    exact = "" if name in NEARLY_EXACT else "exact"
    loaded = load_elsewhere(tmp_path / "out", str(tmp_path / "expected.pt"), exact)
    assert loaded.returncode == 0, loaded.stderr
    assert loaded.stdout.split() == formats
    state = {key: list(value.shape) for key, value in model.state_dict().items()}
    assert json.loads((tmp_path / "expected.pt.keys").read_text()) == state
    require_good_style(tmp_path / "out" / "model.py")


def require_good_style(file: Path) -> None:
    ruff = str(Path(sys.executable).parent / "ruff")
    for command in (["format", "--diff"], ["check", "--select", "E,F,I,W,B,C4,UP"]):
        ran = subprocess.run(
            [ruff, *command, "--isolated", "--no-cache", str(file)],
            capture_output=True,
            text=True,
            check=False,
        )
        assert ran.returncode == 0, ran.stdout
    assert "esper" not in file.read_text().lower()


def test_a_grown_model_reads_as_it_was_built(tmp_path: Path) -> None:
    export_model(*MODELS["grown_digits"](), tmp_path / "out", formats=["safetensors"])
    text = (tmp_path / "out" / "model.py").read_text()
    assert "        block = self.block(h)\n        return h + block\n" in text
    assert '("grown", Residual())' in text
    assert 'nn.Conv2d(4, 16, 3, padding=1, padding_mode="reflect")' in text
    assert 'return {"left": left, "right": right}' in text


def test_the_architecture_is_described(tmp_path: Path) -> None:
    model, sample = tied()
    metadata = {"run": "a", "step": 3}
    report = export_model(
        model, sample, tmp_path / "out", formats=["safetensors"], metadata=metadata
    )
    described = json.loads((tmp_path / "out" / "architecture.json").read_text())
    unique = sum(parameter.numel() for parameter in model.parameters())
    assert described["parameters"] == {"total": unique, "trainable": unique}
    assert described["metadata"] == metadata
    assert described["inputs"] == {"tokens": {"shape": ["batch", 6], "dtype": "int64"}}
    assert described["outputs"] == {"shape": ["batch", 6, 11], "dtype": "float32"}
    assert described["tied"] == {"out.weight": "embedding.weight"}
    modules = {module["path"]: module for module in described["modules"]}
    assert modules["blocks.0.first"]["arguments"] == {"normalized_shape": 12}
    assert modules["blocks.2.attention"]["attributes"] == {"heads": 2}
    assert modules["blocks.1.mlp.2"]["parameters"]["weight"]["shape"] == [12, 24]
    digest = subprocess.run(
        ["sha256sum", tmp_path / "out" / "model.safetensors"], capture_output=True, text=True
    )
    assert digest.stdout.split()[0] == described["weights"]["sha256"]
    assert report.total_bytes == sum(p.stat().st_size for p in (tmp_path / "out").iterdir())


def test_shared_parameters_are_saved_once(tmp_path: Path) -> None:
    export_model(*tied(), tmp_path / "out", formats=["safetensors"])
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert "embedding.weight" in file.keys()  # noqa: SIM118 - a file is no mapping
        assert "out.weight" not in file.keys()  # noqa: SIM118


@pytest.mark.timeout(60)
@pytest.mark.parametrize("hidden", [False, True])
def test_what_is_shared_stays_shared(hidden: bool, tmp_path: Path) -> None:
    model = Twice()
    if hidden:
        # A hook keeps modules from being traced.
        model.register_forward_hook(lambda module, args, output: output + 1)
    report = export_model(model, torch.rand(4, 3), tmp_path / "out", formats=["safetensors"])
    assert report.generated == ("export" if hidden else "fx")
    loaded = load_elsewhere(tmp_path / "out", "shared")
    assert loaded.returncode == 0, loaded.stderr
    names = ["first.0.weight", "second.0.weight", "third.weight"]
    assert loaded.stdout.split() == names


def test_the_model_is_left_as_it_was_found(tmp_path: Path) -> None:
    model = nn.Sequential(Counted(), nn.Dropout(0.5), nn.BatchNorm1d(2), Counting())
    model.train()
    model[2].eval()
    modes = [module.training for module in model.modules()]
    registries = [id(module._parameters) for module in model.modules()]
    attributes = [set(vars(module)) for module in model.modules()]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    sample = torch.rand(3, 4)
    with pytest.raises(GrowthError, match="Sequential answers differently each time"):
        export_model(model, sample, tmp_path / "out", formats=["safetensors"])
    assert [module.training for module in model.modules()] == modes
    assert [id(module._parameters) for module in model.modules()] == registries
    assert [set(vars(module)) for module in model.modules()] == attributes
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert model[3].calls == 0
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_buffer_that_counts_is_exported_as_it_was(tmp_path: Path) -> None:
    model = Counted()
    for _ in range(3):
        model(torch.rand(1, 4))
    report = export_model(
        model, torch.rand(3, 4), tmp_path / "out", formats=["safetensors", "torch"]
    )
    assert report.differences == {"safetensors": 0.0, "torch": 0.0}
    assert isinstance(model.calls, Tensor)
    assert model.calls == 3
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert file.get_tensor("calls") == 3


def test_no_random_number_is_drawn(tmp_path: Path) -> None:
    model, sample = digits()
    before = torch.random.get_rng_state()
    export_model(model, sample, tmp_path / "out", formats=["safetensors", "torch"])
    assert torch.equal(before, torch.random.get_rng_state())


def test_the_same_model_gives_the_same_files(tmp_path: Path) -> None:
    model, sample = MODELS["any_number"]()
    for name in ("a", "b"):
        export_model(model, sample, tmp_path / name, formats=["safetensors"])
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


def test_control_flow_on_values_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    model, sample = undecided()
    with pytest.raises(GrowthError, match=r"torch\.export cannot follow Undecided.*torch\.where"):
        export_model(model, sample, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_slots_are_refused_for_source_but_not_for_a_program(tmp_path: Path) -> None:
    model, sample = digits()
    attach(model, "trunk.0", sample)
    with pytest.raises(GrowthError, match=r"seed slots, at trunk\.0; fold or cull"):
        export_model(model, sample, tmp_path / "out")
    report = export_model(model, sample, tmp_path / "out", formats=["torch"])
    assert report.differences == {"torch": 0.0}
    assert report.generated is None


def test_a_directory_that_holds_something_is_refused(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "precious").write_text("mine")
    with pytest.raises(GrowthError, match="is not empty"):
        export_model(*digits(), target, formats=["safetensors"])
    model = TwoDigitReader(8)
    with pytest.raises(GrowthError, match="fails on the sample"):
        export_model(model, torch.rand(2, 3), target, overwrite=True)
    assert (target / "precious").read_text() == "mine"
    export_model(*digits(), target, formats=["safetensors"], overwrite=True)
    names = {path.name for path in target.iterdir()}
    assert names == {"model.safetensors", "model.py", "architecture.json"}
    assert list(tmp_path.iterdir()) == [target]


def test_a_place_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(GrowthError, match="cannot be written"):
        export_model(*digits(), tmp_path / "file" / "out", formats=["safetensors"])
    with pytest.raises(GrowthError, match="is no directory"):
        export_model(*digits(), tmp_path / "file", formats=["safetensors"])


def test_a_missing_package_is_named_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(GrowthError, match=r"needs onnxscript; install with: pip .*esper\[onnx\]"):
        export_model(*digits(), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.timeout(60)
def test_without_onnxruntime_the_file_is_said_to_be_unverified(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    report = export_model(*digits(), tmp_path / "out", formats=["onnx"])
    assert report.differences == {"onnx": None}
    assert any("not verified" in note for note in report.notes)


@pytest.mark.timeout(60)
def test_a_batch_of_one_is_exported_for_any_size(tmp_path: Path) -> None:
    model, images = digits()
    report = export_model(model, images[:1], tmp_path / "out", formats=["torch"])
    assert report.batch == {"torch": "dynamic"}
    program = torch.export.load(tmp_path / "out" / "model.pt2").module()
    assert torch.equal(program(images)["left"], answer(model, images)["left"])


def test_arguments_without_a_tensor_are_built_in(tmp_path: Path) -> None:
    model, sample = two_inputs()
    report = export_model(model, sample, tmp_path / "out", formats=["safetensors"])
    assert report.notes == ("built in: scale=0.5",)
    both = Sample((sample["left"],), {"scale": 0.5, "right": sample["right"]})
    again = export_model(model, both, tmp_path / "again", formats=["safetensors"])
    assert again.differences == report.differences
    text = (tmp_path / "out" / "model.py").read_text()
    assert text == (tmp_path / "again" / "model.py").read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sample": [torch.rand(2)]}, "the sample is a list"),
        ({"sample": {"images": 3}}, "holds no tensor"),
        ({"sample": {"pictures": torch.rand(2)}}, "cannot be called with the sample"),
        ({"formats": ["pickle"]}, "no format 'pickle'; give some of safetensors, torch, onnx"),
        ({"formats": []}, "no format is given"),
        ({"metadata": {"when": object()}}, "metadata cannot be written as JSON"),
        ({"metadata": {"loss": float("nan")}}, "metadata cannot be written as JSON"),
    ],
)
def test_what_makes_no_sense_is_refused(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    model, sample = digits()
    arguments = {"sample": sample, "directory": tmp_path / "out"} | change
    with pytest.raises(GrowthError, match=message):
        export_model(model, **arguments)
    assert list(tmp_path.iterdir()) == []


def test_outputs_that_are_no_tensors_are_refused(tmp_path: Path) -> None:
    class Odd(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return {x.shape: object()}

    with pytest.raises(GrowthError, match=r"output_torch.* of the model is a object"):
        export_model(Odd(), torch.rand(2), tmp_path / "out")
