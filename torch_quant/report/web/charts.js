// The figures that show all layers at once.

/** Draws into `holder` anew whenever its width changes. */
function responsive(holder, draw) {
  let last = 0;
  const redraw = () => {
    const width = Math.floor(holder.clientWidth);
    if (!width || width === last) return;
    last = width;
    holder.replaceChildren(draw(width));
  };
  new ResizeObserver(redraw).observe(holder);
  return holder;
}

/** A scale from numbers to pixels. */
const line = (low, high, from, to) => (x) => from + ((x - low) / (high - low || 1)) * (to - from);

/** The SQNR of each layer's result along the model, and what each adds. */
function errorChart(layers, open) {
  const known = layers.map((each) => each.error.after).filter(Number.isFinite);
  // What is far above the rest is as good as float, and would flatten all else.
  const low = Math.min(...known, 20), high = Math.min(Math.max(...known, low + 10), Math.max(low + 30, 60));
  const most = Math.max(...layers.map((each) => each.error.adds), 1e-9);
  const readout = h("div", { class: "readout soft" }, "Point at a layer, or focus the figure and press ← and →; Enter opens it.");
  let chosen = -1, show = () => {};
  const tell = (i) => {
    chosen = Math.min(Math.max(i, 0), layers.length - 1);
    const { name, format, error } = layers[chosen];
    readout.replaceChildren(h("span", { class: "mono" }, name), ` (${format}): before ${decibels(error.before)}, ` +
      `after ${decibels(error.after)}, adds ${percent(error.adds)}`);
    show(chosen);
  };
  const draw = (width) => {
    const left = 40, right = width - 8, top = 22, middle = 160, bottom = 246;
    const x = line(-0.5, layers.length - 0.5, left, right);
    const y = (v) => Math.max(line(low, high, middle, top)(v), top - 4), z = line(0, most, bottom, middle + 24);
    const svg = s("svg", { class: "chart", width, height: 266, role: "img", tabindex: 0,
      "aria-label": "SQNR of the result of each layer, and what each layer adds" });
    for (const at of ticks(low, high, 4)) {
      svg.append(s("path", { class: "axis", d: `M${left} ${y(at)}H${right}` }),
        s("text", { x: left - 6, y: y(at) + 4, "text-anchor": "end" }, String(at)));
    }
    svg.append(s("text", { x: left, y: 10 }, "SQNR of the result, dB"),
      s("text", { x: left, y: middle + 18 }, `adds, up to ${percent(most)}`));
    let path = "", pen = "M";
    layers.forEach((each, i) => {
      if (!Number.isFinite(each.error.after)) { pen = "M"; return; }
      path += `${pen}${x(i).toFixed(1)} ${y(each.error.after).toFixed(1)}`;
      pen = "L";
    });
    svg.append(s("path", { class: "curve", d: path }));
    const wide = Math.max(((right - left) / layers.length) * 0.8, 1);
    layers.forEach((each, i) => {
      if (Number.isFinite(each.error.after) && layers.length <= 200) {
        svg.append(s("circle", { class: "dot", cx: x(i), cy: y(each.error.after), r: 2 }));
      }
      if (each.error.adds > 0) {
        const up = z(each.error.adds);
        svg.append(s("rect", { class: "bad", x: x(i) - wide / 2, y: up, width: wide, height: bottom - up }));
      }
    });
    svg.append(s("path", { class: "axis", d: `M${left} ${bottom}H${right}` }),
      s("text", { x: left, y: bottom + 16 }, "first layer"),
      s("text", { x: right, y: bottom + 16, "text-anchor": "end" }, "last layer"));
    const cursor = s("path", { class: "cursor", d: "" });
    svg.append(cursor);
    show = (i) => cursor.setAttribute("d", `M${x(i)} ${top}V${bottom}`);
    const at = (event) => Math.round(((event.clientX - svg.getBoundingClientRect().left - left) / (right - left)) * layers.length - 0.5);
    svg.addEventListener("pointermove", (event) => tell(at(event)));
    svg.addEventListener("click", (event) => { tell(at(event)); open(layers[chosen].name); });
    svg.addEventListener("keydown", (event) => {
      const moves = { ArrowLeft: chosen - 1, ArrowRight: chosen + 1, Home: 0, End: layers.length - 1 };
      if (event.key in moves) tell(moves[event.key]);
      else if (event.key === "Enter" && chosen >= 0) open(layers[chosen].name);
      else return;
      event.preventDefault();
    });
    if (chosen >= 0) show(chosen);
    return svg;
  };
  return h("div", {}, responsive(h("div"), draw), readout);
}

/** The most sensitive layers as bars, split by weight and activations. */
function sensitivityBars(layers, open) {
  const worst = [...layers].sort((a, b) => b.sensitivity.share - a.sensitivity.share).slice(0, 15);
  const most = worst[0].sensitivity.share || 1;
  return h("div", { class: "bars" }, worst.map((each) => {
    const { share, by_weight } = each.sensitivity;
    return [
      h("button", { type: "button", class: "plain mono", onclick: () => open(each.name) }, breaking(each.name)),
      h("div", { class: "track", title: `${percent(by_weight)} by the weight` },
        part("quantized", (share / most) * (1 - by_weight)), part("weight", (share / most) * by_weight)),
      h("div", { class: "value" }, percent(share)),
    ];
  }));
}

/** What falling back buys: output SQNR against how many of the worst are in float. */
function fallbackCurve(points) {
  const predicted = points.filter(([, sqnr]) => Number.isFinite(sqnr));
  const measured = points.filter(([, , sqnr]) => Number.isFinite(sqnr)).map(([n, , sqnr]) => [n, sqnr]);
  const all = [...predicted, ...measured].map(([, sqnr]) => sqnr);
  if (!all.length) return null;
  const low = Math.min(...all), high = Math.max(...all), last = Math.max(...points.map(([n]) => n), 1);
  return responsive(h("div"), (width) => {
    const left = 40, right = width - 8, x = line(0, last, left, right), y = line(low, high, 160, 22);
    const svg = s("svg", { width, height: 200, role: "img",
      "aria-label": "output SQNR against the number of layers in float" });
    for (const at of ticks(low, high, 4)) {
      svg.append(s("path", { class: "axis", d: `M${left} ${y(at)}H${right}` }),
        s("text", { x: left - 6, y: y(at) + 4, "text-anchor": "end" }, String(at)));
    }
    for (const at of ticks(0, last, 5).filter(Number.isInteger)) {
      svg.append(s("text", { x: x(at), y: 177, "text-anchor": "middle" }, String(at)));
    }
    svg.append(s("path", { class: "curve", d: predicted.map(([n, v], i) => `${i ? "L" : "M"}${x(n).toFixed(1)} ${y(v).toFixed(1)}`).join("") }));
    for (const [n, v] of measured) svg.append(s("circle", { class: "measured", cx: x(n), cy: y(v), r: 4 }));
    svg.append(s("text", { x: (left + right) / 2, y: 195, "text-anchor": "middle" }, "of the worst in float"),
      s("text", { x: left, y: 10 }, "output SQNR, dB"));
    return svg;
  });
}
