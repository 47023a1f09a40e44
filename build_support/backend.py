"""PEP 517 backend: setuptools, plus torch as a build requirement only where none is installed.

The build needs torch's headers and libraries, of any release from 2.10 on: the stable ABI makes
the result independent of which one. ``pip install .`` runs in an isolated environment that would
download a second torch, gigabytes of it; but the interpreter of that environment is the one that
the package is being installed for, so a torch beside it can serve. Only when there is none is one
requested.
"""

from __future__ import annotations

from typing import Any

from setuptools import build_meta as _setuptools
from setuptools.build_meta import build_sdist, prepare_metadata_for_build_wheel
from toolchain import find_torch

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

build_wheel = _setuptools.build_wheel
build_editable = _setuptools.build_editable
prepare_metadata_for_build_editable = _setuptools.prepare_metadata_for_build_editable

# Pinned, so that a build from nothing is reproducible; any later torch runs what it produces.
BUILD_TORCH = "torch==2.13.0"


def _torch_requirement() -> list[str]:
    return [] if find_torch() else [BUILD_TORCH]


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    return _setuptools.get_requires_for_build_wheel(config_settings) + _torch_requirement()


def get_requires_for_build_editable(config_settings: Any = None) -> list[str]:
    return _setuptools.get_requires_for_build_editable(config_settings) + _torch_requirement()


def get_requires_for_build_sdist(config_settings: Any = None) -> list[str]:
    return _setuptools.get_requires_for_build_sdist(config_settings)
