"""What a trained model gets right and wrong on its test images."""

from pathlib import Path
from typing import Any

from tfloop.commands.command import BEST, WHERE, Command, start, warn
from tfloop.config import Config
from tfloop.errors import UserError


def evaluate(config: Config, options: dict[str, Any], arguments: list[str]) -> int:
    if not arguments or "" in arguments:
        raise UserError(
            "expected RUN, the folder of a finished run, or several, whose predictions are "
            "averaged; found none"
        )
    config, _ = start(config)
    import numpy as np

    from tfloop.training import folders
    from tfloop.training.ensemble import mean_probabilities

    for folder in arguments:
        folders.settings(Path(folder))
    loops: list[Any] = []
    outputs = []
    for folder in arguments:
        name, loop = _open(folder, options, config)
        if loops and not _has_same_test(loop.data, loops[0].data):
            raise UserError(
                f"{folder}: has other test images than {arguments[0]}; name runs of the same data, "
                "or give --dataset"
            )
        loops.append(loop)
        metrics, logits = loop.evaluate_with_outputs(loop.data.test)
        outputs.append(logits)
        prefix = f"{folder}: " if len(arguments) > 1 else ""
        print(
            f"{prefix}{len(loop.data.test)} test images of {name}: loss {metrics.total:.4f} (data "
            f"{metrics.data:.4f}, l1 {metrics.l1:.4f}, l2 {metrics.l2:.4f})  accuracy "
            f"{100 * metrics.accuracy:.2f} %"
        )
    test, probabilities = loops[0].data.test, mean_probabilities(loops, outputs)
    if len(loops) > 1:
        accuracy = np.mean(probabilities.argmax(axis=1) == test.labels)
        print(
            f"{len(loops)} together, by the mean of their probabilities: accuracy "
            f"{100 * accuracy:.2f} %"
        )
    _print_classes(test, probabilities)
    _print_mistakes(test, probabilities, options["plot"])
    return 0


def _open(folder: str, options: dict[str, Any], config: Config) -> tuple[str, Any]:
    """(the data set's name, a loop on a run's data with its weights)."""
    from tfloop import assembly
    from tfloop.loop import Loop
    from tfloop.training import saved_run

    trained, state, manifest = saved_run.open_run(folder, options["best"], warn)
    if options["dataset"]:
        trained = trained.replace(dataset=options["dataset"], cache="", split="standard")
    data = assembly.load_data(trained)
    saved_run.check_fit(data.test.images, state, manifest, f"--dataset={trained.dataset}")
    batch_size = min(trained.batch_size, len(data.train))
    return trained.dataset, Loop(state, data, batch_size=batch_size, shards=config.shards)


def _has_same_test(one: Any, other: Any) -> bool:
    """Are the test images of two data sets the same, and their classes?"""
    import numpy as np

    if one.classes != other.classes or not np.array_equal(one.test.labels, other.test.labels):
        return False
    if one.digest or other.digest:
        return one.digest == other.digest
    return np.array_equal(one.test.images, other.test.images)


def _print_classes(test: Any, probabilities: Any) -> None:
    from tfloop.inspection import evaluation

    print(f"\n{'class':>7}  precision     recall  images")
    by_class = evaluation.by_class(test.labels, probabilities)
    for label, (precision, recall, images) in enumerate(zip(*by_class, strict=True)):
        print(f"{label:7d}  {100 * precision:7.2f} %  {100 * recall:7.2f} %  {images:6d}")


def _print_mistakes(test: Any, probabilities: Any, path: str) -> None:
    """Calibration and the most confident mistakes; draw them, too, where a path is given."""
    import numpy as np

    from tfloop.inspection import evaluation, plots

    labels = test.labels
    calibration = evaluation.calibration(labels, probabilities)
    bins = len(calibration.images)
    print(f"\nexpected calibration error {100 * calibration.error:.2f} %, over {bins} bins")
    rows = evaluation.confident_mistakes(labels, probabilities)
    guesses, confidence = probabilities.argmax(axis=1), probabilities.max(axis=1)
    print("\nmost confident mistakes" if len(rows) else "\nno mistakes")
    for row in rows:
        share = f"{100 * confidence[row]:.1f} %"
        print(f"image {row:6d}: is {labels[row]}, taken for {guesses[row]} with {share}")
    if not path:
        return
    pictures = test.images[:0]
    if len(rows):  # one by one: images on disk are read in order only
        pictures = np.stack([test.images[row : row + 1][0] for row in rows])
    figure = plots.evaluation(calibration, pictures, labels[rows], guesses[rows], confidence[rows])
    plots.save(figure, path)
    print(path)


COMMAND = Command(
    evaluate,
    "a run on its test images: loss, accuracy, by class, calibration, mistakes; several runs: "
    "averaged",
    topic="use",
    arguments="RUN…",
    settings=WHERE,
    options={
        "plot": ("", "draw calibration and the ten most confident mistakes into this PNG file"),
        "dataset": ("", "other data than the run's own: its test images"),
        "best": BEST,
    },
)
