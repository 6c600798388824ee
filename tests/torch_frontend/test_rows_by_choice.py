"""Which rows reach the factors: masks, sampled labels, and layers that a user registers."""

import copy
import re
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from watched import layers

from singd_core import Embedding, Linear
from singd_torch import SINGD, register_layer
from singd_torch.layers.kinds import _TABLE
from singd_torch.step.curvatures import curvature as curvature_of


@pytest.mark.parametrize("kfac_approx", ["expand", "reduce"])
@pytest.mark.parametrize("loss_average", ["batch", "batch+sequence"])
def test_masked_positions_are_no_rows(kfac_approx: str, loss_average: str) -> None:
    """Padded sequences with a mask train like the sequences without the padding."""
    padded = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).double()
    short = copy.deepcopy(padded)
    x = torch.randn(5, 7, 4, dtype=torch.float64)
    mask = torch.arange(7).expand(5, 7) < 4
    kwargs = {"kfac_approx": kfac_approx, "loss_average": loss_average}
    optimizers = SINGD(padded, **kwargs), SINGD(short, **kwargs)
    terms = 5 if loss_average == "batch" else 20
    for _ in range(4):
        for optimizer in optimizers:
            optimizer.zero_grad()
        optimizers[0].mask_rows(mask)
        ((padded(x) - 1.0).square().sum(-1) * mask).sum().div(terms).backward()
        (short(x[:, :4]) - 1.0).square().sum().div(terms).backward()
        for optimizer in optimizers:
            optimizer.step()
    for p, q in zip(padded.parameters(), short.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-10)


def test_masked_entries_of_a_table_are_not_counted() -> None:
    table = nn.Embedding(4, 3)
    optimizer = SINGD(table, recipe="paper", structures=("dense", "dense"))
    x, mask = torch.tensor([[0, 1, 3], [2, 1, 3]]), torch.tensor([[1, 1, 0], [1, 1, 0]]).bool()
    optimizer.mask_rows(mask)
    table(x).square().sum().backward()
    U = curvature_of([layers(optimizer)[0]], 1.0).H_K.diag
    assert torch.allclose(U, torch.tensor([0.25, 0.5, 0.25, 0.0]))


def test_a_mask_of_numbers_is_refused() -> None:
    with pytest.raises(TypeError, match=r"boolean mask, not torch\.int64: give mask\.bool\(\)"):
        SINGD(nn.Linear(3, 2)).mask_rows(torch.ones(4, 5, dtype=torch.int64))


@pytest.mark.filterwarnings("ignore:no rows of")
def test_a_mask_of_an_empty_batch_does_no_harm() -> None:
    model = nn.Linear(3, 2)
    optimizer = SINGD(model)
    optimizer.mask_rows(torch.ones(0, 5, dtype=torch.bool))
    model(torch.randn(0, 5, 3)).sum().backward()
    optimizer.step()
    assert optimizer.skipped == 0


def test_a_mask_concerns_one_step() -> None:
    model = nn.Linear(3, 2)
    optimizer = SINGD(model)
    optimizer.mask_rows(torch.zeros(4, 5, dtype=torch.bool))
    model(torch.randn(4, 5, 3)).sum().backward()
    optimizer.step()
    model(torch.randn(4, 5, 3)).sum().backward()
    assert next(iter(layers(optimizer)[0].pending.values())).N == 20


def masked_steps(
    optimizer: SINGD, model: nn.Module, shapes: list[tuple[int, ...]], steps: int = 1
) -> list[str]:
    """Take steps with masks of these shapes, one for each micro-batch; return the warnings."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for _ in range(steps):
            optimizer.zero_grad()
            for shape in shapes:
                optimizer.mask_rows(torch.rand(shape) < 0.5)
                model(torch.randn(4, 5, 3)).square().mean().backward()
            optimizer.step()
    return [str(warning.message) for warning in found]


class Flattened(nn.Module):
    """A model that makes one axis of batch and length."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x.flatten(0, 1)))


@pytest.mark.parametrize(
    ("model", "shapes", "warned"),
    [
        (Flattened, [(4, 5)], True),
        (lambda: nn.Linear(3, 2), [(4, 4)], True),
        (lambda: nn.Conv1d(5, 4, 1), [(4,)], True),
        (lambda: nn.Linear(3, 2), [(4, 5), (5, 4)], True),
        (Flattened, [(20,)], False),
        (lambda: nn.Linear(3, 2), [(4, 5), (4, 5)], False),
        (lambda: nn.Sequential(nn.Linear(3, 2), nn.Flatten(), nn.Linear(10, 2)), [(4, 5)], False),
    ],
)
def test_a_mask_that_fits_no_layer_is_warned_about_once(
    model: Any, shapes: list[tuple[int, ...]], warned: bool
) -> None:
    network = model()
    found = masked_steps(SINGD(network, T=1), network, shapes, steps=3)
    text = rf"the mask of rows of shape \({shapes[-1][0]},.*\) left nothing out"
    assert [re.match(text, message) is not None for message in found] == [True] * warned


def test_a_mask_is_not_asked_for_where_no_rows_are_due() -> None:
    model = nn.Linear(3, 2)
    optimizer = SINGD(model, T=3, growing_T=False)
    assert not masked_steps(optimizer, model, [(4, 5)])
    assert not masked_steps(optimizer, model, [(4, 4)])  # no rows
    assert not masked_steps(optimizer, model, [(4, 4)])
    assert len(masked_steps(optimizer, model, [(4, 4)])) == 1


def test_a_mask_may_be_of_layers_that_have_no_rows_in_a_step() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Flatten(), nn.Linear(10, 2))
    groups = [{"params": model[i].parameters(), "T": T} for i, T in ((0, 2), (2, 1))]
    optimizer = SINGD(model, groups, growing_T=False)
    assert not masked_steps(optimizer, model, [(4, 5)], steps=4)


def test_sampled_labels_give_the_rows_and_no_gradient() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    plain = copy.deepcopy(model)
    x, y = torch.randn(8, 4, dtype=torch.float64), torch.randint(3, (8,))
    sampled = torch.randint(3, (8,))
    optimizer = SINGD(model, recipe="paper", T=1)

    logits = model(x)
    with optimizer.sampled_labels():
        nn.functional.cross_entropy(logits, sampled).backward(retain_graph=True)
    nn.functional.cross_entropy(logits, y).backward()

    nn.functional.cross_entropy(plain(x), y).backward()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert p.grad is not None
        assert q.grad is not None
        assert torch.allclose(p.grad, q.grad)
    last = curvature_of([layers(optimizer)[1]], 1.0)
    rows = logits.detach().softmax(-1) - nn.functional.one_hot(sampled, 3)
    assert torch.allclose(last.H_C.matrix, rows.T @ rows / 8)

    optimizer.step()
    nn.functional.cross_entropy(model(x), y).backward()  # the next step is an ordinary one
    assert all(layer.pending for layer in layers(optimizer))


def test_sampled_labels_keep_what_was_accumulated() -> None:
    model = nn.Linear(3, 2)
    optimizer = SINGD(model)
    model(torch.randn(4, 3)).sum().backward()
    gradient = model.weight.grad
    with optimizer.sampled_labels():
        model(torch.randn(4, 3)).sum().backward()
    assert model.weight.grad is gradient


class Scaled(nn.Module):
    """A linear layer under names of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(2, 3))
        self.offset = nn.Parameter(torch.randn(2))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.matrix.T + self.offset


def test_a_registered_layer_is_preconditioned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("singd_torch.layers.kinds._TABLE", dict(_TABLE))
    assert "SINGD without rows" in repr(SINGD(Scaled()))
    register_layer(Scaled, Linear(), weight="matrix", bias="offset")
    own, builtin = Scaled(), nn.Linear(3, 2)
    builtin.weight.data.copy_(own.matrix)
    builtin.bias.data.copy_(own.offset)
    optimizers = SINGD(own), SINGD(builtin)
    x = torch.randn(8, 3)
    for _ in range(3):
        for model, optimizer in zip((own, builtin), optimizers, strict=True):
            optimizer.zero_grad()
            (model(x) - 1.0).square().mean().backward()
            optimizer.step()
    assert torch.allclose(own.matrix, builtin.weight)
    assert torch.allclose(own.offset, builtin.bias)


class Penalized(nn.Module):
    """A layer whose forward does more with its output, or returns its input."""

    def __init__(self, does: str) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(4, 4))
        self.does, self.penalty = does, torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.matrix.T
        self.penalty = y.square().mean()
        return {"uses": y, "skips": x, "shows": x.view_as(x)}[self.does]


@pytest.mark.parametrize("does", ["uses", "skips", "shows"])
def test_a_registered_layer_may_use_its_output_or_return_its_input(
    does: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("singd_torch.layers.kinds._TABLE", dict(_TABLE))
    register_layer(Penalized, Linear(), weight="matrix")
    plain = nn.Sequential(nn.Linear(3, 4), Penalized(does))
    watched, x = copy.deepcopy(plain), torch.randn(8, 3)
    optimizer = SINGD(watched)
    for model in (plain, watched):
        h = model[0](x)
        (h.square().mean() + model[1](h).sum() + model[1].penalty).backward()
    for p, q in zip(plain.parameters(), watched.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
    skipped = not layers(optimizer)[1].pending
    assert skipped == (does == "skips")


class Twice(nn.Embedding):
    """A look-up whose output is twice as wide as its table."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).repeat_interleave(2, -1)


@pytest.mark.parametrize(
    ("module", "kind", "given", "sides"),
    [
        (nn.GRUCell(3, 8), Linear(), {"weight": "weight_ih", "bias": "bias_ih"}, "3 inputs and 8"),
        (Twice(16, 4), Embedding(16), {"weight": "weight"}, "16 inputs and 8"),
        (Scaled(), Linear(transposed=True), {"weight": "matrix"}, "3 inputs and 2"),
    ],
    ids=["cell", "table", "transposed"],
)
def test_a_module_that_is_no_such_layer_is_named(
    module: nn.Module,
    kind: Embedding | Linear,
    given: dict[str, str],
    sides: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("singd_torch.layers.kinds._TABLE", dict(_TABLE))
    register_layer(type(module), kind, **given)
    optimizer = SINGD(nn.ModuleDict({"own": module}))
    x = torch.randint(16, (16, 3)) if isinstance(module, nn.Embedding) else torch.randn(16, 3)
    with pytest.raises(ValueError, match=f"'own.{given['weight']}'.*: its rows have {sides} out"):
        module(x).square().mean().backward()
    del optimizer  # it was there until now, and so were its hooks


@pytest.mark.parametrize(
    ("module", "why"),
    [
        (nn.GRUCell(6, 8), "torch's kernel of GRUCell gives none"),
        (
            nn.ParameterDict({"default": torch.zeros(4, 6)}),
            "a parameter of ParameterDict itself; to have rows of a product with it, put it",
        ),
    ],
    ids=["cell", "bare parameters"],
)
def test_what_cannot_be_registered_is_not_to_be(module: nn.Module, why: str) -> None:
    text = repr(SINGD(nn.ModuleList([module, nn.Linear(8, 3)])))
    assert why in text
    assert "register_layer" not in text


def test_private_gradients_and_rows_exclude_each_other() -> None:
    """Opacus keeps the gradient of each example at the parameter."""
    model = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 2))
    start = copy.deepcopy(model.state_dict())
    optimizer, alone = SINGD(model), SINGD(model.named_parameters())
    for p in model.parameters():
        p.grad_sample = None  # type: ignore[attr-defined]
    model(torch.randn(8, 6)).square().mean().backward()
    with pytest.raises(RuntimeError, match=r"'0.weight' were made private.*named_parameters\(\)"):
        optimizer.step()
    for key, value in model.state_dict().items():
        assert torch.equal(value, start[key])
    alone.step()
    assert not torch.equal(model[0].weight, start["0.weight"])


def test_registering_nonsense_is_an_error() -> None:
    for module in (int, nn.Linear(2, 2)):
        with pytest.raises(TypeError, match="subclass"):
            register_layer(module, Linear())  # type: ignore[arg-type]
    for rows in (3, Linear):  # the class would take a module for its first setting
        with pytest.raises(TypeError, match="LayerKind"):
            register_layer(Scaled, rows)  # type: ignore[arg-type]


@pytest.mark.parametrize("kfac_approx", ["expand", "reduce"])
@pytest.mark.parametrize("shape", [(6, 4), (6, 3, 4), (6, 6, 4)])
def test_masked_samples_are_as_if_left_out(kfac_approx: str, shape: tuple[int, ...]) -> None:
    whole = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    part = copy.deepcopy(whole)
    x, mask = torch.randn(shape, dtype=torch.float64), torch.arange(6) % 3 != 0
    optimizers = [SINGD(model, kfac_approx=kfac_approx) for model in (whole, part)]
    for _ in range(3):
        optimizers[0].mask_rows(mask)
        for optimizer in optimizers:  # `zero_grad` keeps the mask
            optimizer.zero_grad()
        (whole(x)[mask] - 1.0).square().sum().div(4).backward()
        (part(x[mask]) - 1.0).square().sum().div(4).backward()
        for optimizer in optimizers:
            optimizer.step()
    for p, q in zip(whole.parameters(), part.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-10)


def test_a_mask_of_the_batch_leaves_a_convolution_alone() -> None:
    model = nn.Conv1d(3, 2, 1)
    optimizer = SINGD(model)
    optimizer.mask_rows(torch.zeros(4, 3, dtype=torch.bool))
    model(torch.randn(4, 3, 3)).sum().backward()
    assert next(iter(layers(optimizer)[0].pending.values())).N == 12


def test_sampled_labels_of_micro_batches_add_up_and_keep_the_mask() -> None:
    model = nn.Linear(3, 2)
    optimizer = SINGD(model)
    optimizer.mask_rows(torch.tensor([True, True, False]))
    for _ in range(2):
        with optimizer.sampled_labels():
            model(torch.randn(3, 3)).sum().backward()
    assert next(iter(layers(optimizer)[0].pending.values())).N == 4


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_model_that_is_cast_in_training_trains_on(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    optimizer = SINGD(model)
    for current in (torch.float32, dtype):
        model.to(current)
        for _ in range(2):
            optimizer.zero_grad()
            model(torch.randn(5, 3, dtype=current)).square().mean().backward()
            optimizer.step()
    assert optimizer.skipped == 0
    for entries in optimizer.state.values():
        own = {name: t for name, t in entries.items() if t.ndim and "levels" not in name}
        moments = torch.promote_types(dtype, torch.float32)  # of AdamW
        for name, t in own.items():
            assert t.dtype == (moments if name.startswith("exp_avg") else dtype)


def test_frozen_output_projection_leaves_the_others_their_rows() -> None:
    model = nn.MultiheadAttention(4, 2, batch_first=True)
    model.out_proj.weight.requires_grad_(False)
    optimizer = SINGD(model)
    x = torch.randn(2, 3, 4)
    model(x, x, x)[0].sum().backward()
    assert any(layer.pending for layer in layers(optimizer))


def test_auto_is_refused_where_it_cannot_be_decided() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    with pytest.raises(ValueError, match="KFAC takes dense"):
        SINGD(model, kfac=True, structures="auto", memory_budget=10**6)
    optimizer = SINGD(model, model[0].parameters(), structures="auto", memory_budget=10**6)
    with pytest.raises(ValueError, match="decided at construction"):
        optimizer.add_param_group({"params": model[1].parameters(), "structures": "auto"})
    optimizer.add_param_group({"params": model[1].parameters()})
    assert len(layers(optimizer)) == 2


def test_a_rate_that_is_a_tensor_stays_the_callers() -> None:
    lr = torch.tensor(0.1)
    assert SINGD(nn.Linear(2, 2), lr=lr).param_groups[0]["lr"] is lr


class Copying(Linear):
    """A kind that splits its matrix into copies, as one must whose axes are in another order."""

    def split(self, matrix: Any, weight_shape: Any, bias: bool) -> Any:
        weight, b = super().split(matrix, weight_shape, bias)
        return weight.clone(), None if b is None else b.clone()


@pytest.mark.parametrize("given", [{}, {"nesterov": False}, {"momentum": 0.0}], ids=str)
def test_a_kind_may_split_into_copies(
    given: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("singd_torch.layers.kinds._TABLE", dict(_TABLE))

    class Own(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    register_layer(Own, Copying())
    found = []
    for cls in (nn.Linear, Own):
        torch.manual_seed(0)
        model = nn.Sequential(cls(5, 4), nn.Tanh(), cls(4, 4), nn.Tanh(), cls(4, 4)).double()
        optimizer = SINGD(model, **given)
        x, y = torch.randn(9, 5).double(), torch.randn(9, 4).double()
        for _ in range(5):
            optimizer.zero_grad()
            (model(x) - y).square().mean().backward()
            optimizer.step()
        found.append([p.detach() for p in model.parameters()])
    for p, q in zip(*found, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)
