"""Compiles the aggregation kernels when Esper is built; without a C compiler it goes on without."""

import os
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

SOURCE = Path("src/esper/tolaria/aggregation/native.c")
LIBRARY = SOURCE.with_name("libnative.so")
FLAGS = ["-O3", "-shared", "-fPIC"]


class NativeKernels(BuildHookInterface[Any]):
    """Puts the compiled kernels beside their source, and into the wheel."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile, and mark the wheel as made for this platform."""
        del version
        root = Path(self.root)
        if not compile_kernels(root / SOURCE, root / LIBRARY):
            self.app.display_warning("no C compiler works here: Esper will use torch's own kernels")
            return
        build_data["artifacts"].append(str(LIBRARY))
        build_data["pure_python"] = False
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["tag"] = f"py3-none-{platform}"


def compile_kernels(source: Path, library: Path) -> bool:
    """Compile with OpenMP, or else without; return whether there is a library."""
    compiler = os.environ.get("CC", "cc")
    for openmp in (["-fopenmp"], []):
        command = [compiler, *FLAGS, *openmp, "-o", str(library), str(source)]
        try:
            subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            continue
        return True
    library.unlink(missing_ok=True)
    return False
