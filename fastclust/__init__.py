"""fastclust: clustering of attributed graphs with fused CPU and CUDA kernels."""

from fastclust import ops
from fastclust._version import __version__
from fastclust.graph import Graph

__all__ = ["Graph", "__version__", "ops"]
