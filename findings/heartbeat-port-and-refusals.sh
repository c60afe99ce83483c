#!/bin/bash
#
# send-vscp-heartbeat.py ignores --port, and ends with status 0 whatever the server answers.
#
# Tool         vscp-python-send-heartbeat 1.0.1 (PyPI) with pyvscp 0.3.14, pyvscpclasses 0.0.11,
#              pyvscptypes 0.0.11, get-mac 0.9.2; CPython 3.11 (it imports telnetlib, which 3.13
#              does not have)
# Expected     It connects to the port given by --port. If the server refuses the log-in or the
#              event, it says so and its status is not 0. A .netrc file is needed only with --netrc.
# Seen         On 2026-11-28, with a server on port 9598 of the same address that takes everything,
#              then one that refuses everything:
#
#                  without ~/.netrc: FileNotFoundError, status 1
#                  --port PORT: connects to port 9598
#                  each answer is +OK: sends user, pass, send, quit; status 0
#                  each answer is +OK: 4 s or more from the answer to USER until QUIT
#                  each answer is -OK: sends user, pass, send, quit; status 0
#                  with -v, after -OK: Sent Event
#
#              The script waits 2 s each for the answers to USER, PASS and SEND, and does not look
#              at what came. After PASS and SEND it waits for `+OK - Success.`, so that another
#              `+OK` costs the 2 s, too.
# Where it     A heartbeat from cron to a server on any other port than 9598, such as the 8598 of
# matters      uvscpd, never arrives. Where it does arrive, an empty ~/.netrc has to be there, and a
#              wrong password or a refused event shows only in the server's log, if anywhere. A
#              server that answers `+OK - Success.` saves the script its waiting.
#
# Runs as any user with Python 3.8 to 3.12 and pip (Debian 12: python3, python3-pip), in 15 s.
# Installs into a temporary folder, and uses loopback addresses only.
# Status: 0 as stated, 1 the behaviour has changed, 2 it could not be tried.

set -euo pipefail

temporary=$(mktemp -d)
trap 'rm -r "$temporary"' EXIT
cd "$temporary"

if ! python3 -W ignore -c 'import telnetlib' 2>/dev/null; then
    echo "$0: needs a Python with telnetlib, 3.8 to 3.12" >&2
    exit 2
fi
if ! python3 -m pip --quiet --disable-pip-version-check --no-cache-dir install --no-deps \
        --target packages vscp-python-send-heartbeat==1.0.1 pyvscp==0.3.14 pyvscpclasses==0.0.11 \
        pyvscptypes==0.0.11 get-mac==0.9.2 >pip.log 2>&1; then
    cat pip.log >&2
    echo "$0: cannot install the packages" >&2
    exit 2
fi

cat >try.py <<'PYTHON'
import os
import random
import select
import socket
import subprocess
import sys
import time

LONG_ENOUGH_S = 60          # for a slow machine

# Another loopback address than 127.0.0.1, where port 9598 may be in use
address = "127.%d.%d.%d" % (random.randint(1, 254), random.randint(1, 254), random.randint(1, 254))
asked, fixed = socket.create_server((address, 0)), socket.create_server((address, 9598))
os.mkdir("home")


def heartbeat(*options):
    command = [sys.executable, "-W", "ignore", "packages/bin/send-vscp-heartbeat.py",
               "--host", address, "--port", str(asked.getsockname()[1]),
               "--user", "admin", "--password", "secret", *options]
    environment = {**os.environ, "HOME": os.path.abspath("home"),
                   "PYTHONPATH": os.path.abspath("packages")}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, universal_newlines=True)


def serve(connection, answer):
    """Give each line this answer.

    Returns the commands, and the seconds from the first answer to the last command.
    """
    commands = []
    start = None
    with connection, connection.makefile("rwb") as stream:
        connection.settimeout(LONG_ENOUGH_S)
        stream.write(b"+OK - Hello.\r\n")
        stream.flush()
        for line in stream:
            commands.append(line.split()[0].decode())
            if commands[-1] == "quit":
                break
            start = start or time.monotonic()
            stream.write(answer + b"\r\n")
            stream.flush()
    return commands, time.monotonic() - start


script = heartbeat()
output, _ = script.communicate(timeout=LONG_ENOUGH_S)
error = output.splitlines()[-1].split(":")[0]
print("without ~/.netrc: %s, status %d" % (error, script.returncode))

with open("home/.netrc", "w"):
    pass
for answer in b"+OK", b"-OK":
    script = heartbeat("-v")
    try:
        ready, _, _ = select.select([asked, fixed], [], [], LONG_ENOUGH_S)
        if not ready:
            sys.exit("it connects to neither port: " + script.communicate(timeout=LONG_ENOUGH_S)[0])
        connection, _ = ready[0].accept()
        if answer == b"+OK":
            port = connection.getsockname()[1]
            print("--port PORT: connects to %s" % ("port 9598" if port == 9598 else "PORT"))
        commands, seconds = serve(connection, answer)
        output, _ = script.communicate(timeout=LONG_ENOUGH_S)
    finally:
        script.kill()
    print("each answer is %s: sends %s; status %d" % (
        answer.decode(), ", ".join(commands), script.returncode))
    if answer == b"+OK" and seconds >= 4:
        print("each answer is +OK: 4 s or more from the answer to USER until QUIT")
    if answer == b"-OK":
        print("with -v, after -OK: " + " ".join(
            line.split("=")[0] for line in output.splitlines() if "Event" in line))
PYTHON

expected='without ~/.netrc: FileNotFoundError, status 1
--port PORT: connects to port 9598
each answer is +OK: sends user, pass, send, quit; status 0
each answer is +OK: 4 s or more from the answer to USER until QUIT
each answer is -OK: sends user, pass, send, quit; status 0
with -v, after -OK: Sent Event'

seen=$(python3 -W ignore try.py 2>&1) || true
echo "$seen"
if [ "$seen" != "$expected" ]; then
    echo "$0: the behaviour has changed" >&2
    exit 1
fi
