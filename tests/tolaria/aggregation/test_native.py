from pathlib import Path

import hatch_build
import numpy as np
import pytest
import torch

from esper.tolaria.aggregation import native

SOURCE = Path(native.__file__).with_name("native.c")


@pytest.mark.parametrize("name", list(hatch_build.LIBRARIES))
def test_each_library_that_is_built_computes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = native._Kernels(name)
    monkeypatch.setattr(native, "_load", lambda: kernels)
    rows = [[torch.arange(1.0, 6.0)], [torch.ones(5)]]
    table = native.Table.of(rows, [5], torch.float32)
    assert table.gramian().tolist() == [[55, 15], [15, 5]]
    target = torch.zeros(5)
    table.combine(np.array([2.0, -1.0]), [target], [False])
    assert target.tolist() == [1, 3, 5, 7, 9]


@pytest.mark.parametrize("name", list(hatch_build.LIBRARIES))
def test_the_kernels_are_built_from_their_source(name: str, tmp_path: Path) -> None:
    library = tmp_path / name
    assert hatch_build.compile_kernels(SOURCE, library, hatch_build.LIBRARIES[name]) is None
    assert library.stat().st_size > 1000


@pytest.mark.parametrize("compiler", ["false", "no-such-compiler"])
def test_without_a_compiler_nothing_is_built(
    compiler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", compiler)
    library = tmp_path / "libnative.so"
    library.write_bytes(b"stale")
    assert compiler in str(hatch_build.compile_kernels(SOURCE, library, []))
    assert not library.exists(), "a stale library would be used"


def test_without_a_library_torch_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_LIBRARIES", ("libabsent.so",))
    native._load.cache_clear()
    try:
        assert not native.available()
        assert "torch's own" in native.describe()
        with pytest.raises(RuntimeError, match="ask available"):
            native._library()
    finally:
        native._load.cache_clear()


def test_it_says_which_kernels_serve() -> None:
    assert native.describe() == "compiled, on all threads"


def test_too_many_tasks_are_not_taken() -> None:
    assert native.available(128)
    assert not native.available(129)


def test_a_library_of_another_version_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_VERSION", -1)
    native._load.cache_clear()
    try:
        assert not native.available()
    finally:
        native._load.cache_clear()
