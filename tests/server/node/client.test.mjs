// OpenAI's client for Node against a running server; its URL is in QUIRE_TEST_URL.

import assert from "node:assert/strict";
import { test } from "node:test";
import OpenAI from "openai";

const baseURL = `${process.env.QUIRE_TEST_URL}/v1`;
const client = new OpenAI({ baseURL, apiKey: "none", maxRetries: 0 });
const model = "quire-tiny";
const messages = [{ role: "user", content: "What is 27+45?" }];
const tools = [
  {
    type: "function",
    function: {
      name: "get_weather",
      description: "Weather in a city",
      parameters: { type: "object", properties: { city: { type: "string" } }, required: ["city"] },
    },
  },
];

async function running() {
  const text = await (await fetch(`${process.env.QUIRE_TEST_URL}/metrics`)).text();
  return Number(text.match(/^quire:num_requests_running\{.*\} (\S+)$/m)[1]);
}

test("models", async () => {
  const found = [];
  for await (const item of client.models.list()) found.push(item.id);
  assert.deepEqual(found, [model]);
  assert.equal((await client.models.retrieve(model)).max_model_len, 2048);
});

test("a chat", async () => {
  const { data, request_id } = await client.chat.completions.create({ model, messages }).withResponse();
  assert.equal(data.choices[0].message.content, "72");
  assert.equal(data.choices[0].finish_reason, "stop");
  assert.equal(data.usage.completion_tokens, 3);
  assert.match(request_id, /^req_/);
});

test("a streamed chat", async () => {
  const options = { model, messages, stream: true, stream_options: { include_usage: true } };
  const chunks = [];
  for await (const chunk of await client.chat.completions.create(options)) chunks.push(chunk);
  assert.equal(chunks.map((chunk) => chunk.choices[0]?.delta.content ?? "").join(""), "72");
  assert.equal(new Set(chunks.map((chunk) => chunk.id)).size, 1);
  assert.deepEqual(chunks.at(-1).choices, []);
  assert.equal(chunks.at(-1).usage.completion_tokens, 3);
});

test("the stream helper puts a tool call together", async () => {
  const asked = [{ role: "user", content: "What is the weather in Paris?" }];
  const stream = client.chat.completions.stream({ model, messages: asked, tools });
  const final = await stream.finalChatCompletion();
  const [call] = final.choices[0].message.tool_calls;
  assert.equal(call.function.name, "get_weather");
  assert.deepEqual(JSON.parse(call.function.arguments), { city: "Paris" });
  assert.equal(final.choices[0].finish_reason, "tool_calls");
});

test("completions", async () => {
  const body = { model, prompt: ["Ada lives in", "Ben has a"], max_tokens: 4 };
  const whole = await client.completions.create(body);
  assert.deepEqual(whole.choices.map((choice) => choice.index), [0, 1]);
  const texts = ["", ""];
  for await (const chunk of await client.completions.create({ ...body, stream: true })) {
    for (const choice of chunk.choices) texts[choice.index] += choice.text;
  }
  assert.deepEqual(texts, whole.choices.map((choice) => choice.text));
});

test("responses", async () => {
  const whole = await client.responses.create({ model, input: "What is 27+45?" });
  assert.equal(whole.output_text, "72");
  const types = [];
  let text = "";
  for await (const event of await client.responses.create({ model, input: "What is 27+45?", stream: true })) {
    types.push(event.type);
    if (event.type === "response.output_text.delta") text += event.delta;
  }
  assert.equal(text, "72");
  assert.equal(types[0], "response.created");
  assert.equal(types.at(-1), "response.completed");
  const final = await client.responses.stream({ model, input: "What is 27+45?" }).finalResponse();
  assert.equal(final.output_text, "72");
});

test("errors", async () => {
  const refused = (promise, kind, fields) =>
    assert.rejects(promise, (error) => {
      assert.ok(error instanceof kind, String(error));
      for (const [name, value] of Object.entries(fields)) assert.equal(error[name], value);
      return true;
    });
  await refused(client.chat.completions.create({ model: "gpt-9", messages }), OpenAI.NotFoundError, {
    status: 404,
    code: "model_not_found",
  });
  await refused(client.chat.completions.create({ model, messages, temperature: -1 }), OpenAI.BadRequestError, {
    status: 400,
    param: "temperature",
    type: "invalid_request_error",
  });
  const tooLong = { model, prompt: "x", max_tokens: 5000, stream: true };
  await refused(client.completions.create(tooLong), OpenAI.BadRequestError, { code: "context_length_exceeded" });
});

test("an aborted stream ends its request", async () => {
  const body = { model, prompt: "go on", max_tokens: 1900, stream: true };
  const stream = await client.completions.create({ ...body, ignore_eos: true });
  for await (const chunk of stream) {
    assert.equal(chunk.object, "text_completion");
    assert.equal(await running(), 1);
    break; // the iterator aborts what it leaves
  }
  const deadline = Date.now() + 5000;
  while ((await running()) > 0 && Date.now() < deadline) await new Promise((done) => setTimeout(done, 20));
  assert.equal(await running(), 0);
});
