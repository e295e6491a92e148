"""tfloop against its rivals: one network, one order of images, one optimizer and penalty, one batch
size and precision.

All must first compute the same loss on the same weights and batch, to 1e-4 (with TF32 to 1e-2).
Every contender has a process of its own, they take turns, and ratios are formed round by round.
"""

import sys
from pathlib import Path

from race import (
    Contender,
    arguments,
    bars,
    describe,
    environment,
    race,
    ratios,
    save,
    table,
    with_interval,
)


def smoke(names: list[str], batch_size: int) -> int:
    """Ten steps of each contender that is installed, in its own process; 1 where one fails."""
    failed = 0
    for name in names:
        try:
            contender = Contender(name, {"batch_size": batch_size})
            if contender.missing:
                print(f"{name}: left out, {contender.missing} is not installed", flush=True)
                continue
            contender.run(max(10, contender.least))
            contender.close()
        except SystemExit as error:
            print(f"{name}: FAILED: {error}", flush=True)
            failed = 1
            continue
        loss = "" if contender.loss is None else f", first loss {contender.loss:.6f}"
        print(f"{name}: runs{loss}", flush=True)
    return failed


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument(
        "--precision", default="float32", choices=("float32", "tf32"), help="of every contender"
    )
    parser.add_argument(
        "--only", default="", help="contenders to run, by a part of their names, comma-separated"
    )
    parser.add_argument(
        "--smoke", action="store_true", help="ten steps of each, one by one: does each still run?"
    )
    options = parser.parse_args()
    from contenders import CONTENDERS, ON_A_CPU, ON_A_GPU

    found = environment()
    parts = [part.strip() for part in options.only.split(",") if part.strip()]
    left_out = ("side by side", *(ON_A_CPU if found["gpus"] else ON_A_GPU))
    names = [
        name
        for name in CONTENDERS
        if name in ("tfloop", "floor")
        or (any(p in name for p in parts) if parts else name not in left_out)
    ]
    if options.smoke:
        sys.exit(smoke(names, options.batch_size))
    contenders, skipped = [], []
    for name in names:
        try:
            contender = Contender(
                name, {"batch_size": options.batch_size, "precision": options.precision}
            )
        # One that is installed and fails here; without tfloop there is nothing to compare.
        except SystemExit as error:
            if name == "tfloop":
                raise
            print(f"skipped: {error}")
            skipped.append(name)
            continue
        if contender.missing:
            print(f"skipped: {name} ({contender.missing} is not installed)")
            skipped.append(name)
        else:
            contenders.append(contender)
    first = contenders[0]
    tolerance = 1e-4 if options.precision == "float32" else 1e-2  # TF32 has 10 bits
    wrong = [
        c.label
        for c in contenders
        if c.loss is not None and abs(c.loss - first.loss) > tolerance * abs(first.loss)
    ]
    if wrong:
        raise SystemExit(
            f"no report: {', '.join(wrong)} compute another loss than tfloop's "
            f"{first.loss:.6f} on the same "
            f"weights and batch"
        )
    race(contenders, options.seconds, options.rounds)
    rows, results = [], {}
    for c in contenders:
        c.close()
        ms, low, high = with_interval(c.turns)
        ratio = ratios(c, first)
        rows.append(
            [
                c.label,
                f"{ms:.2f} ({low:.2f}–{high:.2f})",
                f"{min(c.turns):.2f}",
                f"{ratio[0]:.2f} ({ratio[1]:.2f}–{ratio[2]:.2f})",
                f"{c.memory:.0f}" if c.name != "floor" else "",
            ]
        )
        results[c.label] = {
            "ms_per_step": c.turns,
            "ratio": ratio,
            "memory_mib": c.memory,
            "loss": c.loss,
        }
    print(
        f"{describe(found)}; batch {options.batch_size}; {options.precision}; "
        f"{options.rounds} rounds; the first batch's loss is "
        f"{first.loss:.6f} for all\n"
    )
    print(
        table(
            [
                "",
                "ms per step, median (95 %)",
                "fastest turn",
                "÷ tfloop, median of pairs (95 %)",
                "peak memory, MiB",
            ],
            rows,
        )
    )
    save(
        "peers",
        options.out,
        {
            "environment": found,
            "batch_size": options.batch_size,
            "precision": options.precision,
            "skipped": skipped,
            "results": results,
        },
    )
    if options.plot:

        def median(c):
            return with_interval(c.turns)[0]

        shown = [first, *sorted((c for c in contenders[1:] if c.name != "floor"), key=median)]
        bars(
            Path(options.out) / "peers.png",
            f"One training step, batch {options.batch_size}, {found['cores']} cores of "
            f"{found['cpu']}",
            {c.label: c.turns for c in shown},
            "ms per step (median, 95 %), less is better",
            {c.label: median(c) for c in contenders if c.name == "floor"},
        )


if __name__ == "__main__":
    main()
