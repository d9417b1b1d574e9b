"""One self-contained HTML page: text, tables and figures in, a string out.

No script, no font, no file from outside.
"""

import base64
import html
import struct
from collections.abc import Callable, Iterable
from typing import NamedTuple

from downscaling.report.themes import LIGHT

_COLOURS = (
  "--page:{page};--card:{card};--ink:{ink};--muted:{muted};--line:{line};--accent:{accent};"
  "--wash:{wash}"
)

_LIGHT = _COLOURS.format(
  page="#faf9f6",
  card=LIGHT.paper,
  ink=LIGHT.ink,
  muted="#666e75",
  line="#e3e0d9",
  accent="#1f6798",
  wash="#e3eff8",
)
_DARK = _COLOURS.format(
  page="#14171a",
  card="#1b1f23",
  ink="#e3e6e8",
  muted="#9aa2a9",
  line="#2c3238",
  accent="#79bbea",
  wash="#1c2d3a",
)
# Figures are drawn once, for light paper. On a dark page their lightness is inverted and their hue
# turned back, so that paper becomes dark, ink light, and every colour stays what legends call it.
# 88 % of an inversion turns white into the grey of a dark card.
_INVERTED = "filter:invert(.88) hue-rotate(180deg)"
CSS = (
  f""":root{{color-scheme:light dark;{_LIGHT}}}
@media(prefers-color-scheme:dark){{:root{{{_DARK}}}figure img{{{_INVERTED}}}}}
"""
  + """
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--page);color:var(--ink);
  font:16px/1.6 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
main{max-width:1160px;margin:0 auto;padding:clamp(20px,4vw,56px) clamp(15px,3.5vw,40px) 72px}
h1,h2{font-family:"Iowan Old Style","Palatino Linotype",Palatino,Charter,Georgia,"DejaVu Serif",
  serif;
  font-weight:600;line-height:1.2;letter-spacing:-.01em}
h1{font-size:clamp(1.75rem,4.4vw,2.7rem);margin:.1em 0 .45em}
h2{font-size:clamp(1.25rem,2.4vw,1.55rem);margin:0 0 .4em}
h3{font-size:1rem;margin:1.8em 0 .5em}
.kicker{color:var(--muted);font-size:.82rem;letter-spacing:.07em;text-transform:uppercase;margin:0}
.lead{font-size:clamp(1.02rem,1.6vw,1.16rem);max-width:46em;margin:0 0 1.3em}
p{max-width:46em;margin:.3em 0 1em}
a{color:var(--accent)}
nav{font-size:.92rem;margin:1.7em 0 0;display:flex;flex-wrap:wrap;gap:.35em 1.15em}
nav a{text-decoration:none}
nav a:hover,nav a:focus-visible{text-decoration:underline}
section{margin-top:clamp(38px,5vw,60px);padding-top:clamp(20px,2.6vw,30px);
  border-top:1px solid var(--line)}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,225px),1fr));gap:14px;
  margin:1.6em 0 0;
  padding:0}
.tile{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:15px 18px}
.tile b{display:block;font-size:1.6rem;font-weight:600;line-height:1.25;
  font-variant-numeric:tabular-nums;
  letter-spacing:-.015em}
.tile b i{font-style:normal;color:var(--muted);font-weight:400}
.tile span{display:block;color:var(--muted);font-size:.875rem;line-height:1.45}
.tile span.name{color:var(--ink);font-size:.92rem}
.scroll{overflow-x:auto;background:var(--card);border:1px solid var(--line);border-radius:10px;
  margin:.6em 0 .7em;
  -webkit-overflow-scrolling:touch}
table{border-collapse:collapse;width:100%;font-size:.93rem;font-variant-numeric:tabular-nums;
  line-height:1.35}
th,td{padding:9px 12px;text-align:right;white-space:nowrap;border-bottom:1px solid var(--line)}
tr:last-child>*{border-bottom:0}
thead th{font-weight:500;color:var(--muted);font-size:.85rem;vertical-align:bottom}
th:first-child{text-align:left;position:sticky;left:0;background:var(--card);z-index:1;
  font-weight:550}
td small,th small{display:block;color:var(--muted);font-size:.76rem;font-weight:400}
td.at{background:var(--wash)}
td.at small{color:var(--accent)}
tr.paper>*{color:var(--muted);font-style:italic;font-weight:400}
tr.floor>*{color:var(--muted);font-weight:400}
.plain th{width:1%}
.plain td{text-align:left;white-space:normal;overflow-wrap:anywhere}
.plain th:first-child{position:static;font-weight:400;color:var(--muted)}
.note{color:var(--muted);font-size:.88rem}
.swatch{display:inline-block;width:1em;height:.82em;background:var(--wash);
  border:1px solid var(--line);
  border-radius:2px;vertical-align:-.06em;margin-right:.4em}
.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,430px),1fr));gap:20px;
  align-items:start;
  margin-top:1em}
figure{margin:0;background:var(--card);border:1px solid var(--line);border-radius:10px;
  padding:clamp(7px,1.4vw,16px);max-width:640px}
figure img{display:block;width:100%;height:auto}
figcaption{color:var(--muted);font-size:.88rem;line-height:1.5;padding:10px 4px 2px}
pre{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:13px 15px;
  overflow-x:auto;
  font:13px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace;
  margin:.5em 0 1em}
pre.wrap{white-space:pre-wrap;overflow-wrap:anywhere}
code{font:.92em ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace}
details{margin:.6em 0}
summary{cursor:pointer;color:var(--accent)}
.missing{background:var(--card);border:1px dashed var(--line);border-radius:10px;padding:14px 18px;
  color:var(--muted)}
.missing+.missing{margin-top:10px}
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,340px),1fr));gap:0 24px;
  align-items:start}
@media(max-width:600px){th,td{padding:8px 9px}table{font-size:.87rem}.tile b{font-size:1.4rem}}
@media print{body{background:#fff}section{break-inside:avoid}}
"""
)


def escape(text: object) -> str:
  return html.escape(str(text), quote=True)


def document(title: str, body: str) -> str:
  """The whole page."""
  return (
    '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
    '<meta name="viewport" content="width=device-width,initial-scale=1">'
    '<meta name="color-scheme" content="light dark">'
    f"<title>{escape(title)}</title>\n<style>{CSS}</style></head>\n<body><main>\n{body}\n</main></body></html>\n"
  )


def section(anchor: str, title: str, lead: str, body: str) -> str:
  """A section; `lead` is plain text, `body` HTML."""
  text = f"<p>{escape(lead)}</p>" if lead else ""
  return f'<section id="{anchor}"><h2>{escape(title)}</h2>{text}{body}</section>'


def missing(text: str, command: str) -> str:
  """What is not there yet and what to type."""
  return f'<div class="missing">{escape(text)} <code>{escape(command)}</code></div>'


def picture(png: bytes, alt: str, caption: str) -> str:
  """A figure, its PNG inline. The style sheet adapts it to a dark page."""
  width, height = struct.unpack(">II", png[16:24])  # PNG header
  image = f"data:image/png;base64,{base64.b64encode(png).decode()}"
  return (
    f'<figure><img width="{width}" height="{height}" alt="{escape(alt)}" src="{image}">'
    f"<figcaption>{escape(caption)}</figcaption></figure>"
  )


def table(head: Iterable[str], body: Iterable[str]) -> str:
  """Rows already made by `row`, in a box that scrolls by itself; head is plain text."""
  cells = "".join(f'<th scope="col">{escape(h)}</th>' for h in head)
  return (
    f'<div class="scroll" tabindex="0" role="region" aria-label="table">'
    f"<table><thead><tr>{cells}</tr></thead>"
    f"<tbody>{''.join(body)}</tbody></table></div>"
  )


def row(
  name: str, cells: Iterable[tuple[str, str, bool]], under: str = "", kind: str = ""
) -> str:
  """One row: its name, a small line under it, and cells (text, small line, is at its floor)."""
  small = lambda text: f"<small>{escape(text)}</small>" if text else ""
  tds = "".join(
    f"<td{' class=at' if at else ''}>{escape(text)}{small(below)}</td>"
    for text, below, at in cells
  )
  row = f"<tr class={kind}>" if kind else "<tr>"
  return f'{row}<th scope="row">{escape(name)}{small(under)}</th>{tds}</tr>'


def facts(pairs: Iterable[tuple[str, object]]) -> str:
  """A two-column list of facts."""
  rows = "".join(
    f'<tr><th scope="row">{escape(k)}</th><td>{escape(v)}</td></tr>' for k, v in pairs
  )
  return f'<div class="scroll"><table class="plain">{rows}</table></div>'


def tile(value: str, name: str, below: str) -> str:
  """One large figure; `value` may hold <i> for its quiet parts and is not escaped."""
  return (
    f'<div class="tile"><span class="name">{escape(name)}</span><b>{value}</b>'
    f"<span>{escape(below)}</span></div>"
  )


class Panel(NamedTuple):
  """A figure: file name without suffix, draw(theme), alternative text, caption."""

  name: str
  draw: Callable  # figures.Draw
  alt: str
  caption: str


class Section(NamedTuple):
  """anchor, title and lead are plain text; `html` comes before the panels."""

  anchor: str
  title: str
  lead: str
  html: str
  panels: list[Panel]


def job(name: str, text: str) -> str:
  """In place of what is not there yet: the job that makes it."""
  return missing(text, f"python -m downscaling {name} --config=… --workdir=…")
