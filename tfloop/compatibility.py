"""Do a model and a data set fit each other, and the loss? Asked before anything is trained."""

from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfloop import models
from tfloop.config import FIELDS, check_setting
from tfloop.data import pipelines
from tfloop.data.dataset import Dataset
from tfloop.data.tf_data import failure_of
from tfloop.errors import UserError
from tfloop.nests import leaves, map_leaves, named_leaves
from tfloop.state import TrainState
from tfloop.wording import counted, first_sentence, names_text, shape_text

LOOKED_AT = 8  # training examples whose outputs tell whether a model gives probabilities


def batch_size_of(data: Any, asked: int) -> int:
    """The rows of a batch: those of a tf.data.Dataset that gives batches, else what is asked for.

    Raises:
      UserError: another size is asked for than such a dataset has; the default counts as none.
    """
    own = getattr(getattr(data, "train", None), "batch_size", None)
    if own is None or asked == own:
        return asked
    if asked != FIELDS["batch_size"].default:
        raise UserError(
            f"--batch_size={asked}: {data.name} gives batches of {own}; leave it out, or unbatch "
            "the dataset"
        )
    return own


def check_data(data: Dataset, sizes: dict[str, int]) -> None:
    """Raises UserError for what is no data set, and sizes that it does not suffice for."""
    if not isinstance(data, Dataset):
        raise UserError(
            f"expected a tfloop.Dataset, found {type(data).__name__}; tfloop.from_arrays(…) and "
            "tfloop.load(…) make one"
        )
    for name, value in sizes.items():
        check_setting(name, value)
    for name, array in named_leaves(data.train.targets):
        target, of = data.kinds.get(name), f" {name}" if name else ""
        if target is None:
            raise UserError(f"{data.name}: nothing says what the targets{of} are; from_arrays does")
        if target.kind == "classes" and array.dtype.kind not in "iub":
            raise UserError(
                f"training targets{of}: found {array.dtype} {tuple(array.shape)}; classes are "
                "whole numbers from 0 on"
            )
    if sizes["batch_size"] > len(data.train):
        raise UserError(
            f"--batch_size={sizes['batch_size']} is larger than the {len(data.train)} training "
            f"{data.noun}"
        )


def check_fit(state: TrainState, data: Dataset, most: int) -> Any:
    """A batch's outputs, as the loss is given them; the state's objective then fits the data.

    Args:
      state: whose model.
      data: that it is to be trained on.
      most: examples that it takes at once.

    Raises:
      UserError: the model takes other inputs, gives outputs that do not fit the targets, or gives
        probabilities where logits are meant.
    """
    if state.augmentation.names and not data.train.has_images:
        raise UserError(
            f"{names_text(state.augmentation.names)}: the inputs are {data.inputs_text}; images "
            "[N, height, width, channels] alone are augmented"
        )
    _check_takes(state.model, data)
    _check_moved(state, data)
    try:
        batch = pipelines.batch_at(data.train, min(LOOKED_AT, most), 0, 0, 0)
    except tf.errors.OpError as error:
        if reason := failure_of(error.message):
            raise UserError(f"{data.name}: {reason}") from None
        raise
    inputs = state.standardize(batch.inputs)
    _check_count(state.model, inputs)
    _check_whole(state.model, inputs)
    given = models.output_specs(state.model)
    if given is not None:  # one call will do: the graph shows what it gives
        _settle(state, data, batch.targets, given)
    outputs = _called(state, inputs, state.objective.as_logits if given is not None else False)
    rows = batch.rows
    for name, output in named_leaves(outputs):
        if not tf.is_tensor(output) or not output.shape.rank or output.shape[0] != rows:
            is_tensor = tf.is_tensor(output)
            found = f"shape {tuple(output.shape)}" if is_tensor else type(output).__name__
            of = f" for {name}" if name else ""
            raise UserError(
                f"the model gives {found}{of} for a batch of {rows} {data.noun}; expected a tensor "
                "[batch, …]"
            )
    if given is None:
        _settle(state, data, batch.targets, outputs)
    _check_logits(state, inputs, outputs)
    _check_columns(state, batch.targets, outputs)
    return outputs


def _settle(state: TrainState, data: Dataset, targets: Any, outputs: Any) -> None:
    state.settle(data.kinds, targets, outputs)
    if state.augmentation.mixes:
        state.objective.check_mixing([n for n in state.augmentation.names if "mix" in n])


def _check_count(model: Any, inputs: Any) -> None:
    """Raises UserError where a model says that it takes more inputs, or fewer."""
    taken = getattr(model, "inputs", None) or []
    if taken and len(taken) != len(leaves(inputs)):
        names = ", ".join(x.name for x in taken)
        raise UserError(
            f"the model cannot be called with {_described(inputs)}: it has "
            f"{counted(len(taken), 'input')} ({names})"
        )


def _check_whole(model: Any, inputs: Any) -> None:
    """Raises UserError where a model would cut fractions to whole numbers, as of a uint8 Input."""
    taken, given = getattr(model, "inputs", None) or [], dict(named_leaves(inputs))
    if not taken:
        return
    by_name = {x.name: x for x in taken}
    pairs = [(name, by_name[name], leaf) for name, leaf in given.items() if name in by_name]
    if set(given) != set(by_name):
        pairs = [(x.name, x, leaf) for x, leaf in zip(taken, given.values(), strict=True)]
    for name, x, leaf in pairs:
        is_cut = "int" in x.dtype and leaf.dtype.is_floating
        if is_cut and bool(tf.reduce_any(leaf != tf.round(leaf))):
            raise UserError(
                f"the model's input {name} takes {x.dtype}, and is given fractions, which it would "
                "cut off: make it a float32 keras.Input, or leave the data as they are: "
                "--nostandardize"
            )


def _called(state: TrainState, inputs: Any, as_logits: Any) -> Any:
    try:
        return models.outputs(state.model, inputs, as_logits=as_logits)
    except UserError:
        raise
    except Exception as error:  # whatever a model of a user's own may raise
        taken, reason = getattr(state.model, "inputs", None) or [], first_sentence(error)
        if taken and "Invalid input shape" in reason:
            reason = f"it takes inputs of shape {tuple(taken[0].shape)}"
        raise UserError(
            f"the model cannot be called with {_described(inputs)}: {reason}{_whole(inputs)}"
        ) from None


def _described(inputs: Any) -> str:
    """ "[8, 28, 28, 1] float32", or "age [8, 4] float32, words [8, 20] int64" """
    shown = []
    for name, leaf in named_leaves(inputs):
        text = f"[{', '.join(map(str, leaf.shape))}] {leaf.dtype.name}"
        shown.append(f"{name} {text}" if name else text)
    return ", ".join(shown)


def _whole(inputs: Any) -> str:
    """A hint at whole numbers, which are no measurements."""
    if not any(leaf.dtype.is_integer for leaf in leaves(inputs)):
        return ""
    return "; whole numbers are handed in as they are: give floats where they measure something"


def _check_logits(state: TrainState, inputs: Any, outputs: Any) -> None:
    """Raises UserError where outputs are probabilities: by their values, of any model."""
    for term in state.objective.terms:
        place = term.places[1]
        values = leaves(outputs)[place].numpy()
        squashed = _squashed(values) if term.is_default and term.activation else ""
        if not squashed:
            continue
        try:  # logits would leave the interval from 0 to 1 for inputs of another size
            more = [_of_other_size(state, inputs, factor, place) for factor in (10.0, -10.0)]
            wide = [found for found in more if np.isfinite(found).all()]
        except (ValueError, TypeError, tf.errors.OpError):
            wide = []
        if wide:
            squashed = _squashed(np.concatenate([values, *wide]))
        if squashed:
            *_, (last, _, _) = models.activations(state.model, inputs)
            shown = ", ".join(f"{value:.3g}" for value in values.reshape(-1)[:4])
            of = f" {term.name}" if term.name else ""
            is_other = term.activation != squashed  # labels are none of the CNN's softmax
            of_cnn = f", of the CNN by --output={term.activation}" if is_other else ""
            raise UserError(
                f"the model's outputs{of} are probabilities, those of a {squashed} ({last} gives "
                f"{shown}, … for the first example); the loss takes logits. Leave the {squashed} "
                f"out{of_cnn}, or give a loss of your own, such as "
                "keras.losses.sparse_categorical_crossentropy"
            )


def _check_moved(state: TrainState, data: Dataset) -> None:
    """Raises UserError where images would be moved, and masks that belong to them would not."""
    moved = [name for name in state.augmentation.names if name not in ("augment_cutout", "mixup")]
    for name, target in data.kinds.items():
        is_mask = data.train.has_images and target.shape[:2] == data.image_shape[:2]
        if moved and is_mask:
            raise UserError(
                f"{moved[0]}: moves the images, and not the targets{f' {name}' if name else ''}, "
                f"which are {shape_text(target.shape)} as they are; augment both in a "
                "tf.data.Dataset of your own"
            )


def _check_columns(state: TrainState, targets: Any, outputs: Any) -> None:
    """Raises UserError where a loss of the user's own compares each target with all outputs.

    Targets [N] and outputs [N, 1] broadcast to [N, N].
    """
    for term in state.objective.terms:
        own, given = leaves(targets)[term.places[0]], leaves(outputs)[term.places[1]]
        is_column = given.shape.rank == own.shape.rank + 1 and given.shape[-1] == 1
        if term.is_default or term.is_keras or not is_column or own.shape[0] < 2:
            continue
        whole, alone = (
            term.loss(own[:rows], given[:rows], 0.0).numpy().reshape(-1)[0]
            for rows in (own.shape[0], 1)
        )
        if not np.isclose(whole, alone, rtol=1e-3, equal_nan=True):
            raise UserError(
                f"the loss function gives {whole:.4g} for the first example of {own.shape[0]}, and "
                f"{alone:.4g} for it alone: targets {tuple(own.shape)} and outputs "
                f"{tuple(given.shape)} broadcast; take outputs[:, 0]"
            )


def _squashed(values: np.ndarray) -> str:
    if values.shape[-1] > 1:
        return models.squashed_values(values.reshape(-1, values.shape[-1]))
    return models.squashed_values(values.reshape(1, -1)).replace("softmax", "sigmoid")


def _of_other_size(state: TrainState, inputs: Any, factor: float, place: int) -> np.ndarray:
    """An output of the inputs times a factor; of whole numbers as they are."""

    def scaled(x: tf.Tensor) -> tf.Tensor:
        return factor * x if x.dtype.is_floating else x

    outputs = models.outputs(
        state.model, map_leaves(scaled, inputs), as_logits=state.objective.as_logits
    )
    return leaves(outputs)[place].numpy()


def _check_takes(model: Any, data: Dataset) -> None:
    """Raises UserError where the model says what images it takes, and they are others."""
    is_built = isinstance(model, keras.Model) and model.built
    shape = getattr(model, "input_shape", None) if is_built else None
    if not isinstance(shape, tuple) or len(shape) != 4 or isinstance(shape[0], tuple):
        return
    if not data.train.has_images:
        return
    pairs = zip(shape[1:], data.image_shape, strict=True)
    if any(side not in (None, found) for side, found in pairs):
        raise UserError(
            f"the model takes images of {shape_text(shape[1:])}, the data have "
            f"{shape_text(data.image_shape)}"
        )
