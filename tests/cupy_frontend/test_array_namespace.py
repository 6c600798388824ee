"""What the core asks of an array library exists in CuPy; nothing is computed."""

import ast
import inspect
from pathlib import Path

import array_api_compat.cupy as compat
import cupy
import ml_dtypes
import numpy as np
import pytest
from array_api_compat import array_namespace

from singd_core import Optimizer, _array
from singd_core._array import device, is_half, namespace

CORE = Path(__file__).parents[2] / "singd_core"


def _is_namespace(node: ast.expr) -> bool:
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name) and node.func.id == "namespace"
    return isinstance(node, ast.Name) and node.id == "xp"


def asked() -> tuple[set[str], set[tuple[str, str]]]:
    """The names that the core takes from a namespace, `linalg.inv` as one, and their keywords."""
    names, keywords = set(), set()
    for path in CORE.rglob("*.py"):
        if "testing" in path.parts:
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        full = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and _is_namespace(node.value):
                full[node] = node.attr
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and full.get(node.value) in ("linalg", "fft"):
                full[node] = f"{full[node.value]}.{node.attr}"
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and node.func in full:
                keywords |= {(full[node.func], k.arg) for k in node.keywords if k.arg}
        names |= set(full.values())
    return names, keywords


NAMES, KEYWORDS = asked()


def find(name: str) -> object:
    found = compat
    for part in name.split("."):
        found = getattr(found, part)
    return found


@pytest.mark.parametrize("name", sorted(NAMES))
def test_cupy_has_the_name(name):
    assert find(name) is not None


@pytest.mark.parametrize(("name", "keyword"), sorted(KEYWORDS))
def test_cupy_takes_the_keyword(name, keyword):
    function = find(name)
    if isinstance(function, cupy.ufunc):
        assert keyword in {"out", "dtype"}
    else:
        parameters = inspect.signature(function).parameters
        assert keyword in parameters


def test_no_name_that_a_step_asks_for_is_missed(monkeypatch):
    used = set()

    class Recorder:
        def __init__(self, inner, prefix=""):
            self.inner, self.prefix = inner, prefix

        def __getattr__(self, name):
            found = getattr(self.inner, name)
            used.add(self.prefix + name)
            return Recorder(found, f"{name}.") if name in ("linalg", "fft") else found

    monkeypatch.setitem(_array._NAMESPACES, np.ndarray, Recorder(array_namespace(np.zeros(1))))
    params = {"map": (np.ones((4, 5)), np.zeros(4)), "vector": np.ones(3)}
    for structures in (("dense", "triltoeplitz"), ("hierarchical:1,1", "blockdiagonal:2")):
        optimizer = Optimizer(structures=structures, recipe="paper")
        state = optimizer.init(params)
        rows = {"map": (np.ones((6, 5)), np.ones((6, 4)))}
        optimizer.update(params, state, params, rows)
    assert {"linalg.vector_norm", "fft.rfft", "where"} <= used <= NAMES


@pytest.mark.parametrize("attribute", ["shape", "ndim", "dtype", "device", "mT", "T"])
def test_cupy_arrays_have_the_attribute(foreign, attribute):
    assert hasattr(foreign(np.zeros((2, 3), np.float32)), attribute)


@pytest.mark.parametrize(
    ("dtype", "half"),
    [
        (np.float64, False),
        (np.float32, False),
        (np.int32, False),
        (np.float16, True),
        (ml_dtypes.bfloat16, True),
    ],
)
def test_namespace_dtype_and_device_of_cupy_arrays_are_found(foreign, dtype, half):
    x = foreign(np.zeros((4, 3), dtype), device=1)
    assert namespace(x) is compat
    assert (x.dtype, is_half(x)) == (np.dtype(dtype), half)
    assert device(x) == cupy.cuda.Device(1)
    assert device(x) != cupy.cuda.Device(0)
