#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-3.0-or-later
"""uvscpd.py - the micro VSCP daemon: TCP clients on one side, a CAN bus on the other.

The daemon speaks VSCP's TCP/IP text protocol (port 8598) and bridges it to one
SocketCAN interface. It makes no decisions of its own and needs no configuration
file; the only thing it keeps is a bounded FIFO of events for each client.

    can0 --frame--> Bus --Frame--> Daemon --event line--> Session.fifo --> Client --> TCP
                     |               | (filter, GUID)                       |
    can0 <--frame-- Bus <---------- Session <------- command line -------- Client <-- TCP

A session with `python3 uvscpd.py -s -c :virtual:` and netcat:

    $ nc localhost 8598
    uvscpd.py 1.0.0 - micro VSCP daemon
    VSCP events between TCP clients and a CAN bus; HELP lists the commands.
    +OK - Success, connected to :virtual:
    send 96,20,3,0,,0,-,0,1,35
    +OK
    quit
    +OK - bye

Read the file from top to bottom: sections 5 to 9 are pure (text and bytes in,
values out), sockets appear only in sections 10 to 12.
"""

# =============================================================================
# 2. Imports, version, log
# =============================================================================
# Only modules that OpenWrt's python3-light has. What is rarely needed and slow
# to import (hmac, ipaddress, fnmatch) is imported where it is used, but before
# the first client comes: later there may be no descriptor left to read it.

from __future__ import annotations

import argparse
import errno
import fcntl
import heapq
import itertools
import os
import re
import selectors
import signal
import socket
import struct
import sys
import syslog
import time
from collections import deque
from functools import lru_cache, partialmethod

# Type checkers take this for true. At run time typing would be an eighth of our start.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Any

__version__ = "1.0.0"


class Log:
    """Messages to stderr in the foreground, to syslog once detached.

    Under systemd (JOURNAL_STREAM is set) a line starts with its priority as
    `<N>`, which is how the journal learns it (sd-daemon(3)).
    """

    def __init__(self) -> None:
        self.debugging = False
        self.detached = False

    def write(self, priority: int, text: str) -> None:
        if self.debugging:
            now = time.time()
            clock = time.strftime("%H:%M:%S", time.localtime(now))
            text = f"{clock}.{int(now * 1000) % 1000:03d} {text}"
        for line in text.splitlines():
            if self.detached:
                syslog.syslog(priority, line)
            elif sys.stderr is not None:
                self.write_stderr(priority, line)

    def write_stderr(self, priority: int, line: str) -> None:
        if "JOURNAL_STREAM" in os.environ and not sys.stderr.isatty():
            line = f"<{priority}>{line}"
        try:
            print(line, file=sys.stderr, flush=True)
        except OSError:
            # Whoever read our messages has gone. There is nobody to tell, and
            # the bus goes on without them.
            sys.stderr = None

    error = partialmethod(write, syslog.LOG_ERR)
    warning = partialmethod(write, syslog.LOG_WARNING)
    info = partialmethod(write, syslog.LOG_INFO)

    def debug(self, text: str) -> None:
        if self.debugging:
            self.write(syslog.LOG_DEBUG, text)


log = Log()


@lru_cache(maxsize=1)
def notify_socket() -> socket.socket:
    """Made once: the watchdog is fed also when we are out of descriptors."""
    return socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)


def notify(text: str) -> None:
    """Tell systemd about us (sd_notify(3)), when it has asked to be told."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address:
        path = "\0" + address[1:] if address[0] == "@" else address
        try:
            notify_socket().sendto(text.encode(), path)
        except OSError as error:
            log.debug(f"{address}: {error}")


# =============================================================================
# 3. Constants
# =============================================================================
# Protocol, SocketCAN and limits, each with its unit and where it comes from.

# VSCP's TCP/IP protocol.
PORT = 8598                     # uvscpd's; the full VSCP daemon has 9598
MAX_LINE = 512                  # characters in a command line; the C uvscpd has 320,
                                # too few for a Level II event with a long datetime
SIGN_OF_LIFE_S = 2.0            # a lone +OK this often inside the receive loop
# node-vscp-tcp loses events that it reads together with RCVLOOP's +OK. Sent in the
# next turn of the loop they still were lost in half of all tries, 20 ms later never.
RCVLOOP_PAUSE_S = 0.05
NOT_TEXT = bytes(b for b in range(256) if b != 0x0A and not 0x20 <= b <= 0x7E)
CAPABILITIES = 1 << 15 | 1 << 5 | 1 << 3    # WCYD: TCP server, IPv4, several connections
CAPABILITY_IPV6 = 1 << 6

# Server discovery: CAN ids of class 0 type 27 and 28, and the bits that tell class and type.
PROBE, PROBE_RESPONSE, PROBE_MASK = 27 << 8, 28 << 8, 0x01FFFF00
MOST_ANSWERS = 10               # a second

# SocketCAN, from linux/can.h, linux/can/raw.h and linux/can/error.h.
EFF_FLAG = 0x80000000           # in the can_id: extended frame, 29-bit id
RTR_FLAG = 0x40000000           # remote request
ERR_FLAG = 0x20000000           # error frame, the id is a set of error classes
EFF_MASK = 0x1FFFFFFF
FRAME = struct.Struct("=IB3x8s")            # struct can_frame: can_id, length, data
FILTER = struct.Struct("=II")               # struct can_filter: can_id, mask
MAX_FILTERS = 512               # CAN_RAW_FILTER_MAX

ERR_TX_TIMEOUT = 0x001          # error classes
ERR_CRTL = 0x004                # controller state, in data[1]
ERR_ACK = 0x020
ERR_BUSOFF = 0x040
ERR_RESTARTED = 0x100
CRTL_RX_OVERFLOW = 0x01         # data[1] of ERR_CRTL
CRTL_WARNING = 0x04 | 0x08      # more than 96 errors, receiving or sending
CRTL_PASSIVE = 0x10 | 0x20      # more than 127
CRTL_ACTIVE = 0x40

# Linux, from asm-generic/socket.h and linux/sockios.h; Python does not name them.
CAN_RAW_ERR_FILTER = 2
SO_RCVBUFFORCE = 33
SO_TIMESTAMPNS_OLD = 35         # two C longs
SO_TIMESTAMPNS_NEW = 64         # two 64-bit integers, whatever the word size (Linux 5.1)
SO_RXQ_OVFL = 40
MSG_CONFIRM = 0x800             # recvmsg: a frame of this socket has been sent
SIOCGIFFLAGS, SIOCGIFADDR, SIOCGIFHWADDR = 0x8913, 0x8915, 0x8927
IFF_UP = 0x1
ANCILLARY_SIZE = 128            # bytes; a timestamp and a drop count need 56
TIMESTAMP = {SO_TIMESTAMPNS_NEW: struct.Struct("=qq"), SO_TIMESTAMPNS_OLD: struct.Struct("@ll")}

# Limits of ours.
RECEIVE_BUFFER = 2 << 20        # bytes of kernel buffer, about 5,400 frames
FRAMES_A_TURN = 500             # taken from the bus before clients are served again
FRAMES_IN_KERNEL = 8000         # more than the kernel holds for us
LINES_A_TURN = 32               # commands of one client before the others' turn
READ_SIZE = 16384               # bytes
GATHER_S = 0.005                # under load, how long frames gather ...
BUSY_S = 0.004                  # ... which is when two wake-ups are closer than this
SEND_WAIT_S = 1.0               # a SEND waits this long for room in the transmit queue
SEND_RETRY_S = 0.002
NEVER = float("inf")
BUS_CHECK_S = 0.5               # how often to look for an interface that is away
LOGGED_IN = 15                  # the privilege of a client that has logged in
WRONG_LOGIN_S = 0.5             # how long a wrong user or password waits for its answer
MOST_WRONG_LOGINS = 5           # then the connection is closed
LINGER_S = 5.0                  # to let a last reply arrive before closing
PEER_GONE_S = 120               # keep-alive and unacknowledged data
MOST_LEAVING = 100              # connections that linger at the same time
ACCEPT_PAUSE_S = 1.0            # after running out of descriptors


# =============================================================================
# 4. Errors
# =============================================================================
# Bad input raises VscpError with the text that follows `-OK - `. Nothing else
# leaves the pure part.

class VscpError(Exception):
    """Something that a client asked for cannot be done; the text says why."""


class BusError(VscpError):
    """The bus cannot take the frame; the text says why and what helps."""


class BusFull(BusError):
    """The transmit queue is full; the frame may fit a moment later."""


# =============================================================================
# 5. Numbers and GUIDs
# =============================================================================
# The fields of commands and events: text to values and back.

GUID_ZERO = bytes(16)


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


def parse_guid(text: str) -> bytes:
    """The 16 bytes of a GUID written as 16 hexadecimal numbers between colons.

    Raises VscpError unless there are 16 fields of one or two digits.

    >>> parse_guid("0:0:0:0:0:0:0:0:0:0:0:0:0:0:1:fe").hex()
    '000000000000000000000000000001fe'
    """
    if not re.fullmatch("[0-9a-fA-F]{1,2}(:[0-9a-fA-F]{1,2}){15}", text):
        raise VscpError("Invalid GUID")
    return bytes(int(field, 16) for field in text.split(":"))


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


def parse_event_guid(text: str) -> bytes:
    """As parse_guid; an empty text or `-` is the GUID of all zeros."""
    return GUID_ZERO if text in ("", "-") else parse_guid(text)


# =============================================================================
# 6. Events and CAN frames
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
# so head = (can_id >> 21) & 0xF0. What is the same again and again, ids and bytes,
# is looked up and not made anew: SEND and event lines take half the time.

if TYPE_CHECKING:
    # A frame that has been on the bus: the CAN id (29 bits, without flags), 0-8 bytes of
    # data, when the kernel received it (microseconds since 1970), and the client that
    # sent it, None for the bus.
    Frame = tuple[int, bytes, int, "Session | None"]


def pack_id(head: int, vscp_class: int, vscp_type: int, nickname: int) -> int:
    """The bits of a CAN id, as far as it has room for the fields."""
    return (head & 0xF0) << 21 | (vscp_class & 0x1FF) << 16 | (vscp_type & 0xFF) << 8 | nickname


def pack_frame(can_id: int, data: bytes) -> bytes:
    """The 16 bytes of struct can_frame (linux/can.h) of an extended data frame."""
    return FRAME.pack(can_id | EFF_FLAG, len(data), data)


BYTE_TEXT = [f",{byte}" for byte in range(256)]
BYTE_VALUE = {text[1:]: byte for byte, text in enumerate(BYTE_TEXT)}


@lru_cache(maxsize=4096)
def parse_id(head: str, vscp_class: str, vscp_type: str, guid: str) -> tuple[int, bool]:
    """The CAN id that four fields of an event make, and whether it mirrors Level I.

    Newer clients give heads of 16 bits, of which CAN carries bits 7-4. The
    nickname is the last byte of the GUID (VSCP specification; the C uvscpd
    always sends 0).

    >>> parse_id("96", "20", "3", "-") == (0x0C140300, False)
    True
    """
    number = parse_number(vscp_class, 1023, "class")
    can_id = pack_id(parse_number(head, 0xFFFF, "head"), number,
                     parse_number(vscp_type, 255, "type"), parse_event_guid(guid)[15])
    return can_id, number > 511


def parse_event(text: str, guid: bytes) -> tuple[int, bytes]:
    """The CAN id (29 bits) and the data (0-8 bytes) of an event that a client sends.

    obid, datetime and timestamp are not looked at: CAN carries none of them. A
    class from 512 on is a Level I event mirrored as Level II: the first 16 data
    bytes are the GUID of the interface that it is meant for, bytes 0-13 of which
    must be those of `guid`, the client's. Raises VscpError when they are not, or
    when a field is missing, malformed or out of range.

    >>> can_id, data = parse_event("96,20,3,0,,0,-,0,1,0x23", GUID_ZERO)
    >>> f"{can_id:08X}#{data.hex()}"
    '0C140300#000123'
    """
    fields = text.split(",")
    if len(fields) < 7:
        raise VscpError("an event is head,class,type,obid,datetime,timestamp,GUID,data...")
    can_id, mirrored = parse_id(fields[0], fields[1], fields[2], fields[6])
    try:
        data = bytes([BYTE_VALUE[field] for field in fields[7:]])
    except KeyError:
        data = bytes([parse_number(field, 255, "data byte") for field in fields[7:]])
    if mirrored:
        if len(data) < 16:
            raise VscpError("class 512-1023 needs the interface's GUID in 16 data bytes")
        if data[:14] != guid[:14]:
            raise VscpError("no interface with this GUID here")
        data = data[16:]
    if len(data) > 8:
        raise VscpError("too many data bytes")
    return can_id, data


@lru_cache(maxsize=4096)
def id_text(can_id: int) -> tuple[str, str]:
    """What a CAN id alone says: `head,class,type,` and `:nickname`."""
    head = can_id >> 21 & 0xF0
    return f"{head},{can_id >> 16 & 0x1FF},{can_id >> 8 & 0xFF},", f":{can_id & 0xFF:X}"


@lru_cache(maxsize=8)
def utc_text(seconds: int) -> str:
    """The UTC date and time, without a zone letter, of seconds since 1970."""
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))


def format_event(frame: Frame) -> tuple[str, str]:
    """The event line in two parts; the first 15 bytes of the client's GUID go between.

    In this way a line is made once, not once a client.

    >>> before, after = format_event((0x0C140305, bytes([0, 1, 35]), 1795390139810025, None))
    >>> before + format_guid(bytes(15)) + after
    '96,20,3,0,2026-11-22T23:28:59,3615768809,0:0:0:0:0:0:0:0:0:0:0:0:0:0:0:5,0,1,35\\r\\n'
    """
    can_id, data, time_us, sender = frame
    before, nickname = id_text(can_id)
    obid = sender.channel_id if sender else 0
    return (f"{before}{obid},{utc_text(time_us // 1000000)},{time_us & 0xFFFFFFFF},",
            nickname + "".join([BYTE_TEXT[byte] for byte in data]) + "\r\n")


# =============================================================================
# 7. Filters
# =============================================================================
# A client's filter and mask are four fields of text; all that matters of them
# on CAN is one comparison of the id: a frame passes when can_id & mask == value.

if TYPE_CHECKING:
    # A filter or a mask as a client gives it: priority (0-255), class and type (0-0xFFFF),
    # and the 16 bytes of a GUID.
    Filter = tuple[int, int, int, bytes]
    # What decides how a client sees a frame: the first 15 bytes of its GUID, as text, and
    # the value and the mask of the comparison. Clients with equal views get equal lines.
    View = tuple[str, int, int]

FILTER_ALL = (0, 0, 0, GUID_ZERO)


def parse_filter(text: str) -> Filter:
    """The filter or mask `priority,class,type,GUID`.

    Raises VscpError when it is not one. Real clients give masks of 0xFFFF for
    the type, too.

    >>> parse_filter("0,0x1FF,0,-")[:3]
    (0, 511, 0)
    """
    fields = text.split(",")
    if len(fields) != 4:
        raise VscpError("a filter is priority,class,type,GUID")
    return (parse_number(fields[0], 0xFF, "priority"), parse_number(fields[1], 0xFFFF, "class"),
            parse_number(fields[2], 0xFFFF, "type"), parse_event_guid(fields[3]))


def make_view(wanted: Filter, mask: Filter, guid: bytes) -> View:
    """The view of a client with this filter, mask and GUID.

    The GUID compared is the event's as the client sees it: its own with the
    nickname as the last byte. A filter class of 512-1023 means the Level I class
    512 lower, as events from CAN have no other. What no frame can match (class
    mask 0xFFFF and filter 2000, say) becomes mask 0, value 1: nothing passes.

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


def pack_filters(wanted: Iterable[tuple[int, int]]) -> bytes:
    """The CAN_RAW_FILTER option: an array of struct can_filter, the union of what is wanted.

    Takes pairs of value and mask as in View. Only extended data frames pass.
    More filters than the kernel takes become one that passes them all.
    """
    pairs = {(value, mask) for value, mask in wanted if value & mask == value}
    if (0, 0) in pairs or len(pairs) > MAX_FILTERS:
        pairs = {(0, 0)}
    kind = EFF_FLAG | RTR_FLAG
    return b"".join(FILTER.pack(value | EFF_FLAG, mask | kind) for value, mask in sorted(pairs))


# =============================================================================
# 8. Session
# =============================================================================
# The protocol state of one connection and its commands. No socket and no clock:
# a do_ method takes the arguments of a command and returns the whole reply, or
# raises VscpError. What a command needs of the world outside (the bus, the
# interface list) it asks of the Daemon.

def ok(*lines: str, text: str = "") -> str:
    """A good reply: data lines, then the final `+OK` line."""
    final = f"+OK - {text}" if text else "+OK"
    return "\r\n".join(lines + (final, ""))


def refusal(reason: object) -> str:
    """A bad reply: the final `-OK` line."""
    return f"-OK - {reason}\r\n"


class LineSplitter:
    """Makes command lines out of bytes, however they are cut into packets.

    CR, other control characters and bytes over 0x7E are dropped. A line of more
    than MAX_LINE characters becomes TOO_LONG; no more than that is ever stored.
    """

    TOO_LONG = "\0too long"         # no line has a control character

    def __init__(self) -> None:
        self.rest = b""

    def feed(self, data: bytes) -> list[str]:
        *lines, self.rest = (self.rest + data.translate(None, NOT_TEXT)).split(b"\n")
        # One character more than allowed is enough to remember that there were too many.
        self.rest = self.rest[:MAX_LINE + 1]
        return [line.decode("ascii") if len(line) <= MAX_LINE else self.TOO_LONG for line in lines]


class Session:
    """The state of one connection, and what its commands do."""

    def __init__(self, daemon: Daemon, name: str, channel_id: int, now_us: int) -> None:
        self.daemon = daemon
        self.name = name                    # address and port, for messages
        self.channel_id = channel_id
        self.guid = client_guid(daemon.options.guid, channel_id)
        self.started = utc_text(now_us // 1000000)
        self.filter = FILTER_ALL
        self.mask = FILTER_ALL
        self.view = make_view(self.filter, self.mask, self.guid)
        self.rcvloop = False
        self.closing = False                # QUIT has been answered
        self.proved: set[str] = set()       # of "user" and "password", what was right
        self.failures = 0                   # how often it was not
        self.delay_s = 0.0                  # hold the present reply back for so long
        self.previous = ""                  # the line that `+` runs again
        self.fifo: deque[str] = deque(maxlen=daemon.options.buffer)    # event lines
        self.fifo_overruns = 0
        self.overruns_before = daemon.bus.overruns
        self.rx_frames = self.rx_commas = self.tx_frames = self.tx_bytes = 0

    def buffer(self, lines: list[str]) -> None:
        """Put event lines into the FIFO; the oldest go when it is full."""
        self.fifo_overruns += max(0, len(self.fifo) + len(lines) - (self.fifo.maxlen or 0))
        self.fifo.extend(lines)

    def set_view(self) -> None:
        """Make a changed GUID, filter or mask count from the next event on."""
        self.daemon.take_in()               # judged by the old filter
        self.view = make_view(self.filter, self.mask, self.guid)
        self.daemon.views_changed()

    # --- privilege 0 ---

    def do_noop(self) -> str:
        return ok()

    def do_quit(self) -> str:
        self.closing = True
        return ok(text="bye")

    def do_repeat(self) -> str:
        if not self.previous:
            raise VscpError("no input")
        return run_command(self, self.previous)

    def do_user(self, name: str = "") -> str:
        return self.log_in("user", name, "username")

    def do_pass(self, password: str = "") -> str:
        return self.log_in("password", password, "password")

    def log_in(self, what: str, given: str, missing: str) -> str:
        logins = self.daemon.options.logins
        if what not in logins:
            return ok(text=f"no {what} configured")
        if not given:
            raise VscpError(f"please supply {missing}")
        from hmac import compare_digest  # slow to import, and rarely needed
        if compare_digest(given, logins[what]):
            self.proved.add(what)
            if self.privilege() == LOGGED_IN:
                log.info(f"{self.name}: logged in")
            return ok()
        self.proved.clear()
        self.failures += 1
        self.delay_s = WRONG_LOGIN_S
        self.closing = self.failures >= MOST_WRONG_LOGINS
        log.warning(f"{self.name}: wrong {what}")
        raise VscpError(f"invalid {what}")

    def privilege(self) -> int:
        """What this client may do, 0-15, as in the command table."""
        options = self.daemon.options
        return LOGGED_IN if options.logins and self.proved == set(options.logins) else options.guest

    def do_help(self, name: str = "") -> str:
        rows = [find_command(name)] if name else COMMANDS
        return ok(*(row.help() for row in rows))

    def do_vers(self) -> str:
        return ok(__version__.replace(".", ",") + ",0")

    def do_wcyd(self) -> str:
        return ok("-".join(f"{byte:02X}" for byte in self.daemon.capabilities.to_bytes(8, "big")))

    def do_interface(self, action: str = "list", *more: str) -> str:
        if action.lower() in ("close", "unique", "normal"):
            return self.do_unsupported()
        if more:
            raise VscpError("wrong number of arguments")
        if action.lower() != "list":
            raise VscpError("interface knows only LIST")
        return ok(*self.daemon.interfaces(self))

    def do_restart(self, *_arguments: str) -> str:
        raise VscpError("uvscpd is not capable of restart/shutdown")

    def do_unsupported(self, *_arguments: str) -> str:
        raise VscpError("only the full VSCP daemon has this command, uvscpd does not")

    # --- privilege 1 ---

    def do_cdta(self) -> str:
        self.daemon.take_in()
        return ok(f"{len(self.fifo)} ")

    def do_clra(self) -> str:
        self.daemon.take_in()
        self.fifo.clear()
        return ok(text="All events cleared.")

    def do_stat(self) -> str:
        bus = self.daemon.bus
        overruns = self.fifo_overruns + bus.overruns - self.overruns_before
        # An event line has 6 commas and one for each byte of data; on CAN the id has 4 bytes.
        rx_bytes = self.rx_commas - 2 * self.rx_frames
        return ok(f"{bus.bus_offs},{bus.warnings},{overruns},{rx_bytes},{self.rx_frames},"
                  f"{self.tx_bytes},{self.tx_frames}")

    def do_info(self) -> str:
        state = self.daemon.bus.state
        return ok(f'{state.status},{state.code},{state.subcode},"{state.text}"')

    def do_chid(self) -> str:
        return ok(str(self.channel_id))

    def do_ggid(self) -> str:
        return ok(format_guid(self.guid))

    # --- privilege 2 ---

    def do_retr(self, count: str = "1") -> str:
        wanted = parse_number(count, sys.maxsize, "number of events")
        if self.rcvloop:
            return ok()
        self.daemon.take_in()
        lines = [self.fifo.popleft() for _ in range(min(wanted, len(self.fifo)))]
        final = ok() if len(lines) == wanted else refusal("No event(s) available")
        return "".join(lines) + final

    def do_rcvloop(self) -> str:
        self.rcvloop = True
        return ok()

    def do_quitloop(self) -> str:
        self.rcvloop = False
        return ok()

    # --- privilege 4 and 6 ---

    def do_send(self, text: str) -> str:
        can_id, data = parse_event(text, self.guid)
        self.daemon.bus.send(can_id, data, self)
        self.tx_frames += 1
        self.tx_bytes += 4 + len(data)
        return ok()

    def do_sgid(self, text: str) -> str:
        self.guid = parse_guid(text)
        self.set_view()
        return ok()

    def do_smsk(self, text: str) -> str:
        self.mask = self.parse_frame(text, "mask")
        self.set_view()
        return ok()

    def do_sflt(self, text: str) -> str:
        self.filter = self.parse_frame(text, "filter")
        self.set_view()
        return ok()

    @staticmethod
    def parse_frame(text: str, what: str) -> Filter:
        """As parse_filter, with the one refusal that clients know."""
        try:
            return parse_filter(text)
        except VscpError:
            raise VscpError(f"format error in {what} frame") from None


# =============================================================================
# 9. Command table
# =============================================================================
# All that is known about a command stands in its row: HELP prints the table,
# run_command looks up, checks the privilege, counts the arguments and calls.

class Command:
    """A row of the command table."""

    def __init__(self, names: str, arguments: str, least: int, most: int, privilege: int,
                 handler: Callable[..., str], summary: str) -> None:
        self.names = names              # the command and its aliases
        self.arguments = arguments      # as HELP shows them
        self.least = least              # number of arguments
        self.most = most
        self.privilege = privilege      # 0-15, what a client must have
        self.handler = handler
        self.summary = summary

    def help(self) -> str:
        """One line: names, arguments and what the command does."""
        name, *aliases = self.names.upper().split()
        also = f" (also {', '.join(aliases)})" if aliases else ""
        return f"{name} {self.arguments}".rstrip() + f": {self.summary}{also}"


ANY = MAX_LINE                  # as many arguments as a line can have
COMMANDS = (
    Command("noop", "", 0, 0, 0, Session.do_noop, "nothing, is answered +OK"),
    Command("quit exit", "", 0, 0, 0, Session.do_quit, "end this connection"),
    Command("+", "", 0, 0, 0, Session.do_repeat, "run the previous command again"),
    Command("user", "[NAME]", 0, 1, 0, Session.do_user, "user name, to log in"),
    Command("pass", "[PASSWORD]", 0, 1, 0, Session.do_pass, "password, to log in"),
    Command("help", "[COMMAND]", 0, 1, 0, Session.do_help, "this list, or one line of it"),
    Command("vers version", "", 0, 0, 0, Session.do_vers, "version of the daemon"),
    Command("wcyd whatcanyoudo", "", 0, 0, 0, Session.do_wcyd, "capabilities, 64 bits"),
    Command("interface", "[list]", 0, ANY, 0, Session.do_interface, "list the interfaces"),
    Command("cdta chdata chkdata checkdata", "", 0, 0, 1, Session.do_cdta,
            "number of buffered events"),
    Command("clra clrall clearall", "", 0, 0, 1, Session.do_clra, "forget the buffered events"),
    Command("stat", "", 0, 0, 1, Session.do_stat,
            "busoff,buswarnings,overruns,rxbytes,rxframes,txbytes,txframes"),
    Command("info", "", 0, 0, 1, Session.do_info, 'state of the bus: status,code,subcode,"text"'),
    Command("chid getchid", "", 0, 0, 1, Session.do_chid, "channel id of this client"),
    Command("ggid getguid", "", 0, 0, 1, Session.do_ggid, "GUID of this client"),
    Command("retr retrieve", "[N]", 0, 1, 2, Session.do_retr, "up to N buffered events, or one"),
    Command("rcvloop receiveloop", "", 0, 0, 2, Session.do_rcvloop,
            "get every event as it comes"),
    Command("quitloop", "", 0, 0, 2, Session.do_quitloop, "end the receive loop"),
    Command("send", "EVENT", 1, 1, 4, Session.do_send,
            "send head,class,type,obid,datetime,timestamp,GUID,data..."),
    Command("sgid setguid", "GUID", 1, 1, 6, Session.do_sgid, "set the GUID of this client"),
    Command("smsk setmask", "MASK", 1, 1, 6, Session.do_smsk, "set priority,class,type,GUID"),
    Command("sflt setfilter", "FILTER", 1, 1, 6, Session.do_sflt, "set priority,class,type,GUID"),
    Command("restart shutdown", "", 0, ANY, 15, Session.do_restart, "not in uvscpd"),
    Command("challenge measurement driver file udp remote var variable dm table test",
            "...", 0, ANY, 0, Session.do_unsupported, "only in the full VSCP daemon"),
)
COMMAND_BY_NAME = {name: row for row in COMMANDS for name in row.names.split()}


def find_command(name: str) -> Command:
    """The row of a command, given in any case; raises VscpError when there is none."""
    try:
        return COMMAND_BY_NAME[name.lower()]
    except KeyError:
        raise VscpError("invalid command") from None


def run_command(session: Session, line: str) -> str:
    """The whole reply to a command line, data lines and exactly one final line.

    Raises BusFull alone: the same line is to be run again a moment later.
    """
    try:
        name, *arguments = line.split() or [""]
        if not name:
            raise VscpError("no input")
        if name != "+":
            session.previous = line
        command = find_command(name)
        if session.privilege() < command.privilege:
            raise VscpError("Need to log in to perform this command.")
        if not command.least <= len(arguments) <= command.most:
            raise VscpError("wrong number of arguments")
        return command.handler(session, *arguments)
    except BusFull:
        raise
    except VscpError as error:
        return refusal(error)


# =============================================================================
# 10. Bus
# =============================================================================
# Takes and gives frames, and knows how the bus is doing. Knows nothing of
# clients, but for remembering who sent which frame. OSError ends here.

WELL, WARNING, PASSIVE, BUS_OFF, AWAY = range(5)     # AWAY: no usable interface


class BusState:
    """How the bus is doing, as INFO tells it."""

    def __init__(self, status: int, code: int, subcode: int, text: str, advice: str = "") -> None:
        self.status = status        # WELL to AWAY
        self.code = code            # error classes of linux/can/error.h; AWAY: an errno
        self.subcode = subcode      # state of the controller, data[1] of an error frame
        self.text = text
        self.advice = advice        # what helps, a command to type where there is one

    def trouble(self) -> str:
        """What is wrong and what helps, for a person."""
        return self.text + (f", try: {self.advice}" if self.advice else "")


BUS_WELL = BusState(WELL, 0, 0, "OK")


class Bus:
    """The bus inside the process, `:virtual:`, and what every bus has.

    The clients talk to each other; no hardware and no kernel support is needed.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.state = BUS_WELL
        self.bus_offs = 0           # since the daemon was started
        self.warnings = 0
        self.overruns = 0           # frames that the kernel or the controller dropped
        self.frames: deque[Frame] = deque()
        self.sock: socket.socket | None = None

    def send(self, can_id: int, data: bytes, sender: Session | None) -> None:
        """Put a frame onto the bus.

        Raises BusFull when there is no room at the moment, BusError when the
        bus cannot take it.
        """
        if len(self.frames) >= FRAMES_IN_KERNEL:
            raise BusFull("too much traffic")
        self.frames.append((can_id, data, time.time_ns() // 1000, sender))

    def receive(self, limit: int) -> list[Frame]:
        """Up to `limit` frames that have come, oldest first."""
        return [self.frames.popleft() for _ in range(min(limit, len(self.frames)))]

    def set_filters(self, wanted: list[tuple[int, int]], own: bool) -> None:
        """Let only frames through that match one of the pairs of value and mask.

        `own` says whether anybody wants to get back what was sent here.
        """

    def check(self) -> None:
        """Look after an interface that is away."""


class OwnFrames:
    """Remembers who sent which frame until the kernel gives it back as sent.

    Frames come back in the order in which they were sent, but some never do: a
    controller that goes bus off forgets them, a full receive buffer drops them.
    So what is overtaken, or was under way when something went wrong, is
    doubtful: it still tells the sender if nothing else does.
    """

    MOST_DOUBTFUL = 1000

    def __init__(self) -> None:
        self.pending: deque[Frame] = deque()        # with the time when they were sent
        self.doubtful: deque[Frame] = deque(maxlen=self.MOST_DOUBTFUL)

    def add(self, frame: Frame, expected: bool) -> None:
        """A frame was sent; `expected` says whether the filter lets it come back."""
        (self.pending if expected else self.doubtful).append(frame)

    def doubt(self, lost: Callable[[int, int], bool]) -> None:
        """Those may not come back of whose CAN id and time of sending this is true."""
        pending, self.pending = self.pending, deque()
        for frame in pending:
            self.add(frame, not lost(frame[0], frame[2]))

    def claim(self, frame: Frame) -> Frame | None:
        """The frame that came back with its sender, None when nobody remembers it."""
        for own in self.pending:
            if own[:2] == frame[:2] and own[2] <= frame[2]:
                while self.pending[0] is not own:
                    self.doubtful.append(self.pending.popleft())
                self.pending.popleft()
                return (*frame[:3], own[3])
        # Of two that are alike the older one is the lost one.
        for own in reversed(self.doubtful):
            if own[:2] == frame[:2]:
                self.doubtful.remove(own)
                return (*frame[:3], own[3])
        return None


class SocketCan(Bus):
    """One CAN_RAW socket on a SocketCAN interface, for everybody.

    What the kernel does (net/can/raw.c): an interface that goes down gives
    ENETDOWN once, and the same socket works again when it is up; one that is
    removed gives ENODEV, and the socket is dead for good.
    """

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.own = OwnFrames()
        self.wanted: list[tuple[int, int]] = []     # what set_filters was given
        self.own_wanted = False
        self.dropped = 0            # the kernel's running total for this socket
        self.told = self.checked = self.state       # as last logged, as last checked
        self.open()

    # --- opening, and the interface's coming and going ---

    def open(self) -> None:
        """Make the socket, or note why that is not possible."""
        try:
            family, protocol = socket.AF_CAN, socket.CAN_RAW
        except AttributeError:      # this Python was built without SocketCAN
            self.on_away(errno.EAFNOSUPPORT)
            return
        sock = None
        try:
            sock = socket.socket(family, socket.SOCK_RAW | socket.SOCK_NONBLOCK, protocol)
            self.set_options(sock)
            sock.bind((self.name,))
        except OSError as error:
            if sock is not None:
                sock.close()
            self.on_away(error.errno)
            return
        self.sock = sock
        self.dropped = 0
        self.set_filters(self.wanted, self.own_wanted)
        self.look_up()

    def set_options(self, sock: socket.socket) -> None:
        """Set what does not depend on the clients."""
        sock.setsockopt(socket.SOL_CAN_RAW, socket.CAN_RAW_FILTER, b"")
        sock.setsockopt(socket.SOL_CAN_RAW, CAN_RAW_ERR_FILTER,
                        ERR_TX_TIMEOUT | ERR_CRTL | ERR_ACK | ERR_BUSOFF | ERR_RESTARTED)
        # Of each row the first that the kernel grants; none will do, too.
        for options in ({SO_RCVBUFFORCE: RECEIVE_BUFFER, socket.SO_RCVBUF: RECEIVE_BUFFER},
                        {SO_TIMESTAMPNS_NEW: 1, SO_TIMESTAMPNS_OLD: 1},
                        {SO_RXQ_OVFL: 1}):
            for option, value in options.items():
                try:
                    sock.setsockopt(socket.SOL_SOCKET, option, value)
                    break
                except OSError as error:
                    log.debug(f"socket option {option} of {self.name}: {error.strerror}")

    def look_up(self) -> None:
        """Note whether the interface is up, down or gone."""
        assert self.sock is not None
        try:
            request = struct.pack("16s24x", self.name.encode())     # struct ifreq
            flags, = struct.unpack_from("=H", fcntl.ioctl(self.sock, SIOCGIFFLAGS, request), 16)
        except OSError as error:
            self.on_away(error.errno)
            return
        if not flags & IFF_UP:
            self.on_away(errno.ENETDOWN)
        elif self.state.status == AWAY:
            self.set_state(BUS_WELL)

    def check(self) -> None:
        if self.state is self.checked:
            self.tell()
        self.checked = self.state
        if self.state.status != AWAY:
            return
        if self.sock is not None and self.state.code == errno.ENETDOWN:
            self.look_up()
            return
        try:
            socket.if_nametoindex(self.name)
        except OSError:
            return              # still missing; no use asking the kernel for a socket
        if self.sock is not None:
            self.sock.close()
            self.sock = None
        self.open()

    def on_away(self, code: int | None) -> None:
        """The interface cannot be used, for this errno: note it with the advice that helps."""
        name, code = self.name, code or errno.EIO
        up = f"ip link set {name} up" + (" type can bitrate 125000" if name[:3] == "can" else "")
        if code == errno.ENETDOWN:
            text, advice = f"interface {name} is down", up
        elif code == errno.EAFNOSUPPORT:
            text = "no CAN support (Address family not supported)"
            advice = "modprobe can can_raw; on OpenWrt: opkg install kmod-can kmod-can-raw"
        elif code == errno.EPROTONOSUPPORT:
            text = "no raw CAN support (Protocol not supported)"
            advice = "modprobe can_raw; on OpenWrt: opkg install kmod-can-raw"
        elif code in (errno.ENODEV, errno.ENXIO):
            code = errno.ENODEV
            text, advice = f"interface {name}: {os.strerror(code)}", up
            if name[:4] == "vcan":
                advice = f"ip link add dev {name} type vcan && {up}"
        else:
            text, advice = f"interface {name}: {os.strerror(code)}", ""
        self.set_state(BusState(AWAY, code, 0, text, advice))

    def set_state(self, state: BusState) -> None:
        """Note how the bus is doing; a change is logged once."""
        if vars(state) == vars(self.state):
            return
        self.state = state
        if state.status >= BUS_OFF:
            now_us = time.time_ns() // 1000
            self.own.doubt(lambda _can_id, sent_us: sent_us <= now_us)
        # An interface that is being removed goes down first: check() tells if it stays down.
        if state.code != errno.ENETDOWN or state.status != AWAY:
            self.tell()

    def tell(self) -> None:
        """Log how the bus is doing, if that has not been done."""
        before, self.told = self.told, self.state
        if self.state.text == before.text:
            return
        if self.state is BUS_WELL:
            log.info(f"{self.name}: the bus is back, was: {before.text}")
        else:
            where = "" if self.state.status == AWAY else f"{self.name}: "
            log.warning(where + self.state.trouble())

    def has_carrier(self) -> bool:
        """Whether Linux gives frames to the controller; if not, it drops them in silence."""
        try:
            # The interface's flag IFF_RUNNING says the same, but up to a second later.
            with open(f"/sys/class/net/{self.name}/carrier", encoding="ascii") as file:
                return file.read() != "0\n"
        except OSError as error:
            return error.errno != errno.EINVAL      # it is down; else send tells what is wrong

    # --- frames ---

    def set_filters(self, wanted: list[tuple[int, int]], own: bool) -> None:
        self.wanted, self.own_wanted = wanted, own
        self.own.doubt(lambda can_id, _sent_us: not self.passes(can_id))
        if self.sock is None:
            return
        try:
            self.sock.setsockopt(socket.SOL_CAN_RAW, socket.CAN_RAW_FILTER, pack_filters(wanted))
            self.sock.setsockopt(socket.SOL_CAN_RAW, socket.CAN_RAW_RECV_OWN_MSGS, own)
        except OSError as error:            # the interface goes at this very moment
            self.on_away(error.errno)

    def passes(self, can_id: int) -> bool:
        """Whether the kernel's filter lets a frame through."""
        return any(can_id & mask == value for value, mask in self.wanted)

    def send(self, can_id: int, data: bytes, sender: Session | None) -> None:
        if self.sock is None:
            raise BusError(self.state.trouble())
        if self.state.status == BUS_OFF and not self.has_carrier():
            raise BusFull(self.state.trouble())
        sent_us = time.time_ns() // 1000 if self.own_wanted else 0
        try:
            self.sock.send(pack_frame(can_id, data))
        except OSError as error:
            if error.errno in (errno.ENOBUFS, errno.EAGAIN):
                raise BusFull(f"{self.name} takes no more frames: nobody acknowledges, "
                              "bus off, or too much traffic") from None
            self.on_away(error.errno)
            raise BusError(self.state.trouble()) from None
        if self.own_wanted:
            self.own.add((can_id, data, sent_us, sender), self.passes(can_id))

    def receive(self, limit: int) -> list[Frame]:
        frames: list[Frame] = []
        if self.sock is None:
            return frames
        recvmsg = self.sock.recvmsg
        try:
            for _ in range(limit):
                raw, ancillary, flags, _address = recvmsg(FRAME.size, ANCILLARY_SIZE)
                can_id, length, data = FRAME.unpack(raw)
                time_us, dropped = 0, self.dropped
                for _level, kind, value in ancillary:
                    if kind in TIMESTAMP:
                        seconds, nanoseconds = TIMESTAMP[kind].unpack(value)
                        time_us = seconds * 1000000 + nanoseconds // 1000
                    elif kind == SO_RXQ_OVFL:
                        dropped, = struct.unpack("=I", value)
                time_us = time_us or time.time_ns() // 1000
                if dropped != self.dropped:
                    self.on_dropped(dropped, time_us)
                if can_id & ERR_FLAG:
                    self.on_error_frame(can_id, data[1])
                    continue
                if self.state is not BUS_WELL:
                    self.on_traffic(bool(flags & MSG_CONFIRM))
                frame: Frame = (can_id & EFF_MASK, data[:length], time_us, None)
                if flags & MSG_CONFIRM:
                    own = self.own.claim(frame)
                    if own is None:         # it was sent when there was nobody else to get it
                        continue
                    frame = own
                frames.append(frame)
        except BlockingIOError:
            pass                # the kernel has no more
        except OSError as error:
            self.on_away(error.errno)
        return frames

    # --- errors on the bus ---

    def on_dropped(self, total: int, time_us: int) -> None:
        """The kernel's running total of frames that its full buffer dropped has changed."""
        self.overruns += total - self.dropped & 0xFFFFFFFF
        self.dropped = total
        self.own.doubt(lambda _can_id, sent_us: sent_us <= time_us)

    def on_traffic(self, own: bool) -> None:
        """A frame went over the bus, so somebody is there; `own`: it was one of ours."""
        over = ERR_ACK | (ERR_TX_TIMEOUT if own else 0)
        if self.state.status == WARNING and self.state.code & over:
            self.set_state(BUS_WELL)

    def on_error_frame(self, can_id: int, controller: int) -> None:
        """Note what an error frame (linux/can/error.h) tells; `controller` is data[1]."""
        code = can_id & EFF_MASK
        if code & ERR_BUSOFF:
            self.bus_offs += self.state.status != BUS_OFF
            advice = f"ip link set {self.name} down && ip link set {self.name} up"
            self.set_state(BusState(BUS_OFF, code, controller, "bus off", advice))
        elif code & ERR_RESTARTED:
            self.set_state(BUS_WELL)
        elif code & ERR_CRTL:
            self.on_controller(code, controller)
        else:
            text = "nobody acknowledges" if code & ERR_ACK else "transmit timeout"
            self.on_warning(WARNING, code, controller, text)

    def on_controller(self, code: int, controller: int) -> None:
        if controller & CRTL_RX_OVERFLOW:
            self.overruns += 1
        if controller & CRTL_PASSIVE:
            self.on_warning(PASSIVE, code, controller, "error passive")
        elif controller & CRTL_WARNING:
            self.on_warning(WARNING, code, controller, "error warning")
        elif controller & CRTL_ACTIVE and self.has_carrier():
            self.set_state(BUS_WELL)

    def on_warning(self, status: int, code: int, controller: int, text: str) -> None:
        if text != self.state.text:
            self.warnings += 1
        self.set_state(BusState(status, code, controller, text, "wiring, bit rate, other nodes"))


# =============================================================================
# 11. Client
# =============================================================================
# Moves bytes between a TCP connection and its session. Never blocks: what the
# connection does not take now waits in `output`, and as long as something waits
# there, no line is run and no more than one block of lines is read.

def split_lines(block: bytes, limit: int) -> list[bytes]:
    """The block cut behind line ends into pieces of at most `limit` bytes, if lines allow."""
    pieces = []
    start = 0
    while len(block) - start > limit:
        end = block.rfind(b"\n", start, start + limit) + 1 or block.find(b"\n", start) + 1
        pieces.append(block[start:end])
        start = end
    return pieces + [block[start:]] if start < len(block) else pieces


class Client:
    """One TCP connection."""

    END = "\0end"                           # in `lines`: the peer sends no more

    def __init__(self, daemon: Daemon, sock: socket.socket, session: Session) -> None:
        self.daemon = daemon
        self.sock = sock
        self.session = session
        self.splitter = LineSplitter()
        self.lines: deque[str] = deque()                # commands to run
        self.output: deque[bytes] = deque()             # each one write, whole lines
        self.segment = max(536, sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG))
        self.interest = 0                   # what the selector watches
        self.streaming = False              # events are sent as they come
        self.loops = 0                      # how often the receive loop was entered or left
        self.paused = False                 # a reply is held back, no further line runs
        self.send_by = NEVER                # until when the first line waits for room
        self.leaving = False                # only a last reply is still to arrive ...
        self.leave_by = 0.0                 # ... until then
        self.ended = False                  # the peer sends no more
        self.closed = False

    # --- what the loop calls ---

    def guarded(self, action: Callable[..., None], *arguments: Any) -> None:
        """Call something for this client; whatever goes wrong costs no other client anything."""
        if self.closed:
            return
        try:
            action(*arguments)
        except OSError as error:
            self.daemon.drop(self, error.strerror or str(error))
        except Exception as error:
            log.error(f"{self.session.name}: a bug in uvscpd.py, the client is dropped:\n"
                      + traceback_text(error))
            self.daemon.drop(self, "internal error")

    def later(self, delay_s: float, action: Callable[..., None], *arguments: Any) -> None:
        self.daemon.call_later(delay_s, self.guarded, action, *arguments)

    def on_ready(self, mask: int) -> None:
        if mask & selectors.EVENT_READ:
            self.guarded(self.read)
        self.guarded(self.turn)

    def turn(self) -> None:
        """Run some of the lines that have come, send what the connection takes."""
        self.flush()
        if not self.output:                 # else the peer shall read its replies first
            self.work()
            self.flush()
        # Last, or a bus that is faster than the peer would keep its commands from running.
        while self.streaming and self.session.fifo and not self.output:
            self.output.append(self.next_block())
            self.flush()
        if self.leaving and not self.output:
            self.shut_down()
        if not self.closed:
            self.watch()

    # --- reading and commands ---

    def read(self) -> None:
        try:
            data = self.sock.recv(READ_SIZE)
        except BlockingIOError:
            return
        self.ended = not data
        if not self.leaving:
            self.lines.extend(self.splitter.feed(data) if data else [self.END])

    def work(self) -> None:
        """Run some of the lines that have come; the other clients have their turn, too."""
        replies: list[str] = []
        for _ in range(LINES_A_TURN):
            if not self.lines or self.paused or self.session.closing or self.closed:
                break
            looping = self.session.rcvloop
            reply = self.run_line(self.lines[0])
            if reply is None:
                break
            self.lines.popleft()
            if self.session.rcvloop != looping:
                self.on_rcvloop()
                self.write("".join(replies))        # and what follows is a write of its own
                self.write(reply)
                replies.clear()
            elif self.session.delay_s:
                self.paused = True
                self.later(self.session.delay_s, self.resume, reply)
                self.session.delay_s = 0
            else:
                replies.append(reply)
        self.write("".join(replies))
        if self.session.closing and not self.paused and not self.closed:
            self.leave()

    def run_line(self, line: str) -> str | None:
        """The reply to a line, None while it has to wait for room on the bus."""
        if line is self.END:
            self.session.closing = True
            return ""
        if line is LineSplitter.TOO_LONG:
            return refusal("line length exceeded")
        if log.debugging and self.send_by == NEVER:
            log.debug(f"{self.session.name} > {hide_password(line)}")
        try:
            reply = run_command(self.session, line)
        except BusFull as full:
            if self.send_by == NEVER:
                self.send_by = self.daemon.now + SEND_WAIT_S
            if self.daemon.now < self.send_by:
                self.paused = True
                self.daemon.wait_for_room(self)
                return None
            reply = refusal(full)
        self.send_by = NEVER
        return reply

    def resume(self, reply: str = "") -> None:
        """Give a reply that was held back, and go on with the lines."""
        self.paused = False
        self.write(reply)
        self.turn()

    # --- events and writing ---

    def put(self, lines: list[str], block: bytes) -> None:
        """Send event lines, also given as one block, or buffer them.

        A command that takes events in may come here, too; then this client may be
        closed before the command ends.
        """
        session = self.session
        session.rx_frames += len(lines)
        session.rx_commas += block.count(b",")
        if not self.streaming or self.output or session.fifo:
            session.buffer(lines)
            return
        self.output.extend(split_lines(block, self.segment))
        self.guarded(self.flush)
        if self.output:
            self.daemon.due.add(self)

    def on_rcvloop(self) -> None:
        """The receive loop was entered or left."""
        self.streaming = False
        self.loops += 1
        if self.session.rcvloop:
            self.later(RCVLOOP_PAUSE_S, self.start_streaming, self.loops)

    def start_streaming(self, loop: int) -> None:
        if loop == self.loops:              # it has not been left since
            self.streaming = True
            self.turn()
            self.later(SIGN_OF_LIFE_S, self.sign_of_life, loop)

    def sign_of_life(self, loop: int) -> None:
        if loop == self.loops:
            if not self.output:
                self.write(ok())
                self.turn()
            self.later(SIGN_OF_LIFE_S, self.sign_of_life, loop)

    def write(self, text: str) -> None:
        """Have text sent by the next flush, a segment's worth of lines a write."""
        if log.debugging:
            for line in text.splitlines():
                log.debug(f"{self.session.name} < {line}")
        self.output.extend(split_lines(text.encode("ascii"), self.segment))

    def flush(self) -> None:
        """Send what the connection takes of the output."""
        while self.output:
            block = self.output[0]
            try:
                sent = self.sock.send(block)
            except BlockingIOError:
                break
            if self.leaving:
                self.leave_by = self.daemon.now + LINGER_S      # as long as it reads
            if sent < len(block):
                self.output[0] = block[sent:]
                break
            self.output.popleft()

    def next_block(self) -> bytes:
        """Take a segment's worth of events from the FIFO, at least one."""
        fifo = self.session.fifo
        lines = [fifo.popleft()]
        room = self.segment - len(lines[0])
        while fifo and len(fifo[0]) <= room:
            room -= len(fifo[0])
            lines.append(fifo.popleft())
        return "".join(lines).encode("ascii")

    def watch(self) -> None:
        """Have the selector watch for what this client can use now."""
        interest = 0
        if self.output:
            interest = selectors.EVENT_WRITE
        elif self.lines and not self.paused:
            self.daemon.due.add(self)       # the next lines run in the next turn
        if not self.lines and not self.ended:
            interest |= selectors.EVENT_READ
        if interest != self.interest:
            before, self.interest = self.interest, 0    # as it is if the selector refuses
            self.daemon.watch(self.sock, before, interest, self.on_ready)
            self.interest = interest

    # --- the end ---

    def leave(self) -> None:
        """Close once the last reply has arrived: closing at once could reset it away."""
        if not self.leaving:
            self.leaving = True
            self.leave_by = self.daemon.now + LINGER_S
            self.session.rcvloop = False
            self.on_rcvloop()
            self.lines.clear()
            self.daemon.on_leaving(self)

    def shut_down(self) -> None:
        """Tell the peer that nothing follows; read() takes in what it still sends."""
        if self.ended:
            self.daemon.drop(self, "")
        else:
            self.sock.shutdown(socket.SHUT_WR)


def traceback_text(error: BaseException) -> str:
    """Where an exception comes from, the last call last; reads no file, as traceback would."""
    lines = ["Traceback (most recent call last):"]
    trace = error.__traceback__
    while trace:
        lines.append(f"  line {trace.tb_lineno}, in {trace.tb_frame.f_code.co_name}")
        trace = trace.tb_next
    return "\n".join([*lines, f"{type(error).__name__}: {error}"])


def hide_password(line: str) -> str:
    """The line as it may be shown."""
    return re.sub(r"(?i)^(\s*pass).+", r"\1 ***", line)


# =============================================================================
# 12. Daemon
# =============================================================================
# The loop: waits for sockets and timers, hands frames to the clients, and lets
# those that have more to do have a turn.

class Daemon:
    """Everything that runs: the bus, the listening socket, the clients."""

    def __init__(self, options: argparse.Namespace, listener: socket.socket, bus: Bus) -> None:
        self.options = options
        self.bus = bus
        self.started = utc_text(int(time.time()))
        self.answers: deque[float] = deque(maxlen=MOST_ANSWERS)     # when probes were answered
        self.capabilities = CAPABILITIES
        if listener.family == socket.AF_INET6:
            self.capabilities |= CAPABILITY_IPV6
        self.clients: set[Client] = set()
        self.leaving: set[Client] = set()       # told to go, not counted any more
        self.views: dict[View, list[Client]] = {}
        self.due: set[Client] = set()           # have something to do when this turn ends
        self.senders: deque[Client] = deque()   # wait for room in the transmit queue
        self.now = time.monotonic()             # when this turn began; a clock is slow to read
        self.timers: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self.timer_numbers = itertools.count()  # equal times run in the order they were set
        self.last_id = 0
        self.status = ""                        # what systemd was told
        self.stopping = False
        self.gathering = False                  # under load: the bus is polled, not watched
        self.last_wake = 0.0
        self.bus_watched: socket.socket | None = None
        self.selector = selectors.DefaultSelector()
        self.listener = listener
        self.watch(listener, 0, selectors.EVENT_READ, self.on_connection)
        self.wake_up, self.wake_up_end = socket.socketpair()
        self.wake_up.setblocking(False)
        self.wake_up_end.setblocking(False)
        self.watch(self.wake_up, 0, selectors.EVENT_READ, self.on_signal)

    # --- the loop ---

    def run(self) -> None:
        """Serve until stop is called."""
        signal.set_wakeup_fd(self.wake_up_end.fileno())
        notify("READY=1")
        watchdog_us = os.environ.get("WATCHDOG_USEC", "")       # 64 bits
        ours = os.environ.get("WATCHDOG_PID") in (None, str(os.getpid()))
        if ours and re.fullmatch("[1-9][0-9]{0,19}", watchdog_us):
            self.feed_watchdog(int(watchdog_us) / 2000000)
        self.check_bus()
        while not self.stopping:
            timeout = None
            if self.due or self.bus.frames:
                timeout = 0.0
            elif self.timers:
                timeout = max(0.0, self.timers[0][0] - self.now)
            ready = self.selector.select(timeout)
            self.now = time.monotonic()
            while self.timers and self.timers[0][0] < self.now:
                _when, _number, action, arguments = heapq.heappop(self.timers)
                action(*arguments)
            for key, mask in ready:
                key.data(mask)
            if self.bus.frames:
                self.pump(FRAMES_A_TURN)
            due, self.due = self.due, set()
            for client in due:
                client.guarded(client.turn)

    def stop(self) -> None:
        self.stopping = True

    def close(self) -> None:
        """End every connection."""
        notify("STOPPING=1")
        signal.set_wakeup_fd(-1)
        for client in self.clients | self.leaving:
            client.sock.close()
        self.listener.close()

    def on_signal(self, _mask: int) -> None:
        """A signal came; its handler has run, its byte is of no more use."""
        self.wake_up.recv(READ_SIZE)

    def call_later(self, delay_s: float, action: Callable[..., None], *arguments: Any) -> None:
        """Call something after so many seconds."""
        heapq.heappush(self.timers, (self.now + delay_s, next(self.timer_numbers), action,
                                     arguments))

    def watch(self, sock: socket.socket, before: int, now: int,
              action: Callable[[int], None]) -> None:
        """Change what the selector watches a socket for; 0 is nothing."""
        if not now:
            self.selector.unregister(sock)
        elif before:
            self.selector.modify(sock, now, action)
        else:
            self.selector.register(sock, now, action)

    # --- from the bus to the clients ---

    def check_bus(self) -> None:
        """Twice a second: bring back a bus that was away, end what lingers, tell systemd."""
        self.bus.check()
        self.watch_bus()
        for client in list(self.leaving):
            client.guarded(client.turn)     # the selector waits for a third of the buffer
            if client.leave_by < self.now:
                self.drop(client, "")
        status = f"STATUS={self.bus.name}: {self.bus.state.text}, {len(self.clients)} clients"
        if status != self.status:
            self.status = status
            notify(status)
        self.call_later(BUS_CHECK_S, self.check_bus)

    def feed_watchdog(self, period_s: float) -> None:
        """Tell systemd that the loop goes round."""
        notify("WATCHDOG=1")
        self.call_later(period_s, self.feed_watchdog, period_s)

    def watch_bus(self) -> None:
        """Have the selector watch the bus's present socket, but not while frames gather."""
        sock = None if self.gathering else self.bus.sock
        if sock is not self.bus_watched:
            if self.bus_watched is not None:
                self.selector.unregister(self.bus_watched)
            if sock is not None:
                self.selector.register(sock, selectors.EVENT_READ, self.on_bus)
            self.bus_watched = sock

    def on_bus(self, _mask: int) -> None:
        """Frames are there. A lone one is passed on at once, under load they gather.

        Waking up costs more than a frame: at 1,000 frames/s, gathering takes a
        third to a half of the CPU time that waking up for each one takes.
        """
        if self.now - self.last_wake < BUSY_S:
            self.gathering = True
            self.watch_bus()
            self.call_later(GATHER_S, self.gather)
        else:
            self.pump(1)
        self.last_wake = self.now

    def gather(self) -> None:
        """Under load: take what has come by now, and again later, until nothing comes."""
        self.last_wake = self.now
        if self.pump(FRAMES_A_TURN):
            self.call_later(GATHER_S, self.gather)
        else:
            self.gathering = False
            self.watch_bus()

    def take_in(self) -> None:
        """Hand out all that the kernel already holds."""
        for _ in range(FRAMES_IN_KERNEL // FRAMES_A_TURN):
            if self.pump(FRAMES_A_TURN) < FRAMES_A_TURN:
                break

    def pump(self, limit: int) -> int:
        """Take frames from the bus and hand them to the clients; returns how many."""
        frames = self.bus.receive(limit)
        if not frames:
            return 0
        if self.options.answer_probes:
            for can_id, data, _, _ in frames:
                if can_id & PROBE_MASK == PROBE:
                    self.answer(can_id, data)
        if log.debugging:
            for frame in frames:
                log.debug(self.describe(frame))
        texts = [(frame[0], frame[3], *format_event(frame)) for frame in frames]
        senders = {sender for _, sender, _, _ in texts}
        for (guid_text, value, mask), clients in self.views.items():
            seen = [(sender, before + guid_text + after) for can_id, sender, before, after in texts
                    if can_id & mask == value]
            lines = [line for _, line in seen]
            block = "".join(lines).encode("ascii")
            for client in clients:
                if client.session in senders:       # nobody gets back what he sent himself
                    others = [line for sender, line in seen if sender is not client.session]
                    if others:
                        client.put(others, "".join(others).encode("ascii"))
                elif lines:
                    client.put(lines, block)
        return len(frames)

    def describe(self, frame: Frame) -> str:
        """A frame for a person to read."""
        can_id, data, _, sender = frame
        return (f"{sender.name if sender else self.bus.name} * class {can_id >> 16 & 0x1FF} "
                f"type {can_id >> 8 & 0xFF} nickname {can_id & 0xFF} "
                f"data {' '.join([f'{byte:02X}' for byte in data])}")

    def answer(self, can_id: int, data: bytes) -> None:
        """Tell a node that looks for a server where this one is.

        High end server probe and response, class 0 types 27 and 28 (VSCP
        specification, Level I protocol): the probe may give 0 for TCP/IP and the
        node's IPv4 address; the response is 16 capability bits, our IPv4 address
        as the node reaches it, and the port.
        """
        address = self.address_for(data)
        if address is None or len(self.answers) == MOST_ANSWERS and self.now < self.answers[0] + 1:
            return
        self.answers.append(self.now)
        answer = struct.pack(">H4sH", self.capabilities & 0xFFFF, socket.inet_aton(address),
                             self.listener.getsockname()[1])
        try:
            self.bus.send(can_id & 0x1C000000 | PROBE_RESPONSE, answer, None)
        except BusError as error:
            log.debug(f"no answer to a probe: {error}")

    def address_for(self, data: bytes) -> str | None:
        """The IPv4 address by which the sender of a probe reaches us, None if there is none."""
        if data and data[0] != 0:
            return None         # it does not speak TCP/IP
        bound = plain_address(self.listener.getsockname()[0])
        if bound not in ("::", "0.0.0.0"):
            return None if ":" in bound else bound
        told = len(data) >= 5 and any(data[1:5])
        return address_towards(socket.inet_ntoa(data[1:5]) if told else "192.0.2.1")

    # --- from the clients to the bus ---

    def wait_for_room(self, client: Client) -> None:
        """The client's first line is a SEND for which the transmit queue has no room."""
        self.senders.append(client)
        if len(self.senders) == 1:
            self.call_later(SEND_RETRY_S, self.retry_senders)

    def retry_senders(self) -> None:
        """Let those that wait try again, in turn, until one finds no room."""
        waiting, self.senders = self.senders, deque()
        rest: deque[Client] = deque()
        for client in waiting:
            if not self.senders or client.send_by <= self.now:      # or it shall be answered now
                client.guarded(client.resume)
            else:
                rest.append(client)
        self.senders = rest + self.senders

    # --- clients ---

    def on_connection(self, _mask: int) -> None:
        try:
            sock, address = self.listener.accept()
        except BlockingIOError:
            return
        except OSError as error:
            self.on_accept_error(error)
            return
        host = plain_address(address[0])
        name = f"[{host}]:{address[1]}" if ":" in host else f"{host}:{address[1]}"
        try:
            sock.setblocking(False)
            # A peer that vanished without a word is noticed, its slot comes back.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option, value in ((socket.TCP_NODELAY, 1), (socket.TCP_KEEPCNT, 4),
                                  (socket.TCP_KEEPIDLE, PEER_GONE_S // 2),
                                  (socket.TCP_KEEPINTVL, PEER_GONE_S // 8),
                                  (socket.TCP_USER_TIMEOUT, PEER_GONE_S * 1000)):
                sock.setsockopt(socket.IPPROTO_TCP, option, value)
            session = Session(self, name, self.next_channel_id(), int(time.time() * 1000000))
            client = Client(self, sock, session)
        except OSError as error:
            log.debug(f"{name}: {error.strerror}")
            sock.close()
            return
        if not self.allowed(host):
            self.refuse(client, "Invalid or unknown peer.")
        elif len(self.clients) >= self.options.max_clients:
            self.refuse(client, "Max number of clients connected.")
        else:
            self.greet(client)
        client.guarded(client.turn)

    def allowed(self, host: str) -> bool:
        """Whether an address may connect."""
        patterns = self.options.allow
        return not patterns or any(matches(host) for matches in patterns)

    def refuse(self, client: Client, reason: str) -> None:
        """Say why, and close."""
        log.warning(f"{client.session.name}: refused: {reason}")
        client.write(refusal(reason))
        client.leave()

    def on_accept_error(self, error: OSError) -> None:
        """Out of descriptors or memory: no more connections for a moment."""
        if error.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
            log.debug(f"a connection was gone before it was accepted: {error.strerror}")
            return
        log.warning(f"cannot accept a connection: {error.strerror}")
        self.watch(self.listener, selectors.EVENT_READ, 0, self.on_connection)
        self.call_later(ACCEPT_PAUSE_S, self.watch, self.listener, 0, selectors.EVENT_READ,
                        self.on_connection)

    def greet(self, client: Client) -> None:
        log.info(f"{client.session.name}: connected")
        self.take_in()              # what came before is not for this client
        self.clients.add(client)
        self.views_changed()
        state = self.bus.state
        client.write(f"uvscpd.py {__version__} - micro VSCP daemon\r\n"
                     "VSCP events between TCP clients and a CAN bus; HELP lists the commands.\r\n"
                     + (ok(text=f"waiting for {self.bus.name}: {os.strerror(state.code)}")
                        if state.status == AWAY
                        else ok(text=f"Success, connected to {self.bus.name}")))

    def views_changed(self) -> None:
        """Sort the clients by what they see, and have the kernel filter what nobody does."""
        self.views = {}
        for client in self.clients:
            self.views.setdefault(client.session.view, []).append(client)
        wanted = [(value, mask) for _, value, mask in self.views]
        if self.options.answer_probes:
            wanted.append((PROBE, PROBE_MASK))
        self.bus.set_filters(wanted, len(self.clients) > 1 or self.options.answer_probes)

    def on_leaving(self, client: Client) -> None:
        """The client's slot is free, though its connection is not closed yet."""
        self.leaving.add(client)
        if len(self.leaving) > MOST_LEAVING:
            # Who has had all goes first.
            self.drop(min(self.leaving, key=lambda each: (len(each.output), each.leave_by)),
                      "too many are leaving")
        if client in self.clients:
            self.clients.remove(client)
            self.views_changed()

    def drop(self, client: Client, reason: str) -> None:
        """Close a connection."""
        if client.closed:
            return
        client.closed = True
        if client.interest:
            self.selector.unregister(client.sock)
        client.sock.close()
        self.leaving.discard(client)
        if client in self.clients:
            self.clients.remove(client)
            self.views_changed()
        log.info(f"{client.session.name}: disconnected" + (f": {reason}" if reason else ""))

    def next_channel_id(self) -> int:
        """A channel id that no client has, as long unused as possible; 0 without ids."""
        if len(self.options.guid) == 16:
            return 0
        taken = {client.session.channel_id for client in self.clients}
        self.last_id = next(number % 0xFFFF + 1 for number in itertools.count(self.last_id)
                            if number % 0xFFFF + 1 not in taken)
        return self.last_id

    def interfaces(self, session: Session) -> list[str]:
        """The lines of INTERFACE LIST: number, type, GUID and name; with ids, each client, too."""
        lines = [f"0,1,{format_guid(session.guid)},{self.bus.name}|Started {self.started}"]
        for each in sorted((client.session for client in self.clients), key=lambda s: s.channel_id):
            if each.channel_id:
                lines.append(f"{each.channel_id},4,{format_guid(each.guid)},"
                             f"{each.name}|Started {each.started}")
        return lines


# =============================================================================
# 13. Command line, main
# =============================================================================
# Checks all that can be checked before anything starts. A wrong value is one
# line on stderr and exit status 2; what the system refuses is exit status 1.

class Parser(argparse.ArgumentParser):
    """argparse with errors of one line and friendlier argument files."""

    def error(self, message: str) -> Any:
        one_line = " ".join(message.split())
        self.exit(2, f"{self.prog}: {one_line}\n")

    def convert_arg_line_to_args(self, arg_line: str) -> list[str]:
        """An argument a line; `--port 8598` may stand in one line, too."""
        if "\0" in arg_line:
            self.error("a zero byte in an argument file")
        line = arg_line.strip()
        if not line or line.startswith("#"):
            return []
        return line.split(None, 1) if line.startswith("-") else [line]


def number_from(least: int, most: int) -> Callable[[str], int]:
    """An argparse type: a decimal number in this range."""
    def convert(text: str) -> int:
        if not re.fullmatch("[0-9]{1,9}", text) or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"'{text}' is not a number from {least} to {most}")
        return int(text)
    return convert


def guid_argument(text: str) -> bytes:
    """The 16 bytes of a GUID, or the first 12, to which each client's id is added.

    `mac` and `ip` are the VSCP daemon's: FF FF FF FF FF FF FF FE and the upper four
    bytes of the Ethernet address, FF FF FF FF FF FF FF FD and the IPv4 address.
    """
    try:
        if text in ("mac", "ip"):
            return own_guid(text)
        if text.count(":") == 11:
            return parse_guid(text + ":0:0:0:0")[:12]
        return parse_guid(text)
    except VscpError:
        raise argparse.ArgumentTypeError(
            f"'{text}' is not 16 or 12 hexadecimal bytes between colons, mac or ip") from None
    except (LookupError, OSError):
        raise argparse.ArgumentTypeError(f"no interface with an address for '{text}'") from None


def own_guid(kind: str) -> bytes:
    """12 bytes of a GUID from the `mac` or the `ip` address; raises LookupError without one."""
    for name in network_interfaces():
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            request = struct.pack("16s24x", name.encode())
            number = SIOCGIFHWADDR if kind == "mac" else SIOCGIFADDR
            try:
                answer = fcntl.ioctl(sock, number, request)
            except OSError:
                continue        # it has no IPv4 address
        if kind == "ip":
            return bytes([255] * 7 + [0xFD]) + answer[20:24]
        # struct sockaddr: family (1: Ethernet), address
        if struct.unpack_from("=H", answer, 16)[0] == 1 and any(answer[18:24]):
            return bytes([255] * 7 + [0xFE]) + answer[18:22]
    raise LookupError(kind)


def network_interfaces() -> list[str]:
    """Interfaces but for the loopback, the one with the default route first."""
    with open("/proc/net/route", encoding="ascii") as file:
        routes = [line.split() for line in file]
    default = [route[0] for route in routes if route[1] == "00000000"]
    return default + [name for _, name in socket.if_nameindex() if name != "lo"]


def address_argument(text: str) -> str:
    address, _, zone = text.partition("%")
    for family in (socket.AF_INET, socket.AF_INET6):
        try:
            socket.inet_pton(family, address)
        except OSError:
            continue
        if text.isascii() and (family == socket.AF_INET6 or not zone):
            return text
    raise argparse.ArgumentTypeError(f"'{text}' is not an IPv4 or IPv6 address")


def interface_argument(text: str) -> str:
    # IFNAMSIZ is 16 with the final zero; the kernel's dev_valid_name has the rest.
    if text != ":virtual:" and not re.fullmatch(r"(?!\.\.?$)[!-.0-9;-~]{1,15}", text):
        raise argparse.ArgumentTypeError(f"'{text}' is not the name of an interface")
    return text


def login_argument(text: str) -> str:
    # What a client can give: one word of a command line.
    if not re.fullmatch("[!-~]{1,255}", text):
        raise argparse.ArgumentTypeError("only printable ASCII characters without spaces")
    return text


def pattern_argument(text: str) -> Callable[[str], bool]:
    """Says of an address whether it is in the network or like the pattern, `*` being anything."""
    import fnmatch
    import ipaddress
    byte, word = r"(\*|25[0-5]|2[0-4][0-9]|1?[0-9]{1,2})", r"(\*|[0-9a-f]{0,4})"
    pattern = re.sub(r"\b0+(?=[0-9a-f])", "", text.lower())      # as addresses are written

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
        raise argparse.ArgumentTypeError(
            f"'{text}' is not an address, network or pattern") from None
    if network.version == 6 and network.prefixlen >= 96 and network.network_address.ipv4_mapped:
        # IPv4 addresses count as such, however they come.
        network = ipaddress.ip_network(
            f"{network.network_address.ipv4_mapped}/{network.prefixlen - 96}")
    return lambda host: ipaddress.ip_address(host) in network


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="uvscpd.py", fromfile_prefix_chars="@",
        formatter_class=argparse.RawDescriptionHelpFormatter, add_help=False,
        description="The micro VSCP daemon: TCP clients to one CAN bus.",
        epilog="""examples:
  uvscpd.py -s -c :virtual:             try it: no hardware, no kernel support
  uvscpd.py -s -d -c can0               at the bench: see every command and event
  uvscpd.py -c can0 --pidfile /run/uvscpd.pid @/etc/uvscpd.conf
                                        in the background, more options in a file

An argument @FILE stands for the arguments in FILE, one a line. README.md tells the rest.""")

    # All of them in groups: for an option without one argparse makes a formatter, and that
    # takes as long as the import of typing.
    add = parser.add_argument_group("bus").add_argument
    add("-c", "--canbus", metavar="NAME", type=interface_argument, default="can0",
        help="SocketCAN interface (default %(default)s), or :virtual: for a bus inside the process")
    add("-g", "--guid", metavar="GUID", type=guid_argument, default=GUID_ZERO,
        help="GUID of every client, 16 bytes (default all zeros); 12 bytes, mac or ip: "
             "each client has an id and a GUID of its own")
    add("--answer-probes", action="store_true", help="answer nodes that look for a server")
    add("--buffer", metavar="N", type=number_from(1, 1000000), default=1000,
        help="events buffered for each client (default %(default)s)")

    add = parser.add_argument_group("network").add_argument
    add("-i", "--ip", metavar="ADDRESS", type=address_argument, default=None,
        help="IPv4 or IPv6 address to listen on (default: all)")
    add("-p", "--port", metavar="PORT", type=number_from(0, 65535), default=PORT,
        help="TCP port (default %(default)s), 0 for any free one")
    add("--max-clients", metavar="N", type=number_from(1, 10000), default=50,
        help="clients at the same time (default %(default)s)")

    add = parser.add_argument_group("access").add_argument
    add("-U", "--user", metavar="NAME", type=login_argument, help="user name")
    add("-P", "--password", metavar="PASSWORD", type=login_argument, help="password")
    add("--guest", metavar="LEVEL", type=number_from(0, 15), default=15,
        help="privilege of clients that have not logged in, 0-15 (default %(default)s)")
    add("--allow", metavar="PATTERN", type=pattern_argument, action="append", default=[],
        help="addresses that may connect, may be repeated: 192.168.1.8, 192.168.1.* or "
             "192.168.1.0/24 (default: all)")

    add = parser.add_argument_group("running").add_argument
    add("-s", "--stay", action="store_true",
        help="stay in the foreground, messages on stderr (default: detach, messages to syslog)")
    add("-d", "--debug", action="store_true", help="tell every command, reply and event")
    add("--pidfile", metavar="FILE", default="", help="write the process id to FILE")
    add("-h", "--help", action="help", help="show this help and exit")
    add("-v", "--version", action="version", version=f"uvscpd.py {__version__}",
        help="show the version and exit")
    try:
        options = parser.parse_args(arguments)
    except (ValueError, RecursionError) as error:
        parser.error(f"bad argument file: {error}")
    logins = {"user": options.user, "password": options.password}
    options.logins = {what: value for what, value in logins.items() if value}
    return options


def plain_address(address: str) -> str:
    """An address without its zone; an IPv4 address as such, though it comes by IPv6."""
    address = address.partition("%")[0]
    return address[7:] if address.startswith("::ffff:") and "." in address else address


def address_towards(peer: str) -> str | None:
    """Our IPv4 address on the way to another one; None without a way. Nothing is sent."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.connect((peer, PORT))
            address: str = sock.getsockname()[0]
            return address
    except OSError:
        return None


def listen(ip: str | None, port: int) -> socket.socket:
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
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        listener.bind(address)
        listener.listen(128)
        listener.setblocking(False)
    except OSError:
        listener.close()
        raise
    return listener


def detach() -> int:
    """Go on in a child with a session of its own; returns the descriptor for ready().

    The parent waits for that, and then returns 0 to whoever started it; if the
    child ends before, 1.
    """
    parent_end, child_end = os.pipe()
    if os.fork():
        os.close(child_end)
        os._exit(0 if os.read(parent_end, 1) else 1)
    os.close(parent_end)
    os.setsid()
    return child_end


def ready(child_end: int) -> None:
    """Let go of the terminal, and tell the waiting parent that clients can connect."""
    os.chdir("/")
    null = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(null, standard)
    os.close(null)
    syslog.openlog("uvscpd", syslog.LOG_PID, syslog.LOG_DAEMON)
    log.detached = True
    os.write(child_end, b"+")
    os.close(child_end)


def remove_pidfile(name: str) -> None:
    """Remove the file, unless it is another daemon's by now."""
    try:
        with open(name, encoding="ascii", errors="replace") as file:
            ours = file.read() == f"{os.getpid()}\n"
        if ours:
            os.unlink(name)
    except FileNotFoundError:
        log.debug(f"{name} has been removed")
    except OSError as error:
        log.warning(f"cannot remove {name}: {error.strerror}")


def serve(options: argparse.Namespace) -> int:
    """Listen, detach unless told to stay, serve; returns the exit status."""
    # Nothing of ours may get the number of a standard file that was closed before we began.
    null = os.open(os.devnull, os.O_RDWR)
    while null <= 2:
        null = os.open(os.devnull, os.O_RDWR)
    os.close(null)
    try:
        listener = listen(options.ip, options.port)
    except OSError as error:
        log.error(f"uvscpd.py: cannot listen on port {options.port}: {error.strerror}")
        return 1
    if options.logins:
        import hmac  # noqa: F401  as later there may be no descriptor left to read it
    child_end = None if options.stay else detach()
    bus = Bus(options.canbus) if options.canbus == ":virtual:" else SocketCan(options.canbus)
    daemon = Daemon(options, listener, bus)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda _number, _frame: daemon.stop())
    try:
        pidfile = os.path.abspath(options.pidfile) if options.pidfile else ""
        if pidfile:
            with open(pidfile, "w", encoding="ascii") as file:
                file.write(f"{os.getpid()}\n")
    except OSError as error:
        log.error(f"uvscpd.py: cannot write {options.pidfile}: {error.strerror}")
        return 1
    try:
        if child_end is not None:
            ready(child_end)
        host, port = listener.getsockname()[:2]
        log.info(f"uvscpd.py {__version__}: listening on {host} port {port}, bus {bus.name}")
        daemon.run()
        log.info("stopped")
    finally:
        daemon.close()
        if pidfile:
            remove_pidfile(pidfile)
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Run the daemon with these arguments, by default those of the process."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)    # until there is a daemon to stop
    options = parse_arguments(arguments)
    log.debugging = options.debug
    try:
        return serve(options)
    except OSError as error:
        log.error(f"uvscpd.py: {error}")
        log.debug(traceback_text(error))
        return 1
    except Exception as error:
        log.error("a bug in uvscpd.py, it ends:\n" + traceback_text(error))
        return 1


if __name__ == "__main__":
    sys.exit(main())
