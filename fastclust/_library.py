"""Loads the native libraries, once: importing this module registers every operator.

The CPU operators come with :mod:`fastclust._C`. The CUDA operators live in a library of their own
that can be loaded only by a torch built with CUDA; where it is not loaded, ``cuda_status`` says why
and everything runs on the CPU.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.autograd import forward_ad

try:
    from fastclust import _C
except ImportError as error:
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 10):
        advice = f"torch must be 2.10 or later, got {torch.__version__}: pip install 'torch>=2.10'"
    else:
        advice = "build it: pip install . (or, in a checkout, python setup.py build_ext --inplace)"
    raise ImportError(f"the kernels of fastclust do not load ({error}); {advice}") from error

_LEVELS = ("portable", "avx2", "avx512")
_level = os.environ.get("FASTCLUST_CPU_LEVEL")
if _level and _level not in _LEVELS:
    warnings.warn(
        f"FASTCLUST_CPU_LEVEL must be one of {', '.join(_LEVELS)}, got {_level!r}; it is ignored",
        stacklevel=2,
    )

CUDA_LIBRARY = Path(__file__).parent / "libfastclust_cuda.so"


# torch's own Functions ask the same.
_transforms_active = getattr(torch._C, "_are_functorch_transforms_active", lambda: True)


def _load_cuda() -> str:
    """Load the CUDA operators if they can be; return a sentence on the outcome."""
    if not CUDA_LIBRARY.is_file():
        return "not built (no nvcc when fastclust was installed, or FASTCLUST_CUDA=0)"
    if torch.version.cuda is None:
        return "built, not loaded: the installed torch is a CPU build"
    try:
        torch.ops.load_library(str(CUDA_LIBRARY))
    except OSError as error:
        return f"built, not loaded: {error}"
    return "loaded"


cuda_status: str = _load_cuda()
cuda_loaded: bool = cuda_status == "loaded"

if hasattr(os, "register_at_fork"):
    # torch's threads do not live on in a forked child: parallel work there would wait for them
    # for ever. One thread gives the same bits. (torch's own data loaders do likewise.)
    os.register_at_fork(after_in_child=lambda: torch.set_num_threads(1))


def register_gradient(
    name: str, backward: Callable[..., Any], setup_context: Callable[..., None]
) -> Callable[..., Any]:
    """Register the gradient of ``fastclust::name``; return the operator to call.

    torch calls an operator's registered gradient in a form that ``torch.func`` refuses; what is
    returned has the same gradient as a ``torch.autograd.Function``, which it takes.
    """
    operator = getattr(torch.ops.fastclust, name)
    overload = operator.default  # found faster
    torch.library.register_autograd(f"fastclust::{name}", backward, setup_context=setup_context)

    def gradients(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        # of a list of tensors the operator wants a list of Nones, a Function one None
        return tuple(None if isinstance(g, list) else g for g in backward(ctx, *grads))

    members = {
        "forward": staticmethod(lambda *inputs: operator(*inputs)),
        "setup_context": staticmethod(setup_context),
        "backward": staticmethod(gradients),
    }
    function: Any = type(f"{name}_function", (torch.autograd.Function,), members)

    def call(*inputs: Any) -> Any:
        # torch.compile knows the operator, and not every Function
        if torch.compiler.is_compiling():
            return operator(*inputs)
        # A Function takes three times as long to call.
        if _differentiates(inputs):
            return function.apply(*inputs)
        return overload(*inputs)

    return call


def _differentiates(inputs: tuple[Any, ...]) -> bool:
    """Whether a derivative of a function of ``inputs`` may be being taken."""
    # A tensor under a transform of torch.func does not tell of derivatives of outer transforms, nor
    # does any of forward-mode ones, of which the operator would make zeros.
    if _transforms_active() or getattr(forward_ad, "_current_level", 0) >= 0:
        return True
    if not torch.is_grad_enabled():
        return False
    for value in inputs:
        if isinstance(value, torch.Tensor):
            if value.requires_grad:
                return True
        elif isinstance(value, (list, tuple)) and _differentiates(tuple(value)):
            return True
    return False


__all__ = ["_C", "cuda_loaded", "cuda_status", "register_gradient"]
