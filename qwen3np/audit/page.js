"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const ratios = Float64Array.from(data.differences, (d) => Math.exp(-d)).sort();
const low = document.getElementById("low"), high = document.getElementById("high");

function below(bound) {  // how many ratios are smaller
  let a = 0, b = ratios.length;
  while (a < b) {
    const middle = (a + b) >> 1;
    if (ratios[middle] < bound) a = middle + 1; else b = middle;
  }
  return a;
}

function show() {
  const bounds = [10 ** -low.value, 10 ** +high.value];
  const inside = below(bounds[1] * (1 + 1e-12)) - below(bounds[0]);
  document.getElementById("low-value").textContent = bounds[0].toPrecision(4);
  document.getElementById("high-value").textContent = bounds[1].toPrecision(4);
  const share = 100 * (1 - inside / ratios.length);
  document.getElementById("share").textContent = `${share.toFixed(share < 10 ? 2 : 1)} % of the ratios are outside.`;
}

function set(pair) {
  low.value = -Math.log10(pair[0]);
  high.value = Math.log10(pair[1]);
  show();
}

low.addEventListener("input", show);
high.addEventListener("input", show);
document.getElementById("tight").addEventListener("click", () => set(data.tight));
document.getElementById("wide").addEventListener("click", () => set(data.wide));
set(data.wide);
