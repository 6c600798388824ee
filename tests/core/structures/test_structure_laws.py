"""The built-in structures under all laws, with parameters smaller and larger than the matrix."""

import pytest

from singd_core.structures import (
    Dense,
    Diagonal,
    Tril,
    TrilToeplitz,
    Triu,
    TriuToeplitz,
    blockdiagonal,
    hierarchical,
    names,
    trilbottomrightdiag,
    triltopleftdiag,
    triubottomrightdiag,
    triutopleftdiag,
)
from singd_core.testing import laws
from singd_core.testing.cases import parameters
from singd_core.testing.laws_storage import dense_operations

STRUCTURES = [
    Dense,
    Diagonal,
    Tril,
    Triu,
    TrilToeplitz,
    TriuToeplitz,
    blockdiagonal(3),
    trilbottomrightdiag(3),
    triltopleftdiag(2),
    triubottomrightdiag(2),
    triutopleftdiag(1),
    hierarchical(2, 3),
]
# the same with other parameters, some larger than the matrix
MORE = [
    blockdiagonal(1),
    blockdiagonal(30),
    trilbottomrightdiag(),
    triutopleftdiag(9),
    hierarchical(1, 1),
    hierarchical(15, 15),
]


# Mirror images of others of STRUCTURES: most of their code is in a class that both derive from.
MIRRORED = {
    Triu,
    TriuToeplitz,
    trilbottomrightdiag(3),
    triubottomrightdiag(2),
    triutopleftdiag(1),
}
# A triangle, and a triangle beside a diagonal: hierarchical(2, 3) has both, with what lies between.
PARTS = {Tril, triltopleftdiag(2)}


def slow(S, law, backend, dtype):
    """Marks a case as slow if others show nearly the same.

    That every operation of every structure compiles is a law of its own, so one structure shows
    that a whole step does. A mirrored structure, and one whose parts are those of others, goes
    through all dtypes in NumPy alone. The others go through float64 and float16 in NumPy, and
    elsewhere through float32 and bfloat16.
    """
    if law.name == "torch_step_compiles":
        shown = hierarchical(2, 3) != S
    else:
        narrow = dtype in ("float16", "float64")
        shown = backend.name != "numpy" and (S in MIRRORED | PARTS or narrow)
    return [pytest.mark.slow] if shown else []


@pytest.mark.parametrize("law", list(parameters(STRUCTURES, slow)))
def test_a_built_in_structure_keeps_the_law(law):
    law()


@pytest.mark.slow
@laws(*MORE)
def test_other_parameters_keep_the_law(law):
    law()


@pytest.mark.parametrize("S", STRUCTURES + MORE, ids=lambda S: S.name)
def test_no_operation_of_few_numbers_is_left_dense(S):
    assert dense_operations(S) == []


def test_every_registered_family_is_tested():
    tested = {S.name.partition(":")[0] for S in STRUCTURES}
    families = {name.partition(":")[0].partition("[")[0] for name in names()}
    assert families - tested == {"block30diagonal", "hierarchical15_15"}
