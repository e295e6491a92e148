"""What a run is chosen by, stopped by and steered by: a metric, and which way is better."""

import math
import operator
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from tfloop.errors import UserError

PARTS = ("train", "test", "validation")
# What scikit-learn's and Keras's names say is to be small; "neg_…" and "…_score" are to be large.
_SMALL = re.compile(
    r"(loss|error|deviance|entropy|crossentropy|divergence|hinge|poisson|huber|logcosh"
    r"|mse|mae|rmse|mape|msle)($|_)"
)
_LARGE = re.compile(r"^(\w+/)?neg_|_score$|_similarity$")
_TERMS = ("loss", "total", "data", "l1", "l2", "custom", "model", "gradient_norm")
_COMPARED: dict[str, Callable] = {
    ">": operator.gt,
    ">=": operator.ge,
    "<": operator.lt,
    "<=": operator.le,
}


class Criterion(NamedTuple):
    """A metric of a part of the data, and whether more of it is better.

    Attributes:
      part: "train", "test" or "validation".
      name: of the metric; "loss" is the total.
      is_max: is more better?
    """

    part: str
    name: str
    is_max: bool

    @property
    def text(self) -> str:
        """ "validation accuracy" """
        return f"{self.part} {self.name}"

    def of(self, entry: Mapping[str, Any]) -> float | None:
        """The metric in {"test": {"accuracy": …}, …}; None where there is none."""
        metrics = entry.get(self.part) or {}
        value = metrics.get("total" if self.name == "loss" else self.name)
        return None if value is None or math.isnan(value) else float(value)

    def is_better(self, value: float, than: float | None) -> bool:
        if than is None:
            return True
        return value > than if self.is_max else value < than

    def shown(self, value: float) -> str:
        """ "99.15 %" of an accuracy, else the number"""
        return f"{100 * value:.2f} %" if self.name.endswith("accuracy") else f"{value:.4g}"


class Goal(NamedTuple):
    """A criterion and what it must reach."""

    criterion: Criterion
    sign: str  # ">", ">=", "<" or "<="
    value: float

    @property
    def text(self) -> str:
        return f"{self.criterion.text} {self.sign} {self.value:g}"

    def is_reached(self, entry: Mapping[str, Any]) -> bool:
        found = self.criterion.of(entry)
        return found is not None and _COMPARED[self.sign](found, self.value)


def parse(text: str, flag: str = "choose_by") -> Criterion:
    """A criterion from "accuracy", "validation accuracy", "min test my_metric".

    Without a part it is that of the validation examples. Without min or max it is min of losses
    and of what is called an error, and max of all else.

    Raises:
      UserError: anything else.
    """
    words = text.split()
    way = words.pop(0) if words and words[0] in ("min", "max") else ""
    part = words.pop(0) if len(words) > 1 and words[0] in PARTS else "validation"
    if len(words) != 1:
        raise UserError(
            f'--{flag}={text}: expected a metric, as in "accuracy", "test loss" or "min validation '
            'my_metric"'
        )
    name = words[0].lower()
    is_small = name in _TERMS or bool(_SMALL.search(name) and not _LARGE.search(name))
    return Criterion(part, words[0], way == "max" if way else not is_small)


def parse_goal(text: str) -> Goal:
    """A goal from "test accuracy > 0.993".

    Raises:
      UserError: anything else.
    """
    found = re.fullmatch(r"(.+?)\s*(>=|<=|>|<)\s*(\S+)", text.strip())
    try:
        value = float(found[3]) if found else math.nan
    except ValueError:
        value = math.nan
    if not found or not math.isfinite(value):
        raise UserError(f'--until={text}: expected a goal, such as "test accuracy > 0.993"')
    return Goal(parse(found[1], "until"), found[2], value)


def default(entry: Mapping[str, Any], part: str = "validation") -> Criterion:
    """The accuracy where there are classes, else the loss."""
    metrics = entry.get(part) or {}
    has_classes = metrics.get("accuracy") is not None
    return Criterion(part, "accuracy", True) if has_classes else Criterion(part, "loss", False)


def given(entry: Mapping[str, Any]) -> list[str]:
    """What one could choose by: "test accuracy", …"""
    return [
        f"{part} {'loss' if name == 'total' else name}"
        for part, metrics in entry.items()
        for name, value in metrics.items()
        if value is not None
    ]


_SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0}


def seconds(text: str) -> float:
    """Of "90s", "10m" or "1.5h".

    Raises:
      UserError: anything else.
    """
    found = re.fullmatch(r"(\d+(?:\.\d*)?)([smh])", text)
    if not found or not float(found[1]):
        raise UserError(f"--max_time={text}: expected a time, such as 90s, 10m or 1.5h")
    return float(found[1]) * _SECONDS[found[2]]


class Every(NamedTuple):
    """How often is evaluated: after so many epochs, or after so many steps (0: by epochs)."""

    epochs: int
    steps: int


def every(text: str) -> Every:
    """From "1epoch", "3epochs", or "500" steps.

    Raises:
      UserError: anything else.
    """
    found = re.fullmatch(r"([1-9]\d{0,9})(epochs?)?", text)
    if not found:
        raise UserError(
            f"--evaluate_every={text}: expected a number of steps, such as 500, or of epochs, such "
            "as 2epochs"
        )
    return Every(int(found[1]), 0) if found[2] else Every(1, int(found[1]))
