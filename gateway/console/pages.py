"""Which page is at which path below `/ui`, and where forms are sent."""

from gateway.api import acts
from gateway.api.explaining import explain_request
from gateway.api.quarantine_acts import retry_refused
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
from gateway.console.page import Post, Show

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
    ("/commands/{command}", act_pages.command),
)
POSTS: tuple[Post, ...] = (
    Post(path="/events/{event}/redeliver", act=act_pages.redeliver, function=acts.redeliver_event),
    Post(path="/destinations/{name}/{act}", act=act_pages.on_destination, function=acts.pause_destination),
    Post(path="/routes/{name}/{act}", act=act_pages.on_route, function=acts.pause_route),
    Post(path="/dead-letters/{act}", act=act_pages.on_dead_letters, function=acts.replay_dead_letters),
    Post(path="/sources/{name}/refused/retry", act=act_pages.on_refused, function=retry_refused),
    Post(path="/rules/try", act=try_page.tried, function=explain_request, most=try_page.MOST_BYTES),
)
