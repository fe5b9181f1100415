"""The protocol between a holder and those who attach: messages over a Unix socket, four bytes of length and JSON."""

from __future__ import annotations

import array
import errno
import json
import os
import select
import socket
import stat
import struct
import time
from typing import Any, Callable, Dict, List, Optional, Tuple

from ._errors import Error, Gone, HolderError, NoHolder, ProtocolError, UnknownModel, show

# Versions of the protocol that this package speaks, the preferred one first.
VERSIONS = (3, 2)

MAX_REPLY = 64 << 20  # bytes of a message, as the holder's own clients bound it
MESSAGE_TIME = 10.0  # seconds that a message may take once it has begun
SILENT_TIME = 60.0  # seconds that a holder may say nothing: while it works, it says so every two
# What a message may have for its size, from 64 KiB on: its values take more memory than its text. Real ones have half as
# many. These are the bytes of text for each object, array, comma and text that is no key.
_SMALL, _OBJECT, _ARRAY, _COMMA, _STRING = 64 << 10, 80, 12, 5, 10
_MAX_TEXT = 4096  # characters of what a holder says to people
_MAX_FDS = 253  # descriptors that Linux sends with one message (SCM_MAX_FD)


def socket_path() -> str:
    """Return where a holder of this user listens: gguf2gpu.sock in the user's runtime directory, or in one of the
    user's own in the directory for temporary files."""
    return os.path.join(_directory()[0], "gguf2gpu.sock")


def _directory() -> Tuple[str, bool]:
    """Return the directory of socket_path, and whether it is one that gguf2gpu makes where everybody may make one."""
    directory = os.environ.get("XDG_RUNTIME_DIR", "")
    if os.path.isabs(directory):  # others are ignored, as the XDG Base Directory Specification wants it
        return directory, False
    directory = "/run/user/%d" % os.getuid()
    if os.path.isdir(directory):
        return directory, False
    return os.path.join(os.environ.get("TMPDIR") or "/tmp", "gguf2gpu-%d" % os.getuid()), True


def _default_path() -> str:
    """Return socket_path, if no other user can have put something there."""
    path = socket_path()
    directory, ours = _directory()
    try:
        info = os.stat(directory)
        if ours and os.path.islink(directory):  # whoever made it may turn it
            raise Error("%s, the default directory for sockets, is a symbolic link; name a socket elsewhere" % directory)
    except FileNotFoundError:
        return path
    if info.st_uid != os.geteuid() or stat.S_IMODE(info.st_mode) & 0o022:
        raise Error(
            "%s, the default directory for sockets, can be written by other users; name a socket elsewhere" % directory
        )
    return path


class Connection:
    """A connection to a holder. It is not safe for several threads; its owner locks."""

    def __init__(self, path: Optional[str], timeout: Optional[float] = None) -> None:
        path = path or _default_path()
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self._buffer = bytearray()
        self._since = 0.0  # when the message that is not complete began
        self.fds: List[int] = []  # descriptors that have come and nobody has taken
        # Connecting and sending wait where nobody accepts or reads.
        seconds = MESSAGE_TIME if timeout is None else max(0.001, min(timeout, MESSAGE_TIME))
        limit = struct.pack("@ll", int(seconds), int(seconds % 1 * 1e6))
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
        try:
            self.sock.connect(path)
        except BlockingIOError as e:
            self.sock.close()
            raise Error("connecting to %s: nobody has accepted within %.3g s" % (path, seconds)) from e
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
            if len(self.fds) > _MAX_FDS:
                raise ProtocolError("the holder sends descriptors again and again")
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
        body = bytes(memoryview(self._buffer)[4 : 4 + size])
        del self._buffer[: 4 + size]
        self._since = time.monotonic()
        _check(body)
        try:
            decoded = body.decode()
            del body
            message = json.loads(decoded)
        except (ValueError, RecursionError) as e:
            raise ProtocolError("a message that is not of this protocol: %.300s" % e) from e
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


def _check(body: bytes) -> None:
    """Refuse a message that would take much more memory than its text does."""
    n = len(body)
    if n > _SMALL and (
        body.count(b"{") > n // _OBJECT
        or body.count(b"[") > n // _ARRAY
        or body.count(b",") > n // _COMMA
        or body.count(b'"') // 2 - body.count(b'":') > n // _STRING  # keys are there once, however often they come
    ):
        raise ProtocolError(
            "a message of %d bytes has more values than real ones: the other side is damaged or hostile" % n
        )


def error_of(reply: Dict[str, Any]) -> Optional[Error]:
    """Return the error that a reply brings, if it brings one."""
    error = reply.get("error")
    if not error:
        return None
    text = error[:_MAX_TEXT] if isinstance(error, str) else show(error)
    kind = reply.get("kind")
    if kind == "unknown":
        return UnknownModel(text, kind)
    if kind == "closing":
        return Gone(text)
    return HolderError(text, kind[:100] if isinstance(kind, str) else "")


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
        connection = Connection(path, None if end is None else end - time.monotonic())
        try:
            connection.send(dict(request, version=version))
            while True:
                left = None if end is None else max(0.0, end - time.monotonic())
                silent = version == 3 and (left is None or left > SILENT_TIME)
                try:
                    reply = connection.receive(SILENT_TIME if silent else left)
                except TimeoutError as e:
                    if not silent:
                        raise
                    raise Gone("the holder has said nothing for %d s" % SILENT_TIME) from e
                what = reply.get("waiting")
                if not what:
                    break
                connection.drop_fds()
                if waiting is not None:
                    waiting(what[:_MAX_TEXT] if isinstance(what, str) else show(what))
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
    found = reply.get("models") or []
    if not isinstance(found, list) or not all(isinstance(m, dict) for m in found):
        raise ProtocolError("the models are not a list of objects")
    return found
