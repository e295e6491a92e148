"""GradientTape against central differences."""

from typing import Any

from tfloop.commands.command import FAILED, MODEL, WHERE, Command, start
from tfloop.config import Config


def check_gradients(config: Config, options: dict[str, Any], arguments: list[str]) -> int:
    start(config)
    from tfloop import assembly
    from tfloop.data.spec import of_data
    from tfloop.inspection import checks

    data = assembly.load_data(config.replace(standardize=False))
    header = f"{'weight':22} {'worst entry':>16} {'GradientTape':>15} {'difference':>15}"
    print(f"{'':28} {header}  error")
    results = []
    target: Any = config if not config.model else assembly.make_model(config, of_data(data))[0]
    shape = () if config.model else data.image_shape
    for check in checks.check_gradients(target, shape, data.classes, config.seed):
        results.append(check)
        verdict = "" if check.passed else "  WRONG"
        print(
            f"{check.what:28} {check.weight:22} {list(check.entry)!s:>16} {check.tape:15.8g} "
            f"{check.difference:15.8g}  {check.error:.1e}{verdict}",
            flush=True,
        )
    worst = max(results, key=lambda check: check.error)
    wrong = sum(not check.passed for check in results)
    print(
        f"{len(results)} gradients, {wrong} wrong; the worst error is {worst.error:.1e} "
        f"({worst.what}, {worst.weight} {list(worst.entry)}; allowed: {checks.TOLERANCE:g})"
    )
    return FAILED if wrong else 0


COMMAND = Command(
    check_gradients,
    "GradientTape against central differences in float64",
    topic="check",
    settings=(*MODEL, "seed", *WHERE),
)
