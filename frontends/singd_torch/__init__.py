"""SINGD for PyTorch: a drop-in optimizer for any model."""

from singd_torch.optimizer import SINGD

__all__ = ["SINGD"]
