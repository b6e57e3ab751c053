"""What is around each page: who may see it, its headers, its theme, its files."""

import re

import pytest
from structlog.testing import capture_logs

from gateway.access.principal import AccessRole
from gateway.console.application import CONTENT_SECURITY_POLICY
from tests.console.conftest import Console


async def test_the_policy_lets_nothing_in() -> None:
    assert CONTENT_SECURITY_POLICY == (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
    )


async def test_every_response_has_the_headers(console: Console) -> None:
    for path, status in (("/ui/events", 200), ("/ui/nothing", 404), ("/ui/events/x", 404), ("/ui/static/x", 404)):
        async with console.client.get(path) as response:
            assert response.status == status
            assert response.headers["Cross-Origin-Opener-Policy"] == "same-origin"
            assert response.headers["Cross-Origin-Resource-Policy"] == "same-origin"
            assert response.headers["Referrer-Policy"] == "same-origin"
            assert response.headers["X-Content-Type-Options"] == "nosniff"
            assert response.headers["X-Frame-Options"] == "DENY"
            assert response.headers["Cache-Control"] == "no-store"


async def test_files_have_their_digest_in_their_address(console: Console) -> None:
    page = await console.page("events")
    files = re.findall(r'"(/ui/static/[^"]+)"', page.source)
    assert len(files) == 3
    for path in files:
        async with console.client.get(path) as response:
            assert response.status == 200
            assert "immutable" in response.headers["Cache-Control"]
    async with console.client.get(re.sub(r"[0-9a-f]{16}", "0" * 16, files[0])) as response:
        assert response.status == 404


async def test_no_file_names_another_host(console: Console) -> None:
    page = await console.page("events")
    for path in re.findall(r'"(/ui/static/[^"]+)"', page.source):
        async with console.client.get(path) as response:
            found = re.findall(r"https?://[^\s\"')]+", await response.text())
            assert [each for each in found if each != "http://www.w3.org/2000/svg"] == []


async def test_a_stranger_is_told_how_to_get_in(console: Console) -> None:
    async with console.client.get("/ui/events", headers={"X-Forwarded-For": "192.0.2.1"}) as response:
        assert response.status == 401
        text = await response.text()
        assert "ssh -L" in text
        assert "WWW-Authenticate" in response.headers
    async with console.client.get("/ui/events", headers={"Sec-Fetch-Site": "cross-site"}) as response:
        assert response.status == 403
    async with console.client.get("/ui/events", headers={"Host": "rebound.example"}) as response:
        assert response.status == 401


async def test_a_link_from_another_site_may_be_followed(console: Console) -> None:
    headers = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}
    async with console.client.get("/ui/events", headers=headers) as response:
        assert response.status == 200


@pytest.mark.parametrize("theme", ["light", "dark"])
async def test_a_theme_is_kept_in_a_cookie(console: Console, theme: str) -> None:
    form = {"theme": theme, "back": "/ui/events?query=a"}
    async with console.client.post("/ui/theme", data=form, allow_redirects=False) as response:
        assert (response.status, response.headers["Location"]) == (303, "/ui/events?query=a")
        cookie = response.headers["Set-Cookie"]
        assert "HttpOnly" in cookie
        assert "SameSite=Strict" in cookie
    assert f'data-theme="{theme}"' in (await console.page("events")).source
    async with console.client.post("/ui/theme", data={"theme": "", "back": ""}, allow_redirects=False):
        pass
    assert "data-theme" not in (await console.page("events")).source


@pytest.mark.parametrize(
    "back", ["https://evil.example/", "//evil.example", "/ui/../x\\y", "/ui\r\nSet-Cookie: a=b", "/uievil", "/metrics"]
)
async def test_a_form_sends_nobody_elsewhere(console: Console, back: str) -> None:
    async with console.client.post(
        "/ui/theme", data={"theme": "dark", "back": back}, allow_redirects=False
    ) as response:
        assert response.headers["Location"] == "/ui"
        assert "a=b" not in str(response.headers)


async def test_another_sites_form_changes_nothing(console: Console) -> None:
    headers = {"Origin": "https://evil.example"}
    async with console.client.post("/ui/theme", data={"theme": "dark"}, headers=headers) as response:
        assert response.status == 403
        assert "Set-Cookie" not in response.headers


async def test_a_bug_is_told_without_what_is_in_it(console: Console, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(*_: object, **__: object) -> None:
        raise KeyError("secret")

    monkeypatch.setattr(type(console.index), "search", fail)
    with capture_logs() as lines:
        page = await console.page("events", expect=500)
    assert "secret" not in page.source
    assert [(line["event"], line["page"]) for line in lines] == [("page_failed", "events")]
    assert "'secret'" not in str(lines)


async def test_too_many_pages_at_a_time_are_refused(console: Console, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.console.application.AT_A_TIME", 0)
    assert "try again" in (await console.page("events", expect=503)).text.lower()


async def test_who_looks_is_shown(console: Console) -> None:
    console.become(AccessRole.VIEWER, owners=frozenset({"payments"}))
    page = await console.page("events")
    assert "anna" in page.text
    assert "viewer" in page.text
    assert "payments" in page.text
