#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-3.0-or-later
"""uvscpd.py - the micro VSCP daemon: TCP clients on one side, a CAN bus on the other.

The daemon speaks VSCP's TCP/IP text protocol (port 8598) and bridges it to one
SocketCAN interface. It only relays: no rules, no configuration file.

    can0 --> Bus.read --> Daemon.hand_out --event lines--> Client.put ----------> TCP
                                                               |                   ^
                                                               +--> Client.fifo ---+
    can0 <-- Bus.send <-- SendQueue.send <-- do_send <-- Client.run_lines <------ TCP

A frame that was sent comes back from the kernel once it has been on the bus. Only
then do the other clients get it; OwnFrames knows who sent it. Event lines are
buffered in `fifo` only for a client outside the receive loop, or one that reads too
slowly.

A session with `python3 uvscpd.py -s -c :virtual:` and netcat:

    $ nc localhost 8598
    uvscpd.py 1.0.0 - micro VSCP daemon
    VSCP events between TCP clients and a CAN bus; HELP lists the commands.
    +OK - Success, connected to :virtual:
    send 96,20,3,0,,0,-,0,1,35
    +OK - Success.
    quit
    +OK - bye

Read the file from top to bottom. Sections 2 to 5 are pure: text and bytes in,
values out. The bus is sections 6 and 7, a connection section 8, what a client can ask
for section 9, and the loop that joins them section 10. Section 11 is what runs beside
the loop, 12 what -d says about events, 13 and 14 are the command line, the start and
the end. A class writes only its own attributes; the commands of section 9 are the one
exception. Times in comments were measured on a processor of 250 MIPS, about that of a
small router.
"""

# Only modules that OpenWrt's python3-light has. What is rarely needed and slow to
# import is imported where it is used, but before the first client connects: later
# there may be no descriptor left to read it.
import _thread
import argparse
import errno
import fcntl
import os
import re
import select
import selectors
import signal
import socket
import struct
import sys
import time
from collections import deque, namedtuple
from functools import lru_cache, partialmethod

# Python 3.5 and older stop with a syntax error and print the next line; its comment tells the
# user why.
TYPE_CHECKING: bool = False     # Python 3.7 or newer is needed
if sys.version_info < (3, 7):
    sys.exit("uvscpd.py: Python 3.7 or newer is needed")

# Not imported at run time, as typing takes an eighth of the start-up time. So annotations that
# Python 3.7 cannot evaluate are in quotes.
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from typing import Any, NoReturn

__version__ = "1.0.0"


# =============================================================================
# 1. Errors, log
# =============================================================================
# VscpError for everything that a user did wrong, Later and NoRoom for what has to wait,
# and messages for the operator, which never block. Constants stand at the head of the
# section that they are about.

MAX_REMEMBERED = 1000           # messages about one thing that RateLimit remembers

NEVER = float("inf")
READ, WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE


class VscpError(argparse.ArgumentTypeError):
    """What a user asked for cannot be done; the text says why.

    A client gets the text after `-OK - `. It is an ArgumentTypeError so that
    argparse prints the text when an option's value is wrong.
    """


class NotVscp(VscpError):
    """A connection speaks another protocol; the text says which."""


class Later(Exception):
    """A log-in cannot be checked before the time `at`; then its line runs again."""

    def __init__(self, at: float) -> None:
        super().__init__()
        self.at = at


class NoRoom(Exception):
    """The bus takes no frame at the moment; the text says why.

    `retry_s` is how soon to try again; NEVER: poll will report room.
    """

    def __init__(self, text: str, retry_s: float) -> None:
        super().__init__(text)
        self.retry_s = retry_s


LOG_ERR, LOG_WARNING, LOG_INFO, LOG_DEBUG = 3, 4, 6, 7      # priorities of syslog(3)
LOG_DAEMON = 3 << 3                                         # its facility


class Log:
    """Messages to stderr in the foreground, to syslog once detached. Never blocks.

    Lines that cannot be written at once (nobody reads the pipe, the terminal is
    stopped, the disk is full) are counted; the number is logged once there is room.
    """

    def __init__(self) -> None:
        self.debugging = False
        self.unlogged = 0                           # lines that could not be written
        self.syslog: socket.socket | None = None    # once detached
        self.journal = self.is_journal()

    @staticmethod
    def is_journal() -> bool:
        """Whether stderr is the journal's; then a line starts with `<priority>` (sd-daemon(3))."""
        try:
            stderr = os.fstat(2)
        except OSError:
            return False
        return os.environ.get("JOURNAL_STREAM") == f"{stderr.st_dev}:{stderr.st_ino}"

    def write(self, priority: int, text: str, time_us: int = 0) -> None:
        clock = f"{clock_text(time_us or time.time_ns() // 1000)} " if self.debugging else ""
        for line in (clock + text).splitlines():
            gap = f"{clock}{counted(self.unlogged, 'message')} could not be logged"
            if self.unlogged and self.put(LOG_WARNING, gap):
                self.unlogged = 0
            if self.unlogged or not self.put(priority, line):
                self.unlogged += 1

    def put(self, priority: int, line: str) -> bool:
        """Write a line to stderr or syslog; returns whether that was possible."""
        try:
            if self.syslog:
                stamp = time.strftime("%b %e %H:%M:%S")
                self.syslog.sendto(f"<{LOG_DAEMON | priority}>{stamp} uvscpd[{os.getpid()}]: {line}"
                                   .encode(errors="backslashreplace"), "/dev/log")
                return True
            text = f"<{priority}>{line}\n" if self.journal else f"{line}\n"
            # With room for a byte a pipe has room for a page, which a line never fills.
            room = select.select([], [2], [], 0)[1]
            return bool(room) and os.write(2, text.encode(errors="backslashreplace")) > 0
        except (OSError, ValueError):
            return False            # write() counts it; there is nobody to tell

    error = partialmethod(write, LOG_ERR)
    warning = partialmethod(write, LOG_WARNING)
    info = partialmethod(write, LOG_INFO)

    def debug(self, text: str, time_us: int = 0) -> None:
        """Log a line of -d, with the present time of day or the one given."""
        if self.debugging:
            self.write(LOG_DEBUG, text, time_us)


log = Log()


class RateLimit:
    """Lets a message pass once per period, about this and that. Pure: time is passed in.

    >>> limit = RateLimit()
    >>> [limit.allows("events", "10.0.0.1", 60, now) for now in (5, 64, 65)]
    [True, False, True]
    """

    def __init__(self) -> None:
        self.again_at: dict[tuple[str, str], float] = {}    # by what it is about, and whom

    def allows(self, what: str, whom: str, period_s: float, now: float) -> bool:
        """Whether there was no such message in this period; from now on there was one."""
        if self.again_at.get((what, whom), 0.0) > now:
            return False
        self.again_at = {each: when for each, when in self.again_at.items() if when > now}
        if sum(each[0] == what for each in self.again_at) >= MAX_REMEMBERED:
            return False
        self.again_at[what, whom] = now + period_s
        return True


def clock_text(time_us: int) -> str:
    """The local time of day at a time given in microseconds since 1970."""
    clock = time.strftime("%H:%M:%S", time.localtime(time_us // 1000000))
    return f"{clock}.{time_us % 1000000:06d}"


def counted(number: int, thing: str) -> str:
    """A number of things, in words: `1 frame`, `2 frames`."""
    return f"{number} {thing}" + "s" * (number != 1)


def duration_text(seconds: float) -> str:
    """A duration in the two largest units.

    >>> duration_text(5), duration_text(11525), duration_text(90000)
    ('5 s', '3 h 12 min', '1 d 1 h')
    """
    parts: list[str] = []
    left = int(seconds)
    for unit, name in ((86400, "d"), (3600, "h"), (60, "min"), (1, "s")):
        if left >= unit or name == "s" and not parts:
            parts.append(f"{left // unit} {name}")
            left %= unit
    return " ".join(parts[:2])


def traceback_text(error: BaseException) -> str:
    """Where an exception comes from, the last call last; reads no file, as traceback would."""
    lines = ["Traceback (most recent call last):"]
    trace = error.__traceback__
    while trace:
        lines.append(f"  line {trace.tb_lineno}, in {trace.tb_frame.f_code.co_name}")
        trace = trace.tb_next
    return "\n".join([*lines, f"{type(error).__name__}: {error}"])


# =============================================================================
# 2. Numbers and GUIDs
# =============================================================================
# The fields of commands and events, from text to values and back.

GUID_ZERO = bytes(16)
GUID_FILLING = {"-:": b"\0", "*:": b"\xFF"}     # how a GUID begins: what stands before its bytes
UNSURE_GUID = ":: means FF in some VSCP programs and zeros in others, write *: or -: instead"


def parse_number(text: str, limit: int, what: str) -> int:
    """The value of a decimal or 0x-hexadecimal number from 0 to limit.

    Raises VscpError naming `what` otherwise.

    >>> parse_number("0x1F", 255, "type")
    31
    """
    if text.isdecimal():
        value = int(text)
    elif re.fullmatch("0[xX][0-9a-fA-F]+", text):
        value = int(text, 16)
    else:
        raise VscpError(f"{what} is not a number")
    if value > limit:
        raise VscpError(f"{what} is over {limit}")
    return value


def guid_bytes(text: str) -> bytes:
    """The bytes of a GUID, or of the beginning of one, in hexadecimal digits.

    The forms are those of the VSCP specification (Globally Unique Identifiers):

        0:1:2:3:4:5:6:7:8:9:A:B:C:D:E:F         one or two digits per byte
        FFFFFFFF-FFFF-FFFF-0102-03AABB440130    groups of bytes with two digits each
        -:1:2                                   16 bytes, zeros before those given
        *:1:2                                   16 bytes, FF before those given
        -                                       16 zeros
        {...}                                   any of these

    Bytes and groups stand between colons or dashes. Raises VscpError for all else. Among it
    are groups of 3, 5 or more digits, as it is not sure where their bytes begin; and `::1:2`,
    which one library of the VSCP project fills with FF, as the specification says, and
    another one with zeros.

    >>> guid_bytes("01-0203:4:abcd").hex(), guid_bytes("{-:1}") == bytes(15) + b"\\1"
    ('01020304abcd', True)
    """
    text = text[1:-1] if text[:1] == "{" and text[-1:] == "}" else text
    if text == "-":
        return GUID_ZERO
    if "::" in text:
        raise VscpError(UNSURE_GUID)
    filling = GUID_FILLING.get(text[:2], b"")
    groups = re.split("[:-]", text[2:] if filling else text)
    if not all(re.fullmatch("[0-9a-fA-F]|([0-9a-fA-F]{2})+", group) for group in groups):
        raise VscpError("Invalid GUID")
    given = b"".join([bytes.fromhex(group.zfill(2)) for group in groups])
    return filling * (16 - len(given)) + given


def parse_guid(text: str) -> bytes:
    """The 16 bytes of a GUID in one of the forms of guid_bytes, which must make so many.

    Raises VscpError otherwise.

    >>> parse_guid("*:1:fe").hex()
    'ffffffffffffffffffffffffffff01fe'
    """
    guid = guid_bytes(text)
    if len(guid) != 16:
        raise VscpError("Invalid GUID")
    return guid


def format_guid(guid: bytes) -> str:
    """The text of a GUID, or of the first bytes of one: upper case, no leading zeros.

    >>> format_guid(bytes(14) + bytes([1, 254]))
    '0:0:0:0:0:0:0:0:0:0:0:0:0:0:1:FE'
    """
    return ":".join(f"{byte:X}" for byte in guid)


def client_guid(base: bytes, channel_id: int) -> bytes:
    """A client's GUID: 16 given bytes as they are, 12 with the channel id and two zeros.

    >>> format_guid(client_guid(bytes([255] * 7 + [253, 10, 0, 0, 1]), 258))
    'FF:FF:FF:FF:FF:FF:FF:FD:A:0:0:1:1:2:0:0'
    """
    return base if len(base) == 16 else base + channel_id.to_bytes(2, "big") + bytes(2)


def parse_nickname(text: str) -> int:
    """The last byte of a GUID in SEND, which is all that CAN carries of it; 0 for an empty one.

    So here `::` is allowed, too, if a byte follows it: what it stands for does not count.

    >>> parse_nickname("::12:fe"), parse_nickname("-"), parse_nickname("")
    (254, 0, 0)
    """
    return parse_guid(text.replace("::", "-:", 1))[15] if text else 0


@lru_cache(maxsize=4096)
def is_guid(text: str) -> bool:
    """Whether a field of SEND is a GUID; an empty one is none."""
    try:
        return bool(text) and parse_nickname(text) >= 0
    except VscpError:
        return False


# =============================================================================
# 3. Events and CAN frames
# =============================================================================
# An event on CAN is an extended data frame. Its id (VSCP specification, Level I
# on CAN):
#
#     bits  28-26      25           24-16   15-8   7-0
#           priority   hard_coded   class   type   nickname of the sender
#
# As text (VSCP daemon, TCP/IP interface):
#
#     head,class,type,obid,datetime,timestamp,GUID,data0,data1,...
#
# so head = (can_id >> 21) & 0xF0. The texts of ids and bytes are kept in tables, which
# halves the time that SEND and an event line take.

# linux/can.h
EFF_FLAG = 0x80000000           # in the can_id: extended frame, 29-bit id
RTR_FLAG = 0x40000000           # remote request
ERR_FLAG = 0x20000000           # error frame, the id is a set of error classes
EFF_MASK = 0x1FFFFFFF
EXTENDED = EFF_FLAG >> 29       # can_id >> 29 of an extended data frame: EFF set, RTR and ERR clear
FRAME = struct.Struct("=IB3x8s")            # struct can_frame: can_id, length, data
FRAME_SIZE, unpack_frame = FRAME.size, FRAME.unpack

if TYPE_CHECKING:
    # A frame that has been on the bus: the CAN id (29 bits, without flags), 0-8 bytes of
    # data, when the kernel received it (seconds since 1970 and nanoseconds), and which client
    # sent it, None for a node. A tuple, as its fields are used by place in the hot loops:
    # frame[0] is the id, frame[4] the sender.
    Frame = tuple[int, bytes, int, int, "Client | Discovery | None"]

MAX_ID_TEXTS = 1024             # CAN ids whose texts are kept for those who see the same GUID


def pack_id(head: int, vscp_class: int, vscp_type: int, nickname: int) -> int:
    """The CAN id of these fields, each cut to the bits that it has there."""
    return (head & 0xF0) << 21 | (vscp_class & 0x1FF) << 16 | (vscp_type & 0xFF) << 8 | nickname


def pack_frame(can_id: int, data: bytes) -> bytes:
    """The 16 bytes of struct can_frame (linux/can.h) of an extended data frame."""
    return FRAME.pack(can_id | EFF_FLAG, len(data), data)


BYTE_TEXT = [f",{byte}" for byte in range(256)]
BYTE_VALUE = {text[1:]: byte for byte, text in enumerate(BYTE_TEXT)}
byte_text, byte_value = BYTE_TEXT.__getitem__, BYTE_VALUE.__getitem__       # for map()


@lru_cache(maxsize=4096)
def parse_id(head: str, vscp_class: str, vscp_type: str, guid: str) -> "tuple[int, bool]":
    """The CAN id that four fields of an event make, and whether it mirrors Level I.

    Newer clients give heads of 16 bits, of which CAN carries bits 7-4. The
    nickname is the last byte of the GUID (VSCP specification; the C uvscpd
    always sends 0).

    >>> parse_id("96", "20", "3", "-") == (0x0C140300, False)
    True
    """
    number = parse_number(vscp_class, 1023, "class")
    can_id = pack_id(parse_number(head, 0xFFFF, "head"), number,
                     parse_number(vscp_type, 255, "type"), parse_nickname(guid))
    return can_id, number > 511


def with_datetime(fields: "list[str]") -> "list[str]":
    """The fields of an event, with an empty datetime if that has been left out.

    VSCP's C and Perl programs before 2016 and its Python packages of 2026 write
    `head,class,type,obid,timestamp,GUID,data...`: the sixth field is a GUID, and the
    seventh, if there is one, is none. Without data the seventh is missing or, for a comma
    at the end, empty.

    >>> with_datetime("96,20,3,0,4711,-,7".split(","))
    ['96', '20', '3', '0', '', '4711', '-', '7']
    """
    sixth, seventh = (*fields[5:7], "", "")[:2]
    if is_guid(seventh) or not is_guid(sixth):
        return fields
    return [*fields[:4], "", *fields[4:]]


def parse_event(text: str) -> "tuple[int, bytes, bytes]":
    """The CAN id (29 bits) and the data (0-8 bytes) of an event that a client sends.

    And the GUID of the interface that it is meant for: the first 16 data bytes of a
    class from 512 on, which is a Level I event mirrored as Level II; else empty.
    obid, datetime and timestamp are ignored, as CAN carries none of them, and datetime
    may be left out. A comma at the end is no data byte: VSCP's Arduino client ends
    events without data so. Raises VscpError when a field is missing, malformed or out of
    range.

    >>> can_id, data, _ = parse_event("96,20,3,0,,0,-,0,1,0x23")
    >>> f"{can_id:08X}#{data.hex()}"
    '0C140300#000123'
    """
    fields = text.split(",")
    if len(fields) < 8:                     # no data, or one byte without datetime
        fields = with_datetime(fields)
    if len(fields) < 7:
        raise VscpError("an event is head,class,type,obid,datetime,timestamp,GUID,data...")
    if not fields[-1] and len(fields) > 7:
        del fields[-1]
    try:
        can_id, mirrored = parse_id(fields[0], fields[1], fields[2], fields[6])
    except VscpError:
        fields = with_datetime(fields)
        can_id, mirrored = parse_id(fields[0], fields[1], fields[2], fields[6])
    try:
        data = bytes(map(byte_value, fields[7:]))
    except KeyError:
        data = bytes([parse_number(field, 255, "data byte") for field in fields[7:]])
    interface = b""
    if mirrored:
        interface, data = data[:16], data[16:]
        if len(interface) < 16:
            raise VscpError("class 512-1023 needs the interface's GUID in 16 data bytes")
    if len(data) > 8:
        raise VscpError("too many data bytes")
    return can_id, data, interface


@lru_cache(maxsize=8)
def utc_text(seconds: int) -> str:
    """The UTC date and time, without a zone letter, of seconds since 1970."""
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))


class EventLines:
    """Makes the event lines of clients that see the same GUID.

    `guid` is the text of its first 15 bytes. The date ends in Z, without which
    node-vscp-tcp takes it for local time. The timestamp is the lower 32 bits of
    microseconds since 1970. With `in_ns` lines are as the VSCP project's programs write
    them since 2026: bit 8 of the head set, no date, 64 bits of nanoseconds.

    >>> frame = (0x0C140305, bytes([0, 1, 35]), 1795390139, 810025000, None)
    >>> EventLines(format_guid(bytes(15))).of([frame])[0]
    ['96,20,3,0,2026-11-22T23:28:59Z,3615768809,0:0:0:0:0:0:0:0:0:0:0:0:0:0:0:5,0,1,35\\r\\n']
    >>> EventLines(format_guid(bytes(15)), in_ns=True).of([frame])[0]
    ['352,20,3,0,,1795390139810025000,0:0:0:0:0:0:0:0:0:0:0:0:0:0:0:5,0,1,35\\r\\n']
    """

    def __init__(self, guid: str, in_ns: bool = False) -> None:
        self.guid = guid
        self.in_ns = in_ns
        # By CAN id: the fields before the date, and the GUID.
        self.id_texts: dict[int, tuple[str, str]] = {}
        self.second = -1                # of the last frame ...
        self.date = ""                  # ... as text, ...
        self.date_us = 0                # ... and as the timestamp of its beginning

    def add_id(self, can_id: int) -> "tuple[str, str]":
        """Make the texts of a CAN id, and keep them."""
        if len(self.id_texts) >= MAX_ID_TEXTS:
            self.id_texts.clear()
        head = can_id >> 21 & 0xF0 | self.in_ns << 8
        texts = (f"{head},{can_id >> 16 & 0x1FF},{can_id >> 8 & 0xFF},0,",
                 f",{self.guid}:{can_id & 0xFF:X}")
        self.id_texts[can_id] = texts
        return texts

    def start_second(self, seconds: int) -> "tuple[str, int]":
        """Make what all lines of a second share: the date, and the timestamp of its beginning."""
        self.second = seconds
        self.date = "," if self.in_ns else utc_text(seconds) + "Z,"
        self.date_us = seconds * 1000000 & 0xFFFFFFFF
        return self.date, self.date_us

    def of(self, frames: "Iterable[Frame]") -> "tuple[list[str], bytes, int]":
        """The event line of each frame, all of them as one block, and their bytes on CAN."""
        # This runs for every frame. The usual lengths of data are written out: joining takes 7 us
        # more, of the 90 that a frame takes under load.
        lines: list[str] = []
        size = 0
        id_texts, text, in_ns = self.id_texts, BYTE_TEXT, self.in_ns
        second, date, date_us = self.second, self.date, self.date_us
        for can_id, data, seconds, nanoseconds, sender in frames:
            try:
                start, end = id_texts[can_id]
            except KeyError:
                start, end = self.add_id(can_id)
            if sender and sender.channel_id:
                start = f"{start[:-2]}{sender.channel_id},"
            if seconds != second:
                second = seconds
                date, date_us = self.start_second(seconds)
            stamp = (seconds * 1000000000 + nanoseconds if in_ns
                     else date_us + nanoseconds // 1000 & 0xFFFFFFFF)
            length = len(data)
            size += length
            if length == 8:
                a, b, c, d, e, f, g, h = data
                line = (f"{start}{date}{stamp}{end}{text[a]}{text[b]}{text[c]}{text[d]}"
                        f"{text[e]}{text[f]}{text[g]}{text[h]}\r\n")
            elif length == 3:
                a, b, c = data
                line = f"{start}{date}{stamp}{end}{text[a]}{text[b]}{text[c]}\r\n"
            elif length == 4:
                a, b, c, d = data
                line = f"{start}{date}{stamp}{end}{text[a]}{text[b]}{text[c]}{text[d]}\r\n"
            elif length == 5:
                a, b, c, d, e = data
                line = f"{start}{date}{stamp}{end}{text[a]}{text[b]}{text[c]}{text[d]}{text[e]}\r\n"
            elif length == 2:
                a, b = data
                line = f"{start}{date}{stamp}{end}{text[a]}{text[b]}\r\n"
            else:
                line = f"{start}{date}{stamp}{end}{''.join(map(byte_text, data))}\r\n"
            lines.append(line)
        return lines, "".join(lines).encode(), size + 4 * len(lines)  # on CAN an id has 4 bytes


# =============================================================================
# 4. Filters
# =============================================================================
# A client's filter and mask are four fields of text; all that matters of them
# on CAN is one comparison of the id: a frame passes when can_id & mask == value.

FILTER = struct.Struct("=II")               # struct can_filter: can_id, mask
MAX_FILTERS = 512               # CAN_RAW_FILTER_MAX

if TYPE_CHECKING:
    # A filter or a mask as a client gives it: priority (0-255), class and type (0-0xFFFF),
    # and the 16 bytes of a GUID.
    Filter = tuple[int, int, int, bytes]
    # What decides how a client sees a frame: the first 15 bytes of the GUID, as text, and
    # the value and the mask of the comparison. Clients with equal views get equal lines.
    View = tuple[str, int, int]

FILTER_ALL = (0, 0, 0, GUID_ZERO)


def parse_filter(text: str, what: str) -> "Filter":
    """The filter or mask `priority,class,type,GUID`; `what` is the word for it.

    A fifth field, the number of a filter, is not used: a client has one. The GUID may be
    empty. Raises VscpError when it is not one. Real clients give masks of 0xFFFF for the
    type, too.

    >>> parse_filter("0,0x1FF,0,-", "mask")[:3]
    (0, 511, 0)
    """
    try:
        fields = text.split(",")
        if len(fields) == 5:
            parse_number(fields.pop(), sys.maxsize, "filter number")
        priority, vscp_class, vscp_type, guid = fields
        return (parse_number(priority, 0xFF, "priority"), parse_number(vscp_class, 0xFFFF, "class"),
                parse_number(vscp_type, 0xFFFF, "type"), parse_guid(guid or "-"))
    except (ValueError, VscpError):
        raise VscpError(f"format error in {what} frame"
                        + f": {UNSURE_GUID}" * ("::" in text)) from None


def make_view(wanted: "Filter", mask: "Filter", guid: bytes) -> "View":
    """The view of a client with the filter `wanted` and this mask, to which events show this GUID.

    The GUID compared is the event's as the client sees it: this one with the
    nickname as the last byte. A filter class of 512-1023 means the Level I class
    512 lower, as events from CAN have no other. A filter that no frame can match
    (class mask 0xFFFF and filter 2000, say) becomes mask 0, value 1: nothing passes.

    >>> _, value, mask = make_view((0, 20, 0, GUID_ZERO), (0, 0xFFFF, 0, GUID_ZERO), GUID_ZERO)
    >>> f"{value:08X} {mask:08X}"
    '00140000 01FF0000'
    """
    guid_text = format_guid(guid[:15])
    priority, vscp_class, vscp_type, wanted_guid = wanted
    priority_mask, class_mask, type_mask, guid_mask = mask
    if 512 <= vscp_class <= 1023:
        vscp_class -= 512
    same_guid = all((ours ^ theirs) & bits == 0
                    for ours, theirs, bits in zip(guid[:15], wanted_guid, guid_mask))
    if (not same_guid or priority & priority_mask > 7
            or vscp_class & class_mask > 0x1FF or vscp_type & type_mask > 0xFF):
        return guid_text, 1, 0
    bits = pack_id(priority_mask << 5, class_mask, type_mask, guid_mask[15])
    value = pack_id(priority << 5, vscp_class, vscp_type, wanted_guid[15])
    return guid_text, value & bits, bits


def matching(frames: "list[Frame]", value: int, mask: int) -> "list[Frame]":
    """The frames that pass a filter."""
    return [frame for frame in frames if frame[0] & mask == value]


def pack_filters(filters: "Iterable[tuple[int, int]]") -> bytes:
    """The CAN_RAW_FILTER option: an array of struct can_filter, the union of these filters.

    Takes pairs of value and mask as in View. Only extended data frames pass.
    More filters than the kernel takes become one that lets all of them pass.
    """
    pairs = {(value, mask) for value, mask in filters if value & mask == value}
    if (0, 0) in pairs or len(pairs) > MAX_FILTERS:
        pairs = {(0, 0)}
    kind = EFF_FLAG | RTR_FLAG
    return b"".join(FILTER.pack(value | EFF_FLAG, mask | kind) for value, mask in sorted(pairs))


# =============================================================================
# 5. Addresses and users
# =============================================================================
# Who may connect, who may log in, and who has to wait. Pure: time is passed in.

MAX_PRIVILEGE = 15
LOGIN_S = 30.0                  # for clients that may do nothing before they log in
WRONG_LOGIN_S = 0.5             # a wrong log-in is answered after this time; until then, other
                                # log-ins from its place wait
MAX_WRONG_LOGINS = 5            # then the connection is closed
MAX_BLOCKED = 1000              # places of wrong log-ins to remember
EVERYWHERE = ("::", "0.0.0.0")  # what a socket for all addresses is bound to


def plain_address(address: str) -> str:
    """An address without its zone; an IPv4-mapped IPv6 address as plain IPv4."""
    address = address.partition("%")[0]
    return address[7:] if address.startswith("::ffff:") and "." in address else address


def place_of(host: str) -> bytes:
    """What counts as one place: an IPv4 address, or the first 64 bits of an IPv6 address."""
    if ":" in host:
        return socket.inet_pton(socket.AF_INET6, host)[:8]
    return socket.inet_aton(host)


def parse_pattern(text: str) -> "Callable[[str], bool]":
    """A predicate: is an address in this network, or does it match this pattern (`*`: anything)?

    Raises VscpError when the text is neither.

    >>> parse_pattern("192.168.1.*")("192.168.1.8"), parse_pattern("fe80::/10")("::1")
    (True, False)
    """
    import fnmatch
    import ipaddress
    byte, word = r"(\*|25[0-5]|2[0-4][0-9]|1?[0-9]{1,2})", r"(\*|[0-9a-f]{0,4})"
    pattern = re.sub(r"\b0+(?=[0-9a-f])", "", text.lower())      # as ipaddress prints them

    def is_like(host: str) -> bool:
        address = ipaddress.ip_address(host)
        fields = address.exploded.split(":")
        # IPv6 with `::` for zeros, and without.
        return any(fnmatch.fnmatchcase(form, pattern) for form in
                   (str(address), ":".join([field.lstrip("0") or "0" for field in fields])))

    if "*" in text and re.fullmatch(rf"{byte}(\.{byte}){{0,3}}|{word}(:{word}){{0,7}}", pattern):
        return is_like
    try:
        if "%" in text:
            raise ValueError        # Python before 3.9 does not know zones
        network = ipaddress.ip_network(text, strict=False)
    except ValueError:
        raise VscpError(
            f"'{text}' is not an address, network or pattern") from None
    if network.version == 6 and network.prefixlen >= 96 and network.network_address.ipv4_mapped:
        # An IPv4 client is known by its IPv4 address, whichever way it connects.
        network = ipaddress.ip_network(
            f"{network.network_address.ipv4_mapped}/{network.prefixlen - 96}")
    return lambda host: ipaddress.ip_address(host) in network


def allowed(host: str, patterns: "list[Callable[[str], bool]]") -> bool:
    """Whether an address matches one of the patterns; without patterns, any address does."""
    return not patterns or any(matches(host) for matches in patterns)


# Who may log in. digest: the SHA-256 of NAME:PASSWORD. privilege: 0-15. hosts: patterns of the
# addresses to come from, none for any.
User = namedtuple("User", "name digest privilege hosts")


def password_digest(name: str, password: str) -> bytes:
    """The SHA-256 of NAME:PASSWORD; a password `sha256:HEX` is that itself.

    >>> password_digest("panel", "secret").hex()[:8]
    'e554505b'
    """
    if password[:7].lower() == "sha256:":
        if not re.fullmatch("[0-9a-fA-F]{64}", password[7:]):
            raise VscpError("sha256: needs 64 hexadecimal digits")
        return bytes.fromhex(password[7:])
    return login_digest(name, password)


def login_digest(name: str, password: str) -> bytes:
    """The SHA-256 of NAME:PASSWORD as a client gives them, whatever the password looks like."""
    from hashlib import sha256  # as late as this: few need it, and it takes long
    return sha256(f"{name}:{password}".encode("ascii")).digest()


class Logins:
    """Who may log in, and who has to wait: one wrong log-in blocks its place for half a second."""

    def __init__(self, users: "dict[str, User]", guest: int, password_needed: bool = True) -> None:
        self.users = users                      # by name; "" is -P without -U: any name will do
        self.guest = User("", b"", guest, [])   # who a client is until it has logged in
        self.password_needed = password_needed  # else the name is enough (-U without -P)
        self.blocked: dict[bytes, float] = {}   # until when nobody may log in from a place

    def check(self, name: str, password: str, host: str, now: float) -> "User | None":
        """The user, if name, password and address are right; a wrong name takes as long.

        Raises Later as long as the place is blocked.
        """
        from hmac import compare_digest
        until = self.blocked.get(place_of(host), 0.0)
        if until > now:
            raise Later(until)
        user = self.users.get(name)
        right = compare_digest(login_digest(name, password), user.digest if user else bytes(32))
        if user and right and allowed(host, user.hosts):
            return user
        self.block(place_of(host), now)
        return None

    def block(self, place: bytes, now: float) -> None:
        """For half a second nobody can log in from this place, on any connection."""
        self.blocked = {each: until for each, until in self.blocked.items() if until > now}
        if len(self.blocked) < MAX_BLOCKED:
            self.blocked[place] = now + WRONG_LOGIN_S


# =============================================================================
# 6. Network interfaces
# =============================================================================
# What the kernel says of them by rtnetlink: is the interface there, and CAN, and up;
# its bit rate, the state of its controller, its queue.

# A network interface as the kernel tells it (rtnetlink(7); linux/if_link.h, linux/can/netlink.h).
# What it does not say is None: a vcan has neither bit rate nor state.
Link = namedtuple("Link", "names index is_can up carrier bitrate state listen_only qdisc kind")
UNKNOWN = Link((), *[None] * (len(Link._fields) - 1))

RTM_NEWLINK, RTM_DELLINK, RTM_GETLINK, NLMSG_ERROR = 16, 17, 18, 2
RTMGRP_LINK = 1
NLMSG = struct.Struct("=IHHII")         # struct nlmsghdr: size, type, flags, number, port
IFINFO = struct.Struct("=BxHiI4x")      # struct ifinfomsg: family, hardware type, index, flags
NLATTR = struct.Struct("=HH")           # struct nlattr: size and number, then the value
IFLA_IFNAME, IFLA_QDISC, IFLA_LINKINFO, IFLA_CARRIER = 3, 6, 18, 33
IFLA_PROP_LIST, IFLA_ALT_IFNAME = 52, 53
INFO_KIND, INFO_DATA = 1, 2             # in IFLA_LINKINFO
CAN_BITTIMING, CAN_STATE, CAN_CTRLMODE = 1, 4, 5            # in INFO_DATA
ARPHRD_CAN, IFF_UP, CTRLMODE_LISTENONLY = 280, 0x1, 0x2
CAN_HARDWARE = struct.pack("=H", ARPHRD_CAN)        # in a struct ifinfomsg, at 2
SIOCGIFFLAGS = 0x8913                   # linux/sockios.h
NETLINK_SIZE = 65536                    # bytes; 600 to 1,600 are usual for one interface
MESSAGES_PER_TURN = 1000                # read before clients are served again


def link_question(name: str, number: int) -> bytes:
    """The message that asks for an interface by its name, an alternative one as well."""
    attribute = NLATTR.pack(NLATTR.size + 16, IFLA_IFNAME) + name.encode().ljust(16, b"\0")
    size = NLMSG.size + IFINFO.size + len(attribute)
    return (NLMSG.pack(size, RTM_GETLINK, 1, number, 0)     # 1: NLM_F_REQUEST
            + IFINFO.pack(0, 0, 0, 0) + attribute)


def attributes(data: bytes) -> "Iterable[tuple[int, bytes]]":
    """The attributes (struct nlattr) in some bytes: the number and the value of each.

    >>> list(attributes(NLATTR.pack(6, 3) + b"hi\\0\\0" + NLATTR.pack(4, 7)))
    [(3, b'hi'), (7, b'')]
    """
    place = 0
    while place + NLATTR.size <= len(data):
        size, number = NLATTR.unpack_from(data, place)
        if size < NLATTR.size:
            break
        yield number & 0x3FFF, data[place + NLATTR.size:place + size]   # without NLA_F_NESTED
        place += size + 3 & ~3


def parse_link(body: bytes) -> Link:
    """What a RTM_NEWLINK or RTM_DELLINK message says after its struct nlmsghdr.

    Raises struct.error when it is shorter than a struct ifinfomsg.
    """
    _family, hardware, index, flags = IFINFO.unpack_from(body)
    link = dict(attributes(body[IFINFO.size:]))
    info = dict(attributes(link.get(IFLA_LINKINFO, b"")))
    kind = info.get(INFO_KIND, b"").rstrip(b"\0").decode("latin-1")
    can = dict(attributes(info.get(INFO_DATA, b""))) if kind == "can" else {}
    names = [link.get(IFLA_IFNAME, b"")] + [
        value for number, value in attributes(link.get(IFLA_PROP_LIST, b""))
        if number == IFLA_ALT_IFNAME]
    bitrate, state, modes = (int.from_bytes(can[number][place:place + 4], sys.byteorder)
                             if number in can else None for number, place in
                             ((CAN_BITTIMING, 0), (CAN_STATE, 0), (CAN_CTRLMODE, 4)))
    return Link(
        tuple(name.rstrip(b"\0").decode("latin-1") for name in names), index,
        hardware == ARPHRD_CAN, bool(flags & IFF_UP), link.get(IFLA_CARRIER) != b"\0", bitrate,
        state, bool((modes or 0) & CTRLMODE_LISTENONLY),
        link.get(IFLA_QDISC, b"").rstrip(b"\0").decode("latin-1"), kind)


def parse_message(kind: int, body: bytes) -> "tuple[bool, Link] | None":
    """Whether an interface is there, and all about it, from a message of this type.

    None if it is about something else, or an error other than ENODEV.
    """
    if kind in (RTM_NEWLINK, RTM_DELLINK) and len(body) >= IFINFO.size:
        return kind == RTM_NEWLINK, parse_link(body)
    if kind == NLMSG_ERROR and struct.unpack_from("=i", body.ljust(4, b"\0"))[0] == -errno.ENODEV:
        return False, UNKNOWN
    return None


def link_by_ioctl(name: str) -> "tuple[bool, Link] | None":
    """The little that can be had without rtnetlink: is it there, and is it up? None: no answer."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            request = struct.pack("16s24x", name.encode())      # struct ifreq
            flags, = struct.unpack_from("=H", fcntl.ioctl(sock, SIOCGIFFLAGS, request), 16)
    except OSError as error:
        return (False, UNKNOWN) if error.errno == errno.ENODEV else None
    return True, UNKNOWN._replace(up=bool(flags & IFF_UP))


class Netlink:
    """Asks the kernel about one network interface, and hears what it tells of all.

    Answers and announcements arrive on one socket, which is bound to the group of links. A
    question waits for the kernel's lock on network interfaces, which any adapter that
    hangs may hold, or for the adapter itself; so it is sent by a thread that does nothing
    else. Measured on Linux 7.3: asked by the loop, it stood still for 4 s and for 12 s; by
    the thread, for 0.05 s at most.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.number = 0                     # of the last question
        self.asked = False                  # it has not been answered
        self.sending = False                # a thread runs
        self.refusal: PermissionError | None = None     # the kernel takes no questions (SELinux)
        self.outdated = False               # its answer may be older than what happened since
        self.sock: socket.socket | None = None      # None: it cannot be used here
        try:
            self.sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
            self.sock.bind((0, RTMGRP_LINK))
            self.sock.setblocking(False)
            self.port = self.sock.getsockname()[0]
        except OSError as error:
            self.give_up(error)

    def give_up(self, error: Exception) -> None:
        """Do without: what the kernel does not say is found out by trying."""
        log.debug(f"{self.name}: rtnetlink cannot be used: {error}")
        self.close()

    def close(self) -> None:
        """The selector must have forgotten the socket."""
        # If a thread runs while Python shuts down, Python 3.11 may crash.
        for _ in range(100):
            if not self.sending:
                break
            time.sleep(0.002)
        if self.sock is not None:
            self.sock.close()
            self.sock = None

    def ask(self) -> None:
        """Send a question, unless one is under way; read() gets the answer."""
        if self.sock is None or self.asked:
            return
        self.number += 1
        self.asked, self.outdated, self.sending = True, False, True
        try:
            _thread.start_new_thread(self.send, (self.sock, link_question(self.name, self.number)))
        except RuntimeError as error:       # no thread can be had; the next tick asks again
            log.debug(f"{self.name}: {error}")
            self.asked = self.sending = False

    def send(self, sock: socket.socket, question: bytes) -> None:
        """Send a question, in a thread of its own."""
        try:
            sock.send(question)
        except OSError as error:
            if isinstance(error, PermissionError):
                self.refusal = error
            self.asked = False              # the next tick asks again
        self.sending = False

    def outdate(self) -> None:
        """Something happened: an answer that is under way does not count."""
        self.outdated = True

    def read(self) -> "list[tuple[bool, Link]]":
        """What has come: whether the interface is there, and all about it.

        Interfaces that are not CAN appear only as the answer to our question. One without
        names means that there is no such interface.
        """
        found: list[tuple[bool, Link]] = []
        if self.sock is None:
            return found
        overrun = False
        for _ in range(MESSAGES_PER_TURN):
            try:
                data = self.sock.recv(NETLINK_SIZE)
            except BlockingIOError:
                break
            except OSError:                 # ENOBUFS: some found no room, maybe an answer
                overrun = True
                continue
            found += self.parse(data)
        if overrun:             # not earlier: until all is read, the kernel drops answers, too
            self.asked = False
            self.ask()
        return found

    def parse(self, data: bytes) -> "list[tuple[bool, Link]]":
        """What the messages in a datagram say, as read() returns it."""
        found: list[tuple[bool, Link]] = []
        while len(data) >= NLMSG.size:
            size, kind, _flags, number, port = NLMSG.unpack_from(data)
            body = data[NLMSG.size:size]
            answers = port == self.port and number == self.number
            self.asked = self.asked and not answers
            # Of other interfaces no more is looked at: parsing takes 400 us.
            counts = not self.outdated if answers else body[2:4] == CAN_HARDWARE
            message = parse_message(kind, body) if counts else None
            found += [message] if message else []
            data = data[max(NLMSG.size, size + 3 & ~3):]
        return found


# =============================================================================
# 7. Bus
# =============================================================================
# Sends and receives frames, and knows how the bus is doing. Knows clients only as
# senders of frames. What the system reports (OSError) becomes advice here.

# Linux, from linux/can/raw.h and asm-generic/socket.h; Python does not name them.
CAN_RAW_ERR_FILTER = 2
SO_RCVBUFFORCE = 33
SO_TIMESTAMPNS_OLD = 35         # two C longs
SO_TIMESTAMPNS_NEW = 64         # two 64-bit integers, whatever the word size (Linux 5.1)
LENGTH_AT = 4                   # where struct can_frame has the number of data bytes
ANCILLARY_SIZE = 64             # bytes; a timestamp needs 32
SO_MEMINFO = 55                 # nine 32-bit numbers, the last: frames dropped (Linux 4.12)
MSG_CONFIRM = 0x800             # recvmsg: a frame of this socket has been sent

RECEIVE_BUFFER = 2 << 20        # bytes of kernel buffer to ask for; the kernel doubles it
FRAME_COST = 960                # bytes of it that a frame takes at most
FRAME_BITS = 131                # of an extended frame with 8 data bytes, with the gap after it
BIT_RATE = 125000               # of VSCP nodes
# Queues that report when they have no room; others drop frames silently.
HONEST_QUEUES = ("noqueue", "noop", "pfifo_fast", "pfifo", "bfifo", "mq")
START_WAIT_S = 0.5              # for the kernel's first answer about the interface
START_S = 10.0                  # so long after the start a missing interface is no trouble yet
NO_ERRORS_S = 10.0              # where the driver reports no state: so long without error frames,
                                # the trouble is over
FRAMES_IN_KERNEL = 8000         # more frames than fit into it: reading this many empties it
SEND_RETRY_S = 0.01             # how soon to try again where poll cannot tell
MAX_UNDER_WAY = 1000            # own frames that have not come back
MAX_OVERTAKEN = 64              # places by which a controller with several mailboxes mixes them

# The first four are the kernel's (enum can_state). UNUSABLE: no usable interface.
WELL, WARNING, PASSIVE, BUS_OFF, UNUSABLE = range(5)
CAN_STATES = ["error active", "error warning", "error passive", "bus off", "stopped", "sleeping"]


# How the bus is doing, as INFO answers it. status: WELL to UNUSABLE. code: error classes of
# linux/can/error.h; UNUSABLE: an errno. subcode: state of the controller, data[1] of an error
# frame. advice: what helps, a command to type where there is one.
BusState = namedtuple("BusState", "status code subcode text advice")
BUS_WELL = BusState(WELL, 0, 0, "OK", "")


def state_text(state: BusState) -> str:
    """What is wrong with the bus and what helps, for a person."""
    return f"{state.text}, try: {state.advice}" if state.advice else str(state.text)


ERR_TX_TIMEOUT = 0x001          # error classes
ERR_CRTL = 0x004                # state of the controller, in data[1]
ERR_ACK = 0x020
ERR_BUSOFF = 0x040
ERR_RESTARTED = 0x100
CRTL_RX_OVERFLOW = 0x01         # data[1] of ERR_CRTL

ACTIVE = (ERR_CRTL, 0x40, WELL, "OK", "active")

# What error frames mean (linux/can/error.h): error class, bit of data[1] (0: any), the status of
# the bus (None: it stays), what INFO says of it, what -d says. The first row with a status counts.
ERRORS = (
    (ERR_BUSOFF, 0, BUS_OFF, "bus off", "bus off"),
    (ERR_RESTARTED, 0, WELL, "OK", "restarted"),
    (ERR_CRTL, 0x10, PASSIVE, "error passive", "receive passive"),      # more than 127 errors
    (ERR_CRTL, 0x20, PASSIVE, "error passive", "transmit passive"),
    (ERR_CRTL, 0x04, WARNING, "error warning", "receive warning"),      # more than 96
    (ERR_CRTL, 0x08, WARNING, "error warning", "transmit warning"),
    ACTIVE,
    (ERR_CRTL, CRTL_RX_OVERFLOW, None, "", "receive overflow"),
    (ERR_CRTL, 0x02, None, "", "transmit overflow"),
    (ERR_ACK, 0, WARNING, "nobody acknowledges", "nobody acknowledges"),
    (ERR_TX_TIMEOUT, 0, WARNING, "transmit timeout", "transmit timeout"),
    (0x002, 0, None, "", "lost arbitration"),
    (0x008, 0, None, "", "protocol violation"),
    (0x010, 0, None, "", "transceiver"),
    (0x080, 0, None, "", "bus error"),
)
STATUS_ERRORS = sum({row[0] for row in ERRORS if row[2] is not None})   # asked of the kernel
KNOWN_ERRORS = sum({row[0] for row in ERRORS})
UNTOLD_ERRORS = ERR_ACK | ERR_TX_TIMEOUT        # what the kernel's own state does not show
NO_SUPPORT = (errno.EAFNOSUPPORT, errno.EPROTONOSUPPORT, errno.EPFNOSUPPORT)     # of CAN
ERR_COUNTERS = 0x200            # data[6] and [7] are the error counters, sending and receiving


def errors_in(can_id: int, data: bytes) -> "list[tuple[int, int, int | None, str, str]]":
    """The rows of ERRORS that are in an error frame."""
    controller = data[1] if len(data) > 1 else 0
    return [row for row in ERRORS if can_id & row[0] and (not row[1] or controller & row[1])]


def status_of(link: Link) -> "int | None":
    """What the kernel says of the bus: a status, None if it does not know."""
    if link.up is False:
        return UNUSABLE
    if link.carrier is False:
        return BUS_OFF
    return link.state if link.state in (WELL, WARNING, PASSIVE, BUS_OFF) else None


def listen_only_text(name: str) -> str:
    """What is wrong with an interface that only listens, and what helps."""
    return (f"{name} is in listen-only mode, try: ip link set {name} down && "
            f"ip link set {name} type can listen-only off && ip link set {name} up")


def remarks_on(name: str, link: Link, buffer_size: int) -> "list[tuple[int, str]]":
    """What an operator wants to know of an interface that can be used: priorities and texts.

    `buffer_size`: of the socket's receive buffer, as the kernel counts it.
    """
    remarks = []
    if link.kind:
        words = ["up", link.kind]
        if link.bitrate:
            words.append(f"{link.bitrate} bit/s")
        if link.state is not None:
            words += CAN_STATES[link.state:][:1]
        differs = link.bitrate not in (None, BIT_RATE)
        remarks.append((LOG_INFO, f"{name}: {', '.join(words)}"
                        + f"; VSCP nodes speak {BIT_RATE}" * differs))
    if link.listen_only:
        remarks.append((LOG_WARNING, listen_only_text(name)))
    if link.qdisc and link.qdisc not in HONEST_QUEUES:
        remarks.append((LOG_WARNING, f"{name}: the queue {link.qdisc} may drop frames silently, "
                        f"try: tc qdisc replace dev {name} root pfifo_fast"))
    frames, full_bus = buffer_size // FRAME_COST, (link.bitrate or 0) / FRAME_BITS
    if frames < full_bus:
        remarks.append((LOG_INFO, f"{name}: the kernel buffers {frames} frames for us, "
                        f"{frames / full_bus:.1f} s of a full bus, try: "
                        f"sysctl net.core.rmem_max={RECEIVE_BUFFER}, and start uvscpd again"))
    return remarks


def stamped_frame_unpackers(option: int) -> "list[Callable[[bytes], tuple[int, bytes, int, int]]]":
    """Functions that unpack a struct can_frame and what this option gives after it, the time.

    They return the CAN id with its flags, the data, seconds and nanoseconds. There is one
    for each number of data bytes: to cut the data after unpacking takes 2 us more, of the 90
    that a frame takes under load.
    """
    begin, time_fields = ("@", "ll") if option == SO_TIMESTAMPNS_OLD else ("=", "qq")
    return [struct.Struct(f"{begin}I4x{length}s{8 - length}x{time_fields}").unpack_from
            for length in range(9)]


class OwnFrames:
    """Frames that were sent and have not come back from the bus: who sent them.

    They come back, confirmed, in the order in which they were sent, unless a
    controller with several mailboxes lets some overtake others. Some never come back:
    the receive buffer was full, the interface went away, the controller is in one-shot mode.
    """

    def __init__(self) -> None:
        # CAN id, data, sender and number of each, the oldest first. The numbers tell how many
        # later frames have overtaken one; after MAX_OVERTAKEN it counts as lost.
        self.frames: deque[tuple[int, bytes, Client | Discovery, int]] = deque(maxlen=MAX_UNDER_WAY)
        self.next_number = 1

    def add(self, can_id: int, data: bytes, sender: "Client | Discovery") -> None:
        """Note a frame that was sent."""
        self.frames.append((can_id, data, sender, self.next_number))
        self.next_number += 1

    def claim(self, can_id: int, data: bytes) -> "Client | Discovery | None":
        """Who sent a frame that came back; None: nobody knows.

        Of equal frames the newest is claimed, so one that never comes back is not
        mistaken for a later one of another sender. Frames far older than one that came
        back are forgotten.
        """
        if len(self.frames) == 1 and self.frames[0][:2] == (can_id, data):      # nearly always
            return self.frames.pop()[2]
        equal = [place for place, own in enumerate(self.frames)
                 if own[1] == data and own[0] == can_id]
        if not equal:
            return None
        sender, oldest = self.frames[equal[-1]][2], self.frames[equal[0]][3]
        del self.frames[equal[-1]]
        self.forget(oldest - MAX_OVERTAKEN)
        return sender

    def forget(self, before: int) -> None:
        """Forget those with lower numbers than this: they will not come back."""
        while self.frames and self.frames[0][3] < before:
            self.frames.popleft()

    def keep(self, passes: "Callable[[int], bool]") -> None:
        """Forget those whose CAN id does not pass the kernel's filter any more."""
        kept = [own for own in self.frames if passes(own[0])]
        self.frames.clear()
        self.frames.extend(kept)


class Health:
    """How the bus is doing: who says what about it, who is believed, and what is logged.

    Where the driver has a state of the controller, the kernel's word is the truth. Error
    frames are quicker than the answer to a question, and all there is where the driver has no
    state (vcan, for one); then a trouble ends when a frame gets through and no error
    frame came for ten seconds. That nobody acknowledges only error frames tell, until a
    frame gets through.
    """

    def __init__(self, name: str) -> None:
        self.name = name                    # of the interface, as the user calls it
        self.link = UNKNOWN                 # the interface, as last told
        self.state = self.logged_state = BUS_WELL
        self.worst_state = BUS_WELL         # since the last tick
        # The kernel will not tell when this trouble is over; a frame that gets through does.
        self.ends_with_frame = False
        self.reported_at = 0.0              # the last error frame about it
        self.remarked: object = None        # the interface's properties as last remarked on
        self.started_at = time.monotonic()
        self.bus_offs = self.warnings = 0   # since then

    def is_well(self) -> bool:
        """Whether there is no trouble, and was none since the last tick."""
        return self.state is BUS_WELL and self.worst_state is BUS_WELL

    # --- what the kernel, error frames and frames say ---

    def set_link(self, link: Link) -> None:
        """Note what the kernel says of the interface; UNKNOWN if it is not there."""
        self.link = link
        if status_of(link) is not None:     # it tells, so it will tell the end
            self.ends_with_frame = self.is_lonely()

    def follow(self, status: "int | None") -> None:
        """Take over the status that the kernel tells; None: it is up, and knows no more."""
        before = self.state.status
        if status is None:
            if before >= BUS_OFF and not self.ends_with_frame:
                self.set_status(WELL)
        elif status > before or status < before and not self.is_lonely():
            self.set_status(status)

    def is_lonely(self) -> bool:
        """Whether the state is that nobody acknowledges, which the kernel does not know."""
        code = self.state.code if self.state.status == WARNING else 0
        return bool(code & UNTOLD_ERRORS) and not code & ERR_CRTL

    def on_frame_through(self, confirmed: bool) -> None:
        """A frame got through, so some node acknowledges again; `confirmed`: one of ours."""
        over = UNTOLD_ERRORS if confirmed else ERR_ACK
        acknowledged = self.is_lonely() and self.state.code & over
        quiet = (status_of(self.link) is None
                 and time.monotonic() > self.reported_at + NO_ERRORS_S)
        if acknowledged or quiet:
            told = status_of(self.link)
            self.set_status(WELL if told is None else told)

    def on_error_frame(self, can_id: int, data: bytes) -> bool:
        """Note what an error frame (linux/can/error.h) says; returns whether it is of the state."""
        controller = data[1] if len(data) > 1 else 0
        rows = [row for row in errors_in(can_id, data) if row[2] is not None]
        if can_id & ERR_CRTL and not controller:    # "active", as some drivers put it
            rows.append(ACTIVE)
        if not rows or self.state.status == UNUSABLE:       # it came before the interface went
            return False
        error_class, _, status, text, _ = rows[0]
        untold = bool(error_class & UNTOLD_ERRORS)
        if self.link.state is not None and not untold:
            self.link = self.link._replace(state=status)    # the kernel would say so now
        if not status:                  # WELL
            if self.link.carrier is not False:
                self.set_state(BUS_WELL)
        elif not untold or self.state.status <= WARNING:    # else it would hide what is worse
            self.reported_at = time.monotonic()
            self.set_trouble(can_id, controller, status, text)
        return True

    # --- the state ---

    def set_unusable(self, code: int) -> None:
        """Note that the interface cannot be used, for this errno, and what helps."""
        name = self.name
        # ENODEV: there is none, or bind() says that it is not CAN. ENXIO: ours was removed.
        not_can = code == errno.ENODEV and self.link.is_can is False
        code = errno.ENODEV if code == errno.ENXIO else code
        has_bitrate = not self.link.bitrate and (self.link.kind or name[:3]) == "can"
        up = f"ip link set {name} up" + f" type can bitrate {BIT_RATE}" * has_bitrate
        modprobe = "modprobe can_raw; on OpenWrt install kmod-can and kmod-can-raw"
        text, advice = {
            errno.ENETDOWN: (f"interface {name} is down", up),
            errno.EAFNOSUPPORT: ("no CAN support (Address family not supported)", modprobe),
            errno.EPROTONOSUPPORT: ("no raw CAN support (Protocol not supported)", modprobe),
            errno.EPFNOSUPPORT: ("this Python has no SocketCAN", "CPython, on Linux"),
        }.get(code, (f"interface {name}: {os.strerror(code)}", ""))
        if not_can:
            text = f"{name} is not a CAN interface"
        elif code == errno.ENODEV and name[:4] == "vcan":
            advice = f"ip link add dev {name} type vcan && {up}"
        elif code == errno.ENODEV:
            advice = "plug in the adapter, load its driver (ip link and dmesg show what is there)"
        self.set_state(BusState(UNUSABLE, code, 0, text, advice))

    def set_status(self, status: int) -> None:
        """Note a status that the kernel tells."""
        if status == UNUSABLE:
            self.set_unusable(errno.ENETDOWN)
        elif status == WELL:
            self.set_state(BUS_WELL)
        else:
            row = next(row for row in ERRORS if row[2] == status and not row[0] & UNTOLD_ERRORS)
            self.set_trouble(row[0], 0, status, row[3])

    def set_trouble(self, code: int, controller: int, status: int, text: str) -> None:
        """Count and note what is wrong with the bus."""
        if text != self.state.text:
            self.bus_offs += status == BUS_OFF
            self.warnings += status != BUS_OFF
        advice = "wiring, bit rate, other nodes"
        if status == BUS_OFF:
            advice = f"ip link set {self.name} down && ip link set {self.name} up"
        self.set_state(BusState(status, code & KNOWN_ERRORS, controller, text, advice))

    def set_state(self, state: BusState) -> None:
        """Note how the bus is doing; log() logs it."""
        if state == self.state:
            return
        self.state = state
        if state.status >= self.worst_state.status:
            self.worst_state = state
        untold = WELL < state.status < UNUSABLE and status_of(self.link) is None
        self.ends_with_frame = untold or self.is_lonely()

    # --- the log ---

    def log(self, now: float) -> None:
        """Log how the bus is doing; a state that came and went since is logged, too."""
        worst, self.worst_state = self.worst_state, self.state
        if worst.text != self.logged_state.text:
            self.log_state(worst, now < self.started_at + START_S)

    def log_state(self, state: BusState, starting: bool) -> None:
        """Log a state that differs from the one logged before."""
        before, self.logged_state = self.logged_state, state
        if state is BUS_WELL:
            if before.text:
                log.info(f"{self.name}: the bus is back, was: {before.text}")
        elif state.status != UNUSABLE:
            log.warning(f"{self.name}: {state_text(state)}")
        elif not starting:
            log.warning(state_text(state))
        else:           # at boot the interface may come after us; without a text, log() warns later
            self.logged_state = state._replace(text="")
            self.remarked = None            # so that the end of the waiting is logged
            if before.status != UNUSABLE:
                log.info(f"waiting: {state_text(state)}")

    def remarks_depend_on(self) -> object:
        """What remarks on the interface are about; None if it cannot be used."""
        link = self.link
        return (link.bitrate, link.kind, link.listen_only, link.qdisc) if link.up else None

    def has_news(self) -> bool:
        """Whether there is something new to say of an interface that can be used."""
        return self.remarks_depend_on() not in (None, self.remarked)

    def log_remarks(self, buffer_size: int) -> None:
        """Log what is to be said of an interface that can be used."""
        self.remarked = self.remarks_depend_on()
        for priority, text in remarks_on(self.name, self.link, buffer_size):
            log.write(priority, text)


class Bus:
    """One CAN_RAW socket on a SocketCAN interface, for everybody, or `:virtual:`.

    What the kernel does (net/can/raw.c): an interface that goes down gives
    ENETDOWN once, and the same socket works again when it is up; one that is
    removed gives ENODEV, and the socket is dead for good.

    `:virtual:` is a bus inside the process, on which the clients talk to each
    other: a pair of sockets that hands back what was sent. No hardware and no
    kernel support is needed.
    """

    def __init__(self, name: str, forget: "Callable[[socket.socket], None]") -> None:
        self.name = name
        self.virtual = name == ":virtual:"
        self.forget_socket = forget         # has the selector forget one that will be closed
        self.sock: socket.socket | None = None      # to read from
        self.out: socket.socket | None = None       # to send with; on CAN a second descriptor of
                                                    # `sock`, as a selector watches one only once
        self.filters: list[tuple[int, int]] = []    # value and mask, as in View
        self.packed_filters = b""           # as the socket has them
        self.has_others = False             # a client must receive what another client sends
        self.own = OwnFrames()              # empty as long as nobody wants them back
        self.receives_own = False           # whether the kernel now gives back own frames
        self.health = Health(name)
        # The interface went: own frames numbered below this are forgotten once the receive buffer
        # is empty. 0: it is there. At bus off they are kept: the controller may still send them.
        self.unconfirmed_before = 0
        self.dropped = 0                    # frames that the kernel or the controller dropped
        self.kernel_drops = 0               # the kernel's running total for this socket
        self.errors = 0                     # error frames; without -d some stay in the kernel
        self.unpack = stamped_frame_unpackers(SO_TIMESTAMPNS_NEW)
        self.netlink = None if self.virtual else Netlink(name)
        self.open()
        self.ask(START_WAIT_S)

    # --- opening, and the interface's coming and going ---

    def open(self) -> None:
        """Make the sockets, or note why that is not possible."""
        try:
            if self.virtual:
                self.sock, self.out = socket.socketpair()
                # Room for 683 frames, less than MAX_UNDER_WAY: the kernel doubles this number
                # and charges 768 bytes per frame.
                self.out.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 18)
            else:
                self.sock = socket.socket(socket.AF_CAN, socket.SOCK_RAW, socket.CAN_RAW)
                self.set_options(self.sock)
                self.sock.bind((self.name,))
                self.out = self.sock.dup()  # so that reading and writing are watched apart
        except (AttributeError, OSError) as error:
            self.close()
            # AttributeError, or no errno: this Python knows no SocketCAN.
            self.health.set_unusable(getattr(error, "errno", None) or errno.EPFNOSUPPORT)
            return
        self.sock.setblocking(False)
        self.out.setblocking(False)
        self.receives_own = self.virtual
        self.kernel_drops = 0
        self.set_filters(self.filters, self.has_others)
        self.health.follow(status_of(self.health.link))

    def set_options(self, sock: socket.socket) -> None:
        """Set what does not depend on the clients."""
        sock.setsockopt(socket.SOL_CAN_RAW, socket.CAN_RAW_FILTER, b"")
        self.packed_filters = b""
        sock.setsockopt(socket.SOL_CAN_RAW, CAN_RAW_ERR_FILTER,
                        EFF_MASK if log.debugging else STATUS_ERRORS)
        # The kernel raises this to its minimum, a few frames. That is less than the transmit queue
        # holds, so poll reports room.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
        # In each row a value, and two options, of which the first that the kernel accepts counts:
        # only root may force the buffer's size. Without either it works, too; -d names the last.
        for value, *options in ((RECEIVE_BUFFER, SO_RCVBUFFORCE, socket.SO_RCVBUF),
                                (1, SO_TIMESTAMPNS_NEW, SO_TIMESTAMPNS_OLD)):
            for option in options:
                try:
                    sock.setsockopt(socket.SOL_SOCKET, option, value)
                    break
                except OSError as error:
                    if option == options[-1]:
                        log.debug(f"socket option {option} of {self.name}: {error.strerror}")
        # A 32-bit C library on Linux before 5.1 accepts the new form and sets the old one.
        in_old_form = sock.getsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS_OLD)
        self.unpack = stamped_frame_unpackers(
            SO_TIMESTAMPNS_OLD if in_old_form else SO_TIMESTAMPNS_NEW)

    def close(self) -> None:
        """Close the socket; the selector forgets it first."""
        for sock in (self.sock, self.out):
            if sock is not None:
                self.forget_socket(sock)
                sock.close()
        self.sock = self.out = None

    def end(self) -> None:
        """Close all sockets: the daemon ends."""
        self.close()
        if self.netlink and self.netlink.sock:
            self.forget_socket(self.netlink.sock)
            self.netlink.close()

    def bound_name(self) -> str:
        """The interface's own name; empty if the socket's interface has been removed."""
        name = self.sock.getsockname() if self.sock else ""
        return name if isinstance(name, str) else str(name[0])      # Python 3.7 gives text

    def ask(self, wait_s: float = 0.0) -> None:
        """Have the kernel say how the interface is, and wait so long for the answer."""
        if self.netlink is None:
            return
        if self.netlink.sock and self.netlink.refusal:
            self.forget_socket(self.netlink.sock)
            self.netlink.give_up(self.netlink.refusal)
        if self.netlink.sock is None:
            answer = link_by_ioctl(self.name)
            if answer:
                self.on_link(*answer)
            return
        self.netlink.ask()
        until = time.monotonic() + wait_s
        while self.netlink.asked and time.monotonic() < until:
            if select.select([self.netlink.sock], [], [], 0.01)[0]:
                self.read_links()

    def read_links(self) -> None:
        """Take in what the kernel has said of interfaces."""
        for there, link in self.netlink.read() if self.netlink else ():
            if not link.names or self.name in link.names:
                self.on_link(there, link)
            elif link.index == self.health.link.index:      # it has another name now
                self.on_link(False, link)

    def on_link(self, there: bool, link: Link) -> None:
        """Note whether the interface is there, and what the kernel says of it."""
        self.health.set_link(link if there else UNKNOWN)
        bound = self.bound_name()
        if self.sock and (not there or not bound or link.names and bound not in link.names):
            # Gone, renamed, or gone and back: a socket whose interface has gone stays dead.
            self.close()
            self.own.forget(self.own.next_number)
        if not there:
            if self.health.state.code not in NO_SUPPORT:
                self.health.set_unusable(errno.ENODEV)
        elif self.sock is None and link.is_can is False:
            self.health.set_unusable(errno.ENODEV)
        elif self.sock is None:
            self.open()
        else:
            self.health.follow(status_of(link))

    def check(self, now: float) -> None:
        """Look after the bus and log how it is doing; called once per tick."""
        if not self.virtual and not self.health.is_well():
            self.ask()
        self.health.log(now)
        if self.sock and self.health.has_news():
            self.health.log_remarks(self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF))
        self.update_receive_own()

    # --- frames ---

    def set_filters(self, filters: "list[tuple[int, int]]", has_others: bool) -> None:
        """Have the kernel let only frames through that match a pair of value and mask.

        `has_others`: a client must receive what another client sends.
        """
        self.filters, self.has_others = [(0, 0)] if log.debugging else filters, has_others
        if self.virtual or self.sock is None:
            return
        self.own.keep(self.passes)
        packed = FILTER.pack(0, 0) if log.debugging else pack_filters(filters)
        if packed != self.packed_filters:       # else it would wait for the kernel's lock in vain
            try:
                self.sock.setsockopt(socket.SOL_CAN_RAW, socket.CAN_RAW_FILTER, packed)
                self.packed_filters = packed
            except OSError:
                # The interface is gone; open() sets the filters once it is back.
                self.unconfirmed_before = self.own.next_number
        self.update_receive_own()

    def passes(self, can_id: int) -> bool:
        """Whether the kernel's filter lets a frame through."""
        for value, mask in self.filters:    # noqa: SIM110  any() takes twice as long
            if can_id & mask == value:
                return True
        return False

    def update_receive_own(self) -> None:
        """Have the kernel return own frames, or not: with a single client that only costs time.

        Measured: 10,000 pipelined SENDs take 2.0 s of CPU with them, 0.93 s without.
        """
        needed = (self.has_others or bool(self.own.frames) or self.health.ends_with_frame
                  or log.debugging)
        if self.sock is not None and not self.virtual and needed != self.receives_own:
            self.sock.setsockopt(socket.SOL_CAN_RAW, socket.CAN_RAW_RECV_OWN_MSGS, needed)
            self.receives_own = needed

    def send(self, can_id: int, data: bytes, sender: "Client | Discovery") -> None:
        """Put a frame onto the bus.

        Raises NoRoom when there is none at the moment, VscpError, with what helps,
        when the bus cannot take it.
        """
        health, state = self.health, self.health.state
        if self.out is None:
            raise VscpError(state_text(state))
        if health.link.listen_only:
            raise VscpError(listen_only_text(self.name))
        if state is not BUS_WELL and state.status == BUS_OFF and not health.ends_with_frame:
            raise NoRoom(state_text(state), TICK_S)     # what is sent now goes nowhere
        try:
            self.out.send(pack_frame(can_id, data))
        except OSError as error:
            self.on_send_error(error)
            self.send(can_id, data, sender)     # once: on_send_error() raises the second time
            return
        if state is not BUS_WELL and state.status == UNUSABLE:      # it is up again
            health.set_state(BUS_WELL)
        if self.virtual or self.receives_own and self.passes(can_id):
            self.own.add(can_id, data, sender)

    def on_send_error(self, error: OSError) -> None:
        """Raises what send() raises, unless it is worth another try."""
        if error.errno in (errno.EAGAIN, errno.ENOBUFS):
            raise NoRoom(f"{self.name} takes no more frames: nobody acknowledges, bus off, "
                         "or too much traffic",
                         NEVER if error.errno == errno.EAGAIN else SEND_RETRY_S) from None
        if error.errno not in (errno.ENETDOWN, errno.ENODEV, errno.ENXIO):
            raise VscpError(f"{self.name}: {error.strerror}") from None
        # The kernel reports once that the interface went; it may be up again.
        if self.unconfirmed_before:
            raise VscpError(state_text(self.on_gone(error.errno))) from None
        self.unconfirmed_before = self.own.next_number

    def on_gone(self, code: int) -> BusState:
        """The interface is down or gone, says a socket's error: note that; returns the state."""
        before = self.health.state
        self.health.set_unusable(code)
        state = self.health.state
        if state != before:         # else the ticks ask, and not each SEND
            if self.netlink:
                self.netlink.outdate()
            self.ask()
        return state

    def read(self, limit: int) -> "tuple[list[Frame], bool]":
        """The frames that have come, oldest first, and whether the socket is empty now.

        Up to `limit` messages are read, error frames included. If the interface went,
        the kernel reports that before the frames that it still holds: then they are read
        to the end first.
        """
        frames: list[Frame] = []
        if self.sock is None:
            return frames, True
        sock, unpack, health = self.sock, self.unpack, self.health
        usual = not health.ends_with_frame
        empty, gone = False, 0
        for _ in range(limit):
            try:
                raw, ancillary, flags, _address = sock.recvmsg(FRAME_SIZE, ANCILLARY_SIZE)
            except BlockingIOError:
                empty = True
                break
            except OSError as error:
                self.unconfirmed_before = self.own.next_number
                gone = error.errno or errno.EIO
                continue
            # The usual: an extended data frame of another node, which ends no trouble, with the
            # kernel's time of it.
            if usual and ancillary and not flags & MSG_CONFIRM:
                can_id, data, seconds, nanoseconds = unpack[raw[LENGTH_AT]](raw + ancillary[0][2])
                can_id ^= EFF_FLAG          # then an extended data frame has no flag left
                if can_id <= EFF_MASK:
                    frames.append((can_id, data, seconds, nanoseconds, None))
                    continue
            frame = self.on_unusual(raw, ancillary, flags)
            if frame:
                frames.append(frame)
            usual = not health.ends_with_frame
        if self.unconfirmed_before:
            if empty:
                self.own.forget(self.unconfirmed_before)
                self.unconfirmed_before = 0
            elif limit < FRAMES_IN_KERNEL:      # so once more at most
                others, empty = self.read(FRAMES_IN_KERNEL)
                frames += others
        if gone:
            self.on_gone(gone)
        return frames, empty

    def on_unusual(self, raw: bytes, ancillary: "list[tuple[int, int, bytes]]",
                   flags: int) -> "Frame | None":
        """Handle what read() does not; returns the frame if clients get it."""
        if ancillary:
            can_id, data, seconds, nanoseconds = self.unpack[raw[LENGTH_AT]](raw + ancillary[0][2])
        else:
            can_id, length, data = unpack_frame(raw)
            data = data[:length]
            seconds, nanoseconds = divmod(time.time_ns(), 1000000000)
        if can_id & ERR_FLAG:
            self.on_error_frame(can_id, data)
        if can_id >> 29 != EXTENDED:
            if log.debugging:
                log.debug(not_vscp_row(self.name, can_id, data),
                          seconds * 1000000 + nanoseconds // 1000)
            return None
        confirmed = self.virtual or bool(flags & MSG_CONFIRM)
        if self.health.ends_with_frame:
            self.health.on_frame_through(confirmed)
        can_id &= EFF_MASK
        sender = self.own.claim(can_id, data) if confirmed else None
        if confirmed and sender is None:    # ours, but nobody is noted as the sender
            return None
        return can_id, data, seconds, nanoseconds, sender

    def on_error_frame(self, can_id: int, data: bytes) -> None:
        """Note what an error frame says."""
        self.errors += 1
        if can_id & ERR_CRTL and data[1:2] and data[1] & CRTL_RX_OVERFLOW:
            self.dropped += 1
        if self.health.on_error_frame(can_id, data) and self.netlink:
            self.netlink.outdate()
        if self.health.ends_with_frame:     # check() switches it off again, not within a read()
            self.update_receive_own()

    def count_drops(self) -> None:
        """Ask the kernel how many frames it has dropped because its buffer was full."""
        if self.sock is None or self.virtual:
            return
        try:
            numbers = self.sock.getsockopt(socket.SOL_SOCKET, SO_MEMINFO, 36)
        except OSError:
            return          # Linux before 4.12 cannot tell
        total = struct.unpack("=9I", numbers)[8] if len(numbers) == 36 else self.kernel_drops
        if self.filters:    # else these are error frames, as nothing else passes
            self.dropped += total - self.kernel_drops & 0xFFFFFFFF
        self.kernel_drops = total


# =============================================================================
# 8. Client
# =============================================================================
# A connection, from greeting to close. It never blocks, and only the commands write
# into it from outside.
#
#     accepted   -- it is allowed, and a slot is free --> connected (greet)
#                -- else --> leaving (refuse)
#     connected  -- QUIT, end of input, SIGTERM, 5 wrong log-ins, no log-in, HTTP or TLS
#                   --> leaving (leave)
#     leaving    -- all output is sent --> shut down (shut_down)
#     shut down  -- the peer closes, or LINGER_S pass --> closed (close)
#     any        -- an error, a bug, a peer silent for PEER_GONE_S --> closed
#
# Its state follows from times: it streams since `stream_at`, is leaving once `leave_by`
# is set. A line runs unless output waits to be sent, or `resume_at` has not come: a
# SEND of this client waits for room on the bus, or a wrong log-in delays the answer. The
# socket is read unless lines are left to run. Events go straight to the socket if the
# client is in the receive loop and nothing waits before them, else into `fifo`.

MAX_LINE = 512                  # characters in a command line; the C uvscpd has 320, too few for a
                                # Level II event with a long datetime
KEPT_TAIL = 16                  # characters kept from the end of a line that is too long, so that
                                # ` HTTP/1.1` is still recognized; its middle is dropped
SIGN_OF_LIFE = "+OK\r\n"        # in the receive loop; other than any reply
SIGN_OF_LIFE_S = 2.0            # how often
# node-vscp-tcp loses events that it reads together with RCVLOOP's +OK. Measured: sent at
# once, half are lost; 20 ms later, none.
RCVLOOP_PAUSE_S = 0.05
LINES_PER_TURN = 32             # commands of one client before the others' turn
LINES_PER_WRITE = 200           # of buffered events; flush() makes segments of them
READ_SIZE = 16384               # bytes
LINGER_S = 5.0                  # to let a last reply arrive before closing
PEER_GONE_S = 300               # a peer that has acknowledged nothing for so long is gone
PEER_CHECK_S = 10
COMPLAIN_S = 3600               # a client that misses events is logged once per hour
NOT_VSCP_S = 60                 # an address that speaks another protocol, once per minute
QUICK_S = 1.0                   # a connection that sends nothing and is closed within this time is
                                # shown by -d only: a load balancer may try the port every second
# Of struct tcp_info (linux/tcp.h)
TCP_ESTABLISHED = 1             # its first byte; not once the peer has closed
LAST_ACK_RECEIVED = 56          # the offset of a number of milliseconds


# What LineReader looks for. MARK: a table for translate() that makes unusual bytes zero: nearly
# every line has none. A slash is one, as each HTTP request has it.
MARK = bytes(byte if byte in b"\r\n" or 0x20 <= byte <= 0x7E and byte != ord("/") else 0
             for byte in range(0x100))
CR = ord("\r")                  # a number, as bytes are searched faster for one
ESCAPE = "\x1b"                 # begins what a cursor key sends
# Patterns, compiled when one is first used: few lines need them, and it takes 25 ms of the start.
# The last character of a line: in UTF-8, else (Latin-1, Windows' telnet) a byte.
LAST_CHARACTER = ("(?s)([\xc2-\xdf][\x80-\xbf]|[\xe0-\xef][\x80-\xbf]{2}"
                  "|[\xf0-\xf4][\x80-\xbf]{3}|.)\\Z")
# A tab is a blank. What is not ASCII is kept until the line ends, as backspace may be meant for it.
CLEAN = {0x09: " ", **dict.fromkeys(range(0x80, 0x100))}
# Telnet (RFC 854): IAC is FF, WILL to DONT are FB to FE, SB is FA, SE is F0.
PIECES = rb"""(?sx)
    (?P<text>  [\t\x1b\x20-\x7e\x80-\xfe]+ )
  | (?P<end>   [\r\n] )
  | (?P<erase> [\x08\x7f] )                                    # backspace, DEL
  | \xff (?: \xfa (?: [^\xff] | \xff [^\xf0] )* \xff \xf0      # IAC SB ... IAC SE
          | [\xfb-\xfe] .                                     # IAC WILL and an option
          | [\xf0-\xf9\xff] )                                 # IAC and a command, IAC IAC
  | (?P<cut>   \xff (?: \xfa .* | [\xfb-\xfe] )? \Z )         # the rest is still to come
  | .                                                         # other bytes are dropped
"""
# Nobody types such a byte first, but TLS and other binary protocols begin with one.
BINARY = rb"[\x00-\x07\x0b\x0c\x0e-\x1a\x1c-\x1f]"
# What begins an HTTP request (RFC 9112): method, target, version. fetch() lets a page choose nearly
# any word as the method, and a cut request may lack the version. And the header that follows.
HTTP = (r" *(\S+ +\S.* HTTP/\d"
        r"|(?i:GET|HEAD|POST|PUT|DELETE|CONNECT|OPTIONS|TRACE|PATCH) +\S*/|[Hh]ost:)")


def shorten(line: str) -> str:
    """A line as it is; of one that is too long, the beginning and the end, with a blank between."""
    if len(line) <= MAX_LINE + 1 + KEPT_TAIL:
        return line
    return f"{line[:MAX_LINE]} {line[-KEPT_TAIL:]}"


def check_line(line: str) -> "str | VscpError":
    """A line as a command, or the error why it cannot be one."""
    command = line.translate(CLEAN)
    if re.match(HTTP, command):
        return NotVscp("an HTTP request")
    if ESCAPE in line:
        return VscpError("a cursor or function key is in this line, please type it again")
    return command if len(line) <= MAX_LINE else VscpError("line length exceeded")


class LineReader:
    """Makes command lines of what a connection sends: bytes in, lines or errors out.

    LF, CR LF or CR ends a line. Tab is a blank; backspace and DEL take away the character
    before them. Telnet's negotiation, other control characters and what is not ASCII are
    dropped. An HTTP request, or binary data at the start, becomes NotVscp. What comes may
    be cut anywhere.

    >>> reader = LineReader()
    >>> reader.feed(b"no"), reader.feed(b"op\\r\\nchod\\x08\\x08id\\r\\nqu")
    ([], ['noop', 'chid'])
    """

    def __init__(self) -> None:
        self.partial = ""           # a line that has not come whole
        self.telnet = b""           # a telnet command that has not come whole
        self.after_cr = False       # CR has ended the line: an LF belongs to it
        self.at_start = True        # nothing has come
        self.usual = True           # `partial` has usual characters only, and nothing else waits

    def feed(self, data: bytes) -> "Sequence[str | VscpError]":
        """The lines that end in these bytes; for one that cannot be a command, the error.

        After NotVscp there is none: what follows in these bytes is dropped.
        """
        text = data.translate(MARK)
        if CR in text:
            text = text.replace(b"\r\n", b"\n")
        if self.usual and CR not in text and 0 not in text:
            whole = self.partial + text.decode("ascii")
            if "ost:" not in whole:             # else it may be a header
                lines = whole.split("\n")
                partial = lines.pop()
                self.partial = shorten(partial) if partial else ""
                self.at_start = False
                if len(whole) > MAX_LINE and max(map(len, lines), default=0) > MAX_LINE:
                    return [check_line(line) for line in lines]
                return lines
        return self.feed_pieces(data)

    def end(self) -> "Sequence[str | VscpError]":
        """The end of the input, where a last line counts without a line end."""
        self.telnet = b""           # or the line end would be taken for the rest of it
        return self.feed(b"\n") if self.partial else []

    def feed_pieces(self, data: bytes) -> "list[str | VscpError]":
        """As feed(), for any bytes: piece by piece."""
        if self.at_start and re.match(BINARY, data):
            return [NotVscp("binary data, perhaps TLS")]
        lines: list[str | VscpError] = []
        data, self.telnet, self.at_start = self.telnet + data, b"", False
        for match in re.finditer(PIECES, data):
            kind, piece = match.lastgroup, match[0]
            if kind == "text":
                self.add(piece.decode("latin-1"))
            elif kind == "erase":
                self.erase()
            elif kind == "end" and self.ends_line(piece):
                lines.append(check_line(self.partial))
                self.partial = ""
                if isinstance(lines[-1], NotVscp):
                    break
            elif kind == "cut":
                self.telnet = piece if len(piece) <= MAX_LINE else b""
        self.usual = (not self.telnet and not self.after_cr
                      and 0 not in self.partial.encode("latin-1").translate(MARK))
        return lines

    def add(self, text: str) -> None:
        """Append to the line."""
        self.after_cr = False
        self.partial = shorten(self.partial + text)

    def erase(self) -> None:
        """Take away the last character, unless the line is wrong: it stays so."""
        if len(self.partial) <= MAX_LINE and ESCAPE not in self.partial:
            self.partial = self.partial[:-4] + re.sub(
                LAST_CHARACTER, "", self.partial[-4:], count=1)

    def ends_line(self, byte: bytes) -> bool:
        """Whether CR or LF ends a line: not LF if CR just did, and not CR if there is no line."""
        if byte == b"\n" and self.after_cr:
            self.after_cr = False
            return False
        if byte == b"\r" and not self.partial:
            return False
        self.after_cr = byte == b"\r"
        return True


def hide_password(line: str) -> str:
    """The line as it may be shown: nothing after PASS, nor where it is typed by mistake."""
    return re.sub(r"(?i)(pass|user\S* +\S+ |^ *\+).+", r"\1 ***", line)


class Client:
    """One TCP connection."""

    # Attributes in slots take less time, as there are over 30: 3 % of a SEND, 6 % of a NOOP.
    __slots__ = (
        "daemon", "sock", "host", "address", "channel_id", "guid", "user", "given_name", "failures",
        "filter", "mask", "view", "fifo", "missed", "dropped_before", "rx_frames", "rx_bytes",
        "tx_frames", "tx_bytes", "reader", "lines", "last_line", "output", "segment",
        "peer_closed_writing", "peer_closed_reading", "connected_at", "announced", "stream_at",
        "sign_at", "resume_at", "login_by", "leave_by", "check_peer_at")

    def __init__(self, daemon: "Daemon", sock: socket.socket, host: str, port: int,
                 channel_id: int) -> None:
        self.daemon = daemon
        self.sock = sock
        self.host = host
        self.address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        self.channel_id = channel_id
        self.guid = client_guid(daemon.options.guid, channel_id)
        # Access
        self.user: User = daemon.logins.guest   # until it has logged in
        self.given_name = ""                    # USER's, for the PASS that follows
        self.failures = 0                       # wrong log-ins
        # Events and STAT
        self.filter = self.mask = FILTER_ALL
        self.view = make_view(self.filter, self.mask, self.interface_guid)
        self.fifo: deque[str] = deque(maxlen=daemon.options.buffer)     # lines to be fetched
        self.missed = 0                         # events that `fifo` has dropped
        self.dropped_before = daemon.bus.dropped
        self.rx_frames = self.rx_bytes = self.tx_frames = self.tx_bytes = 0
        # Input and output
        self.reader = LineReader()
        self.lines: deque[str | VscpError] = deque()    # commands to run, errors to answer
        self.last_line = ""                     # what `+` runs again
        self.output = bytearray()               # what the connection has not taken yet
        self.segment = max(536, sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG))
        self.peer_closed_writing = False        # it sends no more
        self.peer_closed_reading = False        # it takes no more
        # Deadlines
        self.connected_at = NEVER               # when it was let in; NEVER if it was refused
        self.announced = False                  # "connected" has been logged
        self.stream_at = NEVER                  # from then on events are sent as they come
        self.sign_at = NEVER                    # the next sign of life is due
        self.resume_at = 0.0                    # no line runs before; NEVER: a SEND waits for room
        self.login_by = NEVER                   # sent away if it may do nothing until then
        self.leave_by = NEVER                   # leaving; closed by then. NEVER: not leaving
        self.check_peer_at = daemon.now + PEER_CHECK_S  # is the peer still there?

    @property
    def name(self) -> str:
        """For messages: the address, and the user once logged in."""
        return f"{self.address} ({self.user.name})" if self.user.name else self.address

    @property
    def short_name(self) -> str:
        """For the event lines of -d: the user, or the port."""
        return str(self.user.name) or ":" + self.address.rpartition(":")[2]

    @property
    def interface_guid(self) -> bytes:
        """The GUID that event lines show: with ids the CAN interface's, which has the id 0."""
        return client_guid(self.daemon.options.guid, 0) if self.channel_id else self.guid

    @property
    def closed(self) -> bool:
        return self.sock.fileno() < 0

    # --- how it begins ---

    def greet(self) -> None:
        """Let it in, and say who we are."""
        self.connected_at = self.daemon.now
        if not self.user.privilege:
            self.login_by = self.daemon.now + LOGIN_S
        bus, state = self.daemon.bus, self.daemon.bus.health.state
        self.write(f"uvscpd.py {__version__} - micro VSCP daemon\r\n"
                   "VSCP events between TCP clients and a CAN bus; HELP lists the commands.\r\n"
                   + ok(text=f"waiting for {bus.name}: {os.strerror(state.code)}"
                        if state.status == UNUSABLE else f"Success, connected to {bus.name}"))

    def refuse(self, reason: str) -> None:
        """Say why it may not connect, and let it go."""
        if self.daemon.rate_limit.allows("refused", self.host, NOT_VSCP_S, self.daemon.now):
            log.warning(f"{self.name}: refused: {reason}")
        self.write(refusal(reason))
        self.leave()

    def announce(self) -> None:
        """Log that it is connected: it has sent a line, or stays longer than a health check."""
        self.announced = True
        log.info(f"{self.name}: connected")

    # --- what the loop calls: on_ready (the socket), tick (the time), put (events) ---

    def on_ready(self, mask: int) -> None:
        """The connection has sent something, or has room for output, or lines are left to run."""
        if mask & READ:
            self.read()
        self.turn()

    def turn(self) -> None:
        """Run some of the lines that have come, send what the connection takes.

        An error here closes this client and no other.
        """
        try:
            if self.output:
                self.flush()
            if not self.output:                 # else the peer has to read its replies first
                self.run_lines()
                if self.output:
                    self.flush()
            # Events come last: if they arrive faster than the peer reads, there is always another
            # one, and its commands would never run.
            while self.fifo and not self.output and self.stream_at <= self.daemon.now:
                some = min(LINES_PER_WRITE, len(self.fifo))
                self.write("".join([self.fifo.popleft() for _ in range(some)]))
                self.flush()
            if self.leave_by < NEVER and not self.output:
                self.shut_down()
            self.watch()
        except OSError as error:
            self.close(error.strerror or str(error))
        except Exception as error:
            log.error(f"{self.name}: a bug in uvscpd.py, the client is dropped:\n"
                      + traceback_text(error))
            self.close("internal error")

    def tick(self) -> None:
        """Do what is due: a sign of life, a line that waited, the end."""
        now = self.daemon.now
        if not self.announced and self.connected_at + QUICK_S <= now and self.leave_by == NEVER:
            self.announce()
        if self.sign_at <= now and not self.lines and self.resume_at <= now:
            # Not while a reply is due: the client would take the sign of life for it.
            self.sign_at = now + SIGN_OF_LIFE_S
            if not self.output:
                self.write(SIGN_OF_LIFE)
        # turn() also sends: epoll reports room only when a third of the send buffer is free.
        if not self.closed:
            self.turn()
        if self.login_by <= now and self.resume_at <= now and not self.closed:
            self.write(refusal(f"nobody logged in within {LOGIN_S:.0f} s"))
            self.leave()
            self.turn()
        if self.leave_by <= now:
            self.close()
        if self.check_peer_at <= now and not self.closed:
            self.check_peer_at = now + PEER_CHECK_S
            # A live peer acknowledges at least the keep-alive probes, even if it reads nothing.
            if struct.unpack_from("=I", self.tcp_info(), LAST_ACK_RECEIVED)[0] > PEER_GONE_S * 1000:
                self.close("the peer is gone")
        for when in (self.stream_at, self.sign_at, self.resume_at, self.login_by, self.leave_by):
            if when > now and not self.closed:
                self.daemon.soon(when)

    def tcp_info(self) -> bytes:
        """The first bytes of struct tcp_info (linux/tcp.h)."""
        return self.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 64)

    def watch(self) -> None:
        """Have the selector watch for what this client can use now."""
        events, paused = 0, self.resume_at > self.daemon.now
        if self.output or self.lines and not paused:
            events = WRITE
        if not self.lines and not paused and not self.peer_closed_writing:
            events |= READ
        try:
            self.daemon.selector.watch(self.sock, events, self.on_ready)
        except OSError as error:            # too much is watched already
            self.close(error.strerror or str(error))

    # --- commands: from the socket to their replies ---

    def read(self) -> None:
        """Take in what has come."""
        try:
            data = self.sock.recv(READ_SIZE)
        except BlockingIOError:
            return
        except OSError:             # it was reset, perhaps in the middle of a line
            data, self.reader = b"", LineReader()
        self.peer_closed_writing = not data
        if self.leave_by == NEVER:
            # At the end of the input a last line counts without a line end.
            lines = self.reader.feed(data) if data else self.reader.end()
            if not self.announced and lines and not isinstance(lines[0], NotVscp):
                self.announce()
            self.lines.extend(lines)

    def run_lines(self) -> None:
        """Run some of the lines that have come; the other clients have their turn, too."""
        for _ in range(LINES_PER_TURN):
            if not self.lines or self.resume_at > self.daemon.now:
                break
            line = self.lines.popleft()
            stream_at = self.stream_at
            try:
                reply = run_command(self, line) if isinstance(line, str) else self.refuse_line(line)
            except Later as later:
                self.lines.appendleft(line)
                self.pause(later.at)
                break
            if log.debugging and isinstance(line, str):
                log.debug(f"{self.name} > {self.shown(line)}")
            if self.stream_at != stream_at:
                # Replies to RCVLOOP and QUITLOOP go out in a write of their own.
                self.flush()
                self.reply(reply)
                self.flush()
            else:
                self.reply(reply)
        if self.peer_closed_writing and not self.lines and self.resume_at <= self.daemon.now:
            self.leave()

    def shown(self, line: str) -> str:
        """A line as -d shows it. With users, one that is no command may be a password."""
        words = line.split()
        if self.daemon.logins.users and words and words[0].lower() not in COMMANDS:
            return "*** (no command)"
        return hide_password(line)

    def refuse_line(self, error: VscpError) -> str:
        """The reply to a line that is known to be wrong; the end after too many wrong log-ins."""
        if isinstance(error, NotVscp):
            return self.refuse_protocol(error)
        if self.failures < MAX_WRONG_LOGINS:
            return refusal(error)
        self.leave()
        return refusal(error) + refusal("too many wrong log-ins")

    def refuse_protocol(self, error: NotVscp) -> str:
        """The reply to another protocol, and the end: a web page may have chosen what follows."""
        if self.daemon.rate_limit.allows("protocol", self.host, NOT_VSCP_S, self.daemon.now):
            log.warning(f"{self.name}: sent {error}; disconnected, none of it was run")
        self.leave()
        return refusal(f"this port speaks VSCP's text protocol only, this was {error}")

    def pause(self, until: float) -> None:
        """Run no line until then."""
        self.resume_at = until
        self.daemon.soon(until)

    def resume(self, reply: str) -> None:
        """Answer the SEND that has waited for room, and go on."""
        if not self.closed:
            self.resume_at = 0.0
            self.reply(reply)
            self.turn()

    def on_sent(self, length: int) -> None:
        """The bus has taken a frame of this client with so many data bytes."""
        self.tx_frames += 1
        self.tx_bytes += 4 + length         # on CAN the id has 4 bytes

    def set_view(self) -> None:
        """Make a changed GUID, filter or mask count from the next event on."""
        self.daemon.read_all()      # the old filter still applies to frames already in the kernel
        self.view = make_view(self.filter, self.mask, self.interface_guid)
        self.daemon.set_views()

    # --- who it is ---

    def login(self, user: User) -> None:
        """From now on it is this user, or again the guest."""
        if user is self.user:       # a name without a password changes nothing
            return
        if log.debugging:           # show what it has sent so far under its old name
            self.daemon.read_all()
        self.user = user
        may_stay = user is not self.daemon.logins.guest or user.privilege > 0
        self.login_by = NEVER if may_stay else self.daemon.now + LOGIN_S
        if user.privilege < COMMANDS["rcvloop"].privilege:
            self.stop_streaming()

    def on_wrong_login(self, error: VscpError) -> None:
        """Answer late, and let others from this address try first."""
        log.warning(f"{self.address}: {error}")
        self.login(self.daemon.logins.guest)
        self.failures += 1
        self.lines.appendleft(error)
        self.pause(self.daemon.now + WRONG_LOGIN_S)
        self.daemon.serve_last(self)

    def peer_has_closed(self) -> bool:
        """Whether the peer sends no more, even if not all has been read."""
        return self.tcp_info()[0] != TCP_ESTABLISHED

    # --- events, and output of all kinds ---

    def put(self, lines: "list[str]", block: bytes, size: int) -> None:
        """Send event lines, also given as one block with its size on CAN, or buffer them."""
        self.rx_frames += len(lines)
        self.rx_bytes += size
        if self.fifo or self.output or self.stream_at > self.daemon.now:
            missed = len(self.fifo) + len(lines) - (self.fifo.maxlen or 0)
            self.fifo.extend(lines)
            if missed > 0:
                self.on_missed(missed)
            return
        if len(block) <= self.segment:      # nearly always: without a copy
            try:
                sent = self.sock.send(block)
                if sent == len(block):
                    return
                block = block[sent:]
            except OSError:
                pass                        # flush() finds out
        if not self.peer_closed_reading:
            self.output += block
            self.flush()
            self.watch()

    def on_missed(self, count: int) -> None:
        """Its buffer has dropped so many events."""
        self.missed += count
        self.daemon.on_missed(count)
        if self.daemon.rate_limit.allows("events", self.address, COMPLAIN_S, self.daemon.now):
            log.warning(f"{self.name}: is losing events: it does not fetch them, and its buffer of "
                        f"{counted(len(self.fifo), 'event')} is full")

    def stop_streaming(self) -> None:
        """Leave the receive loop: events are buffered again."""
        self.stream_at = self.sign_at = NEVER

    def reply(self, text: str) -> None:
        """Answer a command: have the text sent by the next flush, and shown by -d."""
        if log.debugging:
            for line in text.splitlines():
                log.debug(f"{self.name} < {line}")
        self.write(text)

    def write(self, text: str) -> None:
        """Have text sent by the next flush."""
        if not self.peer_closed_reading:
            self.output += text.encode()

    def flush(self) -> None:
        """Send what the connection takes of the output: whole lines, a segment per write."""
        while self.output:
            block, size = self.output, len(self.output)
            if size > self.segment:
                size = (block.rfind(b"\n", 0, self.segment) + 1
                        or block.find(b"\n", self.segment) + 1)
                block = block[:size]
            try:
                sent = self.sock.send(block)
            except BlockingIOError:
                break
            except OSError:
                # It is gone, or reads no more; the commands that it has sent are run all the same.
                self.peer_closed_reading = True
                self.output.clear()
                break
            del self.output[:sent]
            if self.leave_by < NEVER:
                self.leave_by = self.leave_time()
            if sent < size:
                break

    # --- how it ends ---

    def leave(self) -> None:
        """Close once the last reply has arrived: closing at once could make TCP discard it."""
        if self.leave_by == NEVER:
            self.leave_by = self.leave_time()
            self.login_by = NEVER
            self.stop_streaming()
            self.lines.clear()
            self.fifo.clear()
            self.daemon.on_leaving(self)

    def leave_time(self) -> float:
        """Until when to wait for a peer that has been told to go."""
        return self.daemon.now + (PEER_GONE_S if self.output else LINGER_S)

    def shut_down(self) -> None:
        """Tell the peer that nothing follows; read() takes in what it still sends."""
        if self.peer_closed_writing or self.peer_closed_reading:
            self.close()
            return
        try:
            self.sock.shutdown(socket.SHUT_WR)
        except OSError:
            self.peer_closed_reading = True     # the connection is gone; read() notices the end

    def close(self, reason: str = "") -> None:
        """Close the connection, at once, and log how it was."""
        if self.closed:
            return
        self.daemon.selector.forget(self.sock)
        self.sock.close()
        for waiting in (self.fifo, self.lines, self.output):
            waiting.clear()         # the client may live on as the sender of a frame under way
        self.daemon.on_closed(self)
        if self.connected_at < NEVER:
            write = log.info if self.announced else log.debug
            write(f"{self.name}: disconnected after "
                  f"{duration_text(self.daemon.now - self.connected_at)}: "
                  f"{counted(self.rx_frames, 'event')}, {self.missed} lost, "
                  f"{self.tx_frames} sent" + (f"; {reason}" if reason else ""))


# =============================================================================
# 9. Commands
# =============================================================================
# To add a command, write a function with its row above it (and a line in README's table):
# the names, the privilege, the arguments as HELP shows them, and what it does. HELP
# lists the rows in this order. The function takes the client and the arguments, and
# returns the whole reply or raises VscpError; "" is a reply that comes later. How many
# arguments it may get follows from its signature; `*arguments` is any number. A comma
# in the row's arguments means that they are one list, in which some spaces are allowed.

CAPABILITIES = 1 << 15 | 1 << 5 | 1 << 3    # WCYD: TCP server, IPv4, several connections
CAPABILITY_IPV6 = 1 << 6
# Spaces that people and programs put into a list: after commas, and between date and time of day.
LIST_SPACES = r"(?<=,) +|(?<=\d{4}-\d\d-\d\d) +(?=\d\d:)"
# The VSCP specification's text. Scripts of the VSCP project wait for it, up to 12 s per command.
SUCCESS = "+OK - Success.\r\n"


def ok(*lines: str, text: str = "") -> str:
    """A good reply: data lines, then the final `+OK` line."""
    final = f"+OK - {text}\r\n" if text else SUCCESS
    return "\r\n".join((*lines, final)) if lines else final


def refusal(reason: object) -> str:
    """A bad reply: the final `-OK` line."""
    return f"-OK - {reason}\r\n"


class Command:
    """A row of the command table."""

    def __init__(self, names: str, privilege: int, usage: str, summary: str,
                 handler: "Any") -> None:
        self.names = names.split()      # the command and its aliases
        self.privilege = privilege      # 0-15, what a client must have
        self.usage = usage              # its arguments, as HELP shows them
        self.takes_list = "," in usage  # of fields with commas between them
        self.summary = summary
        self.handler = handler
        code = handler.__code__
        self.most = code.co_argcount - 1                        # number of arguments
        self.least = self.most - len(handler.__defaults__ or ())
        if code.co_flags & 0x04:        # CO_VARARGS: *arguments
            self.most = MAX_LINE

    def help(self) -> str:
        """One line: names, arguments and what the command does."""
        name, *aliases = [name.upper() for name in self.names]
        also = f" (also {', '.join(aliases)})" if aliases else ""
        return f"{name} {self.usage}".rstrip() + f": {self.summary}{also}"


COMMANDS: "dict[str, Command]" = {}       # by name and alias
ONLY_FULL_DAEMON = "only the full VSCP daemon has this command, uvscpd does not"


def command(names: str, privilege: int, usage: str, summary: str) -> "Callable[..., Any]":
    """Put a function into the table; used as a decorator, its row."""
    def add(handler: "Callable[..., str]") -> "Callable[..., str]":
        row = Command(names, privilege, usage, summary, handler)
        COMMANDS.update(dict.fromkeys(row.names, row))
        return handler
    return add


def find_command(name: str) -> Command:
    """The row of a command, given in any case; raises VscpError when there is none."""
    try:
        return COMMANDS[name.lower()]
    except KeyError:
        raise VscpError("invalid command") from None


def run_command(client: Client, line: str) -> str:
    """The whole reply to a command line, data lines and exactly one final line.

    Raises Later alone.
    """
    try:
        words = line.split()
        if not words:
            raise VscpError("no input")
        name, arguments = words[0], words[1:]
        if name != "+":
            client.last_line = line
        row = COMMANDS.get(name) or find_command(name)
        if client.user.privilege < row.privilege:
            raise VscpError("Need to log in to perform this command.")
        if len(arguments) > row.most and row.takes_list:
            arguments = re.sub(LIST_SPACES, "", " ".join(arguments)).split()
        if not row.least <= len(arguments) <= row.most:
            raise VscpError("wrong number of arguments"
                            + f", expected {row.usage}" * row.takes_list)
        reply: str = row.handler(client, *arguments)
        return reply
    except VscpError as error:
        return refusal(error)


# --- privilege 0 ---

@command("noop", 0, "", "do nothing, answer +OK")
def do_noop(_client: Client) -> str:
    return SUCCESS


@command("quit exit", 0, "", "end this connection")
def do_quit(client: Client) -> str:
    client.leave()
    return ok(text="bye")


@command("+", 0, "", "run the previous command again")
def do_repeat(client: Client) -> str:
    if not client.last_line:
        raise VscpError("no input")
    return run_command(client, client.last_line)


@command("user", 0, "[NAME]", "give the user name, to log in")
def do_user(client: Client, name: str = "") -> str:
    logins = client.daemon.logins
    if not logins.users or "" in logins.users:
        return ok(text="no user configured")
    if not name:
        raise VscpError("please supply username")
    client.login(logins.guest)
    client.given_name = name
    return ok() if logins.password_needed else check_login(client, name, "")


@command("pass", 0, "[PASSWORD]", "give the password, to log in")
def do_pass(client: Client, password: str = "") -> str:
    logins = client.daemon.logins
    if not logins.users or not logins.password_needed:
        return ok(text="no password configured")
    if not password:
        raise VscpError("please supply password")
    if not client.given_name and "" not in logins.users:
        raise VscpError("please give the user name first")
    return check_login(client, "" if "" in logins.users else client.given_name, password)


def check_login(client: Client, name: str, password: str) -> str:
    """Check name, password and address together; wrong ones are answered late.

    Raises Later as long as a wrong log-in from the same place makes it wait.
    """
    try:
        user = client.daemon.logins.check(name, password, client.host, client.daemon.now)
    except Later:
        if client.peer_has_closed():    # otherwise guesses of closed connections delay the others
            raise VscpError(
                "a wrong log-in came from this address just before, try again") from None
        raise
    if user is None:
        client.on_wrong_login(VscpError("invalid username or password"))
        return ""
    client.login(user)
    log.info(f"{client.name}: logged in")
    return ok()


@command("help ?", 0, "[COMMAND]", "this list, or one line of it")
def do_help(_client: Client, name: str = "") -> str:
    rows = [find_command(name)] if name else dict.fromkeys(COMMANDS.values())
    return ok(*(row.help() for row in rows))


@command("vers version", 0, "", "version of the daemon")
def do_vers(_client: Client) -> str:
    return ok(__version__.replace(".", ",") + ",0")


@command("wcyd whatcanyoudo", 0, "", "capabilities, 64 bits")
def do_wcyd(client: Client) -> str:
    bits = capabilities(client.daemon.listener)
    return ok("-".join(f"{byte:02X}" for byte in bits.to_bytes(8, "big")))


@command("interface client", 0, "[list]", "list the interfaces")
def do_interface(client: Client, action: str = "list", *_more: str) -> str:
    if action.lower() in ("close", "unique", "normal"):
        raise VscpError(ONLY_FULL_DAEMON)
    # All other words are ignored (VSCP specification, TCP/IP link protocol).
    # Number, type, GUID, name. The types are the VSCP daemon's: 2 a Level I driver, 4 a client.
    daemon = client.daemon
    lines = [f"0,2,{format_guid(client.interface_guid)},{daemon.bus.name}|"
             f"Started {daemon.utc_since(daemon.began)}"]
    guest = daemon.logins.guest
    known = client.user is not guest or client.user.privilege > 0       # it may learn addresses
    for each in sorted(daemon.clients, key=lambda each: each.channel_id):
        if each.channel_id and (known or each is client):
            lines.append(f"{each.channel_id},4,{format_guid(each.guid)},"
                         f"{each.address}|Started {daemon.utc_since(each.connected_at)}")
    return ok(*lines)


# --- privilege 1 ---

@command("cdta chdata chkdata checkdata", 1, "", "number of buffered events")
def do_cdta(client: Client) -> str:
    client.daemon.read_all()
    return ok(f"{len(client.fifo)} ")


@command("clra clrall clearall", 1, "", "forget the buffered events")
def do_clra(client: Client) -> str:
    client.daemon.read_all()
    client.fifo.clear()
    return ok(text="All events cleared.")


@command("stat", 1, "",
         "counters: busoff,buswarnings,overruns,rxbytes,rxframes,txbytes,txframes")
def do_stat(client: Client) -> str:
    client.daemon.read_all()
    bus, health = client.daemon.bus, client.daemon.bus.health
    overruns = client.missed + bus.dropped - client.dropped_before
    return ok(f"{health.bus_offs},{health.warnings},{overruns},{client.rx_bytes},"
              f"{client.rx_frames},{client.tx_bytes},{client.tx_frames}")


@command("info", 1, "", 'state of the bus: status,code,subcode,"text"')
def do_info(client: Client) -> str:
    client.daemon.on_links()
    state = client.daemon.bus.health.state
    return ok(f'{state.status},{state.code},{state.subcode},"{state.text}"')


@command("chid getchid", 1, "", "channel id of this client")
def do_chid(client: Client) -> str:
    return ok(str(client.channel_id))


@command("ggid getguid", 1, "", "GUID of this client")
def do_ggid(client: Client) -> str:
    return ok(format_guid(client.guid))


# --- privilege 2 ---

@command("retr retrieve", 2, "[N]", "up to N buffered events, or one; all if N is negative")
def do_retr(client: Client, count: str = "1") -> str:
    everything = bool(re.fullmatch("-[0-9]+", count))
    asked = 0 if everything else parse_number(count, sys.maxsize, "the count")
    if client.stream_at < NEVER:
        return ok()
    client.daemon.read_all()
    if everything:
        asked = len(client.fifo)
    lines = [client.fifo.popleft() for _ in range(min(asked, len(client.fifo)))]
    final = ok() if len(lines) == asked else refusal("No event(s) available")
    return "".join(lines) + final


@command("rcvloop receiveloop", 2, "", "receive every event as it comes")
def do_rcvloop(client: Client) -> str:
    if client.stream_at == NEVER:
        client.stream_at = client.daemon.now + RCVLOOP_PAUSE_S
        client.sign_at = client.stream_at + SIGN_OF_LIFE_S
        client.daemon.soon(client.stream_at)
    return ok()


@command("quitloop", 2, "", "end the receive loop")
def do_quitloop(client: Client) -> str:
    client.stop_streaming()
    return ok()


# --- privilege 4 and 6 ---

@command("send", 4, "head,class,type,obid,datetime,timestamp,GUID,data...", "send an event")
def do_send(client: Client, text: str) -> str:
    can_id, data, interface = parse_event(text)
    # 14 zeros are this interface, too: VSCP Works writes them when it looks for nodes.
    if interface and interface[:14] not in (
            client.guid[:14], client.interface_guid[:14], GUID_ZERO[:14]):
        raise VscpError("no interface with this GUID here")
    return client.daemon.queue.send(client, can_id, data)


@command("sgid setguid", 6, "GUID", "set the GUID of this client; - restores the original one")
def do_sgid(client: Client, text: str) -> str:
    first_guid = client_guid(client.daemon.options.guid, client.channel_id)
    client.guid = first_guid if text in ("-", "{-}") else parse_guid(text)
    client.set_view()
    return ok()


@command("smsk setmask", 6, "priority,class,type,GUID",
         "set the mask: the bits in which an event must be like the filter")
def do_smsk(client: Client, text: str) -> str:
    client.mask = parse_filter(text, "mask")
    client.set_view()
    return ok()


@command("sflt setfilter", 6, "priority,class,type,GUID",
         "set the filter: what an event must be like in the bits of the mask")
def do_sflt(client: Client, text: str) -> str:
    client.filter = parse_filter(text, "filter")
    client.set_view()
    return ok()


# --- what only the full VSCP daemon has ---

@command("restart shutdown", MAX_PRIVILEGE, "", "not available in uvscpd")
def do_restart(_client: Client, *_arguments: str) -> str:
    raise VscpError("uvscpd is not capable of restart/shutdown")


@command("challenge measurement driver file udp remote var variable dm table test binary",
         0, "...", "only in the full VSCP daemon")
def do_unsupported(_client: Client, *_arguments: str) -> str:
    raise VscpError(ONLY_FULL_DAEMON)


# =============================================================================
# 10. Daemon
# =============================================================================
# The loop joins bus and clients. Each turn begins with reading the clock (`now`) and then
# calls what is ready and what is due.
#
# How the bus is read (BusReader):
#     after a sleep               one frame: most come alone, and a second call, only to find
#                                 the socket empty, costs as much again
#     readable again at once      until it is empty
#     8 frames within 20 ms,      the bus is not watched; every 5 ms, what has come. A wake-up
#     no SEND for 20 ms           costs more than handling a frame
# It is also read until it is empty before a command that counts or clears events, before a
# filter changes, and twice a second. The kernel passes only what some client wants: without
# clients, no frame reaches the daemon.
#
# What waits (SendQueue, and times):
#     a SEND, for room on the bus        until poll reports it or for 10 ms; refused 1.4 s after
#                                        its line was run
#     a sign of life, a late answer,     for tick(), which looks at everything that has a time,
#     a close, a check of the bus        twice a second or sooner (soon)

TICK_S = 0.5
FRAMES_PER_TURN = 500           # read from the bus before clients are served again
AT_ONCE_S = 0.001               # "again at once"
BUSY_FRAMES, BUSY_S = 8, 0.02   # the bus is busy when so many frames come within this time
GATHER_S = 0.005                # how often a busy bus is read
ANSWER_S = 0.02                 # for so long after a SEND, its client waits for an answer
# A SEND is refused if it has found no room for so long. VSCP's C++ programs wait 2 s, and take an
# answer that comes later for that of their next command. So none shall come later than 1.5 s; the
# other 0.1 s is for a long turn of the loop.
SEND_WAIT_S = 1.4
STOPPING_S = 0.5                # for last replies when the daemon ends
MAX_LEAVING = 100               # connections that linger at the same time


class Selector:
    """Waits for sockets; knows what each is watched for, and what is called then.

    Sockets are registered by the module selectors. To wait, its epoll is asked directly, if
    it has one: that takes 12 us, select() of selectors 37, of the 290 that a lone frame takes.
    """

    def __init__(self) -> None:
        self.selector = selectors.DefaultSelector()
        # By descriptor: what it is watched for, and what to call then, with that.
        self.watched: dict[int, tuple[int, Callable[[int], None]]] = {}
        # Waits for so many seconds; returns the descriptors that are ready, each in a pair.
        self.poll: Callable[[float], list[tuple[int, int]]] = self.select
        self.epoll: select.epoll | None = None
        if hasattr(select, "epoll") and hasattr(self.selector, "fileno"):
            self.epoll = select.epoll.fromfd(os.dup(self.selector.fileno()))
            self.poll = self.epoll.poll

    def select(self, timeout_s: float) -> "list[tuple[int, int]]":
        """What poll() is where there is no epoll."""
        return [(key.fd, events) for key, events in self.selector.select(timeout_s)]

    def call(self, ready: "list[tuple[int, int]]") -> None:
        """Call what is to be called for descriptors that poll() returned."""
        for descriptor, _ in ready:
            if descriptor in self.watched:      # else it was closed in this turn
                events, action = self.watched[descriptor]
                action(events)

    def watch(self, sock: socket.socket, events: int, action: "Callable[[int], None]") -> None:
        """Change what a socket is watched for; 0 is nothing. A closed one is not watched."""
        descriptor = sock.fileno()
        before = self.watched[descriptor][0] if descriptor in self.watched else 0
        if events == before or descriptor < 0:
            return
        if not events:
            self.forget(sock)
            return
        self.watched.pop(descriptor, None)  # if this raises, the selector watches nothing for us
        change = self.selector.modify if before else self.selector.register
        change(sock, events)
        self.watched[descriptor] = events, action

    def forget(self, sock: socket.socket) -> None:
        """Watch a socket no more; due before it is closed."""
        if self.watched.pop(sock.fileno(), None):
            self.selector.unregister(sock)

    def close(self) -> None:
        self.selector.close()
        if self.epoll:
            self.epoll.close()


class BusReader:
    """Decides when the bus is read, and how much at once; has the daemon hand it out."""

    def __init__(self, daemon: "Daemon") -> None:
        self.daemon = daemon
        self.read_at = 0.0                  # when the bus had been read
        self.gather_at = NEVER              # under load: the bus is not watched until then
        self.busy_until = 0.0               # the end of the present time of BUSY_S
        self.busy_frames = 0                # frames in it

    def watch(self) -> None:
        """Have the selector watch the bus for frames, unless they gather."""
        if self.daemon.bus.sock:
            self.daemon.selector.watch(self.daemon.bus.sock, READ * (self.gather_at == NEVER),
                                       self.on_readable)

    def read(self, limit: int) -> "tuple[int, bool]":
        """Read up to so many messages and hand the frames out.

        Returns the number of frames, and whether the socket is empty.
        """
        frames, empty = self.daemon.bus.read(limit)
        if frames:
            self.daemon.hand_out(frames)
        return len(frames), empty

    def on_readable(self, _mask: int) -> None:
        """There is something to read on the bus."""
        now = self.daemon.now
        slept = now - self.read_at > AT_ONCE_S
        frames, _ = self.daemon.bus.read(1 if slept else FRAMES_PER_TURN)
        if frames:
            self.daemon.hand_out(frames)
        self.read_at = time.monotonic()
        if self.busy_until < now:
            self.busy_until, self.busy_frames = now + BUSY_S, 0
        self.busy_frames += len(frames)
        if self.busy_frames >= BUSY_FRAMES and self.may_gather():
            self.gather_at = now + GATHER_S
            self.daemon.wake_by(self.gather_at)
            self.watch()

    def may_gather(self) -> bool:
        """Whether no client waits for the answer to a SEND."""
        return self.daemon.queue.sent_at + ANSWER_S < self.daemon.now

    def read_gathered(self) -> None:
        """Under load: take what has come by now, and again later, as long as that is much.

        Measured: at 1,000 frames/s, gathering takes half of the CPU time that waking up
        for each one takes.
        """
        count, empty = self.read(FRAMES_PER_TURN)
        if count > 1 and self.may_gather():
            self.gather_at = time.monotonic() + GATHER_S if empty else self.daemon.now
        else:
            self.gather_at = NEVER
            self.watch()

    def stop_gathering(self) -> None:
        """A client waits for an answer: read the bus in this turn."""
        self.gather_at = self.daemon.now
        self.daemon.wake_by(self.gather_at)

    def read_all(self) -> None:
        """Hand out all that the kernel holds, and count what it dropped."""
        for _ in range(FRAMES_IN_KERNEL // FRAMES_PER_TURN):
            _, empty = self.read(FRAMES_PER_TURN)
            if empty:
                break
        self.daemon.bus.count_drops()


class SendQueue:
    """Takes the clients' SENDs to the bus; those that find no room wait here as frames.

    A client has at most one here, as none of its lines runs meanwhile. The first one
    stays the first until it has been sent or its time is over; as they stand here in the
    order in which their lines were run, its time is over first. The time runs from when a
    line is run, not from when the client sent it.
    """

    def __init__(self, daemon: "Daemon") -> None:
        self.daemon = daemon
        # CAN id and data of the frame, and when it is refused.
        self.waiting: dict[Client, tuple[int, bytes, float]] = {}
        self.no_room_text = ""              # why they wait
        self.retry_at = NEVER               # by then, or when poll reports room
        self.sent_at = 0.0                  # the last SEND

    @property
    def refuse_at(self) -> float:
        """When the first one that waits is refused."""
        return next(iter(self.waiting.values()))[2] if self.waiting else NEVER

    def send(self, client: Client, can_id: int, data: bytes) -> str:
        """Send a frame; returns the reply, or "" if it waits: then the client is answered later.

        Raises VscpError when the bus cannot take it.
        """
        self.sent_at = self.daemon.now
        if self.daemon.reader.gather_at < NEVER:
            self.daemon.reader.stop_gathering()
        if not self.waiting and self.try_to_send(client, can_id, data):
            return SUCCESS
        self.waiting[client] = can_id, data, self.daemon.now + SEND_WAIT_S
        client.pause(NEVER)
        self.watch()
        return ""

    def try_to_send(self, client: Client, can_id: int, data: bytes) -> bool:
        """Give a frame to the bus; False if there is no room. Raises VscpError as send()."""
        try:
            self.daemon.bus.send(can_id, data, client)
        except NoRoom as full:
            self.no_room_text = str(full)
            self.retry_at = self.daemon.now + full.retry_s
            self.daemon.wake_by(self.retry_at)
            return False
        client.on_sent(len(data))
        return True

    def on_room(self, _mask: int = 0) -> None:
        """There may be room: send what waits, one frame of each client, until there is none."""
        self.retry_at = NEVER
        for client in list(self.waiting):
            if client not in self.waiting:      # the turn of another one has closed it
                continue
            can_id, data, _ = self.waiting[client]
            try:
                reply = SUCCESS if self.try_to_send(client, can_id, data) else ""
            except VscpError as error:
                reply = refusal(error)
            if not reply:
                break
            del self.waiting[client]
            client.resume(reply)
        self.watch()

    def tick(self) -> None:
        """Refuse what has waited too long; runs every TICK_S, so it knows each time beforehand."""
        while self.refuse_at <= self.daemon.now:
            client = next(iter(self.waiting))
            del self.waiting[client]
            client.resume(refusal(self.no_room_text))
        self.watch()
        self.daemon.soon(self.refuse_at)

    def forget(self, client: Client) -> None:
        """The client is gone."""
        if self.waiting.pop(client, None):
            self.watch()

    def watch(self) -> None:
        """Have the selector watch the bus for room, if somebody waits and poll can tell."""
        if not self.waiting:
            self.retry_at = NEVER
        room_wanted = bool(self.waiting) and self.retry_at == NEVER
        if self.daemon.bus.out:
            self.daemon.selector.watch(self.daemon.bus.out, WRITE * room_wanted, self.on_room)
        elif self.waiting:
            self.retry_at = self.daemon.now     # the interface is gone: on_room() answers that
            self.daemon.wake_by(self.retry_at)


class Daemon:
    """Everything that runs: the bus, the listening socket, the clients."""

    def __init__(self, options: argparse.Namespace, listener: socket.socket) -> None:
        self.options = options
        self.logins: Logins = options.logins
        # Times: a clock is slow to read, so a turn reads it once
        self.now = self.began = time.monotonic()    # when this turn began; when the daemon did
        self.tick_at = self.now
        self.wake_at = self.now                 # no later than anything that has a time
        self.stop_by = NEVER                    # when to stop at the latest; NEVER while running
        # Who is connected
        self.clients: dict[Client, None] = {}   # in the order in which they are served (serve_last)
        self.leaving: set[Client] = set()       # told to go, not counted any more
        self.views: dict[View, tuple[EventLines, list[Client]]] = {}
        self.last_id = 0
        self.frames = self.missed = 0           # handed out, missed by clients
        # Sockets
        self.selector = Selector()
        self.listener = listener
        self.selector.watch(listener, READ, self.on_connection)
        self.wake_up, self.wake_up_end = socket.socketpair()
        self.wake_up.setblocking(False)
        self.wake_up_end.setblocking(False)
        self.selector.watch(self.wake_up, READ, self.on_signal)
        self.bus = Bus(options.canbus, self.selector.forget)
        self.reader = BusReader(self)
        self.queue = SendQueue(self)
        self.discovery = Discovery(listener)
        self.systemd = Systemd(self.now)
        self.summary = Summary()                # with -d only
        self.rate_limit = RateLimit()           # of warnings about clients
        self.set_views()
        self.reader.watch()
        if self.bus.netlink and self.bus.netlink.sock:
            self.selector.watch(self.bus.netlink.sock, READ, self.on_links)

    def utc_since(self, since: float) -> str:
        """The date and time when `now` was `since`; right also if the clock is set later."""
        return utc_text(int(time.time() - (self.now - since)))

    # --- the loop ---

    def run(self) -> None:
        """Serve until a signal says stop."""
        while self.now < self.stop_by:
            timeout_s = self.wake_at - self.now
            ready = self.selector.poll(timeout_s if timeout_s > 0 else 0)
            self.now = time.monotonic()
            self.selector.call(ready)
            if self.wake_at <= self.now:
                self.on_time()

    def on_time(self) -> None:
        """Do what is due, and find out when the next thing is."""
        if self.reader.gather_at <= self.now:
            self.reader.read_gathered()
        if self.queue.retry_at <= self.now:
            self.queue.on_room()
        if self.tick_at <= self.now:
            self.tick()
        self.wake_at = min(self.tick_at, self.reader.gather_at, self.queue.retry_at)

    def wake_by(self, when: float) -> None:
        """Make sure that on_time() runs no later than this."""
        self.wake_at = min(self.wake_at, when)

    def soon(self, when: float) -> None:
        """Make sure that tick() runs no later than this."""
        self.tick_at = min(self.tick_at, when)
        self.wake_by(when)

    def tick(self) -> None:
        """Look at all that has a time: the bus, the clients, those that wait, systemd."""
        self.tick_at = self.now + min(TICK_S, self.systemd.watchdog_s)
        self.read_all()
        if self.stop_by == NEVER:
            self.bus.check(self.now)
        self.reader.watch()
        self.queue.watch()
        for client in [*self.clients, *self.leaving]:
            client.tick()
        self.queue.tick()
        if self.stop_by == NEVER:           # resume accepting, if descriptors had run out
            self.selector.watch(self.listener, READ, self.on_connection)
        rate = f"{self.bus.health.link.bitrate} bit/s, " if self.bus.health.link.bitrate else ""
        self.systemd.tick(
            self.now, f"{self.bus.name}: {self.bus.health.state.text}, {rate}"
            + counted(len(self.clients), "client"), self.totals())
        if self.stop_by < NEVER and not (self.clients or self.leaving):
            self.stop_by = self.now

    def totals(self) -> str:
        """How many frames were handed out, how many were lost here or in the kernel."""
        return f"{counted(self.frames, 'frame')}, {self.missed + self.bus.dropped} lost"

    def close(self) -> None:
        """End every connection."""
        self.systemd.notify("STOPPING=1")
        signal.set_wakeup_fd(-1)
        for client in [*self.clients, *self.leaving]:
            client.close()
        self.bus.end()
        self.listener.close()
        for thing in (self.selector, self.wake_up, self.wake_up_end, self.systemd.sock):
            thing.close()

    def on_signal(self, _mask: int) -> None:
        """Stop: tell every client, and end once all have gone or the time is up."""
        self.wake_up.recv(READ_SIZE)
        self.stop_by = min(self.stop_by, self.now + STOPPING_S)
        self.selector.forget(self.listener)
        for client in list(self.clients):
            client.write(refusal("uvscpd is stopping"))
            client.leave()
            client.turn()           # sends it, before too many are leaving
        self.soon(self.now)

    # --- from the bus to the clients ---

    def on_links(self, _mask: int = 0) -> None:
        """The kernel has said something of interfaces."""
        self.read_all()             # if the interface went, the socket is closed with what it holds
        self.bus.read_links()
        self.reader.watch()
        self.queue.watch()

    def read_all(self) -> None:
        """Hand out all that the kernel holds by now."""
        self.reader.read_all()

    def hand_out(self, frames: "list[Frame]") -> None:
        """Give frames to the clients that want them, but not to those that sent them."""
        if self.options.answer_probes:
            for can_id, data, *_ in frames:
                if can_id & PROBE_MASK == PROBE:
                    self.answer_probe(can_id, data)
        self.frames += len(frames)
        if log.debugging:
            self.show(frames)
        senders = {frame[4] for frame in frames if frame[4]} if self.bus.receives_own else ()
        for (_, value, mask), (event_lines, clients) in self.views.items():
            wanted = matching(frames, value, mask) if mask or value else frames
            if wanted:
                lines, block, size = event_lines.of(wanted)
                for client in clients:
                    if senders and client in senders:
                        self.hand_out_others(client, event_lines, wanted)
                    else:
                        client.put(lines, block, size)

    @staticmethod
    def hand_out_others(client: Client, event_lines: EventLines, frames: "list[Frame]") -> None:
        """Give a client those frames that it has not sent itself."""
        others = [frame for frame in frames if frame[4] is not client]
        if others:
            client.put(*event_lines.of(others))

    def show(self, frames: "list[Frame]") -> None:
        """Log events for -d, and count them for its summary."""
        for can_id, data, seconds, nanoseconds, sender in frames:
            source = sender.short_name if sender else self.bus.name
            log.debug(event_row(source, can_id, data), seconds * 1000000 + nanoseconds // 1000)
            self.summary.add(can_id, len(data), seconds)

    def answer_probe(self, can_id: int, data: bytes) -> None:
        """Send the response to a probe, if it gets one."""
        response = self.discovery.response(can_id, data, self.now)
        try:
            if response:
                self.bus.send(*response, self.discovery)
        except (NoRoom, VscpError) as error:
            log.debug(f"no answer to a probe: {error}")

    def on_missed(self, count: int) -> None:
        """A client's buffer has dropped so many events."""
        self.missed += count

    # --- who is connected ---

    def on_connection(self, _mask: int) -> None:
        """Somebody has connected."""
        if self.stop_by < NEVER:            # a signal came in the same turn
            return
        try:
            sock, address = self.listener.accept()
        except BlockingIOError:
            return
        except OSError as error:
            # Out of descriptors or memory: the next tick tries again. Else its peer has gone.
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                log.warning(f"cannot accept a connection: {error.strerror}")
                self.selector.forget(self.listener)
            return
        host = plain_address(address[0])
        try:
            sock.setblocking(False)
            self.read_all()         # what came before is not for this client
            client = Client(self, sock, host, address[1], self.next_channel_id())
        except OSError as error:
            log.debug(f"{host}: {error.strerror}")
            sock.close()
            return
        if not allowed(host, self.options.allow):
            client.refuse("Invalid or unknown peer.")
        elif len(self.clients) >= self.options.max_clients:
            client.refuse("Max number of clients connected.")
        else:
            self.clients[client] = None
            self.set_views()
            client.greet()
        client.turn()

    def next_channel_id(self) -> int:
        """A channel id that no client has, as long unused as possible; 0 without ids."""
        if len(self.options.guid) == 16:
            return 0
        taken = {client.channel_id for client in self.clients}
        self.last_id = self.last_id % 0xFFFF + 1
        while self.last_id in taken:
            self.last_id = self.last_id % 0xFFFF + 1
        return self.last_id

    def set_views(self) -> None:
        """Group the clients by view, and have the kernel pass only what one of them wants."""
        self.views = {}
        for client in self.clients:
            if client.view not in self.views:
                event_lines = EventLines(client.view[0], self.options.ns_timestamps)
                self.views[client.view] = event_lines, []
            self.views[client.view][1].append(client)
        filters = [(value, mask) for _, value, mask in self.views]
        if self.options.answer_probes:
            filters.append((PROBE, PROBE_MASK))
        self.bus.set_filters(filters, len(self.clients) > 1 or self.options.answer_probes)

    def serve_last(self, client: Client) -> None:
        """Serve this client after all others, so that those from its address get their try."""
        del self.clients[client]
        self.clients[client] = None

    def on_leaving(self, client: Client) -> None:
        """The client's slot is free, though its connection is not closed yet."""
        self.unlist(client)
        if len(self.leaving) >= MAX_LEAVING:
            # One that has received everything, else the one that lingers longest.
            first = min(self.leaving, key=lambda each: (bool(each.output), each.leave_by))
            first.close("too many are leaving")
        self.leaving.add(client)

    def on_closed(self, client: Client) -> None:
        """Forget a client whose connection is closed."""
        self.unlist(client)
        self.leaving.discard(client)
        if self.stop_by < NEVER:
            self.soon(self.now)

    def unlist(self, client: Client) -> None:
        """No events any more for this client, and no place among those that wait."""
        self.queue.forget(client)
        if client in self.clients:
            del self.clients[client]
            self.set_views()


# =============================================================================
# 11. Services beside the loop
# =============================================================================
# What a node may ask for on the bus, and what systemd hears. Neither knows the daemon:
# times and texts are passed in.

# Server discovery: CAN ids of class 0 type 27 and 28, and the bits that hold class and type.
PROBE, PROBE_RESPONSE, PROBE_MASK = 27 << 8, 28 << 8, 0x01FFFF00
MAX_ANSWERS = 10                # per second
STATUS_S = 10                   # how often systemd gets new numbers


def capabilities(listener: socket.socket) -> int:
    """The 64 bits of WCYD; a node that looks for a server gets the lower 16."""
    return CAPABILITIES | CAPABILITY_IPV6 * (listener.family == socket.AF_INET6)


def address_towards(peer: str) -> "str | None":
    """Our IPv4 address as seen from another one; None if there is no route. Nothing is sent."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.connect((peer, PORT))
            address: str = sock.getsockname()[0]
            return address
    except OSError:
        return None


class Discovery:
    """Tells nodes that look for a server where this one is (--answer-probes).

    High end server probe and response, class 0 types 27 and 28 (VSCP specification,
    Level I protocol): the probe may give 0 for TCP/IP and the node's IPv4 address; the
    response is 16 capability bits, our IPv4 address as the node reaches it, and the port.
    """

    short_name, channel_id = "uvscpd", 0        # of the sender, as a client has them

    def __init__(self, listener: socket.socket) -> None:
        self.listener = listener
        self.answered: deque[float] = deque(maxlen=MAX_ANSWERS)

    def response(self, can_id: int, data: bytes, now: float) -> "tuple[int, bytes] | None":
        """The CAN id and the data of the response to a probe; None if there is none to give."""
        address = self.address_for(data)
        full = len(self.answered) == MAX_ANSWERS
        if address is None or full and now < self.answered[0] + 1:
            return None
        self.answered.append(now)
        return can_id & 0x1C000000 | PROBE_RESPONSE, struct.pack(
            ">H4sH", capabilities(self.listener) & 0xFFFF, socket.inet_aton(address),
            self.listener.getsockname()[1])

    def address_for(self, data: bytes) -> "str | None":
        """The IPv4 address by which the sender of a probe reaches us, None if there is none."""
        if data and data[0] != 0:
            return None         # it does not speak TCP/IP
        bound = plain_address(self.listener.getsockname()[0])
        if bound not in EVERYWHERE:
            return None if ":" in bound else bound
        given = len(data) >= 5 and any(data[1:5])
        return address_towards(socket.inet_ntoa(data[1:5]) if given else "192.0.2.1")


class Systemd:
    """Tells systemd, if it asked (sd_notify(3)), that the daemon is ready, alive, and how it is."""

    def __init__(self, now: float) -> None:
        address = os.environ.get("NOTIFY_SOCKET", "")
        self.address = "\0" + address[1:] if address[:1] == "@" else address
        # Made once: the watchdog is fed also when the daemon is out of descriptors.
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self.watchdog_s = self.watchdog_period()
        self.feed_at = now if self.watchdog_s < NEVER else NEVER
        self.state = self.numbers = ""          # as it last heard them
        self.numbers_at = NEVER                 # the earliest time to send numbers alone

    @staticmethod
    def watchdog_period() -> float:
        """How often to report that we are alive, in seconds: twice as often as systemd demands."""
        period_us = os.environ.get("WATCHDOG_USEC", "")         # 64 bits
        ours = os.environ.get("WATCHDOG_PID") in (None, str(os.getpid()))
        asked = ours and re.fullmatch("[1-9][0-9]{0,19}", period_us)
        return int(period_us) / 2000000 if asked else NEVER

    def notify(self, text: str) -> bool:
        """Send systemd a message if it wants any; False if that failed."""
        try:
            if self.address:
                self.sock.sendto(text.encode(), self.address)
        except OSError as error:
            log.debug(f"{self.address}: {error.strerror}")
            return False
        return True

    def tick(self, now: float, state: str, numbers: str) -> None:
        """Send what is due: that we are alive, a state that changed, numbers every 10 s."""
        if self.feed_at <= now and self.notify("WATCHDOG=1"):
            self.feed_at = now + self.watchdog_s
        due = state != self.state or numbers != self.numbers and self.numbers_at <= now
        if due and self.notify(f"READY=1\nSTATUS={state}, {numbers}"):
            self.state, self.numbers, self.numbers_at = state, numbers, now + STATUS_S


# =============================================================================
# 12. What -d shows
# =============================================================================
# What an event says, for people who watch the bus with -d: from a frame to one line
# of printable ASCII. The protocol needs none of it, so the tables stay text until
# one is first looked at. To name an event, add it to EVENT_NAMES; to show what its
# data says, add a note to its name, a row to EVENT_DATA, or a case to event_meaning.

# The names of each list are numbered from 0; a number is that of the next name. In the lists
# MEASUREMENT and DATA, `TEMPERATURE=K,C,F` gives the units 0, 1 and 2, where they are sure. In all
# others, `ALARM=alarm`: data byte 0 is the alarm, byte 1 the zone, byte 2 the sub-zone;
# `GENERAL=-`: the data has no zones. A type without `=` has what its class has.
# Sources: vscp-class.h and vscp-type.h of the VSCP project; VSCP specification, page of each class.
EVENT_NAMES = """
CLASS: PROTOCOL ALARM=state SECURITY=data 10 MEASUREMENT MEASUREMENTX1 MEASUREMENTX2 MEASUREMENTX3
    MEASUREMENTX4 DATA 20 INFORMATION=index 30 CONTROL=index 40 MULTIMEDIA=value 50 AOL=index
    60 MEASUREMENT64 MEASUREMENT64X1 MEASUREMENT64X2 MEASUREMENT64X3 MEASUREMENT64X4 MEASUREZONE
    MEASUREZONEX1 MEASUREZONEX2 MEASUREZONEX3 MEASUREZONEX4 MEASUREMENT32 MEASUREMENT32X1
    MEASUREMENT32X2 MEASUREMENT32X3 MEASUREMENT32X4 85 SETVALUEZONE SETVALUEZONEX1 SETVALUEZONEX2
    SETVALUEZONEX3 SETVALUEZONEX4 WEATHER=index 95 WEATHER_FORECAST=index 100 PHONE 102
    DISPLAY=index 110 IR 120 CONFIGURATION=index 206 GNSS 212 WIRELESS 506 DIAGNOSTIC=index 508
    ERROR=index LOG LABORATORY LOCAL
PROTOCOL: GENERAL SEGCTRL_HEARTBEAT NEW_NODE_ONLINE PROBE_ACK RESERVED4 RESERVED5 SET_NICKNAME
    NICKNAME_ACCEPTED DROP_NICKNAME READ_REGISTER RW_RESPONSE WRITE_REGISTER ENTER_BOOT_LOADER
    ACK_BOOT_LOADER NACK_BOOT_LOADER START_BLOCK BLOCK_DATA BLOCK_DATA_ACK BLOCK_DATA_NACK
    PROGRAM_BLOCK_DATA PROGRAM_BLOCK_DATA_ACK PROGRAM_BLOCK_DATA_NACK ACTIVATE_NEW_IMAGE
    RESET_DEVICE PAGE_READ PAGE_WRITE RW_PAGE_RESPONSE HIGH_END_SERVER_PROBE
    HIGH_END_SERVER_RESPONSE INCREMENT_REGISTER DECREMENT_REGISTER WHO_IS_THERE
    WHO_IS_THERE_RESPONSE GET_MATRIX_INFO GET_MATRIX_INFO_RESPONSE GET_EMBEDDED_MDF
    GET_EMBEDDED_MDF_RESPONSE EXTENDED_PAGE_READ EXTENDED_PAGE_WRITE EXTENDED_PAGE_RESPONSE
    GET_EVENT_INTEREST GET_EVENT_INTEREST_RESPONSE 48 ACTIVATE_NEW_IMAGE_ACK
    ACTIVATE_NEW_IMAGE_NACK START_BLOCK_ACK START_BLOCK_NACK BLOCK_CHUNK_ACK BLOCK_CHUNK_NACK
    BOOT_LOADER_CHECK BOOT_LOADER_ABORT BOOT_LOADER_ABORT_ACK BOOT_LOADER_ABORT_NACK
ALARM: GENERAL=- WARNING ALARM=alarm SOUND LIGHT POWER EMERGENCY_STOP EMERGENCY_PAUSE
    EMERGENCY_RESET EMERGENCY_RESUME ARM DISARM WATCHDOG=index RESET=alarm
SECURITY: GENERAL=- MOTION GLASS_BREAK BEAM_BREAK SENSOR_TAMPER SHOCK_SENSOR SMOKE_SENSOR
    HEAT_SENSOR PANIC_SWITCH DOOR_OPEN WINDOW_OPEN CO_SENSOR FROST_DETECTED FLAME_DETECTED
    OXYGEN_LOW WEIGHT_DETECTED WATER_DETECTED CONDENSATION_DETECTED SOUND_DETECTED
    HARMFUL_SOUND_LEVEL TAMPER AUTHENTICATED UNAUTHENTICATED AUTHORIZED UNAUTHORIZED ID_CHECK
    PIN_OK PIN_FAIL PIN_WARNING PIN_ERROR PASSWORD_OK PASSWORD_FAIL PASSWORD_WARNING PASSWORD_ERROR
    GAS_SENSOR IN_MOTION_DETECTED NOT_IN_MOTION_DETECTED VIBRATION_DETECTED
MEASUREMENT: GENERAL COUNT LENGTH=m MASS=kg TIME=s,ms ELECTRIC_CURRENT=A TEMPERATURE=K,C,F
    AMOUNT_OF_SUBSTANCE=mol INTENSITY_OF_LIGHT=cd FREQUENCY=Hz RADIOACTIVITY=Bq,Ci FORCE=N
    PRESSURE=Pa,bar,psi ENERGY=J,kWh,Wh,eV POWER=W,hp(M),hp(I) ELECTRICAL_CHARGE=C
    ELECTRICAL_POTENTIAL=V ELECTRICAL_CAPACITANCE=F ELECTRICAL_RESISTANCE=ohm
    ELECTRICAL_CONDUCTANCE=S MAGNETIC_FIELD_STRENGTH=A/m,Oe MAGNETIC_FLUX=Wb
    MAGNETIC_FLUX_DENSITY=T,G INDUCTANCE=H FLUX_OF_LIGHT=lm ILLUMINANCE=lx
    RADIATION_DOSE_ABSORBED=Gy CATALYTIC_ACITIVITY=kat VOLUME=m3,l,ml,dl SOUND_INTENSITY=W/m2
    ANGLE=rad,deg,arcmin,arcsec POSITION=longitude,latitude SPEED=m/s,km/h,mph ACCELERATION=m/s2
    TENSION=N/m HUMIDITY=% FLOW=m3/s,l/s THERMAL_RESISTANCE=K/W REFRACTIVE_POWER=dpt
    DYNAMIC_VISCOSITY=Pa*s,Pl,P SOUND_IMPEDANCE=Pa*s/m SOUND_RESISTANCE=Pa*s/m3
    ELECTRIC_ELASTANCE=1/F LUMINOUS_ENERGY=lm*s LUMINANCE=cd/m2
    CHEMICAL_CONCENTRATION_MOLAR=mol/m3,ppm,% CHEMICAL_CONCENTRATION_MASS=kg/m3 RESERVED47
    RESERVED48 DEWPOINT=K,C,F RELATIVE_LEVEL ALTITUDE=m,ft,in AREA=m2,a,ha,km2
    RADIANT_INTENSITY=W/sr RADIANCE=W/sr/m2 IRRADIANCE=W/m2
    SPECTRAL_RADIANCE=W/sr/m2/nm,W/sr/m3,W/sr/m2/Hz SPECTRAL_IRRADIANCE=W/m2/nm,W/m3,W/m2/Hz
    SOUND_PRESSURE=Pa SOUND_DENSITY=Pa SOUND_LEVEL=dB DOSE_EQVIVALENT=Sv,rem
    RADIATION_DOSE_EXPOSURE=C/kg,R POWER_FACTOR REACTIVE_POWER=var REACTIVE_ENERGY=kvarh
DATA: GENERAL IO AD DA RELATIVE_STRENGTH=,dB,dBV SIGNAL_LEVEL=% SIGNAL_QUALITY=%,,dBm
INFORMATION: GENERAL=- BUTTON MOUSE=mode ON OFF ALIVE TERMINATING OPENED CLOSED
    NODE_HEARTBEAT BELOW_LIMIT ABOVE_LIMIT PULSE ERROR RESUMED PAUSED SLEEP GOOD_MORNING GOOD_DAY
    GOOD_AFTERNOON GOOD_EVENING GOOD_NIGHT SEE_YOU_SOON GOODBYE STOP START RESET_COMPLETED
    INTERRUPTED PREPARING_TO_SLEEP WOKEN_UP DUSK DAWN ACTIVE INACTIVE BUSY IDLE STREAM_DATA=-
    TOKEN_ACTIVITY=token STREAM_DATA_WITH_ZONE=- CONFIRM=- LEVEL_CHANGED=level WARNING STATE
    ACTION_TRIGGER=action SUNRISE SUNSET START_OF_RECORD=record END_OF_RECORD=record PRESET_ACTIVE
    DETECT OVERFLOW BIG_LEVEL_CHANGED SUNRISE_TWILIGHT_START SUNSET_TWILIGHT_START
    NAUTICAL_SUNRISE_TWILIGHT_START NAUTICAL_SUNSET_TWILIGHT_START
    ASTRONOMICAL_SUNRISE_TWILIGHT_START ASTRONOMICAL_SUNSET_TWILIGHT_START CALCULATED_NOON
    SHUTTER_UP SHUTTER_DOWN SHUTTER_LEFT SHUTTER_RIGHT SHUTTER_END_TOP SHUTTER_END_BOTTOM
    SHUTTER_END_MIDDLE SHUTTER_END_PRESET SHUTTER_END_LEFT SHUTTER_END_RIGHT LONG_CLICK
    SINGLE_CLICK DOUBLE_CLICK DATE TIME WEEKDAY LOCK UNLOCK DATETIME RISING FALLING UPDATED CONNECT
    DISCONNECT RECONNECT ENTER EXIT INCREMENTED DECREMENTED PROXIMITY_DETECTED
CONTROL: GENERAL=- MUTE=state ALL_LAMPS=state OPEN CLOSE TURNON TURNOFF START STOP RESET
    INTERRUPT=level SLEEP WAKEUP RESUME PAUSE ACTIVATE DEACTIVATE TURN_ALL_OFF TURN_ALL_ON
    TURN_ALL_X DIM_LAMPS=level CHANGE_CHANNEL=channel CHANGE_LEVEL=level
    RELATIVE_CHANGE_LEVEL=level MEASUREMENT_REQUEST STREAM_DATA=- SYNC=sensor
    ZONED_STREAM_DATA=sequence SET_PRESET=preset TOGGLE_STATE TIMED_PULSE_ON TIMED_PULSE_OFF
    SET_COUNTRY_LANGUAGE=code BIG_CHANGE_LEVEL SHUTTER_UP SHUTTER_DOWN SHUTTER_LEFT SHUTTER_RIGHT
    SHUTTER_MIDDLE SHUTTER_PRESET ALL_LAMPS_ON ALL_LAMPS_OFF LOCK UNLOCK PWM=repeats TOKEN_LOCK
    TOKEN_UNLOCK SET_SECURITY_LEVEL=level SET_SECURITY_PIN SET_SECURITY_PASSWORD SET_SECURITY_TOKEN
    REQUEST_SECURITY_TOKEN INCREMENT DECREMENT
MULTIMEDIA: GENERAL=- PLAYBACK=function NAVIGATOR_KEY_ENG=key ADJUST_CONTRAST ADJUST_FOCUS
    ADJUST_TINT ADJUST_COLOUR_BALANCE ADJUST_BRIGHTNESS ADJUST_HUE ADJUST_BASS ADJUST_TREBLE
    ADJUST_MASTER_VOLUME ADJUST_FRONT_VOLUME ADJUST_CENTRE_VOLUME ADJUST_REAR_VOLUME
    ADJUST_SIDE_VOLUME RESERVED16=- RESERVED17=- RESERVED18=- RESERVED19=- ADJUST_SELECT_DISK
    ADJUST_SELECT_TRACK ADJUST_SELECT_ALBUM ADJUST_SELECT_CHANNEL ADJUST_SELECT_PAGE
    ADJUST_SELECT_CHAPTER ADJUST_SELECT_SCREEN_FORMAT ADJUST_SELECT_INPUT_SOURCE
    ADJUST_SELECT_OUTPUT RECORD=function SET_RECORDING_VOLUME 40 TIVO_FUNCTION=function 50
    GET_CURRENT_TITLE=index SET_POSITION=index GET_MEDIA_INFO REMOVE_ITEM REMOVE_ALL_ITEMS=index
    SAVE_ALBUM 60 CONTROL=code CONTROL_RESPONSE=-
AOL: GENERAL=- UNPLUGGED_POWER UNPLUGGED_LAN CHASSIS_INTRUSION PROCESSOR_REMOVAL ENVIRONMENT_ERROR
    HIGH_TEMPERATURE FAN_SPEED VOLTAGE_FLUCTUATIONS OS_ERROR POWER_ON_ERROR SYSTEM_HUNG
    COMPONENT_FAILURE REBOOT_UPON_FAILURE REPAIR_OPERATING_SYSTEM UPDATE_BIOS_IMAGE
    UPDATE_DIAGNOSTIC_PROCEDURE
WEATHER: GENERAL=- SEASONS_WINTER SEASONS_SPRING SEASONS_SUMMER SEASONS_AUTUMN WIND_NONE WIND_LOW
    WIND_MEDIUM WIND_HIGH WIND_VERY_HIGH AIR_FOGGY AIR_FREEZING AIR_VERY_COLD AIR_COLD AIR_NORMAL
    AIR_HOT AIR_VERY_HOT AIR_POLLUTION_LOW AIR_POLLUTION_MEDIUM AIR_POLLUTION_HIGH AIR_HUMID AIR_DRY
    SOIL_HUMID SOIL_DRY RAIN_NONE RAIN_LIGHT RAIN_HEAVY RAIN_VERY_HEAVY SUN_NONE SUN_LIGHT SUN_HEAVY
    SNOW_NONE SNOW_LIGHT SNOW_HEAVY DEW_POINT STORM FLOOD EARTHQUAKE NUCLEAR_DISASTER FIRE LIGHTNING
    UV_RADIATION_LOW UV_RADIATION_MEDIUM UV_RADIATION_NORMAL UV_RADIATION_HIGH
    UV_RADIATION_VERY_HIGH WARNING_LEVEL1 WARNING_LEVEL2 WARNING_LEVEL3 WARNING_LEVEL4
    WARNING_LEVEL5 ARMAGEDON UV_INDEX
PHONE: GENERAL INCOMING_CALL OUTGOING_CALL RING=call ANSWER=call HANGUP=call GIVEUP=call
    TRANSFER=call DATABASE_INFO
DISPLAY: GENERAL=- CLEAR_DISPLAY POSITION_CURSOR WRITE_DISPLAY WRITE_DISPLAY_BUFFER
    SHOW_DISPLAY_BUFFER SET_DISPLAY_BUFFER_PARAM=- 32 SHOW_TEXT 48 SET_LED SET_COLOR
IR: GENERAL RC5 3 SONY12 32 LIRC 48 VSCP MAPITO
CONFIGURATION: GENERAL=- LOAD LOAD_ACK=- LOAD_NACK=- SAVE SAVE_ACK=- SAVE_NACK=- COMMIT COMMIT_ACK=-
    COMMIT_NACK=- RELOAD REALOD_ACK=- RELOAD_NACK=- RESTORE RESTORE_ACK=- RESTORE_NACK=- 30
    SET_PARAMETER SET_PARAMETER_DEFAULT SET_PARAMETER_ACK=- SET_PARAMETER_NACK=-
GNSS: GENERAL POSITION SATELLITES
WIRELESS: GENERAL GSM_CELL
DIAGNOSTIC: GENERAL OVERVOLTAGE UNDERVOLTAGE VBUS_LOW BATTERY_LOW BATTERY_FULL BATTERY_ERROR
    BATTERY_OK OVERCURRENT CIRCUIT_ERROR SHORT_CIRCUIT OPEN_CIRCUIT MOIST WIRE_FAIL WIRELESS_FAIL
    IR_FAIL 1WIRE_FAIL RS222_FAIL RS232_FAIL RS423_FAIL RS485_FAIL CAN_FAIL LAN_FAIL USB_FAIL
    WIFI_FAIL NFC_RFID_FAIL LOW_SIGNAL HIGH_SIGNAL ADC_FAIL ALU_FAIL ASSERT DAC_FAIL DMA_FAIL
    ETH_FAIL EXCEPTION FPU_FAIL GPIO_FAIL I2C_FAIL I2S_FAIL INVALID_CONFIG MMU_FAIL NMI OVERHEAT
    PLL_FAIL POR_FAIL PWM_FAIL RAM_FAIL ROM_FAIL SPI_FAIL STACK_FAIL LIN_FAIL UART_FAIL
    UNHANDLED_INT MEMORY_FAIL VARIABLE_RANGE WDT EEPROM_FAIL ENCRYPTION_FAIL BAD_USER_INPUT
    DECRYPTION_FAIL NOISE BOOTLOADER_FAIL PROGRAMFLOW_FAIL RTC_FAIL SYSTEM_TEST_FAIL SENSOR_FAIL
    SAFESTATE SIGNAL_IMPLAUSIBLE STORAGE_FAIL SELFTEST_FAIL ESD_EMC_EMI TIMEOUT LCD_FAIL
    TOUCHPANEL_FAIL NOLOAD COOLING_FAIL HEATING_FAIL TX_FAIL RX_FAIL EXT_IC_FAIL CHARGING_ON
    CHARGING_OFF
ERROR: SUCCESS ERROR 7 CHANNEL FIFO_EMPTY FIFO_FULL FIFO_SIZE FIFO_WAIT GENERIC HARDWARE INIT_FAIL
    INIT_MISSING INIT_READY NOT_SUPPORTED OVERRUN RCV_EMPTY REGISTER TRM_FULL 28 LIBRARY PROCADDRESS
    ONLY_ONE_INSTANCE SUB_DRIVER TIMEOUT NOT_OPEN PARAMETER MEMORY INTERNAL COMMUNICATION USER
    PASSWORD CONNECTION INVALID_HANDLE OPERATION_FAILED BUFFER_SMALL ITEM_UNKNOWN NAME_USED
    DATA_WRITE ABORTED INVALID_POINTER
LOG: GENERAL MESSAGE START STOP LEVEL
LABORATORY: GENERAL
LOCAL: GENERAL
"""

# Class and types, the struct format of the data (`*`: at least one more byte), what it says.
# Source: VSCP specification, CLASS1.PROTOCOL, CLASS1.GNSS, CLASS1.WIRELESS.
EVENT_DATA = """
0.2,33,35,40 B node {}
0.6 BB node {} becomes node {}
0.8 B node {}
0.8 BB node {} flags {:08b}
0.8 BBB node {} flags {:08b} after {} s
0.9,29,30 BB node {} register {}
0.10 BB register {} = {}
0.11 BBB node {} register {} = {}
0.12 BBBBBBH node {} algorithm {}, GUID bytes 0 3 5 7: {:X} {:X} {:X} {:X}, page {}
0.13 II block size {} blocks {}
0.14 B error {}
0.15,19,20 I block {}
0.15 IB block {} memory type {}
0.15 IBB block {} memory type {} bank {}
0.17 HI CRC {:04X} block {}
0.18,21 BI error {} block {}
0.22 H CRC {:04X}
0.23 BBBBB frame {}, GUID {:X}:{:X}:{:X}:{:X}
0.24 BBB node {} register {} count {}
0.25 BB* node {} register {} = {}
0.26 B* frame {}: {}
0.27 xBBBB TCP/IP at {}.{}.{}.{}
0.28 HBBBBH TCP/IP {1}.{2}.{3}.{4} port {5}, capabilities {0:04X}
0.31 B node {}
0.37 BHB node {} page {} register {}
0.37 BHBB node {} page {} register {} count {}
0.38 BHB* node {} page {} register {} = {}
0.39 BHB* page {1} register {2} = {3}, frame {0}
206.1 ff latitude {:.7g}, longitude {:.7g}
206.2 B satellites {}
212.1 I GSM cell {}
"""
# Classes that have the types of another one's list.
SAME_TYPES = {60: "MEASUREMENT", 65: "MEASUREMENT", 70: "MEASUREMENT", 85: "MEASUREMENT",
              95: "WEATHER"}
BUTTON_STATES = {0: "released", 1: "pressed", 2: "pressed and released"}
MAX_PLACES = 30                 # of the exponent of a measured value; more is not meant so


@lru_cache(maxsize=None)
def event_names() -> "dict[tuple[str, int], tuple[str, str]]":
    """EVENT_NAMES by list and number: the name, and what stands after its `=`.

    >>> event_names()["MEASUREMENT", 6], event_names()["CLASS", 511]
    (('TEMPERATURE', 'K,C,F'), ('LOCAL', ''))
    """
    names = {}
    for word in EVENT_NAMES.split():
        if word.endswith(":"):
            title, number = word[:-1], 0
        elif word.isdigit():
            number = int(word)
        else:
            name, _, note = word.partition("=")
            names[title, number] = name, note
            number += 1
    return names


@lru_cache(maxsize=1024)
def names_of(vscp_class: int, vscp_type: int) -> "tuple[str, str, str]":
    """The names of a class and a type, and what is noted on the type; "" for what is unknown.

    Classes 60, 65, 70 and 85 have the types of class 10; those of 11-14, and so of
    61-64 and the like, are further types (VSCP specification, Measurements).

    >>> names_of(65, 6), names_of(20, 3), names_of(11, 3)[:2]
    (('MEASUREZONE', 'TEMPERATURE', 'K,C,F'), ('INFORMATION', 'ON', 'index'), ('MEASUREMENTX1', ''))
    """
    class_name, class_note = event_names().get(("CLASS", vscp_class), ("", ""))
    title = SAME_TYPES.get(vscp_class, class_name)
    type_name, type_note = event_names().get((title, vscp_type), ("", ""))
    return class_name, type_name, type_note or class_note


def event_name(vscp_class: int, vscp_type: int) -> str:
    """The names of a class and a type, as far as they are known, and their numbers.

    >>> event_name(20, 3), event_name(11, 3), event_name(400, 3)
    ('INFORMATION ON (20.3)', 'MEASUREMENTX1 (11.3)', '(400.3)')
    """
    class_name, type_name, _ = names_of(vscp_class, vscp_type)
    return " ".join(filter(None, (class_name, type_name, f"({vscp_class}.{vscp_type})")))


def coded_value(coding: int, value: bytes) -> str:
    """The value in the bytes after a data coding byte, whose bits 7-5 are their format.

    Raises ValueError or struct.error when they are not in that format. A float is shown to 7
    digits, a double to 15; a normalized integer has at most 15. Source: VSCP specification,
    Measurements, "VSCP data coding".

    >>> coded_value(0x80, bytes.fromhex("8100D7")), coded_value(0x80, bytes.fromhex("021B22"))
    ('21.5', '694600')
    """
    form = coding >> 5
    if form == 5:
        return f"{struct.unpack('>f', value)[0]:.7g}"
    if form == 6:
        return f"{struct.unpack('>d', value)[0]:.15g}"
    if form == 0 and value:
        return "bits " + " ".join(f"{byte:08b}" for byte in value)
    if form == 1 and value:
        return "bytes " + " ".join(map(str, value))
    if form == 2 and re.fullmatch(b"[-+.0-9eE]+\0*", value):
        return value.rstrip(b"\0").decode()
    if form == 3 and value:
        return str(int.from_bytes(value, "big", signed=True))
    if form == 4 and len(value) > 1:
        # Byte 0: how many places to shift the decimal point; to the left if bit 7 is set.
        places = (value[0] & 0x7F) * (-1 if value[0] & 0x80 else 1)
        number = int.from_bytes(value[1:], "big", signed=True)
        return f"{float(f'{number}e{places}'):.15g}"
    raise ValueError("not in the format of the data coding")


def measured(units: str, coding: int, value: bytes) -> str:
    """As coded_value, with the unit (bits 4-3 of the coding): its name, or its number if not 0.

    Bits and bytes have none.

    >>> measured("K,C,F", 0x8A, bytes.fromhex("8100D7")), measured("", 0x68, b"\\xFF")
    ('21.5 C', '-1, unit 1')
    """
    text, number = coded_value(coding, value), coding >> 3 & 3
    if coding >> 5 < 2:
        return text
    unit = (units.split(",") + [""] * 4)[number]
    return f"{text} {unit}" if unit else f"{text}, unit {number}" if number else text


def time_text(coding: int, value: bytes) -> str:
    """A time that is no number: in unit 2 a date in seven bytes, in unit 3 the text HHMMSS.

    "" for any other. Source: VSCP specification, CLASS1.MEASUREMENT, type 4.

    >>> time_text(0x30, bytes.fromhex("07EA0B16172000")), time_text(0x58, b"233200")
    ('2026-11-22 23:32:00', '23:32:00')
    """
    form, unit = coding >> 5, coding >> 3 & 3
    if unit == 2 and form != 2 and len(value) == 7:
        return "{:04}-{:02}-{:02} {:02}:{:02}:{:02}".format(*struct.unpack(">H5B", value))
    digits = value.rstrip(b"\0").decode("latin-1")
    if unit == 3 and form == 2 and re.fullmatch("[0-9]{6}", digits):
        return f"{digits[:2]}:{digits[2:4]}:{digits[4:]}"
    return ""


def zones(data: bytes) -> "list[str]":
    """Zone and sub-zone, as far as they are there, in words; 255 is all."""
    return [f"all {word}s" if byte == 255 else f"{word} {byte}"
            for word, byte in zip(("zone", "sub-zone"), data)]


def zone_text(first: str, data: bytes) -> str:
    """What data bytes 0-2 say, as far as they are there: `first`, zone, sub-zone.

    >>> zone_text("level", bytes([50, 1, 255, 7]))
    'level 50, zone 1, all sub-zones'
    """
    return ", ".join([*(f"{first} {byte}" for byte in data[:1]), *zones(data[1:])])


def measured_in_zone(units: str, data: bytes) -> str:
    """What the data of a measurement with index, zone and sub-zone before its coding says.

    Some nodes leave the coding out, and the exponent of a normalized integer stands there.
    What is read then has an exponent that nobody means, so the bytes are shown instead.

    >>> measured_in_zone("K,C,F", bytes.fromhex("010203898100D7"))
    '21.5 C, sensor 1, index 1, zone 2, sub-zone 3'
    >>> measured_in_zone("K,C,F", bytes.fromhex("00FFFF826E89"))
    '82 6E 89?, index 0, all zones, all sub-zones'
    """
    coding, value = data[3], data[4:]
    if coding >> 5 == 4 and value[0] & 0x7F > MAX_PLACES:
        return f"{hex_text(data[3:])}?, {zone_text('index', data)}"
    return f"{measured(units, coding, value)}, sensor {coding & 7}, {zone_text('index', data)}"


def button_text(data: bytes) -> str:
    """What the data of BUTTON says: bits 2-0 of byte 0 are the state, bits 7-3 the repeats.

    Source: VSCP specification, CLASS1.INFORMATION, type 1.

    >>> button_text(bytes([0x11, 1, 35, 0, 11]))
    'pressed, 2 repeats, zone 1, sub-zone 35, code 11'
    """
    state, repeats = data[0] & 7, data[0] >> 3
    parts = [BUTTON_STATES.get(state, f"state {state}")]
    if repeats:
        parts.append(counted(repeats, "repeat"))
    parts += zones(data[1:])
    parts += [f"{word} {data[place] << 8 | data[place + 1]}"
              for word, place in (("code", 3), ("code page", 5)) if len(data) > place + 1]
    return ", ".join(parts)


@lru_cache(maxsize=1024)
def data_layout(vscp_class: int, vscp_type: int, length: int) -> "tuple[struct.Struct, str]":
    """The row of EVENT_DATA for a type with this many data bytes, or an empty row.

    >>> data_layout(0, 38, 6)[1]
    'node {} page {} register {} = {}'
    """
    for row in EVENT_DATA.strip().splitlines():
        event, form, text = row.split(None, 2)
        number, _, types = event.partition(".")
        layout = struct.Struct(">" + form.rstrip("*"))
        fits = length > layout.size if form.endswith("*") else length == layout.size
        if fits and number == str(vscp_class) and str(vscp_type) in types.split(","):
            return layout, text
    return struct.Struct(""), ""


def data_meaning(vscp_class: int, vscp_type: int, data: bytes) -> str:
    """What the data of an event says, by its row of EVENT_DATA.

    >>> data_meaning(0, 11, bytes([5, 16, 42])), data_meaning(206, 2, b"\\7")
    ('node 5 register 16 = 42', 'satellites 7')
    """
    layout, text = data_layout(vscp_class, vscp_type, len(data))
    return text.format(*layout.unpack_from(data), " ".join(map(str, data[layout.size:])))


def protocol_meaning(vscp_type: int, data: bytes) -> str:
    """What the data of an event of class 0 says.

    >>> protocol_meaning(31, b""), protocol_meaning(31, b"\\5")
    ('all nodes', 'node 5')
    """
    if vscp_type == 31 and data in (b"", b"\xFF"):
        return "all nodes"
    if vscp_type == 32 and len(data) > 1:
        # Seven frames, each its number and what is next of 16 bytes of GUID, 32 of the address
        # of the node's description (MDF), and a zero.
        guid_size = max(0, 16 - 7 * data[0])
        guid, mdf = data[1:][:guid_size], data[1:][guid_size:].rstrip(b"\0")
        mdf_text = "".join(chr(byte) if 0x20 <= byte <= 0x7E else "." for byte in mdf)
        return (f"frame {data[0]}" + (f", GUID {format_guid(guid)}" if guid else "")
                + (f", MDF {mdf_text}" if mdf else ""))
    return data_meaning(0, vscp_type, data)


def event_meaning(can_id: int, data: bytes) -> str:
    """What the data (0-8 bytes) of an event says; "" if that is unknown or the data malformed.

    Source: VSCP specification, the page of each class, "Data format".

    >>> event_meaning(0x0C0A0605, bytes.fromhex("8A8100D7"))
    '21.5 C, sensor 2'
    """
    vscp_class, vscp_type = can_id >> 16 & 0x1FF, can_id >> 8 & 0xFF
    note = names_of(vscp_class, vscp_type)[2]
    try:
        if vscp_class == 0:
            return protocol_meaning(vscp_type, data)
        if 10 <= vscp_class <= 15:
            text = time_text(data[0], data[1:]) if (vscp_class, vscp_type) == (10, 4) else ""
            text = text or measured(note, data[0], data[1:])
            return f"{text}, sensor {data[0] & 7}"
        if 60 <= vscp_class <= 64:
            return measured(note, 0xC0, data)       # a double
        if 70 <= vscp_class <= 74:
            return measured(note, 0xA0, data)       # a float
        if 65 <= vscp_class <= 69 or 85 <= vscp_class <= 89:
            return measured_in_zone(note, data)
        if (vscp_class, vscp_type) == (20, 1):
            return button_text(data)
        text = data_meaning(vscp_class, vscp_type, data)
        if text:
            return text
    except (ValueError, IndexError, struct.error):
        return ""
    return zone_text(note, data) if note.isalpha() else ""


def error_meaning(can_id: int, data: bytes) -> str:
    """What an error frame says.

    >>> error_meaning(0x224, bytes([0, 0x20, 0, 0, 0, 0, 128, 0]))
    'controller (transmit passive), nobody acknowledges, errors sending 128, receiving 0'
    """
    rows = errors_in(can_id, data)
    states = ", ".join(row[4] for row in rows if row[0] == ERR_CRTL)
    texts = ["controller" + f" ({states})" * bool(states)] if can_id & ERR_CRTL else []
    texts += [row[4] for row in rows if row[0] != ERR_CRTL] or ["unknown"] * (not texts)
    # Some drivers give the counters without saying so, as the class is from Linux 6.0.
    if len(data) == 8 and (can_id & ERR_COUNTERS or any(data[6:])):
        texts.append(f"errors sending {data[6]}, receiving {data[7]}")
    return ", ".join(texts)


def hex_text(data: bytes) -> str:
    """The bytes as `candump` shows them."""
    return " ".join(f"{byte:02X}" for byte in data)


def event_row(source: str, can_id: int, data: bytes) -> str:
    """The line that shows an event: where it came from, CAN id, names, sender, data, meaning.

    The sender is a node's nickname or the host, with its priority, 0 the highest.
    Columns line up for names of up to 30 characters and 4 bytes of data.

    >>> event_row("can0", 0x0C140305, bytes([0, 1, 35]))[:80]
    'can0      * 0C140305  INFORMATION ON (20.3)          node 5 p3   00 01 23     in'
    """
    name = event_name(can_id >> 16 & 0x1FF, can_id >> 8 & 0xFF)
    node = f"node {can_id & 0xFF}" if can_id & 0xFF else "host"
    who = f"{node} p{can_id >> 26}" + " hard" * (can_id >> 25 & 1)
    return (f"{source:<9} * {can_id:08X}  {name:<30} {who:<11} {hex_text(data):<12} "
            f"{event_meaning(can_id, data)}").rstrip()


def not_vscp_row(source: str, can_id: int, data: bytes) -> str:
    """The line that shows a frame that is not VSCP: error, standard or remote.

    >>> not_vscp_row("can0", 0x123, b"\\xFF"), not_vscp_row("can0", ERR_FLAG | 0x40, b"")
    ('can0      - 123       standard frame, not VSCP FF', 'can0      ! error frame: bus off')
    """
    if can_id & ERR_FLAG:
        return f"{source:<9} ! error frame: {error_meaning(can_id & EFF_MASK, data)}"
    kind = "remote" if can_id & RTR_FLAG else "standard"
    number = f"{can_id & EFF_MASK:08X}" if can_id & EFF_FLAG else f"{can_id & 0x7FF:03X}"
    text = hex_text(data) if kind == "standard" else ""
    return f"{source:<9} - {number:<8}  {kind} frame, not VSCP {text}".rstrip()


class Summary:
    """What was on the bus, for -d when the daemon ends."""

    def __init__(self) -> None:
        self.by_class: dict[int, int] = {}
        self.bits = 0                       # of all frames, without stuff bits
        self.second = 0                     # of the last frame
        self.in_second = self.most_in_second = 0            # frames
        self.bits_in_second = self.most_bits_in_second = 0

    def add(self, can_id: int, length: int, seconds: int) -> None:
        """Count a frame of this second with so many data bytes."""
        vscp_class, bits = can_id >> 16 & 0x1FF, FRAME_BITS - 8 * (8 - length)
        self.by_class[vscp_class] = self.by_class.get(vscp_class, 0) + 1
        self.bits += bits
        if seconds != self.second:
            self.second, self.in_second, self.bits_in_second = seconds, 0, 0
        self.in_second += 1
        self.bits_in_second += bits
        self.most_in_second = max(self.most_in_second, self.in_second)
        self.most_bits_in_second = max(self.most_bits_in_second, self.bits_in_second)

    def text(self, source: str, elapsed_s: float, errors: int, bitrate: "int | None") -> str:
        """One line about all, then one for each class, the most frequent first."""
        frames = sum(self.by_class.values())
        seconds = max(1.0, elapsed_s)
        classes = sorted(self.by_class.items(), key=lambda item: -item[1])
        load = (f"; bus load {self.bits / seconds / bitrate:.0%}, at most "
                f"{self.most_bits_in_second / bitrate:.0%}" if bitrate else "")
        return "\n".join([
            f"{source}: {counted(frames, 'frame')} in {duration_text(elapsed_s)}, "
            f"{frames / seconds:.1f} per second, at most {self.most_in_second}{load}; "
            f"{counted(errors, 'error frame')}",
            *(f"{count:9} " + f"{names_of(number, 0)[0]} ({number})".lstrip()
              for number, count in classes)])


# =============================================================================
# 13. Options
# =============================================================================
# Checks all that can be checked before anything starts. A wrong value is one line on
# stderr and exit status 2. To add an option, add it to its group in make_parser.

PORT = 8598                     # uvscpd's; the full VSCP daemon has 9598
MAX_FILE_DEPTH = 10             # an @FILE within an @FILE ...
SIOCGIFADDR, SIOCGIFHWADDR = 0x8915, 0x8927     # linux/sockios.h


class Parser(argparse.ArgumentParser):
    """argparse that raises its errors."""

    def error(self, message: str) -> "NoReturn":
        """Raise VscpError with what is wrong, without words that may be a password."""
        text = re.sub(r"(--[\w-]+)=.*?(?= could match|$)", r"\1", message)
        text = re.sub(r"(ignored explicit argument).*", r"\1", text)
        if text.startswith("unrecognized arguments"):
            names = [word for word in text.split() if word.startswith("-")]
            text = " ".join(["unrecognized arguments" + ":" * bool(names), *names]) + ", see --help"
        raise VscpError(text)


def read_text(path: str) -> "tuple[list[str], bool]":
    """The lines of a file that may have been saved on Windows, and whether anybody can read it.

    Raises VscpError if it cannot be read, or is in UTF-16. What is not UTF-8 becomes
    surrogates, as in the arguments of the process.
    """
    try:
        with open(path, "rb") as file:
            content = file.read()
            readable = bool(os.fstat(file.fileno()).st_mode & 0o007)
    except (OSError, ValueError) as error:
        raise VscpError(getattr(error, "strerror", error)) from None
    if content[:2] in (b"\xFF\xFE", b"\xFE\xFF"):
        raise VscpError("this file is in UTF-16, save it as UTF-8")
    if content[:3] == b"\xEF\xBB\xBF":         # a byte order mark
        content = content[3:]
    text = content.replace(b"\r\n", b"\n").replace(b"\r", b"\n").decode("utf-8", "surrogateescape")
    return text.split("\n"), readable


def split_argument_line(line: str) -> "list[str]":
    """The arguments in a line of @FILE: one, or an option and its value, `--port 8598`.

    A value may stand in quotes; after it, a `#` that follows a space starts a comment.
    """
    if "\0" in line:
        raise VscpError("a zero byte")
    option, rest = re.findall(r"(?s)^(--[^\s=]+|-[^\s-]|)(.*)", line.strip())[0]
    is_long, glued = option.startswith("--"), rest.startswith("=")
    equals = is_long and glued
    rest = rest[equals:].strip()
    quoted = re.fullmatch(r"""(["'])(.*?)\1(?:\s+#.*)?""", rest)
    value = quoted[2] if quoted else re.sub(r"\s+#.*" if equals else r"(^|\s+)#.*", "", rest)
    if is_long and (value or quoted or equals):
        return [f"{option}={value}"]    # in one piece, or @... would be taken for a file
    if option and value.startswith("=") and not glued:
        return [option, value]          # in one piece argparse would drop the `=`
    return [option + value] if option or value else []


def expand_files(arguments: "list[str]", place: str = "", depth: int = 0
                 ) -> "list[tuple[str, str]]":
    """The arguments, with those in FILE instead of each @FILE, and where each stands.

    That is `FILE: line N: `, or "" on the command line. Raises VscpError if a file
    cannot be read.
    """
    expanded: list[tuple[str, str]] = []
    for argument in arguments:
        if not argument.startswith("@"):
            expanded.append((argument, place))
            continue
        path = argument[1:]
        if depth == MAX_FILE_DEPTH:
            raise VscpError(f"{place}too many files within files")
        try:
            lines, _ = read_text(path)
        except VscpError as error:
            raise VscpError(f"{place}cannot read {path}: {error}") from None
        for number, line in enumerate(lines, 1):
            place_within = f"{path}: line {number}: "
            try:
                words = split_argument_line(line)
            except VscpError as error:
                raise VscpError(f"{place_within}{error}") from None
            expanded += expand_files(words, place_within, depth + 1)
    return expanded


def number_from(least: int, most: int) -> "Callable[[str], int]":
    """An argparse type: a decimal number in this range."""
    def convert(text: str) -> int:
        if not re.fullmatch("[0-9]{1,9}", text) or not least <= int(text) <= most:
            raise VscpError(f"'{text}' is not a number from {least} to {most}")
        return int(text)
    return convert


def guid_argument(text: str) -> bytes:
    """The 16 bytes of a GUID, or the first 12, to which each client's id is added.

    `mac` and `ip` are the VSCP daemon's: FF FF FF FF FF FF FF FE and the upper four
    bytes of the Ethernet address, FF FF FF FF FF FF FF FD and the IPv4 address.
    `mac:eth0` and `ip:eth0` say of which interface.
    """
    kind, _, name = text.partition(":")
    try:
        if kind in ("mac", "ip"):
            return own_guid(kind, name)
        guid = guid_bytes(text)
        if len(guid) not in (12, 16):
            raise VscpError("Invalid GUID")
        return guid
    except VscpError:
        raise VscpError(UNSURE_GUID if "::" in text else f"'{text}' is not 16 or 12 hexadecimal "
                        "bytes between colons, mac or ip") from None
    except LookupError:
        raise VscpError(f"no interface with an address for '{text}'") from None
    except OSError as error:
        raise VscpError(f"cannot list the network interfaces: {error.strerror}") from None


def own_guid(kind: str, name: str) -> bytes:
    """12 bytes of a GUID from the `mac` or the `ip` address of an interface.

    Without a name it is the first one, in the order in which the kernel numbers them, so
    that it is the same at boot and later. Made-up Ethernet addresses (docker0, veth) are taken
    only if there is no other. Raises LookupError when there is no address.
    """
    made_up = b""
    for _, each in sorted(socket.if_nameindex()):
        if each != (name or each) or each == "lo":
            continue
        address = interface_address(kind, each)
        if kind == "ip" and address:
            return bytes([255] * 7 + [0xFD]) + address
        if address and not address[0] & 2:      # bit 1: locally administered
            return bytes([255] * 7 + [0xFE]) + address[:4]
        made_up = made_up or address
    if not made_up:
        raise LookupError(kind)
    return bytes([255] * 7 + [0xFE]) + made_up[:4]


def interface_address(kind: str, name: str) -> bytes:
    """The 6 bytes of an interface's Ethernet address, or the 4 of its IPv4 address; b"": none."""
    request = struct.pack("16s24x", name.encode())              # struct ifreq
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            answer = fcntl.ioctl(sock, SIOCGIFHWADDR if kind == "mac" else SIOCGIFADDR, request)
        except OSError:
            return b""
    if kind == "ip":
        return answer[20:24]
    # struct sockaddr: family (1: Ethernet), address
    is_ethernet = struct.unpack_from("=H", answer, 16)[0] == 1 and any(answer[18:24])
    return answer[18:24] if is_ethernet else b""


def address_argument(text: str) -> str:
    address, _, zone = text.partition("%")
    for family in (socket.AF_INET, socket.AF_INET6):
        try:
            socket.inet_pton(family, address)
        except OSError:
            continue
        if text.isascii() and (family == socket.AF_INET6 or not zone):
            return text
    raise VscpError(f"'{text}' is not an IPv4 or IPv6 address")


def interface_argument(text: str) -> str:
    # IFNAMSIZ is 16 with the final zero; the kernel's dev_valid_name has the rest.
    if text != ":virtual:" and not re.fullmatch(r"(?!\.\.?$)[!-.0-9;-~]{1,15}", text):
        raise VscpError(f"'{text}' is not the name of an interface")
    return text


def login_argument(text: str) -> str:
    # What a client can give: one word of a command line.
    if not re.fullmatch("[!-~]{1,255}", text):
        raise VscpError("only printable ASCII characters without spaces, 255 at most")
    return text


def read_users(path: str) -> "tuple[dict[str, User], bool]":
    """The users in a file: NAME PASSWORD [PRIVILEGE [HOST...]], one per line; `#` starts a comment.

    And whether anybody can read it.
    """
    users: dict[str, User] = {}
    lines, readable = read_text(path)
    for number, line in enumerate(lines, 1):
        words = re.findall(r"[^ \t]+", re.split(r"(?:^|[ \t])#", line)[0])
        try:
            if len(words) == 1:
                raise VscpError("a user needs a name and a password")
            if words:
                name, password = map(login_argument, words[:2])
                if name in users:
                    raise VscpError(f"user {name} is listed twice")
                privilege = words[2] if words[2:] else str(MAX_PRIVILEGE)
                if not re.fullmatch("[0-9]|1[0-5]", privilege):     # perhaps a part of the password
                    raise VscpError("the privilege is not a number from 0 to 15")
                users[name] = User(name, password_digest(name, password), int(privilege),
                                   [parse_pattern(word) for word in words[3:]])
        except VscpError as error:
            raise VscpError(f"line {number}: {error}") from None
    return users, readable


def make_logins(options: argparse.Namespace) -> "tuple[Logins, str]":
    """The Logins of --users, -U, -P and --guest, and the users' file if anybody can read it.

    Raises VscpError when the options do not fit together or the file is wrong.
    """
    path, name, password = options.users_file, options.user, options.password
    users: dict[str, User] = {}
    readable_users_file = ""
    if path is not None:
        try:
            users, readable = read_users(path)
            readable_users_file = path if readable else ""
        except VscpError as error:
            raise VscpError(f"--users {path}: {error}") from None
        if (name is None) != (password is None):
            raise VscpError("with --users, -U and -P go together")
        if name in users:
            raise VscpError(f"user {name} is in {path}, too")
    if name or password:
        users[name or ""] = User(name or "", password_digest(name or "", password or ""),
                                 MAX_PRIVILEGE, [])
    guest = options.guest
    if guest is None:
        guest = MAX_PRIVILEGE if path is None else 0
    return Logins(users, guest, not name or password is not None), readable_users_file


def make_parser() -> Parser:
    """The options, in groups, as the help shows them."""
    parser = Parser(
        prog="uvscpd.py", formatter_class=argparse.RawDescriptionHelpFormatter, add_help=False,
        description="The micro VSCP daemon: connects TCP clients to one CAN bus.",
        epilog="""examples:
  uvscpd.py -s -c :virtual:             try it: no hardware, no kernel support
  uvscpd.py -s -d -c can0               at the bench: see every command and event
  uvscpd.py -c can0 --pidfile /run/uvscpd.pid @/etc/uvscpd.conf
                                        in the background, more options in a file

An argument @FILE stands for the arguments in FILE, one per line. README.md has the rest.""")

    # All of them in groups: for an option without one argparse makes a formatter, and that
    # takes as long as the import of typing.
    add = parser.add_argument_group("bus").add_argument
    add("-c", "--canbus", metavar="NAME", type=interface_argument, default="can0",
        help="SocketCAN interface (default %(default)s), or :virtual: for a bus inside the process")
    add("-g", "--guid", metavar="GUID", type=guid_argument, default=GUID_ZERO,
        help="GUID of every client, 16 bytes (default all zeros); 12 bytes, mac or ip (or "
             "mac:eth0, ip:eth0): each client has an id and a GUID of its own")
    add("--ns-timestamps", action="store_true",
        help="event lines without date, timestamp in nanoseconds since 1970, "
             "for the VSCP project's programs of 2026 and later")
    add("--answer-probes", action="store_true", help="answer nodes that look for a server")
    add("--buffer", metavar="N", type=number_from(1, 1000000), default=1000,
        help="events buffered for each client (default %(default)s)")

    add = parser.add_argument_group("network").add_argument
    add("-i", "--ip", metavar="ADDRESS", type=address_argument, default=None,
        help="IPv4 or IPv6 address to listen on (default: all)")
    add("-p", "--port", metavar="PORT", type=number_from(0, 65535), default=PORT,
        help="TCP port (default %(default)s; 0: any free port)")
    add("--max-clients", metavar="N", type=number_from(1, 10000), default=50,
        help="clients at the same time (default %(default)s)")

    add = parser.add_argument_group("access").add_argument
    add("--users", metavar="FILE", dest="users_file",
        help="users, one per line: NAME PASSWORD [PRIVILEGE [HOST...]]")
    add("-U", "--user", metavar="NAME", type=login_argument, help="name of one more user")
    add("-P", "--password", metavar="PASSWORD", type=login_argument, help="that user's password")
    add("--guest", metavar="PRIVILEGE", type=number_from(0, MAX_PRIVILEGE),
        help="privilege of clients that have not logged in, 0-15 (default 15, with --users 0)")
    add("--allow", metavar="PATTERN", type=parse_pattern, action="append", default=[],
        help="addresses that may connect, may be repeated: 192.168.1.8, 192.168.1.* or "
             "192.168.1.0/24 (default: all)")

    add = parser.add_argument_group("running").add_argument
    add("-s", "--stay", action="store_true",
        help="stay in the foreground, messages on stderr (default: detach, messages to syslog)")
    add("-d", "--debug", action="store_true",
        help="show every command and reply, and all that is on the bus")
    add("--pidfile", metavar="FILE", default="", help="write the process id to FILE")
    add("-h", "--help", action="help", help="show this help and exit")
    add("-v", "--version", action="version", version=f"uvscpd.py {__version__}",
        help="show the version and exit")
    return parser


def parse_arguments(arguments: "list[str] | None") -> argparse.Namespace:
    """The options of the command line, by their names there.

    Further ones are made of others: `logins` and `readable_users_file` (make_logins).
    Exits with status 2 when something is wrong.
    """
    parser = make_parser()
    expanded: list[tuple[str, str]] = []
    try:
        expanded = expand_files(sys.argv[1:] if arguments is None else arguments)
        options = parser.parse_args([argument for argument, _ in expanded])
        # Before Python 3.13, argparse drops the value of `--port=--`.
        values = [value for name, value in vars(options).items() if name != "allow"]
        if [] in [*values, *options.allow]:
            raise VscpError("the value of an option cannot be --")
        options.logins, options.readable_users_file = make_logins(options)
        return options
    except VscpError as error:
        text = f"uvscpd.py: {place_of_error(parser, expanded, str(error))}{error}"
        log.error(" ".join(text.split()))       # in one line, whatever a name contains
        sys.exit(2)


def place_of_error(parser: Parser, expanded: "list[tuple[str, str]]", message: str) -> str:
    """Where the argument stands with which this error begins; "" without a file."""
    def has_error(count: int) -> bool:
        try:
            parser.parse_args([argument for argument, _ in expanded[:count]])
        except VscpError as error:
            return str(error) == message
        return False

    before, place = 0, len(expanded)
    if not any(where for _, where in expanded) or not has_error(place):
        return ""
    while place - before > 1:           # bisection: a file may have many lines
        middle = (before + place) // 2
        if has_error(middle):
            place = middle
        else:
            before = middle
    return expanded[place - 1][1]


# =============================================================================
# 14. Start and end
# =============================================================================
# Listens, detaches, serves. What the system refuses is one line and exit status 1.

SPARE_DESCRIPTORS = 20          # needed besides those of the clients
ALL_ADDRESSES = "all addresses"
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def listen(ip: "str | None", port: int) -> socket.socket:
    """A listening socket: for all addresses, IPv6 and IPv4, when none is given.

    Raises OSError when that is not possible.
    """
    if not ip:
        try:
            return listen("::", port)
        except OSError as error:
            # EADDRNOTAVAIL: IPv6 is there, but switched off.
            if error.errno not in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):
                raise
            return listen("0.0.0.0", port)
    family, _, _, _, address = socket.getaddrinfo(      # bytes, as for text it loads a codec
        ip.encode(), port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)[0]
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Connections inherit these. A peer that vanished without a word is noticed by
        # keep-alive after 120 s, its slot comes back.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in ((socket.TCP_NODELAY, 1), (socket.TCP_KEEPIDLE, 60),
                              (socket.TCP_KEEPINTVL, 15), (socket.TCP_KEEPCNT, 4)):
            listener.setsockopt(socket.IPPROTO_TCP, option, value)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        listener.bind(address)
        listener.listen(128)
        listener.setblocking(False)
    except OSError:
        listener.close()
        raise
    return listener


def allow_descriptors(clients: int) -> None:
    """Have the system allow as many descriptors as so many clients need.

    Raises VscpError when it does not, which is known before the first client comes.
    """
    import resource
    needed = clients + SPARE_DESCRIPTORS
    try:
        soft, hard = (sys.maxsize if limit == resource.RLIM_INFINITY else limit
                      for limit in resource.getrlimit(resource.RLIMIT_NOFILE))
        if soft < needed:
            resource.setrlimit(resource.RLIMIT_NOFILE, (min(needed + MAX_LEAVING, hard), hard))
    except OSError as error:            # a sandbox that does not even let us ask
        log.debug(f"limit of descriptors: {error.strerror}")
        return
    if hard < needed:
        raise VscpError(f"--max-clients {clients} needs {needed} descriptors, the system allows "
                        f"{hard} (ulimit -n)")


def detach() -> int:
    """Go on in a child with a session of its own; returns the descriptor for ready().

    The parent waits for a line there, prints it and returns 0 to whoever started
    it; if the child ends before, 1.
    """
    parent_end, child_end = os.pipe()
    if os.fork():
        os.close(child_end)
        line = os.read(parent_end, 1000)
        if line:
            os.write(1, line)
        os._exit(0 if line else 1)
    os.close(parent_end)
    os.setsid()
    return child_end


def ready(child_end: int, port: int) -> None:
    """Let go of the terminal, and tell the waiting parent that clients can connect."""
    os.chdir("/")
    null = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(null, standard)
    os.close(null)
    log.syslog = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
    where = "to syslog" if os.path.exists("/dev/log") else "nowhere, there is no syslog"
    os.write(child_end, f"uvscpd.py: runs in the background, pid {os.getpid()}, port {port}; "
                        f"messages go {where}\n".encode())
    os.close(child_end)


def lock_pidfile(name: str) -> int:
    """A descriptor of the file, locked as long as the daemon lives.

    Raises OSError if another daemon, that is alive, has locked it.
    """
    descriptor = os.open(name, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        pid = os.read(descriptor, 20).decode("ascii", "replace").strip()
        raise FileExistsError(errno.EEXIST, f"process {pid} is running and holds it") from None
    if os.path.exists(name) and os.path.samestat(os.fstat(descriptor), os.stat(name)):
        return descriptor
    os.close(descriptor)            # the daemon that had it has just removed it
    return lock_pidfile(name)


def write_pidfile(descriptor: int) -> None:
    if os.fstat(descriptor).st_size:        # a regular file, perhaps with an old process id
        os.ftruncate(descriptor, 0)
    os.write(descriptor, f"{os.getpid()}\n".encode())


def remove_pidfile(name: str) -> None:
    """Remove the file, unless it is another daemon's by now."""
    try:
        with open(name, encoding="ascii", errors="replace") as file:
            ours = file.read(20) == f"{os.getpid()}\n"
        if ours:
            os.unlink(name)
    except OSError as error:
        log.warning(f"cannot remove {name}: {error.strerror}")


def log_access(options: argparse.Namespace, everywhere: bool) -> None:
    """Log what an operator may not know about access to the bus."""
    path, users = options.readable_users_file, options.logins.users
    guest_privilege = options.logins.guest.privilege
    if path:
        log.warning(f"others can read {path}, try: chmod o= {path}")
    if users and guest_privilege == MAX_PRIVILEGE:
        log.warning("clients may do everything without logging in; "
                    "--guest 0 makes them log in first")
    elif not users and guest_privilege < MAX_PRIVILEGE:
        log.warning("nobody can log in: there is no user (--users)")
    elif not users and everywhere and not options.allow:
        log.info("every host that reaches this one may use the bus (see --allow, --users, --ip)")


def open_standard_files() -> None:
    """Put /dev/null in place of stdin, stdout and stderr if they are closed.

    Otherwise a socket would become descriptor 2, and get the log.
    """
    null = os.open(os.devnull, os.O_RDWR)
    while null <= 2:
        null = os.open(os.devnull, os.O_RDWR)
    os.close(null)


def stop_by_signal(daemon: Daemon) -> None:
    """Have each of STOP_SIGNALS wake the daemon's loop, which calls on_signal."""
    signal.set_wakeup_fd(daemon.wake_up_end.fileno(), warn_on_full_buffer=False)
    for number in STOP_SIGNALS:
        # Under nohup SIGHUP is ignored, and stays so.
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, lambda _number, _frame: None)


def serve(options: argparse.Namespace) -> int:
    """Listen, detach unless told to stay, serve; returns the exit status."""
    open_standard_files()
    allow_descriptors(options.max_clients)
    os.umask(0o022)         # of the pid file
    pidfile = os.path.abspath(options.pidfile) if options.pidfile else ""
    what = f"listen on {options.ip or ALL_ADDRESSES} port {options.port}"
    listener = None
    try:
        listener = listen(options.ip, options.port)
        what = f"write {options.pidfile}"
        descriptor = lock_pidfile(pidfile) if pidfile else None
    except OSError as error:
        if listener:
            listener.close()
        log.error(f"uvscpd.py: cannot {what}: {error.strerror}")
        return 1
    if options.logins.users:
        import hmac  # noqa: F401  as later there may be no descriptor left to read it
    if os.getpid() == 1 and not options.stay:
        log.info("running as process 1: staying in the foreground, as with --stay, "
                 "as a container ends with its process 1")
    child_end = None if options.stay or os.getpid() == 1 else detach()
    daemon = Daemon(options, listener)
    stop_by_signal(daemon)
    try:
        if descriptor is not None:
            write_pidfile(descriptor)
        if child_end is not None:
            ready(child_end, listener.getsockname()[1])
        host, port = listener.getsockname()[:2]
        everywhere = host in EVERYWHERE
        log.info(f"uvscpd.py {__version__}: listening on {ALL_ADDRESSES if everywhere else host} "
                 f"port {port}, bus {options.canbus}")
        log_access(options, everywhere)
        daemon.run()
    finally:
        daemon.close()
        # A signal while Python shuts down would end the process with another status.
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        if pidfile:
            remove_pidfile(pidfile)
    log.debug(daemon.summary.text(options.canbus, daemon.now - daemon.began, daemon.bus.errors,
                                  daemon.bus.health.link.bitrate))
    log.info(f"stopped after {duration_text(daemon.now - daemon.began)}: {daemon.totals()}")
    return 0


def main(arguments: "list[str] | None" = None) -> int:
    """Run the daemon with these arguments, by default those of the process."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)    # until there is a daemon to stop
    options = parse_arguments(arguments)
    log.debugging = options.debug
    try:
        return serve(options)
    except VscpError as error:
        log.error(f"uvscpd.py: {error}")
        return 2
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        log.error(f"uvscpd.py: {where}{error.strerror or error}")
        log.debug(traceback_text(error))
        return 1
    except Exception as error:
        log.error("a bug in uvscpd.py, the daemon exits:\n" + traceback_text(error))
        return 1


if __name__ == "__main__":
    sys.exit(main())
