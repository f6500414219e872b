// The page: which view the address asks for, search, library, keyboard.

import { $, $$, Problem, api, bar, clock, complain, count, detail, fit, fitShare, forget, make, pause, percent, say, sprite, stamp } from "./base.js";
import { card, cardPictures, neighbour } from "./cards.js";
import { jobs } from "./jobs.js";
import { video } from "./video.js";

const CONDITIONS = ["also", "without"], FRAMES = ["more", "less"]; // several of each, with ; between them
const FILTERS = [...CONDITIONS, "path", "tag", "after", "before", "min_duration", "max_duration"];
const PAGE = 24, MOST = 96, EACH = 2; // results at first and at most, and of one video
const box = $("#q");

// ---- The address. It holds the whole state: it can be shared, and the back button works.

const address = () => new URLSearchParams(location.search);
const kept = (params, names) => Object.fromEntries(names.map((name) => [name, params.get(name)]).filter(([, value]) => value));
const link = (values) => {
  const params = new URLSearchParams(Object.entries(values).filter(([, value]) => value !== null && value !== ""));
  return params.size ? `?${params}` : location.pathname;
};
// What a link into a video carries: the search it came from.
const origin = () => kept(address(), ["q", "like", "image", "k", "group", ...FRAMES, ...FILTERS]);
const several = (params, name) => (params.get(name) ?? "").split(";").map((one) => one.trim()).filter(Boolean);
// This search with other conditions.
const conditions = (name, values) => ({ ...Object.fromEntries(address()), [name]: values.join(";") });

function go(values, { replace = false, soon = false } = {}) {
  const inner = replace ? history.state?.inner ?? false : true;
  history[replace ? "replaceState" : "pushState"]({ inner }, "", link(values));
  return render({ soon });
}

const places = {}; // how far each view was scrolled, and what had the focus there
let current = null;

const views = { search: showSearch, library: showLibrary, video: video.show, jobs: jobs.show };

function render({ back = false, soon = false } = {}) {
  const params = address();
  const name = Object.hasOwn(views, params.get("view") ?? "") ? params.get("view") : "search";
  const changed = name !== current;
  if (changed && current !== null) places[current] = { top: scrollY, focus: document.activeElement };
  for (const section of $$("main > section")) section.hidden = section.id !== name;
  for (const entry of $$("header nav a")) entry.ariaCurrent = entry.dataset.view === name ? "page" : null;
  if (changed && current === "video") video.leave();
  const first = current === null;
  current = name;
  document.title = "keyreel";
  if (document.activeElement !== box) box.value = params.get("q") ?? "";
  fillFilters(params);
  if (current !== "search" && current !== "library") toggleFilters(false);
  const shown = views[name](params, { soon, back });
  if (!changed) return shown;
  if (back && places[name]) {
    scrollTo(0, places[name].top);
    if (places[name].focus?.isConnected) places[name].focus.focus({ preventScroll: true });
  } else if (!first) {
    scrollTo(0, 0);
    if (document.activeElement !== box) $(`#${name} h1`).focus({ preventScroll: true });
  }
  return shown;
}

history.scrollRestoration = "manual";
addEventListener("popstate", () => render({ back: true }));
document.addEventListener("click", (event) => {
  const target = event.target.closest("a[href]");
  if (target === null || event.button !== 0 || event.ctrlKey || event.metaKey || event.shiftKey || event.altKey) return;
  const url = new URL(target.href);
  if (url.origin !== location.origin || url.pathname !== location.pathname || url.hash !== "") return;
  event.preventDefault();
  // Next and previous replace the open result in the history: one step back leads to the results.
  go(Object.fromEntries(url.searchParams), { replace: target.closest("#around") !== null });
});

// ---- Cards

// A link to this search with one more frame in `more` or `less`.
function steered(frame, to, from) {
  const without = several(address(), from).filter((one) => one !== frame);
  return link({ ...conditions(to, [...new Set([...several(address(), to), frame])]), [from]: without.join(";") });
}

function momentCard(hit, best) {
  const seconds = hit.pts_seconds, span = `${clock(hit.start_seconds)} – ${clock(hit.stop_seconds)}`;
  const href = link({ view: "video", id: hit.video_id, t: seconds.toFixed(3), ...origin() });
  const subject = hit.answered_by === "subject", words = subject ? `${fit(hit)}, subject` : fit(hit);
  const region = subject ? hit.region : null;
  const node = card({ id: hit.video_id, name: hit.video, seconds, picture: hit.preview, href, label: `${hit.video}, ${span}, ${words}`, region });
  $(".row b", node).textContent = span;
  const by = subject ? ", by what stands out or moves in it" : "", chance = hit.chance === null ? "" : "how likely the best frame shows it; ";
  const title = `${chance}score ${hit.score.toFixed(3)}${by}`;
  Object.assign($(".row span", node), { textContent: words, title });
  bar($(".share", node), fitShare(hit, best));
  const frame = `${hit.video_id}@${seconds.toFixed(3)}`, place = `${hit.video} at ${clock(seconds)}`;
  // The address may have changed since the card was made, if the next answer is still loading.
  const steer = (anchor, to, from) => { anchor.href = steered(frame, to, from); };
  for (const [name, to, from, word] of [[".like", "more", "less", "More"], [".unlike", "less", "more", "Less"]]) {
    const anchor = $(name, node);
    Object.assign(anchor, { ariaLabel: `${word} like ${place}`, onclick: () => steer(anchor, to, from) });
    steer(anchor, to, from);
  }
  const notes = [];
  if (hit.folded) notes.push(`the same in ${count(hit.folded, "other video")}`);
  if (hit.more) notes.push(make("a", { href, textContent: `${hit.more} more in this video` }));
  $(".tags", node).hidden = notes.length === 0;
  $(".tags", node).append(...notes);
  return node;
}

function videoCard(entry) {
  const href = link({ view: "video", id: entry.id, ...kept(address(), FILTERS) }), length = clock(entry.duration_seconds ?? 0);
  const node = card({ id: entry.id, name: entry.name, seconds: 0, picture: entry.poster, href, label: `${entry.name}, ${length}` });
  const [head, foot] = $$(".row", node);
  $("b", head).replaceWith($(".name", foot));
  foot.remove();
  $(".share", node).remove();
  $("span", head).textContent = entry.duration_seconds === null ? "" : length;
  $(".tags", node).hidden = entry.tags.length === 0;
  $(".tags", node).append(...entry.tags.map(tagLink));
  return node;
}
const tagLink = (tag) => make("a", { textContent: tag, href: link({ view: "library", tag }), ariaLabel: `Videos tagged ${tag}` });

function failedCard(entry) {
  const node = stamp("failed");
  $(".name", node).textContent = entry.name;
  $(".why", node).textContent = entry.error ?? "It could not be indexed.";
  $(".hint", node).textContent = entry.hint ?? "";
  const onclick = () => remove(entry.id, entry.name, () => node.remove());
  Object.assign($("button", node), { ariaLabel: `Remove ${entry.name} from the library`, onclick });
  return node;
}

// Asks, removes, then calls `then`. The open view shows errors.
export function remove(id, name, then) {
  const dialog = $("#sure");
  $("h2", dialog).textContent = `Remove ${name}?`;
  dialog.returnValue = "";
  dialog.onclose = async () => {
    if (dialog.returnValue !== "yes") return;
    try {
      await api(`videos/${encodeURIComponent(id)}`, { method: "DELETE" });
      forget(id);
      found.key = listed = null;
      say(`${name} was removed`);
      then();
    } catch (error) {
      complain($(`#${current} > .note.bad`), error);
    }
  };
  dialog.showModal();
}

// ---- Search

const pictures = new Map(); // files to search with, by the number in the address
let found = { key: null, hits: [] };
let running = null;

// Converts the filters for the API: there `before` is exclusive, on the page it is the last day.
function restricted(params) {
  const query = kept(params, FILTERS.filter((name) => !CONDITIONS.includes(name)));
  if (query.before) query.before += "T23:59:59.999";
  return query;
}

function question(params) {
  const query = { ...restricted(params), k: params.get("k") ?? PAGE, per_video: params.has("video") ? null : EACH };
  for (const name of [...CONDITIONS, ...FRAMES]) query[name] = several(params, name);
  const like = /^(.*)@([\d.]+)$/.exec(params.get("like") ?? "");
  if (like) return { method: "POST", query, body: { like: { video_id: like[1], seconds: Number(like[2]) } } };
  if (params.has("image")) {
    const file = pictures.get(params.get("image"));
    if (!file) throw new Problem("The picture of this search is no longer there.", { hint: "Choose it again." });
    const body = new FormData();
    body.append("file", file);
    return { method: "POST", query, body };
  }
  return { query: { ...query, q: params.get("q") } };
}

async function showSearch(params, { soon }) {
  const key = JSON.stringify(kept(params, ["q", "like", "image", "k", ...FRAMES, ...FILTERS]));
  const text = params.get("q")?.trim() ?? "", empty = !text && !params.has("like") && !params.has("image");
  if (text) document.title = `${text} · keyreel`;
  showChips(params);
  if (key === found.key) return found.group === params.get("group") || layout(params);
  running?.abort();
  const mine = (running = new AbortController()), results = $("#results");
  results.ariaBusy = "true";
  const busy = setTimeout(() => { $(".busy").hidden = false; }, 150);
  try {
    if (soon) await pause(empty ? 0 : 130, mine.signal);
    const answer = empty
      ? await api("videos", { query: { ...restricted(params), limit: 12 }, signal: mine.signal })
      : await api("search", { ...question(params), signal: mine.signal });
    found = { key, ...answer };
    complain($("#search > .note.bad"), null);
    layout(params);
  } catch (error) {
    if (mine.signal.aborted) return;
    found = { key: null, hits: [] };
    complain($("#search > .note.bad"), error, () => showSearch(address(), {}));
    results.replaceChildren();
    $("#count").textContent = "";
    $("#more").hidden = $(".choice").hidden = $("#weak").hidden = true;
  } finally {
    clearTimeout(busy);
    if (running === mine) {
      $(".busy").hidden = true;
      results.ariaBusy = "false";
    }
  }
}

function layout(params) {
  const results = $("#results"), grouped = params.get("group") === "videos";
  found.group = params.get("group");
  for (const button of $$(".choice button")) button.ariaPressed = String(button.value === (grouped ? "videos" : ""));
  $("#more").hidden = $(".choice").hidden = $("#weak").hidden = true;
  if (found.videos) return welcome(results);
  const { hits } = found, best = Math.max(...hits.map((hit) => hit.score)), groups = byVideo(hits);
  const from = `${count(hits.length, "moment")} in ${count(groups.length, "video")}`;
  const took = `${Math.max(1, Math.round(1000 * found.seconds))} ms`;
  const damaged = found.left_out.length ? `; ${count(found.left_out.length, "damaged video")} not searched` : "";
  $("#count").textContent = hits.length ? `${from}, ${took}${damaged}` : `Nothing was found${damaged}.`;
  warn(hits);
  $(".choice").hidden = hits.length === 0;
  $("#more").hidden = hits.length < Number(params.get("k") ?? PAGE) || hits.length >= MOST;
  video.results(hits.map((hit) => ({ id: hit.video_id, seconds: hit.pts_seconds })));
  if (hits.length === 0) {
    const active = FILTERS.some((name) => params.has(name));
    const textContent = active ? "Filters are on: fewer of them may find more." : "The library may be empty.";
    return results.replaceChildren(make("p", { className: "empty", textContent }));
  }
  if (!grouped) return results.replaceChildren(cards(hits.map((hit) => momentCard(hit, best))));
  results.replaceChildren(...groups.map((some) => {
    const node = stamp("group"), href = link({ view: "video", id: some[0].video_id, ...origin() });
    Object.assign($("h2 a", node), { textContent: some[0].video, href });
    $(".row span", node).textContent = `${count(some.length, "moment")}, score ${some[0].video_score.toFixed(3)}`;
    const inOrder = some.toSorted((one, other) => one.pts_seconds - other.pts_seconds);
    node.append(cards(inOrder.map((hit) => momentCard(hit, best))));
    return node;
  }));
}

// A banner if the answer means little.
function warn(hits) {
  const words = found.unknown_words.map((word) => `“${word}”`).join(", "), notes = [];
  if (found.matches_well === false) {
    const chance = percent(Math.max(...hits.map((hit) => hit.chance ?? 0)));
    notes.push(make("b", { textContent: "Nothing matches well" }), make("p", { textContent: `The best moment shows it with a chance of ${chance}.` }));
  }
  if (words) notes.push(make("p", { textContent: `The model does not know ${words}.` }));
  $("#weak").replaceChildren(...notes);
  $("#weak").hidden = notes.length === 0;
}

function cards(nodes) {
  const list = make("ol", { className: "cards" });
  list.append(...nodes);
  return list;
}

// Hits of each video, the best video first.
function byVideo(hits) {
  const groups = new Map();
  for (const hit of hits) groups.set(hit.video_id, [...(groups.get(hit.video_id) ?? []), hit]);
  return [...groups.values()].sort((one, other) => other[0].video_score - one[0].video_score);
}

// Without a search: what the library holds.
function welcome(results) {
  const videos = found.videos.filter((entry) => entry.status === "ok");
  $("#count").textContent = found.total === 0 ? "This library is empty." : `${count(found.total, "video")} in the library`;
  video.results([]);
  const empty = found.total === 0, href = link(empty ? { view: "jobs" } : { view: "library", ...kept(address(), FILTERS) });
  const all = make("a", { className: "button", href, textContent: empty ? "Add videos" : "The whole library" });
  results.replaceChildren(cards(videos.map(videoCard)), all);
}

// The frame or picture of the search, and its conditions; each can be removed.
function showChips(params) {
  const like = params.get("like"), file = pictures.get(params.get("image")), list = $("#chips"), nodes = [];
  const add = (text, off, what = text) => {
    const node = stamp("chip");
    $("span", node).textContent = text;
    Object.assign($("a", node), { href: link(off), ariaLabel: `Without ${what}` });
    nodes.push(node);
    return node;
  };
  const rest = kept(params, ["q", ...FRAMES, ...FILTERS]);
  if (like) frameChip(add("", rest), "like", like);
  else if (file) pictureChip(add(`like ${file.name}`, rest), file);
  const left = (name, one) => conditions(name, several(params, name).filter((other) => other !== one));
  for (const [name, word] of [["also", "and"], ["without", "not"]]) {
    for (const one of several(params, name)) add(`${word} ${one}`, left(name, one));
  }
  for (const name of FRAMES) {
    for (const one of several(params, name)) frameChip(add("", left(name, one)), `${name} like`, one);
  }
  list.hidden = nodes.length === 0;
  list.replaceChildren(...nodes);
}

async function frameChip(node, word, frame) {
  const place = frame.lastIndexOf("@"), id = frame.slice(0, place), seconds = Number(frame.slice(place + 1));
  const name = (text) => {
    $("span", node).textContent = `${word} ${text} at ${clock(seconds)}`;
    $("a", node).ariaLabel = `Without ${word} ${text} at ${clock(seconds)}`;
  };
  name("the frame");
  const [entry, sheet] = await Promise.all([detail(id), sprite(id)]).catch(() => [null, null]);
  if (entry) name(entry.name);
  $("canvas", node).hidden = !sheet;
  sheet?.draw($("canvas", node), seconds);
}

async function pictureChip(node, file) {
  const image = await createImageBitmap(file).catch(() => null), canvas = $("canvas", node);
  if (!image) return;
  const scale = 160 / Math.max(image.width, image.height);
  Object.assign(canvas, { width: image.width * scale, height: image.height * scale, hidden: false });
  canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
}

function searchPicture(file) {
  const number = String(pictures.size + 1);
  pictures.set(number, file);
  box.value = "";
  go({ image: number, ...kept(address(), FILTERS) });
}

// A run of typing is one step of the history.
let typing = false;
box.addEventListener("input", () => {
  go({ q: box.value, ...kept(address(), ["group", ...FILTERS]) }, { replace: typing, soon: true });
  typing = true;
});
box.addEventListener("blur", () => { typing = false; });
$("#find").addEventListener("submit", (event) => {
  event.preventDefault();
  typing = false;
  if (current !== "search") go({ q: box.value, ...kept(address(), FILTERS) });
  else found.key ?? render();
  if (matchMedia("(pointer: coarse)").matches) box.blur();
});
$("#picture").addEventListener("change", (event) => {
  if (event.target.files.length) searchPicture(event.target.files[0]);
  event.target.value = "";
});
$("#more").addEventListener("click", () => {
  const before = $$("#results .picture").length, params = Object.fromEntries(address());
  go({ ...params, k: Math.min(Number(params.k ?? PAGE) + PAGE, MOST) }, { replace: true }).then(() => $$("#results .picture")[before]?.focus());
});
$(".choice").addEventListener("click", (event) => {
  if (event.target.matches("button")) go({ ...Object.fromEntries(address()), group: event.target.value }, { replace: true });
});

// ---- Filters

const filters = $("#filters");
function fillFilters(params) {
  const active = FILTERS.filter((name) => params.has(name)).length;
  for (const name of FILTERS) {
    const field = filters.elements[name];
    if (document.activeElement !== field) field.value = params.get(name) ?? "";
  }
  Object.assign($("#filter .badge"), { hidden: active === 0, textContent: active });
  $("#filter").ariaLabel = active ? `Filters, ${active} on` : "Filters";
  if (current === null && active) toggleFilters(true);
}
function toggleFilters(open) {
  filters.hidden = !open;
  $("#filter").ariaExpanded = String(open);
  if (open && current !== null) filters.elements.path.focus();
}
$("#filter").addEventListener("click", () => toggleFilters(filters.hidden));
let settled = null;
filters.addEventListener("input", () => {
  clearTimeout(settled);
  settled = setTimeout(applyFilters, 250);
});
filters.addEventListener("reset", () => setTimeout(applyFilters));
filters.addEventListener("submit", (event) => event.preventDefault());
function applyFilters() {
  const values = Object.fromEntries(address());
  for (const name of [...FILTERS, "offset", "k"]) delete values[name];
  for (const name of FILTERS) values[name] = filters.elements[name].value.trim();
  if (!["search", "library"].includes(current)) delete values.view;
  go(values, { replace: true });
}

// ---- Library

let listing = null;
let listed = null; // what is shown: kept for the way back, with scroll position and focus
async function showLibrary(params, { back = false }) {
  document.title = "Library · keyreel";
  if (back && listed === params.toString()) return;
  listing?.abort();
  const mine = (listing = new AbortController()), list = $("#videos");
  const offset = Math.max(0, Math.floor(Number(params.get("offset"))) || 0);
  list.ariaBusy = "true";
  try {
    const query = { ...restricted(params), offset, limit: PAGE };
    const { total, videos } = await api("videos", { query, signal: mine.signal });
    const bad = videos.filter((entry) => entry.status !== "ok").length;
    list.replaceChildren(...videos.map((entry) => (entry.status === "ok" ? videoCard(entry) : failedCard(entry))));
    $("#library [role=status]").textContent = count(total, "video") + (bad ? `, ${bad} on this page failed` : "");
    const pages = $("#library .pages");
    pages.hidden = total <= PAGE && offset === 0;
    $("span", pages).textContent = videos.length ? `${offset + 1} – ${offset + videos.length} of ${total}` : `of ${total}`;
    page($(".previous", pages), params, offset - PAGE, offset > 0);
    page($(".next", pages), params, offset + PAGE, offset + videos.length < total);
    complain($("#library > .note"), null);
    listed = params.toString();
  } catch (error) {
    if (mine.signal.aborted) return;
    list.replaceChildren();
    complain($("#library > .note"), error, () => showLibrary(address(), {}));
  } finally {
    if (listing === mine) list.ariaBusy = "false";
  }
}
function page(anchor, params, offset, there) {
  Object.assign(anchor, { hidden: !there, href: link({ ...Object.fromEntries(params), offset: offset > 0 ? offset : "" }) });
}

// ---- Keyboard, dropping, pasting

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || $("dialog[open]")) return;
  const { key, target } = event;
  if (target.matches("input:not([type=checkbox], [type=file]), textarea, select")) {
    if (key === "ArrowDown" && target === box && cardPictures().length) {
      event.preventDefault();
      cardPictures()[0].focus();
    } else if (key === "Escape" && filters.contains(target)) {
      toggleFilters(false);
      $("#filter").focus();
    }
    return;
  }
  const focused = target.closest(".card");
  if (key === "/") box.select(), box.focus();
  else if (key === "?") $("#help").showModal();
  else if (focused ? key.startsWith("Arrow") : current !== "video" && /^Arrow(Left|Right)$/.test(key)) {
    const next = neighbour(key);
    if (next) next.focus(), next.scrollIntoView({ block: "nearest" });
    else if (key === "ArrowUp" && focused) box.focus();
    else return;
  } else if ((key === "," || key === ".") && focused?.step) focused.step(key === "," ? -1 : 1);
  else if (key === "m" && focused && $(".like", focused)) $(".like", focused).click();
  else if (key === "l" && focused && $(".unlike", focused)) $(".unlike", focused).click();
  else if (key === "Escape" && !filters.hidden) toggleFilters(false);
  else if (key === "Escape" && current === "video") back();
  else if (current !== "video" || !video.key(key, target)) return;
  event.preventDefault();
});

function back() {
  if (history.state?.inner) history.back();
  else go(origin());
}
$("#back").addEventListener("click", (event) => {
  event.preventDefault();
  event.stopPropagation();
  back();
});
$("#keys").addEventListener("click", () => $("#help").showModal());

function take(files) {
  const image = files.find((file) => file.type.startsWith("image/"));
  if (image) return searchPicture(image);
  if (files.length === 0) return;
  if (current !== "jobs") go({ view: "jobs" });
  jobs.upload(files);
}
let inside = 0;
addEventListener("dragenter", (event) => {
  if (!event.dataTransfer?.types.includes("Files")) return;
  inside += 1;
  $("#dropping").hidden = false;
});
addEventListener("dragleave", () => { $("#dropping").hidden = (inside = Math.max(0, inside - 1)) === 0; });
addEventListener("dragover", (event) => event.preventDefault());
addEventListener("drop", (event) => {
  event.preventDefault();
  inside = 0;
  $("#dropping").hidden = true;
  take([...(event.dataTransfer?.files ?? [])]);
});
addEventListener("paste", (event) => {
  const image = [...(event.clipboardData?.files ?? [])].find((file) => file.type.startsWith("image/"));
  if (image) event.preventDefault(), searchPicture(image);
});

video.start({ go, link, like: (value) => link({ like: value, ...kept(address(), FILTERS) }), origin, remove, tagLink });
jobs.start({ link, changed: () => { found.key = listed = null; if (current === "search" && found.videos) render(); } });
render();
