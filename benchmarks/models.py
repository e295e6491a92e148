"""tfloop, used as README's "From Python" shows it, against Keras's fit and the loop of TensorFlow's
guide, for models of many kinds (`zoo.py`), one after the other, on the same data, weights and SGD.

All must first compute the same loss on the same weights and batch, to 1e-4. Every contender has a
process of its own, they take turns, and ratios are formed round by round.
"""

import math
import statistics

from race import Contender, arguments, describe, environment, race, ratios, save, table
from race import with_interval as interval

# The models of `zoo.py`; is it another network than the first?
KINDS = {
    "cnn": False,
    "cnn, functional": False,
    "cnn, nested": False,
    "resnet": True,
    "vgg": True,
    "mobilenet": True,
    "separable": True,
    "mlp": True,
}
RIVALS = ("keras fit", "keras fit, 50 steps", "TensorFlow guide")


def measure(settings: dict, names: list[str], seconds: float, rounds: int) -> list[Contender]:
    """The contenders on one job, after their turns; tfloop is the first."""
    contenders = [Contender(name, settings) for name in names]
    first = contenders[0]
    wrong = [c.label for c in contenders if abs(c.loss - first.loss) > 1e-4 * abs(first.loss)]
    if wrong:
        raise SystemExit(
            f"no report: {', '.join(wrong)} compute another loss than tfloop's {first.loss:.6f} "
            "on the same weights and batch"
        )
    race(contenders, seconds, rounds)
    for contender in contenders:
        contender.close()
    return contenders


def main() -> None:
    parser = arguments(__doc__.splitlines()[0], rounds=7, seconds=1.0)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--only", default="", help="models to measure, with ; between them")
    parser.add_argument("--cores", type=int, default=0, help="of every contender; 0: all")
    options = parser.parse_args()
    chosen = [name.strip() for name in options.only.split(";") if name.strip()] or list(KINDS)
    unknown = [name for name in chosen if name not in KINDS]
    if unknown:
        raise SystemExit(f"--only: {unknown[0]!r} is no model; choose from {'; '.join(KINDS)}")
    rows, results, gains = [], {}, []
    for model in chosen:
        settings = {"zoo": model, "batch_size": options.batch_size}
        if options.cores:
            settings["cores"] = options.cores
        names = ["tfloop", "tfloop, without start", *RIVALS]
        contenders = measure(settings, names, options.seconds, options.rounds)
        ours, rivals = contenders[0], contenders[2:]
        best = min(rivals, key=lambda c: statistics.median(c.turns))
        gain = ratios(best, ours)
        if KINDS[model]:
            gains.append(gain[0])
        rows.append(
            [
                model,
                *["{:.2f} ({:.2f}–{:.2f})".format(*interval(c.turns)) for c in contenders],
                f"{gain[0]:.2f} ({gain[1]:.2f}–{gain[2]:.2f})",
            ]
        )
        results[model] = {
            "ms_per_step": {c.label: c.turns for c in contenders},
            "best_rival": best.label,
            "ratio": gain,
            "loss": ours.loss,
        }
        print(f"{model}: {gain[0]:.2f} times as fast as {best.label}", flush=True)
    found = environment()
    if options.cores:
        found["cores"] = options.cores
    mean = math.exp(statistics.fmean(map(math.log, gains))) if gains else None
    print(f"\n{describe(found)}; batch {options.batch_size}; {options.rounds} rounds\n")
    header = ["ms per step, median (95 %)", *["tfloop", "without start", *RIVALS], "best ÷ tfloop"]
    print(table(header, rows))
    if mean:
        print(f"\ngeometric mean of best ÷ tfloop, without the twins of the first: {mean:.2f}")
    name = f"models-{options.cores}-core" if options.cores else "models"
    content = {"environment": found, "batch_size": options.batch_size, "results": results}
    save(name, options.out, {**content, "geometric_mean": mean})


if __name__ == "__main__":
    main()
