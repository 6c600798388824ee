"""The number of terms that a loss is a mean of may be given, where layers do not show it."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from singd_torch import SINGD


def sequences() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def trained(model: nn.Module, parts: int = 1, mask: bool = False, **given: Any) -> list[Tensor]:
    model, g = copy.deepcopy(model), torch.Generator().manual_seed(1)
    optimizer = SINGD(model, recipe="paper", T=1, lr=0.1, **given)
    for _ in range(3):
        optimizer.zero_grad()
        x, y = torch.randn(8, 5, 4, generator=g), torch.randint(3, (8, 5), generator=g)
        for a, b in zip(x.chunk(parts), y.chunk(parts), strict=True):
            kept = torch.ones(b.shape, dtype=torch.bool)
            kept[:, 3:] = not mask
            optimizer.mask_rows(kept if mask else None)
            (nn.functional.cross_entropy(model(a)[kept], b[kept]) / parts).backward()
        optimizer.step()
    return [p.detach() for p in model.parameters()]


@pytest.mark.parametrize(
    ("parts", "mask", "terms"), [(1, False, 40), (2, False, 20), (1, True, 24)]
)
def test_a_number_of_terms_is_what_a_mean_over_the_sequence_counts(
    parts: int, mask: bool, terms: int
) -> None:
    model = sequences()
    counted = trained(model, parts, mask, loss_average="batch+sequence")
    given = trained(model, parts, mask, loss_average=terms)
    assert all(map(torch.equal, counted, given))
    assert not torch.equal(trained(model, parts, mask, loss_average=1)[0], given[0])


def test_all_layers_of_a_segmentation_have_the_terms_of_its_loss() -> None:
    """Between its pixels and the pixels of the loss there are layers of fewer pixels."""
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, stride=4, padding=1),
        nn.Upsample(scale_factor=4), nn.Conv2d(4, 2, 1),
    )  # fmt: skip
    images, labels = torch.randn(4, 3, 16, 16), torch.randint(2, (4, 16, 16))

    def curvatures(loss_average: Any) -> list[Tensor]:
        optimizer = SINGD(model, loss_average=loss_average, recipe="paper", lr=0.0)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
        return [optimizer.state[model[i].weight]["averages.t_G"] for i in (0, 1, 3)]

    shown, given = curvatures("batch+sequence"), curvatures(4 * 16 * 16)
    assert [(b / a).item() for a, b in zip(shown, given, strict=True)] == [1.0, 16.0, 1.0]


@pytest.mark.parametrize("loss_average", [0, -3, 2.5, True, "mean"])
def test_a_wrong_number_of_terms_is_named(loss_average: Any) -> None:
    with pytest.raises(ValueError, match="the number of terms that the loss is a mean of"):
        SINGD(sequences(), loss_average=loss_average)
