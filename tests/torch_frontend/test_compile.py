"""Inside torch.compile rows are as in eager calls, and steps that are not due cost nothing."""

import copy
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import recent
import torch
import torch._dynamo.config
import torch._functorch.config
from compiling import (
    CASES,
    Block,
    Graphs,
    Transformer,
    check_equal,
    loss_of,
    mlp,
    pair,
    train,
    vectors,
)
from torch import Tensor, nn
from watched import layers, table

from singd_torch import SINGD

pytestmark = [recent.COMPILES, pytest.mark.usefixtures("nothing_compiled")]


# ---- equality with eager calls ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "T"),
    [
        *(
            # nearly as "transformer, tied table"
            pytest.param(name, 3, marks=pytest.mark.slow if "coder" in name else [])
            for name in CASES
        ),
        ("mlp", 1),
        pytest.param("transformer, tied table", 1, marks=pytest.mark.slow),
    ],
)
def test_training_equals_eager_training_in_two_graphs(name: str, T: int) -> None:
    eager, model, compiled, other = pair(name, T=T, growing_T=False)
    batches = [CASES[name][1]() for _ in range(8)]
    graphs = Graphs()
    train(eager, model, batches)
    train(compiled, torch.compile(other, backend=graphs, fullgraph=True), batches)
    check_equal(eager, compiled)
    assert len(graphs.whole) == min(T, 2)
    probes = sum(len(layer.roles()) for layer in layers(compiled))
    probes += 3 if name == "one layer, four calls" else 0
    assert graphs.probes() == [probes, 0][: min(T, 2)]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")  # inductor's
@pytest.mark.parametrize("name", ["encoder", "checkpointed"])
def test_training_with_inductor_equals_eager_training(name: str) -> None:
    eager, model, compiled, other = pair(name, T=3, growing_T=False)
    batches = [CASES[name][1]() for _ in range(8)]
    train(eager, model, batches)
    train(compiled, torch.compile(other, fullgraph=True), batches)
    check_equal(eager, compiled)


def in_place(model: nn.Module) -> Callable[[Tensor], Tensor]:
    model.compile(backend="eager", fullgraph=True)
    return model


def with_function(model: nn.Module) -> Callable[[Tensor], Tensor]:
    return torch.compile(lambda x: model(x) * 2, backend="eager", fullgraph=True)


@pytest.mark.parametrize(
    "compile_",
    [lambda m: torch.compile(m, backend="eager", fullgraph=True), in_place, with_function],
    ids=["torch.compile(model)", "model.compile()", "a function"],
)
@pytest.mark.parametrize("before", [True, False], ids=["before SINGD", "after SINGD"])
def test_compiled_before_or_after_the_optimizer_is_built(
    compile_: Callable[[nn.Module], Any], before: bool
) -> None:
    model = Transformer().double()
    if before:
        call = compile_(model)
        optimizer = SINGD(call if isinstance(call, nn.Module) else model, T=2)
    else:
        optimizer = SINGD(model, T=2, growing_T=False)
        call = compile_(model)
    assert table(optimizer)["table.weight"] == "SINGD"
    train(optimizer, call, [torch.randint(11, (4, 6)) for _ in range(5)])
    assert all(layer.seen for layer in layers(optimizer))


@pytest.mark.parametrize("what", ["gradients", "step", "all"])
def test_only_forward_passes_of_a_compiled_script_become_graphs(what: str) -> None:
    """Neither a step nor a hook of a backward pass that runs in a compiled function does."""
    eager, model, compiled, other = pair("mlp", T=2, growing_T=False)
    batches = [vectors() for _ in range(4)]
    graphs = Graphs()

    def gradients(x: Tensor) -> None:
        loss_of(other(x)).backward()

    def everything(x: Tensor) -> None:
        compiled.zero_grad()
        gradients(x)
        step()

    compiles = partial(torch.compile, backend=graphs)
    step = compiles(compiled.step) if what == "step" else compiled.step
    if what == "gradients":
        gradients = compiles(gradients)
    elif what == "all":
        everything = compiles(everything)
    train(eager, model, batches)
    for x in batches:
        everything(x)
    check_equal(eager, compiled)
    assert len(graphs.whole) == (0 if what == "step" else 2)


def test_a_graph_that_has_to_hold_a_step_is_refused() -> None:
    optimizer = SINGD(mlp())
    with pytest.raises(torch._dynamo.exc.Unsupported, match="compile_step=True"):
        torch.compile(optimizer.step, backend="eager", fullgraph=True)()


# Two backward passes through one graph: torch wants it to be said.
@torch._functorch.config.patch(donated_buffer=False)
def test_accumulated_gradients_masks_and_sampled_labels() -> None:
    """They are read when the backward pass runs, not when it is traced."""
    eager, model, compiled, other = pair("transformer, tied table", T=1, growing_T=False)
    call = torch.compile(other, backend="aot_eager", fullgraph=True)
    for t in range(3):
        tokens = torch.randint(11, (8, 6))
        mask = torch.rand(4, 6) < 0.7
        for optimizer, m in ((eager, model), (compiled, call)):
            optimizer.zero_grad()
            for part in tokens.chunk(2):
                if t == 1:
                    optimizer.mask_rows(mask)
                y = m(part)
                if t == 2:
                    with optimizer.sampled_labels():
                        y.cos().mean().backward(retain_graph=True)
                (loss_of(y) / 2).backward()
            optimizer.step()
    check_equal(eager, compiled)


def test_two_calls_before_one_backward_pass() -> None:
    eager, model, compiled, other = pair("checkpointed")
    x, z = vectors(), vectors()
    for optimizer, call in (
        (eager, model),
        (compiled, torch.compile(other, backend="aot_eager", fullgraph=True)),
    ):
        (loss_of(call(x)) + loss_of(call(z))).backward()
        optimizer.step()
    check_equal(eager, compiled)


def test_autocast() -> None:
    a = Transformer()
    b = copy.deepcopy(a)
    eager, compiled = SINGD(a, T=2, growing_T=False), SINGD(b, T=2, growing_T=False)
    batches = [torch.randint(11, (4, 6)) for _ in range(4)]
    for optimizer, call in (
        (eager, a),
        (compiled, torch.compile(b, backend="aot_eager", fullgraph=True)),
    ):
        for tokens in batches:
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                y = call(tokens)
            loss_of(y.float()).backward()
            optimizer.step()
    # bfloat16 rounds to 2⁻⁸, and the graph may keep more digits than eager calls do
    check_equal(eager, compiled, close=0.02)


@pytest.mark.slow
def test_batches_of_other_sizes() -> None:
    eager, model, compiled, other = pair("encoder", T=2, growing_T=False)
    batches = [torch.randn(n, n + 2, 8, dtype=torch.float64) for n in (7, 9, 5, 4, 6)]
    call = torch.compile(other, backend="aot_eager", fullgraph=True, dynamic=True)
    train(eager, model, batches)
    train(compiled, call, batches)
    check_equal(eager, compiled)


# ---- what it costs ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mlp", "encoder", "checkpointed"])
def test_no_activation_is_kept_for_the_rows(name: str) -> None:
    graphs = Graphs()
    model = CASES[name][0]().double()
    optimizer = SINGD(model, T=2, growing_T=False)
    batches = [CASES[name][1]() for _ in range(2)]
    train(optimizer, torch.compile(model, backend=graphs, fullgraph=True), batches)
    with_probes, without = graphs.kept
    assert with_probes == without > 0


# Dynamo looks at the `grad` of a graph's inputs.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_blocks_that_are_compiled_each_share_their_graphs() -> None:
    graphs = Graphs()
    model = nn.Sequential(nn.Linear(6, 6), *[Block() for _ in range(12)]).double()
    for block in model[1:]:
        block.compile(backend=graphs, fullgraph=True)
    optimizer = SINGD(model, T=2, growing_T=False)
    train(optimizer, model, [vectors() for _ in range(4)])
    assert len(graphs.whole) == 2
    assert all(layer.seen for layer in layers(optimizer))


@pytest.mark.slow
@pytest.mark.parametrize("structure", ["dense", "triltoeplitz", "diagonal", "hierarchical:1,1"])
def test_a_compiled_step_equals_the_ordinary_one(structure: str) -> None:
    def trained(steps: int, **given: Any) -> tuple[nn.Module, SINGD]:
        torch.manual_seed(0)
        linear = (nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 6), nn.Linear(6, 6))
        model = nn.Sequential(*linear, nn.LayerNorm(6), nn.Linear(6, 3)).double()
        optimizer = SINGD(
            model, structures=(structure,) * 2, T=2, growing_T=False, weight_decay=0.1, **given
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 1.0 / (1 + i))
        for step in range(steps):
            optimizer.zero_grad()
            x, y = torch.randn(8, 5, dtype=torch.float64), torch.randint(3, (8,))
            nn.functional.cross_entropy(model(x), y).backward()
            with torch._dynamo.config.patch(error_on_recompile=step >= 6):
                optimizer.step()
            schedule.step()
        return model, optimizer

    model, _ = trained(10)
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled, _ = trained(10, compile_step={"backend": backend, "fullgraph": True})
    assert len(graphs) == 2 * 3  # the refresh and the step of three stacks
    for p, q in zip(model.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)


FIRST = """
import torch, singd_torch
from singd_core import Optimizer
optimizer, W, x, g = Optimizer(), torch.ones(3, 2), torch.ones(4, 2), torch.ones(4, 3)
def step(state, W, x, g):
    return optimizer.update({"W": g.mT @ x}, state, {"W": W}, {"W": (x, g)})[0]["W"]
torch.compile(step, backend="eager", fullgraph=True)(optimizer.init({"W": W}), W, x, g)
"""


@pytest.mark.slow
def test_the_first_step_of_a_process_may_be_compiled() -> None:
    """Nothing is looked up before that torch.compile cannot look up."""
    subprocess.run([sys.executable, "-c", FIRST], check=True)
