// The server's event streams as values. No other site is ever asked.

export class ServerError extends Error {}

export function headers(key) {
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}

/** The message of an answer that is no success. */
export async function problem(answer) {
  try {
    return (await answer.json()).error.message;
  } catch {
    return `the server answered ${answer.status}`;
  }
}

/** Splits a growing text into the data of whole server-sent events; comments have none. */
export function takeEvents(buffer) {
  const parts = buffer.split("\n\n");
  const rest = parts.pop();
  const events = parts
    .flatMap((part) => part.split("\n"))
    .filter((line) => line.startsWith("data: "))
    .map((line) => line.slice(6));
  return { events, rest };
}

/** Yields the data of each event of a path; throws ServerError with the server's own words. */
export async function* events(path, options) {
  const answer = await fetch(path, options);
  if (!answer.ok) throw new ServerError(await problem(answer));
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const taken = takeEvents(buffer + value);
    buffer = taken.rest;
    yield* taken.events;
  }
}

/** Yields the chunks of a streamed chat; throws ServerError as `events` does, and for an error in the stream. */
export async function* chat(body, key, signal) {
  const asked = JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } });
  for await (const data of events("v1/chat/completions", { method: "POST", headers: headers(key), body: asked, signal })) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ServerError(chunk.error.message);
    yield chunk;
  }
}
