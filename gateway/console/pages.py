"""Which page is at which path below `/ui`."""

from gateway.console import dead_letter_pages, event_pages, name_pages, overview_page, rules_page
from gateway.console.page import Show

PAGES: tuple[tuple[str, Show], ...] = (
    ("", overview_page.overview),
    ("/events", event_pages.events),
    ("/events/{event}", event_pages.event),
    ("/events/{event}/body", event_pages.body),
    ("/attempts/{position}", event_pages.attempt),
    ("/destinations", name_pages.destinations),
    ("/destinations/{name}", name_pages.destination),
    ("/routes", name_pages.routes),
    ("/routes/{name}", name_pages.route),
    ("/dead-letters", dead_letter_pages.dead_letters),
    ("/dead-letters/{position}", dead_letter_pages.dead_letter),
    ("/sources", name_pages.sources),
    ("/sources/{name}", name_pages.source),
    ("/rules", rules_page.rules),
)
