"""Formulas of the site, typeset by MathJax to SVG when it is built."""

from __future__ import annotations

import html
import re

from quickjax import MathJaxRenderer, MathJaxRenderError

MATH = re.compile(r'<span class="math (inline|display)">\\[(\[](.*?)\\[)\]]</span>', re.S)
KATEX = re.compile(
    r"<(?:link|script)\b[^>]*katex[^>]*>(?:\s*</script>)?\s*"
    r"|<script>[^<]*renderMathInElement.*?</script>\s*",
    re.S,
)
GLYPH = re.compile(r'<path id="MJX-\d+-([^"]+)" d="([^"]*)"/>')


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
