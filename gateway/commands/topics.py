"""`gateway topics`: create and check the log's topics."""

from rich.text import Text

from gateway.commands.base import LOG_SETTINGS, Invocation, command, opened_log, rules_without_secrets
from gateway.ops.presentation import Row, print_rows, topic_fields, topic_row
from gateway.required_topics import specs_of
from gateway.telemetry import logs


@command(
    "topics create",
    about="create missing topics",
    example="gateway topics create --rules routes.yaml --log kafka://broker1:9092",
    settings=("rules", *LOG_SETTINGS),
)
async def _topics_create(call: Invocation) -> int:
    specs = specs_of(rules_without_secrets(call.settings.rules), call.topics)
    async with opened_log(call, may_create=True) as log:
        with call.output.waiting("creating topics"):
            created = set(await log.create(specs))
    if call.output.json:
        for spec in specs:
            call.output.line(topic_fields(spec) | {"created": spec.name in created})
    rows = [topic_row(spec, "created" if spec.name in created else "exists") for spec in specs]
    print_rows(call.output, rows)
    return 0


@command(
    "topics check",
    about="compare the topics' configuration with what the guarantees require",
    example="gateway topics check --log kafka://broker1:9092",
    settings=("rules", *LOG_SETTINGS),
)
async def _topics_check(call: Invocation) -> int:
    specs = specs_of(rules_without_secrets(call.settings.rules), call.topics)
    async with opened_log(call) as log:
        with call.output.waiting("reading the topics' configuration"):
            problems = await log.check(specs)
    is_fatal = any(problem.is_fatal for problem in problems)
    rows: list[Row] = []
    for spec in specs:
        own = [problem for problem in problems if problem.topic == spec.name]
        if call.output.json:
            found = [{"message": problem.message, "fatal": problem.is_fatal} for problem in own]
            call.output.line(topic_fields(spec) | {"ok": not own, "problems": found})
        message = Text("\n").join(
            [Text(logs.printable(problem.message), style="red" if problem.is_fatal else "yellow") for problem in own]
        )
        rows.append(topic_row(spec, message if own else Text("ok", style="green")))
    named = {spec.name for spec in specs}
    for problem in problems:
        if problem.topic not in named:
            call.output.note(f"{problem.topic}: {problem.message}", style="red" if problem.is_fatal else "yellow")
    print_rows(call.output, rows)
    return 1 if is_fatal else 0
