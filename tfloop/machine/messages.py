"""What the workers of a cluster say to each other when they meet: JSON, a line each, signed.

Both sides show that they hold the cluster's token, without sending it: what is said is signed with
token and numbers of both (HMAC-SHA256). Without a token anyone can sign.
"""

import hashlib
import hmac
import json
import os
import socket
import time

TOKEN = "TFLOOP_CLUSTER_TOKEN"  # the variable that holds it
LONGEST = 1 << 20  # bytes of one message
PATIENCE = 5.0  # seconds that a visitor has for its hello


def read_line(connection: socket.socket, received: bytes, end: float) -> tuple[dict, bytes]:
    """(the next message, what was received behind it), of a limited length, until a time.

    Raises:
      OSError: the connection is gone, or takes too long.
      ValueError: what comes is no message.
    """
    while b"\n" not in received:
        connection.settimeout(max(0.01, end - time.monotonic()))
        more = connection.recv(1 << 16)
        received += more
        if not more or len(received) > LONGEST or time.monotonic() > end:
            raise ValueError("no message")
    line, _, rest = received.partition(b"\n")
    return parsed(line), rest


def send(connection: socket.socket, message: dict) -> None:
    connection.sendall(json.dumps(message).encode() + b"\n")


def parsed(line: bytes) -> dict:
    """Raises ValueError where the line is no JSON object."""
    try:
        message = json.loads(line)
    except RecursionError:
        raise ValueError("too deep") from None
    if not isinstance(message, dict):
        raise ValueError("no message")
    return message


class OtherToken(ValueError):
    pass


def signed(content: dict, first: str, second: str) -> dict:
    """A message that holds the content, as text, and its signature."""
    text = json.dumps(content)
    return {"content": text, "signature": _signature(text, first, second)}


def opened(message: dict, first: str, second: str) -> dict:
    """The content of a signed message.

    Raises:
      OtherToken: it is signed with another token.
      ValueError: it is no signed message.
    """
    text, signature = message.get("content"), message.get("signature")
    if not isinstance(text, str) or not isinstance(signature, str):
        raise ValueError("not signed")
    wanted = _signature(text, first, second)
    if not hmac.compare_digest(signature.encode(errors="replace"), wanted.encode()):
        raise OtherToken("another token")
    return parsed(text.encode(errors="replace"))


def _signature(text: str, first: str, second: str) -> str:
    """HMAC-SHA256 by the cluster's token of a text and the numbers of both sides."""
    signed = json.dumps([first, second, text]).encode()
    token = os.fsencode(os.environ.get(TOKEN, ""))
    return hmac.new(token, signed, hashlib.sha256).hexdigest()
