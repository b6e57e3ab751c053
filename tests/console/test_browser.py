"""The console in a real browser: what it asks for, what a keyboard reaches, and what axe finds."""

import asyncio
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from playwright.async_api import BrowserContext, Page, async_playwright

from tests.api.test_spools import SPOOL
from tests.console.conftest import Console, console_of
from tests.console.furnished import HOLDS, RULES, furnished

pytestmark = pytest.mark.rotated(share=1 / 6, group="browser")

PHONE = {"width": 390, "height": 844}
DESK = {"width": 1280, "height": 860}
IMAGES = Path(__file__).parent.parent.parent / "docs" / "images"


class Visitor:
    """Somebody with a browser. `strayed` are requests that left the console, `said` what the browser complained of."""

    def __init__(self, console: Console, context: BrowserContext, page: Page, axe: str) -> None:
        self.console = console
        self.context = context
        self.page = page
        self.base = f"http://127.0.0.1:{console.client.port}"
        self.strayed: list[str] = []
        self.said: list[str] = []
        self._axe = axe
        page.on(
            "request", lambda request: None if request.url.startswith(self.base) else self.strayed.append(request.url)
        )
        page.on("console", lambda message: self.said.append(message.text))
        page.on("pageerror", lambda error: self.said.append(str(error)))

    async def go(self, path: str) -> None:
        await self.page.goto(self.base + path)

    async def findings(self) -> list[str]:
        """Return what axe has against the page, and whether the page is wider than the screen."""
        # Run by the debugger, which the page's policy doesn't bind.
        found: dict[str, Any] = await self.page.evaluate(
            self._axe + "; axe.run(document, {runOnly: ['wcag2a', 'wcag2aa', 'wcag21a', 'wcag21aa', 'wcag22aa',"
            " 'best-practice']})"
        )
        problems = [
            f"{self.page.url}: {each['id']}: {each['help']}: {node['html'][:200]}"
            for each in found["violations"]
            for node in each["nodes"]
        ]
        width = await self.page.evaluate("document.documentElement.scrollWidth - innerWidth")
        return [*problems, *([f"{self.page.url}: {width} pixels too wide"] if width > 0 else [])]

    async def press(self, *keys: str) -> None:
        for key in keys:
            await self.page.keyboard.press(key)


@asynccontextmanager
async def visiting(
    console: Console, browser: str, axe: str, *, viewport: dict[str, int] | None = None, scheme: str = "light"
) -> AsyncIterator[Visitor]:
    async with async_playwright() as playwright:
        opened = await playwright.chromium.connect_over_cdp(browser)
        context = await opened.new_context(
            viewport=viewport or DESK,  # type: ignore[arg-type]
            color_scheme=scheme,  # type: ignore[arg-type]
            reduced_motion="reduce",
        )
        context.set_default_timeout(10_000)
        visitor = Visitor(console, context, await context.new_page(), axe)
        yield visitor
        await context.close()
        assert visitor.strayed == []
        assert visitor.said == []


@pytest.fixture
async def day(tmp_path: Path) -> AsyncIterator[tuple[Console, dict[str, str]]]:
    """A console on a day when not all is well, and the ids of events to look at."""
    company, _, shown = await furnished()
    async with console_of(company, tmp_path, RULES, HOLDS) as console:
        await console.refresh()
        yield console, shown


def pages_of(shown: dict[str, str]) -> Sequence[tuple[str, str]]:
    """Return every page, by the name of its picture."""
    return (
        ("overview", "/ui"),
        ("events", "/ui/events"),
        ("events-wrong", "/ui/events?query=sorce:x"),
        ("events-none", "/ui/events?query=zebra"),
        ("event", f"/ui/events/{shown['dead']}"),
        ("event-waiting", f"/ui/events/{shown['waiting']}"),
        ("event-routes", f"/ui/events/{shown['dead']}?tab=routes"),
        ("event-body", f"/ui/events/{shown['dead']}?tab=body"),
        ("event-hex", f"/ui/events/{shown['dead']}?tab=body&view=hex"),
        ("event-headers", f"/ui/events/{shown['dead']}?tab=headers"),
        ("event-test", f"/ui/events/{shown['dead']}/test"),
        ("destinations", "/ui/destinations"),
        ("destination", "/ui/destinations/crm"),
        ("destination-paused", "/ui/destinations/warehouse"),
        ("routes", "/ui/routes"),
        ("route", "/ui/routes/book-charges"),
        ("dead-letters", "/ui/dead-letters"),
        ("dead-letters-none", "/ui/dead-letters?destination=ci"),
        ("sources", "/ui/sources"),
        ("source", "/ui/sources/stripe"),
        ("rules", "/ui/rules"),
        ("rules-route", "/ui/rules?kind=route&name=book-charges#found"),
        ("try", f"/ui/rules/try?event={shown['dead']}"),
        ("review", "/ui/dead-letters/review?act=drop"),
        ("command", "/ui/commands/pause%2Fdestination%2Fwarehouse"),
        ("missing", "/ui/events/none"),
    )


@pytest.mark.timeout(180)
@pytest.mark.parametrize(("viewport", "scheme"), [(DESK, "light"), (PHONE, "dark")], ids=["desk-light", "phone-dark"])
async def test_axe_finds_nothing_on_any_page(
    day: tuple[Console, dict[str, str]], browser: str, axe: str, viewport: dict[str, int], scheme: str
) -> None:
    console, shown = day
    found: list[str] = []
    async with visiting(console, browser, axe, viewport=viewport, scheme=scheme) as visitor:
        for _, path in pages_of(shown):
            await visitor.go(path)
            found += await visitor.findings()
        await visitor.go("/ui/dead-letters")
        await visitor.page.click("a.row >> nth=0")
        await visitor.page.wait_for_selector("text=Unprocessable Entity")
        found += await visitor.findings()
        console.backend.process, console.backend.spool = "gateway-ingress-0:9090", lambda: SPOOL
        await visitor.go("/ui")
        found += await visitor.findings()
        visitor.said = [each for each in visitor.said if "404" not in each]
    assert found == []


PICTURES = (
    ("console-event", "event", DESK, "light"),
    ("console-overview", "overview", DESK, "dark"),
    ("console-phone", "events", PHONE, "light"),
    ("console-rules", "rules-route", DESK, "light"),
)


@pytest.mark.parametrize(("name", "page", "viewport", "scheme"), PICTURES, ids=[each[0] for each in PICTURES])
async def test_the_pictures_of_the_document_can_be_taken(  # noqa: PLR0917 - a picture's
    day: tuple[Console, dict[str, str]],
    browser: str,
    axe: str,
    tmp_path: Path,
    name: str,
    page: str,
    viewport: dict[str, int],
    scheme: str,
) -> None:
    """GATEWAY_TEST_PICTURES=1 puts them into docs/images."""
    console, shown = day
    folder = IMAGES if os.environ.get("GATEWAY_TEST_PICTURES") else tmp_path
    async with visiting(console, browser, axe, viewport=viewport, scheme=scheme) as visitor:
        await visitor.go(dict(pages_of(shown))[page])
        await visitor.page.screenshot(path=folder / f"{name}.png")
    assert (folder / f"{name}.png").stat().st_size > 10_000
    assert f"images/{name}.png" in (IMAGES.parent / "console.md").read_text(encoding="utf-8")


async def test_a_keyboard_reaches_everything(day: tuple[Console, dict[str, str]], browser: str, axe: str) -> None:
    console, _ = day
    async with visiting(console, browser, axe) as visitor:
        page = visitor.page
        await visitor.go("/ui/events")
        await visitor.press("Tab")
        assert await page.evaluate("document.activeElement.textContent") == "Skip to content"
        await visitor.press("Enter")
        assert await page.evaluate("document.activeElement.id") == "main"
        await visitor.press("/")
        await page.keyboard.type("type:charge.failed status:dead")
        await visitor.press("Enter")
        await page.wait_for_url("**/ui/events?query=**")
        await visitor.press("Escape", "j", "Enter")
        await page.wait_for_selector(".journey")
        assert "charge.failed" in await page.inner_text("h1")
        await visitor.press("g", "e")
        await page.wait_for_url(f"{visitor.base}/ui/events")


async def test_a_phone_has_a_menu(day: tuple[Console, dict[str, str]], browser: str, axe: str) -> None:
    console, _ = day
    async with visiting(console, browser, axe, viewport=PHONE) as visitor:
        page = visitor.page
        await visitor.go("/ui/events")
        assert not await page.is_visible("#nav")
        await page.click("text=Menu")
        assert await page.is_visible("#nav")
        assert await visitor.findings() == []
        await visitor.press("Escape")
        assert not await page.is_visible("#nav")


async def test_a_keyboard_pauses_and_resumes(day: tuple[Console, dict[str, str]], browser: str, axe: str) -> None:
    console, _ = day
    async with visiting(console, browser, axe) as visitor:
        page = visitor.page
        await visitor.go("/ui/destinations/ci")
        await page.focus("details.acts summary")
        await visitor.press("Enter", "Tab")
        await page.keyboard.type("they move house")
        assert await visitor.findings() == []
        await visitor.press("Tab", "Enter")
        await page.wait_for_selector("text=Paused by local")
        await page.focus("details.acts summary")
        await visitor.press("Enter", "Tab", "Tab", "Enter")
        await page.wait_for_selector("text=Being resumed")


async def test_dead_letters_are_chosen_and_replayed(
    day: tuple[Console, dict[str, str]], browser: str, axe: str
) -> None:
    console, _ = day
    async with visiting(console, browser, axe, viewport=PHONE) as visitor:
        page = visitor.page
        await visitor.go("/ui/dead-letters")
        await page.check("input[name=id] >> nth=1")
        await page.click("button[value=replay]")
        await page.wait_for_selector("text=Replay 1 dead letter?")
        await page.click("button:text('Replay them')")
        await page.wait_for_selector("text=No gateway has read it yet")
        assert await visitor.findings() == []


async def test_a_live_list_shows_what_arrives(day: tuple[Console, dict[str, str]], browser: str, axe: str) -> None:
    console, _ = day
    async with visiting(console, browser, axe) as visitor:
        page = visitor.page
        await visitor.go("/ui/events")
        await page.click("text=Go live")
        await page.wait_for_selector('[data-live="1"]')
        await console.company.event(type="just.arrived")
        await console.refresh()
        await page.wait_for_selector("text=just.arrived")


async def test_a_theme_is_chosen_without_a_script(day: tuple[Console, dict[str, str]], browser: str, axe: str) -> None:
    console, _ = day
    async with visiting(console, browser, axe) as visitor:
        page = visitor.page
        await visitor.context.route("**/*.js", lambda route: route.abort())
        await visitor.go("/ui/events?since=24h")
        before = await page.evaluate("getComputedStyle(document.body).backgroundColor")
        await page.click("button:text('Dark')")
        await page.wait_for_selector("html[data-theme=dark]")
        assert page.url.endswith("/ui/events?since=24h")
        assert await page.evaluate("getComputedStyle(document.body).backgroundColor") != before
        visitor.said.clear()  # of the script that was kept away


async def test_hostile_text_runs_nothing(day: tuple[Console, dict[str, str]], browser: str, axe: str) -> None:
    console, _ = day
    hostile = "<img src=//evil.example/x onerror=alert(1)><script src=//evil.example/></script>\u202e"
    event, *_ = await console.company.event(type=hostile, key=hostile, body=hostile.encode(), headers={"X-A": hostile})
    await console.refresh()
    async with visiting(console, browser, axe) as visitor:
        visitor.page.on("dialog", lambda _: visitor.strayed.append("a dialog"))
        for path in ("", "?tab=body", "?tab=headers"):
            await visitor.go(f"/ui/events/{event.id}{path}")
            await asyncio.sleep(0)
        await visitor.go("/ui/events")
        assert await visitor.page.locator("text=<img src").count() == 2
