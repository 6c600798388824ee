"""What the files of the distribution say of it, and of each other, is true."""

import importlib.util
import re
import tomllib
from pathlib import Path

import pytest

import singd_core

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGES = [ROOT / p for p in PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]]
PIN = re.compile(r"^([\w.-]+)==([\w.+]+)", re.MULTILINE)


def pins(name: str) -> dict[str, str]:
    """The versions of a file of constraints."""
    return dict(PIN.findall((ROOT / name).read_text()))


def test_all_packages_are_in_the_wheel() -> None:
    assert {p.name for p in PACKAGES} == {"singd_core", "singd_torch", "singd_jax", "singd_cupy"}


@pytest.mark.parametrize("package", PACKAGES, ids=lambda p: p.name)
def test_a_package_is_typed_and_knows_its_version(package: Path) -> None:
    assert (package / "py.typed").is_file()
    assert "__version__" in (package / "__init__.py").read_text()
    if package.name == "singd_core" or importlib.util.find_spec(package.name.split("_")[1]):
        if package.name == "singd_cupy":
            return  # it imports with a GPU alone
        assert importlib.import_module(package.name).__version__ == singd_core.__version__


def test_the_citation_names_the_version() -> None:
    assert f"\nversion: {singd_core.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_pre_commit_runs_the_ruff_of_ci() -> None:
    assert (
        f"rev: v{pins('constraints.txt')['ruff']}" in (ROOT / ".pre-commit-config.yaml").read_text()
    )


def test_the_oldest_versions_are_the_bounds_of_the_project() -> None:
    extras = PROJECT["project"]["optional-dependencies"]
    wanted = [
        *PROJECT["project"]["dependencies"], *extras["torch"], *extras["jax"], *extras["testing"]
    ]  # fmt: skip
    bounds = dict(re.fullmatch(r"([\w-]+)>=([\d.]+)", each).groups() for each in wanted)  # type: ignore[union-attr]
    found = pins("constraints-oldest.txt")
    assert {name: found[name] for name in bounds} == bounds


def test_the_workflow_runs_every_python_that_is_claimed() -> None:
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    claimed = [c.rpartition(" ")[2] for c in PROJECT["project"]["classifiers"] if ":: 3." in c]
    assert claimed
    assert all(f'"{version}"' in workflow for version in claimed)


@pytest.mark.parametrize("package", ["singd_core", "singd_torch"])
def test_the_reference_has_every_public_name(package: str) -> None:
    pytest.importorskip(package.removeprefix("singd_").replace("core", "numpy"))
    page = (ROOT / "docs" / "reference" / f"{package.removeprefix('singd_')}.md").read_text()
    shown = {name.rpartition(".")[2] for name in re.findall(r"^::: ([\w.]+)$", page, re.MULTILINE)}
    modules_and_data = {"__version__", "RECIPES", "rules", "structures", "structure"}
    public = set(importlib.import_module(package).__all__)
    assert public - modules_and_data - shown == set()
