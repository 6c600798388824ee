"""What a rule is: the factors of a layer, and how they learn of its curvature."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Self, TypeVar

from singd_core._array import Array
from singd_core._settings import Rate, Settings
from singd_core._tree import Tree
from singd_core.curvature import Averages, Curvature, Measured
from singd_core.levels import Levels
from singd_core.preconditioner import Preconditioner, balance, products
from singd_core.rounding import Rounding
from singd_core.structures.base import Structure
from singd_core.structures.choose import MatrixShape, Structures, resolve

T_Structure = TypeVar("T_Structure", bound=Structure)


class Rule(Tree, ABC):
    """The factors of a layer, or of a stack of equal layers, and how they learn.

    A new rule is a `tree` that writes the abstract methods, or overrides some methods of another
    rule. `register` gives it a name, which is then a value of the setting `rule`.

    Attributes:
        averages: Mean diagonals of U and G so far.
        levels: How large rows and columns of natural gradients are, or None if not needed.
        title: The name of the rule in tables.
        has_rows: Whether rows refresh the factors. Otherwise gradients do.
        only_dense: Whether both factors have to be dense.
        without_rows: Whether matrices that show no rows learn too, by `Shampoo`. Otherwise AdamW
            trains them.
    """

    averages: Averages
    levels: Levels | None

    title: ClassVar[str]
    has_rows: ClassVar[bool] = True
    only_dense: ClassVar[bool] = False
    without_rows: ClassVar[bool] = False

    @classmethod
    def choose(
        cls,
        structures: Structures | None,
        shape: MatrixShape = ((), 1, 1),
        *,
        diagonal: tuple[bool, bool] = (False, False),
        by_rows: bool = True,
        entries_of_bags: int = 0,
    ) -> tuple[type[Structure], type[Structure]]:
        """The structures of K and C of a layer under this rule.

        It has the arguments and errors of `singd_core.structures.choose.resolve`.
        """
        return resolve(
            structures,
            shape,
            dense_for=cls.title if cls.only_dense else None,
            diagonal=diagonal,
            by_rows=by_rows,
            entries_of_bags=entries_of_bags,
        )

    @classmethod
    def wants_rows(cls, structures: Sequence[type[Structure]]) -> bool:
        """Whether factors of these structures learn better from rows than from gradients."""
        return True

    @classmethod
    def keeps_momentum(cls, s: Settings) -> bool:
        """Whether the factors have a Riemannian momentum."""
        return False

    @classmethod
    @abstractmethod
    def start(
        cls, K: Structure, C: Structure, averages: Averages, levels: Levels | None, momentum: bool
    ) -> Self:
        """The factors before the first refresh, from the identity in both structures.

        `momentum` is what `keeps_momentum` said.
        """

    @property
    @abstractmethod
    def sides(self) -> tuple[Structure, Structure]:
        """A factor of side d_in and one of side d_out, which have the structures and dtypes."""

    @property
    def structures(self) -> tuple[type[Structure], type[Structure]]:
        """The structures of K and of C."""
        K, C = self.sides
        return type(K), type(C)

    @property
    def dtypes(self) -> dict[str, Any]:
        """The dtypes of K and of C."""
        return {name: L.like.dtype for name, L in zip("KC", self.sides, strict=True)}

    @abstractmethod
    def measure(self, A: Array, B: Array) -> tuple[Measured, Measured]:
        """The sums of rows A, shape (..., n, d_in), and B, shape (..., n, d_out)."""

    def seen(self, inputs: Measured, outputs: Measured) -> tuple[Measured, Measured]:
        """What `measure` returns, from sums of the same rows that K = C = I measured."""
        return inputs, outputs

    @abstractmethod
    def measuring(self) -> Self:
        """What `measure` needs; the rest is None."""

    @property
    @abstractmethod
    def row_norms(self) -> tuple[Array, Array]:
        """The roots of the diagonals of P_K and of P_C."""

    @abstractmethod
    def preconditioner(
        self, T: int, *, balanced: bool = False, scales: Sequence[Array] | None = None
    ) -> Preconditioner:
        """What preconditions T gradients.

        Args:
            T: How many: what is worth being made for many is not for one.
            balanced: See `Preconditioner`.
            scales: What balances K and C, if that is known.
        """

    def precondition(self, gradient: Array, *, balanced: bool = False) -> Array:
        """The natural gradient of ∇W, shape (..., d_out, d_in), in the dtype of C."""
        return self.preconditioner(1, balanced=balanced)(gradient)

    def scales(
        self, known: Sequence[Array] | None = None, *, balanced: bool
    ) -> Sequence[Array | None]:
        """What multiplies the columns and the rows of a balanced natural gradient."""
        if not balanced:
            return None, None
        if known is not None:
            return known
        found = [balance(norms) for norms in self.row_norms]
        return found if self.levels is None else products(found, self.levels.scales())

    @abstractmethod
    def refresh(
        self,
        curvature: Curvature,
        lr_cov: Rate,
        s: Settings,
        report: dict[str, Array] | None = None,
        rounding: Rounding | None = None,
    ) -> Self:
        """The factors after a refresh with the curvature, in their dtypes.

        A `report` may be told what the diagnostics show. `rounding` says how "K" and "C" are
        stored in 16 bits (`kept`), None to the nearest number.
        """

    @abstractmethod
    def norms(self) -> dict[str, Array]:
        """The Frobenius norms of the factors, by name."""


def kept(new: T_Structure, old: Structure, name: str, rounding: Rounding | None) -> T_Structure:
    """A new factor in the dtype of the old one."""
    return (new if rounding is None else rounding.tree(new, name)).astype(old.like)
