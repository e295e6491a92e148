"""What a trained model gets right and wrong on its test examples."""

from pathlib import Path
from typing import Any

from tfloop.commands.command import BEST, CODE_OPTIONS, WHERE, Command, start, warn
from tfloop.config import Config
from tfloop.errors import UserError


def evaluate(config: Config, options: dict[str, Any], arguments: list[str]) -> int:
    if not arguments or "" in arguments:
        raise UserError(
            "expected RUN, the folder of a finished run, or several, whose predictions are "
            "averaged; found none"
        )
    config, _ = start(config)
    from tfloop.inspection import reports
    from tfloop.training import folders
    from tfloop.training.ensemble import judge_together

    for folder in arguments:
        folders.settings(Path(folder))
    loops: list[Any] = []
    outputs = []
    for folder in arguments:
        name, loop = _open(folder, options, config)
        if loops and not _has_same_test(loop.data, loops[0].data):
            raise UserError(
                f"{folder}: has other test {loop.data.noun} than {arguments[0]}; name runs of the "
                "same data, or give --dataset"
            )
        loops.append(loop)
        metrics, given = loop.evaluate_with_outputs(loop.data.test)
        outputs.append(given)
        prefix = f"{folder}: " if len(arguments) > 1 else ""
        accuracy = "" if metrics.accuracy is None else f"  accuracy {100 * metrics.accuracy:.2f} %"
        more = "".join(
            f"  {name} {'missing' if value is None else f'{value:.4f}'}"
            for name, value in metrics.more.items()
        )
        print(
            f"{prefix}{len(loop.data.test)} test {loop.data.noun} of {name}: loss "
            f"{metrics.total:.4f} (data {metrics.data:.4f}, l1 {metrics.l1:.4f}, l2 "
            f"{metrics.l2:.4f}){accuracy}{more}"
        )
    found = judge_together(loops, outputs, loops[0].data.test)
    if len(loops) > 1:
        print(f"{len(loops)} together, by the mean of {found.of}: {found.text('')}")
    for line in reports.lines(loops[0], found.outputs):
        print(line)
    if options["plot"]:
        for path in reports.draw(loops[0], found.outputs, options["plot"]):
            print(path)
    return 0


def _open(folder: str, options: dict[str, Any], config: Config) -> tuple[str, Any]:
    """(the data set's name, a loop on a run's data with its weights)."""
    from tfloop import assembly
    from tfloop.data import spec
    from tfloop.data.dataset import with_classes_of
    from tfloop.loop import Loop
    from tfloop.training import saved_run

    trained, state, manifest = saved_run.open_run(folder, options["best"], warn, options)
    if options["dataset"]:
        trained = trained.replace(cache="", split="standard", validation_size=0)
    where = f"--dataset={trained.dataset}"
    data = with_classes_of(assembly.load_data(trained), saved_run.spec_of(manifest).kinds, where)
    if not len(data.test):
        raise UserError(f"{where}: has no test {data.noun} to evaluate")
    spec.check_inputs(saved_run.spec_of(manifest), data.test.inputs, where)
    if options["dataset"]:
        for note in data.notes:
            warn(f"{where}: {note}")
    elif difference := saved_run.difference_of_data(manifest, data):
        warn(f"{where}: {difference}")
    for note in spec.notes_on_ranges(manifest.get("ranges", {}), data.test.inputs):
        warn(f"{where}: {note}")
    batch_size = min(trained.batch_size, len(data.train))
    return trained.dataset, Loop(state, data, batch_size=batch_size, shards=config.shards)


def _has_same_test(one: Any, other: Any) -> bool:
    """Are the test examples of two data sets the same, and what their targets are?"""
    import numpy as np

    from tfloop.nests import leaves

    if one.kinds != other.kinds or one.digest != other.digest:
        return False
    pairs = [(one.test.targets, other.test.targets)]
    if not one.digest:
        pairs.append((one.test.inputs, other.test.inputs))
    return all(
        np.array_equal(a, b)
        for first, second in pairs
        for a, b in zip(leaves(first), leaves(second), strict=True)
    )


COMMAND = Command(
    evaluate,
    "a run on its test data: loss and metrics, by class or by error, mistakes; several runs: "
    "averaged",
    topic="use",
    arguments="RUN…",
    settings=WHERE,
    options={
        "plot": (
            "",
            "draw calibration and the ten most confident mistakes, or predicted against true "
            "values, into this PNG file",
        ),
        "dataset": ("", "other data than the run's own: its test examples"),
        "data_options": ("", "with --dataset=FILE.py:function, its arguments"),
        "best": BEST,
        **CODE_OPTIONS,
    },
)
