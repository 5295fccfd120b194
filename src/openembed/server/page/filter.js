// A filter is a list of conditions that must all hold; the server gets one condition, or {"and": [...]} of several.

const OPERATORS = { gt: ">", gte: "≥", lt: "<", lte: "≤", in: "in" };
const JOINTS = ["and", "or", "not"];

const isObject = (value) => typeof value === "object" && value !== null && !Array.isArray(value);
const sameCondition = (one, other) => JSON.stringify(one) === JSON.stringify(other);

/** Returns the filter of a list of conditions, null for none. */
function filterOf(conditions) {
  return conditions.length > 1 ? { and: conditions } : (conditions[0] ?? null);
}

/** Returns the conditions of a filter: the parts of a top-level "and", and each key by itself. */
function conditionsOf(filter) {
  return Object.entries(filter ?? {}).flatMap(([key, value]) =>
    key === "and" && Array.isArray(value) && value.every(isObject) ? value.flatMap(conditionsOf) : [{ [key]: value }]);
}

/** Returns the conditions written in a text; throws an Error that says what is wrong and what is expected. */
function parseFilter(text) {
  if (!text.trim()) return [];
  let filter;
  try {
    filter = JSON.parse(text);
  } catch (error) {
    throw new Error(`This is not JSON: ${error.message}. Keys and texts stand in double quotes.`);
  }
  if (!isObject(filter)) throw new Error(`A filter is an object such as {"lang": "en"}; this is ${JSON.stringify(filter)}.`);
  return conditionsOf(filter);
}

/** Returns a condition in words: year ≥ 2000, tag in a, b, not (lang = en). */
function describe(condition) {
  return Object.entries(condition).map(([key, wanted]) => {
    if (JOINTS.includes(key)) return describeJoint(key, wanted);
    if (!isObject(wanted)) return `${key} = ${plain(wanted)}`;
    return Object.entries(wanted).map(([name, value]) => describeOperator(key, name, value)).join(" and ");
  }).join(" and ");
}

function describeOperator(field, name, value) {
  if (name === "exists" && typeof value === "boolean") return value ? `${field} exists` : `${field} is missing`;
  return `${field} ${OPERATORS[name] ?? name} ${plain(value)}`;
}

function describeJoint(key, wanted) {
  const parts = (Array.isArray(wanted) ? wanted : [wanted]).map((part) => (isObject(part) ? describe(part) : plain(part)));
  return key === "not" ? `not (${parts.join(" and ")})` : parts.join(` ${key} `);
}

/** Returns {field, label, condition} for each value of a metadata field: items of lists, parts of objects by dots. */
function chipsOf(field, value) {
  if (Array.isArray(value)) return value.map((item) => chipOf(field, item));
  if (isObject(value)) return Object.entries(value).flatMap(([key, part]) => chipsOf(`${field}.${key}`, part));
  return value === null || value === "" ? [] : [chipOf(field, value)];
}

/** The condition holds for a value and for a list that holds it; it is null where none can be asked for. */
function chipOf(field, value) {
  const askable = ["string", "number", "boolean"].includes(typeof value) && !JOINTS.includes(field);
  return { field, label: plain(value), condition: askable ? { [field]: value } : null };
}
