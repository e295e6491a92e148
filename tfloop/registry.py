"""Pure functions by name, with their hyperparameters: of the schedules and the optimizers.

A hyperparameter is a keyword-only argument. A boolean default marks a switch, which shapes the
computation and is fixed; everything else is a number, which becomes a variable.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from tfloop.errors import UserError
from tfloop.settings import Field


class Bound(NamedTuple):
    """A function with the hyperparameters that were chosen for it."""

    function: Callable
    numbers: dict[str, Any]
    switches: dict[str, bool]


class Registry(Mapping[str, Callable]):
    """Functions of one kind by name.

    Example:
      >>> SCHEDULES = Registry("schedule")
      >>> @SCHEDULES.register
      ... def constant(step, *, learning_rate): ...
    """

    def __init__(self, kind: str) -> None:
        """Make one.

        Args:
          kind: what messages call such a function, and the name of the setting that chooses one.
        """
        self.kind = kind
        self._functions: dict[str, Callable] = {}

    def register(self, function: Callable) -> Callable:
        """Add a function under its own name; a decorator."""
        self._functions[function.__name__] = function
        return function

    def bind(self, name: str, hyper: Mapping[str, Any], fields: Mapping[str, Field]) -> Bound:
        """The function `name` with `hyper` over the defaults of its signature.

        Args:
          name: of a registered function.
          hyper: hyperparameters by name; None stands for the default.
          fields: the settings that hyperparameters are checked against.

        Raises:
          UserError: an unknown name; a hyperparameter that the function lacks, that is out of
            range, or that it needs and did not get.
        """
        if name not in self._functions:
            raise UserError(f"--{self.kind}={name} is unknown; choose from {', '.join(self)}")
        function = self._functions[name]
        values = parameters(function)
        for key, value in hyper.items():
            if key not in values:
                known = ", ".join(values)
                raise UserError(f"--{key}: {self.kind} '{name}' has no {key}; it has {known}")
            if value is not None:
                values[key] = fields[key].parse(value) if key in fields else value
        for key, value in values.items():
            if value is None:
                raise UserError(f"--{key}: {self.kind} '{name}' needs it")
        switches = {key: value for key, value in values.items() if isinstance(value, bool)}
        numbers = {key: value for key, value in values.items() if key not in switches}
        return Bound(function, numbers, switches)

    def __getitem__(self, name: str) -> Callable:
        return self._functions[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._functions)

    def __len__(self) -> int:
        return len(self._functions)


def parameters(function: Callable) -> dict[str, Any]:
    """The hyperparameters of a function with their defaults; None where it has no default."""
    defaults = {}
    for key, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is parameter.KEYWORD_ONLY:
            has_default = parameter.default is not parameter.empty
            defaults[key] = parameter.default if has_default else None
    return defaults
