"""What a setting is: a name with a type, a default, a range and a help text. Needs no TensorFlow.

A group of settings is a frozen dataclass whose fields are made with `option`; `Config` joins the
groups. `Field.parse` checks a value, whether it comes from a flag, a file or Python.
"""

import dataclasses
import math
from collections.abc import Collection
from typing import Any, Literal, NamedTuple, get_args, get_type_hints

from tfloop.errors import UserError

UNIT = (0.0, 1.0)  # closed interval
SHARE = (0.0, 0.9999999)
COUNT = (1, 2**31 - 1)
WHOLE = (0, 2**31 - 1)
POSITIVE = (1e-30, math.inf)
NOT_NEGATIVE = (0.0, math.inf)
SMALLEST, LARGEST = 2.0**-126, (2 - 2.0**-23) * 2.0**127  # of float32's normal numbers
# In a list, such as one of layers: TensorFlow takes minutes for some hundred layers.
MOST_VALUES, MOST_SEEDS = 256, 10_000

Retrace = Literal["never", "value", "set", "nonzero", "length"]


def option(
    default: Any,
    help: str,
    *,
    choices: Collection[str] = (),
    within: tuple[float, float] | None = None,
    retrace: Retrace = "never",
) -> Any:
    """A field of a settings dataclass.

    Args:
      default: its value where nothing is given.
      help: one line for `--help` and the table of flags.
      choices: the values it accepts; a registry stays open for what is registered later.
      within: the closed interval it must lie in.
      retrace: when trials of a search with other values need another graph. "never": the graph
        reads it from a variable, or does not depend on it. "value": always, as all of the model.
        "set": where it is given in one run and not in the other. "nonzero": where it is 0 in one
        of them. "length": for a list of another length.
    """
    metadata = {"help": help, "choices": choices, "within": within, "retrace": retrace}
    return dataclasses.field(default=default, metadata=metadata)


class Field(NamedTuple):
    """A setting."""

    name: str
    default: Any
    help: str
    element: type  # of the value, or of a list's elements
    is_list: bool
    may_be_unset: bool
    choices: Collection[str]
    within: tuple[float, float] | None
    retrace: Retrace

    def parse(self, value: Any) -> Any:
        """`value` as this setting's type.

        Raises:
          UserError: a value of another type, out of range, or none of the choices.
        """
        if hasattr(value, "tolist"):  # NumPy's
            value = value.tolist()
        if self.may_be_unset and value in (None, ""):
            return None
        if not self.is_list:
            return self._parse_one(value)
        if isinstance(value, str):
            value = value.split(",") if value.strip() else []
        elif not isinstance(value, (list, tuple)):
            value = [value]
        most = MOST_SEEDS if self.name == "seeds" else MOST_VALUES
        if len(value) > most:
            raise UserError(f"--{self.name}: holds {len(value)} values; at most {most} are taken")
        return tuple(self._parse_one(part) for part in value)

    def _parse_one(self, value: Any) -> Any:
        try:
            value = _coerce(self.element, value)
        except (ValueError, TypeError, KeyError, OverflowError):
            expected = _EXPECTED[self.element]
            raise UserError(f"--{self.name}: expected {expected}, found {_shown(value)}") from None
        if self.element is str and any(c == "\0" or "\ud800" <= c <= "\udfff" for c in value):
            raise UserError(f"--{self.name}={value!r} holds a character that no name can hold")
        if self.choices and value not in self.choices:
            known = ", ".join(self.choices)
            raise UserError(f"--{self.name}={value} is unknown; choose from {known}")
        if self.element is float:
            self._check_in_float32(value)
        if self.within and not self.within[0] <= value <= self.within[1]:
            allowed = _range_text(self.within, value)
            raise UserError(f"--{self.name}={value} is out of range: it must {allowed}")
        return value

    def _check_in_float32(self, value: float) -> None:
        """All arithmetic is in float32: what that has no number for would be another setting."""
        if not math.isfinite(value):
            raise UserError(f"--{self.name}={value} is not a finite number")
        if abs(value) > LARGEST or 0 < abs(value) < SMALLEST:
            range_text = f"{SMALLEST:.2g} to {LARGEST:.2g}"
            raise UserError(
                f"--{self.name}={value} is out of range: float32 has numbers from {range_text}, "
                "and 0"
            )


_EXPECTED = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
_BOOLEANS = {True: True, False: False, "true": True, "false": False}


def _coerce(element: type, value: Any) -> Any:
    if element is bool:
        return _BOOLEANS[value]
    if element is str:
        if not isinstance(value, str):
            raise TypeError
        return value
    is_fraction = element is int and isinstance(value, float) and value != int(value)
    if isinstance(value, bool) or is_fraction:
        raise TypeError
    found = element(value)
    if abs(found) >= 2**64 and element is int:
        raise OverflowError
    return found


def _shown(value: Any) -> str:
    try:
        return repr(value)
    except ValueError:  # Python writes no number of thousands of digits
        return "a number of very many digits"


def _range_text(within: tuple[float, float], value: float) -> str:
    low, high = within
    if within == POSITIVE:
        return "be positive"
    if within == SHARE:
        return "be at least 0 and less than 1"
    if high >= 2**31 - 1 and value < low:
        return f"be at least {low:g}"
    return f"lie between {low:g} and {high:g}"


def whole(text: str, most: int = COUNT[1]) -> int | None:
    """The number that digits write; None where they write none, or a larger one than `most`."""
    digits = text.lstrip("0") or text[-1:]
    if not (text.isascii() and text.isdecimal() and len(digits) <= len(str(most))):
        return None
    number = int(digits)
    return number if number <= most else None


def fields_of(group: type) -> dict[str, Field]:
    """The settings of a dataclass by name, in the order they were declared."""
    hints = get_type_hints(group)
    return {field.name: _field(field, hints[field.name]) for field in dataclasses.fields(group)}


def _field(field: dataclasses.Field, hint: Any) -> Field:
    arguments = get_args(hint)
    return Field(
        field.name,
        field.default,
        element=arguments[0] if arguments else hint,
        is_list=Ellipsis in arguments,
        may_be_unset=type(None) in arguments,
        **field.metadata,
    )
