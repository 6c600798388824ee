"""The core's element-wise chains become one kernel each, which the compiler of CUDA takes."""

from pathlib import Path
from unittest import mock

import cupy
import numpy as np
import pytest
from cupy._core import _fusion_thread_local, fusion

from singd_core._array import _multiply_add
from singd_core._kernels import Kernels, kernels_of, register
from singd_core._scalars import at_least, at_most, clip
from singd_core.adamw import _averaged
from singd_cupy import _fuse

# The arguments, as the ndim of an array or a number; the number of results, and of operations.
CHAINS = {
    "adamw": (_averaged, (2, 2, 2, 0.9, 0.1, 0.99, 0.01, 0, 0, 1e-8), 3, 12),
    "c x + y": (_multiply_add, (2, 0, 2), 1, 2),
    "adamw, a number": (_averaged, (0, 0, 0, 0.9, 0.1, 0.99, 0.01, 0, 0, 1e-8), 3, 12),
}


def traced(function, arguments):
    """The kernel that `cupy.fuse` makes at the first call."""
    history, local = fusion._FusionHistory(), _fusion_thread_local.thread_local
    local.history, local.is_old_fusing = history, True
    try:
        return history.get_fusion(function.__wrapped__, arguments, function.__name__)[0]
    finally:
        local.history, local.is_old_fusing = None, False


def source(kernel) -> str:
    """CUDA that runs the kernel's operation on contiguous arrays of one shape."""
    given = [f"const {p.ctype}* a{i}" for i, p in enumerate(kernel.in_params)]
    made = [f"{p.ctype}* o{i}" for i, p in enumerate(kernel.out_params)]
    reads = [f"const {p.ctype} {p.name} = a{i}[n];" for i, p in enumerate(kernel.in_params)]
    writes = [f"{p.ctype}& {p.name} = o{i}[n];" for i, p in enumerate(kernel.out_params)]
    return (
        f"{kernel.preamble}\n"
        f'extern "C" __global__ void chain({", ".join(given + made)}) {{\n'
        "size_t n = blockIdx.x * blockDim.x + threadIdx.x;\n"
        f"{' '.join(reads + writes)}\n{kernel.operation};\n}}"
    )


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", CHAINS)
def test_a_chain_is_one_kernel_in_its_dtype_that_compiles_to_ptx(foreign, name, dtype):
    function, shapes, outputs, operations = CHAINS[name]
    arguments = tuple(
        foreign(np.zeros((3,) * n, dtype)) if isinstance(n, int) else n for n in shapes
    )
    kernel = traced(function, arguments)
    assert [p.dtype.name for p in kernel.out_params] == [dtype] * outputs
    assert kernel.operation.startswith(f"// {operations} operations")
    headers = Path(cupy.__file__).parent / "_core" / "include"
    program = cupy.cuda.nvrtc.createProgram(source(kernel), "chain.cu", (), ())
    options = ["--gpu-architecture=compute_80", "--std=c++17", f"-I{headers}", *cuda_headers()]
    try:
        cupy.cuda.nvrtc.compileProgram(program, options)
    except cupy.cuda.nvrtc.NVRTCError:
        pytest.fail(cupy.cuda.nvrtc.getProgramLog(program))
    assert ".entry chain" in cupy.cuda.nvrtc.getPTX(program).decode()


def cuda_headers() -> list[str]:
    """Where the wheels of NVIDIA that the tests install have CUDA's headers."""
    import nvidia

    found = [Path(root) / "cu13" / "include" for root in nvidia.__path__]
    return [f"-I{path}" for path in found if path.is_dir()]


def test_the_core_is_told_how_to_fuse_cupy_arrays(foreign):
    assert kernels_of(foreign(np.zeros(3))).fuse is _fuse.fused
    assert _fuse.fused(_averaged) is _fuse.fused(_averaged)


def test_arrays_of_several_dtypes_are_not_fused(foreign):
    function = mock.Mock(__name__="chain", return_value="plain")
    kernel = mock.Mock(return_value="fused")
    with mock.patch.object(cupy, "fuse", return_value=kernel):
        run = _fuse.fused.__wrapped__(function)
    x, y = foreign(np.zeros(3, np.float32)), foreign(np.zeros(3, np.float64))
    assert (run(x, x, 0.5), run(x, y, 0.5)) == ("fused", "plain")


def test_bounds_are_kernels_that_nobody_waits_for(foreign):
    """`clip` of array-api-compat asks the device how many numbers it cuts."""
    x, asked = foreign(np.zeros(3)), []

    def bound(name):
        return lambda x, number: asked.append((name, number)) or x

    assert (_fuse.KERNELS.maximum, _fuse.KERNELS.minimum) == (cupy.maximum, cupy.minimum)
    try:
        register(Kernels(maximum=bound("maximum"), minimum=bound("minimum")), cupy.ndarray)
        at_least(x, 0.5)
        at_most(x, 2.0)
        clip(x, -1.0, 1.0)
    finally:
        register(_fuse.KERNELS, cupy.ndarray)
    assert asked == [("maximum", 0.5), ("minimum", 2.0), ("maximum", -1.0), ("minimum", 1.0)]
