from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from esper.core.config import GuardConfig
from esper.core.settings import (
    EsperSettings,
    declared_settings,
    env_example,
    load_settings,
    to_toml,
)
from esper.leyline import ConfigError

ROOT = Path(__file__).parent.parent.parent


def load(tmp_path: Path, toml: str = "", env: str = "", **rest: Any) -> Any:
    file = tmp_path / "esper.toml"
    file.write_text(toml)
    env_file = tmp_path / ".env"
    env_file.write_text(env)
    arguments: dict[str, Any] = {"file": file, "env_file": env_file, "environ": {}}
    return load_settings(**(arguments | rest))


@given(given=st.lists(st.booleans(), min_size=4, max_size=4))
@hypothesis_settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_highest_source_wins_and_says_so(tmp_path: Path, given: list[bool]) -> None:
    in_file, in_env_file, in_environ, in_flags = given
    loaded = load(
        tmp_path,
        "[guard]\nwindow = 11\n" if in_file else "",
        "ESPER_GUARD__WINDOW=12\n" if in_env_file else "",
        environ={"ESPER_GUARD__WINDOW": "13"} if in_environ else {},
        flags={"guard.window": ("14", "--set guard.window")} if in_flags else {},
    )
    origins = [
        (GuardConfig().window, "default"),
        (11, str(tmp_path / "esper.toml")),
        (12, f"ESPER_GUARD__WINDOW in {tmp_path / '.env'}"),
        (13, "ESPER_GUARD__WINDOW"),
        (14, "--set guard.window"),
    ]
    expected = max((rank for rank, present in enumerate(given, start=1) if present), default=0)
    value, origin = origins[expected]
    assert loaded.settings.guard.window == value
    assert loaded.origins["guard.window"] == origin


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ({"toml": "[gaurd]\nwindow = 9"}, "unknown section of .*: gaurd; did you mean guard"),
        ({"toml": "[guard]\nwindwo = 9"}, r"guard\.windwo; did you mean guard\.window"),
        ({"toml": "guard = 3"}, r"guard is a section; write \[guard\]"),
        ({"toml": "[guard"}, "not valid TOML"),
        ({"env": "ESPER_GUARD__WINDWO=9"}, "ESPER_GUARD__WINDWO; did you mean ESPER_GUARD__WINDOW"),
        ({"environ": {"ESPER_SEED": "1"}}, "unknown environment variable: ESPER_SEED"),
        ({"flags": {"train.epoch": (1, "--set")}}, r"did you mean train\.epochs"),
        ({"toml": "[guard]\nwindow = 'x'"}, r"guard\.window is 'x' \(from .*esper\.toml\)"),
        ({"environ": {"ESPER_TRAIN__EPOCHS": "0"}}, r"train\.epochs is '0' .*greater than"),
        ({"file": Path("missing.toml")}, r"missing\.toml does not exist"),
    ],
)
def test_what_is_not_known_or_not_valid_is_refused_with_the_remedy(
    tmp_path: Path, sources: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, **sources)


def test_other_environment_variables_are_left_alone(tmp_path: Path) -> None:
    load(tmp_path, environ={"PATH": "/bin", "ESPERANTO": "1"})


def test_python_environment_and_file_mean_the_same(tmp_path: Path) -> None:
    direct = EsperSettings(guard=GuardConfig(window=32))
    by_file = load(tmp_path, "[guard]\nwindow = 32").settings
    by_environ = load(tmp_path, environ={"ESPER_GUARD__WINDOW": "32"}).settings
    assert direct == by_file == by_environ


def test_toml_written_is_read_back_the_same(tmp_path: Path) -> None:
    settings = load(tmp_path, "[train]\nclip_norm = 2.5\n[run]\ndrill = false").settings
    assert load(tmp_path, to_toml(settings)).settings == settings


def test_settings_are_frozen(tmp_path: Path) -> None:
    settings = load(tmp_path).settings
    with pytest.raises(ValueError, match="frozen"):
        settings.train.epochs = 3


def test_every_setting_is_described_and_in_the_example() -> None:
    assert all(setting.description for setting in declared_settings())
    assert all(setting.variable in env_example() for setting in declared_settings())
    assert (ROOT / ".env.example").read_text() == env_example()


def test_the_engine_gets_its_sections(tmp_path: Path) -> None:
    loaded = load(tmp_path, "[guard]\nwindow = 32")
    assert loaded.settings.engine().guard.window == 32
