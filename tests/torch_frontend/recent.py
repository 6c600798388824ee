"""What the frontend promises from a torch on that is newer than its oldest."""

import pytest
import torch

COMPILES = pytest.mark.skipif(
    torch.__version__ < "2.13", reason="compiled layers and steps are promised from torch 2.13 on"
)
