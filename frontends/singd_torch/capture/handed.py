"""What stands for the parameters of a model: themselves, or what is gathered from their parts."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from singd_torch.layers.reach import gathers
from singd_torch.sharding import is_in_parts


class Homes:
    """In which modules the parameters of a model are."""

    def __init__(self) -> None:
        self._of: dict[Tensor, tuple[nn.Module, str]] = {}
        self._gathers = False

    def learn(self, model: nn.Module, trained: Container[Tensor]) -> None:
        """Know where the trained parameters are; of those gathered now it is known from before."""
        before = {p: home for p, home in self._of.items() if is_in_parts(p) and p in trained}
        homes = ((p, (m, key)) for m in model.modules() for key, p in m._parameters.items())
        self._of = before | {p: home for p, home in homes if p is not None and p in trained}
        self._gathers = gathers(model)

    def follow(self, new: Mapping[Tensor, Tensor], model: nn.Module) -> None:
        """Know the parameters that are in the places of others."""
        self._of = {new.get(p, p): home for p, home in self._of.items()}
        self._gathers = gathers(model)

    def now(self, p: Tensor) -> Any:
        """What its module has in the place of a parameter."""
        if p not in self._of:
            return None
        module, name = self._of[p]
        return module._parameters.get(name)

    def leaf(self, p: Tensor) -> Tensor | None:
        """What autograd has in the place of a parameter, None where nobody can tell."""
        if not is_in_parts(p):
            return p
        now = self.now(p)
        return None if now is p and self._gathers else now


class Handed:
    """Which parameters the tensors are that calls of functions are handed.

    Attributes:
        of: The parameters by the ids of all that was known so far to stand for them.
        is_gathered: Whether some are in parts, so that others may.
    """

    def __init__(self, parameters: Iterable[Tensor], homes: Homes) -> None:
        self._kept = list(parameters)  # a call may outlast the place of what it is handed
        self._homes, self._in_parts = homes, [p for p in self._kept if is_in_parts(p)]
        self.of = {id(p): p for p in self._kept}
        self.is_gathered = bool(self._in_parts)

    def is_of(self, tensor: Any) -> Any:
        """The parameter that a tensor stands for, else itself."""
        return self.of.get(id(tensor), tensor)

    def gather(self, args: Iterable[Any], kwargs: Mapping[str, Any], ids: set[int]) -> None:
        """Add to `ids` the ids of what a call is handed in place of parameters in parts."""
        for tensor in tensors_of(args, kwargs):
            if id(tensor) in ids or not isinstance(tensor, nn.Parameter):
                continue
            if id(tensor) not in self.of:
                self._know(tensor)
            if id(tensor) in self.of:
                ids.add(id(tensor))

    def _know(self, tensor: Tensor) -> None:
        for p in self._in_parts:
            if self._homes.now(p) is tensor:
                self.of[id(tensor)] = p
                self._kept.append(tensor)
                return


def tensors_of(args: Iterable[Any], kwargs: Mapping[str, Any]) -> Iterator[Tensor]:
    """The tensors among arguments, and in lists of them."""
    for a in (*args, *kwargs.values()):
        for tensor in a if isinstance(a, (list, tuple)) else (a,):
            if isinstance(tensor, Tensor):
                yield tensor
