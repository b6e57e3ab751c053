# /// script
# requires-python = ">=3.11"
# dependencies = ["matplotlib>=3.9"]
# ///
"""Draw the dashboards from a running Prometheus with the queries of boards.py, for documents.

make stack
uv run deploy/grafana/plot.py --prometheus http://127.0.0.1:9090 --minutes 5 docs/images
"""
# ruff: noqa: T201 - a script

import argparse
import json
import math
import sys
import textwrap
import time
import urllib.parse
import urllib.request
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, MaxNLocator, PercentFormatter

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from deploy.grafana.boards import BOARDS, Board, Panel

POINTS = 150
SERIES = 6
"""Maximum series per panel, the largest ones: more couldn't be distinguished."""
GAP = 10.0
ROOM = 1.45
"""Height of the graph relative to the highest value: leaves room for the legend."""
COLUMNS = 3
INK, PAPER, LINES = "#33383d", "#ffffff", "#e3e6e8"
FORMATS: dict[str, Any] = {
    "s": EngFormatter(unit="s", sep=""),
    "bytes": EngFormatter(unit="B", sep=""),
    "percentunit": PercentFormatter(1.0, decimals=None),
    "reqps": EngFormatter(unit="/s", sep=""),
    "ops": EngFormatter(unit="/s", sep=""),
    "none": EngFormatter(sep=""),
}


def draw(board: Board, prometheus: str, minutes: float, folder: Path) -> Path:
    """Write one dashboard as a picture."""
    rows = math.ceil(len(board.panels) / COLUMNS)
    figure, axes = plt.subplots(rows, COLUMNS, figsize=(15, 2.7 * rows), squeeze=False, layout="constrained")
    figure.suptitle(board.title, x=0.01, ha="left", fontsize=14, fontweight="bold")
    for place in axes.flat[len(board.panels) :]:
        place.remove()
    for place, panel in zip(axes.flat, board.panels, strict=False):
        _draw_panel(place, panel, prometheus, minutes)
    path = folder / f"{board.file.stem}.png"
    figure.savefig(path, dpi=80, facecolor=PAPER)
    plt.close(figure)
    return path


def _draw_panel(axes: Axes, panel: Panel, prometheus: str, minutes: float) -> None:
    axes.set_title(panel.title, loc="left", fontsize=10, color=INK)
    lines = [
        (_label(query.legend, each["metric"]), [(float(at), float(value)) for at, value in each["values"]])
        for query in panel.queries
        for each in ask(prometheus, query.at(rate_interval="20s"), minutes)
    ]
    lines.sort(key=lambda line: -max(value for _, value in line[1]))
    for label, points in lines[:SERIES]:
        # While a series is missing, there is no line.
        times, values = [points[0][0]], [points[0][1]]
        for (before, _), (at, value) in pairwise(points):
            if at - before > GAP:
                times.append(before)
                values.append(math.nan)
            times.append(at)
            values.append(value)
        axes.plot([(at - time.time()) / 60 for at in times], values, linewidth=1.4, label=label)
    axes.set_xlim(-minutes, 0)
    highest = max([value for _, points in lines for _, value in points if not math.isnan(value)], default=0)
    axes.set_ylim(bottom=0, top=(highest or 1) * ROOM)
    axes.yaxis.set_major_locator(MaxNLocator(4, integer=panel.unit == "none"))
    axes.yaxis.set_major_formatter(FORMATS[panel.unit])
    axes.tick_params(labelsize=7, length=0, colors=INK)
    axes.grid(color=LINES, linewidth=0.8)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.legend(fontsize=6, frameon=False, loc="upper left", ncols=2)


def _label(legend: str, labels: dict[str, str]) -> str:
    for name, value in labels.items():
        legend = legend.replace(f"{{{{{name}}}}}", value)
    return textwrap.shorten(legend, 48)


def ask(prometheus: str, expr: str, minutes: float) -> list[dict[str, Any]]:
    """Return the series of a query over the last minutes."""
    now = time.time()
    query = {"query": expr, "start": now - minutes * 60, "end": now, "step": max(1.0, minutes * 60 / POINTS)}
    with urllib.request.urlopen(f"{prometheus}/api/v1/query_range?{urllib.parse.urlencode(query)}") as response:  # noqa: S310 - the address is our own
        found: list[dict[str, Any]] = json.load(response)["data"]["result"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--prometheus", default="http://127.0.0.1:9090", metavar="URL")
    parser.add_argument("--minutes", type=float, default=5.0, help="how far to look back (5)")
    parser.add_argument("folder", type=Path, help="where the pictures go")
    options = parser.parse_args()
    mpl.use("Agg")
    options.folder.mkdir(parents=True, exist_ok=True)
    for board in BOARDS:
        print(draw(board, options.prometheus, options.minutes, options.folder))


if __name__ == "__main__":
    main()
