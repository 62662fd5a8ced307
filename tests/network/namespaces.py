"""A network namespace for each site, tied to this machine by a cable that can be cut; and a relay that is slow.

Only root may make them. Delay and loss go through a relay of our own, since not every kernel has ``tc netem``.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys

NEEDED = "needs root and `ip netns` to make network namespaces"
_CHUNK = 1 << 16


def ip(*words: str) -> None:
    """`ip ...`; raises where it fails."""
    subprocess.run(["ip", *words], check=True, capture_output=True, timeout=30)


def available() -> bool:
    """Whether this process may make network namespaces."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        return False
    name = f"fed-probe-{os.getpid()}"
    done = subprocess.run(["ip", "netns", "add", name], check=False, capture_output=True)
    if done.returncode == 0:
        ip("netns", "del", name)
    return done.returncode == 0


class Namespace:
    """A namespace with one cable to the outside. A context manager.

    Args:
        number: 1 to 200; makes names and addresses its own: 10.77.NUMBER.1 outside, 10.77.NUMBER.2 inside.
    """

    def __init__(self, number: int) -> None:
        self.name = f"fed{os.getpid()}n{number}"
        self.outside, self.inside = f"10.77.{number}.1", f"10.77.{number}.2"
        self._cables = (f"fo{os.getpid() % 100000}n{number}", f"fi{os.getpid() % 100000}n{number}")

    def __enter__(self) -> Namespace:
        ip("netns", "add", self.name)
        outer, inner = self._cables
        ip("link", "add", outer, "type", "veth", "peer", "name", inner)
        ip("link", "set", inner, "netns", self.name)
        ip("addr", "add", f"{self.outside}/24", "dev", outer)
        ip("link", "set", outer, "up")
        self.within("addr", "add", f"{self.inside}/24", "dev", inner)
        self.within("link", "set", "lo", "up")
        self.mend()
        return self

    def __exit__(self, *_: object) -> None:
        ip("netns", "del", self.name)  # takes its cable with it

    def within(self, *words: str) -> None:
        """`ip ...` inside."""
        ip("-n", self.name, *words)

    def command(self, *words: str) -> tuple[str, ...]:
        """A command line that runs inside."""
        return ("ip", "netns", "exec", self.name, *words)

    def cut(self) -> None:
        """From now on nothing passes; nobody is told."""
        self.within("link", "set", self._cables[1], "down")

    def mend(self) -> None:
        """Everything passes again, to whatever is outside."""
        self.within("link", "set", self._cables[1], "up")
        self.within("route", "replace", "default", "via", self.outside)


async def _pass_on(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, delay: float, stall: tuple[int, float]
) -> None:
    """Bytes one way: each piece after ``delay`` seconds, and every ``stall[0]`` pieces nothing for ``stall[1]``."""
    number = 0
    try:
        while piece := await reader.read(_CHUNK):
            number += 1
            await asyncio.sleep(stall[1] if number % stall[0] == 0 else delay)
            writer.write(piece)
            await writer.drain()
    except OSError:
        pass
    finally:
        writer.close()


async def relay(listen: str, target: str, ports: list[int], delay: float, stall: tuple[int, float]) -> None:
    """Pass connections to ``listen`` on to ``target``, slowly, until the process is ended."""

    async def serve(port: int) -> asyncio.Server:
        async def meet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                far_reader, far_writer = await asyncio.open_connection(target, port)
            except OSError:
                writer.close()
                return
            await asyncio.gather(
                _pass_on(reader, far_writer, delay, stall), _pass_on(far_reader, writer, delay, stall)
            )

        return await asyncio.start_server(meet, listen, port)

    servers = [await serve(port) for port in ports]
    await asyncio.gather(*(server.serve_forever() for server in servers))


if __name__ == "__main__":
    _, here, there, open_ports, seconds, every, nothing_for = sys.argv
    asyncio.run(
        relay(
            here,
            there,
            [int(port) for port in open_ports.split(",")],
            float(seconds),
            (int(every), float(nothing_for)),
        )
    )
