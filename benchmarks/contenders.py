"""Who is measured: tfloop and its rivals on one job, each a process of its own that runs when it is
told to.

    python benchmarks/contenders.py NAME FOLDER

The folder holds the job (`jobs.py`): network, weights, order of images, optimizer and penalty. A
contender prints one JSON line when it is ready: its loss on the first batch with the initial
weights, and its peak memory so far. Then, for each line "N" on its standard input, it trains N
steps, waits for the device, and prints the seconds they took. Where it can only make some more
(whole calls, say), it says in `run.scale` what share N is of them; where it knows better what a
turn took, in `run.seconds`.

Those of PyTorch and JAX, in files of their own, never import TensorFlow.
"""

import importlib
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

from jobs import EPSILON, MOMENTUM, RATE, RHO, SGD_RATE, Job, config_of, read, zoo_model


def start(job: Job, **more):
    """Start TensorFlow as `train` does; the config with what that chose for this machine."""
    from tfloop.machine.devices import start as start_tensorflow

    return start_tensorflow(config_of({**job.settings, **more})).config


def set_up(job: Job, intra: int = 0, inter: int = 0):
    """TensorFlow's settings for a rival."""
    import tensorflow as tf

    tf.config.experimental.enable_tensor_float_32_execution(job.precision == "tf32")
    tf.config.threading.set_intra_op_parallelism_threads(intra)
    tf.config.threading.set_inter_op_parallelism_threads(inter)


def model_of(job: Job):
    """The job's model, from Keras's layers, with its first weights."""
    from tfloop import models

    if name := job.settings.get("zoo"):
        model = zoo_model(name)
    else:
        model = models.build(config_of(job.settings), job.images.shape[1:], 10)
    trainable, other = models.named_variables(model)
    by_name, names = {**trainable, **other}, models.stable_names(model)
    for name, value in zip(names, job.weights.values(), strict=True):  # in the model's order
        by_name[name].assign(value)
    return model


def tfloop(job: Job, started: bool = True, **more):
    """tfloop as `train` runs it; a model of the zoo as one runs it from Python. The settings choose
    the rest: fast, shards, threads, eager, jit_compile, pipeline."""
    config = start(job, **more) if started else config_of({**job.settings, **more})
    import tensorflow as tf

    import tfloop
    from tfloop.data.pipelines import batch_at

    if "zoo" in job.settings:
        part = job.images[:100], job.labels[:100]
        data = tfloop.from_arrays(job.images, job.labels, *part)
        optimizer = tfloop.Optimizer("sgd", momentum=MOMENTUM)
        state = tfloop.TrainState(model_of(job), optimizer, SGD_RATE)
        loop = tfloop.Loop(state, data, batch_size=config.batch_size, fast=config.fast)
    else:
        loop = tfloop.make_loop(config)

    first = batch_at(loop.data.train, config.batch_size, config.seed, 0, 0)
    if "zoo" in job.settings:  # its loop has another order; it computes the loss of the job's
        n = config.batch_size
        first = first._replace(
            inputs=tf.constant(job.images[:n]), targets=tf.constant(job.labels[:n])
        )
    with loop.taken_back():
        loss = float(
            tfloop.forward_and_backward(loop.state, first, forward=loop.forward).loss.total
        )
    calls = iter(())

    def run(steps):
        nonlocal calls
        made = 0
        while made < steps:
            call = next(calls, None)
            if call is None:
                loop.state.epoch.assign_add(1)
                loop.state.batch_index.assign(0)
                calls = loop.train_epoch()
                continue
            made += call.steps
        run.scale = steps / made

    return loss, run, min(loop.steps_per_call, loop.steps)


def side_by_side(job: Job):
    """As many models as the settings' ensemble, in one compiled call; N steps are N of each."""
    config = start(job)
    import tfloop
    from tfloop.data.pipelines import batch_at
    from tfloop.training.ensemble import SideBySide

    first = tfloop.make_loop(config)
    loops = [
        first,
        *(
            tfloop.make_loop(config.replace(seed=seed), first.data)
            for seed in range(1, config.ensemble)
        ),
    ]
    batch = batch_at(first.data.train, config.batch_size, config.seed, 0, 0)
    loss = float(tfloop.forward_and_backward(first.state, batch, forward=first.forward).loss.total)
    make = SideBySide(loops).make if len(loops) > 1 else lambda calls: first.make(calls[0])

    def endless(loop):
        while True:
            yield from (
                item for item in loop.pending_epoch() if isinstance(item, tfloop.loop.PendingCall)
            )
            loop.state.epoch.assign_add(1)
            loop.state.batch_index.assign(0)

    trainings = [endless(loop) for loop in loops]

    def run(steps):
        made = 0
        while made < steps:
            calls = [next(training) for training in trainings]
            make(calls)
            made += calls[0].count
        run.scale = steps / made

    return loss, run, min(first.steps_per_call, first.steps)


def keras_fit(job: Job, onednn=None, kept=False, intra=0, inter=0, **compile_options):
    """model.fit on arrays in memory; `kept`: oneDNN's backward primitives are, as with tfloop."""
    if onednn is not None:
        os.environ["TF_ENABLE_ONEDNN_OPTS"] = onednn
    if kept:
        os.environ["TF_MKL_OPTIMIZE_PRIMITIVE_MEMUSE"] = "0"
    set_up(job, intra, inter)
    import keras

    model, n = model_of(job), job.batch_size
    for layer in penalized_layers(job, model):
        layer.kernel.regularizer = keras.regularizers.L2(job.network["l2"])
    model.compile(optimizer_of(job), loss_of(job), metrics=["accuracy"], **compile_options)
    loss = float(penalized(job, model, job.images[:n], job.labels[:n])[0])
    clock = Clock()

    def run(steps):
        rows = min(steps * n, len(job.images))
        epochs = max(1, round(steps * n / rows))
        images, labels = job.images[:rows], job.labels[:rows]
        options = {"shuffle": False, "verbose": 0, "callbacks": [clock.callback]}
        model.fit(images, labels, batch_size=n, epochs=epochs, **options)
        run.seconds = clock.seconds * steps * n / (rows * epochs)

    return loss, run, 1


class Clock:
    """Takes the time of fit's epochs, without what fit does before and after them."""

    def __init__(self):
        import keras

        self.callback = keras.callbacks.LambdaCallback(
            on_train_begin=self._begin, on_epoch_end=self._end
        )
        self.callback.on_epoch_begin = self._start
        self.seconds, self._started = 0.0, None

    def _begin(self, logs):
        self.seconds, self._started = 0.0, None

    def _start(self, epoch, logs=None):
        if self._started is None:
            self._started = time.perf_counter()

    def _end(self, epoch, logs):
        self.seconds = time.perf_counter() - self._started


def penalized_layers(job: Job, model):
    """The layers whose kernels the article's network penalises."""
    import keras

    dense = [layer for layer in model.layers if isinstance(layer, keras.layers.Dense)]
    return [] if "zoo" in job.settings else dense


def optimizer_of(job: Job):
    import keras

    if "zoo" in job.settings:
        return keras.optimizers.SGD(SGD_RATE, momentum=MOMENTUM)
    return keras.optimizers.RMSprop(RATE, RHO, epsilon=EPSILON)


def loss_of(job: Job):
    import keras

    return keras.losses.SparseCategoricalCrossentropy(from_logits="zoo" in job.settings)


def penalized(job: Job, model, x, y):
    """(the loss of a batch in training with its penalties, what the model gives)."""
    import tensorflow as tf

    predictions, loss = model(x, training=True), loss_of(job)
    total = loss(y, predictions)
    kernels = [layer.kernel for layer in penalized_layers(job, model)]
    if kernels:
        total += job.network["l2"] * tf.add_n([tf.reduce_sum(tf.square(k)) for k in kernels])
    return total, predictions


def tf_guide(job: Job):
    """The loop of TensorFlow's guide: tf.data, a tf.function step, a Keras optimizer and metric."""
    import tensorflow as tf

    set_up(job)
    import keras

    model, optimizer = model_of(job), optimizer_of(job)
    metric = keras.metrics.SparseCategoricalAccuracy()
    dataset = (
        tf.data.Dataset.from_tensor_slices((job.images, job.labels))
        .repeat()
        .batch(job.batch_size)
        .prefetch(tf.data.AUTOTUNE)
    )

    @tf.function
    def train_step(x, y):
        with tf.GradientTape() as tape:
            loss, predictions = penalized(job, model, x, y)
        optimizer.apply_gradients(
            # AutoGraph's zip takes no `strict`.
            zip(tape.gradient(loss, model.trainable_weights), model.trainable_weights)  # noqa: B905
        )
        metric.update_state(y, predictions)
        return loss

    def run(steps):
        for x, y in dataset.take(steps):
            loss = train_step(x, y)
        loss.numpy()

    n = job.batch_size
    return float(penalized(job, model, job.images[:n], job.labels[:n])[0]), run, 1


def elsewhere(module: str, **options) -> Callable:
    """A contender of a file of its own, which is imported when it runs."""
    return lambda job: importlib.import_module(module).contender(job, **options)


def floor(job: Job):
    """What the processors could do: the job's multiplications at the rate of a 1024² matmul on each
    core at once."""
    import tensorflow as tf

    from tfloop.machine.devices import cores

    set_up(job, 1, cores())
    flop = flop_per_image(model_of(job)) * job.batch_size
    start = [tf.random.stateless_normal([1024, 1024], [0, k]) / 32 for k in range(cores())]

    @tf.function
    def multiply(times):
        def body(i, *products):
            return (i + 1, *(tf.matmul(a, p) for a, p in zip(start, products, strict=True)))

        return tf.while_loop(lambda i, *_: i < times, body, (tf.constant(0), *start))[1]

    def run(steps):
        times = max(1, round(steps * flop / (2 * 1024**3 * len(start))))
        multiply(tf.constant(times)).numpy()
        run.scale = steps * flop / (times * 2 * 1024**3 * len(start))

    run.scale = 1.0
    return None, run, 100


def flop_per_image(model) -> float:
    """Multiplications and additions of one image's forward and backward pass, for convolutions and
    dense layers.

    Backward costs as much again for the kernel, and as much for the input, but for the first
    layer's.
    """
    total = 0
    for index, layer in enumerate(
        layer for layer in model.layers if getattr(layer, "kernel", None) is not None
    ):
        places = (
            layer.output.shape[1] * layer.output.shape[2] if len(layer.output.shape) == 4 else 1
        )
        total += 2 * places * layer.kernel.shape.num_elements() * (2 if index == 0 else 3)
    return total


CONTENDERS: dict[str, Callable[[Job], Any]] = {
    "tfloop": tfloop,
    "tfloop, XLA": lambda job: tfloop(job, jit_compile=True),
    "tfloop, without start": lambda job: tfloop(job, started=False),
    "side by side": side_by_side,
    "floor": floor,
    "keras fit": keras_fit,
    "keras fit, 50 steps": lambda job: keras_fit(job, steps_per_execution=50),
    "keras fit, 50 steps, primitives kept": lambda job: keras_fit(
        job, kept=True, steps_per_execution=50
    ),
    "keras fit, 50 steps, one thread an op": lambda job: keras_fit(
        job, intra=1, inter=2, steps_per_execution=50
    ),
    "keras fit, 50 steps, oneDNN off": lambda job: keras_fit(
        job, onednn="0", steps_per_execution=50
    ),
    "keras fit, XLA": lambda job: keras_fit(job, jit_compile=True),
    "TensorFlow guide": tf_guide,
    "PyTorch": elsewhere("torch_contender"),
    "PyTorch, channels last": elsewhere("torch_contender", channels_last=True),
    "PyTorch, compiled": elsewhere("torch_contender", compiled=True),
    "PyTorch, CUDA graphs": elsewhere("torch_contender", captured=True),
    "JAX": elsewhere("jax_contender"),
    "JAX, lax.scan": elsewhere("jax_contender", steps_per_call=50),
}
ON_A_CPU = (
    "keras fit, 50 steps, primitives kept",
    "keras fit, 50 steps, one thread an op",
    "keras fit, 50 steps, oneDNN off",
)
ON_A_GPU = (
    "PyTorch, CUDA graphs",
    "JAX, lax.scan",
)  # in a loop on a CPU, XLA's gradients of convolutions fall to a naive one


def main() -> None:
    name, job = sys.argv[1], read(sys.argv[2])
    os.environ.setdefault(
        "TF_ENABLE_ONEDNN_OPTS", "0" if job.settings.get("onednn") == "off" else "1"
    )

    def memory():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    try:
        loss, run, least = CONTENDERS[name](job)
    except ModuleNotFoundError as error:
        print(json.dumps({"missing": error.name}), flush=True)
        return
    own = [name for name in ("tensorflow", "torch", "jax") if name in sys.modules]
    print(json.dumps({"loss": loss, "least": least, "imported": own}), flush=True)
    for line in sys.stdin:
        started = time.perf_counter()
        run(int(line))
        seconds = getattr(run, "seconds", time.perf_counter() - started)
        seconds *= getattr(run, "scale", 1.0)
        print(json.dumps({"seconds": seconds, "memory_mib": memory()}), flush=True)


if __name__ == "__main__":
    main()
