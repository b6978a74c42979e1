// A question that a person types: the adapter's own answer, ticks for which of its tokens to
// explain, and the training rows behind them.

(() => {
  const WAIT = 400; // milliseconds between two looks at how far a question is
  const asked = { job: 0, tokens: [], on: [], working: false, draw: () => {} }; // the last answer
  const listed = { scored: [], largest: 1, unit: "", rises: true }; // the rows behind it

  const status = el("p", { class: "muted", id: "ask-status", role: "status", "aria-live": "polite" });
  const textBox = (id, label) => el("textarea", { id, rows: "3", spellcheck: "false", "aria-label": label, dir: "auto" });
  const prompt = textBox("ask-prompt", "Your question");
  const answer = textBox("ask-answer", "Answer to explain (empty: the adapter's own)");
  const chat = el("input", { type: "checkbox", id: "ask-chat" });
  const button = el("button", { type: "submit", id: "ask-go" }, "Ask");
  const out = el("div", { id: "ask-out" });

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
  // After what explains the queries that are there, which is in sight when the page opens.
  ($("queries") ?? $("start")).after(section);
  const link = (...more) => el("li", {}, el("a", { href: "#ask" }, "Ask the adapter"), ...more);
  const queries = document.querySelector("nav [href='#queries']");
  if (queries) queries.parentNode.after(link());
  else document.querySelector("nav ul").prepend(link());
  document.querySelector(".ways li").after(link(" ", el("small", { class: "muted" }, "Type a question of your own: its answer, and the rows behind it.")));

  $("where").textContent = "This page is served from this machine by analysis serve.";

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
    asked.working = button.disabled = is;
    asked.draw();
  }

  function failed(error) {
    status.className = "note bad";
    status.textContent = visible(error.message);
  }

  async function attempt(work) {
    if (asked.working) return;
    working(true);
    status.className = "muted";
    await work().catch(failed);
    working(false);
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
      const shown = text.trim() ? visible(text) : "·";
      return el("span", { role: "checkbox", tabindex: "0", "data-k": k, "aria-label": visible(text.trim()) || "blank" }, shown);
    });
    const explain = el("button", { type: "button", id: "ask-explain", onclick: () => attempt(look) });
    function draw() {
      switches.forEach((each, k) => each.setAttribute("aria-checked", String(asked.on[k])));
      const count = asked.on.filter(Boolean).length;
      explain.textContent = count === asked.on.length ? "Explain the whole answer" : `Explain ${count} token${count === 1 ? "" : "s"}`;
      explain.disabled = asked.working || count === 0;
    }
    asked.draw = draw;
    const turn = (event) => {
      const chosen = event.target.closest("[data-k]");
      if (!chosen) return;
      asked.on[chosen.dataset.k] = !asked.on[chosen.dataset.k];
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
        el("h4", {}, "Which of its tokens should be explained?"),
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
    await showRows(result, tokens);
  }

  const node = el("div", { class: "list", id: "ask-list" });
  const detail = el("div", { id: "ask-row" });
  const list = scoredList(node, {
    label: "Training rows behind the answer",
    empty: "There are no training rows.",
    chosen: (place) => showRow(place).catch(failed),
    of: () => ({ ...listed, kind: "rows", what: ": how the loss of these tokens would change if the row alone were removed" }),
  });

  function showRow(place) {
    const { index, score } = listed.scored[place];
    const said = scoreSentence(score, {
      of: "the mean loss of these tokens",
      number: `${signed(score)} ${listed.unit}`,
      rises: listed.rises,
      whom: "them",
    });
    return showTraining(detail, said, [["Training row ", index]]);
  }

  async function showRows(result, tokens) {
    const what = tokens.length === asked.tokens.length ? "the whole answer" : tokens.map((k) => asked.tokens[k]).join("");
    const order = el("select", {}, el("option", {}, "proponents first"), el("option", {}, "opponents first"));
    Object.assign(listed, {
      scored: result.rows.map((index, k) => ({ index, score: result.scores[k], exact: true })),
      largest: largestOf(result.scores),
      unit: result.unit,
      rises: result.rises,
    });
    order.addEventListener("change", () => {
      listed.scored.reverse();
      list.show(listed.scored.length);
    });
    const parts = [
      el("h3", {}, "Rows behind ", foreign(what)),
      el("div", { class: "bar small" }, el("label", {}, "Order ", order)),
      result.converged ? null : el("p", { class: "note warn" }, "The solver did not converge: read these scores with care."),
      result.left_out ? el("p", { class: "note" }, `${result.left_out.toLocaleString("en")} rows in the middle are left out.`) : null,
      el("p", { class: "muted small" }, `Scores in ${result.unit}: ${result.how}.`),
      node,
      detail,
    ];
    $("ask-rows").replaceChildren(...parts.filter((part) => part !== null));
    const some = listed.scored.length > 0;
    await Promise.all([list.show(listed.scored.length, some ? 0 : -1), some ? showRow(0) : null]);
  }

  answerOf("asking").then((found) => {
    chat.checked = found.form === "chat";
    prompt.maxLength = answer.maxLength = found.characters;
    prompt.placeholder = visible(found.example);
    if (found.note) form.before(el("p", { class: "note" }, found.note));
  });
})();
