// graphile-worker in the benchmark; what its manual says stands in bench/peers/graphile_worker.py.
"use strict";

const { Logger, makeWorkerUtils, run, runMigrations } = require("graphile-worker");
const { Pool } = require("pg");
const { main } = require("./queue.cjs");

const logger = new Logger(() => () => {}); // a line for each job would be measured too

main({
  install: (url) => runMigrations({ connectionString: url, logger }),

  async produce(url, connections) {
    const pool = new Pool({ connectionString: url, max: connections });
    const utils = await makeWorkerUtils({ pgPool: pool, logger });
    return {
      one: (payload) => utils.addJob("echo", payload),
      many: (payloads) => utils.addJobs(payloads.map((payload) => ({ identifier: "echo", payload }))),
      async close() {
        await utils.release();
        await pool.end();
      },
    };
  },

  async work(url, handle) {
    const runner = await run({
      preset: {
        worker: {
          connectionString: url,
          concurrentJobs: 24,
          maxPoolSize: 25,
          localQueue: { size: 500 },
          completeJobBatchDelay: 0,
          failJobBatchDelay: 0,
        },
      },
      logger,
      noHandleSignals: true,
      taskList: { echo: (payload) => handle(payload) },
    });
    return () => runner.stop();
  },
});
