// Numbers as text, and elements. Concatenated with the scripts that use it.

function quantity(value, base, units, digits = 4) {
  let power = 0;
  while (value >= base && power < units.length - 1) [value, power] = [value / base, power + 1];
  return `${Number(value.toPrecision(digits))} ${units[power]}`.trim();
}

function count(value) { return quantity(value, 1000, ["", "k", "M", "B", "T"]); }
function metric(value) { return quantity(value, 1000, ["", "k", "M", "G", "T"]); }
function bytes(value) { return quantity(value, 1024, ["B", "KiB", "MiB", "GiB", "TiB"]); }
function seconds(value) { return quantity(1e6 * value, 1000, ["µs", "ms", "s"], 3); }
function percent(part, whole) {
  const share = whole ? part / whole : 0;
  return share > 0 && share < 0.0005 ? "< 0.1 %" : `${(100 * share).toFixed(share < 0.1 ? 1 : 0)} %`;
}
function grouped(value) { return value.toLocaleString("en-US"); }

/** Creates an element. Attributes that begin with `on` are listeners; children may be nested lists. */
function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  if ("tabindex" in attributes || ["BUTTON", "INPUT", "SELECT"].includes(element.tagName)) {
    element.setAttribute("data-lm-suppress-shortcuts", "true"); // else JupyterLab handles arrows and letters itself
  }
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value);
  }
  element.append(...children.flat(3).filter((child) => child !== null));
  return element;
}
