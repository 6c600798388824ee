"""What `mkdocs build` does beside its plugins; see `hooks` in mkdocs.yml."""

import html
import re

from math_core import LatexError, LatexToMathML
from mkdocs.exceptions import PluginError

_NO_RUN = re.compile(r"^([ >]*`{3,}python) no-run[ ]*$", re.MULTILINE)
# What pymdownx.arithmatex leaves of $...$ and of $$...$$ in its generic mode.
_MATH = re.compile(
    r'<(?P<tag>span|div) class="arithmatex">(?:\\\(|\\\[)(?P<latex>.*?)(?:\\\)|\\\])</(?P=tag)>',
    re.DOTALL,
)
_CONVERTER = LatexToMathML(fancy_error=False)


def on_page_markdown(markdown, **_):
    """Drop the tests' `no-run` mark, which the highlighter takes for a broken option."""
    return _NO_RUN.sub(r"\1", markdown)


def on_page_content(content, page, **_):
    """Turn LaTeX into MathML, so that pages need no script to show it."""

    def mathml(match):
        latex = html.unescape(match["latex"]).strip()
        try:
            return _CONVERTER.convert_with_local_state(latex, displaystyle=match["tag"] == "div")
        except LatexError as error:
            raise PluginError(f"{page.file.src_path}: cannot show {latex!r}: {error}") from error

    return _MATH.sub(mathml, content)
