"""One search twice: `tfloop sweep`, in one trace, and Keras, which builds, compiles and traces a
model for every trial.

Both train the same trials on the same images and choose by the same validation images. Each is one
process, timed from its first trial to its last: start-up and loading are left out, everything else
counts.
"""

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from race import HERE, arguments, describe, environment, save, table

GRID = {"l2": (0.0, 0.0008, 0.001), "momentum": (0.5, 0.8, 0.9)}


def by_tfloop(options) -> dict:
    """Seconds a trial, and the validation accuracy of each."""
    with tempfile.TemporaryDirectory() as folder:
        grid = " ".join(f"{name}={','.join(map(str, values))}" for name, values in GRID.items())
        subprocess.run(
            [
                sys.executable,
                "-m",
                "tfloop",
                "sweep",
                f"--grid={grid}",
                f"--epochs={options.epochs}",
                f"--ensemble={options.ensemble}",
                f"--logdir={folder}",
                f"--validation_size={options.validation_size}",
            ],
            check=True,
            cwd=HERE.parent,
            stdout=subprocess.DEVNULL,
        )
        sweep = next(Path(folder).iterdir())
        ranking = json.loads((sweep / "ranking.json").read_text())
        results = [
            json.loads((trial / "result.json").read_text())
            for trial in sorted(sweep.glob("trial-*"))
        ]
    trials = ranking["trained_here"]
    return {
        "seconds": ranking["seconds_here"] / trials,
        "steps": statistics.fmean(result["seconds"]["training"] for result in results),
        "traces": ranking["traces"],
        "accuracy": [result["final"]["validation"]["accuracy"] for result in results],
    }


def by_keras(epochs: int, validation_size: int, steps_per_execution: int) -> dict:
    """The same with model.fit; runs in a process of its own."""
    import os

    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
    import keras

    from tfloop import assembly, models
    from tfloop.config import Config

    config = Config.make(validation_size=validation_size)
    data = assembly.load_data(config)

    def scaled(images):
        return (images.astype("float32") - data.standardizer.mean) / data.standardizer.scale

    x, y, held_out = (
        scaled(data.train.inputs),
        data.train.targets,
        (scaled(data.validation.inputs), data.validation.targets),
    )
    # TensorFlow is up before the clock runs.
    model = models.build(config, data.image_shape, data.classes)
    model.predict(x[:64], verbose=0)
    accuracies, started = [], time.perf_counter()
    for l2, momentum in itertools.product(*GRID.values()):
        keras.backend.clear_session()
        model = models.build(config, data.image_shape, data.classes)
        for layer in model.layers:
            if isinstance(layer, keras.layers.Dense):
                layer.kernel.regularizer = keras.regularizers.L2(l2)
        model.compile(
            keras.optimizers.RMSprop(0.001, momentum=momentum),
            "sparse_categorical_crossentropy",
            metrics=["accuracy"],
            steps_per_execution=steps_per_execution,
        )
        model.fit(x, y, batch_size=64, epochs=epochs, verbose=0)
        accuracies.append(model.evaluate(*held_out, batch_size=256, verbose=0)[1])
    return {"seconds": (time.perf_counter() - started) / len(accuracies), "accuracy": accuracies}


def main() -> None:
    parser = arguments(__doc__.splitlines()[0], rounds=3)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--validation_size", type=int, default=10000)
    parser.add_argument("--ensemble", type=int, default=1, help="trials of tfloop's side by side")
    parser.add_argument("--keras", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.keras:
        print(json.dumps(by_keras(options.epochs, options.validation_size, options.keras)))
        return

    def keras(steps):
        return json.loads(
            subprocess.run(
                [
                    sys.executable,
                    __file__,
                    f"--epochs={options.epochs}",
                    f"--validation_size={options.validation_size}",
                    f"--keras={steps}",
                ],
                check=True,
                capture_output=True,
                text=True,
            ).stdout.splitlines()[-1]
        )

    searches = {
        "tfloop sweep": lambda: by_tfloop(options),
        "Keras, rebuilt for each trial": lambda: keras(1),
        "Keras, rebuilt, 50 steps an execution": lambda: keras(50),
    }
    turns = {name: [] for name in searches}
    for _ in range(options.rounds):
        for name, search in searches.items():
            turns[name].append(search())
    found, trials = environment(), len(list(itertools.product(*GRID.values())))
    print(
        f"{describe(found)}; {trials} trials of {options.epochs} epochs, {options.rounds} rounds\n"
    )
    ours = statistics.median(turn["seconds"] for turn in turns["tfloop sweep"])
    rows = []
    for name, results in turns.items():
        seconds = statistics.median(turn["seconds"] for turn in results)
        rows.append(
            [
                name,
                f"{seconds:.2f}",
                f"{seconds / ours:.2f}",
                f"{100 * statistics.fmean(results[0]['accuracy']):.2f} %",
                results[0].get("traces", trials),
            ]
        )
    print(
        table(
            [
                "search",
                "s a trial, median",
                "÷ tfloop",
                "validation accuracy, mean over trials",
                "traces of the step",
            ],
            rows,
        )
    )
    steps = statistics.median(turn["steps"] for turn in turns["tfloop sweep"])
    print(
        f"\ntfloop: {steps:.2f} s of each trial are training; {ours - steps:.2f} s "
        f"everything else, tracing included"
    )
    save(
        "sweep",
        options.out,
        {"environment": found, "epochs": options.epochs, "grid": GRID, "turns": turns},
    )


if __name__ == "__main__":
    main()
