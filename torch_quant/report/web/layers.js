// The layers: a tree by module, or a list that can be sorted, with a search and the keyboard.

/** The tree of modules, chains of single children joined. */
function treeOf(layers) {
  const root = { path: "", label: "", children: new Map(), layer: null };
  for (const layer of layers) {
    let node = root;
    for (const name of layer.name.split(".")) {
      if (!node.children.has(name)) {
        node.children.set(name, { path: node.path ? `${node.path}.${name}` : name, label: name, children: new Map(), layer: null });
      }
      node = node.children.get(name);
    }
    if (node.layer) node.children.set(Symbol("twin"), { path: layer.name, label: `(${layer.op})`, children: new Map(), layer });
    else node.layer = layer;
  }
  const finish = (node, level, parent) => {
    node.children = [...node.children.values()];
    while (!node.layer && node.children.length === 1 && parent) {
      const [only] = node.children;
      node.label += `.${only.label}`;
      node.path = only.path;
      node.layer = only.layer;
      node.children = [...only.children.values()];
    }
    node.level = level;
    node.parent = parent;
    node.children.forEach((each) => finish(each, level + 1, node));
    const own = node.layer ? [node.layer] : [];
    node.layers = [...own, ...node.children.flatMap((each) => each.layers)];
    return node;
  };
  return finish(root, 0, null);
}

/** Gives `holder` these children, and touches only what is not in its place. */
function arrange(holder, wanted) {
  const kept = new Set(wanted);
  for (const each of [...holder.children]) if (!kept.has(each)) each.remove();
  let at = holder.firstElementChild;
  for (const each of wanted) {
    if (each === at) at = at.nextElementSibling;
    else holder.insertBefore(each, at);
  }
}

const sum = (values) => values.reduce((a, b) => a + b, 0);
const FEW = 60;
const PLACES = { nan: -2e9, "-inf": -1e9, inf: 1e9 }; // in order of SQNR

function layerTable(layers) {
  const root = treeOf(layers), open = new Set(), shut = new Set(), shown = new Set(), rows = new Map(), panels = new Map();
  const error = layers.some((each) => each.error), sensitive = layers.some((each) => each.sensitivity);
  const mostWork = Math.max(...layers.map((each) => each.share), 1e-9);
  const mostAdded = Math.max(...layers.map((each) => (each.error ? each.error.adds : 0)), 1e-9);
  const mostSensitive = Math.max(...layers.map((each) => (each.sensitivity ? each.sensitivity.share : 0)), 1e-9);
  let view = "tree", words = [], only = "all", sorted = null, visible = [], current = null;

  const meter = (share, whole, kind) => h("div", { class: "meter" }, h("b", {}, percent(share)),
    h("div", { class: "track" }, part(kind, share / whole)));
  const columns = [
    { name: "operator", label: "", by: (x) => x.op, of: (x) => h("span", { title: x.op }, x.op.length > 14 && x.op.includes("attention") ? "attention" : x.op) },
    { name: "format", label: "", by: (x) => x.format, of: (x) => h("span", { class: `tag ${x.quantized ? "quantized" : "float"}`, title: x.reason }, x.format.replace(" weights", " w").replace(" activations", " a")) },
    { name: "work", label: "work", by: (x) => -x.share, of: (x) => meter(x.share, mostWork, x.quantized ? "quantized" : "float") },
    ...(error ? [
      { name: "SQNR", label: "", by: (x) => (x.error ? PLACES[x.error.after] ?? x.error.after : 2e9), of: (x) => (x.error ? decibels(x.error.after) : "") },
      { name: "adds", label: "adds", by: (x) => (x.error ? -x.error.adds : 1), of: (x) => (x.error && x.error.adds >= 0.0005 ? meter(x.error.adds, mostAdded, "bad") : "") },
    ] : []),
    ...(sensitive ? [{ name: "sensitivity", label: "noise", by: (x) => (x.sensitivity ? -x.sensitivity.share : 1), of: (x) => (x.sensitivity ? meter(x.sensitivity.share, mostSensitive, "weight") : "") }] : []),
    { name: "values", label: "", by: null, of: () => "" },
  ];

  const pictures = new IntersectionObserver((entries) => {
    for (const { target, isIntersecting } of entries) {
      if (!isIntersecting) continue;
      pictures.unobserve(target);
      const picture = sparkline(target.node.layer);
      if (picture) target.lastElementChild.replaceChildren(picture);
    }
  }, { rootMargin: "200px" });

  /** What a row of a module says: how much of its work is quantized. */
  const moduleCells = (node) => {
    const work = sum(node.layers.map((each) => each.share));
    const quantized = sum(node.layers.filter((each) => each.quantized).map((each) => each.share));
    const kept = node.layers.filter((each) => each.quantized).length;
    const bar = h("div", { class: "meter", title: `${percent(quantized)} of all work is quantized here` }, h("b", {}, percent(work)),
      h("div", { class: "track" }, part("quantized", quantized), part("float", work - quantized)));
    const cells = [plural(node.layers.length, "layer"), `${kept} of ${node.layers.length} quantized`, bar];
    if (error) {
      const adds = sum(node.layers.map((each) => (each.error ? each.error.adds : 0)));
      cells.push("", adds >= 0.0005 ? h("div", { class: "meter" }, h("b", {}, percent(adds)), h("div", { class: "track" }, part("bad", adds))) : "");
    }
    if (sensitive) {
      const noise = sum(node.layers.map((each) => (each.sensitivity ? each.sensitivity.share : 0)));
      cells.push(h("div", { class: "meter" }, h("b", {}, percent(noise)), h("div", { class: "track" }, part("weight", noise))));
    }
    return [...cells, ""];
  };

  const rowOf = (node) => {
    if (rows.has(node)) return rows.get(node);
    const { layer } = node, cells = layer ? columns.map((each) => each.of(layer)) : moduleCells(node);
    const name = h("div", { class: layer ? "name mono" : "name module mono", role: "gridcell", title: node.path });
    name.append(h("span", { class: "turn", "aria-hidden": "true" }), h("span"));
    const row = h("div", { class: "row", role: "row", tabindex: -1 }, name,
      cells.map((each, i) => h("div", { role: "gridcell", "data-label": columns[i].label }, each)));
    row.node = node;
    if (layer) pictures.observe(row);
    rows.set(node, row);
    return row;
  };
  const panelOf = (node) => {
    if (!panels.has(node)) panels.set(node, h("div", { role: "row" }, h("div", { role: "gridcell" }, details(node.layer))));
    return panels.get(node);
  };

  const matches = (layer) => {
    if (only === "quantized" && !layer.quantized) return false;
    if (only === "float" && layer.quantized) return false;
    const text = `${layer.name} ${layer.op} ${layer.format} ${layer.reason}`.toLowerCase();
    return words.every((word) => text.includes(word));
  };
  const isOpen = (node) => (filtered() ? !shut.has(node) : open.has(node));
  const filtered = () => words.length || only !== "all";

  /** The nodes in view, from above. */
  const listed = () => {
    if (view === "list") {
      const nodes = [];
      const walk = (node) => { if (node.layer && matches(node.layer)) nodes.push(node); node.children.forEach(walk); };
      walk(root);
      const place = new Map(layers.map((each, i) => [each, i]));
      const by = sorted && columns.find((each) => each.name === sorted.name);
      const key = by ? (node) => by.by(node.layer) : sorted ? (node) => node.layer.name : (node) => place.get(node.layer);
      const compare = (a, b) => (key(a) < key(b) ? -1 : key(a) > key(b) ? 1 : place.get(a.layer) - place.get(b.layer));
      nodes.sort(compare);
      return sorted && sorted.down ? nodes.reverse() : nodes;
    }
    const nodes = [];
    const walk = (node) => {
      if (filtered() && !node.layers.some(matches)) return;
      if (node.parent) nodes.push(node);
      if (!node.parent || isOpen(node)) node.children.forEach(walk);
    };
    walk(root);
    return nodes;
  };

  const body = h("div", { class: "body", role: "rowgroup" });
  const status = h("span", { class: "soft", role: "status" });
  const heads = ["layer", ...columns.map((each) => each.name)].map((name) => {
    const can = name === "layer" || columns.find((each) => each.name === name).by;
    return h("div", { role: "columnheader" }, can ? h("button", { type: "button", title: `sort by ${name}`, onclick: () => sort(name) }, name) : name);
  });

  const render = () => {
    visible = listed();
    if (!visible.includes(current)) current = visible[0] || null;
    const parts = [];
    for (const node of visible) {
      const row = rowOf(node), tree = view === "tree";
      const inside = tree && node.children.length > 0;
      const expanded = inside ? isOpen(node) : shown.has(node);
      const state = `${tree} ${expanded} ${node === current}`;
      if (row.state !== state) {
        row.state = state;
        row.setAttribute("aria-expanded", String(expanded));
        row.setAttribute("aria-level", tree ? node.level : 1);
        row.tabIndex = node === current ? 0 : -1;
        const [turn, label] = row.firstElementChild.children;
        turn.textContent = expanded ? "▾" : "▸";
        label.replaceChildren(...breaking(tree ? node.label : node.layer.name));
        row.firstElementChild.style.paddingLeft = tree ? `${Math.min(node.level - 1, 12) * 0.9}rem` : "0";
      }
      parts.push(row);
      if (shown.has(node) && node.layer) parts.push(panelOf(node));
    }
    arrange(body, parts.length ? parts : [h("div", { class: "none" }, "No layer matches: clear the search, or show all.")]);
    const found = layers.filter(matches).length;
    status.textContent = filtered() ? `${found} of ${plural(layers.length, "layer")}` : plural(layers.length, "layer");
    heads.forEach((each, i) => {
      const name = i ? columns[i - 1].name : "layer", here = view === "list" && sorted && sorted.name === name;
      each.setAttribute("aria-sort", here ? (sorted.down ? "descending" : "ascending") : "none");
      if (each.firstElementChild) each.firstElementChild.textContent = here ? `${name} ${sorted.down ? "▾" : "▴"}` : name;
    });
    [...views.children].forEach((each) => each.setAttribute("aria-pressed", String(each.textContent.toLowerCase() === view)));
    [...filters.children].forEach((each) => each.setAttribute("aria-pressed", String(each.name === only)));
  };
  const focus = (node) => {
    if (!node) return;
    if (current && rows.has(current)) rows.get(current).tabIndex = -1;
    current = node;
    const row = rowOf(node);
    row.state = null;
    row.tabIndex = 0;
    row.focus();
    row.scrollIntoView({ block: "nearest" });
  };
  const toggle = (node, wanted) => {
    const inside = view === "tree" && node.children.length > 0;
    const now = wanted === undefined ? !(inside ? isOpen(node) : shown.has(node)) : wanted;
    const put = (set, in_) => (in_ ? set.add(node) : set.delete(node));
    if (inside && filtered()) put(shut, !now);
    else put(inside ? open : shown, now);
    if (now) for (let each = node.parent; each; each = each.parent) open.add(each);
    if (inside && node.layer) { if (now) shown.add(node); else shown.delete(node); }
    render();
    focus(node);
  };
  const sort = (name) => {
    sorted = view === "list" && sorted && sorted.name === name ? { name, down: !sorted.down } : { name, down: false };
    view = "list";
    render();
  };
  /** Open a layer and bring it into view. */
  const reveal = (name) => {
    words = []; only = "all"; search.value = "";
    const find = (node) => (node.layer && node.layer.name === name ? node : node.children.map(find).find(Boolean));
    const node = find(root);
    for (let each = node.parent; each; each = each.parent) open.add(each);
    shown.add(node);
    render();
    focus(node);
    rowOf(node).scrollIntoView({ block: "start" });
  };

  const search = h("input", { type: "search", placeholder: "Search layers, operators, formats, reasons  ( / )", "aria-label": "search layers", "aria-keyshortcuts": "/",
    oninput: () => { shut.clear(); words = search.value.toLowerCase().split(/\s+/).filter(Boolean); render(); },
    onkeydown: (event) => {
      if (event.key === "Escape") { search.value = ""; words = []; render(); }
      else if (event.key === "ArrowDown") { event.preventDefault(); focus(visible[0]); }
      else if (event.key === "Enter") { const first = visible.find((each) => each.layer); if (first) toggle(first, true); }
    } });
  const views = h("div", { class: "group", role: "group", "aria-label": "arrangement" }, ["Tree", "List"].map((name) =>
    h("button", { type: "button", onclick: () => { view = name.toLowerCase(); sorted = null; render(); } }, name)));
  const filters = h("div", { class: "group", role: "group", "aria-label": "which layers" }, [["all", "All"], ["quantized", "Quantized"], ["float", "In float"]].map(([kind, text]) =>
    h("button", { type: "button", name: kind, onclick: () => { only = kind; shut.clear(); render(); } }, text)));
  const all = (wanted) => () => {
    const walk = (node) => { if (wanted && node.children.length) open.add(node); node.children.forEach(walk); };
    open.clear(); shown.clear(); view = "tree";
    walk(root);
    render();
  };
  const log = h("input", { type: "checkbox", checked: true, onchange: () => {
    logarithmic = log.checked;
    panels.clear();
    for (const [node, row] of rows) if (node.layer) pictures.observe(row);
    render();
  } });

  body.addEventListener("click", (event) => {
    const row = event.target.closest(".row");
    if (row && !String(getSelection()).length) toggle(row.node);
  });
  body.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || !event.target.classList.contains("row")) return;
    const node = event.target.node, at = visible.indexOf(node), inside = view === "tree" && node.children.length > 0;
    const now = inside ? isOpen(node) : shown.has(node);
    const act = {
      ArrowDown: () => focus(visible[at + 1]), ArrowUp: () => (at ? focus(visible[at - 1]) : search.focus()),
      Home: () => focus(visible[0]), End: () => focus(visible.at(-1)),
      Enter: () => toggle(node), " ": () => toggle(node),
      ArrowRight: () => (now && inside ? focus(visible[at + 1]) : toggle(node, true)),
      ArrowLeft: () => (now ? toggle(node, false) : node.parent && node.parent.parent && view === "tree" ? focus(node.parent) : null),
    }[event.key];
    if (!act) return;
    event.preventDefault();
    act();
  });
  document.addEventListener("keydown", (event) => {
    if (event.key !== "/" || event.ctrlKey || event.metaKey || /^(INPUT|TEXTAREA|SELECT)$/.test(event.target.tagName)) return;
    event.preventDefault();
    search.focus();
    search.select();
  });

  // Open what fits into a page or two.
  for (let wave = root.children, total = wave.length; wave.length; ) {
    const next = wave.flatMap((each) => each.children);
    total += next.length;
    if (total > FEW && wave !== root.children) break;
    if (total > FEW * 3) break;
    wave.forEach((each) => each.children.length && open.add(each));
    wave = next;
  }
  const element = h("div", {},
    h("div", { class: "tools" }, search, views, filters,
      h("button", { type: "button", onclick: all(true) }, "Open all"), h("button", { type: "button", onclick: all(false) }, "Close all"),
      h("label", {}, log, "log counts"), status),
    h("div", { class: "grid", role: "treegrid", "aria-label": "layers" },
      h("div", { role: "rowgroup" }, h("div", { class: "row head", role: "row" }, heads)), body));
  element.querySelector(".grid").style.setProperty("--wide", ["minmax(13rem, 1fr)", "7.5rem", "8.5rem", "8rem",
    ...(error ? ["5rem", "7.5rem"] : []), ...(sensitive ? ["8rem"] : []), "100px"].join(" "));
  render();
  return { element, reveal };
}
