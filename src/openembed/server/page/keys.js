// The keyboard: results are walked with j and k or the arrows; single keys can be switched off in the help.

const KEYS_NAME = "openembed.single-keys";

function singleKeys() {
  try { return localStorage.getItem(KEYS_NAME) !== "off"; } catch { return true; }
}

function keepSingleKeys(on) {
  try { localStorage.setItem(KEYS_NAME, on ? "on" : "off"); } catch { /* storage is off: for this visit only */ }
}

const isTyping = (node) => node.matches("textarea, select, input:not([type=radio], [type=checkbox])");
const currentHit = () => document.activeElement.closest?.(".hit");
const hitsOf = (number) => [...panes[number].root.querySelectorAll(".hit")];

/** Puts the focus on a result and makes it its list's tab stop. */
function focusHit(hit) {
  if (!hit) return;
  for (const other of hit.parentElement.children) other.tabIndex = other === hit ? 0 : -1;
  hit.focus();
}

/** Goes to the next or previous result; above the first lies the query. */
function stepHit(step) {
  const hit = currentHit();
  if (!hit) return focusHit(hitsOf(visiblePane())[0]);
  const next = step > 0 ? hit.nextElementSibling : hit.previousElementSibling;
  if (next) focusHit(next);
  else if (step < 0) focusQuery();
}

function visiblePane() {
  return shown().find((pane) => pane.root.offsetParent !== null)?.number ?? 0;
}

/** Goes to the same document in the other column, or to the same rank. */
function changeColumn(number) {
  const hit = currentHit();
  if (!state.compare || !hit || hit.id.startsWith(`hit-${number}`)) return;
  panesRoot().dataset.tab = number;
  drawTabs();
  focusHit(byId(hit.dataset.twin) ?? hitsOf(number)[hit.querySelector(".rank").textContent - 1] ?? hitsOf(number).at(-1));
}

function focusQuery() {
  byId("query").focus();
  byId("query").select();
}

const press = (name) => currentHit()?.querySelector(`.${name}`)?.click();

const SINGLE = {
  "/": focusQuery,
  "?": () => byId("help").showModal(),
  j: () => stepHit(1),
  k: () => stepHit(-1),
  h: () => changeColumn(0),
  l: () => changeColumn(1),
  w: () => press("why"),
  c: () => press("id"),
};

const ON_HIT = {
  ArrowDown: () => stepHit(1),
  ArrowUp: () => stepHit(-1),
  Enter: () => press("more"),
};

const ALONG = { ArrowRight: 1, ArrowLeft: -1 };

/** Closes what is open in the result that has the focus, and gives the focus back to it. */
function escape() {
  if (!byId("tip").hidden) return hideTip();
  const hit = currentHit();
  if (!hit) return;
  const open = hit.querySelector(".why[aria-expanded=true]") ?? hit.querySelector(".more[aria-expanded=true]");
  open?.click();
  focusHit(hit);
}

/** Returns what a key means where the focus is, or nothing. */
function meaning(event) {
  const { key, target } = event;
  if (key === "Escape") return escape;
  if (target.matches(".token") && ALONG[key]) return () => moveToken(target, ALONG[key]);
  if (target.matches(".hit") && ON_HIT[key]) return ON_HIT[key];
  if (target.id === "query" && key === "ArrowDown") return () => stepHit(1);
  return isTyping(target) || !singleKeys() ? null : SINGLE[key];
}

function listenToKeys() {
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.isComposing || byId("help").open) return;
    const act = meaning(event);
    if (!act) return;
    if (event.key !== "Escape") event.preventDefault();
    act();
  });
}
