import os

from hypothesis import settings

# A loaded machine is no failure: time limits are pytest's, not hypothesis's.
settings.register_profile("esper", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("esper")

try:
    import torch
except ModuleNotFoundError:
    pass  # scripts/newer_python.sh tests esper.core where there is none
else:
    torch.set_num_threads(1)
