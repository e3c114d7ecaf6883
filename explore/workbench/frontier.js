// An interactive frontier: any quantity on either axis, and details of every run. Python computes all numbers.

const PAD = { left: 70, right: 16, top: 14, bottom: 46 }, HEIGHT = 440, NEAR = 22, R = 5;

function render({ model, el }) {
  const data = model.get("data");
  const { axes, families, letters } = data;
  const rows = data.rows.map((row, i) => ({ ...row, i }));
  const named = new Map(rows.map((row) => [row.run, row]));
  const children = new Map(rows.map((row) => [row.run, []]));
  for (const row of rows) for (const [kind, run] of Object.entries(row.parents)) children.get(run).push([kind, row.run]);
  const seeds = [...new Set(rows.map((row) => row.seed))].sort((a, b) => a - b);
  const corpora = [...new Set(rows.map((row) => row.data))].map((name) => [name, rows.filter((row) => row.data === name).length])
    .sort((a, b) => b[1] - a[1]);
  const repeated = new Set(rows.map((row) => row.point)).size < rows.length;
  const hasLinks = rows.some((row) => Object.keys(row.parents).length);
  const view = { x: data.start.x, y: data.start.y, log: {}, off: new Set(), seedsOff: new Set(), means: false,
    corpus: corpora[0]?.[0] ?? "", links: true, zoom: null, selected: model.get("selected") ?? [], hover: null };
  let shown = [], scales = null, width = 0, drag = null, sent = 0;

  const options = () => [...new Set(Object.values(axes).map((axis) => axis.kind))].map((kind) =>
    h("optgroup", { label: kind }, Object.entries(axes).filter(([, axis]) => axis.kind === kind)
      .map(([name, axis]) => h("option", { value: name }, axis.label))));
  const pick = (which, title) => h("select", { "data-axis": which, "aria-label": title,
    onchange: (event) => { view[which] = event.currentTarget.value; view.zoom = null; draw(); } }, options());
  const logOf = (which) => h("input", { type: "checkbox", "data-log": which, "aria-label": `logarithmic ${which} axis`,
    onchange: (event) => { view.log[view[which]] = event.currentTarget.checked; view.zoom = null; draw(); } });
  const selects = { x: pick("x", "horizontal axis"), y: pick("y", "vertical axis") };
  const logs = { x: logOf("x"), y: logOf("y") };
  const swap = h("button", { type: "button", title: "swap the axes",
    onclick: () => { [view.x, view.y, view.zoom] = [view.y, view.x, null]; draw(); } }, "⇄");
  const corpus = corpora.length < 2 ? null : h("label", {}, "Data ", h("select", { "data-corpus": "",
    onchange: (event) => { view.corpus = event.currentTarget.value; view.zoom = null; draw(); } },
    corpora.map(([name, n]) => h("option", { value: name }, `${name || "none"} (${n})`)),
    h("option", { value: "*" }, `all (${rows.length})`)));
  const toggle = (title, name, pressed, onclick, ...content) => h("button", { type: "button", class: "fr-toggle", title,
    "data-toggle": name, "aria-pressed": pressed, onclick }, ...content);
  const means = !repeated ? null : toggle(`means over seeds, with ${100 * data.level}% intervals of equal points`, "means", false,
    () => { view.means = !view.means; view.zoom = null; draw(); }, "Means over seeds");
  const links = !hasLinks ? null : toggle("lines from parents and teachers to the runs trained from them", "links", true,
    () => { view.links = !view.links; draw(); }, "Parents");
  const reset = h("button", { type: "button", "data-reset": "", title: "show all points", onclick: () => { view.zoom = null; draw(); } }, "Reset zoom");
  const flip = (set, each, all) => (event) => {
    if (event.shiftKey) { const only = all.filter((other) => other !== each); const same = only.every((o) => set.has(o)) && !set.has(each);
      set.clear(); if (!same) only.forEach((other) => set.add(other)); } else if (!set.delete(each)) set.add(each);
    view.zoom = null;
    draw();
  };
  const familyButtons = Object.keys(families).map((name) => toggle("show or hide this family; shift-click: only this one", name, true,
    flip(view.off, name, Object.keys(families)), mark(families[name]), name));
  const seedButtons = seeds.length < 2 ? [] : seeds.map((seed) => toggle("show or hide this seed; shift-click: only this one", `seed ${seed}`, true,
    flip(view.seedsOff, seed, seeds), seed === null ? "no seed" : `seed ${seed}`));
  const tally = h("span", { class: "fr-tally", role: "status" });
  const svg = svgOf("svg", { class: "fr-plot", tabindex: 0, role: "application", "data-lm-suppress-shortcuts": "true",
    "aria-label": "plot of runs: arrow keys move between points, Enter selects, Escape clears" });
  const back = svgOf("g", {}), marks = svgOf("g", { class: "fr-marks" }), above = svgOf("g", { class: "fr-above" });
  const clip = svgOf("clipPath", { id: `fr-clip-${Math.random().toString(36).slice(2)}` });
  const inside = svgOf("g", { "clip-path": `url(#${clip.id})` });
  inside.append(marks, above);
  svg.append(clip, back, inside);
  const tip = h("div", { class: "fr-tip", hidden: "" });
  const box = h("div", { class: "fr-box" }, svg, tip);
  const side = h("aside", { class: "fr-side", "aria-live": "polite" });
  const bench = h("div", { class: "fr-bench" });
  const root = h("div", { class: "fr" },
    h("div", { class: "fr-bar" }, h("label", {}, "x ", selects.x), h("label", {}, logs.x, " log"), swap,
      h("label", {}, "y ", selects.y), h("label", {}, logs.y, " log"), corpus, means, links, reset, h("span", { class: "fr-gap" }), tally),
    h("div", { class: "fr-bar fr-keys" }, familyButtons, seedButtons.length ? h("span", { class: "fr-gap" }) : null, seedButtons),
    h("div", { class: "fr-body" }, box, side), bench);
  el.replaceChildren(root);

  svg.addEventListener("pointermove", (event) => { if (drag) pull(event); else hover(nearest(event)); });
  svg.addEventListener("pointerleave", () => hover(null));
  svg.addEventListener("pointerdown", (event) => {
    if (event.button === 0) { drag = { ...place(event), moved: false, shift: event.shiftKey }; svg.setPointerCapture(event.pointerId); } });
  svg.addEventListener("pointerup", drop);
  svg.addEventListener("pointercancel", () => { drag = null; overlay(); });
  svg.addEventListener("dblclick", () => { view.zoom = null; draw(); });
  svg.addEventListener("keydown", key);
  const answered = () => showBench();
  const chosen = () => { const now = model.get("selected"); if (now.join() !== view.selected.join()) { view.selected = now; overlay(); } };
  model.on("change:bench", answered);
  model.on("change:selected", chosen);
  const resized = new ResizeObserver(() => { if (Math.abs(box.clientWidth - width) > 1) draw(); });
  resized.observe(box);
  draw();
  return () => { resized.disconnect(); model.off("change:bench", answered); model.off("change:selected", chosen); };

  // ---- points

  function isLog(which) {
    const name = view[which], axis = axes[name];
    return view.log[name] ?? (axis.log && axis.kind !== "Quality");
  }

  /** The points: runs, or means over the visible seeds. */
  function pointsOf() {
    const own = axes[view.x].own || axes[view.y].own;
    const on = rows.filter((row) => !view.off.has(row.family) && !view.seedsOff.has(row.seed) && view.x in row.values && view.y in row.values
      && (corpora.length < 2 || (view.corpus === "*" ? !own : row.data === view.corpus)));
    const made = !view.means ? on.map((row) => ({ rows: [row], x: row.values[view.x], y: row.values[view.y] }))
      : [...groupBy(on, (row) => row.point).values()].map((some) => ({ rows: some, x: mean(some, view.x), y: mean(some, view.y) }));
    return made.filter((point) => !(isLog("x") && point.x <= 0) && !(isLog("y") && point.y <= 0));
  }

  function mean(some, name) { return some.reduce((sum, row) => sum + row.values[name], 0) / some.length; }

  /** Half the interval of a point on an axis; 0 unless points are means over seeds. */
  function half(point, name) { return view.means ? (axes[name].half[point.rows[0].point] ?? 0) / Math.sqrt(point.rows.length) : 0; }

  function draw() {
    const began = performance.now();
    width = Math.max(280, box.clientWidth);
    shown = pointsOf();
    const [x0, x1] = view.zoom?.x ?? rangeOf(shown.flatMap((p) => [p.x - half(p, view.x), p.x + half(p, view.x)]), isLog("x"));
    const [y0, y1] = view.zoom?.y ?? rangeOf(shown.flatMap((p) => [p.y - half(p, view.y), p.y + half(p, view.y)]), isLog("y"));
    scales = { x: scaleOf(x0, x1, PAD.left, width - PAD.right, isLog("x")), y: scaleOf(y0, y1, HEIGHT - PAD.bottom, PAD.top, isLog("y")) };
    for (const point of shown) [point.px, point.py] = [scales.x.of(point.x), scales.y.of(point.y)];
    const better = (which) => axes[view[which]].better;
    const front = better("x") || better("y") ? frontOf(shown, axes[view.x].sign, axes[view.y].sign) : [];
    const best = new Set(front);
    for (const point of shown) point.best = best.has(point);
    drawAxes();
    drawMarks(front);
    for (const which of ["x", "y"]) { selects[which].value = view[which]; logs[which].checked = isLog(which); }
    if (corpus) corpus.querySelector("option[value='*']").disabled = axes[view.x].own || axes[view.y].own;
    familyButtons.forEach((button) => button.setAttribute("aria-pressed", !view.off.has(button.dataset.toggle)));
    seedButtons.forEach((button, i) => button.setAttribute("aria-pressed", !view.seedsOff.has(seeds[i])));
    means?.setAttribute("aria-pressed", view.means);
    links?.setAttribute("aria-pressed", view.links);
    reset.hidden = !view.zoom;
    const what = view.means ? "means" : "runs";
    tally.textContent = shown.length ? `${grouped(shown.length)} ${what}, ${front.length} on the front` : `no ${what} to show`;
    overlay();
    root.dataset.points = shown.length;
    root.dataset.front = front.length;
    root.dataset.ms = (performance.now() - began).toFixed(2);
    root.dataset.draws = Number(root.dataset.draws ?? 0) + 1;
  }

  function drawAxes() {
    const bottom = HEIGHT - PAD.bottom, right = width - PAD.right, parts = [];
    svg.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
    clip.replaceChildren(svgOf("rect", { x: PAD.left, y: PAD.top - 8, width: right - PAD.left + 8, height: bottom - PAD.top + 8 }));
    const text = (x, y, content, more) => { const t = svgOf("text", { x, y, ...more }); t.textContent = content; parts.push(t); };
    const ticks = { x: scales.x.ticks.filter((_, i, all) => all.length <= width / 70 || i % 2 === 0), y: scales.y.ticks };
    for (const tick of ticks.x) {
      const x = scales.x.of(tick);
      parts.push(svgOf("path", { class: "fr-grid", d: `M${x} ${PAD.top}V${bottom}` }));
      text(x, bottom + 16, tickText(tick, axes[view.x].unit, ticks.x), { "text-anchor": "middle" });
    }
    for (const tick of ticks.y) {
      const y = scales.y.of(tick);
      parts.push(svgOf("path", { class: "fr-grid", d: `M${PAD.left} ${y}H${right}` }));
      text(PAD.left - 7, y + 4, tickText(tick, axes[view.y].unit, ticks.y), { "text-anchor": "end" });
    }
    parts.push(svgOf("path", { class: "fr-line", d: `M${PAD.left} ${PAD.top}V${bottom}H${right}` }));
    const title = (axis) => axis.label + (axis.unit && !axis.label.toLowerCase().includes(axis.unit.toLowerCase()) ? ` (${axis.unit})` : "");
    text((PAD.left + right) / 2, HEIGHT - 8, title(axes[view.x]), { "text-anchor": "middle", class: "fr-title" });
    text(0, 0, title(axes[view.y]), { "text-anchor": "middle", class: "fr-title", transform: `translate(15 ${(PAD.top + bottom) / 2}) rotate(-90)` });
    back.replaceChildren(...parts);
  }

  function drawMarks(front) {
    const parts = [];
    if (view.links) for (const [a, b] of linked(shown)) parts.push(`<path class="fr-link" d="M${a.px} ${a.py}L${b.px} ${b.py}"/>`);
    if (front.length > 1) parts.push(`<path class="fr-front" d="${front.map((p, i) => (i ? `H${p.px.toFixed(1)}V${p.py.toFixed(1)}` : `M${p.px} ${p.py}`)).join("")}"/>`);
    const bars = [];
    for (const p of shown) {
      const [dx, dy] = [half(p, view.x), half(p, view.y)];
      const clean = (low, scale, log) => scale.of(log && low <= 0 ? scale.low : low).toFixed(1);
      if (dy) bars.push(`M${p.px.toFixed(1)} ${clean(p.y - dy, scales.y, isLog("y"))}V${scales.y.of(p.y + dy).toFixed(1)}`);
      if (dx) bars.push(`M${clean(p.x - dx, scales.x, isLog("x"))} ${p.py.toFixed(1)}H${scales.x.of(p.x + dx).toFixed(1)}`);
    }
    if (bars.length) parts.push(`<path class="fr-interval" d="${bars.join("")}"/>`);
    for (const p of [...shown].sort((a, b) => a.best - b.best)) {
      const { color, marker } = families[p.rows[0].family];
      parts.push(`<path d="${MARKS[marker]}" transform="translate(${p.px.toFixed(1)} ${p.py.toFixed(1)}) scale(${R})" fill="${color}" `
        + `stroke="${color}"${p.best ? "" : ' fill-opacity=".28"'}/>`);
    }
    marks.innerHTML = parts.join(""); // contains only numbers and colours, no text of a run
  }

  /** Pairs of points: a parent or teacher, and the run trained from it. */
  function linked(points) {
    const at = new Map(points.flatMap((point) => point.rows.map((row) => [row.run, point])));
    return points.flatMap((point) => point.rows.flatMap((row) => Object.values(row.parents).map((run) => [at.get(run), point])))
      .filter(([a, b]) => a && a !== b);
  }

  // ---- hovering

  function place(event) {
    const frame = svg.getBoundingClientRect();
    return { x: ((event.clientX - frame.left) * width) / frame.width, y: ((event.clientY - frame.top) * HEIGHT) / frame.height };
  }

  function nearest(event) {
    const { x, y } = place(event);
    let best = null, least = NEAR ** 2;
    for (const point of shown) {
      const distance = (point.px - x) ** 2 + (point.py - y) ** 2;
      if (distance < least) [best, least] = [point, distance];
    }
    return best;
  }

  function hover(point) {
    if (point === view.hover) return;
    view.hover = point;
    overlay();
  }

  function overlay() {
    const at = new Map(shown.flatMap((point) => point.rows.map((row) => [row.run, point])));
    if (view.hover && !shown.includes(view.hover)) view.hover = null;
    const picked = view.selected.map((run) => at.get(run)).filter(Boolean);
    const parts = [];
    const ring = (point, name) => svgOf("circle", { class: name, cx: point.px, cy: point.py, r: R + 4 });
    for (const point of new Set([...picked, view.hover].filter(Boolean))) {
      for (const row of point.rows) {
        for (const run of Object.values(row.parents)) if (at.has(run)) parts.push(tie(at.get(run), point, "fr-tie"));
        for (const [, run] of children.get(row.run)) if (at.has(run)) parts.push(tie(point, at.get(run), "fr-tie fr-child"));
      }
    }
    parts.push(...picked.map((point) => ring(point, "fr-picked")), ...(view.hover ? [ring(view.hover, "fr-hover")] : []));
    if (drag?.moved) parts.push(svgOf("rect", { class: "fr-brush", ...frameOf(drag) }));
    above.replaceChildren(...parts);
    showTip();
    showSide();
  }

  function tie(a, b, name) { return svgOf("path", { class: name, d: `M${a.px} ${a.py}L${b.px} ${b.py}` }); }

  function showTip() {
    const point = view.hover;
    tip.hidden = !point || Boolean(drag?.moved);
    if (tip.hidden) return;
    const row = point.rows[0];
    const line = (name) => h("div", { class: "fr-pair" }, h("span", {}, axes[name].label), h("b", {}, valueText(mean(point.rows, name), axes[name].unit)
      + (half(point, name) ? ` ± ${Number(half(point, name).toPrecision(2))}` : "")));
    const names = [...new Set([view.y, view.x, ...["params_total", "params_active"].filter((name) => point.rows.every((each) => name in each.values))])];
    tip.replaceChildren(strip(row.pattern), h("div", { class: "fr-soft" }, row.family, point.rows.length > 1 ? ` · mean of ${point.rows.length} seeds`
      : row.seed === null ? "" : ` · seed ${row.seed}`), ...names.map(line), h("div", { class: "fr-soft fr-run" }, point.rows.map((each) => each.run).join(", ")));
    const scale = box.clientWidth / width, [x, y] = [point.px * scale, point.py * scale];
    const left = x + 16 + tip.offsetWidth > box.clientWidth ? Math.max(0, x - 16 - tip.offsetWidth) : x + 16;
    tip.style.transform = `translate(${left}px, ${Math.max(0, Math.min(y - tip.offsetHeight / 2, svg.clientHeight - tip.offsetHeight))}px)`;
  }

  // ---- the selected runs

  function select(run, more = false) {
    const others = view.selected.filter((each) => each !== run);
    view.selected = more ? [run, ...others].slice(0, 2) : [run];
    model.set("selected", view.selected);
    model.save_changes();
    overlay();
  }

  function showSide() {
    const state = view.selected.join("\n");
    if (side.dataset.runs === state) return;
    side.dataset.runs = state;
    root.classList.toggle("fr-open", view.selected.length > 0);
    side.replaceChildren(...(view.selected.length ? view.selected.map((run) => named.get(run)).filter(Boolean).map(card)
      : [h("p", { class: "fr-soft" }, "Click a point to see its run; shift-click a second one to compare. Drag to zoom; double-click to show all.")]));
    if (model.widget_manager && view.selected.length) {
      const title = view.selected.length > 1 ? "Compare both in the workbench" : "Open in the workbench";
      side.append(h("button", { type: "button", "data-bench": "", onclick: () => {
        model.set("ask", { n: ++sent, runs: view.selected });
        model.save_changes();
      } }, title));
    }
  }

  function card(row) {
    const names = data.shown.filter((name) => name in row.values);
    const more = Object.keys(axes).filter((name) => name in row.values && !names.includes(name));
    const table = (some) => h("table", {}, some.map((name) => h("tr", {}, h("td", {}, axes[name].label),
      h("td", { "data-value-of": name }, valueText(row.values[name], axes[name].unit)))));
    const related = (label, runs) => runs.length ? h("div", {}, h("span", { class: "fr-soft" }, `${label} `),
      runs.map((run) => h("button", { type: "button", class: "fr-other", onclick: () => select(run) }, run))) : null;
    const parents = Object.entries(row.parents).map(([kind, run]) => related(kind === "quantized_from" ? "quantised from" : kind, [run]));
    const twins = rows.filter((other) => other.point === row.point && other !== row);
    const copy = h("button", { type: "button", title: "copy the name of the run", onclick: async (event) => {
      const button = event.currentTarget;
      try { await navigator.clipboard.writeText(row.run); } catch { selectText(button.previousSibling); return; }
      button.textContent = "Copied";
      setTimeout(() => { button.textContent = "Copy"; }, 1200);
    } }, "Copy");
    return h("section", { class: "fr-card", "data-run": row.run },
      h("div", { class: "fr-head" }, h("code", {}, row.run), copy,
        h("button", { type: "button", title: "close", "aria-label": "close", onclick: () => unselect(row.run) }, "✕")),
      strip(row.pattern), h("div", { class: "fr-soft" }, `${row.family}${row.pattern && `, ${countsOf(row.pattern)}`}${row.seed === null ? "" : `, seed ${row.seed}`}`),
      table(names), ...parents, related("children", children.get(row.run).map(([, run]) => run)), related("other seeds", twins.map((other) => other.run)),
      more.length ? h("details", {}, h("summary", {}, `${more.length} more quantities`), table(more)) : null);
  }

  function selectText(element) { // without a clipboard the name is selected, so that a key can copy it
    const range = document.createRange();
    range.selectNodeContents(element);
    getSelection().removeAllRanges();
    getSelection().addRange(range);
  }

  function unselect(run) {
    view.selected = view.selected.filter((each) => each !== run);
    model.set("selected", view.selected);
    model.save_changes();
    overlay();
  }

  async function showBench() {
    const { error, model: id } = model.get("bench");
    if (error) return bench.replaceChildren(h("p", { class: "fr-error", role: "alert" }, error));
    const child = await model.widget_manager.get_model(id);
    const shownView = await model.widget_manager.create_view(child, {});
    return bench.replaceChildren(shownView.el);
  }

  function strip(pattern) {
    return h("div", { class: "fr-strip", title: pattern }, [...pattern].map((letter) => h("span", { title: letters[letter]?.name ?? letter,
      style: letters[letter] ? `background:${letters[letter].color};color:${letters[letter].ink}` : "" }, letter)));
  }

  function countsOf(pattern) {
    const layers = [...pattern.split("/")[0]];
    return `${layers.length} layers: ` + [...new Set(layers)].map((letter) => `${layers.filter((each) => each === letter).length} ${letter}`).join(" · ");
  }

  // ---- zoom and keys

  function frameOf(from) {
    return { x: Math.min(from.x, from.to.x), y: Math.min(from.y, from.to.y), width: Math.abs(from.to.x - from.x), height: Math.abs(from.to.y - from.y) };
  }

  function pull(event) {
    drag.to = place(event);
    drag.moved ||= Math.hypot(drag.to.x - drag.x, drag.to.y - drag.y) > 6;
    if (drag.moved) overlay();
  }

  function drop(event) {
    const from = drag;
    drag = null;
    if (!from) return;
    if (!from.moved) {
      const point = nearest(event);
      if (point) select(point.rows[0].run, from.shift);
      return;
    }
    const frame = frameOf({ ...from, to: place(event) });
    if (frame.width > 8 && frame.height > 8) {
      view.zoom = { x: [scales.x.at(frame.x), scales.x.at(frame.x + frame.width)], y: [scales.y.at(frame.y + frame.height), scales.y.at(frame.y)] };
    }
    draw();
  }

  function key(event) {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (step && shown.length) {
      const order = [...shown].sort((a, b) => a.px - b.px || a.py - b.py);
      const at = order.indexOf(view.hover);
      hover(order[at < 0 ? (step > 0 ? 0 : order.length - 1) : Math.max(0, Math.min(order.length - 1, at + step))]);
    } else if (event.key === "Enter" && view.hover) select(view.hover.rows[0].run, event.shiftKey);
    else if (event.key === "Escape") { view.selected = []; model.set("selected", []); model.save_changes(); hover(null); overlay(); }
    else return;
    event.preventDefault();
  }

  function mark({ color, marker }) {
    const icon = svgOf("svg", { viewBox: "-1.4 -1.4 2.8 2.8", width: 12, height: 12, "aria-hidden": "true" });
    icon.append(svgOf("path", { d: MARKS[marker], fill: color }));
    return icon;
  }
}

function groupBy(all, keyOf) { // like Map.groupBy, which browsers have only since 2024
  const groups = new Map();
  for (const each of all) groups.set(keyOf(each), [...(groups.get(keyOf(each)) ?? []), each]);
  return groups;
}

function svgOf(tag, attributes) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  return element;
}

/** Shows the data of a standalone page. */
function showPage() {
  const values = { data: JSON.parse(document.getElementById("data").textContent), selected: [], bench: {}, ask: {} };
  const model = { get: (name) => values[name], set: (name, value) => { values[name] = value; }, save_changes() {}, on() {}, off() {} };
  render({ model, el: document.getElementById("frontier") });
}
