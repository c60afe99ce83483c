"""A candleLight USB-CAN adapter that exists only in software, for Linux's own driver of it, gs_usb.

    adapter = CandleLight("2.0")
    adapter.plug_in()                           # now there is a can0; bring it up as usual
    adapter.receive(0x0C140305, b"\\0\\1")        # a node sends a frame
    adapter.wire                                # what went out on the bus
    adapter.enter(BUS_OFF)                      # the controller changes its state
    adapter.unplug()

    python3 candlelight.py PORT...              # plugs in an adapter at each of these ports

It speaks USB/IP (Documentation/usb/usbip_protocol.rst) with the kernel's virtual host controller:
needs root and the modules vhci-hcd and gs_usb, as under .ci/kernel. What the adapter does follows
the firmware's sources (github.com/candle-usb/candleLight_fw) for a controller of the kind bxCAN.
"""

from __future__ import annotations

import contextlib
import glob
import os
import socket
import struct
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator

VHCI = "/sys/devices/platform/vhci_hcd.0"
TIMEOUT = 30                    # seconds; reached only if something is broken
FULL_SPEED = 2                  # enum usb_device_speed

# USB/IP: the header of each message from the kernel, and what answers it. A header is: command,
# number, device, direction, endpoint; CMD_SUBMIT goes on with flags, length, three numbers
# for isochronous transfers, and the setup packet; CMD_UNLINK with the number that it cancels.
HEADER = struct.Struct(">5I 2I 12x 8s")
SUBMITTED = struct.Struct(">5I 2i 20x")         # RET_SUBMIT: with status and length
UNLINKED = struct.Struct(">5I i 24x")           # RET_UNLINK: with a status
CMD_SUBMIT, CMD_UNLINK, RET_SUBMIT, RET_UNLINK = range(1, 5)
EPIPE, EPROTO, ECONNRESET = 32, 71, 104

# Requests and features of gs_usb, drivers/net/can/usb/gs_usb.c
BIT_TIMING, MODE, BT_CONST, DEVICE_CONFIG, TIMESTAMP, GET_STATE = 1, 2, 4, 5, 6, 14
BUS_OFF_RECOVERY = 32
TAKEN = (0, BIT_TIMING, MODE, 3, 7, BUS_OFF_RECOVERY)   # from the host; 0 byte order, 3 BERR, 7 LED
LISTEN_ONLY, LOOP_BACK, ONE_SHOT, HW_TIMESTAMP, IDENTIFY, PADDED = 1, 2, 8, 16, 32, 128
BERR_REPORTING, HAS_STATE, HAS_RECOVERY = 1 << 12, 1 << 13, 1 << 18
FEATURES = {
    "1.0": LISTEN_ONLY | LOOP_BACK,
    "2.0": LISTEN_ONLY | LOOP_BACK | HW_TIMESTAMP | IDENTIFY | PADDED,
    "2.1": LISTEN_ONLY | LOOP_BACK | HW_TIMESTAMP | IDENTIFY | PADDED,
    "2026": (LISTEN_ONLY | LOOP_BACK | ONE_SHOT | HW_TIMESTAMP | IDENTIFY | PADDED
             | BERR_REPORTING | HAS_STATE | HAS_RECOVERY)}
CLOCK_HZ = 48000000
BIT_TIMING_LIMITS = 1, 16, 1, 8, 4, 1, 1024, 1
HOST_FRAME = struct.Struct("<2I4B8s")           # echo id, CAN id, length, three more, data
NO_ECHO = 0xFFFFFFFF                            # the echo id of what comes from the bus
MAILBOXES = 3

ACTIVE, WARNING, PASSIVE, BUS_OFF = range(4)    # the controller, enum can_state
COUNTERS = {ACTIVE: 0, WARNING: 96, PASSIVE: 128, BUS_OFF: 248}     # transmit errors, then
EFF_FLAG, ERR_FLAG = 1 << 31, 1 << 29           # linux/can.h, linux/can/error.h
ERR_CRTL, ERR_ACK, ERR_BUSOFF, ERR_RESTARTED, ERR_CNT = 0x004, 0x020, 0x040, 0x100, 0x200


def wait_until(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {TIMEOUT} s: {what}")
        time.sleep(0.01)


class CandleLight:
    """An adapter with firmware 1.0 (2016), 2.0, 2.1 (2022) or that of July 2026.

    What it shows of the firmware:

    - A frame of the host goes into one of three mailboxes. Its echo, by which the kernel takes it
      as sent, comes then, not once it has been on the bus. set(acknowledged=False): no other node
      is there, so nothing leaves the mailboxes; set(acknowledged=True): all goes out.
    - enter(STATE): the controller is error active, warning, passive or bus off, and each firmware
      tells that in its own way, or does not: see reports(). At bus off nothing leaves the
      mailboxes. enter(ACTIVE) ends it, as the firmware does by itself after some time; then
      what is in the mailboxes goes out, but 2026 has emptied them. Down and up end it, too.
    - error(CLASSES, ...): any error frame, once more "bus off", or that nobody acknowledges.
    - set(stuck=True): takes frames and does nothing with them, so there is no echo of any.
    - with hanging(SECONDS): a firmware that does not answer a request, as when the interface goes
      up or down, or (2026 only) when the kernel asks it for its state and the error counters.
    - In listen-only mode nothing leaves the mailboxes.
    - unplug(HOW), with frames under way, and plug_in() again.

    The kernel is served by a thread. All methods may be called at any time.
    """

    def __init__(self, firmware: str = "2.0", port: int = 0) -> None:
        self.firmware = firmware
        self.port = port                        # of the virtual host controller
        self.hangs_s = 0.0
        self.answers = threading.Event()        # not while the firmware hangs
        self.asked = threading.Event()          # a request has come
        self.usb = socket.socket()              # to the kernel; closed while it is unplugged
        self.usb.close()
        self.lock = threading.RLock()           # of all that follows
        self.power_on()

    def power_on(self) -> None:
        self.answers.set()
        self.acknowledged, self.stuck = True, False
        self.wire: list[tuple[int, bytes]] = []         # CAN id and data of what went out
        self.bit_rate = self.mode = self.flags = 0      # as the driver has set them
        self.state = self.reported = ACTIVE
        self.from_host: deque[tuple[int, int, bytes]] = deque()     # echo id, CAN id, data
        self.mailboxes: deque[tuple[int, int, bytes]] = deque()
        self.to_host: deque[bytes] = deque()
        self.transfers: deque[tuple[int, int]] = deque()    # the kernel wants to read: number, size

    # --- what happens to it ---

    @property
    def interface(self) -> str:
        """The name of its network interface; "" while there is none."""
        found = glob.glob(f"{VHCI}/usb*/*-{self.port + 1}/*/net/*")
        return os.path.basename(found[0]) if found else ""

    def plug_in(self) -> None:
        """Returns when the interface is there."""
        self.attach()
        wait_until(lambda: self.interface, "an interface")

    def attach(self) -> None:
        """Plug in; returns when the kernel has seen the device, be there a driver or not."""
        self.power_on()
        kernel, self.usb = socket.socketpair()
        with kernel, open(f"{VHCI}/attach", "w", encoding="ascii") as file:
            file.write(f"{self.port} {kernel.fileno()} {self.port + 1} {FULL_SPEED}")
        self.thread = threading.Thread(target=self.serve, daemon=True)
        self.thread.start()
        wait_until(lambda: glob.glob(f"{VHCI}/usb*/*-{self.port + 1}"), "a device")

    def unplug(self, how: str = "cable") -> None:
        """Returns when it is gone. How: "cable", "detach" (orderly), "lost" (the server)."""
        if self.usb.fileno() < 0:
            return
        if how == "cable":
            with self.lock:
                while self.transfers:
                    self.answer(self.transfers.popleft()[0], -EPROTO)
        elif how == "detach":
            with open(f"{VHCI}/detach", "w", encoding="ascii") as file:
                file.write(str(self.port))
        self.answers.set()
        with contextlib.suppress(OSError):
            self.usb.shutdown(socket.SHUT_RDWR)
        self.thread.join(TIMEOUT)
        self.usb.close()
        wait_until(lambda: not self.interface and self.port_is_free(), "the interface is gone")

    def port_is_free(self) -> bool:
        with open(f"{VHCI}/status", encoding="ascii") as file:
            return any(line.split()[1:3] == [f"{self.port:04}", "004"] for line in file)

    def set(self, **changes: bool) -> None:
        """Change `acknowledged` and `stuck`."""
        with self.lock:
            self.__dict__.update(changes)
            self.work()

    def receive(self, can_id: int, data: bytes) -> None:
        """A node sends a frame."""
        with self.lock:
            self.to_kernel(NO_ECHO, can_id | EFF_FLAG, data)
            self.work()

    def error(self, classes: int, *data: int) -> None:
        """Send the kernel an error frame of these classes; data[1] is the controller's state."""
        with self.lock:
            self.to_kernel(NO_ECHO, ERR_FLAG | classes, bytes(data).ljust(8, b"\0"))
            self.work()

    def enter(self, state: int) -> None:
        """The controller changes its state."""
        with self.lock:
            if self.state == BUS_OFF and self.firmware == "2026":
                self.mailboxes.clear()
            self.state = state
            counter = COUNTERS[state] if self.firmware != "1.0" else 0
            for classes, controller in self.reports(state):
                self.error(classes, 0, controller, 0, 0, 0, 0, counter, 0)
                self.reported = state
            self.work()

    def reports(self, new: int) -> list[tuple[int, int]]:
        """The error frames by which this firmware reports a state: classes and data[1]."""
        old = self.reported
        if new == old:
            return []
        # In the controller's register the warning stays set when it is passive and bus off.
        both = {ACTIVE: 0, WARNING: 0x0C, PASSIVE: 0x30, BUS_OFF: 0x0C}[new]   # receive, transmit
        active = 0x40 if old >= PASSIVE > new else 0        # from a warning it does not say so
        bus_off = ERR_BUSOFF if new == BUS_OFF else 0
        if self.firmware == "1.0":
            return [(ERR_CRTL | bus_off, both)]
        if self.firmware == "2.0":
            return [(ERR_CRTL | bus_off, both | active)]
        if bus_off:
            return [(ERR_BUSOFF, 0)]
        if self.firmware == "2.1":
            told = active | (both if new == PASSIVE or old == ACTIVE else 0)
            return [(ERR_CRTL, told)] if told else []
        restarted = [(ERR_RESTARTED, 0)] if old == BUS_OFF else []
        transmit = {ACTIVE: 0x40, WARNING: 0x08, PASSIVE: 0x20}[new]
        return [*restarted, (ERR_CRTL | ERR_CNT, transmit)]

    @contextlib.contextmanager
    def hanging(self, seconds: float) -> Iterator[None]:
        """The next request sets `asked`, and is answered so late, or at the end of this."""
        self.hangs_s = seconds
        self.asked.clear()
        self.answers.clear()
        try:
            yield
        finally:
            self.answers.set()

    # --- USB/IP ---

    def serve(self) -> None:
        """The thread: take what the kernel submits, until the connection ends."""
        with contextlib.suppress(OSError, EOFError):
            while True:
                header = HEADER.unpack(self.read(HEADER.size))
                command, number, _, is_in, endpoint, cancelled, size, setup = header
                data = self.read(size) if command == CMD_SUBMIT and not is_in else b""
                if command == CMD_SUBMIT and not endpoint and setup[0] & 0x60:
                    self.asked.set()
                    self.answers.wait(self.hangs_s)
                    self.answers.set()
                with self.lock:
                    if command == CMD_UNLINK:
                        self.unlink(number, cancelled)
                    elif not endpoint:
                        self.on_request(number, setup, data)
                    elif is_in:
                        self.transfers.append((number, size))
                    else:
                        echo_id, can_id, length, *_, content = HOST_FRAME.unpack(data[:20])
                        self.from_host.append((echo_id, can_id, content[:length]))
                        self.answer(number, 0, size=len(data))
                    self.work()

    def read(self, size: int) -> bytes:
        data = self.usb.recv(size, socket.MSG_WAITALL) if size else b""
        if len(data) < size:
            raise EOFError
        return data

    def answer(self, number: int, status: int, data: bytes = b"", size: int = 0) -> None:
        """Complete a transfer: with what has been read, or as many bytes as have been written."""
        size = size or len(data)
        self.usb.sendall(SUBMITTED.pack(RET_SUBMIT, number, 0, 0, 0, status, size) + data)

    def unlink(self, number: int, cancelled: int) -> None:
        """The kernel does not want to read any more."""
        waiting = [transfer for transfer in self.transfers if transfer[0] == cancelled]
        for transfer in waiting:
            self.transfers.remove(transfer)
        self.usb.sendall(UNLINKED.pack(RET_UNLINK, number, 0, 0, 0, -ECONNRESET if waiting else 0))

    def on_request(self, number: int, setup: bytes, data: bytes) -> None:
        """A transfer on endpoint 0: standard requests, and those of gs_usb."""
        kind, request, value, _, size = struct.unpack("<2B3H", setup)
        reply: bytes | None = b""
        if kind & 0x60:
            reply = self.on_gs_usb(request, data)
        elif request == 6:                      # GET_DESCRIPTOR
            serial_number = text_descriptor(f"{self.port + 1:012}")
            reply = serial_number if value == 0x303 else DESCRIPTORS.get(value)
        elif kind & 0x80:                       # GET_STATUS, GET_CONFIGURATION
            reply = b"\1\0"
        if reply is None:
            self.answer(number, -EPIPE)
        else:
            self.answer(number, 0, reply[:size], len(data))

    # --- the firmware ---

    def on_gs_usb(self, request: int, data: bytes) -> bytes | None:
        """The reply to a request of the driver; None if the firmware does not know it."""
        if request == MODE:                     # reset or start
            self.mode, self.flags = struct.unpack("<2I", data)
            self.mailboxes.clear()
            if self.firmware == "2026":
                self.from_host.clear()
                self.to_host.clear()
            self.state = self.reported = ACTIVE
        elif request == BIT_TIMING:
            propagation, phase_1, phase_2, _, prescaler = struct.unpack("<5I", data)
            self.bit_rate = CLOCK_HZ // (prescaler * (1 + propagation + phase_1 + phase_2))
        elif request == BUS_OFF_RECOVERY and self.state == BUS_OFF:
            self.enter(ACTIVE)
        elif request == DEVICE_CONFIG:
            return struct.pack("<4B2I", 0, 0, 0, 0, 2, 1)
        elif request == BT_CONST:
            return struct.pack("<10I", FEATURES[self.firmware], CLOCK_HZ, *BIT_TIMING_LIMITS)
        elif request == TIMESTAMP:
            return self.timestamp()
        elif request == GET_STATE and self.firmware == "2026":
            return struct.pack("<3I", self.state, 0, COUNTERS[self.state])
        return b"" if request in TAKEN else None

    @staticmethod
    def timestamp() -> bytes:
        return struct.pack("<I", time.monotonic_ns() // 1000 & 0xFFFFFFFF)

    def to_kernel(self, echo_id: int, can_id: int, data: bytes) -> None:
        """Hand the kernel a frame, or the echo of one."""
        frame = HOST_FRAME.pack(echo_id, can_id, len(data), 0, 0, 0, data)
        if self.flags & HW_TIMESTAMP:
            frame += self.timestamp()
        self.to_host.append(frame.ljust(32 if self.flags & PADDED else 0, b"\0"))

    def may_send(self) -> bool:
        return (self.mode == 1 and not self.flags & LISTEN_ONLY and self.acknowledged
                and self.state != BUS_OFF)

    def work(self) -> None:
        """What the firmware's main loop does: fill and empty the mailboxes, hand over."""
        moves = not self.stuck
        while moves:
            moves = False
            if self.from_host and len(self.mailboxes) < MAILBOXES:
                frame = self.from_host.popleft()
                self.mailboxes.append(frame)
                self.to_kernel(*frame)
                moves = True
            if self.mailboxes and self.may_send():
                _, can_id, data = self.mailboxes.popleft()
                self.wire.append((can_id & ~EFF_FLAG, data))
                moves = True
        while self.to_host and self.transfers:
            number, size = self.transfers.popleft()
            self.answer(number, 0, self.to_host.popleft()[:size])


def text_descriptor(text: str) -> bytes:
    return bytes([2 + 2 * len(text), 3]) + text.encode("utf-16-le")


# By type and index: the device, its configuration with an interface and two endpoints, texts.
DESCRIPTORS = {
    0x100: struct.pack("<2BH4B3H4B", 18, 1, 0x200, 0, 0, 0, 64, 0x1D50, 0x606F, 0, 1, 2, 3, 1),
    0x200: bytes([9, 2, 32, 0, 1, 1, 0, 0x80, 75, 9, 4, 0, 0, 2, 255, 255, 255, 0,
                  7, 5, 0x81, 2, 32, 0, 0, 7, 5, 0x02, 2, 32, 0, 0]),
    0x300: bytes([4, 3, 9, 4]),                 # English
    0x301: text_descriptor("bytewerk"),
    0x302: text_descriptor("candleLight USB to CAN adapter")}


if __name__ == "__main__":
    adapters = [CandleLight(port=int(port)) for port in sys.argv[1:]]
    for adapter in adapters:
        adapter.attach()
    for adapter in adapters:
        adapter.thread.join()                   # until this process is ended, or the port detached
