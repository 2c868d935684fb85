// pg-boss in the benchmark; what its manual says stands in bench/peers/pg_boss.py.
"use strict";

const { PgBoss } = require("pg-boss");
const { main } = require("./queue.cjs");

const QUEUE = "echo";

async function start(options) {
  const boss = new PgBoss(options);
  boss.on("error", console.error);
  await boss.start();
  return boss;
}

main({
  async install(url) {
    const boss = await start({ connectionString: url });
    await boss.createQueue(QUEUE, { notify: true });
    await boss.stop();
  },

  async produce(url, connections) {
    const boss = await start({ connectionString: url, max: connections, supervise: false, schedule: false });
    return {
      one: (payload) => boss.send(QUEUE, payload),
      many: (payloads) => boss.insert(QUEUE, payloads.map((data) => ({ data }))),
      close: () => boss.stop(),
    };
  },

  async work(url, handle) {
    const boss = await start({ connectionString: url, useListenNotify: true });
    const options = { batchSize: 5000, localConcurrency: 2, burstWhenBatchFull: true };
    await boss.work(QUEUE, options, async (jobs) => {
      for (const job of jobs) handle(job.data);
    });
    return () => boss.stop();
  },
});
