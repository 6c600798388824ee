"""Steps with more examples than `rows`: gradients tell more than rows, and no rows are taken."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from singd_torch import SINGD

N = 60
ROWS = 50  # fewer than there are examples


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv1d(2, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(16, 8), nn.LayerNorm(8)
    ).double()


def batch(n: int = N) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = (n, 2, 6), (n, 8)
    x, y = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return x, y


def train(model: nn.Module, optimizer: SINGD, parts: int = 1, steps: int = 12) -> nn.Module:
    x, y = batch()
    for _ in range(steps):
        optimizer.zero_grad()
        for a, b in zip(x.chunk(parts), y.chunk(parts), strict=True):
            ((model(a) - b).square().mean() / parts).backward()
        optimizer.step()
    assert optimizer.skipped == 0
    return model


def assert_same(model: nn.Module, other: nn.Module, rtol: float = 1e-11) -> None:
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=rtol, atol=rtol)


def without_rows(model: nn.Module, **given: Any) -> nn.Module:
    return train(model, SINGD(model.named_parameters(), **given))


def has_rows(optimizer: SINGD) -> set[bool]:
    return {layer.has_rows for layer in optimizer._layers}


@pytest.mark.parametrize("parts", [1, 3])
def test_steps_are_those_of_gradients_alone(parts: int) -> None:
    model = network()
    optimizer = SINGD(model, rows=ROWS)
    train(model, optimizer, parts)
    assert has_rows(optimizer) == {False}
    assert repr(optimizer).count("a step has more examples than `rows`") == 2
    assert_same(model, without_rows(network()))


@pytest.mark.parametrize(
    "given",
    [
        {"rows": N},
        {"rows": math.inf},
        {"rule": "singd", "rows": ROWS},
        {"recipe": "paper", "rows": ROWS},
    ],
    ids=str,
)
def test_rows_are_taken_where_there_are_fewer_or_a_rule_wants_them(given: dict[str, Any]) -> None:
    model = network()
    optimizer = SINGD(model, **given)
    train(model, optimizer)
    assert has_rows(optimizer) == {True}


def test_tables_and_single_outputs_keep_their_rows() -> None:
    model = nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 1))
    optimizer = SINGD(model, rows=ROWS)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randint(9, (N,))).square().mean().backward()
        optimizer.step()
    assert [layer.has_rows for layer in optimizer._layers] == [True, False, True]


def test_labels_that_are_sampled_have_rows() -> None:
    model = network()
    optimizer = SINGD(model, rows=ROWS)
    x, y = batch()
    with optimizer.sampled_labels():
        (model(x) - torch.randn_like(y)).square().mean().backward()
    (model(x) - y).square().mean().backward()
    optimizer.step()
    assert has_rows(optimizer) == {True}


def test_a_checkpoint_and_a_copy_go_on() -> None:
    model = network()
    optimizer = SINGD(model, rows=ROWS)
    train(model, optimizer)
    twin, third = network(), copy.deepcopy((model, optimizer))
    other = SINGD(twin, rows=ROWS)
    twin.load_state_dict(model.state_dict())
    other.load_state_dict(optimizer.state_dict())
    train(model, optimizer)
    assert_same(train(twin, other), model, 0.0)
    assert_same(train(*third), model, 0.0)
