"""`gateway diff`: what other rules would do with recent events."""

import time
from collections.abc import Iterator
from contextlib import ExitStack, aclosing
from dataclasses import dataclass
from pathlib import Path

from gateway.commands.base import LOG_SETTINGS, Invocation, command, opened_log
from gateway.commands.values import Parser, duration
from gateway.log.records import decode_event
from gateway.model import LogUnavailableError, UnreadableRecordError, UsageError
from gateway.ops.log_search import newest_first
from gateway.ops.output import Output, count
from gateway.ops.rule_diff import STDIN, RouteDiff, RuleDiff, events_in, rule_file_of
from gateway.required_topics import event_topics
from gateway.rules.load import load_rules
from gateway.rules.rules import Rules
from gateway.rules.yaml_document import reason_of
from gateway.text import UNSEEN

MAX_EVENTS = 1_000_000
"""Maximum number of events compared, the newest first."""
COLUMNS = ("before", "after", "gained", "lost", "changed")
KINDS = ("lost", "changed", "gained")
MAX_DIFFERENCES = 8  # of a sample
NO_EVENTS = "no events were compared"


def diff_arguments(parser: Parser) -> None:
    about = "the old rules: a rule file, or REVISION:PATH in Git, such as HEAD:routes.yaml"
    parser.add_argument("old", metavar="OLD", help=about)
    parser.add_argument("new", metavar="NEW", help="the new rules: a rule file or REVISION:PATH")
    events = parser.add_mutually_exclusive_group(required=True)
    events.add_argument(
        "--events",
        type=Path,
        metavar="FILE",
        help="compare on these events: a file of lines from `gateway events show --json`; - is stdin",
    )
    events.add_argument(
        "--since", type=duration, metavar="DURATION", help="compare on the events stored in the last DURATION"
    )
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="also write a summary for a pull request to FILE")


@command(
    "diff",
    about="compare what two versions of the rules do with the same events: what each route gains, loses and changes",
    example="gateway diff HEAD:routes.yaml routes.yaml --since 1h",
    add_arguments=diff_arguments,
    settings=LOG_SETTINGS,
)
async def _diff(call: Invocation) -> int:
    arguments, output = call.arguments, call.output
    try:
        with ExitStack() as stack:
            # Without what this machine has: no message shows a secret, and both have the same placeholders.
            old, new = (
                load_rules(stack.enter_context(rule_file_of(name)), environ={}, resolve=False, reads_secrets=False)
                for name in (arguments.old, arguments.new)
            )
            diff = RuleDiff(old, new, now=time.time())
        if arguments.events is not None:
            _compare_file(output, diff, arguments.events)
        else:
            await _compare_log(call, diff, old, new)
    except BrokenPipeError:
        raise
    except (LogUnavailableError, OSError) as error:
        raise UsageError(str(error)) from error  # an exit code of 1 says that something changes
    changed = {name: route for name, route in diff.routes.items() if route.is_changed}
    if output.json:
        for name, route in diff.routes.items():
            output.line({"route": name, **{key: getattr(route, key) for key in COLUMNS}, "samples": route.samples})
        found = diff.changes
        output.line({"rules": {"added": found.added, "changed": found.changed, "removed": found.removed}})
    _print(output, diff, changed)
    if arguments.markdown is not None:
        try:
            arguments.markdown.write_text("\n".join(_markdown(diff, changed)) + "\n")
        except OSError as error:
            expected = f"expected a file to write, {arguments.markdown}"
            raise UsageError(f"--markdown: {expected}, got {reason_of(error)}") from error
    if not diff.events:
        output.fail(NO_EVENTS)
        return 2
    return 1 if diff.is_changed else 0


def _visible(text: str) -> str:
    """Escape what controls a terminal, hides, or turns the direction of a text, as events may have it."""
    return UNSEEN.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def _compare_file(output: Output, diff: RuleDiff, path: Path) -> None:
    try:
        size = 0 if path == STDIN else path.stat().st_size
    except OSError as error:
        raise UsageError(f"{path}: expected a file of events, got: {error.strerror}") from error
    with output.gauge("comparing", size) as show:
        done = 0
        for event in events_in(path):
            diff.add(event)
            done += len(event.body)
            if diff.events % 100 == 0:
                show(min(done, size), f"{diff.events:,} events")


async def _compare_log(call: Invocation, diff: RuleDiff, old: Rules, new: Rules) -> None:
    topics = [*dict.fromkeys([*event_topics(new, call.topics), *event_topics(old, call.topics)])]
    async with opened_log(call) as log:
        now = log.now()
        since = now - call.arguments.since
        with call.output.gauge("comparing", int(call.arguments.since)) as show:
            async with aclosing(newest_first(log, topics, since=since)) as records:
                async for found in records:
                    try:
                        diff.add(decode_event(found.record))
                    except UnreadableRecordError:
                        continue  # no rules change what becomes of it
                    if diff.events % 100 == 0:
                        show(int(now - found.record.appended_at), f"{diff.events:,} events")
                    if diff.events >= MAX_EVENTS:
                        call.output.note(f"only the newest {MAX_EVENTS:,} events were compared")
                        break


def _print(output: Output, diff: RuleDiff, changed: dict[str, RouteDiff]) -> None:
    if changed:
        rows = [(name, *[f"{getattr(route, key):,}" for key in COLUMNS]) for name, route in changed.items()]
        output.table(["route", *COLUMNS], rows, right=COLUMNS)
        output.print()
        for name, route in changed.items():
            for sample in _samples(route):
                output.print((f"{sample.kind} ", "bold"), f"{name}: {sample.event} {sample.what[0]}")
                if differences := _differences(sample):
                    output.block("\n".join(f"  {line}" for line in differences))
    for line in _rule_changes(diff):
        output.print(line)
    if diff.events:
        output.print(_summary(diff, changed))


@dataclass(frozen=True, slots=True)
class _Sample:
    kind: str
    event: str
    what: tuple[str, ...]


def _samples(route: RouteDiff) -> Iterator[_Sample]:
    for kind in KINDS:
        for event, what in route.samples.get(kind, ()):
            yield _Sample(kind, event, what)


def _differences(sample: _Sample) -> list[str]:
    """Return the first differences of a sample, and how many more there are."""
    _, *every = sample.what
    shown = every[:MAX_DIFFERENCES]
    left = len(every) - len(shown)
    return [*shown, f"… and {left:,} more"] if left else shown


def _rule_changes(diff: RuleDiff) -> Iterator[str]:
    """Yield what differs in the rules, in words: also what none of the requests shows."""
    found = diff.changes
    for word, names in (("added", found.added), ("changed", found.changed), ("removed", found.removed)):
        yield from [f"{word}: {name}" for name in names]


def _summary(diff: RuleDiff, changed: dict[str, RouteDiff]) -> str:
    if not diff.events:
        return NO_EVENTS
    unchanged = "the same deliveries" if diff.is_changed else "no route changed"
    routes = f"{len(changed)} of {count(len(diff.routes), 'route')} changed" if changed else unchanged
    before, after = diff.unrouted["before"], diff.unrouted["after"]
    unrouted = f"; {after:,} without a route" if after + before else ""
    refused = f"; {diff.refused:,} that the ingress would refuse" if diff.refused else ""
    then = f", {before:,} before" if before != after else ""
    return f"{count(diff.events, 'event')}: {routes}{unrouted}{then}{refused}"


def _markdown(diff: RuleDiff, changed: dict[str, RouteDiff]) -> Iterator[str]:
    """Yield the lines of a summary, for a pull request."""
    yield "### What these rules change"
    yield ""
    yield f"{_summary(diff, changed)}."
    if lines := list(_rule_changes(diff)):
        yield ""
        yield from [f"- {line}" for line in lines]
    if not changed:
        return
    yield ""
    yield f"| route | {' | '.join(COLUMNS)} |"
    yield f"|---|{'--:|' * len(COLUMNS)}"
    for name, route in changed.items():
        yield f"| {name} | {' | '.join(f'{getattr(route, key):,}' for key in COLUMNS)} |"
    yield ""
    for name, route in changed.items():
        yield f"<details><summary>{name}</summary>"
        yield ""
        yield "```"
        for sample in _samples(route):
            lines = [f"{sample.kind}: {sample.event} {sample.what[0]}", *_differences(sample)]
            yield _visible("\n  ".join(lines)).replace("```", "'''")
        yield "```"
        yield ""
        yield "</details>"
