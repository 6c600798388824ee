"""A run of `singd_torch` that goes on in JAX."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from singd_core._array import Array


def from_torch(saved: Mapping[str, Any], names: Sequence[str | Sequence[str]]) -> dict[str, Any]:
    """The state of `singd_torch.SINGD` as named arrays, which `unflatten` takes.

    A layer's matrix is `(d_out, d_in + 1)` in both, however its weight is stored, so only the names
    differ.

    Args:
        saved: What `optimizer.state_dict()` returned.
        names: For each parameter of the torch optimizer, in order, its name in JAX, or that of
            the layer whose weight it is. Several names are those of the layers that torch packs
            into one weight: query, key and value of `torch.nn.MultiheadAttention`.

    Raises:
        ValueError: If there are more parameters than names, or a weight has not as many parts.
    """
    flat: dict[str, Any] = {"step": saved["param_groups"][0]["steps"], "skipped": 0}
    if len(names) <= max(saved["state"], default=-1):
        raise ValueError(
            f"names has {len(names)} entries, and the saved state is that of "
            f"{1 + max(saved['state'])} parameters: give one for each"
        )
    for i, entries in saved["state"].items():
        name, arrays = names[i], {key: _array(value) for key, value in entries.items()}
        if isinstance(name, str):
            flat |= {f"{name}.{key}": a for key, a in arrays.items()}
            continue
        for key, a in arrays.items():
            if a.ndim == 0 or len(a) != len(name):
                raise ValueError(
                    f"names[{i}] = {name!r}: {key} has shape {tuple(a.shape)}, which is not one of "
                    f"{len(name)} packed layers"
                )
            flat |= {f"{part}.{key}": a[j] for j, part in enumerate(name)}
    return flat


def _array(value: Any) -> Array:
    """A tensor of torch; NumPy, by which it comes, has no bfloat16."""
    if str(getattr(value, "dtype", "")) == "torch.bfloat16":
        return _array(value.float()).astype(jnp.bfloat16)
    return jnp.asarray(value.detach().cpu().numpy() if hasattr(value, "detach") else value)
