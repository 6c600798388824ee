"""The CuPy frontend has no mathematics of its own."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2]
PRODUCTS = {"matmul", "dot", "vdot", "vecdot", "tensordot", "einsum", "inner", "outer", "linalg"}


def products(path: Path) -> list[str]:
    """The matrix products, and the names of functions that make one, in a module."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.BinOp, ast.AugAssign)) and isinstance(node.op, ast.MatMult):
            found.append(f"line {node.lineno}: @")
        elif isinstance(node, (ast.Attribute, ast.Name, ast.alias)):
            name = getattr(node, "attr", None) or getattr(node, "id", None) or node.name
            found += [f"line {node.lineno}: {name}"] if name in PRODUCTS else []
    return found


def test_the_modules_of_singd_cupy_contain_no_matrix_product():
    modules = sorted((ROOT / "frontends" / "singd_cupy").rglob("*.py"))
    assert len(modules) >= 4
    assert {path.name: products(path) for path in modules if products(path)} == {}


def test_such_products_are_found_where_there_are_some():
    assert products(ROOT / "singd_core" / "structures" / "dense.py")
