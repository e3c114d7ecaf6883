// What the Train tab shows of a plan: numbers in tiles, bars of memory and time. Made one file with workbench.js.

const PLAN_TILES = [
  ["tokens_per_s_gpu", "Tokens/s a GPU", metric, (p, s) => `${metric(p.tokens_per_s_gpu * s.training.n_gpus)} in all`],
  ["tflops_estimate", "TFLOP/s a GPU", Math.round, (p) => `at most ${Math.round(p.tflops_ceiling)}`],
  ["step_s", "Time of a step", seconds, (p) => p.layout],
];

/** The elements of a plan; of a layout that is not possible the reason. */
function trainingOf(plan, state, offers) {
  if (plan.error) return [h("div", { class: "wb-error", "data-name": "plan_error", role: "alert" }, plan.error)];
  const tile = (name, title, value, raw, more, full) => h("div", { class: full ? "wb-tile wb-full" : "wb-tile" },
    h("div", { class: "wb-name" }, title),
    h("div", { class: "wb-value" }, h("span", { "data-name": name, "data-value": JSON.stringify(raw) }, value)),
    h("div", { class: "wb-more" }, more));
  const fits = plan.fits ? (plan.relief ? "fits with help" : "fits") : "too small";
  const memory = `${bytes(plan.needed_bytes)} of ${bytes(plan.capacity_bytes)}`;
  return [
    h("div", { class: "wb-tiles" },
      tile("plan_fits", `Memory of one ${state.training.gpu}`, fits, plan.fits, memory, !plan.fits),
      PLAN_TILES.map(([name, title, format, more]) => tile(name, title, format(plan[name]), plan[name], more(plan, state))),
      tile("binds", "What binds", plan.binds, plan.binds, plan.fits ? "takes most of a step" : "no relief is enough")),
    plan.relief ? h("p", { class: "wb-note" }, `To fit: ${plan.relief}.`) : "",
    plan.fits ? "" : h("p", { class: "wb-note" }, "Speed and time are those that this layout would have if it fitted."),
    rankBars(plan, offers.memory),
    bar("A step, by what it is spent on", plan, null, "step_s", "seconds", seconds, offers.parts, (name) => name),
    h("p", { class: "wb-note" }, "Efficiencies are fitted to published runs; explore plan --published shows their errors."),
  ];
}

/** A stacked bar for each pipeline rank, with a line at the capacity. */
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
