#!/usr/bin/env python
"""Build the docs site from `_quarto.yml` without Quarto and without a network.

Filter the notebooks, render them with smalldocs, typeset every formula with MathJax to SVG, and
check the result: every notebook is in the sidebar, every formula is good, no TeX is left, every
link leads somewhere, and no page loads anything from another host. Any warning fails the build.
"""

from __future__ import annotations

import argparse
import html
import json
import re
import shutil
import sys
import tempfile
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import bibliography
import make_pages
import reference
import yaml
from api import modules
from book import notebooks
from nb_filter import filter_notebook
from quickjax import MathJaxRenderer, MathJaxRenderError
from smalldocs.config import BuildError, ConfigError
from smalldocs.site import build

ROOT = Path(__file__).resolve().parents[1]
HOME = "nbs/index.html"
MATH = re.compile(r'<span class="math (inline|display)">\\[(\[](.*?)\\[)\]]</span>', re.S)
KATEX = re.compile(
    r"<(?:link|script)\b[^>]*katex[^>]*>(?:\s*</script>)?\s*"
    r"|<script>[^<]*renderMathInElement.*?</script>\s*",
    re.S,
)
GLYPH = re.compile(r'<path id="MJX-\d+-([^"]+)" d="([^"]*)"/>')
RAW_TEX = re.compile(
    r"\\[(\[].|\\(?:begin|frac|text|math\w+|displaystyle|sum|left)\b|\$[^$\n]*[\\_^{][^$\n]*\$"
)
REPO_LINK = re.compile(r"\]\(((?:\.\./)+[^)\s#]+)(#[^)\s]*)?\)")
REMOTE_CSS = re.compile(r"(?:@import\s+|url\()[\s\"'(]*((?:https?:)?//[^\"')\s]+)")
WEB_FONT = re.compile(r"@import\s+url\([^)]*\);?")  # the themes fall back to the reader's own fonts
DEFINITION = re.compile(  # at the start of a line
    r'(?:(?<=\n)|(?<=<code class="sourceCode python">))'
    r'(<span class="kw">(?:class</span> |def</span> <span class="fu">))(\w+)'
)
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


# ---------------------------------------------------------------- before: a copy of the project,
# filtered


def quarto_only(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration without the keys that only Quarto reads."""
    config = {k: v for k, v in config.items() if k not in ("execute", "ipynb-filters")}
    for key in ("html-math-method", "grid"):
        config["format"]["html"].pop(key, None)
    config["project"].pop("pre-render", None)
    return {**config, "smalldocs": {"linkify": True}}


def hrefs(entries: list[Any]) -> list[str]:
    """The pages of the sidebar, in order."""
    found: list[str] = []
    for entry in entries:
        item: dict[str, Any] = {"href": entry} if isinstance(entry, str) else entry
        found += [item["href"]] if "href" in item else []
        found += hrefs(item.get("contents", []))
    return found


def check_sidebar(root: Path, config: dict[str, Any], made: list[str]) -> list[str]:
    """Pages that the sidebar lacks, and pages that it names in vain."""
    listed = hrefs(config["website"]["sidebar"]["contents"])
    there = [*(p.relative_to(root).as_posix() for p in notebooks(root)), *made]
    bad = [f"_quarto.yml: the sidebar does not name {p}" for p in there if p not in listed]
    bad += [
        f"_quarto.yml: the sidebar names {p}, which does not exist"
        for p in listed
        if p not in there
    ]
    return bad + [
        f"_quarto.yml: the sidebar names {p} twice"
        for p in sorted(set(listed))
        if listed.count(p) > 1
    ]


def repo_link(match: re.Match[str], root: Path, folder: Path, blob: str) -> str:
    """A link from a notebook's folder to a file outside nbs/ as a link to the public repository,
    if there is such a file."""
    target = (folder / match[1]).resolve()
    inside = target.is_relative_to(root) and not target.is_relative_to(root / "nbs")
    return (
        f"]({blob}{target.relative_to(root).as_posix()}{match[2] or ''})"
        if inside and target.exists()
        else match[0]
    )


def stage(root: Path, config: dict[str, Any], made: dict[str, str], to: Path) -> list[str]:
    """Copy what the site needs, with filtered notebooks; return what is wrong with them."""
    bad: list[str] = []
    blob = f"{config['website']['repo-url']}/blob/main/"
    (to / "_quarto.yml").write_text(
        yaml.safe_dump(quarto_only(config), sort_keys=False), encoding="utf-8"
    )
    shutil.copytree(root / "nbs", to / "nbs", ignore=shutil.ignore_patterns("*.ipynb", ".*", "_*"))
    (to / "tools").mkdir()
    for css in (root / "tools").glob("*.css"):
        shutil.copy(css, to / "tools")
    names = json.dumps(reference.symbols(modules(root)))
    (to / "_symbols.json").write_text(names, encoding="utf-8")
    for name, text in made.items():
        (to / name).parent.mkdir(exist_ok=True)
        (to / name).write_text(text, encoding="utf-8")
    entries = bibliography.read(root)
    for path in notebooks(root):
        nb = filter_notebook(json.loads(path.read_text(encoding="utf-8")), entries)
        public = partial(repo_link, root=root, folder=path.parent, blob=blob)
        for cell in nb["cells"]:
            text = "".join(cell["source"])
            if cell["cell_type"] == "markdown":
                # a link to a file of the repository leads to its page there
                cell["source"] = REPO_LINK.sub(public, text)
            elif cell["cell_type"] == "code" and "#| label:" not in text:
                cell["source"] = f'#| label: "{cell.get("id")}"\n{text}'  # Quarto's anchor, too
            if any(o["output_type"] == "error" for o in cell.get("outputs", [])):
                bad.append(
                    f"{path.relative_to(root)}: cell {cell.get('id')} has an error among its saved"
                    " outputs"
                )
        place = to / path.relative_to(root)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(json.dumps(nb, ensure_ascii=False), encoding="utf-8")
    return bad


def link_definitions(text: str, page: str, entries: dict[str, str]) -> str:
    """The page, where each name that its code defines leads to the name's entry."""

    def one(match: re.Match[str]) -> str:
        if match[2] not in entries:
            return match[0]
        to = entries[match[2]].replace(".md#", ".html#")
        return f'{match[1]}<a href="{"../" * page.count("/")}{to[1:]}">{match[2]}</a>'

    return DEFINITION.sub(one, text)


# ---------------------------------------------------------------- formulas


class Typesetter:
    """TeX to SVG; equal formulas are typeset once, and a page keeps each glyph once."""

    def __init__(self) -> None:
        self.engine = MathJaxRenderer()
        self.done: dict[tuple[str, bool], str] = {}
        self.errors: list[str] = []
        self.page = ""

    def svg(self, tex: str, display: bool) -> str:
        """One formula; a bad one is noted."""
        key = (tex, display)
        if key not in self.done:
            try:
                svg = self.engine.render(tex, display=display)
            except MathJaxRenderError as e:
                svg = f"<svg data-mjx-error='{html.escape(str(e))}'></svg>"
            self.done[key] = svg
        svg = self.done[key]
        unknown = re.search(
            r'data-mml-node="mtext"[^>]*fill="red"|fill="red"[^>]*data-mml-node="mtext"', svg
        )
        if "data-mjx-error" in svg or "merror" in svg or unknown:
            why = re.search(r'data-mjx-error=["\']([^"\']*)', svg)
            self.errors.append(
                f"{self.page}: bad formula ({why[1] if why else 'unknown command'}): {tex}"
            )
        return svg

    def typeset(self, text: str, page: str) -> tuple[str, int]:
        """The page with its formulas as pictures, and how many there were."""
        self.page = page
        glyphs: dict[str, str] = {}

        def one(match: re.Match[str]) -> str:
            tex = html.unescape(match[2]).strip()
            svg = self.svg(tex, match[1] == "display")
            glyphs.update(GLYPH.findall(svg))
            svg = re.sub(r"<defs>.*?</defs>", "", GLYPH.sub("", svg), flags=re.S)
            svg = re.sub(r'(xlink:href="#)MJX-\d+-', r"\1g-", svg)
            svg = re.sub(r' (?:data-[\w-]+|focusable|role)="[^"]*"', "", svg)
            label = html.escape(tex, quote=True).replace("\n", " ")
            svg = svg.replace("<svg ", f'<svg class="math-svg" role="img" aria-label="{label}" ', 1)
            focus = (
                ' tabindex="0"' if match[1] == "display" else ""
            )  # the keyboard can scroll a wide one
            return f'<span class="math {match[1]}"{focus}>{svg}</span>'

        text, count = MATH.subn(one, text)
        text = KATEX.sub("", text)
        if glyphs:
            paths = "".join(f'<path id="g-{k}" d="{d}"/>' for k, d in glyphs.items())
            sheet = f'<svg class="math-glyphs" aria-hidden="true"><defs>{paths}</defs></svg>'
            text = re.sub(r"(<body\b[^>]*>)", lambda m: f"{m[1]}\n{sheet}", text, count=1)
        return text, count


# ---------------------------------------------------------------- after: check what was built


class Reader(HTMLParser):
    """The ids, links, loaded resources and prose of one page."""

    def __init__(self) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.prose: list[str] = []
        self.stack: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note what the tag refers to."""
        a = {k: v or "" for k, v in attrs}
        if tag not in VOID:
            self.stack.append(tag)
        self.ids |= {a[k] for k in ("id", "name") if k in a}
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


def check_site(site: Path) -> list[str]:
    """What is wrong with the built pages."""
    bad: list[str] = []
    pages: dict[Path, Reader] = {}
    for path in sorted(site.rglob("*.html")):
        pages[path] = reader = Reader()
        reader.feed(path.read_text(encoding="utf-8"))
    for path, reader in pages.items():
        name = path.relative_to(site).as_posix()
        tex = RAW_TEX.search(" ".join(reader.prose))
        if tex:
            around = " ".join(reader.prose)[max(0, tex.start() - 30) : tex.end() + 50]
            bad.append(f"{name}: TeX is left on the page: ...{around!r}...")
        for href in [*reader.links, *reader.loads]:
            url = urlsplit(href)
            if url.scheme or url.netloc:
                if href in reader.loads and url.scheme != "data":
                    bad.append(f"{name}: loads {href} from another host")
                continue
            target = (path.parent / unquote(url.path)).resolve() if url.path else path
            target = target / "index.html" if target.is_dir() else target
            if not target.is_file() or not target.is_relative_to(site):
                bad.append(f"{name}: broken link {href}")
            elif (
                url.fragment and target in pages and unquote(url.fragment) not in pages[target].ids
            ):
                bad.append(f"{name}: broken link {href}: there is no such heading")
    for css in site.rglob("*.css"):
        for url in REMOTE_CSS.findall(css.read_text(encoding="utf-8")):
            bad.append(f"{css.relative_to(site)}: loads {url} from another host")
    return bad


DOOR = f"""<!doctype html><html lang="en"><head><meta charset="utf-8"><title>pc_transformer</title>
<meta http-equiv="refresh" content="0; url={HOME}"><link rel="canonical" href="{HOME}"></head>
<body><a href="{HOME}">pc_transformer</a></body></html>
"""


def build_site(root: Path, out: Path) -> list[str]:
    """Build the site into `out`; return what is wrong with it."""
    config = yaml.safe_load((root / "_quarto.yml").read_text(encoding="utf-8"))
    if bad := bibliography.faults(root):
        return bad
    made_pages = make_pages.pages(root)
    bad = check_sidebar(root, config, list(made_pages))
    with tempfile.TemporaryDirectory() as tmp:
        work = Path(tmp).resolve()
        bad += stage(root, config, made_pages, work)
        try:
            site = build(work, quiet=True)
        except (BuildError, ConfigError) as e:
            return [*bad, str(e)]
        bad += [
            str(w) for w in site.warnings if "broken link" not in w
        ]  # check_site finds these too
        made = work / config["project"]["output-dir"]
        setter = Typesetter()
        total = 0
        entries = reference.defined(modules(root))
        for path in sorted(made.rglob("*.html")):
            page = path.relative_to(made).as_posix()
            text, count = setter.typeset(path.read_text(encoding="utf-8"), page)
            mine = entries.get(page.replace(".html", ".ipynb"), {})
            path.write_text(link_definitions(text, page, mine), encoding="utf-8")
            total += count
        bad += setter.errors
        for css in made.glob("site_libs/themes/*.css"):
            css.write_text(WEB_FONT.sub("", css.read_text(encoding="utf-8")), encoding="utf-8")
        (made / "index.html").write_text(DOOR, encoding="utf-8")
        bad += check_site(made)
        if out.exists():
            shutil.rmtree(out)
        shutil.copytree(made, out)
    print(f"{out}: {len(site.pages)} pages, {total} formulas ({len(setter.done)} different)")
    return list(dict.fromkeys(bad))


def main() -> int:
    """Build the site; 1 when anything is wrong with it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--root", type=Path, default=ROOT, help="the repository (default: this one)"
    )
    parser.add_argument(
        "--out", type=Path, help="the output folder, replaced (default: _docs in the repository)"
    )
    args = parser.parse_args()
    out = (args.out or args.root / "_docs").resolve()
    if out.exists() and not (out / "site_libs").is_dir() and any(out.iterdir()):
        parser.error(f"{out} is not empty and is not a built site")
    bad = build_site(args.root.resolve(), out)
    for line in bad:
        print(f"error: {line}", file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
