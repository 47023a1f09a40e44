"""A CUDA device made of CPU memory, for the Python side of what runs on a GPU.

Inside :func:`pretended_cuda` tensors can be moved to "cuda" and made there, say that they are there
(``device``, ``is_cuda``), refuse to become NumPy arrays, and raise where an operator meets tensors
of both devices or would add floats in an order that differs from run to run. Inside
:func:`capturing` they raise also where the host would wait for the device, as a capture does. They
compute on the CPU, with the CPU's kernels. So a training on a GPU runs its every branch, copy and
check without one; what CUDA kernels do is for the emulated blocks and a GPU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._dynamo  # cannot be imported later, while torch.Generator is another class
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)

# Operators that take tensors of two devices on a real GPU, too.
OF_TWO_DEVICES = {"aten::copy_", "aten::index", "aten::index_put_", "aten::_index_put_impl_"}

# Operators after which the host knows what the device has computed.
WAITING = {
    "aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::is_nonzero",
    "aten::masked_select", "aten::bincount", "aten::_unique2", "aten::repeat_interleave",
}  # fmt: skip

# What torch.cuda answers here.
ANSWERS = {
    "is_available": True, "device_count": 1, "current_device": 0, "get_device_name": "pretended",
    "get_device_capability": (9, 0),
    "is_current_stream_capturing": False, "mem_get_info": (2**34, 2**34), "memory_reserved": 0,
    "memory_allocated": 0, "max_memory_allocated": 0, "reset_peak_memory_stats": None,
    "synchronize": None,
}  # fmt: skip


class OnCuda(Tensor):
    """A tensor that says it is on the GPU; ``inner`` is what it holds, on the CPU.

    To torch's C++ side it is a dense tensor of the CPU: autograd would ask for a driver otherwise.
    """

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> OnCuda:
        place: dict[str, Any] = {"dtype": inner.dtype, "device": CPU}
        if inner.layout == torch.strided:
            place |= {"strides": inner.stride(), "storage_offset": inner.storage_offset()}
        out = Tensor._make_wrapper_subclass(cls, inner.shape, **place)
        out.inner = inner
        return out

    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)
    layout = property(lambda self: self.inner.layout)

    def __repr__(self, **kwargs: Any) -> str:
        return f"OnCuda({self.inner!r})"

    def tolist(self) -> Any:
        return self.inner.tolist()

    def numpy(self, **kwargs: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy: .cpu() comes first")

    __array__ = numpy

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(func, args, kwargs or {})


class Birthplace:
    """Whether what comes of no tensor of the GPU is on it nevertheless: made inside of torch."""

    on_cuda = False

    @classmethod
    @contextlib.contextmanager
    def is_cuda(cls) -> Iterator[None]:
        before, cls.on_cuda = cls.on_cuda, True
        try:
            yield
        finally:
            cls.on_cuda = before


def waits(name: str, args: Any, tensors: list[Tensor]) -> bool:
    """Whether an operator on tensors of the GPU, some or all, makes the host wait for it."""
    if name == "aten::index":  # of a mask: it is the number of elements that is waited for
        return any(t is not None and t.dtype == torch.bool for t in args[1])
    between = name == "aten::copy_" and len({isinstance(t, OnCuda) for t in tensors}) == 2
    return between or name in WAITING


def compute(func: Any, args: Any, kwargs: Any) -> Any:
    """One operator, below autograd: on the inner tensors, its results where its operands are."""
    tensors = [t for t in tree_iter((args, kwargs)) if isinstance(t, Tensor)]
    outer = {id(t.inner): t for t in tensors if isinstance(t, OnCuda)}
    name = func._schema.name
    if outer and torch.cuda.is_current_stream_capturing() and waits(name, args, tensors):
        raise RuntimeError(f"{name} waits for cuda:0, which is capturing")
    if outer and name not in OF_TWO_DEVICES:
        for t in tensors:
            # torch's own operators take a number from the CPU
            if not isinstance(t, OnCuda) and (t.dim() > 0 or not name.startswith("aten::")):
                raise RuntimeError(f"{name} on cuda:0 got a tensor {list(t.shape)} on the CPU")

    def inner(x: Any) -> Any:
        return x.inner if isinstance(x, OnCuda) else x

    if outer and any(t.is_floating_point() for t in tensors):
        repeats = name.startswith("aten::index_add") and len(inner(args[2]).unique()) < len(args[2])
        if repeats or name == "aten::cumsum":
            raise RuntimeError(f"{name} on cuda:0 adds in no fixed order")
    out = func(*tree_map(inner, args), **tree_map(inner, kwargs))
    to_cuda = id(out) in outer if name == "aten::copy_" else bool(outer) or Birthplace.on_cuda

    def result(x: Any) -> Any:
        if isinstance(x, Tensor) and to_cuda:
            return outer[id(x)] if id(x) in outer else OnCuda(x)
        return x

    return tree_map(result, out)


class Operators(TorchDispatchMode):
    """Sees every operator, those that make tensors from nothing included."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(func, args, kwargs or {})


def move(x: Tensor) -> Tensor:
    """A copy on the other device."""
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError("a copy between the devices waits for cuda:0, which is capturing")
    if x.requires_grad and torch.is_grad_enabled():
        raise NotImplementedError("gradients do not travel between the devices here")
    x = x.detach()
    return x.inner.clone() if isinstance(x, OnCuda) else OnCuda(x.clone())


class Functions(TorchFunctionMode):
    """Sees torch's functions as they are called: turns "cuda" into the CPU and minds who asked."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if func is torch.device or name == "_parse_to":
            return func(*args, **kwargs)
        first = args[0] if args and isinstance(args[0], Tensor) else None
        if first is not None and name in ("to", "cpu", "cuda"):
            return self.moved(first, name, args[1:], kwargs)
        if isinstance(first, OnCuda) and name in ("to_dense", "to_sparse_csr"):
            return OnCuda(getattr(first.inner, name)())  # goes by the layout that C++ sees
        leaves = list(tree_iter((args, kwargs)))
        if not any(isinstance(x, OnCuda) or is_cuda_argument(x) for x in leaves):
            return func(*args, **kwargs)
        if name == "__setitem__":  # torch makes a tensor on the CPU of the number that is written
            return func(*args, **kwargs)
        with Birthplace.is_cuda():  # also what torch itself makes on the way to the result
            return func(*tree_map(here, args), **tree_map(here, kwargs))

    @staticmethod
    def moved(x: Tensor, name: str, args: Any, kwargs: Any) -> Tensor:
        """``x.to``, ``x.cpu`` and ``x.cuda``."""
        if name != "to":
            return x if x.device.type == name else move(x)
        if args and isinstance(args[0], Tensor):  # to that tensor's device and dtype
            args = (args[0].device, args[0].dtype)
        wanted = [a for a in (*args, kwargs.get("device")) if isinstance(a, str | torch.device)]
        if wanted and torch.device(wanted[0]).type != x.device.type:
            x = move(x)
        return Tensor.to(x, *map(here, args), **tree_map(here, kwargs))


def is_cuda_argument(x: Any) -> bool:
    """Whether an argument of a function names the GPU."""
    return isinstance(x, str | torch.device) and str(x) in ("cuda", "cuda:0")


def here(x: Any) -> Any:
    """An argument, with the CPU in place of the GPU."""
    return CPU if is_cuda_argument(x) else x


CpuGenerator = torch.Generator


class AnyGenerator(torch.Generator):
    """A generator of the CPU, whatever device is asked for."""

    def __new__(cls, device: Any = None) -> torch.Generator:
        return CpuGenerator.__new__(CpuGenerator, "cpu")


@contextlib.contextmanager
def capturing() -> Iterator[None]:
    """Refuse, for a while, what a capture in a CUDA graph would refuse."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        yield


@contextlib.contextmanager
def pretended_cuda() -> Iterator[None]:
    """Give torch a CUDA device, and fastclust its CUDA library, for a while."""
    run_backward: Callable[..., Any] = torch.autograd._engine_run_backward

    def backward(*args: Any, **kwargs: Any) -> Any:
        with Birthplace.is_cuda(), Functions():  # gradients are Python code again, in part
            return run_backward(*args, **kwargs)

    overwrite = torch.__future__.get_overwrite_module_params_on_conversion()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ANSWERS.items():
            patch.setattr(torch.cuda, name, lambda *args, value=value: value)
        patch.setattr(torch.cuda, "_lazy_init", lambda: None)
        patch.setattr(torch, "Generator", AnyGenerator)
        patch.setattr(torch.autograd, "_engine_run_backward", backward)
        patch.setattr("fastclust.validation.cuda_loaded", True)
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        try:
            with Functions(), Operators():
                yield
        finally:
            torch.__future__.set_overwrite_module_params_on_conversion(overwrite)
