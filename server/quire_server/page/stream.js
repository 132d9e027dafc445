// The server's event stream, and its metrics, as values. No other site is ever asked.

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

/** Yields the chunks of a streamed chat; throws ServerError with the server's own words. */
export async function* chat(body, key, signal) {
  const answer = await fetch("v1/chat/completions", {
    method: "POST",
    headers: headers(key),
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  if (!answer.ok) throw new ServerError(await problem(answer));
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const taken = takeEvents(buffer + value);
    buffer = taken.rest;
    for (const data of taken.events) {
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new ServerError(chunk.error.message);
      yield chunk;
    }
  }
}

/** Sums of Prometheus samples by name, without the prefix. */
export function readMetrics(text) {
  const found = {};
  for (const line of text.split("\n")) {
    const match = /^quire:([a-z_]+)(?:\{[^}]*\})? ([-+.eE0-9]+)$/.exec(line);
    if (match) found[match[1]] = (found[match[1]] ?? 0) + Number(match[2]);
  }
  return found;
}
