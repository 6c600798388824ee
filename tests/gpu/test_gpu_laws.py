"""Every structure keeps its laws on a GPU, on every library that sees one."""

import pytest
from gpus import LIBRARIES, SUBSTITUTE, available

from singd_core.structures import get
from singd_core.testing.report import cases
from singd_core.testing.run import run

STRUCTURES = [
    "dense",
    "diagonal",
    "tril",
    "triu",
    "triltoeplitz",
    "triutoeplitz",
    "blockdiagonal:3",
    "trilbottomrightdiag:3",
    "triubottomrightdiag:3",
    "triltopleftdiag:3",
    "triutopleftdiag:3",
    "hierarchical:2,3",
]


def laws():
    """The laws on the backends that are on a GPU here."""
    found = {gpu.backend for name in LIBRARIES if (gpu := available(name))}
    if not found:
        yield pytest.param(
            *(None,) * 4, marks=pytest.mark.skip("no library finds a GPU"), id="none"
        )
        return
    names = STRUCTURES[:1] if SUBSTITUTE else STRUCTURES
    for law, backend, dtype in cases():
        for name in names if backend.name in found else ():
            identity = f"{name}-{law.name}-{backend.name}-{dtype}"
            yield pytest.param(law, name, backend, dtype, id=identity)


@pytest.mark.parametrize(("law", "name", "backend", "dtype"), list(laws()))
def test_a_structure_keeps_the_law_on_the_gpu(law, name, backend, dtype):
    run(law, get(name), backend, dtype)
