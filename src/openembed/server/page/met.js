// Which token of the query meets which of a document, when a score is the sum of what they make together.

const SEEN = 0.45; // the least heat, so that every token met is seen

/** Returns the pairs that make a score, those that add most first, over the document's text with the tokens met in it. */
function metNodes({ title, text, terms }) {
  if (!terms.length) return [element("p", { class: "soft" }, "No token of this document has a vector.")];
  const pairs = metPairs(terms);
  const largest = Math.max(...pairs.map(({ share }) => Math.abs(share))) || 1;
  const items = pairs.slice(0, TERMS).map((pair) => pairItem(pair, largest));
  const rest = pairs.length > TERMS ? `; ${count(pairs.length - TERMS, "smaller one")} not shown` : "";
  const about = `Each token of the query meets the document’s nearest to it in meaning, and adds the product of their vectors${rest}. `
    + "All shares sum to 100 %.";
  return [element("h4", {}, "Tokens that meet"), element("ol", { class: "top met", "aria-label": "Tokens that meet" }, ...items),
    element("p", { class: "soft" }, about), ...metText(title ? `${title} ${text}`.trim() : text, pairs)];
}

/** Returns the pairs with the same word that meets the same token as one: queries are filled up with many of one token. */
function metPairs(terms) {
  const found = new Map();
  for (const { term, met, score, share, met_position: place, met_span: span } of terms) {
    const name = JSON.stringify([term, place]);
    const pair = found.get(name) ?? { term, met, place, span, score: 0, share: 0, times: 0 };
    found.set(name, { ...pair, score: pair.score + score, share: pair.share + share, times: pair.times + 1 });
  }
  return [...found.values()].sort((a, b) => b.share - a.share);
}

function pairItem({ term, met, score, share, times }, largest) {
  const words = (name) => element("bdi", {}, plainTerm(name));
  const both = element("span", { class: "pair" }, words(term), " → ", words(met), times > 1 ? ` × ${times}` : "");
  both.title = both.textContent; // it may be cut
  const product = element("span", { class: "value soft" }, score.toFixed(2).replace("-", "−"));
  return element("li", {}, both, barNode(share, largest), product, element("span", { class: "value" }, percent(share)));
}

/** Returns the document's text, in which each token met shows what is added there; nothing where no place is known. */
function metText(text, pairs) {
  const tokens = metTokens(pairs.filter(({ span }) => span));
  if (!tokens.length) return [];
  const scale = fullHeat(tokens);
  const draw = (token, words) => {
    const tip = `${words} ← ${token.asking.join(", ")}: ${percent(token.weight)}`;
    const heat = Math.max(SEEN, Math.abs(token.weight) / scale);
    return tokenElement(token.weight < 0 ? "less" : "more", words, tip, heat);
  };
  return [heatSection("Document", count(tokens.length, "token") + " met", tokenNodes(text, tokens, draw))];
}

/** Returns the tokens met in their order in the text, each with its share and the query's tokens that met it. */
function metTokens(pairs) {
  const found = new Map();
  for (const { term, met, span: [start, end], share } of pairs) {
    const token = found.get(start) ?? { text: met, start, end, weight: 0, asking: [] };
    found.set(start, { ...token, weight: token.weight + share, asking: [...token.asking, plainTerm(term)] });
  }
  return [...found.values()].sort((a, b) => a.start - b.start);
}
