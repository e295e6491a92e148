"""A data set from a function of the user's own, whatever of the usual things it gives."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from tfloop import user_code
from tfloop.data.arrays import from_arrays, hold_out
from tfloop.data.dataset import Dataset, Split, Standardizer
from tfloop.errors import UserError
from tfloop.wording import listed

EXPECTED = (
    "expected (x_train, y_train, x_test, y_test), ((x_train, y_train), (x_test, y_test)), "
    "(x_train, y_train), a dict of from_arrays's arguments, a Bunch of scikit-learn's, or a "
    "tfloop.Dataset or tf.data.Dataset"
)


def read(reference: str, cut: Any) -> Dataset:
    """The data set that a function gives.

    Args:
      reference: names the function.
      cut: a sources.Cut; its options and its seed go to the function, by name.

    Raises:
      UserError: what `user_code` raises, or something that is no data.
    """
    code = user_code.load(reference, "dataset")
    options = user_code.options_of(cut.options, "data_options")
    name = f"--dataset={reference}"
    made = code.call("dataset", {"seed": cut.seed}, options)
    is_pair = isinstance(made, tuple) and len(made) in (1, 2, 3)
    if hasattr(made, "element_spec") or (is_pair and hasattr(made[0], "element_spec")):
        made = _from_dataset(code, made, options, {"seed": cut.seed}, name)
    if isinstance(made, Dataset):
        return _cut(made, cut, name)
    arguments = _arguments(made, name)
    for setting in ("split", "validation_size", "standardize", "seed"):
        arguments.setdefault(setting, getattr(cut, setting))
    with code.told("dataset"):
        return from_arrays(**{"name": name, **arguments})


def _from_dataset(
    code: user_code.Code, made: Any, options: dict[str, str], known: dict[str, Any], name: str
) -> Dataset:
    """tf.data's datasets: the training one, a test one, a validation one.

    The function is called again wherever reading begins, so that a run repeats.
    """
    from tfloop.data.stream import from_dataset

    def anew() -> Any:
        again = code.call("dataset", known, options)
        return again[0] if isinstance(again, tuple) else again

    parts = made if isinstance(made, tuple) else (made,)
    with code.told("dataset"):
        return from_dataset(anew, *parts[1:], name=name)


def _arguments(made: Any, name: str) -> dict[str, Any]:
    """The arguments of from_arrays, from what a function gave."""
    if hasattr(made, "data") and hasattr(made, "target"):
        return {"x_train": made}
    if isinstance(made, Mapping):
        if "x_train" in made and all(isinstance(key, str) for key in made):
            return dict(made)
        raise UserError(f"{name}: gives a dict of {listed(made) or 'nothing'}; {EXPECTED}")
    if isinstance(made, (tuple, list)):
        is_pairs = len(made) in (2, 3) and all(
            isinstance(part, (tuple, list)) and len(part) == 2 for part in made
        )
        if is_pairs:
            (x_train, y_train), (x_test, y_test), *validation = made
            found = dict(x_train=x_train, y_train=y_train, x_test=x_test, y_test=y_test)
            return {**found, **({"validation": tuple(validation[0])} if validation else {})}
        if len(made) in (2, 4):
            return dict(zip(("x_train", "y_train", "x_test", "y_test"), made, strict=False))
        raise UserError(f"{name}: gives {len(made)} things; {EXPECTED}")
    raise UserError(f"{name}: gives {type(made).__name__}; {EXPECTED}")


def _cut(made: Dataset, cut: Any, name: str) -> Dataset:
    """A data set as it is, with what the settings ask for."""
    if cut.split != "standard":
        raise UserError(f"--split={cut.split}: {name} gives data that are cut already")
    if cut.validation_size and not isinstance(made.train, Split):
        raise UserError(
            f"--validation_size={cut.validation_size}: a tf.data.Dataset cannot be cut; let {name} "
            "give (train, test, validation)"
        )
    if cut.validation_size:
        if len(made.validation):
            raise UserError(
                f"--validation_size={cut.validation_size}: {name} has validation examples already"
            )
        train, held_out = hold_out(made.train, cut.validation_size, cut.seed, made.kinds)
        made = dataclasses.replace(made, train=train, validation=held_out)
    if not cut.standardize and isinstance(made.train, Split):
        made = dataclasses.replace(made, standardizer=Standardizer.identities(made.train.inputs))
    return made
