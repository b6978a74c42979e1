// Sections that are lists of blocks (analysis/explorer/blocks.py).

const SHOWN = 100; // lines of a table before all are asked for

const drawers = {
  text: (block) => el("p", { class: "note " + (block.tone ?? "") }, visible(block.text)),
  facts: (block) => el("div", { class: "card" }, block.title ? el("h3", {}, visible(block.title)) : null, factList(block.facts)),
  table: drawTable,
  rows: drawRows,
  answers: drawAnswers,
  plot,
};

function factList(facts) {
  return el(
    "dl",
    {},
    ...facts.map((fact) =>
      el("div", {}, el("dt", { tabindex: "0", "data-tip": fact.help }, fact.label), el("dd", {}, foreign(fact.value))),
    ),
  );
}

// A cell's hover text: the number in full, its unit, and what it is.
function cellTip(value, column) {
  const full = typeof value === "number" ? (column.type === "percent" ? 100 * value : value) : value;
  return [`${column.label}: ${full} ${column.unit}`.trim(), column.help].filter(Boolean).join(". ");
}

function drawTable(block) {
  const numeric = (column) => !["text", "id"].includes(column.type);
  let rows = block.rows;
  let sorted = { column: -1, down: true };
  let all = rows.length <= SHOWN;
  const body = el("tbody");
  const heads = block.columns.map((column, k) =>
    el(
      "th",
      { scope: "col", class: numeric(column) ? "n" : "", "aria-sort": "none" },
      el(
        "button",
        { type: "button", "data-tip": `${column.help} ${column.unit ? "In " + column.unit + "." : ""} Click to sort.`.trim(), onclick: () => sort(k) },
        column.label,
        column.unit ? el("span", { class: "unit" }, column.unit) : null,
      ),
    ),
  );
  const more = el("button", { type: "button", class: "more", onclick: () => ((all = true), fill()) });

  function fill() {
    const shown = all ? rows : rows.slice(0, SHOWN);
    body.replaceChildren(
      ...shown.map((row) =>
        el(
          "tr",
          {},
          ...row.map((value, k) => {
            const column = block.columns[k];
            const text = formatted(value, column.type);
            const tip = numeric(column) && text ? cellTip(value, column) : null;
            const kind = numeric(column) ? "n" : text.length > 30 ? "t long" : "t";
            return el("td", { class: kind, "data-tip": tip }, numeric(column) ? text : foreign(text));
          }),
        ),
      ),
    );
    more.hidden = all;
    more.textContent = `Show all ${rows.length.toLocaleString("en")} lines`;
  }

  function sort(k) {
    sorted = { column: k, down: sorted.column === k ? !sorted.down : numeric(block.columns[k]) };
    const sign = sorted.down ? -1 : 1;
    const missing = (value) => value === null || value === "";
    rows = [...block.rows].sort((a, b) => {
      if (missing(a[k]) || missing(b[k])) return missing(a[k]) - missing(b[k]);
      return typeof a[k] === "number" ? sign * (a[k] - b[k]) : sign * String(a[k]).localeCompare(String(b[k]));
    });
    heads.forEach((head, n) => head.setAttribute("aria-sort", n !== k ? "none" : sorted.down ? "descending" : "ascending"));
    fill();
  }

  fill();
  const table = el("table", {}, el("caption", {}, el("span", {}, visible(block.title))), el("thead", {}, el("tr", {}, ...heads)), body);
  return el("div", { class: "scroll", tabindex: "0", role: "group", "aria-label": block.title }, table, more);
}

// The cleaning list: rows that can be ticked, of one reason or of all.
function drawRows(block) {
  const at = Object.fromEntries(block.columns.map((column, k) => [column.label, k]));
  const rest = block.columns.map((column, k) => [column, k]).filter(([column]) => !["id", "reason", "score", "evidence", "gain"].includes(column.label));
  const cell = (row, name) => (name in at ? row[at[name]] : null);
  const means = (name) => (Object.hasOwn(block.meanings, name) ? block.meanings[name] : null);
  let places = block.rows.map((_, k) => k);
  const node = el("div", { class: "list tall", id: "cleaning-list" });
  const count = el("p", { class: "muted small" });
  const shown = el("div", { id: "cleaning-row" });
  const reason = el(
    "select",
    { id: "reason", onchange: () => narrow() },
    el("option", { value: "" }, `every reason (${block.rows.length.toLocaleString("en")})`),
    ...Object.entries(block.reasons).map(([name, number]) =>
      el("option", { value: name }, `${visible(name)}${means(name) ? ": " + means(name) : ""} (${number.toLocaleString("en")})`),
    ),
  );
  const indices = () => new Set(places.map((k) => block.index[k]).filter((index) => index >= 0));
  const list = longList(node, {
    height: 66,
    label: block.title,
    empty: "No row with this reason.",
    chosen: (place) => showEntry(places[place]),
    fill: async (seen) => {
      const known = seen.map((place) => block.index[places[place]]).filter((index) => index >= 0);
      const lines = new Map((await source.lines("rows", known)).map((line) => [line.index, line]));
      return seen.map((place) => {
        const row = block.rows[places[place]];
        const index = block.index[places[place]];
        const line = lines.get(index) ?? { id: cell(row, "id"), group: "", preview: "(not a row of this run)" };
        const score = cell(row, "score");
        const gain = cell(row, "gain");
        const also = rest.map(([column, k]) => (row[k] ? `${column.label}: ${row[k]}` : "")).filter(Boolean).join("; ");
        return {
          index,
          tickable: index >= 0,
          label: [line.id, cell(row, "reason"), cell(row, "evidence")].join(", "),
          nodes: [
            el("span", { class: "what" },
              el("span", { class: "first" }, foreign(line.id, { class: "id" }), foreign(cell(row, "reason") ?? "", { class: "chip", "data-tip": means(cell(row, "reason") ?? "") }),
                score === null ? null : el("span", { class: "n", "data-tip": cellTip(score, block.columns[at.score]) }, short(score)),
                gain === null ? null : el("span", { class: "n muted gain", "data-tip": cellTip(gain, block.columns[at.gain]) }, `gain ${short(gain)}`)),
              foreign([cell(row, "evidence"), also].filter(Boolean).join(" · "), { class: "evidence", "data-tip": visible(cell(row, "evidence") ?? "") }),
              foreign(line.preview || "(text not known)", { class: "preview" })),
          ],
        };
      });
    },
  });

  // What was seen of the chosen entry, in full, with the row and the one to compare it with.
  function showEntry(k) {
    const index = block.index[k];
    const gain = cell(block.rows[k], "gain");
    const gained = gain === null ? "" : `gain ${short(gain)} ${block.columns[at.gain].unit}`;
    const seen = [cell(block.rows[k], "evidence"), gained].filter(Boolean).join(" · ");
    const why = [cell(block.rows[k], "reason"), seen].filter(Boolean).join(": ");
    const more = index >= 0 && state.meta.scored
      ? el("button", { type: "button", onclick: () => go({ i: index }) }, "Show the queries that it moves")
      : null;
    const said = why ? el("p", { class: "score-line" }, foreign(why)) : null;
    return showTraining(shown, said, [["Training row ", index], ["To compare with: ", block.other[k]]], more);
  }

  function narrow() {
    places = block.rows.map((_, k) => k).filter((k) => !reason.value || cell(block.rows[k], "reason") === reason.value);
    count.textContent = `${places.length.toLocaleString("en")} entries`;
    list.show(places.length);
    shown.replaceChildren();
  }

  narrow();
  const all = (wanted) => {
    for (const index of indices()) wanted ? ticked.add(index) : ticked.delete(index);
    changedTicks();
  };
  const suggested = () => {
    for (const k of places) if (cell(block.rows[k], "suggested") === "remove" && block.index[k] >= 0) ticked.add(block.index[k]);
    changedTicks();
  };
  return el(
    "div",
    {},
    el(
      "div",
      { class: "bar" },
      el("label", {}, "Reason ", reason),
      el("button", { type: "button", onclick: () => all(true), "data-tip": "Tick every row of this reason" }, "Tick these"),
      el("button", { type: "button", onclick: () => all(false) }, "Untick these"),
      "suggested" in at
        ? el("button", { type: "button", onclick: suggested, "data-tip": "Tick the rows that analysis clean suggests to remove" }, "Tick those to remove")
        : null,
    ),
    count,
    node,
    shown,
  );
}

function drawAnswers(block) {
  return el(
    "div",
    { class: "answers" },
    el("h3", {}, visible(block.title)),
    ...block.answers.map((answer) =>
      el(
        "details",
        {},
        el("summary", {}, foreign(answer.id, { class: "id" }), " ", foreign(answer.prompt, { class: "preview" })),
        el("div", { class: "sides" }, ...answer.said.map(([who, text]) => textCard(who, [["", text]]))),
      ),
    ),
  );
}

// A card with a text by role. The title is a text, or several children.
function textCard(title, parts, ...more) {
  return el(
    "article",
    { class: "card" },
    el("h4", {}, ...(Array.isArray(title) ? title : [visible(title)])),
    ...parts.map(([role, text]) =>
      el("div", { class: "part" }, role ? el("span", { class: "role" }, visible(role)) : null, el("p", { class: "said", dir: "auto" }, visible(text))),
    ),
    ...more,
  );
}

const filling = new Map(); // sections that are filled or being filled, by their nodes

function fillSection(node) {
  if (!filling.has(node)) filling.set(node, fill(node));
  return filling.get(node);
}

async function fill(node) {
  try {
    const { blocks } = await source.section(node.dataset.section);
    const cards = blocks.filter((block) => block.kind === "facts");
    const others = blocks.filter((block) => block.kind !== "facts");
    const facts = cards.length ? [el("div", { class: "cards" }, ...cards.map((block) => drawers.facts(block)))] : [];
    node.replaceChildren(...facts, ...others.map((block) => drawers[block.kind](block)));
    if (!blocks.length) node.replaceChildren(el("p", { class: "muted" }, "Nothing yet."));
  } catch (error) {
    node.replaceChildren(el("p", { class: "note bad" }, `This section could not be read: ${error.message}`));
  }
  node.dataset.filled = "yes";
}
