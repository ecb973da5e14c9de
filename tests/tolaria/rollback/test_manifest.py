from pathlib import Path

import pytest

from esper.leyline import CheckpointError
from esper.tolaria.rollback import CheckpointStore, manifest
from support.states import Stamped


def test_a_checkpoint_of_an_unknown_format_is_named_and_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with CheckpointStore(tmp_path) as store:
        store.save(Stamped(), step=1)
    monkeypatch.setattr(manifest, "FORMAT", 99)
    with pytest.raises(CheckpointError, match="has format 1; this Esper reads 99"):
        CheckpointStore(tmp_path).load_latest(Stamped())
    assert (tmp_path / "step-000000001").is_dir(), "only damage is set aside"
