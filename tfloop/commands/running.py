"""Train a model, and what is done with a trained one."""

import csv
import os
from pathlib import Path

from tfloop import cluster, folders
from tfloop.commands.command import BEST, STARTED, TERMINATED, WHERE, Command, Stop, one, output, start, warn
from tfloop.config import FIELDS, Config
from tfloop.errors import UserError


def train(config: Config, options: dict, arguments: list[str]) -> int:
    if options["dry_run"] and config.strategy == "multi_worker":
        raise UserError("--dry_run and --strategy=multi_worker exclude each other: try one process")
    if options["override"] and not options["resume"]:
        raise UserError("--override counts with --resume only")
    place = cluster.find() if config.strategy == "multi_worker" else None
    stop, resume, asked = Stop(listen=not place), [], config
    if options["resume"] and (not place or place.is_chief):
        try:
            config, resume = _resumed(config, options)
        except UserError as error:
            if place:
                cluster.refuse(place, asked, str(error))
            raise
    if len(resume) == 1 and (done := folders.epochs_done(resume[0], config)):
        finished = f"{resume[0]}: is finished, after {done} epoch{'s' * (done != 1)}; --epochs=N goes on to more"
        print(finished)
        if place:
            cluster.refuse(place, asked, finished)
        return 0
    from tfloop import devices

    config, device, replicas = devices.start(config, asked)
    stop.listen()
    from tfloop import training

    if options["dry_run"]:
        training.dry_run(config, device, replicas)
        return 0
    results = training.train(config, device, STARTED, stop.asked, resume, replicas)
    stopped_by_another = bool(results) and not results[-1]["finished"]
    return stop.code() or (TERMINATED if stopped_by_another else 0)


def _resumed(config: Config, options: dict) -> tuple[Config, list[Path]]:
    """(settings, folders) of the run that --resume names; with auto, of the newest that is not finished and those that were
    begun with it; no folders where there is nothing to go on with."""
    several = len(config.all_seeds) > 1
    if options["dry_run"]:
        raise UserError("--resume and --dry_run exclude each other: one goes on with a run, the other keeps nothing")
    if several and options["resume"] != "auto":
        raise UserError(f"--resume={options['resume']} goes on with one run: leave --seeds, --runs and --ensemble out (or --ensemble=1), "
                        "or go on with all that were begun together: --resume=auto")
    there, ensemble = folders.newest_unfinished(config) if options["resume"] == "auto" else ([Path(options["resume"])], 1)
    if not there or several and len(there) == 1:
        return config, []
    if len(there) == 1:
        return folders.resumed(there[0], config, options["given"], options["override"]), there
    return folders.resumed_group(there, ensemble, config, options["given"], options["override"]), there


def evaluate(config: Config, options: dict, arguments: list[str]) -> int:
    if not arguments or "" in arguments:
        raise UserError("expected RUN, the folder of a finished run, or several, whose predictions are averaged; found none")
    config, _ = start(config)
    import numpy as np

    from tfloop import ensemble, evaluation, plots, runs
    from tfloop.loop import Loop

    loops, outputs = [], []
    for folder in arguments:
        folders.settings(Path(folder))
    for folder in arguments:
        trained, state, manifest = runs.open_run(folder, options["best"], warn)
        if options["dataset"]:
            trained = trained.replace(dataset=options["dataset"], cache="", split="standard")
        data = runs.load_data(trained)
        if loops and not _same_test(data, loops[0].data):
            raise UserError(f"{folder}: has other test images than {arguments[0]}; name runs of the same data, or give --dataset")
        runs.check_fit(data.test.images, state, manifest, f"--dataset={trained.dataset}")
        loops.append(Loop(state, data, batch_size=min(trained.batch_size, len(data.train)), shards=config.shards))
        metrics, found = loops[-1].evaluate_with_outputs(data.test)
        outputs.append(found)
        print(f"{f'{folder}: ' * (len(arguments) > 1)}{len(data.test)} test images of {trained.dataset}: loss {metrics.total:.4f} "
              f"(data {metrics.data:.4f}, l1 {metrics.l1:.4f}, l2 {metrics.l2:.4f})  accuracy {100 * metrics.accuracy:.2f} %")
    labels, probabilities = data.test.labels, ensemble.mean_probabilities(loops, outputs)
    if len(loops) > 1:
        print(f"{len(loops)} together, by the mean of their probabilities: accuracy {100 * np.mean(probabilities.argmax(axis=1) == labels):.2f} %")
    print(f"\n{'class':>7}  precision     recall  images")
    for label, (precision, recall, images) in enumerate(zip(*evaluation.by_class(labels, probabilities))):
        print(f"{label:7d}  {100 * precision:7.2f} %  {100 * recall:7.2f} %  {images:6d}")
    calibration, mistakes = evaluation.calibration(labels, probabilities), evaluation.confident_mistakes(labels, probabilities)
    print(f"\nexpected calibration error {100 * calibration.error:.2f} %, over {len(calibration.images)} bins")
    guesses, confidence = probabilities.argmax(axis=1), probabilities.max(axis=1)
    print("\nmost confident mistakes" if len(mistakes) else "\nno mistakes")
    for row in mistakes:
        print(f"image {row:6d}: is {labels[row]}, taken for {guesses[row]} with {100 * confidence[row]:.1f} %")
    if options["plot"]:
        pictures = np.stack([data.test.images[row:row + 1][0] for row in mistakes]) if len(mistakes) else data.test.images[:0]
        plots.save(plots.evaluation(calibration, pictures, labels[mistakes], guesses[mistakes], confidence[mistakes]), options["plot"])
        print(options["plot"])
    return 0


def _same_test(one, other) -> bool:
    """Are the test images of two data sets the same, and their classes?"""
    import numpy as np

    if one.classes != other.classes or not np.array_equal(one.test.labels, other.test.labels):
        return False
    return one.digest == other.digest if one.digest or other.digest else np.array_equal(one.test.images, other.test.images)


def predict(config: Config, options: dict, arguments: list[str]) -> int:
    if len(arguments) != 2:
        raise UserError(f"predict: expected RUN and IMAGES (a folder or an .npz file), found {len(arguments)} argument{'s' * (len(arguments) != 1)}")
    start(config)
    from tfloop import predictions, runs

    _, state, manifest = runs.open_run(arguments[0], options["best"], warn)
    names, images = predictions.read_images(arguments[1], state.model.input_shape[1:])
    runs.check_fit(images, state, manifest, arguments[1])
    probabilities = predictions.predict(state, images)
    with output(options["out"]) as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["image", "class", *(f"p{k}" for k in range(probabilities.shape[1]))])
        for name, row in zip(names, probabilities):
            writer.writerow([name, int(row.argmax()), *(f"{p:.6f}" for p in row)])
    return 0


def export(config: Config, options: dict, arguments: list[str]) -> int:
    folder = one(arguments, "RUN", "the folder of a run")
    if options["format"] not in ("keras", "saved_model", "tflite", "weights"):
        raise UserError(f"--format={options['format']} is unknown; choose from keras, saved_model, tflite, weights")
    start(config)
    from tfloop import export, runs

    _, state, _ = runs.open_run(folder, options["best"], warn)
    name = os.path.basename(os.path.abspath(folder))
    path = options["out"] or f"{name}{export.FORMATS[options['format']] or '-saved_model'}"
    export.export(state, options["format"], path)
    print(path)
    return 0


def import_(config: Config, options: dict, arguments: list[str]) -> int:
    path = one(arguments, "FILE", "a .keras or .weights.h5 file")
    config, _ = start(config)
    from tfloop import training

    print(training.adopt(config, path))
    return 0


def pack(config: Config, options: dict, arguments: list[str]) -> int:
    if len(arguments) != 2:
        raise UserError(f"pack: expected SOURCE and FOLDER, found {len(arguments)} argument{'s' * (len(arguments) != 1)}")
    if options["format"] not in ("png", "raw"):
        raise UserError(f"--format={options['format']} is unknown; choose from png, raw")
    if not (options["shard_mib"].isdecimal() and 1 <= int(options["shard_mib"]) <= 2**20):
        raise UserError(f"--shard_mib={options['shard_mib']}: expected the size of a shard, from 1 to {2**20} MiB")
    start(config)
    from tfloop import pack

    packed = pack.pack(arguments[0], arguments[1], options["format"], int(options["shard_mib"]))
    print(f"{len(packed.train)} training and {len(packed.test)} test images of {'×'.join(map(str, packed.image_shape))}, "
          f"{packed.classes} classes, in {len(packed.train.images.files) + len(packed.test.images.files)} shards: {arguments[1]}")
    return 0


COMMANDS = {
    "train": Command(train, "train a model; the default is the article's CNN on MNIST", options={
        "dry_run": (False, "do one step of everything, keep nothing, and stop"),
        "resume": ("", "go on with a run: its folder; auto: the newest unfinished one of its name, with those begun together, or a new one"),
        "override": (False, "with --resume: allow settings that change the mathematics of the run")}),
    "evaluate": Command(evaluate, "a run on its test images: loss, accuracy, by class, calibration, mistakes; several runs: averaged", "RUN…", WHERE, {
        "plot": ("", "draw calibration and the ten most confident mistakes into this PNG file"),
        "dataset": ("", "other data than the run's own: its test images"),
        "best": (False, BEST)}),
    "predict": Command(predict, "class and probabilities of each image, as CSV", "RUN IMAGES", WHERE, {
        "out": ("", "the CSV file; unset: standard output"), "best": (False, BEST)}),
    "export": Command(export, "a run as a plain Keras, SavedModel or TFLite model that takes raw pixels", "RUN", WHERE, {
        "format": ("keras", "keras, saved_model, tflite, or weights: the layers' weights alone"),
        "out": ("", "the file, or the folder of a saved_model; unset: named after the run"), "best": (False, BEST)}),
    "import": Command(import_, "a new run with the weights in a file that Keras wrote", "FILE", tuple(
        name for name in FIELDS if name not in ("seeds", "runs", "ensemble"))),
    "pack": Command(pack, "TFRecord shards from pictures, a folder to each class, or from IDX or npz files", "SOURCE FOLDER", WHERE, {
        "format": ("png", "png, or raw: larger, read faster"), "shard_mib": ("64", "size of a shard, about, in MiB")}),
}
