"""Layers that a user may have, by name, with the shape of an input without its batch axis."""

from typing import Any, NamedTuple

import torch

from singd_core.layers import Convolution


class Case(NamedTuple):
    """A convolution's arguments and an input's shape (channels, *spatial)."""

    arguments: dict[str, Any]
    shape: tuple[int, ...]
    out_channels: int = 4
    bias: bool = True

    @property
    def patch(self) -> int:
        size = self.shape[0] // self.arguments.get("groups", 1)
        for k in self.arguments["kernel_size"]:
            size *= k
        return size

    def kind(self, **changes: Any) -> Convolution:
        return Convolution(**self.arguments, **changes)

    def module(self) -> torch.nn.Module:
        Conv = getattr(torch.nn, f"Conv{len(self.shape) - 1}d")
        return Conv(
            self.shape[0], self.out_channels, bias=self.bias, dtype=torch.float64, **self.arguments
        )


def _case(shape: tuple[int, ...], k: tuple[int, ...], *, bias: bool = True, **rest: Any) -> Case:
    return Case({"kernel_size": k, **rest}, shape, bias=bias)


PLAIN = {
    "1d": _case((3, 9), (3,)),
    "2d": _case((3, 6, 7), (3, 2)),
    "3d": _case((2, 4, 5, 6), (2, 3, 1), padding=(1, 0, 1), stride=(1, 2, 1)),
    "no bias": _case((3, 6, 7), (3, 3), padding=1, bias=False),
    "kernel 1": _case((3, 5, 5), (1, 1)),
    "kernel 1, stride 2": _case((3, 5, 6), (1, 1), stride=2, bias=False),
    "kernel as large as the input": _case((3, 4, 5), (4, 5)),
    "patches without overlap": _case((3, 6, 9), (3, 3), stride=3),
    "stride, padding and dilation": _case(
        (3, 9, 8), (3, 2), stride=(2, 3), padding=(2, 1), dilation=2
    ),
    "stride that leaves a rest": _case((2, 8, 8), (3, 3), stride=2),
    "valid": _case((2, 6, 5), (3, 2), padding="valid", stride=2),
    "same, odd kernel": _case((2, 6, 5), (3, 5), padding="same"),
    "same, even kernel": _case((2, 6, 5), (4, 2), padding="same"),
    "same, even kernel, dilation": _case((2, 8, 9), (2, 4), padding="same", dilation=(3, 1)),
    "groups": _case((6, 5, 6), (3, 3), groups=2, padding=1),
    "groups, no bias": _case((6, 5, 6), (3, 3), groups=2, stride=2, bias=False),
    "depthwise": _case((4, 5, 6), (3, 3), groups=4, padding="same"),
    "groups, 1d": _case((4, 8), (3,), groups=2, padding=1),
}
PADDED = {
    f"{mode}{name}": _case(shape, k, padding_mode=mode, **rest)
    for mode in ("reflect", "replicate", "circular")
    for name, shape, k, rest in [
        ("", (2, 5, 6), (3, 3), {"padding": (2, 1), "stride": (2, 1)}),
        (", same, even kernel", (2, 6, 5), (4, 2), {"padding": "same"}),
        (", 1d, groups", (4, 7), (3,), {"padding": 2, "groups": 2, "dilation": 2}),
    ]
} | {
    "replicate beyond the input": _case((2, 3, 4), (3, 3), padding=5, padding_mode="replicate"),
    "circular, 3d": _case((2, 4, 3, 4), (3, 2, 2), padding=(1, 3, 0), padding_mode="circular"),
}
CASES = PLAIN | PADDED
