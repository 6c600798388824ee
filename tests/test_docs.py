"""What README.md, docs/ and the docstrings show is true: all their examples run."""

import doctest
import importlib
import re
import sys
import textwrap
import types
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "docs" / "examples").glob("*.md"))
PAGES = [ROOT / "README.md", *sorted(set((ROOT / "docs").rglob("*.md")) - set(EXAMPLES))]
SLOW = {"characters", "gpt2", "jax", "new_structure", "not_learning"}
NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
PACKAGES = [ROOT / "singd_core", *sorted((ROOT / "frontends").glob("singd_*"))]
FENCE = re.compile(r"[ >]*(?P<fence>`{3,}|~{3,})[ ]*(?P<info>[^`]*)")


class Block(NamedTuple):
    """A fenced block of a page: its info string, the line its code starts on, and the code."""

    info: str
    line: int
    code: str


def blocks(markdown: str) -> list[Block]:
    """All fenced blocks; a fence inside a longer fence is text, as in Markdown."""
    found: list[Block] = []
    lines = iter(enumerate(markdown.splitlines(), start=1))
    for number, line in lines:
        if not (opening := FENCE.fullmatch(line)):
            continue
        fence = opening["fence"]
        code = []
        for _, inner in lines:
            stripped = inner.strip()
            if len(stripped) >= len(fence) and set(stripped) == {fence[0]}:
                break
            code.append(inner)
        else:
            raise ValueError(f"the block that opens on line {number} is never closed")
        found.append(
            Block(opening["info"].strip(), number + 1, textwrap.dedent("\n".join(code)) + "\n")
        )
    return found


def modules() -> list[str]:
    """The names of all modules of all packages, found without importing them."""
    names = []
    for package in PACKAGES:
        for path in sorted(package.rglob("*.py")):
            parts = path.relative_to(package.parent).with_suffix("").parts
            if parts[-1] != "__main__":
                names.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return names


def marked(pages: list[Path]) -> list:
    """Pages as parameters of a test, the slow ones marked as such."""
    return [
        pytest.param(
            page,
            marks=[pytest.mark.slow] if page.stem in SLOW else [],
            id=page.relative_to(ROOT).as_posix(),
        )
        for page in pages
    ]


def skip_without_framework(module: str) -> None:
    """Skip the test when `module` belongs to a frontend whose framework is not installed."""
    framework = module.split(".")[0].removeprefix("singd_")
    if framework != "core":
        found = pytest.importorskip(framework)
        if framework == "cupy" and not found.cuda.is_available():
            pytest.skip("singd_cupy needs a GPU; tests/cupy_frontend tests it without one")


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    """Examples write their files into a temporary directory and their figures to no screen."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")


def run(page, monkeypatch):
    """Run the Python blocks of a page as one program."""
    # A registered module, because dataclasses and pickle look for the module of a class.
    module = types.ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", module)
    for info, line, code in blocks(page.read_text(encoding="utf-8")):
        if not info or info.split()[0] != "python":
            continue
        # Leading empty lines make a traceback point at the line in the page.
        program = compile("\n" * (line - 1) + code, str(page), "exec", dont_inherit=True)
        if info != "python no-run":
            exec(program, vars(module))


@pytest.mark.parametrize("page", marked(PAGES))
def test_the_python_examples_of_a_page_run(page, monkeypatch):
    run(page, monkeypatch)


# What lightning says of the loaders of an example, and how it asks torch for a leaf of a tree.
@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)`:FutureWarning")
@pytest.mark.parametrize("page", marked(EXAMPLES))
def test_an_example_prints_what_its_page_shows(page, monkeypatch, capsys):
    importlib.import_module(
        "torchvision_on_cpu"
    )  # as transformers and lightning import torchvision
    run(page, monkeypatch)
    printed = capsys.readouterr().out.strip()
    (shown,) = (
        b.code.strip() for b in blocks(page.read_text(encoding="utf-8")) if b.info == "text"
    )
    assert NUMBER.sub("#", printed) == NUMBER.sub("#", shown)
    for ours, theirs in zip(*(NUMBER.findall(text) for text in (printed, shown)), strict=True):
        # another processor rounds otherwise, and training carries that on: a few samples, or 0.05
        a, b = (float(number.replace(",", "")) for number in (ours, theirs))
        assert abs(a - b) <= 0.05 + 0.05 * b, (ours, theirs)


@pytest.mark.parametrize("name", modules())
def test_the_examples_in_docstrings_run(name):
    skip_without_framework(name)
    module = importlib.import_module(name)
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    # Failures are printed, and pytest shows what a failed test has printed.
    assert doctest.testmod(module, optionflags=flags).failed == 0


def test_blocks_reads_fences_as_markdown_does():
    page = textwrap.dedent(
        """\
        ```python
        a = 1
        ```
        Text with `code`, and ```code```.
        - an item
            ```python no-run
            if a:
                b = 2
            ```
        ````markdown
        ```python
        not a block
        ```
        ````
        ~~~text
        ```
        ~~~
        """
    )
    assert blocks(page) == [
        Block("python", 2, "a = 1\n"),
        Block("python no-run", 7, "if a:\n    b = 2\n"),
        Block("markdown", 11, "```python\nnot a block\n```\n"),
        Block("text", 16, "```\n"),
    ]
    with pytest.raises(ValueError, match="line 1 "):
        blocks("```python\na = 1\n")
