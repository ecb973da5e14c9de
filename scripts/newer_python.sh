#!/usr/bin/env bash
# Runs the tests of esper.core, which needs no torch, on a Python newer than the project's.
#
#     scripts/newer_python.sh [PYTHON ...]
#
# Without an argument it takes the newest it finds on PATH or among pyenv's versions. That there is
# none is no failure.
set -euo pipefail
cd "$(dirname "$0")/.."

# A shim of pyenv is on PATH even where it can start nothing: only what starts is a Python.
starts() {
  "$1" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 12))' >/dev/null 2>&1
}

newest() {
  local name versions version
  for name in python3.13 python3.12; do
    if starts "$name"; then
      command -v "$name"
      return 0
    fi
    versions=$(printf '%s\n' ~/.pyenv/versions/"${name#python}".* | sort --version-sort --reverse)
    for version in $versions; do
      if starts "$version/bin/python"; then
        echo "$version/bin/python"
        return 0
      fi
    done
  done
}

# What esper.core may import, and what its tests run on, at the versions pyproject.toml asks for.
requirements() {
  "$1" - <<'PYTHON'
import re
import tomllib
from pathlib import Path

TEST_TOOLS = {"pytest", "pytest-timeout", "hypothesis"}


def name(requirement: str) -> str:
    return re.split(r"[^\w.-]", requirement, maxsplit=1)[0].lower()


project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
needed = [each for each in project["dependencies"] if name(each) != "torch"]
tools = [each for each in project["optional-dependencies"]["dev"] if name(each) in TEST_TOOLS]
print("\n".join(needed + tools))
PYTHON
}

run_tests() {
  local python=$1 folder=$2
  "$python" --version
  "$python" -m venv "$folder/venv"
  requirements "$python" >"$folder/requirements.txt"
  "$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    --requirement "$folder/requirements.txt"
  PYTHONPATH=src PYTHONDONTWRITEBYTECODE=1 HYPOTHESIS_STORAGE_DIRECTORY="$folder/hypothesis" \
    "$folder/venv/bin/python" -m pytest -q -p no:cacheprovider \
    tests/core tests/properties/test_breaker.py
}

pythons=("$@")
if [ ${#pythons[@]} -eq 0 ]; then
  found=$(newest)
  if [ -z "$found" ]; then
    echo "no python3.13 or python3.12 was found: the tests of esper.core run on no newer Python"
    exit 0
  fi
  pythons=("$found")
fi

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
for python in "${pythons[@]}"; do
  run_tests "$python" "$folder"
  rm -rf "$folder/venv"
done
