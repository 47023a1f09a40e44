"""fastclust: clustering of attributed graphs with fused CPU and CUDA kernels."""

from fastclust._version import __version__

__all__ = ["__version__"]
