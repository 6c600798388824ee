"""A fake GPU in torch: shapes, dtypes and devices are right, and there are no numbers to read."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def fake_cuda() -> Iterator[None]:
    """Within it tensors can be made on `cuda`, with no GPU and no CUDA build of torch.

    A build without CUDA refuses to index a fake tensor (`x[..., 1:]` asks for a device guard),
    `~x` and `x.contiguous()`, so indexing with slices, integers, None and an ellipsis is taken
    apart into functions that it allows.
    """
    torch: Any = importlib.import_module("torch")
    fake: Any = importlib.import_module("torch._subclasses").FakeTensorMode
    overrides: Any = importlib.import_module("torch.overrides")

    class Indexing(overrides.TorchFunctionMode):  # type: ignore[misc]
        def __torch_function__(
            self, function: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if function is torch.Tensor.__getitem__ and args[0].device.type == "cuda":
                return _index(*args)
            if function is torch.Tensor.__invert__ and args[0].device.type == "cuda":
                return torch.bitwise_not(*args)
            if function is torch.Tensor.contiguous and args[0].device.type == "cuda":
                return torch.clone(*args, memory_format=torch.contiguous_format)
            if function is torch.Tensor.copy_ and args[0].device.type == "cuda":
                return torch.ops.aten.copy_(*args)
            return function(*args, **(kwargs or {}))

    with fake(allow_non_fake_inputs=True), Indexing():
        yield


def _index(x: Any, key: Any) -> Any:
    key = list(key) if isinstance(key, tuple) else [key]
    if Ellipsis in key:
        i, used = key.index(Ellipsis), sum(k is not None and k is not Ellipsis for k in key)
        key[i : i + 1] = [slice(None)] * (x.ndim - used)
    axis = 0
    for k in key:
        if k is None:
            x = x.unsqueeze(axis)
        elif isinstance(k, int):
            x = x.select(axis, k)
            axis -= 1
        elif isinstance(k, slice):
            start, stop, stride = k.indices(x.shape[axis])
            if stride != 1:
                raise NotImplementedError("a stride other than 1 on the fake GPU")
            x = x.narrow(axis, start, max(stop - start, 0))
        else:
            raise NotImplementedError(f"an index of type {type(k).__name__} on the fake GPU")
        axis += 1
    return x
