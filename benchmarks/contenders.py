"""Who is measured: tfloop and its rivals on one job, each a process of its own that runs when it is
told to.

    python benchmarks/contenders.py NAME '{"batch_size": 64, …}'

The job: the network, weights, order of images, RMSprop and L2 penalty that the settings describe.
A contender prints one JSON line when it is ready: its loss on the first batch with the initial
weights, and its peak memory so far. Then, for each line "N" on its standard input, it trains N
steps, waits for the device, and prints the seconds they took. Where it can only make some more
(whole calls, say), it says in `run.scale` what share N is of them.
"""

import json
import os
import resource
import sys
import time

RATE, RHO, EPSILON = 0.001, 0.9, 1e-7


class Job:
    """The data, weights and settings that all contenders share."""

    def __init__(self, settings: dict):
        from tfloop.config import Config

        self.settings = settings
        self.config = Config.make(**{"l2": 0.001, **settings})

    def start(self):
        """Start TensorFlow as `train` does; the config with what that chose for this machine."""
        from tfloop.machine.devices import start

        self.config = start(self.config).config
        return self.config

    def arrays(self):
        """(standardised images float32 in the order of the first epoch, labels, initial weights by
        name)."""
        import numpy as np

        from tfloop import assembly, models
        from tfloop.data import pipelines

        data = assembly.load_data(self.config)
        self.data = data
        order = pipelines.order(self.config.seed, 0, len(data.train)).numpy()
        images = (
            data.train.inputs[order].astype(np.float32) - data.standardizer.mean
        ) / data.standardizer.scale
        model = models.build(self.config, data.image_shape, data.classes)
        weights = {name: v.numpy() for name, v in models.named_variables(model)[0].items()}
        return images, data.train.targets[order].astype("int64"), weights


def set_up(config, intra: int = 0, inter: int = 0, gpu: bool = True):
    """TensorFlow's settings for a rival; without `gpu` it makes the arrays alone, and leaves the
    GPU to that rival."""
    import tensorflow as tf

    if not gpu:
        tf.config.set_visible_devices([], "GPU")
    tf.config.experimental.enable_tensor_float_32_execution(config.precision == "tf32")
    tf.config.threading.set_intra_op_parallelism_threads(intra)
    tf.config.threading.set_inter_op_parallelism_threads(inter)


def tfloop(job: Job):
    """tfloop as `train` runs it. The settings choose the rest: fast, shards, threads, eager,
    jit_compile, pipeline."""
    config = job.start()
    import tfloop
    from tfloop.data.pipelines import batch_at

    loop = tfloop.make_loop(config)
    first = batch_at(loop.data.train, job.config.batch_size, job.config.seed, 0, 0)
    loss = float(tfloop.forward_and_backward(loop.state, first, forward=loop.forward).loss.total)
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
    config = job.start()
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
    make = SideBySide(loops).make if len(loops) > 1 else lambda calls: calls[0].make()

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
    set_up(job.config, intra, inter)
    import keras

    from tfloop import models

    images, labels, _ = job.arrays()
    model = models.build(job.config, job.data.image_shape, job.data.classes)
    for layer in model.layers:
        if isinstance(layer, keras.layers.Dense):
            layer.kernel.regularizer = keras.regularizers.L2(job.config.l2)
    model.compile(
        keras.optimizers.RMSprop(RATE, RHO, epsilon=EPSILON),
        "sparse_categorical_crossentropy",
        metrics=["accuracy"],
        **compile_options,
    )
    n = job.config.batch_size
    loss = float(model.evaluate(images[:n], labels[:n], batch_size=n, verbose=0)[0])

    def run(steps):
        rows = min(steps * n, len(images))
        model.fit(images[:rows], labels[:rows], batch_size=n, shuffle=False, verbose=0)

    return loss, run, 1


def tf_guide(job: Job):
    """The loop of TensorFlow's guide: tf.data, a tf.function step, a Keras optimizer and metric."""
    import tensorflow as tf

    set_up(job.config)
    import keras

    from tfloop import models

    images, labels, _ = job.arrays()
    model = models.build(job.config, job.data.image_shape, job.data.classes)
    optimizer = keras.optimizers.RMSprop(RATE, RHO, epsilon=EPSILON)
    loss_function, metric = (
        keras.losses.SparseCategoricalCrossentropy(),
        keras.metrics.SparseCategoricalAccuracy(),
    )
    kernels = [layer.kernel for layer in model.layers if isinstance(layer, keras.layers.Dense)]
    dataset = (
        tf.data.Dataset.from_tensor_slices((images, labels))
        .batch(job.config.batch_size)
        .prefetch(tf.data.AUTOTUNE)
    )

    def loss_of(x, y):
        predictions = model(x, training=True)
        return loss_function(y, predictions) + job.config.l2 * tf.add_n(
            [tf.reduce_sum(tf.square(k)) for k in kernels]
        ), predictions

    @tf.function
    def train_step(x, y):
        with tf.GradientTape() as tape:
            loss, predictions = loss_of(x, y)
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

    n = job.config.batch_size
    return float(loss_of(images[:n], labels[:n])[0]), run, 1


def torch_eager(job: Job, channels_last=False, compiled=False, captured=False):
    """The usual PyTorch loop on tensors in memory; `captured`: its step is one CUDA graph."""
    import torch
    from torch import nn

    if captured and not torch.cuda.is_available():
        raise SystemExit("PyTorch sees no GPU")
    set_up(job.config, gpu=False)
    images, labels, weights = job.arrays()
    config, shape = job.config, job.data.image_shape
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = (
        config.precision == "tf32"
    )
    if config.batch_norm or config.padding == "same" or len(set(config.kernel)) > 1:
        raise SystemExit("this contender knows the default network only")
    layers, channels, size = [], shape[2], shape[0]
    for i, filters in enumerate(config.conv):
        layers += [nn.Conv2d(channels, filters, config.kernel[0]), nn.ReLU()]
        channels, size = filters, size - config.kernel[0] + 1
        if i < len(config.pool) and config.pool[i] > 1:
            layers.append(nn.MaxPool2d(config.pool[i]))
            size //= config.pool[i]
    layers.append(nn.Flatten())
    inputs, spatial = channels * size * size, (size, size, channels)
    for units in config.dense:
        layers += [nn.Linear(inputs, units), nn.ReLU()]
        inputs = units
    model = nn.Sequential(*layers, nn.Linear(inputs, job.data.classes))
    convolutions = iter([m for m in model if isinstance(m, nn.Conv2d)])
    linears = [m for m in model if isinstance(m, nn.Linear)]
    with torch.no_grad():
        dense = iter(linears)
        for name, value in weights.items():
            if not name.endswith("kernel"):
                continue
            if value.ndim == 4:
                module, value = next(convolutions), value.transpose(3, 2, 0, 1)
            else:
                module = next(dense)
                if module is linears[0]:  # rows in the order of PyTorch's flatten
                    value = (
                        value.reshape(*spatial, -1)
                        .transpose(2, 0, 1, 3)
                        .reshape(-1, value.shape[1])
                    )
                value = value.T
            module.weight.copy_(torch.from_numpy(value.copy()))
            module.bias.zero_()
    x = torch.from_numpy(images.transpose(0, 3, 1, 2).copy()).to(device)
    y, model = torch.from_numpy(labels).to(device), model.to(device)
    if channels_last:
        model, x = (
            model.to(memory_format=torch.channels_last),
            x.contiguous(memory_format=torch.channels_last),
        )
    optimizer = torch.optim.RMSprop(
        model.parameters(), lr=RATE, alpha=RHO, eps=EPSILON, capturable=captured
    )
    criterion = nn.CrossEntropyLoss()

    def loss_of(x, y):
        return criterion(model(x), y) + config.l2 * sum(m.weight.square().sum() for m in linears)

    forward = torch.compile(loss_of) if compiled else loss_of
    n = config.batch_size

    def train_step(x, y):
        optimizer.zero_grad(set_to_none=True)
        loss = forward(x, y)
        loss.backward()
        optimizer.step()
        return loss

    with torch.no_grad():
        first_loss = loss_of(x[:n], y[:n]).item()
    step = capture(train_step, x[:n].clone(), y[:n].clone()) if captured else train_step

    def run(steps):
        for i in range(steps):
            loss = step(x[i * n : (i + 1) * n], y[i * n : (i + 1) * n])
        loss.item()

    return first_loss, run, 1


def capture(step, x, y):
    """`step` as a CUDA graph, after three warm-up steps; it reads every batch from where `x` and
    `y` are."""
    import torch

    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            step(x, y)
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step(x, y)

    def replay(images, labels):
        x.copy_(images)
        y.copy_(labels)
        graph.replay()
        return loss

    return replay


def jax_jit(job: Job, steps_per_call=1):
    """A jitted JAX step, with convolutions in NHWC and RMSprop written out; several to a call are a
    `lax.scan`."""
    import jax
    import jax.numpy as jnp

    set_up(job.config, gpu=False)
    images, labels, weights = job.arrays()
    config, n = job.config, job.config.batch_size
    jax.config.update(
        "jax_default_matmul_precision", "tensorfloat32" if config.precision == "tf32" else "float32"
    )
    if config.batch_norm or config.padding == "same":
        raise SystemExit("this contender knows the default network only")
    x, y = jnp.asarray(images), jnp.asarray(labels)

    def forward(w, x):
        for i in range(1, len(config.conv) + 1):
            x = jax.lax.conv_general_dilated(
                x, w[f"conv{i}/kernel"], (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            x = jax.nn.relu(x + w[f"conv{i}/bias"])
            if i <= len(config.pool) and (p := config.pool[i - 1]) > 1:
                x = jax.lax.reduce_window(
                    x, -jnp.inf, jax.lax.max, (1, p, p, 1), (1, p, p, 1), "VALID"
                )
        x = x.reshape(x.shape[0], -1)
        for i in range(1, len(config.dense) + 1):
            x = jax.nn.relu(x @ w[f"dense{i}/kernel"] + w[f"dense{i}/bias"])
        return x @ w["output/kernel"] + w["output/bias"]

    def loss_of(w, x, y):
        log_p = jax.nn.log_softmax(forward(w, x))
        penalty = sum(
            jnp.sum(jnp.square(v)) for k, v in w.items() if k.endswith("kernel") and v.ndim == 2
        )
        return -jnp.mean(jnp.take_along_axis(log_p, y[:, None], axis=1)) + config.l2 * penalty

    def step(w, s, i):
        xb, yb = (jax.lax.dynamic_slice_in_dim(a, i * n, n) for a in (x, y))
        loss, g = jax.value_and_grad(loss_of)(w, xb, yb)
        s = {k: RHO * s[k] + (1 - RHO) * g[k] ** 2 for k in w}
        return {k: w[k] - RATE * g[k] * jax.lax.rsqrt(s[k] + EPSILON) for k in w}, s, loss

    state = [
        {k: jnp.asarray(v) for k, v in weights.items()},
        {k: jnp.zeros_like(v) for k, v in weights.items()},
    ]

    @jax.jit
    def call(w, s, i):
        if steps_per_call == 1:
            return step(w, s, i)

        def scanned(state, i):
            *state, loss = step(*state, i)
            return state, loss

        state, losses = jax.lax.scan(scanned, [w, s], i + jnp.arange(steps_per_call))
        return *state, losses[-1]

    def run(steps):
        for i in range(0, steps, steps_per_call):
            *state[:], loss = call(*state, i)
        loss.block_until_ready()

    return float(loss_of(state[0], x[:n], y[:n])), run, steps_per_call


def floor(job: Job):
    """What the processors could do: the job's multiplications at the rate of a 1024² matmul on each
    core at once."""
    import tensorflow as tf

    from tfloop import assembly, models
    from tfloop.machine.devices import cores

    set_up(job.config, 1, cores())
    data = assembly.load_data(job.config.replace(standardize=False))
    model = models.build(job.config, data.image_shape, data.classes)
    flop = flop_per_image(model) * job.config.batch_size
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


CONTENDERS = {
    "tfloop": tfloop,
    "tfloop, XLA": lambda job: tfloop(Job({**job.settings, "jit_compile": True})),
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
    "PyTorch": torch_eager,
    "PyTorch, channels last": lambda job: torch_eager(job, channels_last=True),
    "PyTorch, compiled": lambda job: torch_eager(job, compiled=True),
    "PyTorch, CUDA graphs": lambda job: torch_eager(job, captured=True),
    "JAX": jax_jit,
    "JAX, lax.scan": lambda job: jax_jit(job, steps_per_call=50),
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
    name, settings = sys.argv[1], json.loads(sys.argv[2])
    onednn = "0" if settings.get("onednn") == "off" else "1"
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", onednn)

    def memory():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    try:
        loss, run, least = CONTENDERS[name](Job(settings))
    except ModuleNotFoundError as error:
        print(json.dumps({"missing": error.name}), flush=True)
        return
    print(json.dumps({"loss": loss, "least": least}), flush=True)
    for line in sys.stdin:
        started = time.perf_counter()
        run(int(line))
        seconds = (time.perf_counter() - started) * getattr(run, "scale", 1.0)
        print(json.dumps({"seconds": seconds, "memory_mib": memory()}), flush=True)


if __name__ == "__main__":
    main()
