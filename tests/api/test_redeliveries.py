"""Redeliveries of single events by the API: what has come of each, and their end.

what crosses                                what has to come of it
──────────────────────────────────────────  ──────────────────────────────────────────────────
a redelivery that is under way, or done     what was queued so far, and whether there is more to come
one that was cancelled, or never asked for  a second end changes nothing; 404
limits to owners and sources                who has asked for it sees it, others don't, whatever they are called
one that an older version has asked for     is a token's
"""

from dataclasses import replace

from gateway.access.principal import AccessRole, Principal
from gateway.engine.control.redelivery_records import RedeliveryResult
from gateway.ops.control_client import ControlClient
from tests.api.conftest import World


async def asked(world: World, **body: object) -> str:
    event, *_ = await world.company.event()
    await world.refresh()
    command = await world.post(f"/events/{event.id}/redeliver", body)
    return str(command["id"]).partition("/")[2]


async def test_what_has_come_of_one_is_told(world: World) -> None:
    world.become(AccessRole.OPERATOR)
    name = await asked(world, destination="ci", reason="it is back")
    found = await world.get(f"/redeliveries/{name}")
    assert (found["state"], found["is_final"], found["deliveries"]) == ("requested", False, [])
    assert (found["by"], found["reason"], found["destination"], found["route"]) == ("anna", "it is back", "ci", None)
    command = (await ControlClient(world.company.log, world.company.topics).control()).commands[f"redeliver/{name}"]
    results = (
        RedeliveryResult(route="build", destination="ci", outcome="queued", paused_by="destination/ci"),
        RedeliveryResult(route="audit", destination="", outcome="dead"),
    )
    await world.company.command(command.with_state("done", count=1, results=results))
    found = await world.get(f"/redeliveries/{name}")
    assert (found["state"], found["is_final"]) == ("done", True)
    assert found["deliveries"] == [
        {"route": "build", "destination": "ci", "outcome": "queued", "paused_by": "destination/ci"},
        {"route": "audit", "destination": None, "outcome": "dead", "paused_by": None},
    ]


async def test_they_are_listed_the_last_one_first(world: World) -> None:
    world.become(AccessRole.OPERATOR)
    names = [await asked(world) for _ in range(3)]
    first = await world.get("/redeliveries", limit=2)
    rest = await world.get("/redeliveries", limit=2, cursor=first["next_cursor"])
    assert [each["id"] for each in first["items"] + rest["items"]] == names[::-1]
    assert rest["next_cursor"] is None
    assert (await world.get("/redeliveries", 400, cursor="x"))["code"] == "invalid_cursor"
    assert (await world.get("/replays", 400, cursor=first["next_cursor"]))["code"] == "invalid_cursor"


async def test_one_is_cancelled_once(world: World) -> None:
    world.become(AccessRole.OPERATOR)
    name = await asked(world)
    key = {"Idempotency-Key": "one"}
    first = await world.post(f"/redeliveries/{name}/cancel", {"reason": "wrong event"}, headers=key)
    assert (first["state"], first["is_new"]) == ("cancelled", True)
    assert await world.post(f"/redeliveries/{name}/cancel", {"reason": "wrong event"}, headers=key) == first
    assert not (await world.post(f"/redeliveries/{name}/cancel", {}))["is_new"]
    found = await world.get(f"/redeliveries/{name}")
    assert (found["state"], found["detail"]) == ("cancelled", "by anna")
    for path in ("nothing", "a%2Fb", "\x00"):
        await world.get(f"/redeliveries/{path}", 404)
        await world.post(f"/redeliveries/{path}/cancel", {}, 404)


async def test_who_has_limits_sees_their_own(world: World) -> None:
    world.become(AccessRole.OPERATOR, sources=frozenset({"github"}))
    name = await asked(world)
    assert (await world.get(f"/redeliveries/{name}"))["id"] == name
    assert (await world.get(f"/commands/redeliver%2F{name}"))["state"] == "requested"
    assert len((await world.get("/redeliveries"))["items"]) == 1
    world.become(AccessRole.OPERATOR)
    others = await asked(world)
    assert len((await world.get("/redeliveries"))["items"]) == 2
    limits = frozenset({"github"})
    world.access.principal = Principal(name="bob", role=AccessRole.OPERATOR, via="test", sources=limits)
    for path in (name, others):
        await world.get(f"/redeliveries/{path}", 404)
        await world.post(f"/redeliveries/{path}/cancel", {}, 404)
    assert (await world.get("/redeliveries"))["items"] == []


async def test_who_is_called_what_another_is_called_is_another(world: World) -> None:
    """A person may call themselves what a token is called."""
    limits = frozenset({"github"})

    def be(via: str) -> None:
        world.access.principal = Principal(name="deploys", role=AccessRole.OPERATOR, via=via, sources=limits)

    be("token")
    name = await asked(world)
    for via, status in (("oidc", 404), ("identity_header", 404), ("loopback", 404), ("token_session", 200)):
        be(via)
        await world.get(f"/redeliveries/{name}", status)
        assert len((await world.get("/redeliveries"))["items"]) == (status == 200)
        if status == 404:
            await world.post(f"/redeliveries/{name}/cancel", {}, 404)
    be("oidc")
    theirs = await asked(world)
    be("identity_header")
    assert (await world.get(f"/redeliveries/{theirs}"))["by"] == "deploys"
    be("token")
    await world.get(f"/redeliveries/{theirs}", 404)


async def test_one_that_an_older_version_has_asked_for_is_a_tokens(world: World) -> None:
    limits = frozenset({"github"})
    world.access.principal = Principal(name="deploys", role=AccessRole.OPERATOR, via="oidc", sources=limits)
    name = await asked(world)
    command = (await ControlClient(world.company.log, world.company.topics).control()).commands[f"redeliver/{name}"]
    await world.company.command(replace(command, via=""))
    await world.get(f"/redeliveries/{name}", 404)
    world.access.principal = replace(world.access.principal, via="token")
    assert (await world.get(f"/redeliveries/{name}"))["id"] == name
