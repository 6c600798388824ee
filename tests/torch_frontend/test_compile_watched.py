"""Who is watched inside torch.compile: models while they train, and nobody else."""

import copy
import gc
import warnings
from typing import Any

import pytest
import recent
import torch._functorch.config
from compiling import CLOSE, Block, Graphs, encoder, loss_of, mlp, sequences, train, vectors
from torch import Tensor, nn
from watched import layers

from singd_torch import SINGD
from singd_torch.capture import compiled

pytestmark = [recent.COMPILES, pytest.mark.usefixtures("nothing_compiled")]


def test_inference_has_no_probes() -> None:
    graphs = Graphs()
    model = mlp().double()
    call = torch.compile(model, backend=graphs, fullgraph=True)
    optimizer = SINGD(model, T=2, growing_T=False)
    x = vectors()
    for _ in range(4):
        train(optimizer, call, [x])
        with torch.no_grad():
            assert torch.equal(call(x), copy.deepcopy(model)(x))
    assert len(graphs.whole) == 3
    assert sum(p > 0 for p in graphs.probes()) == 1


def test_a_copy_of_the_model_is_not_watched() -> None:
    model = nn.Sequential(Block(), encoder(), nn.Linear(8, 2)).double()
    model[0] = nn.Linear(8, 8).double()
    optimizer = SINGD(model)
    copied = torch.compile(copy.deepcopy(model), backend="aot_eager", fullgraph=True)
    copied(sequences()).sum().backward()
    assert not any(layer.pending for layer in layers(optimizer))


@pytest.mark.parametrize("built", ["before", "after"])
def test_a_graph_of_the_same_model_without_singd_is_not_used(built: str) -> None:
    """Compiled code does not guard on hooks; without the mark on the weights this fails."""
    other, model = mlp().double(), mlp().double()
    calls = [torch.compile(m, backend="eager", fullgraph=True) for m in (other, model)]
    optimizer = SINGD(model) if built == "before" else None
    x = vectors()
    for call in calls if optimizer is None else calls[:1]:
        call(x).sum().backward()
    optimizer = optimizer or SINGD(model)
    for _ in range(2):
        for call in calls:
            call(x).sum().backward()
        assert all(layer.pending for layer in layers(optimizer))
        optimizer.step()


@pytest.mark.parametrize("old", ["replaced", "kept", "never there"])
def test_an_optimizer_that_takes_the_place_of_another_has_rows(old: str) -> None:
    """As in a cell of a notebook that is run again, where the model was compiled before."""
    model = mlp().double()
    call, x = torch.compile(model, backend="eager", fullgraph=True), vectors()
    call(x).sum().backward()
    first = set().union(*map(vars, model.parameters()))
    kept, optimizer = None, SINGD(model)
    if old != "never there":
        kept, optimizer = optimizer, SINGD(model)
    if old == "replaced":
        del kept
        gc.collect()
    for _ in range(2):
        call(x).sum().backward()
        assert all(layer.pending for layer in layers(optimizer))
        optimizer.step()
    kept = None
    del optimizer
    gc.collect()
    assert set().union(*map(vars, model.parameters())) == first


def test_nothing_stays_behind_an_optimizer() -> None:
    model = mlp().double()
    graphs = Graphs()
    call = torch.compile(model, backend=graphs, fullgraph=True)
    before = set(compiled._TAPS)  # of optimizers of other tests
    optimizer = SINGD(model)
    call(vectors()).sum().backward()
    taps = set(compiled._TAPS) - before
    assert len(taps) == 3
    del optimizer
    gc.collect()
    assert not taps & set(compiled._TAPS)
    call(vectors()).sum().backward()
    assert graphs.probes() == [3, 0]
    optimizer = SINGD(model)
    call(vectors()).sum().backward()
    assert all(layer.pending for layer in layers(optimizer))


@pytest.mark.parametrize("strict", [True, False])
def test_an_exported_model_has_no_probes(strict: bool) -> None:
    model = encoder().double()
    optimizer = SINGD(model)
    exported = torch.export.export(model, (sequences(),), strict=strict)
    assert "singd" not in str(exported.graph)
    assert layers(optimizer)


@pytest.mark.parametrize("compiled", [True, False])
def test_transformed_functions_give_no_rows(compiled: bool) -> None:
    model = mlp().double()
    optimizer = SINGD(model)

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return loss_of(torch.func.functional_call(model, parameters, (x,)))

    gradient = torch.func.grad(loss)
    if compiled:
        gradient = torch.compile(gradient, backend="aot_eager", fullgraph=True)
    x, parameters = vectors(), dict(model.named_parameters())
    found = gradient(parameters, x)
    assert not any(layer.pending for layer in layers(optimizer))
    loss(parameters, x).backward()
    assert all(layer.pending for layer in layers(optimizer))
    for p, g in zip(parameters.values(), found.values(), strict=True):
        assert p.grad is not None
        assert (p.grad - g).norm() <= CLOSE * g.norm()


class ByFunction(nn.Module):
    """A table that is the head by a function, and a layer that is used by a function alone."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.inner, self.other = nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.inner(self.table(x)))
        h = h + nn.functional.linear(h, self.other.weight, self.other.bias)
        return nn.functional.linear(h, self.table.weight)


@pytest.mark.slow
def test_weights_that_compiled_code_uses_by_function_learn_from_gradients() -> None:
    torch.compiler.reset()
    model = ByFunction().double()
    compiled: Any = torch.compile(model, backend="aot_eager")
    optimizer, x, losses = SINGD(model), torch.arange(18) % 9, []
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for _ in range(8):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(compiled(x), x)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    said = " ".join(str(warning.message) for warning in found)
    assert "no rows of 'other.weight' have been seen" in said
    assert "no rows of 'table.weight' are taken, since it is used where no call is seen" in said
    lines = {line.split()[0]: line for line in repr(optimizer).splitlines()[2:]}
    assert "without rows" in lines["table.weight"]
    assert "without rows" in lines["other.weight"]
    assert "without rows" not in lines["inner.weight"]
    assert losses[-1] < losses[0]
    assert optimizer.skipped == 0
