"""The connection to a holder, and what is mapped for it."""

from __future__ import annotations

import os
import threading
import time
import weakref
from typing import Any, Dict, List, Optional

from . import _manifest, _memory, _wire
from ._errors import Closed, DeviceError, Error


class Attachment:
    """The connection to a holder and what is mapped for it. Tensors and views keep it; when the last of them has gone,
    everything is unmapped, and then the holder hears of it."""

    def __init__(
        self,
        connection: _wire.Connection,
        machine: _memory.Machine,
        socket: Optional[str],
        manifest: _manifest.Manifest,
    ) -> None:
        self.connection, self.machine, self.socket = connection, machine, socket
        self.name, self.residence, self.independent = manifest.name, manifest.residence, manifest.descriptors
        self.ending = self.alone = False
        self.looked = 0.0  # when the next holder was looked for
        self.heard = 0.0  # when the holder was last listened to
        self.memories: List[List[_memory.Memory]] = []  # by device, in the order of the manifest
        self.lock = threading.RLock()
        self.ready, self.loaded = 0, False
        self.error: Optional[Error] = None  # why the model cannot be used
        self.closed = False
        self.pid = os.getpid()
        self.connections = [connection]  # the one that is open now
        self.end = weakref.finalize(self, _release, self.connections, machine, self.memories)
        self.end.atexit = False  # views may still be used then; the process's end frees everything
        _attachments.add(self)

    def refresh(self) -> None:
        """Take in what the holder has said, without waiting. Raise what makes the model unusable."""
        with self.lock:
            if self.closed:
                raise Closed("the model is closed")
            if self.pid != os.getpid():
                raise Closed("the model was attached to by the parent of this process; a child attaches itself")
            if self.loaded and self.independent:  # whatever the holder says by now, the memory stays
                now = time.monotonic()
                if now - self.heard < _HEAR_EVERY:
                    return
                self.heard = now
            for _ in range(_MOST_MESSAGES):  # a holder that sends without end does not keep anybody here
                if self.error is not None:
                    break
                if self.alone:
                    return self.rejoin()
                try:
                    reply = self.connection.poll()
                except Error as e:
                    if self.independent and self.loaded:  # the memory stays without the holder
                        self.alone = True
                        continue
                    self.error = _again(e)
                    break
                self.connection.drop_fds()  # none is expected any more
                if reply is None:
                    return
                self.take(reply)
            if self.error is not None:
                raise _again(self.error) from None

    def rejoin(self) -> None:
        """Tell the next holder, if there is one that has adopted the memory, that it is in use."""
        if time.monotonic() - self.looked < _LOOK_EVERY:
            return
        try:
            connection, reply = _wire.ask(
                self.socket, {"op": "attach", "model": self.name, "residence": self.residence}, _LOOK_FOR
            )
        except (Error, OSError):
            self.looked = time.monotonic()
            return
        connection.drop_fds()
        manifest = reply.get("manifest")
        if not isinstance(manifest, dict) or manifest.get("residence") != self.residence:
            connection.close()
            self.looked = time.monotonic()
            return
        self.connection.close()
        self.connection = self.connections[0] = connection
        self.alone = self.ending = False

    def take(self, reply: Dict[str, Any]) -> None:
        error = _wire.error_of(reply)
        if error is not None:
            if self.independent and self.loaded:  # whatever the holder says, the memory is there
                self.alone = True
            else:
                self.error = error
            return
        ready = reply.get("ready", 0)
        if isinstance(ready, int):
            self.ready = max(self.ready, ready)
        self.loaded = self.loaded or reply.get("loaded") is True
        self.ending = self.ending or reply.get("ending") is True

    def wait(self, count: int, timeout: Optional[float]) -> None:
        """Wait until so many tensors have arrived."""
        end = None if timeout is None else time.monotonic() + timeout
        while True:
            self.refresh()
            if self.loaded or self.ready >= count:
                return
            left = 0.05  # another thread may read the message that this one waits for
            if end is not None:
                left = min(left, end - time.monotonic())
                if left <= 0:
                    raise TimeoutError(
                        "tensor %d has not arrived in time; %d have" % (count, self.ready)
                    )
            self.connection.wait(left)


def _again(e: Error) -> Error:
    """Return an error like e, without the traceback: that would keep what the frames use, the attachment among it."""
    copy = type(e).__new__(type(e), *e.args)
    copy.args = e.args
    copy.__dict__.update(e.__dict__)
    return copy


_MOST_MESSAGES = 1000  # that are taken in at once
_HEAR_EVERY = 0.001  # seconds between two looks for messages of the holder of a model that is all there
_LOOK_EVERY = 2.0  # seconds between two looks for another holder
_LOOK_FOR = 0.2  # seconds that one may take

_attachments: "weakref.WeakSet[Attachment]" = weakref.WeakSet()


def _release(
    connections: List[_wire.Connection], machine: _memory.Machine, memories: List[List[_memory.Memory]]
) -> None:
    try:
        if any(memories):
            machine.synchronize()
        for memory in (m for of in memories for m in of):
            memory.close()
    except (DeviceError, BufferError):
        pass  # the runtime is of a parent process, or has failed: there is nobody to tell, and nothing else to do
    finally:
        memories.clear()
        connections[0].close()


def _after_fork() -> None:
    """A child has the parent's connections, too, and would keep them open. It cannot use them."""
    for attachment in list(_attachments):
        attachment.end.detach()
        attachment.connection.close()


os.register_at_fork(after_in_child=_after_fork)


def open_allocation(attachment: Attachment, a: _manifest.Allocation) -> _memory.Memory:
    """Map an allocation. A further way of sharing memory is a further case here."""
    if a.handle is not None:
        return attachment.machine.open_handle(a.device, a.handle, a.nbytes)
    return attachment.machine.open_descriptor(a.device, attachment.connection.fds.pop(0), a.size, a.address)


class ClosedAttachment:
    """Stands for the attachment of a model that is closed."""

    closed = True

    def refresh(self) -> None:
        raise Closed("the model is closed")

    def wait(self, count: int, timeout: Optional[float]) -> None:
        self.refresh()


CLOSED: Any = ClosedAttachment()
