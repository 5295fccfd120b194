// Two columns side by side: which documents both found, and how their ranks differ.

const GAP = 8;
const SVG = "http://www.w3.org/2000/svg";

/** A document is the same in both columns when id and texts are: two indexes may use one id for different documents. */
const identity = (hit) => JSON.stringify([hit.id, hit.title, hit.text]);

/** Returns [hit of the first, hit of the second] for each document that both have. */
function sharedHits(first, second) {
  const others = new Map(second.map((hit) => [identity(hit), hit]));
  return first.filter((hit) => others.has(identity(hit))).map((hit) => [hit, others.get(identity(hit))]);
}

/** Marks both columns and says how far they agree; clears the marks where there is nothing to compare. */
function drawComparison() {
  const [first, second] = panes.map((pane) => pane.answer?.hits);
  const settled = panes.every((pane) => !pane.root.hasAttribute("aria-busy"));
  const comparing = state.compare && settled && Boolean(first && second);
  byId("comparison").hidden = !comparing;
  const shared = comparing ? sharedHits(first, second) : [];
  if (comparing) {
    markOnly(shared);
    for (const pair of shared) markPair(pair);
    byId("comparison").replaceChildren(...agreement(shared, first, second));
  }
  drawLinks(shared);
}

const hitElement = (number, rank) => byId(`hit-${number}-${rank}`);

function markOnly(shared) {
  panes.forEach((pane, number) => {
    const both = new Set(shared.map((pair) => pair[number].rank));
    for (const { rank } of pane.answer.hits) {
      if (!both.has(rank)) setShift(hitElement(number, rank), `only in ${"AB"[number]}`, "alone");
    }
  });
}

function markPair([first, second]) {
  const kind = shiftKind(first, second);
  const sign = { up: "▲", down: "▼", level: "=" }[kind];
  [first, second].forEach(({ rank }, number) => {
    const node = hitElement(number, rank);
    node.dataset.twin = hitElement(1 - number, [first, second][1 - number].rank).id;
    setShift(node, `${sign} A ${first.rank} → B ${second.rank}`, kind);
  });
}

const shiftKind = (first, second) => (second.rank < first.rank ? "up" : second.rank > first.rank ? "down" : "level");

function setShift(node, words, kind) {
  const shift = node.querySelector(".shift");
  shift.textContent = words;
  shift.className = `shift ${kind}`;
}

/** Returns the sentence above the columns: overlap@k, what only one found, whether the first result is the same. */
function agreement(shared, first, second) {
  const depth = Math.max(first.length, second.length);
  if (!depth) return ["Neither found anything."];
  const top = shared.some(([a, b]) => a.rank === 1 && b.rank === 1) ? "same first result" : "different first result";
  const parts = [`overlap@${depth} ${(shared.length / depth).toFixed(2)}`, `${first.length - shared.length} only in A`,
    `${second.length - shared.length} only in B`, first.length && second.length ? top : ""];
  const details = element("span", { class: "soft" }, parts.filter(Boolean).join(" · "));
  return [element("strong", {}, `${shared.length} of ${depth} in both`), " ", details];
}

function middle(node) {
  const box = node.getBoundingClientRect();
  return box.top + box.height / 2;
}

/** Draws a line from each shared document of the left column to its place in the right one. */
function drawLinks(shared) {
  const svg = byId("links");
  svg.replaceChildren();
  const { top, width, height } = svg.getBoundingClientRect();
  if (!width) return;
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  for (const [first, second] of shared) {
    const nodes = [hitElement(0, first.rank), hitElement(1, second.rank)];
    const [from, to] = nodes.map((node) => middle(node.querySelector(".rank")) - top);
    const path = document.createElementNS(SVG, "path");
    path.setAttribute("d", `M${GAP} ${from} C${width / 2} ${from} ${width / 2} ${to} ${width - GAP} ${to}`);
    path.setAttribute("class", shiftKind(first, second));
    path.dataset.ends = nodes.map((node) => node.id).join(" ");
    svg.append(path);
  }
}

/** Lights up a document's place in the other column, and the line between. */
function lightTwin(hit) {
  for (const lit of document.querySelectorAll(".lit")) lit.classList.remove("lit");
  if (!hit?.dataset.twin) return;
  byId(hit.dataset.twin)?.classList.add("lit");
  document.querySelector(`#links [data-ends~="${hit.id}"]`)?.classList.add("lit");
}

/** On a phone one column is shown at a time; these are the tabs. */
function drawTabs() {
  const tabs = panes.map((pane, number) => {
    const { index, mode } = state.panes[number];
    const took = pane.answer ? ` · ${duration(pane.answer.took_ms.total)}` : "";
    const checked = panesRoot().dataset.tab === String(number);
    const radio = element("input", { type: "radio", name: "tab", value: number, checked });
    radio.addEventListener("change", () => { panesRoot().dataset.tab = number; });
    const name = element("b", {}, `${"AB"[number]} ${MEANINGS[mode]?.[0] ?? ""}`);
    return element("label", {}, radio, element("span", {}, name, took, element("br"), index ?? ""));
  });
  byId("tabs").replaceChildren(...tabs);
}

const panesRoot = () => byId("panes");

function listenToTwins() {
  const light = (event) => lightTwin(event.target.closest(".hit"));
  for (const name of ["focusin", "mouseover"]) panesRoot().addEventListener(name, light);
  panesRoot().addEventListener("mouseleave", () => lightTwin(null));
  new ResizeObserver(() => drawComparison()).observe(panesRoot());
}
