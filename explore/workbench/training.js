// The Train tab: numbers of a plan in tiles, bars of memory and time. Concatenated with workbench.js.

const PLAN_TILES = [
  ["tokens_per_s_gpu", "Tokens/s per GPU", metric, (p, s) => `${metric(p.tokens_per_s_gpu * s.training.n_gpus)} in total`],
  ["tflops_estimate", "TFLOP/s per GPU", Math.round, (p) => `at most ${Math.round(p.tflops_ceiling)}`],
  ["step_s", "Time per step", seconds, (p) => p.layout],
];

/** The elements of a plan, or the reason why the layout is not possible. */
function trainingOf(plan, state, offers) {
  if (plan.error) return [h("div", { class: "wb-error", "data-name": "plan_error", role: "alert" }, plan.error)];
  const tile = (name, title, value, raw, more, full) => h("div", { class: full ? "wb-tile wb-full" : "wb-tile" },
    h("div", { class: "wb-name" }, title),
    h("div", { class: "wb-value" }, h("span", { "data-name": name, "data-value": JSON.stringify(raw) }, value)),
    h("div", { class: "wb-more" }, more));
  const fits = plan.fits ? (plan.relief ? "fits with savings" : "fits") : "too small";
  const memory = `${bytes(plan.needed_bytes)} of ${bytes(plan.capacity_bytes)}`;
  return [
    h("div", { class: "wb-tiles" },
      tile("plan_fits", `Memory of one ${state.training.gpu}`, fits, plan.fits, memory, !plan.fits),
      PLAN_TILES.map(([name, title, format, more]) => tile(name, title, format(plan[name]), plan[name], more(plan, state))),
      tile("binds", "Bottleneck", plan.binds, plan.binds, plan.fits ? "largest part of a step" : "no saving is enough")),
    plan.relief ? h("p", { class: "wb-note" }, `Savings needed to fit: ${plan.relief}.`) : "",
    plan.fits ? "" : h("p", { class: "wb-note" }, "Speed and time assume that the layout fits."),
    rankBars(plan, offers.memory),
    bar("Time of a step, by part", plan, null, "step_s", "seconds", seconds, offers.parts, (name) => name),
    h("p", { class: "wb-note" }, "Efficiencies are fitted to published runs; explore plan --published shows their errors."),
  ];
}

/** One stacked bar per pipeline rank, with a line at the capacity. */
function rankBars(plan, colors) {
  const longest = Math.max(plan.needed_bytes, plan.capacity_bytes);
  const rows = plan.ranks.map((rank, i) => h("div", { class: "wb-rank" }, Object.entries(rank).map(([kind, value]) =>
    h("i", { title: `rank ${i}, ${kind}: ${bytes(value)}`, "data-rank": i, "data-part": kind, "data-value": value,
      style: `width:${(100 * value) / longest}%;background:${colors[kind].color}` }))));
  const line = h("div", { class: "wb-capacity", style: `left:${(100 * plan.capacity_bytes) / longest}%`,
    title: `capacity: ${bytes(plan.capacity_bytes)}` });
  const legend = Object.keys(plan.ranks[0]).map((kind) =>
    h("span", {}, h("b", { style: `background:${colors[kind].color}` }), kind));
  return h("figure", {}, h("figcaption", {}, "Memory of each pipeline rank; the line is the capacity"),
    h("div", { class: "wb-ranks" }, rows, line), h("div", { class: "wb-legend" }, legend));
}
