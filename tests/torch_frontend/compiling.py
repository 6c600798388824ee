"""Models that tests compile, and a backend that keeps its graphs."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch._functorch.config
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch.utils.checkpoint import checkpoint
from watched import layers

from singd_torch import SINGD

# Relative, float64: eight steps from sums in another order than in eager calls.
CLOSE = 1e-9


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
