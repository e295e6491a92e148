"""Models for others: plain Keras or TensorFlow, which take raw inputs and need no tfloop."""

import re
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfloop import models, scratch
from tfloop.errors import UserError
from tfloop.nests import named_leaves
from tfloop.state import TrainState
from tfloop.wording import first_sentence

FORMATS = {"keras": ".keras", "saved_model": "", "tflite": ".tflite", "weights": ".weights.h5"}
MOST_SCALE = 1e19  # a standard deviation, whose square float32 still holds


def plain_model(state: TrainState, as_predicted: bool = True) -> keras.Model:
    """The model behind its standardiser: inputs as they lie in the data → what predict gives.

    With `average_shifts` it is the mean over each image and its four neighbours. Its layers are
    those of `state.model`, in float32 whatever precision they were trained in, and with the moving
    average of their weights where one is kept. Classes come as probabilities.

    Args:
      state: of the model.
      as_predicted: unset, images are taken as they are, whatever `average_shifts` says.

    Raises:
      UserError: the model shows no graph, or its inputs are of a scale that Keras does not divide
        by.
    """
    model = state.model
    if not isinstance(model, keras.Sequential) and not models.output_activations(model):
        raise UserError(
            f"export takes a Sequential or functional Keras model; this one is a "
            f"{type(model).__name__}; --format=weights writes its weights, and in Python Keras "
            "saves it itself: state.model.save(…)"
        )
    twin = keras.models.clone_model(model, clone_function=_in_float32)
    graph = model._functional if isinstance(model, keras.Sequential) else model
    inputs = _inputs_like(graph._inputs_struct)
    if isinstance(inputs, (list, tuple)) and len(inputs) == 1:
        inputs = inputs[0]
    x = _standardized(state, inputs)
    if isinstance(twin, keras.Sequential):  # its layers, one by one, rather than a model in a model
        for layer in twin.layers:
            x = layer(x, training=False)  # or layers that augment would, in a saved model
    else:
        x = twin(x, training=False)
    plain = keras.Model(inputs, _squashed(state, x), name="tfloop")
    with state.using_ema():
        for copy, trained in zip(_variables(twin), _variables(model), strict=True):
            copy.assign(trained)
    return _averaged(plain, state.average_shifts) if as_predicted else plain


def _averaged(plain: keras.Model, pixels: int) -> keras.Model:
    """The mean of what the model gives for an image, and for it shifted by N pixels four ways."""
    if not pixels:
        return plain
    image, n, layers = keras.Input(plain.input_shape[1:], name="inputs"), pixels, keras.layers
    given = [plain(image, training=False)]
    for way, rows, columns in (
        ("down", (n, 0), (0, 0)),
        ("up", (0, n), (0, 0)),
        ("right", (0, 0), (n, 0)),
        ("left", (0, 0), (0, n)),
    ):
        wide = layers.ZeroPadding2D((rows, columns), name=f"{way}_wide")(image)
        cut = layers.Cropping2D((rows[::-1], columns[::-1]), name=way)(wide)
        given.append(plain(cut, training=False))
    flat = zip(*map(keras.tree.flatten, given), strict=True)
    means = [layers.Average(name=f"mean_{i}")(list(values)) for i, values in enumerate(flat)]
    outputs = keras.tree.pack_sequence_as(given[0], means)
    return keras.Model(image, outputs, name="tfloop_averaged")


def _in_float32(layer: Any) -> Any:
    """A copy of a layer, or of a model in a model, without its weights."""
    if isinstance(layer, keras.Model) and models.output_activations(layer):
        return keras.models.clone_model(layer, clone_function=_in_float32)
    if not isinstance(layer, keras.layers.Layer):  # Python's operators have no type of their own
        return type(layer).from_config(layer.get_config())
    return type(layer).from_config({**layer.get_config(), "dtype": "float32"})


def _variables(model: keras.Model) -> list:
    """All but seeds, in the model's order."""
    return [v for v in model.variables if not v.path.endswith("seed_generator_state")]


def _inputs_like(inputs: Any) -> Any:
    """Inputs of the same shapes: numbers as float32, text as text.

    Those that have no name of their own, but one that Keras counts up, are called "inputs" or, of
    several, "input_0", "input_1" …, since signatures bear these names.
    """
    flat = keras.tree.flatten(inputs)
    made = []
    for number, x in enumerate(flat):
        name = x.name
        if re.fullmatch(r"keras_tensor(_\d+)?|input_layer(_\d+)?", name):
            name = "inputs" if len(flat) == 1 else f"input_{number}"
        dtype = x.dtype if x.dtype in ("string", "bool") or "int" in x.dtype else "float32"
        made.append(keras.Input(x.shape[1:], dtype=dtype, name=name))
    return keras.tree.pack_sequence_as(inputs, made)


def _standardized(state: TrainState, inputs: Any) -> Any:
    """The inputs behind a layer that standardises them, where the state does."""
    flat = keras.tree.flatten(inputs)
    means, scales = dict(named_leaves(state.mean)), dict(named_leaves(state.scale))
    names = [x.name for x in flat]
    if len(means) != len(flat):  # one for all
        means, scales = (dict.fromkeys(names, of[""]) for of in (means, scales))
    elif set(means) != set(names):  # by place: tuples, and a single input
        means, scales = (dict(zip(names, of.values(), strict=True)) for of in (means, scales))
    made = []
    for number, x in enumerate(flat):
        mean, scale = means[x.name], scales[x.name]
        if mean is None or x.dtype != "float32":
            made.append(x)
            continue
        shape = x.shape[1:]
        least, greatest = float(np.min(scale)), float(np.max(scale))
        if least < keras.config.epsilon() or greatest > MOST_SCALE:
            raise UserError(
                f"cannot be exported: {x.name} has standard deviations from {least:.3g} to "
                f"{greatest:.3g}, which Keras's Normalization does not divide by; bring the data "
                "to a scale of about 1 and train again"
            )
        layer = keras.layers.Normalization(
            axis=tuple(range(1, len(x.shape))),
            mean=np.broadcast_to(mean.numpy(), shape),
            variance=np.square(np.broadcast_to(scale.numpy(), shape).astype(np.float64)),
            name="standardize" if len(flat) == 1 else f"standardize_{number}",
        )
        made.append(layer(x))
    return keras.tree.pack_sequence_as(inputs, made)


def _squashed(state: TrainState, outputs: Any) -> Any:
    """The outputs with probabilities in the place of logits that the model ends in."""
    flat, activations = keras.tree.flatten(outputs), models.output_activations(state.model)
    for term in state.objective.terms:
        place = term.places[1]
        if term.as_logits and not activations[place]:
            name = "_".join(["probabilities", *([term.name] if term.name else [])])
            layer = keras.layers.Activation(term.activation, name=name.replace("/", "_"))
            flat[place] = layer(flat[place])
    return keras.tree.pack_sequence_as(outputs, flat)


def _write_names(state: TrainState, path: Path) -> None:
    """The names of the classes beside the model, a line each, where they have any."""
    for term in state.objective.terms:
        if term.target.names:
            ending = f".{term.name.replace('/', '-')}" if term.name else ""
            file = path.with_name(f"{path.name}{ending}.classes.txt")
            file.write_text("\n".join(term.target.names) + "\n", encoding="utf-8")


def export(state: TrainState, format: str, path: str | Path) -> None:
    """Write `plain_model` to `path`, whole or not at all.

    Args:
      state: of the model.
      format: one of FORMATS; "weights" is the layers' weights alone, without the standardiser.
      path: a file with the format's ending, or for "saved_model" a folder.

    Raises:
      UserError: an ending that is not the format's, something in the way, or a place that cannot be
        written.
    """
    path, ending = Path(path), FORMATS[format]
    if not path.name.endswith(ending):
        raise UserError(f"--out={path}: a {format} file ends in {ending}")
    if path.exists():
        raise UserError(f"--out={path}: exists already; name another")
    try:
        model = None if format == "weights" else plain_model(state)
        with scratch.folder(path.parent, ".export-") as folder:
            partial = folder / path.name
            _write_names(state, partial)
            if model is None:
                _save_weights(state, partial)
            elif format == "keras":
                model.save(partial)
            elif format == "saved_model":
                model.export(partial, verbose=False)
            else:
                # TensorFlow takes the name of a saved model for a pattern, so its folder is plain.
                with scratch.temporary("export") as saved:
                    model.export(str(saved), verbose=False)
                    partial.write_bytes(
                        tf.lite.TFLiteConverter.from_saved_model(str(saved)).convert()
                    )
            for made in sorted(folder.iterdir(), key=lambda made: made == partial):  # it last
                if made.name.startswith(path.name):
                    made.rename(path.with_name(made.name))
    except OSError as error:
        raise UserError(f"--out={path}: cannot be written: {error.strerror or error}") from None
    except UserError:
        raise
    except Exception as error:  # whatever Keras or TensorFlow Lite make of layers they lack
        raise UserError(
            f"--format={format}: the model cannot be written so: {first_sentence(error)}"
        ) from None


def _save_weights(state: TrainState, path: Path) -> None:
    if not isinstance(state.model, keras.Model):
        raise UserError(
            f"--format=weights: a {type(state.model).__name__} is no keras.Model; "
            "tf.train.Checkpoint keeps its variables"
        )
    with state.using_ema():
        state.model.save_weights(path)
