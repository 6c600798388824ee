"""The law kit itself: pytest cases, the command line, and the report."""

import subprocess
import sys
from typing import Any, Self

import pytest

from singd_core.structures import Dense, Diagonal, structure
from singd_core.testing import LAWS, LawError, backends, check_structure, laws
from singd_core.testing.__main__ import main
from singd_core.testing.run import run

NUMPY = backends()[:1]


@structure
class Banded(Dense):
    """Tridiagonal matrices: no structure, as their products have five diagonals."""

    matrix: Any

    @classmethod
    def restrict(cls, M: Any) -> Self:
        return cls(Dense.restrict(M).matrix * 1.0).banded()

    project = restrict

    def banded(self) -> Self:
        import numpy as np

        d = self.matrix.shape[-1]
        near = np.abs(np.arange(d)[:, None] - np.arange(d)) <= 1
        return type(self)(self.matrix * near)


def parameters(test: Any) -> list[Any]:
    (mark,) = test.pytestmark
    return list(mark.args[1])


def test_laws_makes_a_case_of_each_law_backend_and_dtype() -> None:
    @laws(Diagonal)
    def case(law: Any) -> None: ...

    names = {str(p.id).split("-")[1] for p in parameters(case)}
    assert names == set(LAWS)
    first = parameters(case)[0]
    assert first.id.startswith("Diagonal-")
    first.values[0]()  # the case is a call that checks the law


def test_expected_failures_are_strict_and_must_name_a_law() -> None:
    @laws(Diagonal, xfail={"gram": "not written yet"})
    def case(law: Any) -> None: ...

    marked = [p for p in parameters(case) if p.marks]
    assert marked
    assert all("-gram-" in p.id for p in marked)
    assert all(mark.kwargs == {"reason": "not written yet", "strict": True}
               for p in marked for mark in p.marks)  # fmt: skip
    with pytest.raises(ValueError, match="there is no law 'grm'"):
        laws(Diagonal, xfail={"grm": "a slip"})


@pytest.mark.slow
def test_the_report_shows_what_is_broken_and_where() -> None:
    report = check_structure(Banded, backends=NUMPY, raises=False)
    text = repr(report)
    assert text.startswith("Banded breaks ")
    assert "closed_under_product" in report.broken
    assert "✗" in text
    assert "✓" in text
    with pytest.raises(LawError) as caught:
        check_structure(Banded, backends=NUMPY)
    assert caught.value.law == report.broken[0]
    assert "numpy" in str(caught.value).lower()


def test_the_report_of_a_structure_says_that_it_is_one() -> None:
    report = check_structure(Diagonal, backends=NUMPY, sizes=[1, 3])
    assert "keeps all laws" in repr(report)
    assert "✗" not in repr(report)
    assert report.errors == []


@pytest.mark.slow
def test_the_command_line_exits_by_what_it_found(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("singd_core.testing.report.backends", lambda: NUMPY)
    assert main(["diagonal", "--sizes", "1,2"]) == 0
    assert "keeps all laws" in capsys.readouterr().out
    assert main([f"{__name__}:Banded"]) == 1
    assert "closed_under_product" in capsys.readouterr().out
    assert main(["no.such.module:Thing"]) == 2
    assert main(["hierarchical:0,1"]) == 2
    assert "k1 must be at least 1" in capsys.readouterr().err


def test_a_counterexample_is_made_small() -> None:
    """Of a law that fails where an entry is not 0, on matrices with a single 1."""

    @structure
    class Squared(Diagonal):
        def apply(self, X: Any) -> Any:
            return super().apply(X) + (super().apply(X) != 0.0)

    with pytest.raises(LawError) as caught:
        check_structure(Squared, backends=NUMPY)
    assert (caught.value.law, caught.value.d) == ("apply", 1)
    assert str(caught.value).endswith("with\nL, the restriction of\n  [[1]]\nX =\n  [[0 0 1]]")


@pytest.mark.slow
def test_many_more_examples_and_sizes_in_the_nightly_profile(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[tuple[int, ...]] = []

    class Counted(Diagonal):
        def apply(self, X: Any) -> Any:
            seen.append(X.shape)
            return super().apply(X)

    counts = []
    for profile in ("", "nightly"):
        monkeypatch.setenv("SINGD_LAWS", profile)
        seen.clear()
        run(LAWS["apply"], Counted, NUMPY[0], "float64")
        counts.append((len(seen), len(set(seen))))
    (few, sizes), (many, more) = counts
    assert few <= LAWS["apply"].examples * sizes
    assert many > 10 * few
    assert more > 2 * sizes


def test_without_hypothesis_it_says_what_to_install() -> None:
    code = "import sys; sys.modules['hypothesis'] = None; import singd_core.testing"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "pip install '.[testing]'" in done.stderr


def test_the_module_can_be_run() -> None:
    command = [sys.executable, "-m", "singd_core.testing", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "--sizes" in done.stdout
