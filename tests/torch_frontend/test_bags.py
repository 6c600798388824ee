"""Bags of look-ups: `nn.EmbeddingBag` has the rows of each look-up of its bags."""

import copy
import warnings
from itertools import accumulate
from typing import Any

import pytest
import recent
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from uses import Does, loss_of
from watched import CLOSE, check_rows, layers, table

from singd_torch import SINGD
from singd_torch.layers.bags import Bags

D, ENTRIES, PADDING = 3, 7, 4
EQUAL = [[1, 4, 2], [6, 0, 6], [4, 4, 4], [5, 1, 4], [2, 2, 2]]
RAGGED = [[1, 4], [], [6, 0, 6, 4, 1], [4, 4], [5], [2, 2], []]
FORMS = {"two axes": EQUAL, "offsets": RAGGED, "last offset": RAGGED}
HOW = ["sum", "mean", "weights", "sum with padding", "mean with padding", "weights with padding"]


def bags_of(form: str, how: str) -> tuple[nn.EmbeddingBag, tuple[Any, ...]]:
    """A module, and the arguments of its call."""
    bags, last = FORMS[form], form == "last offset"
    module = nn.EmbeddingBag(
        *(ENTRIES, D),
        mode="mean" if "mean" in how else "sum",
        padding_idx=PADDING if "padding" in how else None,
        include_last_offset=last,
    )
    x: Tensor = torch.tensor([i for bag in bags for i in bag])
    starts = torch.tensor([0, *accumulate(map(len, bags))][: None if last else -1])
    weights = torch.linspace(-1.0, 2.0, len(x), dtype=torch.float64) if "weights" in how else None
    if form == "two axes":
        x, weights = x.view(len(bags), -1), None if weights is None else weights.view(len(bags), -1)
    return module.double(), (x, None if form == "two axes" else starts, weights)


class LookUps(nn.Module):
    """The same by a table, whose rows are multiplied by numbers and summed."""

    def __init__(self, bags: nn.EmbeddingBag, form: str, weights: Tensor | None) -> None:
        super().__init__()
        self.table = nn.Embedding.from_pretrained(
            bags.weight.detach().clone(), freeze=False, padding_idx=bags.padding_idx
        )
        self.bags, counts, self.x = len(FORMS[form]), [], []
        for bag in FORMS[form]:
            real = [float(i != bags.padding_idx) for i in bag]
            self.x += bag
            counts += [n / sum(real) if bags.mode == "mean" and n else n for n in real]
        self.weights = torch.tensor(counts, dtype=torch.float64)
        if weights is not None:
            self.weights *= weights.flatten()
        self.at = torch.tensor([i for i, bag in enumerate(FORMS[form]) for _ in bag])

    def forward(self) -> Tensor:
        rows = self.table(torch.tensor(self.x)) * self.weights[:, None]
        return rows.new_zeros(self.bags, D).index_add(0, self.at, rows)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("form", FORMS)
def test_rows_tell_the_gradient(form: str, how: str) -> None:
    bags, args = bags_of(form, how)
    check_rows(bags, lambda m: loss_of(m(*args)))


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("form", FORMS)
def test_steps_are_those_of_look_ups_that_are_summed(form: str, how: str) -> None:
    """With "paper" the step depends on the number of look-ups and of bags."""
    bags, args = bags_of(form, how)
    apart = LookUps(bags, form, args[2])
    torch.testing.assert_close(apart(), bags(*args), rtol=CLOSE, atol=CLOSE)
    given: dict[str, Any] = {"recipe": "paper", "lr": 0.1, "T": 1}
    optimizers = SINGD(bags, **given), SINGD(apart, loss_average=len(FORMS[form]), **given)
    for _ in range(4):
        for optimizer, value in zip(optimizers, (bags(*args), apart()), strict=True):
            optimizer.zero_grad()
            loss_of(value).backward()
            optimizer.step()
    assert table(optimizers[0]) == {"weight": "SINGD"}
    torch.testing.assert_close(bags.weight, apart.table.weight, rtol=CLOSE, atol=CLOSE)
    state, its = (next(iter(optimizer.state.values())) for optimizer in optimizers)
    for key in ("K.diag", "C.matrix"):
        torch.testing.assert_close(state[key], its[key], rtol=CLOSE, atol=CLOSE)


def two_calls(m: Any, x: Tensor) -> Tensor:
    ragged = m.bags(x.flatten(), torch.tensor([0, 2, 2, 9], dtype=torch.int32))
    return torch.cat([m.bags(x).tanh(), ragged])


def with_all_arguments(m: Any, x: Tensor) -> Tensor:
    given = None, None, 2.0, False, "sum", False, x.double().cos(), True, PADDING - ENTRIES
    return F.embedding_bag(x, m.bags.weight, *given)


def with_weights_that_learn(m: Any, x: Tensor) -> Tensor:
    return m.bags(x, None, m.weights(m.bags(x))[:, :1].expand(x.shape))  # type: ignore[no-any-return]


USES = {
    "two calls": two_calls,
    "checkpointed": lambda m, x: checkpoint(m.bags, x, use_reentrant=False),
    "by function": with_all_arguments,
    "by name": lambda m, x: F.embedding_bag(input=x, weight=m.bags.weight, padding_idx=1),
    "by look-ups as well": lambda m, x: F.embedding(x[:, 0], m.bags.weight) * m.bags(x).tanh(),
    "tied to the head": lambda m, x: F.linear(m.bags(x).tanh(), m.bags.weight),
    "copied": lambda m, x: F.embedding_bag(x, m.bags.weight.clone()),
    "changed in place": lambda m, x: F.relu_(m.bags(x)) + 0.1,
    "weights that learn": with_weights_that_learn,
}


@pytest.mark.parametrize("case", USES)
def test_calls_in_other_ways(case: str) -> None:
    if case == "by function" and torch.__version__ < "2.9":
        pytest.skip("torch 2.8 takes the last bag of a matrix of look-ups for an end")
    torch.manual_seed(0)
    parts: dict[str, nn.Module] = {"bags": nn.EmbeddingBag(ENTRIES, D, mode="sum")}
    if case == "weights that learn":
        parts["weights"] = nn.Linear(D, D)
    model = Does(USES[case], **parts).double()
    check_rows(model, lambda m: loss_of(m(torch.tensor(EQUAL))))


def test_a_table_of_look_ups_that_a_function_sums() -> None:
    model = Does(lambda m, x: F.embedding_bag(x, m.table.weight), table=nn.Embedding(ENTRIES, D))
    check_rows(model.double(), lambda m: loss_of(m(torch.tensor(EQUAL))))


def test_the_frequencies_are_of_all_look_ups() -> None:
    bags, args = bags_of("offsets", "sum with padding")
    optimizer = SINGD(bags, loss_average="batch")
    loss_of(bags(*args)).backward()
    [layer] = layers(optimizer)
    [pending] = layer.pending.values()
    assert (pending.N, pending.M_now) == (12, len(RAGGED))
    expected = torch.tensor([1.0, 2, 2, 0, 0, 1, 2])
    torch.testing.assert_close(pending.inputs.S.diag, expected, check_dtype=False)


def test_a_mask_leaves_look_ups_out() -> None:
    bags = nn.EmbeddingBag(ENTRIES, D, mode="sum").double()
    optimizer, x = SINGD(bags), torch.tensor(EQUAL)
    optimizer.mask_rows(x < PADDING)  # one bag is left out
    loss_of(bags(x)).backward()
    [layer] = layers(optimizer)
    [pending] = layer.pending.values()
    assert (int(pending.N), int(pending.M_now)) == (7, 4)
    expected = torch.tensor([1.0, 2, 4, 0, 0, 0, 0])
    torch.testing.assert_close(pending.inputs.S.diag, expected, check_dtype=False)


@pytest.mark.parametrize("form", FORMS)
def test_the_host_asks_the_device_for_nothing(form: str) -> None:
    """On the device "meta" there are no numbers, so asking for one is an error."""
    _, (x, starts, _) = bags_of(form, "mean")
    starts = None if starts is None else starts.to("meta")
    rows = Bags(starts, None, is_mean=True, padding_idx=PADDING)
    g = torch.empty(len(FORMS[form]), D, device="meta")
    [own] = rows(x.to("meta"), g, 8)
    assert own.g.shape == (*x.shape, D)


@pytest.mark.parametrize("of", ["bags", "look-ups"])
def test_an_empty_call_moves_no_weight(of: str) -> None:
    bags = nn.EmbeddingBag(ENTRIES, D).double()
    optimizer, before, empty = SINGD(bags), bags.weight.detach().clone(), torch.tensor([]).long()
    bags(empty, empty if of == "bags" else torch.tensor([0, 0])).sum().backward()
    optimizer.step()
    assert optimizer.skipped == 0
    assert torch.equal(bags.weight, before)


@pytest.mark.parametrize("recipe", ["normalized", "paper"])
def test_a_micro_batch_of_empty_bags_counts_as_samples(recipe: str) -> None:
    torch.manual_seed(0)
    model = nn.EmbeddingBag(ENTRIES, D, mode="sum").double()
    parted, head = copy.deepcopy(model), torch.randn(D, 5).double()
    one, other = SINGD(model, recipe=recipe), SINGD(parted, recipe=recipe)
    x, starts, none = torch.arange(12) % ENTRIES, torch.tensor([0, 3, 6, 9]), torch.zeros(4).long()
    for _ in range(4):
        y = torch.randint(5, (8,))
        whole = F.cross_entropy(model(x, torch.cat([starts, none + 12])) @ head, y)
        halves = (x, starts, y[:4]), (x[:0], none, y[4:])
        losses = [F.cross_entropy(parted(i, at) @ head, t) / 2 for i, at, t in halves]
        for optimizer, parts in ((one, [whole]), (other, losses)):
            optimizer.zero_grad()
            for loss in parts:
                loss.backward()
            optimizer.step()
    assert torch.allclose(model.weight, parted.weight, rtol=0, atol=1e-12)


def test_look_ups_behind_the_last_bag_are_no_error() -> None:
    """torch forbids them, does not look, and leaves their gradient uninitialised."""
    given = {"offsets": torch.tensor([0, 2, 4]), "include_last_offset": True}
    [own] = Bags.of(given, None)(torch.arange(5), torch.ones(2, D), 8)
    assert own.g.shape == (5, D)


@pytest.mark.slow
@recent.COMPILES
def test_a_compiled_table_of_bags_learns_from_gradients() -> None:
    torch.compiler.reset()
    model = nn.Sequential(nn.EmbeddingBag(ENTRIES, D), nn.Linear(D, ENTRIES)).double()
    compiled: Any = torch.compile(model, backend="aot_eager", fullgraph=True)
    optimizer, x, losses = SINGD(model), torch.tensor(EQUAL), []
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for _ in range(8):
            optimizer.zero_grad()
            loss = F.cross_entropy(compiled(x), x[:, 0])
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert "no rows of '0.weight' have been seen" in " ".join(str(one.message) for one in found)
    assert table(optimizer)["0.weight"] == "SINGD without rows"
    assert losses[-1] < losses[0]
    assert optimizer.skipped == 0
