"""A TCP echo server with switchable faults, for the tests of the load generator.

Run as a program it reads lines of options from standard input; for each it listens on another
free port of 127.0.0.1 and prints the port. It serves until its standard input ends. A fault
strikes the connections that ``--connections`` names (numbers in the order of accepting; default
all), at byte ``--at`` (from 0) of the connection's stream.
"""

from __future__ import annotations

import argparse
import asyncio
import socket
import struct
import sys

FAULTS = (
    "none",
    "flip",  # the byte's bits are inverted
    "flip-every",  # so is every --at'th byte (the first is number at - 1)
    "drop",  # the byte is left out
    "extra",  # a byte is added before this one
    "greet",  # a byte is sent before anything has been received
    "close",  # the connection is closed in place of the byte
    "stall",  # nothing is sent from the byte on, and nothing read
    "reset",  # RST in place of the byte
    "pieces",  # bytes are sent one by one
    "late",  # a byte more is sent after the client's FIN
    "linger",  # the client's FIN is never answered
)
ENDS = {"close", "stall", "reset"}
CHUNK = 1 << 16


class Echo:
    """The server: counts connections and applies one fault."""

    def __init__(self, fault: str, at: int, connections: set[int] | None) -> None:
        self.fault = fault
        self.at = at
        self.connections = connections
        self.accepted = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection to its end."""
        number = self.accepted
        self.accepted += 1
        struck = self.connections is None or number in self.connections
        try:
            await self._serve(reader, writer, self.fault if struck else "none")
        except (ConnectionError, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    async def _serve(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, fault: str
    ) -> None:
        position = 0
        writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if fault == "greet":
            writer.write(b"!")
        while data := bytearray(await reader.read(CHUNK)):
            here = self.at - position
            position += len(data)
            if fault == "flip-every":
                for i in range((here - 1) % self.at, len(data), self.at):
                    data[i] ^= 0xFF
            elif 0 <= here < len(data):
                if fault in ENDS:
                    await self._end(writer, data[:here], fault)
                    return
                self._damage(data, here, fault)
            step = 1 if fault == "pieces" else len(data)
            for i in range(0, len(data), step):
                writer.write(data[i : i + step])
                await writer.drain()
        if fault == "late":
            writer.write(b"!")
            await writer.drain()
        if fault == "linger":
            await asyncio.Event().wait()

    def _damage(self, data: bytearray, here: int, fault: str) -> None:
        if fault == "flip":
            data[here] ^= 0xFF
        elif fault == "drop":
            del data[here]
        elif fault == "extra":
            data[here:here] = b"!"

    async def _end(self, writer: asyncio.StreamWriter, data: bytearray, fault: str) -> None:
        writer.write(data)
        await writer.drain()
        if fault == "stall":
            await asyncio.Event().wait()
        if fault == "reset":
            linger = struct.pack("ii", 1, 0)
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            writer.transport.abort()


def parse(line: str) -> Echo:
    """Return the server that a command line asks for."""
    parser = argparse.ArgumentParser(prog="echo_server", description=__doc__)
    parser.add_argument("--fault", choices=FAULTS, default="none")
    parser.add_argument("--at", type=int, default=0)
    parser.add_argument("--connections", type=int, nargs="*", default=None)
    arguments = parser.parse_args(line.split())
    chosen = None if arguments.connections is None else set(arguments.connections)
    return Echo(arguments.fault, arguments.at, chosen)


async def main() -> None:
    """Start a server for each line of standard input, and end with it."""
    loop = asyncio.get_running_loop()
    servers = []
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        server = await asyncio.start_server(parse(line).serve, "127.0.0.1", 0, backlog=4096)
        servers.append(server)
        print(server.sockets[0].getsockname()[1], flush=True)


if __name__ == "__main__":
    asyncio.run(main())
