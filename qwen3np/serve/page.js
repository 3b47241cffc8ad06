"use strict";
// A conversation is a list of messages {role, pieces, note}. A piece is a text, whether it is a thought (reasoning), and
// the tokens it came with, as far as they are known. Messages are replaced, not changed, once they are complete: that
// makes Undo an older list. All text enters the page as text; the Content-Security-Policy lets no string become HTML.
const SETTINGS = [ // name, label, least, most, step, the value that turns it off; one without a most is typed
  ["temperature", "Temperature", 0, 2, 0.05], ["top_p", "Top-p", 0.01, 1, 0.01, 1], ["top_k", "Top-k", 0, 100, 1, 0],
  ["min_p", "Min-p", 0, 1, 0.01, 0], ["repetition_penalty", "Repetition penalty", 0.5, 2, 0.05, 1],
  ["presence_penalty", "Presence penalty", -2, 2, 0.1, 0], ["frequency_penalty", "Frequency penalty", -2, 2, 0.1, 0],
  ["max_tokens", "Max tokens", 1], ["seed", "Seed", 0],
];
const ALTERNATIVES = 5;
const $ = (id) => document.getElementById(id);
let model = null; // what /v1/models says of it
let messages = [];
let before = null; // the list that Undo brings back
let chosen = {}; // the sampling settings that differ from the model's
let running = null; // {message, controller} of the answer that is being written
const drawings = new WeakMap(); // message -> the function that brings its element up to date
const origins = new WeakMap(); // the span of a piece -> its tokens

/** Make an element; text goes in as text. */
function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}
const percent = (p) => (p > 0.999 && p < 1 ? "> 99.9 %" : p < 0.0001 ? "< 0.01 %" : `${(100 * p).toFixed(p < 0.1 ? 2 : 1)} %`);
const said = (message, thought) => message.pieces.filter((piece) => piece.thought === thought).map((piece) => piece.text).join("");
const typed = (role, text, thoughts = []) => ({ role, pieces: [...thoughts, { text, thought: false, tokens: [] }], note: "" });

/** A token's text with every character visible: ␣ for a space, \xe2 for a byte of a longer character. */
function visible({ bytes }) {
  try {
    const text = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(Uint8Array.from(bytes));
    const names = { " ": "␣", "\n": "↵", "\r": "␍", "\t": "⇥" };
    return text.replace(/[\s\p{C}]/gu, (c) => names[c] ?? `\\u{${c.codePointAt(0).toString(16)}}`);
  } catch {
    return bytes.map((byte) => `\\x${byte.toString(16).padStart(2, "0")}`).join("");
  }
}

// ----- the server

/** The response to a request. Asks for the API key where one is needed; throws an Error whose message is for the user. */
async function call(path, fields, signal) {
  for (;;) {
    const key = sessionStorage.getItem("key");
    const headers = { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) };
    const request = fields ? { method: "POST", body: JSON.stringify(fields) } : {};
    const response = await fetch(path, { ...request, headers, signal }).catch(() => {
      throw new Error("The server does not answer. It may have been stopped, or the network may be down.");
    });
    if (response.ok) return response;
    const message = (await response.json().catch(() => null))?.error?.message ?? `status ${response.status}`;
    if (response.status === 401) await askForKey(Boolean(key));
    else if (response.status === 429) throw new Error("The server is busy: too many requests are waiting. Try again in a moment.");
    else if (/context/.test(message)) throw new Error(`The conversation is too long: ${message}. Shorten a message, or start a new chat.`);
    else throw new Error(`The server cannot answer this: ${message}.`);
  }
}

function askForKey(wrong) {
  if (wrong) $("door-note").textContent = "The server does not accept this key. Try another one.";
  $("door").showModal();
  return new Promise((resolve, reject) => {
    $("door").onclose = () => reject(new Error("The server needs its API key."));
    $("door").firstElementChild.onsubmit = (event) => {
      event.preventDefault();
      sessionStorage.setItem("key", $("key").value);
      $("door").onclose = null;
      $("door").close();
      resolve();
    };
  });
}

/** The objects of a stream of server-sent events. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let held = ""; ; ) {
    const { value, done } = await reader.read().catch(() => ({ done: true }));
    if (done) throw new Error("The connection was lost before the answer was complete.");
    const parts = (held + value).split("\n\n");
    held = parts.pop();
    for (const part of parts) {
      if (part === "data: [DONE]") return;
      yield JSON.parse(part.slice("data: ".length));
    }
  }
}

// ----- the conversation

/** The request for an answer to these messages or, if the last one is the model's own, for more of that. */
function asked(kept) {
  const sent = kept.map((message) => {
    const reasoning = said(message, true);
    return { role: message.role, content: said(message, false), ...(reasoning && { reasoning_content: reasoning }) };
  });
  if ($("system").value.trim()) sent.unshift({ role: "system", content: $("system").value });
  return {
    messages: sent, ...chosen, stream: true, stream_options: { include_usage: true }, logprobs: true, top_logprobs: ALTERNATIVES,
    ...(model.thinking && { chat_template_kwargs: { enable_thinking: $("thinking").checked } }),
    ...(kept.at(-1).role === "assistant" && { continue_final_message: true, add_generation_prompt: false }),
  };
}

/** Let the model answer these messages or, if the last one is its own, continue that. */
async function answer(kept) {
  running?.controller.abort();
  trouble();
  const last = kept.at(-1);
  const continued = last.role === "assistant";
  const message = { role: "assistant", pieces: continued ? last.pieces.filter((piece) => piece.text) : [], note: "" };
  const had = message.pieces.length;
  const controller = new AbortController();
  running = { message, controller };
  change([...(continued ? kept.slice(0, -1) : kept), message]);
  $("status").textContent = "Reading the prompt …";
  let [tokens, count, start] = [[], 0, 0]; // those whose text has not come, how many came, and the time of the first
  try {
    for await (const { choices: [choice] = [], usage, error } of events(await call("v1/chat/completions", asked(kept), controller.signal))) {
      if (error) throw new Error(`The server gave up: ${error.message}.`);
      if (usage) $("status").textContent += ` · ${usage.total_tokens} of ${model.max_model_len} tokens of context used`;
      if (!choice) continue;
      const arrived = choice.logprobs?.content ?? [];
      tokens.push(...arrived);
      for (const [name, thought] of [["reasoning_content", true], ["content", false]])
        if (choice.delta[name]) {
          message.pieces.push({ text: choice.delta[name], thought, tokens });
          tokens = [];
        }
      if (choice.finish_reason === "length") message.note = "Cut off at the limit of tokens";
      if (!arrived.length) continue;
      start ||= performance.now();
      count += arrived.length;
      const rate = count > 1 ? `, ${((1000 * (count - 1)) / (performance.now() - start)).toFixed(1)} per second` : "";
      $("status").textContent = `${count} token${count === 1 ? "" : "s"}${rate}`;
      follow(drawings.get(message));
    }
    if (tokens.length) message.pieces.push({ text: "", thought: false, tokens }); // what ended the answer
    $("spoken").textContent = said(message, false);
  } catch (error) {
    message.note = controller.signal.aborted ? "Stopped" : "Incomplete";
    if (!controller.signal.aborted) trouble(error.message, () => answer(kept));
    if (!count) $("status").textContent = "";
  } finally {
    if (running?.message === message) running = null;
    if (message.pieces.length === had && messages.includes(message)) messages = kept; // nothing came
    follow(messages.includes(message) ? () => showState(message) : draw);
  }
}

/** Replace the conversation. If a message is lost by that, Undo brings it back; an answer in progress stops. */
function change(next) {
  before = messages.some((message, n) => message !== next[n]) ? messages : null;
  messages = next;
  if (running && !messages.includes(running.message)) running.controller.abort();
  draw();
  $("log").scrollTop = $("log").scrollHeight;
}

function trouble(message = "", again = null) {
  $("trouble").hidden = !message;
  $("trouble").firstElementChild.textContent = message;
  $("trouble").lastElementChild.onclick = again;
}

function send() {
  if (!model || running || !$("question").value.trim()) return;
  const message = typed("user", $("question").value);
  $("question").value = "";
  answer([...messages, message]);
}

// ----- what is shown

function draw() {
  const focused = [...$("messages").children].indexOf(document.activeElement.closest("article"));
  $("messages").replaceChildren(...messages.map(element));
  $("messages").children[Math.min(focused, messages.length - 1)]?.focus();
  showState();
}

/** Bring a message up to date, and what depends on the state of the conversation. */
function showState(message) {
  drawings.get(message)?.();
  $("welcome").hidden = messages.length > 0;
  $("undo").hidden = !before;
  $("send").hidden = Boolean(running);
  $("stop").hidden = !running;
  save();
}

/** Draw, and stay at the end of the conversation if that was in sight. */
function follow(drawing) {
  const log = $("log");
  const atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 60;
  drawing();
  if (atEnd) log.scrollTop = log.scrollHeight;
}

/** The element of a message, with what can be done to it. */
function element(message) {
  const user = message.role === "user";
  const [thoughts, text] = [make("div", { className: "text" }), make("div", { className: "text" })];
  const [summary, note] = [make("summary"), make("span", { className: "note" })];
  const details = make("details", {}, summary, thoughts);
  const upTo = () => messages.slice(0, messages.indexOf(message) + 1);
  const actions = {
    Copy: async () => {
      if (!navigator.clipboard) return; // browsers have one at https and localhost only
      await navigator.clipboard.writeText(said(message, false));
      $("status").textContent = "Copied";
    },
    Edit: () => edit(article, message),
    Regenerate: () => answer(user ? upTo() : upTo().slice(0, -1)),
    Continue: () => answer(upTo()),
  };
  const buttons = Object.entries(actions).map(([name, onclick]) => make("button", { type: "button", onclick }, name));
  buttons[0].hidden = !navigator.clipboard;
  const article = make("article", { tabIndex: -1, className: message.role, ariaLabel: user ? "Your message" : "Answer" });
  article.append(make("h2", {}, user ? "You" : "Model"), details, text, make("div", { className: "actions" }, ...buttons, note));
  article.onkeydown = (event) => {
    const name = { e: "Edit", Enter: "Edit", r: "Regenerate", c: "Copy" }[event.key];
    const next = { ArrowUp: article.previousElementSibling ?? article, ArrowDown: article.nextElementSibling ?? $("question") }[event.key];
    if (event.target !== article || event.ctrlKey || event.metaKey || event.altKey || !(name || next)) return;
    event.preventDefault();
    if (next) next.focus();
    else if (running?.message !== message) actions[name]();
  };
  drawings.set(message, () => {
    const going = running?.message === message;
    article.classList.toggle("running", going);
    article.querySelector(".actions").hidden = going;
    article.ariaBusy = going;
    buttons[3].hidden = user || !message.note;
    note.textContent = message.note;
    const thought = message.pieces.filter((piece) => piece.thought);
    details.hidden = !thought.length;
    const count = thought.flatMap((piece) => piece.tokens).length;
    summary.textContent = (going && !said(message, false) ? "Thinking" : "Thoughts") + (count ? `: ${count} tokens` : "");
    fill(thoughts, thought);
    if (user) text.textContent = said(message, false);
    else fill(text, message.pieces.filter((piece) => !piece.thought));
  });
  drawings.get(message)();
  return article;
}

/** Show pieces: token by token, or with light Markdown. */
function fill(place, pieces) {
  const byToken = $("probabilities").checked && pieces.some((piece) => piece.tokens.length);
  if (byToken) Object.assign(place, { tabIndex: 0, role: "group", ariaLabel: "The tokens; arrow keys go through them" });
  else for (const name of ["tabindex", "role", "aria-label"]) place.removeAttribute(name);
  if (!byToken) return place.replaceChildren(...marked(pieces.map((piece) => piece.text).join("")));
  if (!origins.has(place.firstElementChild)) place.replaceChildren();
  for (const { text, tokens } of pieces.slice(place.childElementCount)) {
    const span = make("span", text ? {} : { className: "end" }, text || tokens.map(visible).join(""));
    if (tokens.length) span.style.setProperty("--s", 1 - Math.exp(tokens.reduce((sum, token) => sum + token.logprob, 0)));
    origins.set(span, tokens);
    place.append(span);
  }
}

/** Text as nodes, with fenced and inline code, bold and headings; other Markdown reads well as it is. */
function marked(text) {
  const nodes = [];
  let end = 0;
  for (const match of text.matchAll(/\n*^```.*\n([^]*?)(?:^``` *\n*|$(?![^]))|`([^`\n]+)`|\*\*([^*\n]+)\*\*|^#{1,6} +(.+)/gm)) {
    const [all, fenced, code, bold, heading] = match;
    const tag = fenced !== undefined ? "pre" : code ? "code" : "b";
    nodes.push(text.slice(end, match.index), make(tag, {}, fenced ?? code ?? bold ?? heading));
    end = match.index + all.length;
  }
  return [...nodes, text.slice(end)];
}

function edit(article, message) {
  const user = message.role === "user";
  const area = make("textarea", { value: said(message, false), ariaLabel: "Edit the message" });
  const close = (goOn) => {
    const kept = messages.slice(0, messages.indexOf(message));
    const edited = typed(message.role, area.value, message.pieces.filter((piece) => piece.thought));
    if (goOn) answer([...kept, edited]);
    else change([...kept, edited, ...messages.slice(kept.length + 1)]);
  };
  const form = make("form", {}, area, make("div", { className: "actions" },
    make("button", {}, user ? "Save and answer" : "Save"),
    make("button", { type: "button", onclick: () => close(!user) }, user ? "Save only" : "Save and continue"),
    make("button", { type: "button", onclick: draw }, "Cancel")));
  form.onsubmit = (event) => {
    event.preventDefault();
    if (area.value.trim()) close(user);
  };
  area.onkeydown = (event) => submitOnEnter(event, () => form.requestSubmit());
  form.onkeydown = (event) => {
    if (event.key !== "Escape") return;
    event.stopPropagation();
    draw();
  };
  article.classList.add("editing");
  article.querySelector(".text:not(details *)").replaceWith(form);
  article.lastElementChild.hidden = true;
  area.focus();
}

function submitOnEnter(event, submit) {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  submit();
}

// ----- the alternatives of a token

function showTip(span) {
  for (const marked of document.querySelectorAll(".at")) marked.classList.remove("at");
  $("tip").hidden = !origins.get(span)?.length;
  if ($("tip").hidden) return;
  span.classList.add("at");
  $("tip").replaceChildren(...origins.get(span).map((token) => {
    const known = token.top_logprobs.some((one) => one.id === token.id);
    return make("table", {}, ...[...token.top_logprobs, ...(known ? [] : [token])].map((one) => {
      const p = Math.exp(one.logprob);
      const bar = make("i");
      bar.style.width = `${100 * p}%`;
      const cells = [make("th", { scope: "row" }, make("bdi", {}, visible(one))), make("td", {}, percent(p)), make("td", {}, bar)];
      return make("tr", { className: one.id === token.id ? "chosen" : "" }, ...cells);
    }));
  }));
  const [at, tip] = [span.getClientRects()[0], $("tip")];
  tip.style.left = `${Math.max(8, Math.min(at.left, innerWidth - tip.offsetWidth - 8))}px`;
  tip.style.top = `${at.bottom + tip.offsetHeight > innerHeight ? Math.max(0, at.top - tip.offsetHeight) : at.bottom}px`;
}
document.onpointerover = ({ target }) => $("tip").contains(target) || showTip(target.closest(".text span"));
$("log").onscroll = () => showTip(null);
$("messages").addEventListener("focusout", () => showTip(null));
$("messages").addEventListener("keydown", (event) => {
  const spans = event.target.role === "group" ? [...event.target.children] : [];
  const at = spans.findIndex((span) => span.classList.contains("at"));
  const next = { ArrowLeft: Math.max(at - 1, 0), ArrowRight: Math.min(at + 1, spans.length - 1), Home: 0, End: spans.length - 1 }[event.key];
  if (!spans.length || next === undefined) return;
  event.preventDefault();
  spans[next].scrollIntoView({ block: "nearest" });
  showTip(spans[next]);
  $("spoken").textContent = [...$("tip").querySelectorAll("tr")].map((row) => `${row.cells[0].innerText} ${row.cells[1].innerText}`).join(", ");
});

// ----- settings, and what is kept

const controls = SETTINGS.map(([name, label, min, max, step = 1, off]) => {
  const slides = max !== undefined;
  const input = make("input", { id: name, type: slides ? "range" : "number", min, max, step });
  const output = make("output");
  const row = make("div", {}, make("label", { htmlFor: name }, label, slides ? output : input), slides ? input : "");
  $("sampling").append(row);
  input.oninput = () => {
    chosen[name] = input.valueAsNumber;
    if (Number.isNaN(chosen[name]) || chosen[name] === model.defaults[name]) delete chosen[name];
    showSettings();
  };
  return () => {
    row.className = name in chosen ? "changed" : "";
    const value = chosen[name] ?? model.defaults[name] ?? off;
    input.value = slides ? value : chosen[name] ?? "";
    input.placeholder = model.defaults[name] ?? "random";
    output.textContent = value === off ? "off" : name === "temperature" && !value ? "0: the likeliest" : value;
    if (slides) input.ariaValueText = output.textContent;
  };
});
const showSettings = () => controls.forEach((show) => show());
$("reset").onclick = () => {
  chosen = {};
  showSettings();
};

/** Keep text and settings for this model in the browser; probabilities would take too much space. */
function save() {
  if (!model) return;
  const parts = (message) => [true, false].map((thought) => ({ text: said(message, thought), thought, tokens: [] }));
  const bare = messages.map((message) => ({ ...message, pieces: parts(message).filter((piece) => piece.text) }));
  const switches = { thinking: $("thinking").checked, probabilities: $("probabilities").checked };
  const kept = { messages: bare, system: $("system").value, chosen, ...switches };
  try {
    localStorage.setItem(`qwen3np ${model.id}`, JSON.stringify(kept));
  } catch {} // no space, or not allowed: then nothing is kept
}

async function start() {
  trouble();
  try {
    model = (await (await call("v1/models")).json()).data[0];
  } catch (error) {
    return trouble(error.message, start);
  }
  $("model").textContent = model.id;
  document.title = `${model.id} – qwen3np chat`;
  $("thinking-switch").hidden = !model.thinking;
  const kept = JSON.parse(localStorage.getItem(`qwen3np ${model.id}`) ?? "{}");
  ({ messages = [], chosen = {} } = kept);
  $("system").value = kept.system ?? "";
  $("thinking").checked = kept.thinking ?? true;
  $("probabilities").checked = kept.probabilities ?? false;
  showSettings();
  change(messages);
}

$("composer").onsubmit = (event) => {
  event.preventDefault();
  send();
};
$("question").onkeydown = (event) => {
  submitOnEnter(event, send);
  if (event.key !== "ArrowUp" || event.target.value || !messages.length) return;
  event.preventDefault();
  $("messages").lastElementChild.focus();
};
document.onkeydown = (event) => {
  if (event.key !== "Escape" || $("door").open) return;
  if (!$("tip").hidden) showTip(null);
  else if (running) running.controller.abort();
  else $("question").focus();
};
$("stop").onclick = () => running?.controller.abort();
$("new").onclick = () => {
  trouble();
  $("status").textContent = "";
  change([]);
};
$("undo").onclick = () => change(before);
$("probabilities").onchange = draw;
$("toggle").onclick = () => openSettings($("settings").hidden);
addEventListener("pagehide", save);

function openSettings(open) {
  $("settings").hidden = !open;
  $("toggle").ariaExpanded = open;
}
openSettings(matchMedia("(min-width: 821px)").matches);
start();
