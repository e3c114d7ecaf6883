// The Decode tab: numbers in tiles, and bars of their parts. Concatenated with workbench.js.

const TILES = [
  ["params_total", "Parameters", count,
    (r) => `${count(r.params_active)} active` + (r.params_mtp ? ` · ${count(r.params_mtp)} more in MTP` : "")],
  ["flops_fwd", "Forward FLOPs/token", metric, (r) => `decoding ${metric(r.flops_decode)}`],
  ["kv_bytes_per_token", "KV cache per token", bytes,
    (r) => `plus ${bytes(r.ssm_state_bytes + r.conv_state_bytes)} of state per sequence`],
  ["cache_bytes", "Cache of the batch", bytes,
    (r, s) => `${percent(s.batch_size * r.kv_bytes, r.cache_bytes)} of it is KV`],
  ["decode_s", "Decoding step, at least", seconds,
    (r) => `${metric(r.tokens_per_s)} tokens/s`],
];

/** The elements of a readout. `pin` may hold a `readout` to compare with, its `label` and its `use`. */
function readoutOf(shown, state, pin, offers) {
  const pinned = pin.readout;
  const tile = (name, title, value, raw, more, full) => h("div", { class: full ? "wb-tile wb-full" : "wb-tile" },
    h("div", { class: "wb-name" }, title),
    h("div", { class: "wb-value" },
      h("span", { "data-name": name, "data-value": raw }, value), ratio(shown, pinned, name)),
    h("div", { class: "wb-more" }, more));
  const needed = shown.weight_bytes + shown.cache_bytes;
  return [
    pinned ? h("div", { class: "wb-pinned", title: pin.label }, "× relative to ", h("code", {}, pin.label), ` at ${pin.use}`) : "",
    h("div", { class: "wb-tiles" },
      TILES.map(([name, title, format, more]) =>
        tile(name, title, format(shown[name]), shown[name], more(shown, state))),
      tile("fits", `Memory of one ${state.hardware}`, shown.fits ? "fits" : "too small", shown.fits,
        `${bytes(needed)} of ${bytes(shown.memory_bytes)}`, !shown.fits)),
    bar("Forward pass, FLOPs per token", shown, pinned, "flops_fwd", "flops_by_group", metric, offers.groups,
      (name) => name),
    bar("Decoding step, by limit", shown, pinned, "decode_s", "decode_by_bound", seconds, offers.groups,
      (name) => offers.bounds[name]),
    h("p", { class: "wb-note" },
      "Times are lower bounds from a roofline, not predictions. Weights, keys and values are bf16; state is fp32."),
  ];
}

function ratio(shown, pinned, name) {
  if (!pinned?.[name] || name === "fits") return null;
  return h("span", { class: "wb-ratio" }, `×${(shown[name] / pinned[name]).toPrecision(3)}`);
}

/** A stacked bar of the parts of a total with a legend, and a thin bar of the pinned model on the same scale. */
function bar(title, shown, pinned, total, parts, format, colors, named) {
  const longest = Math.max(shown[total], pinned?.[total] ?? 0);
  const stack = (numbers, name) => h("div", { class: name, style: `width:${(100 * numbers[total]) / longest}%` },
    Object.entries(numbers[parts]).map(([part, value]) => h("i", { title: `${named(part)}: ${format(value)}`,
      style: `flex-grow:${value / numbers[total]};background:${colors[part].color}` })));
  const legend = Object.entries(shown[parts]).map(([part, value]) => h("span", {},
    h("b", { style: `background:${colors[part].color}` }), `${named(part)} `,
    h("em", { "data-part": part, "data-value": value }, percent(value, shown[total]))));
  return h("figure", {}, h("figcaption", {}, title), stack(shown, "wb-stack"),
    pinned ? stack(pinned, "wb-stack wb-thin") : "", h("div", { class: "wb-legend" }, legend));
}
