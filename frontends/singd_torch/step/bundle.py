"""Stacks with their numbers in vectors, so that an accelerator is called once for all of them.

A rule has a few numbers for each matrix, and as many kernels for one as for a thousand. A bundle
has the numbers of many stacks in vectors, and the momenta in one array. The state has views.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from operator import is_
from typing import Any

import torch
from torch import Tensor

from singd_core._layer_state import NAMES
from singd_core.curvature import Averages
from singd_core.late import Late
from singd_core.length import sides, size
from singd_core.levels import EVEN
from singd_core.rounding import WHOLE
from singd_core.rules import InverseFree, Shampoo, inputs_of
from singd_core.step import has_momentum
from singd_core.without_mean import share_of_bias
from singd_torch._groups import settings_of
from singd_torch.step.joint import Joint
from singd_torch.step.rounding import Row
from singd_torch.step.stack import Stack, State

# Numbers of the parameters of a bundle, if it has several stacks: their gradients are copied.
_LARGEST = 1 << 26


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
    """Stacks of one parameter group that share a device, dtypes and a rule.

    The biases of weights that learn from gradients are apart: each has numbers of its own. A vector
    of numbers has two columns then, of the weights and of the biases.

    Attributes:
        learns: Whether gradients refresh the factors, and not rows.
        apart: Whether biases are apart.
        parts: The stacks: first weights with a bias, then weights without, and last weights that
            are several matrices each.
        parameters: All weights, then all biases, in the order of the parts.
        sizes: The numbers of each.
        size: What `singd_core.length.size` returns, for all matrices; as `by_kind` has numbers.
        momentum: The momenta of all parameters, None without.
        late: The sums over late gradients of all matrices, None without.
        joint: How the factors of all are one.
        factors: They, whose numbers are of all matrices.
        levels: The levels of the columns of all matrices, then of their rows; levels that nobody
            measures are even. None if nobody measures any.
        matrix_of: The number of the matrix of each of these.
        length_of: The number of columns of its matrix, or of rows.
    """

    levels: Tensor | None
    matrix_of: Tensor
    length_of: Tensor
    momentum: Tensor | None
    late: Late | None
    joint: Joint
    factors: InverseFree
    size: Tensor

    def __init__(self, stacks: Iterable[Stack]) -> None:
        ordered = sorted(stacks, key=lambda s: (bool(s.groups), s.layers[0].bias is None))
        factors = ordered[0].factors
        self.learns = isinstance(factors, Shampoo)
        self.apart = factors is not None and inputs_of(factors) is not None
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

    def hold(self, state: State) -> None:
        """Take what the stacks have into vectors, unless that is done."""
        there = self._there()
        if len(there) == len(self._held) and all(map(is_, there, self._held)):
            return
        s = settings_of(self.stacks[0].layers[0].group)
        like = self.stacks[0].averages.k
        self.joint = Joint(self.stacks)
        numbers = self.joint.K.numbers
        n = numbers[-1].stop
        averages = Averages(*(like.new_zeros(n) for _ in range(3)))
        self.momentum = self.late = None
        if has_momentum(s):
            self.momentum = like.new_zeros(sum(self.sizes), dtype=self.dtype)
            like_late = self.stacks[0].layers[0].weight
            self.late = Late.zeros((n,), like_late, with_bias=self.apart)
        of_sides = [
            sides(*layer.shape[1:], layer.kind.overlap)
            for layer in (part.stack.layers[0] for part in self.parts)
        ]
        spectral, outputs = like.new_empty(n), like.new_empty(n)
        for place, own in zip(numbers, of_sides, strict=True):
            for vector, value in zip((spectral, outputs), own, strict=True):
                vector[place].fill_(value)
        self._sides, self._share = (spectral, outputs), None
        if self.apart:
            each = [share_of_bias(part.stack.layers[0].shape[2]) for part in self.parts]
            self._share = like.new_empty(n)
            for place, share in zip(numbers, each, strict=True):
                self._share[place].fill_(share)
        self.size = like.new_empty((2, n) if self.apart else n)
        self._hold_levels(like)
        levels = None if self.levels is None else self.joint.as_levels(self.levels)
        self.factors = self.joint.factors(averages, levels)
        for i, part in enumerate(self.parts):
            part.stack.move(
                part.joined(self.momentum) if self.momentum is not None else None,
                self.late.map(functools.partial(self.joint.of, i))
                if self.late is not None
                else None,
                self.joint.part(i, self.factors),
                state,
            )
        self._held = self._there()
        self.measured()

    def _there(self) -> list[Any]:
        """What the stacks have."""
        return [x for stack in self.stacks for x in (stack.momenta, stack.late, stack.averages)]

    def _hold_levels(self, like: Tensor) -> None:
        """Make room for levels, where somebody measures them."""
        joint, self.levels = self.joint, None
        if not any(map(joint.measures, range(len(self.parts)))):
            return
        self.levels = like.new_full((joint.K.rows[-1].stop + joint.C.rows[-1].stop,), EVEN)
        self.matrix_of = torch.cat([joint.K.matrix_of, joint.C.matrix_of])
        self.length_of = torch.empty_like(self.levels)
        lengths = joint.as_levels(self.length_of)
        for i in range(len(self.parts)):
            for side in joint.levels(i, lengths).sides:
                side.fill_(side.shape[-1])

    def measured(self) -> None:
        """Have the sizes that follow from the averages."""
        of_weights = size(self._sides, self.factors.averages.t_U)
        if self._share is not None:
            of_weights = torch.stack([of_weights, of_weights * self._share])
        self.size.copy_(of_weights)

    def by_kind(self, late: Late) -> Late:
        """Sums with the numbers of weights and the numbers of biases in rows, if these are apart."""
        return late.map(lambda t: t.mT) if self.apart else late

    def matrices(self, flat: Tensor) -> list[Tensor]:
        """What all parameters have as matrices, views; without the biases if these are apart."""
        return [part.stack.layers[0].kind.matrix(*part.joined(flat)) for part in self.parts]

    def columns(self, flat: Tensor) -> list[Tensor]:
        """What biases have that are apart, as columns."""
        found = []
        for part in self.parts:
            stack = part.stack
            found.append(part.joined(flat)[1].view(*stack.batch, stack.layers[0].shape[1], 1))
        return found


def bundled(
    ready: Sequence[Stack], before: Sequence[Bundle], alive: Iterable[Stack]
) -> tuple[list[Bundle], list[Bundle]]:
    """The stacks that step now in bundles, and further bundles that wait for their next step.

    If only some stacks of a bundle step, it is parted for good.
    """
    stepping, waiting, alive = set(ready), [], set(alive)
    found, fresh = [], dict.fromkeys(ready)
    for bundle in before:
        own = [stack for stack in bundle.stacks if stack in stepping]
        if len(own) == len(bundle.parts):
            found.append(bundle)
        elif own:
            found.append(Bundle(own))
        elif alive.issuperset(bundle.stacks):
            waiting.append(bundle)
        for stack in own:
            del fresh[stack]
    alike: dict[Any, tuple[int, list[Stack]]] = {}  # the last of each likeness, and its numbers
    several: list[list[Stack]] = []
    for stack in fresh:
        n = sum(p.numel() for layer in stack.layers for p in layer.parameters)
        total, stacks = alike.get(likeness := _likeness(stack), (0, []))
        if not stacks or total + n > _LARGEST:
            total, stacks = 0, []
            several.append(stacks)
        stacks.append(stack)
        alike[likeness] = total + n, stacks
    return found + list(map(Bundle, several)), waiting


def _likeness(stack: Stack) -> Any:
    layer = stack.layers[0]
    dtypes = (layer.parameters[0].dtype, layer.parameters[-1].dtype, *layer.dtypes)
    factors = stack.factors
    apart = factors is not None and inputs_of(factors) is not None
    return stack.visits, id(layer.group), layer.weight.device, dtypes, type(factors), apart
