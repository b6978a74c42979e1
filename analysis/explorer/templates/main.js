// Starts the page.

// What a browser keeps of the page between visits; nothing where it does not let pages keep things.
const memory = {
  get: (key) => {
    try {
      return localStorage.getItem("lora-influence " + key);
    } catch {
      return null;
    }
  },
  set: (key, value) => {
    try {
      localStorage.setItem("lora-influence " + key, value);
    } catch {
      // kept for this visit only
    }
  },
};

// ---- light and dark ------------------------------------------------------------------------------

const THEMES = ["system", "light", "dark"];

function setTheme(theme, again = true) {
  if (theme === "system") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  $("theme").textContent = `Theme: ${theme}`;
  memory.set("theme", theme);
  if (again) drawAgain();
}

setTheme(THEMES.includes(memory.get("theme")) ? memory.get("theme") : "system", false);
$("theme").addEventListener("click", () => {
  const current = document.documentElement.dataset.theme ?? "system";
  setTheme(THEMES[(THEMES.indexOf(current) + 1) % THEMES.length]);
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => drawAgain());

// ---- ids of ticked rows --------------------------------------------------------------------------

// A line of a file of ids: the id as it is, or as JSON text where it could be taken for something
// else (influence/row_ids.py reads it).
function idLine(id) {
  return /^[\p{L}\p{N}\p{P}\p{S}]([\p{L}\p{N}\p{P}\p{S} ]*[\p{L}\p{N}\p{P}\p{S}])?$/u.test(id) && !id.startsWith('"')
    ? id
    : JSON.stringify(id);
}

// Four digits that differ between texts, mostly.
function digits(text) {
  let found = 0;
  for (const letter of text) found = (31 * found + letter.codePointAt(0)) % 10000;
  return String(found).padStart(4, "0");
}

async function exportIds() {
  const lines = await source.lines("rows", [...ticked].sort((a, b) => a - b));
  const text = lines.map((line) => idLine(line.id) + "\n").join("");
  const url = URL.createObjectURL(new Blob([text], { type: "text/plain;charset=utf-8" }));
  // A name of its own: a browser that finds the name taken adds a number, and a command that is copied
  // would read an earlier choice.
  const name = `ids-${state.meta.run.slice(0, 4)}-${digits(text)}.txt`;
  const link = el("a", { href: url, download: name });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(url), 10000);
  say(`${lines.length} ids saved`);
  const words = state.meta.next.join(name).split(" ");
  const command = el("code", {}, ...words.flatMap((word) => [el("span", {}, word), " "]));
  $("next").replaceChildren(`Saved as ${name}. In its folder, `, command, "says what taking these rows out would do.");
  $("next").hidden = false;
}

ticksChanged.push(() => {
  const count = ticked.size;
  $("next").hidden = true;
  for (const id of ["export", "untick"]) $(id).disabled = $(id).hidden = count === 0;
  $("export").textContent = count ? `Export ${count.toLocaleString("en")} id${count > 1 ? "s" : ""}` : "Export ids";
  if (state.meta) memory.set("ticks " + state.meta.run, JSON.stringify([...ticked]));
});
$("export").addEventListener("click", exportIds);
$("untick").addEventListener("click", () => {
  $("theme").focus(); // the button goes, and its focus would go to nothing
  ticked.clear();
  changedTicks();
  say("No row is ticked");
});

// ---- printing ------------------------------------------------------------------------------------

let printedFrom = "system";
const opened = []; // what is folded on the screen and not on paper

function drawLists(onPaper) {
  printing = onPaper;
  return Promise.all(lists.map((list) => list.draw()));
}

$("print").addEventListener("click", async () => {
  await Promise.all([...document.querySelectorAll(".blocks")].map(fillSection));
  await drawAll();
  try {
    await drawLists(true);
    window.print();
  } catch (error) {
    drawLists(false);
    throw error;
  }
});
addEventListener("beforeprint", () => {
  printedFrom = document.documentElement.dataset.theme ?? "system";
  for (const closed of document.querySelectorAll(".answers details:not([open])")) {
    closed.open = true;
    opened.push(closed);
  }
  document.documentElement.dataset.theme = "light"; // what figures take their colours from
  drawAgain();
  drawLists(true);
});
addEventListener("afterprint", () => {
  for (const closed of opened.splice(0)) closed.open = false;
  setTheme(printedFrom);
  drawLists(false);
});

// ---- keys ----------------------------------------------------------------------------------------

document.addEventListener("keydown", (event) => {
  const typing = event.target.closest("input, select, textarea");
  if (event.key === "Escape") hideTip();
  if ((event.ctrlKey || event.metaKey) && !event.shiftKey && !event.altKey && event.key.toLowerCase() === "p") {
    event.preventDefault(); // a browser that prints by itself does not wait for what is not drawn yet
    $("print").click();
  }
  if (event.key === "/" && !typing && $("search")) {
    event.preventDefault();
    $("search").focus();
    $("search").select();
  }
});

// ---- jumps ---------------------------------------------------------------------------------------

// What stands above the goal of a jump is filled while it comes near, and would push the goal away:
// it is held in its place until the reader moves on, for as long as filling takes.
const HELD = 2000; // milliseconds
let goal = null;

function hold(address) {
  const held = (goal = { node: $(address.slice(1)) });
  setTimeout(() => held === goal && (goal = null), HELD);
}

document.addEventListener("click", (event) => {
  const link = event.target.closest("a[href^='#']");
  if (link && !event.ctrlKey && !event.metaKey && !event.shiftKey) hold(link.hash); // else it opens elsewhere
});
for (const moved of ["wheel", "touchmove", "pointerdown", "mousedown", "keydown"]) {
  addEventListener(moved, () => (goal = null), { passive: true, capture: true });
}
new ResizeObserver(() => goal?.node?.scrollIntoView()).observe($("main"));

// ---- trouble -------------------------------------------------------------------------------------

// What fails after the start, as when the page's server has ended, is said. A click takes it away.
addEventListener("unhandledrejection", (event) => {
  $("trouble").textContent = visible(event.reason?.message ?? event.reason);
  $("trouble").hidden = false;
});
$("trouble").addEventListener("click", () => ($("trouble").hidden = true));

// ---- start ---------------------------------------------------------------------------------------

// The first paint is not kept waiting.
const painted = () => new Promise((resolve) => requestAnimationFrame(() => setTimeout(resolve, 0)));

async function begin() {
  hold(location.hash); // before the explorer writes what it shows there
  await painted();
  state.meta = await source.meta();
  try {
    for (const index of JSON.parse(memory.get("ticks " + state.meta.run) ?? "[]")) {
      if (Number.isInteger(index) && index >= 0 && index < state.meta.rows) ticked.add(index);
    }
  } catch {
    ticked.clear();
  }
  changedTicks();
  if ($("left")) await startExplorer();
  const near = new IntersectionObserver(
    (entries) => {
      for (const { target, isIntersecting } of entries) {
        if (isIntersecting) {
          near.unobserve(target);
          fillSection(target);
        }
      }
    },
    { rootMargin: "600px" },
  );
  for (const node of document.querySelectorAll(".blocks")) near.observe(node);
  document.documentElement.dataset.ready = "yes";
}

begin().catch((error) => {
  $("main").prepend(el("p", { class: "note bad" }, `This page could not start: ${error.message}`));
});
