import os

import torch
from hypothesis import settings

# A loaded machine is no failure: time limits are pytest's, not hypothesis's.
settings.register_profile("esper", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("esper")
torch.set_num_threads(1)
