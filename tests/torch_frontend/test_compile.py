"""Inside torch.compile rows are as in eager calls, and steps that are not due cost nothing."""

import copy
import gc
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import recent
import torch
import torch._dynamo.config
import torch._functorch.config
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch.utils.checkpoint import checkpoint
from watched import layers, table

from singd_torch import SINGD
from singd_torch.capture import compiled

pytestmark = recent.COMPILES

# Relative, float64: eight steps from sums in another order than in eager calls.
CLOSE = 1e-9


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class Graphs:
    """A backend that keeps what it compiles; the forward and backward graphs then run eagerly."""

    def __init__(self) -> None:
        self.whole: list[torch.fx.GraphModule] = []
        self.forward: list[torch.fx.GraphModule] = []
        self.backward: list[torch.fx.GraphModule] = []
        self.kept: list[int] = []
        self._compile = aot_autograd(
            fw_compiler=self._keep(self.forward),
            bw_compiler=self._keep(self.backward),
            partition_fn=min_cut_rematerialization_partition,
        )

    def _keep(self, kept: list[torch.fx.GraphModule]) -> Callable[..., Any]:
        def compile_(graph: torch.fx.GraphModule, inputs: Any) -> Any:
            kept.append(graph)
            return make_boxed_func(partial(self._run, graph))

        return compile_

    def _run(self, graph: torch.fx.GraphModule, *inputs: Any) -> Any:
        outputs = graph(*inputs)
        if graph in self.forward:  # what it made: the result, and what the backward graph needs
            storages = {t.untyped_storage()._cdata: t.untyped_storage() for t in outputs}
            for t in inputs:
                storages.pop(t.untyped_storage()._cdata, None)
            self.kept.append(sum(storage.nbytes() for storage in storages.values()))
        return outputs

    def __call__(self, graph: torch.fx.GraphModule, inputs: Any) -> Any:
        self.whole.append(graph)
        return self._compile(graph, inputs)

    def probes(self) -> list[int]:
        """How often each backward graph hands rows on."""
        return [
            sum("singd_torch" in str(node.target) + str(node.args) for node in graph.graph.nodes)
            for graph in self.backward
        ]


# ---- models -------------------------------------------------------------------------------------


class Transformer(nn.Module):
    """With a table tied to the head, norms, and attention as a function."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 8)
        self.norm = nn.LayerNorm(8)
        self.qkv = nn.Linear(8, 24)
        self.out = nn.Linear(8, 8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.table.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens)
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, 4)).movedim(-3, 0).transpose(-2, -3)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.head(x + self.out(mixed.transpose(-2, -3).flatten(-2)))


class Twice(nn.Module):
    """Calls its layer with equal and with other inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.layer(self.layer(x).tanh()) + self.layer(x)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.outer(F.relu_(self.inner(x)))


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block() for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return x


class Decoder(nn.TransformerDecoderLayer):
    """Self-attention, and attention to another sequence."""

    def __init__(self) -> None:
        super().__init__(8, 2, 16, dropout=0.0, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, x[:, 1:].cos())


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, 5), nn.ReLU(True), nn.LayerNorm(5), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)
    )


def cnn() -> nn.Module:
    first, second = nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 3, groups=2, padding=1)
    return nn.Sequential(
        first, nn.BatchNorm2d(4), nn.ReLU(True), second, nn.Flatten(), nn.Linear(64, 3)
    )


def encoder() -> nn.Module:
    return nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)


def vectors() -> Tensor:
    return torch.randn(7, 6, dtype=torch.float64)


def sequences() -> Tensor:
    return torch.randn(4, 5, 8, dtype=torch.float64)


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "mlp": (mlp, vectors),
    "cnn": (cnn, lambda: torch.randn(7, 2, 6, 6, dtype=torch.float64)),
    "transformer, tied table": (Transformer, lambda: torch.randint(11, (4, 6))),
    "one layer, four calls": (Twice, vectors),
    "checkpointed": (Checkpointed, vectors),
    "encoder": (encoder, sequences),
    "decoder": (Decoder, sequences),
}


def loss_of(y: Tensor) -> Tensor:
    return (y.sin() - 0.3).square().mean()


def train(optimizer: SINGD, call: Callable[[Tensor], Tensor], batches: list[Tensor]) -> None:
    """The compiled graphs of the first two steps, and of one between them, must do for the rest."""
    for t, x in enumerate(batches):
        with torch._dynamo.config.patch(error_on_recompile=t >= 2):
            optimizer.zero_grad()
            loss_of(call(x)).backward()
            optimizer.step()


def check_equal(a: SINGD, b: SINGD, *, close: float = CLOSE) -> None:
    """Weights and all state of two optimizers are equal."""
    ours, theirs = ([p for group in o.param_groups for p in group["params"]] for o in (a, b))
    for p, q in zip(ours, theirs, strict=True):
        assert (p - q).norm() <= close * p.norm()
        assert list(a.state[p]) == list(b.state[q])
        for u, v in zip(a.state[p].values(), b.state[q].values(), strict=True):
            assert (u - v).norm() <= close * u.norm()
    assert all(layer.seen for layer in layers(b))


def pair(name: str, **settings: Any) -> tuple[SINGD, nn.Module, SINGD, nn.Module]:
    """A model with its optimizer, and their equals."""
    a = CASES[name][0]().double()
    b = copy.deepcopy(a)
    return SINGD(a, **settings), a, SINGD(b, **settings), b


# ---- equality with eager calls ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "T"),
    [
        *(
            # nearly as "encoder"
            pytest.param(name, 3, marks=pytest.mark.slow if name == "decoder" else [])
            for name in CASES
        ),
        ("mlp", 1),
        ("transformer, tied table", 1),
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


# ---- who is watched -----------------------------------------------------------------------------


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
