"""Reads a mapping of the configuration by the keys that are allowed in it, and collects what is wrong with it."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from gateway.text import did_you_mean, shown

Path = tuple[str | int, ...]


class ConfigPath:
    """A position in the configuration, and the problems found so far."""

    def __init__(self, path: Path, problems: dict[tuple[Path, str], None]) -> None:
        self._path = path
        self._problems = problems

    def below(self, key: str | int) -> "ConfigPath":
        return ConfigPath((*self._path, key), self._problems)

    def report(self, message: str) -> None:
        self._problems[self._path, message] = None


class InvalidValueError(Exception):
    """A value isn't what a key accepts."""

    def __init__(self, expected: str, value: object) -> None:
        super().__init__(f"expected {expected}, got {shown(value)}")


class Key(NamedTuple):
    """An allowed key: how its value is parsed (raises InvalidValueError, or reports below), and its JSON Schema."""

    read: Callable[[Any, ConfigPath], Any]
    schema: Mapping[str, Any]
    is_required: bool = False
    default: Any = None


def read_keys(
    config: Mapping[Any, object], keys: Mapping[str, Key], where: ConfigPath, elsewhere: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Parse a mapping's values, with defaults for missing keys; one that can't be parsed is reported and omitted.

    `elsewhere` says of other keys why they aren't among these.
    """
    for name in config:
        if name not in keys:
            # Without a value, it may be a secret in braces.
            shown_name = "without a value" if config[name] is None else repr(str(name))
            hint = (elsewhere or {}).get(str(name)) or did_you_mean(str(name), keys)
            where.below(str(name)).report(f"unknown key {shown_name}{hint}")
    values = {}
    for name, key in keys.items():
        if name in config:
            try:
                values[name] = key.read(config[name], where.below(name))
            except InvalidValueError as error:
                where.below(name).report(str(error))
        elif key.is_required:
            where.report(f"expected the key '{name}', got none")
        elif key.default is not None:
            values[name] = key.default
    return values
