"""People sign in with a real browser, and by a provider that we did not write: node's oidc-provider (certified)."""

import asyncio
import shutil
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from aiohttp.test_utils import unused_port
from playwright.async_api import BrowserContext, Page, async_playwright

from gateway.access.access import Refusal
from gateway.access.access_file import Grant, with_token, without_token
from gateway.access.principal import AccessRole
from gateway.access.tokens import digest_of, token_of
from tests.certificates import Authority
from tests.console.signing import CALLBACK, Desk, desk_of, trusting
from tests.tools import needed

pytestmark = pytest.mark.rotated(share=1 / 6, group="browser")

TOKEN = token_of(b"\x01" * 32)
TOKENS = with_token("", Grant(name="deploys", role=AccessRole.OPERATOR, digest=digest_of(TOKEN)))
OTHER = Grant(name="other", role=AccessRole.VIEWER, digest=b"\x01" * 32)
PEOPLE = f"group sre operator\nperson *@example.com viewer\n{TOKENS}"


@asynccontextmanager
async def provider_at(folder: Path, authority: Authority, port: int, redirect: str) -> AsyncIterator[None]:
    """Run the provider."""
    authority.file(folder, "127.0.0.1").rename(folder / "server.pem")
    program = needed("oidc-provider")
    if shutil.which("node") is None:
        pytest.skip("needs node")
    process = await asyncio.create_subprocess_exec(
        program, str(folder), str(port), redirect, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert process.stdout is not None
    try:
        while (line := await process.stdout.readline()) and line != b"ready\n":
            pass
        assert line, "expected the provider to start"
        yield
    finally:
        process.terminate()
        await process.communicate()


@asynccontextmanager
async def opened(browser: str) -> AsyncIterator[tuple[BrowserContext, Page]]:
    async with async_playwright() as playwright:
        chromium = await playwright.chromium.connect_over_cdp(browser)
        context = await chromium.new_context(ignore_https_errors=True, reduced_motion="reduce")
        context.set_default_timeout(10_000)
        yield context, await context.new_page()
        await context.close()


@asynccontextmanager
async def by_provider(folder: Path, browser: str) -> AsyncIterator[tuple[Desk, BrowserContext, Page, str]]:
    """Open a browser beside a console at an address with TLS, which isn't this machine's own, and a provider."""
    authority, port, provider_port = Authority(), unused_port(), unused_port()
    base = f"https://gateway.localhost:{port}"
    (folder / "oidc-secret").write_text("s3cret: of 7+ characters & more\n")
    text = (
        f"sign-in {base}\n"
        f"oidc https://127.0.0.1:{provider_port} client='webhook gateway' secret=${{file:oidc-secret}} "
        f"scope=email scope=groups groups=groups\n{PEOPLE}"
    )
    async with (
        provider_at(folder, authority, provider_port, f"{base}{CALLBACK}"),
        trusting(authority) as client,
        desk_of(folder, text, client=client, tls=authority.server(folder, "gateway.localhost"), port=port) as desk,
        opened(browser) as (context, page),
    ):
        yield desk, context, page, base


async def findings(page: Page, axe: str) -> list[str]:
    """Return what axe has against a page."""
    tags = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]
    found = await page.evaluate(f"{axe}; axe.run(document, {{runOnly: {tags}}})")
    return [f"{each['id']}: {node['html']}" for each in found["violations"] for node in each["nodes"]]


async def through_the_provider(page: Page, login: str) -> None:
    await page.click("text=Sign in with 127.0.0.1")
    await page.fill("input[name=login]", login)
    await page.fill("input[name=password]", "any")
    await page.click("button[type=submit]")
    await page.click("text=Continue")


async def test_a_person_signs_in_by_a_provider_and_out(tmp_path: Path, browser: str, axe: str) -> None:
    async with by_provider(tmp_path, browser) as (desk, context, page, base):
        said: list[str] = []
        page.on("console", lambda message: said.append(message.text))
        await page.goto(f"{base}/ui/destinations?query=ci")
        assert await page.text_content("h1") == "Sign in"
        assert await findings(page, axe) == []
        assert [each for each in said if "401" not in each] == []
        await through_the_provider(page, "ada")
        await page.wait_for_url(f"{base}/ui/destinations?query=ci")
        assert "ada@example.com" in (await page.text_content(".who") or "")
        assert "operator" in (await page.text_content(".who") or "")
        assert await findings(page, axe) == []
        cookies = {each["name"]: each for each in await context.cookies(base)}
        session = cookies["__Host-signed-in"]
        assert (session["secure"], session["httpOnly"], session["sameSite"], session["path"]) == (
            True,
            True,
            "Lax",
            "/",
        )
        assert session["domain"] == "gateway.localhost"
        assert "__Host-signing-in" not in cookies
        assert await page.evaluate("document.cookie") == ""
        # A form of a page works at once, and after a reload.
        await page.goto(f"{base}/ui/destinations/ci")
        await page.click("summary")
        await page.click("button:text-is('Pause')")
        await page.wait_for_selector("text=Paused by ada@example.com")
        await page.click("text=Sign out")
        await page.wait_for_selector("text=You are signed out here")
        assert await findings(page, axe) == []
        await page.goto(f"{base}/ui/destinations")
        assert await page.text_content("h1") == "Sign in"
        assert desk.refused[Refusal.BAD_STATE] == 0


async def test_whom_the_provider_does_not_vouch_for_is_told_so(tmp_path: Path, browser: str) -> None:
    async with by_provider(tmp_path, browser) as (desk, context, page, base):
        await page.goto(f"{base}/ui")
        await through_the_provider(page, "eve")
        await page.wait_for_selector("text=email_verified: it isn't true")
        assert desk.refused[Refusal.BAD_ID_TOKEN] == 1
        await page.go_back()
        await context.clear_cookies()
        await page.goto(f"{base}/ui")
        await through_the_provider(page, "bob")
        await page.wait_for_url(f"{base}/ui")
        assert "viewer" in (await page.text_content(".who") or "")


async def test_a_link_from_another_site_finds_who_is_signed_in(tmp_path: Path, browser: str) -> None:
    async with by_provider(tmp_path, browser) as (_, _context, page, base):
        await page.goto(f"{base}/ui")
        await page.fill("#credential", TOKEN)
        await page.click("text=Sign in with a token")
        await page.wait_for_url(f"{base}/ui")
        assert "deploys" in (await page.text_content(".who") or "")
        await page.goto("about:blank")
        await page.set_content(
            f'<a href="{base}/ui/rules">Look</a><form method=post action="{base}/ui/sign-out"><button>'
        )
        await page.click("button")
        await page.wait_for_selector("h1:text-is('Sign in')")  # no cookie came with it
        await page.goto("about:blank")
        await page.set_content(f'<a href="{base}/ui/rules">Look</a>')
        await page.click("text=Look")
        await page.wait_for_url(f"{base}/ui/rules")
        assert "deploys" in (await page.text_content(".who") or "")


async def test_a_live_page_shows_that_a_session_has_ended(tmp_path: Path, browser: str) -> None:
    async with desk_of(tmp_path, with_token(TOKENS, OTHER)) as desk, opened(browser) as (_, page):
        await page.goto(f"{desk.base}/ui/destinations/ci")
        await page.fill("#credential", TOKEN)
        await page.click("text=Sign in with a token")
        await page.wait_for_url(f"{desk.base}/ui/destinations/ci")
        await page.click("summary")
        await page.click("text=Retry what waits now")
        await page.wait_for_selector('[data-live="1"]')
        await desk.change(without_token(desk.file.read_text(), "deploys"))
        await page.wait_for_selector("text=Your session has ended")
