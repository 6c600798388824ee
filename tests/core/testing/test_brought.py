"""A structure that a person brings: valid ones pass, parameters and sides are said, time ends."""

import pickle
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from brought import Divisors, modulo, no_structure
from cases import cases

from singd_core import Optimizer, structures
from singd_core.structures import Diagonal
from singd_core.testing import LAWS, LawError, backends, check_structure
from singd_core.testing.__main__ import find, main
from singd_core.testing.run import run

NUMPY = backends()[:1]


@pytest.mark.parametrize("S", cases([Divisors, modulo(3)], fast=[Divisors]), ids=lambda S: S.name)
def test_a_valid_structure_of_another_kind_keeps_all_laws(S: Any) -> None:
    report = check_structure(S, backends=NUMPY, sizes=[1, 4, 5] if S is Divisors else None)
    assert report.broken == []


@pytest.mark.slow
@pytest.mark.parametrize("S", [Divisors, modulo(3)], ids=lambda S: S.name)
def test_a_valid_structure_of_another_kind_keeps_all_laws_on_every_library(S: Any) -> None:
    assert check_structure(S).broken == []


# ---- parameters --------------------------------------------------------------------------------


def test_a_family_makes_one_class_of_equal_parameters() -> None:
    assert modulo(3) is modulo(3)
    assert (modulo(3).name, modulo(3).p) == ("modulo:3", 3)
    L = modulo(3).identity(6, like=np.ones(()))
    assert type(pickle.loads(pickle.dumps(L))) is modulo(3)


def test_a_family_is_registered_under_a_name_with_parameters(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(structures.registry, "_FAMILIES", dict(structures.registry._FAMILIES))
    structures.register("modulo", modulo)
    assert structures.get("modulo:3") is modulo(3)
    assert structures.get("modulo") is modulo(2)
    assert "modulo[:p]" in structures.names()


# ---- sides -------------------------------------------------------------------------------------


def test_only_the_sides_that_a_structure_has_are_tried() -> None:
    with pytest.raises(ValueError, match="sizes: modulo:3 has no matrices of side 4"):
        check_structure(modulo(3), sizes=[3, 4], backends=NUMPY)


@pytest.mark.parametrize("d", [0, -1, 2.5])
def test_a_side_is_a_whole_number_of_at_least_1(d: Any) -> None:
    with pytest.raises(ValueError, match=f"sizes: a side is a whole number of at least 1, got {d}"):
        check_structure(Diagonal, sizes=[2, d], backends=NUMPY)


def test_an_optimizer_refuses_a_side_before_it_starts() -> None:
    optimizer = Optimizer(structures=(modulo(2), "dense"))
    optimizer.init({"w": np.zeros((3, 4))})
    with pytest.raises(ValueError, match='K has side 5, and "modulo:2" has no such matrices'):
        optimizer.init({"w": (np.zeros((3, 4)), np.zeros(3))})
    optimizer = Optimizer(structures=("dense", modulo(2)))
    with pytest.raises(ValueError, match='C has side 3, and "modulo:2"'):
        optimizer.init({"w": np.zeros((3, 4))})


def test_a_structure_without_small_sides_says_so() -> None:
    class Nowhere(Diagonal):
        @classmethod
        def has_side(cls, d: int) -> bool:
            return False

    with pytest.raises(ValueError, match=r"Nowhere\.has_side\(d\) is true for no d near 1"):
        check_structure(Nowhere, backends=NUMPY)


# ---- the command line --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("brought:Divisors", Divisors),
        ("brought:modulo:3", modulo(3)),
        ("brought:modulo", modulo(2)),
        ("hierarchical:2,3", structures.get("hierarchical:2,3")),
        ("dense", structures.Dense),
    ],
)
def test_names_on_the_command_line(name: str, found: Any) -> None:
    assert find(name) is found


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("brought:Other", "brought has no structure called Other"),
        ("brought:modulo:x", "brought has no structure called modulo, and no function"),
        ("brought:modulo:2,3", "takes from 0 to 1 positional arguments"),
        ("brought:Divisors:2", "brought has no structure called Divisors"),
        ("brought:no_structure:2", "no_structure returned 2, which is no structure"),
        ("brought:pytest:2", "brought has no structure called pytest"),
        ("brought:modulo:3 --sizes 4", "modulo:3 has no matrices of side 4"),
    ],
)
def test_a_wrong_name_is_an_error_with_exit_code_2(
    name: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(name.split()) == 2
    assert message in capsys.readouterr().err


def test_a_function_that_makes_no_structure_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(structures.registry, "_FAMILIES", dict(structures.registry._FAMILIES))
    structures.register("nothing", no_structure)
    for check in (structures.get, check_structure):
        with pytest.raises(ValueError, match='"nothing:2": nothing returned 2, which is no str'):
            check("nothing:2")
    assert main(["nothing:2"]) == 2
    assert "which is no structure" in capsys.readouterr().err


def test_the_command_line_does_not_pass_what_it_did_not_try(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["brought:modulo:3", "--seconds", "0"]) == 3
    printed = capsys.readouterr()
    assert printed.out.startswith("no law of modulo:3 was tried (0 of ")
    assert "of the laws: give more --seconds, or fewer --backends" in printed.err


def test_the_command_line_tries_the_libraries_that_are_asked_for(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["diagonal", "--sizes", "1", "--backends", "numpy"]) == 0
    printed = capsys.readouterr().out
    assert "keeps all laws" in printed
    assert "not tried, as they are about other array libraries: " in printed
    assert "jax_jit" in printed.partition("other array libraries: ")[2]
    with pytest.raises(SystemExit):
        main(["diagonal", "--backends", "numpy,nump"])
    assert "nump is not one of numpy" in capsys.readouterr().err


# ---- time --------------------------------------------------------------------------------------


def test_time_begins_when_the_libraries_are_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = [0.0]

    def slowly() -> Any:
        seconds[0] += 100.0
        return NUMPY

    clock = SimpleNamespace(perf_counter=lambda: seconds[0])
    monkeypatch.setattr("singd_core.testing.report.time", clock)
    monkeypatch.setattr("singd_core.testing.report.backends", slowly)
    assert check_structure(Diagonal, sizes=[1], seconds=1.0).untried == 0


def test_no_case_begins_after_the_time_is_over() -> None:
    whole = check_structure(Diagonal, backends=NUMPY, sizes=[1])
    report = check_structure(Diagonal, backends=NUMPY, sizes=[1], seconds=0.0)
    assert report.results == {}
    assert report.untried == len(whole.results)
    assert whole.untried == 0
    assert set(report.missed) == {law for law, _, _ in whole.results}
    assert f"no law of Diagonal was tried (0 of {len(report.missed)} laws, 0 of " in report.summary
    assert f"there was no time for {len(whole.results)} cases" in repr(report)


# ---- the nightly profile -----------------------------------------------------------------------


class WrongBeyond64(Diagonal):
    def apply(self, X: Any) -> Any:
        found = super().apply(X)
        return found if X.shape[-2] <= 64 else found * 1.5


class NoisyBeyondTenColumns(Diagonal):
    def apply(self, X: Any) -> Any:
        found = super().apply(X)
        return found if X.shape[-1] <= 10 else found * (1.0 + 1e-11)


@pytest.mark.parametrize("S", [WrongBeyond64, NoisyBeyondTenColumns], ids=lambda S: S.__name__)
def test_the_nightly_profile_finds_what_small_cases_hide(
    S: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(LAWS["apply"], S, NUMPY[0], "float64")
    monkeypatch.setenv("SINGD_LAWS", "nightly")
    with pytest.raises(LawError, match='breaks the law "apply"'):
        run(LAWS["apply"], S, NUMPY[0], "float64", shrink=False)
