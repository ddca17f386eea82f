"""faiss, torch and timm, imported when they are first used.

These libraries take seconds to import, and many commands never need them: a refresh without new
items finds every artifact in the catalogue. So modules write ``from geofm.runtime.native import
torch`` instead of ``import torch``. Only modules that define networks (subclasses of
``torch.nn.Module``) import torch itself; a stage's module imports them in the function that needs
them.

faiss and torch both bring an OpenMP library. faiss is always loaded first, so that every process
has the same one.
"""

from __future__ import annotations

from functools import cached_property
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

__all__ = ["faiss", "timm", "torch"]

if TYPE_CHECKING:
    import faiss
    import timm
    import torch
else:

    class LazyModule:
        """A module that is imported when one of its attributes is first read."""

        def __init__(self, *names: str) -> None:
            """Keep the names of the modules to import, in order; the last one is represented."""
            self._names = names

        @cached_property
        def _module(self) -> ModuleType:
            """Import the modules in order, and return the last."""
            return [import_module(name) for name in self._names][-1]

        def __getattr__(self, attribute: str) -> Any:
            """Look the attribute up in the module, which is imported if it is not yet."""
            return getattr(self._module, attribute)

    faiss = LazyModule("faiss")
    torch = LazyModule("faiss", "torch")
    timm = LazyModule("faiss", "torch", "timm")
