"""The fast forward pass against its plain twin, for many shapes of model and batch: forward,
gradient, whole step.

Forward and gradient are timed in one process, with TensorFlow's own threads, so that they show
what the order of operations buys by itself. The whole step is timed as `train` runs it, with the
shards and threads it chooses, against `train --nofast --shards=1`, in processes that take turns.
"""

import functools
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

SHAPES = {
    "article2, batch 64": {},
    "batch 32": {"batch_size": 32},
    "batch 128": {"batch_size": 128},
    "batch 256": {"batch_size": 256},
    "batch 1024": {"batch_size": 1024},
    "64-64-128-120": {"conv": [64, 64, 128], "dense": [120]},
    "batch normalisation": {"batch_norm": True},
    "5×5 kernels": {"kernel": [5, 3, 3]},
    "padding same": {"padding": "same"},
    "odd: 27×25, colour": {"shape": [27, 25, 3]},
}


def alone(settings: dict, shape, repeats: int) -> dict[str, tuple[float, float]]:
    """{"forward", "gradient"}: (ms of the twin, ms of the fast pass), medians of interleaved
    repeats."""
    import tensorflow as tf

    from tfloop import models
    from tfloop.config import Config
    from tfloop.randomness import Key

    config = Config.make(**settings)
    model = models.build(config, tuple(shape), 10)
    weights = list(models.named_variables(model)[0].values())
    images = tf.random.stateless_normal([config.batch_size, *shape], [0, 0])

    def make(forward, gradient):
        @tf.function(autograph=False)
        def call():
            with tf.GradientTape() as tape:
                loss = tf.nn.l2_loss(forward(model, images, True, Key(tf.zeros([2], tf.int64))))
            return tape.gradient(loss, weights) if gradient else loss

        return call

    found = {}
    for what, gradient in (("forward", False), ("gradient", True)):
        passes = models.outputs, functools.partial(models.outputs, fast=True)
        calls, times = [make(forward, gradient) for forward in passes], ([], [])
        for _ in range(repeats + 3):
            for call, kept in zip(calls, times, strict=True):
                started = time.perf_counter()
                tf.nest.flatten(call())[0].numpy()
                kept.append(1000 * (time.perf_counter() - started))
        found[what] = tuple(statistics.median(kept[3:]) for kept in times)
    return found


def main() -> None:
    parser = arguments(__doc__.splitlines()[0], rounds=5, seconds=1.0)
    parser.add_argument("--only", default="", help="a part of the shapes' names")
    options = parser.parse_args()
    start_quietly(shards=1)  # which leaves the threads to TensorFlow
    rows, results = [], {}
    for label, settings in SHAPES.items():
        if options.only not in label:
            continue
        settings = dict(settings)
        shape = settings.pop("shape", None)
        found = alone(settings, shape or (28, 28, 1), 30)
        cells = [
            f"{plain:.2f} → {fast:.2f} ({plain / fast:.2f}×)" for plain, fast in found.values()
        ]
        results[label] = {"ms": found}
        if shape:
            cells.append("")
        else:
            pair = [
                Contender("tfloop", settings),
                Contender("tfloop", {**settings, "fast": False, "shards": 1}, "plain"),
            ]
            race(pair, options.seconds, options.rounds)
            for contender in pair:
                contender.close()
            ratio = ratios(pair[1], pair[0])
            cells.append(
                f"{with_interval(pair[1].turns)[0]:.2f} → {with_interval(pair[0].turns)[0]:.2f} "
                f"({ratio[0]:.2f}×, {ratio[1]:.2f}–{ratio[2]:.2f})"
            )
            results[label] |= {
                "step": {"fast": pair[0].turns, "plain": pair[1].turns, "ratio": ratio}
            }
        rows.append([label, *cells])
    found = environment()
    print(describe(found) + "\n")
    print(table(["ms, plain → fast", "forward", "forward and gradient", "whole step"], rows))
    save("ops", options.out, {"environment": found, "results": results})


if __name__ == "__main__":
    main()
