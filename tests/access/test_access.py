"""Who may ask at the admin address, over real connections."""

import os
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from ipaddress import ip_network
from pathlib import Path

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

from gateway.access import access
from gateway.access.access import Access, Refusal
from gateway.access.access_file import AccessFileError, Grant, with_token
from gateway.access.principal import AccessError, AccessRole
from gateway.access.throttle import BURST, SECONDS
from gateway.access.tokens import digest_of, token_of
from gateway.settings import AccessSettings
from gateway.telemetry.metrics import ACCESS_REFUSALS
from tests.builders import NOW

Client = TestClient[web.Request, web.Application]
TOKEN, OTHER, EXPIRED = token_of(b"\x01" * 32), token_of(b"\x02" * 32), token_of(b"\x03" * 32)
PEOPLE = "person ada@example.com operator\nperson *@example.com viewer source=github\n"


def file_text() -> str:
    text = PEOPLE
    for name, token, role, expires in (
        ("deploys", TOKEN, AccessRole.READER, None),
        ("old", EXPIRED, AccessRole.OPERATOR, NOW),
    ):
        grant = Grant(name=name, role=role, owners=frozenset({"payments"}), digest=digest_of(token), expires=expires)
        text = with_token(text, grant)
    return text


class Guard:
    """An `Access` with what it has refused, and a clock that stands still."""

    def __init__(self, settings: AccessSettings | None = None) -> None:
        self.now = NOW
        self.refused: Counter[Refusal] = Counter()
        self.looks = 0
        self.access = Access(settings, refused=self._count, clock=lambda: self.now, sleep=self._sleep)
        self.access.load()

    def _count(self, why: Refusal) -> None:
        self.refused[why] += 1

    async def _sleep(self, _: float) -> None:
        self.looks -= 1
        if self.looks < 0:
            raise StopWatchingError

    async def look(self, times: int = 2) -> None:
        """Have the file looked at so many times."""
        self.looks = times
        with pytest.raises(StopWatchingError):
            await self.access.watch()


class StopWatchingError(Exception):
    """Ends the endless watch of a test."""


@asynccontextmanager
async def serving(guard: Guard) -> AsyncIterator[Client]:
    async def answer(request: web.Request) -> web.Response:
        try:
            principal = guard.access.principal_of(request)
        except AccessError as error:
            return web.Response(status=error.status, text=error.detail, headers=error.headers)
        limits = f"{sorted(principal.owners or ())} {sorted(principal.sources or ())}"
        return web.Response(text=f"{principal.name} {principal.role} {principal.via} {limits}")

    application = web.Application()
    application.router.add_route("*", "/", answer)
    async with TestClient(TestServer(application)) as made:
        yield made


async def asked(client: Client, headers: Mapping[str, str] | None = None, method: str = "GET") -> tuple[int, str]:
    async with client.request(method, "/", headers=headers) as response:
        return response.status, await response.text()


def bearer(token: str) -> Mapping[str, str]:
    return {"Authorization": f"Bearer {token}"}


def test_each_reason_has_a_series_from_the_start() -> None:
    assert {*Refusal} == {*ACCESS_REFUSALS}


# Without access for anybody.


async def test_whoever_has_an_account_on_this_machine_is_an_operator() -> None:
    async with serving(Guard()) as client:
        assert await asked(client, method="POST") == (200, "local operator loopback [] []")


@pytest.mark.parametrize("headers", [{"Host": "gateway.example.com"}, {"X-Forwarded-For": "192.0.2.1"}])
async def test_a_request_for_another_name_or_through_a_proxy_is_nobodys(headers: dict[str, str]) -> None:
    guard = Guard()
    async with serving(guard) as client, client.get("/", headers=headers) as response:
        assert response.status == 401
        assert response.headers["WWW-Authenticate"] == 'Bearer realm="gateway"'
    assert guard.refused == {Refusal.NOT_LOCAL: 1}


async def test_another_machines_request_is_nobodys(monkeypatch: pytest.MonkeyPatch) -> None:
    # A machine has no second one to ask from: what it is told of its peer is.
    monkeypatch.setattr(access, "is_local", lambda peer, *_: peer == "192.0.2.1")
    async with serving(Guard()) as client:
        assert (await asked(client))[0] == 401


async def test_a_page_of_another_site_does_not_act_for_who_sits_here() -> None:
    guard = Guard()
    async with serving(guard) as client:
        assert (await asked(client, {"Origin": "https://evil.example"}, "POST"))[0] == 403
    assert guard.refused == {Refusal.FOREIGN_PAGE: 1}


async def test_no_token_is_good_where_none_is_given() -> None:
    async with serving(Guard()) as client:
        assert (await asked(client, bearer(TOKEN)))[0] == 401


# Tokens.


@pytest.fixture
def guard(tmp_path: Path) -> Guard:
    (tmp_path / "access.conf").write_text(file_text())
    proxies = (ip_network("127.0.0.0/8"),)
    file = tmp_path / "access.conf"
    return Guard(AccessSettings(file=file, identity_header="X-Forwarded-Email", identity_proxies=proxies))


async def test_a_token_is_its_role_within_its_limits(guard: Guard) -> None:
    async with serving(guard) as client:
        assert await asked(client, bearer(TOKEN)) == (200, "deploys reader token ['payments'] []")
        # A program sends it, whatever it is called here, and through whatever proxy; no page can.
        headers = {**bearer(TOKEN), "Host": "gateway.example.com", "X-Forwarded-For": "192.0.2.1", "Origin": "null"}
        assert (await asked(client, headers, "POST"))[0] == 200
    assert guard.refused == {}


async def test_once_access_is_given_to_somebody_this_machine_has_none_by_itself(guard: Guard) -> None:
    async with serving(guard) as client:
        assert (await asked(client))[0] == 401
    assert guard.refused == {Refusal.NO_CREDENTIALS: 1}


@pytest.mark.parametrize(
    ("token", "why"),
    [
        (OTHER, Refusal.BAD_TOKEN),
        (TOKEN[:-1] + "x", Refusal.BAD_TOKEN),
        ("gwt_", Refusal.BAD_TOKEN),
        (EXPIRED, Refusal.EXPIRED_TOKEN),
        ("another-kind-of-token", Refusal.NO_CREDENTIALS),
        ("", Refusal.NO_CREDENTIALS),
    ],
)
async def test_any_other_token_is_refused_and_counted(guard: Guard, token: str, why: Refusal) -> None:
    async with serving(guard) as client:
        status, detail = await asked(client, bearer(token))
    assert status == 401
    assert not token or token not in detail
    assert guard.refused == {why: 1}


async def test_a_token_is_good_until_it_expires(guard: Guard) -> None:
    guard.now = NOW - 1
    async with serving(guard) as client:
        assert (await asked(client, bearer(EXPIRED)))[0] == 200
        guard.now = NOW
        assert (await asked(client, bearer(EXPIRED)))[0] == 401


async def test_who_guesses_is_refused_for_a_while_and_who_has_a_token_never(guard: Guard) -> None:
    """Behind a proxy, all have one address: strangers there keep nobody out."""
    async with serving(guard) as client:
        for _ in range(BURST):
            assert (await asked(client, bearer(OTHER)))[0] == 401
        async with client.get("/", headers=bearer(OTHER)) as response:
            assert response.status == 429
            assert response.headers["Retry-After"] == "7"
        assert (await asked(client, bearer(TOKEN)))[0] == 200
        guard.now += SECONDS
        assert [(await asked(client, bearer(OTHER)))[0] for _ in range(2)] == [401, 429]
        assert (await asked(client, bearer(TOKEN)))[0] == 200
    assert guard.refused == {Refusal.BAD_TOKEN: BURST + 1, Refusal.TOO_MANY_GUESSES: 2}


async def test_what_has_not_the_form_of_a_token_is_no_guess(guard: Guard) -> None:
    async with serving(guard) as client:
        for _ in range(BURST + 1):
            assert (await asked(client, bearer("gwt_x")))[0] == 401
        assert (await asked(client, bearer(OTHER)))[0] == 401


def test_each_token_is_compared_whichever_it_is(guard: Guard, monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[bytes] = []

    def compare(digest: bytes, other: bytes) -> bool:
        compared.append(digest)
        return digest == other

    monkeypatch.setattr(access, "is_equal", compare)
    for token in (TOKEN, EXPIRED, OTHER):
        compared.clear()
        guard.access._grant_of(token)
        assert compared == [digest_of(TOKEN), digest_of(EXPIRED)]


# Changes of the file.


async def test_a_revoked_token_is_refused_and_a_new_one_accepted_without_a_restart(
    guard: Guard, tmp_path: Path
) -> None:
    file = tmp_path / "access.conf"
    file.write_text(with_token("", Grant(name="new", role=AccessRole.VIEWER, digest=digest_of(OTHER))))
    async with serving(guard) as client:
        await guard.look(1)
        assert (await asked(client, bearer(TOKEN)))[0] == 200  # it may still be being written
        await guard.look(1)
        assert (await asked(client, bearer(TOKEN)))[0] == 401
        assert await asked(client, bearer(OTHER)) == (200, "new viewer token [] []")


async def test_an_invalid_file_changes_nothing_and_is_told(guard: Guard, tmp_path: Path) -> None:
    file = tmp_path / "access.conf"
    async with serving(guard) as client:
        for text in ("nonsense", None):
            file.unlink() if text is None else file.write_text(text)
            await guard.look()
            assert (await asked(client, bearer(TOKEN)))[0] == 200
            (note,) = guard.access.notes()
            assert note.startswith(f"access: {file}")
        file.write_text(PEOPLE)
        await guard.look()
        assert guard.access.notes() == []
        assert (await asked(client, bearer(TOKEN)))[0] == 401


def test_a_process_does_not_start_with_an_invalid_file(tmp_path: Path) -> None:
    for content in (None, b"nonsense", b"\xff", b"#" * ((1 << 20) + 1)):
        file = tmp_path / "access.conf"
        if content is not None:
            file.write_bytes(content)
        with pytest.raises(AccessFileError, match=r"access\.conf"):
            Guard(AccessSettings(file=file))
    if os.geteuid():
        (tmp_path / "access.conf").chmod(0)
        with pytest.raises(AccessFileError, match="permission denied"):
            Guard(AccessSettings(file=tmp_path / "access.conf"))


async def test_without_a_file_there_is_nothing_to_watch() -> None:
    await Guard().access.watch()


# Who a proxy says it is.


async def test_a_person_is_whom_a_trusted_proxy_names(guard: Guard) -> None:
    async with serving(guard) as client:
        assert await asked(client, {"X-Forwarded-Email": "ada@example.com"}) == (
            200,
            "ada@example.com operator identity_header [] []",
        )
        assert await asked(client, {"x-forwarded-email": "bob@example.com"}) == (
            200,
            "bob@example.com viewer identity_header [] ['github']",
        )
        # What else a proxy sends on is not for us.
        headers = {"X-Forwarded-Email": "ada@example.com", "Authorization": "Bearer eyJhbGciOi…"}
        assert (await asked(client, headers))[0] == 200


async def test_a_person_who_is_given_nothing_is_told_so(guard: Guard) -> None:
    async with serving(guard) as client:
        assert (await asked(client, {"X-Forwarded-Email": "eve@evil.example"}))[0] == 403
    assert guard.refused == {Refusal.UNKNOWN_PERSON: 1}


@pytest.fixture
def distant(tmp_path: Path) -> Guard:
    """Return one that trusts proxies elsewhere."""
    (tmp_path / "access.conf").write_text(PEOPLE)
    proxies = (ip_network("192.0.2.0/24"), ip_network("2001:db8::/32"))
    file = tmp_path / "access.conf"
    return Guard(AccessSettings(file=file, identity_header="X-Forwarded-Email", identity_proxies=proxies))


async def test_nobody_but_a_trusted_proxy_says_who_somebody_is(distant: Guard) -> None:
    async with serving(distant) as client:
        assert (await asked(client, {"X-Forwarded-Email": "ada@example.com"}))[0] == 401
    assert distant.refused == {Refusal.UNTRUSTED_PROXY: 1}


@pytest.fixture
def tokens_only(tmp_path: Path) -> Guard:
    (tmp_path / "access.conf").write_text(PEOPLE)
    return Guard(AccessSettings(file=tmp_path / "access.conf"))


async def test_without_the_setting_no_header_says_who_somebody_is(tokens_only: Guard) -> None:
    async with serving(tokens_only) as client:
        assert (await asked(client, {"X-Forwarded-Email": "ada@example.com"}))[0] == 401
    assert tokens_only.refused == {Refusal.NO_CREDENTIALS: 1}


@pytest.mark.parametrize("names", [["ada@example.com", "eve@evil.example"], [""], ["x" * 255]])
async def test_two_names_or_none_are_nobody(guard: Guard, names: list[str]) -> None:
    headers = [("X-Forwarded-Email", name) for name in names]
    async with serving(guard) as client, client.get("/", headers=headers) as response:
        assert response.status == 401
    assert guard.refused == {Refusal.BAD_IDENTITY: 1}


async def test_a_page_of_another_site_does_not_act_for_who_is_signed_in(guard: Guard) -> None:
    ada = {"X-Forwarded-Email": "ada@example.com", "X-Forwarded-Host": "gateway.example.com"}
    async with serving(guard) as client:
        for headers, status in (
            ({"Origin": "https://gateway.example.com"}, 200),
            ({"Origin": "https://gateway.example.com", "Sec-Fetch-Site": "same-origin"}, 200),
            ({"Origin": "https://evil.example"}, 403),
            ({"Origin": "https://evil.example", "Sec-Fetch-Site": "cross-site"}, 403),
            ({"Sec-Fetch-Site": "same-site"}, 403),
        ):
            assert (await asked(client, ada | headers, "POST"))[0] == status, headers
