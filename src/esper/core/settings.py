"""Where settings come from: defaults, a TOML file, ``.env``, the environment, flags.

Each source overrides those before it. Whatever the source, a name that is not known is refused with
the nearest one that is.
"""

import difflib
import os
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w
from dotenv import dotenv_values
from pydantic import BaseModel, ValidationError
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from esper.core.config import RunConfig, TolariaConfig
from esper.leyline import ConfigError

PREFIX = "ESPER_"
DEFAULT_FILE = Path("esper.toml")
DEFAULT_ENV_FILE = Path(".env")


class EsperSettings(TolariaConfig, BaseSettings):
    """All settings by section.

    Constructed directly it takes sections by field name and looks nowhere else;
    :func:`load_settings` gathers every source.
    """

    model_config = SettingsConfigDict(frozen=True, extra="forbid")

    run: RunConfig = RunConfig()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],  # noqa: ARG003 - pydantic's signature
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Take values from the constructor alone: the other sources are read with their origin."""
        return (init_settings,)

    def engine(self) -> TolariaConfig:
        """Return the sections that the engine reads."""
        return TolariaConfig(**{name: getattr(self, name) for name in TolariaConfig.model_fields})


@dataclass(frozen=True)
class LoadedSettings:
    """Settings, and where each of them came from.

    :param settings: the values.
    :param origins: origin of each setting by ``section.key``: ``default``, a file name, the name of
        an environment variable, or a flag.
    """

    settings: EsperSettings
    origins: dict[str, str]


@dataclass(frozen=True)
class Setting:
    """One setting as it is declared.

    :param key: ``section.key``.
    :param default: value when no source gives one.
    :param description: what it is for.
    """

    key: str
    default: Any
    description: str

    @property
    def variable(self) -> str:
        """Name of its environment variable."""
        return PREFIX + self.key.replace(".", "__").upper()


def declared_settings() -> list[Setting]:
    """Return every setting, in order of declaration."""
    found = []
    for section, field in EsperSettings.model_fields.items():
        model = field.annotation
        if isinstance(model, type) and issubclass(model, BaseModel):
            for key, inner in model.model_fields.items():
                found.append(Setting(f"{section}.{key}", inner.default, inner.description or ""))
    return found


def load_settings(
    *,
    file: Path | None = None,
    environ: Mapping[str, str] | None = None,
    env_file: Path = DEFAULT_ENV_FILE,
    flags: Mapping[str, tuple[Any, str]] | None = None,
) -> LoadedSettings:
    """Gather the settings from every source, in rising order.

    :param file: a TOML file; without one, ``esper.toml`` in the working directory if it exists.
    :param environ: the environment; the process's own by default.
    :param env_file: a file of environment variables, read if it exists.
    :param flags: value and flag by ``section.key``.
    :raises ConfigError: a source cannot be read, or holds an unknown name or an invalid value.
    """
    values: dict[str, Any] = {}
    origins = {setting.key: "default" for setting in declared_settings()}
    environment = os.environ if environ is None else environ
    layers = [
        *_from_file(file),
        *_from_variables(dotenv_values(env_file) if env_file.is_file() else {}, str(env_file)),
        *_from_variables(environment, ""),
        *((key, value, origin) for key, (value, origin) in (flags or {}).items()),
    ]
    for key, value, origin in layers:
        if key not in origins:
            raise _unknown(key, list(origins), f"setting (from {origin})")
        values[key] = value
        origins[key] = origin
    return LoadedSettings(_validate(values, origins), origins)


def to_toml(settings: EsperSettings) -> str:
    """Return the settings as TOML, defaults written out; what is unset is left out."""
    sections = {
        name: {key: value for key, value in section.items() if value is not None}
        for name, section in settings.model_dump(mode="json").items()
    }
    return tomli_w.dumps(sections)


def env_example() -> str:
    """Return the text of ``.env.example``: every variable with its default and meaning."""
    lines = ["# Every setting of Esper as an environment variable, with its default.", ""]
    for setting in declared_settings():
        default = "" if setting.default is None else setting.default
        lines.append(f"# {setting.description}")
        lines.append(f"# {setting.variable}={_spell(default)}")
        lines.append("")
    return "\n".join(lines)


def _from_file(file: Path | None) -> Iterator[tuple[str, Any, str]]:
    path = file or DEFAULT_FILE
    if not path.is_file():
        if file is not None:
            raise ConfigError(f"the configuration file {file} does not exist; check the path")
        return
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error
    sections = list(EsperSettings.model_fields)
    for section, entries in content.items():
        if section not in sections:
            raise _unknown(section, sections, f"section of {path}")
        if not isinstance(entries, dict):
            raise ConfigError(f"{path}: {section} is a section; write [{section}] with its keys")
        for key, value in entries.items():
            yield f"{section}.{key}", value, str(path)


def _from_variables(
    variables: Mapping[str, str | None], file: str
) -> Iterator[tuple[str, Any, str]]:
    known = {setting.variable: setting.key for setting in declared_settings()}
    for name, value in variables.items():
        if not name.startswith(PREFIX) or value is None:
            continue
        origin = f"{name} in {file}" if file else name
        if name not in known:
            place = f"environment variable{f' (in {file})' if file else ''}"
            raise _unknown(name, list(known), place)
        yield known[name], value, origin


def _unknown(name: str, known: list[str], what: str) -> ConfigError:
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    hint = f"; did you mean {nearest[0]}?" if nearest else f"; known are {', '.join(known)}"
    return ConfigError(f"unknown {what}: {name}{hint}")


def _validate(values: Mapping[str, Any], origins: Mapping[str, str]) -> EsperSettings:
    sections: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        section, name = key.split(".", 1)
        sections.setdefault(section, {})[name] = None if value == "" else value
    try:
        return EsperSettings(**sections)  # type: ignore[arg-type]  # pydantic checks them
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"][:2])
        more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
        raise ConfigError(
            f"{key} is {first['input']!r} (from {origins.get(key, 'code')}): "
            f"{first['msg'][0].lower()}{first['msg'][1:]}{more}"
        ) from error


def _spell(value: Any) -> str:  # noqa: ANN401 - any default
    return str(value).lower() if isinstance(value, bool) else str(value)
