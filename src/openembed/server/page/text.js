// Texts are addressed by Unicode code points, as the server counts; JavaScript's own offsets count UTF-16 units.

/** Returns {length, slice(start, end)} of a text, in code points. */
function codePoints(text) {
  if (!/[\ud800-\udbff]/.test(text)) return { length: text.length, slice: (start, end) => text.slice(start, end) };
  const points = Array.from(text);
  return { length: points.length, slice: (start, end) => points.slice(start, end).join("") };
}

/** Returns nodes for text[start:end] with the ranges that fall inside in <mark>, and … where the text goes on. */
function marked(text, ranges, [start, end]) {
  const points = codePoints(text);
  const stop = Math.min(end, points.length);
  const nodes = start > 0 ? ["… "] : [];
  let cursor = start;
  for (const [low, high] of [...ranges].sort((a, b) => a[0] - b[0])) {
    const [from, to] = [Math.max(low, cursor), Math.min(high, stop)];
    if (from >= to) continue;
    nodes.push(points.slice(cursor, from), element("mark", {}, points.slice(from, to)));
    cursor = to;
  }
  nodes.push(points.slice(cursor, stop));
  if (stop < points.length) nodes.push(" …");
  return nodes;
}

/** Returns a metadata value as short text. */
function plain(value) {
  if (Array.isArray(value)) return value.map(plain).join(", ");
  return typeof value === "string" ? value : JSON.stringify(value);
}
