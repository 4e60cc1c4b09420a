"""Citations: `[@key]` in a notebook leads to an entry of nbs/bibliography.yml.

An entry of that file is

    song2020:                       # the key, in the order of the alphabet
      author: [Yuhang Song, Thomas Lukasiewicz, Zhenghua Xu, Rafal Bogacz]
      title: Can the brain do backpropagation?
      year: 2020
      where: NeurIPS 33             # journal, conference or publisher, with volume and pages
      url: https://arxiv.org/abs/2103.04689                                        # may be missing
      use: The order of updates in which predictive coding equals backpropagation.

A surname is the last word of a name, or what stands before a comma ("Oord, Aaron van den").
`[@song2020]` is shown as (Song et al. 2020), `[@song2020; @friston2005]` as one pair of brackets.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import book
import yaml

Entries = dict[str, dict[str, Any]]
FILE = "nbs/bibliography.yml"
PAGE = "reference/bibliography.md"
NEEDS, MAY = {"author", "title", "year", "where", "use"}, {"url"}
CITED = re.compile(r"(```.*?```|`[^`\n]*`)|\[(@[\w-]+(?:;\s*@[\w-]+)*)\]", re.S)  # code is no prose


def read(root: Path) -> Entries:
    """The entries of the bibliography, by their keys; none where there is no file."""
    path = root / FILE
    return (yaml.safe_load(path.read_text(encoding="utf-8")) or {}) if path.exists() else {}


def citing(root: Path) -> dict[str, list[Path]]:
    """The notebooks that cite each key."""
    found: dict[str, list[Path]] = {}
    for path in book.notebooks(root):
        cells = [c for c in book.read(path)["cells"] if c["cell_type"] == "markdown"]
        for key in sorted({k for cell in cells for k in keys(cell["source"])}):
            found.setdefault(key, []).append(path)
    return found


def faults(root: Path) -> list[str]:
    """What is wrong with the file, and the citations that lead nowhere."""
    entries = read(root)
    bad = [f"{FILE}: the keys are not in order"] if list(entries) != sorted(entries) else []
    for key, entry in entries.items():
        if lacks := NEEDS - entry.keys():
            bad.append(f"{FILE}: {key} lacks {', '.join(sorted(lacks))}")
        if more := entry.keys() - NEEDS - MAY:
            bad.append(f"{FILE}: {key} has {', '.join(sorted(more))}, which nothing reads")
        if not isinstance(entry.get("author"), list):
            bad.append(f"{FILE}: the author of {key} must be a list, [First Last, First Last]")
    for key, paths in citing(root).items():
        if key not in entries:
            places = ", ".join(path.relative_to(root).as_posix() for path in paths)
            bad.append(f"{places}: cites {key}, which {FILE} lacks")
    return bad


def label(entry: dict[str, Any]) -> str:
    """How a text names an entry: Song et al. 2020."""
    names = [n.split(",")[0] if "," in n else n.split()[-1] for n in entry["author"]]
    who = " and ".join(names) if len(names) < 3 else f"{names[0]} et al."
    return f"{who} {entry['year']}"


def keys(text: str) -> list[str]:
    """The keys that a text cites."""
    return [k for m in CITED.finditer(text) if m[2] for k in re.findall(r"@([\w-]+)", m[2])]


def cite(text: str, entries: Entries, link: str | None = f"/{PAGE}") -> str:
    """The text with its citations as links to the page, or as words alone; an unknown key stays
    as it is."""

    def one(key: str) -> str:
        name = label(entries[key])
        return f"[{name}]({link}#{key})" if link else name

    def group(match: re.Match[str]) -> str:
        found = keys(match[0])
        known = bool(match[2]) and all(key in entries for key in found)
        return f"({'; '.join(map(one, found))})" if known else match[0]

    return CITED.sub(group, text)


def page(root: Path) -> str:
    """The page of all entries, in Markdown."""
    lines = [
        "---",
        "title: Bibliography",
        "---",
        "",
        "What this book builds on.",
        "",
        "## Works",
        "",
    ]
    entries, cited = read(root), citing(root)
    for key, e in sorted(entries.items(), key=lambda kv: label(kv[1]).lower()):
        title = f"[{e['title']}]({e['url']})" if "url" in e else e["title"]
        links = [
            f"[{book.title(p)}](/{p.relative_to(root).as_posix()})" for p in cited.get(key, ())
        ]
        lines += [
            f"::: {{#{key} .work}}",
            f"{', '.join(e['author'])} ({e['year']}). **{title}.** {e['where']}.\\",
            f"*Used here:* {e['use']}" + ("\\" if links else ""),
            *([f"*Cited by:* {', '.join(links)}"] if links else []),
            ":::",
            "",
        ]
    return "\n".join(lines)
