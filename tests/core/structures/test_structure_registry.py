"""Names of structures, and what is said of a wrong one."""

from functools import partial

import numpy as np
import pytest

from singd_core.structures import (
    BlockDiagonal,
    Diagonal,
    blockdiagonal,
    get,
    hierarchical,
    names,
    register,
    registry,
    trilbottomrightdiag,
)


def test_a_name_gives_its_structure():
    assert get("diagonal") is Diagonal
    assert get("blockdiagonal:4") is blockdiagonal(4)
    assert get("hierarchical:2,3") is hierarchical(2, 3)
    assert get("trilbottomrightdiag") is trilbottomrightdiag(1)
    assert get("trilbottomrightdiag:1") is get("trilbottomrightdiag")


def test_the_authors_names_are_known():
    assert get("block30diagonal") is blockdiagonal(30)
    assert get("hierarchical15_15") is hierarchical(15, 15)


def test_a_structure_is_its_own_name():
    assert get(Diagonal) is Diagonal


def test_names_show_parameters():
    assert "blockdiagonal:b" in names()
    assert "trilbottomrightdiag[:k]" in names()
    assert "hierarchical:k1,k2" in names()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("diagnoal", 'there is no structure "diagnoal"; there are dense, diagonal, '),
        ("diagonal:3", '"diagonal:3": diagonal takes no parameters'),
        ("hierarchical:2", '"hierarchical:2": expected "hierarchical:k1,k2" with integers'),
        ("hierarchical:2,3,4", '"hierarchical:2,3,4": expected "hierarchical:k1,k2" with integers'),
        ("blockdiagonal", '"blockdiagonal": expected "blockdiagonal:b" with integers'),
        ("blockdiagonal:x", '"blockdiagonal:x": expected "blockdiagonal:b" with integers'),
        ("blockdiagonal:0", '"blockdiagonal:0": b must be at least 1, got 0'),
        ("hierarchical:0,4", '"hierarchical:0,4": k1 must be at least 1, got 0'),
        ("", 'there is no structure ""'),
        (3, "3 is neither a structure nor a name"),
    ],
)
def test_a_wrong_name_is_explained(name, message):
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        get(name)
    assert str(caught.value).startswith(message)
    assert "hierarchical:k1,k2" in str(caught.value)


@pytest.mark.parametrize("b", [2.0, True, "2"])
def test_a_size_that_is_no_integer_is_refused(b):
    """It would be found in place of 2, as an equal number."""
    with pytest.raises(TypeError, match="b must be an integer, got"):
        blockdiagonal(b)
    assert get("blockdiagonal:2").name == "blockdiagonal:2"


@pytest.fixture
def families(monkeypatch):
    monkeypatch.setattr(registry, "_FAMILIES", dict(registry._FAMILIES))


@pytest.mark.usefixtures("families")
def test_a_registered_name_is_found_with_its_parameters():
    register("mine", Diagonal)
    register("blocks", blockdiagonal)
    assert get("mine") is Diagonal
    assert get("blocks:2") is blockdiagonal(2)
    assert "mine" in names()
    assert "blocks:b" in names()


@pytest.mark.usefixtures("families")
@pytest.mark.parametrize(
    ("name", "structure", "error", "message"),
    [
        ("diagonal", BlockDiagonal, ValueError, 'the name "diagonal" is taken'),
        ("hierarchical", trilbottomrightdiag, ValueError, 'the name "hierarchical" is taken'),
        ("a:b", Diagonal, ValueError, "'a:b' cannot name a structure"),
        ("", Diagonal, ValueError, "'' cannot name a structure"),
        ("mine", int, TypeError, "is neither a subclass of Structure nor a function"),
        ("mine", "diagonal", TypeError, "is neither a subclass of Structure nor a function"),
    ],
)
def test_what_cannot_be_registered_is_explained(name, structure, error, message):
    with pytest.raises(error, match=message):
        register(name, structure)


@pytest.mark.usefixtures("families")
def test_a_definition_that_runs_again_takes_the_place_of_the_one_before():
    def run_a_cell():
        class Mine(Diagonal):
            pass

        register("mine", Mine)
        return Mine

    run_a_cell()
    assert run_a_cell() is get("mine")


@pytest.mark.usefixtures("families")
@pytest.mark.parametrize("more", [lambda n: lambda b: blockdiagonal(b + n), partial(partial, sum)])
def test_what_has_no_name_in_the_source_takes_no_place(more):
    register("mine", more(0))
    with pytest.raises(ValueError, match="is taken"):
        register("mine", more(1))


def test_equal_parameters_give_the_same_class():
    assert blockdiagonal(7) is blockdiagonal(7)
    assert issubclass(blockdiagonal(7), BlockDiagonal)
    assert blockdiagonal(7).name == "blockdiagonal:7"


def test_a_structure_is_shown_under_its_name():
    L = hierarchical(2, 3).identity(7, like=np.zeros((), dtype="float32"))
    assert repr(L) == "hierarchical:2,3(shape=(7, 7), dtype=float32)"
