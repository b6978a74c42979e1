// A long list of which only what is seen is drawn.

// `fill(places)` returns, or promises, one line for each of the places in the list that are seen:
// `{ index, tickable, nodes, label }`. Arrow keys move, Enter chooses, space ticks.
class LongList {
  constructor(node, { height, label, fill, chosen, empty }) {
    Object.assign(this, { node, height, fill, chosen, empty });
    this.count = 0;
    this.active = -1;
    this.drawn = 0;
    this.space = el("div", { class: "space", role: "presentation" });
    node.setAttribute("role", "listbox");
    node.setAttribute("tabindex", "0");
    node.setAttribute("aria-label", label);
    node.replaceChildren(this.space);
    node.addEventListener("scroll", () => this.draw());
    node.addEventListener("keydown", (event) => this.key(event));
    node.addEventListener("click", (event) => this.click(event));
    ticksChanged.push(() => this.draw());
    new ResizeObserver(() => this.draw()).observe(node);
  }

  // Show `count` lines, with the one at `active` chosen.
  show(count, active = -1) {
    this.count = count;
    this.active = active;
    this.space.style.height = count * this.height + "px";
    if (active >= 0) this.reveal(active);
    else this.node.scrollTop = 0;
    return this.draw();
  }

  async draw() {
    const turn = ++this.drawn;
    if (printing && this.count > PRINTED) this.node.dataset.printed = `The first ${PRINTED} of ${this.count.toLocaleString("en")} are printed.`;
    else delete this.node.dataset.printed;
    const first = printing ? 0 : Math.max(0, Math.floor(this.node.scrollTop / this.height) - 4);
    const seen = printing ? PRINTED : Math.ceil(this.node.clientHeight / this.height) + 8;
    const places = [];
    for (let k = first; k < Math.min(this.count, first + seen); k++) places.push(k);
    const lines = places.length ? await this.fill(places) : [];
    if (turn !== this.drawn) return; // another draw has begun since
    const nodes = lines.map((line, k) => this.line(line, places[k]));
    if (!this.count) nodes.push(el("p", { class: "muted empty" }, this.empty));
    this.space.replaceChildren(...nodes);
    const current = this.space.querySelector("[aria-selected=true]");
    if (current) this.node.setAttribute("aria-activedescendant", current.id);
    else this.node.removeAttribute("aria-activedescendant");
  }

  line({ index, tickable, nodes, label }, place) {
    const node = el(
      "div",
      {
        role: "option",
        class: "line" + (tickable ? " tickable" : ""),
        id: `${this.node.id}-${place}`,
        "aria-selected": String(place === this.active),
        "aria-setsize": this.count,
        "aria-posinset": place + 1,
        "aria-checked": tickable ? String(ticked.has(index)) : null,
        "aria-label": label,
        "data-place": place,
        "data-index": index,
      },
      tickable ? el("span", { class: "tick", "aria-hidden": "true" }) : null,
      ...nodes,
    );
    node.style.top = place * this.height + "px";
    node.style.height = this.height + "px";
    return node;
  }

  reveal(place) {
    const top = place * this.height;
    if (top < this.node.scrollTop) this.node.scrollTop = top;
    const bottom = top + this.height - this.node.clientHeight;
    if (bottom > this.node.scrollTop) this.node.scrollTop = bottom;
  }

  choose(place) {
    if (place < 0 || place >= this.count) return;
    this.active = place;
    this.reveal(place);
    this.draw();
    this.chosen(place);
  }

  key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const page = Math.max(1, Math.floor(this.node.clientHeight / this.height) - 1);
    const moves = { ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page };
    moves.Home = -this.count;
    moves.End = this.count;
    if (event.key in moves && this.count) {
      const wanted = Math.max(this.active, event.key === "ArrowUp" ? 1 : -1) + moves[event.key];
      this.choose(Math.min(Math.max(0, wanted), this.count - 1));
    } else if (event.key === "Enter" && this.active >= 0) {
      this.chosen(this.active);
    } else if (event.key === " ") {
      const current = this.space.querySelector("[aria-selected=true].tickable");
      if (current) tick(Number(current.dataset.index));
    } else {
      return;
    }
    event.preventDefault();
  }

  click(event) {
    const line = event.target.closest(".line");
    if (!line) return;
    if (event.target.closest(".tick")) tick(Number(line.dataset.index));
    else this.choose(Number(line.dataset.place));
  }
}

// Lines of every list that are printed, and whether lists are drawn for paper.
const PRINTED = 15;
let printing = false;
const lists = [];

function longList(node, options) {
  const list = new LongList(node, options);
  lists.push(list);
  return list;
}

// A number from a score, above 0 where the row helps.
const helps = (score, rises) => (rises ? score : -score);
const toned = (score, rises) => (helps(score, rises) < 0 ? "neg" : "pos");

// A list of rows or queries by their scores. `of()` says what is listed now: its `kind`, the
// `scored`, `{ index, score, exact }` each, the `largest` size of a score, the `unit`, whether the
// measurement `rises`, and `what` a score is, for its hover text.
function scoredList(node, { of, ...options }) {
  async function fill(places) {
    const { kind, scored, largest, unit, rises, what } = of();
    const shown = places.map((place) => scored[place]);
    const lines = await source.lines(kind, shown.map((each) => each.index));
    return lines.map((line, k) => {
      const { score, exact } = shown[k];
      const bar = el("span", { class: "fill " + toned(score, rises) });
      bar.style.width = Math.max(2, (100 * Math.abs(score)) / largest) + "%";
      const number = el(
        "span",
        { class: "score " + toned(score, rises), "data-tip": `${exact ? "" : "about "}${score} ${unit}${what}` },
        el("span", { class: "n" }, (exact ? "" : "≈ ") + signed(score)),
        el("span", { class: "meter", "aria-hidden": "true" }, bar),
      );
      return {
        index: line.index,
        tickable: kind === "rows",
        label: `${line.id} ${line.group}: ${signed(score)} ${unit}; ${line.preview}`,
        nodes: [number, rowText(line)],
      };
    });
  }
  return longList(node, { height: 50, fill, ...options });
}

// The two lines of text of a row or query: id and group, and how it begins.
function rowText(line) {
  return el(
    "span",
    { class: "what" },
    el(
      "span",
      { class: "first" },
      foreign(line.id, { class: "id" }),
      line.group ? foreign(line.group, { class: "group" }) : null,
    ),
    foreign(line.preview || "(text not known)", { class: "preview" }),
  );
}
