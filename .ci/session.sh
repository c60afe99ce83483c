#!/bin/bash
#
# A session of uvscpd.py on a CAN interface, with can-utils as the other nodes and as witness.
#
#     .ci/install-client DIRECTORY
#     .ci/kernel .ci/session.sh DIRECTORY
#
# Starts the daemon on vcan0, to which nobody else sends.  Frames of cansend, canplayer and cangen have to arrive at TCP
# clients (connections that bash itself makes, /dev/tcp) as the event lines that follow from candump's log of the same
# frames, to the microsecond; what clients send has to be in that log.  The npm package node-vscp-tcp then has a session
# of its own, see .ci/session.js.  Prints a line per step, and stops with status 1 at the first thing that is wrong.
#
#     UVSCPD_PYTHON    the Python for uvscpd.py (python3)

set -euo pipefail

if [ $# != 1 ]; then
    echo "Usage: $0 DIRECTORY" >&2
    exit 2
fi
modules=$(realpath -m "$1")/node_modules
cd "$(dirname "$0")/.."

python=${UVSCPD_PYTHON:-python3}
can=vcan0
limit=60                                    # seconds; what takes longer has failed
good="+OK - Success."                       # the reply that has no text of its own
zeros=0:0:0:0:0:0:0:0:0:0:0:0:0:0:0         # a GUID but for its last byte
export TZ=UTC0

step() { echo "- $*"; }
fail() { echo "FAILED: $*"; exit 1; }

[ -d "$modules/node-vscp-tcp" ] || fail "no $modules/node-vscp-tcp: call .ci/install-client first"

same() {  # WHAT EXPECTED GOT
    [ "$2" != "$3" ] || return 0
    diff -U 2 --label expected --label got <(echo "$2") <(echo "$3") || fail "$1"
}

lines() { printf '%s\n' "$@"; }


# The bus.  All that is put there comes from one processor, as frames sent on two can overtake each other.

bus() { taskset -c 0 "$@"; }

cansend() {  # FRAME...
    local frame
    for frame; do bus cansend "$can" "$frame"; done
}

# Marks are frames by which a reader knows that it has seen all before them: events of class 511 type 255 with a number.
marks=0

send_mark() {
    marks=$((marks + 1))
    printf -v mark '1FFFFFFF#%08X' "$marks"
    cansend "$mark"
}

witness() {  # all frames since the last mark, as candump's log has them, in the array log
    local record
    send_mark
    log=()
    while read -r -t "$limit" -u "$candump" record || fail "candump hears nothing more"; do
        log+=("$record")
        [[ $record != *" $mark" ]] || break
    done
}

log_is() {  # FRAME...: these are the frames of the array log, up to the mark
    same "frames on the bus" "$(lines "$@" "$mark")" "$(lines "${log[@]##* }")"
}

event_of() {  # (SECONDS.MICROSECONDS) INTERFACE FRAME: appends its event line to the array events, if it is an event
    local time=${1//[(.)]/} id data head=
    [[ $3 =~ ^([0-9A-F]{8})#(([0-9A-F]{2})*)$ ]] || return 0
    id=0x${BASH_REMATCH[1]} data=${BASH_REMATCH[2]}
    printf -v head '%d,%d,%d,0,%(%Y-%m-%dT%H:%M:%S)TZ,%d,%s:%X' $((id >> 21 & 0xF0)) $((id >> 16 & 0x1FF)) \
        $((id >> 8 & 0xFF)) $((time / 1000000)) $((time & 0xFFFFFFFF)) "$zeros" $((id & 0xFF))
    while [ -n "$data" ]; do
        head+=,$((0x${data:0:2}))
        data=${data:2}
    done
    events+=("$head")
}

witness_events() {  # the events since the last mark, the next one included, in the array events
    local record
    witness
    events=()
    # shellcheck disable=SC2086     # three words
    for record in "${log[@]}"; do event_of $record; done
}


# The clients are file descriptors

hear() {  # CLIENT: its next line, in line
    read -r -t "$limit" -u "$1" line || fail "client $1 hears nothing more"
    [[ $line = *$'\r' ]] || fail "no CR at the end of: $line"
    line=${line%$'\r'}
}

hear_reply() {  # CLIENT: lines up to and including the one with +OK or -OK, in the array reply
    reply=()
    while hear "$1"; do
        reply+=("$line")
        [[ $line != [+-]OK* ]] || break
    done
}

ask() {  # CLIENT COMMAND [LINE...]: has to be answered by these lines and the good reply
    printf '%s\r\n' "$2" >&"$1"
    hear_reply "$1"
    same "reply to $2" "$(lines "${@:3}" "$good")" "$(lines "${reply[@]}")"
}

refused() {  # CLIENT COMMAND REASON
    printf '%s\r\n' "$2" >&"$1"
    hear_reply "$1"
    same "reply to $2" "-OK - $3" "$(lines "${reply[@]}")"
}

connect() {  # the new client's number, in client
    exec {client}<>"/dev/tcp/127.0.0.1/$port"
    hear_reply "$client"
    same "last line of the greeting" "+OK - Success, connected to $can" "$line"
    ask "$client" "user admin"
    ask "$client" "pass secret"
}

streamed() {  # CLIENT: in its receive loop it gets the array events, and nothing else
    local got=() end=$((SECONDS + limit))
    while hear "$1"; do
        [ "$SECONDS" -lt "$end" ] || fail "client $1: the mark does not come"
        [ "$line" != +OK ] || continue              # the sign of life
        got+=("$line")
        [[ $line != *,511,255,* ]] || break
    done
    same "events in the receive loop" "$(lines "${events[@]}")" "$(lines "${got[@]}")"
}

buffered() {  # CLIENT: the array events is buffered for it, and nothing else
    ask "$1" cdta "${#events[@]} "
    ask "$1" "retr ${#events[@]}" "${events[@]}"
    ask "$1" cdta "0 "
}

events_are() {  # EVENT...: with DATE and TIME in place of its own, these are the array events, up to the mark
    same "events" "$(lines "$@")" "$(lines "${events[@]:0:${#events[@]}-1}" |
        sed -E 's/,[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z,[0-9]+,/,DATE,TIME,/')"
}


# The daemon, and candump

finish() {
    local status=$?
    kill -9 "$daemon" ${dumper+"$dumper"} 2>/dev/null || true
    if [ "$status" != 0 ]; then
        echo "The daemon's messages:"
        sed 's/^/  /' <&"$messages"
    fi
}

step "the daemon starts and says where it listens"
exec {messages}< <(exec "$python" ./uvscpd.py --stay --canbus "$can" --ip 127.0.0.1 --port 0 \
    --user admin --password secret --guest 0 2>&1)
daemon=$!
trap finish EXIT
read -r -t "$limit" -u "$messages" line || fail "the daemon says nothing"
[[ $line =~ listening\ on\ 127.0.0.1\ port\ ([0-9]+),\ bus\ $can$ ]] || fail "the daemon says: $line"
port=${BASH_REMATCH[1]}

step "candump sees the bus"
exec {candump}< <(exec candump -L -r 2000000 "$can")
dumper=$!
attempts=$limit
until send_mark; read -r -t 1 -u "$candump" line; do
    [ $((attempts -= 1)) != 0 ] || fail "candump sees nothing"
done
witness                                     # the marks before this one are seen


# The session

step "clients connect, have to log in, and one enters the receive loop"
exec {client}<>"/dev/tcp/127.0.0.1/$port"
hear_reply "$client"
refused "$client" cdta "Need to log in to perform this command."
refused "$client" "send 96,20,3,0,,0,-" "Need to log in to perform this command."
exec {client}>&-
connect; streamer=$client
connect; buffer=$client
ask "$streamer" rcvloop

step "cansend: frames arrive as events"
cansend 0C140305#000123 00000000# 1FFFFEFE#FFFFFFFFFFFFFFFF 0E0A062A#8A
witness_events
events_are \
    "96,20,3,0,DATE,TIME,$zeros:5,0,1,35" \
    "0,0,0,0,DATE,TIME,$zeros:0" \
    "240,511,254,0,DATE,TIME,$zeros:FE,255,255,255,255,255,255,255,255" \
    "112,10,6,0,DATE,TIME,$zeros:2A,138"
streamed "$streamer"
buffered "$buffer"

step "canplayer: standard, remote and CAN FD frames are no events, those between them are"
bus canplayer "$can=can0" <<'LOG'
(1436509052.249713) can0 0C140301#01
(1436509052.249714) can0 123#112233
(1436509052.249715) can0 7FF#
(1436509052.249716) can0 0C140302#02
(1436509052.249717) can0 0C140303#R
(1436509052.249718) can0 0C140303#R8
(1436509052.249719) can0 123#R
(1436509052.249720) can0 0C140304#04
(1436509052.249721) can0 0C140305##0112233
(1436509052.249722) can0 0C140306##1112233445566778899AABBCC
(1436509052.249723) can0 123##0112233
(1436509052.249724) can0 0C140307#07
LOG
witness_events
same "number of frames that candump saw" 13 "${#log[@]}"
events_are "96,20,3,0,DATE,TIME,$zeros:1,1" "96,20,3,0,DATE,TIME,$zeros:2,2" \
    "96,20,3,0,DATE,TIME,$zeros:4,4" "96,20,3,0,DATE,TIME,$zeros:7,7"
streamed "$streamer"
buffered "$buffer"

step "cangen: 300 frames of all kinds at random"
bus cangen "$can" -m -g 0 -n 300
witness_events
same "number of frames that candump saw" 301 "${#log[@]}"
streamed "$streamer"
buffered "$buffer"

step "cangen: a burst of 500 events, none lost, in their order"
bus cangen "$can" -e -g 0 -n 500
witness_events
same "number of events that candump saw" 501 "${#events[@]}"
streamed "$streamer"
buffered "$buffer"

step "cangen: 200 events at a frame a millisecond"
bus cangen "$can" -e -g 1 -n 200
witness_events
same "number of events that candump saw" 201 "${#events[@]}"
streamed "$streamer"
buffered "$buffer"

step "a client's SENDs are on the bus, and at the other client"
ask "$buffer" "send 96,20,3,0,,0,-,0,1,35"
ask "$buffer" "SEND 0xF0,0x1FF,0xFE,7,2026-11-21T22:28:59,3810025283,$zeros:FE,1,2,3,4,5,6,7,0xFF"
ask "$buffer" "SEND 96,20,9,0,2026-11-21T22:59:33,0,"
ask "$buffer" "send 480,10,6,0,,11616992294838206464,00:00:00:00:00:00:00:00:00:00:00:00:00:00:00:00,0x8A,0x01"
ask "$buffer" "send 0,532,3,0,,0,-,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,9,8"
refused "$buffer" "send 96,20,3,0,,0,-,1,2,3,4,5,6,7,8,9" "too many data bytes"
ask "$buffer" "send 0x60,0x14,0x3,0x0,1795845433446809000,FF:FF:FF:FF:FF:FF:FF:FE:02:FC:00:00:00:01:00:05,0x00,0x50,0x05"
sent=(0C140300#000123 1FFFFEFE#01020304050607FF 0C140900# 1C0A0600#8A01 00140300#0908 0C140305#005005)
witness_events
log_is "${sent[@]}"
streamed "$streamer"

step "... but not at the one that sent them"
events=("${events[-1]}")
buffered "$buffer"

step "100 SENDs in one packet"
packet= replies=() sent=()
for ((number = 0; number < 100; number++)); do
    packet+="send 224,10,6,0,,0,-,$number"$'\n'
    replies+=("$good")
    printf -v frame '1C0A0600#%02X' "$number"
    sent+=("$frame")
done
printf '%s' "$packet" >&"$buffer"
for reply in "${replies[@]}"; do
    hear "$buffer"
    same "reply to a SEND of many" "$reply" "$line"
done
witness_events
log_is "${sent[@]}"
streamed "$streamer"

step "clients quit, and are let go"
for client in "$streamer" "$buffer"; do
    printf 'quit\r\n' >&"$client"
    while hear "$client"; [ "$line" = +OK ]; do :; done     # the last signs of life
    same "reply to quit" "+OK - bye" "$line"
    status=0
    read -r -t "$limit" -u "$client" line || status=$?
    same "status of reading on: 0 a line, 1 the end, over 128 nothing in time" 1 "$status"
    exec {client}>&-
done

step "node-vscp-tcp has a session of its own:"
NODE_PATH=$modules node .ci/session.js "$port" "$can" admin secret | sed -u 's/^/  /'

step "candump saw what node-vscp-tcp sent, before the first cansend of that session"
witness
same "frames on the bus" "$(lines 0C0A062A#010203 00140900# 0C140305#000123)" "$(lines "${log[@]:0:3}" | sed 's/.* //')"

step "the daemon ends when told to"
kill "$daemon"
status=0
wait "$daemon" || status=$?
same "exit status of the daemon" 0 "$status"
mapfile -t -u "$messages" said
[[ ${said[-1]} = "stopped after "* ]] || fail "the daemon's last words: ${said[-1]}"

echo "All is well after $SECONDS s."
