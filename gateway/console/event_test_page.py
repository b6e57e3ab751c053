"""An event as a test of the rules: its files to copy, or to download together."""

from io import BytesIO
from zipfile import ZIP_DEFLATED, ZipFile, ZipInfo

from gateway.api import event_tests as api
from gateway.console.asking import Asking
from gateway.console.body_views import download_name
from gateway.console.page import Download, Given, Page

MOST_SHOWN = 64 << 10
"""Characters of a file up to which it is shown on the page: a longer one is only in the download."""


async def event_test(asking: Asking, given: Given) -> Page:
    """Show the files of an event's test."""
    name = given.path["event"]
    found = await asking.ask(api.get_event_test, event=name)
    values = {"name": name, "test": found, "most": MOST_SHOWN, "folder": _folder_of(found)}
    return Page(template="event_test.html", title="Rule test", section="events", values=values)


async def event_test_files(asking: Asking, given: Given) -> Download:
    """Return the files of an event's test in one, as a folder."""
    found = await asking.ask(api.get_event_test, event=given.path["event"])
    folder = _folder_of(found)
    return Download(content=await asking.aside(lambda: _packed(found, folder)), name=f"{folder}.zip")


def _folder_of(test: api.EventTest) -> str:
    """Return the name of the folder, of an event's id from outside."""
    return download_name(test.files[0].name.removesuffix(".json")).removesuffix(".body")


def _packed(test: api.EventTest, folder: str) -> bytes:
    written = BytesIO()
    with ZipFile(written, "w", ZIP_DEFLATED) as archive:
        for each in test.files:
            # Of no time, so that the same test is the same file.
            entry = ZipInfo(f"{folder}/{each.name}")
            entry.compress_type, entry.external_attr = ZIP_DEFLATED, 0o600 << 16
            archive.writestr(entry, each.text)
    return written.getvalue()
