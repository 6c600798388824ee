"""`make paper` makes the runs that are missing, and docs/paper.md says what is kept."""

import dataclasses
import importlib
import math
import re
import shutil
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from torch import nn

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "paper.md"


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")


@pytest.fixture
def paper(monkeypatch, tmp_path):
    """`paper.py` with networks, searches and trainings that are small enough for tests."""
    command = importlib.import_module("paper")  # all is imported before anything is changed
    plan, tasks = importlib.import_module("paper_plan"), importlib.import_module("paper_tasks")
    data = importlib.import_module("task_data")
    tiny = dataclasses.replace(
        tasks.PAPER_TASKS["vgg"],
        title="a tiny network",
        data=data.digits,
        validation=lambda: data.digits()[1],
        model=lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 10)),
        needs=None,
    )
    monkeypatch.setitem(tasks.PAPER_TASKS, "vgg", tiny)
    monkeypatch.setattr(plan, "SETTINGS", 2)
    monkeypatch.setattr(plan, "SEEDS", (1, 2))
    monkeypatch.setattr(plan, "GRID", plan.GRID[:1])
    monkeypatch.setattr(plan, "ADAMW_GRID", plan.ADAMW_GRID[:1])
    monkeypatch.setattr(plan, "LOOKS", plan.LOOKS[:1])
    monkeypatch.setattr(command, "MEASURES", {})
    monkeypatch.setattr(command, "publish", importlib.import_module("paper_report").tell)
    where = ["--results", str(tmp_path / "runs"), "--page", shutil.copy(PAGE, tmp_path)]
    given = ["--tasks", "vgg", "--steps", "12", *where]
    return lambda *more: command.main([*given, *more])


def kept(tmp_path):
    return dict(importlib.import_module("paper_runs").Store(tmp_path / "runs"))


# ---- runs ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_runs_are_kept_and_none_is_made_twice(paper, tmp_path, monkeypatch):
    paper("--run", "--methods", "KFAC", "--minutes", "0")
    assert not kept(tmp_path)
    paper("--run", "--methods", "KFAC")
    found = kept(tmp_path)
    # a grid of one, its best and another look with two seeds in two precisions; a search of two
    # settings, its best with two seeds in two precisions
    assert len(found) == 1 + 2 * 2 * 2 + 2 + 2 * 2
    assert all(result.peak > result.state > 0 for result in found.values())
    shown = [(run, result) for run, result in found.items() if run.checks and not result.failed]
    assert all(len(r.curve) == run.checks == 6 and 0.0 <= r.curve[-1][4] <= 1 for run, r in shown)
    assert all(r.eigenvalues[0][0] == 10 for run, r in shown if run.watch)
    text = "".join(path.read_text() for path in tmp_path.glob("runs/*/*.json"))
    assert str(ROOT) not in text
    monkeypatch.setattr(importlib.import_module("paper"), "train", None)  # to run is an error
    paper("--run", "--methods", "KFAC")
    assert kept(tmp_path) == found
    page = (tmp_path / "paper.md").read_text()
    assert "| KFAC | 2 of 2 |" in page
    assert "| SGD | 0 of 2 | not run |" in page


@pytest.mark.slow
def test_the_pictures_are_drawn_of_the_runs(paper, tmp_path, monkeypatch):
    report = importlib.import_module("paper_report")
    monkeypatch.setattr(importlib.import_module("paper"), "publish", report.publish)
    paper("--run", "--methods", "KFAC", "IKFAC", "AdamW")
    assert {p.name for p in tmp_path.glob("*.svg")} == {
        f"paper-{name}.svg" for name in ("pair", "precision", "eigenvalues", "vgg")
    }
    for picture in tmp_path.glob("*.svg"):
        assert ElementTree.parse(picture).getroot().tag.endswith("svg")


def test_shorter_runs_are_kept_apart(paper):
    with pytest.raises(SystemExit):
        importlib.import_module("paper").main(["--run", "--steps", "3"])


@pytest.mark.slow
def test_a_folder_of_images_and_a_vision_transformer_of_any_size(paper, tmp_path, capsys):
    image = pytest.importorskip("PIL.Image")
    rng = np.random.default_rng(0)
    for i in range(20):
        folder = tmp_path / "images" / "ab"[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        image.fromarray(rng.integers(0, 255, (9, 7, 3), np.uint8)).save(folder / f"{i}.png")
    vit = ["--images", str(tmp_path / "images"), "--vit", "1", "8", "2", "8", "4"]
    tasks = importlib.import_module("paper_tasks")
    try:
        paper("--run", "--methods", "default", *vit)
        ((x, y), _), large = tasks.PAPER_TASKS["images"].data(), kept(tmp_path)
        assert len(x) == len(y) == 16
        assert x[torch.arange(3)].shape == (3, 3, 8, 8)
    finally:
        tasks.PAPER_TASKS.pop("images", None)
    assert {run.task for run in large} == {"images"}
    assert "| SINGD(model), default recipe | 1 of 1 |" in capsys.readouterr().out


def test_all_methods_have_the_same_draws_and_each_range_is_covered():
    plan = importlib.import_module("paper_plan")
    kfac, ingd, adamw = (plan.drawn("vit", method) for method in ("KFAC", "INGD", "AdamW"))
    assert len(kfac) == len(ingd) == len(adamw) == plan.SETTINGS
    assert [s["damping"] for s in kfac] == [s["damping"] for s in ingd]
    assert (
        np.argsort([s["lr"] for s in kfac]).tolist()
        == np.argsort([s["lr"] for s in adamw]).tolist()
    )
    low, high = plan.SPACE["damping"]
    places = sorted(math.log(s["damping"] / low) / math.log(high / low) for s in kfac)
    assert [int(8 * place + 1e-3) for place in places] == list(range(8))


# ---- measures -----------------------------------------------------------------------------------


def test_operations_are_those_of_the_products():
    measures = importlib.import_module("paper_measures")
    X, v = torch.ones(3, 4), torch.ones(3)
    with measures.Counter() as counter:
        out = X @ torch.ones(4, 5)  # 2 · 3 · 4 · 5
        out.addmm_(X, torch.ones(4, 5))  # the same
        X * 2.0 + 1.0  # 2 · 12
        v.sum()  # 3
        torch.linalg.inv(torch.eye(3))  # 2 · 3³
        torch.fft.irfft(torch.fft.rfft(torch.ones(2, 8)))  # 2 · 5/2 · 16 · 3
        X.mT.contiguous()
    assert counter.operations == 120 + 120 + 24 + 3 + 54 + 240


def test_the_gap_of_theorem_1_is_of_second_order_for_ikfac_and_of_first_for_ingd():
    kept = importlib.import_module("paper_measures").measured("theorem", RESULTS)
    few = slice(0, 4)
    for name, order in (("IKFAC, float64", 2.0), ("INGD, float64", 1.0)):
        slope, _ = np.polyfit(np.log(kept["beta"][few]), np.log(kept[name][few]), 1)
        assert slope == pytest.approx(order, abs=0.05)


RESULTS = ROOT / "benchmarks" / "results" / "paper"

# ---- the page -----------------------------------------------------------------------------------


def test_the_page_says_what_the_runs_say(tmp_path):
    report, plan = importlib.import_module("paper_report"), importlib.import_module("paper_plan")
    page = Path(shutil.copy(PAGE, tmp_path))
    report.tell(plan.Plan(importlib.import_module("paper_runs").Store()), page)
    assert page.read_text() == PAGE.read_text()


def test_the_pictures_of_the_page_are_there_and_small():
    pictures = re.findall(r"\]\((paper-[\w-]+\.(?:svg|png))\)", PAGE.read_text())
    assert {"paper-theorem.svg", "paper-precision.svg", "paper-structures.png"} <= set(pictures)
    # Eleven methods with their bands in four panels take 110 kB.
    assert all((PAGE.parent / name).stat().st_size < 120_000 for name in pictures)


def test_the_structures_are_drawn(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples")
    structures = importlib.import_module("structures")
    for name in structures.STRUCTURES:
        K = structures.member(name)
        assert np.linalg.cond(K @ K.T) < 1e3  # so that its inverse shows a pattern
    structures.draw(str(tmp_path / "picture.png"))
    assert 10_000 < (tmp_path / "picture.png").stat().st_size < 100_000
