"""A layer: its parameters, its kind, and what is known of its rows."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from singd_core import rules
from singd_core.layers import LayerKind
from singd_core.rules import Factors, learns_from_gradients
from singd_core.rules.inverse_free import InverseFree
from singd_core.structures import Diagonal, Structure
from singd_torch._groups import settings_of
from singd_torch.layers.pending import Pending, Rows, part_of
from singd_torch.layers.reach import Pass, is_zero
from singd_torch.layers.source import Source
from singd_torch.tensors.pieces import on_host

# Refreshes in a row without rows after which gradients refresh the factors of what has gradients.
MOST_MISSED = 3
# Why a layer is trained without rows by a choice of the loss, of which nobody is warned.
IN_THE_LOSS = "derivatives of it are in the loss, and give no rows"
Key: TypeAlias = tuple[int | None, bool]


@dataclasses.dataclass(eq=False)
class Layer:
    """A weight with its bias, the modules that use them, and what the optimizer knows of them.

    Attributes:
        name: The name of the weight in the model.
        kind: How the weight is a matrix, and what its rows are.
        weight: The weight.
        bias: Its bias, or None if it has none that is trained.
        sources: The modules whose calls give rows, and how.
        group: The parameter group of the weight.
        bias_group: The parameter group of the bias.
        structures: Of K and of C.
        pending: The rows of the current step, summed up, by part and role.
        last_pass: The last backward pass that brought rows.
        loss: The loss whose rows come, by the first backward pass of a call.
        seen: Whether the factors have ever been refreshed.
        by_gradient: Whether gradients refresh them, as no rows have been seen so far.
        meter: What measures rows where the factors are on another process, else None.
        without_rows: Why the rows do not tell the gradient, so that none are taken; or None.
        unused: Whether the last step had gradients of others, and none of the weight.
        called_in: The last step with a backward pass through a call that has rows.
        autocast: Whether products are in bfloat16 and the weight is not, on an accelerator.
        refreshes: Refreshes with a call that has rows.
        notes: What was found out, and is kept in checkpoints (`FOUND`).
    """

    name: str
    kind: LayerKind
    weight: nn.Parameter
    bias: nn.Parameter | None
    sources: list[tuple[nn.Module | None, Source]]
    group: dict[str, Any]
    structures: tuple[type[Structure], type[Structure]]
    bias_group: dict[str, Any] | None = None
    pending: dict[Key, Pending] = dataclasses.field(default_factory=dict)
    last_pass: Pass = dataclasses.field(default_factory=Pass)
    loss: int = -1
    seen: bool = False
    by_gradient: bool = False
    meter: Any = None
    without_rows: str | None = None
    unused: bool = False
    called_in: int = -1
    autocast: bool = False
    refreshes: int = 0
    notes: dict[str, Any] = dataclasses.field(default_factory=dict)

    def tell_autocast(self, g: Tensor) -> None:
        """Find out from the gradient at an output whether the model's products are in bfloat16.

        Products with factors are then in bfloat16 too, unless `preconditioner_dtype` is given, or
        the rule wants inverses.
        """
        narrower = g.dtype == torch.bfloat16 and self.weight.dtype == torch.float32
        free = issubclass(rules.get(self.group["rule"]), InverseFree)
        free = free and tuple(self.group["preconditioner_dtype"]) == (None, None)
        self.autocast = narrower and free and not on_host(g)

    @property
    def is_trained(self) -> bool:
        """Whether a step may move it: a frozen weight moves if it has a gradient all the same."""
        return self.weight.requires_grad or self.weight.grad is not None

    @property
    def has_rows(self) -> bool:
        """Whether rows refresh the factors, or else gradients."""
        return self.kind.has_rows and not self.by_gradient

    @property
    def rows_seen(self) -> bool:
        """Whether rows have ever reached the factors."""
        return self.seen and self.has_rows

    @property
    def missed(self) -> int:
        """Refreshes in a row without rows, for which there was a gradient."""
        return int(self.notes.get("missed", 0))

    @missed.setter
    def missed(self, count: int) -> None:
        self.notes["missed"] = count

    def is_lost(self) -> bool:
        """Whether its factors are to learn from gradients from now on: no rows come, or no more."""
        return self.missed >= (MOST_MISSED if self.seen else 1) and self.can_do_without()

    def can_do_without(self) -> bool:
        """Whether its gradient could refresh the factors in place of rows."""
        learns = learns_from_gradients(settings_of(self.group))
        return self.has_rows and self.weight.grad is not None and learns

    @property
    def was_called(self) -> bool:
        """Whether a backward pass of this step went through a call that has rows."""
        return bool(self.called_in == self.group["steps"])

    def misses_rows(self) -> bool:
        """Whether it has a gradient for a refresh, other than zeros, and no rows.

        Calls whose rows are refused count as rows, once there are factors by rows.
        """
        grad = self.weight.grad
        if grad is None or not self.has_rows or self.pending or (self.seen and self.was_called):
            return False
        return not is_zero(grad)

    def count_missed(self, *, called: bool, missed: bool) -> None:
        """Count a refresh. Some process may have had calls for it, or gradients without calls."""
        if called:
            self.called_in = self.group["steps"]
            self.refreshes += 1
        if called and self.seen:
            self.missed = 0
        elif missed:
            self.missed += 1

    @property
    def is_open(self) -> bool:
        """Whether calls of functions that are handed the weight itself give its rows."""
        return self.kind.has_rows and all(source.is_open for _, source in self.sources)

    @property
    def is_unturned(self) -> bool:
        """Whether it is a stack without a call so far: it may turn out to be transposed."""
        return self.is_stack and not self.sources and not self.kind.is_turned

    @property
    def is_stack(self) -> bool:
        """Whether the weight has an axis of its own for matrices, as a stack of experts has."""
        return self.kind.is_stack

    @property
    def has_modules(self) -> bool:
        """Whether a module is known whose calls should give rows."""
        return any(module is not None for module, _ in self.sources)

    def most_rows(self, x: Tensor) -> int:
        """How many rows of a call its factors may want, at most all rows of its input."""
        (_, *sides), n = self.shape, math.prod(x.shape[:-1])
        return int(min(n, max(self.group["rows"], *sides)))

    def source(self, kind: LayerKind, *, biased: bool, part: int | None = None) -> Source | None:
        """How a call of this kind that is handed the weight gives rows; None if it cannot."""
        found, swapped = self.kind.of_call(kind), self.kind.is_turned != kind.is_turned
        if found is None or (swapped and rules.get(self.group["rule"]).only_dense):
            return None
        if found.diagonal_inputs and not issubclass(self.structures[swapped], Diagonal):
            return None
        batch_second = any(source.batch_second for _, source in self.sources)
        return Source(self.weight, found, part, swapped, batch_second, biased or swapped)

    def is_found_as(self, other: Layer) -> bool:
        """Whether what is known of one is right for the other, of the same weight."""
        own, its = (
            [(m, s.kind, s.swapped, s.by_output) for m, s in one.sources if m is not None]
            for one in (self, other)
        )
        same = self.bias is other.bias and self.kind == other.kind
        return same and self.structures == other.structures and own == its

    def turn(self) -> None:
        """Begin anew with the matrices of a stack as `(d_in, d_out)`, which its calls tell.

        Checkpoints have that.
        """
        self.notes["turned"] = True
        turned = self.kind.of_transpose()
        assert turned is not None
        self.kind = turned
        rule, wanted = rules.get(self.group["rule"]), self.group["structures"]
        self.structures = rule.choose(wanted, self.shape, diagonal=(False, False))
        self.seen = self.by_gradient = False
        self.refreshes = self.missed = 0

    @property
    def expects_rows(self) -> bool:
        """Whether rows are known to come: for a stack, once a call has been seen."""
        return self.has_rows and bool(self.seen or self.sources or not self.is_stack)

    def has_module(self, source: Source) -> bool:
        """Whether calls of a module may be what this is a source of."""
        return any(
            module is not None and other.by_output and other.swapped == source.swapped
            for module, other in self.sources
        )

    def know(self, source: Source) -> None:
        """Expect rows of this source."""
        if source.swapped not in {other.swapped for _, other in self.sources}:
            self.sources.append((None, source))

    def lose_rows(self, reason: str) -> None:
        """Take no rows from now on."""
        self.without_rows, self.pending = self.without_rows or reason, {}

    @property
    def one_hot(self) -> bool:
        """Whether rows of a table of embeddings are among its own."""
        kinds = (self.kind, *(source.kind for _, source in self.sources))
        return any(kind.diagonal_inputs for kind in kinds)

    @property
    def parameters(self) -> tuple[nn.Parameter, ...]:
        """The weight and, if there is one, the bias."""
        return (self.weight,) if self.bias is None else (self.weight, self.bias)

    @property
    def shape(self) -> tuple[tuple[int, ...], int, int]:
        """The batch axes, d_out and d_in of the matrix."""
        return self.kind.shape(tuple(self.weight.shape), self.bias is not None)

    @property
    def has_bias_column(self) -> bool:
        """Whether the last column of the matrix is the bias."""
        return self.bias is not None and self.kind.has_rows

    @property
    def bias_is_apart(self) -> bool:
        """Whether its bias is no column of the matrix."""
        return self.bias is not None and not self.kind.has_rows

    @property
    def dtypes(self) -> tuple[torch.dtype, torch.dtype, torch.dtype]:
        """Of K, of C and of the momentum: float16 has no range for them."""
        own = self.weight.dtype if self.weight.dtype != torch.float16 else torch.float32
        K, C = self.group["preconditioner_dtype"]
        return K or own, C or own, self.group["momentum_dtype"] or own

    def first_factors(self, device: torch.device | None = None) -> Factors:
        """The factors before the first refresh, on the device of the weight or another."""
        device = device or self.weight.device
        like_K, like_C = (torch.empty(0, dtype=dtype, device=device) for dtype in self.dtypes[:2])
        how = {"has_rows": self.has_rows, "one_hot": self.one_hot, "bias": self.bias_is_apart}
        given = settings_of(self.group)
        return rules.start(self.structures, self.shape, given, like_K, like_C, **how)

    def fits(self, factors: Factors) -> bool:
        """Whether factors are on the weight's device, in its dtypes, and of its rule."""
        (K, C, _), device = self.dtypes, self.weight.device
        return factors.has_rows is self.has_rows and all(
            side.like.dtype == dtype and side.like.device == device
            for side, dtype in zip(factors.sides, (K, C), strict=True)
        )

    def is_stored_as(self, other: Layer) -> bool:
        """Whether factors fit both or none of two equal layers."""
        p, q = self.weight, other.weight
        same = p.dtype == q.dtype and p.device == q.device
        return same and self.has_rows is other.has_rows

    def add(self, key: Key, new: Pending) -> None:
        """Add what was measured of one call, perhaps elsewhere than where the weight is kept."""
        new = new.on(self.weight.device)
        if key in self.pending:
            new = self.pending[key].add(new, mean=self.group["loss_average"] is not None)
        self.pending[key] = new

    def sizes(self) -> list[Tensor]:
        """What is finite if all pending rows are."""
        return [
            measured.squares
            for pending in self.pending.values()
            for measured in (pending.inputs, pending.outputs)
        ]

    def roles(self) -> list[Key]:
        """The parts and roles that can have rows."""
        roles = {source.swapped for _, source in self.sources}
        return [(part, swapped) for part in self.kind.row_parts for swapped in sorted(roles)]

    def all_pending(self) -> dict[Key, Pending]:
        """What is pending of all parts and roles, also of those that were not used."""
        return {key: self.pending.get(key) or self.no_rows(key) for key in self.roles()}

    def no_rows(self, key: Key) -> Pending:
        """What is pending of a part and role that was not used."""
        (part, swapped), (_, d_out, d_in) = key, self.shape
        groups = self.shape[0] if part is None else ()
        dtype, device = self.weight.dtype, self.weight.device
        A, B = (torch.zeros(*groups, 1, d, dtype=dtype, device=device) for d in (d_in, d_out))
        rows = Rows(B, 0, A, 0) if swapped else Rows(A, 0, B, 0)
        by = self.meter or part_of(self.first_factors(), part)
        return Pending.measured([by], [rows], 0, swapped=swapped)[0]

    def split(self, matrix: Tensor) -> tuple[Tensor, ...]:
        """The parts of a matrix that belong to `parameters`."""
        shape, bias = tuple(self.weight.shape), self.bias is not None
        return tuple(part for part in self.kind.split(matrix, shape, bias) if part is not None)
