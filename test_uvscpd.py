#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-3.0-or-later
"""Tests of uvscpd.py: its functions, its TCP protocol, its command line.

    python3 test_uvscpd.py                          all tests, on the virtual bus
    python3 test_uvscpd.py CommandTest              one class, or Class.test
    UVSCPD_TEST_CAN=vcan0 python3 test_uvscpd.py    all tests, on a SocketCAN interface
    UVSCPD_TEST_LONG=1 python3 test_uvscpd.py       also those that take minutes
    python3 test_uvscpd.py fuzz [SECONDS [SEED]]    hostile lines
    python3 test_uvscpd.py soak [SECONDS [IFACE]]   full load, clients come and go
    python3 test_uvscpd.py bench [IFACE [SECONDS]]  a table of figures

A test of a command is a transcript of what clients A, B ... send and get. To add one,
write lines like these into TRANSCRIPTS of CommandTest; each title becomes a test:

    test_SGID_then_GGID
        A> sgid ::5
        A> ggid                     | ::5 | +OK

    >  commands to send, with ` ; ` between them; each `|` starts a line of the last
       one's reply. The others, and the last one without a `|`, must get `+OK`, by which
       `+OK - Success.` is meant
    <  further lines to get: A< 96,20,3,0,*,#,::5,0,1,35
    =  wait until so many events are buffered for this client: A= 1

The letter may be missing if there is only one client. `*` stands for a date and time,
`#` for a timestamp, `*,#` for both as in an event, `...` for any text, `::5` for a
GUID of zeros that ends with 5, ` $` for a space at the end of a line, and `(closed)`
for the end of the connection. Successive `>` lines of one client go in one packet,
unless a blank line stands between them. At the end each client still connected quits.

Three verbs play such lines:

    self.play(transcript)       in four ways, each with new clients: line by line, packet
                                by packet, byte by byte, and with more lines after QUIT.
                                Each test in TRANSCRIPTS does this; if arguments stand
                                after its title, on a daemon of its own
    talk(transcript, a, b)      once, with these connected clients as A and B
    peer.say("rcvloop ; chid | 0 | +OK")        once, what may stand after a `>`

`peer.ask("stat")` returns the lines of a reply, for a test that has to take them apart.

A test of timing, or of what cannot be provoked from outside, runs a daemon in the test's
own process. Such a daemon does only what the test calls, and its clock stands still:
`daemon.now += 2; daemon.tick()`; what the bus or the kernel would do is replaced by
`mock`. TurnTest has examples.

A test of the kernel is a method of a KernelTestCase. It gets an interface of its own and
a daemon on that; it can take the interface down (go_down) or away (unplug), and be
another program on it (node). These tests need root and UVSCPD_TEST_CAN.

The sections are those of uvscpd.py, in its order, then the files, a real kernel,
abuse, and the long runs. A test that changes the whole machine, its clock for one,
runs only under .ci/kernel.
"""

# =============================================================================
# Imports, tools
# =============================================================================
# A daemon, its clients, transcripts. No test sleeps to wait for something: sleeping
# only sets the pace of a load. A time limit only ends what would never end by itself.

from __future__ import annotations

import argparse
import ast
import compileall
import contextlib
import doctest
import errno
import fcntl
import hashlib
import inspect
import itertools
import os
import pathlib
import random
import re
import resource
import select
import selectors
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import termios
import threading
import time
import tty
import unittest
from calendar import timegm
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any, ClassVar, NamedTuple
from unittest import mock

import uvscpd

HERE = os.path.dirname(os.path.abspath(__file__))
PROGRAM = os.path.join(HERE, "uvscpd.py")
CAN = os.environ.get("UVSCPD_TEST_CAN", "")
BUS = CAN or ":virtual:"
TIMEOUT = 30                    # seconds; reached only if something is broken
SHORT_TIMEOUT = 10              # seconds; for what takes one or less, more on a slow machine
MEGABYTE = 1 << 20
F_SETPIPE_SZ = 1031             # Python has it since 3.10
ROWS = list(dict.fromkeys(uvscpd.COMMANDS.values()))      # commands, in HELP's order
# Without what changes the daemon's output: whether its log goes to the journal, and colours.
ENVIRONMENT = {name: value for name, value in os.environ.items()
               if name not in ("JOURNAL_STREAM", "FORCE_COLOR", "NO_COLOR", "PYTHON_COLORS")}
# Python with the options of this one: -W error -X dev -bb hold for the daemons, too.
PYTHON = (sys.executable, *(f"-W{option}" for option in sys.warnoptions),
          *(f"-X{name}" for name, value in sys._xoptions.items() if value is True),
          *["-b"] * sys.flags.bytes_warning)

needs_root = unittest.skipUnless(CAN and os.geteuid() == 0,
                                 "UVSCPD_TEST_CAN is not set, or this is not root")
needs_ci_kernel = unittest.skipUnless(CAN and os.path.exists("/proc/1/root/job/command"),
                                      "UVSCPD_TEST_CAN is not set, or this is not .ci/kernel")
needs_minutes = unittest.skipUnless(os.environ.get("UVSCPD_TEST_LONG"),
                                    "UVSCPD_TEST_LONG is not set")


def ipv6_works() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as sock:
            sock.bind(("::1", 0))
        return True
    except OSError:
        return False


def run(*arguments: str, **popen: Any) -> subprocess.CompletedProcess[str]:
    """Run Python with these arguments until it ends."""
    return subprocess.run([*PYTHON, *arguments], stdin=subprocess.DEVNULL, env=ENVIRONMENT,
                          capture_output=True, encoding="utf-8", timeout=TIMEOUT, **popen)


def changed_program(source: str) -> tuple[str, ...]:
    """Python's arguments to run uvscpd.py after these lines, which may change it."""
    return "-c", "\n".join((f"import sys; sys.path.insert(0, {HERE!r}); import uvscpd",
                            inspect.cleandoc(source), "sys.exit(uvscpd.main())"))


class DaemonProcess:
    """uvscpd.py in the foreground, on a port that it chooses itself.

    `journal`: it takes its stderr for systemd's journal. `unread`: its stderr holds
    4 kB, and once the daemon listens, nobody reads it until `reading` is set.
    `prepare` is called in the new process before the program starts.
    """

    def __init__(self, *arguments: str, program: tuple[str, ...] = (PROGRAM,),
                 ip: str = "127.0.0.1", journal: bool = False, unread: bool = False,
                 prepare: Callable[[], Any] | None = None, **environment: str) -> None:
        read_end, stderr = os.pipe()
        if journal:
            status = os.fstat(stderr)
            environment["JOURNAL_STREAM"] = f"{status.st_dev}:{status.st_ino}"
        if unread:
            fcntl.fcntl(stderr, F_SETPIPE_SZ, 4096)
        with open(stderr, "wb") as file:
            self.process = subprocess.Popen(
                [*PYTHON, *program, "-s", "-p", "0", "-c", BUS,
                 *(["-i", ip] if ip else []), *arguments], stdin=subprocess.DEVNULL, stderr=file,
                env={**ENVIRONMENT, **environment}, preexec_fn=prepare)
        self.stderr = open(read_end, encoding="utf-8")      # noqa: SIM115
        self.log = ""
        self.port = 0
        self.logged = threading.Condition()     # notified of each new line in `log`
        self.listening = threading.Event()
        self.reading = threading.Event()
        if not unread:
            self.reading.set()
        self.reader = threading.Thread(target=self.read_log, daemon=True)
        self.reader.start()
        self.listening.wait(TIMEOUT)
        if not self.port:
            self.stop()
            raise AssertionError(f"the daemon does not listen:\n{self.log}")

    def read_log(self) -> None:
        with self.stderr as stderr:
            for line in stderr:
                with self.logged:
                    self.log += line
                    self.logged.notify_all()
                match = re.search(r"listening on .+ port (\d+)", line)
                if match:
                    self.port = int(match[1])
                    self.listening.set()
                    self.reading.wait()
        self.listening.set()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Stop the process meanwhile, so that it then finds at once all that has come."""
        self.process.send_signal(signal.SIGSTOP)
        os.waitpid(self.process.pid, os.WUNTRACED)
        try:
            yield
        finally:
            self.process.send_signal(signal.SIGCONT)

    def await_log(self, text: str) -> str:
        """Wait until the log has a match of this pattern; returns the log."""
        with self.logged:
            if not self.logged.wait_for(lambda: re.search(text, self.log), SHORT_TIMEOUT):
                raise AssertionError(f"nothing like {text!r} in the log:\n{self.log}")
            return self.log

    def connect(self, host: str = "127.0.0.1", source: str = "") -> Peer:
        """A client that has been greeted."""
        return Peer(self.port, host, source).greeted()

    def stop(self, number: int = signal.SIGTERM) -> str:
        """End it; returns its log. Fails if the log has a traceback or the status is not 0."""
        try:
            self.process.send_signal(number)
            status = self.process.wait(TIMEOUT)
        finally:
            self.process.kill()
            self.process.wait()
            self.reading.set()
            self.reader.join(TIMEOUT)
        if status or "Traceback" in self.log:
            raise AssertionError(f"the daemon ended with status {status}:\n{self.log}")
        return self.log


class Peer:
    """A client of the daemon; `source`: the address from which it connects."""

    def __init__(self, port: int, host: str = "127.0.0.1", source: str = "") -> None:
        self.sock = self.dial((host, port), source)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.file = self.sock.makefile("rb")
        address, own_port = self.sock.getsockname()[:2]
        self.name = f"[{address}]:{own_port}" if ":" in address else f"{address}:{own_port}"
        self.since = time.monotonic()
        self.signs_of_life = 0
        self.heard: list[str] = []

    def dial(self, address: tuple[str, int], source: str) -> socket.socket:
        return socket.create_connection(address, TIMEOUT, (source, 0) if source else None)

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.file.close()
        self.sock.close()

    def send(self, *lines: str) -> None:
        self.sock.sendall("".join(expand(line) + "\r\n" for line in lines).encode("latin-1"))

    def read_line(self) -> str:
        """The next line; `(closed)` or `(reset)` at the end, `(nothing)` if none comes."""
        try:
            line = self.file.readline().decode("latin-1") or "(closed)\r\n"
        except socket.timeout:
            line = "(nothing)\r\n"
        except ConnectionResetError:
            line = "(reset)\r\n"
        if not line.endswith("\r\n"):
            raise AssertionError(f"a line without CR LF: {line!r}")
        self.heard.append(line[:-2])
        return line[:-2]

    def expect(self, *wanted: str) -> None:
        """Read lines, which must match these; the wildcards are those of transcripts."""
        for text in wanted:
            line = self.read_line()
            while line == SIGN_OF_LIFE and self.may_be_sign_of_life():
                line = self.read_line()
            if not re.fullmatch(pattern(text), line):
                heard = "\n    ".join(self.heard[-8:])
                raise AssertionError(f"expected {text!r}, but heard at last:\n    {heard}")

    def may_be_sign_of_life(self) -> bool:
        """Whether one more sign of life may have come by now: one every 2 seconds at most."""
        self.signs_of_life += 1
        return self.signs_of_life <= (time.monotonic() - self.since) // uvscpd.SIGN_OF_LIFE_S

    def greeted(self, bus: str = BUS, trouble: str = "") -> Peer:
        """This client, when it has read the greeting of a daemon on this bus."""
        state = f"waiting for {bus}: {trouble}" if trouble else f"Success, connected to {bus}"
        self.expect("uvscpd.py ...", "...", f"+OK - {state}")
        return self

    def say(self, *lines: str) -> None:
        """Play `>` lines of this client, each in one packet: `rcvloop ; chid | 0 | +OK`."""
        for line in lines:
            exchange(self, parse_line(f"> {line}"))

    def ask(self, command: str) -> list[str]:
        """All lines of the reply to a command, as they come."""
        self.send(command)
        reply = [self.read_line()]
        while not reply[-1].startswith(("+OK", "-OK", "(")):
            reply.append(self.read_line())
        return reply

    def await_events(self, count: int) -> None:
        """Wait until so many events are buffered."""
        deadline = time.monotonic() + TIMEOUT
        reply = self.ask("cdta")
        while reply != [f"{count} ", OK]:
            if not re.match("[0-9]+ $", reply[0]) or time.monotonic() > deadline:
                raise AssertionError(f"waiting for {count} events: {reply}")
            reply = self.ask("cdta")

    def segments(self) -> int:
        """How many TCP segments with data have come; each was one write of the daemon."""
        info = self.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
        return int(struct.unpack_from("=I", info, 152)[0])      # tcpi_data_segs_in, Linux 4.6

    def reset(self) -> None:
        """End the connection with a reset."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.__exit__()


OK = "+OK - Success."           # the good reply without a text of its own
SIGN_OF_LIFE = "+OK"
WILDCARDS = {"*": r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d", "#": r"\d{1,10}", "...": ".*"}
WILDCARDS["*,#"] = WILDCARDS["*"] + "Z," + WILDCARDS["#"]


def pattern(text: str) -> str:
    """The regular expression for a line of a transcript."""
    return "".join(WILDCARDS.get(part, re.escape(part))
                   for part in re.split(r"(\*,#|\*|#|\.\.\.)", expand(text)))


def expand(text: str) -> str:
    """The text with `::1:5` replaced by the 16 fields of that GUID; `+OK` alone is meant as OK."""
    return OK if text == "+OK" else re.sub("::([0-9A-Fa-f:]+)",
                  lambda match: "0:" * (15 - match[1].count(":")) + match[1], text)


class Step(NamedTuple):
    """What a client does in a transcript: sends a line (>), gets one (<), waits (=)."""

    who: str
    what: str
    text: str


def parse_line(line: str) -> list[Step]:
    """The steps of one line of a transcript; none for a blank line."""
    match = re.fullmatch(r"\s*([A-Z]?)([<>=]) ?(.*)", line)
    if not match:
        return []
    who, what, rest = match.groups()
    first, *others = (re.sub(r" \$$", " ", part) for part in re.split(r" *\| ", rest))
    if what != ">":
        return [Step(who, what, text) for text in (first, *others)]
    steps = []
    for command in first.split(" ; "):
        steps += [Step(who, ">", command), Step(who, "<", "+OK")]
    return steps[:-1] + [Step(who, "<", text) for text in others or ["+OK"]]


def parse_transcript(text: str) -> list[list[Step]]:
    """The packets of a transcript: successive commands of one client with their replies.

    At the end each client quits that has not been closed.
    """
    packets: list[list[Step]] = [[]]
    for steps in map(parse_line, text.split("\n")):
        before = packets[-1]
        # What stands after a `<` or `=` is sent once that has come.
        if not (steps and before) or (steps[0].who != before[0].who or steps[0].what == "="
                                      or steps[0].what == ">" and before[0].what != ">"):
            packets.append([])
        packets[-1] += steps
    steps = sum(packets, [])
    for who in sorted({step.who for step in steps}):
        if Step(who, "<", "(closed)") not in steps:
            packets.append(parse_line(f"{who}> quit | +OK - bye | (closed)"))
    return [packet for packet in packets if packet]


# None of this may run when it follows QUIT in the same packet.
AFTER_QUIT = "noop\nsend 0,511,255,0,,0,-,1\nhelp\n\0\xff\nquit\nno line end"


def exchange(peer: Peer, packet: list[Step], way: str = "packets") -> None:
    """The common part of play, talk and say: play one packet in one of the ways of play."""
    if packet[0].what == "=":
        peer.await_events(int(packet[0].text))
    elif way == "lines":
        for step in packet:
            (peer.send if step.what == ">" else peer.expect)(step.text)
    else:
        lines = "".join(expand(step.text) + "\n" for step in packet if step.what == ">")
        pieces = list(lines) if way == "bytes" else [lines]
        if way == "more after QUIT" and packet[-1].text == "(closed)":
            pieces[-1] += AFTER_QUIT
        for piece in pieces:
            peer.sock.sendall(piece.encode("latin-1"))
        peer.expect(*(step.text for step in packet if step.what == "<"))


def talk(transcript: str, *peers: Peer) -> None:
    """Play a transcript once, each line in one packet, with these connected clients, A first."""
    for packet in map(parse_line, transcript.split("\n")):
        if packet:
            exchange(peers["ABCDEF".find(packet[0].who)], packet)


class DaemonTestCase(unittest.TestCase):
    """Tests that share one daemon. Each title in TRANSCRIPTS becomes a test."""

    ARGUMENTS: ClassVar[tuple[str, ...]] = ()
    TRANSCRIPTS: ClassVar[str] = ""
    daemon: ClassVar[DaemonProcess]

    def __init_subclass__(cls) -> None:
        for title, arguments, text in re.findall(r"(test_\w+)(.*)\n((?s:.+?))(?=test_|\Z)",
                                                 cls.TRANSCRIPTS):
            def test(self: DaemonTestCase, transcript: str = text,
                     arguments: str = arguments) -> None:
                self.play(transcript, *arguments.split())
            assert not hasattr(cls, title), title
            setattr(cls, title, test)

    @classmethod
    def setUpClass(cls) -> None:
        cls.daemon = DaemonProcess(*cls.ARGUMENTS)

    @classmethod
    def tearDownClass(cls) -> None:
        cls.daemon.stop()

    def connect(self) -> Peer:
        """A client that has been greeted; closed when the test ends."""
        peer = self.daemon.connect()
        self.addCleanup(peer.__exit__)
        return peer

    def play(self, transcript: str, *arguments: str) -> None:
        """Run a transcript line by line, packet by packet, byte by byte, and with lines after QUIT.

        If there are arguments, a daemon of its own is started with them.
        """
        packets = parse_transcript(transcript)
        daemon = DaemonProcess(*arguments) if arguments else self.daemon
        if arguments:
            self.addCleanup(daemon.stop)
        for way in ("lines", "packets", "bytes", "more after QUIT"):
            with contextlib.ExitStack() as stack:
                peers = {who: stack.enter_context(daemon.connect())
                         for who in sorted({packet[0].who for packet in packets})}
                try:
                    for packet in packets:
                        exchange(peers[packet[0].who], packet, way)
                except (AssertionError, OSError) as error:
                    self.fail(f"{way}: {error}")


def until(condition: Callable[[], object], describe: Callable[[], object] = str,
          limit_s: float = TIMEOUT) -> None:
    """Call `condition` until it is true; after `limit_s`, fail with what `describe` returns."""
    deadline = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {limit_s} s: {describe()}")


def memory(daemon: DaemonProcess | Relay) -> int:
    """The peak of its resident memory so far, in bytes."""
    with open(f"/proc/{daemon.process.pid}/status", encoding="ascii") as file:
        return int(re.findall(r"VmHWM:\s+(\d+) kB", file.read())[0]) * 1024


def descriptors(daemon: DaemonProcess) -> int:
    return len(os.listdir(f"/proc/{daemon.process.pid}/fd"))


def await_descriptors(daemon: DaemonProcess, most: int, peer: Peer) -> None:
    """Wait until it has at most so many open; the commands of `peer` keep its loop turning."""
    until(lambda: peer.ask("noop") == [OK] and descriptors(daemon) <= most,
          lambda: f"{descriptors(daemon)} descriptors, not {most}")


def cpu_time(daemon: DaemonProcess | Relay) -> float:
    """Seconds of processor time used."""
    with open(f"/proc/{daemon.process.pid}/stat", encoding="ascii") as file:
        fields = file.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def idle(daemon: DaemonProcess) -> Iterator[None]:
    """Fail if the daemon takes more than 30 % of a processor meanwhile."""
    cpu_before, before = cpu_time(daemon), time.monotonic()
    yield
    share = (cpu_time(daemon) - cpu_before) / (time.monotonic() - before)
    if share > 0.3:
        raise AssertionError(f"the daemon takes {share:.0%} of a processor")


def watched(daemon: uvscpd.Daemon) -> tuple[bool, bool]:
    """Whether the selector watches the bus for frames, and for room."""
    frames, room = (sock is not None and sock.fileno() in daemon.selector.watched
                    for sock in (daemon.bus.sock, daemon.bus.out))
    return frames, room


def number_text(number: int) -> str:
    """A number as four data bytes of an event."""
    return ",".join(map(str, number.to_bytes(4, "big")))


def send_events(peer: Peer, numbers: Iterable[int]) -> None:
    """Send numbered events; the replies are not read."""
    peer.sock.sendall("".join(f"send 96,20,3,0,,0,-,{number_text(number)}\n"
                              for number in numbers).encode())


def send_all(peer: Peer, numbers: range) -> None:
    """Send numbered events, each of which must be answered `+OK`."""
    send_events(peer, numbers)
    peer.expect(*["+OK"] * len(numbers))


def read_numbers(peer: Peer, last: int) -> list[int]:
    """The numbers of the events that come, up to `last`; signs of life are left out."""
    numbers = [-1]
    while numbers[-1] < last:
        line = peer.file.readline()
        if not line.endswith(b"\r\n"):
            raise AssertionError(f"a line without CR LF after event {numbers[-1]}: {line!r}")
        if line.decode() != f"{SIGN_OF_LIFE}\r\n":
            numbers.append(int.from_bytes(map(int, line.split(b",")[-4:]), "big"))
    return numbers[1:]


def send_line(vscp_type: int, *data: int) -> str:
    """The command that sends an event of class 20."""
    return ",".join(map(str, (f"send 96,20,{vscp_type},0,,0,-", *data)))


def event_line(vscp_type: int, *data: int) -> str:
    """The line of that event as other clients get it."""
    return ",".join(map(str, (f"96,20,{vscp_type},0,*,#,::0", *data)))


def type_and_data(line: str) -> tuple[int, ...]:
    """Type and data of an event line."""
    fields = line.split(",")
    return tuple(map(int, (fields[2], *fields[7:])))


def next_events(peer: Peer, count: int) -> list[str]:
    """The next events of a client in the receive loop."""
    lines: list[str] = []
    while len(lines) < count:
        line = peer.read_line()
        lines += [line] if line != SIGN_OF_LIFE else []
    return lines


def visit(port: int, manner: tuple[bool, ...]) -> None:
    """Connect, and disconnect without QUIT, in one of 16 manners."""
    commands, wait, half_close, reset = manner
    with socket.create_connection(("127.0.0.1", port), TIMEOUT) as sock:
        if commands:
            sock.sendall(b"rcvloop\nhelp\nno line end")
        if wait:
            sock.recv(1)
        if half_close:
            sock.shutdown(socket.SHUT_WR)
        if reset:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


MANNERS = list(itertools.product((False, True), repeat=4))


class NarrowPeer(Peer):
    """A greeted client with small buffers: a few unread kilobytes fill its connection."""

    def __init__(self, port: int) -> None:
        super().__init__(port)
        self.greeted()

    def dial(self, address: tuple[str, int], _source: str) -> socket.socket:
        sock = socket.socket()
        sock.settimeout(TIMEOUT)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16384)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 536)
        sock.connect(address)
        return sock


class SimulatedNode:
    """A VSCP node that is a client of the daemon; each of its registers is 42.

    It answers as the VSCP specification says (Level I protocol, class 0). Type 31,
    "Who is there?", gets seven frames of type 32: an index, then the next 7 bytes of
    a GUID (16 bytes, highest first), the URL of the node's description (MDF, 32 bytes)
    and a zero. Type 9, Read register, gets type 10: register, contents.
    """

    def __init__(self, port: int, nickname: int) -> None:
        self.nickname = nickname
        self.guid = bytes([255] * 8 + list(range(1, 8)) + [nickname])
        self.peer = Peer(port).greeted()
        self.peer.say("rcvloop")
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def close(self) -> None:
        self.peer.sock.shutdown(socket.SHUT_RDWR)
        self.thread.join(TIMEOUT)
        self.peer.__exit__()

    def run(self) -> None:
        """Answer until the connection ends."""
        with contextlib.suppress(OSError):
            for line in iter(self.peer.read_line, "(closed)"):
                fields = line.split(",")
                if fields[1:2] == ["0"]:
                    self.on_event(int(fields[2]), bytes(map(int, fields[7:])))

    def on_event(self, vscp_type: int, data: bytes) -> None:
        """Answer a question; its first data byte is the node that it is for, 255 is all."""
        if vscp_type == 31 and data in (b"", b"\xFF", bytes([self.nickname])):
            known = (self.guid + b"example.org/node.xml").ljust(49, b"\0")
            for index in range(7):
                self.send(32, bytes([index]) + known[7 * index:7 * index + 7])
        elif vscp_type == 9 and data[0] == self.nickname:
            self.send(10, bytes([data[1], 42]))

    def send(self, vscp_type: int, data: bytes, vscp_class: int = 0) -> None:
        self.peer.send(f"send 0x60,{vscp_class},{vscp_type},0,,0,{uvscpd.format_guid(self.guid)},"
                       + ",".join(map(str, data)))


@contextlib.contextmanager
def reserved_port() -> Iterator[int]:
    """A free port that the kernel gives to nobody else, but on which a daemon can listen."""
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(("127.0.0.1", 0))
        yield sock.getsockname()[1]


@contextlib.contextmanager
def logged() -> Iterator[list[str]]:
    """The lines that functions of uvscpd log in this process meanwhile, in a growing list."""
    lines: list[str] = []

    def put(_priority: int, line: str) -> bool:
        lines.append(line)
        return True

    with mock.patch.object(uvscpd.log, "put", put):
        yield lines


class OwnDaemonTestCase(unittest.TestCase):
    """Tests that start daemons of their own: as processes, or inside the test's process."""

    log: list[str]              # of a daemon in this process

    def start(self, *arguments: str, **options: Any) -> DaemonProcess:
        daemon = DaemonProcess(*arguments, **options)
        self.addCleanup(daemon.stop)
        return daemon

    def connect(self, daemon: DaemonProcess, host: str = "127.0.0.1", source: str = "") -> Peer:
        """A client that has been greeted; closed when the test ends."""
        peer = daemon.connect(host, source)
        self.addCleanup(peer.__exit__)
        return peer

    def file(self, text: str) -> str:
        """The name of a file with this text, which only its owner may read."""
        directory = tempfile.TemporaryDirectory()
        self.addCleanup(directory.cleanup)
        name = os.path.join(directory.name, "file")
        with open(os.open(name, os.O_WRONLY | os.O_CREAT, 0o600), "w", encoding="latin-1") as file:
            file.write(text)
        return name

    @contextlib.contextmanager
    def detached(self, *arguments: str, program: tuple[str, ...] = (PROGRAM,),
                 **options: Any) -> Iterator[tuple[int, int]]:
        """Start a daemon in the background; its port and process id. Afterwards it must end."""
        with tempfile.TemporaryDirectory() as directory, reserved_port() as port:
            life, other_end = os.pipe()         # end of file once the daemon has ended
            self.addCleanup(os.close, life)
            result = run(*program, "-c", BUS, "-i", "127.0.0.1", "-p", str(port), "--pidfile",
                         "uvscpd.pid", *arguments, cwd=directory, pass_fds=(other_end,), **options)
            os.close(other_end)
            self.assertEqual((result.returncode, result.stderr), (0, ""))
            pidfile = os.path.join(directory, "uvscpd.pid")
            with open(pidfile, encoding="ascii") as file:
                pid = int(file.read())
            self.assertEqual(os.stat(pidfile).st_mode & 0o777, 0o644)
            if "preexec_fn" not in options:     # its standard files are open
                where = "to syslog" if os.path.exists("/dev/log") else "nowhere, .*"
                self.assertRegex(result.stdout, r"\Auvscpd\.py: runs in the background, "
                                 rf"pid {pid}, port {port}; messages go {where}\n\Z")
            try:
                yield port, pid
                if os.path.exists(pidfile):
                    os.kill(pid, signal.SIGTERM)
                self.assertTrue(select.select([life], [], [], TIMEOUT)[0], "it does not end")
                self.assertFalse(os.path.exists(pidfile))
            finally:
                if not select.select([life], [], [], 0)[0]:
                    os.kill(pid, signal.SIGKILL)

    def daemon_in_process(self, *arguments: str) -> uvscpd.Daemon:
        """A daemon in this process that does only what the test calls. Logs to self.log."""
        stack = contextlib.ExitStack()
        self.addCleanup(stack.close)
        self.log = stack.enter_context(logged())
        options = uvscpd.parse_arguments(["-i", "127.0.0.1", "-c", ":virtual:", *arguments])
        daemon = uvscpd.Daemon(options, uvscpd.listen(options.ip, 0))
        self.addCleanup(daemon.close)
        return daemon

    def connect_in_process(self, daemon: uvscpd.Daemon) -> tuple[uvscpd.Client, socket.socket]:
        """A client of a daemon in this process, and the client's end of the connection."""
        other_end = socket.create_connection(daemon.listener.getsockname(), TIMEOUT)
        select.select([daemon.listener], [], [], TIMEOUT)   # until it can be accepted
        daemon.on_connection(0)
        self.addCleanup(other_end.close)
        return list(daemon.clients)[-1], other_end

    def daemon_and_client_in_process(self, *arguments: str) -> tuple[uvscpd.Daemon, uvscpd.Client]:
        daemon = self.daemon_in_process(*arguments)
        return daemon, self.connect_in_process(daemon)[0]

    def assert_bad_argument(self, argument: str, message: str = "") -> None:
        """The argument is refused with exit status 2 and one line that has this message."""
        with self.subTest(argument), logged() as lines:
            with self.assertRaises(SystemExit) as ending:
                uvscpd.parse_arguments([argument])
            self.assertEqual(ending.exception.code, 2)
            self.assertRegex("\n".join(lines), rf"\Auvscpd\.py: .*{message}.*\Z")

    def assert_ends(self, status: int, message: str, *arguments: str) -> None:
        """The program ends with this status and one line on stderr, which starts like that."""
        result = run(PROGRAM, *arguments)
        self.assertEqual((result.returncode, result.stdout), (status, ""))
        self.assertRegex(result.stderr, rf"\A{message}.*\n\Z")


# =============================================================================
# 2. Numbers and GUIDs, 3. Events and CAN frames
# =============================================================================
# EVENTS is tried from text to frame, from frame to text, and through the daemon;
# all for a client whose GUID is zeros.

ZEROS = ",".join(["0"] * 16)            # the interface's GUID in the data of class 512-1023

EVENTS = (                              # given to SEND; CAN id # data; the line that others get
    ("96,20,3,0,,0,-,0,1,35", "0C140300#000123", "96,20,3,0,*,#,::0,0,1,35"),
    ("0,0,0,0,,0,-", "00000000#", "0,0,0,0,*,#,::0"),
    ("0,511,255,0,,0,-", "01FFFF00#", "0,511,255,0,*,#,::0"),
    # Priority and hard-coded; other bits of the head do not go onto the bus.
    ("32,1,2,0,,0,-", "04010200#", "32,1,2,0,*,#,::0"),
    ("128,1,2,0,,0,-", "10010200#", "128,1,2,0,*,#,::0"),
    ("224,1,2,0,,0,-", "1C010200#", "224,1,2,0,*,#,::0"),
    ("16,1,2,0,,0,-", "02010200#", "16,1,2,0,*,#,::0"),
    ("15,1,2,0,,0,-", "00010200#", "0,1,2,0,*,#,::0"),
    ("0xFFFF,1,2,0,,0,-", "1E010200#", "240,1,2,0,*,#,::0"),
    # The GUID's last byte is the nickname.
    ("96,20,3,0,,0,", "0C140300#", "96,20,3,0,*,#,::0"),
    ("96,20,3,0,,0,::0", "0C140300#", "96,20,3,0,*,#,::0"),
    ("96,20,3,0,,0,::fE", "0C1403FE#", "96,20,3,0,*,#,::FE"),
    ("96,20,3,0,,0,FF:FF:FF:FF:FF:FF:FF:FE:01:2:03:4:5:6:7:0a", "0C14030A#", "96,20,3,0,*,#,::A"),
    # Hexadecimal numbers; fields that CAN cannot carry; what real clients send.
    ("0x60,0X14,0x003,0,,0,-,0x0,0x01,0xfF", "0C140300#0001ff", "96,20,3,0,*,#,::0,0,1,255"),
    ("96,20,3,,,,-,7", "0C140300#07", "96,20,3,0,*,#,::0,7"),
    ("96,20,3,4711,2001-01-01T00:00:00,4294967296,-,7", "0C140300#07", "96,20,3,0,*,#,::0,7"),
    ("96,20,9,0,2026-11-21T22:59:33,0,", "0C140900#", "96,20,9,0,*,#,::0"),
    ("480,10,6,0,,11616992294838206464,00:00:00:00:00:00:00:00:00:00:00:00:00:00:00:00,0x8A,0x01",
     "1C0A0600#8a01", "224,10,6,0,*,#,::0,138,1"),
    # One comma at the end is no data byte: VSCP's Arduino client ends events without data so.
    ("0,20,3,0,2026-11-24T12:00:00,0,::0,", "00140300#", "0,20,3,0,*,#,::0"),
    ("96,20,3,0,,0,-,1,2,", "0C140300#0102", "96,20,3,0,*,#,::0,1,2"),
    ("96,20,3,0,,0,,", "0C140300#", "96,20,3,0,*,#,::0"),
    ("96,20,3,x,yesterday,-1,-,7", "0C140300#07", "96,20,3,0,*,#,::0,7"),
    ("96,20,3,0,2026-11-28 05:00:00,0,-,7", "0C140300#07", "96,20,3,0,*,#,::0,7"),
    # The GUID as the VSCP specification writes it.
    ("96,20,3,0,,0,{FFFFFFFF-FFFF-FFFF-0102-03AABB440130},7", "0C140330#07",
     "96,20,3,0,*,#,::30,7"),
    ("96,20,3,0,,0,*:FE:5,7", "0C140305#07", "96,20,3,0,*,#,::5,7"),
    ("96,20,3,0,,0,{-},7", "0C140300#07", "96,20,3,0,*,#,::0,7"),
    # Without datetime: VSCP's Python programs of 2026, its C and Perl programs before 2016.
    ("0x60,0x14,0x3,0x0,1795845433446809000,FF:FF:FF:FF:FF:FF:FF:FE:02:FC:00:00:00:01:00:05,"
     "0x00,0x50,0x05", "0C140305#005005", "96,20,3,0,*,#,::5,0,80,5"),
    ("0,20,3,0,0,-,0,1,35", "00140300#000123", "0,20,3,0,*,#,::0,0,1,35"),
    ("0,20,3,0,0,-,9", "00140300#09", "0,20,3,0,*,#,::0,9"),
    ("0,20,3,0,0,::5", "00140305#", "0,20,3,0,*,#,::5"),
    ("0,20,3,0,0,::5,", "00140305#", "0,20,3,0,*,#,::5"),
    ("0,20,3,0,0,{*:5},1,2,3,4,5,6,7,8,", "00140305#0102030405060708",
     "0,20,3,0,*,#,::5,1,2,3,4,5,6,7,8"),
    (f"0,532,3,0,0,::5,{ZEROS},9", "00140305#09", "0,20,3,0,*,#,::5,9"),
    # With datetime: a GUID where the timestamp belongs is junk if another one follows.
    ("96,20,3,0,,-,::5,7", "0C140305#07", "96,20,3,0,*,#,::5,7"),
    ("96,20,3,0,,::6,::5", "0C140305#", "96,20,3,0,*,#,::5"),
    ("96,20,3,0,,::6,,7", "0C140300#07", "96,20,3,0,*,#,::0,7"),
    ("96,20,3,0,,-,,", "0C140300#", "96,20,3,0,*,#,::0"),
    # Level I mirrored as Level II; of the interface's GUID, 14 bytes count.
    (f"96,532,3,0,,0,-,{ZEROS}", "0C140300#", "96,20,3,0,*,#,::0"),
    (f"96,532,3,0,,0,::5,{ZEROS},0,1,35", "0C140305#000123", "96,20,3,0,*,#,::5,0,1,35"),
    (f"96,512,3,0,,0,-,{ZEROS[:-4]},8,9,1,2,3,4,5,6,7,8", "0C000300#0102030405060708",
     "96,0,3,0,*,#,::0,1,2,3,4,5,6,7,8"),
    (f"96,1023,3,0,,0,-,{ZEROS}", "0DFF0300#", "96,511,3,0,*,#,::0"),
    # Any number of data bytes.
    *(("0,1,2,0,,0,-" + ",1,2,3,4,5,6,7,8"[:2 * length],
       "00010200#" + "0102030405060708"[:2 * length],
       "0,1,2,0,*,#,::0" + ",1,2,3,4,5,6,7,8"[:2 * length]) for length in range(9)),
)

BAD_EVENTS = (
    "96", "96,20,3,0,,0", "65536,20,3,0,,0,-", "-1,20,3,0,,0,-", ",20,3,0,,0,-", "x,20,3,0,,0,-",
    f"96,1024,3,0,,0,-,{ZEROS}", "96,65535,3,0,,0,-", "96,-1,3,0,,0,-", "96,,3,0,,0,-",
    "96,20,256,0,,0,-", "96,20,-1,0,,0,-", "96,20,,0,,0,-",
    "96,20,3,0,,0,-,256", "96,20,3,0,,0,-,-1", "96,20,3,0,,0,-,1,,2",
    "96,20,3,0,,0,-,,", "96,20,3,0,,0,,,", "96,20,3,0,,0,-,1,,",
    "96,20,3,0,,0,-,0x", "96,20,3,0,,0,-,0xG", "96,20,3,0,,0,-,FF", "96,20,3,0,,0,-,1.5",
    "96,20,3,0,,0,-,1,2,3,4,5,6,7,8,9",
    "96,20,3,0,,0,0", "96,20,3,0,,0,::1:FFF", "96,20,3,0,,0,0:G", "96,20,3,0,,0,::0:",
    "96,20,3,0,,0,::", "96,20,3,0,,0,*", "96,20,3,0,,0,*:", "96,20,3,0,,0,{}",
    # Without datetime.
    "96,20,3,0,0,5", "96,20,3,0,-,5", "96,20,3,0,0,-,256", "96,20,3,0,0,-,1,,2", "96,20,3,0,0,,1",
    "96,20,3,0,0,::5,1,2,3,4,5,6,7,8,9", "96,20,3,0,0,::1:FFF,1", "96,20,3,-,1,2,3",
    # Class 512-1023 without the GUID of an interface, with too much after it, with another's.
    "96,532,3,0,,0,-", f"96,532,3,0,,0,-,{ZEROS[2:]}", f"96,532,3,0,,0,-,{ZEROS},1,2,3,4,5,6,7,8,9",
    f"96,532,3,0,,0,-,1{ZEROS[1:]}", f"96,532,3,0,,0,-,{ZEROS[:-6]},1,0,0",
)

FIFTEEN = ":".join("0" * 15)
GUIDS = (                               # given; as the daemon writes it
    (FIFTEEN + ":0", "0:0:0:0:0:0:0:0:0:0:0:0:0:0:0:0"),
    ("00:01:02:03:04:05:06:07:08:09:0a:0b:0c:0d:0e:0f", "0:1:2:3:4:5:6:7:8:9:A:B:C:D:E:F"),
    ("FF:ff:Ff:fF:10:a0:0A:1:0:0:0:0:0:0:0:FE", "FF:FF:FF:FF:10:A0:A:1:0:0:0:0:0:0:0:FE"),
    # In groups.
    ("FFFFFFFF-FFFF-FFFF-0102-03AABB440130", "FF:FF:FF:FF:FF:FF:FF:FF:1:2:3:AA:BB:44:1:30"),
    ("0001:0203:0405:0607:0809:0a0b:0c0d:0e0f", "0:1:2:3:4:5:6:7:8:9:A:B:C:D:E:F"),
    ("0001:0203:0405:0607-8-9:0a0b0c0d0e-f", "0:1:2:3:4:5:6:7:8:9:A:B:C:D:E:F"),
    ("000102030405060708090a0b0c0d0e0f", "0:1:2:3:4:5:6:7:8:9:A:B:C:D:E:F"),
    # With a filling.
    ("-", "0:0:0:0:0:0:0:0:0:0:0:0:0:0:0:0"),
    ("-:1:2:3", "0:0:0:0:0:0:0:0:0:0:0:0:0:1:2:3"),
    ("*:1", "FF:FF:FF:FF:FF:FF:FF:FF:FF:FF:FF:FF:FF:FF:FF:1"),
    ("*:0102-03AABB440130", "FF:FF:FF:FF:FF:FF:FF:FF:1:2:3:AA:BB:44:1:30"),
    (f"-:{FIFTEEN}:7", "0:0:0:0:0:0:0:0:0:0:0:0:0:0:0:7"),
    # In braces.
    ("{00:01:02:03:04:05:06:07:08:09:0a:0b:0c:0d:0e:0f}", "0:1:2:3:4:5:6:7:8:9:A:B:C:D:E:F"),
    ("{FFFFFFFF-FFFF-FFFF-0102-03AABB440130}", "FF:FF:FF:FF:FF:FF:FF:FF:1:2:3:AA:BB:44:1:30"),
    ("{*:1}", "FF:FF:FF:FF:FF:FF:FF:FF:FF:FF:FF:FF:FF:FF:FF:1"),
    ("{-}", "0:0:0:0:0:0:0:0:0:0:0:0:0:0:0:0"),
)
BAD_GUIDS = ("", "0", FIFTEEN, FIFTEEN + ":0:0", FIFTEEN + ":", FIFTEEN + ":100", FIFTEEN + ":G",
             FIFTEEN + ":-1", FIFTEEN + ": 1", FIFTEEN + ":0\n", ":" + FIFTEEN, "0" * 31, "0" * 33,
             "0" * 34, FIFTEEN[2:] + ":100", "000-" * 10 + "00", "{}", "{0", "0}", "{{-}}", "*",
             "*:", "-:", "-1", "*1", "-:-1", "-:1:", f"-:{FIFTEEN}:0:0", f"{FIFTEEN},0",
             f"{{{FIFTEEN}:00", f"0{FIFTEEN}:0}}")
UNSURE_GUIDS = ("::", "::1", "::0102:03aa:44:01:30", "{::1}", f"::{FIFTEEN}:0")


def parse_frame(text: str) -> tuple[int, bytes]:
    """The CAN id and the data of `CAN id # data`."""
    can_id, _, data = text.partition("#")
    return int(can_id, 16), bytes.fromhex(data)


class EventTest(DaemonTestCase):
    def test_event_to_frame(self) -> None:
        for sent, frame, _ in EVENTS:
            with self.subTest(sent):
                can_id, data = uvscpd.parse_event(expand(sent))[:2]
                self.assertEqual(f"{can_id:08X}#{data.hex()}", frame)

    def test_more_ids_than_are_kept(self) -> None:
        event_lines = uvscpd.EventLines(FIFTEEN)
        frames = [(can_id, b"", 1795390139, 0, None) for can_id in (0, 1, 2, 0, 256, 1, 2, 0)]
        with mock.patch.object(uvscpd, "MAX_ID_TEXTS", 2):
            lines = event_lines.of(frames)[0]
        self.assertEqual(lines, [uvscpd.EventLines(FIFTEEN).of([frame])[0][0] for frame in frames])
        self.assertLessEqual(len(event_lines.id_texts), 2)

    def test_frame_to_event_line(self) -> None:
        for _, frame, seen in EVENTS:
            with self.subTest(frame):
                lines = uvscpd.EventLines(FIFTEEN).of(
                    [(*parse_frame(frame), 1795390139, 810025999, None)])[0]
                line = seen.replace("*,#", "2026-11-22T23:28:59Z,3615768809")    # of 32 bits
                self.assertEqual(lines, [expand(line) + "\r\n"])

    def test_GUID_to_bytes_and_back(self) -> None:
        for given, written in GUIDS:
            with self.subTest(given):
                guid = uvscpd.parse_guid(given)
                self.assertEqual(guid, bytes(int(field, 16) for field in written.split(":")))
                self.assertEqual(uvscpd.format_guid(guid), written)

    def test_bad_GUIDs(self) -> None:
        for texts, reason in ((BAD_GUIDS, "Invalid GUID"), (UNSURE_GUIDS, ":: means .*")):
            for text in texts:
                with self.subTest(text), self.assertRaisesRegex(uvscpd.VscpError, f"^{reason}$"):
                    uvscpd.parse_guid(text)

    def test_nickname_in_a_GUID_of_any_form(self) -> None:
        for text, nickname in (("", 0), *((given, int(written.rpartition(":")[2], 16))
                                          for given, written in GUIDS),
                               ("::1", 1), ("::0102:03aa:44:01:30", 0x30), ("{::FE}", 0xFE)):
            with self.subTest(text):
                self.assertEqual(uvscpd.parse_nickname(text), nickname)
        for text in (*filter(None, BAD_GUIDS), "::", "{::}", "::1::2", "1::2"):
            with self.subTest(text), self.assertRaises(uvscpd.VscpError):
                uvscpd.parse_nickname(text)

    def test_event_without_datetime(self) -> None:
        for sent, frame, _ in EVENTS:
            fields = expand(sent).split(",")
            if len(fields) > 6 and uvscpd.is_guid(fields[6]):
                del fields[4]
                with self.subTest(",".join(fields)):
                    can_id, data = uvscpd.parse_event(",".join(fields))[:2]
                    self.assertEqual(f"{can_id:08X}#{data.hex()}", frame)

    def test_struct_can_frame(self) -> None:
        self.assertEqual(uvscpd.pack_frame(0x0C140305, b"\0\1\x23"),
                         struct.pack("=IB3x8s", 0x8C140305, 3, b"\0\1\x23"))

    def test_SEND_every_event(self) -> None:
        self.play("".join(f"A> send {sent}\n" for sent, _, _ in EVENTS)
                  + f"B= {len(EVENTS)}\nB> retr {len(EVENTS)}"
                  + "".join(f" | {seen}" for _, _, seen in EVENTS) + " | +OK")

    def test_SEND_every_bad_event(self) -> None:
        self.play("".join(f"A> send {text} | -OK - ...\n" for text in BAD_EVENTS)
                  + "A> send 96,20,3,0,,0,-\nB= 1")

    def test_time_of_an_event(self) -> None:
        a, b = self.connect(), self.connect()
        before = int(time.time())
        b.say("send 96,20,3,0,2001-01-01T00:00:00,1,-")
        a.await_events(1)
        fields = a.ask("retr")[0].split(",")
        seconds = timegm(time.strptime(fields[4], "%Y-%m-%dT%H:%M:%SZ"))
        self.assertTrue(before <= seconds <= time.time(), fields)
        self.assertLess(int(fields[5]) - seconds * 1000000 & 0xFFFFFFFF, 1000000, fields)


# =============================================================================
# 4. Filters
# =============================================================================
# For a client with the GUID 0:1:2: ... :F.

class FilterTest(unittest.TestCase):
    FILTERS: tuple[tuple[str, str, list[int], list[int]], ...] = (
        # filter, mask, CAN ids of frames that pass, of frames that do not
        ("7,511,255,::FF", "0,0,0,::0", [0, 0x1FFFFFFF, 0x0C140305], []),
        ("3,20,3,::5", "0xFF,0xFFFF,0xFFFF,::FF", [0x0C140305, 0x0E140305],
         [0x10140305, 0x0C150305, 0x0C140405, 0x0C140306]),
        ("0,532,0,::0", "0,0xFFFF,0,::0", [0x0C140305], [0x0C150305, 0]),
        ("0,16,0,::0", "0,0x1F0,0,::0", [0x00100000, 0x001F0000], [0x00200000]),
        ("8,0,0,::0", "8,0,0,::0", [], [0, 0x1FFFFFFF]),        # no priority has that bit
        ("0,0,0,0:1:2:3:4:5:6:7:8:9:A:B:C:D:E:5", "0,0,0," + ":".join(["FF"] * 16),
         [0x0C140305], [0x0C140306, 0x0C14030F]),
        ("0,0,0,::1:0", "0,0,0,::F:0", [], [0, 0x0C140305]),    # another client's GUID
    )

    @staticmethod
    def view(wanted: str, mask: str) -> uvscpd.View:
        return uvscpd.make_view(uvscpd.parse_filter(expand(wanted), "filter"),
                                uvscpd.parse_filter(expand(mask), "mask"), bytes(range(16)))

    def test_frames_that_pass(self) -> None:
        for wanted, mask, passing, stopped in self.FILTERS:
            _, value, bits = self.view(wanted, mask)
            for can_id in passing + stopped:
                with self.subTest(filter=wanted, mask=mask, can_id=f"{can_id:08X}"):
                    self.assertEqual(can_id & bits == value, can_id in passing)

    def test_any_filter_against_the_definition(self) -> None:
        # Likely to go wrong: the fields' limits, and the bit above each.
        fields = ((0, 3, 7, 8, 255), (0, 20, 511, 512, 532, 1023, 1024, 1044, 0xFFFF),
                  (0, 3, 255, 0x103, 0xFFFF), (0, 1, 0xFF))
        rng = random.Random(1)
        for _ in range(2000):
            wanted, mask, (priority, vscp_class, vscp_type, nickname) = (
                [rng.choice(field) for field in fields] for _ in range(3))
            event = (priority & 7, vscp_class & 511, vscp_type & 255, nickname)
            level1 = [wanted[0], wanted[1] - 512 * (512 <= wanted[1] <= 1023), *wanted[2:]]
            _, value, bits = self.view("{},{},{},::{:X}".format(*wanted),
                                       "{},{},{},::{:X}".format(*mask))
            can_id = event[0] << 26 | event[1] << 16 | event[2] << 8 | event[3]
            self.assertEqual(can_id & bits == value,
                             all(event[i] & mask[i] == level1[i] & mask[i] for i in range(4)),
                             (wanted, mask, event))

    def test_kernel_filters(self) -> None:
        many = [(number, 0xFFFF) for number in range(513)]
        for wanted, packed in (
                ([], []),
                ([(0x00140000, 0x01FF0000)], [(0x00140000, 0x01FF0000)]),
                ([(5, 0xFF), (3, 0xFF), (5, 0xFF)], [(3, 0xFF), (5, 0xFF)]),
                ([(5, 0xFF), (0, 0)], [(0, 0)]),                        # a client wants them all
                ([self.view("8,0,0,::0", "8,0,0,::0")[1:]], []),        # nothing can pass
                (many[:512], many[:512]),
                (many, [(0, 0)])):                                      # more than Linux takes
            # Extended frames that are no remote requests.
            self.assertEqual(uvscpd.pack_filters(wanted), b"".join(
                struct.pack("=II", value | 0x80000000, mask | 0xC0000000)
                for value, mask in packed))


# =============================================================================
# 5. Addresses and users
# =============================================================================
# Who may connect, and who may log in.

class AddressTest(OwnDaemonTestCase):
    PATTERNS = (        # --allow, addresses that may connect, others
        ("", "127.0.0.1 ::1 192.0.2.1", ""),
        ("*", "127.0.0.1 ::1 192.0.2.1", ""),
        ("127.0.0.1", "127.0.0.1", "127.0.0.2 127.0.0.10 ::1"),
        ("127.0.0.*", "127.0.0.0 127.0.0.255", "127.0.1.0 227.0.0.1 ::1"),
        ("127.0.0.0/8", "127.0.0.1 127.255.255.255", "128.0.0.0 ::1"),
        ("192.168.1.8/24", "192.168.1.0 192.168.1.255", "192.168.2.8"),
        ("::1", "::1", "::2 127.0.0.1 0.0.0.1"),
        ("::/64", "::1 ::ffff:0:0:1", "0:0:0:1::1 127.0.0.1"),
        ("FD00:*", "fd00::1 fd00:1::2", "fd01::1 127.0.0.1"),
        ("2001:0db8:* 010.1.*", "2001:db8::1 10.1.2.3", "2001:d::1 10.2.0.1"),
        ("fd00:0:0:*", "fd00::1 fd00:0:0:1::", "fd00:0:1::"),
        ("::ffff:127.0.0.0/104", "127.255.255.255", "128.0.0.0 ::1"),
        ("10.0.0.1 ::1 127.*", "10.0.0.1 ::1 127.0.0.1", "10.0.0.2 ::2"),
    )
    BAD_PATTERNS = ("", "localhost", "127.0.0", "127.0.0.256", "127.0.0.0/33", "127.0.0.0/x",
                    "127..0.1", "127.0.0.1-5", "127.0.0.1 ", "127.0.0.x*", "::1/129", "::g",
                    "fe80::1%lo", "fd00:*g", "127.0.0.0.*", "256.0.0.*", "127.0:0.*")

    def test_ALLOW_patterns(self) -> None:
        for patterns, good, bad in self.PATTERNS:
            allow = uvscpd.parse_arguments([f"--allow={text}" for text in patterns.split()]).allow
            for host in f"{good} {bad}".split():
                with self.subTest(patterns, host=host):
                    self.assertEqual(uvscpd.allowed(host, allow), host in good.split())

    def test_ALLOW_malformed_patterns(self) -> None:
        for text in self.BAD_PATTERNS:
            self.assert_bad_argument(f"--allow={text}", "--allow")

    def test_addresses_as_they_are_logged(self) -> None:
        for address, plain in (("127.0.0.1", "127.0.0.1"), ("::ffff:10.0.0.1", "10.0.0.1"),
                               ("::1", "::1"), ("fe80::1%eth0", "fe80::1"),
                               ("::ffff:0:1", "::ffff:0:1")):
            self.assertEqual(uvscpd.plain_address(address), plain)

    USERS = """
# name   password    level hosts
panel    secret      4     127.0.0.*    # a comment
hass\tsha256:{}   15     127.0.0.2 ::1
watcher  look#out    2
nobody   nothing     0
    """.format(hashlib.sha256(b"hass:top").hexdigest().upper())

    def test_users_and_hosts(self) -> None:
        arguments = ["--users", self.file(self.USERS), "-U", "boss", "-P", "b"]
        logins = uvscpd.parse_arguments(arguments).logins
        times = itertools.count()               # a second later each: nobody has to wait
        for name, password, host, level in (
                ("panel", "secret", "127.0.0.1", 4), ("panel", "secret", "127.0.1.1", None),
                ("panel", "Secret", "127.0.0.1", None), ("hass", "top", "127.0.0.2", 15),
                ("hass", "top", "::1", 15), ("hass", "top", "127.0.0.1", None),
                ("watcher", "look#out", "192.0.2.1", 2), ("watcher", "secret", "192.0.2.1", None),
                ("nobody", "nothing", "::1", 0), ("boss", "b", "192.0.2.1", 15),
                ("boss", "sha256:x", "::1", None), ("", "secret", "::1", None)):
            with self.subTest(name, password=password, host=host):
                user = logins.check(name, password, host, next(times))
                self.assertEqual(user and user.privilege, level)


# =============================================================================
# 6. Network interfaces, 7. Bus
# =============================================================================
# Room on the virtual bus, who sent the frames that come back, error frames.

SENDERS = {name: mock.Mock(channel_id=0) for name in "ABC"}     # clients without a connection


class BusTest(unittest.TestCase):
    HISTORIES = (       # A1x: A sends frame 1 with data x; 1x=A: it comes back, as A's
        "1=None",
        "A1 B2 1=A 2=B 2=None",
        "A1 B1 A1 C1 1=C 1=A 1=B 1=A 1=None",           # identical frames
        "A1 B2 C3 2=B 3=C B1 1=B 1=A 1=None",           # A's was lost, or comes late
        "A1x 1y=None 2x=None 1x=A",
        # A frame far older than one that came back is forgotten, even if few are under way.
        " ".join([*(f"A{number}" for number in range(100)), "80=A",
                  *(f"{number}={None if number < 16 or number == 80 else 'A'}"
                    for number in range(100))]),
        " ".join(["A0", *(f"A{number} {number}=A" for number in range(1, 100)), "0=None"]),
        " ".join([*(f"A{number}" for number in range(3000)), "1999=None 2000=A"]),     # bounded
    )

    def setUp(self) -> None:
        self.bus = uvscpd.Bus(":virtual:", lambda _sock: None)
        self.addCleanup(self.bus.close)
        assert self.bus.sock and self.bus.out
        self.sock, self.out = self.bus.sock, self.bus.out

    def send(self, can_id: int, data: bytes = b"", sender: str = "A") -> None:
        """Send a frame that does not come back yet."""
        self.bus.send(can_id, data, SENDERS[sender])
        self.sock.recv(16)

    def come_back(self, can_id: int, data: bytes = b"") -> Any:
        """The sender of a frame that comes back now, None if nobody gets it."""
        self.out.send(uvscpd.pack_frame(can_id, data))
        frames, _ = self.bus.read(9)
        return frames[0][4] if frames else None

    def error_frame(self, error_class: int, *controller: int) -> None:
        data = bytes([0, *controller])
        self.out.send(struct.pack("=IB3x8s", 0x20000000 | error_class, len(data), data))
        self.assertEqual(self.bus.read(9), ([], True))

    def test_virtual_bus_is_bounded(self) -> None:
        sent = []
        with self.assertRaises(uvscpd.NoRoom):
            for number in range(uvscpd.MAX_UNDER_WAY):
                self.bus.send(number, b"", SENDERS["A"])
                sent.append(number)
        self.assertGreater(len(sent), 100)
        frames, empty = self.bus.read(3)
        self.assertEqual(([frame[0] for frame in frames], empty), ([0, 1, 2], False))
        frames, empty = self.bus.read(uvscpd.MAX_UNDER_WAY)
        self.assertEqual(([frame[0] for frame in frames], empty), (sent[3:], True))
        self.bus.send(1, b"", SENDERS["A"])

    def test_own_frames(self) -> None:
        for history in self.HISTORIES:
            self.setUp()                                # a bus on which nothing is under way
            for who, number, data, sender in re.findall(r"([A-C]?)(\d+)(\w?)(?:=(\w+))?", history):
                can_id, step = int(number), f"{who}{number}{data}"
                with self.subTest(history[:50], step=step):
                    if sender:
                        self.assertIs(self.come_back(can_id, data.encode()), SENDERS.get(sender))
                    else:
                        self.send(can_id, data.encode(), who)

    def test_own_frame_sent_right_after_the_interface_was_down(self) -> None:
        with mock.patch.object(self.bus, "out") as out:
            self.bus.send(1, b"", SENDERS["A"])
            out.send.side_effect = [OSError(errno.ENETDOWN, ""), 16]
            self.bus.send(2, b"", SENDERS["A"])
            self.assertEqual(self.bus.read(100), ([], True))
        self.assertEqual([self.come_back(number) for number in (1, 2)], [None, SENDERS["A"]])

    ERROR_FRAMES = (    # class, data[1]; what INFO says then, STAT's first three counts
        (0x004, 0x01, '0,0,0,"OK"', "0,0,1"), (0x004, 0x02, '0,0,0,"OK"', "0,0,1"),
        (0x004, 0x04, '1,4,4,"error warning"', "0,1,1"),
        (0x004, 0x08, '1,4,8,"error warning"', "0,1,1"),
        (0x004, 0x10, '2,4,16,"error passive"', "0,2,1"),
        (0x004, 0x2C, '2,4,44,"error passive"', "0,2,1"),
        (0x004, 0x01, '2,4,44,"error passive"', "0,2,2"), (0x004, 0x40, '0,0,0,"OK"', "0,2,2"),
        (0x020, 0, '1,32,0,"nobody acknowledges"', "0,3,2"),
        (0x001, 0, '1,1,0,"transmit timeout"', "0,4,2"), (0x100, 0, '0,0,0,"OK"', "0,4,2"),
        (0x044, 0x21, '3,68,33,"bus off"', "1,4,3"), (0x100, 0, '0,0,0,"OK"', "1,4,3"),
        (0x008, 0x7F, '0,0,0,"OK"', "1,4,3"))

    def test_error_frames(self) -> None:
        for error_class, controller, info, counts in self.ERROR_FRAMES:
            with self.subTest(f"{error_class:03X}#{controller:02X}"):
                self.error_frame(error_class, controller)
                bus, state = self.bus, self.bus.health.state
                self.assertEqual(
                    f'{state.status},{state.code},{state.subcode},"{state.text}"', info)
                self.assertEqual(
                    f"{bus.health.bus_offs},{bus.health.warnings},{bus.dropped}", counts)

    def test_frame_after_errors(self) -> None:
        for error_class, controller, well in ((0x020, 0, True), (0x001, 0, True),
                                              (0x004, 0x04, False), (0x004, 0x10, False)):
            self.error_frame(error_class, controller)
            self.send(1)
            self.assertIsNotNone(self.come_back(1))
            self.assertEqual(self.bus.health.state is uvscpd.BUS_WELL, well)

    def test_state_that_came_and_went(self) -> None:
        with logged() as lines:
            for error_classes, text in (
                    ([0x040, 0x100], "bus off"), ([], "the bus is back, was: bus off"),
                    ([0x020], "nobody acknowledges"), ([0x020], "")):
                for error_class in error_classes:
                    self.error_frame(error_class)
                lines.clear()
                self.bus.check(time.monotonic())
                self.assertEqual([line.partition(", try: ")[0] for line in lines],
                                 [f":virtual:: {text}"] * bool(text))


def attribute(number: int, value: bytes) -> bytes:
    """A struct nlattr."""
    return struct.pack("=HH", 4 + len(value), number) + value + bytes(-len(value) % 4)


def link_message(*can: bytes, names: tuple[str, ...] = ("can0",), flags: int = 1, carrier: int = 1,
                 qdisc: str = "pfifo_fast", kind: str = "can", index: int = 3) -> bytes:
    """What the kernel says of an interface, after struct nlmsghdr; `can`: the driver's part."""
    first, *others = (name.encode() + b"\0" for name in names)
    return struct.pack("=BxHiII", 0, 280, index, flags, 0) + b"".join((
        attribute(3, first), attribute(13, struct.pack("=I", 10)), attribute(33, bytes([carrier])),
        attribute(6, qdisc.encode() + b"\0"), attribute(23, bytes(200)),
        attribute(0x8000 | 52, b"".join(attribute(53, name) for name in others)),
        attribute(18, attribute(1, kind.encode() + b"\0") + attribute(2, b"".join(can)))))


def error_message(code: int) -> bytes:
    """That the kernel refuses a question, after struct nlmsghdr."""
    return struct.pack("=i", -code) + bytes(16)


def can_state(state: int) -> bytes:
    return attribute(4, struct.pack("=I", state))


class LinkTest(unittest.TestCase):
    """What the kernel says of the interface, and what error frames and frames add to it."""

    UP = uvscpd.UNKNOWN._replace(names=("can0",), index=3, is_can=True, up=True, carrier=True,
                                 listen_only=False, kind="can")

    def test_messages(self) -> None:
        can = (attribute(1, struct.pack("=8I", 125000, *[0] * 7)), can_state(2),
               attribute(5, struct.pack("=II", 0, 2)), attribute(6, struct.pack("=I", 100)),
               attribute(8, struct.pack("=HH", 128, 7)))
        whole = link_message(*can, names=("can0", "vscpbus", "bus2"))
        link = uvscpd.Link(("can0", "vscpbus", "bus2"), 3, True, True, True, 125000, 2, True,
                           "pfifo_fast", "can")
        self.assertEqual(uvscpd.parse_message(16, whole), (True, link))
        self.assertEqual(uvscpd.parse_message(17, whole), (False, link))
        self.assertEqual(uvscpd.parse_link(link_message(kind="vcan", carrier=0, flags=0)),
                         uvscpd.Link(("can0",), 3, True, False, False, None, None, False,
                                     "pfifo_fast", "vcan"))
        for size in range(len(whole)):
            uvscpd.parse_message(16, whole[:size])                  # ends, and raises nothing
        self.assertEqual(uvscpd.parse_message(2, error_message(errno.ENODEV)),
                         (False, uvscpd.UNKNOWN))
        for kind, body in ((2, error_message(errno.EPERM)), (2, b""), (3, b""), (24, whole)):
            self.assertIsNone(uvscpd.parse_message(kind, body))

    def ask(self, name: str) -> tuple[bool, uvscpd.Link]:
        """What the kernel of this machine answers."""
        netlink = uvscpd.Netlink(name)
        self.addCleanup(netlink.close)
        netlink.ask()
        self.assertTrue(netlink.asked)
        answers: list[tuple[bool, uvscpd.Link]] = []
        until(lambda: answers.extend(netlink.read())        # type: ignore[func-returns-value]
              or answers)
        self.assertFalse(netlink.asked)
        return answers[0]

    def test_interfaces_of_this_machine(self) -> None:
        for _, name in socket.if_nameindex():
            there, link = self.ask(name)
            self.assertEqual((there, link.names[0]), (True, name))
            self.assertEqual(uvscpd.link_by_ioctl(name),
                             (True, uvscpd.UNKNOWN._replace(up=link.up)))
        self.assertFalse(self.ask("lo")[1].is_can)
        self.assertEqual(self.ask("none"), (False, uvscpd.UNKNOWN))
        self.assertEqual(uvscpd.link_by_ioctl("none"), (False, uvscpd.UNKNOWN))

    def test_answer_that_is_older_than_what_happened(self) -> None:
        netlink = uvscpd.Netlink("lo")
        self.addCleanup(netlink.close)
        netlink.ask()
        netlink.outdate()
        until(lambda: netlink.read() or not netlink.asked)
        self.assertEqual(netlink.read(), [])
        netlink.ask()
        until(netlink.read)

    def test_no_thread_or_no_rtnetlink(self) -> None:
        netlink = uvscpd.Netlink("lo")
        self.addCleanup(netlink.close)
        with mock.patch("_thread.start_new_thread", side_effect=RuntimeError("no thread")):
            netlink.ask()
        self.assertFalse(netlink.asked)
        with mock.patch.object(socket, "socket", side_effect=PermissionError(1, "no")):
            self.assertIsNone(uvscpd.Netlink("lo").sock)

    def bus(self, **about: Any) -> uvscpd.Bus:
        """A bus on can0 of which only the tests say how it is."""
        bus = uvscpd.Bus(":virtual:", lambda _sock: None)
        bus.close()
        bus.name, bus.virtual, bus.sock = "can0", False, mock.Mock(getsockname=lambda: ("can0",))
        bus.health.name = bus.name
        bus.health.link = self.UP._replace(**about)
        return bus

    # What happens, and INFO's status then. The kernel says: k and a state, k- none, kdown, koff no
    # carrier, kgone; e: error class and data[1]; f: a frame of a node; c: an own one comes back;
    # s: ten seconds without an error frame.
    HISTORIES = (
        "k0=0 e004.0C=1 e004.00=0 k0=0",                # candleLight 1.0 ends a warning by 0
        "k0=0 e004.30=2 e004.4C=1 k1=1 e004.00=0",      # candleLight 2.0
        "k0=0 e004.30=2 k2=2 e020.00=2 f=2 k1=1 k0=0",  # a frame does not end what the kernel says
        "k0=0 e020.00=1 k0=1 f=0", "k0=0 e001.00=1 f=1 k0=1 c=0", "k0=0 e020.00=1 k2=2 k0=0",
        "k0=0 e040.00=3 k3=3 f=3 e004.40=0 k0=0",       # gs_usb keeps the carrier
        "k0=0 e040.00=3 k3=3 e100.00=0 k0=0", "k0=0 e004.0C=1 k1=1 k0=0",   # mcp251x, m_can
        "k3=3 koff0=3 k0=0", "k1=1 kdown=4 e040.00=4 k0=0", "kdown=4 k-=0",
        "k-=0 e004.0C=1 k-=1 f=1 s=1 f=0", "k-=0 e004.0C=1 k-=1 e004.40=0",
        "k-=0 e040.00=3 k-=3 f=3 s=3 f=0", "k-=0 koff-=3 k-=0", "k-=0 koff-=3 e004.40=3 k-=0",
        "k0=0 e040.00=3 e100.00=0 e020.00=1 f=0", "k0=0 e004.30=2 e004.0C=1 e020.00=1 f=1",
        "k0=0 e024.08=1 k0=0", "k-=0 e040.00=3 kdown=4 k-=0", "k0=0 kgone=4",
        "k0=0 e004.30=2 e001.00=2 k2=2")

    def play(self, bus: uvscpd.Bus, what: str) -> None:
        """Let one thing of a history happen."""
        if what[0] == "k":
            state = {"0": 0, "1": 1, "2": 2, "3": 3}.get(what[-1])
            bus.on_link(what != "kgone", self.UP._replace(
                state=state, up=what != "kdown", carrier="off" not in what))
        elif what[0] == "e":
            error_class, controller = what[1:].split(".")
            data = bytes((0, int(controller, 16), 0, 0, 0, 0, 0, 0))
            bus.on_error_frame(int(error_class, 16), data)
        elif what[0] == "s":
            bus.health.reported_at -= 10
        else:
            bus.on_unusual(uvscpd.pack_frame(1, b""), [], uvscpd.MSG_CONFIRM * (what == "c"))

    def test_histories(self) -> None:
        for history in self.HISTORIES:
            bus = self.bus()
            for what, status in re.findall(r"(\S+)=(\d)", history):
                with self.subTest(history, what=what):
                    self.play(bus, what)
                    self.assertEqual(bus.health.state.status, int(status))

    def test_bus_off_is_counted_once_until_it_ends(self) -> None:
        bus = self.bus(state=0)
        for what, count in (("e040.00", 1), ("e040.00", 1), ("k3", 1), ("koff3", 1), ("k0", 1),
                            ("k3", 2), ("e040.00", 2)):
            self.play(bus, what)
            self.assertEqual(bus.health.bus_offs, count)

    def test_INFO_has_only_known_error_classes(self) -> None:
        bus = self.bus(state=0)
        bus.on_error_frame(0x204, bytes((0, 0x0C, 0, 0, 0, 0, 96, 0)))
        self.assertEqual(bus.health.state[:4], (1, 4, 0x0C, "error warning"))

    def bus_with_frames(self, **about: Any) -> tuple[uvscpd.Bus, list[Any]]:
        """As bus(), and a list from which it reads frames; CAN id, data[1] and flags of each."""
        bus = self.bus(**about)
        coming: list[tuple[int, int, int]] = []

        def recvmsg(*_sizes: int) -> tuple[bytes, list[Any], int, None]:
            if not coming:
                raise BlockingIOError
            can_id, controller, flags = coming.pop(0)
            time_of_it = (socket.SOL_SOCKET, 64, struct.pack("=qq", 1, 2))
            return (struct.pack("=IB3x8s", can_id, 8, bytes((0, controller))), [time_of_it], flags,
                    None)

        bus.sock = mock.Mock(recvmsg=recvmsg, getsockname=lambda: ("can0",),
                             getsockopt=mock.Mock(return_value=bytes(36)))
        bus.out, bus.filters, bus.receives_own = mock.Mock(), [(0, 0)], False
        return bus, coming

    ERROR = 0x20000000
    CONFIRMED = (uvscpd.EFF_FLAG | 7, 0, uvscpd.MSG_CONFIRM)

    def test_own_frames_at_bus_off(self) -> None:
        for recovery in (self.ERROR | 0x004, 0x40, 0), (self.ERROR | 0x100, 0, 0):
            bus, coming = self.bus_with_frames(state=0)
            bus.has_others = True
            bus.update_receive_own()
            bus.send(7, bytes(8), SENDERS["A"])
            coming += [(self.ERROR | 0x040, 0, 0), recovery, self.CONFIRMED]
            frames, _ = bus.read(9)
            self.assertEqual([frame[4] for frame in frames], [SENDERS["A"]])

    def test_own_frame_that_ends_a_trouble_is_not_given_to_its_sender(self) -> None:
        bus, coming = self.bus_with_frames(state=0)
        coming.append((self.ERROR | uvscpd.ERR_ACK, 0, 0))
        bus.read(9)
        self.assertTrue(bus.receives_own)       # for a lone client, too
        bus.send(7, bytes(8), SENDERS["A"])
        coming += [self.CONFIRMED, (self.ERROR | 0x004, 0x40, 0)]
        frames, _ = bus.read(9)
        self.assertEqual(([frame[4] for frame in frames], bus.receives_own), ([SENDERS["A"]], True))
        with mock.patch.object(bus.health, "log_remarks"), logged():
            bus.check(0.0)
        self.assertFalse(bus.receives_own)

    def test_error_frame_that_says_nothing_of_the_state_outdates_no_answer(self) -> None:
        for error_class, controller, outdates in ((0x008, 0, False), (0x004, 0x01, False),
                                                  (0x080, 0, False), (0x004, 0x08, True)):
            bus, coming = self.bus_with_frames(state=0)
            bus.netlink = mock.Mock(refusal=None)
            coming.append((self.ERROR | error_class, controller, 0))
            bus.read(9)
            self.assertEqual(bus.netlink.outdate.called, outdates)

    def test_bus_off_before_the_first_answer(self) -> None:
        bus = self.bus()
        bus.out, bus.health.link = mock.Mock(), uvscpd.UNKNOWN
        for what in "e040.00", "k3":
            self.play(bus, what)
        with self.assertRaises(uvscpd.NoRoom):
            bus.send(1, b"", SENDERS["A"])

    def test_no_descriptor_to_ask_without_rtnetlink(self) -> None:
        bus = self.bus()
        bus.netlink, sock = mock.Mock(sock=None), bus.sock
        with mock.patch.object(socket, "socket", side_effect=OSError(errno.EMFILE, "none")):
            bus.ask()
        self.assertIs(bus.sock, sock)

    def test_a_kernel_that_refuses_questions(self) -> None:
        """A sandbox may allow the socket of rtnetlink, but no question on it."""
        bus = self.bus()
        bus.netlink = uvscpd.Netlink("can0")
        self.addCleanup(bus.netlink.close)
        refusing = mock.Mock(send=mock.Mock(side_effect=[
            OSError(errno.ENOBUFS, "no"), PermissionError(errno.EACCES, "no")]))
        for gives_up in False, True:
            bus.netlink.asked = True
            bus.netlink.send(refusing, b"")
            self.assertFalse(bus.netlink.asked)
            self.assertEqual(bool(bus.netlink.refusal), gives_up)
        for there in True, False:
            with mock.patch.object(uvscpd, "link_by_ioctl", return_value=(there, self.UP)), \
                    mock.patch.object(bus, "on_link") as on_link:
                bus.ask()
            on_link.assert_called_once_with(there, self.UP)
        self.assertIsNone(bus.netlink.sock)     # what it might still say would be only a part

    def test_one_question_for_many_SENDs(self) -> None:
        bus = self.bus()
        bus.netlink = mock.Mock(refusal=None)
        bus.out = mock.Mock(send=mock.Mock(side_effect=OSError(errno.ENETDOWN, "")))
        for _ in range(5):
            with self.assertRaisesRegex(uvscpd.VscpError, "can0 is down"):
                bus.send(1, b"", SENDERS["A"])
        self.assertEqual(bus.netlink.outdate.call_count, 1)

    def test_messages_that_found_no_room(self) -> None:
        netlink = uvscpd.Netlink("can0")
        self.addCleanup(netlink.close)
        assert netlink.sock
        message = struct.pack("=IHHII", 16 + len(link_message()), 16, 0, 0, 0) + link_message()
        with mock.patch.object(netlink, "ask") as ask, mock.patch.object(
                netlink, "sock", mock.Mock(recv=mock.Mock(side_effect=[
                    message, OSError(errno.ENOBUFS, ""), message, BlockingIOError]))) as sock:
            netlink.asked = True
            ask.side_effect = lambda: self.assertEqual(sock.recv.call_count, 4)
            self.assertEqual([link.names for _, link in netlink.read()], [("can0",)] * 2)
        ask.assert_called_once_with()           # once all has been read
        self.assertFalse(netlink.asked)

    def test_interface_that_is_not_CAN_is_not_opened(self) -> None:
        bus = self.bus()
        bus.sock = None
        with mock.patch.object(bus, "open") as opened:
            bus.on_link(True, self.UP._replace(is_can=False))
        self.assertFalse(opened.called)
        self.assertEqual(bus.health.state.text, "can0 is not a CAN interface")

    def test_what_is_logged_of_an_interface(self) -> None:
        for about, texts in (
                ({}, ["can0: up, can"]), ({"bitrate": 125000}, ["can0: up, can, 125000 bit/s"]),
                ({"bitrate": 500000, "state": 2},
                 ["can0: up, can, 500000 bit/s, error passive; VSCP nodes speak 125000"]),
                ({"qdisc": "fq_codel"}, [
                    "can0: up, can", "can0: the queue fq_codel may drop frames silently, "
                    "try: tc qdisc replace dev can0 root pfifo_fast"]),
                ({"qdisc": "pfifo_fast"}, ["can0: up, can"]),
                ({"listen_only": True}, ["can0: up, can", uvscpd.listen_only_text("can0")])):
            remarks = uvscpd.remarks_on("can0", self.UP._replace(**about), 1 << 22)
            self.assertEqual([text for _, text in remarks], texts)
        (_, _), (_, text) = uvscpd.remarks_on("can0", self.UP._replace(bitrate=125000), 425984)
        self.assertEqual(text, "can0: the kernel buffers 443 frames for us, 0.5 s of a full bus, "
                         "try: sysctl net.core.rmem_max=2097152, and start uvscpd again")

    def test_remarks_are_logged_again_when_they_change(self) -> None:
        bus = self.bus()
        with logged() as lines:
            for about, count in (({"bitrate": 125000}, 1), ({"bitrate": 125000, "state": 1}, 0),
                                 ({"bitrate": 250000}, 1), ({"bitrate": 250000, "up": False}, 0)):
                lines.clear()
                bus.health.link = self.UP._replace(**about)
                with mock.patch.object(bus, "sock", mock.Mock(getsockopt=lambda *_: 1 << 22)):
                    bus.check(0.0)
                self.assertEqual(len(lines), count, about)

    def test_missing_in_the_first_seconds(self) -> None:
        down = "interface can0 is down"
        for history, wanted in (
                ("0:kdown 1:kgone 2:k0", [f"waiting: {down}"]),
                ("0:kdown 11:kdown 12:k0", [f"waiting: {down}", down,
                                            f"can0: the bus is back, was: {down}"]),
                ("0:k0 1:kdown 2:k0", [f"waiting: {down}"]),
                ("0:k0 11:kdown 12:k0", [down, f"can0: the bus is back, was: {down}"])):
            bus = self.bus()
            with logged() as lines, mock.patch.object(bus.health, "log_remarks"), \
                    mock.patch.object(bus, "ask"):
                for seconds, what in re.findall(r"(\d+):(\w+)", history):
                    self.play(bus, what)
                    bus.sock = bus.sock or mock.Mock(getsockname=lambda: ("can0",))
                    for _ in range(2):
                        bus.check(bus.health.started_at + int(seconds))
                self.assertEqual([line.partition(", try")[0] for line in lines], wanted)

    def test_listen_only(self) -> None:
        bus = self.bus(listen_only=True)
        bus.out = mock.Mock()
        with self.assertRaisesRegex(uvscpd.VscpError, "listen-only mode, try: ip link set can0 d"):
            bus.send(1, b"", SENDERS["A"])

    def test_error_of_send_that_is_not_the_interface_s(self) -> None:
        for code in errno.EACCES, errno.EINVAL, errno.EPERM:
            bus = self.bus()
            bus.out = mock.Mock(send=mock.Mock(side_effect=OSError(code, "no")))
            with self.assertRaisesRegex(uvscpd.VscpError, "^can0: no$"):
                bus.send(1, b"", SENDERS["A"])
            self.assertIs(bus.health.state, uvscpd.BUS_WELL)

    def test_no_SEND_at_bus_off(self) -> None:
        for history, refused in (("k3", True), ("koff-", True), ("k- e040.00", False)):
            bus = self.bus()
            bus.out = mock.Mock()
            for what in history.split():
                self.play(bus, what)
            bus.sock = None
            with self.assertRaises(uvscpd.NoRoom) if refused else contextlib.nullcontext():
                bus.send(1, b"", SENDERS["A"])
            self.assertEqual(bus.out.send.called, not refused)

    def test_names(self) -> None:
        bus = self.bus()
        for name in "can0", ("can0",):          # Python 3.7 gives text, later ones a tuple
            with mock.patch.object(bus.sock, "getsockname", return_value=name):
                self.assertEqual(bus.bound_name(), "can0")
        bus.name, bus.netlink = "vscpbus", mock.Mock(sock=None)
        here = self.UP._replace(names=("can0", "vscpbus"), state=0)
        for there, link, status in (
                (True, here, 0), (True, here._replace(names=("can9",), index=4, up=False), 0),
                (True, here._replace(up=False), 4), (True, here, 0),
                (True, here._replace(names=("can0",)), 4)):         # the name was taken from it
            with mock.patch.object(bus.netlink, "read", return_value=[(there, link)]):
                bus.read_links()
            self.assertEqual(bus.health.state.status, status, link)

    def test_time_in_the_form_that_is_in_force(self) -> None:
        frame = uvscpd.pack_frame(5, b"ab")
        for old_form, data in ((0, struct.pack("=qq", 7, 9)), (1, struct.pack("@ll", 7, 9))):
            bus = self.bus()
            bus.set_options(mock.Mock(getsockopt=mock.Mock(return_value=old_form)))
            self.assertEqual(bus.unpack[2](frame + data), (uvscpd.EFF_FLAG | 5, b"ab", 7, 9))

    def test_Python_without_SocketCAN(self) -> None:
        for error in AttributeError("CAN_RAW"), OSError("unknown address family"):
            with mock.patch.object(uvscpd.Bus, "set_options", side_effect=error), \
                    mock.patch.object(socket, "AF_CAN", socket.AF_UNIX, create=True), \
                    mock.patch.object(socket, "SOCK_RAW", socket.SOCK_DGRAM), \
                    mock.patch.object(socket, "CAN_RAW", 0, create=True):
                bus = uvscpd.Bus("nosuchcan0", lambda _sock: None)
            self.addCleanup(bus.end)
            self.assertEqual(uvscpd.state_text(bus.health.state),
                             "this Python has no SocketCAN, try: CPython, on Linux")


# =============================================================================
# 8. Client
# =============================================================================
# From bytes to command lines, and how connections begin and end.

TOO_LONG = "line length exceeded"
KEY = "a cursor or function key is in this line, please type it again"
NOT_HTTP, NOT_BINARY = "an HTTP request", "binary data, perhaps TLS"

# What PuTTY sends at once in its default type, Telnet: WILL NAWS, TSPEED, TTYPE, NEW-ENVIRON, ...
PUTTY = bytes.fromhex("FFFB1F FFFB20 FFFB18 FFFB27 FFFD01 FFFB03 FFFD03")
WINDOW_SIZE = bytes.fromhex("FFFA1F 0050 0A0D FFF0")            # 80 columns; an LF, a CR in it
TERMINAL = b"\xff\xfa\x18\x00noop\xff\xff\xf0\xff\xf0"         # IAC IAC: the byte FF
CTRL_C = bytes.fromhex("FFF4 FFFD06")

# What web pages make a browser send: the form, multipart, beacon and fetch differ in the body.
WEB_PAGES = (
    b"POST / HTTP/1.1\r\nHost: pi:8598\r\nContent-Type: text/plain\r\n\r\n",
    b"PUT /a HTTP/1.1\r\nHost: pi:8598\r\nUser-Agent: vers\r\n\r\n",
    b"OPTIONS * HTTP/1.0\r\n\r\n",
    b"vers /a HTTP/1.1\r\nHost: pi:8598\r\n\r\n",               # fetch takes any method
    b"+ / HTTP/1.1\r\n", b"get /a\n", b"  GET http://pi:8598/a\r",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"POST /" + b"x" * 600 + b" HTTP/1.1\r\n",
    b"x" * 9999 + b" /" + b"x" * 9999 + b" HTTP/1.1\r\n",
    b"GET /ws HTTP/1.1\r\nUpgrade: websocket\r\n\r\n",
    b"Host: pi:8598\r\n", b" host:" + b"x" * 600 + b"\r\n",
    b"CONNECT pi:8598 HTTP/1.1\r\n\r\n",
    *(method + b" /\n" for method in b"HEAD POST PUT DELETE CONNECT OPTIONS TRACE PATCH".split()),
)
BINARY_HELLOS = (
    bytes.fromhex("160301 0200 0100 01FC 0303") + b"\nvers\n",           # TLS
    bytes.fromhex("0003 0008 2112A442") + b"\nvers\n",                  # STUN and TURN, WebRTC's
    bytes.fromhex("0014 0001 0000 2112A442"),                           # the same by ICE-TCP
    bytes.fromhex("100C 0004") + b"MQTT\x04\x02\x00\x3c\x00\x00",
    bytes.fromhex("0501 00"), bytes.fromhex("0401 0050 01020304 00"),   # SOCKS 5 and 4
    bytes.fromhex("0300 000B 06E0 0000 0000 00"),                       # a remote desktop
    bytes.fromhex("0006 0100 0001 0000 0000 0000"),                     # DNS over TCP
    bytes.fromhex("0000 00A4 FF") + b"SMBr",
    bytes.fromhex("0000 0008 04D2 162F"),                               # PostgreSQL
)
# Others whose lines are refused one by one, or quit, as they always were.
HARMLESS_HELLOS = (
    b"SSH-2.0-OpenSSH_9.9\r\n", b"EHLO pi\r\n", b"USER anonymous\r\n",
    b"PROXY TCP4 127.0.0.1 127.0.0.1 40000 8598\r\n",
    bytes.fromhex("0D0A0D0A000D0A515549540A 2111000C 7F000001 7F000001 9C402196"),  # PROXY v2
    b"OPTIONS sip:nm SIP/2.0\r\nVia: SIP/2.0/TCP nm;branch=foo\r\n\r\n",
    b"*1\r\n$4\r\nPING\r\n", b"\r\n\r\n", b"l\x00\x0b\x00\x00\x00\x00\x00\x00\x00\x00\x00",
    b"\x80\x2e\x01\x03\x01", b"<policy-file-request/>\x00", b"TNMP\x04\x00\x00\x00",
)


def in_pieces(data: bytes, size: int) -> list[bytes]:
    return [data[start:start + size] for start in range(0, len(data), size)]


class LineTest(unittest.TestCase):
    LINES: tuple[tuple[bytes, list[str]], ...] = (
        (b"noop\r\nquit\n", ["noop", "quit"]),
        (b"no line end", []),
        (b"\n\r\n", ["", ""]),
        (b"a b\r\nno\top\n\t\n", ["a b", "no op", " "]),
        (b"n\x07o\x1f\0op\n", ["noop"]),
        (b"n\x80o\xc3\xa9o\xffp\n !~ \n", ["noop", " !~ "]),
        (b"\xff" + b"x" * 512 + b"\r\n", ["x" * 512]),
        (b"x" * 513 + b"\nnoop\n", [TOO_LONG, "noop"]),
        (b"noop\n" + b"x" * 513 + b"\r\n" + b"y" * 6000 + b"\n\n",
         ["noop", TOO_LONG, TOO_LONG, ""]),
        # CR: alone it ends a line; LF, NUL and more CRs belong to it.
        (b"noop\rquit\r", ["noop", "quit"]),
        (b"noop\r\0quit\r\0\r\n", ["noop", "quit"]),
        (b"noop\r\r\nquit\n\rchid\n\r", ["noop", "quit", "chid"]),
        (b"n\ro\r\ro\np\r\r\n\r\n", ["n", "o", "o", "p", ""]),
        # Backspace and DEL
        (b"send 3\x082\nnoob\x7fp\n", ["send 2", "noop"]),
        (b"\x08\x7fx\x08\x08noop\r\n", ["noop"]),
        (b"3\xc3\xa9\x082\n3\xc3\xa9\x08\x082\n3\xe9\x7f2\n", ["32", "2", "32"]),
        (b"13\x84\x082\n3\xa7\x082\n1\xb0\x08\n", ["132", "32", "1"]),      # CP850, Latin-1
        (b"x" * 600 + b"\x08" * 200 + b"\n", [TOO_LONG]),
        (b"x" * 513 + b"\x08\n", [TOO_LONG]),
        # Cursor keys
        (b"chi\x1b[Dd\nnoop\n\x1b[A\r", [KEY, "noop", KEY]),
        (b"chid\x1b[D\x08\x08\x08\x08\nnoop\n", [KEY, "noop"]),
        # Telnet, RFC 854
        (PUTTY + b"noop\r\n", ["noop"]),
        (b"no" + WINDOW_SIZE + b"op\r\0" + TERMINAL + b"quit\r\n", ["noop", "quit"]),
        (b"no" + CTRL_C + b"op\xff\xf6\n\xff\xff\nno\xff\xfe\nop\n", ["noop", "", "noop"]),
        (b"no\xff\xff\xfbop\n", ["noop"]),
    )

    def feed(self, data: bytes, size: int = 0) -> list[str]:
        """What a new reader makes of the data in pieces of a size."""
        reader = uvscpd.LineReader()
        return [str(line) for piece in in_pieces(data, size or len(data))
                for line in reader.feed(piece)]

    def test_end_of_the_input(self) -> None:
        for data, lines in ((b"chid", ["chid"]), (b"chid\n", []), (b"", []), (b"\xff", []),
                            (b"chid\xff", ["chid"]), (b"chid\xff\xfb", ["chid"]),
                            (b"chid\xff\xfa\x18", ["chid"])):
            reader = uvscpd.LineReader()
            reader.feed(data)
            self.assertEqual(list(reader.end()), lines, data)

    def test_lines_in_pieces_of_any_size(self) -> None:
        for data, lines in self.LINES:
            for size in (0, 1, 2, 3, 4, 5, 7, 511, 512, 513, 514):
                with self.subTest(data[:30], size=size):
                    self.assertEqual(self.feed(data, size), lines)

    def test_usual_lines_are_the_same_piece_by_piece(self) -> None:
        """feed() takes a short way for most input: it must come to the same result."""
        rng = random.Random(1)
        words = [b"noop", b"send 1,2", b"x" * 300, b" ", b"\r\n", b"\n", b"\r\n", b"\r", b"\x08",
                 b"/", b"ost:", b"\xff\xfb", b"\x1b", b"a /b HTTP/1", b"h"]
        for _ in range(2000):
            data = b"noop\n" + b"".join(rng.choices(words, [9] * 7 + [1] * 8, k=20))
            slow = uvscpd.LineReader()
            lines = [str(line) for line in slow.feed_pieces(data)]
            if NOT_HTTP not in lines:
                self.assertEqual(self.feed(data, rng.choice((1, 2, 5, 30, 500))), lines)

    def test_endless_line(self) -> None:
        for byte in b"x/\xe9\x1b":
            reader = uvscpd.LineReader()
            for _ in range(50):
                self.assertEqual(reader.feed(bytes([byte]) * 16384), [])
                self.assertLess(len(reader.partial), 600)
            error, noop = reader.feed(b"\nnoop\n")
            self.assertIsInstance(error, uvscpd.VscpError)
            self.assertEqual(noop, "noop")

    def test_endless_subnegotiation_is_given_up(self) -> None:
        reader = uvscpd.LineReader()
        reader.feed(b"\xff\xfa")
        for piece in in_pieces(b"x" * 600 + b"\xff\xff" * 600, 100):
            reader.feed(piece)
            self.assertLessEqual(len(reader.telnet), 512)
        self.assertEqual(reader.feed(b"\nnoop\n")[-1], "noop")

    def test_time_for_hostile_bytes(self) -> None:
        """No input takes a time that grows with its square: pieces of 16 kB would take minutes."""
        for piece in (b"\xff\xfa", b"\xff", b"\xff\xfa\xff", b"\xff\xff\xfa", b" ", b" /", b"a /"):
            self.feed(b"\n" + (piece * 16384)[:16384] + b" HTTP/\n")

    def test_other_protocols(self) -> None:
        for hello in WEB_PAGES + BINARY_HELLOS:
            for size in (0, 1, 2, 3, 7, 512):
                with self.subTest(hello[:30], size=size):
                    reader = uvscpd.LineReader()
                    for piece in in_pieces(hello, size or len(hello)):
                        lines = reader.feed(piece)
                        if lines:
                            break
                    self.assertEqual(len(lines), 1)
                    self.assertIsInstance(lines[0], uvscpd.NotVscp)
                    self.assertEqual(str(lines[0]), NOT_HTTP if hello in WEB_PAGES else NOT_BINARY)

    def test_no_line_of_VSCP_looks_like_another_protocol(self) -> None:
        arguments = ("", "1", "list", "0,2,3", "a b c", "HTTP/1.1", "Host:", "a/b", "/", "GET",
                     "96,20,3,0,2026-11-21T22:28:59Z,0,FF:0:0:0:0:0:0:0:0:0:0:0:0:0:0:1,1",
                     "96, 20, 3, 0, , 0, -, 1", *(row.usage for row in ROWS))
        for name in uvscpd.COMMANDS:
            for argument in arguments:
                for line in (f"{name} {argument}", f"  {name.upper()}  {argument} "):
                    for end in ("\r\n", "\n", "\r"):
                        self.assertEqual(self.feed((line + end).encode()), [line])


class ClientTest(DaemonTestCase):
    TRANSCRIPTS = f"""
    test_empty_line
        >                   | -OK - no input
        > noop
    test_unknown_command
        > foo               | -OK - invalid command
        > no op             | -OK - invalid command
        > noopnoop 1 2 3    | -OK - invalid command
    test_line_of_513_characters
        > user {'x' * 508}  | -OK - line length exceeded
        > chid              | 0 | +OK
    """

    def test_many_commands_in_one_packet(self) -> None:
        self.play("> chid | 0 | +OK\n> foo | -OK - invalid command\n> noop\n" * 50)

    def test_what_the_Cpp_client_sends_first(self) -> None:
        with Peer(self.daemon.port) as peer:            # it does not wait for the greeting
            peer.send("user ", "pass ", "vers ")
            peer.greeted()
            peer.expect("+OK - no user configured", "+OK - no password configured",
                        "1,0,0,0", "+OK")

    def test_half_closed_after_commands(self) -> None:
        peer = self.connect()
        peer.send(*["chid", "foo"] * 100)
        peer.sock.sendall(b"stat\nnot a whole line")
        peer.sock.shutdown(socket.SHUT_WR)
        peer.expect(*["0", "+OK", "-OK - invalid command"] * 100)
        peer.expect("0,0,0,0,0,0,0", "+OK", "-OK - invalid command", "(closed)")

    def test_replies_read_late(self) -> None:
        peer, other = self.connect(), self.connect()
        peer.send(*["help"] * 6000, "quit")             # megabytes, more than a connection holds
        for _ in range(300):
            other.say("noop")           # and others do not wait
        lines = peer.file.read().split(b"\r\n")
        self.assertEqual(len(lines), 6000 * (len(ROWS) + 1) + 2)
        self.assertEqual(lines[-2:], [b"+OK - bye", b""])

    def test_line_cut_off_by_a_reset_does_not_run(self) -> None:
        a, b = self.connect(), self.connect()
        a.sock.sendall(b"send 96,20,1,0,,0,-\nsend 96,20,2,0,,0,-,1,1")
        b.await_events(1)
        a.reset()
        talk("""
            A> send 96,20,3,0,,0,-
            B> retr 9   | 96,20,1,0,*,#,::0 | 96,20,3,0,*,#,::0 | -OK - No event(s) available
        """, self.connect(), b)

    def test_telnet(self) -> None:
        """Negotiation is never answered, and costs no command."""
        peer = self.connect()
        peer.sock.sendall(PUTTY + b"chid\r\0" + WINDOW_SIZE + b"nop\x08op\r\n")
        peer.expect("0", "+OK", "+OK")
        peer.sock.sendall(b"chid\x1b[Dd\r\n")
        peer.expect(f"-OK - {KEY}")
        peer.say("quit | +OK - bye | (closed)")

    def test_connection_closed_or_reset_without_QUIT(self) -> None:
        for _ in range(10):
            Peer(self.daemon.port).__exit__()
        a, b = self.connect(), self.connect()
        a.say("rcvloop")
        a.send("help")
        a.reset()
        b.say(*["send 96,20,3,0,,0,-"] * 10)


class StrangerTest(OwnDaemonTestCase):
    """Whoever else connects: browsers, port scanners, health checks."""

    def say_hello(self, daemon: DaemonProcess, hello: bytes, size: int) -> list[str]:
        """What the daemon answers to this and to lines after it; all in pieces of this size."""
        with daemon.connect() as peer:
            with contextlib.suppress(ConnectionError):      # closed in the middle
                for piece in in_pieces(hello + b"\r\nvers\r\nnoop\n", size):
                    peer.sock.sendall(piece)
            peer.sock.shutdown(socket.SHUT_WR)
            return [line.decode() for line in peer.file.read().splitlines()]

    def test_not_a_line_of_a_web_page_is_run(self) -> None:
        daemon = self.start()
        for hello in WEB_PAGES + BINARY_HELLOS:
            what = NOT_HTTP if hello in WEB_PAGES else NOT_BINARY
            for size in (20000, *[1, 7] * (len(hello) < 700)):
                with self.subTest(hello[:30], size=size):
                    self.assertEqual(self.say_hello(daemon, hello, size), [
                        f"-OK - this port speaks VSCP's text protocol only, this was {what}"])
        self.assertEqual(daemon.stop().count("sent an HTTP request"), 1)

    def test_other_strangers_are_answered_and_send_nothing(self) -> None:
        daemon = self.start()
        watcher = self.connect(daemon)
        for hello in HARMLESS_HELLOS:
            lines = self.say_hello(daemon, hello, 20000)
            self.assertRegex(lines[0], "^-OK - |no user configured")
        watcher.say("cdta | 0 $ | +OK")

    def test_lines_before_an_HTTP_request_are_run(self) -> None:
        with self.connect(self.start()) as peer:
            peer.sock.sendall(b"chid\nGET / HTTP/1.1\nchid\n")
            peer.expect("0", "+OK", f"-OK - ...only, this was {NOT_HTTP}", "(closed)")

    def test_one_warning_per_minute_and_address(self) -> None:
        daemon = self.daemon_in_process()
        for host, seconds, warnings in (("10.0.0.1", 0, 1), ("10.0.0.1", 30, 0), ("::1", 0, 1),
                                        ("10.0.0.1", 30, 1), ("::1", 29, 0), ("::1", 1, 1)):
            daemon.now += seconds
            client, other_end = self.connect_in_process(daemon)
            self.log.clear()
            client.host = host
            other_end.sendall(b"GET / HTTP/1.1\r\n\r\n")
            client.on_ready(uvscpd.READ)
            daemon.now += 2
            daemon.tick()
            daemon.now -= 2
            other_end.close()
            client.on_ready(uvscpd.READ)
            self.assertTrue(client.closed)
            self.assertEqual(self.log, [f"{client.name}: sent {NOT_HTTP}; disconnected, "
                                        "none of it was run"] * warnings)

    def test_warnings_that_are_remembered_are_bounded(self) -> None:
        limit = uvscpd.RateLimit()
        count = sum(limit.allows("protocol", str(number), 60, 0.0) for number in range(3000))
        self.assertEqual((count, len(limit.again_at)), (1000, 1000))
        self.assertTrue(limit.allows("protocol", "5", 60, 60.0))

    def test_health_checks_are_one_line_with_debug(self) -> None:
        daemon = self.daemon_in_process()
        for debugging, data, reset in itertools.product((False, True), (b"", b"no line en"),
                                                        (False, True)):
            if data and not reset:
                continue                # at the end of its input it is a line
            client, other_end = self.connect_in_process(daemon)
            self.log.clear()
            with self.subTest(debugging=debugging, data=data, reset=reset), \
                    mock.patch.object(uvscpd.log, "debugging", debugging):
                other_end.sendall(data)
                client.on_ready(uvscpd.READ)
                daemon.now += 0.9
                daemon.tick()
                if reset:
                    other_end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER,
                                         struct.pack("ii", 1, 0))
                other_end.close()
                client.on_ready(uvscpd.READ)
                self.assertTrue(client.closed)
                self.assertEqual(len(self.log), debugging, self.log)
                self.assertRegex("".join(self.log), "disconnected after 0 s|^$")

    def test_client_that_sends_a_line_is_logged(self) -> None:
        client, other_end = self.connect_in_process(self.daemon_in_process())
        self.assertEqual(self.log, [])
        other_end.sendall(b"quit\n")
        client.on_ready(uvscpd.READ)
        self.assertEqual(self.log, [f"{client.name}: connected"])
        client.close()
        self.assertRegex(self.log[1], f"^{client.name}: disconnected after 0 s")

    def test_client_that_is_silent_for_a_second_is_logged(self) -> None:
        daemon, client = self.daemon_and_client_in_process()
        for seconds, lines in ((0.9, []), (0.2, [f"{client.name}: connected"]), (9, [])):
            self.log.clear()
            daemon.now += seconds
            daemon.tick()
            self.assertEqual(self.log, lines)
        client.close("gone")
        self.assertRegex("".join(self.log), rf"^{client.name}: disconnected after 10 s.*; gone$")


class SlowReaderTest(OwnDaemonTestCase):
    """A client that reads slower than its events or replies come."""

    def test_command_of_a_client_that_reads_slower_than_events_come(self) -> None:
        daemon = self.daemon_in_process("--buffer", "100000")
        client, other_end = self.connect_in_process(daemon)
        client.stream_at = daemon.now
        lines = ["0,0,0,0,2026-11-22T00:00:00,0,0:0:0:0:0:0:0:0:0:0:0:0:0:0:0:0\r\n"] * 1000
        while len(client.fifo) < 50000:
            client.put(lines, "".join(lines).encode(), 4000)
        client.turn()
        other_end.sendall(b"quitloop\n")
        for _ in range(500):
            if client.stream_at < uvscpd.NEVER:
                client.put(lines, "".join(lines).encode(), 4000)
                other_end.recv(1 << 16)
                daemon.selector.call(daemon.selector.poll(0))
        self.assertEqual(client.stream_at, uvscpd.NEVER)

    def test_slow_reader_that_leaves_has_time(self) -> None:
        daemon = self.daemon_in_process()
        client, other_end = self.connect_in_process(daemon)
        while not client.output:                # until the connection takes no more
            client.write("x" * 60000 + "\n")
            client.flush()
        client.lines.append("quit")
        client.leave()
        daemon.now += 60                        # nothing was read meanwhile
        client.tick()
        self.assertFalse(client.closed)
        while client.output:
            other_end.recv(1 << 16)
            client.turn()
        for seconds, closed in ((4, False), (2, True)):     # 5 s from when all has been sent
            daemon.now += seconds
            daemon.tick()
            self.assertEqual(client.closed, closed)

    def test_lost_events_are_logged_once_per_hour(self) -> None:
        daemon, client = self.daemon_and_client_in_process("--buffer", "3")
        for seconds, count, warnings in ((0, 3, 0), (0, 1, 1), (3599, 2, 0), (2, 1, 1)):
            self.log.clear()
            daemon.now += seconds
            client.put(["event\r\n"] * count, b"event\r\n" * count, 5 * count)
            self.assertEqual(self.log, [
                f"{client.name}: is losing events: it does not fetch them, and its buffer of "
                "3 events is full"] * warnings)
        self.assertEqual((client.missed, daemon.missed, len(client.fifo)), (4, 4, 3))
        self.assertEqual((client.rx_frames, client.rx_bytes), (7, 35))


class LeavingTest(OwnDaemonTestCase):
    """How a connection ends: by QUIT, a reset, a peer that has vanished, a bug."""

    def test_closed_without_reading_replies(self) -> None:
        daemon = self.start()
        observer = self.connect(daemon)
        for title, pause in (("running", contextlib.nullcontext()), ("paused", daemon.paused())):
            with pause, Peer(daemon.port) as peer:
                send_events(peer, range(400))
            with self.subTest(title):
                observer.await_events(400)
                observer.send("retr 400")
                self.assertEqual(read_numbers(observer, 399), list(range(400)))
                observer.expect("+OK")

    def test_client_reset_while_its_command_takes_events_in(self) -> None:
        daemon = self.daemon_in_process()
        client, other_end = self.connect_in_process(daemon)
        daemon.now += 1
        client.stream_at = daemon.now
        other_end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        other_end.close()
        client.lines.extend(["noop", "cdta", "send 96,20,3,0,,0,-", "quit"])
        daemon.bus.send(1, b"", SENDERS["A"])
        client.on_ready(selectors.EVENT_READ)
        self.assertTrue(client.closed)
        self.assertEqual((daemon.clients, daemon.leaving), ({}, set()))
        self.assertEqual(len(daemon.bus.read(9)[0]), 1)     # its SEND has run all the same

    def test_no_events_after_QUIT(self) -> None:
        daemon = self.daemon_in_process("--buffer", "9")
        client, other_end = self.connect_in_process(daemon)
        with other_end, other_end.makefile("rb") as replies:
            client.fifo.extend(["an event\r\n"] * 9)
            client.lines.extend(["retr 2", "rcvloop", "quit"])
            client.turn()
            daemon.now += 3
            daemon.tick()
            self.assertFalse(client.stream_at < uvscpd.NEVER or client.closed)
            other_end.settimeout(TIMEOUT)
            heard = replies.read()
            self.assertTrue(heard.endswith(b"+OK - bye\r\n"))
            self.assertEqual(heard.count(b"an event"), 2)

    def test_keepalive_notices_a_vanished_client(self) -> None:
        client, _ = self.connect_in_process(self.daemon_in_process())
        # A client is gone after 60 + 4 * 15 s without an acknowledgement, not for reading slowly.
        for option, value in (("NODELAY", 1), ("KEEPIDLE", 60), ("KEEPINTVL", 15), ("KEEPCNT", 4),
                              ("USER_TIMEOUT", 0)):
            self.assertEqual(client.sock.getsockopt(
                socket.IPPROTO_TCP, getattr(socket, f"TCP_{option}")), value, option)
        self.assertTrue(client.sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE))

    def test_client_that_another_one_has_closed_in_this_tick(self) -> None:
        daemon, client = self.daemon_and_client_in_process()
        client.peer_closed_writing = True
        client.close()
        client.tick()
        self.assertFalse(daemon.leaving)

    def test_peer_that_acknowledges_nothing_for_five_minutes(self) -> None:
        for milliseconds, gone in ((299999, False), (300001, True)):
            daemon, client = self.daemon_and_client_in_process()
            info = bytes(56) + struct.pack("=I", milliseconds) + bytes(4)
            with mock.patch.object(uvscpd.Client, "tcp_info", return_value=info):
                for seconds, closed in ((9, False), (2, gone)):
                    daemon.now += seconds
                    client.tick()
                    self.assertEqual(client.closed, closed)
            client.close()

    def test_bug_in_a_command(self) -> None:
        daemon = DaemonProcess(program=changed_program("""
            def broken(client):
                raise RuntimeError("a bug for the test")
            uvscpd.COMMANDS["wcyd"].handler = broken
        """))
        a, b = self.connect(daemon), self.connect(daemon)
        a.send("noop", "wcyd", "noop")
        while a.read_line() != "(closed)":
            self.assertEqual(a.heard[-1], OK)
        for peer in (b, self.connect(daemon)):
            peer.say("chid | 0 | +OK")
        with self.assertRaisesRegex(AssertionError, r"(?s)status 0.*a bug in uvscpd\.py, the "
                                    r"client is dropped:\nTraceback.*\n  line \d+, in broken\n"
                                    r"RuntimeError: a bug for the test\n"):
            daemon.stop()


# =============================================================================
# 9. Commands
# =============================================================================
# Each row of README's table of commands: names, arguments, replies.

class CommandTest(DaemonTestCase):
    REPLIES = (         # names, reply to a client that has just come
        ("noop", "+OK"),
        ("quit exit", "+OK - bye | (closed)"),
        ("+", "-OK - no input"),
        ("vers version", "1,0,0,0 | +OK"),
        ("wcyd whatcanyoudo", "00-00-00-00-00-00-80-28 | +OK"),
        ("interface client", f"0,2,::0,{BUS}|Started * | +OK"),
        ("cdta chdata chkdata checkdata", "0 $ | +OK"),
        ("clra clrall clearall", "+OK - All events cleared."),
        ("stat", "0,0,0,0,0,0,0 | +OK"),
        ("info", '0,0,0,"OK" | +OK'),
        ("chid getchid", "0 | +OK"),
        ("ggid getguid", "::0 | +OK"),
        ("retr retrieve", "-OK - No event(s) available"),
        ("rcvloop receiveloop quitloop", "+OK"),
        ("restart shutdown", "-OK - uvscpd is not capable of restart/shutdown"),
        ("challenge measurement driver file udp remote var variable dm table test binary",
         "-OK - ...full VSCP daemon..."),
    )
    WITH_ARGUMENT = "user pass help interface client retr retrieve"
    NEED_ARGUMENT = "send sgid setguid smsk setmask sflt setfilter"

    def test_every_name_in_lower_upper_and_mixed_case(self) -> None:
        for names, reply in self.REPLIES:
            for name in names.split():
                for text in (name, name.upper(), name.title()):
                    self.play(f"> {text} | {reply}")

    def test_wrong_number_of_arguments(self) -> None:
        without = " ".join(names for names, _ in self.REPLIES[:-2]).split()
        lines = [f"{name} 1" for name in without if name not in self.WITH_ARGUMENT.split()]
        lines += [f"{name} 1 2" for name in f"{self.WITH_ARGUMENT} {self.NEED_ARGUMENT}".split()
                  if name not in ("interface", "client")]
        lines += self.NEED_ARGUMENT.split()
        self.play("".join(f"> {line} | -OK - wrong number of arguments...\n" for line in lines))

    def test_HELP(self) -> None:
        *lines, final = self.connect().ask("help")
        self.assertEqual(final, OK)
        self.assertEqual([re.split("[ :]", line)[0] for line in lines],
                         [row.names[0].upper() for row in ROWS])

    TRANSCRIPTS = """
    test_lines_after_QUIT_do_not_run
        A> quit         | +OK - bye | (closed)
        B> send 96,20,2,0,,0,-
        C= 1
        C> retr 2       | 96,20,2,0,*,#,::0 | -OK - No event(s) available
    test_repeat
        A> CHID         | 0 | +OK
        A> +            | 0 | +OK
        A> +            | 0 | +OK
        A> send 96,20,3,0,,0,-,1 ; +
        B= 2
        B> retr 2       | 96,20,3,0,*,#,::0,1 | 96,20,3,0,*,#,::0,1 | +OK
    test_USER_PASS_not_configured
        > user Admin    | +OK - no user configured
        > pass secRet   | +OK - no password configured
        > user $        | +OK - no user configured
        > pass $        | +OK - no password configured
    test_HELP_about_a_command
        > help send     | SEND ... | +OK
        > HELP ChkData  | CDTA... | +OK
        > ? smsk        | SMSK ...the mask... | +OK
        > help sflt     | SFLT ...the filter... | +OK
        > help foo      | -OK - ...
    test_INTERFACE_action
        > interface list    | 0,2,::0,...|Started * | +OK
        > Interface LIST    | 0,2,::0,...|Started * | +OK
        > interface close   | -OK - ...full VSCP daemon...
        > interface unique 0:1 | -OK - ...full VSCP daemon...
        > interface Normal  | -OK - ...full VSCP daemon...
        > interface foo 1 2 | 0,2,::0,...|Started * | +OK
    test_commands_of_the_full_daemon_with_arguments
        > variable list 1 2 3 | -OK - ...full VSCP daemon...
        > restart 1 2 3     | -OK - uvscpd is not capable of restart/shutdown
    test_CDTA_CLRA_two_events
        B> send 96,20,1,0,,0,- ; send 96,20,2,0,,0,-
        A= 2
        A> cdta         | 2 $ | +OK
        A> clra         | +OK - All events cleared.
        A> cdta         | 0 $ | +OK
    test_STAT
        A> send 96,20,1,0,,0,- ; send 96,20,1,0,,0,-,1,2
        A> send 96,20,1,0,,0 | -OK - ...
        B> send 96,20,1,0,,0,-,1,2,3
        A= 1
        A> stat         | 0,0,0,7,1,10,2 | +OK
        B> stat         | 0,0,0,10,2,7,1 | +OK
    test_SGID
        A> sgid 01:02:03:04:05:06:07:08:09:0a:0b:0c:0d:0e:0f:10
        A> ggid         | 1:2:3:4:5:6:7:8:9:A:B:C:D:E:F:10 | +OK
        B> send 96,20,3,0,,0,::FE,1
        A= 1
        A> retr         | 96,20,3,0,*,#,1:2:3:4:5:6:7:8:9:A:B:C:D:E:F:FE,1 | +OK
    test_SGID_then_SEND_mirrored_event
        A> sgid 1:2:3:4:5:6:7:8:9:A:B:C:D:E:0:0
        A> send 96,532,3,0,,0,-,1,2,3,4,5,6,7,8,9,10,11,12,13,14,0,7,99
        A> send 96,532,3,0,,0,-,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,98
        A> send 96,532,3,0,,0,-,1,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,97 | -OK - ...
        B= 2
        B> retr 2       | 96,20,3,0,*,#,::0,99 | 96,20,3,0,*,#,::0,98 | +OK
    test_SGID_forms
        > sgid {FFFFFFFF-FFFF-FFFF-0102-03AABB440130}
        > ggid          | FF:FF:FF:FF:FF:FF:FF:FF:1:2:3:AA:BB:44:1:30 | +OK
        > sgid -:1:2 ; ggid | ::1:2 | +OK
    test_SGID_first_GUID_again -g 1:2:3:4:5:6:7:8:9:A:B:C:D:E:F:10
        > sgid ::5 ; ggid | ::5 | +OK
        > SetGUID - ; ggid | 1:2:3:4:5:6:7:8:9:A:B:C:D:E:F:10 | +OK
    test_SGID_invalid
        > sgid 1:2:3    | -OK - Invalid GUID
        > sgid ::       | -OK - :: means FF in some VSCP programs and zeros in others, ...
        > ggid          | ::0 | +OK
    test_RETR_empty_queue
        > retr 0
        > retr 3        | -OK - No event(s) available
    test_RETR_oldest_first
        B> send 96,20,1,0,,0,- ; send 96,20,2,0,,0,-,2 ; send 96,20,3,0,,0,-,3
        A= 3
        A> retr         | 96,20,1,0,*,#,::0 | +OK
        A> Retrieve 2   | 96,20,2,0,*,#,::0,2 | 96,20,3,0,*,#,::0,3 | +OK
    test_RETR_more_than_there_are
        B> send 96,20,1,0,,0,- ; send 96,20,2,0,,0,-
        A= 2
        A> retr 5       | 96,20,1,0,*,#,::0 | 96,20,2,0,*,#,::0 | -OK - No event(s) available
    test_RETR_bad_count
        B> send 96,20,1,0,,0,-
        A= 1
        A> retr -x      | -OK - ...
        A> retr many    | -OK - ...
        A> cdta         | 1 $ | +OK
    test_RETR_negative_count
        A> retr -1
        B> send 96,20,1,0,,0,- ; send 96,20,2,0,,0,-
        A= 2
        A> retr -1      | 96,20,1,0,*,#,::0 | 96,20,2,0,*,#,::0 | +OK
        A> retr -9
    test_spaces_after_commas
        A> smsk 0, 0xFFFF,0,  ::0 ; sflt 0, 20, 0, ::0
        B> send 96, 20, 3, 0, , 0, -, 1,  2
        B> send 96 ,20,3,0,,0,- | -OK - wrong number of arguments, expected head,class,...
        B> send 96,20,3,0,2026-11-28 5,0,- | -OK - wrong number of arguments, expected head,...
        B> send         | -OK - wrong number of arguments, expected head,class,...
        B> smsk 0,0     0,0 | -OK - wrong number of arguments, expected priority,class,type,GUID
        A= 1
        A> retr         | 96,20,3,0,*,#,::0,1,2 | +OK
    test_SEND_nine_data_bytes
        > send 96,20,3,0,,0,-,1,2,3,4,5,6,7,8,9 | -OK - too many data bytes
    test_SMSK_SFLT
        A> smsk 0,0xFFFF,0,::FF ; sflt 0,532,0,::5
        B> send 96,20,1,0,,0,::4 ; send 96,21,2,0,,0,::5 ; send 96,20,3,0,,0,::5
        A= 1
        A> retr         | 96,20,3,0,*,#,::5 | +OK
        A> stat         | 0,0,0,4,1,0,0 | +OK
        A> SetMask 0,0,0,::0 ; SetFilter 0,0,0,::0
        B> send 96,21,5,0,,0,-
        A= 1
    test_SMSK_SFLT_with_the_number_of_a_filter
        A> smsk 0,0xFFFF,0,-,1 ; sflt 0, 20, 0, -, 0x1
        B> send 96,21,1,0,,0,- ; send 96,20,2,0,,0,-
        A= 1
        A> retr         | 96,20,2,0,*,#,::0 | +OK
    test_SMSK_SFLT_act_on_what_comes_afterwards
        B> send 96,20,1,0,,0,- ; send 96,21,2,0,,0,-
        A> smsk 0,0xFFFF,0,::0 ; sflt 0,21,0,::0
        B> send 96,20,3,0,,0,- ; send 96,21,4,0,,0,-
        A= 3
        A> retr 3       | 96,20,1,0,*,#,::0 | 96,21,2,0,*,#,::0 | 96,21,4,0,*,#,::0 | +OK
    test_SMSK_SFLT_format_errors
        > smsk 0,0,0                | -OK - format error in mask frame
        > smsk 0,0,0,::0,           | -OK - format error in mask frame
        > smsk 0,0,0,::0,1,1        | -OK - format error in mask frame
        > smsk 0,0,0,::             | -OK - format error in mask frame: :: means FF in some ...
        > setmask 0,65536,0,::0     | -OK - format error in mask frame
        > setmask 0,0,0,::100       | -OK - format error in mask frame
        > sflt 0,0,0,::0,x          | -OK - format error in filter frame
        > sflt 0,0,0,::             | -OK - format error in filter frame: :: means FF in some ...
        > sflt foo                  | -OK - format error in filter frame
        > sflt -1,0,0,::0           | -OK - format error in filter frame
        > setfilter 256,0,0,::0     | -OK - format error in filter frame
        > setfilter 0,0,65536,::0   | -OK - format error in filter frame
    """


class ReceiveLoopTest(DaemonTestCase):
    TRANSCRIPTS = """
    test_RCVLOOP_buffered_events_then_new_ones
        B> send 96,20,1,0,,0,- ; send 96,20,2,0,,0,-
        A= 2
        A> rcvloop
        A< 96,20,1,0,*,#,::0 | 96,20,2,0,*,#,::0
        B> send 96,20,3,0,,0,-
        A< 96,20,3,0,*,#,::0
        B> send 96,20,4,0,,0,-
        A< 96,20,4,0,*,#,::0
        A> stat         | 0,0,0,16,4,0,0 | +OK
        A> cdta         | 0 $ | +OK
    test_RCVLOOP_replies_between_events
        A> rcvloop
        A> foo          | -OK - invalid command
        B> send 96,20,1,0,,0,-
        A< 96,20,1,0,*,#,::0
        A> retr ; retr 5 ; send 96,20,2,0,,0,-
        A> ggid         | ::0 | +OK
        B= 1
        B> send 96,20,3,0,,0,-
        A< 96,20,3,0,*,#,::0
        A> rcvloop ; vers | 1,0,0,0 | +OK
    test_QUITLOOP
        A> quitloop ; rcvloop ; ggid | ::0 | +OK
        A> QuitLoop ; vers | 1,0,0,0 | +OK
        B> send 96,20,1,0,,0,-
        A= 1
        A> retr         | 96,20,1,0,*,#,::0 | +OK
    test_SMSK_SFLT_inside_the_receive_loop
        A> rcvloop ; smsk 0,0xFFFF,0,::0 ; sflt 0,21,0,::0
        B> send 96,20,1,0,,0,- ; send 96,21,2,0,,0,-
        A< 96,21,2,0,*,#,::0
    """

    def test_sign_of_life(self) -> None:
        in_loop, out_of_loop, again = peers = [self.connect() for _ in range(3)]
        begin = time.monotonic()
        talk("A> rcvloop\nB> rcvloop ; quitloop\nC> rcvloop ; quitloop", *peers)
        for _ in range(100):            # takes time, so that C's two loops do not begin at once
            again.ask("help")
        again.say("rcvloop")
        for seconds in (2, 4):
            for peer in (again, in_loop):
                self.assertEqual(peer.read_line(), SIGN_OF_LIFE)
                self.assertGreaterEqual(time.monotonic() - begin, seconds - 0.01)
                peer.signs_of_life += 1
        self.assertEqual(out_of_loop.ask("chid"), ["0", OK])     # nothing came before
        again.say("chid | 0 | +OK")

    def test_each_reply_is_one_write(self) -> None:
        a, b = self.connect(), self.connect()
        if not a.segments():
            self.skipTest("this kernel does not count segments")
        for number in range(3):
            b.say(f"send 96,20,{number},0,,0,-")
        a.await_events(3)
        # RCVLOOP's +OK is a write of its own: a real client loses events that come with it.
        for command, lines, writes in (("vers", 2, 1), ("retr 2", 3, 1),
                                       ("help", len(ROWS) + 1, 1), ("chid\nrcvloop", 4, 3)):
            before = a.segments()
            a.send(command)
            for _ in range(lines):
                last = a.read_line()
            # On a slow machine a sign of life may have come after the last of them.
            for _ in range(a.segments() - before - writes):
                self.assertEqual(("rcvloop" in command, a.read_line()), (True, SIGN_OF_LIFE))
            self.assertGreaterEqual(a.segments() - before, writes, command)
        self.assertRegex(last, pattern("96,20,2,0,*,#,::0"))


NOT_ALLOWED = "-OK - Need to log in to perform this command."
ALLOWED = "-OK - uvscpd is not capable of restart/shutdown"     # RESTART with privilege 15
WRONG = "-OK - invalid username or password"


class LoginTest(DaemonTestCase):
    ARGUMENTS = ("-U", "Admin", "-P", "secRet", "--guest", "0")
    TRANSCRIPTS = f"""
    test_USER_PASS
        > user Admin ; pass secRet ; chid | 0 | +OK
        > restart           | {ALLOWED}
    test_USER_PASS_none_given
        > user              | -OK - please supply username
        > USER $            | -OK - please supply username
        > pass              | -OK - please supply password
        > pass $            | -OK - please supply password
        > pass secRet       | -OK - please give the user name first
    test_USER_alone
        > noop ; user Admin ; chid | {NOT_ALLOWED}
    test_USER_PASS_wrong
        > user Admin ; pass secret | {WRONG}
        > chid              | {NOT_ALLOWED}
        > user admin ; pass secRet | {WRONG}
        > User Admin ; Pass secRet ; chid | 0 | +OK
    test_PASS_again_after_a_wrong_one
        > user Admin ; pass x | {WRONG}
        > pass secRet ; chid | 0 | +OK
    test_another_USER_or_a_wrong_PASS_logs_out
        > user Admin ; pass secRet ; restart | {ALLOWED}
        > user admin ; restart | {NOT_ALLOWED}
        > user Admin ; restart | {NOT_ALLOWED}
        > pass secRet ; restart | {ALLOWED}
        > pass secret       | {WRONG}
        > restart           | {NOT_ALLOWED}
    test_log_out_ends_the_receive_loop
        A> user Admin ; pass secRet ; rcvloop ; user Admin
        B> user Admin ; pass secRet ; send 96,20,3,0,,0,-
        A> pass secRet ; retr | 96,20,3,0,*,#,::0 | +OK
    test_guest_watches_but_does_not_SEND -U Admin -P secRet --guest 2
        A> user Admin ; pass secRet ; send 96,20,1,0,,0,-,1
        B= 1
        B> send 96,20,2,0,,0,-  | {NOT_ALLOWED}
        B> sgid ::1         | {NOT_ALLOWED}
        B> retr 2           | 96,20,1,0,*,#,::0,1 | -OK - No event(s) available
        B> rcvloop
        A> send 96,20,3,0,,0,-
        B< 96,20,3,0,*,#,::0
        A> cdta             | 0 $ | +OK
    test_only_USER_configured -U Admin --guest 0
        > restart           | {NOT_ALLOWED}
        > pass x            | +OK - no password configured
        > restart           | {NOT_ALLOWED}
        > user admin        | {WRONG}
        > restart           | {NOT_ALLOWED}
        > user Admin ; restart | {ALLOWED}
    test_only_PASS_configured -P secRet --guest 0
        > user anybody      | +OK - no user configured
        > pass secret       | {WRONG}
        > restart           | {NOT_ALLOWED}
        > pass secRet ; restart | {ALLOWED}
    """


class AccessTest(OwnDaemonTestCase):
    def test_privilege_of_every_command(self) -> None:
        _, client = self.daemon_and_client_in_process()
        for level, row in itertools.product(range(16), ROWS):
            with self.subTest(row.names, level=level):
                client.user = uvscpd.User("", b"", level, [])
                reply = uvscpd.run_command(client, row.names[0] + " x" * row.least)
                self.assertEqual(reply == NOT_ALLOWED + "\r\n", level < row.privilege)

    def test_wrong_logins_are_slow_and_five_are_enough(self) -> None:
        daemon = self.start("-U", "Admin", "-P", "secRet", "--guest", "0")
        a, b = self.connect(daemon), self.connect(daemon, source="127.0.0.2")
        begin = time.monotonic()
        for number, name in enumerate(("Admin", "admin", "root", "hass", "Admin")):
            a.send(f"user {name}", f"pass hunter{number}")
        a.send("user Admin")
        # Another address is served meanwhile.
        b.say("user Admin ; pass secRet ; chid | 0 | +OK")
        with contextlib.suppress(BlockingIOError):
            replies = a.sock.recv(1000, socket.MSG_PEEK | socket.MSG_DONTWAIT)
            self.assertLess(replies.count(b"\n"), 10)
        for number in range(1, 6):
            a.expect("+OK", WRONG)
            self.assertGreaterEqual(time.monotonic() - begin, 0.5 * number - 0.01)
        a.expect("-OK - too many wrong log-ins", "(closed)")
        log = daemon.stop()
        self.assertEqual(log.count(f"{a.name}: invalid username or password\n"), 5, log)
        self.assertEqual(log.count(f"{b.name} (Admin): logged in\n"), 1, log)
        self.assertNotRegex(log, "hunter|secRet")

    def test_wrong_logins_are_slow_by_address_not_by_connection(self) -> None:
        daemon = self.start("-U", "Admin", "-P", "secRet", "--guest", "0", "--max-clients", "99")
        begin = time.monotonic()
        with daemon.paused():
            peers = [Peer(daemon.port) for _ in range(41)]
            for peer in peers:
                self.addCleanup(peer.__exit__)
                peer.send("user Admin", "pass " + ("secRet" if peer is peers[-1] else "hunter2"))
            for peer in peers[5:-1]:                    # they do not wait for their answers
                peer.sock.shutdown(socket.SHUT_RDWR)
        for peer in (*peers[:5], peers[-1]):
            peer.greeted()
            peer.expect("+OK", "+OK" if peer is peers[-1] else WRONG)
        self.assertGreaterEqual(time.monotonic() - begin, 2.5 - 0.01)

    def test_no_login_within_30_s(self) -> None:
        users = self.file("zero zz 0")
        login = ["user zero", "pass zz"]
        for guest, steps, sent_away in (        # lines, and seconds without any after them
                ("0", [([], 29)], False), ("0", [([], 29), ([], 2)], True),
                ("1", [([], 29), ([], 2)], False),
                ("0", [(["user zero"], 20), (["user zero"], 20)], True),
                ("0", [(login, 60)], False)):           # even if it may do nothing
            with self.subTest(guest=guest, steps=steps):
                daemon = self.daemon_in_process("--users", users, "--guest", guest)
                client, other_end = self.connect_in_process(daemon)
                for lines, seconds in steps:
                    client.lines.extend(lines)
                    client.tick()
                    daemon.now += seconds
                client.tick()
                heard = other_end.recv(4096).decode().splitlines()
                self.assertEqual([line for line in heard if line[:3] == "-OK"],
                                 ["-OK - nobody logged in within 30 s"] * sent_away)

    def test_guesses_do_not_keep_others_out(self) -> None:
        daemon = self.daemon_in_process("-U", "Admin", "-P", "secRet", "--guest", "0")
        for password in ["hunter2"] * 9 + ["secRet"]:
            client, _ = self.connect_in_process(daemon)
            client.lines.extend(["user Admin", *[f"pass {password}"] * 4])
        for turn in range(10):                  # a guess of each of the others
            self.assertIs(client.user, daemon.logins.guest, turn)
            daemon.tick()
            daemon.now += uvscpd.WRONG_LOGIN_S
        self.assertIsNot(client.user, daemon.logins.guest)

    def test_users_file_of_a_relative_name_detached(self) -> None:
        name = os.path.join("..", os.path.relpath(self.file("a b"), tempfile.gettempdir()))
        with self.detached("--users", name) as (port, _), Peer(port).greeted() as peer:
            peer.say(f"cdta | {NOT_ALLOWED}", "user a ; pass b ; cdta | 0 $ | +OK")

    def test_who_may_use_the_bus_is_logged(self) -> None:
        everything = "clients may do everything without logging in"
        for arguments, text, mode, message in (
                (["-U", "a", "-P", "b"], "", 0, everything),
                (["-U", "a", "-P", "b", "--guest", "0"], "", 0, ""),
                (["--users"], "a b", 0o600, ""),
                (["--users"], "a b", 0o640, ""),
                (["--users"], "a b", 0o644, "others can read "),
                (["--users"], "# nobody", 0o600, "nobody can log in"),
                (["--guest", "3"], "", 0, "nobody can log in"), ([], "", 0, ""),
                (["-i", "0.0.0.0"], "", 0, "every host that reaches this one may use the bus"),
                (["-i", "0.0.0.0", "--allow", "::1"], "", 0, "")):
            with self.subTest(arguments, text=text, mode=mode):
                if text:
                    arguments = ["--users", self.file(text)]
                    os.chmod(arguments[1], mode)
                log = [line for line in self.start(*arguments).stop().splitlines()[1:-1]
                       if not line.startswith(f"{BUS}: up")]
                self.assertEqual([line[:len(message)] for line in log],
                                 [message] if message else [], log)

    def test_INTERFACE_shows_no_addresses_to_a_guest_without_privilege(self) -> None:
        for guest, count in (("0", 2), ("1", 3)):
            daemon = self.start("-U", "a", "-P", "b", "--guest", guest, "-g", ClientIdTest.BASE)
            a, b = self.connect(daemon), self.connect(daemon)
            self.assertEqual(len(a.ask("interface")), 1 + count)
            b.say("user a ; pass b")
            self.assertEqual(len(b.ask("interface")), 4)


# =============================================================================
# 10. Daemon, 11. Services beside the loop
# =============================================================================
# Who gets which event, when, who has to wait, and the limits.

class FanOutTest(DaemonTestCase):
    TRANSCRIPTS = """
    test_every_other_client_but_not_the_sender
        A> send 96,20,1,0,,0,-
        B= 1
        C= 1
        B> send 96,20,2,0,,0,-
        A= 1
        C= 2
        A> retr 2       | 96,20,2,0,*,#,::0 | -OK - No event(s) available
        B> retr 2       | 96,20,1,0,*,#,::0 | -OK - No event(s) available
        C> retr 2       | 96,20,1,0,*,#,::0 | 96,20,2,0,*,#,::0 | +OK
    test_not_to_the_sender_inside_the_receive_loop
        A> rcvloop ; send 96,20,1,0,,0,-
        B= 1
        B> send 96,20,2,0,,0,-
        A< 96,20,2,0,*,#,::0
    test_identical_events_from_several_senders
        A> rcvloop ; send 96,20,1,0,,0,-,7
        B> send 96,20,1,0,,0,-,7
        C> send 96,20,1,0,,0,-,7
        D= 3
        A< 96,20,1,0,*,#,::0,7 | 96,20,1,0,*,#,::0,7
        B> retr 3       | 96,20,1,0,*,#,::0,7 | 96,20,1,0,*,#,::0,7 | -OK - No event(s) available
        C> retr 3       | 96,20,1,0,*,#,::0,7 | 96,20,1,0,*,#,::0,7 | -OK - No event(s) available
    test_sender_that_leaves_at_once
        B> send 96,20,1,0,,0,- ; quit | +OK - bye | (closed)
        A= 1
    test_scan_for_nodes
        A> smsk 0,0xFFFF,0xFFFF,::0 ; sflt 0,0,32,::0 ; send 0,0,31,0,,0,-,255
        B= 1
        B> retr         | 0,0,31,0,*,#,::0,255 | +OK
        B> send 112,0,32,0,,0,::6,0,255,255,255,255,255,255,255
        B> send 112,0,33,0,,0,::6 ; send 112,0,32,0,,0,::6,1,255,1,2,3,4,5,6
        A= 2
        A> retr         | 112,0,32,0,*,#,::6,0,255,255,255,255,255,255,255 | +OK
        A> retr         | 112,0,32,0,*,#,::6,1,255,1,2,3,4,5,6 | +OK
    test_FIFO_overrun --buffer 3
        C> rcvloop
        B> send 96,20,0,0,,0,-
        C< 96,20,0,0,*,#,::0
        A> clra         | +OK - All events cleared.
        B> send 96,20,1,0,,0,- ; send 96,20,2,0,,0,- ; send 96,20,3,0,,0,-
        B> send 96,20,4,0,,0,- ; send 96,20,5,0,,0,-
        C< 96,20,1,0,*,#,::0 | 96,20,2,0,*,#,::0 | 96,20,3,0,*,#,::0
        C< 96,20,4,0,*,#,::0 | 96,20,5,0,*,#,::0
        A> cdta         | 3 $ | +OK
        A> stat         | 0,0,2,24,6,0,0 | +OK
        A> retr 3       | 96,20,3,0,*,#,::0 | 96,20,4,0,*,#,::0 | 96,20,5,0,*,#,::0 | +OK
    """

    def test_events_from_before_the_connection(self) -> None:
        a = self.connect()
        a.say("send 96,20,1,0,,0,-")
        talk("""
            A> send 96,20,2,0,,0,-
            B= 1
            B> retr 2   | 96,20,2,0,*,#,::0 | -OK - No event(s) available
        """, a, self.connect())

    def test_commands_take_in_what_is_on_the_way(self) -> None:
        a, b = self.connect(), self.connect()
        event = "96,20,1,0,*,#,::0"
        for commands, replies in (
                (["cdta", "retr"], ["1 ", "+OK", event, "+OK"]),
                (["retr"], [event, "+OK"]),
                (["clra", "cdta"], ["+OK - All events cleared.", "0 ", "+OK"]),
                (["sflt 0,21,0,::0", "smsk 0,0xFFFF,0,::0", "cdta"], ["+OK", "+OK", "1 ", "+OK"])):
            b.say("noop")               # else epoll still lists A, which would be served first
            with self.daemon.paused():
                b.send("send 96,20,1,0,,0,-")
                a.send(*commands)
            b.expect("+OK")
            a.expect(*replies)
        b.say("noop")
        with self.daemon.paused():
            b.send("send 96,20,1,0,,0,-")
            late = Peer(self.daemon.port)
        with late:
            late.greeted()
            late.say("cdta | 0 $ | +OK")

    def test_many_events_in_order(self) -> None:
        events = [(number % 256, number // 256) for number in range(600)]
        seen = " | ".join("96,20,{},0,*,#,::0,{}".format(*event) for event in events)
        self.play("A> rcvloop\n"
                  + "".join("B> send 96,20,{},0,,0,-,{}\n".format(*event) for event in events)
                  + f"A< {seen}\nC= 600\nC> retr 600 | {seen} | +OK")


class ConnectionTest(OwnDaemonTestCase):
    """Who may connect, how many, and what remains of those who have gone."""

    def test_max_clients(self) -> None:
        daemon = self.start("--max-clients", "3")
        peers = [self.connect(daemon) for _ in range(3)]
        for _ in range(2):
            with Peer(daemon.port) as refused:
                refused.send("user ", "pass ", "vers ")     # this must not cost it the answer
                refused.expect("-OK - Max number of clients connected.", "(closed)")
        peers[0].say("quit | +OK - bye | (closed)")
        for peer in (self.connect(daemon), peers[1]):
            peer.say("noop")

    def test_ALLOW(self) -> None:
        # On the socket for both, an IPv4 client counts as IPv4.
        for allow, good, bad in (("127.0.0.0/8", "127.0.0.1", "::1"), ("::1", "::1", "127.0.0.1")):
            daemon = self.start("--allow", allow, ip="")
            if good == "127.0.0.1" or ipv6_works():
                self.connect(daemon, good).say("noop")
            if bad == "127.0.0.1" or ipv6_works():
                with Peer(daemon.port, bad) as peer:
                    peer.expect("-OK - Invalid or unknown peer.", "(closed)")
                for _ in range(3):          # one warning per minute and address
                    with Peer(daemon.port, bad) as another:
                        another.expect("-OK - Invalid or unknown peer.", "(closed)")
                log = daemon.stop()
                self.assertEqual(log.count("refused: Invalid or unknown peer."), 1)
                self.assertIn(f"{peer.name}: refused: Invalid or unknown peer.", log)

    def test_connection_that_cannot_be_accepted(self) -> None:
        daemon = self.daemon_in_process()
        for code, seconds in ((errno.ECONNABORTED, 0), (errno.EMFILE, 1), (errno.ENOMEM, 1)):
            with self.subTest(errno.errorcode[code]), mock.patch.object(
                    daemon, "listener", accept=mock.Mock(side_effect=OSError(code, "no"))), \
                    mock.patch.object(daemon.selector, "watch") as watch, \
                    mock.patch.object(daemon.selector, "forget") as forget:
                self.log.clear()
                daemon.on_connection(0)
                self.assertEqual(self.log, ["cannot accept a connection: no"] * seconds)
                self.assertEqual(forget.call_args_list, [((daemon.listener,),)] * seconds)
                daemon.tick()
                watch.assert_called_with(daemon.listener, selectors.EVENT_READ,
                                         daemon.on_connection)

    def test_out_of_descriptors(self) -> None:
        daemon = self.start()
        peers = [self.connect(daemon)]
        _, most = resource.prlimit(daemon.process.pid, resource.RLIMIT_NOFILE)
        limits = (descriptors(daemon) + 2, most)
        resource.prlimit(daemon.process.pid, resource.RLIMIT_NOFILE, limits)
        peers += [self.connect(daemon) for _ in range(2)]
        waiting = Peer(daemon.port)
        self.addCleanup(waiting.__exit__)
        # Connected clients are still served. The sign of life comes after two seconds.
        peers[0].say("rcvloop")
        with idle(daemon):
            self.assertEqual(peers[0].read_line(), SIGN_OF_LIFE)
        tries = daemon.log.count("cannot accept a connection")
        self.assertIn(tries, range(1, int(2 * (time.monotonic() - waiting.since)) + 4))
        peers[1].__exit__()
        waiting.greeted()

    def test_many_QUIT_in_one_turn(self) -> None:
        daemon = self.start("--max-clients", "150")
        peers = [self.connect(daemon) for _ in range(150)]
        with daemon.paused():
            for peer in peers:
                peer.send("vers", "quit")
        for peer in peers:
            peer.expect("1,0,0,0", "+OK", "+OK - bye", "(closed)")

    def test_too_many_linger_and_the_longest_is_dropped(self) -> None:
        daemon = self.daemon_in_process("--max-clients", "200")
        clients = [self.connect_in_process(daemon)[0] for _ in range(uvscpd.MAX_LEAVING + 2)]
        clients[0].output += b"not yet sent"
        for number, client in enumerate(clients):
            self.assertEqual([each.closed for each in clients].index(True) if number > 100 else 0,
                             number > 100)
            client.leave()
            daemon.now += 0.01
        self.assertEqual([number for number, each in enumerate(clients) if each.closed], [1, 2])

    def test_memory_of_clients_that_quit(self) -> None:
        daemon, count, no_events = self.start(), 250, ("sflt 0,0,9,::0", "smsk 0,0,255,::0")
        sender = self.connect(daemon)
        sender.say(*no_events)
        used = []
        for _ in range(3):
            peers = [self.connect(daemon) for _ in range(30)]
            for number, peer in enumerate(peers):       # each has lines of its own
                peer.say(f"sgid {number:X}" + ":FF" * 15)
            send_all(sender, range(count))
            for peer in peers:
                peer.await_events(count)
                peer.say(*no_events)
            for peer in peers:                          # an event that nobody wants
                peer.say("send 96,20,8,0,,0,- ; quit | +OK - bye | (closed)")
                peer.__exit__()
            used.append(memory(daemon))
        self.assertLess(used[-1] - used[0], MEGABYTE)   # the lines of two rounds are 2.2 MB


class TurnTest(OwnDaemonTestCase):
    """What the daemon does in a turn of its loop, and when."""

    def test_STAT_counts_of_the_bus(self) -> None:
        daemon = self.daemon_in_process()
        daemon.bus.dropped = 5                 # before it connected
        client, _ = self.connect_in_process(daemon)
        health = daemon.bus.health
        daemon.bus.dropped, health.bus_offs, health.warnings, client.missed = 7, 1, 2, 30
        self.assertEqual(uvscpd.run_command(client, "stat"), f"1,2,32,0,0,0,0\r\n{OK}\r\n")

    @staticmethod
    def frames_come(daemon: uvscpd.Daemon, count: int) -> None:
        for number in range(count):
            daemon.bus.send(number, b"", SENDERS["A"])

    def test_frames_gather_under_load(self) -> None:
        daemon, client = self.daemon_and_client_in_process()
        for number in range(8):                 # the eighth within 20 ms is load
            self.assertEqual((daemon.reader.gather_at, watched(daemon)[0]), (uvscpd.NEVER, True))
            self.frames_come(daemon, 1)
            daemon.now = daemon.reader.read_at + 0.002
            daemon.reader.busy_until = max(daemon.reader.busy_until, daemon.now) if number else 0.0
            daemon.reader.on_readable(selectors.EVENT_READ)
        self.assertAlmostEqual(daemon.reader.gather_at - daemon.now, 0.005)
        self.assertFalse(watched(daemon)[0])
        for count, gathers in ((3, True), (1, False)):
            self.frames_come(daemon, count)
            daemon.reader.read_gathered()
            self.assertEqual((daemon.reader.gather_at < uvscpd.NEVER, watched(daemon)[0]),
                             (gathers, not gathers))
        self.assertEqual(len(client.fifo), 12)

    def test_nothing_gathers_while_somebody_waits_for_an_answer(self) -> None:
        daemon, client = self.daemon_and_client_in_process()
        for quiet_s, gathers in ((0.019, False), (0.021, True)):
            daemon.now += 10
            daemon.reader.gather_at = daemon.now + 1
            self.assertEqual(uvscpd.run_command(client, "send 0,20,1,0,,0,-"), f"{OK}\r\n")
            self.assertEqual(daemon.reader.gather_at, daemon.now)
            daemon.reader.read_gathered()                     # takes in just that one
            self.assertEqual(daemon.reader.gather_at, uvscpd.NEVER)
            daemon.now += quiet_s
            self.frames_come(daemon, 9)
            daemon.reader.busy_until, daemon.reader.busy_frames = daemon.now, 7
            daemon.reader.on_readable(selectors.EVENT_READ)
            self.assertEqual(daemon.reader.gather_at < uvscpd.NEVER, gathers)
            daemon.read_all()
            self.assertEqual(len(client.fifo), 9)
            client.fifo.clear()

    def test_lone_frame_or_all_in_a_turn(self) -> None:
        daemon, client = self.daemon_and_client_in_process()
        for since_s, count in ((0.0005, 3), (0.0015, 1)):
            self.frames_come(daemon, 3)
            daemon.now = daemon.reader.read_at + since_s
            daemon.reader.on_readable(selectors.EVENT_READ)
            self.assertEqual(len(client.fifo), count)
            daemon.read_all()
            client.fifo.clear()

    def test_SIGTERM_ends_at_once_when_all_clients_have_gone(self) -> None:
        for with_client in (False, True):
            daemon = self.daemon_in_process()
            client = self.connect_in_process(daemon)[0] if with_client else None
            daemon.tick()
            self.assertAlmostEqual(daemon.tick_at - daemon.now, 0.5)
            daemon.wake_up_end.send(b"\0")
            daemon.on_signal(0)
            self.assertEqual(daemon.tick_at, daemon.now)
            if client:
                daemon.tick()
                self.assertGreater(min(daemon.stop_by, daemon.tick_at), daemon.now)
                client.close()
                self.assertEqual(daemon.tick_at, daemon.now)
            daemon.tick()
            self.assertEqual(daemon.stop_by, daemon.now)

    def test_addresses_of_wrong_logins_are_bounded(self) -> None:
        logins = uvscpd.Logins({}, 0)
        for number in range(1500):
            logins.check("", "", f"10.0.{number // 256}.{number % 256}", 10.0)
        self.assertEqual(len(logins.blocked), 1000)
        logins.check("", "", "2001:db8::1", 10.6)
        self.assertEqual(logins.blocked, {b"\x20\x01\x0d\xb8\0\0\0\0": 11.1})
        with self.assertRaises(uvscpd.Later) as later:              # one /64 counts as one
            logins.check("", "", "2001:db8::2", 10.7)
        self.assertEqual(later.exception.at, 11.1)

    def test_next_tick_is_the_earliest_time(self) -> None:
        daemon = self.daemon_in_process()
        clients = [self.connect_in_process(daemon)[0] for _ in range(2)]
        for client in clients:
            client.lines.append("rcvloop")
            client.turn()
            daemon.now += 0.03
        daemon.now = clients[0].stream_at
        daemon.tick()
        self.assertEqual(daemon.tick_at, clients[1].stream_at)

    def test_nothing_is_sent_for_own_events(self) -> None:
        daemon = self.daemon_in_process()
        (client, _), (other, _) = self.connect_in_process(daemon), self.connect_in_process(daemon)
        with mock.patch.object(uvscpd.Client, "put", autospec=True) as put:
            daemon.hand_out([(0x0C140300, b"", 0, 0, client)])
        self.assertEqual([call[0][0] for call in put.call_args_list], [other])


class SelectorTest(OwnDaemonTestCase):
    """What waits for sockets: epoll, and where there is none, poll or select."""

    KINDS = (selectors.DefaultSelector, selectors.PollSelector, selectors.SelectSelector)

    def test_watch_and_forget(self) -> None:
        for kind in self.KINDS:
            with self.subTest(kind), mock.patch.object(selectors, "DefaultSelector", kind):
                selector = uvscpd.Selector()
                one, other = socket.socketpair()
                action = mock.Mock()
                other.send(b"!")
                for events, called in ((1, [1]), (2, [2]), (3, [3]), (0, []), (1, [1])):
                    selector.watch(one, events, action)
                    selector.call(selector.poll(0))
                    self.assertEqual([call[0][0] for call in action.call_args_list], called)
                    action.reset_mock()
                selector.forget(one)
                self.assertEqual(selector.poll(0), [])
                one.close()
                selector.watch(one, selectors.EVENT_READ, action)       # is too late
                self.assertEqual(selector.watched, {})
                for thing in (selector, other):
                    thing.close()

    def test_socket_that_is_closed_in_its_turn(self) -> None:
        selector = uvscpd.Selector()
        pairs = [socket.socketpair() for _ in range(2)]
        called = []

        def action(_mask: int) -> None:
            called.append(1)
            for one, _ in pairs:
                selector.forget(one)
                one.close()

        for one, other in pairs:
            other.send(b"!")
            selector.watch(one, selectors.EVENT_READ, action)
        selector.call(selector.poll(0))
        self.assertEqual(called, [1])
        selector.close()
        for _, other in pairs:
            other.close()

    def test_daemon_without_epoll(self) -> None:
        daemon = self.start(program=changed_program(
            "import selectors; selectors.DefaultSelector = selectors.SelectSelector"))
        a, b = self.connect(daemon), self.connect(daemon)
        a.say("rcvloop")
        b.say(send_line(3, 1))
        a.expect(event_line(3, 1))


class RoomTest(OwnDaemonTestCase):
    """SENDs for which the bus has no room now."""

    def test_senders_share_a_bus_that_is_full_now_and_then(self) -> None:
        daemon = self.start(program=changed_program("""
            import random
            chance, send = random.Random(1), uvscpd.Bus.send
            def send_or_not(*arguments):
                if chance.random() < 0.3:
                    raise uvscpd.NoRoom("a full bus for the test", 0.001)
                send(*arguments)
            uvscpd.Bus.send = send_or_not
        """))
        observer, *senders = (self.connect(daemon) for _ in range(6))
        observer.say("rcvloop")
        for number, peer in enumerate(senders):
            peer.send(*(send_line(number, count) for count in range(60)), "chid")
        for peer in senders:
            peer.expect(*["+OK"] * 60, "0", "+OK")
        events = [type_and_data(line) for line in next_events(observer, 300)]
        for number in range(5):         # all of each sender, in its order
            self.assertEqual([each for each in events if each[0] == number],
                             [(number, count) for count in range(60)])
        # No client had to wait until another one was finished.
        order = [vscp_type for vscp_type, _ in events]
        self.assertLess(max(order.index(number) for number in range(5)),
                        min(len(order) - order[::-1].index(number) for number in range(5)))

    def test_SENDs_that_wait_when_the_interface_goes(self) -> None:
        daemon = self.daemon_in_process()
        clients = [self.connect_in_process(daemon)[0] for _ in range(2)]
        with mock.patch.object(daemon.bus, "send", side_effect=uvscpd.NoRoom("full", 1.0)):
            for client in clients:
                client.lines.append("send 96,20,3,0,,0,-")
                client.turn()
        daemon.bus.close()
        daemon.bus.health.set_unusable(errno.ENETDOWN)
        daemon.on_links()
        self.assertEqual(daemon.wake_at, daemon.now)        # at once, not after 1.4 s
        with mock.patch.object(uvscpd.Client, "reply") as reply:
            daemon.queue.on_room()
        self.assertFalse(daemon.queue.waiting)
        for call in reply.call_args_list:
            self.assertIn("is down", call[0][0])
        self.assertEqual(len(reply.call_args_list), 2)

    def test_each_SEND_that_waits_has_its_own_time(self) -> None:
        daemon = self.daemon_in_process()
        clients = [self.connect_in_process(daemon)[0] for _ in range(5)]
        full = uvscpd.NoRoom("full", uvscpd.NEVER)
        run_at = []
        with mock.patch.object(daemon.bus, "send", side_effect=full) as send:
            for client in clients:
                client.lines.append("send 96,20,3,0,,0,-")
                client.turn()
                run_at.append(daemon.now)
                daemon.now += 0.25
            self.assertEqual(list(daemon.queue.waiting), clients)
            self.assertEqual(watched(daemon), (True, True))
            self.assertEqual(send.call_count, 1)            # the others do not try
            send.side_effect = [None, full]
            daemon.queue.on_room()                          # the bus takes one frame, ...
            send.side_effect = full
            for number in range(1, 5):                      # ... and the others get no more time
                self.assertEqual(list(daemon.queue.waiting), clients[number:])
                due = run_at[number] + uvscpd.SEND_WAIT_S
                self.assertEqual(daemon.queue.refuse_at, due)
                daemon.now = due - 0.001
                daemon.tick()
                self.assertEqual(list(daemon.queue.waiting), clients[number:])
                self.assertEqual(daemon.tick_at, due)
                daemon.now = due
                daemon.tick()
        self.assertFalse(daemon.queue.waiting)
        self.assertEqual(watched(daemon), (True, False))

    def test_nobody_is_refused_whose_turn_comes_in_time(self) -> None:
        daemon = self.daemon_in_process()
        clients = [self.connect_in_process(daemon)[0] for _ in range(12)]
        full = uvscpd.NoRoom("full", uvscpd.NEVER)
        with mock.patch.object(daemon.bus, "send", side_effect=full) as send:
            for client in clients:
                client.lines.extend(["send 96,20,3,0,,0,-"] * 60)
                client.turn()
            while daemon.queue.waiting:                     # the bus takes 62 frames a second
                daemon.now += 1 / 62
                send.side_effect = [None, full]
                daemon.queue.on_room()
                daemon.tick()
        self.assertEqual([client.tx_frames for client in clients], [60] * 12)

    def test_end_of_input_while_a_SEND_waits(self) -> None:
        daemon = self.daemon_in_process()
        client, other_end = self.connect_in_process(daemon)
        full = uvscpd.NoRoom("full", uvscpd.NEVER)
        with mock.patch.object(daemon.bus, "send", side_effect=full) as send:
            other_end.sendall(b"send 96,20,3,0,,0,-\n")
            other_end.shutdown(socket.SHUT_WR)
            for _ in range(3):
                daemon.selector.call(daemon.selector.poll(0))
            self.assertEqual(list(daemon.queue.waiting), [client])
            client.on_ready(selectors.EVENT_READ)   # select may have reported it in that turn
            self.assertEqual(list(daemon.queue.waiting), [client])
            send.side_effect = None
            daemon.queue.on_room()
        other_end.settimeout(TIMEOUT)
        self.assertTrue(other_end.recv(4096).endswith(b":virtual:\r\n+OK - Success.\r\n"))

    def test_input_is_not_watched_while_a_SEND_waits(self) -> None:
        daemon = self.daemon_in_process()
        client, other_end = self.connect_in_process(daemon)
        full = uvscpd.NoRoom("full", uvscpd.NEVER)
        with mock.patch.object(daemon.bus, "send", side_effect=full):
            client.lines.append("send 96,20,3,0,,0,-")
            client.turn()
            other_end.sendall(b"noop\n")
            # Watched, it would keep the loop busy.
            self.assertNotIn(client.sock.fileno(), dict(daemon.selector.poll(0)))

    def test_no_sign_of_life_while_a_reply_is_due(self) -> None:
        daemon = self.daemon_in_process()
        client, other_end = self.connect_in_process(daemon)
        with mock.patch.object(daemon.bus, "send",
                               side_effect=uvscpd.NoRoom("no room", uvscpd.NEVER)):
            client.lines.extend(["rcvloop", "send 96,20,3,0,,0,-"])
            client.turn()
            client.sign_at = daemon.now
            daemon.tick()
            daemon.now += uvscpd.SEND_WAIT_S
            daemon.tick()
            daemon.tick()
        self.assertTrue(other_end.recv(4096).endswith(
            b":virtual:\r\n+OK - Success.\r\n-OK - no room\r\n+OK\r\n"))


class StartedTest(OwnDaemonTestCase):
    def test_clock_that_is_set_later(self) -> None:
        daemon, client = self.daemon_and_client_in_process("-g", ClientIdTest.BASE)
        daemon.now = daemon.began + 3600
        for seconds, clock in ((0, "1970-01-01T00:00:00"), (1795390139, "2026-11-22T23:28:59")):
            with mock.patch("time.time", return_value=seconds + 3600.5):
                own, its = uvscpd.run_command(client, "interface").splitlines()[:2]
            self.assertEqual([own.rpartition(" ")[2], its.rpartition(" ")[2][:14]],
                             [clock, clock[:14]])


class ClientIdTest(OwnDaemonTestCase):
    BASE = "FF:FF:FF:FF:FF:FF:FF:F5:1:2:3:4"
    DATA = "255,255,255,255,255,255,255,245,1,2,3,4"

    def test_twelve_bytes(self) -> None:
        daemon = self.start("-g", self.BASE)
        a, b, c = peers = [self.connect(daemon) for _ in range(3)]
        for number, peer in enumerate(peers, 1):
            peer.say(f"chid | {number} | +OK", f"ggid | {self.BASE}:0:{number}:0:0 | +OK")
        # The id is the obid. A mirrored event may name A's GUID, the interface's, or zeros.
        # Event lines have the interface's GUID, whatever SGID says; filters compare with that.
        interface = f"{self.BASE}:0:0:0"
        seen = " | ".join(f"96,20,{rest}" for rest in (
            f"1,1,*,#,{interface}:5,7", f"2,1,*,#,{interface}:6,8", f"3,1,*,#,{interface}:6,9",
            f"3,1,*,#,{interface}:6,10", f"4,1,*,#,{interface}:5"))
        talk(f"""
            A> send 96,20,1,0,,0,::5,7
            A> send 96,532,2,0,,0,::6,{self.DATA},0,1,0,9,8
            A> send 96,532,3,0,,0,::6,{self.DATA},0,0,0,9,9
            A> send 96,532,3,0,,0,::6,{ZEROS},10
            A> send 96,532,2,0,,0,::6,{self.DATA},0,2,0,9,8 | -OK - ...
            B> sgid ::1 ; sflt 0,0,0,{interface}:0 ; smsk 0,0,0,{"FF:" * 15}0
            A> send 96,20,4,0,,0,::5
            A> sgid ::9 ; sgid - ; ggid | {self.BASE}:0:1:0:0 | +OK
            B= 5
            C= 5
            B> retr 5 | {seen} | +OK
            C> retr 5 | {seen} | +OK
            B> quit | +OK - bye | (closed)
        """, *peers)
        d = self.connect(daemon)                            # does not get the id of B, who left
        clients = " | ".join(f"{number},4,{self.BASE}:0:{number}:0:0,{peer.name}|Started *"
                             for number, peer in ((1, a), (3, c), (4, d)))
        d.say(f"interface | 0,2,{interface}:0,{BUS}|Started * | {clients} | +OK")

    def test_sixteen_bytes(self) -> None:
        daemon = self.start("-g", f"{self.BASE}:5:6:7:8")
        talk(f"""
            A> chid | 0 | +OK
            A> send 96,20,1,0,,0,::9
            A> interface | 0,2,{self.BASE}:5:6:7:8,{BUS}|Started * | +OK
            B= 1
            B> retr | 96,20,1,0,*,#,{self.BASE}:5:6:7:9 | +OK
        """, self.connect(daemon), self.connect(daemon))

    def test_ns_timestamps(self) -> None:
        daemon = self.start("--ns-timestamps")
        a, b = self.connect(daemon), self.connect(daemon)
        before = time.time_ns()
        a.say("send 96,20,3,0,,0,::5,1")
        b.await_events(1)
        line = b.ask("retr")[0]
        match = re.fullmatch(r"352,20,3,0,,(\d+),(0:){15}5,1", line)
        assert match, line
        self.assertTrue(before <= int(match[1]) <= time.time_ns(), line)

    def test_id_after_65535(self) -> None:
        daemon = self.daemon_in_process("-g", self.BASE)
        daemon.last_id = 0xFFFE
        daemon.clients = {mock.Mock(channel_id=number): None for number in (2, 3)}
        self.assertEqual([daemon.next_channel_id() for _ in range(3)], [0xFFFF, 1, 4])
        daemon.clients.clear()


class DiscoveryTest(OwnDaemonTestCase):
    def test_probe(self) -> None:
        daemon = self.start("--answer-probes", ip="")
        answer = "96,0,28,0,*,#,::0,128,{},127,0,0,1,{},{}".format(
            0x68 if ipv6_works() else 0x28, *divmod(daemon.port, 256))
        talk(f"""
            A> send 96,0,27,0,,0,::5,0,127,0,0,1
            A= 1
            B= 2
            A> retr 2 | {answer} | -OK - No event(s) available
            B> retr 2 | 96,0,27,0,*,#,::5,0,127,0,0,1 | {answer} | +OK
        """, self.connect(daemon), self.connect(daemon))

    def test_answers(self) -> None:
        for arguments, data, address in (
                (["--answer-probes"], b"", "127.0.0.1"),
                (["--answer-probes"], b"\0\x7F\0\0\1", "127.0.0.1"),
                (["--answer-probes", "-i", "0.0.0.0"], b"\0\x7F\0\0\1", "127.0.0.1"),
                (["--answer-probes", "-i", "0.0.0.0"], b"\1\x7F\0\0\1", ""),     # not TCP/IP
                (["--answer-probes", "-i", "::1"], b"\0\x7F\0\0\1", ""),
                ([], b"\0\x7F\0\0\1", "")):
            if "::1" in arguments and not ipv6_works():
                continue
            with self.subTest(arguments, data=data):
                daemon = self.daemon_in_process(*arguments)
                daemon.bus.send(0x0C001B05, data, SENDERS["A"])
                daemon.reader.read(1)
                self.assertEqual([frame[:2] for frame in daemon.bus.read(9)[0]], [
                    (0x0C001C00, b"\x80\x28" + socket.inet_aton(address)
                     + daemon.listener.getsockname()[1].to_bytes(2, "big"))] if address else [])

    def test_ten_answers_per_second(self) -> None:
        daemon = self.daemon_in_process("--answer-probes")
        for now, answers in ((100.0, 10), (100.99, 0), (101.0, 10), (200.0, 10)):
            daemon.now = now
            for _ in range(30):
                daemon.answer_probe(27 << 8, b"")
            self.assertEqual(len(daemon.bus.read(99)[0]), answers, now)


class SystemdTest(OwnDaemonTestCase):
    def notify_socket(self, address: str = "") -> tuple[socket.socket, str]:
        """A socket as systemd's, with an abstract address if none is given; its NOTIFY_SOCKET."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.addCleanup(sock.close)
        sock.bind(address)
        sock.settimeout(TIMEOUT)
        return sock, os.fsdecode(sock.getsockname()).replace("\0", "@")

    @staticmethod
    def heard(sock: socket.socket) -> list[str]:
        """All that the daemon has sent to this socket."""
        sock.setblocking(False)
        texts = []
        with contextlib.suppress(BlockingIOError):
            while True:
                texts.append(sock.recv(1000).decode())
        return texts

    @staticmethod
    def await_texts(sock: socket.socket, *texts: str) -> None:
        """Wait until these texts have come in this order; others may come in between."""
        for text in texts:
            while text not in sock.recv(1000).decode():
                pass

    def test_READY_STATUS_WATCHDOG_STOPPING(self) -> None:
        directory = os.path.dirname(self.file(""))
        for address in (os.path.join(directory, "not"), os.path.join(directory, "@n"), ""):
            sock, name = self.notify_socket(address)
            daemon = self.start(NOTIFY_SOCKET=name, WATCHDOG_USEC="200000")
            self.await_texts(sock, f"READY=1\nSTATUS={BUS}: OK, 0 clients, 0 frames, 0 lost",
                             "WATCHDOG=1", "WATCHDOG=1")
            self.connect(daemon)
            self.await_texts(sock, f"READY=1\nSTATUS={BUS}: OK, 1 client, 0 frames, 0 lost")
            daemon.stop()
            self.await_texts(sock, "STOPPING=1")

    def test_READY_when_the_queue_was_full(self) -> None:
        sock, name = self.notify_socket()
        other, _ = self.notify_socket()
        other.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                other.sendto(b"STATUS=another service", sock.getsockname())
        daemon = self.start(NOTIFY_SOCKET=name)
        self.connect(daemon)                # by now the daemon has tried to send READY
        self.await_texts(sock, "READY=1")

    def systemd(self, name: str) -> uvscpd.Systemd:
        with mock.patch.dict(os.environ, {"NOTIFY_SOCKET": name}):
            systemd = uvscpd.Systemd(0.0)
        self.addCleanup(systemd.sock.close)
        return systemd

    def test_READY_again_when_systemd_did_not_listen(self) -> None:
        name = self.file("") + ".sock"
        systemd = self.systemd(name)
        systemd.tick(0.0, "OK", "0 frames")
        sock, _ = self.notify_socket(name)
        for _ in range(2):
            systemd.tick(0.0, "OK", "0 frames")
        self.assertEqual(self.heard(sock), ["READY=1\nSTATUS=OK, 0 frames"])

    def test_STATUS_numbers_every_ten_seconds(self) -> None:
        sock, name = self.notify_socket()
        systemd = self.systemd(name)
        for now, numbers, sent in ((0, "0", True), (9, "5", False), (11, "5", True),
                                   (22, "5", False), (22, "6", True), (31, "7", False)):
            systemd.tick(now, "OK", numbers)
            self.assertEqual(self.heard(sock), [f"READY=1\nSTATUS=OK, {numbers}"] * sent)

    def test_watchdog_period(self) -> None:
        pid = str(os.getpid())
        for environment, seconds in (
                ({}, uvscpd.NEVER), ({"WATCHDOG_USEC": "3000000"}, 1.5),
                ({"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": pid}, 1.5),
                ({"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": pid + "0"}, uvscpd.NEVER),
                *(({"WATCHDOG_USEC": junk}, uvscpd.NEVER) for junk in ("", "0", "x", "9" * 400))):
            with self.subTest(environment), mock.patch.dict(os.environ, environment):
                self.assertEqual(uvscpd.Systemd.watchdog_period(), seconds)


# =============================================================================
# 12. What -d shows
# =============================================================================
# From a frame to its names and to what its data says.

# CAN id, names of class and type; after each `|`, data: its meaning.
MEANINGS = """
    # Nodes and registers.
    00000205 PROTOCOL NEW_NODE_ONLINE | 05: node 5
    00000305 PROTOCOL PROBE_ACK | :
    00000600 PROTOCOL SET_NICKNAME | 0506: node 5 becomes node 6
    00000800 PROTOCOL DROP_NICKNAME | 05: node 5 | 052003: node 5 flags 00100000 after 3 s
    00000900 PROTOCOL READ_REGISTER | 0510: node 5 register 16 | 05: | 000510:
    00000A05 PROTOCOL RW_RESPONSE | 102A: register 16 = 42
    00000B00 PROTOCOL WRITE_REGISTER | 05102A: node 5 register 16 = 42
    00001800 PROTOCOL PAGE_READ | 050007: node 5 register 0 count 7
    00001A05 PROTOCOL RW_PAGE_RESPONSE | 01FF00: frame 1: 255 0
    00001B05 PROTOCOL HIGH_END_SERVER_PROBE | : | 00C0A80114: TCP/IP at 192.168.1.20
    00001C00 PROTOCOL HIGH_END_SERVER_RESPONSE
        | 8028C0A801082196: TCP/IP 192.168.1.8 port 8598, capabilities 8028
    00002500 PROTOCOL EXTENDED_PAGE_READ | 05000110: node 5 page 1 register 16
        | 050100D010: node 5 page 256 register 208 count 16
    00002600 PROTOCOL EXTENDED_PAGE_WRITE | 050000102A: node 5 page 0 register 16 = 42 | 05000010:
    00002705 PROTOCOL EXTENDED_PAGE_RESPONSE
        | 0300011001020304: page 1 register 16 = 1 2 3 4, frame 3
    # Who is there.
    00001F00 PROTOCOL WHO_IS_THERE | : all nodes | FF: all nodes | 05: node 5
    00002005 PROTOCOL WHO_IS_THERE_RESPONSE | 00FFFFFFFFFFFFFF: frame 0, GUID FF:FF:FF:FF:FF:FF:FF
        | 0207056578616D70: frame 2, GUID 7:5, MDF examp | 036C650A6F007800: frame 3, MDF le.o.x
        | 0007: frame 0, GUID 7 | 031F207E7F410000: frame 3, MDF . ~.A | 0600000000000000: frame 6
        | 00:
    00002A05 PROTOCOL | 01:
    # Measurements: each coding, units by name and by number, nothing after the coding.
    0C0A0605 MEASUREMENT TEMPERATURE | 8A8100D7: 21.5 C, sensor 2 | 80858D: -0.00115 K, sensor 0
        | 90021B22: 694600 F, sensor 0 | 98000001: 1, unit 3, sensor 0
        | AE41838000: 16.4375 C, sensor 6 | C0000000: | E001: | :
    0C0A0005 MEASUREMENT GENERAL | 8080FF: -1, sensor 0
        | 807F800000000000: -1.40737488355328e+141, sensor 0
        | 80FF7FFFFFFFFFFF: 1.40737488355327e-113, sensor 0
        | 80037FFFFFFFFFFF: 1.40737488355327e+17, sensor 0 | 8081: | 80:
    0C0A0105 MEASUREMENT COUNT | 60FF: -1, sensor 0
        | 6780000000000000: -36028797018963968, sensor 7 | 60:
    0C0A1005 MEASUREMENT ELECTRICAL_POTENTIAL | A041A8CCCD: 21.1 V, sensor 0
        | A07FC00000: nan V, sensor 0 | A0FF800000: -inf V, sensor 0 | A041A8CC:
    0C0A2305 MEASUREMENT HUMIDITY | 402D34352E35: -45.5 %, sensor 0 | 4031320A33: | 40:
        | 4034350000: 45 %, sensor 0 | 4000: | 4034003500:
    0C0A0405 MEASUREMENT TIME | 3007EA0B16172000: 2026-11-22 23:32:00, sensor 0
        | 1107EA0B16172000: 2026-11-22 23:32:00, sensor 1 | 5A323333323030: 23:32:00, sensor 2
        | 5832333332303000: 23:32:00, sensor 0
        | 3807EA0B16172000: bytes 7 234 11 22 23 32 0, sensor 0 | 58313A3333:
        | 5031323334353637: 1234567, unit 2, sensor 0 | 502D35: -5, unit 2, sensor 0
        | 6805: 5 ms, sensor 0 | 6005: 5 s, sensor 0
        | 302007EA0B16: bytes 32 7 234 11 22, sensor 0
    0C0A0E05 MEASUREMENT POWER | 6005: 5 W, sensor 0 | 6805: 5 hp(M), sensor 0
        | 7005: 5 hp(I), sensor 0 | 7805: 5, unit 3, sensor 0
    0C0A1F05 MEASUREMENT POSITION | A041A8CCCD: 21.1 longitude, sensor 0
        | A841A8CCCD: 21.1 latitude, sensor 0
    0C0AFF05 MEASUREMENT | 6805: 5, unit 1, sensor 0
    0C0B0605 MEASUREMENTX1 | 6805: 5, unit 1, sensor 0
    0C0F0105 DATA IO | 0105A0: bits 00000101 10100000, sensor 1 | 2905: bytes 5, sensor 1
    0C0F0405 DATA RELATIVE_STRENGTH | 6005: 5, sensor 0 | 6805: 5 dB, sensor 0
        | 7005: 5 dBV, sensor 0
    0C0F0505 DATA SIGNAL_LEVEL | 6005: 5 %, sensor 0 | 6805: 5, unit 1, sensor 0
    0C0F0605 DATA SIGNAL_QUALITY | 6005: 5 %, sensor 0 | 6805: 5, unit 1, sensor 0
        | 70A1: -95 dBm, sensor 0
    # The same in classes without a coding byte, or with a zone before it.
    0C3C0605 MEASUREMENT64 TEMPERATURE | 4072666666666666: 294.4 K | 407266666666:
    0C400605 MEASUREMENT64X4 | FFEFFFFFFFFFFFFF: -1.79769313486232e+308
    0C460605 MEASUREMENT32 TEMPERATURE | 43933333: 294.4 K | :
    0C4A0605 MEASUREMENT32X4 | 43933333: 294.4
    0C410605 MEASUREZONE TEMPERATURE | 010203898100D7: 21.5 C, sensor 1, index 1, zone 2, sub-zone 3
        | 00FFFF826E89: 82 6E 89?, index 0, all zones, all sub-zones
        | 000102801E01: 1e+30 K, sensor 0, index 0, zone 1, sub-zone 2
        | 000102809F01: 80 9F 01?, index 0, zone 1, sub-zone 2 | 00010280: | 0001028000: | 000102:
    0C550605 SETVALUEZONE TEMPERATURE
        | 00FFFF6015: 21 K, sensor 0, index 0, all zones, all sub-zones | 010203:
    0C590605 SETVALUEZONEX4 | 0102036015: 21, sensor 0, index 1, zone 2, sub-zone 3
    0C450605 MEASUREZONEX4 | 0102036015: 21, sensor 0, index 1, zone 2, sub-zone 3
    0C090605 | 6015:
    0C100605 | 6015:
    0C3B0605 | 4072666666666666:
    0C4B0605 | 43933333:
    0C540605 | 0102036015:
    # Zones, and what comes before them.
    0C140305 INFORMATION ON | 000123: index 0, zone 1, sub-zone 35 | 00: index 0 | :
    0C140105 INFORMATION BUTTON | 010123000B: pressed, zone 1, sub-zone 35, code 11
        | 00FFFF: released, all zones, all sub-zones | 12: pressed and released, 2 repeats | :
        | 0F0102010B0100: state 7, 1 repeat, zone 1, sub-zone 2, code 267, code page 256
        | 010123000B01: pressed, zone 1, sub-zone 35, code 11
        | 01012300: pressed, zone 1, sub-zone 35
    0C140005 INFORMATION GENERAL | 000123:
    0C142405 INFORMATION STREAM_DATA | 0001020304050607:
    0C1E0500 CONTROL TURNON | FF01FF: index 255, zone 1, all sub-zones
    0C1E1400 CONTROL DIM_LAMPS | 3201FF: level 50, zone 1, all sub-zones
    00010205 ALARM ALARM | 0401FF: alarm 4, zone 1, all sub-zones
    04020905 SECURITY DOOR_OPEN | 000123: data 0, zone 1, sub-zone 35
    0C5A0305 WEATHER SEASONS_SUMMER | 0001236015: index 0, zone 1, sub-zone 35
    0C5F0305 WEATHER_FORECAST SEASONS_SUMMER | 000123: index 0, zone 1, sub-zone 35
    0C5F0005 WEATHER_FORECAST GENERAL | 000123:
    0C320605 AOL HIGH_TEMPERATURE | 000123: index 0, zone 1, sub-zone 35
    0DFA0005 DIAGNOSTIC GENERAL | 000123: index 0, zone 1, sub-zone 35
    0DFA0205 DIAGNOSTIC UNDERVOLTAGE | 000123: index 0, zone 1, sub-zone 35
    0DFC0B05 ERROR FIFO_WAIT | 000123: index 0, zone 1, sub-zone 35
    0C280105 MULTIMEDIA PLAYBACK | 020123: function 2, zone 1, sub-zone 35
    0C280B05 MULTIMEDIA ADJUST_MASTER_VOLUME | 400123: value 64, zone 1, sub-zone 35
    0C640305 PHONE RING | 07: call 7
    0C660105 DISPLAY CLEAR_DISPLAY | 000123: index 0, zone 1, sub-zone 35
    0C780105 CONFIGURATION LOAD | 0001230001: index 0, zone 1, sub-zone 35
    0C780205 CONFIGURATION LOAD_ACK | 0001:
    # Places and cells.
    0CCE0105 GNSS POSITION | 426678D541360419: latitude 57.618, longitude 11.376 | 426678D5:
    0CCE0205 GNSS SATELLITES | 07: satellites 7 | 0700:
    0CD40105 WIRELESS GSM_CELL | 00012345: GSM cell 74565 | 012345:
    # Boot loader.
    00000C00 PROTOCOL ENTER_BOOT_LOADER
        | 0500FF0102030104: node 5 algorithm 0, GUID bytes 0 3 5 7: FF 1 2 3, page 260 | 0500:
    00000D05 PROTOCOL ACK_BOOT_LOADER | 0000008000000400: block size 128 blocks 1024
    00000E05 PROTOCOL NACK_BOOT_LOADER | 03: error 3 | :
    00000F00 PROTOCOL START_BLOCK | 00000102: block 258 | 0000010201: block 258 memory type 1
        | 000001020103: block 258 memory type 1 bank 3
    00001000 PROTOCOL BLOCK_DATA | 0102030405060708:
    00001105 PROTOCOL BLOCK_DATA_ACK | ABCD00000102: CRC ABCD block 258
    00001205 PROTOCOL BLOCK_DATA_NACK | 0300000102: error 3 block 258
    00001300 PROTOCOL PROGRAM_BLOCK_DATA | 00000102: block 258
    00001405 PROTOCOL PROGRAM_BLOCK_DATA_ACK | 00000102: block 258
    00001505 PROTOCOL PROGRAM_BLOCK_DATA_NACK | 0300000102: error 3 block 258
    00001600 PROTOCOL ACTIVATE_NEW_IMAGE | 0BCD: CRC 0BCD
    00001700 PROTOCOL RESET_DEVICE | 03000102FE: frame 3, GUID 0:1:2:FE
    # Only the class is known, or not even that.
    0C5A3505 WEATHER | 000123: index 0, zone 1, sub-zone 35
    0C0B0005 MEASUREMENTX1 | :
    1FFFFFFF LOCAL | FFFFFFFFFFFFFFFF:
    0D900305 | 000123:
    # The last name of each list and those after a gap: no name is missing or there twice.
    00000000 PROTOCOL GENERAL | :
    00002900 PROTOCOL GET_EVENT_INTEREST_RESPONSE | :
    00003000 PROTOCOL ACTIVATE_NEW_IMAGE_ACK | :
    00003900 PROTOCOL BOOT_LOADER_ABORT_NACK | :
    00010D00 ALARM RESET | :
    00022500 SECURITY VIBRATION_DETECTED | :
    000A4100 MEASUREMENT REACTIVE_ENERGY | :
    000F0600 DATA SIGNAL_QUALITY | :
    00140900 INFORMATION NODE_HEARTBEAT | :
    00145800 INFORMATION PROXIMITY_DETECTED | :
    001E3500 CONTROL DECREMENT | :
    00281E00 MULTIMEDIA SET_RECORDING_VOLUME | :
    00282800 MULTIMEDIA TIVO_FUNCTION | :
    00283700 MULTIMEDIA SAVE_ALBUM | :
    00283D00 MULTIMEDIA CONTROL_RESPONSE | :
    00321000 AOL UPDATE_DIAGNOSTIC_PROCEDURE | :
    005A3400 WEATHER UV_INDEX | :
    00640800 PHONE DATABASE_INFO | :
    00660600 DISPLAY SET_DISPLAY_BUFFER_PARAM | :
    00662000 DISPLAY SHOW_TEXT | :
    00663100 DISPLAY SET_COLOR | :
    006E0100 IR RC5 | :
    006E0300 IR SONY12 | :
    006E2000 IR LIRC | :
    006E3100 IR MAPITO | :
    00780F00 CONFIGURATION RESTORE_NACK | :
    00782100 CONFIGURATION SET_PARAMETER_NACK | :
    00CE0200 GNSS SATELLITES | :
    00D40100 WIRELESS GSM_CELL | :
    01FA5100 DIAGNOSTIC CHARGING_OFF | :
    01FC0100 ERROR ERROR | :
    01FC1500 ERROR TRM_FULL | :
    01FC3000 ERROR INVALID_POINTER | :
    01FD0400 LOG LEVEL | :
    01FE0000 LABORATORY GENERAL | :
    01FF0000 LOCAL GENERAL | :
"""

ERROR_MEANINGS = (                        # CAN id # data; what it says
    ("040#", "bus off"), ("020#0000", "nobody acknowledges"),
    ("004#0020", "controller (transmit passive)"),
    ("204#000C", "controller (receive warning, transmit warning)"),
    ("088#00FF", "protocol violation, bus error"), ("800#", "unknown"),
    *((f"{1 << bit:X}#", text) for bit, text in enumerate((
        "transmit timeout", "lost arbitration", "controller", "protocol violation",
        "transceiver", "nobody acknowledges", "bus off", "bus error", "restarted"))),
    *((f"4#00{1 << bit:02X}", f"controller ({text})") for bit, text in enumerate((
        "receive overflow", "transmit overflow", "receive warning", "transmit warning",
        "receive passive", "transmit passive", "active"))))


class MeaningTest(unittest.TestCase):
    CLASSES = (0, 1, 2, *range(10, 16), 20, 30, 40, 50, *range(60, 75), *range(85, 91), 95, 100,
               102, 110, 120, 206, 212, 506, 508, 509, 510, 511)

    def test_frame_to_name_and_meaning(self) -> None:
        for row in re.findall(r"\n    ([0-9A-F].*(?:\n     .*)*)", MEANINGS):
            head, *cases = re.split(r"\s*\| ", row)
            can_id, name = int(head[:8], 16), head[9:]
            vscp_class, vscp_type = can_id >> 16 & 511, can_id >> 8 & 255
            self.assertEqual(uvscpd.event_name(vscp_class, vscp_type),
                             f"{name} ({vscp_class}.{vscp_type})".lstrip())
            for data, _, meaning in (case.partition(":") for case in cases):
                with self.subTest(head, data=data):
                    self.assertEqual(uvscpd.event_meaning(can_id, bytes.fromhex(data)),
                                     meaning.strip())

    def test_known_classes(self) -> None:
        self.assertEqual([*self.CLASSES], [number for number in range(512)
                                           if not uvscpd.event_name(number, 255).startswith("(")])

    def test_any_frame_gives_one_line(self) -> None:
        rng = random.Random(1)
        for vscp_class, vscp_type, length in itertools.product(
                [*self.CLASSES, 400, *[0, 10, 65] * 3], range(256), range(9)):
            can_id = rng.getrandbits(29) & 0x1E0000FF | vscp_class << 16 | vscp_type << 8
            data = bytes(rng.getrandbits(8) for _ in range(length))
            line = uvscpd.event_row("can0", can_id, data)
            if not re.fullmatch("[ -~]+", line):
                self.fail(f"{can_id:08X}#{data.hex()}: {line!r}")

    def test_row(self) -> None:
        for frame, source, row in (
                ("0C0A0605#8A8100D7", "can0",
                 "can0      * 0C0A0605  MEASUREMENT TEMPERATURE (10.6) "
                 "node 5 p3   8A 81 00 D7  21.5 C, sensor 2"),
                ("02000900#0510", "hass", "hass      * 02000900  PROTOCOL READ_REGISTER (0.9)   "
                 "host p0 hard 05 10        node 5 register 16"),
                ("1D9003FF#", "can0", "can0      * 1D9003FF  (400.3)                        "
                 "node 255 p7")):
            with self.subTest(frame):
                self.assertEqual(uvscpd.event_row(source, *parse_frame(frame)), row)

    def test_error_frames(self) -> None:
        for frame, text in ERROR_MEANINGS:
            with self.subTest(frame):
                self.assertEqual(uvscpd.error_meaning(*parse_frame(frame)), text)

    def test_durations_and_counts(self) -> None:
        for seconds, text in ((0.9, "0 s"), (59, "59 s"), (60, "1 min"), (61, "1 min 1 s"),
                              (3600, "1 h"), (90061, "1 d 1 h"), (86400, "1 d")):
            self.assertEqual(uvscpd.duration_text(seconds), text)
        self.assertEqual([uvscpd.counted(number, "frame") for number in (0, 1, 2)],
                         ["0 frames", "1 frame", "2 frames"])


# =============================================================================
# 13. Options
# =============================================================================
# Arguments, files of arguments and of users, GUIDs from the addresses of this machine.

class ArgumentTest(OwnDaemonTestCase):
    BAD_ARGUMENTS = (
        "--nonsense", "extra", "@/nonexistent/file", "-c", "-p",
        "--port=x", "--port=-1", "--port=65536", "--port=0x50", "--port=",
        "--canbus=", "--canbus=sixteen.letters.", "--canbus=a/b", "--canbus=a b", "--canbus=.",
        "--ip=localhost", "--ip=1.2.3", "--ip=1.2.3.4.5", "--ip=::g", "--ip=",
        "--ip=fe80::1%\udcff", "--ip=127.0.0.1%lo",
        "--guid=1:2", "--guid=", "--guid={}", "--guid=1:2:3:4:5:6:7:8:9:A:B:C:D:E:F:100",
        "--user=", "--user=two words", "--password=", "--password=two words", "--password=\xe9",
        "--buffer=x", "--max-clients=x", f"--user={'x' * 256}")
    LIMITS = (("guest", 0, 15), ("buffer", 1, 1000000), ("max-clients", 1, 10000),
              ("port", 0, 65535))
    LINES: tuple[tuple[str, list[str]], ...] = (        # of a file of arguments; the arguments
        ("", []), ("  # comment", []), ("-s", ["-s"]), ("--stay", ["--stay"]),
        ("Admin", ["Admin"]), ("a#b # c", ["a#b"]), ("-s  # stay", ["-s"]),
        ("--port 8598", ["--port=8598"]), ("--port=8598", ["--port=8598"]),
        (" -p  8598\t# a port", ["-p8598"]), ("-p8598", ["-p8598"]),
        ("-P 'a \"b' # c", ["-Pa \"b"]), ("-P 'a b\"", ["-P'a b\""]),
        ("--password 'my #1'", ["--password=my #1"]), ('--password="a" # b', ["--password=a"]),
        ("--password se#cret", ["--password=se#cret"]), ("-Pse=cret", ["-Pse=cret"]),
        ("--password se=cret", ["--password=se=cret"]), ("-P=x", ["-P=x"]),
        ("-P =x", ["-P", "=x"]), ("-P '=x'", ["-P", "=x"]), ("--password =x", ["--password==x"]),
        ("-P '@x'", ["-P@x"]), ("--password @x", ["--password=@x"]),
        ("--pidfile ''", ["--pidfile="]), ('-P"a"', ["-Pa"]),
        ("'quoted' # comment", ["quoted"]), ("--a 'b", ["--a='b"]),
        ("--password=#x", ["--password=#x"]), ("--password=x # y", ["--password=x"]),
    )
    BAD_USERS = (       # the end of the message, files
        ("line 3: a user needs a name and a password", "a b\n\nc"),
        ("line 1: the privilege is not a number from 0 to 15", "a b 16", "a two words 4"),
        ("line 1: 'nonsense' is not an address, network or pattern", "a b 1 nonsense"),
        ("line 2: user a is listed twice", "a b\na c"),
        ("line 1: only printable ASCII characters without spaces", "\xe9 b", "a \0", "a b\xa04"),
        ("line 1: sha256: needs 64 hexadecimal digits", "a sha256:12", "a SHA256:12"))

    def test_lines_of_a_file_of_arguments(self) -> None:
        for line, arguments in self.LINES:
            with self.subTest(line):
                self.assertEqual(uvscpd.split_argument_line(line), arguments)

    def test_passwords_in_a_file_of_arguments(self) -> None:
        for line, password in (("-P =x", "=x"), ("-P '=x'", "=x"), ("--password =x", "=x"),
                               ("-P=x", "x"), ("-P @x", "@x"), ("--password '#x'", "#x")):
            with self.subTest(line):
                options = uvscpd.parse_arguments(["@" + self.file(line)])
                self.assertEqual(options.password, password)

    def test_no_password_in_an_error(self) -> None:
        for arguments in (["--passwrd=geheim"], ["--p=geheim"], ["-P", "my", "geheim"],
                          ["--password=geh eim"], ["-P", "geheim\xe9"]):
            with logged() as lines, self.assertRaises(SystemExit):
                uvscpd.parse_arguments(arguments)
            self.assertEqual(len(lines), 1)
            self.assertNotRegex(lines[0], "geh|eim")

    def test_bad_arguments(self) -> None:
        for argument in self.BAD_ARGUMENTS:
            self.assert_bad_argument(argument)
        self.assert_bad_argument("--nonsense", "unrecognized arguments: --nonsense, see --help$")
        self.assert_bad_argument("--guid=::1", ":: means FF in some VSCP programs")
        for option in ("port", "users", "guest", "allow", "max-clients"):
            self.assert_bad_argument(f"--{option}=--", "")
        self.assert_bad_argument("@/no/file", "cannot read /no/file: No such file or directory$")

    def test_bad_users_file(self) -> None:
        for message, *files in self.BAD_USERS:
            for name in map(self.file, files):
                self.assert_bad_argument(f"--users={name}", re.escape(f"{name}: {message}"))
        self.assert_bad_argument("--users=/nonexistent", "No such file")

    def test_users_file_with_U_and_P(self) -> None:
        name = self.file("a b")
        for more, word in ((["-U", "x"], "-U and -P"), (["-P", "x"], "-U and -P"),
                           (["-U", "a", "-P", "x"], "user a is in")):
            self.assert_ends(2, rf"uvscpd\.py: .*{word}", "--users", name, *more)

    def test_least_and_greatest_numbers(self) -> None:
        for option, least, most in self.LIMITS:
            for number in (least, most):
                options = uvscpd.parse_arguments([f"--{option}={number}"])
                self.assertEqual(vars(options)[option.replace("-", "_")], number)
            for number in (least - 1, most + 1):
                self.assert_bad_argument(f"--{option}={number}", f"--{option}: '{number}' is not "
                                         f"a number from {least} to {most}$")

    def test_no_arguments(self) -> None:
        options = uvscpd.parse_arguments([])
        self.assertEqual(
            (options.canbus, options.guid, options.buffer, options.ip, options.port,
             options.max_clients, options.logins.guest.privilege, options.allow, options.pidfile),
            ("can0", bytes(16), 1000, None, 8598, 50, 15, [], ""))
        self.assertFalse(options.ns_timestamps or options.answer_probes or options.stay
                         or options.debug or options.logins.users)

    def test_status_and_output_of_the_process(self) -> None:
        for option, stdout in (("--help", "usage: uvscpd.py .*"),
                               ("--version", "uvscpd.py 1.0.0\n")):
            with self.subTest(option):
                result = run(PROGRAM, option)
                self.assertEqual((result.returncode, result.stderr), (0, ""))
                self.assertRegex(result.stdout, rf"(?s)\A{stdout}\Z")
        self.assert_ends(2, r"uvscpd\.py: .*port", "--port=x")

    def test_bad_file_of_arguments(self) -> None:
        name = self.file("")
        for content in ("@/no/file", "-p\n\xFF\n", "@" + name, "--port x", "--nonsense",
                        "@a\0b", "--pidfile=a\0b"):
            with self.subTest(content):
                with open(name, "w", encoding="latin-1") as file:
                    file.write(content)
                self.assert_ends(2, r"uvscpd\.py: ", "@" + name)

    def assert_error(self, message: str, *arguments: str) -> None:
        """These arguments are refused with exactly this line."""
        with self.subTest(message), logged() as lines:
            with self.assertRaises(SystemExit) as ending:
                uvscpd.parse_arguments(list(arguments))
            self.assertEqual((ending.exception.code, lines), (2, [f"uvscpd.py: {message}"]))

    def test_place_of_an_error_in_a_file_of_arguments(self) -> None:
        port = "argument -p/--port: 'x' is not a number from 0 to 65535"
        good = self.file("-s\n--guest 0\n")
        for content, place in (("--port x", 1), ("# x\n\n-s\n--port=x # y\n-d\n", 4),
                               (f"@{good}\n-p\n\nx\n--buffer y", 4)):
            name = self.file(content)
            self.assert_error(f"{name}: line {place}: {port}", "@" + good, "@" + name, "-d")
        self.assert_error(port, "--port=x", "@" + good)
        self.assert_error(port, "@" + good, "--port=x")
        name = self.file("-s\n--nonsense\n-d\n")
        self.assert_error(f"{name}: line 2: unrecognized arguments: --nonsense, see --help",
                          "@" + good, "@" + name)
        name = self.file("-s\n--buffer")
        self.assert_error(f"{name}: line 2: argument --buffer: expected one argument", "@" + name)
        name = self.file("-s\n-d\0")
        self.assert_error(f"{name}: line 2: a zero byte", "@" + name)
        outer = self.file(f"\n@{name}.none")
        self.assert_error(f"{outer}: line 2: cannot read {name}.none: No such file or directory",
                          "@" + outer)
        self.assert_error("cannot read /a b: No such file or directory", "@/a\nb")
        self.assert_error("cannot read : No such file or directory", "@")
        with open(name, "w", encoding="ascii") as file:
            file.write(f"-s\n@{name}")
        self.assert_error(f"{name}: line 2: too many files within files", "@" + name)
        name = self.file("--password\nx\n--stay\n--password\n")
        self.assert_error(f"{name}: line 4: argument -P/--password: expected one argument",
                          "@" + name)

    def test_files_saved_on_Windows(self) -> None:
        mark = b"\xEF\xBB\xBF".decode("latin-1")
        options = uvscpd.parse_arguments(["@" + self.file(mark + "--port 1\r\n-d\r\n")])
        self.assertEqual((options.port, options.debug), (1, True))
        users, _ = uvscpd.read_users(self.file(mark + "a b 4\r\nc d\r\n"))
        self.assertEqual([(user.name, user.privilege) for user in users.values()],
                         [("a", 4), ("c", 15)])
        for start in (b"\xFF\xFE", b"\xFE\xFF"):
            name = self.file(start.decode("latin-1") + "a\0 \0b\0\r\0\n\0")
            why = "this file is in UTF-16, save it as UTF-8"
            self.assert_error(f"cannot read {name}: {why}", "@" + name)
            self.assert_error(f"--users {name}: {why}", "--users", name)

    def test_file_names_and_comments_in_any_encoding(self) -> None:
        name = self.file("# \xe9\n--pidfile=/tmp/\xe9\n")
        options = uvscpd.parse_arguments(["@" + name])
        self.assertEqual(os.fsencode(options.pidfile), b"/tmp/\xe9")
        users, _ = uvscpd.read_users(self.file("# \xe9\na b # \xe9\n"))
        self.assertEqual(list(users), ["a"])

    def test_file_of_arguments(self) -> None:
        name = self.file("# A comment\n\n--guid 1:2:3:4:5:6:7:8:9:A:B:C:D:E:F:10\n-U\nAdmin\n"
                         "--password secRet\n--guest 0\n")
        daemon = self.start("@" + name)
        with open(f"/proc/{daemon.process.pid}/cmdline", "rb") as cmdline:
            self.assertNotIn(b"secRet", cmdline.read())
        self.connect(daemon).say(
            f"restart | {NOT_ALLOWED}", f"user admin ; pass secRet | {WRONG}",
            f"user Admin ; pass secRet ; restart | {ALLOWED}",
            "ggid | 1:2:3:4:5:6:7:8:9:A:B:C:D:E:F:10 | +OK")

    def test_forms_of_GUID(self) -> None:
        for text, guid in (("-:1", bytes(15) + b"\1"), ("*:1", b"\xFF" * 15 + b"\1"),
                           ("{FFFFFFFF-FFFF-FFFF-0102-03AABB440130}",
                            bytes.fromhex("FFFFFFFFFFFFFFFF010203AABB440130")),
                           ("*:1:2:3:4:5:6:7:8:9:A:B", b"\xFF" * 5 + bytes(range(1, 12))),
                           ("1:2:3:4:5:6:7:8:9:A:B:C", bytes(range(1, 13))),
                           ("01020304-0506-0708-090A-0B0C", bytes(range(1, 13)))):
            with self.subTest(text):
                self.assertEqual(uvscpd.parse_arguments([f"--guid={text}"]).guid, guid)

    def assert_machine_guid(self, kind: str, addresses: set[bytes]) -> None:
        """The GUID has one of these addresses; if there are none, it is a bad argument."""
        first = b"\xFF" * 7 + {"mac": b"\xFE", "ip": b"\xFD"}[kind.partition(":")[0]]
        if addresses:
            self.assertIn(uvscpd.guid_argument(kind), {first + address for address in addresses})
        else:
            self.assert_bad_argument(f"--guid={kind}", "--guid")

    def test_GUID_of_this_machine(self) -> None:
        macs = set()
        for name in os.listdir("/sys/class/net"):
            with open(f"/sys/class/net/{name}/type", encoding="ascii") as kind, \
                    open(f"/sys/class/net/{name}/address", encoding="ascii") as address:
                if kind.read() == "1\n":                    # Ethernet
                    macs.add(bytes.fromhex(address.read().replace(":", ""))[:4])
        with open("/proc/net/fib_trie", encoding="ascii") as file:
            ips = set(re.findall(r"\|-- (?!127)(\S+)\n +/32 host LOCAL", file.read()))
        self.assert_machine_guid("mac", macs)
        self.assert_machine_guid("ip", {socket.inet_aton(ip) for ip in ips})

    def test_GUID_of_other_machines(self) -> None:
        # struct ifreq: name, then a sockaddr: family and 6 bytes; family, port and 4 bytes.
        def ethernet(first: int) -> bytes:
            return bytes(16) + struct.pack("=H", 1) + bytes((first, 3, 4, 5, 6, 7)) + bytes(16)

        internet = bytes(16) + struct.pack("=H", 2) + b"\0\0\xC0\0\2\1" + bytes(16)
        ip, none = {b"\xC0\0\2\1"}, OSError()
        rows: tuple[tuple[str, str, list[Any], set[bytes]], ...] = (
            ("mac", "eth0", [ethernet(4)], {b"\4\3\4\5"}),
            ("ip", "eth0", [internet], ip),
            ("ip", "eth0 eth1", [none, internet], ip),
            ("ip:eth1", "eth0 eth1", [internet], ip), ("ip:eth2", "eth0 eth1", [], set()),
            ("mac:eth1", "eth0 eth1", [ethernet(8)], {b"\x08\3\4\5"}),
            ("mac", "ppp0 eth0", [bytes(40), ethernet(4)], {b"\4\3\4\5"}),
            ("mac", "docker0 eth0 eth1", [ethernet(2), ethernet(8), ethernet(4)],
             {b"\x08\3\4\5"}),
            ("mac", "docker0 veth1", [ethernet(2), ethernet(6)], {b"\2\3\4\5"}),
            ("mac", "ppp0", [bytes(40)], set()), ("ip", "eth0", [none], set()),
            ("mac", "", [], set()), ("ip", "", [], set()), ("mac:eth0", "", [], set()))
        for kind, names, answers, wanted in rows:
            # The kernel's order is that of the numbers, whatever the order of the list.
            index = list(enumerate(["lo", *names.split()], 1))[::-1]
            with self.subTest(kind, names=names), \
                    mock.patch("socket.if_nameindex", return_value=index), \
                    mock.patch("fcntl.ioctl", side_effect=answers):
                self.assert_machine_guid(kind, wanted)

    def test_interfaces_that_cannot_be_listed(self) -> None:
        with mock.patch("socket.if_nameindex", side_effect=PermissionError(1, "no")):
            self.assert_bad_argument("--guid=mac", "cannot list the network interfaces: no")


# =============================================================================
# 14. Start and end
# =============================================================================
# Exit status, messages, signals, detaching.

STOPPING = "-OK - uvscpd is stopping"


class ProcessTest(OwnDaemonTestCase):
    def test_as_installed(self) -> None:
        """As __main__.py of a directory it prints the same, and runs from the compiled code."""
        directory = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, directory)
        shutil.copy(PROGRAM, os.path.join(directory, "__main__.py"))
        for arguments in (["--version"], ["--help"], ["--nonsense"], ["--port", "x"],
                          ["@no such file"], ["-s", "-p", "0", "--pidfile", "/no such/file"]):
            script, installed = (run("-I", "-S", program, *arguments)
                                 for program in (PROGRAM, directory))
            self.assertEqual((installed.returncode, installed.stdout, installed.stderr),
                             (script.returncode, script.stdout, script.stderr))
        self.assertTrue(compileall.compile_dir(directory, quiet=1))
        with open(os.path.join(directory, "__main__.py"), "r+", encoding="utf-8") as file:
            status = os.fstat(file.fileno())
            file.write(" " * (status.st_size // 2))         # of the same size and time: not read
        os.utime(file.name, ns=(status.st_atime_ns, status.st_mtime_ns))
        self.connect(self.start(program=("-I", "-S", directory))).say("noop")

    def test_signals(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            daemon = self.start()
            peers = [self.connect(daemon) for _ in range(3)]
            peers[0].say("rcvloop")
            peers[1].sock.sendall(b"noop\nno line end")
            peers[1].expect("+OK")
            log = daemon.stop(number)           # checks the exit status
            self.assertRegex(log, r"(?s): disconnected after [01] s: 0 events, 0 lost, 0 sent\n.*"
                             r"\nstopped after [0-9]+ s: 0 frames, 0 lost\n\Z")
            for peer in peers:
                with self.subTest(number.name):
                    peer.expect(STOPPING, "(closed)")

    def test_SIGTERM_while_commands_wait_and_a_client_does_not_read(self) -> None:
        daemon = self.start()
        deaf, peer = NarrowPeer(daemon.port), self.connect(daemon)
        self.addCleanup(deaf.__exit__)
        deaf.sock.sendall(b"help\n" * 300)
        peer.say("noop")
        with daemon.paused():
            peer.send(*["noop"] * 5)
            daemon.process.send_signal(signal.SIGTERM)
        self.assertEqual(daemon.process.wait(TIMEOUT), 0)
        while peer.read_line() != "(closed)":
            pass
        self.assertEqual(peer.heard[-2], STOPPING)

    def test_SIGTERM_with_many_clients(self) -> None:
        daemon = self.start("--max-clients", "150")
        peers = [self.connect(daemon) for _ in range(150)]
        daemon.process.send_signal(signal.SIGTERM)
        for peer in peers:
            peer.expect(STOPPING, "(closed)")

    def test_SIGTERM_until_it_has_ended(self) -> None:
        for _ in range(5):
            daemon = self.start("--pidfile", self.file(""))
            while daemon.process.poll() is None:
                daemon.process.send_signal(signal.SIGTERM)
            self.assertEqual(daemon.process.returncode, 0)

    def test_SIGHUP_under_nohup(self) -> None:
        daemon = self.start(prepare=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
        peer = self.connect(daemon)
        daemon.process.send_signal(signal.SIGHUP)
        for _ in range(2):
            peer.say("noop")

    def test_cannot_start(self) -> None:
        port = str(self.start().port)
        for arguments, word in ((["-p", port], port),
                                (["-p", "0", "--pidfile", "/nonexistent/pid"], "/nonexistent/pid")):
            for foreground in ([], ["-s"]):
                with self.subTest(arguments=arguments, foreground=foreground):
                    self.assert_ends(1, f".*{word}", "-c", BUS, "-i", "127.0.0.1",
                                     *arguments, *foreground)

    def test_errors_that_end_the_daemon(self) -> None:
        for error, status, text in (
                (uvscpd.VscpError("no"), 2, r"uvscpd\.py: no"),
                (OSError(errno.EIO, "no", "/x"), 1, r"uvscpd\.py: /x: no\n.* Traceback .*"),
                (OSError("no"), 1, r"uvscpd\.py: no\n.* Traceback .*"),
                (KeyError("no"), 1,
                 r"a bug in uvscpd\.py, the daemon exits:\nTraceback .*KeyError: 'no'")):
            with self.subTest(repr(error)), mock.patch("signal.signal"), logged() as lines, \
                    mock.patch("uvscpd.serve", side_effect=error), \
                    mock.patch.object(uvscpd.log, "debugging", False):
                self.assertEqual(uvscpd.main(["-d"]), status)
                self.assertRegex("\n".join(lines), rf"(?s)\A[0-9:.]+ {text}\Z")

    def test_detached(self) -> None:
        without_files: dict[str, Any] = {"preexec_fn": lambda: os.closerange(0, 3)}
        for options in ({}, without_files):
            with self.subTest(options), self.detached(**options) as (port, pid), Peer(port) as peer:
                peer.greeted()
                self.assertNotEqual(os.getsid(pid), os.getsid(0))
                self.assertEqual(os.readlink(f"/proc/{pid}/cwd"), "/")
                self.assertEqual([os.readlink(f"/proc/{pid}/fd/{fd}") for fd in (0, 1, 2)],
                                 [os.devnull] * 3)
                os.kill(pid, signal.SIGTERM)
                peer.expect(STOPPING, "(closed)")

    def test_addresses(self) -> None:
        both = ["127.0.0.1", "::1"] if ipv6_works() else ["127.0.0.1"]
        for ip, hosts in [("", both)] + [(host, [host]) for host in both]:
            daemon = self.start(ip=ip)
            bits = "80-68" if "::1" in hosts else "80-28"       # capabilities: IPv6 or not
            for host in both:
                with self.subTest(ip=ip, host=host):
                    if host in hosts:
                        self.connect(daemon, host).say(
                            f"wcyd | 00-00-00-00-00-00-{bits} | +OK")
                    else:
                        self.assertRaises(ConnectionRefusedError, daemon.connect, host)

    def test_no_IPv6(self) -> None:
        for code, wanted in ((errno.EAFNOSUPPORT, [socket.AF_INET6, socket.AF_INET]),
                             (errno.EADDRNOTAVAIL, [socket.AF_INET6, socket.AF_INET]),
                             (errno.EMFILE, [socket.AF_INET6])):
            with self.subTest(errno.errorcode[code]), socket.socket() as ipv4, \
                    mock.patch("socket.socket", side_effect=[OSError(code, ""), ipv4]) as made:
                with contextlib.suppress(OSError):
                    self.assertEqual(uvscpd.listen(None, 0).getsockname()[0], "0.0.0.0")
                self.assertEqual([call[0][0] for call in made.call_args_list], wanted)

    def test_missing_interface_and_JOURNAL_STREAM(self) -> None:
        try:
            socket.socket(socket.AF_CAN, socket.SOCK_RAW, socket.CAN_RAW).close()
            reason = os.strerror(errno.ENODEV)
        except AttributeError:
            reason = os.strerror(errno.EAFNOSUPPORT)
        except OSError as error:
            reason = os.strerror(error.errno or 0)
        daemon = self.start("-c", "nosuchcan0", journal=True)
        with Peer(daemon.port).greeted("nosuchcan0", reason) as peer:
            peer.say("send 96,20,3,0,,0,- | -OK - ...", 'info | 4,#,0,"..." | +OK',
                     "stat | 0,0,0,0,0,0,0 | +OK")
        log = daemon.stop().splitlines()
        self.assertEqual([line for line in log if not re.match("<[46]>[^<]", line)], [])
        self.assertEqual([line for line in log if line.startswith("<4>")], [])
        waiting, = (line for line in log if line.startswith("<6>waiting: "))
        self.assertRegex(waiting, "adapter|driver|modprobe can_raw")

    def test_process_1_of_a_container_stays_in_the_foreground(self) -> None:
        daemon = self.start(program=changed_program(
            "uvscpd.os.getpid = lambda: 1; sys.argv.remove('-s')"))
        self.connect(daemon).say("noop")
        self.assertIn("running as process 1: staying in the foreground", daemon.stop())

    def test_JOURNAL_STREAM_of_another_file(self) -> None:
        log = self.start(JOURNAL_STREAM="8:1").stop()
        self.assertRegex(log, r"(?m)^uvscpd\.py .* listening on ")
        self.assertNotIn("<", log)

    def test_debug_shows_commands_and_events(self) -> None:
        daemon = self.start("-d", "-U", "hass", "-P", "x")
        a, b = self.connect(daemon), self.connect(daemon)
        talk("""
            A> hunter2 | -OK - invalid command
            A> user hass ; pass x ; send 96,20,4,0,,0,-,0,1 ; chid | 0 | +OK
            B> send 0,10,6,0,,0,::5 ; send 0,20,6,0,,0,::5 ; send 0,0,6,0,,0,::5
            A= 3
            A> quit | +OK - bye | (closed)
        """, a, b)
        a.__exit__()
        daemon.await_log("disconnected")
        log = daemon.stop()
        self.assertNotIn("hunter2", log)       # it may be a password
        for text in (f"{a.name} > user hass", f"{a.name} < {OK}", f"{a.name} (hass) > pass ***",
                     f"{a.name} (hass) > chid", f"{a.name} (hass) < 0",
                     "hass      * 0C140400  INFORMATION OFF (20.4)         host p3     00 01"
                     "        index 0, zone 1",
                     f":{b.name.split(':')[1]:<8} * 00140605  INFORMATION TERMINATING (20.6) "
                     "node 5 p0"):
            self.assertRegex(log, rf"(?m)^\d\d:\d\d:\d\d\.\d{{6}} {re.escape(text)}$")
        self.assertRegex(log, r"(?m)^.{15} " + re.escape(BUS) + r": 4 frames in \d+ s, \d+\.\d per "
                         r"second, at most [1-4]; 0 error frames\n        2 INFORMATION \(20\)\n"
                         r"(        1 (MEASUREMENT|PROTOCOL) \((0|10)\)\n){2}")
        self.assertRegex(log, rf"{re.escape(a.name)} \(hass\): disconnected after \d s: 3 events, "
                         "0 lost, 1 sent\n")
        self.assertRegex(log, "(?m) stopped after [0-9]+ s: 4 frames, 0 lost$")

    def test_debug_does_not_show_a_password(self) -> None:
        daemon = self.start("-d", "-U", "Admin", "-P", "secRet")
        peer = self.connect(daemon)
        for command in ("user Admin", "pass secRet", "+", "  PASS  secRet", "pass 1 secRet",
                        "\0pa\x07sx\x7fs secRet", PUTTY.decode("latin-1") + "pass secRet",
                        "!pass secRet", "x help  pass  secRet", "pass\tsecRet",
                        "pass secRetwrong", "passsecRet", "user x secRet", "+ secRet",
                        "help pass secRet", "chid"):
            peer.ask(command)
        log = daemon.stop()
        self.assertIn("> chid", log)
        self.assertNotIn("secRet", log)

    def test_too_few_descriptors_to_start(self) -> None:
        for most, word in ((32, "--max-clients 40"), *((most, "") for most in range(4, 10))):
            result = run(*changed_program(f"""
                import resource
                resource.setrlimit(resource.RLIMIT_NOFILE, ({most}, {most}))
            """), "-s", "-p", "0", "-c", BUS, "--max-clients", "40", "--pidfile", "/no/pid")
            with self.subTest(most=most):
                self.assertEqual((result.returncode, result.stdout), (2, ""))
                self.assertRegex(result.stderr, rf"\Auvscpd\.py: .*{word}.*\n\Z")

    def test_more_clients_than_the_soft_limit_of_descriptors(self) -> None:
        daemon = self.start("--max-clients", "40", prepare=lambda: resource.setrlimit(
            resource.RLIMIT_NOFILE, (32, 256)))
        peers = [self.connect(daemon) for _ in range(40)]
        with Peer(daemon.port) as peer:
            peer.expect("-OK - Max number of clients connected.", "(closed)")
        for peer in peers:
            peer.say("noop")

    def test_pidfile(self) -> None:
        with tempfile.TemporaryDirectory() as directory:
            file = pathlib.Path(directory, "pid")
            daemon = DaemonProcess("--pidfile", str(file))
            self.addCleanup(daemon.process.kill)
            pid = daemon.process.pid
            # -X dev warns of a socket that is left open.
            result = run("-X", "dev", PROGRAM, "-s", "-p", "0", "-c", BUS, "--pidfile", str(file))
            self.assertEqual((result.returncode, result.stdout), (1, ""))
            self.assertRegex(result.stderr,
                             rf"\Auvscpd\.py: .*{file}: process {pid} is running.*\n\Z")
            self.assertEqual(file.read_text(encoding="ascii"), f"{pid}\n")
            daemon.process.kill()               # it leaves its pid file, which must not matter
            daemon.process.wait()
            file.write_text(f"{os.getpid()}\nand more", encoding="ascii")
            again = self.start("--pidfile", str(file))
            self.assertEqual(file.read_text(encoding="ascii"), f"{again.process.pid}\n")
            file.write_text("1\n", encoding="ascii")   # now another daemon's: it must stay
            again.stop()
            self.assertEqual(file.read_text(encoding="ascii"), "1\n")


# =============================================================================
# The files
# =============================================================================
# What uvscpd.py may import, and whether README.md is right.

class PortabilityTest(OwnDaemonTestCase):
    # Modules that OpenWrt's python3-light lacks, and those that need one of these.
    MISSING = ("asyncio concurrent ctypes decimal email fractions http importlib.metadata logging "
               "multiprocessing pathlib ssl statistics unittest urllib uuid")
    LIGHT = f"""if True:
        import sys
        missing = set({MISSING!r}.split())
        assert not missing & set(sys.modules), missing & set(sys.modules)
        sys.modules.update(dict.fromkeys(missing))      # importing them fails now
        del sys.argv[0]
        with open(sys.argv[0], encoding="utf-8") as file:
            source = file.read()
        exec(compile(source, sys.argv[0], "exec"))
    """

    def test_isolated_and_without_site(self) -> None:
        for program in ([PROGRAM], ["-c", self.LIGHT, PROGRAM]):
            result = run("-I", "-S", *program, "--version")
            self.assertEqual((result.stdout, result.stderr, result.returncode),
                             (f"uvscpd.py {uvscpd.__version__}\n", "", 0))

    def test_Python_that_is_too_old(self) -> None:
        with open(PROGRAM, encoding="utf-8") as file:
            source = file.read()
        if sys.version_info >= (3, 8):
            ast.parse(source, feature_version=(3, 6))
        self.assertNotIn("from __future__ import annotations", source)
        result = run("-c", "import pathlib, sys; "
                     "program = pathlib.Path(sys.argv[1]).read_text('utf-8'); "
                     "sys.version_info = (3, 6); exec(program)", PROGRAM)
        self.assertEqual((result.stdout, result.stderr, result.returncode),
                         ("", "uvscpd.py: Python 3.7 or newer is needed\n", 1))

    def test_session_with_the_modules_of_python3_light(self) -> None:
        daemon = self.start("-d", "-U", "Admin", "-P", "secRet",
                            program=("-I", "-S", "-c", self.LIGHT, PROGRAM))
        a, b = self.connect(daemon), self.connect(daemon)
        a.say("user Admin ; pass secRet", "help send | ... | +OK", "sgid ::1",
            "stat | ... | +OK", "interface | ... | +OK")
        b.say("send 96,20,3,0,,0,-,1")
        a.await_events(1)
        a.say("rcvloop | +OK | 96,20,3,0,*,#,...")


class HouseTest(unittest.TestCase):
    """The rules of uvscpd.py's docstring and of its rooms, checked in its source."""

    tree: ClassVar[ast.Module]
    classes: ClassVar[list[ast.ClassDef]]

    @classmethod
    def setUpClass(cls) -> None:
        with open(PROGRAM, encoding="utf-8") as file:
            cls.tree = ast.parse(file.read())
        cls.classes = [node for node in cls.tree.body if isinstance(node, ast.ClassDef)]

    @staticmethod
    def written(node: ast.AST) -> set[str]:
        """The attributes and items that the code in a class writes: `self.x`, `other.x`."""
        names = set()
        for inner in ast.walk(node):
            if isinstance(inner, (ast.Attribute, ast.Subscript)) \
                    and isinstance(inner.ctx, (ast.Store, ast.Del)):
                while isinstance(inner, ast.Subscript):
                    inner = inner.value
                path = []
                while isinstance(inner, ast.Attribute):
                    path.append(inner.attr)
                    inner = inner.value
                root = inner.id if isinstance(inner, ast.Name) else "..."
                names.add(".".join([root, *reversed(path)]))
        return names

    def test_a_class_writes_only_its_own_attributes(self) -> None:
        for each in self.classes:
            with self.subTest(each.name):
                foreign = [name for name in self.written(each) if name.count(".")
                           and not re.fullmatch(r"self\.\w+", name)]
                self.assertEqual(foreign, [])
        sample = ast.parse("b.c = 1; self.d.e += 1; del b.f[0]; self.g = b.h")
        self.assertEqual(self.written(sample), {"b.c", "self.d.e", "b.f", "self.g"})

    def test_no_class_is_a_hall(self) -> None:
        counts = {each.name: sum(name.startswith("self.") for name in self.written(each))
                  for each in self.classes}
        self.assertLessEqual(counts.pop("Client"), 34)
        self.assertLessEqual(max(counts.values()), 26)

    def test_slots_are_the_attributes(self) -> None:
        for each in self.classes:
            slots = getattr(getattr(uvscpd, each.name), "__slots__", None)
            if slots is not None:
                written = {name[5:] for name in self.written(each) if name[:5] == "self."}
                self.assertEqual(set(slots) ^ written, set(), each.name)

    def test_the_first_class_comes_soon(self) -> None:
        imports = max(node.lineno for node in self.tree.body
                      if isinstance(node, (ast.Import, ast.ImportFrom)))
        self.assertLess(self.classes[0].lineno - imports, 90)


class ReadmeTest(OwnDaemonTestCase):
    """README.md is compared with the program, and its sessions are played.

    A session stands between two lines of three backquotes. A line `$ ... nc` connects;
    lines with `> `, and what its printf prints, are sent; all other lines must come,
    where `...` stands for any number of lines.
    """

    readme: ClassVar[str]

    @classmethod
    def setUpClass(cls) -> None:
        with open(os.path.join(HERE, "README.md"), encoding="utf-8") as file:
            cls.readme = file.read()

    # --- what README says of the program ---

    def rows(self, heading: str) -> list[tuple[list[str], str]]:
        """The rows of a table: the texts in backquotes in the first cell; the second cell."""
        _, table = self.readme.split(f"\n| {heading} |", 1)
        rows = [re.split(r"(?<!\\)\|", line) for line in table.split("\n\n")[0].splitlines()[2:]]
        return [(re.findall("`([^`]+)`", row[1]), row[2].strip()) for row in rows]

    def test_options(self) -> None:
        options = re.findall(r"(?m)^  (-.*?)(?:  |$)", run(PROGRAM, "--help").stdout)
        self.assertGreater(len(options), 10)
        self.assertEqual(sorted(text.split()[0] for texts, _ in self.rows("option")
                                for text in texts),
                         sorted(re.findall(r"(?<!\S)--?[a-zA-Z-]+", " ".join(options))))

    def test_commands(self) -> None:
        self.assertEqual([([text.split()[0] for text in texts], int(privilege))
                          for texts, privilege in self.rows("command")],
                         [(row.names, row.privilege) for row in ROWS])

    def test_messages(self) -> None:
        """The messages in "Troubleshooting" are texts of the program."""
        with open(PROGRAM, encoding="utf-8") as file:
            source = re.sub(r'"\n\s*f?"', "", file.read())      # adjacent ones are one text
        texts = {re.sub(r"^(uvscpd\.py|\{[\w.]+\}): ", "", text)
                 for text in re.findall(r'"([^"\n]{7,})"', source)}
        patterns = [".+".join(map(re.escape, re.split(r"\{[^{}]*\}", text))) for text in texts]
        for message in (text for texts, _ in self.rows("message") for text in texts):
            self.assertTrue(any(re.fullmatch(each, message) for each in patterns
                                if re.search("[a-z]{3}", each)), message)

    def test_event_line(self) -> None:
        line, bits = re.findall(r"\n    (96,20,3,.*)\n(?s:.*?)`cansend can0 (\w+#\w+)`",
                                self.readme)[0]
        can_id, data, _ = uvscpd.parse_event(line)
        self.assertEqual(f"{can_id:08X}#{data.hex()}", bits)
        date, timestamp = line.split(",")[4:6]
        seconds = timegm(time.strptime(date, "%Y-%m-%dT%H:%M:%SZ"))
        microseconds = (int(timestamp) - seconds * 1000000) % (1 << 32)
        self.assertLess(microseconds, 1000000)
        frame = can_id, data, seconds, microseconds * 1000, None
        self.assertEqual(uvscpd.EventLines(FIFTEEN).of([frame])[0],
                         [line + "\r\n"])

    def test_users(self) -> None:
        text, = re.findall("```\n(# name .*?)```", self.readme, re.S)
        with tempfile.NamedTemporaryFile("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            users, _ = uvscpd.read_users(file.name)
        self.assertEqual([(name, user.privilege) for name, user in users.items()],
                         [("panel", 4), ("watcher", 2), ("hass", 15)])
        name, password = re.findall(r"`printf %s (\w+):(\w+) \| sha256sum`", self.readme)[0]
        self.assertTrue(uvscpd.Logins(users, 0).check(name, password, "192.168.1.8", 0.0))

    # --- sessions ---

    def sessions(self, heading: str) -> list[list[str]]:
        """The lines of each session in a section; `$` starts one."""
        section = self.readme.split(f"\n## {heading}\n")[1].split("\n## ")[0]
        return [session.splitlines() for block in re.findall("```\n(.*?)```", section, re.S)
                for session in re.split(r"(?m)^\$ ", block)[1:]]

    def normal(self, line: str) -> str:
        """The line with `?` for what differs from run to run: times, ports, the bus's name."""
        line = re.sub(r"^\d\d:\d\d:\d\d\.\d{6} (\S+ +(?=\* ))?", "", line)
        return re.sub(r"\d{4}-\d\d-\d\dT[\d:]+Z,\d+|127\.0\.0\.1:\d+|port \d+|\b\d+ s\b|[\d.]+ per "
                      rf"second|at most \d+|can0|:virtual:|{re.escape(BUS)}", "?", line)

    def hear(self, read_line: Callable[[], str], shown: list[str]) -> None:
        """Read lines, which must be those in README; signs of life may come in between."""
        skipping, deadline = False, time.monotonic() + SHORT_TIMEOUT
        for line in map(self.normal, shown):
            heard = line if line == "..." else self.normal(read_line())
            while (heard != line and (skipping or heard == SIGN_OF_LIFE) and heard[0] != "("
                   and time.monotonic() < deadline):
                heard = self.normal(read_line())
            self.assertEqual(heard, line)
            skipping = line == "..."

    def play_sessions(self, daemon: DaemonProcess, sessions: list[list[str]]) -> None:
        """Play sessions. What comes after the last typed line is read when all have been played."""
        last = []
        for command, *lines in sessions:
            peer = Peer(daemon.port)
            self.addCleanup(peer.__exit__)
            piped = re.findall(r"printf '(.*)\\n'", command)
            if piped:
                lines = [f"> {text}" for text in piped[0].split(r"\n")] + lines
                lines.insert(-1, "> quit")
            shown: list[str] = []
            for line in lines:
                if line.startswith("> "):
                    self.hear(peer.read_line, shown)
                    peer.send(line[2:])
                    shown = ["..."] if shown[-1:] == ["..."] else []
                else:
                    shown.append(line)
            if piped:
                self.hear(peer.read_line, shown)
                port = peer.sock.getsockname()[1]
                peer.__exit__()
                daemon.await_log(f":{port}: disconnected")
            else:
                last.append((peer, shown))
        for peer, shown in last:
            self.hear(peer.read_line, shown)

    def test_quick_start(self) -> None:
        self.play_sessions(self.start(), self.sessions("Quick start"))

    def test_bench(self) -> None:
        daemon = self.start("-d", ip="")
        node = SimulatedNode(daemon.port, 5)
        *sessions, (_, *screen) = self.sessions("At the bench")
        self.play_sessions(daemon, sessions)
        node.send(6, bytes.fromhex("8A8100D7"), vscp_class=10)
        node.send(3, bytes([0, 1, 35]), vscp_class=20)
        daemon.await_log("INFORMATION ON")
        address = ":".join(map(str, node.peer.sock.getsockname()))
        node.close()
        log = daemon.stop(signal.SIGINT).splitlines()
        rest = iter(line for line in log if address not in line)
        self.hear(lambda: next(rest, "(nothing)"), screen)


# =============================================================================
# A real kernel
# =============================================================================
# What the kernel and the bus do to the daemon, on interfaces that the tests make, as
# root. For a slow, dead or broken bus, the test plays a CAN adapter on a serial line
# (slcan): it has the master side of a pseudo-terminal, the kernel's driver the other.

SIOCGIFNAME, SIOCSIFFLAGS, N_SLCAN = 0x8910, 0x8914, 17
FLOOD = 9000                    # frames, more than the kernel holds for the daemon


def shell(command: str) -> None:
    subprocess.run(command, shell=True, check=True, timeout=TIMEOUT)


def set_up(name: str, up: bool) -> None:
    """What `ip link set NAME up` and `down` do, at once."""
    with socket.socket() as sock:
        fcntl.ioctl(sock, SIOCSIFFLAGS, struct.pack("16sH22x", name.encode(), up))


class Node:
    """Another program on the interface."""

    def __init__(self, name: str, listening: bool = False) -> None:
        self.sock = socket.socket(socket.AF_CAN, socket.SOCK_RAW, socket.CAN_RAW)
        self.sock.settimeout(TIMEOUT)
        self.sock.setsockopt(socket.SOL_CAN_RAW, socket.CAN_RAW_FD_FRAMES, 1)
        self.sock.setsockopt(socket.SOL_SOCKET, uvscpd.SO_RCVBUFFORCE, uvscpd.RECEIVE_BUFFER)
        if not listening:
            self.sock.setsockopt(socket.SOL_CAN_RAW, socket.CAN_RAW_FILTER, b"")
        self.sock.bind((name,))

    def send(self, vscp_type: int, *data: int) -> None:
        """Send an event of class 20."""
        self.send_frame(uvscpd.EFF_FLAG | 0x0C140000 | vscp_type << 8, bytes(data))

    def send_frame(self, can_id: int, data: bytes) -> None:
        """Send a frame of any kind; the id with its flags. A full queue is waited for."""
        frame = uvscpd.FRAME.pack(can_id, len(data), data)
        while True:
            try:
                self.sock.send(frame)
                return
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                time.sleep(0.001)

    def send_error(self, code: int, controller: int = 0) -> None:
        self.send_frame(uvscpd.ERR_FLAG | code, bytes((0, controller, 0, 0, 0, 0, 0, 0)))

    def receive(self, count: int) -> list[tuple[int, ...]]:
        """Type and data of so many frames."""
        frames = [uvscpd.FRAME.unpack(self.sock.recv(72)) for _ in range(count)]
        return [(can_id >> 8 & 0xFF, *data[:length]) for can_id, length, data in frames]


@needs_root
class KernelTestCase(unittest.TestCase):
    """Each test has an interface, made for it, and a daemon on that."""

    ARGUMENTS: ClassVar[tuple[str, ...]] = ()
    name = "vcan7"

    def setUp(self) -> None:
        self.plug_in()
        self.addCleanup(self.unplug)
        self.start()

    def plug_in(self) -> None:
        shell(f"ip link add dev {self.name} up type vcan")

    def unplug(self) -> None:
        shell(f"ip link del {self.name}")

    def go_up(self) -> None:
        set_up(self.name, True)

    def go_down(self) -> None:
        set_up(self.name, False)

    CHANGES = "uvscpd.START_S = 0"          # what is missing is a trouble from the start

    def start(self, more_changes: str = "") -> None:
        self.daemon = DaemonProcess("-c", self.name, *self.ARGUMENTS, journal=True,
                                    program=changed_program(f"{self.CHANGES}\n{more_changes}"))
        self.addCleanup(self.daemon.stop)

    def connect(self, trouble: str = "") -> Peer:
        """A client that has been greeted; closed when the test ends."""
        peer = Peer(self.daemon.port)
        self.addCleanup(peer.__exit__)
        return peer.greeted(self.name, trouble)

    def node(self, name: str = "", listening: bool = False) -> Node:
        node = Node(name or self.name, listening)
        self.addCleanup(node.sock.close)
        return node

    def retrieve(self, peer: Peer) -> list[tuple[int, ...]]:
        """Type and data of all events that are buffered for a client."""
        *lines, final = peer.ask("retr 100000")
        self.assertEqual(final, "-OK - No event(s) available")
        return [type_and_data(line) for line in lines]

    def stat(self, peer: Peer) -> list[int]:
        return [int(number) for number in peer.ask("stat")[0].split(",")]

    def await_state(self, peer: Peer, text: str, status: str = "[0-4]") -> None:
        """Wait until INFO has this text and status."""
        wanted = f'{status},.*,"{pattern(text)}"'
        until(lambda: re.fullmatch(wanted, peer.ask("info")[0]), lambda: peer.heard[-2],
              SHORT_TIMEOUT)

    def assert_senders_known(self, *peers: Peer) -> None:
        """Everybody sends the same event: each client gets all of them but its own."""
        node = self.node()
        for peer in peers:
            peer.say("clra | +OK - All events cleared.")
        for sender in [*peers, None] * 3:
            if sender:
                sender.say(send_line(7))
            else:
                node.send(7)
            self.assertEqual([self.retrieve(peer) for peer in peers],
                             [[] if peer is sender else [(7,)] for peer in peers])

    def await_log_lines(self, wanted: list[str]) -> None:
        """Wait until the log has just these lines, besides those of start, end and clients."""
        def log() -> list[str]:
            return [line for line in self.daemon.log.splitlines()
                    if not re.search("connected|listening|stopped|: up, ", line)]

        until(lambda: log() == wanted, log, SHORT_TIMEOUT)


class FramesTest(KernelTestCase):
    def test_frames_of_every_kind(self) -> None:
        a, node = self.connect(), self.node()
        ids = (("0,0,0,0,*,#,::0", 0), ("96,20,3,0,*,#,::5", 0x0C140305),
               ("240,511,255,0,*,#,::FF", 0x1FFFFFFF))
        data = bytes(range(248, 256))
        with self.daemon.paused():          # so the time can only be the kernel's
            before = time.time_ns() // 1000
            for length in range(9):
                for _, can_id in ids:
                    extended = can_id | uvscpd.EFF_FLAG
                    node.send_frame(can_id & 0x7FF, data[:length])
                    node.send_frame(extended | uvscpd.RTR_FLAG, data[:length])
                    node.send_error(0x008)                              # a protocol error
                    node.sock.send(struct.pack("=IB3x64s", extended, length, data))     # CAN FD
                    node.send_frame(extended, data[:length])
            after = time.time_ns() // 1000
        a.send("retr 100")
        for length in range(9):
            for start, _ in ids:
                a.expect(",".join([start, *map(str, data[:length])]))
                fields = a.heard[-1].split(",")
                time_us = before + (int(fields[5]) - before & 0xFFFFFFFF)
                self.assertTrue(before <= time_us <= after, fields)
                self.assertEqual(fields[4], uvscpd.utc_text(time_us // 1000000) + "Z")
                before = time_us
        a.expect("-OK - No event(s) available")
        a.say('info | 0,0,0,"OK" | +OK')

    def test_SEND(self) -> None:
        a, node = self.connect(), self.node(listening=True)
        for text, frame, _ in EVENTS:
            a.say("send " + text)
            can_id, data = frame.split("#")
            self.assertEqual(node.sock.recv(72),
                             uvscpd.pack_frame(int(can_id, 16), bytes.fromhex(data)))

    def test_one_order_for_everybody(self) -> None:
        # From two processors at once, Linux may hand two frames to two sockets in different orders.
        processors = os.sched_getaffinity(0)
        for pid in (0, self.daemon.process.pid):
            os.sched_setaffinity(pid, {min(processors)})
            self.addCleanup(os.sched_setaffinity, pid, processors)
        peers = [self.connect() for _ in range(4)]
        listener, other = self.node(listening=True), self.node()
        for number, peer in enumerate(peers):
            peer.send(*(send_line(number, count) for count in range(100)))
        for count in range(100):
            other.send(4, count)
        for peer in peers:
            peer.expect(*["+OK"] * 100)
        order = listener.receive(500)
        self.assertEqual(sorted(order), [divmod(number, 100) for number in range(500)])
        for number, peer in enumerate(peers):
            self.assertEqual(self.retrieve(peer), [each for each in order if each[0] != number])

    def test_unwanted_frames_stay_in_the_kernel(self) -> None:
        def passed() -> list[int]:
            """How many frames each of the kernel's filters on the interface has let through."""
            rows = []
            for kind in ("all", "fil", "inv", "eff", "sff"):
                with open(f"/proc/net/can/rcvlist_{kind}", encoding="ascii") as file:
                    rows += [line.split() for line in file]
            return [int(row[5]) for row in rows if row[:1] == [self.name]]

        a, node = self.connect(), self.node()
        a.say("sflt 0,20,3,::0", "smsk 0,0x1FF,0xFF,::0")
        for number in range(100):
            node.send(number % 5)
        self.assertEqual((passed(), self.retrieve(a)), ([20], [(3,)] * 20))
        b = self.connect()                  # has no filter
        node.send(4)
        node.send(3)
        self.assertEqual((self.retrieve(a), self.retrieve(b)), ([(3,)], [(4,), (3,)]))
        for peer in (a, b):
            peer.say("quit | +OK - bye | (closed)")
        self.assertEqual(passed(), [])

    def test_commands_take_in_what_the_kernel_holds(self) -> None:
        a, node = self.connect(), self.node()
        for command, *replies in (
                ("cdta", "3 ", "+OK"), ("clra", "+OK ..."), ("cdta", "3 ", "+OK"),
                ("retr 6", *(event_line(1, number) for number in (0, 1, 2) * 2), "+OK"),
                ("sflt 0,0,9,::0", "+OK"), ("smsk 0,0,0xFF,::0", "+OK")):
            with self.daemon.paused():
                for number in range(3):
                    node.send(1, number)
                a.send(command)
            a.expect(*replies)
        node.send(1, 4)                     # the filter acts on what comes from now on
        node.send(9)
        self.assertEqual(self.retrieve(a), [(1, 0), (1, 1), (1, 2)] * 2 + [(9,)])

    def test_full_bus_and_five_clients(self) -> None:
        peers = [self.connect() for _ in range(5)]
        for peer in peers:
            peer.say("rcvloop")
        node, start = self.node(), time.monotonic()
        for number in range(2000):          # 1,000 frames/s of 8 bytes are 125 kbit/s
            time.sleep(max(0.0, start + number / 1000 - time.monotonic()))
            node.send(*divmod(number, 256), 2, 3, 4, 5, 6, 7, 8)
        streams = [next_events(peer, 2000) for peer in peers]
        self.assertEqual([type_and_data(line)[:2] for line in streams[0]],
                         [divmod(number, 256) for number in range(2000)])
        self.assertEqual(streams, [streams[0]] * 5)


class SendersTest(KernelTestCase):
    """Who sent an event, when others send the same."""

    def test_everything_comes_back(self) -> None:
        peers, node = [self.connect() for _ in range(3)], self.node()
        self.assert_senders_known(*peers)
        for code in (uvscpd.ERR_BUSOFF, uvscpd.ERR_RESTARTED) * 10:
            for peer in peers:
                peer.send(send_line(7), send_line(7), send_line(8))
            node.send(7)
            node.send_error(code)           # frames under way may be lost now
        for peer in peers:
            peer.expect(*["+OK"] * 60)
        for peer in peers:
            self.assertEqual(sorted(self.retrieve(peer)), [(7,)] * 100 + [(8,)] * 40)
        self.assert_senders_known(*peers)

    def test_confirmations_lost_in_a_full_receive_buffer(self) -> None:
        bus, node = uvscpd.Bus(self.name, lambda _sock: None), self.node()
        self.addCleanup(bus.end)
        bus.set_filters([(0, 0)], True)

        def read() -> list[Any]:
            frames, empty = bus.read(uvscpd.FRAMES_IN_KERNEL)
            self.assertTrue(empty)
            return [frame[4] for frame in frames]

        for _ in range(FLOOD):
            node.send(9)
        for name in "AB" * 40:
            bus.send(7, b"", SENDERS[name])
        self.assertEqual(set(read()), {None}, "nothing was lost")
        for name in "BBAC":
            bus.send(7, b"", SENDERS[name])
            self.assertEqual(read(), [SENDERS[name]])

    def test_interface_goes_down_or_away_during_SENDs(self) -> None:
        a, b, c = (self.connect() for _ in range(3))
        for go, come in ((self.go_down, self.go_up), (self.unplug, self.plug_in)):
            a.send(*[send_line(7)] * 400)
            a.expect(*["+OK"] * 50)
            go()
            sent = 50 + [a.read_line() for _ in range(350)].count(OK)
            come()
            self.await_state(a, "OK")
            counts = [len(self.retrieve(peer)) for peer in (a, b, c)]
            self.assertEqual(counts, [0, counts[1], counts[1]])
            # While an interface goes down, Linux drops some frames and reports no error.
            self.assertTrue(50 <= counts[1] <= sent, (counts, sent))
            self.assert_senders_known(b, a, c)


class InterfaceTest(KernelTestCase):
    MISSING = ("interface vcan7: No such device, "
               "try: ip link add dev vcan7 type vcan && ip link set vcan7 up")
    DOWN = "interface vcan7 is down, try: ip link set vcan7 up"

    def setUp(self) -> None:
        self.start()                        # without an interface
        self.addCleanup(self.unplug)

    def test_missing_down_deleted(self) -> None:
        a, b = (self.connect("No such device") for _ in range(2))
        a.say("rcvloop")
        log = []
        for go, come, code, reason in (
                (None, self.plug_in, errno.ENODEV, self.MISSING),
                (self.go_down, self.go_up, errno.ENETDOWN, self.DOWN),
                (self.unplug, self.plug_in, errno.ENODEV, self.MISSING)):
            if go:
                go()
            for peer in (a, b):
                peer.say(f"{send_line(1)} | -OK - {reason}")
            trouble = reason.partition(", try")[0]
            b.say(f'info | 4,{code},0,"{trouble}" | +OK')
            self.connect(os.strerror(code))
            with idle(self.daemon):         # while a client in the receive loop hears nothing
                self.assertEqual([a.read_line(), a.read_line()], [SIGN_OF_LIFE] * 2)
            come()
            self.await_state(b, "OK")
            self.node().send(1, 2)
            b.say(send_line(3))
            a.expect(event_line(1, 2), event_line(3))
            a.say(send_line(4))
            self.assertEqual(self.retrieve(b), [(1, 2), (4,)])
            log += [f"<4>{reason}", f"<6>vcan7: the bus is back, was: {trouble}"]
            self.await_log_lines(log)


class NoRtnetlinkTest(InterfaceTest):
    """The same where rtnetlink is not allowed."""

    CHANGES = InterfaceTest.CHANGES + """
        class Socket(uvscpd.socket.socket):
            def __init__(self, family=-1, *rest, **more):
                if family == uvscpd.socket.AF_NETLINK:
                    raise PermissionError(1, "not allowed")
                super().__init__(family, *rest, **more)
        uvscpd.socket.socket = Socket
    """


class NoQuestionsTest(InterfaceTest):
    """The same where rtnetlink is allowed, but no question on it."""

    CHANGES = InterfaceTest.CHANGES + """
        class Socket(uvscpd.socket.socket):
            def send(self, data):
                if self.family == uvscpd.socket.AF_NETLINK:
                    raise PermissionError(13, "not allowed")
                return super().send(data)
        uvscpd.socket.socket = Socket
    """


class NamesTest(KernelTestCase):
    """The interface is meant by an alternative name."""

    name = "vscpbus"

    def plug_in(self) -> None:
        shell("ip link add dev vcan7 up type vcan")
        shell("ip link property add dev vcan7 altname vscpbus")

    def unplug(self) -> None:
        shell("ip link del vcan7")

    def test_alternative_name(self) -> None:
        a, b = self.connect(), self.connect()
        a.say(send_line(1))
        self.node("vcan7").send(2)
        b.await_events(2)
        set_up("vcan7", False)
        self.await_state(a, "interface vscpbus is down")
        set_up("vcan7", True)
        self.await_state(a, "OK")
        shell("ip link property del dev vcan7 altname vscpbus")
        self.await_state(a, "interface vscpbus: No such device")
        shell("ip link property add dev vcan7 altname vscpbus")
        self.await_state(a, "OK")
        a.say(send_line(3))
        b.await_events(3)

    def test_renamed_and_swapped(self) -> None:
        a = self.connect()
        shell("ip link property del dev vcan7 altname vscpbus")
        self.await_state(a, "interface vscpbus: No such device")
        shell("ip link add dev vcan8 type vcan && ip link set vcan8 name vscpbus")
        self.addCleanup(shell, "ip link del vscpbus")
        self.await_state(a, "interface vscpbus is down")
        set_up("vscpbus", True)
        self.await_state(a, "OK")
        node = self.node("vscpbus", listening=True)
        a.say(send_line(4))
        self.assertEqual(node.receive(1), [(4,)])


class QueueTest(KernelTestCase):
    def test_queue_that_drops_silently(self) -> None:
        shell("tc qdisc add dev vcan7 root netem")
        a = self.connect()
        self.go_down()
        self.await_state(a, "interface vcan7 is down")
        self.go_up()
        self.await_state(a, "OK")
        self.daemon.await_log("vcan7: the queue netem may drop frames silently, "
                              "try: tc qdisc replace dev vcan7 root pfifo_fast")


class BusStateTest(KernelTestCase):
    def test_states_of_the_controller(self) -> None:
        a, node = self.connect(), self.node()
        before, log = "OK", []
        for error_class, controller, info, counts in BusTest.ERROR_FRAMES:
            node.send_error(error_class, controller)
            a.say(f"info | {info} | +OK", f"stat | {counts},... | +OK")
            text = info.split('"')[1]
            advice = ("ip link set vcan7 down && ip link set vcan7 up" if text == "bus off"
                      else "wiring, bit rate, other nodes")
            if text != before:
                log.append(f"<6>vcan7: the bus is back, was: {before}" if text == "OK"
                           else f"<4>vcan7: {text}, try: {advice}")
            before = text
            self.await_log_lines(log)

    def test_nobody_acknowledges_ends_with_a_frame(self) -> None:
        a, node = self.connect(), self.node()
        for sender in (node, a):
            node.send_error(uvscpd.ERR_ACK)
            self.await_state(a, "nobody acknowledges")
            if sender is a:
                a.say(send_line(1))
            else:
                node.send(1)
            self.await_state(a, "OK")

    def test_error_frame_and_interface_down_and_up(self) -> None:
        a, node = self.connect(), self.node()
        with self.daemon.paused():
            node.send_error(uvscpd.ERR_BUSOFF)
            self.go_down()
            self.go_up()
        for _ in range(2):
            a.ask("cdta")                   # makes the daemon read what the kernel holds
            self.await_state(a, "OK")
            a.say(send_line(1))

    def test_interface_deleted_and_added_at_once(self) -> None:
        a = self.connect()
        with self.daemon.paused():
            self.unplug()
            self.plug_in()
        self.await_state(a, "OK")
        a.say(send_line(1))
        self.await_log_lines([f"<4>{InterfaceTest.MISSING}",
                        "<6>vcan7: the bus is back, was: interface vcan7: No such device"])

    def test_many_error_frames(self) -> None:
        a, node, begin = self.connect(), self.node(), time.monotonic()
        for number in range(500):
            node.send_error(uvscpd.ERR_ACK)
            node.send(*divmod(number, 256))
        self.assertEqual(self.retrieve(a), [divmod(number, 256) for number in range(500)])
        late = self.connect().sock.getsockname()[1]
        log = self.daemon.await_log(f":{late}: connected")
        most = 4 + 4 * (time.monotonic() - begin)       # a line per change, two per 0.5 s at most
        self.assertLess(len(re.findall("nobody acknowledges", log)), most)
        self.await_state(a, "OK")


class BurstTest(KernelTestCase):
    """More frames than the kernel holds come while the daemon is paused."""

    ARGUMENTS = ("--buffer", "100")

    def test_frames_that_the_kernel_drops(self) -> None:
        a, b, c, node = self.connect(), self.connect(), self.connect(), self.node()
        c.say("rcvloop")
        with self.daemon.paused():
            for number in range(FLOOD):
                node.send(number >> 8, number & 0xFF)
            late = Peer(self.daemon.port)
            self.addCleanup(late.__exit__)
            a.send("cdta", "stat")
            b.send("stat", "cdta")
        for peer, buffered, stat in ((a, -4, -2), (b, -2, -4)):     # all are counted at once
            peer.expect("...", "+OK", "...", "+OK")
            self.assertEqual((peer.heard[buffered], int(peer.heard[stat].split(",")[2])),
                             ("100 ", FLOOD - 100))
        late.greeted(self.name)
        for peer in (late, self.connect()):
            self.assertEqual((peer.ask("cdta")[0], self.stat(peer)[2:5]), ("0 ", [0, 0, 0]))
        node.send(255)
        events = {a: self.retrieve(a), c: []}
        while events[c][-1:] != [(255,)]:
            events[c] += map(type_and_data, next_events(c, 1))
        c.say("quitloop")                   # no sign of life between STAT's lines
        for peer, got in events.items():
            self.assertEqual(len(got) + self.stat(peer)[2], FLOOD + 1)
            self.assertEqual(got, sorted(got))
        self.assertEqual(len(events[a]), 100)
        self.assertLess(self.stat(a)[4], FLOOD, "the kernel dropped nothing")

    def test_error_frames_that_the_kernel_drops(self) -> None:
        node = self.node()
        with self.daemon.paused():          # while nobody is connected, only error frames come
            for _ in range(FLOOD):
                node.send_error(0x004, 0x08)
        late = self.connect()
        self.assertEqual(self.stat(late)[1:5], [1, 0, 0, 0])
        with self.daemon.paused():
            for _ in range(FLOOD):
                node.send(1)
        overruns, _, frames = self.stat(late)[2:5]
        self.assertEqual(overruns, FLOOD - 100)
        self.assertLess(frames, FLOOD, "the kernel dropped nothing")
        self.assertRegex(self.daemon.stop(), rf": {frames} frames, {overruns} lost\n\Z")

    def test_CLRA(self) -> None:
        a, node = self.connect(), self.node()
        for errors in (0, 1):
            with self.daemon.paused():
                for _ in range(2500):
                    node.send(1)
                    for _ in range(errors):
                        node.send_error(0x004, 0x08)
                a.send("clra", "cdta")
            with self.subTest(errors=errors):
                a.expect("+OK - ...", "0 ", "+OK")
                self.assertEqual(self.retrieve(a), [])


class SerialLineTest(KernelTestCase):
    """On a CAN adapter on a serial line: a frame is sent when the test takes it."""

    def plug_in(self) -> None:
        self.adapter, self.line = os.openpty()
        tty.setraw(self.line)
        fcntl.ioctl(self.line, termios.TIOCSETD, struct.pack("i", N_SLCAN))
        self.name = fcntl.ioctl(self.line, SIOCGIFNAME, bytes(16)).rstrip(b"\0").decode()
        self.text = ""
        self.go_up()

    def unplug(self) -> None:
        os.close(self.adapter)
        os.close(self.line)

    def put(self, *lines: str) -> None:
        os.write(self.adapter, "".join(line + "\r" for line in lines).encode())

    def take(self, count: int) -> list[tuple[int, ...]]:
        """Type and data of the next so many frames: T0C140300523 is (3, 2, 3)."""
        while self.text.count("\r") < count:
            if not select.select([self.adapter], [], [], TIMEOUT)[0]:
                raise AssertionError(f"not {count} frames, but {self.text!r}")
            self.text += os.read(self.adapter, 64).decode()
        *frames, self.text = self.text.split("\r", count)
        assert all(re.fullmatch("T0C14..00[0-8](..)*", frame) for frame in frames), frames
        return [(int(frame[5:7], 16), *bytes.fromhex(frame[10:])) for frame in frames]

    def test_slow_bus(self) -> None:
        a, b = self.connect(), self.connect()
        events = [divmod(number, 256) for number in range(300)]
        a.send(*(send_line(*each) for each in events))
        frames = self.take(100)
        b.say("noop")                                       # while A waits for room
        for _ in range(200):
            time.sleep(1 / 400)                             # the bus takes no more than this
            frames += self.take(1)
        self.assertEqual(frames, events)
        a.expect(*["+OK"] * 300)
        self.assertEqual(self.retrieve(b), events)

    def test_twelve_senders_take_turns(self) -> None:
        self.start("uvscpd.SEND_WAIT_S = 60")               # none is refused on a slow machine
        peers = [self.connect() for _ in range(12)]
        with self.daemon.paused():
            for number, peer in enumerate(peers):
                peer.send(*(send_line(number, count) for count in range(60)))
        order: list[int] = []
        while len(order) < 12 * 60:
            time.sleep(1 / 62)                              # the bus takes no more than this
            order.append(self.take(1)[0][0])
        for number, peer in enumerate(peers):
            peer.expect(*["+OK"] * 60)
            places = [place for place, sender in enumerate(order) if sender == number]
            waits = [later - place for place, later in zip(places, places[1:])]
            self.assertEqual(len(places), 60)
            self.assertLessEqual(max(waits), 2 * 12)        # when all wait, each has the 12th turn

    def test_dead_bus(self) -> None:
        a, b, c = (self.connect() for _ in range(3))
        refusal = f"-OK - {self.name} takes no more frames: ..."
        start = time.monotonic()
        a.send(*(send_line(1, number) for number in range(14)))
        sent = 0
        while a.read_line() == OK:
            sent += 1
        self.assertGreaterEqual(sent, 5)                    # what waits for the adapter
        with idle(self.daemon):
            b.send(send_line(2), "noop")
            b.expect(refusal, "+OK")
            a.expect(*[refusal] * (13 - sent))
        self.assertGreaterEqual(time.monotonic() - start, uvscpd.SEND_WAIT_S * (14 - sent))
        a.send(send_line(3))
        frames = [*((1, number) for number in range(sent)), (3,)]
        self.assertEqual(self.take(sent + 1), frames)
        a.expect("+OK")
        a.say(send_line(4))
        self.assertEqual(self.take(1), [(4,)])      # and none that was refused
        self.assertEqual(self.retrieve(c), [*frames, (4,)])

    def test_bus_off(self) -> None:
        a, b = self.connect(), self.connect()
        self.put("sb256256")
        self.await_state(a, "bus off")
        a.say(f"{send_line(1)} | -OK - bus off, try: ...")
        advice = a.heard[-1].partition(", try: ")[2]
        # The controller has recovered, but until the interface has been down, Linux drops frames
        # instead of giving them to it.
        self.put("sa000000", "T0C1402053000123")
        b.await_events(1)
        a.say(f"{send_line(1)} | -OK - ...")
        shell(advice)
        self.await_state(a, "OK")
        a.say(send_line(3))
        self.assertEqual(self.take(1), [(3,)])
        b.say(f"retr 2 | 96,20,2,0,*,#,::5,0,1,35 | {event_line(3)} | +OK")


@needs_ci_kernel
class UnderWayTest(KernelTestCase):
    """On a bus that needs time, as a real one: a frame comes back once it has been sent."""

    marks = 0

    @classmethod
    def setUpClass(cls) -> None:
        cls.load_vcan("echo=1")             # own frames come back from the bus, not at once

    @classmethod
    def tearDownClass(cls) -> None:
        cls.load_vcan("echo=0")

    @staticmethod
    def load_vcan(option: str) -> None:
        """Load the module anew, which takes all its interfaces away."""
        shell("chroot /proc/1/root modprobe -r vcan || true")
        shell(f"chroot /proc/1/root modprobe vcan {option}")
        shell(f"ip link add dev {CAN} up type vcan")

    def netem(self, manner: str) -> None:
        """Set delay or loss of the bus, see tc-netem(8)."""
        shell(f"tc qdisc replace dev {self.name} root netem {manner}")

    def arrived(self, *peers: Peer) -> list[list[tuple[int, ...]]]:
        """Type and data of all events for each client, those under way, too."""
        self.marks += 1
        mark = (255, self.marks)
        self.node().send(*mark)             # comes after all that is under way
        arrived, deadline = [], time.monotonic() + TIMEOUT
        for peer in peers:
            events = self.retrieve(peer)
            while mark not in events:
                self.assertLess(time.monotonic(), deadline)
                events += self.retrieve(peer)
            arrived.append([each for each in events if each[0] != 255])
        return arrived

    def await_sent(self, peer: Peer, command: str) -> None:
        """Give this command until it is done."""
        until(lambda: peer.ask(command) == [OK], lambda: peer.heard[-1], SHORT_TIMEOUT)

    def test_sender_leaves(self) -> None:
        self.netem("delay 100ms")
        first, end = self.connect(), "quit | +OK - bye | (closed)"
        events = [(7, number) for number in range(10)]
        for manner in (["{} ; " + end], ["{}", end], ["{}"]):       # the last one just closes
            got = []
            for each in events:
                with self.connect() as sender:
                    sender.say(*(line.format(send_line(*each)) for line in manner))
                got += self.arrived(first)[0]
            with self.subTest(manner):
                self.assertEqual(got, events)
            other = self.connect()          # and the same from somebody who stays
            for each in events:
                other.say(send_line(*each))
            with self.subTest(manner, then="another one"):
                self.assertEqual(self.arrived(first, other), [events, []])
            other.__exit__()

    def test_interface_flaps_twice(self) -> None:
        self.netem("delay 100ms")
        a, b, c = (self.connect() for _ in range(3))
        for _ in range(6):
            for peer, vscp_type in ((a, 7), (b, 8)):
                self.await_sent(peer, send_line(vscp_type))
            self.go_down()
            self.go_up()
            for peer, vscp_type in ((a, 7), (b, 8)):
                peer.ask(send_line(vscp_type))
            self.go_down()
            self.go_up()
            self.await_state(a, "OK")
            for peer in (a, b, c):
                peer.say("clra | +OK - All events cleared.")
            # A daemon that still waited for the lost frames would take these for them.
            for peer, vscp_type in ((b, 7), (a, 8)):
                self.await_sent(peer, send_line(vscp_type))
            self.assertEqual(self.arrived(a, b, c), [[(7,)], [(8,)], [(7,), (8,)]])

    def test_clock_is_set(self) -> None:
        self.netem("delay 300ms")
        a, b, c = (self.connect() for _ in range(3))
        ahead_s = time.time() - time.monotonic()
        self.addCleanup(lambda: time.clock_settime(time.CLOCK_REALTIME,
                                                   time.monotonic() + ahead_s))
        for step_s in (-2, 60):
            for number in range(10):
                a.say(send_line(1, number))
                b.say(send_line(2, number))
            time.clock_settime(time.CLOCK_REALTIME, time.time() + step_s)
            ones, twos, both = self.arrived(b, a, c)
            with self.subTest(step_s):
                self.assertEqual((ones, twos), ([(1, number) for number in range(10)],
                                                [(2, number) for number in range(10)]))
                self.assertEqual(both, [each for pair in zip(ones, twos) for each in pair])

    def test_frames_that_never_come_back(self) -> None:
        sender, _ = self.connect(), self.connect()
        self.netem("loss 100%")
        before = memory(self.daemon)
        for first in range(0, 20000, 500):
            send_all(sender, range(first, first + 500))
        self.assertLess(memory(self.daemon) - before, 2.5 * MEGABYTE)

    def test_frames_that_overtake_each_other(self) -> None:
        self.netem("delay 60ms 50ms")
        peers = [self.connect() for _ in range(3)]
        overtaken = 0
        for batch in range(4):              # as many as may be under way on a real bus
            events = [(number % 3, batch, number) if number % 4 else (9,) for number in range(45)]
            for number, each in enumerate(events):
                peers[number % 3].say(send_line(*each))
            for number, peer in enumerate(peers):
                wanted = [each for i, each in enumerate(events) if i % 3 != number]
                peer.await_events(len(wanted))
                got = self.retrieve(peer)
                self.assertEqual(sorted(got), sorted(wanted))
                overtaken += got != wanted
        self.assertTrue(overtaken)


class NoCarrierTest(KernelTestCase):
    """Linux takes frames for an interface without a carrier, and drops them in silence."""

    name = "vxcan7"

    def plug_in(self) -> None:
        shell("ip link add dev vxcan7 type vxcan peer name vxcan8")
        self.go_up()

    def test_no_carrier_at_start_and_later(self) -> None:
        a, b = self.connect(), self.connect()
        for _ in range(2):
            self.await_state(a, "...", "[34]")
            a.say(f"{send_line(1)} | -OK - ...")
            set_up("vxcan8", True)
            self.await_state(a, "OK")
            node = self.node("vxcan8", listening=True)
            a.say(send_line(2))
            self.assertEqual(node.receive(1), [(2,)])
            self.assertEqual(self.retrieve(b), [(2,)])
            set_up("vxcan8", False)


@needs_root
class NobodyConnectedTest(OwnDaemonTestCase):
    """The daemon sees the bus while nobody is connected: at the start and after the last client."""

    def setUp(self) -> None:
        self.node = Node(BUS, listening=True)
        self.node.sock.settimeout(SHORT_TIMEOUT)
        self.addCleanup(self.node.sock.close)

    def test_probe_is_answered(self) -> None:
        daemon = self.start("--answer-probes")
        for _ in range(2):
            self.node.send_frame(uvscpd.EFF_FLAG | 0x0C001B05, b"\0\x7F\0\0\1")
            self.assertEqual(self.node.sock.recv(72), uvscpd.pack_frame(
                0x0C001C00, b"\x80\x28\x7F\0\0\1" + daemon.port.to_bytes(2, "big")))
            self.connect(daemon).say("quit | +OK - bye | (closed)")

    def test_debug_shows_frames(self) -> None:
        daemon = self.start("-d")
        for number in (201, 202):
            self.node.send(3, number)
            daemon.await_log(rf"\b20\b.*\b3\b.*\b({number}|{number:02X})\b")
            self.connect(daemon).say("quit | +OK - bye | (closed)")


class HintTest(OwnDaemonTestCase):
    """What is wrong with an interface, and what helps: in INFO, SEND's reply and the log."""

    @needs_root
    def test_interface_that_is_not_CAN_or_missing(self) -> None:
        for name, shown, missing in (
                ("lo", r"\blo\b.* no(t a)? CAN interface", "ip link"),
                ("can7", r"\bcan7\b.*(adapter|driver)", "ip link set can7 up")):
            daemon = self.start("-c", name)
            with Peer(daemon.port).greeted(name, "...") as peer:
                for where, text in (("reply", peer.ask(send_line(1))[0]), ("log", daemon.stop())):
                    with self.subTest(name, where=where):
                        self.assertRegex(text, shown)
                        self.assertNotIn(missing, text)

    def test_no_CAN_support(self) -> None:
        for code, text in ((errno.EAFNOSUPPORT, "no CAN support (Address family not supported)"),
                           (errno.EPROTONOSUPPORT, "no raw CAN support (Protocol not supported)")):
            hint = f"{text}, try: modprobe can_raw; on OpenWrt install kmod-can and kmod-can-raw"
            daemon = self.start("-c", "can7", program=changed_program(f"""
                class Socket(uvscpd.socket.socket):
                    def __init__(self, family=-1, *rest, **more):
                        if family == uvscpd.socket.AF_CAN:
                            raise OSError({code}, "")
                        super().__init__(family, *rest, **more)
                uvscpd.socket.socket = Socket
            """))
            with self.subTest(text), Peer(daemon.port).greeted("can7", os.strerror(code)) as peer:
                peer.say(f'info | 4,{code},0,"{text}" | +OK', f"{send_line(1)} | -OK - {hint}")
                self.assertEqual(daemon.stop().count(f"{hint}\n"), 1)


# =============================================================================
# Abuse
# =============================================================================
# Clients that misbehave do not disturb the others, and cost the daemon no more
# memory and descriptors than its limits allow.

class AbuseTest(DaemonTestCase):
    ARGUMENTS = ("--buffer", "500")

    def narrow(self) -> Peer:
        peer = NarrowPeer(self.daemon.port)
        self.addCleanup(peer.__exit__)
        return peer

    def test_client_that_does_not_read_events(self) -> None:
        count, batch = 5000, 250
        sender, *readers = (self.connect() for _ in range(4))
        deaf = self.narrow()
        for peer in (*readers, deaf):
            peer.say("rcvloop")
        before = memory(self.daemon)
        for first in range(0, count, batch):
            numbers = range(first, first + batch)
            send_all(sender, numbers)
            for reader in readers:
                self.assertEqual(read_numbers(reader, numbers[-1]), list(numbers))
        self.assertLess(memory(self.daemon) - before, 2 * MEGABYTE)
        # Now it reads: whole lines in order, the newest events; STAT knows how many are missing.
        got = read_numbers(deaf, count - 1)
        self.assertLess(len(got), count)
        self.assertEqual(got, sorted(set(got)))
        self.assertEqual(got[-500:], list(range(count - 500, count)))
        deaf.say("quitloop", f"stat | 0,0,{count - len(got)},{8 * count},{count},0,0 | +OK")

    def test_client_that_does_not_read_replies(self) -> None:
        deaf, other = self.narrow(), self.connect()
        before = memory(self.daemon)
        # The short lines, read at once, ask for 4 MB of replies; the long ones fill the connection.
        stream = b"help\n" * 3000 + (b"help".ljust(511) + b"\n") * 2000
        reply = "".join(text + "\r\n" for text in deaf.ask("help")).encode()
        deaf.sock.setblocking(False)
        with self.daemon.paused():
            sent = deaf.sock.send(stream[:16384])
        in_vain = 0
        while in_vain < 100:            # turns of the daemon's loop in which it read nothing
            try:
                sent += deaf.sock.send(stream[sent:sent + 16384])
                in_vain = 0
            except BlockingIOError:
                other.say("noop")
                in_vain += 1
            self.assertLess(sent, MEGABYTE)
        self.assertLess(memory(self.daemon) - before, 2 * MEGABYTE)
        deaf.sock.settimeout(TIMEOUT)
        for _ in range(stream[:sent].count(b"\n")):
            self.assertEqual(deaf.file.read(len(reply)), reply)
        deaf.sock.sendall(stream[sent:stream.index(b"\n", sent) + 1] + b"quit\n")
        self.assertEqual(deaf.file.read(), reply + b"+OK - bye\r\n")

    def test_connections_dropped_in_every_manner(self) -> None:
        other = self.connect()
        used = descriptors(self.daemon)
        memory_used = []
        for _ in range(10):
            for manner in MANNERS:
                visit(self.daemon.port, manner)
            await_descriptors(self.daemon, used, other)
            memory_used.append(memory(self.daemon))
        self.assertLess(memory_used[-1] - memory_used[0], 2 * MEGABYTE)


class LogTest(OwnDaemonTestCase):
    """Nobody reads the messages, or they cannot be written."""

    def call(self, port: int, *commands: str) -> None:
        """Connect, give commands and quit; the daemon logs the connection and its end."""
        with Peer(port).greeted() as peer:
            peer.say(*commands, "quit | +OK - bye | (closed)")

    def test_nobody_reads_stderr(self) -> None:
        daemon = self.start("-d", unread=True)
        for _ in range(20):
            self.call(daemon.port, " ; ".join(["noop"] * 20))
        daemon.process.send_signal(signal.SIGTERM)
        self.assertEqual(daemon.process.wait(TIMEOUT), 0)

    def test_messages_are_counted_while_nobody_reads_stderr(self) -> None:
        daemon, calls = self.start(unread=True), 0

        def accounted() -> int:
            """How many messages of clients are in the log, or in its counts of lost ones."""
            counts = re.findall(r"(\d+) messages? could not be logged", daemon.log)
            return sum(map(int, counts)) + len(re.findall(": (dis)?connected", daemon.log))

        deadline = time.monotonic() + TIMEOUT
        while calls < 100 or accounted() < 2 * calls - 1:       # the last may still be on its way
            self.assertLess(time.monotonic(), deadline, daemon.log)
            self.call(daemon.port)
            calls += 1
            if calls == 100:
                self.assertLess(accounted(), 100)
                daemon.reading.set()
        self.assertLessEqual(accounted(), 2 * calls)

    def test_messages_that_cannot_be_written(self) -> None:
        log = uvscpd.Log()
        with mock.patch("select.select", return_value=([], [2], [])), \
                mock.patch("os.write", side_effect=OSError) as write:
            for _ in range(2):
                log.info("two\nlines")
            write.side_effect = lambda _, text: len(text)
            for _ in range(4):
                log.info("two\nlines")
            self.assertEqual([call[0][1] for call in write.call_args_list][-9:], [
                b"4 messages could not be logged\n", *[b"two\n", b"lines\n"] * 4])

    def test_nobody_reads_syslog(self) -> None:
        with tempfile.TemporaryDirectory() as directory, \
                socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.bind(os.path.join(directory, "log"))
            sock.settimeout(TIMEOUT)
            program = changed_program(f"""
                send = uvscpd.socket.socket.sendto
                def redirected(sock, text, path):
                    assert path == "/dev/log"
                    return send(sock, text, {sock.getsockname()!r})
                uvscpd.socket.socket.sendto = redirected
            """)
            with self.detached(program=program) as (port, pid):
                for _ in range(100):
                    self.call(port)
            self.assertRegex(sock.recv(1000).decode(), rf"\A<30>[A-Z][a-z]{{2}} [ 123]\d \d\d:\d\d:"
                             rf"\d\d uvscpd\[{pid}\]: uvscpd\.py .* listening on .* port {port}, ")


@needs_minutes
class PatienceTest(OwnDaemonTestCase):
    """Tests that need minutes."""

    def test_slow_readers_stay(self) -> None:
        daemon = self.start()
        sender, *readers = (self.connect(daemon), NarrowPeer(daemon.port), NarrowPeer(daemon.port))
        for reader in readers:
            self.addCleanup(reader.__exit__)
            reader.say("rcvloop")
        for second in range(150):
            send_all(sender, range(100 * second, 100 * second + 100))
            readers[0].file.read1(1500)                 # the other one reads nothing
            time.sleep(1)
        for reader in readers:
            reader.read_line()                          # it may be the rest of one
            self.assertNotIn("(", reader.heard[-1])
            reader.send("quitloop", "vers")
            while reader.read_line() != "1,0,0,0":
                self.assertNotIn("(", reader.heard[-1])

    @needs_ci_kernel
    def test_vanished_clients_are_dropped(self) -> None:
        daemon = self.start()
        used = descriptors(daemon)
        for command in ("noop", "rcvloop"):        # the latter always has more to get
            self.connect(daemon).say(command)
        shell("tc qdisc add dev lo root netem loss 100%")
        self.addCleanup(shell, "tc qdisc del dev lo root")
        deadline = time.monotonic() + 330
        while descriptors(daemon) > used:
            self.assertLess(time.monotonic(), deadline, f"{descriptors(daemon)}, {used} at first")
            time.sleep(1)


# =============================================================================
# Fuzz
# =============================================================================
# `test_uvscpd.py fuzz`: hostile command lines. Each must get exactly one final line,
# and whatever reaches another client must be a well-formed event.

REPORT_S = 2.0                  # how often a long run shows how far it is
HOSTILE = ["0", "1", "3", "5", "96", "255", "256", "511", "512", "532", "1023", "1024",
           "65535", "65536", "-1", "+1", "4294967296", "9" * 99, "0x", "0x0", "0xFF", "0X1f",
           "0x" + "F" * 99, "0b1", "1_0", "1e3", "1.5", "nan", "\u0663", "\xb2", "\xe9" * 9, "",
           " ", "-", "::", "%s%n", "{0}", "'", "$(id)", "\0", "\x1b[2J", "\r",
           "2026-11-21T22:28:59", "x" * 600]
EVENT_LINE = re.compile(r"\d+,\d+,\d+,0,\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ,\d{1,10},"
                        r"(0:){15}[0-9A-F]{1,2}(,\d{1,3}){0,8}")


def progress(text: str) -> None:
    """Show how far a long run is."""
    print(f"    {text}", file=sys.stderr, flush=True)


def hostile_line(rng: random.Random) -> bytes:
    """A command line that may be almost anything, but for a line end."""
    def fields(count: int, separator: str) -> str:
        return separator.join(rng.choice(HOSTILE) for _ in range(count))

    event = ["96", "20", "3", "0", "", "0", "-", *"12345678"[:rng.randrange(9)]]
    event[rng.randrange(len(event))] = rng.choice(HOSTILE)
    arguments = rng.choice((
        "", fields(1, ""), fields(2, " "), ",".join(event), fields(rng.randrange(40), ","),
        fields(4, ","), f"0,{fields(2, ',')},{':'.join('0' * rng.choice((15, 16, 17)))}",
        fields(16, ":"), expand(f"::{rng.randrange(999):X}")))
    name = rng.choice([*uvscpd.COMMANDS, "send", "send", "send", "", "foo"])
    line = bytearray(f"{name}{' ' * rng.randrange(3)}{arguments}".encode())
    for _ in range(rng.choice((0, 0, 0, 1, 2, 5))):
        line.insert(rng.randrange(len(line) + 1), rng.randrange(256))
    for end in (b"\n", b"\r", b"\xff\xfa"):     # nor the start of telnet's subnegotiation
        line = line.replace(end, b"")
    return bytes(line)


def try_line(peer: Peer, line: bytes, number: int) -> bool:
    """Send a line, which must get one reply; False if that has closed the connection."""
    marker = uvscpd.format_guid(number.to_bytes(16, "big"))
    peer.sock.sendall(line + f"\r\nquitloop\nsgid {marker}\nggid\n".encode())
    lines = [peer.read_line()]
    while lines[-1] not in (marker, "(closed)"):
        lines.append(peer.read_line())
    if lines[-1] == "(closed)" and (lines[-2] == "+OK - bye" or NOT_BINARY in lines[-2]):
        return False
    peer.expect("+OK")
    finals = [text for text in lines if text[:3] in ("+OK", "-OK")]
    if len(finals) != 3 or finals[1:] != [OK, OK] or lines[-1] != marker:
        raise AssertionError(f"to {line!r}, QUITLOOP, SGID it said {lines}")
    return True


def check_events(watcher: Peer, peer: Peer, number: int) -> None:
    """Fail unless all lines that the watcher has got are well-formed events. Its GUID is zeros."""
    peer.say(f"send 0,511,255,0,,0,-,{number_text(number)}")
    line = ""
    while not re.fullmatch(f"0,511,255,.*:0,{number_text(number)}", line):
        line = watcher.read_line()
        if line != SIGN_OF_LIFE:
            assert EVENT_LINE.fullmatch(line), f"not an event: {line!r}"
            can_id, data, _ = uvscpd.parse_event(line)
            fields = [can_id >> 21 & 0xF0, can_id >> 16 & 0x1FF, can_id >> 8 & 0xFF]
            assert line.startswith("{},{},{},".format(*fields)), f"not a CAN event: {line!r}"


def fuzz(seed: int) -> Generator[int, None, None]:
    """Try lines without end; yields their count after each."""
    rng, number = random.Random(seed), 0
    with contextlib.ExitStack() as stack:
        daemon = DaemonProcess()
        stack.callback(daemon.stop)
        watcher, peer = (stack.enter_context(daemon.connect()) for _ in range(2))
        watcher.say("rcvloop")
        try:
            for number in itertools.count(1):
                if not try_line(peer, hostile_line(rng), number):
                    peer.__exit__()
                    peer = stack.enter_context(daemon.connect())
                if number % 100 == 0:
                    peer.heard.clear()
                    check_events(watcher, peer, number)
                yield number
        except (AssertionError, uvscpd.VscpError) as error:
            raise AssertionError(f"seed {seed}, line {number}: {error}") from None


class FuzzTest(unittest.TestCase):
    def test_hostile_lines(self) -> None:
        with contextlib.closing(fuzz(seed=1)) as numbers:
            self.assertIn(600, numbers)         # tries 600 lines


def run_fuzz(seconds: float, seed: int) -> None:
    """Try lines until the time is up."""
    begin = time.monotonic()
    report_at = begin + REPORT_S
    with contextlib.closing(fuzz(seed)) as numbers:
        for number in numbers:
            if time.monotonic() > report_at:
                progress(f"{number} lines, seed {seed}")
                report_at += REPORT_S
            if time.monotonic() > begin + seconds:
                break
    print(f"fuzz: passed, {number} lines, seed {seed}")


# =============================================================================
# Soak
# =============================================================================
# `test_uvscpd.py soak`: full load while clients come and go and the interface goes
# down and up.

class Soak:
    """A daemon under load, its clients and what is counted."""

    BATCH = 400                         # events; two batches fit into a FIFO

    def __init__(self, stack: contextlib.ExitStack, interface: str) -> None:
        bus = interface or ":virtual:"
        self.daemon = DaemonProcess("-c", bus)
        stack.callback(self.daemon.stop)
        self.sender, self.observer, *self.readers = (
            stack.enter_context(Peer(self.daemon.port).greeted(bus)) for _ in range(5))
        for reader in self.readers:
            reader.say("rcvloop")
        self.interface = interface
        if interface:
            self.node = Node(interface)
            stack.callback(self.node.sock.close)
        self.received = [0] * len(self.readers)
        self.sent = self.visits = 0
        self.idle = descriptors(self.daemon)
        self.first_memory = 0

    def send(self) -> None:
        """One batch of events, and now and then a visitor."""
        numbers = range(self.sent, self.sent + self.BATCH)
        if self.interface:
            for number in numbers:
                self.node.send(3, *number.to_bytes(4, "big"))
        else:
            send_events(self.sender, numbers)
        self.sent = numbers.stop
        if self.sent % (4 * self.BATCH) == 0:
            visit(self.daemon.port, random.choice(MANNERS))
            self.visits += 1

    def receive(self, last: int) -> None:
        """Let each reader read its events up to this one."""
        for i, reader in enumerate(self.readers):
            numbers = read_numbers(reader, last)
            assert numbers == sorted(set(numbers)), f"not in order: {numbers}"
            self.received[i] += len(numbers)
        if not self.interface:
            self.sender.expect(*["+OK"] * self.BATCH)
            self.sender.heard.clear()

    def set_interface(self, up: bool) -> None:
        """Bring the interface up or down, and wait until the daemon knows."""
        set_up(self.interface, up)
        until(lambda: self.observer.ask("info")[0].startswith("0," if up else "4,"),
              lambda: f"{self.interface} is {'up' if up else 'down'}, but INFO says "
                      + self.observer.heard[-2])

    def report(self) -> None:
        """Bring the interface down and up, wait until all visitors are gone, show the counts."""
        if self.interface:
            self.set_interface(False)
            self.set_interface(True)
            self.node.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)   # clears ENETDOWN
        await_descriptors(self.daemon, self.idle, self.observer)
        self.first_memory = self.first_memory or memory(self.daemon)
        progress(f"{self.sent} events, {self.visits} visits, {self.idle} descriptors, "
                 f"{memory(self.daemon) >> 10} KiB")

    def check(self) -> None:
        """Fail if STAT does not count all missing events, or if memory has grown."""
        for reader, received in zip(self.readers, self.received):
            reader.say("quitloop", f"stat | #,#,{self.sent - received},#,#,0,0 | +OK")
        growth = memory(self.daemon) - self.first_memory
        assert growth < 2 * MEGABYTE, f"memory has grown by {growth} bytes"


def run_soak(seconds: float, iface: str) -> None:
    """Put full load on a daemon for so many seconds."""
    end = time.monotonic() + seconds
    with contextlib.ExitStack() as stack:
        soak = Soak(stack, iface)
        soak.send()
        while time.monotonic() < end:
            report_at = time.monotonic() + REPORT_S
            while time.monotonic() < report_at:
                soak.send()             # while the readers read a batch, the daemon has the next
                soak.receive(soak.sent - soak.BATCH - 1)
            soak.report()
        soak.receive(soak.sent - 1)
        soak.check()
    print(f"soak: passed, {soak.sent} events, {soak.visits} visits")


# =============================================================================
# Benchmark
# =============================================================================
# `test_uvscpd.py bench` measures the daemon beside two relays. The floor is a plain one:
# it reads frames with the kernel's time of them until the bus is empty, makes the lines
# from cached parts and writes once to each client. It is woken for each frame and knows
# no commands. The limit shows what Python can do at best: it makes the system calls of
# the daemon, in the same order, and next to nothing besides. Both have their own code
# for the lines, on purpose not uvscpd's own functions: if these became slower, so would
# the relays, and the ratio would hide it.
#
# The load is mixed, as on a real bus: 16 CAN ids of 10 nodes, 0 to 8 bytes of data.
#
# On a usual machine compare only the ratios. By the stopwatch, which counts
# instructions (see .ci/kernel), figures repeat within 1 % whatever else the machine
# does; there each is compared with the limit in FIGURES:
#
#     KERNEL_STOPWATCH=1 .ci/kernel /usr/bin/python3 test_uvscpd.py bench vcan0
#
# Relays, sender and node are processes that load one function below and nothing else
# of this file. Because of the stopwatch everything is loaded before it is measured,
# and nothing has a time limit: if a frame that somebody waits for is lost, the run
# hangs. Without IFACE the daemon has the virtual bus and a client that sends, the
# relays get their frames as datagrams, and there is no node, so no questions.

BARE_PYTHON = (sys.executable, "-s", "-S")      # without what the machine's site-packages load
COLONS = 17                     # in an event line: 15 in the GUID, 2 in the datetime
LONE_S = 0.03                   # after so long without a frame, the next one is a lone one
FIGURES = (                     # what is measured, its unit, its limit by the stopwatch
    ("question and answer, 1 connection", "us", "<= 820"),
    ("question and answer, 2 connections", "us", "<= 970"),
    ("the same, the node takes 1 ms", "us", "<= 1770"),
    ("page of 7 answers 1 ms apart, 2 connections", "us", "<= 8500"),
    ("lone frame, 1 client", "us", "<= 0.96 * floor"),
    ("lone frame, last of 5", "us", "<= 1.05 * floor"),
    ("CPU at 1000 frames/s, 1 client", "s", "<= 0.53 * floor"),
    ("CPU at 1000 frames/s, 5 clients", "s", "<= 0.37 * floor"),
    ("CPU at 1000 frames/s, 20 clients", "s", "<= 0.48 * floor"),
    ("CPU at 7600 frames/s, 1 client", "s", "<= 0.87 * floor"),
    ("CPU at 7600 frames/s, 5 clients", "s", "<= 0.92 * floor"),
    ("CPU at 7600 frames/s, 20 clients", "s", "<= 1.04 * floor"),
    ("lost of these, the worst", "%", "<= 0"),
    ("flat out, 5 clients: delivered", "/s", ">= 1.0 * floor"),
    ("each further client, of the first", "%", "<= 0.95 * floor"),
    ("SEND, each waiting for +OK; floor: NOOP", "/s", ""),
    ("SEND, pipelined; floor: NOOP", "/s", ""),
    ("CPU from start to listening, as a script", "ms", ""),
    ("CPU from start to listening, as installed", "ms", "<= 1.5 * floor"),
    ("memory when listening, as a script", "MB", ""),
    ("memory when listening, as installed", "MB", "<= 1.2 * floor"),
    ("peak memory with 20 clients", "MB", "<= 4 + floor"),
)


def can_socket(interface: str) -> socket.socket:
    sock = socket.socket(socket.AF_CAN, socket.SOCK_RAW, socket.CAN_RAW)
    sock.bind((interface,))
    return sock


def mixed_events() -> list[tuple[int, bytes]]:
    """CAN ids and data of a load: 16 ids in turn, of 10 nodes, each with its length of data."""
    mix = ((0x0C0A0601, 4), (0x0C140302, 3), (0x0C0A2303, 5), (0x0C140404, 3),
           (0x0C0A0605, 4), (0x14140906, 3), (0x0C0F0107, 8), (0x0C1E0508, 3),
           (0x0C0A1009, 6), (0x0C140A03, 4), (0x18000104, 5), (0x0C0F0207, 8),
           (0x0C28060A, 7), (0x0C140301, 2), (0x001E0702, 1), (0x1C000405, 0))
    return [(can_id, bytes((number * 16 + place * 37 + length) & 0xFF for place in range(length)))
            for number in range(100) for can_id, length in mix]


def packed(can_id: int, data: bytes) -> bytes:
    """The struct can_frame of an event."""
    return struct.pack("=IB3x8s", can_id | 0x80000000, len(data), data)


def send_command(can_id: int, data: bytes) -> bytes:
    """The command that sends an event."""
    head, guid = can_id >> 21 & 0xF0, "0:" * 15 + f"{can_id & 0xFF:X}"
    values = "".join(f",{byte}" for byte in data)
    return f"send {head},{can_id >> 16 & 0x1FF},{can_id >> 8 & 0xFF},,,,{guid}{values}\n".encode()


def open_target(target: str) -> tuple[socket.socket, Callable[[int, bytes], bytes]]:
    """Where a relay gets its frames (`can:NAME`, `tcp:PORT`, `udp:PORT`), and in what form."""
    kind, _, where = target.partition(":")
    if kind == "tcp":
        return socket.create_connection(("127.0.0.1", int(where))), send_command
    if kind == "can":
        sock = can_socket(where)
        sock.setsockopt(socket.SOL_CAN_RAW, socket.CAN_RAW_FILTER, b"")
    else:
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sock.connect(("127.0.0.1", int(where)))
    return sock, packed


def open_relay(interface: str) -> tuple[socket.socket, socket.socket]:
    """Where clients of a relay connect, and where its frames come: the interface, or a UDP port."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen(128)
    if interface:
        source = can_socket(interface)
        source.setsockopt(socket.SOL_SOCKET, 33, 2 << 20)       # SO_RCVBUFFORCE
    else:
        source = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        source.bind(listener.getsockname())
    source.setsockopt(socket.SOL_SOCKET, 64, 1)                 # SO_TIMESTAMPNS
    source.setblocking(False)
    print(f"listening on 127.0.0.1 port {listener.getsockname()[1]}", file=sys.stderr, flush=True)
    return listener, source


def run_floor(interface: str) -> None:
    """Relay frames to whoever connects, as plainly as possible."""
    import selectors
    listener, source = open_relay(interface)
    selector = selectors.DefaultSelector()
    selector.register(listener, selectors.EVENT_READ)
    selector.register(source, selectors.EVENT_READ)
    frame_struct, time_struct = struct.Struct("=IB3x8s"), struct.Struct("=qq")
    byte_text = [f",{byte}" for byte in range(256)]
    id_text: dict[int, tuple[str, str]] = {}
    date_text: dict[int, str] = {}

    def line_of(frame: bytes, stamp: bytes) -> str:
        can_id, length, data = frame_struct.unpack(frame)
        seconds, nanoseconds = time_struct.unpack(stamp)
        if can_id not in id_text:
            id_text[can_id] = (
                f"{can_id >> 21 & 0xF0},{can_id >> 16 & 0x1FF},{can_id >> 8 & 0xFF},0,",
                f",0:0:0:0:0:0:0:0:0:0:0:0:0:0:0:{can_id & 0xFF:X}")
        if seconds not in date_text:
            date_text.clear()
            date_text[seconds] = time.strftime("%Y-%m-%dT%H:%M:%SZ,", time.gmtime(seconds))
        head, guid = id_text[can_id]
        return (head + date_text[seconds]
                + str(seconds * 1000000 + nanoseconds // 1000 & 0xFFFFFFFF) + guid
                + "".join(byte_text[byte] for byte in data[:length]) + "\r\n")

    clients: list[socket.socket] = []
    while True:
        for key, _ in selector.select():
            if key.fileobj is listener:
                clients.append(listener.accept()[0])
                clients[-1].setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                clients[-1].sendall(b"+OK\r\n+OK\r\n")
                continue
            lines = []
            while True:
                try:
                    frame, ((_, _, stamp),), _, _ = source.recvmsg(16, 64)
                except BlockingIOError:
                    break
                lines.append(line_of(frame, stamp))
            block = "".join(lines).encode()
            for client in clients:
                client.sendall(block)


def run_limit(interface: str) -> None:
    """Relay frames and SENDs with as little Python as possible.

    As the daemon it reads one frame after a sleep, all when there are more at once, and
    what has come every 5 ms under load, but not soon after a SEND.
    It believes what it gets, takes every write for done, and answers all but SEND and
    RCVLOOP with +OK. The loop is one function, as calls take time.
    """
    import select
    listener, source = open_relay(interface)
    source_fd, listener_fd = source.fileno(), listener.fileno()
    epoll = select.epoll()
    epoll.register(source_fd, select.EPOLLIN)
    epoll.register(listener_fd, select.EPOLLIN)
    poll, recvmsg, clock = epoll.poll, source.recvmsg, time.monotonic
    unpack, pack = struct.Struct("=IB3x8sqq").unpack, struct.Struct("=IB3x8s").pack
    byte_text = [f",{byte}" for byte in range(256)]
    byte_value = {f"{byte}": byte for byte in range(256)}
    id_text: dict[int, tuple[str, str]] = {}
    id_value: dict[tuple[str, ...], int] = {}
    clients: dict[int, socket.socket] = {}
    streams: dict[int, Callable[[bytes], int]] = {}     # of those in the receive loop
    senders: list[int] = []                             # of own frames, the oldest first
    second, date, date_us = -1, "", 0
    never = 1e9
    read_at, gather_at, busy_until, busy_frames, quiet_until = 0.0, never, 0.0, 0, 0.0

    while True:
        ready = poll(max(0.0, gather_at - clock()) if gather_at < never else -1)
        now = clock()
        if gather_at <= now:
            ready.append((source_fd, 0))
        for fd, _ in ready:
            if fd == source_fd:
                lines: list[str] = []
                sender = 0
                for _ in range(1 if gather_at == never and now - read_at > 0.001 else 500):
                    try:
                        frame, ((_, _, stamp),), flags, _ = recvmsg(16, 64)
                    except BlockingIOError:
                        break
                    can_id, length, data, seconds, nanoseconds = unpack(frame + stamp)
                    if seconds != second:
                        second, date_us = seconds, seconds * 1000000
                        date = time.strftime("%Y-%m-%dT%H:%M:%SZ,", time.gmtime(seconds))
                    try:
                        head, guid = id_text[can_id]
                    except KeyError:
                        head, guid = id_text[can_id] = (
                            f"{can_id >> 21 & 0xF0},{can_id >> 16 & 0x1FF},{can_id >> 8 & 0xFF},0,",
                            f",0:0:0:0:0:0:0:0:0:0:0:0:0:0:0:{can_id & 0xFF:X}")
                    timestamp = date_us + nanoseconds // 1000 & 0xFFFFFFFF
                    if length == 8:
                        a, b, c, d, e, f, g, h = data
                        lines.append(f"{head}{date}{timestamp}{guid}{byte_text[a]}{byte_text[b]}"
                                     f"{byte_text[c]}{byte_text[d]}{byte_text[e]}{byte_text[f]}"
                                     f"{byte_text[g]}{byte_text[h]}\r\n")
                    else:
                        texts = "".join([byte_text[byte] for byte in data[:length]])
                        lines.append(f"{head}{date}{timestamp}{guid}{texts}\r\n")
                    if flags & 0x800:                   # MSG_CONFIRM
                        sender = senders.pop(0)
                block = "".join(lines).encode()
                for client, send in streams.items():
                    if client != sender and block:
                        send(block)
                read_at = clock()
                if busy_until < now:
                    busy_until, busy_frames = now + 0.02, 0
                busy_frames += len(lines)
                if gather_at < never and len(lines) > 1 and quiet_until < now:
                    gather_at = read_at + 0.005
                elif gather_at < never:
                    gather_at = never
                    epoll.modify(source_fd, select.EPOLLIN)
                elif busy_frames >= 8 and quiet_until < now:
                    gather_at = now + 0.005
                    epoll.modify(source_fd, 0)
            elif fd == listener_fd:
                sock = listener.accept()[0]
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                sock.sendall(b"+OK\r\n")
                clients[sock.fileno()] = sock
                epoll.register(sock.fileno(), select.EPOLLIN)
                if interface and len(clients) == 2:     # own frames are wanted by the other one
                    source.setsockopt(socket.SOL_CAN_RAW, socket.CAN_RAW_RECV_OWN_MSGS, 1)
            else:
                text = clients[fd].recv(16384)
                if not text:
                    epoll.unregister(fd)
                    streams.pop(fd, None)
                    clients.pop(fd).close()
                    if interface and len(clients) < 2:
                        source.setsockopt(socket.SOL_CAN_RAW, socket.CAN_RAW_RECV_OWN_MSGS, 0)
                replies = []
                for line in text.decode().splitlines():
                    if line[:5] == "send ":
                        fields = line[5:].split(",")
                        key = fields[0], fields[1], fields[2], fields[6]
                        if key not in id_value:
                            id_value[key] = (0x80000000 | int(fields[0]) << 21
                                             | int(fields[1]) << 16 | int(fields[2]) << 8)
                        data = bytes([byte_value[field] for field in fields[7:]])
                        source.send(pack(id_value[key], len(data), data))
                        if len(clients) > 1:
                            senders.append(fd)
                        quiet_until = now + 0.02
                    elif line == "rcvloop":
                        streams[fd] = clients[fd].send
                    replies.append("+OK\r\n")
                if replies:
                    clients[fd].send("".join(replies).encode())


def run_sender(target: str) -> None:
    """For each line `RATE COUNT` on stdin send COUNT frames, RATE per second (0: flat out)."""
    sock, form = open_target(target)
    frames = [form(*event) for event in mixed_events()]
    answered = sock.family == socket.AF_INET and sock.type == socket.SOCK_STREAM
    print("ready", file=sys.stderr, flush=True)
    for line in sys.stdin:
        rate, count = map(int, line.split())
        start = time.monotonic()
        for number in range(count):
            if rate:            # evenly, as on a bus; if late, the others still get their turns
                time.sleep(max(0.0, start + number / rate - time.monotonic()))
            if answered and number % 100 == 99:
                sock.recv(1 << 16)
            while True:
                try:
                    sock.send(frames[number % len(frames)])
                    break
                except OSError as error:        # vcan's receiving side is full: wait as a bus would
                    if error.errno != errno.ENOBUFS:
                        raise
                    time.sleep(0.001)
        print("sent", flush=True)


def run_node(interface: str) -> None:
    """Node 5: answers a read of register 0 at once, 1 after 1 ms, 2 with 7 answers 1 ms apart."""
    sock = can_socket(interface)
    sock.setsockopt(socket.SOL_CAN_RAW, socket.CAN_RAW_FILTER,
                    struct.pack("=II", 0x80000900, 0x81FFFF00))     # class 0 type 9
    print("ready", file=sys.stderr, flush=True)
    while True:
        register = sock.recv(16)[9]
        for _ in range(7 if register == 2 else 1):
            if register:
                time.sleep(0.001)
            sock.send(struct.pack("=IB3x8s", 0x8C000A05, 2, bytes([register, 42])))


def start_python(*arguments: str) -> tuple[subprocess.Popen[str], int]:
    """Start Python with these arguments, wait until it is ready; the process and its port."""
    process = subprocess.Popen([*BARE_PYTHON, *arguments], stdin=subprocess.PIPE, encoding="utf-8",
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stderr is not None
    line = next((line for line in process.stderr if re.search("listening on|ready", line)), "")
    assert line, f"Python with {arguments} does not start"
    return process, int((re.findall(r"port (\d+)", line) or [0])[0])


def code_of(function: Callable[[str], None], argument: str) -> tuple[str, str]:
    """Python's arguments to run this function with the imports and helpers that it needs."""
    helpers: tuple[Callable[..., Any], ...] = (
        can_socket, mixed_events, packed, send_command, open_target, open_relay, function)
    return "-c", "\n".join(["from __future__ import annotations",
                            "import errno, socket, struct, sys, time",
                            *[inspect.getsource(helper) for helper in helpers],
                            f"{function.__name__}({argument!r})"])


def kill(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


def start_relay(kind: str, interface: str, *options: str) -> tuple[subprocess.Popen[str], int]:
    """Start `floor` or `limit`, or the daemon from the file or directory of this name."""
    return start_python(*(
        code_of(run_floor, interface) if kind == "floor" else
        code_of(run_limit, interface) if kind == "limit" else
        (kind, "-s", "-p", "0", "-i", "127.0.0.1", "-c", interface or ":virtual:", *options)))


class Relay:
    """The daemon, the floor or the limit as a process, and clients that count what they get."""

    def __init__(self, kind: str, interface: str, *options: str) -> None:
        self.kind = kind
        self.process, self.port = start_relay(kind, interface, *options)
        self.target = (f"can:{interface}" if interface else
                       f"udp:{self.port}" if kind in ("floor", "limit") else f"tcp:{self.port}")
        self.sender, _ = start_python(*code_of(run_sender, self.target))
        self.clients: list[socket.socket] = []

    def connect(self, receive: bool = True) -> socket.socket:
        """One more client, greeted, in the receive loop or not."""
        sock = socket.create_connection(("127.0.0.1", self.port))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if receive:
            self.clients.append(sock)
            if self.kind != "floor":
                sock.sendall(b"rcvloop\n")
        seen = b""
        while seen.count(b"+OK") < 1 + receive:
            seen += sock.recv(4096)
        return sock

    def cpu_s(self) -> float:
        return time.clock_gettime(~self.process.pid << 3 | 2)       # as clock_getcpuclockid(3)

    def load(self, rate: int, count: int) -> tuple[float, float, float]:
        """Send frames; % lost, seconds of the relay's CPU, events delivered per second.

        Real clients are elsewhere and take none of the relay's processor in the
        middle of its work; those here must not either (SCHED_BATCH).
        """
        assert self.sender.stdin is not None and self.sender.stdout is not None
        colons, sent = 0, False
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
        with selectors.DefaultSelector() as selector:
            selector.register(self.sender.stdout, selectors.EVENT_READ)
            for sock in self.clients:
                selector.register(sock, selectors.EVENT_READ)
            cpu, begin = self.cpu_s(), time.monotonic()
            self.sender.stdin.write(f"{rate} {count}\n")
            self.sender.stdin.flush()
            last = quiet = begin
            while not sent or time.monotonic() - quiet < 1.0:
                for key, _ in selector.select(1.0 if sent else None):
                    if key.fileobj is self.sender.stdout:
                        sent = bool(self.sender.stdout.readline())
                        quiet = time.monotonic()
                        continue
                    assert isinstance(key.fileobj, socket.socket)
                    got = key.fileobj.recv(1 << 16).count(b":")
                    if got:             # no sign of life
                        colons += got
                        last = quiet = time.monotonic()
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
        events = colons // COLONS
        return (100 * (1 - events / count / len(self.clients)), self.cpu_s() - cpu,
                events / (last - begin))

    def lone_frame_us(self, rounds: int) -> float:
        """Median of the time from sending a lone frame to its arrival at the last client."""
        source, form = open_target(self.target)
        frame = form(0x0C140305, bytes(8))
        times = []
        with source:
            for _ in range(rounds):
                time.sleep(LONE_S)
                begin = time.monotonic()
                source.send(frame)
                for sock in self.clients:
                    while b":" not in sock.recv(4096):
                        pass                                # a sign of life
                times.append(time.monotonic() - begin)
        return 1e6 * sorted(times)[rounds // 2]

    def question_us(self, rounds: int, register: int, asker: socket.socket) -> float:
        """Median of the time from sending a register read to the last answer at a client."""
        hearer = self.clients[0]
        times = []
        for _ in range(rounds):
            begin = time.monotonic()
            asker.sendall(b"send 96,0,9,0,,0,-,5,%d\n" % register)
            seen = b""
            while seen.count(b"96,0,10,") < (7 if register == 2 else 1):
                seen += hearer.recv(4096)
            times.append(time.monotonic() - begin)
            if asker is not hearer:
                asker.recv(4096)
        return 1e6 * sorted(times)[rounds // 2]

    def commands_per_second(self, line: bytes, count: int, pipelined: bool) -> float:
        """How many commands per second of one client are answered."""
        with self.connect(receive=False) as sock:
            begin = time.monotonic()
            if pipelined:
                answered = 0
                sock.setblocking(False)
                rest = line * count
                while answered < count:
                    readable, writable, _ = select.select([sock], [sock] if rest else [], [])
                    if writable:
                        rest = rest[sock.send(rest[:1 << 14]):]
                    if readable:
                        answered += sock.recv(1 << 16).count(b"\n")
            else:
                for _ in range(count):
                    sock.sendall(line)
                    sock.recv(4096)
            return count / (time.monotonic() - begin)

    def close(self) -> None:
        for sock in self.clients:
            sock.close()
        kill(self.sender)
        kill(self.process)


def measure(kind: str, interface: str, seconds: float) -> dict[str, float]:
    """The figures of a relay (start_relay) by the rows' names; shows each when it is known."""
    figures: dict[str, float] = {}

    def note(what: str, figure: float) -> None:
        figures[what] = figure
        progress(f"{os.path.basename(kind)}: {what}: {figure_text(figure)}")

    rounds = int(40 * seconds)
    is_daemon = kind not in ("floor", "limit")
    for count, who in ((1, "1 client"), (5, "5 clients"), (20, "20 clients")):
        relay = Relay(kind, interface, *(["--buffer", "16000"] if count == 20 else []))
        for _ in range(count):
            relay.connect()
        relay.load(1000, 500)       # what runs for the first time has to be loaded
        for rate, frames in ((1000, 1000 * seconds), (7600, 3000 * seconds)):
            missing, cpu, _ = relay.load(rate, int(frames))
            note(f"CPU at {rate} frames/s, {who}", cpu)
            note(f"lost at {rate} frames/s, {who}", missing)
        if count == 1:
            relay.lone_frame_us(10)
            note("lone frame, 1 client", relay.lone_frame_us(rounds))
            if kind != "floor" and interface:
                node, _ = start_python(*code_of(run_node, interface))
                asker = relay.clients[0]
                for row, register in zip(FIGURES, (0, 0, 1, 2)):
                    relay.question_us(10, register, asker)
                    note(row[0], relay.question_us(rounds, register, asker))
                    if asker is relay.clients[0]:       # from now on one sends, one receives
                        asker = relay.connect(receive=False)
                kill(node)
        elif count == 5:
            note("lone frame, last of 5", relay.lone_frame_us(rounds))
            note("flat out, 5 clients: delivered", relay.load(0, int(3000 * seconds))[2])
        else:
            note("peak memory with 20 clients", memory(relay) / MEGABYTE)
        relay.close()
    note("lost of these, the worst", max(figures[what] for what in figures if "lost at" in what))
    more = figures["CPU at 1000 frames/s, 20 clients"] / figures["CPU at 1000 frames/s, 1 client"]
    note("each further client, of the first", (more - 1) / 19 * 100)
    for manner, program in (("as a script", uvscpd.__file__), ("as installed", kind)):
        if is_daemon or manner == "as installed":
            cpu_ms, megabytes = measure_start(program, interface)
            note(f"CPU from start to listening, {manner}", cpu_ms)
            note(f"memory when listening, {manner}", megabytes)
    return figures


def measure_start(kind: str, interface: str) -> tuple[float, float]:
    """Milliseconds of CPU until a relay listens, and its memory then in MB: each the best of 5."""
    times, memories = [], []
    for _ in range(5):
        relay = Relay(kind, interface)
        times.append(1000 * relay.cpu_s())
        memories.append(memory(relay) / MEGABYTE)
        relay.close()
    return min(times), min(memories)


def measure_commands(kind: str, interface: str, amount: int) -> list[dict[str, float]]:
    """The figures of SEND, and of NOOP, of a daemon or the limit by the rows' names."""
    lines = b"send 96,20,3,0,,0,-,1,2,3,4,5,6,7,8\n", b"noop\n"
    figures: list[dict[str, float]] = [{}, {}]
    relay = Relay(kind, interface)
    for what, pipelined in (("SEND, each waiting for +OK; floor: NOOP", False),
                            ("SEND, pipelined; floor: NOOP", True)):
        progress(f"{os.path.basename(kind)}: {what}")
        # In turns, so that a slow moment of the machine hits both.
        sends, noops = zip(*([relay.commands_per_second(line, amount, pipelined) for line in lines]
                             for _ in range(3)))
        figures[0][what], figures[1][what] = max(sends), max(noops)
    relay.close()
    return figures


def figure_text(figure: float) -> str:
    return f"{figure:,.0f}" if figure >= 100 else f"{figure:.2f}"


def run_benchmark(iface: str, seconds: float) -> None:
    """Print one table: the daemon, the floor, the limit, the ratio to the floor, what is wanted."""
    os.environ["PYTHONHASHSEED"] = "0"      # or the order of sets differs from run to run
    with tempfile.TemporaryDirectory() as directory:
        installed = os.path.join(directory, "uvscpd")
        os.mkdir(installed)
        shutil.copy(uvscpd.__file__, os.path.join(installed, "__main__.py"))
        compileall.compile_dir(installed, quiet=1)
        floor, limit, ours = (measure(kind, iface, seconds)
                              for kind in ("floor", "limit", installed))
        for figures, more in zip((ours, floor),
                                 measure_commands(installed, iface, int(100 * seconds))):
            figures.update(more)
        if iface:                       # else the limit has nowhere to send to
            limit.update(measure_commands("limit", iface, int(100 * seconds))[0])
    stopwatch = os.environ.get("KERNEL_STOPWATCH") == "1"
    print(f"Python {sys.version.split()[0]}, {os.cpu_count()} processors, "
          f"{iface or 'virtual bus'}; {1000 * seconds:.0f} frames at 1000/s, "
          f"{3000 * seconds:.0f} at 7600/s\n\n"
          f"{'':46}{'uvscpd':>9}{'floor':>9}{'limit':>9}{'ratio':>7}  {'':4}"
          f"{' wanted' * stopwatch}")
    for what, unit, wanted in FIGURES:
        if what in ours:
            least = floor.get(what, 0.0)
            missed = wanted and not eval(f"{ours[what]} {wanted}", {"floor": least})
            print(f"{what:46}" + "".join(f"{figure_text(each[what]) if what in each else '':>9}"
                                         for each in (ours, floor, limit))
                  + f"{f'{ours[what] / least:.2f}' if least else '':>7}  {unit:5}"
                  + f"{wanted}{'  MISSED' if missed else ''}" * stopwatch)


# =============================================================================
# main
# =============================================================================

class RunParser(argparse.ArgumentParser):
    """argparse with errors of one line."""

    def error(self, message: str) -> Any:
        self.exit(2, f"{self.prog}: {message}\n")


def number_of_seconds(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0.1 <= float(text) < 1e6:
            return float(text)
    raise argparse.ArgumentTypeError(f"'{text}' is not a number from 0.1 to 999999")


def can_interface(text: str) -> str:
    try:
        if text:
            can_socket(text).close()
    except (AttributeError, OSError) as error:      # or this Python knows no SocketCAN
        raise argparse.ArgumentTypeError(f"no CAN on '{text}': {error}") from None
    return text


RUNS: dict[str, tuple[Callable[..., None], str, dict[str, Any]]] = {    # and arguments
    "fuzz": (run_fuzz, "Hostile lines, for SECONDS (10). A SEED repeats a run.",
             {"seconds": 10.0, "seed": random.randrange(1000000)}),
    "soak": (run_soak, "Full load while clients come and go, for SECONDS (60). On the SocketCAN "
             "interface IFACE (as root), which goes down and up, or the virtual bus.",
             {"seconds": 60.0, "iface": ""}),
    "bench": (run_benchmark, "A table of figures, on the SocketCAN interface IFACE or the virtual "
              "bus. SECONDS is how long each load lasts: with 5, the default, all of it takes 2 "
              "minutes, by the stopwatch (see the section Benchmark) 4.",
              {"iface": "", "seconds": 5.0}),
}


def load_tests(_loader: unittest.TestLoader, tests: unittest.TestSuite,
               _pattern: str | None) -> unittest.TestSuite:
    """The examples in the docstrings of uvscpd.py are tests, too."""
    tests.addTests(doctest.DocTestSuite(uvscpd))
    return tests


def main() -> int:
    """Run the tests, or what the first argument names; returns the exit status."""
    word, *rest = sys.argv[1:] or [""]
    if word not in RUNS:
        unittest.main()
    function, text, arguments = RUNS[word]
    parser = RunParser(prog=f"test_uvscpd.py {word}", description=text)
    kinds: dict[str, Callable[[str], Any]] = {
        "seconds": number_of_seconds, "seed": int, "iface": can_interface}
    for name, default in arguments.items():
        parser.add_argument(name, metavar=name.upper(), nargs="?", type=kinds[name],
                            default=default)
    try:
        function(**vars(parser.parse_args(rest)))
    except (AssertionError, OSError) as error:
        print(f"{word}: FAILED: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
