"""Which topics have events: those that an ingress may have appended to, perhaps by rules that no router ever had."""

from collections.abc import Collection

from gateway.log.base import Log
from gateway.log.topics import ROUTER_GROUP, SOURCES_GROUP, Topics
from gateway.model import LogUnavailableError


async def wanted_topics(
    log: Log, topics: Topics, needed: Collection[str], subscribed: frozenset[str], deleted: Collection[str]
) -> frozenset[str]:
    """Return the topics to read: those `needed` by the rules, others with events, and those `subscribed` to.

    Of the last, the `deleted` ones are left out, unless the rules or the log have them. Raises LogUnavailableError if
    the rules need others than those subscribed to.
    """
    try:
        present = await topics_with_events(log, topics, subscribed)
    except LogUnavailableError:
        if subscribed.issuperset(needed):
            return subscribed  # and it is looked for again soon
        raise
    return (subscribed - set(deleted)) | present | set(needed)


async def topics_with_events(log: Log, topics: Topics, subscribed: Collection[str]) -> set[str]:
    """Return the topics of events that are there, those of former rules and those `subscribed` to among them.

    Raises LogUnavailableError; but where the custom names alone can't be read, others are found all the same.
    """
    present = set(await log.topics())
    events = {name for name in present if name.startswith(topics.events(""))}
    begun = await log.topics_of(topics.group(ROUTER_GROUP))
    try:
        named = await log.topics_of(topics.group(SOURCES_GROUP))
    except LogUnavailableError:
        named = ()
    return events | present.intersection({*subscribed, *begun, *named})
