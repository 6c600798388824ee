"""The benchmarks run, and what they say about bytes, refreshes, targets and rates is so."""

import importlib
import math
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
OURS_AND_PEERS = (
    *("SINGD/default", "SINGD/kfac", "singd-0.0.5/dense"),
    *("SOAP/heavyball", "PSGD/heavyball", "SOAP/pytorch-optimizer", "PSGD/pytorch-optimizer"),
)


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")


@pytest.fixture
def page(tmp_path):
    return Path(shutil.copy(ROOT / "docs" / "benchmarks.md", tmp_path))


@pytest.fixture
def tiny(monkeypatch):
    """The name of a network for `bench.py` that is small enough for tests."""
    problems = importlib.import_module("problems")
    problem = problems.Problem(
        title="a tiny network",
        model=lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)),
        batch=lambda: problems.labelled(5, 3, classes=2),
    )
    monkeypatch.setitem(problems.PROBLEMS, "tiny", problem)
    return "tiny"


# ---- bench.py -----------------------------------------------------------------------------------


def test_bench_keeps_its_rows_and_writes_the_page(tiny, page, tmp_path):
    bench, steps = importlib.import_module("bench"), importlib.import_module("steps")
    where = ["--results", str(tmp_path), "--page", str(page)]
    bench.main(["--models", tiny, "--optimizers", "SINGD/diagonal", "--steps", "2", *where])
    sgd, one, ten = steps.load(tmp_path)
    assert [row.optimizer for row in (sgd, one, ten)] == ["SGD", "SINGD/diagonal", "SINGD/diagonal"]
    assert sgd.ratio == 1.0
    assert one.refresh is not None
    assert one.other is None
    assert ten.refresh.calls > ten.other.calls
    text = page.read_text()
    assert "**a tiny network**" in text
    assert text.partition("## Time to a target")[0].count("| SINGD/diagonal |") == 2
    assert (tmp_path / "benchmarks-cpu.svg").exists()


def test_state_and_peak_are_the_bytes_that_are_allocated(tiny):
    bench = importlib.import_module("bench")
    numbers, tensors, batch = 3 * 4 + 4 + 4 * 2 + 2, 4, 5 * 3 * 4 + 5 * 8
    sgd, adamw = (bench.Runner(tiny_problem(), name, 1, CPU, 60.0) for name in ("SGD", "AdamW"))
    sgd, adamw = sgd.anatomy(), adamw.anatomy()
    assert sgd.state == 4 * numbers  # a momentum
    assert adamw.state == 8 * numbers + 4 * tensors  # two moments, and a step for each tensor
    for found in (sgd, adamw):
        held = batch + 8 * numbers + found.state  # with parameters and gradients
        assert held < found.peak < held + 4 * (numbers + 5 * 30)  # activations and temporaries


def tiny_problem():
    return importlib.import_module("problems").PROBLEMS["tiny"]


@pytest.mark.parametrize("T", [1, 3])
@pytest.mark.parametrize("name", OURS_AND_PEERS)
def test_the_steps_that_are_said_to_refresh_are_those_with_more_calls(tiny, name, T):
    bench = importlib.import_module("bench")
    runner = bench.Runner(tiny_problem(), name, T, CPU, 60.0)
    calls = [outside + inside for outside, inside in runner.anatomy().calls]
    steps = list(zip(calls, runner.kinds(len(calls)), strict=True))[1:]  # the first one starts up
    refreshing = [count for count, refreshes in steps if refreshes]
    others = [count for count, refreshes in steps if not refreshes]
    assert bool(others) == (T > 1)
    assert min(refreshing) > max(others, default=0)


def test_a_name_that_no_optimizer_has_is_an_error():
    with pytest.raises(SystemExit, match="'SINGDX'; there are SGD, AdamW"):
        importlib.import_module("bench").chosen(["SINGDX"])


# ---- race.py ------------------------------------------------------------------------------------


def test_race_goes_on_where_it_stopped_and_writes_the_page(page, tmp_path, monkeypatch):
    race, curves = importlib.import_module("race"), importlib.import_module("curves")
    monkeypatch.setattr(race, "EXAMPLES", 20)
    where = ["--results", str(tmp_path), "--page", str(page), "--workers", "0"]
    given = ["--tasks", "digits", "--optimizers", "SINGD/diagonal", "--scale", "1e-6", *where]
    race.main([*given, "--minutes", "0"])
    assert not curves.load(tmp_path)
    race.main(given)
    found = curves.load(tmp_path)
    entrants = ("SGD", 1), ("AdamW", 1), ("SINGD/diagonal", 10)
    assert len(found) == len(entrants) * (4 + 3)
    assert not curves.pending(found, "digits", entrants)
    race.main(given)
    assert len(curves.load(tmp_path)) == len(found)
    assert "| SINGD/diagonal | 10 |" in page.read_text()
    assert (tmp_path / "benchmarks-race.svg").exists()


def test_the_target_is_the_lowest_loss_of_adamw_after_three_quarters_of_its_time():
    curves = importlib.import_module("curves")
    found = {}
    for run, ahead in zip(curves.tuning("digits", ("AdamW", 1)), (0.5, 0.2, 0.3, 9.0), strict=True):
        assert curves.target(found, "digits") is None
        found[run] = curve(curves, run, [1.0, 0.9, ahead, math.inf if ahead == 9.0 else 0.1])
    assert curves.target(found, "digits") == 0.2


def test_the_rate_is_the_one_that_reaches_the_target_first_or_else_ends_lowest():
    curves = importlib.import_module("curves")
    entrant = ("SINGD/dense", 10)
    adamw, ours = curves.tuning("digits", ("AdamW", 1)), curves.tuning("digits", entrant)
    found = {run: curve(curves, run, [1.0, 0.9, 0.2, 0.1]) for run in adamw}
    assert curves.pending(found, "digits", [entrant]) == ours
    ends = [0.9, 0.8, 0.7, math.inf]
    found |= {run: curve(curves, run, [1.0, end]) for run, end in zip(ours, ends, strict=True)}
    assert curves.best(found, "digits", entrant) == ours[2].rate
    found[ours[0]] = curve(curves, ours[0], [1.0, 0.2, 5.0])
    assert curves.best(found, "digits", entrant) == ours[0].rate
    pending = curves.pending(found, "digits", [entrant])
    assert [(run.rate, run.seed) for run in pending] == [(ours[0].rate, s) for s in curves.SEEDS]


def curve(curves, run, losses):
    found = curves.Curve(run, "here")
    for i, loss in enumerate(losses):
        found.add(float(i + 1), 10 * (i + 1), loss)
    return found


# ---- the page -----------------------------------------------------------------------------------


def test_the_page_says_what_the_results_say(page):
    steps, curves = importlib.import_module("steps"), importlib.import_module("curves")
    results = ROOT / "benchmarks" / "results"
    importlib.import_module("steps_report").publish(steps.load(results), page)
    importlib.import_module("race_report").publish(curves.load(results), page)
    assert page.read_text() == (ROOT / "docs" / "benchmarks.md").read_text()
