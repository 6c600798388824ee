"""Stacks with their numbers in vectors, so that one call is for all of them.

A rule has a few numbers for each matrix, and as many kernels for one as for a thousand. A bundle
has the numbers of many stacks in vectors, and the momenta in one array. The state has views.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from operator import is_
from typing import Any

import torch
from torch import Tensor

from singd_core._layer_state import NAMES
from singd_core.curvature import Averages
from singd_core.length import sides, size
from singd_core.levels import EVEN
from singd_core.rounding import WHOLE
from singd_core.rules import InverseFree, Shampoo
from singd_core.step import has_momentum
from singd_core.without_mean import share_of_bias
from singd_torch._groups import are_like, likeness, settings_of
from singd_torch.step.bundle_sums import Sums
from singd_torch.step.joint import Joint
from singd_torch.step.rounding import Row
from singd_torch.step.stack import Stack, State
from singd_torch.tensors.matrices import Matrices

# Numbers of the parameters of a bundle, if it has several stacks: their gradients are copied.
_LARGEST = 1 << 26

# The same on the host.
_LARGEST_ON_HOST = 1 << 22
# Numbers of a stack on the host: of larger ones, the calls are no large part of the time.
_SMALL = 1 << 20
# So many stacks are faster in a bundle on the host.
_SEVERAL = 6


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
    """Where a stack stands in its bundle.

    Attributes:
        stack: The stack.
        places: Its weights, and its biases, in an array of all parameters.
        shapes: The shapes of these.
    """

    stack: Stack
    places: list[slice]
    shapes: list[tuple[int, ...]]

    def joined(self, flat: Tensor) -> list[Tensor]:
        """Its weights and its biases, views."""
        pairs = zip(self.places, self.shapes, strict=True)
        return [flat[place].view(shape) for place, shape in pairs]


class Bundle:
    """Stacks that share a device, dtypes, a rule, and settings but for rates and decays.

    Biases that are apart (`Layer.bias_is_apart`) have numbers of their own, which come after the
    numbers of all weights.

    Attributes:
        learns: Whether gradients refresh the factors, and not rows.
        parts: The stacks: first those whose biases are apart, then weights with a bias, then
            weights without, and last weights that are several matrices each.
        apart: How many of them have biases that are apart.
        several: How many matrices the weights are.
        parameters: All weights, then all biases, in the order of the parts.
        sizes: The numbers of each.
        size: What `singd_core.length.size` returns, for all matrices.
        momentum: The momenta of all parameters, None without.
        sums: The sums over late gradients of all matrices, None without.
        waited: Whether there was a step without it since it stepped.
        joint: How the factors of all are one.
        factors: They, whose numbers are of all matrices.
        levels: The levels of the columns of all matrices, then of their rows; levels that nobody
            measures are even. None if nobody measures any.
    """

    levels: Tensor | None
    momentum: Tensor | None
    sums: Sums | None
    joint: Joint
    factors: InverseFree
    size: Tensor

    def __init__(self, stacks: Iterable[Stack]) -> None:
        ordered = sorted(stacks, key=_order)
        self.learns = isinstance(ordered[0].factors, Shampoo)
        self.apart = sum(stack.is_apart for stack in ordered)
        self.several = sum(stack.numbers for stack in ordered)
        self.parts, self.parameters = [], []
        where: dict[Stack, list[slice]] = {stack: [] for stack in ordered}
        start = 0
        for k in (0, 1):
            for stack in ordered:
                own = [p for layer in stack.layers for p in layer.parameters[k : k + 1]]
                if own:
                    end = start + sum(p.numel() for p in own)
                    where[stack].append(slice(start, end))
                    self.parameters += own
                    start = end
        for stack in ordered:
            axis = (len(stack.layers),) if len(stack.layers) > 1 else ()
            shapes = [(*axis, *p.shape) for p in stack.layers[0].parameters]
            self.parts.append(Part(stack, where[stack], shapes))
        self.sizes = [p.numel() for p in self.parameters]
        self.momentum, self.waited = None, False
        self._held: list[Any] = []

    @property
    def stacks(self) -> list[Stack]:
        """The stacks."""
        return [part.stack for part in self.parts]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the momenta."""
        return self.parts[0].stack.layers[0].dtypes[2]

    @functools.cached_property
    def row(self) -> Row:
        """The parameters, as they are stored in 16 bits."""
        known = {
            p: (layer.name, role)
            for stack in self.stacks
            for layer in stack.layers
            for p, role in zip(layer.parameters, NAMES, strict=False)
        }
        names, roles = zip(*(known[p] for p in self.parameters), strict=True)
        return Row(self.parameters, names, roles, [WHOLE] * len(names))

    def fits(self) -> bool:
        """Whether all stacks have the rule and shared settings that they had.

        Rows may have come since, and a script may have changed the settings of some groups.
        """
        leaders = (layer for stack in self.stacks for layer in stack.of_groups)
        groups = {id(layer.group): layer.group for layer in leaders}
        return are_like([(group,) for group in groups.values()]) and all(
            isinstance(stack.factors, Shampoo) is self.learns for stack in self.stacks
        )

    def hold(self, state: State) -> None:
        """Take what the stacks have into vectors, unless that is done."""
        there, s = self._there(), settings_of(self.stacks[0].layers[0].group)
        # momenta that are there go on where the momentum is 0, as it is for some steps
        averages_any = has_momentum(s) or any(stack.momenta is not None for stack in self.stacks)
        begins = averages_any and self.momentum is None
        if len(there) == len(self._held) and all(map(is_, there, self._held)) and not begins:
            if self.waited:  # its stacks may have had refreshes apart
                self.measured()
                self.waited = False
            return
        like = self.stacks[0].averages.k
        self.joint = Joint(self.stacks)
        numbers = self.joint.K.numbers
        n = self.several
        averages = Averages(*(like.new_zeros(n) for _ in range(3)))
        self.momentum = self.sums = None
        if averages_any:
            self.momentum = like.new_zeros(sum(self.sizes), dtype=self.dtype)
            self.sums = Sums(self.stacks, self.apart, self.stacks[0].layers[0].weight)
        of_sides = [
            sides(*layer.shape[1:], layer.kind.overlap)
            for layer in (part.stack.layers[0] for part in self.parts)
        ]
        spectral, outputs = like.new_empty(n), like.new_empty(n)
        for place, own in zip(numbers, of_sides, strict=True):
            for vector, value in zip((spectral, outputs), own, strict=True):
                vector[place].fill_(value)
        self._sides = spectral, outputs
        self._shares = like.new_empty(sum(s.numbers for s in self.stacks[: self.apart]))
        for part, place in zip(self.parts[: self.apart], numbers, strict=False):
            self._shares[place].fill_(share_of_bias(part.stack.layers[0].shape[2]))
        self.size = like.new_empty(n + len(self._shares))
        self.levels = None
        if any(map(self.joint.measures, range(len(self.parts)))):
            rows = self.joint.K.rows[-1].stop + self.joint.C.rows[-1].stop
            self.levels = like.new_full((rows,), EVEN)
        levels = None if self.levels is None else self.joint.as_levels(self.levels)
        self.factors = self.joint.factors(averages, levels)
        for i, part in enumerate(self.parts):
            part.stack.move(
                part.joined(self.momentum) if self.momentum is not None else None,
                self.sums.part(i) if self.sums is not None else None,
                self.joint.part(i, self.factors),
                state,
            )
        self._held = self._there()
        self.measured()

    def _there(self) -> list[Any]:
        """What the stacks have."""
        return [x for stack in self.stacks for x in (stack.momenta, stack.late, stack.averages)]

    def measured(self) -> None:
        """Have the sizes that follow from the averages."""
        of_weights = size(self._sides, self.factors.averages.t_U)
        self.size[: self.several].copy_(of_weights)
        if self.apart:
            of_biases = of_weights[: len(self._shares)] * self._shares
            self.size[self.several :].copy_(of_biases)

    def matrices(self, flat: Tensor) -> Matrices:
        """What all parameters have as matrices: the weights, then the biases that are apart."""
        return Matrices([*self.weights(flat), *self.biases(flat)])

    def weights(self, flat: Tensor) -> list[Tensor]:
        """What all parameters have as matrices, without the biases that are apart."""
        return [part.stack.layers[0].kind.matrix(*part.joined(flat)) for part in self.parts]

    def of_biases(self, flat: Tensor) -> Tensor:
        """What the biases have that are apart, in a row."""
        apart = self.parts[: self.apart]
        return flat[apart[0].places[1].start : apart[-1].places[1].stop]

    def biases(self, flat: Tensor) -> list[Tensor]:
        """What the biases have that are apart, as columns."""
        apart = self.parts[: self.apart]
        shapes = ((*part.stack.batch, part.stack.layers[0].shape[1], 1) for part in apart)
        return [part.joined(flat)[1].view(own) for part, own in zip(apart, shapes, strict=True)]


def bundled(
    ready: Sequence[Stack],
    steps_so: Callable[[Stack], bool],
    before: Sequence[Bundle],
    alive: Iterable[Stack],
    *,
    on_host: bool,
) -> tuple[list[Bundle], list[Bundle]]:
    """The stacks that step now in bundles, and further bundles that wait for their next step.

    If only some stacks of a bundle step, it is parted for good. On the host stacks step alone that
    are large or few, or that did not step with their bundle once. `steps_so` tells of a stack
    whether it can step in a bundle.
    """
    if on_host and not before and len(ready) < _SEVERAL:
        return [], []
    fresh = dict.fromkeys(filter(steps_so, ready))
    found, waiting, stepping, alive = [], [], set(fresh), set(alive)
    for bundle in filter(Bundle.fits, before):
        own = [stack for stack in bundle.stacks if stack in stepping]
        if len(own) == len(bundle.parts):
            found.append(bundle)
        elif own and on_host:
            for stack in bundle.stacks:
                stack.alone = stack.alone or stack not in stepping
            continue  # the others are in another one
        elif own:
            found.append(Bundle(own))
        elif alive.issuperset(bundle.stacks):
            bundle.waited = True
            waiting.append(bundle)
        for stack in own:
            del fresh[stack]
    most, least = (_LARGEST_ON_HOST, _SEVERAL) if on_host else (_LARGEST, 1)
    alike: dict[Any, tuple[int, list[Stack]]] = {}  # the last of each likeness, and its numbers
    several: list[list[Stack]] = []
    for stack in fresh:
        n = sum(p.numel() for layer in stack.layers for p in layer.parameters)
        if on_host and (stack.alone or stack.visits or n > _SMALL):
            continue
        total, stacks = alike.get(key := _likeness(stack), (0, []))
        if not stacks or total + n > most:
            total, stacks = 0, []
            several.append(stacks)
        stacks.append(stack)
        alike[key] = total + n, stacks
    return found + [Bundle(own) for own in several if len(own) >= least], waiting


def _likeness(stack: Stack) -> Any:
    layer = stack.layers[0]
    dtypes = (layer.parameters[0].dtype, layer.parameters[-1].dtype, *layer.dtypes)
    settings = id(layer.group) if stack.capturable else likeness(layer.group)
    return stack.visits, settings, layer.weight.device, dtypes, type(stack.factors)


def _order(stack: Stack) -> Any:
    return not stack.is_apart, bool(stack.groups), stack.layers[0].bias is None
