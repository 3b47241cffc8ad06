"use strict";
// The page has one state: the picked token, the attention layer and head, and the sliders. Each part redraws from it.
const data = JSON.parse(document.getElementById("data").textContent);
const tokens = data.ids.map((id) => data.texts[id]);
const S = tokens.length;
const { layers: L, heads: H } = data.attention;
const MEAN = H; // the "head" that is the mean of all
const weights = Uint8Array.from(atob(data.attention.weights), (c) => c.charCodeAt(0));
const state = { token: S - 1, layer: 0, head: MEAN };

const $ = (id) => document.getElementById(id);
const dark = matchMedia("(prefers-color-scheme: dark)");
const compact = new Intl.NumberFormat("en", { maximumSignificantDigits: 3, notation: "compact" });
const percent = (p) => {
  if (p > 0.999 && p < 1) return "> 99.9 %";
  if (p > 0 && p < 0.0001) return "< 0.01 %";
  return p === 0 || p === 1 ? `${100 * p} %` : `${(100 * p).toFixed(p < 0.1 ? 2 : 1)} %`;
};
const whole = (p) => (p > 0 && p < 0.005 ? "< 1 %" : `${(100 * p).toFixed(0)} %`); // attention has 8 bits
const named = (t) => `token ${t + 1} “${tokens[t]}”`;

/** Make an element; text goes in as text, never as HTML. */
function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

/** A bar for a probability, with a mark where another one stands. */
function bar(p, mark) {
  const filled = make("i");
  filled.style.width = `${100 * p}%`;
  const whole = make("div", { className: "bar" }, filled);
  if (mark !== undefined) {
    whole.append(make("b"));
    whole.lastChild.style.left = `min(${100 * mark}%, 100% - 2px)`;
  }
  whole.setAttribute("aria-hidden", "true");
  return make("td", {}, whole);
}

function pick(token) {
  state.token = Math.max(0, Math.min(S - 1, token));
  $("tokens").querySelectorAll("input")[state.token].checked = true;
  $("previous").disabled = state.token === 0;
  $("following").disabled = state.token === S - 1;
  $("picked-number").textContent = state.token + 1;
  for (const place of document.querySelectorAll("#picked-text, .picked-text")) place.textContent = tokens[state.token];
  showNext();
  markLens();
  showAttention();
  showSizes();
}

// ----- the tokens

tokens.forEach((text, t) => {
  const input = make("input", { type: "radio", name: "token", onchange: () => pick(t) });
  $("tokens").append(make("label", {}, input, make("span", {}, make("small", {}, `${t + 1}`), make("bdi", {}, text))));
});
$("previous").onclick = () => pick(state.token - 1);
$("following").onclick = () => pick(state.token + 1);

// a link to a part of the page must not land under the bar, which takes several lines on a phone
const clearTheBar = () => (document.documentElement.style.scrollPaddingTop = `${document.querySelector(".picked").offsetHeight + 8}px`);
addEventListener("resize", clearTheBar);
clearTheBar();

// ----- what comes next

const SHOWN = 10;
const candidates = data.next.ids[0].length;
for (const name of ["max", "value"]) $("top-k").setAttribute(name, candidates + 1); // one more than there are: off

/** Sampling as the package does it: temperature, then top-k, then top-p. Returns what is left to each candidate, and in all. */
function distribution(token, temperature, topK, topP) {
  const logits = [...data.next.logits[token], ...data.next.group_logits[token]];
  const sizes = [...data.next.logits[token].map(() => 1), ...data.next.group_sizes];
  if (temperature === 0) return { probabilities: logits.map((_, i) => (i ? 0 : 1)), kept: 1 };
  let left = topK > candidates ? Infinity : topK;
  const each = logits.map((x) => Math.exp((x - logits[0]) / temperature));
  const stay = sizes.map((size) => {
    const some = Math.min(size, left);
    left -= some;
    return some;
  });
  const total = stay.reduce((sum, size, i) => sum + size * each[i], 0);
  let before = 0;
  if (topP < 1)
    each.forEach((weight, i) => {
      // a token stays while those before it make up less than p
      const room = Math.ceil((topP * total - before) / weight - 1e-9);
      stay[i] = Math.min(stay[i], Math.max(i ? 0 : 1, room));
      before += stay[i] * weight;
    });
  const kept = stay.reduce((sum, size) => sum + size, 0);
  const mass = stay.reduce((sum, size, i) => sum + size * each[i], 0);
  return { probabilities: each.map((weight, i) => (stay[i] * weight) / mass), kept };
}

function showNext() {
  const [temperature, topK, topP] = ["temperature", "top-k", "top-p"].map((id) => $(id).valueAsNumber);
  const labels = [temperature ? temperature.toFixed(2) : "0: the likeliest", topK > candidates ? "off" : `${topK}`, topP < 1 ? topP.toFixed(2) : "off"];
  ["temperature", "top-k", "top-p"].forEach((id, i) => {
    $(`${id}-value`).textContent = labels[i];
    $(id).setAttribute("aria-valuetext", labels[i]);
  });
  const own = distribution(state.token, 1, Infinity, 1).probabilities;
  const { probabilities, kept } = distribution(state.token, temperature, topK, topP);
  const ids = data.next.ids[state.token].slice(0, SHOWN);
  const follows = data.ids[state.token + 1];
  $("next-table").tBodies[0].replaceChildren(
    ...ids.map((id, i) => {
      const name = make("th", { scope: "row", title: data.texts[id] }, make("bdi", {}, data.texts[id]));
      if (id === follows) name.append(" ✓");
      const cells = [name, make("td", {}, percent(own[i])), make("td", {}, probabilities[i] ? percent(probabilities[i]) : "dropped")];
      return make("tr", { className: probabilities[i] ? "" : "dropped" }, ...cells, bar(probabilities[i], own[i]));
    }),
  );
  $("next-caption").textContent = `After ${named(state.token)}. Bars: with the sliders; the thin mark: the model’s own.`
    + (follows === undefined ? "" : ` ✓ is what the prompt goes on with.`);
  const shown = probabilities.slice(0, SHOWN).reduce((sum, p) => sum + p, 0);
  const rest = kept - probabilities.slice(0, SHOWN).filter((p) => p > 0).length;
  $("kept").textContent = `${kept.toLocaleString("en")} token${kept === 1 ? "" : "s"} can be drawn`
    + (rest ? `; the ${rest.toLocaleString("en")} not listed share ${percent(Math.max(1 - shown, 0))}.` : ".");
}
$("sliders").oninput = showNext;
$("sliders").onreset = () => setTimeout(showNext);

// ----- guesses layer by layer

const { ids: guesses, probabilities: surety } = data.lens;
const row = (r) => (r === 0 ? "embedding" : `after layer ${r - 1}`);
{
  const head = make("tr", {}, make("td"));
  tokens.forEach((text, t) => {
    const cell = make("th", { scope: "col", title: `${t + 1} ${text}` }, `${t + 1} `, make("bdi", {}, text));
    cell.onclick = () => pick(t);
    head.append(cell);
  });
  const body = make("tbody");
  guesses.forEach((ofRow, r) => {
    const line = make("tr", {}, make("th", { scope: "row", title: row(r) }, r === 0 ? row(r) : `layer ${r - 1}`));
    ofRow.forEach((ids, t) => {
      const cell = make("td", { tabIndex: -1 }, make("bdi", {}, data.texts[ids[0]]));
      cell.style.setProperty("--p", surety[r][t][0]);
      if (ids[0] === guesses[L][t][0]) cell.className = "final";
      cell.dataset.place = `${r},${t}`;
      line.append(cell);
    });
    body.append(line);
  });
  $("lens-table").append(make("thead", {}, head), body);
  $("lens-table").style.width = `${8 + 5.25 * (S + 1)}rem`; // a fixed layout needs one; the border's is for scrolling
}
const lensCell = (r, t) => $("lens-table").rows[r + 1].cells[t + 1];
const place = (event) => event.target.closest("[data-place]")?.dataset.place.split(",").map(Number);
let lensFocus = [L, S - 1]; // the one cell that Tab reaches
let pointed = null; // the cell whose guesses are shown

function showLens(r, t) {
  pointed = [r, t];
  const best = guesses[r][t].map((id, i) => make("li", {}, make("bdi", { className: "text" }, data.texts[id]), ` ${percent(surety[r][t][i])}`));
  $("lens-detail").replaceChildren(make("div", {}, `At ${named(t)}, ${row(r)}${r === L ? ", the last" : ""}: `), make("ol", {}, ...best));
}
function focusLens(r, t) {
  lensCell(...lensFocus).tabIndex = -1;
  lensFocus = [r, t];
  lensCell(r, t).tabIndex = 0;
  lensCell(r, t).setAttribute("aria-label", guesses[r][t].map((id, i) => `${data.texts[id]} ${percent(surety[r][t][i])}`).join(", "));
}
function markLens() {
  const { rows } = $("lens-table");
  for (const cell of $("lens-table").querySelectorAll(".on")) cell.classList.remove("on");
  for (const line of rows) line.cells[state.token + 1].classList.add("on");
  const box = $("lens-scroll");
  const cell = rows[0].cells[state.token + 1];
  const label = rows[0].cells[0].offsetWidth;
  const whole = Math.max(1, Math.floor((box.clientWidth - label) / (cell.offsetWidth + 1))); // columns that fit
  if (cell.offsetLeft < box.scrollLeft + label || cell.offsetLeft + cell.offsetWidth > box.scrollLeft + box.clientWidth)
    // to where a column begins: the labels never hide half of one
    box.scrollLeft = rows[0].cells[Math.max(1, state.token + 2 - whole)].offsetLeft - label - 1;
  focusLens(lensFocus[0], state.token);
  showLens(pointed?.[0] ?? L, state.token);
}
$("lens-table").onmouseover = (event) => place(event) && showLens(...place(event));
$("lens-table").onmouseleave = () => showLens(L, state.token);
$("lens-table").addEventListener("focusin", (event) => place(event) && showLens(...place(event)));
$("lens-table").addEventListener("click", (event) => {
  if (!place(event)) return;
  const [r, t] = place(event);
  focusLens(r, t);
  pointed = [r, t];
  pick(t);
});
$("lens-table").onkeydown = (event) => {
  const at = place(event);
  if (!at) return;
  if (event.key === "Enter" || event.key === " ") pick(at[1]);
  else if (!moved(event.key, at, L, S - 1)) return;
  event.preventDefault();
  focusLens(...at);
  lensCell(...at).focus();
};

/** Move a place [row, column] by a key, in place; false for keys that move nothing. */
function moved(key, at, lastRow, lastColumn) {
  const steps = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1], Home: [0, -Infinity], End: [0, Infinity] };
  if (!steps[key]) return false;
  at[0] = Math.max(0, Math.min(lastRow, at[0] + steps[key][0]));
  at[1] = Math.max(0, Math.min(lastColumn, at[1] + steps[key][1]));
  return true;
}

// ----- attention

const triangle = (S * (S + 1)) / 2; // numbers of a head: each row up to the token itself
/** The weight with which token q looks at token k. */
function weight(layer, head, q, k) {
  if (k > q) return 0;
  const at = (h) => weights[(layer * H + h) * triangle + (q * (q + 1)) / 2 + k] / 255;
  if (head !== MEAN) return at(head);
  let sum = 0;
  for (let h = 0; h < H; h++) sum += at(h);
  return sum / H;
}
const headName = () => (state.head === MEAN ? "the mean of all heads" : `head ${state.head}`);

/** Colours of the theme as [red, green, blue]. */
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).match(/[0-9a-f]{2}/gi).map((h) => parseInt(h, 16));
let palette;
function readPalette() {
  const [from, to] = [colour("--panel"), colour("--ink")];
  // the square root brings out weights that are small but not nothing
  palette = Array.from({ length: 256 }, (_, i) => from.map((c, j) => Math.round(c + (to[j] - c) * Math.sqrt(i / 255))));
  palette.hidden = colour("--hidden");
  const stops = [0, 16, 64, 144, 255].map((i) => `rgb(${palette[i]}) ${(100 * i) / 255}%`);
  $("scale").style.background = `linear-gradient(to right, ${stops})`;
}

/** Paint one head, a pixel for each pair of tokens. */
function paint(canvas, head) {
  canvas.width = canvas.height = S;
  const context = canvas.getContext("2d");
  const image = context.createImageData(S, S);
  for (let q = 0, i = 0; q < S; q++)
    for (let k = 0; k < S; k++, i += 4) {
      const [r, g, b] = k > q ? palette.hidden : palette[Math.round(255 * weight(state.layer, head, q, k))];
      image.data.set([r, g, b, 255], i);
    }
  context.putImageData(image, 0, 0);
}

const order = [MEAN, ...Array(H).keys()];
order.forEach((head) => {
  const input = make("input", { type: "radio", name: "head", checked: head === MEAN });
  input.onchange = () => {
    state.head = head;
    showAttention();
  };
  const thumb = make("canvas");
  thumb.setAttribute("aria-hidden", "true");
  $("heads").append(make("label", {}, input, make("span", {}, thumb, head === MEAN ? "mean" : `head ${head}`)));
});
const CELL = Math.max(5, Math.min(34, Math.floor(600 / S)));
const MARGIN = 92; // of the labels
const pixels = make("canvas");
let cursor = null; // the pair [q, k] that is pointed at

function showHeads() {
  $("layer-value").textContent = `${state.layer} (of 0 to ${L - 1})`;
  $("heads").querySelectorAll("canvas").forEach((canvas, i) => paint(canvas, order[i]));
}
$("layer").oninput = () => {
  state.layer = $("layer").valueAsNumber;
  showHeads();
  showAttention();
};

function showAttention() {
  paint(pixels, state.head);
  const title = `Layer ${state.layer}, ${headName()}: where ${named(state.token)} looks`;
  $("picture-title").textContent = title;
  const looked = Array.from({ length: state.token + 1 }, (_, k) => [weight(state.layer, state.head, state.token, k), k]);
  looked.sort((a, b) => b[0] - a[0]);
  $("row-table").tBodies[0].replaceChildren(
    ...looked.map(([p, k]) =>
      make("tr", {}, make("th", { scope: "row", title: tokens[k] }, `${k + 1} `, make("bdi", {}, tokens[k])), make("td", {}, whole(p)), bar(p))),
  );
  drawPicture();
}

function drawPicture() {
  const canvas = $("picture");
  const side = MARGIN + CELL * S + 12;
  const scale = devicePixelRatio || 1;
  canvas.width = canvas.height = side * scale;
  canvas.style.width = canvas.style.height = `${side}px`;
  const context = canvas.getContext("2d");
  context.scale(scale, scale);
  context.imageSmoothingEnabled = false;
  context.drawImage(pixels, MARGIN, MARGIN, CELL * S, CELL * S);
  const [q, k] = cursor ?? [state.token, null];
  const style = getComputedStyle(document.documentElement);
  const [text, chosen, muted] = ["--text", "--pick", "--muted"].map((name) => style.getPropertyValue(name));
  const size = Math.max(9, Math.min(14, CELL - 1));
  const every = Math.ceil(size / CELL); // labels must not run into each other
  context.textBaseline = "middle";
  for (const down of [true, false]) {
    tokens.forEach((token, t) => {
      const marked = down ? t === q || t === state.token : t === k;
      const near = down ? [q, state.token] : [k];
      if (!marked && (t % every || (every > 1 && near.some((n) => n !== null && Math.abs(n - t) < every)))) return;
      context.save();
      context.font = `${marked ? "bold " : ""}${size}px ui-monospace, "DejaVu Sans Mono", monospace`;
      context.fillStyle = (down ? t === state.token : false) ? chosen : marked ? text : muted;
      context.translate(...(down ? [MARGIN - 6, MARGIN + (t + 0.5) * CELL] : [MARGIN + (t + 0.5) * CELL, MARGIN - 6]));
      if (!down) context.rotate(-Math.PI / 2);
      context.textAlign = down ? "right" : "left";
      const longest = Math.floor((MARGIN - 8) / (size * 0.61));
      const letters = [...token];
      context.fillText(letters.length > longest ? `${letters.slice(0, longest - 1).join("")}…` : token, 0, 0);
      context.restore();
    });
  }
  context.lineWidth = 2;
  context.strokeStyle = chosen;
  context.strokeRect(MARGIN - 1, MARGIN + state.token * CELL - 1, CELL * (state.token + 1) + 2, CELL + 2);
  if (cursor) {
    context.strokeStyle = text;
    context.strokeRect(MARGIN + k * CELL - 1, MARGIN + q * CELL - 1, CELL + 2, CELL + 2);
    $("picture-detail").textContent = k > q
      ? `${named(q)[0].toUpperCase()}${named(q).slice(1)} cannot see ${named(k)}, which comes later.`
      : `${named(q)[0].toUpperCase()}${named(q).slice(1)} gives ${whole(weight(state.layer, state.head, q, k))} of its attention to ${named(k)}${k === q ? ", itself" : ""}.`;
  } else $("picture-detail").textContent = "";
}
function pointedPair(event) {
  const [k, q] = [event.offsetX, event.offsetY].map((x) => Math.floor((x - MARGIN) / CELL));
  return q >= 0 && q < S && k < S ? [q, Math.max(k, -1)] : null;
}
$("picture").onmousemove = (event) => {
  const pair = pointedPair(event);
  const next = pair && pair[1] >= 0 ? pair : null;
  if (`${next}` === `${cursor}`) return;
  cursor = next;
  drawPicture();
};
$("picture").onmouseleave = $("picture").onblur = () => {
  cursor = null;
  drawPicture();
};
$("picture").onclick = (event) => {
  const pair = pointedPair(event); // a label picks, too
  if (pair) pick(pair[0]);
};
$("picture").onkeydown = (event) => {
  const at = [...(cursor ?? [state.token, state.token])];
  if (event.key === "Enter" || event.key === " ") pick(at[0]);
  else if (!moved(event.key, at, S - 1, S - 1)) return;
  event.preventDefault();
  cursor = at;
  drawPicture();
};

// ----- sizes

const { points, values, outside } = data.sizes;
const ranges = values.map((ofPoint) => {
  const logarithms = ofPoint.flat().filter((x) => x > 0).map(Math.log);
  const least = Math.min(...logarithms);
  return { least, width: Math.max(Math.max(...logarithms) - least, Math.log(10)) };
});
{
  const numbers = Array.from({ length: L }, (_, layer) => make("th", { scope: "col" }, `${layer}`));
  const body = points.map(([name, words], p) => {
    const label = name === "output" ? "(output)" : name;
    return make("tr", {}, make("th", { scope: "row" }, label, make("small", {}, words)), ...values[p].map(() => make("td")));
  });
  $("sizes-table").append(make("thead", {}, make("tr", {}, make("th", { scope: "col" }, "point \\ layer"), ...numbers)), make("tbody", {}, ...body));
}
function showSizes() {
  const rows = $("sizes-table").tBodies[0].rows;
  values.forEach((ofPoint, p) =>
    ofPoint.forEach((ofLayer, layer) => {
      const x = ofLayer[state.token];
      const cell = rows[p].cells[layer + 1];
      cell.textContent = x === null ? "" : compact.format(x); // not every layer has every point
      cell.style.setProperty("--p", x > 0 ? (Math.log(x) - ranges[p].least) / ranges[p].width : 0);
    }));
  const sizes = Object.entries(outside).map(([name, of]) => `${name} ${compact.format(of[state.token])}`);
  $("outside").textContent = `Columns are layers. Deeper blue is larger, among all layers and tokens of its row. Outside of the layers: ${sizes.join(", ")}.`;
  for (const line of document.querySelectorAll(".chart .on")) line.classList.remove("on");
  for (const line of document.querySelectorAll(`.chart [id$="-${state.token}"][id^="line-"]`)) {
    line.classList.add("on");
    line.parentNode.append(line); // above the others
  }
}

dark.onchange = () => {
  readPalette();
  showHeads();
  showAttention();
};
readPalette();
showHeads();
pick(S - 1);
