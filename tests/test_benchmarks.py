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


@pytest.mark.slow
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
        importlib.import_module("bench").chosen(["SINGDX"], CPU)


# ---- race.py ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_race_goes_on_where_it_stopped_and_writes_the_page(page, tmp_path, monkeypatch):
    race, curves = importlib.import_module("race"), importlib.import_module("curves")
    monkeypatch.setattr(race, "EXAMPLES", 20)
    where = ["--results", str(tmp_path), "--page", str(page), "--workers", "0"]
    given = ["--tasks", "digits", "--optimizers", "SINGD/default", "--scale", "1e-6", *where]
    race.main([*given, "--minutes", "0"])
    assert not curves.load(tmp_path)
    race.main(given)
    found = curves.load(tmp_path)
    entrants = ("SGD", 1), ("AdamW", 1), ("SINGD/default", 50)
    tried = [len(curves.tuning(found, "digits", entrant)) for entrant in entrants]
    assert len(found) == sum(tried) + 3 * 3
    assert tried[2] == 1  # SINGD as it is
    assert not curves.pending(found, "digits", entrants)
    race.main(given)
    assert len(curves.load(tmp_path)) == len(found)
    assert "| SINGD/default | 50 |" in page.read_text()
    assert (tmp_path / "benchmarks-race.svg").exists()


def test_the_target_is_the_lowest_loss_of_adamw_after_three_quarters_of_its_time():
    curves = importlib.import_module("curves")
    found = {}
    for run, ahead in zip(
        curves.tuning(found, "digits", ("AdamW", 1)), (0.5, 0.2, 0.3, 9.0), strict=True
    ):
        assert curves.target(found, "digits") is None
        found[run] = curve(
            curves, run, [1.0, 0.9, ahead, math.inf if ahead == 9.0 else ahead / 10.0]
        )
    assert curves.target(found, "digits") == 0.2


def test_the_rate_is_the_one_that_reaches_the_target_first_or_else_ends_lowest():
    curves = importlib.import_module("curves")
    entrant = ("SINGD/dense", 10)
    adamw, ours = (curves.tuning({}, "digits", own) for own in (("AdamW", 1), entrant))
    ends = 0.3, 0.1, 0.2, 0.4
    found = {
        run: curve(curves, run, [1.0, 0.9, 0.2, end]) for run, end in zip(adamw, ends, strict=True)
    }
    assert curves.pending(found, "digits", [entrant]) == ours
    ends = [0.9, 0.8, 0.7, math.inf]
    found |= {run: curve(curves, run, [1.0, end]) for run, end in zip(ours, ends, strict=True)}
    assert curves.best(found, "digits", entrant) == ours[2].rate
    found[ours[1]] = curve(curves, ours[1], [1.0, 0.2, 5.0])
    assert curves.best(found, "digits", entrant) == ours[1].rate
    pending = curves.pending(found, "digits", [entrant])
    assert [(run.rate, run.seed) for run in pending] == [(ours[1].rate, s) for s in curves.SEEDS]


def test_rates_beyond_a_grid_whose_edge_is_best_are_tried():
    curves = importlib.import_module("curves")
    adamw, muon = ("AdamW", 1), ("Muon", 1)

    def tried(entrant, loss):
        found = {}
        for _ in range(9):
            new = [r for r in curves.tuning(found, "digits", entrant) if r not in found]
            found |= {run: curve(curves, run, [1.0, loss(run.rate)]) for run in new}
        return found

    assert [run.rate for run in tried(adamw, lambda rate: rate)] == [
        *(0.003, 0.01, 0.03, 0.1),
        *(0.001, 0.0003, 0.0001),
    ]
    found = tried(adamw, lambda rate: abs(rate - 0.03))
    assert len(found) == 4
    assert curves.pending(found, "digits", [muon])[0].rate == 0.01
    rates = [run.rate for run in curves.tuning(found, "digits", muon)]
    found |= {
        run: curve(curves, run, [1.0 / run.rate]) for run in curves.tuning(found, "digits", muon)
    }
    assert [run.rate for run in curves.tuning(found, "digits", muon)] == [*rates, 1.0]
    assert curves.best(found, "digits", muon) is None  # a rate is missing


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


# ---- precision.py -------------------------------------------------------------------------------


def test_the_page_of_low_precision_says_what_was_run():
    precision = importlib.import_module("precision")
    assert precision.report() in precision.PAGE.read_text()


@pytest.mark.slow
def test_precision_keeps_its_runs_and_makes_none_twice(tmp_path, monkeypatch):
    precision, calls = importlib.import_module("precision"), []
    made = {"FOLDER": tmp_path, "STEPS": 2}
    made |= {"CHOSEN": ["digits-mlp"], "METHODS": {"SINGD, default": {}}, "SEEDS": (1,)}
    for name, value in made.items():
        monkeypatch.setattr(precision, name, value)
    train = precision.train
    monkeypatch.setattr(precision, "train", lambda run: calls.append(run) or train(run))
    monkeypatch.setattr(precision, "write", lambda *_: None)
    for _ in range(2):
        monkeypatch.setattr("sys.argv", ["precision.py"])
        precision.main()
    assert [run.format for run in calls] == precision.FORMATS
    assert "5 of 5 runs were made" in precision.report()


# ---- launches.py --------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_graphs_whose_kernels_are_counted_can_be_of_a_gpu():
    launches = importlib.import_module("launches")
    found = launches.recorded()
    assert len(found) == len(launches.KINDS)
    assert all(given["options"]["combo_kernels"] for _, _, given in found)
    graph, inputs = launches.on_gpu(*found[0][:2])
    assert all(x.device.type == "cuda" for x in inputs)
    placeholders = [node for node in graph.graph.nodes if node.op == "placeholder"]
    assert len(placeholders) == len(inputs)
    assert all(node.op != "get_attr" for node in graph.graph.nodes)


# ---- noisy.py, finetune.py, many_examples.py and float8.py --------------------------------------


def test_large_batches_are_trained_in_all_ways(capsys):
    many = importlib.import_module("many_examples")
    many.main(["--quick", "--tasks", "digits-cnn"])
    header, _, row = capsys.readouterr().out.splitlines()[-3:]
    assert header.count("|") == row.count("|") == 3 + len(many.WAYS)


def test_factors_of_8_bits_are_stored_in_all_ways(capsys):
    float8 = importlib.import_module("float8")
    float8.main(["--quick", "--tasks", "digits-mlp"])
    header, _, row = capsys.readouterr().out.splitlines()[-3:]
    assert header.count("|") == row.count("|") == 3 + len(float8.WAYS)
    x = torch.randn(1000)
    for dtype in float8.DTYPES.values():
        assert not float8.rounded(torch.zeros(3), dtype, stochastic=True).any()
        nearest = float8.rounded(x, dtype, stochastic=False)
        assert torch.equal(float8.rounded(nearest, dtype, stochastic=True), nearest)
        drawn = torch.stack([float8.rounded(x, dtype, stochastic=True) for _ in range(400)])
        error = (drawn.mean(0) - x).abs() / (drawn - x).abs().amax().clamp_min(1e-6)
        assert error.max() < 0.2


@pytest.mark.slow
def test_noisy_gradients_are_measured_for_all_settings():
    noisy = importlib.import_module("noisy")
    shown = noisy.main(["--tasks", "physics", "gan", "--seeds", "0", "--share", "0.01"])
    lines = shown.splitlines()
    assert len(lines) == 2 + len(noisy.OPTIMIZERS)
    assert "nan" not in shown
    assert " inf" not in shown


@pytest.mark.slow
def test_fine_tuning_is_measured_for_all_rates(monkeypatch):
    finetune = importlib.import_module("finetune")
    images = torch.rand(600, 1, 14, 14), torch.arange(600) % 10  # MNIST is not at hand everywhere
    monkeypatch.setattr(finetune, "pooled_mnist", lambda: (images, images))
    shown = finetune.main(["--seeds", "0"])
    assert len(shown.splitlines()) == 2 + len(finetune.OPTIMIZERS)
    assert "nan" not in shown


# ---- deep.py ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_deep_networks_are_measured_with_full_steps_too():
    deep = importlib.import_module("deep")
    shown = deep.main(["--depths", "16", "--seeds", "0", "--steps", "6"])
    rows = shown.splitlines()[2:]
    assert len(rows) == len(deep.NETWORKS) * len(deep.SCHEDULES)
    assert any(len({*row.split("|")[5:7]}) == 2 for row in rows)  # other losses
