import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cli.conftest import Esper
from esper.cli.checkpoint import export_weights, import_weights
from esper.leyline import CheckpointError

# Several commands, each of which has to import torch.
pytestmark = pytest.mark.timeout(60)

Run = Callable[..., str]


@pytest.fixture
def run(esper: Esper, workplace: Path) -> Run:
    """A finished run, and a way to ask about its checkpoints."""
    trained = esper(
        "train", "tiny_job:build", "--epochs", "2", "--name", "first", "--set",
        "checkpoints.every=5", "--set", "checkpoints.mode=wait",
    )  # fmt: skip
    assert trained.returncode == 0, trained.stderr

    def ask(command: str, *arguments: str, code: int = 0) -> str:
        result = esper("checkpoint", command, "first", *arguments)
        assert result.returncode == code, result.stdout + result.stderr
        return result.stdout + result.stderr

    return ask


def newest(workplace: Path) -> Path:
    return max((workplace / "runs" / "first" / "checkpoints").glob("step-?????????"))


def test_they_are_listed_and_their_history_told(run: Run) -> None:
    listed = run("ls")
    assert listed.splitlines()[0].split() == ["step", "written", "size", "guard", "validation"]
    assert "healthy" in listed
    history = run("ls", "--history")
    assert "saved" in history
    assert "newer ones are kept" in history


def test_damage_is_found_and_is_an_error(run: Run, workplace: Path) -> None:
    assert "all whole" in run("verify")
    file = newest(workplace) / "tensors.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    told = run("verify", code=2)
    assert "does not match its digest: tensor" in told
    assert "1 of 3 checkpoints are damaged" in told
    assert newest(workplace).is_dir(), "verifying changes nothing"


def test_weights_go_out_and_in_again(run: Run, workplace: Path, esper: Esper) -> None:
    path = str(workplace / "runs" / "first")
    told = run("export", "--safetensors", "out.safetensors")
    weights = load_file(workplace / "out.safetensors")
    assert f"{len(weights)} tensors of step" in told
    changed = {name: torch.full_like(tensor, 3) for name, tensor in weights.items()}
    torch.save({"state_dict": changed}, workplace / "in.pt")
    told = run("import", "--torch", "in.pt")
    assert "stays, pinned" in told
    export_weights(path, None, workplace / "again.safetensors", None)
    again = load_file(workplace / "again.safetensors")
    assert all(torch.equal(again[name], tensor) for name, tensor in changed.items())
    resumed = esper("train", "--resume", "first", "--epochs", "3")
    assert resumed.returncode == 0, resumed.stderr


def test_what_does_not_fit_is_named_and_nothing_is_changed(run: Run, workplace: Path) -> None:
    run("export", "--safetensors", "out.safetensors")
    weights = load_file(workplace / "out.safetensors")
    name, tensor = next(iter(weights.items()))
    path, file = workplace / "runs" / "first", workplace / "in.pt"
    before = sorted(entry.name for entry in (path / "checkpoints").iterdir())
    for wrong, words in (
        ({k: v for k, v in weights.items() if k != name}, f"the file lacks {name}"),
        (weights | {"odd": tensor}, "the model lacks odd"),
        (weights | {name: tensor.new_zeros(99, 1)}, rf"{name} is \(99, 1\)"),
        ([1, 2], "holds no state_dict"),
    ):
        torch.save(wrong, file)
        with pytest.raises(CheckpointError, match=words):
            import_weights(str(path), None, file)
    with pytest.raises(CheckpointError, match="cannot be read"):
        import_weights(str(path), None, workplace / "none.pt")
    with pytest.raises(CheckpointError, match="no whole checkpoint of step 999 "):
        export_weights(str(path), None, workplace / "x.st", 999)
    assert sorted(entry.name for entry in (path / "checkpoints").iterdir()) == before


class Planted:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("ran",)


def test_code_in_a_file_is_never_run(run: Run, workplace: Path) -> None:
    (workplace / "in.pt").write_bytes(pickle.dumps(Planted()))
    run("import", "--torch", "in.pt", code=2)
    torch.save({"state_dict": Planted()}, workplace / "in.pt")
    assert "no code in it is run" in run("import", "--torch", "in.pt", code=2)
    assert not (workplace / "ran").exists()


def test_one_can_be_pinned_and_let_go(run: Run, workplace: Path) -> None:
    step = str(int(newest(workplace).name.removeprefix("step-")))
    assert ": pinned" in run("pin", step)
    assert "pinned" in run("ls")
    assert "no longer pinned" in run("pin", step, "--release")
    assert "there is no checkpoint of step 1 " in run("pin", "1", code=2)
