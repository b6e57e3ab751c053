"""Who may ask at the admin address, over real connections."""

from collections.abc import AsyncIterator

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

from gateway.access import access
from gateway.access.access import Access
from gateway.access.principal import AccessError

Client = TestClient[web.Request, web.Application]


@pytest.fixture
async def client() -> AsyncIterator[Client]:
    guard = Access()

    async def answer(request: web.Request) -> web.Response:
        try:
            principal = guard.principal_of(request)
        except AccessError as error:
            return web.Response(status=error.status, text=error.detail, headers=error.headers)
        return web.Response(text=f"{principal.name} {principal.role} {principal.via}")

    application = web.Application()
    application.router.add_route("*", "/", answer)
    async with TestClient(TestServer(application)) as made:
        yield made


async def test_whoever_has_an_account_on_this_machine_is_an_operator(client: Client) -> None:
    async with client.post("/") as response:
        assert (response.status, await response.text()) == (200, "local operator loopback")


@pytest.mark.parametrize("headers", [{"Host": "gateway.example.com"}, {"X-Forwarded-For": "192.0.2.1"}])
async def test_a_request_for_another_name_or_through_a_proxy_is_nobodys(
    client: Client, headers: dict[str, str]
) -> None:
    async with client.get("/", headers=headers) as response:
        assert response.status == 401
        assert response.headers["WWW-Authenticate"] == "Bearer"


async def test_another_machines_request_is_nobodys(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    # A machine has no second one to ask from: what it is told of its peer is.
    monkeypatch.setattr(access, "is_local", lambda peer, *_: peer == "192.0.2.1")
    async with client.get("/") as response:
        assert response.status == 401


async def test_a_page_of_another_site_does_not_act_for_who_sits_here(client: Client) -> None:
    async with client.post("/", headers={"Origin": "https://evil.example"}) as response:
        assert response.status == 403
