"""A network namespace for each site, tied to this machine by a cable that can be cut, or by one that is slow and loses.

Only root may make them. Not every kernel has ``tc netem``, so a bad cable is two TUN devices and a process between them
that holds packets back and drops some. What TCP makes of that is the kernel's own doing.
"""

from __future__ import annotations

import fcntl
import os
import random
import select
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections import deque
from pathlib import Path

NEEDED = "needs root, `ip netns` and /dev/net/tun to make network namespaces and bad cables"
_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000  # linux/if_tun.h
_PACKET = 1 << 16


def ip(*words: str) -> None:
    """`ip ...`; raises where it fails."""
    subprocess.run(["ip", *words], check=True, capture_output=True, timeout=30)


def available() -> bool:
    """Whether this process may make network namespaces."""
    if os.geteuid() != 0 or shutil.which("ip") is None or not Path("/dev/net/tun").exists():
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
        loss: share of the packets that the cable drops, each way.
        delay: seconds for which it holds back the others.
    """

    def __init__(self, number: int, *, loss: float = 0.0, delay: float = 0.0) -> None:
        self.name = f"fed{os.getpid()}n{number}"
        self.outside, self.inside = f"10.77.{number}.1", f"10.77.{number}.2"
        self._cables = (f"fo{os.getpid() % 100000}n{number}", f"fi{os.getpid() % 100000}n{number}")
        self._loss, self._delay = loss, delay
        self._carrier: subprocess.Popen[str] | None = None

    def __enter__(self) -> Namespace:
        ip("netns", "add", self.name)
        outer, inner = self._cables
        if self._loss or self._delay:
            words = (outer, inner, str(self._loss), str(self._delay))
            self._carrier = subprocess.Popen(
                [sys.executable, "-P", __file__, *words], stdout=subprocess.PIPE, text=True
            )
            assert self._carrier.stdout is not None
            assert self._carrier.stdout.readline() == "ready\n"
        else:
            ip("link", "add", outer, "type", "veth", "peer", "name", inner)
        ip("link", "set", inner, "netns", self.name)
        ip("addr", "add", f"{self.outside}/24", "dev", outer)
        ip("link", "set", outer, "up")
        self.within("addr", "add", f"{self.inside}/24", "dev", inner)
        self.within("link", "set", "lo", "up")
        self.mend()
        return self

    def __exit__(self, *_: object) -> None:
        if self._carrier is not None and self._carrier.poll() is None:
            self.lost()
        ip("netns", "del", self.name)  # takes its cable with it

    def lost(self) -> tuple[int, int]:
        """Packets that a bad cable has dropped and passed on. It is gone then."""
        assert self._carrier is not None
        self._carrier.terminate()
        told, _ = self._carrier.communicate(timeout=30)
        dropped, passed = map(int, told.split())
        return dropped, passed

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


def _tun(name: str) -> int:
    """The file of a new TUN device: one IP packet a read and a write."""
    device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(device, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _IFF_TUN | _IFF_NO_PI))
    return device


def carry(names: tuple[str, str], loss: float, delay: float) -> tuple[int, int]:
    """Be the cable between two new devices until SIGTERM comes; packets dropped and passed on."""
    devices = [_tun(name) for name in names]
    other = dict(zip(devices, reversed(devices), strict=True))
    draw, dropped, passed = random.Random(0), 0, 0
    held: deque[tuple[float, int, bytes]] = deque()  # in order of time, since all wait equally long
    waiting = select.poll()
    for device in devices:
        waiting.register(device, select.POLLIN)
    ended: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: ended.append(number))
    print("ready", flush=True)
    while not ended:
        wait = max(0.0, held[0][0] - time.monotonic()) if held else 0.2
        for device, _ in waiting.poll(1000 * wait):
            try:
                packet = os.read(device, _PACKET)
            except OSError:  # the device is down
                continue
            if draw.random() < loss:
                dropped += 1
            else:
                held.append((time.monotonic() + delay, other[device], packet))
        while held and held[0][0] <= time.monotonic():
            _, target, packet = held.popleft()
            try:
                os.write(target, packet)
                passed += 1
            except OSError:  # the other end is down, or full: lost as well
                dropped += 1
    return dropped, passed


if __name__ == "__main__":
    _, one, two, share, seconds = sys.argv
    print(*carry((one, two), float(share), float(seconds)))
