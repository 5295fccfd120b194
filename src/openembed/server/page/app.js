// The page as a whole: what happens when something is asked for, and the wiring.

let turn = 0;

/** The state has changed: shows it, writes the URL and searches. */
function commit() {
  draw();
  writeUrl();
  return run();
}

/** Searches in every shown column; when all have answered, compares and announces, unless something newer was asked. */
async function run() {
  const mine = ++turn;
  if (!indexes.length) return;
  if (!state.query) {
    byId("progress").classList.remove("busy");
    drawWelcome();
    drawComparison();
    return;
  }
  byId("progress").classList.add("busy");
  await Promise.all(shown().map(searchPane));
  if (mine !== turn) return;
  byId("progress").classList.remove("busy");
  drawComparison();
  drawTabs();
  announce();
}

function announce() {
  const sentences = shown().map((pane) => (state.compare ? `${"AB"[pane.number]}: ${pane.outcome}` : pane.outcome));
  if (!byId("comparison").hidden) sentences.push(byId("comparison").querySelector("strong")?.textContent ?? "");
  say(`${sentences.join(". ")}.`);
}

/** Shows the state in every control. */
function draw() {
  settle();
  document.body.classList.toggle("comparing", state.compare);
  byId("query").value = state.query;
  drawK();
  byId("compare").hidden = !state.compare && indexes.length === 1 && indexes[0].modes.length === 1;
  byId("compare").setAttribute("aria-pressed", String(state.compare));
  panes[1].root.hidden = !state.compare;
  placeHead(panes[0]);
  const documents = indexNamed(state.panes[0].index)?.count;
  byId("query").placeholder = documents === undefined ? "Search" : `Search ${count(documents, "document")}`;
  panes.forEach(drawControls);
  drawConditions();
  drawTabs();
}

/** Puts the only column's controls beside the common ones, or above its results; moves nothing in place, to keep the focus. */
function placeHead({ head, root }) {
  const home = state.compare ? root : byId("controls");
  if (head.parentElement !== home) home.insertBefore(head, home.querySelector(":scope > #tools, :scope > .line"));
}

function drawK() {
  const select = byId("k");
  const value = String(state.k);
  if (![...select.options].some((option) => option.value === value)) select.append(element("option", {}, value));
  select.value = value;
}

function drawConditions() {
  const list = byId("conditions");
  list.hidden = !state.conditions.length;
  list.replaceChildren(...state.conditions.map((condition) => {
    const label = describe(condition);
    const onclick = () => toggleCondition(condition);
    const act = { class: "chip", type: "button", "aria-label": `Remove the filter ${label}`, onclick };
    return element("li", {}, element("button", act, element("bdi", {}, label), " ×"));
  }));
  const filter = filterOf(state.conditions);
  byId("filter").value = filter ? JSON.stringify(filter) : "";
  byId("instruction").value = state.instruction;
  showFilterError(state.filterProblem);
}

function setConditions(conditions) {
  Object.assign(state, { conditions, filterProblem: "" });
  return commit();
}

function toggleCondition(condition) {
  const others = state.conditions.filter((each) => !sameCondition(each, condition));
  setConditions(others.length < state.conditions.length ? others : [...others, condition]);
  (byId("conditions").querySelector("li:last-child button") ?? panesRoot()).focus();
}

function showOptions(open) {
  byId("options").hidden = !open;
  byId("options-open").setAttribute("aria-expanded", String(open));
}

function showFilterError(message) {
  byId("filter-error").textContent = message;
  byId("filter").setAttribute("aria-invalid", String(Boolean(message)));
  if (message) showOptions(true);
}

function applyOptions() {
  try {
    Object.assign(state, { conditions: parseFilter(byId("filter").value), filterProblem: "" });
  } catch (error) {
    showFilterError(error.message);
    byId("filter").focus();
    return;
  }
  state.instruction = byId("instruction").value.trim();
  commit();
}

function toggleCompare() {
  state.compare = !state.compare;
  if (state.compare && (!state.panes[1].mode || samePanes())) chooseSecond();
  panesRoot().dataset.tab = "0";
  commit();
  byId("compare").focus();
}

/** Shows the form for the API key, with the server's words for why. */
function askForKey(error) {
  byId("key").hidden = false;
  byId("key-reason").textContent = error.message;
  byId("key-value").focus();
}

function takeKey() {
  try {
    useKey(byId("key-value").value.trim());
  } catch (error) {
    askForKey(error);
    return;
  }
  byId("key-value").value = "";
  byId("key").hidden = true;
  boot();
}

/** Asks which indexes there are, then shows what the URL asks for. */
async function boot() {
  byId("notice").replaceChildren();
  try {
    indexes = (await call("v1/indexes")).data;
  } catch (error) {
    if (error.status === 401) askForKey(error);
    else bootFailed(errorTitle(error), error.message, retryOffers(error));
    return;
  }
  if (!indexes.length) {
    const offers = retryOffers({ status: 0, retryAfter: 0 });
    bootFailed("There is nothing to search yet", "The server runs, but holds no index.", offers);
    return;
  }
  draw();
  writeUrl(true);
  run();
}

function bootFailed(title, text, offers) {
  byId("notice").replaceChildren(element("div", { class: "notice bad" }, element("h2", {}, title), element("p", {}, text),
    element("div", { class: "row" }, ...offers)));
  say(`${title}. ${text}`);
}

function listen() {
  const onSubmit = (id, act) => byId(id).addEventListener("submit", (event) => { event.preventDefault(); act(); });
  const onClick = (id, act) => byId(id).addEventListener("click", act);
  onSubmit("search", () => { state.query = byId("query").value.trim(); commit(); });
  onSubmit("options", applyOptions);
  onSubmit("key", takeKey);
  onClick("options-open", () => showOptions(byId("options").hidden));
  onClick("options-clear", () => { state.instruction = ""; setConditions([]); });
  onClick("compare", toggleCompare);
  onClick("help-open", () => byId("help").showModal());
  onClick("to-query", focusQuery);
  byId("k").addEventListener("change", () => { state.k = Number(byId("k").value); commit(); });
  byId("filter").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) applyOptions();
  });
  byId("single-keys").checked = singleKeys();
  byId("single-keys").addEventListener("change", (event) => keepSingleKeys(event.target.checked));
  addEventListener("popstate", () => { readUrl(); draw(); writeUrl(true); run(); });
  new IntersectionObserver(([entry]) => { byId("to-query").hidden = entry.isIntersecting; }).observe(byId("search"));
}

panes.push(makePane(0), makePane(1));
panesRoot().append(panes[0].root, document.createElementNS(SVG, "svg"), panes[1].root);
panesRoot().children[1].setAttribute("id", "links");
panesRoot().children[1].setAttribute("aria-hidden", "true");
panesRoot().dataset.tab = "0";
readUrl();
draw();
listen();
listenToKeys();
listenToTokens();
listenToTwins();
boot();
