// What all parts of the page use: elements, numbers as text, the light and dark theme.

const data = JSON.parse(document.getElementById("data").textContent);

/** An element; text among its children is text, whatever it holds. */
function h(tag, attributes, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value != null) element.setAttribute(name, value);
  }
  element.append(...children.flat(Infinity).filter((each) => each != null && each !== ""));
  return element;
}

/** An element of a drawing. */
function s(tag, attributes, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes || {})) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

const percent = (x) => (x >= 0.9995 && x < 1 ? "99.9%" : `${(100 * x).toFixed(1)}%`);
/** What JSON has no numbers for. */
const WORDS = { inf: "equal", "-inf": "no signal", nan: "not a number" };
const decibels = (x) => (Number.isFinite(x) ? `${x.toFixed(1)} dB` : WORDS[x] || "–");
const plural = (n, one, many) => `${n.toLocaleString("en")} ${n === 1 ? one : many || `${one}s`}`;

/** A number in three figures. */
function short(x) {
  if (!Number.isFinite(x)) return String(x ?? "–");
  if (x === 0) return "0";
  const size = Math.abs(x);
  if (size >= 1e5 || size < 1e-3) return x.toExponential(2).replace("e+", "e");
  return String(Number(x.toPrecision(3)));
}

function scaled(x, units, base) {
  let i = 0;
  for (; x >= base && i < units.length - 1; i++) x /= base;
  return `${i ? x.toPrecision(3) : x} ${units[i]}`;
}
const bytes = (x) => scaled(x, ["bytes", "kB", "MB", "GB"], 1000);
const count = (x) => scaled(x, ["", "thousand", "million", "billion", "trillion"], 1000).trim();

/** Round places for the marks of an axis. */
function ticks(low, high, wanted) {
  const rough = (high - low) / wanted || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].find((each) => each * power >= rough) * power;
  const found = [];
  for (let i = Math.ceil(low / step); i * step <= high + step / 1e6; i++) found.push(i * step);
  return found.map((each) => Number(each.toPrecision(10)));
}

/** A name that may break behind its dots and underscores. */
function breaking(name) {
  return name.split(/(?<=[._])/).flatMap((each) => [document.createElement("wbr"), each]).slice(1);
}

function legend(...entries) {
  return h("div", { class: "legend" }, entries.map(([kind, text]) =>
    h("span", {}, h("i", { class: `bg-${kind}` }), text)));
}

/** A part of a bar; widths are set here since the page allows no styles in its elements. */
function part(kind, share) {
  const element = h("i", { class: `bg-${kind}` });
  element.style.width = `${100 * Math.min(Math.max(share, 0), 1)}%`;
  return element;
}

function table(columns, rows) {
  const head = h("tr", {}, columns.map((each) =>
    h("th", { scope: "col", class: each.number ? "number" : "" }, each.name)));
  const body = rows.map((row) => h("tr", {}, columns.map((each) =>
    h("td", { class: each.number ? "number" : "wrap" }, each.of(row) ?? ""))));
  return h("div", { class: "scroll" },
    h("table", {}, h("thead", {}, head), h("tbody", {}, body)));
}

// The theme: that of the system until the reader chooses.
const THEMES = ["auto", "light", "dark"];
function remembered(value) {
  try { // a page opened from a disk may have no storage
    if (value) localStorage.setItem("torch-quant-theme", value);
    return localStorage.getItem("torch-quant-theme");
  } catch { return value; }
}
function themeSwitch() {
  const buttons = THEMES.map((name) => h("button", { type: "button", onclick: () => choose(name) }, name));
  function choose(name) {
    if (name === "auto") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = name;
    remembered(name);
    buttons.forEach((each, i) => each.setAttribute("aria-pressed", String(THEMES[i] === name)));
  }
  const kept = remembered();
  choose(THEMES.includes(kept) ? kept : "auto");
  return h("div", { class: "group", role: "group", "aria-label": "colours" }, buttons);
}
