"""many.py trains each of its tasks, makes no run twice, and its page says what the runs show."""

import dataclasses
import importlib
import math
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from cases import cases

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")


@pytest.fixture
def many(monkeypatch, tmp_path):
    """`many.py` on one task of three steps, in this process, with its own results and page."""
    tasks, module = importlib.import_module("many_tasks"), importlib.import_module("many")
    monkeypatch.setitem(tasks.TASKS, "steep", dataclasses.replace(tasks.TASKS["steep"], steps=3))
    copied = shutil.copy(ROOT / "docs" / "many_tasks.md", tmp_path)
    where = ["--results", str(tmp_path / "runs"), "--page", copied]
    return lambda *more: module.main(["--tasks", "steep", *where, *more])


def kept(tmp_path):
    return importlib.import_module("many_runs").Store(tmp_path / "runs")


# Weights of which only the signs are used have no rows, which is said.
@pytest.mark.filterwarnings("ignore:no rows of '0.weight' and '3.weight' are taken")
@pytest.mark.parametrize(
    "method", cases(["AdamW", "SINGD", "SINGD, diagonal"], fast=["AdamW", "SINGD, diagonal"])
)
def test_each_task_trains(method):
    tasks, runs = importlib.import_module("many_tasks"), importlib.import_module("many_runs")
    noisy = importlib.import_module("noisy")
    torch.set_num_threads(1)
    build = partial(noisy.built, decay=True, **runs.METHODS[method])
    for name, task in tasks.TASKS.items():
        if task.needs is None or task.needs.exists():
            assert math.isfinite(tasks.train(name, build, seed=0, steps=2)), name


@pytest.mark.slow
def test_no_run_is_made_twice_but_those_of_other_code(many, tmp_path, monkeypatch, capsys):
    runs = importlib.import_module("many_runs")
    many()
    found = dict(kept(tmp_path))
    assert len(found) == 2 * (len(runs.RATES) + 3 * len(runs.METHODS))
    assert all(math.isfinite(result.loss) for result in found.values())
    many("--dry")
    assert capsys.readouterr().out.splitlines()[-1].startswith("0 runs are missing")
    monkeypatch.setattr(runs, "CODE", "another")
    many("--dry")
    assert capsys.readouterr().out.splitlines()[-1].startswith("12 runs are missing")


def test_the_page_counts_and_names_where_singd_is_behind(many, tmp_path):
    runs = importlib.import_module("many_runs")
    plan = runs.Plan(kept(tmp_path), ["steep"])
    values = {"AdamW": 2.0, "SINGD": 3.0, "SINGD, diagonal": 2.05}
    while todo := plan.pending():
        for run in todo:
            place = [runs.SEARCH, *runs.CONFIRM].index(run.seed)
            loss = values[run.method] + abs(math.log10((run.rate or 0.01) / 0.01)) + 0.1 * place
            loss = 1.0 if (run.method, run.schedule) == ("SINGD", "linear") else loss
            result = {"seconds": 1.0, "code": runs.CODE, "versions": {}}
            plan.store.add(run, runs.Result(loss=loss, **result))
    assert plan.rate("steep", "linear") == 0.01
    many("--report-only")
    text = (tmp_path / "many_tasks.md").read_text()
    assert "| steep | **2.2** ± 0.1 (0.01) | 3.2 ± 0.1 | behind | 2.25 ± 0.1 | level |" in text
    assert "| steep | 2.2 ± 0.1 (0.01) | **1** | ahead | 2.25 ± 0.1 | level |" in text
    assert "`SINGD(model)` is ahead of AdamW on 1 of 1 tasks, level on 0 and behind on 0." in text
    assert "(`steep`): at a constant rate 3.2 ± 0.1 against 2.2 ± 0.1.\n" in text
