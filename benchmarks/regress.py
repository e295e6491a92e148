"""Has the step become slower? A fresh run of tfloop against Keras's fit and against its own plain
twin, for the default network, and against fit for three others, compared with the ratios stored for
this kind of machine. Exits with 1 where the upper end of a fresh ratio's interval lies below the
stored one's lower end.

Ratios only: absolute times belong to one machine and one moment. Ratios still differ from one kind
of CPU to another; where none are stored for this one, or with `--store`, the fresh ones are kept.
"""

import json
import sys
from pathlib import Path

from race import Contender, arguments, describe, environment, machine, race, ratios, save, table

MODELS = ("resnet", "mobilenet", "mlp")  # of the zoo


def measure(seconds: float, rounds: int) -> dict[str, tuple[float, float, float]]:
    """How many times as long each rival takes as tfloop: (median, low, high)."""
    fast = Contender("tfloop", {})
    rivals = [
        Contender("keras fit", {}),
        Contender("tfloop", {"fast": False, "shards": 1}, "tfloop, plain"),
    ]
    race([fast, *rivals], seconds, rounds)
    for contender in (fast, *rivals):
        contender.close()
    found = {rival.label: ratios(rival, fast) for rival in rivals}
    for model in MODELS:
        ours, fit = (Contender(name, {"zoo": model}) for name in ("tfloop", "keras fit, 50 steps"))
        race([ours, fit], seconds, rounds)
        for contender in (ours, fit):
            contender.close()
        found[f"{model}: keras fit, 50 steps"] = ratios(fit, ours)
    return found


def main() -> None:
    parser = arguments(__doc__.splitlines()[0], rounds=7, seconds=1.0)
    parser.add_argument(
        "--store", action="store_true", help="keep the fresh ratios as those to compare with"
    )
    options = parser.parse_args()
    fresh, found = measure(options.seconds, options.rounds), environment()
    path = Path(options.out) / "regress.json"
    stored = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    known = stored.get(machine(found))

    def shown(interval):
        return "{:.2f} ({:.2f}–{:.2f})".format(*interval)

    if options.store or not known:
        if not options.store:
            print(
                f"No ratios are stored for {machine(found)}: these are kept, to compare with "
                f"from now on.\n"
            )
        print(
            table(
                ["÷ tfloop", "median (95 %)"],
                [[name, shown(ratio)] for name, ratio in fresh.items()],
            )
        )
        save(
            "regress",
            options.out,
            {**stored, machine(found): {"environment": found, "ratios": fresh}},
        )
        return
    stored_ratios = known["ratios"]
    if new := [name for name in fresh if name not in stored_ratios]:
        print(f"not stored before, to compare with from now on: {'; '.join(new)}\n")
        stored_ratios |= {name: fresh[name] for name in new}
        save("regress", options.out, stored)
    worse = [name for name, (_, _, high) in fresh.items() if high < stored_ratios[name][1]]
    print(f"now: {describe(found)}\nstored: {describe(known['environment'])}\n")
    print(
        table(
            ["÷ tfloop", "stored, median (95 %)", "now", ""],
            [
                [
                    name,
                    shown(stored_ratios[name]),
                    shown(ratio),
                    "worse" if name in worse else "kept",
                ]
                for name, ratio in fresh.items()
            ],
        )
    )
    sys.exit(1 if worse else 0)


if __name__ == "__main__":
    main()
