"""The operators: one module per kernel, on CPU and CUDA tensors, differentiable."""
