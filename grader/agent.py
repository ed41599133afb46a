"""The frames between the grader and the guest's agent (images/guest/agent.c), as plain data.

A frame is a header of 12 bytes, little endian (u32 magic, u8 type, u8 unused, u16 id, u32 length)
and `length` bytes. Nothing here waits or reads: bytes go in, frames come out. The bytes come from
a kernel that a student has changed, so nothing in them is believed.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum

_HEADER = struct.Struct("<IBBHI")
_MAGIC = 0x0141504D
_MAX_PAYLOAD = 256 << 10


class Type(IntEnum):
    """The types of frames; those below 16 go to the agent."""

    RUN = 1
    KILL = 2
    PING = 3
    SYSRQ = 4
    HELLO = 16
    OUTPUT = 17
    EXIT = 18
    PONG = 19
    ERROR = 20


class Malformed(Exception):
    """What came from the guest is not the agent's language."""


@dataclass(frozen=True)
class Frame:
    """One frame: its type, the id of the request that it belongs to, and its bytes."""

    type: Type
    id: int
    payload: bytes


@dataclass(frozen=True)
class Exit:
    """How a command ended: the exit code, or minus the signal's number."""

    status: int
    truncated: bool
    killed: bool


def pack(kind: Type, number: int, payload: bytes = b"") -> bytes:
    """Return the bytes of a frame; `number` is its id, below 65,536."""
    if len(payload) > _MAX_PAYLOAD:
        raise ValueError(f"a frame carries at most {_MAX_PAYLOAD} bytes, not {len(payload)}")
    return _HEADER.pack(_MAGIC, kind, 0, number, len(payload)) + payload


def pack_run(number: int, command: str, uid: int, cap: int) -> bytes:
    """Return the frame that runs `command` as `uid`, with at most `cap` bytes of output."""
    text = command.encode()
    if b"\0" in text:
        raise ValueError("a command cannot hold a NUL byte")
    return pack(Type.RUN, number, struct.pack("<II", uid, cap) + text)


def unpack_exit(frame: Frame) -> Exit:
    """Return what an EXIT frame says; raise `Malformed` if it says nothing."""
    if len(frame.payload) != 8:
        raise Malformed(f"an EXIT frame of {len(frame.payload)} bytes")
    status, flags = struct.unpack("<iI", frame.payload)
    return Exit(status, bool(flags & 1), bool(flags & 2))


class Frames:
    """Cuts a stream of bytes into frames."""

    def __init__(self) -> None:
        self._held = bytearray()

    def feed(self, data: bytes) -> Iterator[Frame]:
        """Take `data` and yield the frames that it completes; raise `Malformed` on junk."""
        self._held += data
        while len(self._held) >= _HEADER.size:
            magic, kind, _, number, length = _HEADER.unpack_from(self._held)
            if magic != _MAGIC or length > _MAX_PAYLOAD:
                raise Malformed(f"the bytes {bytes(self._held[:16]).hex(' ')} begin no frame")
            end = _HEADER.size + length
            if len(self._held) < end:
                return
            payload = bytes(self._held[_HEADER.size : end])
            del self._held[:end]
            try:
                yield Frame(Type(kind), number, payload)
            except ValueError:
                raise Malformed(f"a frame of the unknown type {kind}") from None
