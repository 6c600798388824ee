"""ResNet, ViT and ConvNeXt of timm and of torchvision: small ones, and nothing is downloaded."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from watched import check_model

timm = pytest.importorskip("timm")
resnet = pytest.importorskip("torchvision.models.resnet")
convnext = pytest.importorskip("torchvision.models.convnext")
vision_transformer = pytest.importorskip("torchvision.models.vision_transformer")

CLASSES, SIZE = 5, 32

# How to make the model, how many of its layers are preconditioned, and settings.
MODELS: dict[str, tuple[Callable[[], nn.Module], int, dict[str, Any]]] = {
    "timm ResNet": (lambda: timm.create_model("test_resnet", num_classes=CLASSES), 16, {}),
    "timm ViT": (lambda: timm.create_model("test_vit", num_classes=CLASSES, img_size=SIZE), 26, {}),
    "timm ConvNeXt": (lambda: timm.create_model("test_convnext", num_classes=CLASSES), 32, {}),
    "torchvision ResNet": (
        lambda: resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1], num_classes=CLASSES),
        13,
        {"structures": ("blockdiagonal:4", "diagonal")},  # small ones for 5 million weights
    ),
    "torchvision ViT": (
        lambda: vision_transformer.VisionTransformer(SIZE, 8, 2, 2, 16, 32, num_classes=CLASSES),
        10,
        {},
    ),
    "torchvision ConvNeXt": (
        lambda: convnext.ConvNeXt(
            [convnext.CNBlockConfig(8, 16, 1), convnext.CNBlockConfig(16, None, 1)],
            num_classes=CLASSES,
        ),
        9,
        {},
    ),
}


# Each architecture is fast from one library.
SLOW = {"timm ConvNeXt", "torchvision ResNet", "timm ViT"}


@pytest.mark.parametrize(
    "name", [pytest.param(m, marks=pytest.mark.slow) if m in SLOW else m for m in MODELS]
)
def test_an_image_model_trains(name: str) -> None:
    make, preconditioned, given = MODELS[name]
    images, labels = torch.randn(8, 3, SIZE, SIZE), torch.randint(CLASSES, (8,))

    def loss(model: nn.Module) -> Tensor:
        dtype = next(model.parameters()).dtype
        return nn.functional.cross_entropy(model(images.to(dtype)), labels)

    check_model(make(), loss, preconditioned, **given)
