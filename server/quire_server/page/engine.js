// The engine at work, as it tells of itself: figures, the KV pool, its steps, and who is in the queue.

import { draw, hue } from "./grid.js";
import { drawSteps } from "./steps.js";
import { events, headers } from "./stream.js";

const at = (id) => document.getElementById(id);
const AGAIN = 2000; // milliseconds until a lost engine is asked for again
const RECENT = 2; // seconds of steps that the speed is taken over
const MOST = 12; // sequences that are listed

/** Show the engine for as long as the page is open. `key` gives the API key. */
export async function watch(key) {
  for (;;) {
    try {
      for await (const data of events("engine/stream", { headers: headers(key()) })) tell(JSON.parse(data));
    } catch {
      at("rate").textContent = "no answer";
    }
    await new Promise((resolve) => setTimeout(resolve, AGAIN));
  }
}

function tell(view) {
  if (view.steps === undefined) return; // no engine just now, and why
  const used = new Set(view.sequences.flatMap((one) => one.block_ids)).size;
  const figures = {
    running: view.num_running,
    waiting: view.num_waiting,
    rate: speed(view.steps),
    step: view.steps.at(-1)?.num_tokens ?? 0,
    cache: `${((100 * used) / view.num_blocks).toFixed(1)} %`,
    hits: view.num_query_tokens ? `${((100 * view.num_hit_tokens) / view.num_query_tokens).toFixed(0)} %` : "–",
    cached: `${view.num_cached_blocks} of ${view.num_blocks}`,
    preemptions: view.num_preemptions,
  };
  for (const [id, value] of Object.entries(figures)) at(id).textContent = value;
  draw(at("grid"), view);
  drawSteps(at("steps"), view.steps);
  list(view.sequences);
}

let seen = null; // id of the last step that was told of
let samples = []; // [when a look came, tokens sampled since the one before]

/** Tokens sampled per second over the last looks. By this machine's clock, which the server's need not agree with. */
function speed(steps) {
  const newest = steps.at(-1)?.step_id ?? -1;
  if (seen === null || newest < seen) seen = newest; // the first look, or a new engine
  const now = performance.now();
  const fresh = steps.filter((step) => step.step_id > seen);
  seen = newest;
  samples.push([now, fresh.reduce((sum, step) => sum + step.num_sampled, 0)]);
  samples = samples.filter(([when]) => when > now - 1000 * RECENT);
  return Math.round(samples.reduce((sum, [, tokens]) => sum + tokens, 0) / RECENT);
}

function list(sequences) {
  const rows = sequences.slice(0, MOST).map((one) => {
    const row = document.createElement("li");
    const mark = document.createElement("span");
    mark.className = "mark";
    if (one.block_ids.length) mark.style.backgroundColor = `hsl(${hue(one.sequence_id)} 65% 52%)`;
    const output = one.num_tokens - one.num_prompt_tokens;
    row.append(mark, `${one.status}: ${one.num_prompt_tokens} in, ${output} out, ${one.block_ids.length} blocks`);
    return row;
  });
  if (sequences.length > MOST) {
    const more = document.createElement("li");
    more.textContent = `and ${sequences.length - MOST} more`;
    rows.push(more);
  }
  at("queue").replaceChildren(...rows);
}
