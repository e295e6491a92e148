"""tf.function that counts its traces, and says which argument changed when it is traced a second time."""

import functools
import warnings

import tensorflow as tf


class Traced:
    """A compiled function. `traces` counts how often TensorFlow traced it; one is what a training loop wants.

    Args:
      function: what to compile.
      name: what warnings call it.
      eager: run it as it is instead, in a debugger's reach; then `traces` stays 0.
    """

    def __init__(self, function, name: str, eager: bool = False, **options):
        self.name, self.traces, self._seen = name, 0, None
        self._function = function
        # TensorFlow's own warning counts traces by code, whatever object they are of: a partial has none.
        self._call = function if eager else tf.function(functools.partial(self._trace), autograph=False, **options)

    def __call__(self, *arguments):
        return self._call(*arguments)

    def _trace(self, *arguments):
        self.traces += 1
        described = [_describe(part) for part in tf.nest.flatten(arguments)]
        if self._seen is not None:
            changed = [f"argument {i + 1} was {old}, is {new}" for i, (old, new) in
                       enumerate(zip(self._seen, described)) if old != new]
            warnings.warn(f"{self.name} was traced again: " + ("; ".join(changed) or "no argument changed its type: a "
                          "Python value or a variable that it reads was replaced"), stacklevel=3)
        self._seen = described
        return self._function(*arguments)


def _describe(part) -> str:
    if isinstance(part, tf.Tensor):
        return f"{part.dtype.name} {part.shape}"
    if hasattr(part, "element_spec"):
        return ", ".join(f"{spec.dtype.name} {spec.shape}" for spec in tf.nest.flatten(part.element_spec))
    return repr(part)
