"""Arrows between the modules of a package point downwards: a module imports only what is below."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# From the bottom to the top; a folder holds modules of one rank.
RANKS: dict[str, list[str]] = {
    "singd_core": [
        *("_version", "_warnings", "_table", "_kernels", "_array", "_scalars", "_tree", "rounding"),
        *("_settings", "structures", "curvature", "levels", "preconditioner", "rules", "adamw"),
        *("_recipes", "layers", "late", "length", "step", "without_mean"),
        *("_layer_state", "_given", "_given_rows", "_given_state", "_parameter", "optimizer"),
        *("_check", "state", "testing"),
    ],
    "singd_torch": [
        *("_warnings", "_pytree", "_uncompiled", "_fallback", "_groups", "_form", "_changed"),
        *("sharding.guards", "sharding.__init__", "tensors", "layers"),
        *("_distributed", "_state", "_table", "_loading", "capture", "step", "_diagnostics"),
        *("_training", "_saving", "sharding", "_estimate", "optimizer", "_check"),
    ],
}


def modules(package: str) -> dict[str, Path]:
    """The files of a package by the names of their modules within it."""
    root = next(p for p in (ROOT / package, ROOT / "frontends" / package) if p.exists())
    return {
        ".".join(path.relative_to(root).with_suffix("").parts): path for path in root.rglob("*.py")
    }


def imports(package: str, path: Path, known: dict[str, Path]) -> Iterator[str]:
    """The modules that a module of the package imports when it is imported itself."""
    for node in ast.parse(path.read_text()).body:
        found = []
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            found = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        own = (name.removeprefix(f"{package}.") for name in found if name.startswith(f"{package}."))
        for name in own:
            yield from (one for one in (name, f"{name}.__init__") if one in known)


def rank(package: str, module: str) -> int:
    """The place of a module, or of the folder that it is in."""
    order = RANKS[package]
    places = [i for i, one in enumerate(order) if module == one or module.startswith(f"{one}.")]
    exact = [i for i in places if order[i] == module]
    assert places, f"{package}/{module} has no place in RANKS"
    return (exact or places)[0]


@pytest.mark.parametrize("package", RANKS)
def test_arrows_point_downwards(package: str) -> None:
    known, wrong = modules(package), []
    for module, path in known.items():
        if module == "__init__":  # it shows all of the package
            continue
        for other in imports(package, path, known):
            if rank(package, other) > rank(package, module):
                wrong.append(f"{module} imports {other}")
    assert wrong == []


@pytest.mark.parametrize("package", ["singd_core", "singd_torch", "singd_jax", "singd_cupy"])
def test_no_module_imports_itself_through_others(package: str) -> None:
    known = modules(package)
    arrows = {
        name: set(imports(package, path, known)) - {name, "__init__"}
        for name, path in known.items()
        if name != "__init__" and not name.endswith(".__init__")
    }
    left = dict(arrows)
    while True:  # take away what imports nothing that is left
        done = {name for name, others in left.items() if not others & left.keys()}
        if not done:
            break
        left = {name: others for name, others in left.items() if name not in done}
    assert left == {}


def test_an_arrow_upwards_would_be_seen(tmp_path: Path) -> None:
    path = tmp_path / "low.py"
    path.write_text("from singd_core.optimizer import Optimizer\nfrom singd_core import rules\n")
    found = list(imports("singd_core", path, modules("singd_core")))
    assert found == ["optimizer", "rules.__init__"]
    assert rank("singd_core", "optimizer") > rank("singd_core", "rules.kfac")
