"""Has the step become slower? A fresh run of tfloop against Keras's fit and against its own plain twin, compared with
the stored ratios. Exits with 1 where the upper end of a fresh ratio's interval lies below the stored one's lower end.

Ratios only: absolute times belong to one machine and one moment. `--store` keeps the fresh ratios instead.
"""

import json
import sys
from pathlib import Path

from race import Contender, arguments, describe, environment, race, ratios, save, table


def main() -> None:
    parser = arguments(__doc__.splitlines()[0], rounds=7, seconds=1.0)
    parser.add_argument("--store", action="store_true", help="keep the fresh ratios as those to compare with")
    options = parser.parse_args()
    fast = Contender("tfloop", {})
    rivals = [Contender("keras fit", {}), Contender("tfloop", {"fast": False, "shards": 1}, "tfloop, plain")]
    race([fast, *rivals], options.seconds, options.rounds)
    for contender in (fast, *rivals):
        contender.close()
    fresh, found = {rival.label: ratios(rival, fast) for rival in rivals}, environment()
    path = Path(options.out) / "regress.json"
    if options.store or not path.exists():
        print(table(["÷ tfloop", "median (95 %)"], [[k, "{:.2f} ({:.2f}–{:.2f})".format(*v)] for k, v in fresh.items()]))
        save("regress", options.out, {"environment": found, "ratios": fresh})
        return
    stored = json.loads(path.read_text(encoding="utf-8"))
    rows, worse = [], []
    for name, (median, low, high) in fresh.items():
        if name in stored["ratios"] and high < stored["ratios"][name][1]:
            worse.append(name)
        rows.append([name, "{:.2f} ({:.2f}–{:.2f})".format(*stored["ratios"].get(name, (float("nan"),) * 3)),
                     f"{median:.2f} ({low:.2f}–{high:.2f})", "worse" if name in worse else "kept"])
    print(f"now: {describe(found)}\nstored: {describe(stored['environment'])}\n")
    print(table(["÷ tfloop", "stored, median (95 %)", "now", ""], rows))
    sys.exit(1 if worse else 0)


if __name__ == "__main__":
    main()
