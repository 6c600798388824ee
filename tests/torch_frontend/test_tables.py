"""Embeddings, tied or not: the factor of the entries is the diagonal of their frequencies."""

import copy
import re
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, embedding, one_hot
from uses import Does, loss_of
from watched import layers

from singd_core.curvature import Curvature
from singd_core.structures import Dense, Diagonal, choose
from singd_torch import SINGD
from singd_torch.step.curvatures import curvature as curvature_of


def test_the_input_factor_has_the_entries_frequencies() -> None:
    table = nn.Embedding(5, 3, padding_idx=4)
    optimizer = SINGD(table, structures=("dense", "dense"), recipe="paper")
    x = torch.tensor([[0, 1, 1], [3, 1, 4]])
    table(x).square().sum(-1).sum().div(2).backward()
    [layer] = layers(optimizer)
    assert layer.structures[0] is Diagonal
    curvature = curvature_of([layer], 1.0)
    # K = I at the start, so H_K is U: the mean of the one-hot rows' squares, without the padding
    assert torch.equal(curvature.H_K.diag, torch.tensor([1, 3, 0, 1, 0]) / 6)
    rows = table.weight.detach()[x].reshape(-1, 3)  # of a mean over 2 terms: times 2 a row
    assert torch.allclose(curvature.H_C.matrix, 2 * rows.T @ rows)


def test_one_hot_rows_give_the_same_step() -> None:
    """A table is a linear layer of one-hot rows with a diagonal K."""
    table, linear = nn.Embedding(5, 3).double(), nn.Linear(5, 3, bias=False).double()
    linear.weight.data.copy_(table.weight.data.T)
    x = torch.randint(5, (20, 4))
    structures = ("diagonal", "dense")
    models = (table, x), (linear, one_hot(x, 5).double())
    # "paper", as a table has no levels
    optimizers = [SINGD(model, recipe="paper", structures=structures) for model, _ in models]
    for _ in range(5):
        for (model, inputs), optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            (model(inputs).sin() - 0.3).square().mean().backward()
            optimizer.step()
    # the roots of the counts are taken in float32: 1e-7 in a factor
    assert torch.allclose(table.weight.T, linear.weight, rtol=1e-6)


@pytest.mark.parametrize("by_function", [False, True], ids=["module", "function"])
def test_an_index_without_axes_is_a_batch_of_one(*, by_function: bool) -> None:
    def call(m: Any, x: torch.Tensor) -> torch.Tensor:
        h = embedding(x, m.table.weight) if by_function else m.table(x)
        return m.head(h.tanh())  # type: ignore[no-any-return]

    torch.manual_seed(0)
    one = Does(call, table=nn.Embedding(5, 3), head=nn.Linear(3, 2)).double()
    several = copy.deepcopy(one)
    for model, x in ((one, torch.tensor(3)), (several, torch.tensor([3]))):
        optimizer = SINGD(model)
        for _ in range(3):
            optimizer.zero_grad()
            loss_of(model(x)).backward()
            optimizer.step()
        assert "without rows" not in repr(optimizer)
    for p, q in zip(one.parameters(), several.parameters(), strict=True):
        assert torch.equal(p, q)


class Tied(nn.Module):
    """A table and a linear map with one weight."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 4)
        self.middle = nn.Linear(4, 4)
        self.head = nn.Linear(4, 7, bias=bias)
        self.head.weight = self.table.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.middle(self.table(x)).tanh())


@pytest.mark.parametrize("bias", [False, True])
def test_a_tied_weight_is_one_layer_with_the_rows_of_both_uses(bias: bool) -> None:
    model = Tied(bias).double()
    optimizer = SINGD(model)
    x = torch.randint(7, (6, 5))
    nn.functional.cross_entropy(model(x).flatten(0, 1), x.roll(1).flatten()).backward()
    found = {layer.name: layer for layer in layers(optimizer)}
    assert set(found) == {"table.weight", "middle.weight"}
    tied = found["table.weight"]
    assert set(tied.pending) == {(None, False), (None, True)}
    pending = [tied.pending[None, swapped] for swapped in (False, True)]
    head, lookup = (Curvature.of(*rows.terms(1.0)) for rows in pending)
    # the entries are the outputs of the head: their frequencies are on the side of C
    assert torch.allclose(
        lookup.H_C.diag, torch.bincount(x.flatten(), minlength=7).double() / x.numel()
    )
    # one Kronecker product near the sum of two: exact in trace but for the two mixed terms
    both = curvature_of([tied], 1.0)
    s = ((both.t_U - head.t_U) / lookup.t_U).item()
    assert s > 0
    assert torch.allclose(both.t_G, head.t_G + lookup.t_G / s)
    mixed = s * lookup.t_U * head.t_G, head.t_U * lookup.t_G / s
    assert torch.allclose(*mixed)  # at the least sum the two are equal


def test_a_tied_model_trains_and_resumes() -> None:
    model = Tied(True)
    optimizer = SINGD(model)
    x = torch.randint(7, (32, 5))

    def train(model: nn.Module, optimizer: SINGD, steps: int) -> float:
        for _ in range(steps):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x).flatten(0, 1), x.flatten())
            loss.backward()
            optimizer.step()
        return loss.item()

    first = train(model, optimizer, 1)
    train(model, optimizer, 29)
    other = Tied(True)
    other.load_state_dict(model.state_dict())
    resumed = SINGD(other)
    resumed.load_state_dict(optimizer.state_dict())
    last = train(model, optimizer, 5)
    assert train(other, resumed, 5) == last
    assert last < 0.8 * first


@pytest.mark.parametrize("module", [nn.Embedding, nn.EmbeddingBag])
@pytest.mark.parametrize(
    "kwargs", [{"sparse": True}, {"scale_grad_by_freq": True}, {"max_norm": 1.0}]
)
def test_tables_with_other_gradients_show_no_rows(
    kwargs: dict[str, object], module: type[nn.Module]
) -> None:
    (line,) = repr(SINGD(module(5, 3, **kwargs))).splitlines()[2:]
    cells = ["weight", "5×3", "SINGD without rows", "dense", "diagonal", "148"]
    assert re.split("  +", line) == [*cells, f"{module.__name__} gives none with its arguments"]


class Words(nn.Module):
    """Words in bags, which are classified."""

    def __init__(self, entries: int, kind: type[nn.Module] = nn.EmbeddingBag) -> None:
        super().__init__()
        self.table, self.head = kind(entries, 8), nn.Linear(8, 5)  # type: ignore[call-arg]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.table(x)
        return self.head(found if found.ndim == 2 else found.mean(1))


def trained(model: Words, optimizer: SINGD, steps: int) -> None:
    g = torch.Generator().manual_seed(0)
    for _ in range(steps):
        x = torch.randint(len(model.table.weight), (12, 4), generator=g)
        optimizer.zero_grad()
        cross_entropy(model(x), torch.randint(5, (12,), generator=g)).backward()
        optimizer.step()


@pytest.mark.parametrize(
    ("kind", "entries", "C"),
    [
        (nn.EmbeddingBag, 600, Diagonal),
        (nn.EmbeddingBag, 500, Dense),
        (nn.Embedding, 600, Dense),  # such tables are often tied to a head, which wants it
    ],
)
def test_a_large_table_of_bags_has_diagonal_factors(
    kind: type[nn.Module], entries: int, C: type
) -> None:
    optimizer = SINGD(Words(entries, kind))
    assert layers(optimizer)[0].structures == (Diagonal, C)
    few = SINGD(kind(10, 700))  # of long vectors
    assert layers(few)[0].structures[1] is not Diagonal
    asked = SINGD(Words(entries, kind), structures=("dense", "dense"))
    assert layers(asked)[0].structures == (Diagonal, Dense)


def test_a_large_table_of_bags_without_rows_has_diagonal_factors_too() -> None:
    model = Words(600)
    model.table = nn.EmbeddingBag(600, 8, mode="max")
    optimizer = SINGD(model)
    [layer] = [one for one in layers(optimizer) if one.name == "table.weight"]
    assert not layer.has_rows
    assert layer.structures == (Diagonal, Diagonal)


@pytest.mark.filterwarnings("ignore:no rows of 'table.weight' are taken")
def test_a_table_of_bags_that_is_a_head_too_is_none_of_them() -> None:
    """Whether rows are there or lost."""
    model = nn.ModuleDict({"table": nn.EmbeddingBag(600, 8), "head": nn.Linear(8, 600, bias=False)})
    model["head"].weight = model["table"].weight
    optimizer = SINGD(model)
    assert layers(optimizer)[0].structures == (Dense, Diagonal)
    for _ in range(2):
        optimizer.zero_grad()
        h = model["table"](torch.randint(600, (6, 3)))
        loss = model["head"](h).square().mean() + model["table"].weight.sin().square().sum()
        loss.backward()
        optimizer.step()
    [layer] = layers(optimizer)
    assert not layer.has_rows
    assert Dense in layer.structures


def test_a_checkpoint_with_the_structures_of_another_version_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The factors begin anew, and what is no factor goes on."""
    torch.manual_seed(0)
    model = Words(600)
    with monkeypatch.context() as patch:
        patch.setattr(choose, "_RARE", 10**9)  # so that it has a dense factor
        optimizer = SINGD(model)
        trained(model, optimizer, 3)
        saved = copy.deepcopy(optimizer.state_dict())
    assert "C.matrix" in saved["state"][0]
    mixed = copy.deepcopy(saved)  # as torch fills what is missing from a new state
    mixed["state"][0]["C.diag"] = torch.ones(8)
    for state_dict in (saved, mixed):
        new = SINGD(model)
        with pytest.warns(UserWarning, match=r"factors of 'table\.weight' begin anew"):
            new.load_state_dict(copy.deepcopy(state_dict))
        state = new.state[model.table.weight]
        assert not [name for name in state if name[:2] in ("K.", "C.")]
        assert torch.equal(state["momentum_buffer"], saved["state"][0]["momentum_buffer"])
        K = new.state[model.head.weight]["K.matrix"]
        assert torch.equal(K, saved["state"][1]["K.matrix"])
        trained(model, new, 2)
        assert new.state[model.table.weight]["C.diag"].shape == (8,)
    saved["param_groups"][0]["structures"] = ("diagonal", "diagonal")  # which somebody chose
    with pytest.raises(ValueError, match=r"'table\.weight'.*another structure.*begin with a new"):
        SINGD(model).load_state_dict(saved)


def test_a_checkpoint_with_wider_blocks_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    points = nn.Parameter(torch.randn(200, 2))
    with monkeypatch.context() as patch:
        patch.setattr(choose, "_REMEMBERED", 20)  # blocks of 40 in place of 25
        optimizer = SINGD([points])
        torch.cdist(points, points).sum().backward()
        optimizer.step()
    new = SINGD([points])
    with pytest.warns(UserWarning, match="begin anew"):
        new.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    new.step()
    assert new.state[points]["C.blocks"].shape == (8, 25, 25)


def of_another_model(entries: dict[str, Any]) -> None:
    entries["C.matrix"], entries["K.diag"] = torch.eye(9), torch.ones(601)


def without_blocks(entries: dict[str, Any]) -> None:
    entries["C.matrix"] = torch.tensor(1.0)


def not_square(entries: dict[str, Any]) -> None:
    entries["C.matrix"] = torch.ones(8, 7)


def no_tensor(entries: dict[str, Any]) -> None:
    entries["C.matrix"] = "lost"


@pytest.mark.parametrize("change", [of_another_model, without_blocks, not_square, no_tensor])
def test_factors_that_are_none_of_a_layer_are_an_error(change: Any) -> None:
    """And none that another version has chosen."""
    torch.manual_seed(0)
    model = Words(600)
    optimizer = SINGD(model, momentum=0.0)  # a momentum would tell another model
    trained(model, optimizer, 1)
    saved = copy.deepcopy(optimizer.state_dict())
    entries = saved["state"][0]
    del entries["C.diag"]
    change(entries)
    with pytest.raises(ValueError, match=r"'table\.weight'"):
        SINGD(model).load_state_dict(saved)
