"""The warnings of `gateway check --strict`: valid rules that could be safer, simpler or faster."""

import json
import re
from collections.abc import Mapping

from gateway.model import Disposition
from gateway.rules.advice import credential_of, is_in_the_clear, written_credential
from gateway.rules.build import names_of, retry_policy_of
from gateway.rules.conditions import AllOf, AnyOf, Compare, Condition, Every, Field, OneOf, Path, Test, written
from gateway.rules.expressions import Expression
from gateway.rules.schema_reader import ParsedMapping, SchemaReader
from gateway.rules.value_kinds import shown_duration
from gateway.rules.yaml_document import Code, Node

LONG_TEXT = 10_000
"""Bytes of the sample text for which a pattern's time is reported."""
SLOW = 200_000
"""Cost units from which on a pattern is slow: a tenth of the budget for all expressions over an event."""
_PATH = r"(?:type|source|(?:headers|query|body)(?:\.[A-Za-z_]\w*|\[(?:\d+|'[^'\\]*'|\"[^\"\\]*\")\])+)"
_LITERAL = r"(?:'[^'\\]*'|\"[^\"\\]*\"|-?\d+(?:\.\d+)?|true|false|null)"
_MATCHABLE = re.compile(
    rf"\s*(?:{_PATH}\s*(?:==|<=|>=|<|>)\s*{_LITERAL}|{_PATH}\.startsWith\({_LITERAL}\)|has\({_PATH}\))\s*", re.ASCII
)
_PRIVATE = re.compile(r"https?://(?:[^./:]+|[^/:]+\.(?:local|internal|svc|cluster\.local|localhost))(?::\d+)?(?:/|$)")
_RETRIED = re.compile(r"408|425|429|5(?:\d\d|xx)|timeout|connect|dns|tls|transport|auth", re.ASCII)
"""Transient results, after which a delivery is retried by default."""


class Lints:
    """Adds warnings about complete rules to the reader, beyond those of `Advice`."""

    def __init__(
        self, reader: SchemaReader, destinations: Mapping[str, ParsedMapping], routes: Mapping[str, ParsedMapping]
    ) -> None:
        self._reader = reader
        self._destinations = destinations
        self._routes = routes

    def report(self) -> None:
        """Add all warnings."""
        for read in self._destinations.values():
            self._of_destination(read)
        for read in self._routes.values():
            self._of_route(read)
            self._of_retry(read)
        self._of_stops()

    def _of_destination(self, read: ParsedMapping) -> None:
        url, node = read.values["url"], read.node.value["url"]
        if is_in_the_clear(url) and not _PRIVATE.match(url) and not credential_of(read):
            self._warn(node, "plain", "expected https, got http: what is sent can be read and changed on the way")
        if written := written_credential(read):
            where, what = written
            message = f"expected a reference such as ${{NAME}}, got {what}, as it is: whoever reads the file has it"
            self._warn(where, "weak", message)
        if "rate" not in read.values:
            message = "expected a `rate`, got none: a burst of events, or a backlog, comes as fast as it can"
            self._reader.report(read.node, "unlimited", message, severity="warning", at_key=True)

    def _of_route(self, read: ParsedMapping) -> None:
        match, when = read.values.get("match"), read.values.get("when")
        if match is not None and _is_impossible(match):
            self._warn(read.node.value["match"], "unreachable", "no event can satisfy all of these conditions")
        if not isinstance(when, Expression):
            return
        node = read.node.value["when"]
        if when.text.strip() == "false":
            self._warn(node, "unreachable", "no event can satisfy this; `enabled: false` says so")
        elif all(_MATCHABLE.fullmatch(part) for part in re.split(r"&&", when.text)):
            self._warn(node, "matchable", "expected `match` for what it can say, got CEL: `match` is indexed")
        slowest = max([pattern.cost(LONG_TEXT) for pattern in when.patterns], default=0)
        if slowest > SLOW:
            message = (
                f"expected a pattern that takes at most {SLOW // 10_000} ms for a text of 10 kB, got one that may "
            )
            self._warn(node, "slow", f"{message}take {slowest / 10_000:.0f} ms")

    def _of_retry(self, read: ParsedMapping) -> None:
        """Report retry policies that lose events shortly before they could be delivered."""
        retry: ParsedMapping | None = read.values.get("retry")
        if retry is None:
            return
        policy = retry_policy_of(read)
        results = retry.node.child("results") or retry.node  # otherwise inherited from `defaults`
        for result, disposition in policy.results:
            if disposition is Disposition.DROP and _RETRIED.fullmatch(result):
                message = f"expected a retry or a dead letter after {result}, which passes, got drop: the event is lost"
                self._warn(results.child(result) or results, "lossy", message)
        if policy.schedule[0] > policy.max_age and policy.max_attempts > 1:
            message = (
                f"expected a first step of at most max_age, {shown_duration(policy.max_age)}, got "
                f"{shown_duration(policy.schedule[0])}: what fails once isn't tried again"
            )
            self._warn(retry.node.child("schedule") or retry.node.child("max_age") or retry.node, "lossy", message)

    def _of_stops(self) -> None:
        """Report routes that get no events because of a `stop` above them, in the cases that are easy to recognise."""
        stops: dict[tuple[bool, str, str], list[tuple[str, frozenset[str]]]] = {}
        for name, read in self._routes.items():
            own, sources = _conditions_of(read), names_of(read, "from")
            is_catch_all = read.values.get("catch_all", False)
            above: set[str] = set()
            for number, source in enumerate(sources):
                candidates = [each for key in (*own, "") for each in stops.get((is_catch_all, source, key), ())]
                taking = {stop for stop, conditions in candidates if conditions <= own}
                above = taking if not number else above & taking
            if above:
                message = f"no event gets here: {min(above)}, above it, has `stop` and takes all of them"
                self._warn(read.node.value["name"], "unreachable", message)
            if read.values.get("stop") and not read.values.keys() & {"enabled", "sample", "expires"}:
                for source in sources:
                    stops.setdefault((is_catch_all, source, min(own, default="")), []).append((name, own))

    def _warn(self, node: Node, code: Code, message: str) -> None:
        self._reader.report(node, code, message, severity="warning")


def _conditions_of(read: ParsedMapping) -> frozenset[str]:
    """Return the conditions of a route, as text."""
    match, when = read.values.get("match"), read.values.get("when")
    every = _flattened(match) if isinstance(match, AllOf) else [] if match is None else [match]
    return frozenset([json.dumps(written(each)) for each in every] + ([] if when is None else [when.text]))


def _is_impossible(condition: Condition) -> bool:
    """Return whether no event can satisfy a condition. False if that isn't easy to recognise."""
    match condition:
        case AllOf(conditions):
            by_path: dict[Path, list[Test]] = {}
            for each in _flattened(condition):
                if isinstance(each, Field):
                    its = each.test.tests if isinstance(each.test, Every) else (each.test,)
                    by_path.setdefault(each.path, []).extend(its)
            return any(map(_is_impossible, conditions)) or any(map(_exclude_each_other, by_path.values()))
        case AnyOf(conditions):
            return all(map(_is_impossible, conditions))
        case Field(_, Every(tests)):
            return _exclude_each_other(list(tests))
        case _:
            return False


def _flattened(condition: AllOf) -> list[Condition]:
    return [
        inner for each in condition.conditions for inner in (_flattened(each) if isinstance(each, AllOf) else [each])
    ]


def _exclude_each_other(tests: list[Test]) -> bool:
    """Return whether no value passes all of these tests for one path."""
    values = [test for test in tests if isinstance(test, OneOf) and not test.globs]
    if values and not frozenset.intersection(*[test.keys for test in values]):
        return True
    bounds = [test for test in tests if isinstance(test, Compare)]
    least = max([test.bound for test in bounds if test.operator.startswith("gt")], default=float("-inf"))
    most = min([test.bound for test in bounds if test.operator.startswith("lt")], default=float("inf"))
    is_open = any(test.operator in {"gt", "lt"} and test.bound == least == most for test in bounds)
    return least > most or is_open
