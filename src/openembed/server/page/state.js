// What the page shows, and the same as a URL, so that a search can be shared and the back button works.

const K_DEFAULT = 10;

const state = { query: "", k: K_DEFAULT, conditions: [], filterProblem: "", instruction: "", compare: false, panes: [{}, {}] };
let indexes = [];

/** True for a mode that some index has; until the indexes are known, for the most common ones. */
const offered = (mode) => (indexes.length ? indexes : [{ modes: ["dense", "bm25", "hybrid"] }]).some(({ modes }) => modes.includes(mode));

const indexNamed = (name) => indexes.find((index) => index.name === name);

/** Reads the state from the URL; what the URL does not say gets its default. */
function readUrl() {
  const given = new URLSearchParams(location.search);
  state.query = given.get("q") ?? "";
  state.k = Math.min(1000, Math.max(1, Number.parseInt(given.get("k") ?? K_DEFAULT, 10) || K_DEFAULT));
  state.instruction = given.get("instruction") ?? "";
  state.compare = given.has("mode2") || given.has("index2");
  state.panes = ["", "2"].map((suffix) => ({ index: given.get(`index${suffix}`), mode: given.get(`mode${suffix}`) }));
  try {
    Object.assign(state, { conditions: parseFilter(given.get("filter") ?? ""), filterProblem: "" });
  } catch (error) {
    Object.assign(state, { conditions: [], filterProblem: `The filter of this address is left out. ${error.message}` });
  }
}

/** Returns the URL of the state; defaults are left out. */
function toUrl() {
  const wanted = new URLSearchParams();
  if (state.query) wanted.set("q", state.query);
  state.panes.slice(0, state.compare ? 2 : 1).forEach((pane, number) => {
    const suffix = number ? "2" : "";
    if (pane.mode) wanted.set(`mode${suffix}`, pane.mode);
    if (indexes.length > 1 && pane.index) wanted.set(`index${suffix}`, pane.index);
  });
  if (state.k !== K_DEFAULT) wanted.set("k", state.k);
  if (state.conditions.length) wanted.set("filter", JSON.stringify(filterOf(state.conditions)));
  if (state.instruction) wanted.set("instruction", state.instruction);
  return `${location.pathname}${wanted.size ? `?${wanted}` : ""}`;
}

/** Writes the state to the address bar: a new entry of the history, or the present one replaced. */
function writeUrl(replace = false) {
  const url = toUrl();
  if (url !== location.pathname + location.search) history[replace ? "replaceState" : "pushState"](null, "", url);
  document.title = state.query ? `${state.query} · openembed search` : "openembed search";
}

/** Gives every shown pane an index that exists and a mode that its index has, once the indexes are known. */
function settle() {
  if (!indexes.length) return;
  for (const pane of state.panes.slice(0, state.compare ? 2 : 1)) {
    if (!indexNamed(pane.index)) pane.index = indexes[0]?.name ?? null;
    const modes = indexNamed(pane.index)?.modes ?? [];
    if (!modes.includes(pane.mode)) pane.mode = modes.includes("hybrid") ? "hybrid" : (modes[0] ?? null);
  }
}

const samePanes = () => state.panes[0].index === state.panes[1].index && state.panes[0].mode === state.panes[1].mode;

/** Makes the second pane differ from the first: by model where there is a second index, by mode otherwise. */
function chooseSecond() {
  const [first] = state.panes;
  const other = indexes.find((index) => index.name !== first.index && index.modes.includes(first.mode));
  const mode = indexNamed(first.index)?.modes.find((name) => name !== first.mode);
  state.panes[1] = other ? { index: other.name, mode: first.mode } : { index: first.index, mode: mode ?? first.mode };
}
