"""The HTML of report.html: escaping, tables, figures, the page. Every text that comes in as ``str`` is escaped here."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

from prism_fast.report.data import visible


class Markup(str):
    """Text that is HTML already; any other text is escaped. To be made of constants and of escaped text alone."""

    __slots__ = ()


def escape(text: object) -> Markup:
    """HTML of a text from anywhere; control characters and lone surrogates become visible marks."""
    if isinstance(text, Markup):
        return text
    return Markup(html.escape(visible(str(text)), quote=True))


def tag(name: str, content: object = "", **attributes: str) -> Markup:
    """One element; ``class_`` stands for class. The content is escaped unless it is Markup."""
    written = "".join(f' {key.rstrip("_")}="{escape(value)}"' for key, value in attributes.items())
    return Markup(f"<{name}{written}>{escape(content)}</{name}>")


def join(parts: Iterable[object], separator: str = "") -> Markup:
    return Markup(separator.join(escape(part) for part in parts))


def table(
    head: Sequence[object], rows: Iterable[Sequence[object]], *, text_columns: int = 1, class_: str = ""
) -> Markup:
    """A table; columns from ``text_columns`` on are numbers, aligned right. None is shown as a dash."""

    def cells(name: str, row: Sequence[object]) -> Markup:
        return join(
            tag(name, "–" if value is None else value, class_="text" if index < text_columns else "number")
            for index, value in enumerate(row)
        )

    body = join(tag("tr", cells("td", row)) for row in rows)
    inner = join([tag("thead", tag("tr", cells("th", head))), tag("tbody", body)])
    return tag("div", tag("table", inner, class_=class_), class_="scroll")


def figure(source: str, alt: str, caption: object, *, narrow: bool = False) -> Markup:
    """An image card; ``source`` is a data URI."""
    picture = Markup(f'<img src="{html.escape(source, quote=True)}" alt="{html.escape(alt, quote=True)}">')
    return tag("figure", join([picture, tag("figcaption", caption)]), class_="narrow" if narrow else "wide")


def absent(text: object) -> Markup:
    """The line that stands where there is nothing to show."""
    return tag("p", join(["Not shown: ", text]), class_="absent")


def section(identity: str, title: str, *content: object) -> Markup:
    return tag("section", join([tag("h2", title), *content], "\n"), id=identity)


def page(title: str, header: Markup, sections: Sequence[tuple[str, str, Markup]]) -> str:
    """The whole document; ``sections`` are (id, short name for the navigation, content)."""
    links = join(tag("a", name, href=f"#{identity}") for identity, name, _ in sections)
    body = join([tag("header", header), tag("nav", links), tag("main", join((s for _, _, s in sections), "\n"))], "\n")
    return _PAGE.replace("@TITLE@", escape(title)).replace("@STYLE@", _STYLE).replace("@BODY@", body)


# The policy forbids scripts and everything from outside: a response that slipped through could still do nothing.
_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>@TITLE@</title>
<style>@STYLE@</style>
</head>
<body>
@BODY@
</body>
</html>
"""

_STYLE = """
:root { --page: #f5f6f8; --card: #ffffff; --ink: #1c2330; --soft: #5d6675; --line: #dfe3e9; --accent: #0072b2;
  --good: #00734f; --bad: #b3400a; --warn: #8a6100; --good-back: #e2f4ec; --bad-back: #fbe9df; --warn-back: #fdf3d3; }
@media (prefers-color-scheme: dark) { :root { --page: #12161d; --card: #1b212b; --ink: #e6e9ee; --soft: #9aa4b2;
  --line: #313a47; --accent: #6cb8e6; --good: #5fd0a5; --bad: #f5a277; --warn: #eccb6a; --good-back: #16342a;
  --bad-back: #3d2417; --warn-back: #3a3115; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
header, nav, main { max-width: 1240px; margin: 0 auto; padding: 0 28px; }
header { padding-top: 34px; }
h1 { font-size: 27px; line-height: 1.2; margin: 0 0 6px; letter-spacing: -0.01em; }
h2 { font-size: 19px; margin: 0 0 12px; }
h3 { font-size: 15px; margin: 18px 0 8px; }
p { margin: 0 0 12px; max-width: 110ch; }
.lead, .soft, figcaption { color: var(--soft); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(190px, 1fr)); gap: 14px; margin: 20px 0; }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 14px 16px; }
.tile .name { color: var(--soft); font-size: 13px; }
.tile .value { font-size: 25px; font-weight: 650; line-height: 1.3; font-variant-numeric: tabular-nums; }
.tile .detail { color: var(--soft); font-size: 13px; }
nav { display: flex; flex-wrap: wrap; gap: 4px 18px; padding-top: 8px; padding-bottom: 14px; font-size: 14px; }
nav a { color: var(--accent); text-decoration: none; }
nav a:hover { text-decoration: underline; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 20px 22px;
  margin: 0 0 20px; }
figure { margin: 0 0 14px; background: #ffffff; border: 1px solid var(--line); border-radius: 8px; padding: 10px 12px; }
figure.narrow { max-width: 520px; }
figure img { display: block; width: 100%; height: auto; }
figcaption { color: #555f6e; font-size: 13px; padding: 6px 4px 0; border-top: 1px solid #eceff3; margin-top: 8px; }
.absent { color: var(--soft); font-style: italic; }
.scroll { overflow-x: auto; margin-bottom: 12px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 7px 10px; border-bottom: 1px solid var(--line); vertical-align: top; text-align: left; }
th { font-size: 13px; font-weight: 600; color: var(--soft); vertical-align: bottom; }
th.number, td.number { text-align: right; }
tr.reference td, tr.total td { color: var(--soft); }
code { font: 13px/1.45 ui-monospace, "DejaVu Sans Mono", monospace; overflow-wrap: anywhere; }
table.samples { table-layout: fixed; min-width: 1040px; }
table.samples td { border-right: 1px solid var(--line); }
table.samples td:last-child, table.samples th:last-child { border-right: 0; }
table.samples img { display: block; width: 100%; max-width: 200px; max-height: 200px; object-fit: contain;
  image-rendering: pixelated; border: 1px solid var(--line); border-radius: 4px; background: #fff; margin-bottom: 6px; }
.response { font: 12.5px/1.45 ui-monospace, "DejaVu Sans Mono", monospace; white-space: pre-wrap;
  overflow-wrap: anywhere; unicode-bidi: isolate; max-height: 340px; overflow-y: auto; margin-top: 6px; }
.question { white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate; }
.mark { color: var(--accent); opacity: 0.85; }
.badge { display: inline-block; font-size: 12px; font-weight: 600; border-radius: 20px; padding: 1px 9px;
  margin-right: 4px; }
.good { color: var(--good); background: var(--good-back); }
.bad { color: var(--bad); background: var(--bad-back); }
.warn { color: var(--warn); background: var(--warn-back); }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(380px, 1fr)); gap: 4px 28px; }
summary { cursor: pointer; color: var(--accent); margin-bottom: 8px; }
@media print { section { break-inside: avoid; } nav { display: none; } }
"""
