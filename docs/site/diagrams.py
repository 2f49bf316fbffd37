"""docs/images: the diagrams, and the plots of docs/performance.md.

`python docs/site/diagrams.py` draws them anew; a test fails while the files differ. Plots take their figures from the
table of the page, so they cannot disagree with it. The pictures use the reader's fonts and follow the colour scheme of
the reader's system; they are narrow, so that a phone shows their words in a readable size.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from xml.sax.saxutils import escape

PAGES = Path(__file__).parents[1]
IMAGES = PAGES / "images"

_STYLE = """\
text { font: 14px system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; fill: #1f2933 }
.small { font-size: 12px } .dim { fill: #52606d } .strong { font-weight: 600 } .code { font-family: monospace }
.on { fill: #ffffff }
.box { fill: #ffffff; stroke: #52606d; stroke-width: 1.5 }
.frame { fill: #e6f4f1; stroke: #00897b; stroke-width: 1.5 }
.main { fill: #00796b; stroke: none } .second { fill: #8fd0c7; stroke: none }
.third { fill: none; stroke: #9aa5b1; stroke-dasharray: 4 3 }
.line { fill: none; stroke: #52606d; stroke-width: 1.5 } .head { fill: #52606d }
@media (prefers-color-scheme: dark) {
  text { fill: #e4e7eb } .dim { fill: #b8c2cc } .on { fill: #ffffff }
  .box { fill: #2b3440; stroke: #9aa5b1 } .frame { fill: #12312d; stroke: #4db6ac }
  .main { fill: #00796b } .second { fill: #4d5d6b } .line { stroke: #b8c2cc } .head { fill: #b8c2cc }
}"""


class Picture:
    """An SVG in the making; lengths are pixels at full size."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self._head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
            f'height="{height}" role="img">\n<title>{escape(title)}</title>\n<style>\n{_STYLE}\n</style>\n'
        )
        self._parts: list[str] = []

    def text(self, x: float, y: float, text: str, look: str = "", anchor: str = "middle") -> None:
        """Write one line whose baseline is at ``y``."""
        self._parts.append(f'<text x="{x:g}" y="{y:g}" class="{look}" text-anchor="{anchor}">{escape(text)}</text>')

    def box(self, x: float, y: float, width: float, height: float, *lines: str, look: str = "box") -> None:
        """Draw a box with its first line strong and the others small, in its middle."""
        self._parts.append(f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="5" class="{look}"/>')
        on = " on" if look == "main" else ""
        top = y + height / 2 + 5 - 8 * (len(lines) - 1)
        for number, line in enumerate(lines):
            self.text(
                x + width / 2,
                top + 16 * number,
                line,
                ("small" if number else "" if look == "second" else "strong") + on,
            )

    def arrow(self, *points: tuple[float, float]) -> None:
        """Draw a line through these points, the last of which is the tip."""
        (x0, y0), (x1, y1) = points[-2:]
        step = ((x1 > x0) - (x1 < x0), (y1 > y0) - (y1 < y0))  # lines are horizontal or vertical
        back = (x1 - 8 * step[0], y1 - 8 * step[1])
        way = " ".join(f"{x:g},{y:g}" for x, y in (*points[:-1], back))
        side = (4 * step[1], 4 * step[0])
        tip = f"{x1:g},{y1:g} {back[0] + side[0]:g},{back[1] + side[1]:g} {back[0] - side[0]:g},{back[1] - side[1]:g}"
        self._parts.append(f'<polyline points="{way}" class="line"/><polygon points="{tip}" class="head"/>')

    def line(self, x0: float, y0: float, x1: float, y1: float) -> None:
        """Draw a thin line."""
        self._parts.append(f'<line x1="{x0:g}" y1="{y0:g}" x2="{x1:g}" y2="{y1:g}" class="third"/>')

    def __str__(self) -> str:
        return self._head + "\n".join(self._parts) + "\n</svg>\n"


def overview() -> Picture:
    """Where smtp-dup stands and what it does."""
    p = Picture(
        560, 320, "Mail goes through the relay inline to the old server; workers deliver a stored copy to the new one"
    )
    p.box(190, 4, 180, 312, look="frame")
    p.text(280, 25, "smtp-dup", "strong")
    p.box(4, 40, 118, 54, "Postfix", "or another MTA")
    p.box(206, 40, 148, 54, "relay", "port 2525")
    p.box(438, 40, 118, 54, "old server", "primary")
    p.box(206, 142, 148, 54, "Redis", "ledger and RQ queues")
    p.box(206, 246, 148, 54, "workers", "one set per backup")
    p.box(438, 246, 118, 54, "new server", "backup")
    p.box(4, 246, 118, 54, "failed list", "you decide")
    p.arrow((122, 58), (206, 58))
    p.arrow((206, 78), (122, 78))
    p.arrow((354, 58), (438, 58))
    p.arrow((438, 78), (354, 78))
    p.text(403, 52, "inline", "small dim")
    p.text(403, 95, "its replies", "small dim")
    p.text(156, 95, "same", "small dim")
    p.text(156, 110, "replies", "small dim")
    p.text(156, 36, "transport", "small dim")
    p.text(156, 51, "map", "small dim")
    p.arrow((280, 94), (280, 142))
    p.text(288, 115, "a copy,", "small dim", "start")
    p.text(288, 130, "stored first", "small dim", "start")
    p.arrow((280, 196), (280, 246))
    p.text(288, 225, "later", "small dim", "start")
    p.arrow((354, 273), (438, 273))
    p.text(403, 266, "retried", "small dim")
    p.arrow((206, 273), (122, 273))
    p.text(156, 266, "refused", "small dim")
    return p


_PHASES = (  # step, name, lasts, the old server, the new server
    ("1", "prepare", "days", "answers", ""),
    ("2", "one domain", "a week", "answers", "one domain"),
    ("3-5", "all mail", "weeks", "answers", "gets copies"),
    ("6", "cut over", "weeks", "gets copies", "answers"),
    ("7", "switch off", "", "", "answers"),
)


def phases() -> Picture:
    """Who answers and who gets copies, step by step."""
    p = Picture(560, 226, "The phases of a migration: which server answers and which gets copies")
    left, wide = 52, 101.6
    p.text(0, 92, "old", "strong", "start")
    p.text(0, 142, "new", "strong", "start")
    for number, (step, name, lasts, *servers) in enumerate(_PHASES):
        x = left + number * wide
        p.text(x + wide / 2, 18, step, "strong")
        p.text(x + wide / 2, 38, name)
        p.text(x + wide / 2, 56, lasts, "small dim")
        for row, what in enumerate(servers):
            look = {"answers": "main", "": "third"}.get(what, "second")
            p.box(x + 2, 66 + 50 * row, wide - 4, 42, *([what] if what else []), look=look)
    for number, way in ((1, "transport map"), (2, "transport map"), (3, "one setting")):
        x = left + number * wide
        p.arrow((x + wide / 2, 164), (x + wide / 2, 176), (x - wide / 2 + 8, 176), (x - wide / 2 + 8, 164))
        p.text(x + 4, 192, way, "small dim")
    p.text(
        left + 2 * wide + wide / 2,
        216,
        "Each of these steps can be taken back, by what stands under its arrow.",
        "small dim",
    )
    return p


_SHAPES = {  # picture -> title, servers, what mail there is and what each server does with it
    "route-one.svg": (
        "One new server: the old one answers for all mail, the new one gets a copy",
        ("old", "new"),
        (("all mail", "answers", "copy"),),
    ),
    "route-order.svg": (
        "Several servers in order: the first that can be used answers, all others get a copy",
        ("a", "b", "c"),
        (("as a rule", "answers", "copy", "copy"), ("while a is away", "copy, later", "answers", "copy")),
    ),
    "route-moved.svg": (
        "Mailbox by mailbox: the new server answers for those who have moved, and both have all mail",
        ("old", "new"),
        (("anna, moved", "copy", "answers"), ("all others", "answers", "copy")),
    ),
    "route-shop.svg": (
        "A domain elsewhere: its own server answers, and its own archive gets copies",
        ("old", "new", "shop", "archive"),
        (("shop.example", "", "", "answers", "copy"), ("all others", "answers", "copy", "", "")),
    ),
    "route-weights.svg": (
        "Weights: three of four mailboxes at a, one at b, and each server has all mail",
        ("a, weight 3", "b, weight 1"),
        (("3 of 4 people", "answers", "copy"), ("1 of 4 people", "copy", "answers")),
    ),
    "route-standby.svg": (
        "Disaster recovery: the standby has all mail, and answers while the site is away",
        ("site", "standby"),
        (("as a rule", "answers", "copy"), ("site is away", "copy, later", "answers")),
    ),
}


def shape(title: str, servers: tuple[str, ...], rows: tuple[tuple[str, ...], ...]) -> Picture:
    """Who answers for which mail and who gets copies, a row for each kind of mail."""
    p = Picture(560, 40 + 50 * len(rows), title)
    left = 116
    wide = (560 - left) / len(servers)
    for column, name in enumerate(servers):
        p.text(left + column * wide + wide / 2, 22, name, "strong")
    for number, (mail, *cells) in enumerate(rows):
        y = 34 + 50 * number
        p.text(0, y + 26, mail, "", "start")
        for column, what in enumerate(cells):
            look = {"answers": "main", "": "third"}.get(what, "second")
            p.box(left + column * wide + 2, y, wide - 4, 42, *([what] if what else []), look=look)
    return p


# Plots --------------------------------------------------------------------------------------------------------


def measured() -> list[tuple[str, list[float], list[float]]]:
    """Return what the first table of docs/performance.md says: name, messages a second, milliseconds a message."""
    page = (PAGES / "performance.md").read_text(encoding="utf-8")
    table = page[page.index("| new connections, msg/s |") :].splitlines()[2:]
    rows = []
    for line in table:
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) != 4:
            break
        rates = [float(cell.replace(",", "")) for cell in cells[1:3]]
        times = [float(number) for number in re.findall(r"[\d.]+", cells[3])]
        if len(times) == 2:  # the bare tools have none
            rows.append((re.sub(r" \(.*?\)|, no durability, pooled", "", cells[0]), rates, times))
    return rows


def bars(title: str, rows: list[tuple[str, list[float]]]) -> Picture:
    """Draw two bars for each row: new connections and kept ones."""
    p = Picture(560, 44 + 66 * len(rows), title)
    p.text(0, 16, title, "strong", "start")
    p.box(360, 6, 12, 12, look="second")
    p.text(378, 16, "new", "small dim", "start")
    p.box(430, 6, 12, 12, look="main")
    p.text(448, 16, "kept connections", "small dim", "start")
    scale = 480 / max(value for _, values in rows for value in values)
    for number, (name, values) in enumerate(rows):
        y = 36 + 66 * number
        p.text(0, y + 12, name, "strong" if name == "smtp-dup" else "", "start")
        for row, (value, look) in enumerate(zip(values, ("second", "main"), strict=True)):
            p.box(0, y + 19 + 18 * row, round(value * scale, 1), 15, look=look)
            p.text(round(value * scale, 1) + 6, y + 31 + 18 * row, f"{value:,g}", "small", "start")
    return p


_ROOMS = {  # what each room is for; their floors are the contract in pyproject.toml
    "relay.command": "the command smtp-dup",
    "relay.demo": "smtp-dup demo",
    "relay.daemon": "processes, supervisor",
    "relay.page": "the cockpit in a browser",
    "relay.server": "one relay process",
    "relay.monitoring": "health, metrics, probes",
    "relay.cockpit": "what an operator sees: flow, readiness",
    "workers": "delivery of the copies",
    "relay.smtpd": "the client's side, MAIL to dot",
    "relay.routing": "who answers for which mail",
    "relay.spool": "messages as files",
    "relay.topology": "who is the primary now",
    "relay.trace": "each message's life",
    "relay.handover": "copies for a first try",
    "relay.ledger": "every key, every change of a copy",
    "relay.redisio": "Redis as a server",
    "relay.client": "the other servers' side",
    "relay.config": "options, settings",
    "relay.mail": "values: reply, envelope, record",
}


def rooms() -> Picture:
    """The packages, floor by floor: each imports only what is below it."""
    contracts = tomllib.loads((PAGES.parent / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]
    floors = [layer.split(" | ") for layer in contracts["contracts"][0]["layers"]]
    p = Picture(480, 54 * len(floors) + 8, "The rooms of smtp-dup; each imports only what is below it")
    for number, floor in enumerate(floors):
        width = 464 / len(floor)
        for place, name in enumerate(floor):
            look = "frame" if name.startswith("workers") else "box"
            p.box(8 + place * width, 8 + 54 * number, width - 8 * (len(floor) > 1), 44, name, _ROOMS[name], look=look)
    return p


def pictures() -> dict[str, str]:
    """Return every picture by its file's name."""
    rows = measured()
    return {
        "overview.svg": str(overview()),
        "phases.svg": str(phases()),
        **{name: str(shape(*what)) for name, what in _SHAPES.items()},
        "rooms.svg": str(rooms()),
        "throughput.svg": str(bars("Messages a second", [(name, rates) for name, rates, _ in rows])),
        "processor-time.svg": str(bars("Milliseconds a message", [(name, times) for name, _, times in rows])),
    }


def main() -> None:
    """Write the pictures."""
    for name, text in pictures().items():
        (IMAGES / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
