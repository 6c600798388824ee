"""What the project's own tests parametrise over: the array libraries that are installed.

```python
@pytest.mark.parametrize(("backend", "dtype"), WIDE, ids=str)
def test_something(backend, dtype):
    with backend.active():
        x = backend.to(np.eye(3), dtype)
```
"""

from singd_core.testing import Backend, backends, no_host_sync

__all__ = ["ALL", "BACKENDS", "WIDE", "Backend", "backends", "no_host_sync"]

BACKENDS: tuple[Backend, ...] = backends()
ALL = [(b, dtype) for b in BACKENDS for dtype in b.dtypes]
WIDE = [(b, dtype) for b, dtype in ALL if dtype in ("float64", "float32")]
