"""The paths of `redact:` as people write them; `gateway/bodies/redaction.py` says what they hide."""

from collections.abc import Iterable
from typing import NamedTuple

from gateway.bodies.hidden_paths import PathPattern
from gateway.bodies.redaction import TYPE_AND_KEY, Redaction
from gateway.rules.conditions import NAME, SEGMENT
from gateway.text import Glob, did_you_mean

EXPECTED = "a path such as body.card.number, body.*_token, headers.x-api-key or query.token"
_ROOTS = ("body", "headers", "query")


class RedactPath(NamedTuple):
    """A path, and what it was written as."""

    root: str
    pattern: PathPattern
    text: str


def parse_redact_path(text: str) -> RedactPath:
    """Parse a path. Raises ValueError. A key in quotes is that key, whatever is in it: `body."a.b*"`.

    A reference is refused: where its value isn't known, as in a command, nothing would be hidden.
    """
    if "${" in text:
        raise ValueError(f"expected {EXPECTED}, got one with a reference")
    root, dot, rest = text.partition(".")
    rest = dot + rest
    if root not in _ROOTS:
        raise ValueError(f"expected {EXPECTED}, got '{text}'{did_you_mean(root, _ROOTS)}")
    if root == "body":
        segments = list(SEGMENT.finditer(rest))
        if "".join([found[0] for found in segments]) == rest:
            return RedactPath(root, tuple([_step(found[1], found[2]) for found in segments]), text)
        raise ValueError(f"expected body.a.b, got '{text}'; a list's items are body.a.0, other keys are quoted")
    found = NAME.fullmatch(rest)
    if found is None:
        raise ValueError(f"expected {root}.<name>, or {root}.* for all of them, got '{text}'")
    step = _step(found[1], found[2])
    return RedactPath(root, (_lower(step) if root == "headers" else step,), text)


def redaction_of(paths: Iterable[RedactPath], of_body: frozenset[str] = TYPE_AND_KEY) -> Redaction:
    """Return what these paths hide; `of_body` as a Redaction has it."""
    by_root: dict[str, list[PathPattern]] = {root: [] for root in _ROOTS}
    for path in paths:
        by_root[path.root].append(path.pattern)
    headers, query = ([pattern[0] for pattern in by_root[root]] for root in ("headers", "query"))
    return Redaction(body=tuple(by_root["body"]), headers=tuple(headers), query=tuple(query), of_body=of_body)


def _step(quoted: str | None, plain: str | None) -> Glob:
    return Glob.of(plain) if plain is not None else Glob(quoted or "", (quoted or "",))


def _lower(step: Glob) -> Glob:
    return Glob(step.text.lower(), tuple([piece.lower() for piece in step.pieces]))
