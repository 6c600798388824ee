"""Count the kernels of compiled steps by the code that torch's compiler writes for a CUDA GPU.

No GPU is needed, but a build of torch that has Triton: what the compiler asks of a GPU is told to
it. Calls of generated kernels, of products and of operations on lists are counted, for the 4-layer
GPT of `make bench` with default settings. AdamW is outside of the graphs: three kernels more.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from problems import PROBLEMS
from torch import Tensor, fx
from torch._subclasses import FakeTensorMode

from singd_torch import SINGD
from singd_torch.step import graphs
from singd_torch.tensors import pieces

KINDS = "between refreshes", "before a refresh", "at a refresh"
CALL = re.compile(r"\w*fused\w*\.run\(|extern_kernels\.\w+\(|= torch\.ops\.[\w.]+\(")
H100 = {"name": "H100", "major": 9, "minor": 0, "multi_processor_count": 132, "warp_size": 32}
H100 |= {"regs_per_multiprocessor": 65536, "max_threads_per_multi_processor": 2048}
H100 |= {"max_threads_per_block": 1024, "total_memory": 80 << 30, "gcnArchName": ""}
H100 |= {"L2_cache_size": 50 << 20, "shared_memory_per_block_optin": 232448, "is_integrated": 0}


class Written(Exception):  # noqa: N818
    """The code that was written, in the place of its compilation."""


def recorded() -> list[tuple[fx.GraphModule, Sequence[Tensor], dict[str, Any]]]:
    """The graph of each kind of step, its inputs, and the arguments of torch.compile."""
    found, inputs = [], []

    def compile_(graph: fx.GraphModule, **given: Any) -> fx.GraphModule:
        found.append((graph, given))
        return graph

    def take(self: Any, kind: Any, stacks: Any, change: Any) -> Any:
        if self._known.get(kind.key, 0) is None:
            inputs.append(kind.inputs)
        return original(self, kind, stacks, change)

    problem, original = PROBLEMS["gpt"], graphs.Graphs.take
    with (
        mock.patch.object(torch, "compile", compile_),
        mock.patch.object(graphs.Graphs, "take", take),
        mock.patch.object(pieces, "on_host", return_value=False),
    ):
        model, (x, y) = problem.model(), problem.batch()
        optimizer = SINGD(model, T=5, growing_T=False, compile_step=True)
        while len(found) < len(KINDS):
            optimizer.zero_grad()
            problem.loss(model(x), y).backward()
            optimizer.step()
    return [(graph, own, given) for (graph, given), own in zip(found, inputs, strict=True)]


def on_gpu(graph: fx.GraphModule, inputs: Sequence[Tensor]) -> tuple[fx.GraphModule, list[Tensor]]:
    """The same graph of tensors without data on a GPU. The machine needs no GPU for it."""
    made, new, fakes = fx.Graph(), dict[fx.Node, fx.Node](), list[Tensor]()
    known, own, fake = dict[Any, fx.Node](), iter(inputs), FakeTensorMode()
    given = "placeholder", "get_attr"
    for node in sorted(graph.graph.nodes, key=lambda n: n.op not in given):  # they come first
        if node.op in given:
            x = next(own) if node.op == "placeholder" else getattr(graph, node.target)
            place = x.data_ptr(), x.shape, x.stride(), x.dtype
            if place not in known:
                known[place] = made.placeholder(node.name)
                with fake:
                    fakes.append(
                        torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda")
                    )
            new[node] = known[place]
        else:
            new[node] = made.node_copy(node, new.__getitem__)
            if new[node].kwargs.get("device") is not None:
                new[node].kwargs = {**new[node].kwargs, "device": torch.device("cuda", 0)}
    return fx.GraphModule({}, made), fakes


def code_of(graph: fx.GraphModule, inputs: Sequence[Tensor], options: dict[str, Any]) -> str:
    """The code that the compiler writes."""
    from torch._dynamo.device_interface import CudaInterface
    from torch._inductor import compile_fx, config
    from torch._inductor import graph as lowered
    from torch._inductor.fx_passes import joint_graph, post_grad
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    def written(self: Any) -> None:
        code, _ = self.codegen()
        raise Written(getattr(code, "value", code))

    gpu = SimpleNamespace(**H100)
    driver.set_active(SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", 90, 32)))
    for name, value in {
        "is_available": True,
        "device_count": 1,
        "_lazy_init": None,
        "current_device": 0,
        "_exchange_device": 0,
        "_maybe_exchange_device": 0,
        "get_device_properties": gpu,
        "get_device_capability": (9, 0),
        "get_rng_state": torch.get_rng_state(),
        "set_rng_state": None,
    }.items():
        setattr(torch.cuda, name, lambda *_, value=value, **__: value)
    for name, value in {
        "is_available": True,
        "current_device": 0,
        "get_device_properties": gpu,
        "get_compute_capability": 90,
        "raise_if_triton_unavailable": None,
    }.items():
        setattr(CudaInterface, name, staticmethod(lambda *_, value=value: value))
    CudaInterface.Worker.get_device_properties = staticmethod(lambda *_: gpu)
    CudaInterface.Worker.current_device = staticmethod(lambda: 0)
    joint_graph.lazy_init = post_grad.lazy_init = lambda *_: None  # patterns of attention
    lowered.GraphLowering.compile_to_module = lowered.GraphLowering._compile_to_module = written
    # folding would compute on the GPU
    given = {"compile_threads": 1, "force_disable_caches": True, "joint_graph_constant_folding": 0}
    try:
        with config.patch(given | options), torch.no_grad():
            compile_fx.compile_fx(graph, list(inputs))(*inputs)
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, Written):
            cause = cause.__cause__ or cause.__context__
        if cause is None:
            raise
        return str(cause)
    raise AssertionError("the compiler wrote nothing")


def main() -> None:
    """Print the count of each kind of step."""
    found = [(*on_gpu(graph, inputs), given) for graph, inputs, given in recorded()]
    for kind, (graph, inputs, given) in zip(KINDS, found, strict=True):
        code = code_of(graph, inputs, given.get("options", {}))
        print(f"{kind}: {len(CALL.findall(code[code.index('def call(') :]))} kernels")


if __name__ == "__main__":
    main()
