"""A timeline to look at: one HTML file that needs nothing else, and a picture.

The page is moved with the keyboard or the pointer, says what is under either, and has the numbers as a table, which is
what a screen reader gets. It draws on a canvas: a run of hours has tens of thousands of spans.
"""

import json
import os
import time
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from raytron.metrics.timeline import Span, shares

__all__ = ["timeline_page", "timeline_png"]

MOST = 50_000  # spans of a page: the newest
COLOURS = ("#4c78a8", "#e4572e", "#59a14f", "#b279a2", "#eeb422", "#76b7b2", "#9c755f", "#ff9da6")

_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>Timeline: %(title)s</title>
<style>
:root { color-scheme: light dark; font: 15px/1.5 system-ui, sans-serif }
body { max-width: 80rem; margin: 1rem auto; padding: 0 1rem }
canvas { width: 100%%; display: block; border: 1px solid color-mix(in srgb, currentColor 25%%, transparent);
  border-radius: 6px; touch-action: none }
canvas:focus-visible { outline: 3px solid #4c78a8; outline-offset: 2px }
table { border-collapse: collapse; margin: 1rem 0 } td, th { padding: .2rem .8rem .2rem 0; text-align: left }
td { font-variant-numeric: tabular-nums }
#said { min-height: 1.5em } kbd { border: 1px solid; border-radius: 3px; padding: 0 .3em; font: inherit }
.key { display: inline-block; margin-right: 1rem } .key i { display: inline-block; width: .8em; height: .8em;
  border-radius: 2px; margin-right: .3em }
</style>
<h1>Timeline: %(title)s</h1>
<p><label>Start of the run <select id="run"></select></label></p>
<p id="keys"></p>
<canvas id="chart" tabindex="0" role="application" aria-describedby="help said"
  aria-label="Timeline, a lane for each engine, reward model and judge, the trainer, pushes of weights,
  evaluations and saves"></canvas>
<p id="said" role="status" aria-live="polite"></p>
<p id="help"><kbd>←</kbd> <kbd>→</kbd> move, <kbd>+</kbd> <kbd>−</kbd> zoom (or the wheel), <kbd>0</kbd> all of it,
<kbd>↑</kbd> <kbd>↓</kbd> choose a lane, <kbd>,</kbd> <kbd>.</kbd> its previous and next span; or drag.%(cut)s</p>
<h2>Share of the time</h2>
<table><thead><tr><th scope="col">Lane</th><th scope="col">Share</th></tr></thead><tbody>
%(rows)s
</tbody></table>
<noscript><p>Drawing needs JavaScript; the picture beside this file does not.</p></noscript>
<script type="application/json" id="data">%(data)s</script>
<script>
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const $ = id => document.getElementById(id), canvas = $("chart"), pen = canvas.getContext("2d");
const ROW = 26, BAR = 18, AXIS = 24, LEFT = 110;
let run, from, span, lane = 0, chosen = -1;
const seconds = s => s >= 100 ? s.toFixed(0) + " s" : s >= 1 ? s.toFixed(2) + " s" : (s * 1000).toFixed(1) + " ms";
const clamp = (x, low, high) => Math.max(low, Math.min(high, x));
const width = () => canvas.clientWidth - LEFT;
const at = x => from + (x - LEFT) / width() * span;

function show(number) {
  run = data.runs[number];
  from = 0; span = run.seconds || 1; chosen = -1;
  draw();
}
function move(start, length) {
  span = clamp(length, Math.min(1e-4, run.seconds || 1), run.seconds || 1);
  from = clamp(start, 0, (run.seconds || 1) - span);
  draw();
}
function zoom(factor, middle) { move(middle - (middle - from) * factor, span * factor); }
function tick() {
  const rough = span / 8, power = 10 ** Math.floor(Math.log10(rough));
  return power * [1, 2, 5, 10].find(n => n * power >= rough);
}
function draw() {
  const ratio = window.devicePixelRatio || 1, height = data.lanes.length * ROW + AXIS;
  canvas.style.height = height + "px";
  canvas.width = canvas.clientWidth * ratio; canvas.height = height * ratio;
  pen.setTransform(ratio, 0, 0, ratio, 0, 0);
  pen.clearRect(0, 0, canvas.clientWidth, height);
  const ink = getComputedStyle(canvas).color, step = tick();
  pen.font = "12px system-ui, sans-serif"; pen.textBaseline = "middle";
  for (let t = Math.ceil(from / step) * step; t <= from + span; t += step) {
    const x = LEFT + (t - from) / span * width();
    pen.fillStyle = ink; pen.globalAlpha = .15; pen.fillRect(x, 0, 1, height - AXIS); pen.globalAlpha = 1;
    pen.fillText(seconds(t), x + 3, height - AXIS / 2);
  }
  data.lanes.forEach((name, i) => {
    pen.fillStyle = ink; pen.font = (i === lane ? "bold " : "") + "12px system-ui, sans-serif";
    pen.fillText(name, 6, i * ROW + ROW / 2, LEFT - 12);
  });
  pen.save(); pen.beginPath(); pen.rect(LEFT, 0, width(), height); pen.clip();
  run.spans.forEach((s, i) => {
    if (s[2] + s[3] < from || s[2] > from + span) return;
    const x = LEFT + (s[2] - from) / span * width(), w = Math.max(.5, s[3] / span * width());
    pen.fillStyle = data.colours[s[1] %% data.colours.length];
    pen.fillRect(x, s[0] * ROW + (ROW - BAR) / 2, w, BAR);
    if (i === chosen) { pen.strokeStyle = ink; pen.lineWidth = 2; pen.strokeRect(x, s[0] * ROW + 3, w, ROW - 6); }
  });
  pen.restore();
}
function tell(i) {
  chosen = i;
  if (i < 0) { $("said").textContent = ""; return; }
  const s = run.spans[i], more = Object.entries(s[4] || {}).map(([k, v]) => ", " + k + " " + v).join("");
  $("said").textContent =
    data.lanes[s[0]] + ": " + data.names[s[1]] + ", " + seconds(s[3]) + ", from " + seconds(s[2]) + more;
}
function next(direction) {
  const mine = run.spans.map((s, i) => i).filter(i => run.spans[i][0] === lane);
  if (!mine.length) { $("said").textContent = data.lanes[lane] + ": nothing"; return; }
  let k = mine.indexOf(chosen);
  if (k < 0) k = direction > 0 ? mine.findIndex(i => run.spans[i][2] >= from) - 1 : mine.length;
  tell(mine[clamp(k + direction, 0, mine.length - 1)]);
  const s = run.spans[chosen];
  if (s[2] < from || s[2] > from + span) move(s[2] - span / 10, span); else draw();
}
const actions = {
  ArrowLeft: () => move(from - span / 5, span), ArrowRight: () => move(from + span / 5, span),
  "+": () => zoom(.5, from + span / 2), "=": () => zoom(.5, from + span / 2), "-": () => zoom(2, from + span / 2),
  "0": () => move(0, run.seconds), ",": () => next(-1), ".": () => next(1),
  ArrowUp: () => choose(lane - 1), ArrowDown: () => choose(lane + 1),
};
function choose(number) {
  lane = clamp(number, 0, data.lanes.length - 1); chosen = -1;
  $("said").textContent = data.lanes[lane];
  draw();
}
canvas.addEventListener("keydown", event => {
  if (event.ctrlKey || event.metaKey || event.altKey || !actions[event.key]) return;
  event.preventDefault(); actions[event.key]();
});
canvas.addEventListener("wheel", event => {
  if (!event.deltaY) return;
  event.preventDefault(); zoom(event.deltaY > 0 ? 1.25 : .8, at(event.offsetX));
}, { passive: false });
canvas.addEventListener("pointerdown", event => canvas.setPointerCapture(event.pointerId));
canvas.addEventListener("pointermove", event => {
  if (event.buttons) { move(from - event.movementX / width() * span, span); return; }
  const row = Math.floor(event.offsetY / ROW), t = at(event.offsetX), near = span / width() * 2;
  tell(run.spans.findIndex(s => s[0] === row && s[2] - near <= t && t <= s[2] + s[3] + near));
  draw();
});
data.runs.forEach((r, i) => $("run").append(new Option(r.title, i)));
$("run").addEventListener("change", () => show(+$("run").value));
data.names.forEach((name, i) => {
  const key = document.createElement("span"), box = document.createElement("i");
  key.className = "key"; box.style.background = data.colours[i %% data.colours.length];
  key.append(box, name); $("keys").append(key);
});
window.addEventListener("resize", draw);
if (data.runs.length) { $("run").value = data.runs.length - 1; show(data.runs.length - 1); }
</script>
"""


def timeline_page(spans: Sequence[Span], path: str | Path, title: str = "", lanes: Sequence[str] = ()) -> None:
    """Write the page; it replaces an older one atomically.

    lanes: those to show whether or not there are spans on them.
    """
    cut = f" Only the newest {MOST:,} of {len(spans):,} spans are shown." if len(spans) > MOST else ""
    rows, data = _rows(spans, lanes), _data(spans[-MOST:], lanes)
    text = _PAGE % {"title": escape(title), "cut": cut, "rows": rows, "data": data}
    path = Path(path)
    beside = path.with_name(f".{path.name}.tmp")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)


def _rows(spans: Sequence[Span], lanes: Sequence[str]) -> str:
    found, order = shares(spans), _order(spans, lanes)[0]
    told = {lane: ", ".join(f"{name} {share:.1%}" for name, share in found.get(lane, {}).items()) for lane in order}
    return "\n".join(f'<tr><th scope="row">{escape(lane)}</th><td>{escape(of)}</td></tr>' for lane, of in told.items())


def _data(spans: Sequence[Span], shown: Sequence[str]) -> str:
    """What the page's script draws. "<" is spelt so that nothing in it can end the script."""
    lanes, names = _order(spans, shown)
    runs: dict[int, dict[str, Any]] = {}
    for span in spans:
        run = runs.setdefault(span.start_of, {"zero": span.start, "spans": []})
        run["zero"] = min(run["zero"], span.start)
    for number, run in runs.items():
        run["title"] = f"{number}, {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(run['zero']))}"
    for span in sorted(spans, key=lambda span: span.start):
        run = runs[span.start_of]
        start = round(span.start - run["zero"], 6)
        drawn = [lanes.index(span.lane), names.index(span.name), start, round(span.seconds, 6)]
        run["spans"].append([*drawn, dict(span.args)] if span.args else drawn)
        run["seconds"] = max(run.get("seconds", 0.0), start + span.seconds)
    data = {"lanes": lanes, "names": names, "colours": COLOURS, "runs": list(runs.values())}
    return json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")


def _order(spans: Sequence[Span], lanes: Sequence[str] = ()) -> tuple[list[str], list[str]]:
    """Lanes, those given and more, and names as they first appear; but engines, then reward models first, by number."""

    def place(lane: str) -> tuple[int, int]:
        kind, _, number = lane.rpartition(" ")
        at = ("engine", "reward model").index(kind) if kind in ("engine", "reward model") else 2
        return at, int(number) if at < 2 and number.isdecimal() else 0

    lanes = sorted(dict.fromkeys([*lanes, *(span.lane for span in spans)]), key=place)
    return lanes, list(dict.fromkeys(span.name for span in spans))


def timeline_png(spans: Sequence[Span], path: str | Path, title: str = "") -> None:
    """Draw the newest start of the run; the picture is replaced atomically. Without spans nothing is drawn."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    newest = max((span.start_of for span in spans), default=0)
    spans = [span for span in spans if span.start_of == newest]
    if not spans:
        return
    lanes, names = _order(spans)
    zero = min(span.start for span in spans)
    figure = Figure(figsize=(12, 1.2 + 0.4 * len(lanes)), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
    colour: Mapping[str, str] = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}
    for row, lane in enumerate(lanes):
        for name in names:
            bars = [(span.start - zero, span.seconds) for span in spans if (span.lane, span.name) == (lane, name)]
            axes.broken_barh(bars, (row - 0.35, 0.7), facecolors=colour[name], linewidth=0)
    axes.set(xlabel="seconds", yticks=range(len(lanes)), yticklabels=lanes, ylim=(len(lanes) - 0.5, -0.5))
    axes.set_xlim(0, max(span.start + span.seconds - zero for span in spans) or 1)
    axes.spines[["right", "top", "left"]].set_visible(False)
    axes.tick_params(left=False)
    handles = [Patch(color=colour[name], label=name) for name in names]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(names), frameon=False)
    path = Path(path)
    partial = path.with_name(f".{path.name}.tmp")
    figure.savefig(partial, format="png")
    os.replace(partial, path)
