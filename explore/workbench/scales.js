// Scales, ticks, markers and fronts of a figure. Concatenated with frontier.js.

const MARKS = { // paths around the origin, in units of the radius of a point
  s: "M-.85-.85h1.7v1.7h-1.7z", o: "M-1 0a1 1 0 1 0 2 0a1 1 0 1 0-2 0z", "^": "M0-1.1L1.05.8H-1.05z",
  v: "M0 1.1L1.05-.8H-1.05z", D: "M0-1.15L1.15 0L0 1.15L-1.15 0z", "<": "M-1.1 0L.8-1.05V1.05z", ">": "M1.1 0L-.8-1.05V1.05z",
  P: "M-.38-1.05h.76v.67h.67v.76h-.67v.67h-.76v-.67h-.67v-.76h.67z",
  X: "M-.55-1L0-.45L.55-1L1-.55L.45 0L1 .55L.55 1L0 .45L-.55 1L-1 .55L-.45 0L-1-.55z",
  p: "M0-1.1L1.05-.34L.65.89H-.65L-1.05-.34z", h: "M0-1.1L.95-.55V.55L0 1.1L-.95.55V-.55z",
};

/** A scale: `of(value)` gives the pixel, `at(pixel)` the value. */
function scaleOf(low, high, from, to, log) {
  const [a, b] = log ? [Math.log10(low), Math.log10(high)] : [low, high];
  const of = (value) => from + ((to - from) * ((log ? Math.log10(value) : value) - a)) / (b - a || 1);
  const at = (pixel) => { const v = a + ((b - a) * (pixel - from)) / (to - from); return log ? 10 ** v : v; };
  return { of, at, low, high, ticks: log ? logTicks(low, high) : linearTicks(low, high) };
}

/** The range of values with a margin; a log axis spans at least a factor of 1.2. */
function rangeOf(values, log) {
  const all = values.filter((value) => Number.isFinite(value) && (!log || value > 0));
  if (!all.length) return [1, 2];
  let [low, high] = log ? [Math.log10(Math.min(...all)), Math.log10(Math.max(...all))] : [Math.min(...all), Math.max(...all)];
  const least = log ? Math.log10(1.2) : Math.max(Math.abs(low), Math.abs(high)) * 0.002 || 1;
  if (high - low < least) [low, high] = [(low + high - least) / 2, (low + high + least) / 2];
  const margin = 0.06 * (high - low);
  return log ? [10 ** (low - margin), 10 ** (high + margin)] : [low - margin, high + margin];
}

function linearTicks(low, high, about = 6) {
  const rough = (high - low) / about, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].find((each) => each * power >= rough) * power;
  const ticks = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high * (1 + 1e-12) + 1e-300 && ticks.length < 30; i++) ticks.push(i * step);
  return ticks;
}

function logTicks(low, high) {
  for (const steps of [[1], [1, 3], [1, 2, 5], [1, 1.5, 2, 3, 4, 5, 6, 8]]) {
    const ticks = [];
    for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power++) {
      for (const step of steps) if (step * 10 ** power >= low && step * 10 ** power <= high) ticks.push(step * 10 ** power);
    }
    if (ticks.length > 10) return ticks.filter((_, i) => i % Math.ceil(ticks.length / 8) === 0);
    if (ticks.length >= 4) return ticks;
  }
  return linearTicks(low, high);
}

/** A value with its unit, as in tables. */
function valueText(value, unit) {
  if (value === undefined || value === null) return "";
  if (unit.startsWith("bytes")) return bytes(value);
  if (unit === "s") return value < 90 ? seconds(value) : value < 5400 ? `${(value / 60).toFixed(0)} min` : `${(value / 3600).toFixed(1)} h`;
  if (unit.startsWith("FLOPs")) return quantity(value, 1000, ["", "k", "M", "G", "T", "P", "E"], 3);
  if (unit === "parameters" || unit === "tokens") return quantity(value, 1000, ["", "k", "M", "B", "T"], 3);
  if (Number.isInteger(value)) return grouped(value);
  return Math.abs(value) < 1e-3 ? value.toExponential(2) : Number(value.toPrecision(5)).toString();
}

/** The text of a tick, with enough digits to differ from its neighbours. */
function tickText(value, unit, ticks) {
  if (unit || Math.abs(value) >= 1e4 || (value && Math.abs(value) < 1e-3)) {
    if (!["bits per byte", "nats per token"].includes(unit)) return valueText(Number(value.toPrecision(6)), unit);
  }
  const step = ticks.length > 1 ? Math.abs(ticks[1] - ticks[0]) : Math.abs(value);
  const digits = Math.max(0, Math.min(6, -Math.floor(Math.log10(step || 1) + 1e-9)));
  return Number(value.toFixed(digits + 1)).toFixed(digits).replace(/\.0+$/, (zeros) => (digits > 1 ? zeros : ""));
}

/** The points that no other point dominates; `sx` and `sy` are 1 if lower is better, -1 if higher is. */
function frontOf(points, sx, sy) {
  const order = [...points].sort((a, b) => sx * (a.x - b.x) || sy * (a.y - b.y));
  const front = [];
  for (const point of order) {
    const last = front.at(-1);
    if (!last || sy * point.y < sy * last.y || (point.x === last.x && point.y === last.y)) front.push(point);
  }
  return front;
}
