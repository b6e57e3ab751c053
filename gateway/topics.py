"""Which topics the rules need, and that they are there as the promises need them."""

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
    """Return what the topics have to be by these rules. Raises RulesError where events and ours would share one."""
    return topics.specs(event_topics(rules, topics), rules.ordered)


async def ensure_topics(log: Log, settings: Settings, rules: Rules, logger: FilteringBoundLogger) -> None:
    """Hold the topics against what the promises need; a fatal difference is a UsageError, or with `--dev` a warning."""
    specs = specs_of(rules, Topics(settings.topic_prefix))
    if settings.dev or isinstance(settings.log, EmbeddedTarget):
        for name in await log.create(specs):
            logger.info("topic_created", topic=name)
    fatal: list[str] = []
    for problem in await log.check(specs):
        if problem.is_fatal and not settings.dev:
            fatal.append(f"{problem.topic}: {problem.message}")
        else:
            logger.warning("topic_differs", topic=problem.topic, problem=problem.message)
    if fatal:
        advice = "run `gateway topics create` for what is missing, or use --dev where losing events doesn't matter"
        raise UsageError("\n".join([*fatal, advice]))
