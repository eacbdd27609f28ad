"""Pieces of a report page: one file, pictures inside, every string escaped. Not what a page says: page.py and sweep.py."""

import base64
import html
from typing import Any

from mdt_ray import storage

STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.55 system-ui, sans-serif; color: #1c2733; background: #f4f6f9; margin: 0; }
main { max-width: 60rem; margin: 0 auto; padding: 2rem 1rem 4rem; }
h1 { font-size: 1.6rem; margin: 0; } h2 { font-size: 1.15rem; margin: 0 0 .6rem; }
p { margin: .3rem 0 .8rem; } .muted { color: #5b6b7b; }
section { background: #fff; border: 1px solid #e3e8ee; border-radius: 8px; padding: 1.1rem 1.3rem; margin-top: 1.1rem; }
img { max-width: 100%; height: auto; display: block; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); gap: .8rem; margin-top: 1.1rem; }
.card { background: #fff; border: 1px solid #e3e8ee; border-radius: 8px; padding: .8rem 1rem; }
.card b { display: block; font-size: 1.5rem; } .card span { color: #5b6b7b; font-size: .85rem; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(24rem, 1fr)); gap: 1rem; align-items: start; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .3rem .6rem; border-bottom: 1px solid #e3e8ee; vertical-align: top; }
th { color: #5b6b7b; font-weight: 600; font-size: .85rem; } td.num, th.num { text-align: right; }
.scroll { overflow-x: auto; }
pre { overflow-x: auto; background: #f4f6f9; padding: .8rem; border-radius: 6px; font-size: .8rem; }
"""


def write_page(uri: str, title: str, body: str, inputs: str = "") -> None:
    """Write a page that `is_current` knows by its inputs."""
    page = (f'<!doctype html><html lang="en"><head><meta charset="utf-8">{_mark(inputs)}'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{text(title)}</title><style>{STYLE}</style></head>"
            f"<body><main>{body}</main></body></html>\n")
    storage.write_bytes(uri, page.encode())


def is_current(uri: str, inputs: str) -> bool:
    """Whether a page of these inputs is there."""
    return storage.exists(uri) and _mark(inputs) in storage.read_bytes(uri)[:2000].decode(errors="replace")


def _mark(inputs: str) -> str:
    return f'<meta name="inputs" content="{text(inputs)}">'


def headline(title: str, note: str, cards: list[tuple[str, str]]) -> str:
    """The head of a page: its cards are a number and what it is. `note` is HTML."""
    cells = "".join(f'<div class="card"><b>{text(value)}</b><span>{text(label)}</span></div>' for value, label in cards)
    return f'<h1>{text(title)}</h1><p class="muted">{note}</p><div class="cards">{cells}</div>'


def section(title: str, note: str, content: str) -> str:
    """A titled box; `content` is HTML."""
    return f'<section><h2>{text(title)}</h2><p class="muted">{text(note)}</p>{content}</section>'


def table(head: list[str], rows: list[list[Any]]) -> str:
    """A table of texts."""
    cells = "".join(f"<th>{text(h)}</th>" for h in head)
    lines = "".join("<tr>" + "".join(f"<td>{text(c)}</td>" for c in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{cells}</tr></thead><tbody>{lines}</tbody></table>"


def img(png: bytes, alt: str) -> str:
    """A picture inside the page."""
    return f'<img alt="{text(alt)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def text(value: Any) -> str:
    """Any string, escaped."""
    return html.escape(str(value))
