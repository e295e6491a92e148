"""Several models trained side by side: model-steps per second, against one model at a time."""

import statistics

from race import Contender, arguments, describe, environment, race, ratios, save, table


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument(
        "--members",
        default="1,2,4,8",
        help="numbers of models to compare; the first is what the others are compared with",
    )
    parser.add_argument("--presets", default="article2,speedrun")
    options = parser.parse_args()
    members, rows, results = [int(count) for count in options.members.split(",")], [], []
    found = environment()
    for preset in options.presets.split(","):
        contenders = [
            Contender(
                "side by side",
                {"preset": preset, "ensemble": count, "l2": 0.0},
                f"{preset}, {count}",
            )
            for count in members
        ]
        race(contenders, options.seconds, options.rounds)
        for count, contender in zip(members, contenders, strict=True):
            each = [step / count for step in contender.turns]  # ms for one step of one model
            first = [step / members[0] for step in contenders[0].turns]
            pairs = [one / other for one, other in zip(first, each, strict=True)]
            median, low, high = ratios(contenders[0], contender)
            scale = count / members[0]
            rows.append(
                [
                    f"`{preset}`",
                    count,
                    f"{statistics.median(each):.2f}",
                    f"{1000 / statistics.median(each):.0f}",
                    f"{median * scale:.2f} ({low * scale:.2f}–{high * scale:.2f})",
                    f"{contender.memory:.0f}",
                ]
            )
            results.append(
                {
                    "preset": preset,
                    "members": count,
                    "ms_per_model_step": each,
                    "ratios": pairs,
                    "memory_mib": contender.memory,
                }
            )
        for contender in contenders:
            contender.close()
    print(f"{describe(found)}; {options.rounds} rounds\n")
    print(
        table(
            [
                "preset",
                "models",
                "ms per model-step, median",
                "model-steps per second",
                "÷ one at a time (95 %)",
                "peak memory, MiB",
            ],
            rows,
        )
    )
    save("ensemble", options.out, {"environment": found, "rows": results})


if __name__ == "__main__":
    main()
