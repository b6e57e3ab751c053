"""Which page is at which path below `/ui`."""

from gateway.console import (
    act_pages,
    dead_letter_pages,
    event_pages,
    event_test_page,
    name_pages,
    overview_page,
    rules_page,
    try_page,
)
from gateway.console.page import Act, Show

PAGES: tuple[tuple[str, Show], ...] = (
    ("", overview_page.overview),
    ("/events", event_pages.events),
    ("/events/{event}", event_pages.event),
    ("/events/{event}/body", event_pages.body),
    ("/events/{event}/test", event_test_page.event_test),
    ("/events/{event}/test/files", event_test_page.event_test_files),
    ("/attempts/{position}", event_pages.attempt),
    ("/destinations", name_pages.destinations),
    ("/destinations/{name}", name_pages.destination),
    ("/routes", name_pages.routes),
    ("/routes/{name}", name_pages.route),
    ("/dead-letters", dead_letter_pages.dead_letters),
    ("/dead-letters/review", act_pages.review),
    ("/dead-letters/{position}", dead_letter_pages.dead_letter),
    ("/sources", name_pages.sources),
    ("/sources/{name}", name_pages.source),
    ("/rules", rules_page.rules),
    ("/rules/try", try_page.form),
    ("/orders/{order}", act_pages.order),
)
ACTS: tuple[tuple[str, Act], ...] = (
    ("/events/{event}/redeliver", act_pages.redeliver),
    ("/destinations/{name}/{act}", act_pages.on_destination),
    ("/routes/{name}/{act}", act_pages.on_route),
    ("/dead-letters/{act}", act_pages.on_dead_letters),
    ("/sources/{name}/refused/retry", act_pages.on_refused),
    ("/rules/try", try_page.tried),
)
