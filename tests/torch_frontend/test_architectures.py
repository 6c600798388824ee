"""Every architecture trains, and its layers see the right rows, whatever its modules do inside."""

from collections.abc import Callable

import architectures
import pytest
import torch
from architectures import Built

from singd_torch import SINGD, check

pytest.importorskip("transformers")
pytest.importorskip("timm")

pytestmark = [
    pytest.mark.slow,
    # of the models themselves, and of layers that are trained without rows
    pytest.mark.filterwarnings("ignore"),
]

LANGUAGE = [
    *[(architectures.causal, name) for name in architectures.CAUSAL],
    *[(architectures.sequences, name) for name in architectures.SEQUENCES],
    *[(architectures.masked, name) for name in architectures.MASKED],
    (architectures.swin, "swin"),
    (architectures.parakeet, "parakeet"),
]
IMAGES = [(architectures.images, name) for name in architectures.IMAGES]


def named(value: object) -> str:
    return value if isinstance(value, str) else ""


def check_architecture(build: Callable[[str], Built], name: str, structures: str | None) -> None:
    model, loss = build(name)
    assert check(model, loss)
    given = {} if structures is None else {"structures": (structures, structures)}
    optimizer, start = SINGD(model, **given), [p.detach().clone() for p in model.parameters()]
    reached = set()
    for _ in range(3):
        optimizer.zero_grad()
        value = loss(model)
        value.backward()
        sizes = {p: p.grad.abs().max() for p in model.parameters() if p.grad is not None}
        # a bias in front of a softmax or a norm has a gradient of rounding alone
        reached |= {p for p, size in sizes.items() if size > 1e-6 * max(sizes.values())}
        optimizer.step()
        assert value.isfinite()
    assert optimizer.skipped == 0
    for (path, p), before in zip(model.named_parameters(), start, strict=True):
        assert not (p in reached and torch.equal(p, before)), path


@pytest.mark.parametrize(("build", "name"), LANGUAGE, ids=named)
def test_transformers(build: Callable[[str], Built], name: str) -> None:
    check_architecture(build, name, None)


@pytest.mark.parametrize(("build", "name"), IMAGES, ids=named)
def test_timm(build: Callable[[str], Built], name: str) -> None:
    """With diagonal factors, since these have millions of weights."""
    check_architecture(build, name, "diagonal")
