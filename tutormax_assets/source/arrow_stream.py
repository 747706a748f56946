"""Batches of a driver's result, one after the other, while other Python threads go on.

Polars reads such a stream batch by batch only with the interpreter's lock held, so that an event
loop, or a tunnel to the database in the same process, stands still for as long as the server takes.
A function that is called through ctypes is called without the lock. The structures are those of the
Arrow C data and stream interfaces (https://arrow.apache.org/docs/format/CDataInterface.html).
"""

import ctypes
from collections.abc import Generator
from typing import Any, Protocol

import polars as pl

from tutormax_assets.errors import TutormaxError


class ArrowStreamError(TutormaxError):
    """The stream broke off; the message is the driver's."""


class ArrowStream(Protocol):
    """What gives its batches through the Arrow PyCapsule interface."""

    def __arrow_c_stream__(self, requested_schema: object = None) -> object: ...


class _Schema(ctypes.Structure):
    pass


class _Array(ctypes.Structure):
    pass


class _Stream(ctypes.Structure):
    pass


_ReleaseSchema = ctypes.CFUNCTYPE(None, ctypes.POINTER(_Schema))
_ReleaseArray = ctypes.CFUNCTYPE(None, ctypes.POINTER(_Array))
_Schema._fields_ = [
    ("format", ctypes.c_void_p),
    ("name", ctypes.c_void_p),
    ("metadata", ctypes.c_void_p),
    ("flags", ctypes.c_int64),
    ("n_children", ctypes.c_int64),
    ("children", ctypes.c_void_p),
    ("dictionary", ctypes.c_void_p),
    ("release", _ReleaseSchema),
    ("private_data", ctypes.c_void_p),
]
_Array._fields_ = [
    ("length", ctypes.c_int64),
    ("null_count", ctypes.c_int64),
    ("offset", ctypes.c_int64),
    ("n_buffers", ctypes.c_int64),
    ("n_children", ctypes.c_int64),
    ("buffers", ctypes.c_void_p),
    ("children", ctypes.c_void_p),
    ("dictionary", ctypes.c_void_p),
    ("release", _ReleaseArray),
    ("private_data", ctypes.c_void_p),
]
_Stream._fields_ = [
    (
        "get_schema",
        ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(_Stream), ctypes.POINTER(_Schema)),
    ),
    ("get_next", ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(_Stream), ctypes.POINTER(_Array))),
    ("get_last_error", ctypes.CFUNCTYPE(ctypes.c_char_p, ctypes.POINTER(_Stream))),
    ("release", ctypes.c_void_p),
    ("private_data", ctypes.c_void_p),
]

_pointer_of = ctypes.pythonapi.PyCapsule_GetPointer
_pointer_of.restype = ctypes.c_void_p
_pointer_of.argtypes = [ctypes.py_object, ctypes.c_char_p]
_capsule = ctypes.pythonapi.PyCapsule_New
_capsule.restype = ctypes.py_object
_capsule.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]


class _Batch:
    """A batch whose memory belongs to whoever takes it."""

    def __init__(self, schema: Any, array: Any) -> None:
        self.schema, self.array = schema, array

    def __arrow_c_array__(self, requested_schema: object = None) -> tuple[object, object]:
        return (
            _capsule(ctypes.addressof(self.schema), b"arrow_schema", None),
            _capsule(ctypes.addressof(self.array), b"arrow_array", None),
        )


def batches(source: ArrowStream) -> Generator[pl.DataFrame, None, None]:
    """The batches of a stream; each is there before the next one is asked for.

    Raises:
        ArrowStreamError: The stream broke off.
    """
    # The stream lives as long as its capsule.
    capsule = source.__arrow_c_stream__()
    stream = ctypes.cast(
        _pointer_of(capsule, b"arrow_array_stream"), ctypes.POINTER(_Stream)
    ).contents

    def check(code: int) -> None:
        if code:
            said = stream.get_last_error(stream)
            raise ArrowStreamError(said.decode() if said else f"error {code}")

    while True:
        array, schema = _Array(), _Schema()
        check(stream.get_next(stream, array))
        if not array.release:
            return
        try:
            check(stream.get_schema(stream, schema))
            yield pl.DataFrame(_Batch(schema, array))
        finally:
            # What was taken over has nothing to release any more.
            for left in (array, schema):
                if left.release:
                    left.release(left)
