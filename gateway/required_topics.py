"""The topics that the rules require, and the check that they exist with the required configuration."""

from structlog.typing import FilteringBoundLogger

from gateway.log.base import Log, TopicSpec
from gateway.log.topics import Topics
from gateway.model import UsageError
from gateway.rules.rules import Rules
from gateway.settings import EmbeddedTarget, Settings


def event_topics(rules: Rules, topics: Topics) -> set[str]:
    """Return the topics that the sources of the rules append to."""
    return {source.topic or topics.events(source.name) for source in rules.sources.values()}


def specs_of(rules: Rules, topics: Topics) -> tuple[TopicSpec, ...]:
    """Return the specifications of all topics. Raises RulesError if a source uses one of the gateway's own topics."""
    return topics.specs(event_topics(rules, topics), rules.ordered)


async def ensure_topics(log: Log, settings: Settings, rules: Rules, logger: FilteringBoundLogger) -> None:
    """Compare the topics with their specifications. Raises UsageError for a problem that breaks a guarantee.

    With `--dev`, one that can only lose events is a warning. Creates missing topics with `--dev` or an embedded log.
    """
    specs = specs_of(rules, Topics(settings.topic_prefix))
    if settings.dev or isinstance(settings.log, EmbeddedTarget):
        for name in await log.create(specs):
            logger.info("topic_created", topic=name)
    fatal = []
    for problem in await log.check(specs):
        if problem.is_fatal and not (settings.dev and problem.is_tolerable):
            fatal.append(problem)
        else:
            logger.warning("topic_misconfigured", topic=problem.topic, problem=problem.message)
    if fatal:
        lines = [f"{problem.topic}: {problem.message}" for problem in fatal]
        if any(problem.is_tolerable for problem in fatal):
            lines.append(
                "run `gateway topics create` for what is missing, or use --dev where losing events doesn't matter"
            )
        raise UsageError("\n".join(lines))
