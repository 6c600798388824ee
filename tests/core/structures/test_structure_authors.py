"""The projections and products of singd 0.0.5, the authors' package, where it has the structure."""

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("singd.structures")

from singd_core.structures import get  # noqa: E402


def _author(module: str, name: str) -> type:
    return getattr(__import__(f"singd.structures.{module}", fromlist=[name]), name)


def _template(module: str, name: str, **attributes: int) -> type:
    return type("Chosen", (_author(module, name),), attributes)


def _cases():
    yield "dense", _author("dense", "DenseMatrix")
    yield "diagonal", _author("diagonal", "DiagonalMatrix")
    yield "triltoeplitz", _author("triltoeplitz", "TrilToeplitzMatrix")
    yield "triutoeplitz", _author("triutoeplitz", "TriuToeplitzMatrix")
    yield "trilbottomrightdiag", _author("trilbottomrightdiag", "TrilBottomRightDiagonalMatrix")
    yield "triltopleftdiag", _author("triltopleftdiag", "TrilTopLeftDiagonalMatrix")
    yield "triubottomrightdiag", _author("triubottomrightdiag", "TriuBottomRightDiagonalMatrix")
    yield "triutopleftdiag", _author("triutopleftdiag", "TriuTopLeftDiagonalMatrix")
    yield "blockdiagonal:3", _template("blockdiagonal", "BlockDiagonalMatrixTemplate", BLOCK_DIM=3)
    yield (
        "hierarchical:2,3",
        _template("hierarchical", "HierarchicalMatrixTemplate", MAX_K1=2, MAX_K2=3),
    )


@pytest.mark.parametrize("d", [1, 2, 4, 5, 8])
@pytest.mark.parametrize(
    ("name", "theirs"), list(_cases()), ids=lambda x: x if type(x) is str else ""
)
@pytest.mark.filterwarnings("ignore")  # theirs says where it is naive
def test_projections_and_products_are_the_authors(name, theirs, d):
    ours = get(name)
    generator = torch.Generator().manual_seed(d)
    M, X = (torch.randn(d, n, generator=generator) for n in (d, 3))
    M = M + M.T

    def close(actual, expected):
        # float32, which is the widest that some of theirs take: sums of up to 8³ products
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)

    K_theirs, K_ours = theirs.from_dense(M), ours.project(M)
    close(K_ours.dense(), K_theirs.to_dense())
    close(K_ours.congruence(X).dense(), K_theirs.from_inner(X).to_dense())
    close(K_ours.gram().dense(), K_theirs.from_inner().to_dense())
    close(K_ours.apply_t(X), K_theirs.rmatmat(X))
    close(K_ours.matmul(K_ours).dense(), (K_theirs @ K_theirs).to_dense())
    close(K_ours.norm(), K_theirs.frobenius_norm())
    close(K_ours.max_abs(), K_theirs.infinity_vector_norm())
    close(K_ours.trace() / d, K_theirs.average_trace())
