"""The protocol between a holder and those who attach: messages over a Unix socket, four bytes of length and JSON."""

from __future__ import annotations

import array
import errno
import json
import os
import select
import socket
import stat
import time
from typing import Any, Callable, Dict, List, Optional, Tuple

from ._errors import Error, Gone, HolderError, NoHolder, ProtocolError, UnknownModel

# Versions of the protocol that this package speaks, the preferred one first.
VERSIONS = (3, 2)

MAX_REPLY = 64 << 20  # bytes of a message, as the holder's own clients bound it
MESSAGE_TIME = 10.0  # seconds that a message may take once it has begun
_MAX_FDS = 253  # descriptors that Linux sends with one message (SCM_MAX_FD)


def socket_path() -> str:
    """Return where a holder of this user listens: gguf2gpu.sock in the user's runtime directory, or in one of the
    user's own in the directory for temporary files."""
    directory = os.environ.get("XDG_RUNTIME_DIR", "")
    if not directory:
        directory = "/run/user/%d" % os.getuid()
        if not os.path.isdir(directory):
            directory = os.path.join(os.environ.get("TMPDIR") or "/tmp", "gguf2gpu-%d" % os.getuid())
    return os.path.join(directory, "gguf2gpu.sock")


def _default_path() -> str:
    """Return socket_path, if no other user can have put something there."""
    path = socket_path()
    directory = os.path.dirname(path)
    try:
        info = os.stat(directory)
    except FileNotFoundError:
        return path
    if info.st_uid != os.geteuid() or stat.S_IMODE(info.st_mode) & 0o022:
        raise Error(
            "%s, the default directory for sockets, can be written by other users; name a socket elsewhere" % directory
        )
    return path


class Connection:
    """A connection to a holder. It is not safe for several threads; its owner locks."""

    def __init__(self, path: Optional[str]) -> None:
        path = path or _default_path()
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self._buffer = bytearray()
        self._since = 0.0  # when the message that is not complete began
        self.fds: List[int] = []  # descriptors that have come and nobody has taken
        try:
            self.sock.connect(path)
        except (FileNotFoundError, ConnectionRefusedError) as e:
            self.sock.close()
            raise NoHolder("nobody holds models at %s: %s; 'gguf2gpu hold MODEL' does" % (path, e.strerror)) from e
        except OSError as e:
            self.sock.close()
            raise Error("connecting to %s: %s" % (path, e.strerror or e)) from e

    def send(self, message: Dict[str, Any]) -> None:
        body = json.dumps(message).encode()
        try:
            self.sock.sendall(len(body).to_bytes(4, "big") + body)
        except BrokenPipeError:
            pass  # a reply may say why
        except OSError as e:
            raise Gone("the holder is gone: %s" % e) from e

    def receive(self, timeout: Optional[float] = None) -> Dict[str, Any]:
        """Return the next message. None waits for it as long as it takes."""
        end = None if timeout is None else time.monotonic() + timeout
        while True:
            message = self.poll()
            if message is not None:
                return message
            left = None if end is None else end - time.monotonic()
            if left is not None and left <= 0:
                raise TimeoutError("the holder has not answered in time")
            if self._buffer:
                left = MESSAGE_TIME if left is None else min(left, MESSAGE_TIME)
            self.wait(left)

    def wait(self, timeout: Optional[float]) -> None:
        """Wait until there is something to read, or the time is over."""
        poll = select.poll()  # select.select refuses descriptors above 1023
        poll.register(self.sock, select.POLLIN)
        poll.poll(None if timeout is None else max(1, int(timeout * 1000)))

    def poll(self) -> Optional[Dict[str, Any]]:
        """Return the next message if it has come, without waiting. The holder's end is Gone."""
        message = self._take()
        while message is None:
            try:
                data, control, flags, _ = self.sock.recvmsg(
                    1 << 20, socket.CMSG_SPACE(4 * _MAX_FDS), socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
                )
            except (BlockingIOError, InterruptedError):
                if self._buffer and time.monotonic() - self._since > MESSAGE_TIME:
                    raise Gone("the holder has begun a message and does not end it") from None
                return None
            except OSError as e:
                if e.errno == errno.EBADF:
                    raise Gone("the connection to the holder is closed") from e
                raise Gone("the holder is gone: %s" % e) from e
            self._take_fds(control)
            if flags & socket.MSG_CTRUNC:
                raise ProtocolError("the holder sent more descriptors than this process can have")
            if not data:
                raise Gone("the holder is gone: it has closed the connection")
            if not self._buffer:
                self._since = time.monotonic()
            self._buffer += data
            message = self._take()
        return message

    def _take_fds(self, control: List[Tuple[int, int, bytes]]) -> None:
        for level, kind, data in control:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds = array.array("i")
                fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
                self.fds.extend(fds)

    def _take(self) -> Optional[Dict[str, Any]]:
        if len(self._buffer) < 4:
            return None
        size = int.from_bytes(self._buffer[:4], "big")
        if size > MAX_REPLY:
            raise ProtocolError(
                "a message of %d bytes, the limit is %d: the other side does not speak this protocol"
                % (size, MAX_REPLY)
            )
        if len(self._buffer) < 4 + size:
            return None
        body = bytes(self._buffer[4 : 4 + size])
        del self._buffer[: 4 + size]
        self._since = time.monotonic()
        try:
            message = json.loads(body)
        except ValueError as e:
            raise ProtocolError("a message that is not of this protocol: %s" % e) from e
        if not isinstance(message, dict):
            raise ProtocolError("a message that is no object")
        return message

    def drop_fds(self) -> None:
        """Close the descriptors that nobody has taken."""
        for fd in self.fds:
            os.close(fd)
        self.fds = []

    def close(self) -> None:
        self.drop_fds()
        self.sock.close()


def error_of(reply: Dict[str, Any]) -> Optional[Error]:
    """Return the error that a reply brings, if it brings one."""
    text = reply.get("error")
    if not text:
        return None
    kind = str(reply.get("kind", ""))
    if kind == "unknown":
        return UnknownModel(str(text), kind)
    if kind == "closing":
        return Gone(str(text))
    return HolderError(str(text), kind)


def ask(
    path: Optional[str],
    request: Dict[str, Any],
    timeout: Optional[float],
    waiting: Optional[Callable[[str], None]] = None,
) -> Tuple[Connection, Dict[str, Any]]:
    """Send a request and return the connection and the first reply that does not tell to wait, which waiting is told.
    The caller closes the connection."""
    end = None if timeout is None else time.monotonic() + timeout
    refused: Optional[Error] = None
    for version in VERSIONS:
        connection = Connection(path)
        try:
            connection.send(dict(request, version=version))
            while True:
                reply = connection.receive(None if end is None else max(0.0, end - time.monotonic()))
                what = reply.get("waiting")
                if not what:
                    break
                connection.drop_fds()
                if waiting is not None:
                    waiting(str(what))
            refused = error_of(reply)
            if refused is None:
                return connection, reply
            if reply.get("version") == version or reply.get("version") not in VERSIONS:
                raise refused
        except BaseException:
            connection.close()
            raise
        connection.close()  # the holder speaks another version, which may be the next one
    assert refused is not None
    raise refused


def models(socket: Optional[str] = None, timeout: Optional[float] = 10.0) -> List[Dict[str, Any]]:
    """Return what a holder holds: a dict for each model, with the keys of ``gguf2gpu hold --list --json``.

    socket is the path of the holder's, None for the usual one. Errors are NoHolder, Gone, HolderError, ProtocolError,
    and TimeoutError after timeout seconds (None: never)."""
    connection, reply = ask(socket, {"op": "list"}, timeout)
    connection.close()
    return list(reply.get("models") or [])
