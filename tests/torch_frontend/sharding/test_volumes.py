"""The table of the page Many GPUs: what models cost on 8 and 64 processes, told by `estimate`."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import watched
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from singd_core import settings
from singd_core.curvature import Curvature
from singd_torch import SINGD, estimate
from singd_torch.layers.layer import Layer
from singd_torch.sharding.box import rows
from singd_torch.sharding.owners import Shares

PAGE = Path(__file__).parents[3] / "docs" / "many_gpus.md"


class GPT2(nn.Module):
    def __init__(self, blocks: int, d: int) -> None:
        super().__init__()
        self.table, self.places = nn.Embedding(50257, d), nn.Embedding(1024, d)
        sides = (d, 3 * d), (d, d), (d, 4 * d), (4 * d, d)
        linear = [[nn.Linear(*each) for each in sides] for _ in range(blocks)]
        norms = [[nn.LayerNorm(d) for _ in range(2)] for _ in range(blocks)]
        self.blocks = nn.ModuleList(m for block in (*linear, *norms) for m in block)
        self.norm, self.head = nn.LayerNorm(d), nn.Linear(d, 50257, bias=False)
        self.head.weight = self.table.weight


class Llama(nn.Module):
    def __init__(self, blocks: int = 32, d: int = 4096, hidden: int = 11008) -> None:
        super().__init__()
        self.table = nn.Embedding(32_000, d)
        sides = *[(d, d)] * 4, (d, hidden), (d, hidden), (hidden, d)
        linear = [[nn.Linear(*each, bias=False) for each in sides] for _ in range(blocks)]
        norms = [[nn.RMSNorm(d) for _ in range(2)] for _ in range(blocks)]
        self.blocks = nn.ModuleList(m for block in (*linear, *norms) for m in block)
        self.norm, self.head = nn.RMSNorm(d), nn.Linear(d, 32_000, bias=False)


MODELS = {
    "GPT-2 small": lambda: GPT2(12, 768),
    "GPT-2 medium": lambda: GPT2(24, 1024),
    "GPT-2 XL": lambda: GPT2(48, 1600),
    "Llama-7B": Llama,
}


def bytes_in_words(n: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if n >= size:
            return f"{n / size:,.3g} {unit}"
    return f"{n / 1e3:,.0f} kB"


def lines(name: str) -> Iterator[tuple[str, float]]:
    """The lines of a model, and the most that a process has, in shares."""
    with torch.device("meta"):
        model = MODELS[name]()
    numbers = sum(p.numel() for p in model.parameters())
    for structures in ("default", "diagonal"):
        for p in (8, 64):
            given = None if structures == "default" else structures
            found = estimate(model, given, processes=p)
            most, share = max(found.by_process), found.total / p
            sizes = found.total, most, found.sent_by_step, found.sent_by_refresh
            own = 3 * 4 * numbers * (p - 1) / p
            words = " | ".join(map(bytes_in_words, (*sizes, own)))
            yield f"| {name} | {structures} | {p} | {words} |", most / share


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_the_page_has_what_estimate_tells(name: str) -> None:
    page = PAGE.read_text()
    for line, share in lines(name):
        assert line in page
        assert share <= 1.2


TOKENS = 8192


def work_of_refresh(layer: Layer) -> int:
    """The operations of products that make new factors of sums, and what preconditions of them."""
    s, factors = settings(), layer.first_factors(torch.device("meta"))
    t = factors.averages.t_G
    with FlopCounterMode(display=False) as counted:
        new = factors.refresh(Curvature(*factors.sides, t, t), 0.05, s)
        new.preconditioner(s.T, balanced=True)
    return int(counted.get_total_flops())


def loads(name: str, structures: str | None, processes: int) -> list[int]:
    """The operations of a refresh by process."""
    with torch.device("meta"):
        model = MODELS[name]()
    layers = watched.layers(SINGD(model, structures=structures))
    places = {p: rows(p.shape, processes) for p in model.parameters()}
    shares = Shares.of(layers, processes, {}, places)
    load, known = [0] * processes, dict[Any, int]()
    for layer in shares.whole:
        key = layer.shape, layer.structures
        if key not in known:
            known[key] = work_of_refresh(layer)
        load[shares.owners[layer.weight]] += known[key]
    return load


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "most", "share"), [("GPT-2 small", 5e8, 1.02), ("Llama-7B", 8e9, 1.0)]
)
def test_a_refresh_costs_an_owner_less_than_a_ten_thousandth_of_a_step(
    name: str, most: float, share: float
) -> None:
    load = loads(name, None, 8)
    assert 0.95 * most < max(load) < 1.05 * most
    assert round(max(load) / (sum(load) / 8), 2) == share
    with torch.device("meta"):
        numbers = sum(p.numel() for p in MODELS[name]().parameters())
    assert max(load) < 1e-4 * 6 * numbers * TOKENS


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4, 8])
def test_no_process_waits_long_for_the_refreshes_of_others(processes: int) -> None:
    for name, structures in (("GPT-2 small", "dense"), ("GPT-2 medium", None)):
        load = loads(name, structures, processes)
        assert max(load) <= 1.06 * sum(load) / processes


if __name__ == "__main__":
    for name in MODELS:
        for line, _ in lines(name):
            print(line)
