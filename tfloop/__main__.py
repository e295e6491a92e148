"""The program: `tfloop`, or `python -m tfloop`."""

import os
import signal
import sys


def main() -> int:
    """Run the command line; its exit code. Ctrl-C while it is imported is one line, too."""
    try:
        from tfloop import cli, stopping
    except KeyboardInterrupt:
        print("tfloop: interrupted", file=sys.stderr)
        return 130
    code = cli.main()
    if stopping.abandoned:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


if __name__ == "__main__":
    code = main()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # nothing is left to be broken off
    # Where Ctrl-C came amid code that runs from a string, such as a dataclass's, CPython remembers
    # that, and `python -m` ends by the signal although it was caught. The next such code resets it.
    exec("")
    raise SystemExit(code)
