// Small parts that everything on the page is made of. Texts of rows go into textContent alone.

const $ = (id) => document.getElementById(id);

// The largest size of numbers, never 0. A spread call takes no more than some 100,000.
const largestOf = (values) => values.reduce((most, value) => Math.max(most, Math.abs(value)), 1e-300);

// An element with attributes (`class`, `on*` handlers, others) and children (nodes or texts).
function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value === true ? "" : String(value));
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

// Text with what no screen shows made visible: control characters, and those that turn the
// direction of what follows.
function visible(text) {
  return String(text).replace(
    /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u200b\u202a-\u202e\u2060-\u2069\ufeff]/g,
    (character) => {
      const code = character.charCodeAt(0);
      if (character === "\r") return "";
      if (code < 0x20) return String.fromCharCode(0x2400 + code);
      return "⟨U+" + code.toString(16).toUpperCase().padStart(4, "0") + "⟩";
    },
  );
}

// A text of the data, apart in direction from what is around it.
const foreign = (text, attributes = {}) => el("bdi", { dir: "auto", ...attributes }, visible(text));

const MINUS = "\u2212";
const plus = (text) => (text.startsWith("-") ? MINUS + text.slice(1) : text);

// A number with three significant digits.
function short(value) {
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e5 || size < 1e-3) return plus(value.toExponential(2).replace("e-", "e" + MINUS).replace("e+", "e"));
  return plus(size >= 1000 ? value.toFixed(0) : String(Number(value.toPrecision(3))));
}

const signed = (value) => (value > 0 ? "+" : "") + short(value);

function formatted(value, type) {
  if (value === null || value === undefined || value === "") return "";
  if (typeof value === "string") return value;
  if (type === "percent") return plus((100 * value).toFixed(1)) + " %";
  if (type === "whole") return value.toLocaleString("en");
  return short(value);
}

// ---- hover texts, which the keyboard reaches too ------------------------------------------------

const tip = $("tip");

function showTip(node) {
  tip.textContent = node.dataset.tip;
  tip.classList.remove("hidden");
  const place = node.getBoundingClientRect();
  const size = tip.getBoundingClientRect();
  const left = Math.min(Math.max(8, place.left), innerWidth - size.width - 8);
  const below = place.bottom + 6 + size.height < innerHeight;
  tip.style.left = Math.max(8, left) + "px";
  tip.style.top = (below ? place.bottom + 6 : Math.max(8, place.top - size.height - 6)) + "px";
}

const hideTip = () => tip.classList.add("hidden");
const tipped = (event) => event.target.closest && event.target.closest("[data-tip]");

document.addEventListener("mouseover", (event) => (tipped(event) ? showTip(tipped(event)) : hideTip()));
document.addEventListener("focusin", (event) => {
  const node = tipped(event);
  if (!node) return hideTip();
  node.setAttribute("aria-description", node.dataset.tip);
  if (node.matches(":focus-visible")) showTip(node);
});
document.addEventListener("focusout", hideTip);
document.addEventListener("scroll", hideTip, true);

// Say something to who listens rather than looks.
const say = (text) => ($("said").textContent = text);

// ---- ticks ---------------------------------------------------------------------------------------

const ticked = new Set(); // positions of training rows
const ticksChanged = []; // called after a change

function tick(index, wanted = !ticked.has(index)) {
  if (wanted) ticked.add(index);
  else ticked.delete(index);
  changedTicks();
}

function changedTicks() {
  for (const call of ticksChanged) call();
}

// ---- bars ----------------------------------------------------------------------------------------

// Bars of `[name, value]` with their unit: to either side of nothing, or to one where that is all.
function bars(values, unit, label) {
  const largest = largestOf(values.map((each) => each[1]));
  const oneSided = values.every((each) => each[1] >= 0) || values.every((each) => each[1] <= 0);
  const list = el("ul", { class: oneSided ? "bars one" : "bars", "aria-label": label });
  for (const [name, value] of values) {
    const bar = el("span", { class: "fill " + (value < 0 ? "neg" : "pos") });
    bar.style.width = ((oneSided ? 100 : 50) * Math.abs(value)) / largest + "%";
    list.append(
      el(
        "li",
        { "data-tip": `${name}: ${value} ${unit}` },
        foreign(name, { class: "barname" }),
        el("span", { class: "track", "aria-hidden": "true" }, bar),
        el("span", { class: "n" }, signed(value)),
      ),
    );
  }
  return list;
}
