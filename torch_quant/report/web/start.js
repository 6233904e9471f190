// Puts the page together.

function section(id, title, lead, ...content) {
  return h("section", { id, "aria-labelledby": `${id}-title` }, h("h2", { id: `${id}-title` }, title),
    lead ? h("p", { class: "soft" }, lead) : null, content);
}

function fact(value, name) {
  return h("div", { class: "fact" }, h("b", {}, value), h("span", {}, name));
}

const exact = (x) => (Number.isFinite(x) ? String(Number(x.toPrecision(4))) : String(x));

function factsSection() {
  const { bytes: size, comparison, speed, metrics } = data, found = [];
  const quantized = data.layers.filter((each) => each.quantized).length;
  found.push(fact(percent(data.coverage), `of the multiply-accumulates quantized, ${quantized} of ${data.layers.length} layers`));
  found.push(fact(percent(size.quantized / (size.float || 1)), `of the size: ${bytes(size.float)} → ${bytes(size.quantized)}`));
  if (comparison) found.push(fact(decibels(comparison.outputs), `SQNR of the outputs, ${plural(comparison.batches, "batch", "batches")}`));
  const ran = speed ? speed.runs.filter((each) => each.median != null) : [];
  const here = ran.find((each) => each.this), plain = ran.find((each) => !each.quantized);
  if (here && plain) found.push(fact(`${(plain.median / here.median).toFixed(2)}×`, `as fast as ${plain.name}: ${short(plain.median)} → ${short(here.median)} ms`));
  for (const each of metrics) found.push(fact(exact(each.quantized), `${each.name}; ${exact(each.float)} in float`));
  return h("section", { class: "facts", id: "summary", "aria-label": "summary" }, found);
}

function coverageSection(open) {
  const keys = Object.keys(data.by_op[0] || {});
  const columns = keys.map((name) => ({ name, number: !["op", "format"].includes(name), of: (row) => String(row[name]) }));
  const reasons = new Map();
  for (const each of data.layers.filter((layer) => !layer.quantized)) {
    const why = each.reason === "fallen back" ? "taken back to float by its sensitivity" : each.reason || "it is no product";
    reasons.set(why, [...(reasons.get(why) || []), each]);
  }
  const name = (each) => h("div", {}, h("button", { type: "button", class: "plain mono", onclick: () => open(each.name) }, breaking(each.name)),
    each.share >= 0.0005 ? h("span", { class: "soft" }, ` ${percent(each.share)}`) : null);
  const inFloat = [...reasons].map(([why, layers]) => {
    const work = sum(layers.map((each) => each.share));
    const text = `${plural(layers.length, "layer")}${work >= 0.0005 ? `, ${percent(work)} of the work` : ""}`;
    return h("div", {}, h("h3", { class: "wrap" }, why), h("div", { class: "soft" }, text), layers.slice(0, 5).map(name),
      layers.length > 5 ? h("details", {}, h("summary", {}, `${layers.length - 5} more`), layers.slice(5).map(name)) : null);
  });
  const outside = data.outside.length ? [h("h3", {}, "Not captured as graphs; what multiplies there is in float"),
    table([{ name: "module", of: (row) => row.module }, { name: "why", of: (row) => row.why }], data.outside)] : [];
  return section("coverage", "What is quantized", `${data.backend}: ${data.summary}`,
    table(columns, data.by_op),
    inFloat.length ? h("h2", { id: "float" }, "What is in float, and why") : h("p", {}, "Nothing that multiplies is in float."),
    inFloat.length ? h("div", { class: "two" }, inFloat) : null, outside,
    data.notes.map((each) => h("p", { class: "soft" }, each)));
}

function errorSection(open) {
  const layers = data.layers.filter((each) => each.error), { comparison } = data;
  const lead = `The float model and the quantized one ran side by side on ${plural(comparison.batches, "batch", "batches")}: how near the result of ` +
    "each layer is to float with everything before it quantized, and what the layer itself adds. " +
    `At the outputs: ${decibels(comparison.outputs)} on the kernels, ${decibels(comparison.simulated)} for the same plan in float arithmetic.` +
    (comparison.unseen ? ` ${plural(comparison.unseen, "layer has", "layers have")} no result of their own, or were not called.` : "");
  const worst = [...layers].sort((a, b) => b.error.adds - a.error.adds).slice(0, 5).filter((each) => each.error.adds > 0.0005);
  return section("error", "Where the error comes in", lead, layers.length ? errorChart(layers, open) : null,
    worst.length ? table([
      { name: "most comes in at", of: (each) => h("button", { type: "button", class: "plain mono", onclick: () => open(each.name) }, breaking(each.name)) },
      { name: "before", number: true, of: (each) => decibels(each.error.before) },
      { name: "after", number: true, of: (each) => decibels(each.error.after) },
      { name: "adds", number: true, of: (each) => percent(each.error.adds) }], worst) : null);
}

function sensitivitySection(open) {
  const layers = data.layers.filter((each) => each.sensitivity), { sensitivity } = data;
  const curve = fallbackCurve(sensitivity.curve), measured = sensitivity.curve.some((each) => Number.isFinite(each[2]));
  return section("sensitivity", "Sensitivity", `Ranked by: ${sensitivity.meaning}; ${plural(sensitivity.batches, "batch", "batches")}. ${sensitivity.note}`,
    h("div", { class: "two" },
      h("div", {}, legend(["quantized", "by activations"], ["weight", "by the weight"]), sensitivityBars(layers, open)),
      curve ? h("div", {}, legend(["quantized", "predicted"], ...(measured ? [["float", "measured"]] : [])), curve) : null));
}

function speedSection() {
  const { runs, threads, rounds } = data.speed, whole = runs[0].median;
  return section("speed", "Speed", `${plural(threads, "thread")}, ${plural(rounds, "call")} of each in turns.`, table([
    { name: "model", of: (each) => each.name + (each.this ? " (this report's)" : "") },
    { name: "median", number: true, of: (each) => (each.median == null ? "–" : `${short(each.median)} ms`) },
    { name: "90 % within", number: true, of: (each) => (each.p90 == null ? "–" : `${short(each.p90)} ms`) },
    { name: "times float32", number: true, of: (each) => (each.median && whole ? (whole / each.median).toFixed(2) : "–") },
    { name: "SQNR", number: true, of: (each) => (each.sqnr == null ? "–" : decibels(each.sqnr)) },
    ...(runs.some((each) => each.why_not) ? [{ name: "", of: (each) => each.why_not }] : [])], runs));
}

function settingsSection() {
  const fallen = data.layers.filter((each) => each.why === "fallen back" || each.why === "slower");
  const known = typeof data.settings !== "string";
  const text = known ? JSON.stringify(data.settings, null, 1) : data.settings;
  const lines = ["from torch_quant import Quantizer", "", 'quantizer = Quantizer.from_config("settings.json")  # what is below',
    `calib_model = quantizer.calib(model)  # run ${plural(data.calibration.batches, "batch", "batches")} of data through it`];
  for (const each of fallen) lines.push(`quantizer.set(${JSON.stringify(each.name)}, "float")  # ${each.why}`);
  lines.push(`quant_model = quantizer.quantize(model, backend=${JSON.stringify(data.backend)})`);
  const copy = (source) => h("button", { type: "button", onclick: async (event) => {
    const button = event.target;
    getSelection().selectAllChildren(source);
    try { await navigator.clipboard.writeText(source.textContent); button.textContent = "Copied"; }
    catch { button.textContent = "Selected: press Ctrl+C"; }
  } }, "Copy");
  const code = h("pre", { tabindex: 0 }, lines.join("\n")), settings = h("pre", { tabindex: 0 }, text);
  return section("settings", "The configuration", "",
    data.command ? [h("p", {}, "The command:"), h("pre", { tabindex: 0 }, data.command)] : null,
    h("p", {}, "In Python: ", copy(code)), code,
    known ? h("p", {}, "settings.json, which ", h("code", {}, "torch-quant quantize --config"), " reads too: ", copy(settings)) : h("p", {}, "These settings have no form as a file:"),
    settings);
}

(function start() {
  const layers = layerTable(data.layers), { made, calibration } = data;
  const parts = [factsSection(), coverageSection(layers.reveal)];
  if (data.comparison) parts.push(errorSection(layers.reveal));
  if (data.sensitivity) parts.push(sensitivitySection(layers.reveal));
  if (data.speed) parts.push(speedSection());
  parts.push(section("layers", "Layers", "", h("p", { class: "soft keys" }, h("kbd", {}, "/"), " searches, ", h("kbd", {}, "↑"), " ", h("kbd", {}, "↓"),
    " move, ", h("kbd", {}, "→"), " or ", h("kbd", {}, "Enter"), " opens, ", h("kbd", {}, "←"), " closes. A column's name sorts by it."), layers.element));
  parts.push(settingsSection());
  const names = { coverage: "What is quantized", error: "Error", sensitivity: "Sensitivity", speed: "Speed", layers: "Layers", settings: "Configuration" };
  const nav = h("nav", { "aria-label": "sections" }, parts.filter((each) => names[each.id]).map((each) =>
    h("a", { href: `#${each.id}` }, names[each.id])));
  const seen = calibration.batches ? `calibrated on ${plural(calibration.batches, "batch", "batches")} (${calibration.observers.join(", ")})` : "not calibrated on data";
  document.getElementById("top").append(
    h("div", {}, h("h1", {}, data.title), h("div", { class: "soft wrap" }, `${data.model} on ${data.backend}, ${seen}`)), themeSwitch());
  document.getElementById("main").replaceChildren(nav, ...parts);
  document.getElementById("foot").append(`Made ${made.date} by torch_quant ${made.torch_quant} with torch ${made.torch} on ${made.machine}.`);
  document.documentElement.dataset.ready = "true";
})();
