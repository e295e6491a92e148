"""Where the time of a training step goes."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from tfloop.commands.command import CODE_OPTIONS, HOW, Command, start, warn, without
from tfloop.config import Config
from tfloop.errors import UserError


def profile(config: Config, options: dict[str, Any], arguments: list[str]) -> int:
    if len(arguments) > 1 or "" in arguments:
        raise UserError(f"expected one RUN or none; found {len(arguments)} arguments")
    folder = Path(arguments[0]) if arguments else None
    if folder:
        config = _settings_of(folder, options)
    if config.eager:
        raise UserError("--eager: only a compiled step is profiled; leave it out")
    config, device = start(config.replace(ensemble=1))
    import tensorflow as tf

    if config.jit_compile and not tf.config.list_logical_devices("GPU"):
        raise UserError(
            "--jit_compile: on a CPU the profiler does not see inside XLA's program; leave it out"
        )
    from tfloop.assembly import make_loop
    from tfloop.inspection import plots, step_profile

    loop = make_loop(config)
    if folder:
        from tfloop.training import checkpoints

        path, _ = checkpoints.newest(folder / "checkpoints", warn)
        checkpoints.restore(loop.state, path)
    found = step_profile.profile(loop)
    for line in step_profile.lines(found, device):
        print(line)
    if options["plot"]:
        plots.profile(found, str(folder or config.model or config.preset), options["plot"])
        print(options["plot"])
    if options["json"]:
        figures = {**dataclasses.asdict(found), "rows": [row._asdict() for row in found.rows]}
        figures |= {"device": device, "verdict": found.verdict, "of_floor": found.of_floor}
        Path(options["json"]).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
        print(options["json"])
    return 0


def _settings_of(folder: Path, options: dict[str, Any]) -> Config:
    """The settings of a run, with what the command line says otherwise.

    Threads, shards and device are chosen anew, for this machine.
    """
    from tfloop.training import code, folders

    given = {name: value for name, value in options["given"].items() if name not in CODE_OPTIONS}
    own = code.trusted(folder, folders.config_of(folder), options["given"])
    unset = {"shards": 0, "intra_op_threads": 0, "inter_op_threads": 0, "device": "auto"}
    return own.replace(**{**unset, **given})


COMMAND = Command(
    profile,
    "where the time of a step goes: by layer, input and overhead, and the flag to try",
    topic="look",
    arguments="[RUN]",
    settings=without(
        HOW, "epochs", "seeds", "runs", "ensemble", "on_nan", "eager", "validation_size"
    ),
    options={
        "plot": ("", "draw the table into this PNG file"),
        "json": ("", "write all figures to this file"),
    },
)
