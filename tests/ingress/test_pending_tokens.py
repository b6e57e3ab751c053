"""Tokens that providers send to be shown to operators: bounded, in memory alone, and forgotten once nobody waits."""

import orjson
import pytest
from prometheus_client import generate_latest

from gateway.ingress.pending_tokens import MAX_TOKENS
from gateway.rules.rules import Source
from gateway.verify.schemes import build_verifier
from tests.ingress.test_ingress import PING, World, a_request, running, some_rules

PENDING = Source(name="notion", path="/in/notion", verifier=build_verifier({"scheme": "notion", "pending": True}))
SIGNED = Source(
    name="notion", path="/in/notion", verifier=build_verifier({"scheme": "notion", "secrets": ["hush-" * 8]})
)


def with_token(token: str) -> bytes:
    return a_request("/in/notion", body=orjson.dumps({"verification_token": token}))


async def statuses(world: World, *requests: bytes) -> list[int]:
    return [(await world.exchange(request)).status for request in requests]


async def test_a_token_is_kept_once_and_is_in_no_line_no_metric_and_no_record() -> None:
    async with running() as world:
        world.rules[0] = some_rules(PENDING)
        assert await statuses(world, *[with_token("secret_of-notion")] * 2) == [200, 200]
        assert world.ingress.tokens.all() == {"notion": ("secret_of-notion",)}
        [line] = [each for each in world.lines if each["event"] == "token_awaits_operator"]
        assert (line["source"], line["count"]) == ("notion", 1)
        assert "secret_of" not in str(world.lines)
        assert b"gateway_requests_total" in (metrics := generate_latest(world.registry))
        assert b"secret_of" not in metrics
        assert world.log.stored == []
        assert await statuses(world, a_request("/in/notion", body=PING)) == [401]


async def test_strangers_take_few_places_and_push_nobody_out() -> None:
    async with running() as world:
        world.rules[0] = some_rules(PENDING)
        tokens = [f"secret_of-somebody-{n}" for n in range(MAX_TOKENS + 20)]
        expected = [200] * MAX_TOKENS + [429] * 20
        assert await statuses(world, *[with_token(token) for token in tokens]) == expected
        assert world.ingress.tokens.all() == {"notion": tuple(tokens[:MAX_TOKENS])}
        assert len([each for each in world.lines if each["event"] == "token_awaits_operator"]) == MAX_TOKENS
        refused = [each for each in world.lines if each.get("reason") == "rate_limited"]
        assert len(refused) == 10  # the others have one line together
        assert world.log.stored == []


@pytest.mark.parametrize("others", [[SIGNED], []])
async def test_tokens_are_forgotten_once_the_source_is_not_pending(others: list[Source]) -> None:
    async with running() as world:
        world.rules[0] = some_rules(PENDING)
        assert await statuses(world, with_token("secret_of-notion")) == [200]
        world.rules[0] = some_rules(*others)
        assert await statuses(world, with_token("secret_of-notion")) == [401 if others else 404]
        assert world.ingress.tokens.all() == {}
        assert world.log.stored == []
