#!/bin/bash
#
# `telnet HOST PORT <FILE` of Debian 12 sends nothing of the file, and blames the server.
#
# Tool         inetutils-telnet 2:2.4-2+deb12u3, what `apt-get install telnet` installs on Debian 12
# Expected     The lines are sent before telnet ends at the end of its input, or it says that they
#              were not, with a status other than 0.
# Seen         On 2026-11-28, with a server that reads lines and never closes the connection itself:
#
#                  input from a file: the server got b'' and the end
#                  input from a pipe, open until the server has the line: it got b'noop\r\n' and the end
#                  telnet said, both times: Connection closed by foreign host. (status 0)
#
#              At the end of its input telnet closes at once. What it has read but not sent yet is
#              lost, and so is an answer that has not come yet. The foreign host had not closed
#              anything.
# Where it     Servers of line protocols, such as VSCP's, are tried by hand with telnet. A script
# matters      that gives telnet the same lines from a file sends none of them; from a pipe it may
#              lose the last ones and the answers. It looks as if the server had closed the
#              connection, and the status is 0. nc and socat send everything.
#
# Runs as any user on Debian 12 (amd64) with python3, after `apt-get update`, in 5 s. Unpacks the
# packages into a temporary folder, and uses loopback addresses only.
# Status: 0 as stated, 1 the behaviour has changed, 2 it could not be tried.

set -euo pipefail

temporary=$(mktemp -d)
trap 'rm -r "$temporary"' EXIT
cd "$temporary"

if ! apt-get -qq -o APT::Sandbox::User=root download inetutils-telnet=2:2.4-2+deb12u3 \
        libkrb5-3=1.20.1-2+deb12u5 libk5crypto3=1.20.1-2+deb12u5 \
        libkrb5support0=1.20.1-2+deb12u5 libcom-err2=1.47.0-2+b2 libkeyutils1=1.6.3-2 \
        libtinfo6=6.4-4; then
    echo "$0: cannot download the packages" >&2
    exit 2
fi
for package in ./*.deb; do
    dpkg-deb -x "$package" .
done
libraries=$(find "$PWD" -name 'lib*.so.*' -printf '%h\n' | sort -u | paste -s -d :)

cat >try.py <<'PYTHON'
import os
import socket
import subprocess
import sys

LONG_ENOUGH_S = 60          # for a slow machine


def accept(stdin):
    """Start telnet; returns its process and the server's side of its connection."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        command = ["usr/bin/inetutils-telnet", "127.0.0.1", str(server.getsockname()[1])]
        telnet = subprocess.Popen(command, stdin=stdin, stdout=subprocess.PIPE,
                                  stderr=subprocess.STDOUT,
                                  env={**os.environ, "LD_LIBRARY_PATH": sys.argv[1]})
        server.settimeout(LONG_ENOUGH_S)
        connection, _ = server.accept()
    connection.settimeout(LONG_ENOUGH_S)
    return telnet, connection


def read_to_end(connection):
    received = b""
    while True:
        chunk = connection.recv(1000)
        if not chunk:
            return received
        received += chunk


def last_words(telnet):
    last_line = telnet.stdout.read().decode().splitlines()[-1]
    return "%s (status %d)" % (last_line, telnet.wait(LONG_ENOUGH_S))


with open("input", "w") as file:
    file.write("noop\n")
with open("input") as file:
    telnet, connection = accept(file)
print("input from a file: the server got %r and the end" % read_to_end(connection))
said = [last_words(telnet)]

telnet, connection = accept(subprocess.PIPE)
telnet.stdin.write(b"noop\n")
telnet.stdin.flush()
received = b""
while not received.endswith(b"\n"):
    received += connection.recv(1000) or sys.exit("telnet ended too early")
telnet.stdin.close()
received += read_to_end(connection)
print("input from a pipe, open until the server has the line: it got %r and the end" % received)
said.append(last_words(telnet))

print("telnet said, both times: " + " / ".join(sorted(set(said))))
PYTHON

expected="input from a file: the server got b'' and the end
input from a pipe, open until the server has the line: it got b'noop\\r\\n' and the end
telnet said, both times: Connection closed by foreign host. (status 0)"

seen=$(timeout 100 python3 try.py "$libraries" 2>&1) || true
echo "$seen"
if [ "$seen" != "$expected" ]; then
    echo "$0: the behaviour has changed" >&2
    exit 1
fi
