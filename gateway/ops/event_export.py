"""Events as files: what is left out of them, what they are called, and how they are written.

An event is written as `gateway events show --json` prints it, so `gateway test` (as `captured`) and `gateway diff` (as
lines) read it. A file goes where the log's rights don't hold: into a repository, a ticket. So what proves who sent the
event stays behind, wherever its source has it, and whatever by its name may be a credential.
"""

import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple
from urllib.parse import unquote_plus

import orjson

from gateway.bodies.redaction import hidden_whole, text_of, uncoded
from gateway.client.masking import MASK, MIN_SECRET, Mask
from gateway.log.records import decode_event
from gateway.model import Event, UnreadableBodyError, UnreadableRecordError, UsageError, shown
from gateway.ops.log_search import Found
from gateway.ops.output import header_text
from gateway.ops.presentation import event_content, event_fields
from gateway.rules.rules import Rules
from gateway.rules.yaml_document import reason_of
from gateway.verify.kept_proof import proofs_in
from gateway.verify.request import Request
from gateway.verify.schemes import ALWAYS_CREDENTIALS

LINES = ".jsonl"
"""How the name of a file of lines ends; any other name is a folder's."""
TESTS = "tests.yaml"
"""The file of tests in a folder, one for each event: `gateway test --tests FILE --update` takes their snapshots."""
LONGEST = 60
"""Characters of a part of a file's name."""
MIN_VALUE = 16
"""Bytes of a header's value, or a parameter's, from which on it is masked elsewhere in the event, too: shorter ones may
be there by chance."""
_SUSPECT = re.compile(
    r"\bauth\b|authenti|authori[sz]|cookie|credential|hmac|passw|secret|session|\bsig\b|signature|token|api[-_]?key",
    re.IGNORECASE,
)
"""What is in a header's or parameter's name that may carry a credential, whatever the rules say of it."""
REDACTED = "what its source hides (redact)"
TOO_SHORT = "has a credential in its body that is too short to be masked"
"""Why an event is left out."""
_UNSAFE = re.compile(r"[^A-Za-z0-9_.-]+")


class Withheld(NamedTuple):
    """An event without what proves who sent it; `names` says where something was."""

    event: Event
    names: tuple[str, ...]


def withhold(rules: Rules, event: Event) -> Withheld | None:
    """Return an event without signatures and credentials; None if one of its body can't be told from other text."""
    source = rules.sources.get(event.source)
    path = "/" if source is None else source.path
    request = Request(method="POST", path=path, query=event.query, headers=event.headers, body=event.body)
    proofs = None if source is None else proofs_in(source.verifier, request)
    hidden = ALWAYS_CREDENTIALS if proofs is None else proofs.headers | ALWAYS_CREDENTIALS
    parameters = frozenset[str]() if proofs is None else proofs.parameters
    in_body = () if proofs is None else proofs.values
    if any(len(value) < MIN_SECRET for value in in_body):
        return None
    redaction = None if source is None else source.redaction
    # Hidden first: a type or a key is hidden by comparison with values that won't be there any more.
    seen = event if redaction is None else redaction.rewritten(event)
    names, values = dict[str, None](), list(in_body)
    for name, value in event.headers:
        if _is_proof(name, hidden):
            names[f"header {header_text(name).lower()}"] = None
            values.append(value)
    parts: list[str] = []
    for part, left in zip(event.query.split("&"), seen.query.split("&"), strict=True) if event.query else ():
        parameter, given = map(unquote_plus, part.partition("=")[::2])
        if parameter in parameters or _SUSPECT.search(parameter):
            names[f"parameter {_named(parameter)}"] = None
            values.append(_raw(given))
        else:
            parts.append(left)
    bare = replace(
        seen,
        headers=tuple([(name, value) for name, value in seen.headers if not _is_proof(name, hidden)]),
        query="&".join(parts),
    )
    without = _without(bare, Mask([*in_body, *[each for each in values if len(each) >= MIN_VALUE]]), values)
    for field in ("type", "key", "body"):
        if getattr(without, field) != getattr(bare, field):
            names[field] = None
    return Withheld(without, tuple(names) if seen == event else (*names, REDACTED))


def _named(parameter: str) -> str:
    """Return a parameter's name for a line of a terminal; in quotes if it would be more than that line."""
    return parameter if parameter.isprintable() and len(parameter) <= LONGEST else shown(parameter)


def _is_proof(name: bytes, hidden: Collection[bytes]) -> bool:
    return name.lower() in hidden or _SUSPECT.search(header_text(name)) is not None


def _without(event: Event, mask: Mask, values: Collection[bytes]) -> Event:
    """Return an event without what a mask has, and without a type or a key that is one of the values."""

    def text(of: str) -> str:
        return MASK.decode() if _raw(of) in values else mask.masked_text(of)

    masked = replace(
        event,
        type=text(event.type),
        key=None if event.key is None else text(event.key),
        headers=tuple([(name, mask.masked(value)) for name, value in event.headers]),
        query=mask.masked_text(event.query),
    )
    try:
        content = text_of(event.headers, event.body)
    except UnreadableBodyError:  # nobody knows what is in it
        return hidden_whole(masked) if values else masked
    left = mask.masked(content)
    return masked if left == content else replace(masked, headers=uncoded(masked.headers), body=left)


def _raw(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def exported(found: Found, withheld: Withheld) -> dict[str, object]:
    """Return an event as JSON has it; `withheld` names where something was left out or masked."""
    fields: dict[str, object] = event_fields(found, withheld.event, "") | event_content(withheld.event)
    if withheld.names:
        fields["withheld"] = withheld.names
    return fields


def line_of(fields: Mapping[str, object]) -> bytes:
    """Return an event as a line of a file."""
    return orjson.dumps(fields) + b"\n"


def file_name(named: tuple[str, str, str], position: str) -> str:
    """Return the name of an event's file: of its source, its type and its id, whatever these are.

    What isn't fit for a name is replaced, and a digest then keeps it apart from others.
    """
    parts = [_UNSAFE.sub("_", text)[:LONGEST].strip("._") for text in named]
    name = ".".join([part for part in parts if part]) or "event"
    if parts != [*named]:
        told = "\0".join((*named, position)).encode("utf-8", "surrogatepass")
        name += "." + blake2b(told, digest_size=4).hexdigest()
    return f"{name}.json"


class Export:
    """Events that are written, with what is told of it at the end: how many, their bytes, and what was left out."""

    def __init__(self, to: Path) -> None:
        """Write to a folder, or to a file if the name ends as one of lines does. Raises UsageError."""
        self.written = self.size = 0
        self.left_out: Counter[str] = Counter()
        """Why events were left out → how many."""
        self.withheld: Counter[str] = Counter()
        """Where something was withheld → of how many events."""
        self._to: Folder | Lines = Lines(to) if to.name.endswith(LINES) else Folder(to)

    def add(self, found: Found, rules: Rules) -> None:
        """Write an event, without what these rules say is to be withheld.

        Raises UsageError for a file that is there already, or can't be written.
        """
        try:
            event = decode_event(found.record)
        except UnreadableRecordError:
            self.left_out["can't be read"] += 1
            return
        safe = withhold(rules, event)
        if safe is None:
            self.left_out[TOO_SHORT] += 1
            return
        self.add_exported(exported(found, safe))

    def add_exported(self, fields: Mapping[str, Any]) -> None:
        """Write an event as `exported` returns it. Raises UsageError as `add`."""
        position = f"{fields['topic']}/{fields['partition']}@{fields['offset']}"
        name = file_name((str(fields["source"]), str(fields["type"]), str(fields["id"])), position)
        self.size += self._to.write(name, position, line_of(fields))
        self.written += 1
        self.withheld.update(fields.get("withheld", ()))

    def close(self) -> None:
        """Complete what was written. Raises UsageError."""
        self.size += self._to.close()


class Lines:
    """A file into which events are written, a line for each."""

    def __init__(self, path: Path) -> None:
        """Raise UsageError for a file that is there already."""
        self._file = new_file(path)

    def write(self, _name: str, _position: str, content: bytes) -> int:
        """Write an event, and return the bytes."""
        return self._file.write(content)

    def close(self) -> int:
        """Close the file, and return 0: it has nothing but the events."""
        self._file.close()
        return 0


class Folder:
    """A folder into which events are written, a file for each, and the file of their tests at the end."""

    def __init__(self, path: Path) -> None:
        """Make the folder if there is none. Raises UsageError, also if it has a file of tests already."""
        self.path = path
        self._tests: list[dict[str, object]] = []
        self._taken: set[str] = set()
        try:
            path.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise UsageError(f"--to: expected a folder, or a place for one, {path}, got: {reason_of(error)}") from error
        if (path / TESTS).exists():
            raise UsageError(f"--to: expected a folder without {TESTS}, got {path}: nothing is overwritten")

    def write(self, name: str, position: str, content: bytes) -> int:
        """Write an event to a file of that name, and return the bytes. Raises UsageError if it is there already."""
        if name.casefold() in self._taken:  # of several events with one id, all are written
            name = f"{name.removesuffix('.json')}.{_UNSAFE.sub('_', position)}.json"
        self._taken.add(name.casefold())
        with new_file(self.path / name) as file:
            file.write(content)
        self._tests.append(file_test(name))
        return len(content)

    def close(self) -> int:
        """Write the file of tests, if there is any event, and return its bytes."""
        if not self._tests:
            return 0
        content = written_tests(self._tests)
        with new_file(self.path / TESTS) as file:
            file.write(content)
        return len(content)


def file_test(name: str) -> dict[str, object]:
    """Return the test of an event that is in a file of this name: that all that happens with it stays as it is."""
    return {"name": name.removesuffix(".json"), "event": {"captured": name}, "expect": {"snapshot": True}}


def written_tests(tests: Iterable[Mapping[str, object]]) -> bytes:
    """Return a file of tests. Each of its lines is JSON, which YAML reads."""
    return b"".join([b"tests:\n", *[b"  - " + orjson.dumps(each) + b"\n" for each in tests]])


def new_file(path: Path) -> BinaryIO:
    """Create a file that only its owner reads. Raises UsageError if there is one, also as a link, or none can be."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        raise UsageError(f"--to: expected no file at {path}, got one: nothing is overwritten") from None
    except OSError as error:
        raise UsageError(f"--to: expected to write {path}, got: {reason_of(error)}") from error
    return os.fdopen(descriptor, "wb")
