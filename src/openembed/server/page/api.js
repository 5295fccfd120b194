// Requests to the server that delivered the page. The API key lives in this tab's session storage only.

const KEY_NAME = "openembed.key";

/** What a request failed with: the server's own words where it gave any. status 0: it did not answer. */
class ApiError extends Error {
  constructor(status, error, retryAfter = 0) {
    super(error.message || `The server answered ${status}.`);
    Object.assign(this, { status, param: error.param ?? "", code: error.code ?? "", retryAfter });
  }
}

function storedKey() {
  try { return sessionStorage.getItem(KEY_NAME) ?? ""; } catch { return ""; }
}

let apiKey = storedKey();

/** Keeps the key for this tab; throws an Error for one that no header can carry. */
function useKey(key) {
  if (!/^[\x21-\x7e]+$/.test(key)) throw new Error("A key has letters, digits and signs, without spaces.");
  apiKey = key;
  try { sessionStorage.setItem(KEY_NAME, key); } catch { /* storage is off: the key lives as long as the page */ }
}

/** Returns the JSON answer to a GET, or to a POST where there is a body; throws ApiError, or AbortError when aborted. */
async function call(path, body, signal) {
  const headers = { Accept: "application/json" };
  if (apiKey) headers.Authorization = `Bearer ${apiKey}`;
  if (body) headers["Content-Type"] = "application/json";
  const options = { method: body ? "POST" : "GET", headers, signal, body: body && JSON.stringify(body) };
  const response = await fetch(path, options).catch((error) => {
    signal?.throwIfAborted();
    throw new ApiError(0, { message: `No answer (${error.message}).` });
  });
  const answer = await response.json().catch(() => null);
  signal?.throwIfAborted();
  if (response.ok && answer) return answer;
  throw new ApiError(response.status, answer?.error ?? {}, retryAfter(response));
}

/** Returns the seconds of a Retry-After header, given as seconds or as a date; 0 without one. */
function retryAfter(response) {
  const value = response.headers.get("Retry-After") ?? "";
  const seconds = /^\d+$/.test(value) ? Number(value) : (Date.parse(value) - Date.now()) / 1000;
  return Math.max(0, Math.ceil(seconds || 0));
}
