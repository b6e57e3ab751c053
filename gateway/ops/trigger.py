"""`gateway trigger`: a fixture made current, as a request that is signed by what `gateway send` signs with."""

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlencode

import orjson

from gateway.bodies.media_types import Kind, kind_of
from gateway.model import UsageError
from gateway.ops.fixtures import Fixture
from gateway.ops.send import Signed, sign
from gateway.rules.load import InvalidRulesError, check_rules
from gateway.rules.rules import Source
from gateway.text import did_you_mean
from gateway.verify.verifier import Verifier

_STEP = re.compile(r"\.(?P<name>[A-Za-z_$][\w$-]*)|\[(?P<index>\d+)\]|\['(?P<quoted>[^']*)'\]")
_ROOT = "body"


class Setting(NamedTuple):
    """A value for a field of the body; `text` is its path as it was written, from `body` on, `written` the value."""

    text: str
    path: Sequence[str | int]
    value: Any
    written: str


def parse_setting(text: str) -> Setting:
    """Parse `body.data.amount=42`: the value is JSON if it can be, else a string. Raises ValueError for other forms."""
    path, equals, written = text.partition("=")
    steps = list(_STEP.finditer(path, len(_ROOT)))
    if not equals or not steps or path != _ROOT + "".join([step[0] for step in steps]):
        raise ValueError(text)
    try:
        value = orjson.loads(written)
    except orjson.JSONDecodeError:
        value = written
    return Setting(path, [_name_of(step) for step in steps], value, written)


def _name_of(step: re.Match[str]) -> str | int:
    if step["index"] is not None:
        return int(step["index"])
    return step["name"] if step["name"] is not None else step["quoted"]


def with_settings(fixture: Fixture, settings: Sequence[Setting]) -> tuple[Fixture, Sequence[str]]:
    """Return the fixture with these values, and the paths that are new in it. Raises UsageError if one has no place."""
    body = orjson.loads(orjson.dumps(fixture.body))
    is_form, added = _is_form(fixture), []
    for setting in settings:
        place = body
        for step in setting.path[:-1]:
            place = _at(place, step, setting)
        last = setting.path[-1]
        if isinstance(place, dict) and isinstance(last, str):
            if last not in place:
                added.append(setting.text + did_you_mean(last, place))
        else:
            _at(place, last, setting)
        place[last] = setting.written if is_form else setting.value
    return replace(fixture, body=body), added


def _at(place: Any, step: str | int, setting: Setting) -> Any:  # noqa: ANN401 - any JSON
    if isinstance(place, dict) and isinstance(step, str):
        if step in place:
            return place[step]
        raise UsageError(
            f"--set: {setting.text}: expected a field that is there, got {step}{did_you_mean(step, place)}"
        )
    if isinstance(place, list) and isinstance(step, int):
        if step < len(place):
            return place[step]
        raise UsageError(f"--set: {setting.text}: expected an item below {len(place)}, got {step}")
    what = "a list" if isinstance(place, list) else "an object" if isinstance(place, dict) else "neither of both"
    raise UsageError(f"--set: {setting.text}: expected an object for a name, a list for a number, got {what} at {step}")


def _is_form(fixture: Fixture) -> bool:
    return kind_of(fixture.headers.get("Content-Type", "")) is Kind.FORM


def source_of_provider(rules: Path, provider: str) -> str:
    """Return the name of the only source with this provider's scheme. Raises RulesError, and UsageError without it."""
    found, problems = check_rules(rules, resolve=False)
    if found is None:
        raise InvalidRulesError(problems)
    names = [name for name, source in found.sources.items() if source.verifier.scheme == provider]
    if not names:
        advice = f"`gateway providers {provider}` prints one; or name one with --source"
        raise UsageError(f"{rules}: expected a source with `scheme: {provider}`, got none: {advice}")
    if len(names) > 1:
        raise UsageError(f"--source: expected one of {', '.join(names)}, which all have `scheme: {provider}`, got none")
    return names[0]


def request_of(
    fixture: Fixture, source: Source, verifier: Verifier, *, url: str, now: float, is_forged: bool = False
) -> Signed:
    """Return the request that the provider would send of this event. Raises UsageError as `sign` does."""
    return sign(
        source,
        verifier,
        url=url,
        body=body_of(fixture),
        id=fixture.identity[0] if fixture.identity else "",
        type=fixture.type,
        headers=fixture.headers,
        now=now,
        is_forged=is_forged,
    )


def body_of(fixture: Fixture) -> bytes:
    if _is_form(fixture):
        return urlencode(fixture.body).encode()
    return orjson.dumps(fixture.body)


def curl(request: Signed) -> str:
    """Return a command that sends the request. A secret that is sent as it is stands in it."""
    headers: list[str] = []
    for name, value in request.headers:
        headers += ["-H", f"{name}: {value}"]
    return shlex.join(["curl", "-i", *headers, "--data-raw", request.body.decode(), str(request.url)])


def request_fields(request: Signed) -> Mapping[str, object]:
    """Return a request as JSON fields."""
    return {
        "method": "POST",
        "url": str(request.url),
        "headers": [list(pair) for pair in request.headers],
        "body": request.body.decode(),
    }
