"""What a model gets right and wrong, in lines and as a picture: by class, by label, or by error.

What fits follows from the targets of each output.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tfloop.data.targets import Target, class_numbers
from tfloop.errors import UserError
from tfloop.inspection import evaluation, plots
from tfloop.loop import Loop
from tfloop.nests import leaves
from tfloop.objective import Term
from tfloop.scores import as_shares

QUANTILES = (50, 75, 90, 99)  # of the absolute error, in percent


def lines(loop: Loop, outputs: Any) -> Iterator[str]:
    """The report, line by line.

    Args:
      loop: with the model and the test examples.
      outputs: a nest of [test examples, …] of the model, of classes as probabilities.
    """
    for term, targets, given in _by_output(loop, outputs):
        if term.name:
            yield f"\noutput {term.name}"
        if term.target.kind == "values":
            yield from _errors(targets, given)
        elif term.target.kind == "labels":
            yield from _labels(term.target, targets, given)
        elif term.accuracy and term.target.is_one_class and given.ndim == 2:
            shares = _shares(given)
            yield from _classes(term.target, targets, shares, loop.data.noun)
            yield from _mistakes(term.target, targets, shares, loop.data.noun)


def draw(loop: Loop, outputs: Any, path: str | Path) -> list[Path]:
    """Draw what goes with the report, for each output what fits; the files.

    Raises:
      UserError: there is nothing that could be drawn.
    """
    written: list[Path] = []
    for term, targets, given in _by_output(loop, outputs):
        place = Path(path)
        if written:  # one picture for each output
            place = place.with_name(f"{place.stem}-{term.name.replace('/', '-')}{place.suffix}")
        if term.target.kind == "values":
            plots.save(plots.predicted(_flat(targets), _flat(given)), place)
            written.append(place)
        elif term.target.is_one_class and given.ndim == 2:
            plots.save(_picture(loop, term.target, targets, _shares(given)), place)
            written.append(place)
    if not written:
        raise UserError(
            f"--plot={path}: there is no picture for {loop.data.targets_text}; classes and values "
            "have one"
        )
    return written


def _by_output(loop: Loop, outputs: Any) -> Iterator[tuple[Term, np.ndarray, np.ndarray]]:
    """(output, its targets, what the model gives)"""
    targets, given = leaves(loop.data.test.targets), leaves(outputs)
    for term in loop.state.objective.terms:
        own = given[term.places[1]]
        if term.target.kind != "values":
            own = as_shares(term.target, own)
        yield term, targets[term.places[0]], own


def _shares(given: np.ndarray) -> np.ndarray:
    """[N, classes], of one column for two classes both."""
    return np.concatenate([1.0 - given, given], axis=1) if given.shape[1] == 1 else given


def _flat(values: np.ndarray) -> np.ndarray:
    return values.reshape(-1)


def _classes(target: Target, targets: np.ndarray, shares: np.ndarray, noun: str) -> Iterator[str]:
    labels = class_numbers(target, targets)
    width = max(7, *(len(name) for name in target.names or ("",)))
    yield f"\n{'class':>{width}}  precision     recall  {noun}"
    by_class = evaluation.by_class(labels, shares)
    for label, (precision, recall, count) in enumerate(zip(*by_class, strict=True)):
        name = target.name_of(label)
        yield f"{name:>{width}}  {100 * precision:7.2f} %  {100 * recall:7.2f} %  {int(count):6d}"


def _mistakes(target: Target, targets: np.ndarray, shares: np.ndarray, noun: str) -> Iterator[str]:
    labels = class_numbers(target, targets)
    calibration = evaluation.calibration(labels, shares)
    bins = len(calibration.images)
    yield f"\nexpected calibration error {100 * calibration.error:.2f} %, over {bins} bins"
    rows = evaluation.confident_mistakes(labels, shares)
    guesses, confidence = shares.argmax(axis=1), shares.max(axis=1)
    yield "\nmost confident mistakes" if len(rows) else "\nno mistakes"
    for row in rows:
        is_, taken = target.name_of(int(labels[row])), target.name_of(int(guesses[row]))
        share = f"{100 * confidence[row]:.1f} %"
        yield f"{noun.removesuffix('s')} {row:6d}: is {is_}, taken for {taken} with {share}"


def _labels(target: Target, targets: np.ndarray, given: np.ndarray) -> Iterator[str]:
    from sklearn.metrics import precision_recall_fscore_support

    guesses = given > 0.5
    found = precision_recall_fscore_support(targets > 0.5, guesses, zero_division=0)
    width = max(7, *(len(name) for name in target.names or ("",)))
    yield f"\n{'label':>{width}}  precision     recall  examples that have it"
    for label, (precision, recall, _, count) in enumerate(zip(*found, strict=True)):
        name = target.name_of(label)
        yield f"{name:>{width}}  {100 * precision:7.2f} %  {100 * recall:7.2f} %  {int(count):6d}"
    all_right = np.mean((guesses == (targets > 0.5)).all(axis=1))
    yield f"\nall labels right: {100 * all_right:.2f} % of the examples"


def _errors(targets: np.ndarray, given: np.ndarray) -> Iterator[str]:
    """Quantiles of |predicted - true|, beside the spread of the true values."""
    true = targets.reshape(len(targets), -1).astype(np.float64)
    error = given.reshape(true.shape) - true
    columns = range(true.shape[1]) if 1 < true.shape[1] <= 20 else [None]
    titles = "".join(f"{f'{q} % below':>14}" for q in QUANTILES)
    yield f"\n{'column':>7}  {'mean error':>11}  {'RMSE':>11}  {'std of true':>11}{titles}"
    for column in columns:
        own = error if column is None else error[:, column]
        of = true if column is None else true[:, column]
        quantiles = np.percentile(np.abs(own), QUANTILES)
        shown = "".join(f"{value:14.5g}" for value in quantiles)
        name = "all" if column is None else str(column)
        yield (
            f"{name:>7}  {own.mean():11.5g}  {np.sqrt(np.mean(own**2)):11.5g}  "
            f"{of.std():11.5g}{shown}"
        )


def _picture(loop: Loop, target: Target, targets: np.ndarray, shares: np.ndarray) -> Any:
    labels, test = class_numbers(target, targets), loop.data.test
    calibration = evaluation.calibration(labels, shares)
    rows = evaluation.confident_mistakes(labels, shares)
    guesses, confidence = shares.argmax(axis=1)[rows], shares.max(axis=1)[rows]
    names = [target.name_of(int(label)) for label in labels[rows]]
    taken = [target.name_of(int(label)) for label in guesses]
    pictures: Any = []
    if len(rows) and test.has_images and test.inputs.shape[-1] in (1, 3):
        # One by one: images on disk are read in order only.
        pictures = np.stack([test.inputs[row : row + 1][0] for row in rows])
    return plots.evaluation(calibration, pictures, names, taken, confidence, loop.data.noun)
