"""Traffic for people: rates, shares, and charts of bars that the server draws. Pure."""

from collections.abc import Sequence
from typing import Literal

from markupsafe import Markup

from gateway.api.traffic_shapes import Traffic, TrafficStep
from gateway.console.text import exact, plural, unix

BAR, HEIGHT = 4, 24
"""Of a chart: the width of a step, and the height of the highest, in its own units."""
Counted = Literal["received", "deliveries", "attempts"]
_BAD: dict[Counted, str] = {"deliveries": "died", "attempts": "failed"}
_TOLD: dict[Counted, tuple[str, str]] = {
    "received": ("event", ""),
    "deliveries": ("delivery", "dead"),
    "attempts": ("attempt", "failed"),
}


def rate(count: int, traffic: Traffic) -> str:
    """Return how many there were in a second, a minute, an hour or a day, whichever says the most; "" for none."""
    seconds = unix(traffic.until) - unix(traffic.since)
    if count == 0 or seconds < 1:
        return ""
    a_second = count / seconds
    for unit, name in ((1, "s"), (60, "min"), (3600, "h")):
        if a_second * unit >= 1:
            return f"{a_second * unit:,.1f}".removesuffix(".0") + f"/{name}"
    return f"{a_second * 86_400:,.1f}".removesuffix(".0") + "/d"


def success(traffic: Traffic, *, of: Counted = "deliveries") -> str | None:
    """Return which share of what has been decided has succeeded (`99.5 %`); None if only failures are recorded.

    "" if nothing has been decided.
    """
    if traffic.attempts_recorded == "failures":
        return None
    if of == "attempts":
        good, bad = traffic.attempts.made - traffic.attempts.failed, traffic.attempts.failed
    else:
        good, bad = traffic.deliveries.delivered, traffic.deliveries.died + traffic.deliveries.dropped
    if good + bad == 0:
        return ""
    # What isn't all, or isn't none, isn't told as if it were.
    text = f"{min(max(100 * good / (good + bad), 0.1 if good else 0.0), 99.9 if bad else 100.0):.1f}"
    return f"{text.removesuffix('.0')} %"


def chart(traffic: Traffic, counted: Counted) -> Markup:
    """Return a chart of bars, one a step: what is bad of it is drawn as the lower part. Its title says the numbers."""
    every = [_count(step, counted) for step in traffic.steps]
    bad = [_count(step, _BAD[counted]) if counted in _BAD else 0 for step in traffic.steps]
    most = max(every, default=0)
    what, how = _TOLD[counted]
    told = plural(sum(every), what, {"delivery": "deliveries"})
    title = f"{told} since {exact(traffic.since)[:16]} UTC, at most {most:,} {_a_step(traffic)}"
    if sum(bad):
        title += f"; {sum(bad):,} {how}"
    width = BAR * len(every)
    drawn = Markup('<path d="{}"/><path class="bad" d="{}"/>').format(_bars(every, most), _bars(bad, most))
    return Markup(
        '<svg class="chart" role="img" viewBox="0 0 {} {}" preserveAspectRatio="none"><title>{}</title>{}'
        '<path class="base" d="M0 {}h{}"/></svg>'
    ).format(width, HEIGHT + 1, title, drawn, HEIGHT + 0.5, width)


def _a_step(traffic: Traffic) -> str:
    return {300: "in 5 minutes", 3600: "in an hour"}.get(traffic.step_seconds, "in a day")


def _count(step: TrafficStep, name: str) -> int:
    return getattr(step, name) or 0


def _bars(counts: Sequence[int], most: int) -> str:
    """Return the path of bars; what isn't nothing is seen."""
    parts: list[str] = []
    for number, count in enumerate(counts):
        if count:
            height = max(1, round(HEIGHT * count / most))
            parts.append(f"M{BAR * number} {HEIGHT - height}h{BAR - 1}v{height}h-{BAR - 1}z")
    return "".join(parts)
