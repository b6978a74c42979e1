// A query and a training row side by side, with the score between them split.

let pairTurn = 0;
const tickers = new Map(); // buttons that tick the shown row, with what writes their label

// Text by token, coloured by each one's part of the score.
function tokenText(tokens, unit) {
  const largest = largestOf(tokens.map((each) => each[1]));
  const box = el("p", { class: "said tokens", dir: "auto" });
  for (const [text, value] of tokens) {
    const share = Math.abs(value) / largest;
    const node = el("span", { "data-tip": `${signed(value)} ${unit} of the score, at this token` }, visible(text));
    if (share > 0.04) node.className = value < 0 ? "neg-token" : "pos-token";
    node.style.setProperty("--share", share.toFixed(2));
    box.append(node);
  }
  return box;
}

const ROWS_SHOWN = 8;

async function showPair(q, i) {
  const turn = ++pairTurn;
  if (q === null && i === null) return $("pair").replaceChildren();
  const [query, row, split] = await Promise.all([
    q === null ? null : source.query(q),
    i === null ? null : source.row(i),
    q === null || i === null ? null : source.pair(q, i),
  ]);
  if (turn !== pairTurn) return;
  tickers.clear();
  const unit = state.meta.unit;
  const cards = [];
  if (query) cards.push(textCard(["Query ", foreign(query.id)], query.parts, ...notKnown(query)));
  if (row) {
    const button = el("button", { type: "button", class: "ticker", onclick: () => tick(i) });
    const label = () => {
      button.textContent = ticked.has(i) ? "✓ ticked" : "Tick this row";
      button.setAttribute("aria-pressed", String(ticked.has(i)));
    };
    label();
    tickers.set(button, label);
    cards.push(rowCard(row, undefined, button));
  }
  const parts = [el("div", { class: "sides" }, ...cards)];
  if (query && row) {
    const place = query.rows.indexOf(i);
    parts.unshift(scoreLine(query, place));
    say(`${visible(query.id)}, ${visible(row.id)}: ${place < 0 ? "no score" : signed(query.scores[place]) + " " + unit}`);
    if (split.tokens) {
      parts.push(
        el("h4", {}, "Which tokens of the row"),
        el("p", { class: "muted small" }, `Each token's part of the score, ${unit}: blue with a line helps, red with dots harms. A part counts what a token says of the next one and of later ones.`),
        tokenText(split.tokens, unit),
      );
    }
    if (split.modules) {
      parts.push(el("h4", {}, `Which layers of the adapter, ${unit}`), bars(split.modules, unit, "Parts of the score by layer"));
    }
    if (split.why) parts.push(el("p", { class: "note small" }, split.why));
  }
  if (row && row.queries.length) parts.push(await drives(row, q));
  if (turn !== pairTurn) return;
  $("pair").replaceChildren(...parts);
}

ticksChanged.push(() => tickers.forEach((label) => label()));

const notKnown = (line) => (line.parts.length ? [] : [el("p", { class: "muted" }, "(its text is not known here)")]);

// One sentence on a score: what it is the change `of`, the `number` as it is shown, whom the row
// helps or harms, and what else is known of the score.
function scoreSentence(score, { of, number, rises, whom, more = "", tip = null }) {
  const help = helps(score, rises);
  const words = help > 0 ? `it helps ${whom}: a proponent` : help < 0 ? `it harms ${whom}: an opponent` : `it does nothing to ${whom}`;
  const shown = el("strong", { class: toned(score, rises), tabindex: tip ? "0" : null, "data-tip": tip }, number);
  return el("p", { class: "score-line" }, `Without this row alone, ${of} would change by `, shown, `${more}; ${words}.`);
}

// The sentence on the score of a pair.
function scoreLine(query, place) {
  if (place < 0) return el("p", { class: "score-line" }, "This file keeps no score of this row for this query.");
  const { unit, rises, measurement } = state.meta;
  const value = query.scores[place];
  const about = query.exact && !query.exact[place] ? "about " : "";
  return scoreSentence(value, {
    of: `the query's ${measurement}`,
    number: `${about}${signed(value)} ${unit}`,
    rises,
    whom: "the answer",
    more: ` (rank ${(place + 1).toLocaleString("en")} of ${query.rows.length.toLocaleString("en")})`,
    tip: `${value} ${unit}: the predicted change of the query's ${measurement} if this row alone were removed`,
  });
}

// A training row with what is known of it.
function rowCard(row, title = "Training row ", ...more) {
  return textCard([title, foreign(row.id)], row.parts, ...notKnown(row), row.facts.length ? factList(row.facts) : null, ...more);
}

const rowsTurns = new WeakMap(); // nodes with what was asked of them last

// Show training rows by position, each with a title before its id, below a node or null, in a node of
// the page. Positions below 0 are left out.
async function showTraining(node, above, wanted, ...more) {
  const turn = {};
  rowsTurns.set(node, turn);
  const there = wanted.filter(([, index]) => index >= 0);
  const rows = await Promise.all(there.map(([, index]) => source.row(index)));
  if (rowsTurns.get(node) !== turn) return;
  const cards = rows.map((row, k) => rowCard(row, there[k][0]));
  node.replaceChildren(...[above, el("div", { class: "sides" }, ...cards), ...more].filter((part) => part !== null));
}

// The queries that a row moves most, to go to.
async function drives(row, current) {
  const order = row.scores.map((_, k) => k).sort((a, b) => Math.abs(row.scores[b]) - Math.abs(row.scores[a])).slice(0, ROWS_SHOWN);
  const lines = await source.lines("queries", order.map((k) => row.queries[k]));
  const items = lines.map((line, n) => {
    const value = row.scores[order[n]];
    return el(
      "li",
      {},
      el(
        "button",
        { type: "button", "aria-current": line.index === current ? "true" : null, onclick: () => go({ q: line.index, i: row.index }) },
        el("span", { class: "n " + toned(value, state.meta.rises), "data-tip": `${value} ${state.meta.unit}` }, signed(value)),
        rowText(line),
      ),
    );
  });
  return el("div", {}, el("h4", {}, `The queries that this row moves most, ${state.meta.unit}`), el("ol", { class: "drives" }, ...items));
}
