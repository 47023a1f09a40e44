"""The operators: one module per kernel, on CPU and CUDA tensors, differentiable."""

from fastclust.ops.infonce import Hardness, dense_weights, hard_infonce, hardness

__all__ = ["Hardness", "dense_weights", "hard_infonce", "hardness"]
