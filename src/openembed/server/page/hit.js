// One result: rank, title, score with a bar, snippet with marks, metadata as chips, full text, why, copy.

const CHIPS = 8;

const MEASURES = {
  dense: { name: "cosine", digits: 3, share: (score) => score },
  sparse: { name: "sum of term scores", digits: 2, share: (score, best) => score / best },
  tokens: { name: "MaxSim", digits: 2, share: (score, best) => score / best },
  bm25: { name: "BM25 score", digits: 2, share: (score, best) => score / best },
  hybrid: { name: "rank fusion score", digits: 4, share: (score, best) => score / best },
};

/** Returns the list item of a hit; `pane` is the column it stands in, `best` the first hit's score. */
function hitNode(pane, hit, best) {
  const node = fromTemplate("hit-template");
  const part = (name) => node.querySelector(`.${name}`);
  node.id = `hit-${pane.number}-${hit.rank}`;
  node.tabIndex = hit.rank === 1 ? 0 : -1;
  node.setAttribute("aria-labelledby", `${node.id}-title`);
  part("rank").textContent = hit.rank;
  part("title").id = `${node.id}-title`;
  part("title").append(...titleNodes(hit));
  part("title").classList.toggle("untitled", !hit.title);
  fillScore(part, hit.score, best, MEASURES[pane.answer.mode]);
  part("chips").append(...metadataNodes(hit.metadata));
  part("id").append(element("span", {}, hit.id));
  part("id").setAttribute("aria-label", `Copy id ${hit.id}`);
  part("id").addEventListener("click", () => copyId(part("id"), hit.id));
  part("more").hidden = !isCut(hit);
  part("more").addEventListener("click", () => toggleFull(node, hit));
  part("why").hidden = !pane.explains;
  part("why").addEventListener("click", () => toggleWhy(node, pane, hit));
  showText(node, hit, false);
  return node;
}

function titleNodes(hit) {
  return hit.title ? marked(hit.title, hit.highlights?.title ?? [], [0, Infinity]) : [hit.id];
}

function fillScore(part, score, best, measure) {
  part("value").textContent = score.toFixed(measure.digits).replace("-", "−");
  part("score").title = measure.name;
  part("bar").style.setProperty("--share", Math.min(1, Math.max(0, measure.share(score, best) || 0)));
}

const spanOf = (hit) => hit.snippet ?? [0, Infinity];
const isCut = (hit) => spanOf(hit)[0] > 0 || spanOf(hit)[1] < codePoints(hit.text).length
  || allChips(hit.metadata).length > CHIPS;

function showText(node, hit, full) {
  const text = node.querySelector(".text");
  text.replaceChildren(...marked(hit.text, hit.highlights?.text ?? [], full ? [0, Infinity] : spanOf(hit)));
  text.hidden = !hit.text;
  node.classList.toggle("full", full);
}

/** Returns chips of all metadata; a chip that can be asked for is a button that filters by it. */
function metadataNodes(metadata) {
  return allChips(metadata).map((chip) => element("li", {}, chipNode(chip)));
}

const allChips = (metadata) => Object.entries(metadata ?? {}).flatMap(([field, value]) => chipsOf(field, value));

function chipNode({ field, label, condition }) {
  const words = [element("span", { class: "soft" }, field), " ", element("bdi", {}, label)];
  if (!condition) return element("span", { class: "chip", title: label }, ...words);
  const active = state.conditions.some((each) => sameCondition(each, condition));
  const title = active ? "Remove this filter" : `Only where ${describe(condition)}`;
  const onclick = () => toggleCondition(condition);
  return element("button", { class: "chip", type: "button", title, "aria-pressed": String(active), onclick }, ...words);
}

function toggleFull(node, hit) {
  const button = node.querySelector(".more");
  if (button.hidden) return;
  const full = !node.classList.contains("full");
  showText(node, hit, full);
  button.textContent = full ? "Less" : "Full text";
  button.setAttribute("aria-expanded", String(full));
}

async function toggleWhy(node, pane, hit) {
  const [panel, button] = [node.querySelector(".panel"), node.querySelector(".why")];
  panel.hidden = !panel.hidden;
  button.setAttribute("aria-expanded", String(!panel.hidden));
  if (panel.hidden || panel.dataset.asked) return;
  panel.dataset.asked = "yes";
  if (hit.terms) return panel.replaceChildren(...(pane.answer.mode === "tokens" ? metNodes(hit) : termNodes(hit.terms)));
  const { index, query } = pane.answer;
  const asked = { index, query, instruction: state.instruction, hit, cache: pane.explained, signal: pane.request.signal };
  if (!(await explain(panel, asked))) delete panel.dataset.asked; // opened again, it is asked again
}

/** Copies the id; where the browser forbids it, selects it instead. */
async function copyId(button, id) {
  try {
    await navigator.clipboard.writeText(id);
    button.classList.add("copied");
    setTimeout(() => button.classList.remove("copied"), 1500);
    say(`Copied ${id}`);
  } catch {
    getSelection().selectAllChildren(button.firstElementChild);
    say("The browser does not let this page copy. The id is selected: press Control C.");
  }
}
