"""Losses and metrics by output: against Keras's evaluation, scikit-learn, and values by hand."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from sklearn import metrics as sk

import tfloop
from tfloop import assembly, criterion
from tfloop.errors import UserError
from tfloop.training.export import plain_model


def dense(units, activation=None, inputs=4):
    keras.utils.set_random_seed(0)
    return keras.Sequential([keras.Input((inputs,)), layers.Dense(units, activation)])


def data_of(random, targets, **options):
    rows = len(tf.nest.flatten(targets)[0])
    x = random.normal(size=(rows, 4))
    return tfloop.from_arrays(x, targets, standardize=False, **options)


def evaluated(model, data, **options):
    state = tfloop.TrainState(model, **options)
    return tfloop.Loop(state, data, batch_size=10).evaluate(data.train)


@pytest.mark.quick
@pytest.mark.parametrize(
    "loss", ["mse", "hinge", "squared_hinge", "huber", "log_cosh", keras.losses.Huber(0.3)]
)
def test_a_loss_of_keras_on_one_column_is_that_of_its_evaluation(random, loss):
    targets = random.integers(0, 2, 30) * 2.0 - 1.0
    data, model = data_of(random, targets), dense(1)
    model.compile("sgd", loss)
    expected = model.evaluate(data.train.inputs, targets, verbose=0)
    assert evaluated(model, data, loss=loss).data == pytest.approx(expected, rel=1e-5)


@pytest.mark.quick
def test_a_function_of_ones_own_that_compares_each_target_with_all_outputs_is_refused(random):
    data = data_of(random, random.normal(size=30))

    def crossed(targets, outputs):
        return tf.reduce_mean(tf.square(targets - outputs), axis=-1)

    with pytest.raises(UserError, match=r"broadcast; take outputs\[:, 0\]"):
        evaluated(dense(1), data, loss=crossed)

    def right(targets, outputs):
        return tf.square(targets - outputs[:, 0])

    model = dense(1)
    expected = np.mean((data.train.targets - model(data.train.inputs)[:, 0]) ** 2)
    assert evaluated(model, data, loss=right).data == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("activation", [None, "sigmoid"])
def test_two_classes_may_have_one_output(random, activation):
    labels = random.integers(0, 2, 40)
    data, model = data_of(random, labels), dense(1, activation)
    found = evaluated(model, data, metrics=[sk.roc_auc_score, sk.f1_score])
    logits = model(data.train.inputs).numpy()[:, 0].astype(np.float64)
    p = logits if activation else 1 / (1 + np.exp(-logits))
    assert found.data == pytest.approx(sk.log_loss(labels, p), rel=1e-4)
    assert found.accuracy == pytest.approx(np.mean((p > 0.5) == labels))
    assert found.more["roc_auc_score"] == pytest.approx(sk.roc_auc_score(labels, p))
    assert found.more["f1_score"] == pytest.approx(sk.f1_score(labels, p > 0.5))


def test_logits_of_a_loss_of_kerass_are_no_probabilities_for_metrics(random):
    """Squashed for what takes probabilities or guesses; the loss is handed what the model gives."""
    labels = random.integers(0, 2, 60)
    data, model = data_of(random, labels), dense(1)
    loss = keras.losses.BinaryCrossentropy(from_logits=True)
    found = evaluated(model, data, loss=loss, metrics=[sk.accuracy_score])
    logits = model(data.train.inputs).numpy()[:, 0]
    assert found.accuracy == found.more["accuracy_score"] == np.mean((logits > 0) == labels)


def test_labels_of_a_model_that_shows_no_graph_are_cut_at_a_half(random):
    class Subclass(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = layers.Dense(3, "sigmoid")

        def call(self, x):
            return self.dense(x)

    labels, model = random.integers(0, 2, (40, 3)), Subclass()
    data = data_of(random, labels)
    p = model(data.train.inputs).numpy()
    found = evaluated(model, data, loss="binary_crossentropy")
    assert found.accuracy == pytest.approx(np.mean((p > 0.5) == labels))


@pytest.mark.quick
@pytest.mark.parametrize(
    "name, is_max",
    [
        ("neg_mean_squared_error", True),
        ("neg_log_loss", True),
        ("d2_log_loss_score", True),
        ("f1_macro", True),
        ("mean_absolute_error", False),
        ("mape", False),
        ("huber", False),
        ("log_loss", False),
        ("kind/loss", False),
    ],
)
def test_the_direction_of_a_metric_follows_from_its_name(name, is_max):
    assert criterion.parse(name).is_max is is_max


# --- several outputs


def two(names=("area", "price")):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((4,))
    return keras.Model(inputs, {name: layers.Dense(1, name=name)(inputs) for name in names})


@pytest.mark.quick
def test_outputs_and_targets_belong_together_by_name(random):
    targets = {"price": random.normal(size=20), "area": 5 + random.normal(size=20)}
    data, model = data_of(random, targets), two()
    found, given = evaluated(model, data), model(data.train.inputs)
    for name, values in targets.items():
        expected = np.mean((values - given[name][:, 0]) ** 2)
        assert found.more[f"{name}/loss"] == pytest.approx(float(expected), rel=1e-5)
    with pytest.raises(UserError, match="the model gives the outputs area, price"):
        evaluated(two(), data_of(random, (targets["price"], targets["area"])))


@pytest.mark.quick
def test_a_dict_of_losses_says_something_of_each_output(random):
    targets = {"price": random.normal(size=20), "area": random.normal(size=20)}
    data = data_of(random, targets)
    with pytest.raises(UserError, match="says nothing of the output 'price'"):
        evaluated(two(), data, loss={"area": "mse"})
    with pytest.raises(UserError, match="there is no output 'size'"):
        evaluated(two(), data, loss={"size": "mse"})
    model = two()
    found = evaluated(model, data, loss={"area": ("mae", 2.0), "price": 0})
    expected = 2 * np.mean(np.abs(targets["area"] - model(data.train.inputs)["area"][:, 0]))
    assert found.data == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.quick
def test_metrics_need_names_of_their_own(random):
    data = data_of(random, random.normal(size=20))
    for metrics, message in (
        ({"total": sk.r2_score}, "total is there already"),
        ([lambda t, o: 1.0, lambda t, o: 2.0], "comes twice"),
        ({"a": 3}, "a: expected a function"),
    ):
        with pytest.raises(UserError, match=message):
            evaluated(dense(1), data, metrics=metrics)


def test_a_metric_by_column_is_asked_of_the_whole_evaluation(random):
    """It gives three numbers for any number of rows; their mean is told."""
    data, model = data_of(random, random.normal(size=(20, 3))), dense(3)
    found = evaluated(model, data, metrics={"m": lambda t, o: np.mean(np.abs(t - o), axis=0)})
    expected = np.mean(np.abs(data.train.targets - model(data.train.inputs)))
    assert found.more["m"] == pytest.approx(float(expected), rel=1e-5)


def test_a_metric_by_example_is_a_mean_over_training_and_evaluation(random):
    data, model = data_of(random, random.normal(size=25)), dense(1)

    def absolute(targets, outputs):
        return tf.abs(targets - outputs[:, 0])

    state = tfloop.TrainState(model, "sgd", 0.0, metrics={"abs": absolute})
    record = tfloop.Loop(state, data, batch_size=10).fit(1)
    expected = np.mean(np.abs(data.train.targets - model(data.train.inputs)[:, 0]))
    assert record.train.more["abs"] == pytest.approx(float(expected), rel=1e-5)


def test_keras_metrics_are_asked_of_the_whole_evaluation(random):
    labels = random.integers(0, 2, 40)
    data, model = data_of(random, labels), dense(1, "sigmoid")
    found = evaluated(model, data, metrics={"auc": keras.metrics.AUC(num_thresholds=2000)})
    p = model(data.train.inputs).numpy()[:, 0]
    assert found.more["auc"] == pytest.approx(sk.roc_auc_score(labels, p), abs=0.01)


# --- masks, weights, what is standardised


def test_a_class_for_each_place_of_an_image(random):
    masks = random.integers(0, 3, (12, 5, 5))
    images = random.normal(size=(12, 5, 5, 1))
    data = tfloop.from_arrays(images, masks, standardize=False)
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((5, 5, 1)), layers.Conv2D(3, 3, padding="same")])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("sgd", loss, metrics=["accuracy"])
    expected = model.evaluate(data.train.inputs, masks, verbose=0)
    found = evaluated(model, data)
    assert [found.data, found.accuracy] == pytest.approx(expected, rel=1e-5)


def test_weights_of_classes_are_those_of_fit(random):
    labels, weight = random.integers(0, 3, 40), {0: 2.0, 2: 0.5}
    data = data_of(random, labels, class_weight=weight)
    expected = np.array([weight.get(label, 1.0) for label in labels], np.float32)
    np.testing.assert_array_equal(data.train.sample_weight, expected)


@pytest.mark.parametrize("swapped", [False, True])
def test_an_export_standardises_each_input_by_its_own_numbers(random, swapped):
    x = {"a": random.normal(3, 2, (30, 2)), "z": random.normal(-50, 9, (30, 2))}
    data = tfloop.from_arrays(x, random.normal(size=30))
    inputs = [keras.Input((2,), name=name) for name in (("z", "a") if swapped else ("a", "z"))]
    model = keras.Model(inputs, layers.Dense(1)(layers.Concatenate()(inputs)))
    state = tfloop.TrainState(model, standardizer=data.standardizer)
    tfloop.Loop(state, data, batch_size=10).fit(1)
    raw = {name: tf.constant(values, tf.float32) for name, values in x.items()}
    np.testing.assert_allclose(plain_model(state)(raw), tfloop.predict(state, x), atol=1e-4)


@pytest.mark.quick
def test_whole_numbers_are_scaled_where_the_model_was_trained_on_numbers_that_are(random):
    table = random.integers(0, 200, (30, 3))
    data = tfloop.from_arrays(table.astype(float), random.normal(size=30))
    model = dense(1, inputs=3)
    state = tfloop.TrainState(model, standardizer=data.standardizer)
    tfloop.Loop(state, data, batch_size=10)
    np.testing.assert_allclose(
        tfloop.predict(state, table), tfloop.predict(state, table.astype(float)), rtol=1e-6
    )
    with pytest.raises(UserError, match="inputs to predict are a, the model takes one array"):
        tfloop.predict(state, {"a": table})


# --- tf.data


def rows(*arrays):
    return tf.data.Dataset.from_tensor_slices(tuple(np.asarray(a) for a in arrays))


@pytest.mark.quick
@pytest.mark.parametrize(
    "make, message",
    [
        (lambda x: rows(x, [0, 1, -1] * 4), "label -1 is not a class number"),
        (lambda x: rows(x, [0.0, np.nan, 1.0] * 4), "is NaN or infinite"),
        (lambda x: rows(x, [0, 1, 1] * 4, [1.0, -1.0, 1.0] * 4), "expected finite numbers from 0"),
        (lambda x: rows(x, [0, 1, 1] * 4).repeat(), "the dataset has no end"),
        (lambda x: rows(x), "expected elements .inputs, targets."),
        (lambda x: rows(x, [0, 1, 1] * 4).take(0), "holds no training examples"),
        (lambda x: rows(x, np.zeros((12, 2), int)), "batched=True or batched=False"),
        (lambda x: 3, "expected a tf.data.Dataset, found int"),
    ],
)
def test_a_dataset_that_does_not_do_is_named(random, make, message):
    with pytest.raises(UserError, match=message):
        tfloop.from_dataset(lambda: make(random.normal(size=(12, 2))))


@pytest.mark.quick
def test_batches_of_different_sizes_are_refused(random):
    def uneven():
        return tf.data.Dataset.from_generator(
            lambda: ((np.zeros((n, 2)), np.arange(n) % 2) for n in (4, 3, 4)),
            output_signature=(tf.TensorSpec([None, 2]), tf.TensorSpec([None], tf.int64)),
        )

    with pytest.raises(UserError, match="batch 1 has 3 examples, the first has 4"):
        tfloop.from_dataset(uneven)


def test_weights_of_a_dataset_count_in_training_and_in_tests(random):
    x, y, w = random.normal(size=(20, 4)), np.arange(20) % 2, random.uniform(0, 2, 20)

    def make():
        return rows(x.astype("f4"), y.astype(bool), w[:, None]).batch(20)

    data = tfloop.from_dataset(make, make)
    state = tfloop.TrainState(dense(2), "sgd", 0.0)
    record = tfloop.Loop(state, data).fit(1)
    logits = state.model(x).numpy()
    each = tf.nn.sparse_softmax_cross_entropy_with_logits(y, logits)
    assert record.train.data == pytest.approx(np.mean(w * each), rel=1e-5)
    assert record.test.data == pytest.approx(record.train.data, rel=1e-5)


def stream(x, y):
    return lambda: tf.data.Dataset.from_tensor_slices((x, y)).batch(4)


def test_a_dataset_with_other_examples_has_another_fingerprint(random):
    x, y = random.normal(size=(12, 2)), np.arange(12) % 3
    found = {
        tfloop.from_dataset(stream(inputs, targets)).fingerprint
        for inputs, targets in ((x, y), (x, y), (x, y[::-1].copy()), (x + 1, y), (x, y * 2))
    }
    assert len(found) == 4  # the first two are the same


def test_the_test_of_a_dataset_is_like_its_training(random):
    x, y = random.normal(size=(12, 2)), np.arange(12) % 3
    for inputs, targets, message in (
        (x, y - 1, "test targets: label -1 is not a class number"),
        (x, y + 1, "test targets: label 3 is out of range"),
        (x[:, :1], y, "test: inputs are 1 float64, those of the training 2 float64"),
        (x.astype(np.float32), y, "test: inputs are 2 float32, those of the training 2 float64"),
    ):
        with pytest.raises(UserError, match=message):
            tfloop.from_dataset(stream(x, y), stream(inputs, targets))


def test_targets_are_told_by_all_rows_of_a_dataset(random):
    one_hot = np.eye(3, dtype=np.float32)[np.arange(1200) % 3]
    one_hot[-1] = 1  # behind those that are looked at first
    data = tfloop.from_dataset(stream(random.normal(size=(1200, 2)), one_hot))
    assert data.target.kind == "labels"


def test_sequences_of_any_length_train_in_padded_batches_alone(random):
    spec = (tf.TensorSpec((None, 2)), tf.TensorSpec((), tf.int64))
    examples = [(random.normal(size=(3 + i % 4, 2)).astype(np.float32), i % 2) for i in range(40)]

    def make():
        return tf.data.Dataset.from_generator(lambda: iter(examples), output_signature=spec)

    def state():
        keras.utils.set_random_seed(0)
        return tfloop.TrainState(
            keras.Sequential([keras.Input((None, 2)), layers.SimpleRNN(3), layers.Dense(2)])
        )

    data = tfloop.from_dataset(lambda: make().padded_batch(10), lambda: make().padded_batch(40))
    assert tfloop.Loop(state(), data, shards=2).fit(1).steps == 4
    with pytest.raises(UserError, match="its examples have different shapes: batch them"):
        tfloop.Loop(state(), tfloop.from_dataset(make), batch_size=10)


def test_a_dataset_that_gives_less_than_was_counted_says_so(random):
    x, y, passes = random.normal(size=(12, 2)), np.arange(12) % 3, []

    def rows():
        passes.append(None)
        return iter(zip(x, y)) if len(passes) < 8 else iter(zip(x[:6], y[:6]))

    spec = (tf.TensorSpec((2,), tf.float64), tf.TensorSpec((), tf.int64))
    data = tfloop.from_dataset(
        lambda: tf.data.Dataset.from_generator(rows, output_signature=spec).batch(4)
    )
    with pytest.raises(UserError, match="gives a batch of 2.* where it gave 4"):
        tfloop.Loop(tfloop.TrainState(dense(3, inputs=2)), data).fit(20)


# --- sigmoids, masks


def ends(kind):
    """A model for images with one output for each place that ends in a sigmoid."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((4, 4, 1))
    if kind == "convolution":
        return keras.Model(
            inputs, layers.Conv2D(1, 3, padding="same", activation="sigmoid")(inputs)
        )
    x = layers.Conv2D(1, 3, padding="same")(inputs)
    if kind == "activation":
        return keras.Model(inputs, layers.Activation("sigmoid")(x))
    return keras.Model(inputs, layers.Lambda(tf.sigmoid)(x))


@pytest.mark.parametrize("kind", ["convolution", "activation"])
@pytest.mark.parametrize("with_channel", [True, False])
def test_a_last_sigmoid_is_applied_once_also_that_of_a_convolution(random, kind, with_channel):
    masks = random.integers(0, 2, (10, 4, 4) + (1,) * with_channel)
    data = tfloop.from_arrays(random.normal(size=(10, 4, 4, 1)), masks, standardize=False)
    model = ends(kind)
    p = model(data.train.inputs).numpy().reshape(-1)
    found = evaluated(model, data, metrics=[sk.f1_score])
    assert found.data == pytest.approx(sk.log_loss(masks.reshape(-1), p), rel=1e-4)
    assert found.accuracy == pytest.approx(np.mean((p > 0.5) == masks.reshape(-1)))
    assert found.more["f1_score"] == pytest.approx(sk.f1_score(masks.reshape(-1), p > 0.5))
    state = tfloop.TrainState(model)
    tfloop.Loop(state, data, batch_size=5)
    np.testing.assert_allclose(tfloop.predict(state, data.train.inputs).reshape(-1), p, rtol=1e-5)


@pytest.mark.quick
def test_a_sigmoid_that_the_graph_does_not_show_is_refused(random):
    masks = random.integers(0, 2, (10, 4, 4))
    data = tfloop.from_arrays(random.normal(size=(10, 4, 4, 1)), masks, standardize=False)
    with pytest.raises(UserError, match="are probabilities, those of a sigmoid"):
        evaluated(ends("lambda"), data)


def test_labels_and_the_softmax_of_the_cnn_name_the_flag_that_helps(random):
    data = tfloop.from_arrays(
        random.normal(size=(40, 8, 8, 1)), random.integers(0, 2, (40, 3)), standardize=False
    )
    config = tfloop.Config.make("digits", conv=(2,), dense=())
    with pytest.raises(UserError, match="Leave the softmax out, of the CNN by output=sigmoid"):
        assembly.make_loop(config, data).fit(1)


def test_one_hot_masks_are_shares_of_classes_at_each_place(random):
    numbers = random.integers(0, 3, (10, 4, 4))
    images = random.normal(size=(10, 4, 4, 1))
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((4, 4, 1)), layers.Conv2D(3, 3, padding="same")])
    found = [
        evaluated(model, tfloop.from_arrays(images, masks, standardize=False))
        for masks in (numbers, np.eye(3)[numbers], np.eye(3, dtype=int)[numbers])
    ]
    for one in found[1:]:
        assert (one.data, one.accuracy) == pytest.approx((found[0].data, found[0].accuracy))


@pytest.mark.quick
def test_images_are_not_moved_without_their_masks(random):
    masks = random.integers(0, 3, (10, 4, 4))
    data = tfloop.from_arrays(random.normal(size=(10, 4, 4, 1)), masks)
    model = keras.Sequential([keras.Input((4, 4, 1)), layers.Conv2D(3, 3, padding="same")])
    moving = tfloop.Augmentation(flip=True)
    with pytest.raises(UserError, match="augment_flip: moves the images, and not the targets"):
        tfloop.Loop(tfloop.TrainState(model, augmentation=moving), data, batch_size=5)


@pytest.mark.quick
def test_a_loss_that_leaves_places_out_is_refused():
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=255)
    with pytest.raises(UserError, match="has ignore_class"):
        tfloop.TrainState(dense(3), loss=loss)


def test_scikit_learns_metrics_look_at_each_output(random):
    labels, size = random.integers(0, 2, 30), random.normal(size=30)
    data = data_of(random, {"kind": labels, "size": size})
    keras.utils.set_random_seed(0)
    inputs = keras.Input((4,))
    model = keras.Model(inputs, {"kind": layers.Dense(2)(inputs), "size": layers.Dense(1)(inputs)})
    by_output = {"kind": {"f1": sk.f1_score}, "size": {"r2": sk.r2_score}}
    found, given = evaluated(model, data, metrics=by_output), model(data.train.inputs)
    guesses = np.argmax(given["kind"], axis=1)
    assert found.more["kind/f1"] == pytest.approx(sk.f1_score(labels, guesses))
    assert found.more["size/r2"] == pytest.approx(sk.r2_score(size, given["size"][:, 0]), rel=1e-4)
    with pytest.warns(UserWarning, match="the metric kind/mae is left out"):
        each = evaluated(model, data, metrics={"mae": keras.metrics.mean_absolute_error})
    expected = np.mean(np.abs(size - given["size"][:, 0]))
    assert each.more["size/mae"] == pytest.approx(float(expected), rel=1e-5)
