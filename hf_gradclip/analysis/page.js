"use strict";
// Shows the numbers that are in the page: those of a step under the pointer, and those of a threshold at the slider.
const runs = JSON.parse(document.getElementById("data").textContent);
const CLIPPED = 1, SKIPPED = 2, BROKEN = 4;
const COLUMNS = {
  loss: ["loss", "norm"], learning_rate: ["learning_rate"], norm: ["norm", "threshold", "scale"],
  rate: ["scale"], update: ["norm", "threshold", "scale"], strategies: ["norm", "threshold"],
};

function nearest(steps, wanted) {
  let low = 0, high = steps.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (steps[middle] < wanted) low = middle + 1; else high = middle;
  }
  return low > 0 && wanted - steps[low - 1] < steps[low] - wanted ? low - 1 : low;
}

function ends(svg, name) {
  return svg.dataset[name].split(" ").map(Number);
}

function line(svg, kind, x1, y1, x2, y2) {
  let found = svg.querySelector("." + CSS.escape(kind));
  if (!found) {
    found = document.createElementNS("http://www.w3.org/2000/svg", "line");
    found.setAttribute("class", kind.startsWith("limit") ? kind + " limit" : kind);
    svg.append(found);
  }
  const places = { x1, y1, x2, y2 };
  for (const key in places) found.setAttribute(key, places[key]);
  return found;
}

function said(record, row, columns) {
  const words = columns.filter(name => record[name][row] !== null)
    .map(name => name.replace("_", " ") + " " + record[name][row]);
  const flags = record.flags[row];
  if (flags & BROKEN) words.push("NaN or inf");
  if (flags & CLIPPED) words.push("clipped");
  if (flags & SKIPPED) words.push("left out");
  return words.join(", ");
}

function write(output, lines) {
  output.replaceChildren(...lines.map(([bold, words]) => {
    const row = document.createElement("div"), name = document.createElement("b");
    name.textContent = bold;
    row.append(name, " " + words);
    return row;
  }));
}

function show(figure, svg, step, part) {
  const kind = figure.dataset.kind, chosen = figure.dataset.runs.split(" ").map(Number);
  const [left, top, right, bottom] = ends(svg, "box"), [first, last] = ends(svg, "x");
  const output = figure.querySelector(".values");
  figure.dataset.step = step;
  let at = step;
  if (kind === "heat") {
    const heat = runs[chosen[0]].heat[svg.parentNode.className === "wide" ? 0 : 1];
    const row = Math.max(0, Math.min(heat.names.length - 1, Math.floor(part * heat.names.length)));
    let bin = heat.first.findIndex((_, i) => step <= heat.last[i]);
    if (bin < 0) bin = heat.first.length - 1;
    const span = heat.first[bin] === heat.last[bin] ? "step " + heat.first[bin]
      : "steps " + heat.first[bin] + " to " + heat.last[bin];
    const norm = heat.norm[row][bin];
    const words = [norm === null ? null : "norm " + norm, heat.broken[row].includes(bin) ? "NaN or inf" : null];
    write(output, [[span + ", " + heat.names[row] + ":", words.filter(Boolean).join(", ") || "norm 0, or not measured"]]);
    at = (heat.first[bin] + heat.last[bin]) / 2;
  } else {
    const lines = chosen.map(place => {
      const run = runs[place], record = kind === "update" ? run.update : run.gradient;
      const row = nearest(record.step, step);
      if (chosen.length === 1) at = record.step[row];
      const name = chosen.length > 1 ? run.name + ", step " : "step ";
      return [name + record.step[row] + ":", said(record, row, COLUMNS[kind])];
    });
    write(output, lines);
  }
  const x = left + (at - first) / (last - first) * (right - left);
  line(svg, "pointer", x, top, x, bottom);
}

for (const figure of document.querySelectorAll("figure[data-kind]")) {
  const seen = () => [...figure.querySelectorAll("svg")].find(svg => svg.getClientRects().length);
  const move = event => {
    const svg = seen(), place = svg.getBoundingClientRect(), view = svg.viewBox.baseVal;
    const [left, top, right, bottom] = ends(svg, "box"), [first, last] = ends(svg, "x");
    const x = (event.clientX - place.left) / place.width * view.width;
    const y = (event.clientY - place.top) / place.height * view.height;
    const step = first + (Math.max(left, Math.min(right, x)) - left) / (right - left) * (last - first);
    show(figure, svg, Math.max(1, Math.round(step)), (y - top) / (bottom - top));
  };
  figure.addEventListener("pointermove", move);
  figure.addEventListener("pointerdown", move);
}

for (const slider of document.querySelectorAll("input[data-run]")) {
  const place = Number(slider.dataset.run), cells = slider.closest("section").querySelectorAll("tr.chosen td");
  const choose = () => {
    const found = runs[place].fixed[slider.value];
    cells.forEach((cell, i) => {
      const parts = found[i].split(/(?<=[:=,])/);
      cell.replaceChildren(...parts.flatMap(part => [part, document.createElement("wbr")]));
    });
    slider.setAttribute("aria-valuetext", found[0] + ", clipped " + found[1]);
    const limit = Math.log(Number(found[0].split("=")[1]));
    for (const svg of document.querySelectorAll('figure[data-kind="norm"] svg')) {
      const [left, top, right, bottom] = ends(svg, "box"), [low, high] = ends(svg, "y").map(Math.log);
      const y = bottom - (limit - low) / (high - low) * (bottom - top);
      const inside = Math.max(top, Math.min(bottom, y));
      line(svg, "limit" + place, left, inside, right, inside).style.stroke = slider.dataset.color;
    }
  };
  slider.addEventListener("input", choose);
  choose();
}
