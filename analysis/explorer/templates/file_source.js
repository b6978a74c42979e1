// The source of a page that is a file: answers come from the packed blocks in it.
// What each method returns is said in analysis/explorer/contract.py.

const source = (() => {
  const meta = JSON.parse(document.getElementById("meta").textContent);
  const unpacked = new Map();
  function once(name, read) {
    if (!unpacked.has(name)) unpacked.set(name, unpackedBlock(name).then(read));
    return unpacked.get(name);
  }

  const asText = (buffer) => new TextDecoder().decode(buffer);
  const json = (name) => once(name, (buffer) => JSON.parse(asText(buffer)));
  const digits = (value) => Number(value.toPrecision(5));

  // The scores as one function of (query, row), NaN where there is none.
  async function scores() {
    const form = meta.form;
    const count = meta.rows;
    if (form.name === "strongest") {
      const kept = await json("scores");
      return { kept, of: () => NaN };
    }
    const buffer = await once("scores", (each) => each);
    if (form.name === "float32") {
      const values = new Float32Array(buffer);
      return { kept: null, of: (q, i) => values[q * count + i] };
    }
    const codes = new Int8Array(buffer);
    const decoded = new Float64Array(256);
    for (let code = -form.steps; code <= form.steps; code++) {
      decoded[code + 128] = Math.sign(code) * Math.abs(code / form.steps) ** form.power;
    }
    const of = (q, i) => decoded[codes[q * count + i] + 128] * form.largest[q];
    return { kept: await json("strongest"), of };
  }

  // `[place, score, exact]` of every known score of a query or of a row, proponents first.
  function ordered(found) {
    const sign = meta.rises ? 1 : -1;
    return found.sort((a, b) => sign * (b[1] - a[1]) || a[0] - b[0]);
  }

  async function ofQuery(q) {
    const { kept, of } = await scores();
    const exact = new Map();
    if (kept !== null) kept.rows[q].forEach((i, k) => exact.set(i, kept.scores[q][k]));
    const found = [];
    if (meta.form.name === "strongest") {
      exact.forEach((score, i) => found.push([i, score, true]));
    } else {
      for (let i = 0; i < meta.rows; i++) {
        const score = exact.get(i) ?? of(q, i);
        if (Number.isFinite(score)) found.push([i, score, exact.has(i) || kept === null]);
      }
    }
    return ordered(found);
  }

  async function ofRow(i) {
    const { kept, of } = await scores();
    const found = [];
    for (let q = 0; q < meta.queries; q++) {
      const place = kept === null ? -1 : kept.rows[q].indexOf(i);
      const score = place < 0 ? of(q, i) : kept.scores[q][place];
      if (Number.isFinite(score)) found.push([q, score, place >= 0 || kept === null]);
    }
    return ordered(found);
  }

  const said = new Map(); // what is searched of each row, in lower case

  async function search(kind, text) {
    const rows = await json(kind);
    const words = text.toLowerCase().split(/\s+/).filter((word) => word);
    const every = rows.map((_, k) => k);
    if (!words.length) return every;
    if (!said.has(kind)) {
      said.set(
        kind,
        rows.map(([id, group, , parts]) =>
          [id, group, ...parts.map((part) => part[1])].join("\n").toLowerCase(),
        ),
      );
    }
    const lower = said.get(kind);
    return every.filter((k) => words.every((word) => lower[k].includes(word)));
  }

  async function lines(kind, indices) {
    const rows = await json(kind);
    return indices.map((k) => ({ index: k, id: rows[k][0], group: rows[k][1], preview: rows[k][2] }));
  }

  async function whole(kind, k) {
    const [line] = await lines(kind, [k]);
    return { ...line, parts: (await json(kind))[k][3] };
  }

  async function query(q) {
    const found = await ofQuery(q);
    return {
      ...(await whole("queries", q)),
      rows: found.map((each) => each[0]),
      scores: found.map((each) => digits(each[1])),
      exact: found.map((each) => each[2]),
    };
  }

  async function row(i) {
    const { kinds, rows } = await json("facts");
    const facts = rows[i].map(([kind, value]) => ({
      label: kinds[kind][0],
      value,
      help: kinds[kind][1],
    }));
    const found = meta.scored ? await ofRow(i) : [];
    return {
      ...(await whole("rows", i)),
      facts,
      queries: found.map((each) => each[0]),
      scores: found.map((each) => digits(each[1])),
      exact: found.map((each) => each[2]),
    };
  }

  async function pair(q, i) {
    const kept = await json("pairs");
    const entry = (kept.queries[q] ?? {})[i];
    if (entry === undefined) return { tokens: null, modules: null, why: meta.why };
    const [tokens, modules] = entry;
    const parts = (shares, name) =>
      shares && shares[1].map((share, k) => [name(k), digits((share / 1000) * shares[0])]);
    return {
      tokens: parts(tokens, (k) => kept.words[kept.tokens[i][k]]),
      modules: parts(modules, (k) => kept.modules[k]),
      why: tokens && modules ? "" : meta.why,
    };
  }

  return {
    meta: async () => meta,
    search,
    lines,
    query,
    row,
    pair,
    section: (name) => json("section-" + name),
  };
})();
