// What every view needs: the API, its errors, the token, times, templates. All text goes in through textContent.

export const API = new URL("../api/v1/", import.meta.url);
export const $ = (selector, root = document) => root.querySelector(selector);
export const $$ = (selector, root = document) => [...root.querySelectorAll(selector)];
export const stamp = (id) => $(`#${id}`).content.firstElementChild.cloneNode(true);
export const still = matchMedia("(prefers-reduced-motion: reduce)");
export const count = (number, noun) => `${number.toLocaleString("en")} ${noun}${number === 1 ? "" : "s"}`;

export function clock(seconds) {
  const tenths = Math.floor(seconds * 10 + 1e-6), minutes = Math.floor(tenths / 600), hours = Math.floor(minutes / 60);
  const rest = ((tenths % 600) / 10).toFixed(1).padStart(4, "0");
  return hours ? `${hours}:${String(minutes % 60).padStart(2, "0")}:${rest}` : `${minutes}:${rest}`;
}

export function say(text) {
  $("#said").textContent = text;
}

export class Problem extends Error {
  constructor(message, { hint = null, status = 0 } = {}) {
    super(message);
    Object.assign(this, { hint, status });
  }
}

// Any answer of the server that is no success, whatever its body.
export function problem(status, text) {
  let said = null;
  try { said = JSON.parse(text).error; } catch { /* no JSON: a proxy's page */ }
  return new Problem(said?.message ?? `The server answered ${status}.`, { hint: said?.hint, status });
}

// An error beside what it is about, with what to do and a way to try again.
export function complain(slot, error, again = null) {
  slot.hidden = error === null;
  slot.replaceChildren();
  if (error === null) return;
  for (const [tag, text] of [["b", error.message], ["p", error.hint]]) {
    if (text) slot.appendChild(document.createElement(tag)).textContent = text;
  }
  if (again === null) return;
  const button = slot.appendChild(document.createElement("button"));
  button.type = "button";
  button.textContent = "Try again";
  button.addEventListener("click", again);
}

let token = sessionStorage.getItem("keyreel-token");
let asking = null;

export const authorization = () => (token === null ? {} : { Authorization: `Bearer ${token}` });

// Pictures and videos are asked for by the browser itself, which sends no header: for them the token goes in a cookie.
function remember(secret) {
  token = secret;
  sessionStorage.setItem("keyreel-token", secret);
  document.cookie = `keyreel_token=${encodeURIComponent(secret)}; path=${API.pathname}; SameSite=Strict`;
}

// One dialog, however many requests were refused at once. `used`: the token that the refused request carried.
export function askToken(used) {
  if (token !== used) return Promise.resolve();
  asking ??= new Promise((resolve, reject) => {
    const dialog = $("#token"), form = $("form", dialog), field = $("#secret");
    $(".note", dialog).hidden = used === null;
    field.value = "";
    form.onsubmit = (event) => {
      event.preventDefault();
      remember(field.value.trim());
      dialog.close("yes");
    };
    $("button[type=button]", dialog).onclick = () => dialog.close("no");
    dialog.onclose = () => {
      asking = null;
      if (dialog.returnValue === "yes") resolve();
      else reject(new Problem("A token is needed.", { hint: "Try again and give the token of this library." }));
      dialog.returnValue = "";
    };
    dialog.showModal();
  });
  return asking;
}
export const currentToken = () => token;

export const pause = (milliseconds, signal) => new Promise((resolve, reject) => {
  const timer = setTimeout(resolve, milliseconds);
  signal?.addEventListener("abort", () => { clearTimeout(timer); reject(signal.reason); }, { once: true });
});

// JSON of the API. A full queue (429) is waited for, twice at most; a refused token is asked for.
export async function api(path, { method = "GET", query = {}, body = null, signal = null, tries = 2 } = {}) {
  const url = new URL(path, API), used = token;
  for (const [key, value] of Object.entries(query)) if (value !== null && value !== "") url.searchParams.set(key, value);
  const json = body !== null && !(body instanceof FormData);
  const headers = { ...authorization(), ...(json && { "Content-Type": "application/json" }) };
  const response = await fetch(url, { method, headers, body: json ? JSON.stringify(body) : body, signal }).catch((error) => {
    if (signal?.aborted) throw error;
    throw new Problem("The server cannot be reached.", { hint: "It may have been stopped, or the network is down." });
  });
  const again = { method, query, body, signal };
  if (response.status === 401) {
    await askToken(used);
    return api(path, { ...again, tries });
  }
  if (response.status === 429 && tries > 0) {
    await pause(1000 * Math.min(Number(response.headers.get("Retry-After")) || 1, 10), signal);
    return api(path, { ...again, tries: tries - 1 });
  }
  const text = await response.text();
  if (!response.ok) throw problem(response.status, text);
  return text === "" ? null : JSON.parse(text);
}

// What is known of a video, asked for once; a few dozen are kept.
const known = new Map();
export function detail(id) {
  if (!known.has(id)) {
    const asked = api(`videos/${encodeURIComponent(id)}`);
    asked.catch(() => known.delete(id));
    known.set(id, asked);
    if (known.size > 60) known.delete(known.keys().next().value);
  }
  return known.get(id);
}

// The thumbnails of a video: draws the one nearest a time on a canvas.
const sheets = new Map();
export const forget = (id) => [known, sheets].forEach((kept) => kept.delete(id));
export async function sprite(id) {
  const video = await detail(id);
  if (!video.sprite) return null;
  if (!sheets.has(id)) {
    const image = new Image();
    image.src = new URL(video.sprite.image, API);
    sheets.set(id, image);
    if (sheets.size > 30) sheets.delete(sheets.keys().next().value);
  }
  const image = sheets.get(id);
  await image.decode();
  const { columns, tile: [width, height], step_seconds: step } = video.sprite;
  const tiles = Math.min(Math.ceil(video.duration_seconds / step - 1e-9) || 1, columns * Math.round(image.naturalHeight / height));
  return {
    step, tiles, duration: video.duration_seconds,
    draw(canvas, seconds) {
      const place = Math.min(Math.max(Math.floor(seconds / step + 1e-6), 0), tiles - 1);
      Object.assign(canvas, { width, height });
      const x = (place % columns) * width, y = Math.floor(place / columns) * height;
      canvas.getContext("2d").drawImage(image, x, y, width, height, 0, 0, width, height);
      return place;
    },
  };
}

export function bar(node, share) {
  $("rect", node).setAttribute("width", `${(100 * Math.min(Math.max(share, 0), 1)).toFixed(1)}%`);
}
