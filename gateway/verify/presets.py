"""Loads the presets from `providers.yaml`: each is one or several of the generic schemes, filled in."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from types import MappingProxyType
from typing import Any, NamedTuple

import yaml

from gateway.model import RulesError
from gateway.text import parse_duration
from gateway.verify.config_keys import GENERIC, ConfigPath, Path, read_keys


class SchemeError(RulesError):
    """A source's `verify:` is at fault. `problems` has all of them: the path below `verify`, and the message."""

    def __init__(self, problems: Sequence[tuple[Path, str]]) -> None:
        super().__init__("\n".join(f"{'.'.join(map(str, ('verify', *path)))}: {text}" for path, text in problems))
        self.problems = tuple(problems)


class Way(NamedTuple):
    """One signing method of a scheme: a generic scheme with its keys' values, in a preset without the secrets.

    `takes` is the prefix of the secrets that it uses. `id` is where its identity is, if not where the preset says.
    """

    scheme: str
    values: Mapping[str, Any]
    takes: str | None = None
    id: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """A provider: its signing methods, and where its events have their identity and type."""

    ways: tuple[Way, ...]
    id: str | None = None
    type: str | None = None
    sends: tuple[tuple[str, str], ...] = ()
    handshake: str | None = None
    dedupe: float | None = None

    @property
    def has_timestamp(self) -> bool:
        return any("timestamp" in way.values for way in self.ways)

    def with_secrets(self, given: Mapping[str, Any]) -> list[Way]:
        """Return the signing methods with the user's secrets and tolerance."""
        marks = tuple([way.takes for way in self.ways if way.takes])
        ways = []
        for way in self.ways:
            secrets = [
                secret
                for secret in given.get("secrets", ())
                if (secret.text.startswith(way.takes) if way.takes else not marks or not secret.text.startswith(marks))
            ]
            own = {"secrets": secrets}
            if "tolerance" in given and "timestamp" in way.values:
                own["tolerance"] = given["tolerance"]
            ways.append(way._replace(values={**way.values, **own}))
        return ways


def _load_presets() -> Mapping[str, Preset]:
    text = resources.files("gateway.verify").joinpath("providers.yaml").read_text("utf-8")
    return MappingProxyType({name: _preset(dict(entry)) for name, entry in yaml.safe_load(text).items()})


def _preset(entry: dict[str, Any]) -> Preset:
    about: dict[str, Any] = {key: entry.pop(key) for key in ("id", "type", "handshake") if key in entry}
    if "dedupe" in entry:
        about["dedupe"] = parse_duration(entry.pop("dedupe"))
    sends = tuple(entry.pop("sends", {}).items())
    ways = []
    for config in entry.get("any_of", [entry]):
        scheme = config.get("scheme", "hmac")
        keys = {name: key for name, key in GENERIC[scheme].items() if name != "secrets"}
        problems: dict[tuple[Path, str], None] = {}
        way = dict(config)
        takes, identity = way.pop("takes", None), way.pop("id", None)
        values = read_keys(way, keys, ConfigPath((), problems))
        if problems:
            raise SchemeError(list(problems))
        ways.append(Way(scheme, values, takes, identity))
    return Preset(ways=tuple(ways), sends=sends, **about)


PRESETS: Mapping[str, Preset] = _load_presets()
"""The presets, by the name that is written under `scheme`."""
