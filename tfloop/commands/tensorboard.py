"""TensorBoard on the runs."""

import os
import socket
import threading
from typing import Any

from tfloop.commands.command import Command, one_argument, start
from tfloop.config import Config
from tfloop.errors import UserError
from tfloop.settings import whole


def tensorboard(config: Config, options: dict[str, Any], arguments: list[str]) -> int:
    folder, port, host = "runs", options["port"], options["host"]
    if arguments:
        folder = one_argument(arguments, "LOGDIR", "the folder with the runs")
    if not os.path.isdir(folder):
        raise UserError(f"{folder}: no such folder; train first, or name the folder with the runs")
    if port and whole(port, most=65535) is None:
        raise UserError(
            f"--port={port}: expected a number from 0 to 65535; 0 takes any that is free"
        )
    if not host:
        raise UserError("--host: expected the address to listen on, found nothing")
    start(config)  # TensorBoard imports TensorFlow too, with all its messages
    url = _launch(folder, host, port)
    print(f"TensorBoard shows {folder} at {url} (Ctrl-C ends it)", flush=True)
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        print()
    return 0


def _launch(folder: str, host: str, port: str) -> str:
    """Start the server; its address."""
    from tensorboard import default, program
    from tensorboard.program import TensorBoardServerException

    board = program.TensorBoard(default.get_plugins())
    own_port = {"port": int(port)} if port else {}
    board.configure(logdir=folder, host=host, load_fast="false", **own_port)
    try:
        socket.getaddrinfo(host, None)
        return board.launch()
    except (OSError, SystemExit) as error:
        reason = getattr(error, "strerror", "") or error
        raise UserError(f"--host={host}: cannot listen there: {reason}") from None
    except TensorBoardServerException as error:
        reason = str(error).splitlines()[0].removeprefix("TensorBoard ")
        raise UserError(f"tensorboard: {reason}") from None


COMMAND = Command(
    tensorboard,
    "open TensorBoard on the runs",
    topic="look",
    arguments="[LOGDIR]",
    settings=(),
    options={
        "port": ("", "its port; unset: 6006 or the next free one"),
        "host": ("127.0.0.1", "the address to listen on"),
    },
)
