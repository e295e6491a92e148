"""TensorFlow, imported when it is first used.

The command line's flags come from the schedules and optimizers, and `--help` must not wait four
seconds for TensorFlow. So those modules take `tf` from here.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import tensorflow as tf
else:

    class _LazyModule:
        def __init__(self, name: str) -> None:
            self._name = name

        def __getattr__(self, attribute: str) -> Any:
            return getattr(importlib.import_module(self._name), attribute)

    tf = _LazyModule("tensorflow")

__all__ = ["tf"]
