// The playground: builds requests to the API of this server and shows the answers.
// Every text goes through textContent. The key stays in the memory of the page. Numbers of answers
// are shown as they were sent, and whole numbers of requests are sent as they were typed: a number of
// JavaScript would be rounded above 2^53.

const $ = (id) => document.getElementById(id);
const METHODS = "/qwen3vl.v1.VisionService/";
const CHAT = "/v1/chat/completions";
const WAIT_MS = 350;
const SAMPLES = {
  schema: JSON.stringify({
    type: "object",
    properties: {
      objects: {
        type: "array",
        items: {
          type: "object",
          properties: {
            position: { type: "string" },
            shape: { enum: ["circle", "square", "triangle", "star", "cross", "diamond"] },
            color: { type: "string" },
            size: { enum: ["small", "large"] },
          },
          required: ["position", "shape", "color", "size"],
          additionalProperties: false,
        },
      },
    },
    required: ["objects"],
    additionalProperties: false,
  }, null, 2),
  regex: "(day|night) in the [a-z]{3,12}",
  choice: "desert\nmeadow\nsea\nsnow",
};
const OPTIONS = ["close_objects", "property_order", "schema_in_prompt"];
const NAMES = { schema: "JSON Schema", regex: "Regular expression", choice: "The lines, of which the answer is one" };

const state = { images: [], tasks: new Map(), model: "", retry: 0, running: null, language: "curl", request: null };
const drafts = { ...SAMPLES };

// JSON with exact numbers

class Numeral {
  constructor(text) { this.text = text; }
  toString() { return this.text; }
}

function read(text) {
  // The value of JSON, with a Numeral for each number. Every text in place of a value gets the prefix
  // "s" and every number becomes a text with the prefix "n", so that no text is taken for a number.
  JSON.parse(text); // raises for what is not JSON
  const marked = text.replace(/("(?:[^"\\]|\\.)*")(\s*:)?|-?\d[\d.eE+-]*/g, (whole, string, colon) => {
    if (string === undefined) return `"n${whole}"`;
    return colon === undefined ? `"s${string.slice(1)}` : whole;
  });
  return JSON.parse(marked, (_, value) => {
    if (typeof value !== "string") return value;
    return value[0] === "n" ? new Numeral(value.slice(1)) : value.slice(1);
  });
}

function written(value, indent) {
  // JSON of a value in which whole numbers may be BigInt.
  const marked = JSON.stringify(value, (_, one) => (typeof one === "bigint" ? `\u0000${one}` : one), indent);
  return marked.replace(/"\\u0000(-?\d+)"/g, "$1");
}

function typed(text) {
  // What stands in a field for a number.
  return /^-?\d+$/.test(text) && !Number.isSafeInteger(Number(text)) ? BigInt(text) : Number(text);
}

// Calls

function headers() {
  const found = { "content-type": "application/json" };
  if ($("key").value) found.authorization = `Bearer ${$("key").value}`;
  return found;
}

class Refused extends Error {
  constructor(message, reason, id, field) {
    super(message);
    Object.assign(this, { reason, id, field });
  }
}

async function post(path, request, signal) {
  const options = { method: "POST", headers: headers(), body: written(request), signal };
  return fetch(path, options).catch((error) => {
    if (signal?.aborted) throw error;
    throw new Refused("The server does not answer.", "NO_ANSWER");
  });
}

async function call(method, request, signal) {
  const response = await post(METHODS + method, request, signal);
  const body = await response.json();
  if (!response.ok) {
    throw new Refused(body.message, response.headers.get("x-error-reason") ?? body.code, response.headers.get("x-request-id"));
  }
  return body;
}

async function connect() {
  clearTimeout(state.retry);
  try {
    const [model, found] = await Promise.all([call("GetModel", {}), call("ListTasks", {})]);
    state.model = model.name;
    $("server").textContent = `${model.name} on the ${model.engine} engine, version ${model.serverVersion ?? "unknown"}`;
    const chosen = $("task").value;
    state.tasks = new Map((found.tasks ?? []).map((task) => [task.name, task]));
    $("task").replaceChildren(new Option("Own prompt", ""), ...[...state.tasks.keys()].map((name) => new Option(name, name)));
    $("task").value = state.tasks.has(chosen) ? chosen : "";
    update();
  } catch (error) {
    const next = error.reason?.startsWith("API_KEY") ? " Enter a key." : " Trying again …";
    $("server").textContent = `${error.message}${next}`;
    if (!error.reason?.startsWith("API_KEY")) state.retry = setTimeout(connect, 2000);
  }
}

// Images

async function add(files) {
  for (const file of files) {
    if (file.type && !file.type.startsWith("image/")) continue;
    const url = await new Promise((resolve, reject) => {
      const reader = new FileReader();
      reader.onload = () => resolve(reader.result);
      reader.onerror = () => reject(reader.error);
      reader.readAsDataURL(file);
    });
    state.images.push({ name: file.name || "pasted image", url: url.replace(/^data:;/, "data:application/octet-stream;"), shown: URL.createObjectURL(file) });
  }
  showImages();
}

function showImages() {
  $("images").replaceChildren(...state.images.map((image, index) => {
    const picture = element("img");
    picture.src = image.shown;
    picture.alt = image.name;
    const remove = element("button", "×");
    remove.type = "button";
    remove.ariaLabel = `Remove ${image.name}`;
    remove.addEventListener("click", () => {
      URL.revokeObjectURL(image.shown);
      state.images.splice(index, 1);
      showImages();
      $("files").focus();
    });
    const item = element("li");
    item.append(picture, remove);
    return item;
  }));
}

// Task and schema

function grammar() {
  const text = $("constraint").value;
  if ($("form").value === "schema") {
    const order = $("property-order").value;
    const propertyOrder = order && { propertyOrder: `PROPERTY_ORDER_${order.toUpperCase()}` };
    return { jsonSchema: text, ...chosen("close-objects", "closeObjects"), ...propertyOrder };
  }
  if ($("form").value === "regex") return { regex: text };
  if ($("form").value === "choice") return { choice: { options: lines(text) } };
  return null;
}

function chosen(id, field) {
  // A field for what was chosen; none for the default.
  const value = $(id).value;
  return value === "" ? {} : { [field]: { true: true, false: false }[value] ?? value };
}

function lines(text) {
  return text.split("\n").filter((line) => line !== "");
}

let checking = { timer: 0, abort: new AbortController() };

function update() {
  const task = state.tasks.get($("task").value);
  $("own").hidden = Boolean(task);
  $("description").hidden = !task?.description;
  $("description").textContent = task?.description ?? "";
  const form = $("form").value;
  $("constraint-label").hidden = form === "text";
  $("constraint-name").textContent = NAMES[form] ?? "";
  $("schema-options").hidden = form !== "schema";
  clearTimeout(checking.timer);
  checking.abort.abort();
  if (task) {
    showVerdict(task.enforcement, task.checked ?? [], []);
  } else if (form === "text") {
    showVerdict(null, [], []);
  } else {
    verdict("checking", "Checking …");
    checking = { abort: new AbortController(), timer: setTimeout(check, WAIT_MS) };
  }
}

async function check() {
  const signal = checking.abort.signal;
  try {
    const found = await call("ValidateSchema", { grammar: grammar() }, signal);
    showVerdict(found.enforcement, found.keywords ?? [], found.warnings ?? [], found.reason);
  } catch (error) {
    if (signal.aborted) return;
    $("keywords").hidden = true;
    verdict("bad", error.message);
  }
}

function showVerdict(enforcement, keywords, warnings, reason) {
  const checked = keywords.filter((one) => one.enforcement === "ENFORCEMENT_CHECKED");
  if (!enforcement || enforcement === "ENFORCEMENT_UNSPECIFIED") {
    $("verdict").hidden = true;
  } else if (enforcement === "ENFORCEMENT_ENFORCED") {
    verdict("good", "ENFORCED: no answer can violate it.");
  } else {
    const some = checked.length === 1 ? "1 keyword is" : `${checked.length} keywords are`;
    verdict("warn", `CHECKED: ${checked.length ? `${some} checked after generation; a violation is an error.` : reason ?? ""}`);
  }
  $("keywords").hidden = keywords.length + warnings.length === 0;
  $("keywords").replaceChildren(
    ...warnings.map((one) => keyword("checked", "WARNING", one.pointer, one.message)),
    ...[...checked, ...keywords.filter((one) => !checked.includes(one))].map((one) => {
      const kind = one.enforcement.replace("ENFORCEMENT_", "");
      return keyword(kind.toLowerCase(), kind, one.pointer, one.reason ?? "");
    }),
  );
}

function keyword(kind, label, where, why) {
  const item = element("li");
  const mark = element("span", label);
  mark.className = `mark ${kind}`;
  item.append(mark, element("code", where || "/"), element("small", why));
  return item;
}

function verdict(kind, text) {
  $("verdict").className = kind;
  $("verdict").textContent = text;
  $("verdict").hidden = false;
}

// A request

function build() {
  const images = state.images.map((image) => ({ type: "image_url", image_url: { url: image.url } }));
  const task = state.tasks.get($("task").value);
  const request = { model: state.model, stream: true, stream_options: { include_usage: true } };
  const prompt = task ? [] : [{ type: "text", text: $("prompt").value }];
  if (task) request.task = task.name;
  request.messages = [{ role: "user", content: [...images, ...prompt] }];
  if (!task) {
    const text = $("constraint").value;
    if ($("form").value === "schema") {
      request.structured_outputs = { json: text };
      for (const field of OPTIONS) Object.assign(request, chosen(field.replaceAll("_", "-"), field));
    }
    if ($("form").value === "regex") request.structured_outputs = { regex: text };
    if ($("form").value === "choice") request.structured_outputs = { choice: lines(text) };
  }
  for (const [id, field] of [["max-tokens", "max_completion_tokens"], ["temperature", "temperature"], ["seed", "seed"]]) {
    if ($(id).value !== "") request[field] = typed($(id).value);
  }
  return request;
}

function complete() {
  // Whether every field may be sent. The browser says what is wrong with one, which must be visible for that.
  const wrong = $("request").querySelector(":invalid");
  wrong?.closest("details")?.setAttribute("open", "");
  return $("request").reportValidity();
}

async function run() {
  if (state.running || !complete()) return;
  const request = build();
  state.request = { ...request, names: state.images.map((image) => image.name), task: $("task").value, grammar: grammar(), prompt: $("prompt").value };
  state.running = new AbortController();
  $("run").disabled = true;
  $("stop").disabled = false;
  for (const id of ["empty", "error", "view", "boxes", "facts"]) $(id).hidden = true;
  $("raw").hidden = false;
  $("raw").open = true;
  $("text").textContent = "";
  $("code").hidden = false;
  showCode();
  if (matchMedia("(max-width: 800px)").matches) $("answer").scrollIntoView({ behavior: "smooth" });
  const began = performance.now();
  try {
    const ended = await stream(request, state.running.signal);
    const text = $("text").textContent;
    show(text);
    facts(ended, performance.now() - began);
  } catch (error) {
    showError(state.running.signal.aborted ? new Refused("You stopped the call. The server has freed its slot.", "STOPPED") : error);
    if (error.reason === "NO_ANSWER") connect();
  } finally {
    state.running = null;
    $("run").disabled = false;
    $("stop").disabled = true;
  }
}

async function stream(request, signal) {
  const response = await post(CHAT, request, signal);
  const id = response.headers.get("x-request-id");
  if (!response.ok) throw refusal((await response.json()).error, id);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  const found = { usage: null, timings: null, report: null, finish: null };
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read().catch((error) => {
      if (signal.aborted) throw error;
      return { done: true };
    });
    if (done) break;
    rest += value;
    const blocks = rest.split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      if (!block.startsWith("data: ")) continue;
      if (block === "data: [DONE]") return found;
      const chunk = JSON.parse(block.slice(6));
      if (chunk.error) throw refusal(chunk.error, id);
      const choice = chunk.choices?.[0];
      if (choice?.delta?.content) $("text").append(choice.delta.content);
      found.finish = choice?.finish_reason ?? found.finish;
      found.usage = chunk.usage ?? found.usage;
      found.timings = chunk.timings ?? found.timings;
      found.report = chunk.structured_output ?? found.report;
    }
  }
  throw new Refused("The connection ended before the answer was complete.", "INCOMPLETE", id);
}

function refusal(error, id) {
  return new Refused(error.message, error.code, id, error.param);
}

// An answer

function show(text) {
  let value;
  try {
    value = read(text);
  } catch {
    value = text;
  }
  const structured = isTree(value);
  $("raw").open = false;
  $("view").replaceChildren(render(value));
  $("view").hidden = false;
  if (structured) showBoxes(value);
}

function isTree(value) {
  return typeof value === "object" && value !== null && !(value instanceof Numeral);
}

function render(value) {
  if (Array.isArray(value)) return renderArray(value);
  if (isTree(value)) {
    const table = element("table");
    for (const [name, member] of Object.entries(value)) {
      const row = table.insertRow();
      row.append(element("th", name));
      row.insertCell().append(render(member));
    }
    return table;
  }
  const shown = element("span", String(value));
  shown.className = value === null ? "null" : value instanceof Numeral ? "number" : typeof value;
  return shown;
}

function renderArray(values) {
  const objects = values.length && values.every((one) => isTree(one) && !Array.isArray(one));
  if (!objects) {
    if (values.every((one) => typeof one === "string" || one instanceof Numeral)) {
      return element("span", values.length ? values.join(", ") : "none");
    }
    const list = element("ul");
    list.append(...values.map((one) => { const item = element("li"); item.append(render(one)); return item; }));
    return list;
  }
  const names = [...new Set(values.flatMap((one) => Object.keys(one)))];
  const table = element("table");
  table.createTHead().insertRow().append(...names.map((name) => element("th", name)));
  const body = table.createTBody();
  for (const one of values) {
    const row = body.insertRow();
    for (const name of names) row.insertCell().append(Object.hasOwn(one, name) ? render(one[name]) : "");
  }
  return table;
}

const isBox = (value, size) => Array.isArray(value) && value.length === size && value.every((one) => one instanceof Numeral && one >= 0 && one <= 1000);

function shapes(value, label, found) {
  if (Array.isArray(value)) {
    value.forEach((one) => shapes(one, label, found));
  } else if (isTree(value)) {
    const own = ["label", "name", "text", "class"].map((name) => value[name]).find((one) => typeof one === "string") ?? label;
    for (const [name, member] of Object.entries(value)) {
      if (/^(bbox|box|bounding_?box)(_2d)?$/i.test(name) && isBox(member, 4)) found.push({ box: member.map(Number), label: own });
      else if (/^(point|center)(_2d)?$/i.test(name) && isBox(member, 2)) found.push({ point: member.map(Number), label: own });
      else shapes(member, own, found);
    }
  }
  return found;
}

function showBoxes(value) {
  // Qwen3-VL writes coordinates in thousandths of the width and the height of the image.
  const found = shapes(value, "", []);
  if (!found.length || state.images.length !== 1) return;
  const svg = drawn("svg", { viewBox: "0 0 1000 1000", preserveAspectRatio: "none", role: "img", "aria-label": `${found.length} places in the image` });
  for (const { box, point, label } of found) {
    const [x, y] = box ? [Math.min(box[0], box[2]), Math.min(box[1], box[3])] : point;
    svg.append(box
      ? drawn("rect", { x, y, width: Math.abs(box[2] - box[0]), height: Math.abs(box[3] - box[1]) })
      : drawn("circle", { cx: x, cy: y, r: 8 }));
    if (label) {
      const text = drawn("text", { x: x + 6, y: y > 40 ? y - 10 : y + 34 });
      text.textContent = label;
      svg.append(text);
    }
  }
  const picture = element("img");
  picture.src = state.images[0].shown;
  picture.alt = state.images[0].name;
  $("boxes").replaceChildren(picture, svg);
  $("boxes").hidden = false;
}

function drawn(name, attributes) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

function facts({ usage, timings, report, finish }, took) {
  const seconds = (value) => (value === undefined ? "–" : `${value.toFixed(2)} s`);
  const found = [
    ["prompt", usage && `${usage.prompt_tokens} tokens, ${usage.prompt_tokens_details?.image_tokens ?? 0} of images`],
    ["answer", usage && `${usage.completion_tokens} tokens`],
    ["first token", timings && seconds(timings.first_token_seconds)],
    ["total", timings && seconds(timings.total_seconds)],
    ["in this browser", seconds(took / 1000)],
    ["schema", report && report.enforcement.toUpperCase()],
    ["end", finish],
  ].filter(([, value]) => value);
  $("facts").replaceChildren(...found.map(([name, value]) => {
    const item = element("div");
    item.append(element("dt", name), element("dd", value));
    return item;
  }));
  $("facts").hidden = false;
}

function showError(error) {
  const parts = [element("h3", error.reason ?? "ERROR"), element("p", error.message)];
  if (error.id) parts.push(element("p", `Request id: ${error.id}`));
  $("error").replaceChildren(...parts);
  $("error").hidden = false;
  if (!$("text").textContent) $("raw").hidden = true;
}

// The same call elsewhere

function quoted(text) {
  return `'${text.replaceAll("'", "'\\''")}'`;
}

function showCode() {
  if (!state.request) return;
  const { names, grammar: given, prompt, task, ...request } = state.request;
  delete request.stream;
  delete request.stream_options;
  const makers = { curl, python, grpc: grpcPython };
  $("snippet").textContent = makers[state.language](request, names, given, prompt, task);
}

function placed(request, place) {
  let index = 0;
  const placedPart = (part) => (part.type === "image_url" ? { ...part, image_url: { url: place(index++) } } : part);
  const messages = request.messages.map((one) => ({ ...one, content: one.content.map(placedPart) }));
  return { ...request, messages };
}

function curl(request, names) {
  const mark = `@IMAGE-${Math.random().toString(36).slice(2)}-`; // what no prompt has
  const body = placed(request, (index) => `data:image/png;base64,${mark}${index}@`);
  if (state.request.task) body.task = state.request.task;
  let text = quoted(written(body, 2));
  text = text.replace(new RegExp(`${mark}(\\d+)@`, "g"), (_, index) => `'"$(base64 < ${quoted(names[index])} | tr -d '\\n')"'`);
  const key = $("key").value ? ' \\\n  -H "authorization: Bearer $QWEN3VL_API_KEY"' : "";
  return `curl ${location.origin}${CHAT} \\\n  -H 'content-type: application/json'${key} \\\n  --data-binary @- <<< ${text}\n`;
}

function literal(value) {
  // JSON of a request as Python: only true, false and null differ.
  return written(value, 4).replace(/("(?:[^"\\]|\\.)*")|\b(true|false|null)\b/g,
    (whole, string, word) => string ?? { true: "True", false: "False", null: "None" }[word]);
}

function python(request, names) {
  const { model, messages, ...options } = { ...placed(request, (index) => `@IMAGE${index}@`), task: state.request.task };
  const own = ["structured_outputs", ...OPTIONS, "task"]; // not of OpenAI's API
  const given = Object.entries(options).filter(([, value]) => value !== undefined && value !== "");
  const extra = Object.fromEntries(given.filter(([name]) => own.includes(name)));
  const rest = Object.fromEntries(given.filter(([name]) => !own.includes(name)));
  let content = literal(messages);
  names.forEach((name, index) => {
    content = content.replace(`"@IMAGE${index}@"`, () => `image(${JSON.stringify(name)})`);
  });
  const more = Object.entries(rest).map(([name, value]) => `    ${name}=${literal(value)},\n`).join("");
  return `# pip install openai
import base64
from pathlib import Path

from openai import OpenAI


def image(path):
    return "data:image/png;base64," + base64.b64encode(Path(path).read_bytes()).decode()


client = OpenAI(base_url="${location.origin}/v1", api_key="${$("key").value ? "YOUR KEY" : "none"}")
answer = client.chat.completions.create(
    model=${JSON.stringify(model)},
    messages=${content.replaceAll("\n", "\n    ")},
${more}${Object.keys(extra).length ? `    extra_body=${literal(extra).replaceAll("\n", "\n    ")},\n` : ""})
print(answer.choices[0].message.content)
`;
}

function grpcPython(request, names, given, prompt, task) {
  const kinds = { jsonSchema: "json_schema", regex: "regex" };
  const [[kind, value]] = Object.entries(given ?? { none: null });
  const wish = (name) => (request[name] === undefined ? "" : `, ${name}=${literal(request[name])}`);
  const order = request.property_order === undefined ? "" : `, property_order=pb.PROPERTY_ORDER_${request.property_order.toUpperCase()}`;
  const rule = kind === "choice"
    ? `pb.Grammar(choice=pb.Choice(options=${JSON.stringify(value.options)}))`
    : `pb.Grammar(${kinds[kind]}=${JSON.stringify(value)}${wish("close_objects")}${order})`;
  const inline = `pb.InlineTask(user=${JSON.stringify(prompt)}${given ? `, grammar=${rule}` : ""}${wish("schema_in_prompt")})`;
  const made = task ? `pb.Task(name=${JSON.stringify(task)})` : `pb.Task(inline=${inline})`;
  const options = [["temperature", request.temperature], ["seed", request.seed], ["max_tokens", request.max_completion_tokens]]
    .filter(([, one]) => one !== undefined).map(([name, one]) => `${name}=${one}`).join(", ");
  return `# pip install ./clients/python
from pathlib import Path

from qwen3vl import Client
from qwen3vl.v1 import vision_pb2 as pb

images = [pb.Image(data=Path(path).read_bytes()) for path in ${JSON.stringify(names)}]
task = ${made}
sampling = pb.SamplingOptions(${options})
with Client("${location.hostname}:50051") as client:  # the port of gRPC
    answer = client.run_task(pb.RunTaskRequest(task=task, images=images, sampling=sampling))
    print(answer.result.text)
`;
}

function element(name, text) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  return made;
}

// Events

$("files").addEventListener("change", () => { add([...$("files").files]); $("files").value = ""; });
$("files").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.ctrlKey && !event.metaKey) { event.preventDefault(); $("files").click(); }
});
for (const kind of ["dragenter", "dragover", "dragleave", "drop"]) {
  document.addEventListener(kind, (event) => {
    event.preventDefault();
    $("drop").classList.toggle("over", kind === "dragenter" || kind === "dragover");
    if (kind === "drop") add([...event.dataTransfer.files]);
  });
}
document.addEventListener("paste", (event) => {
  const files = [...event.clipboardData.files];
  if (files.length) { event.preventDefault(); add(files); }
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); run(); }
});
$("request").addEventListener("submit", (event) => { event.preventDefault(); run(); });
$("stop").addEventListener("click", () => state.running?.abort());
$("task").addEventListener("change", update);
$("form").addEventListener("change", () => { $("constraint").value = drafts[$("form").value] ?? ""; update(); });
$("constraint").addEventListener("input", () => { drafts[$("form").value] = $("constraint").value; update(); });
for (const id of ["close-objects", "property-order"]) $(id).addEventListener("change", update);
$("key").addEventListener("change", connect);
for (const button of document.querySelectorAll("[data-code]")) {
  button.addEventListener("click", () => {
    state.language = button.dataset.code;
    for (const other of document.querySelectorAll("[data-code]")) other.ariaPressed = String(other === button);
    showCode();
  });
}
$("copy").addEventListener("click", async () => {
  await navigator.clipboard.writeText($("snippet").textContent);
  $("copy").textContent = "Copied";
  setTimeout(() => { $("copy").textContent = "Copy"; }, 1500);
});
$("constraint").value = drafts.schema;
connect();
