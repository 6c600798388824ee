"""Every array library gives the rows that NumPy gives: on its device, traced or not."""

from math import prod

import numpy as np
import pytest
from curvature_cases import CASES

from singd_core.layers import LayerKind, Linear


def rows(kind: LayerKind, x, g, bias: bool, kfac_approx: str):
    A, _ = kind.inputs(x, bias=bias, kfac_approx=kfac_approx)
    B, _ = kind.outputs(g, kfac_approx=kfac_approx, loss_average="batch")
    return A, B


def assert_equals_numpy(backend, kind: LayerKind, x, g, bias: bool, kfac_approx: str) -> None:
    expected = rows(kind, x, g, bias, kfac_approx)
    actual = backend.run(
        lambda x, g: rows(kind, x, g, bias, kfac_approx), backend.array(x), backend.array(g)
    )
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == backend.array(x).dtype
        np.testing.assert_allclose(
            backend.numpy(a), e, rtol=0, atol=backend.tolerance * np.abs(e).max()
        )


@pytest.mark.parametrize("kfac_approx", ["expand", "reduce"])
@pytest.mark.parametrize("shape", [(), (7,), (3, 4, 2)])
def test_linear_rows_equal_numpy(
    backend, shape: tuple[int, ...], kfac_approx: str, rng: np.random.Generator
) -> None:
    x, g = rng.normal(size=(*shape, 6)), rng.normal(size=(*shape, 4))
    assert_equals_numpy(backend, Linear(), x, g, True, kfac_approx)


# One for each array operation that a convolution uses.
SOME = ["3d", "stride, padding and dilation", "groups", "reflect", "replicate", "circular"]


@pytest.mark.parametrize("kfac_approx", ["expand", "reduce"])
@pytest.mark.parametrize("name", SOME)
def test_convolution_rows_equal_numpy(
    backend, name: str, kfac_approx: str, rng: np.random.Generator
) -> None:
    case = CASES[name]
    x, g = rng.normal(size=(3, *case.shape)), rng.normal(size=(3, 4, *case.shape[1:]))
    assert_equals_numpy(backend, case.kind(), x, g, True, kfac_approx)
    if "groups" in case.arguments:
        averaged = case.kind(average_groups=True)
        assert_equals_numpy(backend, averaged, x, g, False, kfac_approx)


@pytest.mark.parametrize("kfac_approx", ["expand", "reduce"])
@pytest.mark.parametrize("name", SOME)
def test_nothing_is_read_back_from_the_device(
    name: str, kfac_approx: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    xp = pytest.importorskip("array_api_strict")

    def refuse(self):
        raise AssertionError("an array was read back from the device")

    case, device = CASES[name], xp.Device("device1")
    x = xp.ones((3, *case.shape), device=device)
    g = xp.ones((3, 4, *case.shape[1:]), device=device)
    for method in ("__bool__", "__float__", "__int__", "__index__"):
        monkeypatch.setattr(type(x), method, refuse)
    for array in rows(case.kind(), x, g, True, kfac_approx):
        assert array.device == device


def test_rows_under_jit_equal_eager(rng: np.random.Generator) -> None:
    jnp, jax = pytest.importorskip("jax.numpy"), pytest.importorskip("jax")
    case = CASES["groups"]
    x, g = jnp.asarray(rng.normal(size=(3, *case.shape))), jnp.ones((3, 4, *case.shape[1:]))
    eager = rows(case.kind(), x, g, True, "expand")
    traced = jax.jit(lambda x, g: rows(case.kind(), x, g, True, "expand"))(x, g)
    for t, e in zip(traced, eager, strict=True):
        np.testing.assert_array_equal(t, e)


@pytest.mark.parametrize(
    ("name", "kfac_approx"), [("linear", "expand"), ("groups", "expand"), ("circular", "reduce")]
)
def test_rows_compiled_in_one_graph_equal_eager(name: str, kfac_approx: str) -> None:
    torch = pytest.importorskip("torch")
    kind, shape = (
        (Linear(), (5, 6)) if name == "linear" else (CASES[name].kind(), CASES[name].shape)
    )
    x, g = torch.randn(3, *shape), torch.randn(3, 4, *shape[1:])
    eager = rows(kind, x, g, True, kfac_approx)
    compiled = torch.compile(rows, fullgraph=True, backend="eager")(kind, x, g, True, kfac_approx)
    for c, e in zip(compiled, eager, strict=True):
        torch.testing.assert_close(c, e, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", ["2d", "groups", "circular"])
def test_half_precision_stays_half_precision(name: str, dtype: str) -> None:
    torch = pytest.importorskip("torch")
    case = CASES[name]
    x = torch.randn(3, *case.shape, dtype=torch.float64).to(getattr(torch, dtype))
    A, _ = case.kind().inputs(x, bias=True, kfac_approx="reduce")
    expected, _ = case.kind().inputs(x.double(), bias=True, kfac_approx="reduce")
    assert A.dtype == x.dtype
    # Two averaging products, each with rounded weights and a rounded result.
    eps = 4 * torch.finfo(x.dtype).eps
    torch.testing.assert_close(A.double(), expected, rtol=0, atol=eps * float(x.abs().max()))


def largest_intermediate(f, *args) -> int:
    """The size of the largest array that a JAX function makes, before any fusion."""
    jax = pytest.importorskip("jax")

    def largest(jaxpr) -> int:
        sizes = [prod(v.aval.shape) for eqn in jaxpr.eqns for v in eqn.outvars]
        inner = [p.jaxpr for eqn in jaxpr.eqns for p in eqn.params.values() if hasattr(p, "jaxpr")]
        return max([*sizes, *map(largest, inner)])

    return largest(jax.make_jaxpr(f)(*args).jaxpr)


@pytest.mark.parametrize("name", [n for n in CASES if "without" not in n and "kernel 1" not in n])
def test_reduce_makes_nothing_larger_than_the_padded_input(name: str) -> None:
    case = CASES[name]
    kind, x = case.kind(), np.ones((16, *case.shape), np.float32)
    padded = prod(n + w.before + w.after for n, w in zip(case.shape[1:], kind.windows, strict=True))
    channels = 16 * case.shape[0]
    made = largest_intermediate(lambda x: kind.inputs(x, bias=False, kfac_approx="reduce")[0], x)
    assert made <= channels * padded


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_expand_makes_nothing_larger_than_the_patches(name: str, bias: bool) -> None:
    case = CASES[name]
    kind, x = case.kind(), np.ones((16, *case.shape), np.float32)
    groups = case.arguments.get("groups", 1)
    channels = case.shape[0] // groups
    # The ones of the bias are a channel of their own until they are cut to one column.
    one = 0 if not bias else 1 if channels == 1 else case.patch // channels
    _, N = kind.inputs(x, bias=bias, kfac_approx="expand")
    patches = groups * N * (case.patch + one)
    padded = prod(n + w.before + w.after for n, w in zip(case.shape[1:], kind.windows, strict=True))
    made = largest_intermediate(lambda x: kind.inputs(x, bias=bias, kfac_approx="expand")[0], x)
    assert made <= max(patches, 16 * groups * (channels + bias) * padded)
