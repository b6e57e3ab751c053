"""What was responded to the last attempts of deliveries, for those who may read it."""

from collections.abc import Mapping, Sequence

from gateway.access.principal import AccessRole, Principal
from gateway.api.backend import Backend, must_be_available
from gateway.api.problems import ApiError, Code
from gateway.api.shares import whose_turn
from gateway.api.visibility import reads_bodies
from gateway.index.results import ListedDelivery
from gateway.ops.output import body_text
from gateway.ops.redaction import Redactions
from gateway.ops.responses_in_log import masked, recorded_responses


def must_read_responses(principal: Principal) -> None:
    """Raise ApiError for who may not read what was responded."""
    if not reads_bodies(principal):
        expected = f"expected the role {AccessRole.READER}, got {principal.role}"
        raise ApiError(Code.FORBIDDEN, f"include_responses: {expected}")


async def last_responses(
    backend: Backend, principal: Principal, listed: Sequence[ListedDelivery]
) -> Mapping[object, str]:
    """Return the beginning of what was responded to each, by its cursor, as text: a hex dump if it isn't UTF-8.

    Of several events of one request with one id it isn't known which one a response repeats: if their source hides
    something, all of it is hidden.
    """
    hidden = Redactions(backend.rules())
    async with must_be_available():
        hiding = {each.event.number: each.event for each in listed if hidden.of(each.event.source) is not None}
        shared = [
            number
            for number, event in hiding.items()
            if len(await backend.open_index().namesakes(event.id, event.received_at, limit=2)) > 1
        ]
        recorded = await recorded_responses(backend.log, listed, hidden, shared)
    found = await backend.aside(whose_turn(principal), lambda: masked(recorded, hidden)) if recorded else {}
    return {cursor: body_text(response.body) for cursor, response in found.items()}
