// Fastify with pg: one durable INSERT a request; what the manuals say stands in bench/peers/fastify.py.
"use strict";

const Fastify = require("fastify");
const { Pool } = require("pg");

const { url, port, pool_size } = JSON.parse(process.argv[2]);
const pool = new Pool({ connectionString: url, max: pool_size });
const server = Fastify();

const schema = {
  body: {
    type: "object",
    required: ["type", "payload"],
    properties: { type: { type: "string" }, payload: { type: "object" } },
  },
  response: {
    200: { type: "object", properties: { job_id: { type: "string" }, status: { type: "string" } } },
  },
};

server.post("/jobs", { schema }, async (request) => {
  const { type, payload } = request.body;
  const { rows } = await pool.query({
    name: "insert-job",
    text: "insert into jobs (type, payload) values ($1, $2) returning id",
    values: [type, payload],
  });
  return { job_id: rows[0].id, status: "pending" };
});

process.once("SIGTERM", async () => {
  await server.close();
  await pool.end();
  process.exit(0);
});

server.listen({ host: "127.0.0.1", port }).then(() => console.log(JSON.stringify({ ready: true })));
