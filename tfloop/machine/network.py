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
import signal
import socket
import struct
import sys
from collections.abc import Callable

from tfloop.errors import UserError

_NEW_USER, _NEW_NETWORK = 0x10000000, 0x40000000  # CLONE_NEWUSER, CLONE_NEWNET
_GET_FLAGS, _SET_FLAGS, _UP, _LOOPBACK = 0x8913, 0x8914, 1, 8  # SIOCGIFFLAGS, SIOC…, IFF_…

OPEN_PORTS = (
    "TensorFlow's ports of this cluster listen on every address of this machine and ask for no "
    "password: whoever reaches them can read and write files as you; keep others out with a "
    "firewall"
)


def make_private() -> Callable[[], None]:
    """A new network; the function moves a process that has one thread into it.

    The user stays who it is.

    Raises:
      UserError: this system does not give one.
    """
    try:
        namespaces = _new_namespaces()
    except OSError as error:
        raise UserError(
            f"--network=private: this system gives no private network ({error.strerror}), and "
            "TensorFlow's ports would listen on every address of this machine without a password; "
            "where nobody else can reach it, say --network=open"
        ) from None
    libc = ctypes.CDLL(None, use_errno=True)

    def enter() -> None:
        for namespace in namespaces:
            if libc.setns(namespace, 0):
                raise OSError(ctypes.get_errno(), "cannot enter the network")

    return enter


def is_private() -> bool:
    """Is no interface up but the loopback?"""
    try:
        flags = [_flags(name) for _, name in socket.if_nameindex()]
    except OSError:
        return False
    return all(each & _LOOPBACK for each in flags if each & _UP)


def _new_namespaces() -> list[int]:
    """Open files that stand for what a process must enter: a user's namespace, a network's.

    They are made by a child, since only a process with one thread may make a user's namespace.
    """
    if not sys.platform.startswith("linux"):
        raise OSError(errno.ENOSYS, "it is not Linux")
    libc = ctypes.CDLL(None, use_errno=True)  # loaded before the fork
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        try:
            _leave_network(libc)
            _bring_loopback_up()
            os.write(writer, b"done")
            signal.pause()
        except OSError as error:
            os.write(writer, str(error.strerror).encode())
        finally:
            os._exit(0)
    try:
        os.close(writer)
        said = os.read(reader, 1000).decode()
        os.close(reader)
        if said != "done":
            raise OSError(errno.EPERM, said)
        names = [f"/proc/{child}/ns/{kind}" for kind in ("user", "net")]
        if os.stat(names[0]).st_ino == os.stat("/proc/self/ns/user").st_ino:
            names.pop(0)
        return [os.open(name, os.O_RDONLY) for name in names]
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def _leave_network(libc: ctypes.CDLL) -> None:
    user, group = os.getuid(), os.getgid()
    try:
        _unshare(libc, _NEW_NETWORK)  # root needs no more
    except OSError:
        _unshare(libc, _NEW_USER | _NEW_NETWORK)
        for name, content in (
            ("setgroups", "deny"),
            ("uid_map", f"{user} {user} 1"),
            ("gid_map", f"{group} {group} 1"),
        ):
            with open(f"/proc/self/{name}", "w", encoding="ascii") as file:
                file.write(content)


def _unshare(libc: ctypes.CDLL, what: int) -> None:
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
