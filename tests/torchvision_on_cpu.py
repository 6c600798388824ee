"""Import this before torchvision, or before a library that imports it, as transformers does.

The wheels of torchvision on PyPI are built for CUDA: beside a CPU build of torch their compiled
operators do not load, and then `import torchvision` fails as it describes two of them. The models
need none: declared here, without an implementation, they let torchvision be imported.
"""

import importlib.util
from pathlib import Path

import torch

_spec = importlib.util.find_spec("torchvision")
try:
    if _spec is not None and _spec.origin is not None:
        torch.ops.load_library(Path(_spec.origin).with_name("_C.so"))
except OSError:
    _library = torch.library.Library("torchvision", "FRAGMENT")
    for _name in ("nms", "qnms"):
        _library.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
