// What is shown of one layer: its figures, and the values on their grid.

let logarithmic = true;

/** Heights of bars for counts, 0 to 1. */
function heights(counts) {
  const most = Math.max(...counts, 1);
  const high = (n) => (logarithmic ? Math.log1p(n) / Math.log1p(most) : n / most);
  return counts.map(high);
}

/** The numbers that the levels of a grid stand for; none where they are too many to be told apart. */
function levelsOf(grid) {
  if (grid.scale == null || grid.levels > 256) return [];
  if (grid.values) return grid.values.map((each) => each * grid.scale);
  return Array.from({ length: grid.levels }, (_, i) => grid.low + i * grid.scale);
}

/** An activation: counts of its values, and the grid that they are rounded to. */
function activationFigure(each) {
  const { grid, histogram, seen } = each, behind = each.behind !== "";
  const ends = [grid.low, grid.high];
  if (histogram) ends.push(histogram.low, histogram.low + histogram.width * histogram.counts.length);
  if (seen && !behind) ends.push(...seen);
  const low = Math.min(...ends), high = Math.max(...ends), margin = (high - low) * 0.02 || 1;
  const draw = (width) => {
    const left = 6, right = width - 6, top = 8, floor = 118;
    const x = line(low - margin, high + margin, left, right);
    const svg = s("svg", { width, height: 150, role: "img",
      "aria-label": `values of ${each.tensor} on the grid from ${short(grid.low)} to ${short(grid.high)}` });
    svg.append(s("rect", { class: "band", x: x(grid.low), y: top, width: Math.max(x(grid.high) - x(grid.low), 1), height: floor - top }));
    if (histogram) {
      const tall = heights(histogram.counts), wide = x(histogram.width) - x(0);
      tall.forEach((share, i) => {
        if (!share) return;
        const at = histogram.low + i * histogram.width;
        const out = at + histogram.width < grid.low || at > grid.high;
        const up = Math.max(share * (floor - top - 6), 1);
        svg.append(s("rect", { class: out ? "out" : "bar", x: x(at), y: floor - up, width: Math.max(wide - (wide > 4 ? 1 : 0), 0.5), height: up }));
      });
    } else if (seen && !behind) {
      svg.append(s("path", { class: "seen", d: `M${x(seen[0])} 50v12m0 -6H${x(seen[1])}m0 -6v12` }));
    }
    const levels = levelsOf(grid);
    const marks = levels.map((value) => `M${x(value).toFixed(2)} ${floor}v6`).join("");
    svg.append(s("path", { class: "levels", d: marks || `M${x(grid.low)} ${floor + 3}H${x(grid.high)}` }),
      s("path", { class: "axis", d: `M${left} ${floor}H${right}` }));
    for (const at of ticks(low, high, Math.max(width / 110, 2))) {
      svg.append(s("text", { x: x(at), y: floor + 22, "text-anchor": "middle" }, short(at)));
    }
    return svg;
  };
  const step = grid.scale == null ? `${grid.scales} scales` : `${grid.values ? "scale" : "steps of"} ${short(grid.scale)}`;
  const facts = [`${grid.element}: ${short(grid.low)} to ${short(grid.high)}, ${grid.levels} levels, ${step}`];
  if (grid.zero_point) facts[0] += `, 0 is code ${grid.zero_point}`;
  if (seen) facts.push(`calibration (${each.observer}) saw ${short(seen[0])} to ${short(seen[1])}${behind ? " before the transform" : ""}`);
  if (each.clipped > 0) facts.push(`${each.clipped < 0.0005 ? "under 0.1%" : percent(each.clipped)} of the values lie beyond the grid`);
  facts.push(histogram ? `counts: ${each.counted === "calibration" ? "of calibration" : "of the report's batches"}`
    : "no counts: report(..., batches=[...]) or a histogram observer gives them");
  return h("figure", {},
    h("figcaption", {}, "input ", h("span", { class: "mono" }, each.tensor), behind ? ` behind ${each.behind.slice(1, -1)}` : "",
      h("div", { class: "soft" }, facts.join("; "))),
    responsive(h("div"), draw));
}

/** A weight: how often each code is used. */
function weightFigure(weight) {
  const { codes } = weight;
  const draw = (width) => {
    const left = 6, right = width - 6, floor = 88, x = line(0, codes.counts.length, left, right);
    const svg = s("svg", { width, height: 112, role: "img", "aria-label": "how often each code of the weight is used" });
    heights(codes.counts).forEach((share, i) => {
      const up = share * (floor - 8);
      if (share) svg.append(s("rect", { class: "weight", x: x(i), y: floor - up, width: Math.max(x(1) - x(0) - 1, 0.5), height: up }));
    });
    svg.append(s("path", { class: "axis", d: `M${left} ${floor}H${right}` }),
      s("text", { x: left, y: floor + 16 }, short(codes.low)),
      s("text", { x: right, y: floor + 16, "text-anchor": "end" }, short(codes.high)));
    return svg;
  };
  const [least, , median, , most] = weight.scale;
  const scales = weight.scales === 1 ? `scale ${short(median)}` : `${plural(weight.scales, "scale")} from ${short(least)} to ${short(most)}, median ${short(median)}`;
  return h("figure", {},
    h("figcaption", {}, "codes of the weight",
      h("div", { class: "soft" }, `${weight.shape.join(" × ")}, ${weight.format}; ${scales}; ` +
        `${weight.used} of ${weight.levels} codes used, ${percent(weight.ends)} at the two ends`)),
    responsive(h("div"), draw));
}

/** All that is known of one layer. */
function details(layer) {
  const facts = [["layer", h("span", { class: "mono" }, layer.name)], ["operator", layer.op], ["format", layer.format]];
  if (layer.reason) facts.push(["in float since", layer.reason]);
  if (layer.activation) facts.push(["activations", layer.activation]);
  if (layer.method) facts.push(["weight rounded by", layer.method]);
  if (layer.transforms.length) facts.push(["transforms", layer.transforms.join(", ")]);
  if (layer.macs) facts.push(["work", `${count(layer.macs)} multiply-accumulates, ${percent(layer.share)} of the model's`]);
  const { error, sensitivity } = layer;
  if (error) facts.push(["against float", `before ${decibels(error.before)}, after ${decibels(error.after)}; adds ${percent(error.adds)} of all that is added`]);
  if (sensitivity) {
    const alone = sensitivity.output == null ? "" : `; ${decibels(sensitivity.output)} at the outputs if it alone is quantized`;
    facts.push(["sensitivity", `${percent(sensitivity.share)} of the noise, ${percent(sensitivity.by_weight)} of that by the weight${alone}`]);
    if (sensitivity.together.length) facts.push(["falls back with", sensitivity.together.join(", ")]);
  }
  const figures = [...layer.inputs.map(activationFigure), ...(layer.weight ? [weightFigure(layer.weight)] : [])];
  if (!figures.length && layer.quantized) {
    figures.push(h("p", { class: "soft" }, "No grid is fixed: scales are chosen at each call."));
  }
  return h("div", { class: "details", role: "region", "aria-label": `details of ${layer.name}` },
    h("dl", {}, facts.map(([name, text]) => [h("dt", {}, name), h("dd", {}, text)])),
    layer.inputs.length ? legend(["quantized", "values"], ["bad", "beyond the grid"], ["band", "the grid; ticks are its levels"]) : null,
    figures);
}

/** A small picture of a layer's values, for its row. */
function sparkline(layer) {
  const found = layer.inputs.find((each) => each.histogram);
  const counts = found ? found.histogram.counts : layer.weight ? layer.weight.codes.counts : null;
  if (!counts) return null;
  const tall = heights(counts), step = 100 / tall.length;
  const path = tall.map((share, i) => `L${(i * step).toFixed(1)} ${(20 - 19 * share).toFixed(1)}h${step.toFixed(1)}`).join("");
  return s("svg", { width: 100, height: 20, "aria-hidden": "true" },
    s("path", { class: found ? "bar" : "weight", d: `M0 20${path}V20Z` }));
}
