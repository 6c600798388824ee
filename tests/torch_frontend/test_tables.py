"""Embeddings, tied or not: the factor of the entries is the diagonal of their frequencies."""

import copy
import re
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, embedding, linear, one_hot
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
    """A large table, whose head has its own weight or the table's."""

    def __init__(self, head: str, entries: int = 600) -> None:
        super().__init__()
        self.table, self.middle = nn.Embedding(entries, 8), nn.Linear(8, 8)
        self.by_function = head == "function"
        self.head = nn.Identity() if self.by_function else nn.Linear(8, entries, bias=False)
        if head == "module":
            self.head.weight = self.table.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.middle(self.table(x)).tanh()
        found: torch.Tensor = linear(h, self.table.weight) if self.by_function else self.head(h)
        return found


def trained(model: nn.Module, optimizer: SINGD, steps: int, seed: int = 0) -> None:
    g = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        x, y = torch.randint(model.table.num_embeddings, (2, 12), generator=g)
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()


@pytest.mark.parametrize(
    ("head", "wanted"),
    [
        ("its own", (Diagonal, Diagonal)),
        ("module", (Dense, Diagonal)),  # as a linear map, whose outputs are the entries
        ("function", (Diagonal, Dense)),  # as a table, which a call has shown to be a map too
    ],
)
def test_a_large_table_has_diagonal_factors_unless_it_is_a_linear_map_too(
    head: str, wanted: tuple[type, type]
) -> None:
    torch.manual_seed(0)
    model = Words(head)
    optimizer = SINGD(model)
    trained(model, optimizer, 3)
    [layer] = [one for one in layers(optimizer) if one.name == "table.weight"]
    assert layer.structures == wanted
    assert int(layer.refreshes) == 3
    other = Words(head)
    other.load_state_dict(model.state_dict())
    resumed = SINGD(other)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    copied, copied_optimizer = copy.deepcopy((model, optimizer))
    for net, opt in ((model, optimizer), (other, resumed), (copied, copied_optimizer)):
        trained(net, opt, 3, seed=1)
    for p, q, r in zip(*(m.parameters() for m in (model, other, copied)), strict=True):
        assert torch.equal(p, q)
        assert torch.equal(p, r)


def test_a_table_that_becomes_a_linear_map_begins_anew() -> None:
    """Rows of the step so far, and what look-ups alone have taught, are of other structures."""
    torch.manual_seed(0)
    model = Words("function")
    model.by_function, model.head = False, nn.Linear(8, 600, bias=False)
    optimizer = SINGD(model)
    trained(model, optimizer, 2)
    optimizer.zero_grad()
    x = torch.arange(12)
    cross_entropy(model(x), x).backward()  # look-ups that wait
    model.by_function = True
    cross_entropy(model(x), x).backward()
    optimizer.step()
    [layer] = [one for one in layers(optimizer) if one.name == "table.weight"]
    assert layer.structures == (Diagonal, Dense)
    assert layer.refreshes == 1
    assert "without rows" not in repr(optimizer)
    assert not optimizer.skipped


def test_a_small_table_keeps_what_it_has_when_it_becomes_a_linear_map() -> None:
    torch.manual_seed(0)
    model = Words("function", entries=50)
    model.by_function, model.head = False, nn.Linear(8, 50, bias=False)
    optimizer = SINGD(model)
    trained(model, optimizer, 2)
    model.by_function = True
    trained(model, optimizer, 1)
    [layer] = [one for one in layers(optimizer) if one.name == "table.weight"]
    assert layer.structures == (Diagonal, Dense)
    assert layer.refreshes == 3


def test_a_checkpoint_with_the_structures_of_an_earlier_version_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The factors begin anew, and what is no factor goes on."""
    torch.manual_seed(0)
    model = Words("its own")
    with monkeypatch.context() as patch:
        patch.setattr(choose, "_RARE", 10**9)  # so that it has a dense factor
        optimizer = SINGD(model)
        trained(model, optimizer, 3)
        saved = copy.deepcopy(optimizer.state_dict())
    assert "C.matrix" in saved["state"][0]
    new = SINGD(model)
    with pytest.warns(UserWarning, match=r"factors of 'table\.weight' begin anew"):
        new.load_state_dict(saved)
    state = new.state[model.table.weight]
    assert "K.diag" not in state
    assert torch.equal(state["momentum_buffer"], saved["state"][0]["momentum_buffer"])
    assert torch.equal(new.state[model.middle.weight]["K.matrix"], saved["state"][1]["K.matrix"])
    trained(model, new, 2)
    assert new.state[model.table.weight]["C.diag"].shape == (8,)
    saved["param_groups"][0]["structures"] = ("diagonal", "diagonal")  # which somebody chose
    with pytest.raises(ValueError, match=r"'table\.weight'.*another structure"):
        SINGD(model).load_state_dict(saved)
