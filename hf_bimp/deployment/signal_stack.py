"""The alternate stack of signal handlers, which OpenVINO and nncf leave pointing at memory that they have freed."""

import contextlib
import ctypes
import sys
from collections.abc import Iterator

_DISABLED = 2  # SS_DISABLE


class _Stack(ctypes.Structure):
    _fields_ = [("address", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]


@contextlib.contextmanager
def preserved_signal_stack() -> Iterator[None]:
    """Whatever libraries make of this thread's alternate signal stack inside, it is what it was afterwards.

    Python runs its handlers on it: without this the next signal (Ctrl-C, the end of a worker) would end the process.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None  # the order of the fields is Linux's
    before = _Stack()
    is_known = libc is not None and libc.sigaltstack(None, ctypes.byref(before)) == 0
    try:
        yield
    finally:
        if libc is not None and is_known:
            before.flags &= _DISABLED
            libc.sigaltstack(ctypes.byref(before), None)
