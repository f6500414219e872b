// What every view needs: the API, its errors, the token, times, templates. All text goes in through textContent.

export const API = new URL("../api/v1/", import.meta.url);
export const $ = (selector, root = document) => root.querySelector(selector);
export const $$ = (selector, root = document) => [...root.querySelectorAll(selector)];
export const stamp = (id) => $(`#${id}`).content.firstElementChild.cloneNode(true);
export const make = (tag, values = {}) => Object.assign(document.createElement(tag), values);
export const still = matchMedia("(prefers-reduced-motion: reduce)");
export const count = (number, noun) => `${number.toLocaleString("en")} ${noun}${number === 1 ? "" : "s"}`;
export const percent = (chance) => (chance < 0.01 ? "<1 %" : `${Math.round(100 * chance)} %`);
// How well a hit fits: its chance, or its score if the query has no chances; and as a share, for a bar.
export const fit = (hit) => (hit.chance === null ? hit.score.toFixed(3) : percent(hit.chance));
export const fitShare = (hit, best) => hit.chance ?? (best > 0 ? hit.score / best : 0);
export const between = (value, low, high) => Math.min(Math.max(value, low), high);
export const bar = (node, share) => $("rect", node).setAttribute("width", `${(100 * between(share, 0, 1)).toFixed(1)}%`);
export const say = (text) => { $("#said").textContent = text; };

export function clock(seconds) {
  const tenths = Math.floor(seconds * 10 + 0.5), minutes = Math.floor(tenths / 600), hours = Math.floor(minutes / 60);
  const rest = ((tenths % 600) / 10).toFixed(1).padStart(4, "0");
  return hours ? `${hours}:${String(minutes % 60).padStart(2, "0")}:${rest}` : `${minutes}:${rest}`;
}

export class Problem extends Error {
  constructor(message, { hint = null, status = 0 } = {}) {
    super(message);
    Object.assign(this, { hint, status });
  }
}

// The error of a failed request, whatever its body.
export function problem(status, text) {
  let error = null;
  try { ({ error } = JSON.parse(text)); } catch { /* no JSON: a proxy's page */ }
  return new Problem(error?.message ?? `The server answered ${status}.`, { hint: error?.hint, status });
}

// Shows an error with its hint, and a button to try again.
export function complain(slot, error, again = null) {
  slot.hidden = error === null;
  slot.replaceChildren();
  for (const [tag, text] of [["b", error?.message], ["p", error?.hint]]) if (text) slot.append(make(tag, { textContent: text }));
  if (error && again) slot.append(make("button", { type: "button", textContent: "Try again", onclick: () => again() }));
}

let token = sessionStorage.getItem("keyreel-token");
let asking = null;
export const authorization = () => (token === null ? {} : { Authorization: `Bearer ${token}` });
export const currentToken = () => token;

// One dialog, however many requests were refused at once. `used`: the token that the refused request carried.
export function askToken(used) {
  if (token !== used) return Promise.resolve();
  asking ??= new Promise((resolve, reject) => {
    const dialog = $("#token"), field = $("#secret");
    $(".note", dialog).hidden = used === null;
    field.value = dialog.returnValue = "";
    $("button[type=button]", dialog).onclick = () => dialog.close("no");
    dialog.onclose = () => {
      asking = null;
      if (dialog.returnValue !== "yes") return reject(new Problem("A token is needed.", { hint: "Try again with the token of this library." }));
      token = field.value.trim();
      sessionStorage.setItem("keyreel-token", token);
      // The browser fetches pictures and videos without headers: for them the token is in a cookie.
      document.cookie = `keyreel_token=${encodeURIComponent(token)}; path=${API.pathname}; SameSite=Strict`;
      resolve();
    };
    dialog.showModal();
  });
  return asking;
}

export const pause = (milliseconds, signal) => new Promise((resolve, reject) => {
  const timer = setTimeout(resolve, milliseconds);
  signal?.addEventListener("abort", () => { clearTimeout(timer); reject(signal.reason); }, { once: true });
});

// Fetches JSON of the API. Waits for a full queue (429), at most twice; asks for a token if it was refused.
export async function api(path, { method = "GET", query = {}, body = null, signal = null, tries = 2 } = {}) {
  const url = new URL(path, API), used = token, json = body !== null && !(body instanceof FormData);
  for (const [key, value] of Object.entries(query)) {
    for (const one of Array.isArray(value) ? value : [value]) if (one !== null && one !== "") url.searchParams.append(key, one);
  }
  const headers = { ...authorization(), ...(json && { "Content-Type": "application/json" }) };
  const response = await fetch(url, { method, headers, body: json ? JSON.stringify(body) : body, signal }).catch((error) => {
    if (signal?.aborted) throw error;
    throw new Problem("The server cannot be reached.", { hint: "It may have been stopped, or the network is down." });
  });
  if (response.status === 401) {
    await askToken(used);
    return api(path, { method, query, body, signal, tries });
  }
  if (response.status === 429 && tries > 0) {
    await pause(1000 * Math.min(Number(response.headers.get("Retry-After")) || 1, 10), signal);
    return api(path, { method, query, body, signal, tries: tries - 1 });
  }
  const text = await response.text();
  if (!response.ok) throw problem(response.status, text);
  return text === "" ? null : JSON.parse(text);
}

// Details and thumbnails of videos, fetched once; keeps the latest few dozen.
const known = new Map(), sheets = new Map();
export const forget = (id) => [known, sheets].forEach((kept) => kept.delete(id));
function remembered(kept, id, most, create) {
  if (!kept.has(id)) kept.set(id, create());
  if (kept.size > most) kept.delete(kept.keys().next().value);
  return kept.get(id);
}

export const detail = (id) => remembered(known, id, 60, () => {
  const asked = api(`videos/${encodeURIComponent(id)}`);
  asked.catch(() => known.delete(id));
  return asked;
});

// The thumbnails of a video; `draw` puts the one nearest a time on a canvas.
export async function sprite(id) {
  const video = await detail(id);
  if (!video.sprite) return null;
  const image = remembered(sheets, id, 30, () => Object.assign(new Image(), { src: new URL(video.sprite.image, API) }));
  await image.decode();
  const { columns, tile: [width, height], step_seconds: step } = video.sprite, duration = video.duration_seconds;
  const tiles = Math.min(Math.ceil(duration / step - 1e-9) || 1, columns * Math.round(image.naturalHeight / height));
  return {
    step, tiles, duration,
    draw(canvas, seconds) {
      const place = between(Math.floor(seconds / step + 1e-6), 0, tiles - 1);
      Object.assign(canvas, { width, height });
      const x = (place % columns) * width, y = Math.floor(place / columns) * height;
      canvas.getContext("2d").drawImage(image, x, y, width, height, 0, 0, width, height);
      return place;
    },
  };
}
