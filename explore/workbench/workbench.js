// The front end of the workbench: it draws the models and numbers computed in Python, and sends edits back.

function render({ model, el }) {
  const offers = model.get("offers");
  let view = model.get("view");
  let state = view.state;
  let sent = 0;
  let selected = -1;
  let kinds = {};
  let drag = null;
  let rows = new Map();
  const timers = new Map();

  const degrees = { tp: ["TP", "tensor-parallel ranks"], cp: ["CP", "context-parallel ranks"], pp: ["PP", "pipeline-parallel ranks"],
    vpp: ["VPP", "pipeline stages per rank"], ep: ["EP", "expert-parallel ranks"],
    etp: ["ETP", "ranks that share one expert"], micro_batch: ["micro-batch", "sequences per micro-batch"] };
  const presets = h("select", { title: "open a published system", onchange: () => begin(presets.value) },
    h("option", { value: "" }, "published systems…"), offers.presets.map((name) => h("option", {}, name)));
  const hardware = h("select", { onchange: () => change((s) => { s.hardware = hardware.value; }) },
    offers.hardware.map((name) => h("option", { value: name }, name === "here" ? "here (measured)" : name)));
  const pin = h("button", { type: "button", title: "compare later changes with this model", onclick: togglePin }, "Pin");
  const choice = (field, names) => h("select", { "data-choice": field,
    onchange: (event) => change((s) => { s.training[field] = event.currentTarget.value; }) },
    names.map((name) => h("option", {}, name)));
  const choices = { gpu: choice("gpu", offers.gpus), precision: choice("precision", offers.precisions) };
  const best = h("button", { type: "button", title: "search all layouts (takes a second or two)",
    onclick: () => { best.disabled = true; send({ state, best: true }); } }, "Find the best layout");
  const tabs = [["decoding", "Decode"], ["training", "Train"]].map(([tab, name]) => h("button", { type: "button",
    role: "tab", "data-tab": tab, onclick: () => change((s) => { s.tab = tab; }) }, name));
  const copies = [["Copy code", "code"], ["Copy JSON", "json"]].map(([name, what]) =>
    h("button", { type: "button", onclick: (event) => copy(event.currentTarget, name, view[what]) }, name));
  const strip = h("div", {
    class: "wb-strip", role: "listbox", "aria-label": "layers", "aria-orientation": "horizontal",
    title: "arrows: select · shift+arrows or drag: move · letter: replace · Insert: repeat · Delete: remove",
    onmousedown: (event) => event.preventDefault(), // a press selects only after it turns out not to be a drag
    onkeydown: key, onpointerdown: press, onpointermove: pull, onpointerup: drop,
    onpointercancel: () => { drag = null; mark(); },
  });
  const palette = h("div", { class: "wb-palette", role: "toolbar", "aria-label": "edit the selected layer" });
  const text = h("input", { type: "text", class: "wb-pattern", spellcheck: false, autocomplete: "off",
    oninput: () => { selected = -1; change((s) => { s.model.pattern = text.value; }); } });
  const tally = h("span", { class: "wb-tally" });
  const error = h("div", { class: "wb-error", role: "alert" });
  const sliders = h("div", { class: "wb-sliders" });
  const readout = h("div", { class: "wb-readout", "aria-live": "off" });
  const root = h("div", { class: "wb" },
    h("div", { class: "wb-bar" }, h("label", {}, "Start from ", presets),
      h("span", { role: "tablist", class: "wb-tabs" }, tabs),
      h("label", { class: "wb-decode" }, "Hardware ", hardware),
      h("label", { class: "wb-train" }, "GPU ", choices.gpu), h("label", { class: "wb-train" }, "Precision ", choices.precision),
      h("span", { class: "wb-train" }, best), h("span", { class: "wb-gap" }), h("span", { class: "wb-decode" }, pin),
      h("span", { class: "wb-copies" }, copies)),
    strip, palette, h("label", { class: "wb-typed" }, "Pattern", text, tally), error,
    h("div", { class: "wb-body" }, sliders, readout));
  el.replaceChildren(root);

  const answered = () => {
    view = model.get("view");
    if (view.n >= sent && view.state) state = view.state;
    draw();
  };
  model.on("change:view", answered);
  model.on("change:pinned", draw);
  draw();
  return () => { model.off("change:view", answered); model.off("change:pinned", draw); };

  // ---- edits

  function send(edit) {
    sent = Math.max(model.get("edit").n ?? 0, model.get("view").n, sent) + 1;
    model.set("edit", { n: sent, ...edit });
    model.save_changes();
  }

  function change(edit) {
    state = structuredClone(state);
    edit(state);
    send({ state });
    drawStrip();
  }

  function begin(name) {
    if (name) send({ state, preset: name });
    presets.value = "";
    selected = -1;
  }

  function letters() {
    return [...state.model.pattern.replace(/[|\s]/g, "")];
  }

  function edit(list, select) {
    selected = Math.max(-1, Math.min(select, list.length - 1));
    change((s) => { s.model.pattern = list.join(""); });
    focus();
  }

  function put(letter) {
    const list = letters();
    const at = selected < 0 ? list.length : selected;
    list[at] = letter;
    edit(list, at);
  }

  function move(from, to) {
    const list = letters();
    if (from < 0 || to < 0 || to >= list.length) return;
    list.splice(to, 0, ...list.splice(from, 1));
    edit(list, to);
  }

  function repeat() {
    const list = letters();
    const at = selected < 0 ? list.length - 1 : selected;
    list.splice(at + 1, 0, list[at] ?? Object.keys(kinds)[0]);
    edit(list, at + 1);
  }

  function remove() {
    const list = letters();
    list.splice(selected < 0 ? list.length - 1 : selected, 1);
    edit(list, selected < 0 ? -1 : selected);
  }

  function cycle(step) {
    const known = Object.keys(kinds).filter((letter) => letter !== "/");
    const at = known.indexOf(letters()[selected]);
    if (selected >= 0) put(known[(at + step + known.length) % known.length]);
  }

  function key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    const last = letters().length - 1;
    if (step && event.shiftKey) move(selected, selected + step);
    else if (step) select(Math.max(0, Math.min(last, selected + step)));
    else if (event.key === "Home" || event.key === "End") select(event.key === "Home" ? 0 : last);
    else if (event.key === "ArrowUp" || event.key === "ArrowDown") cycle(event.key === "ArrowUp" ? -1 : 1);
    else if (event.key === "Enter" || event.key === " ") cycle(1);
    else if (event.key === "Delete" || event.key === "Backspace") remove();
    else if (event.key === "Insert" || event.key === "+") repeat();
    else if (kinds[event.key]) put(event.key);
    else if (kinds[event.key.toUpperCase()]) put(event.key.toUpperCase());
    else return;
    event.preventDefault();
  }

  function press(event) {
    const at = chipAt(event);
    if (event.button !== 0 || at < 0) return;
    drag = { from: at, x: event.clientX, y: event.clientY, moved: false };
    strip.setPointerCapture(event.pointerId);
  }

  function pull(event) {
    if (!drag) return;
    drag.moved ||= Math.hypot(event.clientX - drag.x, event.clientY - drag.y) > 5;
    if (drag.moved) mark(drag.from, chipAt(event));
  }

  function drop(event) {
    if (!drag) return;
    const { from, moved } = drag;
    const to = chipAt(event);
    drag = null;
    mark();
    if (moved && to >= 0) move(from, to);
    else if (!moved && from === selected) cycle(1);
    else if (!moved) select(from);
  }

  function chipAt(event) {
    return [...strip.children].indexOf(el.getRootNode().elementFromPoint(event.clientX, event.clientY));
  }

  function mark(from = -1, to = -1) {
    [...strip.children].forEach((chip, i) => {
      chip.classList.toggle("wb-dragged", i === from);
      chip.classList.toggle("wb-before", i === to && to < from);
      chip.classList.toggle("wb-after", i === to && to > from);
    });
  }

  function select(at) {
    selected = at;
    drawStrip();
    focus();
  }

  function focus() {
    strip.children[selected]?.focus({ preventScroll: true });
  }

  function togglePin() {
    const { batch_size, seq_len, hardware: device } = view.state;
    const use = `${grouped(batch_size)} × ${grouped(seq_len)} tokens on ${device}`;
    const label = view.strip.length <= 40 ? view.strip : `${view.strip.slice(0, 18)}…${view.strip.slice(-18)}`;
    model.set("pinned", model.get("pinned").readout ? {} : { label, use, readout: view.readout });
    model.save_changes();
  }

  // ---- drawing

  function draw() {
    kinds = Object.fromEntries(view.letters.map((kind) => [kind.letter, kind]));
    error.textContent = view.error;
    root.classList.toggle("wb-stale", Boolean(view.error));
    hardware.value = state.hardware;
    for (const [field, select] of Object.entries(choices)) select.value = state.training[field];
    for (const tab of tabs) tab.setAttribute("aria-selected", tab.dataset.tab === state.tab);
    root.classList.toggle("wb-training", state.tab === "training");
    if (view.n >= sent) best.disabled = false;
    drawStrip();
    palette.replaceChildren(
      ...view.letters.map(({ letter, name }) => {
        const title = `replace the selected layer by ${name}, or append it`;
        const label = letter === "/" ? "MTP" : name;
        return h("button", { type: "button", title, onclick: () => put(letter) }, chip(letter), label);
      }),
      h("span", { class: "wb-signs" }, [
        ["◀", "move left", () => move(selected, selected - 1)],
        ["▶", "move right", () => move(selected, selected + 1)],
        ["+", "repeat the layer", repeat],
        ["✕", "remove the layer", remove],
      ].map(([sign, title, onclick]) =>
        h("button", { type: "button", class: "wb-sign", title, "aria-label": title, onclick }, sign))));
    if (view.n >= sent) drawSliders();
    if (!view.error) drawReadout();
    root.dataset.n = view.n;
  }

  function drawStrip() {
    const list = letters();
    const focused = strip.contains(el.getRootNode().activeElement);
    strip.replaceChildren(...list.map((letter, i) => {
      const name = kinds[letter]?.name ?? "unknown";
      const label = `layer ${i + 1} of ${list.length}: ${name}`;
      return chip(letter, { role: "option", "aria-label": label, "aria-selected": i === selected,
        tabindex: i === Math.max(selected, 0) ? 0 : -1, onfocus: () => { if (selected < 0) select(i); } });
    }));
    if (focused) focus();
    if (text.value.replace(/[|\s]/g, "") !== list.join("")) text.value = state.model.pattern;
    const layers = list.join("").split("/")[0];
    const parts = Object.keys(kinds).map((letter) => [layers.split(letter).length - 1, letter]).filter(([n]) => n);
    tally.textContent = `${layers.length} layers: ` + parts.map(([n, letter]) => `${n} ${letter}`).join(" · ");
  }

  function chip(letter, more = {}) {
    const { color = "transparent", ink = "var(--wb-error)" } = kinds[letter] ?? {};
    const known = kinds[letter] ? "wb-chip" : "wb-chip wb-unknown";
    return h("span", { class: known, style: `background:${color};color:${ink}`, ...more }, letter);
  }

  function drawSliders() {
    const names = view.sliders.map((slider) => slider.path.join("."));
    if (names.join() !== [...rows.keys()].join()) {
      rows = new Map(names.map((name, i) => [name, row(name, view.sliders[i])]));
      const ownerOf = (slider) => slider.letter || (slider.path[0] !== "training" ? "" : degrees[slider.label] ? "layout" : "run");
      const titles = { "": state.tab === "training" ? "Model" : "Model and use", run: "Training run", layout: "Layout, in ranks" };
      const owners = [...new Set(view.sliders.map(ownerOf))];
      sliders.replaceChildren(...owners.map((owner) => h("fieldset", {},
        h("legend", {}, titles[owner] ?? [chip(owner), kinds[owner].name]),
        names.filter((_, i) => ownerOf(view.sliders[i]) === owner).map((name) => rows.get(name).element))));
    }
    view.sliders.forEach((slider, i) => rows.get(names[i]).set(slider));
  }

  function row(name, { path, label }) {
    let values = [];
    const input = h("input", { type: "range", min: 0, step: 1, "data-path": name, oninput: () => {
      showValue();
      change((s) => {
        const owner = path.slice(0, -1).reduce((place, part) => (place[part] ??= {}), s);
        owner[path.at(-1)] = values[input.value];
      });
    } });
    const output = h("output");
    const showValue = () => {
      output.textContent = values[input.value] === null ? "none" : grouped(values[input.value]);
      input.setAttribute("aria-valuetext", output.textContent);
      input.style.setProperty("--wb-part", `${(100 * input.value) / Math.max(1, values.length - 1)}%`);
    };
    const names = { seq_len: path[0] === "training" ? "sequence" : "context", batch_size: "batch",
      vocab_size: "vocabulary", n_gpus: "GPUs", global_batch: "global batch", ...Object.fromEntries(
        Object.entries(degrees).map(([degree, [short]]) => [degree, short])) };
    const set = (slider) => {
      values = slider.values;
      input.max = values.length - 1;
      input.value = values.indexOf(slider.value);
      showValue();
    };
    return { element: h("label", { class: "wb-slider", title: degrees[label]?.[1] ?? "" }, h("span", {}, names[label] ?? label), input, output), set };
  }

  function drawReadout() {
    const pinned = model.get("pinned");
    pin.textContent = pinned.readout ? "Unpin" : "Pin";
    pin.setAttribute("aria-pressed", Boolean(pinned.readout));
    readout.replaceChildren(...(view.state.tab === "training"
      ? trainingOf(view.plan, view.state, offers) : readoutOf(view.readout, view.state, pinned, offers)));
  }

  async function copy(button, name, content) {
    try {
      await navigator.clipboard.writeText(content);
    } catch { // no permission: the older command needs none
      const area = h("textarea", {}, content);
      root.append(area);
      area.select();
      document.execCommand("copy");
      area.remove();
    }
    button.textContent = "Copied";
    clearTimeout(timers.get(button)); // one timer per button, because both may show "Copied"
    timers.set(button, setTimeout(() => { button.textContent = name; }, 1200));
  }
}

export default { render };
