"""The methods as scikit-learn estimators: :class:`HSAN`, :class:`ECNMF` and :class:`SSGC`."""

from fastclust.estimators.ecnmf import ECNMF
from fastclust.estimators.hsan import HSAN
from fastclust.estimators.ssgc import SSGC

__all__ = ["ECNMF", "HSAN", "SSGC"]
