// A column: an index, a mode, and what the search in it found. One column as a rule, two when comparing.

const MEANINGS = {
  dense: ["Dense", "finds by meaning: the query’s vector is compared with every document’s."],
  sparse: ["Sparse", "finds by terms: the query’s words and related ones, each with a learned weight."],
  tokens: ["Tokens", "finds by meaning, token by token: each token of the query counts its nearest in the document."],
  bm25: ["BM25", "finds by words: rare words that stand in both count most."],
  hybrid: ["Hybrid", "does all of it and fuses the rankings by rank."],
};
const SUMS = ["sparse", "tokens", "bm25"]; // a score is a sum, over terms or over tokens that meet, which each hit brings with it
const BY_VECTORS = ["dense", "hybrid"]; // which tokens made the dense vectors is asked for
const SKELETON_AFTER = 150;

const panes = [];
const shown = () => panes.slice(0, state.compare ? 2 : 1);
const part = (pane, name) => pane.root.querySelector(`.${name}`);
const radios = (pane) => pane.head.querySelectorAll("input[type=radio]");

/** Returns a new column, its controls wired to the state. */
function makePane(number) {
  const root = fromTemplate("pane-template");
  const pane = { number, root, answer: null, outcome: "", request: null, explained: new Map(), explains: false };
  pane.head = part(pane, "head");
  root.setAttribute("aria-label", `Results ${"AB"[number]}`);
  pane.head.querySelector(".letter").textContent = "AB"[number];
  part(pane, "unseen").textContent = "Results";
  for (const radio of radios(pane)) {
    radio.name = `mode-${number}`;
    radio.addEventListener("change", () => choose(number, { mode: radio.value }));
  }
  pane.head.querySelector(".index").addEventListener("change", (event) => choose(number, { index: event.target.value }));
  return pane;
}

function choose(number, choice) {
  Object.assign(state.panes[number], choice);
  settle();
  commit();
}

/** Shows the column's settings in its controls. */
function drawControls(pane) {
  const { index, mode } = state.panes[pane.number];
  const known = indexNamed(index);
  const select = pane.head.querySelector(".index");
  select.replaceChildren(...indexes.map(({ name }) => element("option", { value: name, selected: name === index }, name)));
  select.parentElement.hidden = indexes.length < 2;
  for (const radio of radios(pane)) {
    radio.disabled = !known?.modes.includes(radio.value);
    radio.parentElement.hidden = !offered(radio.value);
    radio.checked = radio.value === mode;
  }
  pane.head.querySelector(".about").textContent = known ? aboutIndex(known, indexes.length < 2) : "";
}

function aboutIndex({ name, count: documents, models }, named) {
  const made = Object.values(models).join(" + ") || "no model: words only";
  return [named ? name : "", count(documents, "document"), made].filter(Boolean).join(" · ");
}

/** Searches in the column and shows what comes; an answer that is no longer wanted changes nothing. */
async function searchPane(pane) {
  pane.request?.abort();
  const request = (pane.request = new AbortController());
  pane.root.setAttribute("aria-busy", "true");
  const slow = setTimeout(() => drawWaiting(pane), SKELETON_AFTER);
  try {
    const answer = await call("v1/search", searchBody(pane), request.signal);
    drawAnswer(pane, answer);
  } catch (error) {
    if (!request.signal.aborted) drawError(pane, error);
  } finally {
    clearTimeout(slow);
    if (pane.request === request) pane.root.removeAttribute("aria-busy");
  }
}

function searchBody(pane) {
  const body = { query: state.query, ...state.panes[pane.number], k: state.k };
  if (SUMS.includes(body.mode)) body.explain = true;
  if (state.conditions.length) body.filter = filterOf(state.conditions);
  if (state.instruction) body.instruction = state.instruction;
  return body;
}

/** Before the first results: as many grey rows as results are asked for; later the old results stay, dimmed. */
function drawWaiting(pane) {
  pane.root.classList.add("waiting");
  if (part(pane, "hits").children.length) return;
  clearPane(pane);
  const rows = Array.from({ length: Math.min(state.k, 10) }, () => element("li", { class: "ghost", "aria-hidden": "true" }));
  part(pane, "hits").replaceChildren(...rows);
  part(pane, "line").hidden = false;
  part(pane, "summary").textContent = "Searching…";
  part(pane, "measure").textContent = "";
}

function clearPane(pane) {
  pane.answer = null;
  pane.explained = new Map();
  pane.root.classList.remove("waiting");
  part(pane, "hits").replaceChildren();
  part(pane, "line").hidden = part(pane, "notice").hidden = true;
}

function drawAnswer(pane, answer) {
  clearPane(pane);
  pane.answer = answer;
  pane.outcome = `${count(answer.hits.length, "result")} in ${duration(answer.took_ms.total)}, ${MEANINGS[answer.mode][0]}`;
  pane.explains = SUMS.includes(answer.mode)
    || (BY_VECTORS.includes(answer.mode) && Boolean(indexNamed(answer.index)?.contributions));
  part(pane, "line").hidden = false;
  part(pane, "summary").replaceChildren(...summary(answer));
  part(pane, "measure").textContent = answer.hits.length ? MEASURES[answer.mode].name : "";
  part(pane, "hits").append(...answer.hits.map((hit) => hitNode(pane, hit, answer.hits[0].score)));
  if (!answer.hits.length) drawNothing(pane, answer);
}

function summary({ hits, took_ms: took }) {
  const parts = [took.encode ? `encode ${duration(took.encode)}` : "", `search ${duration(took.search)}`].filter(Boolean);
  const details = element("span", { class: "took soft" }, parts.join(" · "));
  return [element("strong", {}, count(hits.length, "result")), ` in ${duration(took.total)} `, details];
}

/** Nothing was found: says what may help, and offers it. */
function drawNothing(pane, answer) {
  const button = (words, onclick) => element("button", { type: "button", onclick }, words);
  const meaning = indexNamed(answer.index)?.modes.find((mode) => mode !== "bm25");
  const offers = [];
  if (state.conditions.length) offers.push(button("Search without the filter", () => setConditions([])));
  if (answer.mode === "bm25" && meaning) offers.push(button("Search by meaning", () => choose(pane.number, { mode: meaning })));
  drawNotice(pane, "Nothing found", reasonForNothing(answer.mode), offers);
}

function reasonForNothing(mode) {
  if (state.conditions.length) return "No document that passes the filter matches this query.";
  if (mode === "sparse") return "No document shares a term with this query.";
  if (mode === "bm25") return "No document holds a word of this query. BM25 finds words, not meanings.";
  return "The index has no document for this query.";
}

function drawNotice(pane, title, text, offers = [], kind = "") {
  const notice = part(pane, "notice");
  notice.className = `notice ${kind}`;
  notice.hidden = false;
  notice.replaceChildren(element("h3", {}, title), element("p", {}, text), element("div", { class: "row" }, ...offers));
}

/** Shows what went wrong and what can be done about it. */
function drawError(pane, error) {
  if (!(error instanceof ApiError)) console.error(error);
  clearPane(pane);
  pane.outcome = errorTitle(error);
  if (error.status === 401) return askForKey(error);
  if (error.param === "filter") showFilterError(error.message);
  drawNotice(pane, pane.outcome, error.message, retryOffers(error), "bad");
}

const ERRORS = {
  0: "The server does not answer",
  401: "An API key is needed",
  403: "This is not allowed here",
  404: "Not found",
  429: "Too many requests",
  503: "The server is not taking requests",
};

function errorTitle({ status }) {
  return ERRORS[status] ?? (status >= 500 ? "The server failed" : "This search was not accepted");
}

/** Returns a button that tries again, disabled for as long as the server asked. */
function retryOffers({ status, retryAfter: wait }) {
  if (status >= 400 && status < 500 && status !== 429) return [];
  const button = element("button", { type: "button", onclick: () => (indexes.length ? run() : boot()) });
  countDown(button, wait);
  return [button];
}

function countDown(button, seconds) {
  button.disabled = seconds > 0;
  button.textContent = seconds > 0 ? `Try again in ${seconds} s` : "Try again";
  if (seconds > 0) setTimeout(() => countDown(button, seconds - 1), 1000);
}

/** Before any query: what the modes mean. */
function drawWelcome() {
  for (const pane of shown()) {
    pane.request?.abort();
    clearPane(pane);
    const { modes } = indexNamed(state.panes[pane.number].index);
    const rows = modes.map((mode) => {
      const [name, meaning] = MEANINGS[mode];
      return element("div", {}, element("dt", {}, name), element("dd", {}, meaning));
    });
    const notice = part(pane, "notice");
    notice.className = "notice welcome";
    notice.hidden = false;
    notice.replaceChildren(element("dl", {}, ...rows), keysHint());
  }
}

function keysHint() {
  const key = (name) => element("kbd", {}, name);
  return element("p", { class: "keys" }, "Press ", key("/"), " to search from anywhere, ", key("?"), " for every key.");
}
