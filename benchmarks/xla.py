"""How a GPU is kept busy between operations: the step as one XLA program per call, with CUDA graphs
(XLA's command buffers) around its loop, unrolled, or a call a step; and several models as stacked
weights, one operation for all, against side by side.

On a CPU, `--rehearse` runs all of it once, so that no time on a GPU machine is lost to a mistake.
"""

import os
import statistics
import time

from race import (
    Contender,
    arguments,
    describe,
    environment,
    race,
    ratios,
    save,
    start_quietly,
    table,
    with_interval,
)

GRAPHS = "--xla_gpu_graph_min_graph_size=1 --xla_gpu_enable_command_buffer="
VARIANTS = {
    "XLA, all steps of a call": ({}, ""),
    "with command buffers of loops": ({}, f"{GRAPHS}+WHILE,+CONDITIONAL"),
    "with loops unrolled": (
        {},
        "--xla_gpu_enable_while_loop_unrolling=WHILE_LOOP_UNROLLING_FULL_UNROLL",
    ),
    "a call a step": ({"steps_per_call": 1}, ""),
    "a call a step, with command buffers": ({"steps_per_call": 1}, f"{GRAPHS}+FUSION"),
    "without XLA": ({"jit_compile": False}, ""),
}


def stacked(members: int, repeats: int) -> dict[str, list[float]]:
    """ms of a step of all members of the article's network, SGD: stacked and side by side."""
    import tensorflow as tf

    def of(seed, *shape):
        return tf.Variable(0.1 * tf.random.stateless_normal(shape, [seed, 0]))

    shapes = [(3, 3, 1, 32), (3, 3, 32, 64), (3, 3, 64, 64), (576, 70), (70, 10)]
    of_all = [[of(i, *shape) for i, shape in enumerate(shapes)] for _ in range(members)]
    # The members' kernels stand beside each other as groups of channels; dense ones are stacked.
    one = [of(i, *shape[:-1], members * shape[-1]) for i, shape in enumerate(shapes[:3])]
    one += [of(i, members, *shape) for i, shape in enumerate(shapes[3:], 3)]
    images, labels = tf.random.normal([64, 28, 28, 1]), tf.range(64) % 10

    def convolved(kernels, x):
        for kernel, pool in zip(kernels, (2, 2, 1), strict=True):
            x = tf.nn.relu(tf.nn.conv2d(x, kernel, 1, "VALID"))
            x = tf.nn.max_pool2d(x, pool, pool, "VALID") if pool > 1 else x
        return x

    def loss(w):
        x = tf.reshape(convolved(w[:3], images), [64, -1])
        logits = tf.nn.relu(x @ w[3]) @ w[4]
        return tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits))

    def loss_of_stack(w):
        x = convolved(w[:3], tf.tile(images, [1, 1, 1, members]))
        x = tf.reshape(x, [64, 9, members, 64])
        x = tf.reshape(tf.transpose(x, [2, 0, 1, 3]), [members, 64, 576])
        logits = tf.nn.relu(x @ w[3]) @ w[4]
        repeated = tf.tile(labels[None], [members, 1])
        each = tf.nn.sparse_softmax_cross_entropy_with_logits(repeated, logits)
        return tf.reduce_sum(tf.reduce_mean(each, axis=1))

    def update(w, loss):
        with tf.GradientTape() as tape:
            value = loss(w)
        for variable, gradient in zip(w, tape.gradient(value, w), strict=True):
            variable.assign_sub(0.01 * gradient)
        return value

    @tf.function(jit_compile=True, autograph=False)
    def side_by_side():
        return tf.add_n([update(w, loss) for w in of_all])

    @tf.function(jit_compile=True, autograph=False)
    def as_one():
        return update(one, loss_of_stack)

    difference = abs(float(loss(of_all[0])) * members - float(side_by_side()))
    if difference > 1e-3:
        raise SystemExit(f"the members side by side compute another loss, {difference:.2g} off")
    times: dict[str, list[float]] = {"stacked": [], "side by side": []}
    steps = {"stacked": as_one, "side by side": side_by_side}
    for turn in range(repeats + 1):
        for name, step in steps.items():
            started = time.perf_counter()
            for _ in range(20):
                value = step()
            value.numpy()  # waits for the device
            if turn:
                times[name].append(1000 * (time.perf_counter() - started) / 20)
    return times


def main() -> None:
    parser = arguments(__doc__.splitlines()[0], rounds=5, seconds=0.5)
    parser.add_argument("--rehearse", action="store_true", help="also without a GPU")
    parser.add_argument("--members", type=int, default=8)
    options = parser.parse_args()
    found = environment()
    if not found["gpus"] and not options.rehearse:
        raise SystemExit("this needs a GPU; --rehearse runs it on the CPU all the same")
    contenders = []
    for label, (settings, flags) in VARIANTS.items():
        os.environ["XLA_FLAGS"] = flags
        try:
            contenders.append(Contender("tfloop", {"jit_compile": True, **settings}, label))
        except SystemExit as error:  # a flag that this version does not know
            print(f"left out: {error}")
    os.environ.pop("XLA_FLAGS")
    race(contenders, options.seconds, options.rounds)
    rows = []
    for contender in contenders:
        contender.close()
        rows.append(
            [
                contender.label,
                "{:.3f} ({:.3f}–{:.3f})".format(*with_interval(contender.turns)),
                "{:.2f} ({:.2f}–{:.2f})".format(*ratios(contender, contenders[0])),
            ]
        )
    start_quietly(device="auto" if found["gpus"] else "cpu")
    together = stacked(options.members, options.rounds)
    print(describe(found) + "\n")
    print(table(["the default job", "ms per step (95 %)", "÷ first"], rows) + "\n")
    cells = [[name, f"{statistics.median(times):.3f}"] for name, times in together.items()]
    print(table([f"{options.members} models, XLA", "ms for a step of all"], cells))
    results = {"variants": {c.label: c.turns for c in contenders}, "together": together}
    save("xla", options.out, {"environment": found, "rehearsal": not found["gpus"], **results})


if __name__ == "__main__":
    main()
