#!/bin/bash
#
# After a receive loop, node-vscp-tcp takes old lines of the loop for the answers to new commands.
#
# Tool         node-vscp-tcp 1.1.4 (npm) with node-vscp 1.1.26, node-vscp-class 1.0.23,
#              node-vscp-type 1.0.22; Node.js 20.20.2
# Expected     After `await stopRcvLoop()` each command gets its own answer, as before
#              `startRcvLoop()`.
# Seen         On 2026-11-28, with a server that sends three events in the loop, each with a sign of
#              life (`+OK`) after it, and that refuses to send:
#
#                  before the loop: getGUID() is 0:0:0:0:0:0:0:0:0:0:0:0:0:0:0:9
#                  in the loop: 3 events, 3 signs of life; 228 characters kept
#                  after the loop: getGUID() is 20,9,0,2026-11-28T10:00:00Z,1,0:0:0:0:0:0:0:0:0:0:0:0:0:0:0:5,0,1,2
#                  after the loop: the server answers -OK, sendEvent() is true
#
#              All that comes in the loop is passed on, and also kept in `collectedData` until the
#              loop ends, however long it runs. The answers to QUITLOOP and to the later commands
#              are then what stands there up to the next `+OK`, whatever the server really says.
#              After each, two characters too many are cut off, here the `0,` of the event.
# Where it     A program that leaves the receive loop and goes on: it believes that a refused event
# matters      was sent, and finds events where GUIDs should be. A program that stays in the loop
#              keeps every byte that ever came. What helps: a connection for the receive loop alone,
#              and `client.collectedData = ''` at each event and each 'alive'.
#
# Runs as any user with Node.js and npm, in 10 s. Installs into a temporary folder, and uses
# loopback addresses only.
# Status: 0 as stated, 1 the behaviour has changed, 2 it could not be tried.

set -euo pipefail

temporary=$(mktemp -d)
trap 'rm -r "$temporary"' EXIT
cd "$temporary"

if ! npm_config_cache=$temporary/cache npm install --ignore-scripts --no-audit --no-fund \
        --prefix . node-vscp-tcp@1.1.4 node-vscp@1.1.26 node-vscp-class@1.0.23 \
        node-vscp-type@1.0.22 >npm.log 2>&1; then
    cat npm.log >&2
    echo "$0: cannot install the packages" >&2
    exit 2
fi

cat >try.js <<'JAVASCRIPT'
'use strict';
const fs = require('fs');
const net = require('net');
const Client = require('node-vscp-tcp');

const show = text => fs.writeSync(1, text + '\n');
console.info = console.log = () => {};          // the package's own lines contain the time of day

const ANSWERS = {
  getguid: '0:0:0:0:0:0:0:0:0:0:0:0:0:0:0:9\r\n+OK\r\n',
  rcvloop: '+OK\r\n',
  quitloop: '+OK\r\n',
  send: '-OK - refused\r\n',
};
const event = n => `0,20,9,0,2026-11-28T10:00:00Z,1,0:0:0:0:0:0:0:0:0:0:0:0:0:0:0:5,0,1,${n}\r\n`;

let connection;
const server = net.createServer(socket => {
  connection = socket;
  let input = '';
  socket.on('data', chunk => {
    const lines = (input + chunk).split('\r\n');
    input = lines.pop();
    for (const line of lines) {
      socket.write(ANSWERS[line.split(' ')[0].toLowerCase()]);
    }
  });
  socket.write('+OK\r\n');
});

async function main() {
  const client = new Client();
  await client.connect({host: '127.0.0.1', port: server.address().port, timeout: 60000});
  show(`before the loop: getGUID() is ${await client.getGUID()}`);

  let events = 0, alive = 0;
  client.addEventListener(() => { events += 1; });
  const done = new Promise(resolve => client.on('alive', () => { if (++alive === 3) resolve(); }));
  await client.startRcvLoop();
  for (const n of [1, 2, 3]) connection.write(event(n) + '+OK\r\n');
  await done;
  show(`in the loop: ${events} events, ${alive} signs of life; ` +
       `${client.collectedData.length} characters kept`);

  await client.stopRcvLoop();
  show(`after the loop: getGUID() is ${await client.getGUID()}`);
  const result = await client.sendEvent({event: '0,20,9,0,,,-,0,1,2'}).catch(() => 'rejected');
  show(`after the loop: the server answers -OK, sendEvent() is ${result}`);
  process.exit();
}

setTimeout(() => { show('no answer for 60 s'); process.exit(1); }, 60000);
server.listen(0, '127.0.0.1', () => main().catch(error => {
  show(String(error));
  process.exit(1);
}));
JAVASCRIPT

expected='before the loop: getGUID() is 0:0:0:0:0:0:0:0:0:0:0:0:0:0:0:9
in the loop: 3 events, 3 signs of life; 228 characters kept
after the loop: getGUID() is 20,9,0,2026-11-28T10:00:00Z,1,0:0:0:0:0:0:0:0:0:0:0:0:0:0:0:5,0,1,2
after the loop: the server answers -OK, sendEvent() is true'

seen=$(node try.js 2>&1) || true
echo "$seen"
if [ "$seen" != "$expected" ]; then
    echo "$0: the behaviour has changed" >&2
    exit 1
fi
