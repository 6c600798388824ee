"""What a model was made of when its layers were found, to notice that it is another by now."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from singd_torch.layers.kinds import hooks_of_all, is_known, methods
from singd_torch.sharding import is_in_parts


class Makeup:
    """What the modules of a model have: modules and parameters, and methods where it is a layer.

    Attributes:
        left_out: Parameters that required a gradient and were given to no group at construction.
    """

    def __init__(
        self, model: nn.Module, trained: Collection[Tensor], left_out: set[Tensor] | None
    ) -> None:
        """`left_out` is None at construction."""
        modules = [m for m in model.modules() if not isinstance(m, torch.jit.ScriptModule)]
        self._of = [(m, is_known(m), _made_of(m, is_known(m))) for m in modules]
        self._hooks = hooks_of_all()
        others = (p for p in model.parameters() if p.requires_grad and p not in trained)
        self.left_out = set(others) if left_out is None else left_out

    def is_other(self) -> bool:
        """Whether a module has others now: pruned, parametrized, replaced, added or patched.

        Or whether all modules have other hooks.
        """
        if self._hooks != hooks_of_all():
            return True
        return any(not _same(_made_of(m, known), made) for m, known, made in self._of)

    def has_taken(self, now: Sequence[Tensor], before: Sequence[Tensor]) -> bool:
        """Whether the modules have new parameters in the places of those before, one by one."""
        new = dict(zip(before, now, strict=True))
        return all(
            m._parameters.get(name) is new[p]
            for m, _, made in self._of
            for name, p in made.items()
            if isinstance(p, Tensor) and p in new
        )


def _made_of(module: nn.Module, known: bool) -> dict[str, Any]:
    """All that is asked about, by name."""
    made = {**module._parameters, **module._modules}
    if known:
        made |= methods(type(module)) | {"forward of its own": vars(module).get("forward")}
    return made


def _same(now: dict[str, Any], before: dict[str, Any]) -> bool:
    """Whether all are the same, but for weights that are gathered from parts, or were then."""
    return now.keys() == before.keys() and all(
        a is b or any(isinstance(t, Tensor) and is_in_parts(t) for t in (a, b))
        for a, b in zip(now.values(), map(before.__getitem__, now), strict=True)
    )
