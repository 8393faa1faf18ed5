"use strict";
// Everything that comes from a run is put into the page as text (textContent), never as markup.
const data = JSON.parse(document.getElementById("page-data").textContent);
const several = data.runs.length > 1;
const COLOURS = 8;
const DASHES = ["solid", "dash", "dot", "dashdot"];
const touch = matchMedia("(pointer: coarse)");
const dark = matchMedia("(prefers-color-scheme: dark)");

function make(tag, options = {}, ...children) {
  const { classes, text, colour, ...attributes } = options;
  const element = document.createElement(tag);
  if (classes) element.className = classes;
  if (text !== undefined) element.textContent = text;
  if (colour !== undefined) element.dataset.colour = colour % COLOURS;
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

function short(value) {
  if (value === null || value === undefined) return "–";
  if (value !== 0 && (Math.abs(value) < 1e-3 || Math.abs(value) >= 1e7)) return value.toExponential(1);
  return Number(value.toPrecision(3)).toLocaleString("en", { maximumSignificantDigits: 4 });
}

// ---- curves ----

// Plotly reads some markup in its labels (<b>, <a href>): none of ours has any.
function label(text, longest = 60) {
  const cut = text.length > longest ? `${text.slice(0, longest - 1)}…` : text;
  return cut.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
}

function css(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

function colour(place) {
  return css(`--c${place % COLOURS}`);
}

function layout(more) {
  const axis = { gridcolor: css("--line"), zeroline: false, linecolor: css("--line"), automargin: true };
  return {
    height: 250,
    margin: { l: 44, r: 10, t: 8, b: 34 },
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { color: css("--soft"), size: 12, family: getComputedStyle(document.body).fontFamily },
    hoverlabel: { bgcolor: css("--card"), bordercolor: css("--line"), font: { color: css("--text") }, namelength: -1 },
    showlegend: false,
    dragmode: touch.matches ? false : "zoom",
    ...more,
    xaxis: { ...axis, ...more.xaxis },
    yaxis: { ...axis, ...more.yaxis },
  };
}

const CONFIG = { responsive: true, displayModeBar: false, scrollZoom: false };

// The mean of the last `width` values; null, a number that was not finite, stays a gap.
function smoothed(values, width) {
  return values.map((value, place) => {
    if (value === null) return null;
    const near = values.slice(Math.max(0, place + 1 - width), place + 1).filter((x) => x !== null);
    return near.reduce((sum, x) => sum + x, 0) / near.length;
  });
}

function last(values) {
  return values.findLast((value) => value !== null);
}

function place(panel, series) {
  return several ? series.run : panel.series.indexOf(series);
}

function nameOf(series) {
  return several ? data.runs[series.run].name : series.name;
}

class Curves {
  constructor(panel, box) {
    this.panel = panel;
    this.hidden = new Set();
    this.plot = make("div", { classes: "plot", role: "img", "aria-label": this.words() });
    const legend = make("div", { classes: "legend", role: "group", "aria-label": `Curves of ${panel.title}` });
    panel.series.forEach((series, number) => legend.append(this.button(series, number)));
    const far = Math.max(...panel.series.map((series) => series.each));
    const note = far > 1 ? `${panel.note} Each point is the mean of ${far} steps.` : panel.note;
    box.append(
      make("article", { classes: "panel" },
        make("h3", { text: panel.unit ? `${panel.title} (${panel.unit})` : panel.title }),
        ...(note ? [make("p", { classes: "note", text: note })] : []),
        this.plot, legend, this.numbers()));
  }

  words() {
    const parts = this.panel.series.map((series) => {
      const first = series.y.find((value) => value !== null);
      return `${nameOf(series)} from ${short(first)} at step ${series.x[0]} to ${short(last(series.y))} at step ${series.x.at(-1)}`;
    });
    return `${this.panel.title}: ${parts.join("; ")}`;
  }

  button(series, number) {
    const button = make("button", { type: "button", "aria-pressed": "true", colour: place(this.panel, series) },
      make("span", { classes: this.panel.exact && !several && number === 0 ? "swatch whole" : "swatch" }),
      make("span", { text: nameOf(series) }),
      make("span", { classes: "last", text: short(last(series.y)) }));
    button.addEventListener("click", () => {
      const shown = this.hidden.has(number);
      if (shown) this.hidden.delete(number);
      else this.hidden.add(number);
      button.setAttribute("aria-pressed", String(shown));
      this.draw();
    });
    return button;
  }

  numbers() {
    const rows = this.panel.series.map((series) => {
      const known = series.y.filter((value) => value !== null);
      const facts = [known[0], last(series.y), Math.min(...known), Math.max(...known)];
      return make("tr", {}, make("th", { scope: "row", text: nameOf(series) }),
        ...facts.map((value) => make("td", { classes: "n", text: short(value) })));
    });
    const head = ["", "first", "last", "lowest", "highest"].map((text) => make("th", { scope: "col", text }));
    return make("details", {}, make("summary", { text: "Numbers" }),
      make("div", { classes: "scroll" },
        make("table", {}, make("thead", {}, make("tr", {}, ...head)), make("tbody", {}, ...rows))));
  }

  draw() {
    if (!window.Plotly) return;
    const traces = [];
    this.panel.series.forEach((series, number) => {
      if (this.hidden.has(number)) return;
      const width = this.panel.exact ? 1 : smoothing();
      const at = place(this.panel, series);
      // Of accuracies, the mean stands out; past the last colour, the dashes tell curves apart.
      const mean = this.panel.exact && !several && at === 0;
      const turn = several ? series.run : Math.floor(at / COLOURS);
      const line = { color: mean ? css("--text") : colour(at), width: mean ? 3.5 : 2, dash: DASHES[turn % DASHES.length] };
      const few = series.x.length < 25;
      const base = { x: series.x, type: "scatter", name: label(nameOf(series)), mode: few && width === 1 ? "lines+markers" : "lines" };
      if (width > 1) traces.push({ ...base, y: series.y, line: { ...line, width: 1, dash: "solid" }, opacity: 0.28, hoverinfo: "skip" });
      traces.push({ ...base, y: smoothed(series.y, width), line, marker: { size: 6 } });
    });
    Plotly.react(this.plot, traces, layout({
      hovermode: "x unified",
      xaxis: { title: { text: "step", standoff: 4 }, hoverformat: ",d" },
      yaxis: { hoverformat: ".4~g", tickformat: this.panel.share ? ".0%" : "", rangemode: this.panel.share ? "tozero" : "normal" },
    }), CONFIG);
  }
}

function smoothing() {
  return Number(document.getElementById("smooth").value);
}

// ---- accuracy and memory ----

const NARROW = 22;

function drawAccuracy(table, box) {
  const rows = table.rows.toReversed();
  const runs = data.runs.length;
  const height = Math.max(220, 70 + rows.length * (several ? 22 * runs + 12 : 34));
  const traces = [];
  // Runs one under the other, and before above after.
  const at = (row, run, key) => row + (runs / 2 - run - 0.5) * (0.7 / runs) + (key === "before" ? 0.11 : -0.11) / runs;
  const trace = (name, run, key, marker) => {
    const found = rows.map((row, place) => [place, row.cells[run]?.[key]]).filter(([, score]) => score);
    if (!found.length) return;
    traces.push({
      type: "scatter", mode: "markers", name: label(name), marker: { size: 9, ...marker },
      x: found.map(([, score]) => score[0]), y: found.map(([place]) => at(place, run, key)),
      text: found.map(([place, score]) => label(rows[place].name) + (score[1] === null ? "" : `, ${(100 * score[1]).toFixed(1)} to ${(100 * score[2]).toFixed(1)} %`)),
      hoverinfo: "text+x+name",
      error_x: { type: "data", symmetric: false, thickness: 1.5, width: 3, color: marker.color,
        array: found.map(([, [share, , high]]) => (high === null ? NaN : high - share)),
        arrayminus: found.map(([, [share, low]]) => (low === null ? NaN : share - low)) },
    });
  };
  const chance = rows.map((row, place) => [place, row.chance]).filter(([, share]) => share !== null);
  if (chance.length) {
    traces.push({ type: "scatter", mode: "markers", name: "chance", x: chance.map(([, share]) => share), y: chance.map(([place]) => place),
      marker: { symbol: "line-ns-open", size: 20 * (several ? runs : 1), color: css("--soft"), line: { width: 2 } }, hoverinfo: "x+name" });
  }
  data.runs.forEach((run, number) => {
    const before = several ? `${run.name}, before` : "before";
    trace(before, number, "before", { color: several ? colour(number) : css("--soft"), symbol: "circle-open", line: { width: 2 } });
    trace(several ? `${run.name}, after` : "after", number, "after", { color: colour(number) });
  });
  box.setAttribute("role", "img");
  box.setAttribute("aria-label", `Accuracy by ${table.title.toLowerCase()}, as in the table below`);
  Plotly.react(box, traces, layout({
    height, hovermode: "closest", showlegend: true,
    legend: { orientation: "h", traceorder: "normal", y: 1, yanchor: "bottom", x: 0, font: { color: css("--text") } },
    margin: { l: 10, r: 16, t: 30, b: 34 },
    xaxis: { tickformat: ".0%", hoverformat: ".1%", range: [0, 1.02] },
    yaxis: { tickvals: rows.map((_, place) => place), ticktext: rows.map((row) => label(row.name, NARROW)), range: [-0.6, rows.length - 0.4], tickfont: { color: css("--text") } },
  }), CONFIG);
}

function drawMemory(memory, box) {
  const phases = memory.phases.toReversed();
  const items = [...new Set(phases.flatMap((phase) => Object.keys(phase.held)))];
  const traces = items.map((item, number) => ({
    type: "bar", orientation: "h", name: label(item), marker: { color: colour(number) },
    y: phases.map((_, place) => place), x: phases.map((phase) => phase.held[item] ?? 0), hoverinfo: "x+name",
  }));
  const measured = Object.entries(memory.measured);
  measured.forEach(([name, value], number) => traces.push({
    type: "scatter", mode: "lines", name: label(`measured: ${name}`), x: [value, value], y: [-0.5, phases.length - 0.5],
    line: { color: css("--text"), dash: DASHES[(number + 1) % DASHES.length], width: 2 }, hoverinfo: "x+name",
  }));
  box.setAttribute("role", "img");
  box.setAttribute("aria-label", "Planned memory by phase, as in the table below");
  Plotly.react(box, traces, layout({
    height: 110 + 34 * phases.length + 20 * Math.ceil((items.length + measured.length) / 3), barmode: "stack", hovermode: "closest", showlegend: true,
    legend: { orientation: "h", traceorder: "normal", y: 1, yanchor: "bottom", x: 0, font: { color: css("--text") } },
    margin: { l: 10, r: 16, t: 30, b: 34 },
    xaxis: { title: { text: "GiB" }, hoverformat: ".2f", rangemode: "tozero" },
    yaxis: { tickvals: phases.map((_, place) => place), ticktext: phases.map((phase) => label(phase.name, NARROW)), tickfont: { color: css("--text") } },
  }), CONFIG);
}

// ---- drawing ----

const curves = [];

function drawTables() {
  data.accuracy.forEach((table, number) => drawAccuracy(table, document.getElementById(`accuracy-${number}`)));
  for (const box of document.querySelectorAll("[data-memory]")) drawMemory(data.runs[box.dataset.memory].memory, box);
}

function drawAll() {
  for (const one of curves) if (one.plot.offsetParent !== null) one.draw();
  drawTables();
}

async function loadPlotly() {
  const packed = Uint8Array.from(atob(document.getElementById("plotly").textContent), (x) => x.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  document.head.append(make("script", { text: await new Response(stream).text() }));
}

async function showCurves() {
  const panels = document.getElementById("panels");
  if (panels) {
    for (const panel of data.curves.main) curves.push(new Curves(panel, panels));
    const slider = document.getElementById("smooth");
    const tell = () => {
      const width = smoothing();
      document.getElementById("smoothed").textContent = width === 1 ? "off" : `mean of ${width} steps`;
    };
    slider.addEventListener("input", () => { tell(); drawAll(); });
    tell();
    const box = document.getElementById("others-box");
    box?.addEventListener("toggle", () => {
      const others = document.getElementById("others");
      if (!others.children.length) for (const panel of data.curves.others) curves.push(new Curves(panel, others));
      drawAll();
    });
  }
  await loadPlotly();
  drawAll();
  dark.addEventListener("change", drawAll);
  document.documentElement.dataset.drawn = "yes";
}

// ---- completions ----

const PAGE = 12;
const TESTS = {
  right: (item) => item.right === true,
  wrong: (item) => item.right === false,
  rescued: (item) => item.hint !== null,
  gated: (item) => item.gate > 0,
  closed: (item) => item.gate === 0,
  cut: (item) => item.cut,
};

function chip(kind, text) {
  return make("span", { classes: `chip ${kind}`, text });
}

function signed(value) {
  return value === null ? "–" : `${value > 0 ? "+" : ""}${short(value)}`;
}

function picture(image) {
  const name = image.name || "without a name";
  if (image.place === undefined) {
    return make("figure", {}, make("div", { classes: "lost", text: "Picture not here" }), make("figcaption", { text: `${name}: ${image.why}` }));
  }
  return make("figure", {},
    make("img", { src: data.browser.pictures[image.place], width: image.width, height: image.height, loading: "lazy",
      classes: Math.max(image.width, image.height) < 96 ? "tiny" : "", alt: `Picture of the question, file ${name}` }),
    make("figcaption", { text: name }));
}

// The completion as it was sampled, tags and all; reasoning and answer look different.
function said(text) {
  const box = make("p", { classes: "said" });
  let within = "";
  for (const part of text.split(/(<\/?(?:think|answer)>)/)) {
    const tag = /^<(\/?)(think|answer)>$/.exec(part);
    if (tag) {
      within = tag[1] ? "" : tag[2];
      box.append(make("span", { classes: "tag", text: part }));
    } else if (part) {
      box.append(make("span", { classes: within, text: part }));
    }
  }
  if (!text) box.append(make("span", { classes: "think", text: "(nothing)" }));
  return box;
}

function fact(name, value) {
  return make("div", {}, make("dt", { text: name }), make("dd", { text: value }));
}

function details(item, group) {
  const parts = [];
  if (item.hint !== null) {
    parts.push(make("div", {}, make("p", { classes: "label", text: "Hint, beside the question while it was sampled" }), make("p", { classes: "said hint", text: item.hint })));
  }
  parts.push(make("div", {}, make("p", { classes: "label", text: "Reasoning and answer, as sampled" }), said(item.text)));
  const facts = [["right answer", group.answer || "–"], ...Object.entries(item.rewards).map(([name, value]) => [`reward ${name}`, short(value)]),
    ["advantage", signed(item.advantage)], ["gate", item.gate === null ? "–" : short(item.gate)]];
  parts.push(make("dl", { classes: "facts" }, ...facts.map(([name, value]) => fact(name, value))));
  return make("div", { classes: "body" }, ...parts);
}

function row(item, group) {
  const verdict = item.right === null ? chip("", "not judged") : item.right ? chip("right", "✓ right") : chip("wrong", "✗ wrong");
  const rewards = Object.entries(item.rewards).map(([name, value]) => `${name} ${short(value)}`).join(" · ");
  const summary = make("summary", {}, verdict,
    ...(item.hint !== null ? [chip("hint", "rescued by a hint")] : []),
    ...(item.gate === null ? [] : [chip("", item.gate > 0 ? (item.gate === 1 ? "gate open" : `gate ${short(item.gate)}`) : "gate closed")]),
    ...(item.cut ? [chip("cut", "cut off")] : []),
    ...(item.data ? [chip("", "of the dataset")] : []),
    make("span", { classes: "glance", text: item.text.replaceAll(/<\/?(think|answer)>/g, " ").trim().slice(0, 200) }),
    make("span", { classes: "note", text: rewards }));
  const box = make("details", { classes: "item" }, summary);
  box.addEventListener("toggle", () => { if (box.open && box.children.length === 1) box.append(details(item, group)); });
  return box;
}

function groupBox(group, items) {
  const [first, ...rest] = group.prompt.split("\n");
  const where = `${several ? `${data.runs[group.run].name}, ` : ""}step ${group.step}${group.answer ? `, right answer ${group.answer}` : ""}`;
  const hidden = group.items.length - items.length;
  return make("article", { classes: "group" },
    make("div", { classes: "head" },
      ...(group.images.length ? [make("div", { classes: "pictures" }, ...group.images.map(picture))] : []),
      make("div", { classes: "question" },
        make("h3", { text: first || "(an empty question)" }),
        ...(rest.length ? [make("p", { classes: "options", text: rest.join("\n") })] : []),
        make("p", { classes: "note", text: where + (hidden ? `; ${hidden} of ${group.items.length} completions do not match` : "") }))),
    make("div", { classes: "items" }, ...items.map((item) => row(item, group))));
}

function showCompletions() {
  const form = document.querySelector("form.filters");
  if (!form) return;
  const groups = data.browser.groups;
  const all = groups.flatMap((group) => group.items);
  for (const count of document.querySelectorAll("[data-count]")) {
    const test = TESTS[count.dataset.count];
    count.textContent = (test ? all.filter(test) : all).length.toLocaleString("en");
  }
  for (const step of [...new Set(groups.map((group) => group.step))].sort((a, b) => a - b)) {
    form.elements.step.append(make("option", { value: step, text: `step ${step}` }));
  }
  const box = document.getElementById("groups");
  const more = document.getElementById("more");
  let matching = [];
  let shown = 0;

  function add() {
    const next = matching.slice(shown, shown + PAGE);
    const boxes = next.map(([group, items]) => groupBox(group, items));
    box.append(...boxes);
    shown += next.length;
    more.hidden = shown >= matching.length;
    more.textContent = `Show ${Math.min(PAGE, matching.length - shown)} more questions of ${matching.length - shown}`;
    return boxes[0];
  }

  function filter() {
    const chosen = new FormData(form);
    const tests = [chosen.get("verdict"), ...["rescued", "gated", "closed", "cut"].filter((name) => chosen.has(name))].filter(Boolean).map((name) => TESTS[name]);
    const text = chosen.get("text").trim().toLowerCase();
    const found = (words) => words !== null && words.toLowerCase().includes(text);
    matching = groups
      .filter((group) => !chosen.get("step") || group.step === Number(chosen.get("step")))
      .filter((group) => !chosen.get("run") || group.run === Number(chosen.get("run")))
      .map((group) => {
        const whole = !text || found(group.prompt);
        return [group, group.items.filter((item) => tests.every((test) => test(item)) && (whole || found(item.text) || found(item.hint)))];
      })
      .filter(([, items]) => items.length);
    const count = matching.reduce((sum, [, items]) => sum + items.length, 0);
    document.getElementById("found").textContent = `${count.toLocaleString("en")} of ${all.length.toLocaleString("en")} completions, of ${matching.length.toLocaleString("en")} questions`;
    box.replaceChildren();
    shown = 0;
    add();
  }

  form.addEventListener("input", filter);
  form.addEventListener("reset", () => setTimeout(filter));
  form.addEventListener("submit", (event) => event.preventDefault());
  more.addEventListener("click", () => {
    const first = add();
    first?.querySelector("summary").focus();
  });
  filter();
}

showCompletions();
showCurves();
