"""The docs site: it builds offline, and the checks of the build do find what is wrong."""

import json
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
FLAGS += [
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-extensions",
]
PHONE = 390  # CSS pixels
BOOK = sorted(
    p
    for p in ROOT.glob("nbs/**/*.ipynb")
    if not any(x[0] in "_." for x in p.relative_to(ROOT).parts)
)

pytest.importorskip("smalldocs", reason="the docs extra is not installed")


def build(root: Path, out: Path) -> subprocess.CompletedProcess[str]:
    """Build the site of a repository."""
    cmd = [
        sys.executable,
        str(ROOT / "tools/build_docs.py"),
        "--root",
        str(root),
        "--out",
        str(out),
    ]
    return subprocess.run(cmd, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site: the one that `make test` has just made, or else a fresh one."""
    given = os.environ.get("PC_TRANSFORMER_SITE")
    if given and (Path(given) / "index.html").is_file():
        return Path(given)
    out = tmp_path_factory.mktemp("docs") / "site"
    done = build(ROOT, out)
    assert done.returncode == 0, done.stderr
    return out


def pages(site: Path) -> list[Path]:
    """The pages that notebooks became."""
    return sorted((site / "nbs").rglob("*.html"))


def find(site: Path, query: str) -> list[list[str]]:
    """What the search of the built site finds: title, section and address."""
    quickjs = pytest.importorskip("quickjs")
    engine = quickjs.Context()
    engine.eval((ROOT / "tools/search.js").read_text(encoding="utf-8"))
    engine.set("index", (site / "search.json").read_text(encoding="utf-8"))
    call = f"foundSections(JSON.parse(index), {json.dumps(query)}, 8)"
    row = "(e) => [e.title, e.section, e.href]"
    return json.loads(engine.eval(f"JSON.stringify({call}.map({row}))"))


@pytest.mark.parametrize(
    ("query", "first"),
    [
        ("energy", "The categorical energy"),
        ("free energy", "The free energy"),
        ("nanogpt", "nanoGPT"),
        ("PCTransformer", "PCTransformer"),
        ("kv CACHE", "The KV cache"),
    ],
)
def test_search_finds(site: Path, query: str, first: str) -> None:
    """The section that is called so comes first."""
    title, section, href = find(site, query)[0]
    assert (section or title) == first
    assert (site / href.split("#")[0]).is_file()


def test_search_wants_every_word(site: Path) -> None:
    """Nothing is found for a word that is nowhere, and the script of the pages searches so."""
    assert find(site, "energy xyzzy") == []
    assert "foundSections(index, q" in (site / "site_libs/smalldocs.js").read_text(encoding="utf-8")


def references(site: Path) -> list[Path]:
    """The pages that no notebook became."""
    return sorted((site / "reference").rglob("*.html"))


def test_one_page_for_each_notebook(site: Path) -> None:
    """Every notebook is a page, and the front page leads to the first."""
    there = [p.relative_to(ROOT).with_suffix("") for p in BOOK]
    assert [p.relative_to(site).with_suffix("") for p in pages(site)] == there
    assert "nbs/index.html" in (site / "index.html").read_text(encoding="utf-8")


def test_pages_are_whole(site: Path) -> None:
    """Title, navigation, search, dark mode and style are there; nothing comes from another host."""
    for page in pages(site):
        text = page.read_text(encoding="utf-8")
        for need in (
            "<title>",
            'id="quarto-sidebar"',
            "site.css",
            'name="viewport"',
            "quarto-color-scheme",
        ):
            assert need in text, f"{page.name} lacks {need}"
        assert not re.search(r"<(script|link|img)\b[^>]*(src|href)=\"(https?:)?//", text), page.name
        words = re.sub(r"base64,[A-Za-z0-9+/=]+", "", text)  # a picture's bytes may spell anything
        assert "katex" not in words.lower(), page.name
    assert json.loads((site / "search.json").read_text(encoding="utf-8"))


def test_formulas_are_pictures_with_a_label(site: Path) -> None:
    """Each formula is an SVG that a screen reader can read; its glyphs are on the page."""
    total = 0
    for page in pages(site):
        text = page.read_text(encoding="utf-8")
        svgs = re.findall(r'<svg class="math-svg"[^>]*>', text)
        total += len(svgs)
        assert all('role="img"' in s and "aria-label=" in s for s in svgs), page.name
        used = set(re.findall(r'xlink:href="#(g-[^"]+)"', text))
        assert used <= set(re.findall(r'<path id="(g-[^"]+)"', text)), page.name
    assert total > 0


SICK = {
    "bad formula": (r"$\frac{a$", "bad formula"),
    "unknown command": (r"$\notacommand{a}$", "bad formula"),
    "broken link": ("[gone](nowhere.ipynb)", "broken link"),
    "link to a file that is not where it says": ("[gone](../../_quarto.yml)", "broken link"),
    "broken anchor": ("[gone](#nowhere)", "broken link"),
    "picture from another host": ("![x](https://example.org/x.png)", "another host"),
    "TeX that is left": (r"\begin{align} a \end{align}", "TeX is left"),
    "picture without a text": ("![](x.png)", "picture(s) without a text"),
    "page that takes too long": ("<!-- {} -->", "a visit takes"),
}


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A repository of one healthy page."""
    (tmp_path / "nbs").mkdir()
    (tmp_path / "tools").mkdir()
    shutil.copy(ROOT / "tools/site.css", tmp_path / "tools")
    config = (ROOT / "_quarto.yml").read_text(encoding="utf-8")
    made = re.compile(r"^      - text: \w+\n        href: reference/.*\n", re.M)
    config = made.sub("", config)  # the navigation bar's links to pages that it does not make
    head, tail = config[: config.index("    contents:")], config[config.index("\nformat:") :]
    (tmp_path / "_quarto.yml").write_text(
        f"{head}    contents: [nbs/index.ipynb]\n{tail}", encoding="utf-8"
    )
    write(tmp_path, "index", r"Well: $\frac12 x_l^2$.")
    return tmp_path


def write(root: Path, name: str, text: str) -> None:
    """Write a notebook of one cell."""
    cell = {
        "cell_type": "markdown",
        "id": "a",
        "metadata": {},
        "source": f"# Title\n\n## Part\n\n{text}\n",
    }
    nb = {"cells": [cell], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}
    (root / "nbs" / f"{name}.ipynb").write_text(json.dumps(nb), encoding="utf-8")


def test_a_healthy_page_builds(tiny: Path) -> None:
    """So that the next tests fail for the right reason."""
    done = build(tiny, tiny / "out")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", SICK)
def test_a_sick_page_fails(tiny: Path, name: str) -> None:
    """Each fault ends the build with exit 1 and is named."""
    text, message = SICK[name]
    noise = random.Random(0).randbytes(700_000).hex()  # nothing makes it shorter than 700 kB
    write(tiny, "index", text.replace("{}", noise))
    (tiny / "nbs/x.png").write_bytes(b"")
    done = build(tiny, tiny / "out")
    assert done.returncode == 1
    assert message in done.stderr


def test_links_between_folders_and_out_of_the_book(tiny: Path) -> None:
    """A page in a folder links to pages above and beside it, and to a file of the repository in
    its place."""
    for folder in ("0_theory", "1_model"):
        (tiny / "nbs" / folder).mkdir()
    links = "[home](../index.ipynb) [other](../1_model/01_b.ipynb#part) [config](../../_quarto.yml)"
    write(tiny, "0_theory/01_a", links)
    write(tiny, "1_model/01_b", "B.")
    config = tiny / "_quarto.yml"
    text = config.read_text(encoding="utf-8")
    names = "nbs/index.ipynb, nbs/0_theory/01_a.ipynb, nbs/1_model/01_b.ipynb"
    config.write_text(text.replace("[nbs/index.ipynb]", f"[{names}]"), encoding="utf-8")
    done = build(tiny, tiny / "out")
    assert done.returncode == 0, done.stderr
    page = (tiny / "out/nbs/0_theory/01_a.html").read_text(encoding="utf-8")
    for href in (
        "../index.html",
        "../1_model/01_b.html#part",
        "https://github.com/pc-transformer/pc_transformer/blob/main/_quarto.yml",
    ):
        assert f'href="{href}"' in page, href


def test_a_caption_is_the_text_of_its_picture(tiny: Path) -> None:
    """Of each picture of a cell; one without a caption is named after its section."""
    picture = {"data": {"image/png": "aGk="}, "metadata": {}, "output_type": "display_data"}
    cells = [
        {"cell_type": "markdown", "id": "a", "metadata": {}, "source": "# Title\n\n## Part"},
        *(
            {
                "cell_type": "code",
                "id": f"c{n}",
                "metadata": {},
                "execution_count": None,
                "source": source,
                "outputs": outputs,
            }
            for n, (source, outputs) in enumerate(
                [
                    ('#| fig-cap: "Losses < 1"\nf()', [picture]),
                    ("#| fig-cap:\n#|   - One\n#|   - Two\nf()", [picture, picture]),
                    ("f()", [picture]),
                ]
            )
        ),
    ]
    nb = {"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}
    (tiny / "nbs/index.ipynb").write_text(json.dumps(nb), encoding="utf-8")
    done = build(tiny, tiny / "out")
    assert done.returncode == 0, done.stderr
    page = (tiny / "out/nbs/index.html").read_text(encoding="utf-8")
    texts = re.findall(r'<img[^>]*\balt="([^"]*)"', page)
    assert texts == ["Losses &lt; 1", "One", "Two", "A picture of the section Part"]
    assert 'id="c0"' in page, "the reference links to cells"


WORK = """
song2020:
  author: [Yuhang Song, Thomas Lukasiewicz, Zhenghua Xu]
  title: Can the brain do backpropagation?
  year: 2020
  where: NeurIPS 33
  use: The order of updates.
"""


def cites(root: Path, works: str, text: str) -> None:
    """A bibliography, and a front page that cites."""
    (root / "nbs/bibliography.yml").write_text(works, encoding="utf-8")
    config = root / "_quarto.yml"
    names = "[nbs/index.ipynb, reference/bibliography.md]"
    found = config.read_text(encoding="utf-8").replace("[nbs/index.ipynb]", names)
    config.write_text(found, encoding="utf-8")
    write(root, "index", text)


def test_citations_lead_to_the_bibliography(tiny: Path) -> None:
    """`[@key]` names the work and leads to its entry, which leads back; code stays as it is."""
    cites(tiny, WORK, "So it is [@song2020], or [@song2020; @song2020]. Code: `[@song2020]`.")
    done = build(tiny, tiny / "out")
    assert done.returncode == 0, done.stderr
    page = (tiny / "out/nbs/index.html").read_text(encoding="utf-8")
    link = '<a href="../reference/bibliography.html#song2020">Song et al. 2020</a>'
    assert f"({link})" in page and f"({link}; {link})" in page
    assert "<code>[@song2020]</code>" in page
    works = (tiny / "out/reference/bibliography.html").read_text(encoding="utf-8")
    assert 'id="song2020"' in works and '<a href="../nbs/index.html">Title</a>' in works


@pytest.mark.parametrize(
    ("works", "text", "message"),
    [
        (WORK, "[@song2021]", "nbs/index.ipynb: cites song2021, which nbs/bibliography.yml lacks"),
        (WORK.replace("  year: 2020\n", ""), "", "song2020 lacks year"),
        (WORK.replace("use:", "for:"), "", "song2020 has for, which nothing reads"),
        (WORK.replace("[Yuhang", "Yuhang").replace("Xu]", "Xu"), "", "must be a list"),
        (WORK + WORK.replace("song2020", "rao1999"), "", "the keys are not in order"),
    ],
)
def test_a_citation_that_leads_nowhere_fails(
    tiny: Path, works: str, text: str, message: str
) -> None:
    """An unknown key and an entry that is not whole end the build."""
    cites(tiny, works, text)
    done = build(tiny, tiny / "out")
    assert done.returncode == 1
    assert message in done.stderr


def test_a_page_outside_the_sidebar_fails(tiny: Path) -> None:
    """A chapter cannot be forgotten."""
    write(tiny, "99_new", "New.")
    done = build(tiny, tiny / "out")
    assert done.returncode == 1
    assert "does not name nbs/99_new.ipynb" in done.stderr


def test_a_missing_page_fails(tiny: Path) -> None:
    """The sidebar names no page in vain."""
    write(tiny, "other", "Other.")
    (tiny / "nbs/index.ipynb").unlink()
    done = build(tiny, tiny / "out")
    assert done.returncode == 1
    assert "names nbs/index.ipynb, which does not exist" in done.stderr


COLUMNS = """<!doctype html><title>probe</title><pre id="result">running</pre>
<iframe id="f" style="border:0;width:1280px;height:800px" src="nbs/index.html"></iframe><script>
document.getElementById("f").onload = () => setTimeout(() => {
  const wide = Array.from(document.getElementById("f").contentDocument.querySelectorAll("main pre"))
    .map((pre) => [pre.scrollWidth, pre.clientWidth]);
  document.getElementById("result").textContent = "done " + JSON.stringify(wide);
}, 200);
</script>"""


PROBE = """<!doctype html><title>probe</title><pre id="result">running</pre><script>
const pages = %s, wide = [], frame = document.createElement("iframe");
frame.style = "border:0;width:%dpx;height:800px"; document.body.append(frame);
async function look(page) {
  await new Promise(done => { frame.onload = done; frame.src = page; });
  const doc = frame.contentDocument, root = doc.scrollingElement;
  await new Promise(done => setTimeout(done, 100));
  const view = frame.contentWindow, scrolls = e => view.getComputedStyle(e).overflowX != "visible";
  const beyond = e => e.getBoundingClientRect().right > %d + 1;
  const out = Array.from(doc.querySelectorAll("main *")).filter(beyond);
  for (const e of out) {
    let box = e.parentElement;
    while (box.tagName != "MAIN" && !scrolls(box)) box = box.parentElement;
    if (box.tagName == "MAIN") { wide.push(page + ": wide " + e.outerHTML.slice(0, 80)); break; }
  }
  if (root.scrollWidth > root.clientWidth) wide.push(page + ": " + root.scrollWidth + " px");
  for (const img of doc.images)
    if (img.complete && !img.naturalWidth) wide.push(page + ": broken picture");
  for (const link of doc.querySelectorAll("link[rel=stylesheet]"))
    if (!link.sheet) wide.push(page + ": no " + link.getAttribute("href"));
}
(async () => {
  for (const page of pages) await look(page);
  document.getElementById("result").textContent = "done " + JSON.stringify(wide);
})();
</script>"""


def probe(work: Path, page: str) -> list[Any]:
    """What the script of a page finds out in a browser."""
    (work / "probe.html").write_text(page, encoding="utf-8")
    cmd = [
        str(CHROMIUM),
        *FLAGS,
        f"--user-data-dir={work.parent / 'profile'}",
        "--allow-file-access-from-files",
        "--window-size=1280,1600",
        "--virtual-time-budget=60000",
        "--dump-dom",
        (work / "probe.html").as_uri(),
    ]
    done = subprocess.run(cmd, capture_output=True, text=True, timeout=120, check=False)
    found = re.search(r'<pre id="result">(.*?)</pre>', done.stdout, re.S)
    assert found and found[1].startswith("done"), done.stderr[-2000:]
    return json.loads(found[1].removeprefix("done "))


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_no_page_is_wider_than_a_phone(site: Path, tmp_path: Path) -> None:
    """At 390 px nothing scrolls sideways but boxes of their own; pictures and styles load."""
    work = tmp_path / "site"
    shutil.copytree(site, work)
    urls = [p.relative_to(site).as_posix() for p in [*pages(site), *references(site)]]
    assert probe(work, PROBE % (json.dumps(urls), PHONE, PHONE)) == []


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_a_line_of_code_is_seen_whole(tiny: Path) -> None:
    """A hundred columns of code stand side by side on a screen of 1280 px."""
    write(tiny, "index", "```python\n" + "x" * 100 + "\n```")
    assert build(tiny, tiny / "out").returncode == 0
    ((needed, given),) = probe(tiny / "out", COLUMNS)
    assert needed <= given


@pytest.mark.parametrize("path", BOOK, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_every_cell_that_draws_has_its_picture(path: Path) -> None:
    """Notebooks that were run with a matplotlib backend set keep no figures, and nothing else
    would say so."""
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        draws = cell["cell_type"] == "code" and (
            "plt.subplots(" in source or "plt.show()" in source
        )
        if draws and not source.startswith(("#| export", "#| slow", "#| eval")):
            assert any("image/png" in o.get("data", {}) for o in cell["outputs"]), (
                f"{path.name}: {cell['id']} has no figure"
            )
