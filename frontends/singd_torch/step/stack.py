"""Equal layers, which step as one along a first axis of their factors, momenta and gradients."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable, MutableMapping, Sequence
from functools import partial
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor, nn

from singd_core._layer_state import NAMES
from singd_core._settings import Settings, gap
from singd_core.curvature import Averages
from singd_core.late import Late
from singd_core.preconditioner import Preconditioner
from singd_core.rounding import Rounding, is_rounded
from singd_core.rules import Factors, Shampoo, by_rows
from singd_torch import _state
from singd_torch._groups import are_like, settings_of
from singd_torch.layers.layer import Layer
from singd_torch.step.rounding import owners
from singd_torch.step.solve import written
from singd_torch.tensors.join import are_equal, join, join_trees, owned, parts, tree_parts

T = TypeVar("T")
State: TypeAlias = MutableMapping[Any, dict[str, Any]]

# Stacks differ in shape: one of many must not use up the recompilations of the others. An older
# torch has no such options.
_ISOLATED: dict[str, Any] = {
    name: value
    for name, value in (("isolate_recompiles", True), ("recompile_limit", 64))
    if name in inspect.signature(torch.compile).parameters
}


@dataclasses.dataclass(eq=False)
class Stack:
    """Layers of equal kind, shape and settings. A single one has no first axis.

    It owns what they learn. `_publish` gives views of it to the optimizer's state.

    Attributes:
        layers: The layers.
        factors: Their factors, joined. None until they are needed.
        momenta: The momenta of the weights and of the biases. None without or until needed.
        late: The sums over late gradients. None without or until needed.
        preconditioner: What preconditions until the next refresh.
        report: What a step tells the diagnostics, None if nobody asks for them.
        compile: Arguments of torch.compile, None to run things as they are.
        visits: Whether its state is elsewhere between steps, and it shares no memory.
        alone: Whether others of its bundle have stepped without it once.
        shares_memory: Whether parameters of other layers are in the memory of its own.
        capturable: Whether what a step reads stays where it is, as a CUDA graph needs it.
    """

    layers: Sequence[Layer]
    factors: Factors | None = None
    momenta: Sequence[Tensor] | None = None
    late: Late | None = None
    preconditioner: Preconditioner | None = None
    report: dict[str, Any] | None = None
    compile: dict[str, Any] | None = None
    visits: bool = False
    alone: bool = False
    shares_memory: bool = False
    capturable: bool = False
    _fixed: Preconditioner | None = None
    _factors: Sequence[Factors] = ()
    _handed_out: Sequence[Tensor] = ()
    _shown: Sequence[Tensor] = ()
    _places: list[int] = dataclasses.field(default_factory=list)
    _owners: Tensor | None = None
    _compiled: dict[Callable[..., Any], Callable[..., Any]] = dataclasses.field(
        default_factory=dict
    )

    @property
    def groups(self) -> tuple[int, ...]:
        """The axes of the matrices of one layer, () for one matrix."""
        return self.layers[0].shape[0]

    @property
    def batch(self) -> tuple[int, ...]:
        """The axes of all its matrices: of its layers if there are several, and of their groups."""
        n = len(self.layers)
        return (n, *self.groups) if n > 1 else self.groups

    @property
    def of_groups(self) -> list[Layer]:
        """The first layer of each pair of groups, of weights and of biases."""
        pairs: dict[Any, Layer] = {}
        for one in self.layers:
            pairs.setdefault((id(one.group), id(one.bias_group)), one)
        return list(pairs.values())

    @property
    def numbers(self) -> int:
        """How many matrices there are."""
        return math.prod(self.batch)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.layers[0].weight.device

    @property
    def is_apart(self) -> bool:
        """Whether its biases are no columns of its matrices."""
        return self.layers[0].bias_is_apart

    def rounding(self, s: Settings) -> Rounding | None:
        """How its arrays are stored after this step, None if to the nearest number."""
        layer = self.layers[0]
        (K, C, _), parameters = layer.dtypes, zip(NAMES, layer.parameters, strict=False)
        dtypes = {"K": K, "C": C} | {name: p.dtype for name, p in parameters}
        if not is_rounded(s.rounding, dtypes.values()):
            return None
        owner: Any = layer.name
        if len(self.layers) > 1:
            if self._owners is None or self._owners.device != layer.weight.device:
                self._owners = owners([one.name for one in self.layers], layer.weight)
            owner = self._owners
        found = Rounding.of(s.rounding, s.seed, layer.group["steps"], owner, dtypes)
        if found is None or self.compile is None:
            return found
        # else each step would be compiled anew
        base = torch.full((), found.base, dtype=torch.int32, device=layer.weight.device)
        return found._replace(base=base)

    @property
    def averages(self) -> Averages:
        """The mean diagonals of the curvature, once there are factors."""
        assert self.factors is not None
        return self.factors.averages

    def tie(self, state: State) -> None:
        """Join what the state has of the layers, in the dtypes and on the device of the weights."""
        factors = [_state.factors_of(layer, state) for layer in self.layers]
        known = self._factors  # whose tensors may have got other memory
        if self.factors is not None:
            known = tree_parts(self.factors, len(self.layers))
        measured = not known or all(map(are_equal, known, factors))
        for layer in self.layers:
            layer.seen = "averages.k" in state.get(layer.weight, {})
            layer.pending = layer.pending if measured else {}  # by factors that are no more
        self.factors = self.momenta = self.late = None
        self.hold(join_trees(factors).map(partial(owned, set())), state)
        like = self.layers[0].weight.new_empty(0, dtype=self.layers[0].dtypes[2])
        kept = {p: state.get(p, {}).get(_state.MOMENTUM) for p in self._parameters()}
        if any(m is not None for m in kept.values()):

            def momentum(p: nn.Parameter) -> Tensor:
                m = kept[p]
                return like.new_zeros(p.shape) if m is None else m.to(like)

            momenta = [owned(set(), m) for m in self.joined(momentum)]
            late = None
            if settings_of(self.layers[0].group).normalized:
                each = [_state.late_of(layer, state) for layer in self.layers]
                late = join_trees(each).map(partial(owned, set()))
            self.hold_momenta(momenta, late, state)

    def begin(self, state: State, s: Settings) -> None:
        """Have momenta of nothing yet."""
        pairs = zip(self.layers, self._factors, strict=True)
        new = [_state.before(layer, s, factors) for layer, factors in pairs]
        momenta = [join(place) for place in zip(*(own.momenta or () for own in new), strict=True)]
        late = [own.late for own in new if own.late is not None]
        self.hold_momenta(momenta, join_trees(late) if late else None, state)

    def move(
        self,
        momenta: Sequence[Tensor] | None,
        late: Late | None,
        factors: Factors,
        state: State,
    ) -> None:
        """Have these in place of its own, in other memory that it writes its own to."""
        if momenta is not None:
            if self.momenta is not None:
                torch._foreach_copy_(list(momenta), list(self.momenta))
            if self.late is not None and late is not None:
                late.map(Tensor.copy_, self.late)
            self.late = self.momenta = None  # else it would go on in the memory that it had
            self.hold_momenta(momenta, late, state)
        assert self.factors is not None
        factors.map(Tensor.copy_, self.factors)
        self.factors = None
        self.hold(factors, state, preconditioner=self.preconditioner)

    def hold(
        self,
        factors: Factors,
        state: State,
        *,
        seen: bool = False,
        preconditioner: Preconditioner | None = None,
    ) -> None:
        """Have these factors from now on; `seen` if rows have reached them.

        `preconditioner` is what preconditions with them, if that is known.
        """
        fresh = [layer for layer in self.layers if seen and not layer.seen]
        if self.factors is None:
            self.factors, self._factors = factors, tree_parts(factors, len(self.layers))
            fresh = [layer for layer in self.layers if layer.seen or seen]
        elif factors is not self.factors:  # where they are
            self.factors.map(Tensor.copy_, factors)
        self.preconditioner = preconditioner
        for layer in fresh:
            layer.seen = True
        if fresh:
            self._publish(state)

    def uses(self, s: Settings) -> int:
        """How many steps a preconditioner that is made now is used for, as far as that matters.

        If `capturable` these are the most of all, lest another kind of product is made later.
        """
        if self.visits:
            return 1
        return s.T if self.capturable else gap(self.layers[0].group["steps"], s)

    def precondition_with(self, made: Preconditioner) -> Preconditioner:
        """Have what preconditions from now on, in the memory of the last one if `capturable`."""
        if self.capturable:
            made = self._fixed = made if self._fixed is None else written(self._fixed, made)
        self.preconditioner = made
        return made

    def let_go(self) -> None:
        """Have nothing of the state."""
        self.factors = self.momenta = self.late = self.preconditioner = None
        self._factors = self._handed_out = self._shown = ()
        self._places = []

    def factors_of(self, layer: Layer) -> Factors:
        """The factors of one of the layers, views."""
        return self._factors[self.layers.index(layer)]

    def fits(self) -> bool:
        """Whether the factors, if there are any, are as the weights and their rule want them."""
        if not are_like([(one.group, one.bias_group) for one in self.of_groups]):
            return False
        alike = all(one.is_stored_as(self.layers[0]) for one in self.layers[1:])
        return not self._factors or (alike and self.layers[0].fits(self._factors[0]))

    def is_known(self, state: State) -> bool:
        """Whether the state has anything of its layers, which `tie` would join."""
        kept = (state.get(p, {}) for p in self._parameters())
        return any(_state.MOMENTUM in own or "averages.k" in own for own in kept)

    @property
    def autocast(self) -> bool:
        """Whether products with its factors are in bfloat16."""
        return all(layer.autocast for layer in self.layers)

    def go_on_by_rows(self, state: State) -> None:
        """Have the same factors for rows, which are seen for the first time."""
        assert isinstance(self.factors, Shampoo)
        factors, self.factors = by_rows(self.factors, settings_of(self.layers[0].group)), None
        for layer in self.layers:
            layer.by_gradient = False
        self.hold(factors, state)

    def is_tied(self, state: State) -> bool:
        """Whether it has what the state has, which others may write to, in the weights' dtype.

        Others may also have put other tensors into the state, or other memory into its tensors.
        """
        if self.factors is None or [*map(Tensor.data_ptr, self._shown)] != self._places:
            return False
        shows_factors = all(
            state.get(layer.weight, {}).get("averages.k")
            is (own.averages.k if layer.seen else None)
            for layer, own in zip(self.layers, self._factors, strict=True)
        )
        if not shows_factors:
            return False
        if self.momenta is None:
            return not any(_state.MOMENTUM in state.get(p, {}) for p in self._parameters())
        return self.momenta[0].dtype == self.layers[0].dtypes[2] and all(
            state.get(p, {}).get(_state.MOMENTUM) is part
            for p, part in zip(self._parameters(), self._handed_out, strict=True)
        )

    def hold_momenta(self, momenta: Sequence[Tensor], late: Late | None, state: State) -> None:
        """Have these momenta and sums from now on."""
        changed = self.momenta is None or any(
            m is not old for m, old in zip(momenta, self.momenta, strict=True)
        )
        if changed and self.capturable and self.momenta is not None:
            torch._foreach_copy_(list(self.momenta), list(momenta))
        elif changed:
            self.momenta = momenta
            self._handed_out = [part for m in momenta for part in self.split(m)]
        if late is not None and self.late is None:
            self.late, changed = late, True
        elif late is not None and self.late is not None:  # perhaps numbers of the host
            write = Tensor.copy_ if isinstance(late.squares, Tensor) else Tensor.fill_
            self.late.map(write, late)
        if changed:
            self._publish(state)

    def _publish(self, state: State) -> None:
        """Let the state have views of what is here. It shows factors that have been refreshed."""
        shown: list[tuple[nn.Parameter, str, Tensor]] = []
        for layer, own in zip(self.layers, self._factors, strict=True):
            if layer.seen:
                shown += [(layer.weight, *named) for named in own.named_arrays()]
        if self.momenta is not None:
            for p, part in zip(self._parameters(), self._handed_out, strict=True):
                shown.append((p, _state.MOMENTUM, part))
        if self.late is not None:
            sums = tree_parts(self.late, len(self.layers))
            for layer, of_layer in zip(self.layers, sums, strict=True):
                shown += [(layer.weight, *named) for named in of_layer.named_arrays(_state.LATE)]
        for p, name, t in shown:
            state[p][name] = t
        self._shown = [t for _, _, t in shown]
        self._places = [*map(Tensor.data_ptr, self._shown)]

    def joined(self, of: Callable[[nn.Parameter], Tensor]) -> list[Tensor]:
        """What the weights have, and what the biases have, such as their gradients."""
        places = zip(*(layer.parameters for layer in self.layers), strict=True)
        return [join(list(map(of, place))) for place in places]

    def _parameters(self) -> list[nn.Parameter]:
        """The weights of all layers, then their biases."""
        places = zip(*(layer.parameters for layer in self.layers), strict=True)
        return [p for place in places for p in place]

    def split(self, joined: Tensor) -> Sequence[Tensor]:
        """The parts of the layers, views."""
        return parts(joined, len(self.layers))

    def run(self, function: Callable[..., T], *args: Any) -> T:
        """The function of these arguments, compiled for this stack alone if that was chosen."""
        if self.compile is None:
            return function(*args)
        if function not in self._compiled:
            options = {"dynamic": False} | _ISOLATED | self.compile
            self._compiled[function] = torch.compile(function, **options)
        return self._compiled[function](*args)  # type: ignore[no-any-return]
