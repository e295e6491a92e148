"""The summaries of a run, dashboard by dashboard: each a function that gives their messages."""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.types_pb2 import DT_FLOAT
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.custom_scalar.summary import pb as custom_scalar_pb
from tensorboard.plugins.histogram.summary_v2 import histogram_pb
from tensorboard.plugins.hparams import api_pb2
from tensorboard.plugins.hparams.summary import session_end_pb
from tensorboard.plugins.hparams.summary_v2 import HParam, Metric, hparams_config_pb, hparams_pb
from tensorboard.plugins.image.metadata import create_summary_metadata as image_metadata
from tensorboard.plugins.pr_curve.summary import pb as pr_curve_pb
from tensorboard.plugins.scalar.metadata import create_summary_metadata as scalar_metadata
from tensorboard.plugins.text.summary_v2 import text_pb
from tensorboard.util.tensor_util import make_tensor_proto

from tfloop import models
from tfloop.config import FIELDS, GROUPS, hyperparameters
from tfloop.data.dataset import Split
from tfloop.inspection import pictures, plots
from tfloop.inspection.moments import Context, summary
from tfloop.metrics import Metrics
from tfloop.records import Call

TAGS = {
    "total": "loss/total",
    "data": "loss/data",
    "l1": "loss/l1",
    "l2": "loss/l2",
    "custom": "loss/custom",
    "model": "loss/model",
    "accuracy": "accuracy",
    "gradient_norm": "gradient_norm/mean",
}
TENSORS = "tensors"  # what single weights and layers have; TensorBoard shows it last
PROBED = 4  # test images whose activations the histograms show
EMBEDDED = 500  # test images in the projector
MISCLASSIFIED = 25
HISTOGRAMS = ("default", "full")  # levels

_SHAPING = ("start from", "data", "augmentation", "model", "loss", "optimizer", "schedule", "run")
HYPER_FIELDS = [
    name for group in _SHAPING for name in GROUPS[group] if name not in ("seeds", "runs")
] + ["device"]


# --- Scalars


@summary("call")
def training_curves(context: Context) -> Iterator[Summary]:
    assert context.call is not None
    call = context.call
    yield scalars(_tagged(call.train) | _speed(context, call) | _norms(context, call))


@summary("epoch")
def training_by_epoch(context: Context) -> Iterator[Summary]:
    assert context.epoch is not None
    train = context.epoch.train
    accuracy = {} if train.accuracy is None else {"epoch_accuracy": train.accuracy}
    yield scalars({**accuracy, "epoch_loss": train.total})


@summary("evaluation")
@summary("epoch")
def weights_digest(context: Context) -> Iterator[Summary]:
    """Two runs whose weights have the same SHA-256 are the same, bit for bit."""
    if context.evaluation and context.evaluation.digest:
        yield text_pb("weights_sha256", context.evaluation.digest)


@summary("evaluation", run="test")
@summary("epoch", run="test")
def test_curves(context: Context) -> Iterator[Summary]:
    if context.evaluation and context.evaluation.test:
        yield scalars(_tagged(context.evaluation.test))


@summary("evaluation", run="validation")
@summary("epoch", run="validation")
def validation_curves(context: Context) -> Iterator[Summary]:
    if context.evaluation and context.evaluation.validation:
        yield scalars(_tagged(context.evaluation.validation))


def _tagged(metrics: Metrics) -> dict[str, float]:
    values = metrics.by_name()
    return {TAGS.get(name, name): value for name, value in values.items() if value is not None}


def _speed(context: Context, call: Call) -> dict[str, float]:
    pipeline = context.loop.pipeline
    rows, first = pipeline.batch_size, call.batch_index - call.steps
    examples = min(call.batch_index * rows, pipeline.size) - first * rows
    return {
        "loss/worst_step": call.worst,
        "learning_rate": call.learning_rate,
        "speed/ms_per_step": 1000 * call.seconds / call.steps,
        "speed/examples_per_second": examples / call.seconds,
        "gradient_norm/all": float(call.gradients.norm),
        "speed/input_wait_ms": 1000 * call.input_seconds / call.steps,
        **_arithmetic(context, call),
        **_memory(),
        **context.usage.scalars(),
    }


def _arithmetic(context: Context, call: Call) -> dict[str, float]:
    """How much a step multiplies, and what share of its time the machine's matmul would take."""
    flop = context.flop
    if not flop:
        return {}
    floor = flop / context.peak
    return {"speed/gflop_per_step": flop / 1e9, "speed/of_floor": floor * call.steps / call.seconds}


def _memory() -> dict[str, float]:
    """Memory in use now, MiB: of this process, where the system tells, and of the GPU."""
    memory = {}
    if os.path.exists("/proc/self/statm"):
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        memory["memory/host_mib"] = pages * os.sysconf("SC_PAGE_SIZE") / 2**20
    if tf.config.list_logical_devices("GPU"):
        used = tf.config.experimental.get_memory_info("GPU:0")["current"]
        memory["memory/device_mib"] = used / 2**20
    return memory


def _norms(context: Context, call: Call) -> dict[str, float]:
    """Norms and penalties by weight, those of the call's last step."""
    state = context.loop.state
    values = {}
    if state.loss_scale is not None:
        values["loss_scale"] = float(state.loss_scale)
    l1, l2 = (float(state.hyper[name]) for name in ("l1", "l2"))
    gradients, updates = call.gradients.norms(), call.updates.norms()
    for name in context.shown(state.weights):
        weight = state.weights[name].numpy()
        norm = float(np.linalg.norm(weight))
        values[f"{TENSORS}/gradient_norm/{name}"] = gradients[name]
        values[f"{TENSORS}/update_norm/{name}"] = updates[name]
        if norm:
            values[f"{TENSORS}/update_to_weight/{name}"] = updates[name] / norm
        if l1 and name in state.kernels:
            values[f"{TENSORS}/loss_l1/{name}"] = l1 * float(np.abs(weight).sum())
        if l2 and name in state.kernels:
            values[f"{TENSORS}/loss_l2/{name}"] = l2 * norm**2
    return values


_SCALAR = scalar_metadata(display_name="", description="")


def scalars(values: Mapping[str, float]) -> Summary:
    """A scalar for each tag. (TensorBoard's own scalar_pb is general, and three times slower.)"""
    return Summary(
        value=[
            Summary.Value(
                tag=tag,
                metadata=_SCALAR,
                tensor=TensorProto(dtype=DT_FLOAT, float_val=[value]),
            )
            for tag, value in values.items()
        ]
    )


# --- Custom Scalars


@summary("start", run="")
def charts(context: Context) -> Iterator[Summary]:
    """Accuracy and loss side by side, train and test in one chart, as the article plots them."""

    def chart(title: str, tag: str) -> layout_pb2.Chart:
        content = layout_pb2.MultilineChartContent(tag=[f"^{tag}$"])
        return layout_pb2.Chart(title=title, multiline=content)

    shown = [chart("accuracy", "accuracy"), chart("loss", "loss/total")]
    category = layout_pb2.Category(title="accuracy and loss", chart=shown)
    yield custom_scalar_pb(layout_pb2.Layout(category=[category]))


# --- HParams


@summary("start", run="")
def hparams(context: Context) -> Iterator[Summary]:
    """The run's settings, with the numbers as they really are.

    The defaults of the rule and the schedule stand in place of those left open.
    """
    hidden = set(FIELDS) - set(HYPER_FIELDS)
    values = {name: value for name, value in context.settings.items() if name not in hidden}
    hyper = context.loop.state.hyper
    values |= {name: variable.numpy() for name, variable in hyper.items()}
    plain = _plain(values)
    of_own = [*context.loop.state.objective.extra, *context.loop.state.objective.whole_metrics]
    metrics = [
        *(
            Metric(name, part, display_name=f"{part} {name}")
            for name in of_own
            for part in ("test", "validation")
        ),
        Metric("accuracy", "test", display_name="test accuracy"),
        Metric("loss/data", "test", display_name="test loss"),
        Metric("accuracy", "validation", display_name="validation accuracy"),
        Metric("accuracy", "train", display_name="train accuracy"),
        Metric("loss/total", "train", display_name="train loss"),
        Metric("speed/ms_per_step", "train", display_name="ms per step"),
    ]
    # TensorBoard takes one run's list for all, so every run has all names.
    of_rules = [*hyperparameters("optimizer"), *hyperparameters("schedule")]
    names = dict.fromkeys([*HYPER_FIELDS, *of_rules, *plain])
    yield hparams_config_pb([HParam(name) for name in names], metrics)
    yield hparams_pb(plain, trial_id=context.folder.name)


def session_end(succeeded: bool) -> Summary:
    """HParams's message that the run has ended, and how."""
    status = api_pb2.STATUS_SUCCESS if succeeded else api_pb2.STATUS_FAILURE
    return session_end_pb(status)


def _plain(settings: Mapping[str, object]) -> dict[str, bool | int | float | str]:
    """The settings that are set, as HParams takes them."""
    plain: dict[str, bool | int | float | str] = {}
    for name, value in settings.items():
        if hasattr(value, "tolist"):  # NumPy's
            value = value.tolist()
        if isinstance(value, (tuple, list)):
            value = ", ".join(map(str, value))
        if value not in (None, ""):
            plain[name] = value if isinstance(value, (bool, int, float)) else str(value)
    return plain


# --- Text


@summary("start")
def settings_text(context: Context) -> Iterator[Summary]:
    rows = [f"| {name} | {value} |" for name, value in _plain(context.settings).items()]
    yield text_pb("config", "\n".join(["| setting | value |", "| --- | --- |", *rows]))


@summary("start")
def model_text(context: Context) -> Iterator[Summary]:
    state = context.loop.state
    header = ["| layer | output | weights | parameters |", "| --- | --- | --- | ---: |"]
    cells: list[list[str]] = [[*row[:-1], f"{row[-1]:,}"] for row in models.table(state.model)]
    cells += [[name, "", "no gradient", "none"] for name in state.without_gradient]
    left_out = len(state.weights) - len(context.shown(state.weights))
    if left_out:
        told = (
            f"{left_out} of {len(state.weights)} weights have no curves and histograms of their own"
        )
        cells.append([told, "", "", f"--summary_tensors={context.most}"])
    rows = [f"| {' | '.join(row)} |" for row in cells]
    yield text_pb("model", "\n".join([*header, *rows]))


@summary("end", run="test", needs_test=True)
def classification_report(context: Context) -> Iterator[Summary]:
    from sklearn.metrics import classification_report

    outputs = context.outputs()
    if not _classifies(context, outputs):
        return
    labels, guesses = _labels(context), outputs.argmax(axis=1)
    target, known = context.loop.data.target, range(outputs.shape[1])
    names = (target.names if target else ()) or None
    text = classification_report(
        labels, guesses, labels=known, target_names=names, digits=4, zero_division=0
    )
    indented = "\n".join(f"    {line}" for line in text.splitlines())
    yield text_pb("classification_report", indented)


def _classifies(context: Context, outputs: Any) -> bool:
    """Is there an output for each class? A model with a loss of its own may do something else."""
    target = context.loop.data.target
    if target is None or not target.is_one_class or not context.loop.classifies:
        return False
    return outputs.shape[1:] == (target.classes,)


def _labels(context: Context) -> np.ndarray:
    """[test examples] their classes."""
    return context.loop.data.class_numbers(context.loop.data.test.targets)


# --- Histograms and Distributions


@summary("epoch", levels=HISTOGRAMS)
def weight_histograms(context: Context) -> Iterator[Summary]:
    weights = context.loop.state.weights
    shown = context.shown(weights)
    for name in shown:
        yield histogram_pb(f"{TENSORS}/weights/{name}", weights[name].numpy())
    if context.call:
        gradients = context.call.gradients.parts()
        for name in shown:
            yield histogram_pb(f"{TENSORS}/gradients/{name}", np.asarray(gradients[name]))


@summary("epoch", run="test", levels=HISTOGRAMS, needs_test=True)
def activation_histograms(context: Context) -> Iterator[Summary]:
    found = dict(context.activations(context.loop.data.test.rows(slice(PROBED))))
    for name in context.shown(found):
        yield histogram_pb(f"{TENSORS}/activations/{name}", found[name].numpy())


# --- Images and PR Curves


@summary("epoch", levels=("full",), needs_test=True)
@summary("end", levels=("default",), needs_test=True)
def filters(context: Context) -> Iterator[Summary]:
    if not _classifies(context, context.outputs()):
        return
    for weight in context.loop.state.weights.values():
        if len(weight.shape) == 4:
            yield _image("pictures/filters", pictures.filters(weight.numpy()))
            return


@summary("epoch", run="test", levels=("full",), needs_test=True)
@summary("end", run="test", levels=("default",), needs_test=True)
def mistakes(context: Context) -> Iterator[Summary]:
    """The confusion matrix, the first images that are wrong, precision and recall by class."""
    test, outputs = context.loop.data.test, context.outputs()
    if not _classifies(context, outputs):
        return
    guesses, labels = outputs.argmax(axis=1), _labels(context)
    target = context.loop.data.target
    assert target is not None
    yield _image(
        "pictures/confusion", plots.confusion(labels, guesses, outputs.shape[1], target.names)
    )
    wrong = np.flatnonzero(guesses != labels)[:MISCLASSIFIED]
    if len(wrong) and _shows_pictures(test):
        true, taken = ([target.name_of(int(n)) for n in of[wrong]] for of in (labels, guesses))
        shown = plots.misclassified(test.inputs[wrong], true, taken)
        yield _image("pictures/misclassified", shown)
    shares = context.loop.state.probabilities(tf.constant(outputs)).numpy()
    if not models.squashed_values(shares):  # a loss of one's own that takes logits
        shares = tf.nn.softmax(shares).numpy()
    for label in range(shares.shape[1]):
        name = target.names[label] if target.names else f"class_{label}"
        yield pr_curve_pb(name, labels == label, shares[:, label])


@summary("epoch", run="test", levels=("full",), needs_test=True)
def feature_maps(context: Context) -> Iterator[Summary]:
    """Of the first image of each class."""
    test = context.loop.data.test
    if not _classifies(context, context.outputs()) or not _shows_pictures(test):
        return
    labels = _labels(context)
    rows = [np.flatnonzero(labels == label)[0] for label in np.unique(labels)]
    found = dict(context.activations(test.inputs[rows]))
    for name in context.shown([name for name, value in found.items() if len(value.shape) == 4]):
        yield _image(f"pictures/feature_maps/{name}", pictures.feature_maps(found[name].numpy()))


def _shows_pictures(split: Split) -> bool:
    """Are the inputs images that a picture can show?"""
    return split.has_images and split.inputs.shape[-1] in (1, 3)


def _point_labels(context: Context, rows: int) -> list[str]:
    """What the projector calls the first test examples: class, or number."""
    data = context.loop.data
    if data.target is None or not data.target.is_one_class:
        return [str(row) for row in range(rows)]
    return [data.target.name_of(label) for label in _labels(context)[:rows].tolist()]


def _image(tag: str, png: bytes) -> Summary:
    # The header of a PNG file holds its width and height.
    width, height = (int.from_bytes(png[i : i + 4], "big") for i in (16, 20))
    content = [str(width).encode(), str(height).encode(), png]
    tensor = make_tensor_proto(np.array(content, dtype=object))
    value = Summary.Value(tag=tag, tensor=tensor, metadata=image_metadata("", ""))
    return Summary(value=[value])


# --- Graphs


@summary("start", levels=HISTOGRAMS)
def conceptual_graph(context: Context) -> Iterator[Summary]:
    """Keras's: TensorBoard draws it from the model's JSON."""
    model = context.loop.state.model
    if not isinstance(model, (keras.Sequential, keras.src.models.Functional)):
        return
    data = SummaryMetadata.PluginData(plugin_name="graph_keras_model", content=b"1")
    tensor = make_tensor_proto(np.array(model.to_json().encode(), dtype=object))
    metadata = SummaryMetadata(plugin_data=data)
    yield Summary(value=[Summary.Value(tag="keras", tensor=tensor, metadata=metadata)])


# --- Projector


@summary("end", run="test", levels=HISTOGRAMS, needs_test=True)
def embeddings(context: Context) -> Sequence[Any]:
    """What goes into the last layer, for the first test images, with labels and thumbnails.

    The projector reads files, not events.
    """
    from google.protobuf import text_format
    from tensorboard.plugins.projector import ProjectorConfig

    test = context.loop.data.test
    inputs = test.rows(slice(EMBEDDED))
    rows = min(len(test), EMBEDDED)
    activations = [pair for pair in context.activations(inputs) if pair[1].shape[:1] == [rows]]
    if not activations:
        return ()
    name, activation = activations[-2] if len(activations) > 1 else activations[-1]
    vectors = activation.numpy().reshape(rows, -1)
    folder = context.folder / "test"
    folder.mkdir(parents=True, exist_ok=True)
    vectors.astype("<f4").tofile(folder / "embeddings.bytes")
    labels = _point_labels(context, rows)
    (folder / "labels.tsv").write_text("\n".join(labels) + "\n", encoding="utf-8")
    config = ProjectorConfig()
    embedding = config.embeddings.add(
        tensor_name=name,
        tensor_shape=vectors.shape,
        tensor_path="embeddings.bytes",
        metadata_path="labels.tsv",
    )
    if _shows_pictures(test):
        (folder / "thumbnails.png").write_bytes(pictures.sprite(inputs))
        embedding.sprite.image_path = "thumbnails.png"
        embedding.sprite.single_image_dim.extend([inputs.shape[2], inputs.shape[1]])
    text = text_format.MessageToString(config)
    (folder / "projector_config.pbtxt").write_text(text, encoding="utf-8")
    return ()
