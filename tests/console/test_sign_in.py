"""People sign in to the console with a token, and by a provider: over real connections, through an access file."""

import asyncio
import re
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from gateway.access.access import Refusal
from gateway.access.access_file import Grant, with_token, without_token
from gateway.access.principal import AccessRole
from gateway.access.sessions import AGE, IDLE, RENEWAL
from gateway.access.throttle import BURST
from gateway.access.tokens import digest_of, token_of
from gateway.ops.audit import Act, read_acts
from tests.console.signing import HOST, ORIGIN, PAGE, Browser, Desk, desk_of

TOKEN, OTHER, EXPIRED = token_of(b"\x01" * 32), token_of(b"\x02" * 32), token_of(b"\x03" * 32)
SESSION, SECURE = "signed-in", "__Host-signed-in"


def file_text(role: AccessRole = AccessRole.OPERATOR, *, sign_in: str = f"sign-in {ORIGIN}") -> str:
    return with_token(f"{sign_in}\n", Grant(name="deploys", role=role, digest=digest_of(TOKEN)))


@pytest.fixture
async def desk(tmp_path: Path) -> AsyncIterator[Desk]:
    async with desk_of(tmp_path, file_text()) as made:
        yield made


@pytest.fixture
def browser(desk: Desk) -> Browser:
    return desk.browser()


def cookie_named(cookies: list[str], name: str) -> str:
    (found,) = [each for each in cookies if each.startswith(f"{name}=")]
    return found


async def test_a_page_asks_who_is_there_and_is_shown_after_that(desk: Desk, browser: Browser) -> None:
    reply = await browser.get("/ui/rules?a=b")
    assert reply.status == 401
    assert reply.document.problems == []
    assert reply.document.forms["/ui/sign-in"]["next"] == "/ui/rules?a=b"
    assert "expected" not in reply.document.text  # nothing is wrong yet
    with capture_logs() as lines:
        reply = await browser.sign_in(TOKEN, page="/ui/rules?a=b")
    assert (reply.status, reply.location) == (303, "/ui/rules?a=b")
    assert TOKEN not in str(lines)
    (line,) = [each for each in lines if each["event"] == "signed_in"]
    assert (line["who"], line["via"], line["role"], line["address"]) == (
        "deploys",
        "token_session",
        "operator",
        "127.0.0.1",
    )
    page = await browser.get(PAGE)
    assert page.status == 200
    assert "deploys" in page.document.text
    assert desk.signed_in == {"token_session": 1}


async def test_a_session_cookie_is_sealed_and_for_the_browser_alone(browser: Browser) -> None:
    reply = await browser.sign_in(TOKEN)
    cookie = cookie_named(reply.cookies, SESSION)
    for part in ("HttpOnly", "SameSite=Lax", "Path=/", f"Max-Age={int(AGE)}"):
        assert part in cookie
    assert "Secure" not in cookie
    assert TOKEN not in cookie
    assert "deploys" not in cookie


async def test_where_there_is_tls_no_other_host_can_set_the_cookie(desk: Desk) -> None:
    browser = desk.browser(**HOST, X_Forwarded_For="192.0.2.1")
    reply = await browser.sign_in(TOKEN, Origin=ORIGIN)
    assert reply.status == 303
    assert "Secure" in cookie_named(reply.cookies, SECURE)
    assert "Secure" in cookie_named(reply.cookies, "session")
    assert await browser.status() == 200
    # The same session under the name that any host may set is none there.
    browser.cookies = {SESSION: browser.cookies[SECURE]}
    assert await browser.status() == 401


@pytest.mark.parametrize("token", [OTHER, "gwt_nonsense", "", "ä" * 50])
async def test_another_token_signs_nobody_in(desk: Desk, browser: Browser, token: str) -> None:
    with capture_logs() as lines:
        reply = await browser.sign_in(token)
    assert reply.status == 401
    assert SESSION not in browser.cookies
    assert "unknown token" in reply.document.text
    assert desk.refused[Refusal.BAD_TOKEN] == 1
    assert [each["reason"] for each in lines if each["event"] == "sign_in_refused"] == ["bad_token"]
    assert not token or token not in f"{lines}{reply.text}"


async def test_guesses_on_the_page_are_bounded_with_those_of_programs(desk: Desk, browser: Browser) -> None:
    for _ in range(BURST):
        assert (await browser.sign_in(OTHER)).status == 401
    reply = await browser.sign_in(OTHER)
    assert reply.status == 429
    assert int(reply.headers["Retry-After"]) > 0
    for token, status in ((OTHER, 429), (TOKEN, 200)):
        headers = {"Authorization": f"Bearer {token}"}
        async with desk.session.get(f"{desk.base}/api/v1/openapi.json", headers=headers) as response:
            assert response.status == status
    assert (await browser.sign_in(TOKEN)).status == 303


async def test_a_flood_of_refusals_writes_few_lines_and_says_how_many_it_left_out(desk: Desk, browser: Browser) -> None:
    with capture_logs() as lines:
        for _ in range(BURST + 15):
            await browser.sign_in(OTHER)
        assert len([each for each in lines if each["event"] == "sign_in_refused"]) == 20
        desk.sign_in._tell_suppressed()  # as its timer does, ten seconds later
    assert [(each["reason"], each["count"]) for each in lines if each["event"] == "lines_suppressed"] == [
        ("too_many_guesses", 5)
    ]


async def test_a_form_of_another_page_signs_nobody_in(desk: Desk, browser: Browser) -> None:
    fields = {**(await browser.get("/ui/sign-in")).document.forms["/ui/sign-in"], "credential": TOKEN}
    for headers in (
        {"Origin": "https://evil.example"},
        {"Sec_Fetch_Site": "cross-site"},
        {"Sec_Fetch_Site": "same-site"},
        {"Origin": "null"},
    ):
        assert (await browser.post("/ui/sign-in", fields, **headers)).status == 403
    assert desk.refused[Refusal.FOREIGN_PAGE] == 4
    for changed in ({"token": "0" * 64}, {"token": ""}):
        assert (await browser.post("/ui/sign-in", {**fields, **changed})).status == 403
    browser.cookies.clear()  # the form's token alone, as an attacker may have it from a page of their own
    assert (await browser.post("/ui/sign-in", fields)).status == 403
    assert SESSION not in browser.cookies


@pytest.mark.parametrize("path", ["https://evil.example/", "//evil.example", "/ui/../x\\y", "/uievil", "/metrics", ""])
async def test_nobody_is_sent_elsewhere_after_it(browser: Browser, path: str) -> None:
    fields = (await browser.get("/ui/sign-in")).document.forms["/ui/sign-in"]
    reply = await browser.post("/ui/sign-in", {**fields, "credential": TOKEN, "next": path})
    assert (reply.status, reply.location) == (303, "/ui")
    page = await browser.get(f"/ui/sign-in?next={path}")
    assert page.document.forms["/ui/sign-in"]["next"] == "/ui"


async def test_a_sign_in_makes_a_new_session_and_ends_the_one_before(browser: Browser) -> None:
    await browser.sign_in(TOKEN)
    planted, forms = dict(browser.cookies), browser.cookies["session"]
    await browser.sign_in(TOKEN)
    assert browser.cookies[SESSION] != planted[SESSION]
    assert browser.cookies["session"] != forms
    assert await browser.status() == 200
    browser.cookies = planted
    assert await browser.status() == 401


async def test_who_signs_out_is_out_and_so_is_a_copy_of_the_cookie(desk: Desk, browser: Browser) -> None:
    await browser.sign_in(TOKEN)
    copy = dict(browser.cookies)
    page = (await browser.get(PAGE)).document
    with capture_logs() as lines:
        reply = await browser.post("/ui/sign-out", page.forms["/ui/sign-out"])
    assert reply.status == 200
    assert reply.document.problems == []
    assert "signed out" in reply.document.text
    assert [(each["who"], each["via"]) for each in lines if each["event"] == "signed_out"] == [
        ("deploys", "token_session")
    ]
    assert SESSION not in browser.cookies
    assert await browser.status() == 401
    # The form on that page is good at once.
    fields = {**reply.document.forms["/ui/sign-in"], "credential": TOKEN}
    assert (await browser.post("/ui/sign-in", fields)).status == 303
    browser.cookies = copy
    assert await browser.status() == 401
    assert desk.refused[Refusal.SESSION_OVER] == 1


async def test_another_sites_page_signs_nobody_out(browser: Browser) -> None:
    await browser.sign_in(TOKEN)
    fields = (await browser.get(PAGE)).document.forms["/ui/sign-out"]
    assert (await browser.post("/ui/sign-out", fields, Origin="https://evil.example")).status == 403
    assert (await browser.post("/ui/sign-out", {"token": "0" * 64})).status == 403
    assert await browser.status() == 200


async def test_another_sites_page_does_not_act_for_who_has_a_session(desk: Desk, browser: Browser) -> None:
    await browser.sign_in(TOKEN)
    fields = (await browser.get("/ui/destinations/ci")).document.forms["/ui/destinations/ci/pause"]
    for headers in ({"Origin": "https://evil.example"}, {"Sec_Fetch_Site": "cross-site"}):
        assert (await browser.post("/ui/destinations/ci/pause", fields, **headers)).status == 403
    assert (await desk.company.log.bounds(desk.company.topics.control))[0] == (0, 0)


async def test_a_session_ends_by_its_age_however_much_it_is_used(desk: Desk, browser: Browser) -> None:
    await browser.sign_in(TOKEN)
    for _ in range(int(AGE / IDLE * 2) - 1):
        desk.clock.ahead += IDLE / 2
        assert await browser.status() == 200
    desk.clock.ahead += IDLE / 2
    reply = await browser.get(PAGE)
    assert reply.status == 401
    assert "Your session has ended" in reply.document.text


async def test_a_session_that_nobody_uses_ends(desk: Desk, browser: Browser) -> None:
    await browser.sign_in(TOKEN)
    desk.clock.ahead += IDLE - 1
    assert await browser.status() == 200
    desk.clock.ahead += IDLE
    assert await browser.status() == 401


async def test_a_session_is_renewed_once_a_minute_and_by_nobody_whose_session_is_over(
    desk: Desk, browser: Browser
) -> None:
    await browser.sign_in(TOKEN)
    assert (await browser.get(PAGE)).cookies == []
    desk.clock.ahead += RENEWAL
    cookie = cookie_named((await browser.get(PAGE)).cookies, SESSION)
    assert int(re.findall(r"Max-Age=(\d+)", cookie)[0]) <= AGE - RENEWAL
    desk.clock.ahead += AGE
    assert SESSION not in str((await browser.get(PAGE)).cookies)


@pytest.mark.parametrize(
    "change",
    [
        lambda text: without_token(text, "deploys"),
        lambda text: with_token(
            without_token(text, "deploys"), Grant(name="deploys", role=AccessRole.OPERATOR, digest=digest_of(OTHER))
        ),
        lambda text: text.replace("token deploys", "token others"),
        lambda text: f"{text.rstrip()} expires=2020-01-01T00:00:00Z\n",
    ],
    ids=["revoked", "made anew", "renamed", "expired"],
)
async def test_a_session_ends_with_what_it_rests_on(desk: Desk, browser: Browser, change: Callable[[str], str]) -> None:
    await browser.sign_in(TOKEN)
    assert await browser.status() == 200
    await desk.change(change(desk.file.read_text()))
    assert await browser.status() == 401
    assert desk.refused[Refusal.SESSION_OVER] == 1


async def test_a_changed_role_counts_at_once(desk: Desk, browser: Browser) -> None:
    await browser.sign_in(TOKEN)
    fields = (await browser.get("/ui/destinations/ci")).document.forms["/ui/destinations/ci/pause"]
    await desk.change(file_text(AccessRole.VIEWER))
    assert "viewer" in (await browser.get(PAGE)).document.text
    assert (await browser.post("/ui/destinations/ci/pause", fields)).status == 403


@pytest.mark.parametrize("position", [0, 1, 20, -1])
async def test_a_changed_cookie_is_nobodys(desk: Desk, browser: Browser, position: int) -> None:
    await browser.sign_in(TOKEN)
    value = browser.cookies[SESSION]
    swapped = "A" if value[position] != "A" else "Q"
    at = position % len(value)
    browser.cookies[SESSION] = value[:at] + swapped + value[at + 1 :]
    assert await browser.status() == 401
    assert desk.refused[Refusal.BAD_SESSION] == 1


async def test_a_key_in_a_file_is_that_of_all_processes_behind_an_address(tmp_path: Path) -> None:
    (tmp_path / "session.key").write_text("0123456789abcdef" * 4 + "\n")
    text = file_text(sign_in=f"sign-in {ORIGIN} key=${{file:session.key}}")
    async with desk_of(tmp_path, text) as one, desk_of(tmp_path, text) as other:
        first, second = one.browser(), other.browser()
        await first.sign_in(TOKEN)
        second.cookies = first.cookies
        assert await second.status() == 200
        (tmp_path / "session.key").write_text("another" * 8)
        await asyncio.to_thread(other.access.load)
        assert await second.status() == 401
        assert await first.status() == 200


async def test_a_process_without_a_key_makes_its_own(tmp_path: Path) -> None:
    async with desk_of(tmp_path, file_text()) as one, desk_of(tmp_path, file_text()) as other:
        first, second = one.browser(), other.browser()
        await first.sign_in(TOKEN)
        second.cookies = first.cookies
        assert await second.status() == 401


async def test_nobody_signs_in_where_no_line_says_so_but_on_this_machine(tmp_path: Path) -> None:
    async with desk_of(tmp_path, file_text(sign_in="")) as desk:
        elsewhere = desk.browser(**HOST)
        reply = await elsewhere.get(PAGE)
        assert reply.status == 401
        assert "/ui/sign-in" not in reply.document.forms
        assert "sign-in https://gateway.example.com" in reply.document.text
        assert (await elsewhere.get("/ui/sign-in")).status == 404
        here = desk.browser()
        assert (await here.sign_in(TOKEN)).status == 303
        fields = (await desk.browser().get("/ui/sign-in")).document.forms["/ui/sign-in"]
        elsewhere.cookies = {"session": "x"}
        assert (await elsewhere.post("/ui/sign-in", {**fields, "credential": TOKEN})).status == 403


@pytest.mark.parametrize(
    "origin", ["http://10.0.0.5:9090", "http://gateway.example.com", "https://gateway.example.com:444"]
)
async def test_a_form_at_another_address_than_the_one_of_the_file_signs_nobody_in(desk: Desk, origin: str) -> None:
    browser = desk.browser(Host=origin.partition("//")[2])
    reply = await browser.sign_in(TOKEN, Origin=origin)
    assert reply.status == 403
    assert f"expected a page at {ORIGIN}" in reply.document.text


async def test_the_api_takes_no_session(browser: Browser) -> None:
    await browser.sign_in(TOKEN)
    assert (await browser.get("/api/v1/openapi.json")).status == 401
    assert (await browser.get("/api/v1/openapi.json", Authorization=f"Bearer {TOKEN}")).status == 200


async def test_what_is_done_is_recorded_with_who_signed_in_and_how(desk: Desk, browser: Browser) -> None:
    await browser.sign_in(TOKEN)
    fields = (await browser.get("/ui/destinations/ci")).document.forms["/ui/destinations/ci/pause"]
    assert (await browser.post("/ui/destinations/ci/pause", fields)).status == 303
    acts = [each async for each in read_acts(desk.company.log, desk.company.topics)]
    found = [each.record for each in acts if isinstance(each, Act)]
    assert [(each.who, each.via, each.is_proven, each.origin) for each in found] == [
        ("deploys", "token_session", True, "127.0.0.1")
    ]


async def test_a_token_in_a_header_counts_before_a_session(desk: Desk, browser: Browser) -> None:
    await browser.sign_in(TOKEN)
    assert (await browser.get(PAGE, Authorization=f"Bearer {OTHER}")).status == 401
    assert desk.refused[Refusal.BAD_TOKEN] == 1


async def test_without_an_access_file_there_is_nobody_to_sign_in_as(desk: Desk) -> None:
    desk.access._settings = type(desk.access._settings)()
    browser = desk.browser()
    assert (await browser.get("/ui/sign-in")).status == 404
    assert await browser.status() == 200


async def test_strangers_who_send_forms_slowly_take_no_page_from_those_who_are_signed_in(
    desk: Desk, browser: Browser, monkeypatch: pytest.MonkeyPatch
) -> None:
    await browser.sign_in(TOKEN)
    monkeypatch.setattr("gateway.console.application.SIGN_INS_AT_A_TIME", 2)
    monkeypatch.setattr("gateway.console.application.AT_A_TIME", 1)
    head = b"POST /ui/sign-in HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 99\r\n"
    head += b"Content-Type: application/x-www-form-urlencoded\r\n\r\na"
    host, _, port = desk.base.partition("//")[2].partition(":")
    writers = []
    for _ in range(2):
        _, writer = await asyncio.open_connection(host, int(port))
        writer.write(head)
        await writer.drain()
        writers.append(writer)
    async with asyncio.timeout(10):
        while (await desk.browser().get("/ui/sign-in")).status != 503:
            pass
    assert await browser.status() == 200
    for writer in writers:
        writer.close()
        await writer.wait_closed()


async def test_a_form_to_sign_in_is_small_and_comes_soon(
    desk: Desk, browser: Browser, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = (await browser.get("/ui/sign-in")).document.forms["/ui/sign-in"]
    assert (await browser.post("/ui/sign-in", {**fields, "credential": "x" * 9000})).status == 413
    monkeypatch.setattr("gateway.console.sign_in_pages.SECONDS", 0.01)

    async def slow() -> AsyncIterator[bytes]:
        yield b"a"
        await asyncio.Event().wait()

    headers = {"Content-Type": "application/x-www-form-urlencoded"}
    async with desk.session.post(f"{desk.base}/ui/sign-in", data=slow(), headers=headers) as response:
        assert response.status == 400
        assert "expected the form within" in await response.text()
