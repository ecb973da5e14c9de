import pytest
import torch
from torch import Tensor, nn

from esper.kasmina import Kasmina
from esper.leyline import GrowthError, Planting, SeedCommand, SeedOperation
from support.growth import QUICK

# Dynamo looks at it and hides the warning, which this project's tests make an error.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.fixture
def growing() -> tuple[Blocks, torch.optim.Optimizer, Kasmina]:
    torch.compiler.reset()
    torch.manual_seed(0)
    model = Blocks()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    kasmina = Kasmina(model, optimizer, slots=["layers.1"], sample=torch.randn(4, 6), config=QUICK)
    return model, optimizer, kasmina


def _step(model: Blocks, optimizer: torch.optim.Optimizer, kasmina: Kasmina) -> None:
    content = torch.randn(16, 6)
    optimizer.zero_grad()
    (model(content) - content).square().mean().backward()
    kasmina.train_seeds(lambda: (model(content) - content).square().mean())
    optimizer.step()
    kasmina.settle()


def test_growth_recompiles_the_block_that_grows_and_outputs_stay_those_of_eager(
    growing: tuple[Blocks, torch.optim.Optimizer, Kasmina],
) -> None:
    model, _, kasmina = growing
    blocks = kasmina.compile([f"layers.{index}" for index in range(3)], backend="eager")
    _step(*growing)
    assert blocks.compilations == {"layers.0": 1, "layers.1": 1, "layers.2": 1}
    inserted = Planting(training="insert")
    command = SeedCommand("layers.1", SeedOperation.GERMINATE, "mlp", planting=inserted)
    assert kasmina.apply(command).applied
    for _ in range(6):
        _step(*growing)
    assert blocks.compilations["layers.1"] >= 2
    assert blocks.recompilations <= 4
    assert kasmina.metrics()["kasmina.recompilations_total"] == blocks.recompilations
    assert not blocks.exhausted
    sample = torch.randn(16, 6)
    compiled = model(sample)
    with torch.compiler.set_stance("force_eager"):
        assert torch.equal(model(sample), compiled)


def test_a_seed_trains_apart_in_a_compiled_model(
    growing: tuple[Blocks, torch.optim.Optimizer, Kasmina],
) -> None:
    model, _, kasmina = growing
    kasmina.compile([f"layers.{index}" for index in range(3)], backend="eager")
    assert kasmina.apply(SeedCommand("layers.1", SeedOperation.GERMINATE, "mlp")).applied
    for _ in range(5):
        _step(*growing)
    state = kasmina.survey(lambda x: (model(x) - x).square().mean(), [torch.randn(32, 6)] * 3, None)
    assert state.seeds["layers.1"].gain is not None
    assert state.seeds["layers.1"].gain.mean != 0.0


def test_an_unknown_block_is_refused(
    growing: tuple[Blocks, torch.optim.Optimizer, Kasmina],
) -> None:
    with pytest.raises(GrowthError, match=r"no module 'layers\.7'"):
        growing[2].compile(["layers.7"])
