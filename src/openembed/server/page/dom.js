// Elements and numbers. Text reaches the page as text nodes only, so nothing a server sends is ever read as HTML.

const byId = (id) => document.getElementById(id);

/** Returns a new element; strings among the children become text, `onclick` a listener, true an empty attribute. */
function element(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "onclick") node.addEventListener("click", value);
    else if (value !== false && value != null) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children);
  return node;
}

/** Returns the first element of a copy of a template. */
const fromTemplate = (id) => byId(id).content.firstElementChild.cloneNode(true);

/** Says a sentence to screen readers; the same sentence twice is said twice. */
function say(sentence) {
  byId("said").textContent = "";
  requestAnimationFrame(() => { byId("said").textContent = sentence; });
}

const count = (number, noun) => `${number.toLocaleString("en")} ${noun}${number === 1 ? "" : "s"}`;

/** Returns a duration as people read it: 0.4 ms, 12 ms, 1.2 s. */
function duration(ms) {
  if (ms >= 1000) return `${(ms / 1000).toFixed(1)} s`;
  return `${ms < 9.95 ? ms.toFixed(1) : Math.round(ms)} ms`;
}

/** Returns a share as percent, two decimals below 1 %, with a true minus sign. */
const percent = (share) => `${(share * 100).toFixed(Math.abs(share) < 0.00995 ? 2 : 1).replace("-", "−")} %`;
