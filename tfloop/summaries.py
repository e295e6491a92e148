"""What TensorBoard shows of a run: every dashboard that a classifier can feed, from the records that the loop yields.

The step knows nothing of it. `train`, `test` and `validation` are runs over one axis, the global step; the run's own
folder holds its settings (HParams) and the layout of Custom Scalars. How much is written:

  none      nothing
  scalars   curves, the run's settings, and texts
  default   histograms after every epoch as well; pictures, precision and recall, embeddings and graphs at the end
  full      all of that after every epoch, and feature maps
"""

import os
from collections.abc import Mapping
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf
from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.types_pb2 import DT_FLOAT
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.custom_scalar.summary import pb as custom_scalar_pb
from tensorboard.plugins.hparams import api_pb2
from tensorboard.plugins.hparams.summary import session_end_pb
from tensorboard.plugins.hparams.summary_v2 import HParam, Metric, hparams_config_pb, hparams_pb
from tensorboard.plugins.histogram.summary_v2 import histogram_pb
from tensorboard.plugins.image.metadata import create_summary_metadata as image_metadata
from tensorboard.plugins.pr_curve.summary import pb as pr_curve_pb
from tensorboard.plugins.scalar.metadata import create_summary_metadata as scalar_metadata
from tensorboard.plugins.text.summary_v2 import text_pb
from tensorboard.util.tensor_util import make_tensor_proto

from tfloop import models
from tfloop.config import FIELDS, GROUPS, HYPER
from tfloop.errors import UserError
from tfloop.events import EventFile
from tfloop.loop import Call, Epoch, Loop, Metrics

LEVELS = FIELDS["summaries"].metadata["choices"]
TAGS = {"total": "loss/total", "data": "loss/data", "l1": "loss/l1", "l2": "loss/l2", "custom": "loss/custom",
        "model": "loss/model", "accuracy": "accuracy", "gradient_norm": "gradient_norm/mean"}
SCALAR = scalar_metadata(display_name="", description="")
PROBED = 4  # test images whose activations the histograms show
EMBEDDED = 500  # test images in the projector
MISCLASSIFIED = 25
HYPER_FIELDS = [name for group in ("start from", "data", "augmentation", "model", "loss", "optimizer", "schedule", "run")
                for name in GROUPS[group] if name not in ("seeds", "runs")] + ["device"]
NO_HYPER = set(FIELDS) - set(HYPER_FIELDS)


class Summaries:
    """Writes the records of a run into a folder.

    Example:
      >>> with Summaries("runs/mine", loop) as summaries:
      ...     for record in loop.run(epochs=5): summaries.write(record)
      ...     summaries.finish()
    """

    def __init__(self, folder: str | Path, loop: Loop, level: str = "default", settings: Mapping[str, object] | None = None,
                 resumed: bool = False):
        """Args:
          folder: the run's own.
          loop: whose records they are.
          level: how much is written, one of LEVELS.
          settings: what the text and HParams tell of the run, beside the numbers in `state.hyper`; unset, it is the optimizer,
            the schedule and the batch size. Of a Config's fields HParams gets those that shape the run.
          resumed: its first events are written already.

        Raises:
          UserError: an unknown level.
        """
        if level not in LEVELS:
            raise UserError(f"summaries: level {level!r} is unknown; choose from {', '.join(LEVELS)}")
        self._folder, self._loop, self._level, self._files = Path(folder), loop, level, {}
        self._histograms, self._every_epoch = level in ("default", "full"), level == "full"
        self._last_call, self._last_epoch = None, None
        self._penalised = {id(kernel) for kernel in loop.state.kernels}
        if settings is None:
            settings = {"optimizer": loop.state.optimizer.name, "schedule": loop.state.schedule.name, "batch_size": loop.pipeline.batch_size}
        if level != "none" and not resumed:
            self._write("", 0, custom_scalar_pb(_layout()), *_hparams(settings, loop.state, self._folder.name))
            self._write("train", 0, text_pb("config", _settings_text(settings)), text_pb("model", _model_text(loop.state)))

    def write(self, record: Call | Epoch) -> None:
        """A Call is a point of the training curves, an Epoch one of the test and validation curves."""
        if self._level == "none":
            return
        if isinstance(record, Call):
            self._last_call = record
            self._write("train", record.step, _scalars(_tagged(record.train) | self._call_scalars(record)))
            return
        self._last_epoch = record
        self._write("train", record.step, _scalars({"epoch_accuracy": record.train.accuracy, "epoch_loss": record.train.total}))
        if record.test:
            self._write("test", record.step, _scalars(_tagged(record.test)))
        if record.validation:
            self._write("validation", record.step, _scalars(_tagged(record.validation)))
        if self._histograms:
            self._write("train", record.step, *self._weight_histograms())
        if self._histograms and record.test:
            self._write("test", record.step, *self._activation_histograms())
        if self._every_epoch and record.test:
            self._pictures(record.step, record.outputs)

    def finish(self) -> None:
        """What is written once, after the last epoch; HParams then has the run as a success."""
        if self._level == "none":
            return
        if len(self._loop.data.test):
            self._finish()
        self.end(succeeded=True)

    def _finish(self) -> None:
        split, step = self._loop.data.test, int(self._loop.state.global_step)
        outputs = self._last_epoch.outputs if self._last_epoch else self._loop.evaluate_with_outputs(split)[1]
        if outputs.shape[1] == self._loop.data.classes:
            self._write("test", step, text_pb("classification_report", _report(split.labels, outputs)))
        if not self._histograms:
            return
        if self._loop.graph:
            self._file("train").write_graph(self._loop.graph)
        if isinstance(self._loop.state.model, (keras.Sequential, keras.src.models.Functional)):
            self._write("train", 0, _keras_model_pb(self._loop.state.model))
        if not self._every_epoch:
            self._pictures(step, outputs)
        self._embeddings()

    def end(self, succeeded: bool) -> None:
        """Tell HParams that the run has ended, and how."""
        if self._level != "none":
            self._write("", 0, session_end_pb(api_pb2.STATUS_SUCCESS if succeeded else api_pb2.STATUS_FAILURE))

    def sync(self) -> dict[str, int]:
        """Wait until all is on disk; the size of every event file of the run, by its path in the run's folder."""
        for file in self._files.values():
            file.sync()
        return {str(path.relative_to(self._folder)): path.stat().st_size for path in sorted(self._folder.rglob("*tfevents*"))}

    def __enter__(self) -> "Summaries":
        return self

    def __exit__(self, *_) -> None:
        for file in self._files.values():
            file.close()

    def _file(self, run: str) -> EventFile:
        if run not in self._files:
            self._files[run] = EventFile(self._folder / run)
        return self._files[run]

    def _write(self, run: str, step: int, *summaries) -> None:
        self._file(run).write(step, *summaries)

    def _call_scalars(self, call: Call) -> dict[str, float]:
        """Norms and penalties by weight are those of the call's last step."""
        state, seconds = self._loop.state, call.seconds / call.steps
        size, rows = self._loop.pipeline.size, self._loop.pipeline.batch_size
        examples = min(call.batch * rows, size) - (call.batch - call.steps) * rows
        values = {"learning_rate": call.rate, "speed/ms_per_step": 1000 * seconds,
                  "speed/examples_per_second": examples / call.seconds, "gradient_norm/all": float(call.gradients.norm),
                  "speed/input_wait_ms": 1000 * call.input_seconds / call.steps, **_memory()}
        if state.loss_scale is not None:
            values["loss_scale"] = float(state.loss_scale)
        l1, l2 = (float(state.hyper[name]) for name in ("l1", "l2"))
        gradients, updates = call.gradients.norms(), call.updates.norms()
        for name, variable in state.weights.items():
            weight = variable.numpy()
            norm = float(np.linalg.norm(weight))
            values[f"gradient_norm/{name}"], values[f"update_norm/{name}"] = gradients[name], updates[name]
            if norm:
                values[f"update_to_weight/{name}"] = updates[name] / norm
            if l1 and id(variable) in self._penalised:
                values[f"loss_l1/{name}"] = l1 * float(np.abs(weight).sum())
            if l2 and id(variable) in self._penalised:
                values[f"loss_l2/{name}"] = l2 * norm**2
        return values

    def _weight_histograms(self) -> list[Summary]:
        found = [histogram_pb(f"weights/{name}", weight.numpy()) for name, weight in self._loop.state.weights.items()]
        if self._last_call:
            found += [histogram_pb(f"gradients/{name}", np.asarray(gradient))
                      for name, gradient in self._last_call.gradients.parts().items()]
        return found

    def _activation_histograms(self) -> list[Summary]:
        return [histogram_pb(f"activations/{name}", activation.numpy())
                for name, activation in self._forward(self._loop.data.test.images[:PROBED])]

    def _forward(self, images) -> list[tuple[str, tf.Tensor]]:
        state = self._loop.state
        return list(models.forward(state.model, state.standardize(images)))

    def _pictures(self, step: int, outputs: np.ndarray) -> None:
        from tfloop import plots

        test, model = self._loop.data.test, self._loop.state.model
        if outputs.shape[1] != self._loop.data.classes:
            return  # a model with a loss of its own, which may not classify
        guesses = outputs.argmax(axis=1)
        wrong = np.flatnonzero(guesses != test.labels)[:MISCLASSIFIED]
        pictures = {"confusion": plots.confusion(test.labels, guesses, outputs.shape[1])}
        if len(wrong):
            pictures["misclassified"] = plots.misclassified(test.images[wrong], test.labels[wrong], guesses[wrong])
        kernel = next((weight.numpy() for weight in self._loop.state.weights.values() if len(weight.shape) == 4), None)
        if kernel is not None:
            self._write("train", step, _image_pb("filters", plots.filters(kernel)))
        if self._every_epoch:
            one_each = [np.flatnonzero(test.labels == label)[0] for label in np.unique(test.labels)]
            for name, activation in self._forward(test.images[one_each]):
                if len(activation.shape) == 4:
                    pictures[f"feature_maps/{name}"] = plots.feature_maps(activation.numpy())
        shares = models.probabilities(model, tf.constant(outputs)).numpy()
        curves = [pr_curve_pb(f"class_{label}", test.labels == label, shares[:, label]) for label in range(shares.shape[1])]
        self._write("test", step, *(_image_pb(tag, png) for tag, png in pictures.items()), *curves)

    def _embeddings(self) -> None:
        """The projector's files: what goes into the last layer, for the first test images, with labels and thumbnails."""
        from tensorboard.plugins.projector import ProjectorConfig
        from google.protobuf import text_format

        from tfloop import plots

        test = self._loop.data.test
        images, labels = test.images[:EMBEDDED], test.labels[:EMBEDDED]
        activations = self._forward(images)
        name, vectors = activations[-2] if len(activations) > 1 else activations[-1]
        vectors = vectors.numpy().reshape(len(images), -1)
        folder = self._folder / "test"
        vectors.astype("<f4").tofile(folder / "embeddings.bytes")
        (folder / "labels.tsv").write_text("\n".join(map(str, labels)) + "\n", encoding="utf-8")
        (folder / "thumbnails.png").write_bytes(plots.sprite(images))
        config = ProjectorConfig()
        embedding = config.embeddings.add(tensor_name=name, tensor_shape=vectors.shape, tensor_path="embeddings.bytes",
                                          metadata_path="labels.tsv")
        embedding.sprite.image_path = "thumbnails.png"
        embedding.sprite.single_image_dim.extend([images.shape[2], images.shape[1]])
        (folder / "projector_config.pbtxt").write_text(text_format.MessageToString(config), encoding="utf-8")


def _tagged(metrics: Metrics) -> dict[str, float]:
    return {TAGS[name]: value for name, value in metrics._asdict().items() if value is not None}


def _scalars(values: dict[str, float]) -> Summary:
    """A scalar for each tag. (TensorBoard's own scalar_pb is general, and three times slower.)"""
    return Summary(value=[Summary.Value(tag=tag, metadata=SCALAR, tensor=TensorProto(dtype=DT_FLOAT, float_val=[value]))
                          for tag, value in values.items()])


def _memory() -> dict[str, float]:
    """Memory in use now, MiB: of this process, where the system tells, and of the GPU."""
    found = {}
    if os.path.exists("/proc/self/statm"):
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        found["memory/host_mib"] = pages * os.sysconf("SC_PAGE_SIZE") / 2**20
    if tf.config.list_logical_devices("GPU"):
        found["memory/device_mib"] = tf.config.experimental.get_memory_info("GPU:0")["current"] / 2**20
    return found


def _layout() -> layout_pb2.Layout:
    """Accuracy and loss side by side, train and test in one chart, as the article plots them."""
    def chart(title: str, tag: str) -> layout_pb2.Chart:
        return layout_pb2.Chart(title=title, multiline=layout_pb2.MultilineChartContent(tag=[f"^{tag}$"]))

    return layout_pb2.Layout(category=[layout_pb2.Category(title="accuracy and loss", chart=[
        chart("accuracy", "accuracy"), chart("loss", "loss/total")])])


def _hparams(settings: Mapping[str, object], state, run: str) -> list[Summary]:
    """The run's settings, numbers as they really are (the rule's defaults in place of those left open), for HParams."""
    values = {name: value for name, value in settings.items() if name not in NO_HYPER}
    values = _plain({**values, **{name: variable.numpy() for name, variable in state.hyper.items()}})
    metrics = [Metric("accuracy", "test", display_name="test accuracy"), Metric("loss/data", "test", display_name="test loss"),
               Metric("accuracy", "validation", display_name="validation accuracy"),
               Metric("accuracy", "train", display_name="train accuracy"), Metric("loss/total", "train", display_name="train loss"),
               Metric("speed/ms_per_step", "train", display_name="ms per step")]
    names = dict.fromkeys([*HYPER_FIELDS, *HYPER["optimizer"], *HYPER["schedule"], *values])  # TensorBoard takes one run's list
    return [hparams_config_pb([HParam(name) for name in names], metrics), hparams_pb(values, trial_id=run)]


def _settings_text(settings: Mapping[str, object]) -> str:
    rows = [f"| {name} | {value} |" for name, value in _plain(settings).items()]
    return "\n".join(["| setting | value |", "| --- | --- |", *rows])


def _plain(settings: Mapping[str, object]) -> dict[str, bool | int | float | str]:
    """The settings that are set, as HParams takes them."""
    values = {name: value.tolist() if hasattr(value, "tolist") else value for name, value in settings.items()}  # NumPy's
    values = {name: ", ".join(map(str, value)) if isinstance(value, (tuple, list)) else value for name, value in values.items()}
    return {name: value if isinstance(value, (bool, int, float)) else str(value) for name, value in values.items() if value not in (None, "")}


def _model_text(state) -> str:
    if not isinstance(state.model, keras.Sequential):
        rows = [f"| {name} | {tuple(weight.shape)} | {weight.shape.num_elements():,} |" for name, weight in state.weights.items()]
        return "\n".join(["| weight | shape | parameters |", "| --- | --- | ---: |", *rows])
    rows = [f"| {layer} | {shape} | {weights} | {parameters:,} |" for layer, shape, weights, parameters in models.table(state.model)]
    return "\n".join(["| layer | output | weights | parameters |", "| --- | --- | --- | ---: |", *rows])


def _report(labels: np.ndarray, outputs: np.ndarray) -> str:
    from sklearn.metrics import classification_report

    text = classification_report(labels, outputs.argmax(axis=1), digits=4, zero_division=0)
    return "\n".join(f"    {line}" for line in text.splitlines())


def _image_pb(tag: str, png: bytes) -> Summary:
    width, height = (int.from_bytes(png[i:i + 4], "big") for i in (16, 20))  # of the PNG's header
    tensor = make_tensor_proto(np.array([str(width).encode(), str(height).encode(), png], dtype=object))
    return Summary(value=[Summary.Value(tag=tag, tensor=tensor, metadata=image_metadata("", ""))])


def _keras_model_pb(model) -> Summary:
    """The conceptual graph: TensorBoard draws it from the model's JSON."""
    metadata = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="graph_keras_model", content=b"1"))
    tensor = make_tensor_proto(np.array(model.to_json().encode(), dtype=object))
    return Summary(value=[Summary.Value(tag="keras", tensor=tensor, metadata=metadata)])
