// The source of a page that a server answers. What each method returns is said in
// analysis/explorer/contract.py.

async function answerOf(path, posted) {
  const options = { credentials: "omit", cache: "no-store", referrerPolicy: "no-referrer" };
  if (posted !== undefined) {
    options.method = "POST";
    options.headers = { "Content-Type": "application/json" };
    options.body = JSON.stringify(posted);
  }
  let response;
  try {
    response = await fetch("api/" + path, options);
  } catch {
    throw new Error("the server does not answer: is analysis serve still running?");
  }
  const found = await response.json().catch(() => ({ error: "the server's answer cannot be read" }));
  if (!response.ok) throw new Error(found.error ?? "the server refused");
  return found;
}

const source = (() => {
  const LINES = 1000; // that are asked for at once
  const KEPT = 20; // answers to the same question
  const kept = new Map();

  function once(path) {
    if (!kept.has(path)) {
      const answer = answerOf(path);
      kept.set(path, answer);
      answer.catch(() => kept.delete(path));
      if (kept.size > KEPT) kept.delete(kept.keys().next().value);
    }
    return kept.get(path);
  }

  async function lines(kind, indices) {
    const parts = [];
    for (let k = 0; k < indices.length; k += LINES) {
      parts.push(answerOf(`lines?kind=${kind}&indices=${indices.slice(k, k + LINES).join(",")}`));
    }
    return (await Promise.all(parts)).flat();
  }

  return {
    meta: () => once("meta"),
    search: (kind, text) => answerOf(`search?kind=${kind}&text=${encodeURIComponent(text)}`),
    lines,
    query: (q) => once(`query/${q}`),
    row: (i) => once(`row/${i}`),
    pair: (q, i) => once(`pair/${q}/${i}`),
    section: (name) => once(`section/${encodeURIComponent(name)}`),
  };
})();
