// The query explorer: from a query to the rows behind it, or from a row to the queries it moves.

const state = { meta: null, from: "queries", q: null, i: null, left: [], right: [], all: [], largest: 1 };

const other = () => (state.from === "queries" ? "rows" : "queries");
const whole = (number) => number.toLocaleString("en");
let leftList = null;
let rightList = null;

function makeLists() {
  leftList = longList($("left"), {
    height: 50,
    label: "Queries",
    empty: "Nothing contains these words.",
    chosen: (place) => choose(state.left[place]),
    fill: async (places) => {
      const kind = state.from;
      const lines = await source.lines(kind, places.map((place) => state.left[place]));
      return lines.map((line) => ({
        index: line.index,
        tickable: kind === "rows",
        label: `${line.id} ${line.group}: ${line.preview}`,
        nodes: [rowText(line)],
      }));
    },
  });
  rightList = scoredList($("right"), {
    label: "Rows behind the query",
    empty: "No scores to show.",
    chosen: (place) => pick(state.right[place].index),
    of: () => ({
      kind: other(),
      scored: state.right,
      largest: state.largest,
      unit: state.meta.unit,
      rises: state.meta.rises,
      what: ", if the row alone were removed",
    }),
  });
}

async function search() {
  const text = $("search").value;
  const kind = state.from;
  const found = await source.search(kind, text);
  if (kind !== state.from || text !== $("search").value) return;
  state.left = found;
  const one = found.length === 1;
  const noun = kind === "queries" ? (one ? "query" : "queries") : one ? "training row" : "training rows";
  const current = state.from === "queries" ? state.q : state.i;
  const { first, first_of: of, queries } = state.meta;
  const looked = of < queries ? ` of the first ${whole(of)}` : "";
  const chosen = kind === "queries" && !text && !one && of > 1 && current === first;
  const why = chosen ? `; chosen first: the one${looked} that a row helps most` : "";
  $("left-count").textContent = `${whole(found.length)} ${noun}${why}`;
  await leftList.show(state.left.length, state.left.indexOf(current));
}

// Choose on the left: what is on the right follows, and its first line is chosen, or `kept`.
async function choose(index, kept = null) {
  const from = state.from;
  if (from === "queries") state.q = index;
  else state.i = index;
  const found = from === "queries" ? await source.query(index) : await source.row(index);
  if (from !== state.from || index !== (from === "queries" ? state.q : state.i)) return;
  const places = from === "queries" ? found.rows : found.queries;
  state.all = places.map((place, k) => ({ index: place, score: found.scores[k], exact: found.exact ? found.exact[k] : true }));
  state.largest = largestOf(found.scores);
  const title = $("right-title");
  title.replaceChildren(from === "queries" ? "Rows behind " : "Queries moved by ", foreign(found.id));
  $("right-of").replaceChildren(foreign(found.preview));
  await arrange();
  const there = state.right.findIndex((each) => each.index === kept);
  if (there >= 0) {
    rightList.show(state.right.length, there);
    await pick(kept);
  } else if (state.right.length) {
    rightList.active = 0;
    rightList.draw();
    await pick(state.right[0].index);
  } else {
    await showPair(state.q, from === "rows" ? state.i : null);
  }
}

// Order and filter of the right list.
async function arrange() {
  const order = $("order").value;
  let right = [...state.all];
  if (order === "last") right.reverse();
  if (order === "size") right.sort((a, b) => Math.abs(b.score) - Math.abs(a.score));
  const words = $("filter").value;
  if (words.trim()) {
    const found = new Set(await source.search(other(), words));
    if (words !== $("filter").value) return;
    right = right.filter((each) => found.has(each.index));
  }
  state.right = right;
  const signs = right.map((each) => Math.sign(helps(each.score, state.meta.rises)));
  const helping = signs.filter((sign) => sign > 0).length;
  const harming = signs.filter((sign) => sign < 0).length;
  const verbs = state.from === "queries" ? ["help", "harm"] : ["helped", "harmed"];
  $("right-count").textContent = `${whole(right.length)} with a score (${state.meta.unit}): ${whole(helping)} ${verbs[0]}, ${whole(harming)} ${verbs[1]}`;
  await rightList.show(right.length);
}

// Choose on the right: the pair is shown.
async function pick(index) {
  if (state.from === "queries") state.i = index;
  else state.q = index;
  address();
  await showPair(state.q, state.i);
}

function address() {
  const parts = [];
  if (state.q !== null) parts.push(`q=${state.q}`);
  if (state.i !== null) parts.push(`r=${state.i}`);
  try {
    history.replaceState(null, "", "#" + parts.join("&"));
  } catch {
    // a page that is embedded elsewhere may not change its address
  }
}

// Show a query, a row or both in the explorer.
async function go({ q = null, i = null }, scroll = true) {
  if ((i !== null && i < 0) || !state.meta.scored) return;
  const from = q === null ? "rows" : "queries";
  await startFrom(from, q === null ? i : q, q === null ? null : i);
  if (scroll) $("queries").scrollIntoView({ block: "start" });
}

async function startFrom(from, index = null, kept = null) {
  if (state.from !== from) {
    state.from = from;
    document.querySelector(`input[name=from][value=${from}]`).checked = true;
    $("search").value = "";
    $("left-title").textContent = from === "queries" ? "Queries" : "Training rows";
    $("left").setAttribute("aria-label", from === "queries" ? "Queries" : "Training rows");
    $("right").setAttribute("aria-label", from === "queries" ? "Rows behind the query" : "Queries that the row moves");
    const labels = from === "queries" ? ["proponents first", "opponents first"] : ["helped most first", "harmed most first"];
    labels.forEach((label, k) => ($("order").options[k].textContent = label));
  }
  const wanted = index ?? (from === "queries" ? state.q : state.i) ?? 0;
  const count = from === "queries" ? state.meta.queries : state.meta.rows;
  const place = Math.min(Math.max(0, wanted), count - 1);
  if (from === "queries") state.q = place;
  else state.i = place;
  await search();
  if (count > 0) await choose(place, kept);
}

function startExplorer() {
  makeLists();
  const later = (call, wait) => {
    let timer = null;
    return () => (clearTimeout(timer), (timer = setTimeout(call, wait)));
  };
  $("search").addEventListener("input", later(search, 120));
  $("search").addEventListener("keydown", (event) => {
    if (event.key === "ArrowDown" || event.key === "Enter") {
      event.preventDefault();
      $("left").focus();
      if (leftList.active < 0) leftList.choose(0);
    }
  });
  $("filter").addEventListener("input", later(arrange, 120));
  $("order").addEventListener("change", arrange);
  for (const radio of document.querySelectorAll("input[name=from]")) {
    radio.addEventListener("change", () => startFrom(radio.value));
  }
  const asked = new URLSearchParams(location.hash.slice(1));
  const number = (name, count) => {
    const value = Number.parseInt(asked.get(name) ?? "", 10);
    return value >= 0 && value < count ? value : null;
  };
  const q = number("q", state.meta.queries);
  const i = number("r", state.meta.rows);
  return q === null && i !== null ? startFrom("rows", i) : startFrom("queries", q ?? state.meta.first, i);
}
