// A question that a person types: the adapter's own answer, ticks for which of its tokens to
// explain, and the training rows behind them.

(() => {
  const WAIT = 400; // milliseconds between two looks at how far a question is
  const asked = { job: 0, tokens: [], on: [], list: null };

  const status = el("p", { class: "muted", id: "ask-status", role: "status", "aria-live": "polite" });
  const prompt = textBox("ask-prompt", "Your question");
  const answer = textBox("ask-answer", "Answer to explain (empty: the adapter's own)");
  const chat = el("input", { type: "checkbox", id: "ask-chat" });
  const button = el("button", { type: "submit", id: "ask-go" }, "Ask");
  const out = el("div", { id: "ask-out" });

  function textBox(id, label) {
    const box = el("textarea", { id, rows: "3", spellcheck: "false", "aria-label": label });
    Object.assign(box.style, {
      width: "100%", resize: "vertical", font: "inherit", color: "inherit", background: "var(--page)",
      border: "1px solid var(--line)", borderRadius: "4px", padding: ".4rem .6rem",
    });
    box.dir = "auto";
    return box;
  }

  function spaced(node) {
    node.style.marginTop = "1rem";
    return node;
  }

  const form = el(
    "form",
    { autocomplete: "off" },
    el("label", { for: "ask-prompt" }, "Your question, put as the training rows are"),
    prompt,
    el("details", {}, el("summary", {}, "Explain another answer than the adapter's own"), answer),
    el("div", { class: "bar" }, button, el("label", {}, chat, " as a turn of a conversation (chat template)")),
    status,
  );
  const section = el(
    "section",
    { id: "ask", "aria-labelledby": "ask-title" },
    el("h2", { id: "ask-title" }, "Ask the adapter"),
    el("p", { class: "muted" }, "What would it say, and which training rows are behind that? The model is loaded with the first question; answers and scores stay on this machine."),
    form,
    out,
  );
  $("main").prepend(section);
  document.querySelector("nav ul").prepend(el("li", {}, el("a", { href: "#ask" }, "Ask the adapter")));

  document.querySelector("footer p").firstChild.textContent =
    "This page is served from this machine by analysis serve. plotly.js is by Plotly, Inc., under the MIT licence. Keys: ";

  const sleep = (time) => new Promise((resolve) => setTimeout(resolve, time));

  // Ask for work, and wait until it is done.
  async function done(path, posted) {
    const { job } = await answerOf(path, posted);
    for (;;) {
      const now = await answerOf("asked");
      if (now.job !== job) throw new Error("another question was asked in the meantime");
      if (now.state === "done") return { job, seconds: now.seconds, result: now.result };
      if (now.state === "failed") throw new Error(now.doing);
      status.textContent = `${now.doing} … ${now.seconds.toFixed(0)} s`;
      await sleep(WAIT);
    }
  }

  function working(is) {
    for (const node of section.querySelectorAll("button")) node.disabled = is;
  }

  async function attempt(work) {
    working(true);
    status.className = "muted";
    try {
      await work();
    } catch (error) {
      status.className = "note bad";
      status.textContent = visible(error.message);
    } finally {
      working(false);
    }
  }

  form.addEventListener("submit", (event) => {
    event.preventDefault();
    attempt(ask);
  });
  prompt.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
  });

  async function ask() {
    const posted = { prompt: prompt.value, form: chat.checked ? "chat" : "plain" };
    if (answer.value.trim()) posted.answer = answer.value;
    status.textContent = "asking …";
    const { job, seconds, result } = await done("ask", posted);
    Object.assign(asked, { job, tokens: result.tokens, on: result.tokens.map((_, k) => k < result.said) });
    status.textContent = `answered in ${seconds.toFixed(1)} s`;
    showAnswer(result);
  }

  // The answer, token by token: each is a switch.
  function showAnswer(result) {
    const box = el("p", { class: "said tokens", id: "ask-tokens", dir: "auto" });
    const switches = asked.tokens.map((text, k) => {
      const node = el("span", { role: "checkbox", tabindex: "0", "data-k": k, "aria-label": text.trim() || "blank" }, visible(text) || "·");
      node.style.cursor = "pointer";
      node.style.border = "1px solid var(--line)";
      node.style.padding = "1px 2px";
      return node;
    });
    const explain = el("button", { type: "button", id: "ask-explain", onclick: () => attempt(look) });
    function draw() {
      switches.forEach((node, k) => {
        node.setAttribute("aria-checked", String(asked.on[k]));
        node.style.background = asked.on[k] ? "var(--chosen)" : "none";
        node.style.textDecoration = asked.on[k] ? "underline 2px" : "none";
        node.style.opacity = asked.on[k] ? "1" : ".6";
      });
      const count = asked.on.filter(Boolean).length;
      explain.textContent = count === asked.on.length ? "Explain the whole answer" : `Explain ${count} token${count === 1 ? "" : "s"}`;
      explain.disabled = count === 0;
    }
    const turn = (event) => {
      const node = event.target.closest("[data-k]");
      if (!node) return;
      asked.on[node.dataset.k] = !asked.on[node.dataset.k];
      draw();
    };
    const all = (wanted) => ((asked.on = asked.on.map(() => wanted)), draw());
    box.append(...switches);
    box.addEventListener("click", turn);
    box.addEventListener("keydown", (event) => {
      if (event.key !== " " && event.key !== "Enter") return;
      event.preventDefault();
      turn(event);
    });
    draw();
    out.replaceChildren(
      el(
        "div",
        { class: "card" },
        el("h3", {}, result.own ? "The adapter answers" : "The answer to explain"),
        el("p", { class: "said", id: "ask-said", dir: "auto" }, visible(result.answer)),
        spaced(el("h4", {}, "Which of its tokens should be explained?")),
        box,
        result.ended ? null : el("p", { class: "note" }, "The answer was cut here: it is longer."),
        el(
          "div",
          { class: "bar" },
          explain,
          el("button", { type: "button", onclick: () => all(true) }, "All tokens"),
          el("button", { type: "button", id: "ask-none", onclick: () => all(false) }, "None"),
        ),
      ),
      el("div", { id: "ask-rows" }),
    );
  }

  async function look() {
    const tokens = asked.on.flatMap((on, k) => (on ? [k] : []));
    const { seconds, result } = await done("explain", { job: asked.job, tokens });
    status.textContent = `explained in ${seconds.toFixed(1)} s`;
    showRows(result, tokens);
  }

  function showRows(result, tokens) {
    const largest = largestOf(result.scores);
    const what = tokens.length === asked.tokens.length ? "the whole answer" : tokens.map((k) => asked.tokens[k]).join("");
    const node = el("div", { class: "list", id: "ask-list" });
    const order = el("select", {}, el("option", { value: "first" }, "proponents first"), el("option", { value: "last" }, "opponents first"));
    const detail = el("div", { id: "ask-row" });
    let places = result.rows.map((_, k) => k);
    if (asked.list) {
      ticksChanged.splice(ticksChanged.indexOf(asked.list.drawTicks), 1);
      lists.splice(lists.indexOf(asked.list), 1);
    }
    const before = ticksChanged.length;
    const list = longList(node, {
      height: 50,
      label: "Training rows behind the answer",
      empty: "There are no training rows.",
      chosen: (place) => attempt(() => showRow(places[place])),
      fill: async (seen) => {
        const shown = seen.map((place) => places[place]);
        const lines = await source.lines("rows", shown.map((k) => result.rows[k]));
        return lines.map((line, n) => {
          const score = result.scores[shown[n]];
          const harm = result.rises ? score : -score;
          const fill = el("span", { class: "fill " + (harm < 0 ? "neg" : "pos") });
          fill.style.width = Math.max(2, (100 * Math.abs(score)) / largest) + "%";
          const number = el(
            "span",
            { class: "score " + (harm < 0 ? "neg" : "pos"), "data-tip": `${score} ${result.unit}: how the loss of these tokens would change if the row alone were removed` },
            el("span", { class: "n" }, signed(score)),
            el("span", { class: "meter", "aria-hidden": "true" }, fill),
          );
          return { index: line.index, tickable: true, label: `${line.id} ${line.group}: ${signed(score)} ${result.unit}; ${line.preview}`, nodes: [number, rowText(line)] };
        });
      },
    });
    list.drawTicks = ticksChanged[before];
    asked.list = list;

    async function showRow(k) {
      const row = await source.row(result.rows[k]);
      const score = result.scores[k];
      const harm = result.rises ? score : -score;
      const number = el("strong", { class: harm < 0 ? "neg" : "pos" }, `${signed(score)} ${result.unit}`);
      detail.replaceChildren(
        el("p", { class: "score-line" }, "Without this row alone, the mean loss of these tokens would change by ", number, `; ${harm > 0 ? "it helps them: a proponent" : harm < 0 ? "it harms them: an opponent" : "it does nothing to them"}.`),
        el("div", { class: "sides" }, textCard(["Training row ", foreign(row.id)], row.parts, row.facts.length ? factList(row.facts) : null)),
      );
    }

    order.addEventListener("change", () => {
      places = [...places].reverse();
      list.show(places.length);
    });
    const parts = [
      spaced(el("h3", {}, "Rows behind ", foreign(what))),
      el("div", { class: "bar small" }, el("label", {}, "Order ", order)),
      result.converged ? null : el("p", { class: "note warn" }, "The solver did not converge: read these scores with care."),
      result.left_out ? el("p", { class: "note" }, `${result.left_out.toLocaleString("en")} rows in the middle are left out.`) : null,
      el("p", { class: "muted small" }, `Scores in ${result.unit}: ${result.how}.`),
      node,
      detail,
    ];
    $("ask-rows").replaceChildren(...parts.filter((part) => part !== null));
    list.show(places.length, places.length ? 0 : -1);
    if (places.length) showRow(places[0]);
  }

  answerOf("asking").then((found) => {
    chat.checked = found.form === "chat";
    prompt.maxLength = answer.maxLength = found.characters;
    prompt.placeholder = visible(found.example);
    if (found.note) form.before(el("p", { class: "note" }, found.note));
  });
})();
