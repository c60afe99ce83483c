// A session of the npm package node-vscp-tcp with a running uvscpd.py.
//
//     NODE_PATH=DIRECTORY/node_modules node .ci/session.js PORT INTERFACE USER PASSWORD
//
// DIRECTORY is where .ci/install-client has put the package.  The daemon listens on PORT of this machine for the CAN
// interface INTERFACE, and gives those who have not logged in no privilege (--guest 0).  Nobody else uses INTERFACE.
//
// Uses the package as a user's program would, and can-utils for the other nodes on the bus.  Prints a line per step,
// and stops with status 1 at the first thing that is wrong.
//
// About the package: it resolves a command's promise at the next line with +OK, whichever command that line answers,
// and rejects it at one with -OK; in the receive loop every +OK is the sign of life ("alive").

'use strict';

const assert = require('node:assert/strict');
const { execFileSync } = require('node:child_process');
const Client = require('node-vscp-tcp');

const [port, canInterface, username, password] = process.argv.slice(2);
const LIMIT_MS = 60000;             // for a step; what takes longer has failed
const ZEROS = '0:0:0:0:0:0:0:0:0:0:0:0:0:0:0';      // a GUID but for its last byte


// Steps and failures

let current = 'start';
let timer;

function step(text) {
  current = text;
  console.log(`- ${text}`);
  clearTimeout(timer);
  timer = setTimeout(fail, LIMIT_MS, `not done in ${LIMIT_MS / 1000} s`);
}

function fail(reason) {
  const text = reason.response ? `${reason.command}: ${reason.response.join(' / ')}` : reason.stack || reason;
  console.log(`FAILED: ${current}: ${text}`);
  process.exit(1);
}

process.on('uncaughtException', fail);
process.on('unhandledRejection', fail);
console.info = () => {};            // the package tells of every connection
console.error = fail;               // ... and of lines that it does not understand


// The bus and the clients

// On one processor, as frames sent on two can overtake each other.
function bus(program, ...options) {
  execFileSync('taskset', ['-c', '0', program, canInterface, ...options]);
}

function cansend(...frames) {
  for (const frame of frames) bus('cansend', frame);
}

async function connect() {
  const client = new Client();
  client.on('error', fail);
  const greeting = await client.connect({ host: '127.0.0.1', port: Number(port), timeout: LIMIT_MS });
  assert.equal(greeting.response.at(-1), `+OK - Success, connected to ${canInterface}`);
  return client;
}

async function logIn(client) {
  assert.equal(await client.user({ username }), true);
  assert.equal(await client.password({ password }), true);
}

async function refused(promise, text) {
  await assert.rejects(promise, (reply) => {
    assert.deepEqual(reply.response, [`-OK - ${text}`]);
    return true;
  });
}

// An event as "head,class,type,nickname:data", once its other fields are what they should be.
function brief(event) {
  const guid = event.vscpGuid.split(':');
  const nickname = guid.pop();
  assert.equal(guid.join(':'), ZEROS);
  assert.equal(event.vscpObId, 0);
  assert(Number.isInteger(event.vscpTimeStamp) && event.vscpTimeStamp < 2 ** 32);
  assert(!Number.isNaN(event.vscpDateTime.getTime()));
  return `${event.vscpHead},${event.vscpClass},${event.vscpType},${nickname}:${event.vscpData}`;
}

// All that is buffered for the client is these events.
async function buffered(client, expected) {
  assert.equal(await client.getPendingEventCount(), expected.length);
  const events = await client.getEvents({ count: expected.length });
  assert.deepEqual(events.map(brief), expected);
  assert.equal(await client.getPendingEventCount(), 0);
}


async function session() {
  step('connects, and has to log in');
  const client = await connect();
  await refused(client.getPendingEventCount(), 'Need to log in to perform this command.');
  await client.user({ username });
  await refused(client.password({ password: 'wrong' }), 'invalid username or password');
  await logIn(client);
  assert.equal(await client.noop(), true);

  step('asks for version, capabilities, channel id and GUID');
  assert.deepEqual(Object.keys(await client.getRemoteVersion()), ['major', 'minor', 'release', 'build']);
  assert.match((await client.getWhatCanYouDo()).join('-'), /^00-00-00-00-00-00-80-[26]8$/);
  assert.equal(await client.getChannelID(), 0);
  assert.equal(await client.getGUID(), `${ZEROS}:0`);

  step('lists the interfaces');
  const [{ started, ...listed }, ...more] = await client.getInterfaces();
  assert.deepEqual(listed, { index: 0, type: 2, guid: `${ZEROS}:0`, name: canInterface });
  assert.match(started, /^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d$/);
  assert.deepEqual(more, []);

  step('sends events, and another client gets them');
  const other = await connect();
  await logIn(other);
  const guid = '00:00:00:00:00:00:00:00:00:00:00:00:00:00:00:2A';
  const event = { vscpHead: 96, vscpClass: 10, vscpType: 6, vscpGuid: guid, vscpData: [1, 2, 3] };
  assert.equal(await client.sendEvent({ event }), true);
  assert.equal(await client.sendEvent({ event: '0,20,9,0,,0,-' }), true);
  await refused(client.sendEvent({ event: '0,20,9,0,,0,-,1,2,3,4,5,6,7,8,9' }), 'too many data bytes');
  await buffered(other, ['96,10,6,2A:1,2,3', '0,20,9,0:']);
  assert.equal(await client.getPendingEventCount(), 0);
  await other.disconnect();

  step('gets what was buffered, and exactly that');
  cansend('0C140305#000123', '1C0A0607#', '0014090A#0102030405060708');
  await buffered(client, ['96,20,3,5:0,1,35', '224,10,6,7:', '0,20,9,A:1,2,3,4,5,6,7,8']);
  await refused(client.getEvents({ count: 1 }), 'No event(s) available');

  step('forgets what was buffered');
  cansend('0C140305#', '0C140305#');
  await client.clearQueue();
  assert.equal(await client.getPendingEventCount(), 0);

  step('sets filter and mask: of a class and type');
  await client.setFilter({ filterClass: 20, filterType: 3 });
  await client.setMask({});         // the package's default: all bits of class and type
  cansend('0C140305#01', '0C140405#02', '0C150305#03', '1C140306#04');
  await buffered(client, ['96,20,3,5:1', '224,20,3,6:4']);

  step('sets filter and mask: of a priority and node');
  await client.setFilter({ filterPriority: 3, filterGuid: guid });
  await client.setMask({ maskPriority: 7, maskClass: 0, maskType: 0, maskGuid: guid.replace('2A', 'FF') });
  cansend('0C14032A#01', '0C14032B#02', '1014032A#03', '0D0A062A#04');
  await buffered(client, ['96,20,3,2A:1', '96,266,6,2A:4']);
  await client.setMask({ maskClass: 0, maskType: 0 });

  step('gets events in the receive loop as they come, a burst of 200 among them');
  const seen = [];
  const last = new Promise((resolve) => {
    client.addEventListener((each) => {
      seen.push(each);
      if (each.vscpClass === 511) resolve();
    });
  });
  await client.startRcvLoop();
  cansend('0C140305#000123', '1C0A0607#');
  bus('cangen', '-e', '-g', '0', '-n', '200', '-I', '0C140300', '-L', '1', '-D', 'i');
  cansend('0C140305#FF', '01FF0000#');
  await last;
  const burst = Array.from({ length: 200 }, (_, number) => `96,20,3,0:${number}`);
  assert.deepEqual(seen.map(brief), ['96,20,3,5:0,1,35', '224,10,6,7:', ...burst, '96,20,3,5:255', '0,511,0,0:']);

  step('leaves the receive loop, and events are buffered again');
  // The package would take for QUITLOOP's reply what it has heard in the loop, so make it forget that, and a sign of
  // life that comes now, so leave when there has just been one.
  await new Promise((resolve) => { client.once('alive', resolve); });
  client.collectedData = '';
  assert.deepEqual((await client.stopRcvLoop()).response, ['+OK - Success.']);
  cansend('0C140305#01', '0C140306#02');
  await buffered(client, ['96,20,3,5:1', '96,20,3,6:2']);
  assert.equal(seen.length, 204);

  step('quits, and the daemon closes the connection');
  const closed = new Promise((resolve) => { client.once('disconnect', resolve); });
  assert.deepEqual((await client.disconnect()).response, ['+OK - bye']);
  await closed;
  clearTimeout(timer);
}

session().catch(fail);
