"""Configuration loader: a TOML file, then the environment, then flags; the later wins.

    TREEGRPO_TRAIN__LR=1e-4 treegrpo up geohop.toml --train.steps 200

Paths of input files in a TOML file are relative to that file, elsewhere to the current directory. An unknown key is an
error that names the nearest known one; a value that does not fit is an error that names where it came from.
docs/adr/0001-configuration-sources.md says which part pydantic-settings does and which part is here.
"""

from __future__ import annotations

import argparse
import difflib
import os
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

from pydantic import SecretStr, ValidationError
from pydantic_settings import (
    BaseSettings,
    CliSettingsSource,
    EnvSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from treegrpo.config.base import InputMarker, Section
from treegrpo.config.schema import Config
from treegrpo.errors import ConfigError, describe
from treegrpo.storage.surrogates import has_lone_surrogate
from treegrpo.storage.text_files import read_text

ENV_PREFIX = "TREEGRPO_"
GONE = dict.fromkeys(
    ("run.resume", "resume"), "a run continues by itself where it stopped; leave it out, or begin a new run in another run.dir"
)
"""Keys and flags of earlier versions, with what is right now."""


class _Settings(Config, BaseSettings):
    """The same tree for pydantic-settings' sources."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX, env_nested_delimiter="__", cli_avoid_json=True, cli_exit_on_error=False, cli_prefix=""
    )


class _Source(NamedTuple):
    """The values of one source, and how an error names a key in it."""

    label: str
    """With SECTION and KEY to fill in."""
    values: Mapping[str, Any]

    def where(self, section: str, key: str) -> str:
        return self.label.format(section=section, key=key, env=f"{section}__{key}".upper())


def load_config(toml: Path | None, flags: Sequence[str] = ()) -> Config:
    """Read the configuration: ``toml``, then TREEGRPO_SECTION__KEY variables, then ``--section.key value`` flags.

    Raises:
        ConfigError: a file that is not there or not TOML, an unknown key, or a value that does not fit.
    """
    sources = [
        _Source(str(toml), {} if toml is None else _from_toml(toml)),
        _Source(f"the environment variable {ENV_PREFIX}{{env}}", _from_environment()),
        _Source("the flag --{section}.{key}", _from_flags(flags)),
    ]
    file, _, given = sources
    for source in (file, given):
        _hide_secrets(source)
    merged: dict[str, dict[str, Any]] = {}
    for source in sources:
        for section, keys in source.values.items():
            for key, value in _keys(source, section, keys):
                if isinstance(value, str) and has_lone_surrogate(value):
                    raise ConfigError(f"{section}.{key} ({source.where(section, key)}) is not UTF-8; write it in UTF-8.")
                merged.setdefault(section, {})[key] = value
    try:
        return Config.model_validate(merged)
    except ValidationError as error:
        raise _refused(error, sources) from error


def config_from_arguments(arguments: Sequence[str]) -> Config:
    """`load_config` for a command's arguments, ``[CONFIG.toml] [--section.key value …]``. Raises ConfigError."""
    try:
        Path.cwd()
    except OSError as error:  # libraries would end the process without a reason
        raise ConfigError("The current directory is gone; change to one that exists.") from error
    named = bool(arguments) and not arguments[0].startswith("-")
    if late := [word for word in arguments[1:] if word.endswith(".toml")]:
        raise ConfigError(f"The configuration file {late[0]} goes first, before the flags.")
    return load_config(Path(arguments[0]), arguments[1:]) if named else load_config(None, arguments)


def flag_parser(**options: Any) -> argparse.ArgumentParser:
    """A parser that knows every key as a flag, for its help text; ``options`` are ArgumentParser's."""
    parser = argparse.ArgumentParser(formatter_class=argparse.RawDescriptionHelpFormatter, **options)
    CliSettingsSource(_Settings, root_parser=parser)
    return parser


def _refused(error: ValidationError, sources: Sequence[_Source]) -> ConfigError:
    """The error for the first invalid value, with the source it came from."""
    first = error.errors()[0]
    section, key = (*map(str, first["loc"]), "")[:2]
    places = [source.where(section, key) for source in sources if key in source.values.get(section, {})]
    reason = first["msg"][:1].lower() + first["msg"][1:]
    where = places[-1] if places else "the default"
    value = "" if is_secret(section, key) or "@" in str(first["input"]) else f" = {first['input']!r}"  # before it: a password
    return ConfigError(f"{section}.{key}{value} ({where}) is not acceptable: {reason}.")


def is_secret(section: str, key: str) -> bool:
    """Whether a key's value must never be shown."""
    model = cast("type[Section] | None", Config.model_fields[section].annotation if section in Config.model_fields else None)
    return model is not None and key in model.model_fields and model.model_fields[key].annotation is SecretStr


def _hide_secrets(source: _Source) -> None:
    """Raise ConfigError for a secret in a file or flag, where others could read it."""
    for section, keys in source.values.items():
        for key in keys if isinstance(keys, dict) else ():
            if is_secret(section, key):
                raise ConfigError(
                    f"{section}.{key} ({source.where(section, key)}) is a secret; name a file in {section}.{key}_file, "
                    f"or give it as {ENV_PREFIX}{section.upper()}__{key.upper()}."
                )


def _keys(source: _Source, section: str, keys: Any) -> Iterator[tuple[str, Any]]:
    """The pairs of one section. Raises ConfigError that names the nearest key for an unknown one."""
    if section in Config.model_fields and not isinstance(keys, dict):
        where = source.where(section, "KEY")
        raise ConfigError(f"{section} is a section, not a value; give its keys one by one ({where}: {section}.KEY).")
    for key, value in cast("dict[str, Any]", keys if isinstance(keys, dict) else {"": keys}).items():
        check_name(f"{section}.{key}".rstrip("."), source.where(section, key))
        yield key, value


def check_name(name: str, where: str) -> None:
    """Raise ConfigError that names the nearest key unless ``name`` is one."""
    sections = {section: cast("type[Section]", field.annotation) for section, field in Config.model_fields.items()}
    names = [f"{section}.{key}" for section, model in sections.items() for key in model.model_fields]
    if name in GONE:
        raise ConfigError(f"{where}: {name} is gone: {GONE[name]}.")
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.0)[0]
        raise ConfigError(f"{where}: {name} is not a configuration key; the nearest is {near}.")


def _from_toml(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise ConfigError(f"The configuration file {path} does not exist; check the path.")
    try:
        table = tomllib.loads(read_text(path))
    except OSError as error:
        raise ConfigError(f"The configuration file {path} cannot be read ({error.strerror}); check its permissions.") from error
    except (tomllib.TOMLDecodeError, UnicodeError) as error:
        raise ConfigError(f"The configuration file {path} is not valid TOML: {describe(error)}.") from error
    for section, field in Config.model_fields.items():
        keys = table.get(section)
        for key, about in cast("type[Section]", field.annotation).model_fields.items():
            is_input = any(isinstance(mark, InputMarker) for mark in about.metadata)
            if is_input and isinstance(keys, dict) and isinstance(keys.get(key), str):
                keys[key] = path.parent / keys[key]
    return table


def _from_environment() -> Mapping[str, Any]:
    for variable in os.environ:  # the library's source leaves out what begins with no section's name
        if variable.startswith(ENV_PREFIX):
            name = variable.removeprefix(ENV_PREFIX).lower().replace("__", ".", 1)
            check_name(name, f"the environment variable {variable} (one is written {ENV_PREFIX}SECTION__KEY)")
    try:
        return EnvSettingsSource(_Settings)()
    except SettingsError as error:
        raise ConfigError(f"The environment variables {ENV_PREFIX}… cannot be read: {error}.") from error


def _from_flags(flags: Sequence[str]) -> Mapping[str, Any]:
    for flag in flags:  # argparse would name no nearest key
        if flag.startswith("--"):
            name = flag.partition("=")[0]
            check_name(name.removeprefix("--"), f"the flag {name}")
    try:
        return CliSettingsSource(_Settings, cli_parse_args=list(flags))()
    except SettingsError as error:
        reason = str(error).removeprefix("error parsing CLI: ")
        raise ConfigError(f"The flags cannot be read: {reason}; a key is written --section.key VALUE.") from error
