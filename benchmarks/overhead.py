"""The loop's own cost per step, and what its summaries cost.

First a model with one weight on images of one pixel, where nothing is left but the loop, against a
bare tf.function that does the same update, called once a step, and against Keras's fit. Then
epochs of the default job, as `train` runs them, with each level of --summaries.
"""

import statistics
import tempfile
import time

from race import arguments, describe, environment, save, start_quietly, table, with_interval

STEPS = 500


def contestants() -> dict:
    """name → a function that trains STEPS steps."""
    import keras
    import numpy as np
    import tensorflow as tf

    import tfloop

    class Nothing(tf.Module):
        def __init__(self):
            super().__init__()
            self.w = tf.Variable(tf.zeros([1, 2]), name="w")

        def __call__(self, images):
            return tf.reshape(images, [-1, 1]) @ self.w

    x, y = np.ones((STEPS, 1, 1), np.uint8), np.arange(STEPS) % 2
    data = tfloop.from_arrays(x, y, x[:2], y[:2])

    def loop(**settings):
        made = tfloop.Loop(tfloop.TrainState(Nothing(), "sgd", 0.0), data, batch_size=1, **settings)

        def run():
            for _ in made.train_epoch():
                pass
            made.state.epoch.assign_add(1)
            made.state.batch_index.assign(0)

        return run

    model, images, labels = Nothing(), tf.ones([1, 1]), tf.constant([0])

    @tf.function
    def step():
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(
                tf.nn.sparse_softmax_cross_entropy_with_logits(labels, model(images))
            )
        model.w.assign_sub(0.0 * tape.gradient(loss, model.w))
        return loss

    def bare():
        for _ in range(STEPS):
            loss = step()
        loss.numpy()

    def fit(**options):
        built = keras.Sequential([keras.Input((1,)), keras.layers.Dense(2, use_bias=False)])
        built.compile(
            keras.optimizers.SGD(0.0),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            **options,
        )
        flat = x.reshape(-1, 1).astype("float32")
        return lambda: built.fit(flat, y, batch_size=1, verbose=0, shuffle=False)

    return {
        "tfloop, 50 steps a call": loop(),
        "tfloop, 1 step a call": loop(steps_per_call=1),
        "tfloop, host pipeline": loop(pipeline="host"),
        "tfloop, eager": loop(eager=True),
        "bare tf.function": bare,
        "keras fit": fit(),
        "keras fit, 50 steps": fit(steps_per_execution=50),
    }


def summaries(rounds: int, config) -> dict[str, list[tuple[float, float, float]]]:
    """level → (seconds of an epoch with its summaries, of these in summaries, seconds at the end of
    the run), by round."""
    import tfloop
    from tfloop.inspection.summaries import LEVELS, Summaries

    loop = tfloop.make_loop(config)
    found = {level: [] for level in LEVELS}
    for turn in range(rounds + 1):
        for level in LEVELS:
            loop.state.begin(0)
            with tempfile.TemporaryDirectory() as folder, Summaries(folder, loop, level) as written:
                started, inside = time.perf_counter(), 0.0
                for record in loop.run(1):
                    before = time.perf_counter()
                    written.write(record)
                    inside += time.perf_counter() - before
                epoch = time.perf_counter() - started
                before = time.perf_counter()
                written.finish()
                if turn:
                    found[level].append((epoch, inside, time.perf_counter() - before))
    return found


def main() -> None:
    options = arguments(__doc__.splitlines()[0], rounds=7).parse_args()
    config = start_quietly()
    costs = summaries(options.rounds, config)
    runs = contestants()
    turns = {name: [] for name in runs}
    for turn in range(options.rounds + 1):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            if turn:
                turns[name].append(1e6 * (time.perf_counter() - started) / STEPS)
    found = environment()
    print(describe(found) + "\n")
    print(
        table(
            ["one weight, one pixel", "µs per step, median (95 %)"],
            [
                [name, "{:.0f} ({:.0f}–{:.0f})".format(*with_interval(values))]
                for name, values in turns.items()
            ],
        )
    )
    rows = []
    for level, times in costs.items():
        ratio = with_interval(
            [epoch / none for (epoch, _, _), (none, _, _) in zip(times, costs["none"], strict=True)]
        )

        def median(column, times=times):
            return statistics.median(time[column] for time in times)

        rows.append(
            [
                level,
                f"{median(0):.2f}",
                "{:.3f} ({:.3f}–{:.3f})".format(*ratio),
                f"{100 * median(1) / (median(0) - median(1)):.1f} %",
                f"{median(2):.2f}",
            ]
        )
    print(
        "\n"
        + table(
            [
                "--summaries",
                "s an epoch",
                "÷ none, median of pairs (95 %)",
                "time in summaries ÷ the rest",
                "s at the end of a run",
            ],
            rows,
        )
    )
    save(
        "overhead",
        options.out,
        {
            "environment": found,
            "us_per_step": turns,
            "summaries": {
                level: [
                    dict(zip(("epoch_s", "in_summaries_s", "at_end_s"), time, strict=True))
                    for time in times
                ]
                for level, times in costs.items()
            },
        },
    )


if __name__ == "__main__":
    main()
