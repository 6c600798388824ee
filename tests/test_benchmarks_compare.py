"""compare.py makes the runs that are missing, and its page says what they show."""

import dataclasses
import importlib
import math
import shutil
from pathlib import Path

import pytest

import singd_core

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")


@pytest.fixture
def compare(monkeypatch, tmp_path):
    """`compare.py` on one task of three steps, in this process, with its own results and page."""
    tasks, module = importlib.import_module("tasks"), importlib.import_module("compare")
    short = dataclasses.replace(tasks.TASKS["digits-mlp"], steps=3)
    monkeypatch.setitem(tasks.TASKS, "digits-mlp", short)
    copied = shutil.copy(ROOT / "docs" / "comparison.md", tmp_path)
    where = ["--results", str(tmp_path / "runs"), "--page", copied, "--workers", "0"]
    given = ["--tasks", "digits-mlp", "--schedules", "linear", *where]
    return lambda *more: module.main([*given, *more])


def kept(tmp_path):
    return importlib.import_module("compare_runs").Store(tmp_path / "runs")


def test_compare_keeps_its_runs_and_makes_none_twice(compare, tmp_path, monkeypatch, capsys):
    compare("--methods", "AdamW", "--seeds")
    found = dict(kept(tmp_path))
    assert len(found) == 6 + 4  # of three steps, the best rate is at the edge
    assert {run.seed for run in found} == {0}
    assert all(math.isfinite(r.loss) and 0.0 <= r.metric <= 1.0 for r in found.values())
    assert max(len(path.read_text()) for path in tmp_path.glob("runs/*/*.json")) < 2000
    monkeypatch.setattr(importlib.import_module("compare"), "train", None)  # to run is an error
    compare("--methods", "AdamW", "--seeds")
    assert dict(kept(tmp_path)) == found
    compare("--methods", "AdamW", "--seeds", "2", "--dry")
    assert "2 runs are missing" in capsys.readouterr().out.splitlines()[-1]
    assert "| digits-mlp |" in (tmp_path / "comparison.md").read_text()


def test_a_quick_comparison_keeps_nothing(compare, tmp_path, capsys):
    compare("--quick", "--methods", "AdamW", "SINGD")
    assert "| digits-mlp |" in capsys.readouterr().out
    assert not (tmp_path / "runs").exists()


def test_compare_makes_runs_of_singd_anew_when_its_code_changes(compare, tmp_path, monkeypatch):
    runs = importlib.import_module("compare_runs")
    compare("--singd", "lr=0.01,structures=('diagonal', 'dense')", "--seeds", "0")
    ((run, result),) = kept(tmp_path)
    assert kept(tmp_path).is_made(run)
    assert kept(tmp_path).is_made(again(runs, structures=["diagonal", "dense"], lr=0.01))
    assert not kept(tmp_path).is_made(again(runs, structures=["diagonal", "dense"], lr=0.02))
    assert result.code == runs.CODE
    monkeypatch.setattr(runs, "CODE", "another")
    assert not kept(tmp_path).is_made(run)
    compare("--singd", "lr=0.01,structures=('diagonal', 'dense')", "--seeds", "0")
    ((_, result),) = kept(tmp_path)
    assert result.code == "another"
    assert "structures=['diagonal', 'dense']" in (tmp_path / "comparison.md").read_text()


def again(runs, **given):
    return runs.make("digits-mlp", "SINGD", None, 0, "linear", **given)


def test_a_default_that_is_given_is_the_default():
    runs = importlib.import_module("compare_runs")
    lr = singd_core.settings().lr
    assert again(runs, lr=lr) == again(runs)
    assert again(runs, lr=lr).path == again(runs).path
    assert again(runs, lr=2.0 * lr) != again(runs)


def test_a_run_that_goes_astray_is_kept_as_infinitely_bad(compare, tmp_path):
    runs = importlib.import_module("compare_runs")
    run = runs.make("digits-mlp", "AdamW", 1e30, 0, "linear")
    kept(tmp_path).add(run, runs.train(run))
    (path,) = tmp_path.glob("runs/*/*.json")
    assert '"loss": null' in path.read_text()
    assert kept(tmp_path).loss(run) == math.inf


def test_a_fingerprint_is_of_code_alone(tmp_path):
    fingerprint = importlib.import_module("run_store").fingerprint
    (tmp_path / "testing").mkdir()

    def of(text, name="a.py"):
        (tmp_path / name).write_text(text)
        return fingerprint((tmp_path,))

    first = of("def f(x):\n    return x + 1\n")
    assert of('"""Says."""\ndef f(x):  # so\n    "Adds."\n    return (x + 1)\n') == first
    assert of("x = 1", "testing/laws.py") == first
    assert of("def f(x):\n    return x + 2\n") != first


@pytest.fixture
def made_up(tmp_path):
    """A plan of four tasks whose losses are (log rate − log of the best rate)², and of any seed."""
    plans, runs = importlib.import_module("compare_plan"), importlib.import_module("compare_runs")
    best = {"digits-mlp": 0.01, "digits-cnn": 0.02, "vit": 0.01, "vae": 0.5}

    class MadeUp(plans.Plan):
        def make_all(self):
            while todo := self.pending():
                for run in todo:
                    off = 0.0 if run.rate is None else math.log(run.rate / best[run.task]) ** 2
                    loss = math.inf if run.rate == 0.05 and run.task == "vit" else 1.0 + off
                    loss += 0.1 * (run.rate is not None) + 0.01 * run.seed
                    given = {"seconds": 2.0, "cpu_ms": 1.0, "curve": [], "code": runs.CODE}
                    versions = {"torch": "2"}
                    result = runs.Result(loss=loss, metric=0.5, versions=versions, **given)
                    self.store.add(run, result)

    return MadeUp(kept(tmp_path), list(best), basis=list(best))


def test_rates_are_searched_beyond_an_edge_and_the_best_are_confirmed(made_up):
    own = importlib.import_module("compare_runs").OWN
    assert all(run.method in own for run in made_up.confirmation())
    made_up.make_all()
    assert made_up.grid("digits-mlp", "AdamW", "linear") == [0.001, 0.002, 0.005, 0.01, 0.02, 0.05]
    assert made_up.grid("vae", "AdamW", "linear")[6:] == [0.1, 0.2, 0.5, 1.0]
    assert made_up.best("vae", "AdamW", "linear") == 0.5
    assert made_up.one("AdamW", "linear") == 0.01  # 0.05 goes astray on one task
    confirmed = {(r.task, r.rate) for r, _ in made_up.store if r.seed == 3 and r.method == "AdamW"}
    assert confirmed == {(t, 0.01) for t in made_up.tasks} | {("digits-cnn", 0.02), ("vae", 0.5)}


def test_the_page_counts_where_singd_is_ahead(made_up):
    report, tried = (
        importlib.import_module("compare_report"),
        importlib.import_module("compare_tried"),
    )
    made_up.make_all()
    text = report.losses(made_up, "linear", made_up.tasks)
    assert "AdamW at 0.01" in text
    assert "| vae | **1.03** ± 0.01 |" in text
    assert "ahead of every rival on 4 of 4 tasks" in text
    assert "of AdamW on 4, of Muon on 4, of SOAP on 4" in text
    assert "| default |" in tried.tried(made_up)
    assert "| vae |" in tried.costs(made_up)
    assert "| mean |  | -" in tried.against_rivals(made_up)
    beside = report.without_rows(made_up.store, made_up.seeds)
    assert "SINGD without rows is ahead of SINGD with rows on" in beside
    assert "Adafactor on 4 of 4." in beside


def test_what_only_the_page_on_rows_shows_runs_with_a_linear_decay_alone(made_up):
    runs = importlib.import_module("compare_runs")
    plan = dataclasses.replace(made_up, schedules=["linear", "constant"])
    of = {
        schedule: {run.method for run in plan.search() if run.schedule == schedule}
        for schedule in plan.schedules
    }
    assert of["linear"] - of["constant"] == set(runs.BESIDES)
    assert of["constant"] == set(runs.RIVALS)
