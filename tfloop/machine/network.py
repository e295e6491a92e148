"""A network that only the processes of one cluster see.

TensorFlow's workers talk over ports that listen on every address of the machine and ask nobody who
they are: whoever reaches one can read and write files as the user who trains. TensorFlow cannot be
made to listen at one address. But Linux can give a process and its children a network of their own,
in which there is the loopback interface and nothing else.
"""

import ctypes
import errno
import fcntl
import os
import socket
import struct
import sys

from tfloop.errors import UserError

_NEW_USER, _NEW_NETWORK = 0x10000000, 0x40000000  # CLONE_NEWUSER, CLONE_NEWNET
_GET_FLAGS, _SET_FLAGS, _UP, _LOOPBACK = 0x8913, 0x8914, 1, 8  # SIOCGIFFLAGS, SIOC…, IFF_…

OPEN_PORTS = (
    "TensorFlow's ports of this cluster listen on every address of this machine and ask for no "
    "password: whoever reaches them can read and write files as you; keep others out with a "
    "firewall"
)


def enter_private() -> None:
    """From now on this process, and those it starts, have a network of their own.

    The user stays who it is. It must be called while the process has one thread.

    Raises:
      UserError: this system does not give one.
    """
    try:
        _leave_network()
        _bring_loopback_up()
    except OSError as error:
        raise UserError(
            f"--network=private: this system gives no private network ({error.strerror}), and "
            "TensorFlow's ports would listen on every address of this machine without a password; "
            "where nobody else can reach it, say --network=open"
        ) from None


def is_private() -> bool:
    """Is no interface up but the loopback?"""
    try:
        flags = [_flags(name) for _, name in socket.if_nameindex()]
    except OSError:
        return False
    return all(each & _LOOPBACK for each in flags if each & _UP)


def _leave_network() -> None:
    if not sys.platform.startswith("linux"):
        raise OSError(errno.ENOSYS, "it is not Linux")
    user, group = os.getuid(), os.getgid()
    try:
        _unshare(_NEW_NETWORK)  # root needs no more
    except OSError:
        _unshare(_NEW_USER | _NEW_NETWORK)
        for name, content in (
            ("setgroups", "deny"),
            ("uid_map", f"{user} {user} 1"),
            ("gid_map", f"{group} {group} 1"),
        ):
            with open(f"/proc/self/{name}", "w", encoding="ascii") as file:
                file.write(content)


def _unshare(what: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(what):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _bring_loopback_up() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        request = struct.pack("16sH14x", b"lo", _flags("lo") | _UP)
        fcntl.ioctl(any_socket, _SET_FLAGS, request)


def _flags(interface: str) -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        request = struct.pack("16sH14x", interface.encode(), 0)
        return struct.unpack("16xH14x", fcntl.ioctl(any_socket, _GET_FLAGS, request))[0]
