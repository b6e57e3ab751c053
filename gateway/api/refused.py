"""What was refused of a source's requests and kept (`quarantine`), by reason: as far as nothing was done about it."""

from collections.abc import Mapping
from dataclasses import dataclass

from gateway.access.principal import Principal
from gateway.api.backend import Backend, must_be_available
from gateway.api.json_shapes import Time
from gateway.api.log_findings import Scene
from gateway.api.problems import not_found
from gateway.api.visibility import sees_source
from gateway.ops.output import rfc3339


@dataclass(frozen=True, slots=True, kw_only=True)
class RefusedGroup:
    """Requests that were refused for one reason, and are kept: how many, and when the first and the last came.

    `incomplete` is how many of them can't be verified again, by what wasn't kept of them: `body` or `credential`.
    """

    reason: str
    count: int
    oldest: Time
    newest: Time
    incomplete: Mapping[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """What is kept of a source's refused requests, the largest group first, and nothing was done about.

    What isn't kept, the metric `gateway_rejected_total` counts by reason. `is_cut_short`: not all of the quarantine
    could be read, so that the numbers are the least that there are.
    """

    items: tuple[RefusedGroup, ...]
    is_cut_short: bool
    as_of: Time


async def get_refused(backend: Backend, principal: Principal, *, name: str) -> Refused:
    """Return what is kept of a source's refused requests, by reason."""
    rules = backend.rules()
    if name not in rules.sources or not sees_source(principal, rules, name):
        raise not_found("a source")
    async with must_be_available():
        scene = Scene(backend.log, backend.topics, rules, await backend.control(), backend.sees_members)
        kept = await backend.log_reader.of_quarantine(scene)
    return Refused(
        items=tuple(
            [
                RefusedGroup(
                    reason=each.reason,
                    count=each.count,
                    oldest=rfc3339(each.oldest),
                    newest=rfc3339(each.newest),
                    incomplete={why.value: number for why, number in each.missing.items()},
                )
                for each in kept.groups.largest_first()
                if each.source == name
            ]
        ),
        is_cut_short=not kept.is_whole,
        as_of=rfc3339(kept.at),
    )
