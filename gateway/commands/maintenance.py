"""`gateway migrate`, `backup` and `restore`: the embedded log as a whole."""

from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path

from gateway.commands.base import KAFKA_SETTINGS, Invocation, command, opened_log, rules_without_secrets
from gateway.commands.values import Parser, log_url
from gateway.log.embedded.backup import back_up
from gateway.log.embedded.log import EmbeddedLog
from gateway.log.embedded.restore import restore
from gateway.model import UsageError
from gateway.ops.migrate import migrate
from gateway.ops.output import count
from gateway.ops.rejected import refuse_open
from gateway.required_topics import event_topics
from gateway.settings import EmbeddedTarget, KafkaTarget, log_target


def migrate_arguments(parser: Parser) -> None:
    parser.add_argument("--from", dest="source", type=log_url, required=True, metavar="URL", help="sqlite:///FILE")
    about = "kafka://HOST:PORT[,HOST:PORT]"
    parser.add_argument("--to", dest="log", type=log_url, required=True, metavar="URL", help=about)


@command(
    "migrate",
    about="move an embedded log to Kafka, with its commits (what is already delivered), with both gateways stopped",
    example="gateway migrate --from sqlite:///gateway.db --to kafka://broker1:9092",
    add_arguments=migrate_arguments,
    settings=("rules", "topic_prefix", *KAFKA_SETTINGS),
)
async def _migrate(call: Invocation) -> int:
    output = call.output
    origin = log_target(call.arguments.source)
    if not isinstance(origin, EmbeddedTarget) or not isinstance(call.settings.log, KafkaTarget):
        raise UsageError("migrate: expected --from sqlite:///FILE and --to kafka://HOST:PORT")
    if not origin.path.exists():
        raise UsageError(f"--from: expected an embedded log, got no file {origin.path}")
    rules = rules_without_secrets(call.settings.rules)
    names = event_topics(rules, call.topics)
    async with AsyncExitStack() as stack:
        target = await stack.enter_async_context(opened_log(call))
        # As its owner: this fails while a gateway runs on it, and none can start meanwhile. Retention deletes nothing
        # from it, so the move can be abandoned.
        source = await EmbeddedLog.open(origin.path, owner=True, sweep_interval=None)
        stack.push_async_callback(source.close)

        def show(total: int) -> Callable[[int, str], None]:
            return stack.enter_context(output.gauge("migrate", total))

        await refuse_open(source, call.topics)
        moved, left = await migrate(source, target, call.topics, names, show, ordered=rules.ordered)
    if output.json:
        for each in moved:
            output.line(each._asdict())
    rows = [(each.topic, str(each.records), str(each.unfinished)) for each in moved if each.records]
    output.table(["topic", "records", "unfinished"], rows, right=("records", "unfinished"))
    topics = call.topics
    unneeded = {topics.attempts, topics.audit, topics.responses}  # no delivery depends on them
    if kept := [topic for topic in left if topic in unneeded]:
        output.note(f"not moved, since no delivery depends on them: {', '.join(kept)}; the file keeps them")
    left = [topic for topic in left if topic not in {*unneeded, topics.rejected}]  # nothing rejected is open
    if left:
        output.note(f"not moved, since they don't have the prefix {topics.prefix!r}: {', '.join(left)}")
    twice = sum([each.twice for each in moved])
    duplicates = f", but {count(twice, 'record')} twice, whose delivery may be repeated" if twice else ""
    output.print(
        f"everything was moved, unchanged{duplicates}; start the gateway on Kafka, and keep the file until you have "
        "seen it work"
    )
    return 0


def backup_arguments(parser: Parser) -> None:
    about = "the copy to write; an existing file, or the target of a symbolic link, is replaced atomically"
    parser.add_argument("file", metavar="FILE", help=about)


@command(
    "backup",
    about="copy an embedded log as it is now, while its gateway runs",
    example="gateway backup --log sqlite:///gateway.db /backup/gateway.db",
    add_arguments=backup_arguments,
    settings=("log",),
)
def _backup(call: Invocation) -> int:
    target, copy = call.settings.log, Path(call.arguments.file)
    if not isinstance(target, EmbeddedTarget):
        raise UsageError("--log: expected sqlite:///FILE, got Kafka, which has replicas instead")
    with call.output.waiting(f"copying {target.path}"):
        size = back_up(target.path, copy)
    call.output.print(f"{copy}: {size / 1e6:,.1f} MB")
    if call.output.json:
        call.output.line({"file": str(copy), "bytes": size})
    return 0


def restore_arguments(parser: Parser) -> None:
    parser.add_argument("file", metavar="FILE", help="a copy made by `gateway backup`; it stays in place")


@command(
    "restore",
    about="replace an embedded log with a copy, while no gateway runs; the old file is kept under another name",
    example="gateway restore --log sqlite:///gateway.db /backup/gateway.db",
    add_arguments=restore_arguments,
    settings=("log",),
)
def _restore(call: Invocation) -> int:
    target, copy = call.settings.log, Path(call.arguments.file)
    if not isinstance(target, EmbeddedTarget):
        raise UsageError("--log: expected sqlite:///FILE, got Kafka, which has replicas instead")
    with call.output.waiting(f"restoring {target.path}"):
        size, before, stray = restore(target.path, copy)
    aside = f"; the previous log was kept as {before}" if before else ""
    follows = "" if stray else ". Start the gateway"
    call.output.print(f"{target.path}: {size / 1e6:,.1f} MB, its structure checked{aside}{follows}")
    if stray:
        its_file = stray.with_name(stray.name.removesuffix("-wal"))
        call.output.note(
            f"{stray} had no database file, and may have acknowledged events that are nowhere else. "
            f"Before you start the gateway, put that file back as {its_file}, and inspect it: gateway events "
            f"list --log sqlite:///{its_file}",
            style="yellow",
        )
    if call.output.json:
        names = {"before": before and str(before), "stray": stray and str(stray)}
        call.output.line({"file": str(target.path), "bytes": size, **names})
    return 0
