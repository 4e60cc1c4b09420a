#!/usr/bin/env python
"""Build the docs site from `_quarto.yml` without Quarto and without a network.

Filter the notebooks, make the reference and the bibliography, render all with smalldocs, typeset
every formula with MathJax to SVG, and check the result: every page is in the sidebar, every formula
is good, no TeX is left, every link leads somewhere, every picture has a text, and no page is heavy
or loads anything from another host. Any warning fails the build.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
import tempfile
from functools import cache, partial
from pathlib import Path
from typing import Any

import bibliography
import make_pages
import reference
import yaml
from api import modules
from book import notebooks
from check_site import check_site
from nb_filter import filter_notebook
from smalldocs import highlight
from smalldocs.config import BuildError, ConfigError
from smalldocs.site import build
from typeset import Typesetter

ROOT = Path(__file__).resolve().parents[1]
SEARCH_SCRIPT = ROOT / "tools/search.js"
HOME = "nbs/index.html"
REPO_LINK = re.compile(r"\]\(((?:\.\./)+[^)\s#]+)(#[^)\s]*)?\)")
WEB_FONT = re.compile(r"@import\s+url\([^)]*\);?")  # the themes fall back to the reader's own fonts
HEADING = re.compile(r"^#+ (.+)$", re.M)
CAPTION = re.compile(r"^#\| fig-(?:cap|alt):", re.M)
FIGURE = re.compile(
    r'(<figure class="figure">\s*<p>)<img (src="[^"]*" class="img-fluid")'
    r"(></p>\s*<figcaption>(.*?)</figcaption>)",
    re.S,
)
DEFINITION = re.compile(  # at the start of a line
    r'(?:(?<=\n)|(?<=<code class="sourceCode python">))'
    r'(<span class="kw">(?:class</span> |def</span> <span class="fu">))(\w+)'
)

# ---------------------------------------------------------------- before: a filtered copy


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


def options(cell: dict[str, Any], text: str, heading: str) -> list[str]:
    """What is added to a cell: Quarto's anchor, and a text for a picture that has no caption."""
    added = [] if "#| label:" in text else [f'#| label: "{cell.get("id")}"']
    if any("image/png" in o.get("data", {}) for o in cell.get("outputs", [])):
        if not CAPTION.search(text):
            added.append(f"#| fig-alt: {json.dumps(f'A picture of the section {heading}')}")
    return added


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
        heading = ""
        for cell in nb["cells"]:
            text = "".join(cell["source"])
            if cell["cell_type"] == "markdown":
                # a link to a file of the repository leads to its page there
                cell["source"] = REPO_LINK.sub(public, text)
                heading = [heading, *HEADING.findall(text)][-1]
            else:
                cell["source"] = "\n".join([*options(cell, text, heading), text])
            if any(o["output_type"] == "error" for o in cell.get("outputs", [])):
                bad.append(
                    f"{path.relative_to(root)}: cell {cell.get('id')} has an error among its saved"
                    " outputs"
                )
        place = to / path.relative_to(root)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(json.dumps(nb, ensure_ascii=False), encoding="utf-8")
    return bad


def captions_as_texts(text: str) -> str:
    """The page, where a picture's caption is also its text for a reader who sees none."""
    return FIGURE.sub(lambda m: f'{m[1]}<img alt="{m[4]}" {m[2]}{m[3]}', text)


def link_definitions(text: str, page: str, entries: dict[str, str]) -> str:
    """The page, where each name that its code defines leads to the name's entry."""

    def one(match: re.Match[str]) -> str:
        if match[2] not in entries:
            return match[0]
        to = entries[match[2]].replace(".md#", ".html#")
        return f'{match[1]}<a href="{"../" * page.count("/")}{to[1:]}">{match[2]}</a>'

    return DEFINITION.sub(one, text)


SEARCH = re.compile(r"const hits = fuse \?.*?\.slice\(0, limit\);", re.S)
FUSE = re.compile(r'<script src="[^"]*fuse[^"]*"></script>\s*')


def simple_search(site: Path, script: str) -> list[str]:
    """Let the search find words, where smalldocs looks for what is spelled alike."""
    path = site / "site_libs/smalldocs.js"
    call = "const hits = foundSections(index, q, limit);"
    text, count = SEARCH.subn(call, path.read_text(encoding="utf-8"))
    path.write_text(script + text, encoding="utf-8")
    shutil.rmtree(site / "site_libs/fuse")
    return [] if count == 1 else ["smalldocs.js: the search is not where it was"]


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
        highlight.css_class = cache(highlight.css_class)  # a third of the time without
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
            text = captions_as_texts(link_definitions(FUSE.sub("", text), page, mine))
            path.write_text(text, encoding="utf-8")
            total += count
        bad += setter.errors
        for css in made.glob("site_libs/themes/*.css"):
            css.write_text(WEB_FONT.sub("", css.read_text(encoding="utf-8")), encoding="utf-8")
        (made / "index.html").write_text(DOOR, encoding="utf-8")
        bad += simple_search(made, SEARCH_SCRIPT.read_text(encoding="utf-8"))
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
