import { headers, problem } from "./stream.js";

const at = (id) => document.getElementById(id);

function element(name, text = "", ...children) {
  const made = document.createElement(name);
  made.textContent = text;
  made.append(...children);
  return made;
}

function resolve(api, schema) {
  const name = schema?.$ref?.split("/").pop();
  return name ? { name, ...api.components.schemas[name] } : (schema ?? {});
}

/** A schema's type in a few words. */
function kind(api, schema) {
  if (schema.$ref) return resolve(api, schema).name;
  if (schema.const !== undefined) return JSON.stringify(schema.const);
  if (schema.enum) return schema.enum.map((value) => JSON.stringify(value)).join(" | ");
  if (schema.anyOf) return schema.anyOf.map((one) => kind(api, one)).filter((one) => one !== "null").join(" | ");
  if (schema.type === "array") return `list of ${kind(api, schema.items ?? {})}`;
  return schema.type ?? "anything";
}

function fields(api, schema) {
  const required = new Set(schema.required ?? []);
  const table = element("table");
  for (const [name, field] of Object.entries(schema.properties ?? {})) {
    const mark = required.has(name) ? " (required)" : "";
    table.append(
      element("tr", "", element("td", "", element("code", name)), element("td", kind(api, field) + mark),
        element("td", field.description ?? "")),
    );
  }
  return table;
}

function operation(api, path, method, described) {
  const section = element("section", "", element("h2", `${method.toUpperCase()} ${path}`), element("p", described.description ?? ""));
  const body = described.requestBody?.content?.["application/json"]?.schema;
  if (body) section.append(fields(api, resolve(api, body)));
  const answers = Object.entries(described.responses).map(([status, one]) => `${status}: ${one.description}`);
  section.append(element("p", answers.join("  ")));
  return section;
}

async function load() {
  const answer = await fetch("openapi.json", { headers: headers(at("key").value) });
  if (!answer.ok) {
    at("paths").replaceChildren(element("p", await problem(answer)));
    return;
  }
  const api = await answer.json();
  at("version").textContent = api.info.version;
  const sections = Object.entries(api.paths).flatMap(([path, methods]) =>
    Object.entries(methods).map(([method, described]) => operation(api, path, method, described)),
  );
  at("paths").replaceChildren(...sections);
}

at("key").value = sessionStorage.getItem("key") ?? "";
at("key").addEventListener("change", () => {
  sessionStorage.setItem("key", at("key").value);
  load();
});
load();
