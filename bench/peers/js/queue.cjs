// The roles that each queue of the npm registry plays in the benchmark: see bench/peers/jobs.py.
//
// node QUEUE.cjs ROLE ARGUMENTS: ARGUMENTS is JSON; answers are lines of JSON on stdout.
// Moments are nanoseconds of CLOCK_MONOTONIC, which all processes of a machine share.
"use strict";

const readline = require("node:readline");

const now = () => Number(process.hrtime.bigint());
const say = (answer) => process.stdout.write(JSON.stringify(answer) + "\n");
const pause = (ms) => new Promise((done) => setTimeout(done, ms));

/** Insert `count` jobs in batches over some connections; answer the seconds. */
async function bulk(queue, { url, count, batch, connections, payload }) {
  const producer = await queue.produce(url, connections);
  let left = count;
  const work = async () => {
    while (left > 0) {
      const size = Math.min(batch, left);
      left -= size;
      await producer.many(Array(size).fill(payload));
    }
  };
  const started = now();
  await Promise.all(Array.from({ length: connections }, work));
  say({ seconds: (now() - started) / 1e9 });
  await producer.close();
}

/** Insert `count` jobs one by one, each stamped with the moment before; answer the seconds. */
async function submit(queue, { url, count, connections, pause_ms, payload }) {
  const producer = await queue.produce(url, connections);
  let left = count;
  const work = async () => {
    while (left-- > 0) {
      await producer.one({ ...payload, sent_ns: now() });
      if (pause_ms) await pause(pause_ms);
    }
  };
  const started = now();
  await Promise.all(Array.from({ length: connections }, work));
  say({ seconds: (now() - started) / 1e9 });
  await producer.close();
}

/** Run jobs that do nothing from the line `go` on; report on the line `report`; end with SIGTERM. */
async function work(queue, { url }) {
  const seen = { handled: 0, first_ns: null, last_ns: null, waits_ns: [] };
  const handle = (payload) => {
    const at = now();
    seen.first_ns ??= at;
    seen.last_ns = at;
    seen.handled += 1;
    if (payload.sent_ns) seen.waits_ns.push(at - payload.sent_ns);
  };
  let stop = async () => {};
  process.once("SIGTERM", () => stop().finally(() => process.exit(0)));
  readline.createInterface({ input: process.stdin }).on("line", async (line) => {
    if (line === "report") return say(seen);
    stop = await queue.work(url, handle);
    say({ working: true });
  });
  say({ ready: true });
}

/** Play the role that the command line names for `queue`: install, produce, work. */
exports.main = async (queue) => {
  const [role, text] = process.argv.slice(2);
  const args = JSON.parse(text);
  try {
    if (role === "work") return await work(queue, args);
    if (role === "install") {
      await queue.install(args.url);
      say({ installed: true });
    } else {
      await { bulk, submit }[role](queue, args);
    }
    process.exit(0);
  } catch (error) {
    console.error(error);
    process.exit(1);
  }
};
