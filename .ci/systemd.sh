#!/bin/bash
#
# What .ci/systemd runs in the machine that it boots: it follows README's instructions for systemd and checks what they
# promise.  Do not call it by hand: it changes the system that it runs on.
#
# The machine starts twice.  The first time a user installs everything, with the texts below, which are README's; the
# second time everything has to start by itself.  The daemon is on can0; can1 is another controller on the same bus,
# where candump is the witness and cansend plays a node.  There are three USB adapters, too: .link files call two of
# them vscpbus0 and vscpbus1, whatever the kernel has called them, and the other one keeps its name.

set -euo pipefail

until [ -c /dev/virtio-ports/output ]; do sleep 0.1; done
exec >/dev/virtio-ports/output 2>&1 </dev/null

limit=60                                    # seconds; what takes longer has failed. How soon the daemon
                                            # notices something is the tests' matter
unit=uvscpd
ip_guid=FF:FF:FF:FF:FF:FF:FF:FD:A:0:2:F     # of the machine, with -g ip
zeros=0:0:0:0:0:0:0:0:0:0:0:0:0:0:0         # a GUID but for its last byte
job=/job

step() { echo "- $*"; }
fail() { echo "FAILED: $*"; exit 1; }

finish() {
    local status=$?
    if [ "$status" != 0 ]; then
        systemctl --no-pager --lines=0 status "$unit" || true
        echo "The end of the journal:"
        ip -details link show | sed 's/^/  /'
        journalctl --boot --no-pager --lines=40 | sed 's/^/  /'
    fi
    journalctl --sync
    sync
    echo "$status" >"$job/status"
    systemctl poweroff --force --force 2>/dev/null
}
trap finish EXIT

same() {  # WHAT EXPECTED GOT
    [ "$2" != "$3" ] || return 0
    diff -U 2 --label expected --label got <(echo "$2") <(echo "$3") || fail "$1"
}

await() {  # WHAT COMMAND...: the command succeeds in time
    local end=$((SECONDS + limit)) what=$1
    shift
    until "$@"; do
        [ "$SECONDS" -lt "$end" ] || fail "$what"
        sleep 0.1
    done
}


# README's texts.  The last step compares.

install='sudo install -D -m 644 uvscpd.py /usr/local/lib/uvscpd/__main__.py
sudo python3 -I -S /usr/local/lib/uvscpd --version
sudo install -m 644 uvscpd.service /etc/systemd/system/
sudo systemctl enable --now uvscpd'

can_rule='sudo tee /etc/udev/rules.d/90-can.rules <<'\''EOF'\''
SUBSYSTEM=="net", ACTION=="add", ATTR{type}=="280", KERNEL!="vcan*|vxcan*", RUN+="/sbin/ip link set $name type can bitrate 125000", RUN+="/sbin/ip link set $name type can restart-ms 100", RUN+="/sbin/ip link set $name up"
EOF
sudo udevadm control --reload && sudo udevadm trigger --action=add --subsystem-match=net --attr-match=type=280'

second_bus="sed 's/can0/can1/g; s/--stay/--stay --port 8599/' uvscpd.service | sudo tee /etc/systemd/system/uvscpd-can1.service
sudo systemctl enable --now uvscpd-can1"

password='sudo sh -c '\''umask 077; cat >/etc/uvscpd.conf'\'' <<'\''EOF'\''
--user admin
--password secret
--guest 0
EOF
sudo mkdir -p /etc/systemd/system/uvscpd.service.d
sudo tee /etc/systemd/system/uvscpd.service.d/password.conf <<'\''EOF'\''
[Service]
LoadCredential=uvscpd:/etc/uvscpd.conf
ExecStart=
ExecStart=/usr/bin/python3 -I -S /usr/local/lib/uvscpd --stay --canbus can0 @%d/uvscpd
EOF
sudo systemctl daemon-reload && sudo systemctl restart uvscpd'

online='sudo mkdir -p /etc/systemd/system/uvscpd.service.d
sudo tee /etc/systemd/system/uvscpd.service.d/online.conf <<'\''EOF'\''
[Unit]
Wants=network-online.target
After=network-online.target
EOF
sudo systemctl daemon-reload'

upgrade='sudo install -D -m 644 uvscpd.py /usr/local/lib/uvscpd/__main__.py
sudo python3 -I -S /usr/local/lib/uvscpd --version
sudo systemctl restart uvscpd'

options='[Service]
ExecStart=
ExecStart=/usr/bin/python3 -I -S /usr/local/lib/uvscpd --stay --canbus can0 --port 9598'

uninstall='sudo systemctl disable --now uvscpd
sudo rm -rf /usr/local/lib/uvscpd /etc/systemd/system/uvscpd* /etc/uvscpd.*
sudo rm -f /etc/udev/rules.d/90-can.rules /etc/sysctl.d/90-can.conf
sudo systemctl daemon-reload'

user() {  # COMMANDS: run by somebody who may sudo, at home
    runuser -l somebody -c "set -e; $1" >/tmp/output 2>&1 || { cat /tmp/output; fail "$1"; }
}


# The unit

property() { systemctl show --value --property "$1" "${2:-$unit}"; }
property_is() { [ "$(property "$1" "${3:-$unit}")" = "$2" ]; }
status_text() {  # PATTERN
    # shellcheck disable=SC2053     # a pattern
    [[ $(property StatusText) = $1 ]]
}
await_status() { await "STATUS is not $1" status_text "$1"; }      # PATTERN
active() { systemctl --quiet is-active "$1"; }

messages() {  # PRIORITY: what the daemon has logged with just this priority since the last call of forget
    journalctl --quiet --output cat --identifier "$unit" --priority "$1..$1" --since "$since"
}
logged() {  # PRIORITY WORDS
    messages "$1" | grep -q -- "$2"
}
forget() { since=@$EPOCHREALTIME; }

restarted() {  # PID: the daemon is ready again, as another process
    local pid
    pid=$(property MainPID)
    [ "$pid" != "$1" ] && [ "$pid" != 0 ] && active "$unit"
}

waits() {  # WHAT [UNIT]: the first that it has said of the bus is that it waits, as information
    local first
    first=$(journalctl --quiet --output json --output-fields PRIORITY,MESSAGE \
        "_SYSTEMD_INVOCATION_ID=$(property InvocationID "${2:-$unit}")" | grep -m 1 -E 'waiting: |interface ')
    [[ $first = *"waiting: $1"* && $first = *'"PRIORITY":"6"'* ]]
}


# Clients: connections of bash's own

hear() {  # its next line, in line
    read -r -t "$limit" -u "$client" line || fail "the client hears nothing more"
    line=${line%$'\r'}
}

ask() {  # COMMAND [PATTERN]: the last line of the answer is like the pattern; all of it is in the array reply
    printf '%s\r\n' "$1" >&"$client"
    hear_reply
    # shellcheck disable=SC2053     # a pattern
    [[ $line = ${2:-+OK*} ]] || fail "reply to $1: $line"
}

hear_reply() {
    reply=()
    while hear; do
        reply+=("$line")
        [[ $line != [+-]OK* ]] || break
    done
}

connect() {  # [PORT]
    exec {client}<>"/dev/tcp/127.0.0.1/${1:-8598}" || fail "cannot connect"
    hear_reply
    [[ $line = +OK* ]] || fail "greeting: $line"
}

disconnect() {
    ask quit
    exec {client}>&-
}

sends() {
    printf 'send 96,20,3,0,,0,-\r\n' >&"$client"
    hear_reply
    [[ $line = +OK* ]]
}

on_the_wire() {  # FRAME: candump sees it next, on can1
    local record
    read -r -t "$limit" -u "$candump" record || fail "candump sees nothing"
    same "frame on the bus" "$1" "${record##* }"
}

both_ways() {
    exec {candump}< <(exec candump -L can1)
    local dumper=$!
    # candump has begun when it sees this.
    until cansend can0 00000001#; read -r -t 1 -u "$candump"; do :; done
    ask "send 96,20,3,0,,0,$zeros:7,0,1,35"
    local record
    while read -r -t "$limit" -u "$candump" record && [[ $record = *" 00000001#" ]]; do :; done
    same "frame on the bus" 0C140307#000123 "${record##* }"
    ask clra
    cansend can1 0C0A0605#8A
    await "no event comes" has_event
    [[ ${reply[0]} = 96,10,6,0,20*,*,$zeros:5,138 ]] || fail "the event: ${reply[0]}"
    kill "$dumper"
    exec {candump}<&-
}

has_event() {
    printf 'retr\r\n' >&"$client"
    hear_reply
    [[ $line = +OK* ]]
}

link_up() { [[ $(ip link show "$1") = *[\<,]UP[,\>]* ]]; }
link_down() { ! link_up "$1"; }


# USB adapters

plug_in() {  # PORT...
    python3 "$job/candlelight.py" "$@" &
    adapters=$!
}

unplug() {
    kill "$adapters"
    wait "$adapters" || true
    await "the adapters are still there" no_adapters
}

no_adapters() { [ -z "$(ls -d /sys/bus/usb/drivers/gs_usb/*:* 2>/dev/null)" ]; }

find_adapter() {  # PORT PATTERN: it has a name like that, which is then in name
    for name in $(cd /sys/class/net && echo $2); do
        # The serial number tells the port.
        [ "$(cat "/sys/class/net/$name/device/../serial" 2>/dev/null)" != "$(printf %012d $(($1 + 1)))" ] || return 0
    done
    return 1
}

named() {  # PORT NAME: udev is to call that adapter so
    printf '%s\n' '[Match]' "Property=ID_SERIAL_SHORT=$(printf %012d $(($1 + 1)))" '' '[Link]' "Name=$2" \
        >"/etc/systemd/network/10-$2.link"
}

is_up() {  # NAME: brought up by README's rule
    await "$1 is not up" link_up "$1"
    [[ $(ip -details link show "$1") = *"bitrate 125000"* ]] || fail "the bit rate of $1 is wrong"
}

all_are_up() {
    local name port=0 pattern
    for pattern in 'can*' vscpbus0 vscpbus1; do
        await "the adapter at port $port is not called $pattern" find_adapter "$port" "$pattern"
        is_up "$name"
        port=$((port + 1))
    done
}

works() {  # PORT NAME: so does the daemon on this interface
    connect "$1"
    [[ $line = *"$2"* ]] || fail "greeting: $line"
    await "SEND does not work" sends
    disconnect
}


# The first start: a user installs it all

home=/home/somebody
if [ "$(<"$job/start")" = 1 ]; then
    step "first start: the user installs program and unit"
    cp "$job"/uvscpd.{py,service} "$home"
    chown somebody: "$home"/uvscpd.*
    user "$install"
    active "$unit" || fail "it is not active"
    systemctl --quiet is-enabled "$unit" || fail "it is not enabled"
    await_status "can0: *"
    await "it does not say that it waits for can0" \
        waits "interface can0 is down, try: ip link set can0 up type can bitrate 125000"

    step "... has USB adapters, some of which get a name of their own"
    named 1 vscpbus0
    named 2 vscpbus1
    udevadm control --reload
    modprobe vhci-hcd
    plug_in 0 1 2
    for name in can2 vscpbus0 vscpbus1; do
        await "there is no $name" [ -e "/sys/class/net/$name" ]
        link_down "$name" || fail "$name is up already"
    done

    step "... and has all of them brought up by udev, while systemd-networkd runs the network"
    active systemd-networkd || fail "systemd-networkd does not run"
    link_down can0 || fail "it is up already"
    user "$can_rule"
    for name in can0 can1; do
        is_up "$name"
        [[ $(ip -details link show "$name") = *"restart-ms 100"* ]] || fail "restart-ms of $name is wrong"
    done
    all_are_up
    await_status "can0: OK*"

    step "... and a second daemon on can1, a third one on vscpbus0"
    user "$second_bus"
    active uvscpd-can1 || fail "it is not active"
    connect 8599
    [[ $line = *can1* ]] || fail "greeting: $line"
    disconnect
    user "${online//uvscpd.service/uvscpd-can1.service}"        # for the second start
    printf '%s\n' '[Service]' 'ExecStart=' \
        'ExecStart=/usr/bin/python3 -I -S /usr/local/lib/uvscpd --stay --canbus can1 --port 8599 -g ip' \
        >/etc/systemd/system/uvscpd-can1.service.d/guid.conf
    third_bus=${second_bus//can1/vscpbus0}
    user "${third_bus/8599/8600}"
    works 8600 vscpbus0

    step "the USB adapters are unplugged, and plugged in again in another order: udev brings them up"
    unplug
    plug_in 2 1 0
    all_are_up
    works 8600 vscpbus0

    # From now on the machine starts with them.  The cards' driver comes first, as the names depend on the order.
    cat >/etc/systemd/system/adapters.service <<UNIT
[Unit]
DefaultDependencies=no
Before=systemd-udevd.service systemd-udev-trigger.service

[Service]
ExecStartPre=/sbin/modprobe -a kvaser_pci vhci-hcd
ExecStart=/usr/bin/python3 $job/candlelight.py 0 1 2
ExecStartPost=/bin/sh -c 'until ls -d /sys/devices/platform/vhci_hcd.0/usb*/*-3; do sleep 0.1; done'

[Install]
WantedBy=sysinit.target
UNIT
    systemctl --quiet enable adapters
    exit 0
fi


# The second start: all that is there

step "second start: the daemon runs on can0, which is up"
await "it is not active" active "$unit"
await_status "can0: OK*"
link_up can0 || fail "can0 is down"

step "the USB adapters are up"
all_are_up
works 8600 vscpbus0

step "... and when they are plugged in later"
systemctl stop adapters
await "the adapters are still there" no_adapters
systemctl restart uvscpd-vscpbus0
await "it does not say that it waits" waits "interface vscpbus0: No such device" uvscpd-vscpbus0
plug_in 2 1 0
all_are_up
works 8600 vscpbus0
systemctl stop uvscpd-vscpbus0
unplug

step "the start did not wait for can0"
await "network-online.target is not reached" active network-online.target
# It gives up after two minutes, with a failure.
property_is Result success systemd-networkd-wait-online || fail "systemd-networkd-wait-online has failed"

step "messages are in the journal, with their priorities"
journalctl --quiet --boot --output cat --identifier "$unit" --priority info..info | grep -q "listening on " ||
    fail "no information that it listens"

step "it needs few rights"
systemd-analyze security --no-pager --threshold=15 "$unit" | tail -n 1
[ "$(stat -c %U "/proc/$(property MainPID)")" != root ] || fail "it runs as root"

step "events go both ways"
connect
both_ways

step "can0 goes down: a warning, SEND is refused, the client stays"
forget
ip link set can0 down
await "no warning" logged warning can0
ask "send 96,20,3,0,,0,-" "-OK - *"
await_status "can0: *[Dd]own*"

step "... and up again: SEND works"
ip link set can0 up
await "SEND does not work again" sends
await "nothing is logged" logged info can0
await_status "can0: OK*"
both_ways

step "the driver lets go of can0: a warning, SEND is refused, the client stays"
forget
device=$(basename "$(realpath /sys/class/net/can0/device)")
echo "$device" >/sys/bus/pci/drivers/kvaser_pci/unbind
[ ! -e /sys/class/net/can0 ] || fail "can0 is still there"
await "no warning" logged warning can0
ask "send 96,20,3,0,,0,-" "-OK - *"

step "... and takes it again: udev brings it up, SEND works"
echo "$device" >/sys/bus/pci/drivers/kvaser_pci/bind
await "can0 does not come back" [ -e /sys/class/net/can0 ]
await "can0 is not up" link_up can0
await "SEND does not work again" sends
both_ways
disconnect

step "the same with can1"
device=$(basename "$(realpath /sys/class/net/can1/device)")
echo "$device" >/sys/bus/pci/drivers/kvaser_pci/unbind
[ ! -e /sys/class/net/can1 ] || fail "can1 is still there"
echo "$device" >/sys/bus/pci/drivers/kvaser_pci/bind
await "can1 does not come back" [ -e /sys/class/net/can1 ]
await "can1 is not up" link_up can1

step "the second daemon sees the same bus; for -g ip it has waited for an address"
property_is NRestarts 0 uvscpd-can1 || fail "it was started $(property NRestarts uvscpd-can1) times again"
connect 8599
[[ $line = *can1* ]] || fail "greeting: $line"
ask ggid
[[ ${reply[0]} = "$ip_guid":* ]] || fail "GUID: ${reply[0]}"
await "SEND does not work again" sends
ask clra
cansend can0 0C0A0605#8A
await "no event comes" has_event
[[ ${reply[0]} = 96,10,6,0,20*,*,$ip_guid:0:0:0:5,138 ]] || fail "the event: ${reply[0]}"
disconnect

step "killed, it is started again"
pid=$(property MainPID)
kill -KILL "$pid"
await "it is not started again" restarted "$pid"
property_is NRestarts 1 || fail "number of restarts: $(property NRestarts)"
connect
disconnect

step "when it hangs, the watchdog has it started again"
# The unit's own time would take half a minute.
mkdir -p "/run/systemd/system/$unit.service.d"
printf '%s\n' '[Service]' 'WatchdogSec=4' >"/run/systemd/system/$unit.service.d/watchdog.conf"
property_is WatchdogUSec 30s || fail "the unit's watchdog: $(property WatchdogUSec)"
systemctl daemon-reload
systemctl restart "$unit"
sleep 6                                     # it does not trouble a daemon that is well
property_is NRestarts 0 || fail "it was started again without a reason"
forget
pid=$(property MainPID)
kill -STOP "$pid"
await "it is not started again" restarted "$pid"
property_is NRestarts 1 || fail "number of restarts: $(property NRestarts)"
journalctl --quiet --output cat --unit "$unit" --since "$since" | grep -qi 'watchdog timeout' ||
    fail "it was not the watchdog"
connect
disconnect
rm "/run/systemd/system/$unit.service.d/watchdog.conf"
systemctl daemon-reload

step "it is upgraded"
forget
user "$upgrade"
connect

step "stopped, it ends well, with a client connected"
systemctl stop "$unit"
property_is Result success || fail "result: $(property Result)"
property_is ExecMainStatus 0 || fail "status: $(property ExecMainStatus)"
exec {client}>&-
same "warnings" "" "$(messages warning)"

step "another option, as systemctl edit would write it"
mkdir -p "/etc/systemd/system/$unit.service.d"
echo "$options" >"/etc/systemd/system/$unit.service.d/override.conf"
systemctl daemon-reload
systemctl restart "$unit"
connect 9598
disconnect

step "a password by LoadCredential, instead of that: a client has to log in"
user "$password"
same "mode of the file" "600 root" "$(stat -c '%a %U' /etc/uvscpd.conf)"
connect
ask cdta "-OK - Need to log in*"
ask "user admin"
ask "pass wrong" "-OK*"
ask "user admin"
ask "pass secret"
await "SEND does not work" sends
disconnect
! tr '\0' ' ' <"/proc/$(property MainPID)/cmdline" | grep secret || fail "the password is in the process list"
rm -r /etc/systemd/system/uvscpd.service.d

own_guid() {  # mac|ip GUID: what -g gives, with the channel id and two zeros behind it
    mkdir -p "/run/systemd/system/$unit.service.d"
    printf '%s\n' '[Service]' 'ExecStart=' \
        "ExecStart=/usr/bin/python3 -I -S /usr/local/lib/uvscpd --stay --canbus can0 -g $1" \
        >"/run/systemd/system/$unit.service.d/guid.conf"
    systemctl daemon-reload
    systemctl reset-failed "$unit"
    systemctl restart "$unit" || fail "-g $1: it does not start"
    connect
    ask ggid
    same "GUID" "$2:0:1:0:0" "${reply[0]}"
    disconnect
    rm "/run/systemd/system/$unit.service.d/guid.conf"
}

step "-g mac"
own_guid mac FF:FF:FF:FF:FF:FF:FF:FE:52:54:0:12
step "-g ip"
own_guid ip "$ip_guid"

step "README shows the texts used here"
readme=$(<"$job/README.md")
for name in install can_rule second_bus password online upgrade options uninstall; do
    text=${!name}
    # shellcheck disable=SC2001     # its lines that are not empty, indented
    indented=$(sed 's/./    &/' <<<"$text")
    # A fenced block, an indented one, or within a sentence
    [[ $readme = *$'\n```\n'"$text"$'\n```\n'* || $readme = *$'\n\n'"$indented"$'\n\n'* || $readme = *"\`$text\`"* ]] ||
        { echo "$text"; fail "not this"; }
done

step "uninstalled, nothing of it is left"
for file in /etc/sysctl.d/90-can.conf "/etc/systemd/system/$unit.service.d/own.conf"; do
    mkdir -p "$(dirname "$file")"
    touch "$file"
done
user "sudo systemctl disable --now uvscpd-can1 uvscpd-vscpbus0"
user "$uninstall"
property_is LoadState not-found || fail "the unit is $(property LoadState)"
property_is ActiveState inactive || fail "the daemon is $(property ActiveState)"
same "what is left" "" "$(find /etc /usr/local -name '*uvscpd*' -o -name '90-can*')"
