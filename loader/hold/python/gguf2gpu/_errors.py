"""The errors of this package. All are of the class Error."""

from __future__ import annotations


def show(value: object) -> str:
    """Return the beginning of a value of a holder's. It costs no more than that, whatever the value is."""
    if isinstance(value, (str, bytes)):
        return repr(value[:100])
    if isinstance(value, bool) or value is None or isinstance(value, float):
        return repr(value)
    if isinstance(value, int):
        return repr(value) if value.bit_length() < 400 else "a number of %d bits" % value.bit_length()
    return "a %s" % type(value).__name__


class Error(Exception):
    """What went wrong, and where."""


class HolderError(Error):
    """What a holder answered. ``kind`` is its kind on the wire, "" for an error that has none."""

    def __init__(self, text: str, kind: str = "") -> None:
        super().__init__(text)
        self.kind = kind


class UnknownModel(HolderError):
    """The holder has no model of that name, or several and none was named."""


class NoHolder(Error, ConnectionError):
    """Nobody holds models at the socket."""


class Gone(Error, ConnectionError):
    """The process that holds the model has ended, or took the model away. Views must not be used any more."""


class Closed(Error, ValueError):
    """The model was closed by this process."""


class ProtocolError(Error):
    """The other side does not speak the protocol, or what it says cannot be true."""


class DeviceError(Error):
    """A call of the HIP runtime failed, or there is no such device. ``code`` is hipError_t, 0 where there is none."""

    def __init__(self, text: str, code: int = 0) -> None:
        super().__init__(text)
        self.code = code


class Unsupported(Error, TypeError):
    """The tensor cannot be had in this form. The text says in which it can."""


class UnknownNames(Error, LookupError):
    """The names of the tensors in transformers are not known for this model."""
