"""Where two runs part: in settings, data, machine, curves, and in which step and layer."""

import shlex
from typing import Any

from tfloop.commands.command import FAILED, RUN_CODE, Command, start, whole_number
from tfloop.config import FIELDS, GROUPS, Config
from tfloop.errors import UserError
from tfloop.history.records import ALONE
from tfloop.wording import counted


def diff(config: Config, options: dict[str, Any], arguments: list[str]) -> int:
    expected = 1 if options["with"] else 2
    if len(arguments) != expected or "" in arguments:
        what = "RUN --with='--flag=value …'" if options["with"] else "RUN RUN"
        raise UserError(f"expected {what}; found {counted(len(arguments), 'folder')}")
    steps, tolerance = whole_number(options, "steps", 0), _tolerance(options["tolerance"])
    start(config.replace(device="cpu"))  # for what is read here; each side has its own device
    from tfloop.history import difference
    from tfloop.history.records import Records

    given = {name: options[name] for name in RUN_CODE if options[name]}
    first, second = Records(arguments[0]), Records(arguments[-1])
    if options["with"]:
        changes: dict[str, Any] | None = _changes(options["with"])
        print(f"{first.folder} | the same with {options['with']}")
    else:
        changes = None
        is_equal = _told_apart(first, second, tolerance)
        if is_equal:
            return 0
    lengths = (first.steps, second.steps)
    found = difference.part(first, second, given, changes, steps, print)
    for line in difference.lines(found):
        print(line)
    if options["plot"]:
        _plot(found, options["plot"])
    if lengths[0] != lengths[1]:
        print(f"one made {counted(lengths[0], 'step')}, the other {lengths[1]}")
    is_equal = found.equal and lengths[0] == lengths[1] and found.compared > 0
    if is_equal and not options["with"] and _records_differ(first, second):
        print("what they recorded differs all the same: one was computed otherwise, or changed")
        is_equal = False
    return 0 if is_equal else FAILED


def _records_differ(first: Any, second: Any) -> bool:
    """Do the curves or the digests of two runs differ?"""
    from tfloop.history import difference

    ours, theirs = first.digests(), second.digests()
    shared = ours.keys() & theirs.keys()
    any_bit = difference.curves_that_differ(first, second, 0.0)[1]
    return any_bit is not None or any(ours[step] != theirs[step] for step in shared)


def _told_apart(first: Any, second: Any, tolerance: float) -> bool:
    """Say what the folders tell; are both known to be equal?"""
    from tfloop.history import difference

    print(f"{first.folder} | {second.folder}")
    data = [] if first.fingerprint == second.fingerprint else ["the training examples differ"]
    for what, found in (
        ("settings", difference.settings_that_differ(first, second)),
        ("data", data),
        ("machine", difference.machines_that_differ(first, second)),
    ):
        print(f"{what}: {'the same' if not found else ''}".rstrip())
        for line in found:
            print(f"  {line}")
    count, any_bit, more = difference.curves_that_differ(first, second, tolerance)
    print(f"curves: {counted(count, 'call')} that both recorded")
    for pair, what in ((any_bit, "in any bit"), (more, f"by more than {tolerance:g}")):
        if pair is None:
            print(f"  no loss differs {what}")
            continue
        a, b = pair
        print(
            f"  the first whose loss differs {what}: steps {a.first} to {a.last - 1}, "
            f"{a.loss:.9g} | {b.loss:.9g}"
        )
    ours, theirs = first.digests(), second.digests()
    shared = sorted(ours.keys() & theirs.keys())
    equal = [step for step in shared if ours[step] == theirs[step]]
    print(f"weights: equal after {len(equal)} of {counted(len(shared), 'shared evaluation')}")
    is_same_end = bool(shared) and first.steps == second.steps == shared[-1] == (equal or [0])[-1]
    if is_same_end and len(equal) == len(shared) and any_bit is None:
        print("equal, bit for bit")
        return True
    return False


# One process trains one run again, and writes nothing.
_NOT_WITH = {*ALONE, "preset", *GROUPS["what is written"], "summaries", "summary_tensors"}


def _changes(text: str) -> dict[str, Any]:
    """The settings that --with names.

    Raises:
      UserError: it is no flags of train's.
    """
    found: dict[str, Any] = {}
    try:
        tokens = shlex.split(text)
    except ValueError as error:
        raise UserError(f"--with={text}: {str(error).lower()}") from None
    for token in tokens:
        name, has_value, value = token.removeprefix("--").partition("=")
        if not token.startswith("--"):
            raise UserError(f"--with={text}: '{token}' is no flag; a flag begins with --")
        off = name.removeprefix("no")
        if name not in FIELDS and off in FIELDS and FIELDS[off].element is bool and not has_value:
            name, value, has_value = off, "false", "="
        if name not in FIELDS:
            raise UserError(f"--with={text}: --{name} is no setting of train")
        if name in _NOT_WITH:
            raise UserError(
                f"--with={text}: --{name} does not count where one run is trained again"
            )
        if not has_value and FIELDS[name].element is not bool:
            raise UserError(f"--with={text}: --{name} needs a value: --{name}=…")
        found[name] = value if has_value else "true"
    if not found:
        raise UserError("--with: expected flags of train, such as --with='--nofast'")
    Config.make(**found)  # what is wrong with them is said here
    return found


def _tolerance(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not value >= 0:
        raise UserError(f"--tolerance={text}: expected a number, 0 or more")
    return value


def _plot(found: Any, path: str) -> None:
    if not found.growth:
        print("--plot: there is no growth to draw")
        return
    from tfloop.inspection import plots

    plots.growth(found, path)
    print(path)


COMMAND = Command(
    diff,
    "where two runs part: settings, data, machine, curves, and the first step and layer",
    topic="look",
    arguments="RUN [RUN]",
    settings=(),
    options={
        "with": ("", "in place of a second run: flags with which the first is trained again"),
        "steps": ("1000", "how many steps after the first that differs are followed"),
        "tolerance": ("0.01", "of the loss, for the first call that differs by more"),
        "plot": ("", "draw how the difference grows into this PNG file"),
        **RUN_CODE,
    },
)
