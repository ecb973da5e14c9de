"""The training state: captured without a copy, restored in place, exact to the bit."""

from esper.tolaria.state.capture import Capturable, Capture
from esper.tolaria.state.train_state import TrainState

__all__ = ["Capturable", "Capture", "TrainState"]
