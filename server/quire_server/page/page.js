import { watch } from "./engine.js";
import { chat, headers } from "./stream.js";

const at = (id) => document.getElementById(id);
const NUMBERS = ["temperature", "top_p", "max_tokens", "seed"];

let turns = []; // messages as the API wants them
let running = null; // AbortController of the answer that is being made

function show(role, text = "") {
  const turn = document.createElement("div");
  turn.className = `turn ${role}`;
  turn.textContent = text;
  at("turns").append(turn);
  turn.scrollIntoView({ block: "end" });
  return turn;
}

/** An assistant's turn: reasoning is folded above the text. */
function answerTurn() {
  const turn = show("assistant");
  const text = document.createTextNode("");
  turn.append(text);
  let thought = null;
  return {
    text,
    think(piece) {
      if (thought === null) {
        const details = document.createElement("details");
        const summary = document.createElement("summary");
        summary.textContent = "Thinking";
        thought = document.createTextNode("");
        details.append(summary, thought);
        turn.prepend(details);
      }
      thought.data += piece;
    },
    say(piece) {
      text.data += piece;
      turn.scrollIntoView({ block: "end" });
    },
  };
}

function body() {
  const system = at("system").value.trim();
  const messages = system ? [{ role: "system", content: system }, ...turns] : turns;
  const numbers = NUMBERS.filter((id) => at(id).value !== "").map((id) => [id, Number(at(id).value)]);
  const thinking = at("thinking").checked ? { chat_template_kwargs: { enable_thinking: true } } : {};
  return { messages, ...Object.fromEntries(numbers), ...thinking };
}

async function answer() {
  running = new AbortController();
  at("send").hidden = true;
  at("stop").hidden = false;
  const shown = answerTurn();
  const began = performance.now();
  let first = null;
  try {
    for await (const chunk of chat(body(), at("key").value, running.signal)) {
      const delta = chunk.choices[0]?.delta ?? {};
      if (delta.reasoning_content) shown.think(delta.reasoning_content);
      if (delta.content) shown.say(delta.content);
      if (first === null && (delta.content || delta.reasoning_content)) first = performance.now();
      if (chunk.usage) tellSpeed(chunk.usage, began, first);
    }
  } catch (error) {
    if (error.name !== "AbortError") show("error", error.message);
  }
  if (shown.text.data) turns.push({ role: "assistant", content: shown.text.data });
  running = null;
  at("send").hidden = false;
  at("stop").hidden = true;
  at("text").focus();
}

function tellSpeed(usage, began, first) {
  const seconds = (performance.now() - began) / 1000;
  const rate = (usage.completion_tokens / seconds).toFixed(0);
  const wait = first === null ? "" : `, first after ${(first - began).toFixed(0)} ms`;
  at("speed").textContent = `${usage.completion_tokens} tokens, ${rate} per second${wait}`;
}

at("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = at("text").value.trim();
  if (!text || running) return;
  at("text").value = "";
  turns.push({ role: "user", content: text });
  show("user", text);
  answer();
});
at("text").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    at("ask").requestSubmit();
  }
});
at("stop").addEventListener("click", () => running?.abort());
at("clear").addEventListener("click", () => {
  running?.abort();
  turns = [];
  at("turns").replaceChildren();
  at("speed").textContent = "";
});
at("key").value = sessionStorage.getItem("key") ?? "";
at("key").addEventListener("change", () => {
  sessionStorage.setItem("key", at("key").value);
  tellModel();
});

async function tellModel() {
  const found = await fetch("v1/models", { headers: headers(at("key").value) });
  if (!found.ok) return;
  const [model] = (await found.json()).data;
  at("model").textContent = `${model.id}, ${model.max_model_len.toLocaleString()} tokens of context`;
}

tellModel();
watch(() => at("key").value);
