"""The topics that the rules require, and the check that they exist with the required configuration."""

from collections.abc import Iterable, Mapping

from structlog.typing import FilteringBoundLogger

from gateway.log.base import ALL, NO_TOPIC, Commit, Log, Partition, TopicSpec
from gateway.log.topics import SOURCES_GROUP, Topics
from gateway.model import ForbiddenError, LogUnavailableError, RulesError, UsageError
from gateway.rules.rules import Rules
from gateway.settings import EmbeddedTarget, Settings


def event_topics(rules: Rules, topics: Topics) -> set[str]:
    """Return the topics that the sources of the rules append to."""
    return {source.topic or topics.events(source.name) for source in rules.sources.values()}


def specs_of(rules: Rules, topics: Topics) -> tuple[TopicSpec, ...]:
    """Return the specifications of all topics. Raises RulesError if a source uses one of the gateway's own topics."""
    return topics.specs(
        event_topics(rules, topics),
        rules.ordered,
        has_responses=rules.has_responses,
        has_quarantine=any(source.quarantine for source in rules.sources.values()),
    )


async def _remember_named_topics(log: Log, topics: Topics, names: Iterable[str], logger: FilteringBoundLogger) -> None:
    """Let routers find these event topics, even if their rules never have them: their names may be any.

    Otherwise nobody would read what an ingress appends to one if its rules are rolled back before a router has them. An
    ingress may lack the right to do so, or a broker be away: that is a warning.
    """
    named = sorted(name for name in names if not name.startswith(topics.events("")))
    if not named:
        return
    try:
        await log.seed(topics.group(SOURCES_GROUP), {Partition(name, 0): Commit(0) for name in named})
    except (UsageError, LogUnavailableError) as error:
        problem = f"a router won't find it by itself if its source is removed before the router has the rules: {error}"
        for name in named:
            logger.warning("topic_misconfigured", topic=name, problem=problem)


async def missing_topics(log: Log, specs: Iterable[TopicSpec]) -> Mapping[Partition, str]:
    """Return which of these topics don't exist, or aren't for us, as what can't be read. Raises LogUnavailableError."""
    names = {spec.name for spec in specs}
    missing: dict[Partition, str] = {}
    for name in sorted(names - (await log.partitions(names)).keys()):
        missing[Partition(name, ALL)] = NO_TOPIC
        try:
            await log.readable(name)
        except ForbiddenError as error:
            missing[Partition(name, ALL)] = str(error)
    return missing


async def missing_of_rules(log: Log, topics: Topics, rules: Rules | None) -> Mapping[Partition, str]:
    """Return which topics of the rules don't exist, as `missing_topics` does; without rules, of no source."""
    try:
        specs = topics.specs(()) if rules is None else specs_of(rules, topics)
    except RulesError:  # `gateway check` says which
        specs = topics.specs(())
    return await missing_topics(log, specs)


async def ensure_topics(
    log: Log, settings: Settings, rules: Rules, logger: FilteringBoundLogger, *, is_start: bool
) -> None:
    """Compare the topics with their specifications. Raises UsageError for a problem that breaks a guarantee.

    With `--dev`, one that can only lose events is a warning. So is a missing topic: its records wait, or are refused,
    until it exists. But a process doesn't start without the control topic, since the gateway was never set up there.
    Creates missing topics with `--dev` or an embedded log.
    """
    topics = Topics(settings.topic_prefix)
    specs = specs_of(rules, topics)
    if settings.dev or isinstance(settings.log, EmbeddedTarget):
        for name in await log.create(specs):
            logger.info("topic_created", topic=name)
    problems = await log.check(specs)
    is_set_up = not any(problem.is_missing and problem.topic == topics.control for problem in problems)
    fatal = []
    for problem in problems:
        is_tolerated = (settings.dev and problem.is_tolerable) or (problem.is_missing and (is_set_up or not is_start))
        if problem.is_fatal and not is_tolerated:
            fatal.append(problem)
        else:
            advice = "; run `gateway topics create`" if problem.is_missing else ""
            logger.warning("topic_misconfigured", topic=problem.topic, problem=f"{problem.message}{advice}")
    if fatal:
        lines = [f"{problem.topic}: {problem.message}" for problem in fatal]
        if any(problem.is_tolerable for problem in fatal):
            lines.append(
                "run `gateway topics create` for what is missing, or use --dev where losing events doesn't matter"
            )
        raise UsageError("\n".join(lines))
    missing = {problem.topic for problem in problems if problem.is_missing}
    await _remember_named_topics(log, topics, event_topics(rules, topics) - missing, logger)
