"""What TensorBoard is given of a run, dashboard by dashboard."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer
from tensorboard.compat.proto.graph_pb2 import GraphDef
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from tensorboard.util.tensor_util import make_ndarray

import tfloop
from tfloop.inspection.event_files import _events, read_scalars
from tfloop.training import saved_run

SMALL = dict(preset="digits", conv=(4, 6), pool=(2,), dense=(8,), batch_size=100, quiet=True)


def train(folder, **settings):
    config = tfloop.Config.make(**{**SMALL, "epochs": 2, "logdir": str(folder), **settings})
    return Path(tfloop.train(config)[0]["folder"])


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """A run with everything on, as TensorBoard's multiplexer sees it: (folder, {run: {plugin: {tag:
    events}}})."""
    folder = train(
        tmp_path_factory.mktemp("runs"), summaries="full", l1=1e-4, l2=1e-3, validation_size=100
    )
    multiplexer = EventMultiplexer(size_guidance={}).AddRunsFromDirectory(str(folder)).Reload()
    found = {}
    for run in multiplexer.Runs():
        for tag in multiplexer.Runs()[run]["tensors"]:
            plugin = multiplexer.SummaryMetadata(run, tag).plugin_data.plugin_name
            found.setdefault(run, {}).setdefault(plugin, {})[tag] = multiplexer.Tensors(run, tag)
    return folder, found, multiplexer


def values(events):
    return [(event.step, float(make_ndarray(event.tensor_proto))) for event in events]


def test_none_writes_nothing_and_trains_the_same(tmp_path):
    quiet, loud = (train(tmp_path, summaries=level) for level in ("none", "full"))
    assert not list(quiet.rglob("*tfevents*")) and list(loud.rglob("*tfevents*"))
    results = [json.loads((folder / "result.json").read_text()) for folder in (quiet, loud)]
    assert results[0]["weights_sha256"] == results[1]["weights_sha256"]


def test_scalars_alone_are_curves_settings_and_texts(tmp_path):
    folder = train(tmp_path, summaries="scalars")
    multiplexer = EventMultiplexer().AddRunsFromDirectory(str(folder)).Reload()
    plugins = {
        multiplexer.SummaryMetadata(run, tag).plugin_data.plugin_name
        for run in multiplexer.Runs()
        for tag in multiplexer.Runs()[run]["tensors"]
    }
    assert plugins == {"scalars", "text", "hparams", "custom_scalars"}


@pytest.mark.quick
def test_train_test_and_validation_share_the_axis_of_global_steps(full):
    _, found, _ = full
    assert set(found) == {".", "train", "test", "validation"}
    steps = [step for step, _ in values(found["train"]["scalars"]["accuracy"])]
    assert steps == sorted(set(steps))
    for run in ("test", "validation"):
        assert [step for step, _ in values(found[run]["scalars"]["accuracy"])] == [14, 28]
    assert steps[-1] == 28


@pytest.mark.quick
def test_the_terms_add_up_and_penalties_are_told_layer_by_layer(full):
    scalars = full[1]["train"]["scalars"]
    last = {tag: values(events)[-1][1] for tag, events in scalars.items()}
    assert last["loss/total"] == pytest.approx(
        last["loss/data"] + last["loss/l1"] + last["loss/l2"], rel=1e-5
    )
    assert {tag for tag in last if "/loss_l2/" in tag} == {
        "tensors/loss_l2/dense1/kernel",
        "tensors/loss_l2/output/kernel",
    }
    _, state, _ = saved_run.open_run(full[0])
    for name in ("dense1/kernel", "output/kernel"):
        assert last[f"tensors/loss_l2/{name}"] == pytest.approx(
            1e-3 * float(tf.reduce_sum(state.weights[name] ** 2)), rel=1e-5
        )
        assert last[f"tensors/loss_l1/{name}"] == pytest.approx(
            1e-4 * float(tf.reduce_sum(tf.abs(state.weights[name]))), rel=1e-5
        )


def test_norms_by_layer_are_those_of_the_last_step(loop, tmp_path):
    one = loop(optimizer="sgd", learning_rate=0.1, steps_per_call=1)
    before = {name: weight.numpy() for name, weight in one.state.weights.items()}
    gradients = tfloop.forward_and_backward(one.state, one.batch(0)).gradients
    with tfloop.Summaries(tmp_path, one) as summaries:
        summaries.write(next(one.run(1)))
    found = {scalar.tag: scalar.value for scalar in read_scalars(tmp_path)}
    for name, gradient in gradients.items():
        norm = np.linalg.norm(gradient)
        assert found[f"tensors/gradient_norm/{name}"] == pytest.approx(norm, rel=1e-3, abs=1e-6)
        assert found[f"tensors/update_norm/{name}"] == pytest.approx(0.1 * norm, rel=1e-3, abs=1e-7)
        if name.endswith("kernel"):
            size = np.linalg.norm(one.state.weights[name])
            assert found[f"tensors/update_to_weight/{name}"] == pytest.approx(
                np.linalg.norm(one.state.weights[name] - before[name]) / size, rel=1e-3
            )


@pytest.mark.quick
def test_speed_input_wait_memory_and_rate_are_curves(full):
    last = {tag: values(events)[-1][1] for tag, events in full[1]["train"]["scalars"].items()}
    images, steps = 1337 - 0, 14  # one call an epoch, the last batch of which is not full
    assert last["speed/examples_per_second"] == pytest.approx(
        1000 * images / (steps * last["speed/ms_per_step"]), rel=1e-4
    )
    assert 0 <= last["speed/input_wait_ms"] < last["speed/ms_per_step"]
    assert 50 < last["memory/host_mib"] < 100_000
    assert last["learning_rate"] == pytest.approx(0.001)


@pytest.mark.quick
def test_histograms_of_weights_gradients_and_activations(full):
    _, found, _ = full
    weights = {
        "conv1/kernel",
        "conv1/bias",
        "conv2/kernel",
        "conv2/bias",
        "dense1/kernel",
        "dense1/bias",
        "output/kernel",
        "output/bias",
    }
    assert set(found["train"]["histograms"]) == {
        f"tensors/{kind}/{name}" for kind in ("weights", "gradients") for name in weights
    }
    assert set(found["test"]["histograms"]) == {
        f"tensors/activations/{layer}"
        for layer in ("conv1", "pool1", "conv2", "flatten", "dense1", "output")
    }
    of_train = found["train"]["histograms"]
    buckets = make_ndarray(of_train["tensors/weights/conv1/kernel"][-1].tensor_proto)
    assert buckets[:, 2].sum() == 3 * 3 * 1 * 4
    gradients = make_ndarray(of_train["tensors/gradients/conv1/kernel"][-1].tensor_proto)
    assert gradients[0, 0] < 0 < gradients[-1, 1] and gradients[:, 2].sum() == 36
    norms = {
        tag: values(events)[-1][1]
        for tag, events in found["train"]["scalars"].items()
        if "gradient_norm/" in tag
    }
    parts = [
        norm
        for tag, norm in norms.items()
        if tag not in ("gradient_norm/all", "gradient_norm/mean")
    ]
    assert norms["gradient_norm/all"] == pytest.approx(np.sqrt(np.sum(np.square(parts))), rel=1e-5)


@pytest.mark.quick
def test_pictures_are_png_files_of_the_size_they_say(full):
    _, found, _ = full
    images = found["train"]["images"] | found["test"]["images"]
    assert set(images) == {
        "pictures/filters",
        "pictures/confusion",
        "pictures/misclassified",
        "pictures/feature_maps/conv1",
        "pictures/feature_maps/pool1",
        "pictures/feature_maps/conv2",
    }
    for events in images.values():
        width, height, png = make_ndarray(events[-1].tensor_proto)
        assert tf.io.decode_png(png).shape[:2] == (int(height), int(width))


@pytest.mark.quick
def test_precision_and_recall_for_every_class(full):
    curves = full[1]["test"]["pr_curves"]
    assert sorted(curves) == [f"class_{label}/pr_curves" for label in range(10)]
    true_positives, false_positives, *_ = make_ndarray(curves["class_3/pr_curves"][-1].tensor_proto)
    labels = tfloop.load("digits", validation_size=100).test.targets
    assert true_positives[0] == (labels == 3).sum() and true_positives[0] + false_positives[
        0
    ] == len(labels)


@pytest.mark.quick
def test_the_graphs_are_the_compiled_step_and_the_models_layers(full):
    _folder, found, multiplexer = full
    names = {"/".join(node.name.split("/")[:2]) for node in multiplexer.Graph("train").node}
    assert {"forward/conv1", "backward/dense1", "update/rmsprop"} <= names
    model = json.loads(
        make_ndarray(found["train"]["graph_keras_model"]["keras"][0].tensor_proto).item()
    )
    assert [layer["config"]["name"] for layer in model["config"]["layers"]][1:] == [
        "conv1",
        "pool1",
        "conv2",
        "flatten",
        "dense1",
        "output",
    ]


def test_the_projector_has_embeddings_labels_and_thumbnails(full):
    folder, _, _ = full
    config = (folder / "test/projector_config.pbtxt").read_text()
    assert 'tensor_path: "embeddings.bytes"' in config and "single_image_dim: 8" in config
    test = tfloop.load("digits", validation_size=100).test
    count = min(len(test), 500)
    assert np.fromfile(folder / "test/embeddings.bytes", "<f4").reshape(count, 8).std() > 0
    assert [int(line) for line in (folder / "test/labels.tsv").read_text().split()] == test.targets[
        :count
    ].tolist()
    side = int(np.ceil(np.sqrt(count)))
    assert tf.io.decode_png((folder / "test/thumbnails.png").read_bytes()).shape[:2] == (
        8 * side,
        8 * side,
    )


@pytest.mark.quick
def test_settings_and_report_are_texts_and_hparams(full):
    _, found, _ = full

    def text(run, tag):
        return make_ndarray(found[run]["text"][tag][-1].tensor_proto).item().decode()

    assert "| batch_size | 100 |" in text("train", "config") and "dense1" in text("train", "model")
    assert "accuracy" in text("test", "classification_report") and "macro avg" in text(
        "test", "classification_report"
    )
    assert {
        "_hparams_/session_start_info",
        "_hparams_/session_end_info",
        "_hparams_/experiment",
    } == set(found["."]["hparams"])


def test_a_live_plot_is_redrawn_after_every_epoch(tmp_path):
    folder = train(tmp_path, live_plot=True, summaries="none")
    assert tf.io.decode_png((folder / "curves.png").read_bytes()).shape[1] == 1320


def test_in_a_notebook_the_live_plot_is_redrawn_in_place(loop, monkeypatch):
    import importlib.machinery
    import sys
    import types

    shown = []
    handle = types.SimpleNamespace(update=lambda figure: shown.append(("update", figure)))

    def display(figure, display_id):
        return shown.append(("display", figure)) or handle

    package = types.ModuleType("IPython")
    package.__spec__ = importlib.machinery.ModuleSpec("IPython", None)
    monkeypatch.setitem(sys.modules, "IPython", package)
    monkeypatch.setitem(sys.modules, "IPython.display", types.SimpleNamespace(display=display))
    plot = tfloop.LivePlot()
    for record in loop().run(3):
        plot.write(record)
    assert [what for what, _ in shown] == ["display", "update", "update"]
    assert len(shown[-1][1].axes[0].lines[1].get_xdata()) == 3


def test_a_profile_holds_the_marked_steps_and_changes_nothing(tmp_path, capsys):
    profiled, plain = train(tmp_path, profile="5:8", quiet=False), train(tmp_path)
    assert "profile of steps 5 to 7 written" in capsys.readouterr().out
    (plane,) = (profiled / "train/plugins/profile").rglob("*.xplane.pb")
    assert b"step_num" in plane.read_bytes()
    digests = [
        json.loads((folder / "result.json").read_text())["weights_sha256"]
        for folder in (profiled, plain)
    ]
    assert digests[0] == digests[1]
    steps = [s.step for s in read_scalars(profiled) if (s.run, s.tag) == ("train", "accuracy")]
    assert steps[:4] == [5, 6, 7, 8]


@pytest.mark.parametrize(
    "profile, said",
    [
        ("900:910", "no such step was made; nothing is profiled"),
        ("20:900", "profile of steps 20 to 29 written"),
    ],
)
def test_a_profile_says_what_it_really_holds(tmp_path, capsys, profile, said):
    train(tmp_path, profile=profile, quiet=False)
    assert said in capsys.readouterr().out


def test_hparams_columns_are_the_same_for_every_optimizer_and_schedule(tmp_path):
    from tensorboard.plugins.hparams import metadata

    train(tmp_path), train(tmp_path, optimizer="adam", schedule="cosine")
    multiplexer = EventMultiplexer().AddRunsFromDirectory(str(tmp_path)).Reload()
    columns = [
        [
            info.name
            for info in metadata.parse_experiment_plugin_data(
                multiplexer.SummaryMetadata(run, "_hparams_/experiment").plugin_data.content
            ).hparam_infos
        ]
        for run in ("digits-001", "digits-002")
    ]
    assert columns[0] == columns[1] and {"rho", "momentum", "beta_1", "decay_steps", "l2"} <= set(
        columns[0]
    )


def test_pictures_of_many_classes_and_of_floats_stay_reasonable(random, recwarn):
    from tfloop.inspection import plots

    labels = random.integers(300, size=2000)
    assert tf.io.decode_png(plots.confusion(labels, labels[::-1], 300)).shape[0] <= 1200
    pixels = tf.io.decode_png(
        plots.misclassified(
            random.uniform(0, 255, (7, 9, 8, 3)).astype(np.float32), labels[:7], labels[7:14]
        )
    ).numpy()
    assert pixels[..., :3].std() > 20 and not recwarn.list
    for accuracy, loss in ((1.0, 0.5), (float("nan"), float("nan")), (0.5, -1.0)):
        plots.curves(
            {"a": {"test/accuracy": ([1, 2], [accuracy] * 2), "test/loss": ([1, 2], [loss] * 2)}}
        ).canvas.draw()
    assert not recwarn.list


def test_a_model_of_ones_own_is_summarised_too(tmp_path, digits):
    import keras

    class Own(keras.Model):
        def __init__(self):
            super().__init__()
            self.flat, self.out = keras.layers.Flatten(), keras.layers.Dense(10)

        def call(self, x):
            return self.out(self.flat(x))

    model = Own()
    model(np.zeros([1, 8, 8, 1], np.float32))
    one = tfloop.Loop(tfloop.TrainState(model, standardizer=digits.standardizer), digits)
    with tfloop.Summaries(tmp_path, one, "full") as summaries:
        for record in one.run(1):
            summaries.write(record)
        summaries.finish()
    assert {s.run for s in read_scalars(tmp_path)} == {"train", "test"}


def test_a_loop_of_ones_own_tells_its_numbers_or_what_it_is_told(loop, tmp_path):
    one = loop(optimizer="adam", learning_rate=0.25)
    for settings in (
        None,
        {"width": np.int64(7), "layers": np.array([3, 4]), "note": None, "made": Path("here")},
    ):
        with tfloop.Summaries(
            tmp_path / str(bool(settings)), one, "scalars", settings
        ) as summaries:
            summaries.write(next(one.run(1)))
    multiplexer = EventMultiplexer().AddRunsFromDirectory(str(tmp_path)).Reload()
    told = {
        run: HParamsPluginData.FromString(
            multiplexer.SummaryMetadata(run, "_hparams_/session_start_info").plugin_data.content
        ).session_start_info.hparams
        for run in ("False", "True")
    }
    assert (
        told["False"]["optimizer"].string_value == "adam"
        and told["False"]["batch_size"].number_value == 100
    )
    assert (
        told["True"]["width"].number_value == 7
        and told["True"]["layers"].string_value == "3, 4"
        and told["True"]["made"].string_value == "here"
    )
    for values in told.values():
        assert values["learning_rate"].number_value == 0.25 and "note" not in values


def test_an_unknown_level_is_refused(loop, tmp_path):
    with pytest.raises(
        tfloop.UserError, match="level 'all' is unknown; choose from none, scalars, default, full"
    ):
        tfloop.Summaries(tmp_path, loop(), "all")


@pytest.mark.parametrize(
    "outputs, found",
    [(lambda x: tf.reduce_sum(x), r"shape \(\)"), (lambda x: {"a": 3}, "int for a")],
)
def test_a_model_whose_outputs_have_no_rows_is_refused(digits, outputs, found):
    class Odd(tf.Module):
        def __init__(self):
            super().__init__()
            self.w = tf.Variable(1.0, name="w")

        def __call__(self, images):
            return outputs(images * self.w)

    state = tfloop.TrainState(Odd(), loss=lambda labels, outputs: tf.zeros_like(labels, tf.float32))
    with pytest.raises(tfloop.UserError, match=f"the model gives {found} for a batch of 8 images"):
        tfloop.Loop(state, digits)


def test_a_diverged_run_is_a_failure_in_hparams(tmp_path):
    with pytest.raises(tfloop.DivergenceError):
        train(tmp_path, learning_rate=1e20)
    multiplexer = EventMultiplexer().AddRunsFromDirectory(str(tmp_path)).Reload()
    from tensorboard.plugins.hparams import metadata
    from tensorboard.plugins.hparams.api_pb2 import STATUS_FAILURE

    run = next(run for run in multiplexer.Runs() if "/" not in run)
    content = multiplexer.SummaryMetadata(run, "_hparams_/session_end_info").plugin_data.content
    assert metadata.parse_session_end_info_plugin_data(content).status == STATUS_FAILURE


def test_the_graph_is_a_few_boxes_each_layer_one_of_them(tmp_path):
    config = tfloop.Config.make(
        "digits", epochs=1, logdir=str(tmp_path), quiet=True, augment_shift=1.0, ema=0.9, l2=1e-3
    )
    (result,) = tfloop.train(config)
    graphs = [
        GraphDef.FromString(event.graph_def)
        for path in Path(result["folder"], "train").glob("*tfevents*")
        for event in _events(path)
        if event.graph_def
    ]
    (graph,) = graphs
    boxes = {node.name.split("/")[0] for node in graph.node}
    assert boxes == {
        "input",
        "augmentation",
        "forward",
        "loss",
        "backward",
        "update",
        "state",
        "while",
    }
    layers = {node.name.split("/")[1] for node in graph.node if node.name.startswith("forward/")}
    assert {"conv1", "conv2", "dense1", "output"} <= layers and len(layers) <= 12
    names = {node.name for node in graph.node}
    inputs = {name.lstrip("^").split(":")[0] for node in graph.node for name in node.input}
    assert inputs <= names


def test_of_many_weights_some_are_shown(tmp_path):
    config = tfloop.Config.make("digits", summary_tensors=3, epochs=1, quiet=True)
    loop = tfloop.make_loop(config)
    settings = dataclasses.asdict(config)
    with tfloop.Summaries(tmp_path, loop, "full", settings) as summaries:
        for record in loop.run(1):
            summaries.write(record)
    tags = {scalar.tag for scalar in read_scalars(tmp_path)}
    shown = {tag for tag in tags if tag.startswith("tensors/gradient_norm/")}
    assert shown == {
        f"tensors/gradient_norm/{name}" for name in ("conv1/kernel", "dense1/kernel", "output/bias")
    }
