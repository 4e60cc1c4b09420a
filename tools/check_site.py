"""What is wrong with the built site: links, pictures, formulas, other hosts, the size of a page."""

from __future__ import annotations

import gzip
import re
from collections.abc import Iterator
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

HEAVIEST = 700_000  # bytes of a page and all that it loads
RAW_TEX = re.compile(
    r"\\[(\[].|\\(?:begin|frac|text|math\w+|displaystyle|sum|left)\b|\$[^$\n]*[\\_^{][^$\n]*\$"
)
REMOTE_CSS = re.compile(r"(?:@import\s+|url\()[\s\"'(]*((?:https?:)?//[^\"')\s]+)")
FONT = re.compile(r"url\([\"']?([^)\"'?]+\.woff2)")
VOID = {
    "area",
    "base",
    "br",
    "col",
    "embed",
    "hr",
    "img",
    "input",
    "link",
    "meta",
    "source",
    "track",
    "wbr",
}
QUIET = {"code", "pre", "script", "style", "svg", "title"}  # their text is no prose
LOADS = {
    "script": "src",
    "img": "src",
    "link": "href",
    "iframe": "src",
    "source": "src",
    "video": "src",
}


class Reader(HTMLParser):
    """The ids, links, loaded resources and prose of one page."""

    def __init__(self) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.prose: list[str] = []
        self.silent: list[str] = []  # pictures that say nothing to a reader who sees none
        self.stack: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note what the tag refers to."""
        a = {k: v or "" for k, v in attrs}
        if tag not in VOID:
            self.stack.append(tag)
        self.ids |= {a[k] for k in ("id", "name") if k in a}
        if tag == "img" and not a.get("alt", "").strip():
            self.silent.append(a.get("src", "")[:40])
        if tag == "a" and "href" in a:
            self.links.append(a["href"])
        if tag in LOADS and LOADS[tag] in a and a.get("rel") not in ("canonical", "prev", "next"):
            self.loads.append(a[LOADS[tag]])

    def handle_endtag(self, tag: str) -> None:
        """Close the tag."""
        if tag in self.stack:
            while self.stack.pop() != tag:
                pass

    def handle_data(self, data: str) -> None:
        """Keep prose."""
        if not QUIET & set(self.stack):
            self.prose.append(data)


def check_links(path: Path, pages: dict[Path, Reader], site: Path) -> Iterator[str]:
    """Links that lead nowhere, and what is loaded from another host."""
    reader = pages[path]
    for href in [*reader.links, *reader.loads]:
        url = urlsplit(href)
        if url.scheme or url.netloc:
            if href in reader.loads and url.scheme != "data":
                yield f"loads {href} from another host"
            continue
        target = (path.parent / unquote(url.path)).resolve() if url.path else path
        target = target / "index.html" if target.is_dir() else target
        if not target.is_file() or not target.is_relative_to(site):
            yield f"broken link {href}"
        elif url.fragment and target in pages and unquote(url.fragment) not in pages[target].ids:
            yield f"broken link {href}: there is no such heading"


@cache
def compressed(path: Path) -> int:
    """The bytes of a file as hosts send it, with the font that it asks for."""
    data = path.read_bytes()
    font = FONT.search(data.decode()) if path.suffix == ".css" else None
    return len(gzip.compress(data, 6)) + ((path.parent / font[1]).stat().st_size if font else 0)


def weight(path: Path, reader: Reader) -> int:
    """The bytes that a first visit of a page takes."""
    urls = [u for u in map(urlsplit, reader.loads) if u.path and not u.scheme and not u.netloc]
    files = [(path.parent / unquote(u.path)).resolve() for u in urls]
    return sum(compressed(f) for f in [path, *files] if f.is_file())


def check_page(path: Path, pages: dict[Path, Reader], site: Path) -> Iterator[str]:
    """What is wrong with one page."""
    reader = pages[path]
    prose = " ".join(reader.prose)
    if tex := RAW_TEX.search(prose):
        around = prose[max(0, tex.start() - 30) : tex.end() + 50]
        yield f"TeX is left on the page: ...{around!r}..."
    if reader.silent:
        yield f"{len(reader.silent)} picture(s) without a text: give `fig-cap`, or ![words](file)"
    if (size := weight(path, reader)) > HEAVIEST:
        yield f"a visit takes {size // 1000} kB, more than {HEAVIEST // 1000}"
    yield from check_links(path, pages, site)


def check_site(site: Path) -> list[str]:
    """What is wrong with the built pages."""
    pages: dict[Path, Reader] = {}
    for path in sorted(site.rglob("*.html")):
        pages[path] = reader = Reader()
        reader.feed(path.read_text(encoding="utf-8"))
    bad = [
        f"{path.relative_to(site).as_posix()}: {fault}"
        for path in pages
        for fault in check_page(path, pages, site)
    ]
    for css in site.rglob("*.css"):
        for url in REMOTE_CSS.findall(css.read_text(encoding="utf-8")):
            bad.append(f"{css.relative_to(site)}: loads {url} from another host")
    return bad
