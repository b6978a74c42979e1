// Figures by plotly, which is unpacked and run when the first one is seen.

const COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a5fa0"];
const SYMBOLS = ["circle", "square", "diamond", "triangle-up", "cross", "x", "star"];
const OTHERS = "#8a94a0";
const drawn = new Map(); // nodes with their blocks, drawn again in other colours
let library = null;

// plotly, run as an inline script, whose hash the page's security policy has.
function plotly() {
  if (library === null) {
    library = unpackedBlock("plotly").then((bytes) => {
      const script = el("script");
      script.textContent = new TextDecoder().decode(bytes);
      document.head.append(script);
      if (!window.Plotly) throw new Error("plotly did not start");
      return window.Plotly;
    });
  }
  return library;
}

// A text of the data for plotly, which takes some tags in texts.
function plain(text, width = 60) {
  const whole = Array.from(visible(text).replace(/\s+/g, " "));
  const cut = whole.length > width ? whole.slice(0, width - 1).join("") + "…" : whole.join("");
  return cut.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
}

// The title of an axis, on as many lines as it takes in so many pixels.
function axisTitle(axis, pixels) {
  const most = Math.max(12, pixels / 7);
  const lines = [""];
  for (const word of (axis.label + (axis.unit ? ` (${axis.unit})` : "")).split(" ")) {
    const longer = `${lines.at(-1)} ${word}`.trim();
    if (longer.length <= most || !lines.at(-1)) lines[lines.length - 1] = longer;
    else lines.push(word);
  }
  return lines.map((line) => plain(line, 80)).join("<br>");
}

// Ticks of a logarithmic axis whose values are less than 100 times apart: at 1, 2 and 5, not at
// powers of ten alone.
function logTicks(axis, values) {
  const known = values.filter((value) => value > 0);
  const low = known.reduce((least, value) => Math.min(least, value), Infinity);
  const high = largestOf(known);
  if (!known.length || high >= 100 * low) return;
  axis.tickvals = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++) {
    axis.tickvals.push(...[1, 2, 5].map((digit) => digit * 10 ** power));
  }
  axis.ticktext = axis.tickvals.map(short);
}

const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

function layoutOf(block, width) {
  const ink = colour("--ink");
  const grid = colour("--line");
  const part = (axis, pixels) => ({
    title: { text: axisTitle(axis, pixels), font: { size: 12 }, standoff: 10 },
    type: axis.log ? "log" : undefined,
    dtick: axis.log ? 1 : undefined,
    gridcolor: grid,
    zerolinecolor: colour("--muted"),
    automargin: true,
    exponentformat: "e",
  });
  return {
    font: { family: "system-ui, sans-serif", size: 11, color: ink },
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    margin: { l: 50, r: 10, t: 10, b: 40 },
    xaxis: part(block.x, width - 90),
    yaxis: part(block.y, 220),
    hoverlabel: { align: "left", bgcolor: colour("--page"), font: { color: ink } },
    dragmode: false,
  };
}

function scatterOf(block, layout, width) {
  let named = 0;
  layout.height = width < 600 ? 380 + 20 * block.series.length : 380; // names one below the other
  layout.hovermode = "closest";
  layout.showlegend = block.series.length > 1;
  layout.legend = { orientation: "h", y: 1.02, yanchor: "bottom", font: { size: 11 } };
  if (block.x.log) logTicks(layout.xaxis, block.series.flatMap((series) => series.x));
  if (block.y.log) logTicks(layout.yaxis, block.series.flatMap((series) => series.y));
  const unit = (axis) => (axis.unit ? " " + plain(axis.unit) : "");
  return block.series.map((series) => {
    const k = series.other ? -1 : named++ % COLOURS.length;
    return {
      type: "scatter",
      mode: "markers",
      name: plain(series.name, 28),
      x: series.x,
      y: series.y,
      customdata: series.index,
      text: series.names.map((name) => plain(name)),
      hovertemplate:
        "%{text}<br>%{x:.3g}" + unit(block.x) + "<br>%{y:.3g}" + unit(block.y) + "<extra></extra>",
      marker: {
        color: k < 0 ? OTHERS : block.series.length > 1 ? COLOURS[k] : colour("--pos-strong"),
        symbol: k < 0 ? "circle-open" : SYMBOLS[k],
        size: block.series.length > 1 || series.x.length > 50 ? 7 : 11,
        opacity: 0.8,
      },
    };
  });
}

function barsOf(block, layout) {
  layout.height = 280;
  layout.xaxis.showticklabels = block.names.length <= 40;
  layout.xaxis.type = "category";
  const places = block.names.map((_, k) => String(k));
  layout.xaxis.tickvals = places;
  layout.xaxis.ticktext = block.names.map((name) => plain(name, 16));
  return [
    {
      type: "bar",
      x: places,
      y: block.values,
      text: block.names.map((name) => plain(name)),
      textposition: "none",
      hovertemplate: "%{text}<br>%{y:.3f}<extra></extra>",
      marker: { color: block.values.map((value) => colour(value < 0 ? "--neg" : "--pos")) },
    },
  ];
}

function heatmapOf(block, layout, width) {
  const lines = block.lines.length;
  const few = lines <= 60;
  layout.height = Math.min(few ? 980 : 820, Math.max(220, 130 + lines * (lines <= 12 ? 24 : few ? 14 : 2)));
  for (const [axis, names, all] of [
    [layout.xaxis, block.columns, block.columns.length <= 40],
    [layout.yaxis, block.lines, few],
  ]) {
    axis.tickvals = all ? names.map((_, k) => k) : [];
    axis.ticktext = all ? names.map((name) => plain(name, 18)) : [];
    axis.showgrid = false;
    axis.zeroline = false;
  }
  layout.yaxis.autorange = "reversed";
  layout.xaxis.tickangle = width < 40 * block.columns.length ? -90 : -45;
  const middle = colour("--page");
  return [
    {
      type: "heatmap",
      z: block.values,
      zmid: 0,
      customdata: block.values.map((values, k) =>
        values.map((_, c) => [plain(block.lines[k]), plain(block.columns[c])]),
      ),
      hovertemplate:
        "%{customdata[0]}<br>%{customdata[1]}<br>%{z:.3g} " + plain(block.unit) + "<extra></extra>",
      colorscale: [
        [0, colour("--neg-strong")],
        [0.5, middle],
        [1, colour("--pos-strong")],
      ],
      colorbar: { thickness: 10, title: { text: plain(block.unit, 24), side: "right" }, outlinewidth: 0 },
      // never 0: without gaps plotly writes a style attribute, which the policy forbids
      xgap: few ? 1 : 0.05,
      ygap: few ? 1 : 0.05,
    },
  ];
}

const KINDS = { scatter: scatterOf, bars: barsOf, heatmap: heatmapOf };

async function draw(node, block) {
  const Plotly = await plotly();
  const layout = layoutOf(block, node.clientWidth);
  const traces = KINDS[block.plot](block, layout, node.clientWidth);
  await Plotly.react(node, traces, layout, { displayModeBar: false, responsive: true });
  if (!drawn.has(node)) {
    node.on("plotly_click", (event) => {
      const point = event.points[0];
      if (block.plot === "heatmap") go({ q: block.index[point.pointIndex[0]] });
      else if (block.plot === "scatter" && point.customdata !== undefined) {
        if (state.meta.scored) go({ i: point.customdata });
        else showTraining(node.nextElementSibling, "", [["Training row ", point.customdata]]);
      }
    });
  }
  drawn.set(node, block);
  node.classList.remove("waiting");
}

const waiting = new Map(); // nodes of figures that were not seen yet
const drawing = new Set(); // figures that are being drawn

const seen = new IntersectionObserver(
  (entries) => {
    for (const { target, isIntersecting } of entries) {
      if (isIntersecting && waiting.has(target)) start(target);
    }
  },
  { rootMargin: "200px" },
);

function start(node) {
  const block = waiting.get(node);
  waiting.delete(node);
  seen.unobserve(node);
  const work = draw(node, block)
    .catch((error) => {
      node.textContent = `This figure could not be drawn: ${error.message}`;
    })
    .finally(() => drawing.delete(work));
  drawing.add(work);
  return work;
}

// A figure, drawn when it is seen.
function plot(block) {
  const node = el("div", { class: "plot waiting", role: "img", "aria-label": `${block.title}. ${block.help}` });
  waiting.set(node, block);
  seen.observe(node);
  return el(
    "figure",
    {},
    el("figcaption", {}, el("strong", {}, block.title), " ", el("span", { class: "muted" }, block.help)),
    node,
    el("div", { "aria-live": "polite" }),
  );
}

async function drawAll() {
  for (const node of [...waiting.keys()]) start(node);
  await Promise.all(drawing);
}

const drawAgain = () => Promise.all([...drawn].map(([node, block]) => draw(node, block)));
