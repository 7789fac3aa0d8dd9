"""How a run fared, to look at: one HTML file that needs nothing else, made from its journal.

Who sits where, what happened and what it cost, where the bytes of each rank came from at each move, and where the time
went, as pictures (SVG) and in words: tables and lists say all that the pictures show. No script: the page is read at
any width, by keyboard and by ear as it is. The rejected alternative, a dashboard that asks a server, would be gone with
the run; this stays in its folder.
"""

import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import Any

from raytron.metrics.accounting import KINDS, Goodput, Incident, goodput
from raytron.metrics.progress import short_time

__all__ = ["status_html", "status_page"]

Event = Mapping[str, Any]

MOST = 200  # incidents, generations and marks of a page: the newest
DRAWN = 4000  # stretches of the timeline: the longest
WIDTH, LANE, RANKS = 1000.0, 40.0, 60.0  # of the timeline, in its own units

COLOURS = {  # of the kinds of time: on light, on dark
    "useful": ("#2b6cb0", "#6aa9e9"),
    "start": ("#7c5cc4", "#a58bea"),
    "step": ("#d9480f", "#ff8a5c"),
    "detect": ("#c92a4b", "#ff7b93"),
    "release": ("#b36b00", "#e8a33d"),
    "wait": ("#495057", "#adb5bd"),
    "newcomers": ("#9a7b00", "#e3c64b"),
    "rendezvous": ("#2f855a", "#4cb782"),
    "move": ("#0b7285", "#3bc2d6"),
    "load": ("#a0529a", "#d891d2"),
    "redone": ("#8d5a3b", "#c99470"),
    "decide": ("#c2255c", "#f783ac"),
    "other": ("#8a8f98", "#7c828c"),
}
OUTCOMES = {
    "recovered": "recovered in place",
    "rewound": "went back to a checkpoint",
    "resized": "changed size or shape",
    "restarted": "actors started again",
    "unfinished": "not recovered",
}
SOURCES = {"own": "own memory", "twin": "twin", "replica": "replica", "owner": "only owner"}

_STYLE = """
:root { color-scheme: light dark; --page: #f6f6f8; --card: #fff; --line: #d9d9e0; --text: #1b1b22; --soft: #595966;
  --accent: #4338ca; %(light)s }
@media (prefers-color-scheme: dark) { :root { --page: #131318; --card: #1d1d24; --line: #3a3a46; --text: #ececf2;
  --soft: #a9a9b8; --accent: #a5a1ff; %(dark)s } }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 1rem; max-width: 72rem; background: var(--page); color: var(--text);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif }
h1 { font-size: 1.5rem; margin: 0 } h2 { font-size: 1.15rem; margin: 0 0 .6rem } h3 { font-size: 1rem; margin: 0 }
p { margin: .3rem 0 } .soft { color: var(--soft) } a { color: var(--accent) }
section { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 1rem; margin: 1rem 0 }
:focus-visible { outline: 3px solid var(--accent); outline-offset: 2px }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr)); gap: .6rem; margin: 1rem 0 0 }
dl div { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: .6rem .8rem }
dt { color: var(--soft); font-size: .85rem } dd { margin: 0; font-size: 1.25rem; font-weight: 600 }
.wide { overflow-x: auto; max-width: 100%%; margin: .6rem 0 }
table { border-collapse: collapse } caption { text-align: left; color: var(--soft); padding-bottom: .3rem }
th, td { text-align: left; padding: .25rem 1rem .25rem 0; vertical-align: top } thead th { color: var(--soft);
  font-weight: 600; border-bottom: 1px solid var(--line) } tbody th { font-weight: 500 }
td, dd { font-variant-numeric: tabular-nums } .number { text-align: right }
.number, .whole, thead th { white-space: nowrap }
.unseen { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%%); white-space: nowrap }
svg { display: block; width: 100%%; border-radius: 6px }
.bar { height: 34px } .lanes { height: 130px } .lanes text { fill: var(--text) }
.swatch { display: inline-block; width: .9em; height: .9em; border-radius: 3px; margin-right: .5em;
  vertical-align: -.08em }
.marks { position: relative; height: 1.7rem } .marks a { position: absolute; transform: translateX(-50%%);
  text-decoration: none; padding: 0 .25rem; line-height: 1.7rem; font-size: .9rem }
.axis { display: flex; justify-content: space-between; font-size: .8rem; color: var(--soft) }
.nodes { display: grid; grid-template-columns: repeat(auto-fill, minmax(13rem, 1fr)); gap: .7rem; padding: 0;
  list-style: none; margin: 0 0 1rem } .nodes > li { border: 1px solid var(--line); border-radius: 10px;
  padding: .6rem .8rem } .nodes ul { list-style: none; padding: 0; margin: .3rem 0 0 }
details { border-top: 1px solid var(--line); padding: .5rem 0 } summary { cursor: pointer; overflow-wrap: anywhere }
details[open] > summary { margin-bottom: .4rem } summary b { font-weight: 600 } .inner { padding-left: 1.1rem }
.mono { font-family: ui-monospace, Menlo, Consolas, monospace; font-size: .9em; overflow-wrap: anywhere }
%(classes)s
@media (max-width: 34rem) { body { padding: .6rem; font-size: 15px } section { padding: .8rem } .inner { padding: 0 } }
"""


def status_page(events: Sequence[Event], path: str | Path, title: str, refresh_s: int | None = None) -> None:
    """Write the page; it replaces an older one atomically. Arguments as of `status_html`."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.tmp")
    beside.write_text(status_html(events, title, refresh_s), encoding="utf-8")
    os.replace(beside, path)


def status_html(events: Sequence[Event], title: str, refresh_s: int | None = None) -> str:
    """The page of a run called `title`, whose journal `events` are (see accounting.py; of a run that is alive the last
    is an event "now"). With `refresh_s` a browser loads it again every so many seconds."""
    account = goodput(events)
    seats = [event for event in events if event["event"] == "seated"]
    refresh = f'<meta http-equiv="refresh" content="{int(refresh_s)}">' if refresh_s else ""
    body = "\n".join(
        [
            _head(events, account, seats, title),
            _where_time_went(account),
            _timeline(events, account, seats),
            _who_sits_where(seats),
            _incidents(account),
            _generations(seats),
        ]
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">{refresh}\n'
        f"<title>{escape(title)}: how it fared</title>\n<style>{_style()}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _style() -> str:
    light, dark = ("; ".join(f"--{kind}: {pair[i]}" for kind, pair in COLOURS.items()) for i in (0, 1))
    classes = "\n".join(f".{kind} {{ fill: var(--{kind}); background: var(--{kind}) }}" for kind in COLOURS)
    return _STYLE % {"light": light, "dark": dark, "classes": classes}


# ------------------------------------------------------------------------------------------------------------- sections


def _head(events: Sequence[Event], account: Goodput, seats: Sequence[Event], title: str) -> str:
    steps = max((event.get("steps", 0) for event in events), default=0)
    step = next((event["step"] for event in reversed(events) if "step" in event), 0)
    kinds = [incident.kind for incident in account.incidents]
    last = seats[-1] if seats else {}
    numbers = {
        "goodput": f"{account.share:.1%}",
        "time": short_time(account.wall_s),
        "step": f"{step:,} of {steps:,}" if steps else f"{step:,}",
        "recoveries": f"{len(kinds) - kinds.count('resized'):,}",
        "changes of size": f"{kinds.count('resized'):,}",
        "ranks": f"{len(last.get('ranks', ())):,}" + (f" + {len(last['spares'])}" if last.get("spares") else ""),
        "nodes": f"{len(last.get('nodes', ())):,}",
        "generation": f"{last.get('generation', 0):,}",
    }
    cells = "".join(f"<div><dt>{name}</dt><dd>{escape(value)}</dd></div>" for name, value in numbers.items())
    return (
        f"<header><h1>{escape(title)}</h1>\n<p>{escape(_standing(events))}</p>\n"
        '<p class="soft">Goodput is the time spent on steps that count, over all the time in which the run was alive.'
        f"</p>\n<dl>{cells}</dl></header>"
    )


def _standing(events: Sequence[Event]) -> str:
    if not events:
        return "Nothing is known of this run yet."
    last, starts = events[-1], max(1, sum(event["event"] == "began" for event in events))
    begun = f"begun {_date(events[0]['time'])}" + (f", started {starts} times" if starts > 1 else "")
    if last["event"] == "ended":
        why = last.get("why") or ""
        return f"Ended {_date(last['time'])}" + (f" with {why}" if why else "") + f"; {begun}."
    if last["event"] == "now":
        return f"Alive at {_date(last['time'])}; {begun}."
    return f"Alive, or cut off, after {_date(last['time'])}; {begun}."


def _where_time_went(account: Goodput) -> str:
    wall, at, bars, rows = account.wall_s, 0.0, [], []
    for kind, seconds in account.seconds.items():
        if seconds <= 0:
            continue
        said = f"{KINDS[kind]}: {_seconds(seconds)}, {seconds / wall:.2%}"
        width = WIDTH * seconds / wall
        bars.append(_rect(kind, at, 0, width, 34, said))
        at += width
        rows.append(
            f'<tr><th scope="row"><span class="swatch {kind}"></span>{escape(KINDS[kind])}</th>'
            f'<td class="number">{_seconds(seconds)}</td><td class="number">{seconds / wall:.2%}</td></tr>'
        )
    if not rows:
        return _section("time", "Where the time went", "<p>No time has gone by yet.</p>")
    picture = _svg("bar", 34, "Where the time went", f"One bar, {account.share:.1%} of it steps that count.", bars)
    table = _table("Where the time went", ("on what", "*seconds", "*share"), rows, seen=False)
    return _section("time", "Where the time went", picture + table)


def _timeline(events: Sequence[Event], account: Goodput, seats: Sequence[Event]) -> str:
    if not account.stretches:
        return ""
    scale = _Scale(account)
    stretches = sorted(account.stretches, key=lambda stretch: -stretch.seconds)[:DRAWN]
    bars = []
    for stretch in sorted(stretches, key=lambda stretch: (stretch.kind != "useful", stretch.start)):
        x = scale.x(stretch.start, stretch.start_of)
        width = max(scale.x(stretch.end, stretch.start_of) - x, 0.8)  # what is short is seen too
        said = f"{KINDS[stretch.kind]}, {_seconds(stretch.seconds)}"
        bars.append(_rect(stretch.kind, min(x, WIDTH - width), 0, width, LANE, said))
    bars.append(_ranks(events, scale))
    most = max((len(seat["ranks"]) for seat in seats), default=0)
    described = (
        f"From left to right {short_time(account.wall_s)}. Above, what was done when, steps and what interrupted them; "
        f"below, the number of ranks, up to {most}. The same is said in words under Faults, recoveries and changes."
    )
    picture = _svg("lanes", LANE + 10 + RANKS + 20, "Timeline", described, bars)
    ticks = "".join(f"<span>{_seconds(account.wall_s * part / 4)}</span>" for part in range(5))
    keys = "".join(
        f'<span style="white-space:nowrap;margin-right:1rem"><span class="swatch {kind}"></span>{escape(KINDS[kind])}'
        "</span>"
        for kind in dict.fromkeys(stretch.kind for stretch in account.stretches)
    )
    inner = (
        f'{_marks(account, scale)}{picture}<div class="axis" aria-hidden="true">{ticks}</div>'
        f'<p class="soft" aria-hidden="true">{keys}</p>'
        f'<p class="soft">Below: ranks, up to {most}. &#9660; leads to what happened there.</p>'
    )
    return _section("timeline", "Timeline", inner)


def _marks(account: Goodput, scale: "_Scale") -> str:
    marks = []
    for number, incident in _newest(account.incidents):
        left = 100 * scale.x(incident.at, scale.start_of(incident.at)) / WIDTH
        said = f"{OUTCOMES[incident.kind]} at {_clock(incident.at)}"
        sign = "&#9671;" if incident.kind == "resized" else "&#9660;"
        marks.append(
            f'<a href="#incident-{number}" style="left:{left:.3f}%" aria-label="{escape(said)}" title="{escape(said)}">'
            f"{sign}</a>"
        )
    return f'<nav class="marks" aria-label="What happened when">{"".join(marks)}</nav>' if marks else ""


def _ranks(events: Sequence[Event], scale: "_Scale") -> str:
    """The number of ranks over time, as an area."""
    points, number = [], 0
    for event in events:
        number += event["event"] == "began"
        if event["event"] == "seated":
            points.append((scale.x(event["time"], max(1, number)), len(event["ranks"])))
    if not points:
        return ""
    most, base, top = max(count for _, count in points) or 1, LANE + 10 + RANKS, LANE + 10
    path = [f"M{points[0][0]:.2f} {base:.2f}"]
    for (x, count), (after, _) in pairwise([*points, (WIDTH, 0)]):
        y = base - (base - top) * count / most
        path += [f"L{x:.2f} {y:.2f}", f"L{max(x, after):.2f} {y:.2f}"]
    return f'<path class="move" fill-opacity=".45" d="{"".join(path)}L{WIDTH:.2f} {base:.2f}Z"></path>'


def _who_sits_where(seats: Sequence[Event]) -> str:
    if not seats:
        return ""
    last = seats[-1]
    dp, pp, cp, tp = last["mesh"]
    unit = pp * cp * tp
    cards = []
    for at, (node, host) in enumerate(last["nodes"]):
        rows = [
            f"<li>rank {rank} <span class='soft'>unit {rank // unit}, {escape(place)}</span></li>"
            for rank, (place, where) in enumerate(last["ranks"])
            if where == at
        ]
        rows += [
            f"<li>spare <span class='soft'>{escape(place)}</span></li>"
            for place, where in last["spares"]
            if where == at
        ]
        cards.append(
            f"<li><h3 class='mono'>{escape(node[:8])}</h3><p class='soft mono'>{escape(host)}</p><ul>{''.join(rows)}"
            "</ul></li>"
        )
    names = [node[:8] for node, _ in last["nodes"]]
    rows = []
    for number in range(dp):
        own = list(enumerate(last["ranks"]))[number * unit : (number + 1) * unit]
        told = ", ".join(f"{rank}: {place} on {names[where]}" for rank, (place, where) in own)
        rows.append(f'<tr><th scope="row">{number}</th><td class="mono">{escape(told)}</td></tr>')
    return _section(
        "seats",
        "Who sits where",
        f"<p>{_shape(last['mesh'])}, generation {last['generation']}. A unit is one replica of the model.</p>"
        f"<ul class='nodes'>{''.join(cards)}</ul>" + _table("Units", ("unit", "rank: place on node"), rows),
    )


def _incidents(account: Goodput) -> str:
    title = "Faults, recoveries and changes"
    if not account.incidents:
        return _section("incidents", title, "<p>None.</p>")
    rows = []
    for kind, words in OUTCOMES.items():
        if lost := [sum(one.lost.values()) for one in account.incidents if one.kind == kind]:
            rows.append(
                f'<tr><th scope="row">{words}</th><td class="number">{len(lost):,}</td><td class="number">'
                f'{_seconds(sum(lost))}</td><td class="number">{_seconds(sum(lost) / len(lost))}</td></tr>'
            )
    sums = _table("What was lost to what", ("what became of it", "*times", "*lost in all", "*each"), rows)
    cut = len(account.incidents) - MOST
    older = f'<p class="soft">The newest {MOST} of {MOST + cut:,}.</p>' if cut > 0 else ""
    told = [_incident(number, incident) for number, incident in _newest(account.incidents)]
    return _section("incidents", title, sums + older + "\n".join(reversed(told)))


def _incident(number: int, incident: Incident) -> str:
    lost, event = incident.lost, incident.event
    size = f", {_shape(event['mesh'])}" if "mesh" in event else ""
    cause = incident.causes[0] if incident.causes else incident.reason
    summary = f"<b>{_clock(incident.at)} {OUTCOMES[incident.kind]}</b>{size}, {_seconds(sum(lost.values()))} lost" + (
        f": {escape(cause)}" if cause else ""
    )
    said = [f"<p>Fault: {_words(more)}</p>" for more in incident.causes[1:]]
    said += [f"<p>Decision: {_words(incident.reason)}</p>"] if incident.reason not in ("", cause) else []
    if lost:
        rows = [
            f'<tr><th scope="row"><span class="swatch {kind}"></span>{KINDS[kind]}</th>'
            f'<td class="number">{_seconds(seconds)}</td></tr>'
            for kind, seconds in lost.items()
        ]
        said.append(_table("What it took", ("on what", "*seconds"), rows))
    said.append(_sources(incident))
    inner = f'<div class="inner">{"".join(said)}</div>'
    return f'<details id="incident-{number}"><summary>{summary}</summary>{inner}</details>'


def _sources(incident: Incident) -> str:
    """Where each rank's shard came from."""
    event = incident.event
    if incident.kind in ("rewound", "restarted"):
        step = event.get("step", 0)
        return f"<p>All ranks began from {f'the checkpoint of step {step:,}' if step else 'the start'}.</p>"
    told = event.get("sources") or []
    if not told:
        return ""
    columns = [kind for kind in SOURCES if any(kind == source[0] for row in told for source in row["from"])]
    rows = []
    for row in told:
        cells = []
        for column in columns:
            parts = [(place, count) for kind, place, count in row["from"] if kind == column]
            own = ((_bytes(count) if column == "own" else f"{_bytes(count)} from {place}") for place, count in parts)
            cells.append(f"<td>{escape(', '.join(own)) or '&ndash;'}</td>")
        head = f'<th scope="row" class="whole">{row["rank"]} <span class="soft">{escape(row["place"])}</span></th>'
        rows.append(f"<tr>{head}{''.join(cells)}</tr>")
    all_told = f"{_bytes(event.get('bytes_moved', 0))} moved, {_bytes(event.get('bytes_local', 0))} stayed"
    return _table(f"Where each shard came from ({all_told})", ("rank", *(SOURCES[kind] for kind in columns)), rows)


def _generations(seats: Sequence[Event]) -> str:
    if not seats:
        return ""
    same = ("generation", "ranks")  # else only those who stand by are others
    met = [two for one, two in pairwise([{}, *seats]) if any(one.get(name) != two[name] for name in same)]
    rows = []
    for before, seat in list(pairwise([None, *met]))[-MOST:]:
        had, has = ({place for place, _ in one["ranks"]} if one else set() for one in (before, seat))
        joined, left = ([*sorted(a - b)] for a, b in ((has, had), (had, has)))
        rows.append(
            f'<tr><th scope="row">{seat["generation"]}</th><td>{_clock(seat["time"])}</td>'
            f"<td class='whole'>{_shape(seat['mesh'])}</td>"
            f'<td class="number">{len({where for _, where in seat["ranks"]})}</td>'
            f'<td class="number">{len(seat["spares"])}</td>'
            f"<td>{escape(_some(joined)) or '&ndash;'}</td><td>{escape(_some(left)) or '&ndash;'}</td></tr>"
        )
    heads = ("generation", "since", "shape", "*nodes", "*spares", "took a seat", "gave one up")
    return _section("generations", "Generations", _table("How often the ranks have met", heads, rows, seen=False))


# -------------------------------------------------------------------------------------------------------------- parts


class _Scale:
    """Where a moment is on the timeline, on which starts of the run follow each other without a gap."""

    def __init__(self, account: Goodput) -> None:
        self._extents: dict[int, tuple[float, float]] = {}
        for stretch in account.stretches:
            start, end = self._extents.get(stretch.start_of, (stretch.start, stretch.end))
            self._extents[stretch.start_of] = min(start, stretch.start), max(end, stretch.end)
        self._offsets, self._wall = {}, 0.0
        for number, (start, end) in self._extents.items():
            self._offsets[number] = self._wall
            self._wall += end - start

    def start_of(self, time: float) -> int:
        """The start of the run that a moment belongs to."""
        return max((n for n, (start, _) in self._extents.items() if start <= time), default=min(self._extents))

    def x(self, time: float, start_of: int) -> float:
        """In units of the picture."""
        if start_of not in self._extents:
            start_of = self.start_of(time)
        start, end = self._extents[start_of]
        return WIDTH * (self._offsets[start_of] + min(max(time, start), end) - start) / self._wall


def _newest(incidents: Sequence[Incident]) -> Iterator[tuple[int, Incident]]:
    yield from list(enumerate(incidents))[-MOST:]


def _section(name: str, title: str, inner: str) -> str:
    return f'<section aria-labelledby="{name}"><h2 id="{name}">{title}</h2>\n{inner}</section>'


def _svg(name: str, height: float, title: str, described: str, parts: Iterable[str]) -> str:
    return (
        f'<svg class="{name}" viewBox="0 0 {WIDTH:g} {height:g}" preserveAspectRatio="none" role="img" '
        f'aria-labelledby="{name}-title {name}-said"><title id="{name}-title">{escape(title)}</title>'
        f'<desc id="{name}-said">{escape(described)}</desc>{"".join(parts)}</svg>'
    )


def _rect(kind: str, x: float, y: float, width: float, height: float, said: str) -> str:
    shape = f'x="{x:.2f}" y="{y:g}" width="{width:.2f}" height="{height:g}"'
    return f'<rect class="{kind}" {shape}><title>{escape(said)}</title></rect>'


def _table(caption: str, heads: Sequence[str], rows: Sequence[str], seen: bool = True) -> str:
    """Heads with an asterisk are of numbers. What is too wide for the screen is scrolled by itself. A caption that says
    what the heading above does is not seen."""
    unseen = "" if seen else ' class="unseen"'
    cells = "".join(
        f'<th scope="col" class="number">{escape(head[1:])}</th>'
        if head.startswith("*")
        else f'<th scope="col">{escape(head)}</th>'
        for head in heads
    )
    return (
        f'<div class="wide" tabindex="0" role="group" aria-label="{escape(caption)}"><table>'
        f"<caption{unseen}>{escape(caption)}</caption><thead><tr>{cells}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _shape(mesh: Sequence[int]) -> str:
    dp, pp, cp, tp = mesh
    sizes = {"dp": dp, "pp": pp, **({"cp": cp} if cp > 1 else {}), "tp": tp}
    return " &times; ".join(f"{name} {size}" for name, size in sizes.items())


def _words(text: str) -> str:
    """Escaped, with ids of nodes as short as elsewhere."""
    return escape(re.sub(r"\b([0-9a-f]{8})[0-9a-f]{48}\b", r"\1", text))


def _some(names: Sequence[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _seconds(seconds: float) -> str:
    if seconds >= 600:
        return short_time(seconds)
    return f"{seconds:.1f} s" if seconds >= 10 else f"{seconds:.2f} s" if seconds >= 0.1 else f"{1000 * seconds:.0f} ms"


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.1f} TB"


def _clock(seconds: float) -> str:
    return time.strftime("%H:%M:%S", time.localtime(seconds))


def _date(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
