"""Renders the report's Markdown as one HTML file that needs nothing else: figures and style are inside, and there is no script."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from pathlib import Path

from markdown_it import MarkdownIt

STYLE = """
:root { color-scheme: light dark; --ink: #1c2024; --soft: #5b6470; --line: #d9dde3; --paper: #fbfbfa; --card: #fff; --mark: #0072b2; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e8eb; --soft: #a2abb6; --line: #373d45; --paper: #15181c; --card: #1c2026; --mark: #6bb8e8; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 70rem; margin: 0 auto; padding: 2.5rem 1.5rem 4rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .3rem; }
h1 + p { color: var(--soft); margin-top: 0; }
h2 { font-size: 1.25rem; margin: 2.6rem 0 .8rem; padding-top: .9rem; border-top: 1px solid var(--line); }
h3 { font-size: 1.05rem; margin: 1.8rem 0 .6rem; }
p, li { max-width: 62rem; }
li { margin: .3rem 0; }
section.answer { background: var(--card); border: 1px solid var(--line); border-left: 4px solid var(--mark); border-radius: 6px; padding: .2rem 1.4rem .8rem; margin-top: 1.6rem; }
section.alarm { background: var(--card); border: 1px solid #d55e00; border-left: 4px solid #d55e00; border-radius: 6px; padding: .2rem 1.4rem .8rem; margin-top: 1.6rem; }
section.answer h2, section.alarm h2 { border: 0; margin: .6rem 0 .4rem; padding: 0; }
section.answer h2 + p { font-size: 1.12rem; }
details { margin-top: 2.6rem; padding-top: .9rem; border-top: 1px solid var(--line); }
details h2 { display: inline; border: 0; margin: 0; padding: 0; }
summary { cursor: pointer; margin-bottom: .8rem; }
.wide { overflow-x: auto; margin: .8rem 0; }
table { border-collapse: collapse; font-size: .86rem; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .7rem; border-bottom: 1px solid var(--line); vertical-align: top; text-align: left; }
th { color: var(--soft); font-weight: 600; vertical-align: bottom; }
th.number, td.number { text-align: right; }
td.number { white-space: nowrap; }
tbody tr:hover { background: color-mix(in srgb, var(--mark) 8%, transparent); }
code { font: .9em ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; background: color-mix(in srgb, var(--mark) 10%, transparent); padding: .05em .3em; border-radius: 3px; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 6px; padding: .8rem 1rem; overflow-x: auto; }
pre code { background: none; padding: 0; }
img { display: block; max-width: 100%; height: auto; background: #fff; border: 1px solid var(--line); border-radius: 6px; padding: .5rem; margin: 1.6rem auto .4rem; }
p:has(> img) + p { color: var(--soft); font-size: .9rem; margin-top: 0; }
@media print { main { max-width: none; padding: 0; } .wide { overflow: visible; } table { font-size: .7rem; } }
"""


def render_html(markdown: str, title: str, folder: Path, folded: Sequence[str] = ()) -> str:
    """Render Markdown as a whole HTML page, with the images it names (relative to `folder`) inside.

    Every section gets an element of its own; those whose headings are in `folded` open on a click.
    """
    parser = MarkdownIt("commonmark", {"html": False}).enable("table")
    tokens = parser.parse(markdown)
    for token in tokens:
        for child in token.children or ():
            if child.type == "image":
                _embed(child, folder)
        if token.type in ("th_open", "td_open"):
            # The style that the renderer gives right-aligned cells says nothing of line breaks.
            right = "right" in str(token.attrs.pop("style", ""))
            token.attrs |= {"class": "number"} if right else {}
    parser.add_render_rule("table_open", lambda *_: '<div class="wide"><table>\n')
    parser.add_render_rule("table_close", lambda *_: "</table></div>\n")
    body = "".join(
        _wrap(heading, parser.renderer.render(part, parser.options, {}), folded) for heading, part in _split(tokens)
    )
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{html.escape(title)}</title>\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n<main>\n{body}</main>\n</body>\n</html>\n"
    )


def _split(tokens: Sequence) -> list[tuple[str, list]]:
    """Split the tokens before each heading of the second level; the heading's text goes with its part."""
    parts: list[tuple[str, list]] = [("", [])]
    for token, following in zip(tokens, [*tokens[1:], None], strict=True):
        if token.type == "heading_open" and token.tag == "h2":
            parts.append((following.content, []))
        parts[-1][1].append(token)
    return parts


def _wrap(heading: str, content: str, folded: Sequence[str]) -> str:
    if not heading:
        return content
    if heading in folded:
        end = content.index("</h2>") + len("</h2>")
        return f"<details>\n<summary>{content[:end]}</summary>{content[end:]}</details>\n"
    kind = {"Conclusion": ' class="answer"', "Runs that did not begin alike": ' class="alarm"'}.get(heading, "")
    return f"<section{kind}>\n{content}</section>\n"


def _embed(image, folder: Path) -> None:
    """Put the figure into the token; what is no figure of the report, such as an image in a user's own text, becomes text."""
    path = folder / str(image.attrs["src"])
    kind = {".svg": "image/svg+xml", ".png": "image/png"}.get(path.suffix)
    if kind is None or not path.resolve().is_relative_to(folder.resolve()) or not path.is_file():
        image.type, image.tag, image.children = "text", "", None
        image.content = f"![{image.content}]({image.attrs['src']})"
        return
    image.attrs["src"] = f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode('ascii')}"
