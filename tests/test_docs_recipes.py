"""The table of docs/settings.md shows the recipes as they are."""

import dataclasses
import re
from pathlib import Path

from singd_core import RECIPES, Settings

PAGE = Path(__file__).parents[1] / "docs" / "settings.md"
ROW = re.compile(r"\| `(\w+)` \| `([^`]+)` \| `([^`]+)` \|")


def test_the_table_of_settings_shows_both_recipes():
    shown = [match.groups() for match in ROW.finditer(PAGE.read_text(encoding="utf-8"))]
    names = [field.name for field in dataclasses.fields(Settings)]
    paper, ours = RECIPES["paper"], RECIPES["normalized"]
    assert shown == [(n, repr(getattr(paper, n)), repr(getattr(ours, n))) for n in names]


def test_every_setting_names_equations_that_there_are():
    mathematics = PAGE.with_name("mathematics.md").read_text(encoding="utf-8")
    rows = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if ROW.match(line)]
    assert rows
    for row in rows:
        numbers = re.findall(r"\d\.\d+", row.rstrip("| ").rpartition("|")[2])
        assert numbers, row
        assert all(f"({number})" in mathematics for number in numbers), row
