import pytest
import torch

from esper.tolaria.aggregation import native

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=["compiled", "torch"])
def kernels_in_use(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run a test with the compiled kernels, and again as if they had not been built."""
    if request.param == "torch":
        monkeypatch.setattr(native, "available", lambda tasks=2: False)
    else:
        assert native.available(), "the kernels were not compiled when Esper was installed"
    return str(request.param)
