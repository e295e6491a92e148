"""The article's experiments over several seeds."""

from pathlib import Path
from typing import Any

from tfloop.commands.command import WHERE, Command, Stop, curves_only, start
from tfloop.config import Config
from tfloop.errors import UserError
from tfloop.search import experiments
from tfloop.training import folders


def report(config: Config, options: dict[str, Any], arguments: list[str]) -> int:
    stop, folder = Stop(), Path(options["out"])
    presets = options["experiments"].split(",")
    for preset in presets:
        if preset not in experiments.EXPERIMENTS:
            known = ", ".join(experiments.EXPERIMENTS)
            raise UserError(
                f"--experiments={options['experiments']}: '{preset}' is no experiment; choose from "
                f"{known}"
            )
    seeds = config.seeds or tuple(range(5))
    if len({*presets}) < len(presets) or len({*seeds}) < len(seeds):
        raise UserError("report: an experiment or a seed comes twice")
    config = curves_only(config, options)
    folders.check_writable(folder, "--out")
    config, device = start(config)
    from tfloop.inspection import plots

    trials = experiments.planned(config, presets, seeds, folder)
    folder.mkdir(parents=True, exist_ok=True)

    def say(line: str) -> None:
        print(line, flush=True)

    with folders.locked(folder):
        if not experiments.train(config, trials, device, stop.asked, say):
            print("stopped; the same command goes on")
            return stop.code()
        rows = experiments.rows(trials)
        plots.save(plots.report(rows), folder / "report.png")
        text = experiments.markdown(rows, "report.png", device)
        folders.write(folder / "report.md", text)
        content = {"device": device, "rows": [row._asdict() for row in rows]}
        folders.write_json(folder / "report.json", content)
    print(f"{text}\n{folder / 'report.md'}")
    return 0


COMMAND = Command(
    report,
    "the article's three experiments over several seeds, by its protocol and by a clean one",
    topic="search",
    settings=("epochs", "seeds", "summaries", *WHERE),
    options={
        "experiments": (
            "article2,article3,article3_32",
            "which of the article's, a comma between them",
        ),
        "out": ("report", "the folder for runs, report.md, report.png and report.json"),
    },
)
