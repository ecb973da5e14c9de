"""Compiles the aggregation kernels when Esper is built; without a C compiler it goes on without."""

import os
import shlex
import subprocess
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

SOURCE = Path("src/esper/tolaria/aggregation/native.c")
# The first shares torch's OpenMP threads, the second runs on one; native.py takes what loads.
LIBRARIES = {"libnative.so": ["-fopenmp"], "libnative_serial.so": []}
FLAGS = ["-O3", "-fPIC", "-Wno-unknown-pragmas"]


class NativeKernels(BuildHookInterface[Any]):
    """Puts the compiled kernels beside their source, and into the wheel."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile, and mark the wheel as made for this platform."""
        del version
        source = Path(self.root) / SOURCE
        built: list[str] = []
        for name, openmp in LIBRARIES.items():
            problem = compile_kernels(source, source.with_name(name), openmp)
            if problem is None:
                built.append(str(SOURCE.with_name(name)))
            else:
                self.app.display_warning(f"{name} was not compiled: {problem}")
        if not built:
            self.app.display_warning("Esper will use torch's own kernels, which are slower")
            return
        build_data["artifacts"].extend(built)
        build_data["pure_python"] = False
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["tag"] = f"py3-none-{platform}"


def compile_kernels(source: Path, library: Path, openmp: list[str]) -> str | None:
    """Compile one library, and return what went wrong, if anything did.

    OpenMP is left out of the link on purpose. Its symbols are those of the runtime that torch has
    loaded; with a second runtime, the idle threads of each would hold up the other's.
    """
    compiler = shlex.split(os.environ.get("CC", "cc"))
    with tempfile.TemporaryDirectory() as scratch:
        objects = str(Path(scratch) / "native.o")
        commands = (
            [*compiler, *FLAGS, *openmp, "-c", str(source), "-o", objects],
            [*compiler, "-shared", "-o", str(library), objects],
        )
        for command in commands:
            try:
                subprocess.run(command, check=True, capture_output=True)
            except (OSError, subprocess.CalledProcessError) as error:
                library.unlink(missing_ok=True)
                said = getattr(error, "stderr", None) or b""
                return f"{error} {said.decode(errors='replace')[:400]}".strip()
    return None
