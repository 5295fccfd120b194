// Why a document was found: how much each token adds to a text's vector, as heat over the text and as a list, or each term to
// the score.

const TOP = 8;
const TERMS = 24;

/** Fills a panel with the tokens of query and document and returns true, or shows the error; `cache` keeps the answers. */
async function explain(panel, { index, query, instruction, hit, cache, signal }) {
  panel.replaceChildren(element("p", { class: "soft" }, "Asking the model…"));
  const full = (hit.title ? `${hit.title} ${hit.text}` : hit.text).trim();
  const ask = (body) => {
    const name = JSON.stringify(body);
    if (!cache.has(name)) cache.set(name, call("v1/contributions", body, signal));
    cache.get(name).catch(() => cache.delete(name));
    return cache.get(name);
  };
  const prompt = instruction ? { instruction } : {};
  try {
    const [asked, found] = await Promise.all([
      ask({ text: query, index, input_type: "query", ...prompt }),
      ask({ text: full, index, input_type: "document" }),
    ]);
    panel.replaceChildren(heat("Query", query, asked), heat("Document", full, found), legend(),
      element("p", { class: "soft" }, found.explained ?? ""));
    return true;
  } catch (error) {
    if (error.name !== "AbortError") panel.replaceChildren(element("p", { class: "error", role: "alert" }, error.message));
    if (error.status === 401) askForKey(error);
    return false;
  }
}

/** Returns the terms that make a score, those that add most first, with their shares of it. */
function termNodes(terms) {
  const items = terms.slice(0, TERMS).map(({ term, share }) => topItem(plainTerm(term), share, terms[0].share));
  const rest = terms.length > TERMS ? `; ${count(terms.length - TERMS, "smaller one")} not shown` : "";
  const about = `A term adds its weight in the query times its weight in the document${rest}. All shares sum to 100 %.`;
  return [element("h4", {}, "Terms of the score"), element("ol", { class: "top", "aria-label": "Terms of the score" }, ...items),
    element("p", { class: "soft" }, about)];
}

/** Returns the weight shown at full heat: the largest, but at least twice the average, so that an even text looks even. */
function fullHeat(pooled) {
  return Math.max(2 / Math.max(1, pooled.length), ...pooled.map((token) => Math.abs(token.weight)));
}

/** Returns the tokens with neighbours that stand for the same characters (the bytes of one emoji) as one. */
function wholeCharacters(tokens) {
  const whole = [];
  for (const token of tokens) {
    const last = whole.at(-1);
    const same = last && token.end > token.start && token.start === last.start && token.end === last.end;
    if (same) whole[whole.length - 1] = { ...last, weight: last.weight + token.weight, pooled: last.pooled || token.pooled };
    else whole.push(token);
  }
  return whole;
}

function heat(name, text, answer) {
  const tokens = wholeCharacters(answer.tokens);
  const pooled = tokens.filter((token) => token.pooled);
  const scale = fullHeat(pooled);
  const nodes = tokenNodes(text, tokens, (token, words) => tokenNode(token, words, scale, pooled.length));
  const rest = nodes.pop();
  if (rest.trim()) nodes.push(element("span", { class: "unread", title: "Beyond what the model reads" }, rest));
  return heatSection(name, count(pooled.length, "pooled token"), nodes, topList(text, pooled));
}

/** Returns a text under its name as a list of tokens, one of them a tab stop, with what stands below it. */
function heatSection(name, note, nodes, ...below) {
  const label = `Tokens of the ${name.toLowerCase()}`;
  const line = element("p", { class: "tokens", role: "list", dir: "auto", "aria-label": label }, ...nodes);
  line.querySelector(".token")?.setAttribute("tabindex", "0");
  const heading = element("h4", {}, name, element("span", { class: "soft" }, ` ${note}`));
  return element("section", { class: "heat" }, heading, line, ...below);
}

/** Returns the text as nodes: tokens as `draw(token, words)` gives them, what lies between as it is; last, what comes after them. */
function tokenNodes(text, tokens, draw) {
  const points = codePoints(text);
  const nodes = [];
  let cursor = 0;
  for (const token of tokens) {
    const node = draw(token, wording(token, points));
    if (placed(token, cursor, points.length)) {
      const own = points.slice(token.start, token.end);
      const [lead] = own.trim() ? /^\s*/.exec(own) : [""]; // of many tokenizers a token has the space before it
      nodes.push(points.slice(cursor, token.start) + lead, node);
      cursor = token.end;
    } else nodes.push(node, " ");
  }
  return [...nodes, points.slice(cursor, points.length)];
}

/** True when a token has characters of the text, after those already shown. */
function placed({ start, end }, cursor, length) {
  return Number.isInteger(start) && start >= cursor && end > start && end <= length;
}

/** Returns a token's characters; its name without the tokenizer's marks where it has none (special tokens). */
function wording(token, points) {
  const own = token.end > token.start ? points.slice(token.start, token.end).trim() : "";
  return own || plainTerm(token.text);
}

/** Returns a vocabulary's entry without its tokenizer's marks. */
const plainTerm = (name) => name.replace(/^(##|[▁Ġ])(?=.)/u, "");

function tokenNode(token, words, scale, pooled) {
  const kind = !token.pooled ? "apart" : token.weight < 0 ? "less" : "more";
  const tip = token.pooled
    ? `${words}: ${percent(token.weight)}, ${Math.abs(token.weight * pooled).toFixed(1)} × the average token`
    : `${words}: read, not pooled`;
  return tokenElement(kind, words, tip, token.pooled ? token.weight / scale : 0);
}

/** Returns a token of a text, its tooltip and its heat, from -1 to 1. */
function tokenElement(kind, words, tip, heat) {
  const node = element("span", { class: `token ${kind}`, role: "listitem", tabindex: "-1" }, words);
  node.dataset.tip = tip;
  node.style.setProperty("--heat", heat ** 2); // squared: what stands out is seen
  return node;
}

/** Returns the tokens with the largest weights, each wording once. */
function topList(text, pooled) {
  const points = codePoints(text);
  const strongest = new Map();
  for (const token of [...pooled].sort((a, b) => Math.abs(b.weight) - Math.abs(a.weight))) {
    const words = wording(token, points);
    if (!strongest.has(words)) strongest.set(words, token.weight);
  }
  const top = [...strongest].slice(0, TOP);
  const items = top.map(([words, weight]) => topItem(words, weight, Math.abs(top[0][1])));
  return element("ol", { class: "top", "aria-label": "Strongest tokens" }, ...items);
}

function topItem(words, weight, largest) {
  return element("li", {}, element("bdi", {}, words), barNode(weight, largest), element("span", { class: "value" }, percent(weight)));
}

function barNode(weight, largest) {
  const bar = element("span", { class: `bar ${weight < 0 ? "less" : "more"}`, "aria-hidden": "true" });
  bar.style.setProperty("--share", Math.abs(weight) / largest);
  return bar;
}

function legend() {
  const sample = (kind, words) => {
    const node = element("span", { class: `token ${kind}` }, words);
    if (kind !== "apart") node.style.setProperty("--heat", 0.8);
    return node;
  };
  const samples = [sample("more", "adds"), sample("less", "takes away"), sample("apart", "read, not pooled")];
  return element("p", { class: "legend soft" }, ...samples, " the stronger, the more; pooled tokens sum to 100 %");
}

/** Shows the tooltip of a token above it, inside the window. */
function showTip(token) {
  const tip = byId("tip");
  tip.textContent = token.dataset.tip;
  tip.hidden = false;
  token.setAttribute("aria-describedby", "tip");
  const [at, own] = [token.getBoundingClientRect(), tip.getBoundingClientRect()];
  const rightmost = document.documentElement.clientWidth - own.width - 8;
  const above = at.top - own.height - 6;
  tip.style.setProperty("left", `${Math.min(Math.max(8, at.left + at.width / 2 - own.width / 2), rightmost)}px`);
  tip.style.setProperty("top", `${above < 0 ? at.bottom + 6 : above}px`);
}

function hideTip() {
  byId("tip").hidden = true;
  document.querySelector("[aria-describedby=tip]")?.removeAttribute("aria-describedby");
}

/** Moves from token to token; one token of a text is a tab stop. */
function moveToken(token, step) {
  const all = [...token.parentElement.querySelectorAll(".token")];
  const next = all[all.indexOf(token) + step];
  if (!next) return;
  token.setAttribute("tabindex", "-1");
  next.setAttribute("tabindex", "0");
  next.focus();
}

function listenToTokens() {
  const tokenOf = (event) => event.target.closest?.(".token[role]");
  for (const name of ["focusin", "mouseover"]) document.addEventListener(name, (event) => {
    hideTip();
    if (tokenOf(event)) showTip(tokenOf(event));
  });
  for (const name of ["focusout", "mouseout"]) document.addEventListener(name, (event) => { if (tokenOf(event)) hideTip(); });
  window.addEventListener("scroll", hideTip, { passive: true });
}
