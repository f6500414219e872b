// One video: player, timeline, moments, key-frames, and the model's attention.

import { $, $$, API, api, authorization, bar, between, clock, complain, count, detail, fit, fitShare, make, pause, problem, sprite, stamp } from "./base.js";

// The same colours as the overlays of a storyboard: dark violet, magenta, orange, pale yellow.
const HEAT = [[20, 11, 52], [101, 21, 110], [187, 55, 84], [249, 142, 9], [252, 255, 164]];
const TICKS = [0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400];
const section = $("#video"), player = $("video", section), timeline = $(".timeline", section), drawing = $(".timeline > svg", section);
let page = null; // what page.js lends: go, link, like, origin, remove, tagLink
let shown = { id: null };
let found = []; // the results of the last search, for next and previous
let now = 0, asked = null;

function svg(name, attributes, parent, text = "") {
  const node = parent.appendChild(document.createElementNS("http://www.w3.org/2000/svg", name));
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.textContent = text;
  return node;
}
const at = (seconds) => `${(100 * between(seconds / shown.duration, 0, 1)).toFixed(3)}%`;

function show(seconds) {
  now = between(seconds, 0, shown.duration);
  $(".playhead", drawing)?.setAttribute("x", at(now));
  $("output", section).textContent = clock(now);
  Object.assign(timeline, { ariaValueNow: now.toFixed(1), ariaValueText: clock(now) });
  const cards = $$("#board .card"), last = cards.findLastIndex((card) => Number(card.dataset.seconds) <= now + 0.02);
  cards.forEach((card, place) => card.classList.toggle("now", place === last));
  for (const button of $$("#moments button")) button.ariaCurrent = String(now >= button.start - 0.02 && now < button.stop);
}

function seek(seconds, play) {
  show(seconds);
  if (player.hidden) return;
  player.currentTime = now;
  if (!play) return;
  player.scrollIntoView({ block: "nearest" });
  player.play().catch(() => {});
}

function drawTimeline(entry) {
  drawing.replaceChildren();
  const { duration } = shown, band = (start, stop) => Math.max((100 * (stop - start)) / duration - 0.12, 0.06);
  const ticks = svg("g", { class: "ticks" }, drawing);
  svg("line", { x1: 0, x2: "100%", y1: 92.5, y2: 92.5 }, ticks);
  const step = TICKS.find((one) => duration / one <= 7) ?? duration / 5;
  for (let tick = 0; tick <= duration + 1e-6; tick += step) {
    const anchor = tick === 0 ? "start" : duration - tick < 0.04 * duration ? "end" : "middle";
    const text = clock(tick);
    svg("text", { x: at(tick), y: 112, "text-anchor": anchor }, ticks, step < 1 ? text : text.slice(0, -2));
  }
  const scenes = svg("g", { class: "scenes" }, drawing), cuts = svg("g", { class: "cuts" }, drawing);
  for (const [start, stop] of entry.scenes.length ? entry.scenes : entry.shots) {
    svg("rect", { x: at(start), y: 0, width: `${band(start, stop).toFixed(3)}%`, height: 16, rx: 2 }, scenes);
  }
  for (const [start] of entry.shots.slice(1)) svg("line", { x1: at(start), x2: at(start), y1: 0, y2: 16 }, cuts);
  svg("g", { class: "found" }, drawing);
  svg("svg", { class: "curve scores", x: 0, y: 26, width: "100%", height: 66, viewBox: "0 0 1000 100", preserveAspectRatio: "none" }, drawing);
  const marks = svg("g", { class: "marks" }, drawing);
  for (const { pts_seconds: seconds } of entry.keyframes) {
    svg("line", { x1: at(seconds), x2: at(seconds), y1: 16, y2: 92 }, marks);
    svg("circle", { cx: at(seconds), cy: 8, r: 5.5 }, marks);
  }
  const head = svg("svg", { class: "playhead", x: 0, overflow: "visible" }, drawing);
  svg("line", { x1: 0, x2: 0, y1: -4, y2: 98 }, head);
}

// The scores over the timeline, from the lowest to the highest.
function drawCurve(curve) {
  const scores = curve.map(([, score]) => score), low = Math.min(...scores), high = Math.max(...scores);
  if (curve.length < 2 || high <= low) return;
  const points = curve.map(([seconds, score]) => `${((1000 * seconds) / shown.duration).toFixed(1)} ${(98 - (96 * (score - low)) / (high - low)).toFixed(1)}`);
  svg("path", { class: "edge", d: `M${points.join("L")}` }, $(".scores", drawing));
}

// The moments and scores of a query in this video: on the timeline, and as a list.
async function searchInside(query) {
  const note = $("#watch section .note"), list = $("#moments"), state = $("#within-count");
  asked?.abort();
  const mine = (asked = new AbortController()), id = shown.id;
  complain(note, null);
  const clear = (text) => {
    for (const node of $$(".found, .scores", drawing)) node.replaceChildren();
    list.replaceChildren();
    state.textContent = text;
  };
  if (query.trim() === "") return clear("Type words to find the moments of this video that show them.");
  try {
    await pause(130, mine.signal);
    const { hits, curve } = await api(`videos/${encodeURIComponent(id)}/moments`, { query: { q: query, k: 12 }, signal: mine.signal });
    clear(hits.length ? `${count(hits.length, "moment")}, best first` : "Nothing was found in this video.");
    drawCurve(curve);
    const best = Math.max(...hits.map((hit) => hit.score));
    for (const hit of hits) {
      const width = Math.max((100 * (hit.stop_seconds - hit.start_seconds)) / shown.duration, 0.4);
      svg("rect", { x: at(hit.start_seconds), y: 26, width: `${width}%`, height: 66, rx: 2 }, $(".found", drawing));
      const node = stamp("span"), button = $("button", node);
      $("b", node).textContent = `${clock(hit.start_seconds)} – ${clock(hit.stop_seconds)}`;
      $("span", node).textContent = fit(hit);
      bar($(".share", node), fitShare(hit, best));
      Object.assign(button, { start: hit.start_seconds, stop: hit.stop_seconds, onclick: () => seek(hit.pts_seconds, true) });
      list.append(node);
    }
    show(now);
  } catch (error) {
    if (mine.signal.aborted) return;
    clear("");
    complain(note, error, () => searchInside(query));
  }
}

// Attention as colour and opacity over the picture; `area`: where the model's input lies on it, as fractions.
function drawHeat(canvas, attention, [rows, columns], [left, top, right, bottom]) {
  const small = Object.assign(document.createElement("canvas"), { width: columns, height: rows });
  const pen = small.getContext("2d"), image = pen.createImageData(columns, rows), peak = Math.max(...attention, 1e-12);
  attention.forEach((value, place) => {
    const level = value / peak, stop = Math.min(Math.floor(level * 4), 3), part = level * 4 - stop;
    const colour = HEAT[stop].map((low, channel) => low + part * (HEAT[stop + 1][channel] - low));
    image.data.set([...colour, 40 + 170 * level], 4 * place);
  });
  pen.putImageData(image, 0, 0);
  const { width, height } = Object.assign(canvas, { width: 192, height: 192 });
  const large = canvas.getContext("2d");
  large.imageSmoothingQuality = "high";
  large.drawImage(small, left * width, top * height, (right - left) * width, (bottom - top) * height);
}

function drawBoard(entry) {
  const { width, height } = entry, board = $("#board");
  board.replaceChildren(...entry.keyframes.map((one) => {
    const node = stamp("keyframe"), seconds = one.pts_seconds;
    node.dataset.seconds = seconds;
    Object.assign($("img", node), { src: one.preview, width, height });
    Object.assign($(".picture", node), { ariaLabel: `Play from ${clock(seconds)}`, onclick: () => seek(seconds, true) });
    if (one.attention?.length) drawHeat($(".heat", node), one.attention, entry.grid, entry.attended_area ?? [0, 0, 1, 1]);
    $("b", node).textContent = clock(seconds);
    $(".row span", node).textContent = `${Math.round(100 * one.weight)} % of the video`;
    bar($(".share", node), one.weight);
    const href = page.like(`${entry.id}@${seconds.toFixed(3)}`);
    Object.assign($(".like", node), { href, ariaLabel: `More like the frame at ${clock(seconds)}` });
    return node;
  }));
  board.classList.toggle("tall", height > width);
  board.classList.toggle("few", entry.keyframes.length <= 2 && height <= width);
}

function tables(entry) {
  for (const kind of ["scenes", "shots"]) $(`#${kind}`).replaceChildren(...entry[kind].map(([start, stop], place) => {
    const row = make("tr");
    const texts = [place + 1, clock(start), clock(stop), `${(stop - start).toFixed(1)} s`];
    row.append(...texts.map((textContent) => make("td", { textContent })));
    row.children[1].replaceChildren(make("button", { textContent: clock(start), onclick: () => seek(start, true) }));
    return row;
  }));
  const facts = {
    Codec: entry.codec, "Frames a second": entry.average_fps?.toFixed(2), Sound: entry.has_audio ? "yes" : "no",
    "Frames indexed": entry.frames, Indexed: new Date(1000 * entry.indexed_at).toLocaleString(), Id: entry.id,
  };
  const pairs = Object.entries(facts).filter(([, value]) => value);
  $("#about").replaceChildren(...pairs.flatMap(([name, value]) => [make("dt", { textContent: name }), make("dd", { textContent: value })]));
}

function facts(entry) {
  const texts = [
    entry.duration_seconds !== null && clock(entry.duration_seconds), entry.width && `${entry.width} × ${entry.height}`,
    entry.date && new Date(1000 * entry.date).toLocaleDateString(), entry.scenes.length && count(entry.scenes.length, "scene"), entry.shots.length && count(entry.shots.length, "shot"),
  ];
  const spans = texts.filter(Boolean).map((textContent) => make("span", { textContent }));
  $(".facts", section).replaceChildren(...spans, ...entry.tags.map(page.tagLink));
}

function drawAround(params) {
  const around = $("#around"), place = found.findIndex((hit) => hit.id === shown.id && hit.seconds.toFixed(3) === params.get("t"));
  around.hidden = place < 0;
  if (place < 0) return;
  $("span", around).textContent = `${place + 1} of ${found.length}`;
  for (const [rel, hit] of [["prev", found[place - 1]], ["next", found[place + 1]]]) {
    const anchor = $(`[rel=${rel}]`, around);
    anchor.classList.toggle("off", !hit);
    if (hit) anchor.href = page.link({ view: "video", id: hit.id, t: hit.seconds.toFixed(3), ...page.origin() });
    else anchor.removeAttribute("href");
  }
}

async function open(params) {
  const id = params.get("id") ?? "", seconds = Number(params.get("t")) || 0, note = $("#video > .note");
  const same = id === shown.id && !$("#watch").hidden;
  complain(note, null);
  if (!same) {
    shown = { id, duration: 1 };
    for (const node of [$("#watch"), $("#remove"), $("#around"), $(".peek", section)]) node.hidden = true;
    $(".facts", section).replaceChildren();
    $("#video-title").textContent = "Loading…";
    player.pause();
    player.removeAttribute("src");
  }
  try {
    const entry = await detail(id);
    if (id !== shown.id || section.hidden) return;
    document.title = `${entry.name} · keyreel`;
    $("#back").textContent = params.get("q") || params.get("like") || params.get("image") ? "← Results" : "← Back";
    if (!same) fill(entry);
    drawAround(params);
    if (entry.status !== "ok") return complain(note, { message: entry.error ?? "It could not be indexed.", hint: entry.hint });
    if (!same || params.has("t")) start(seconds, params.has("t"));
    if ($("#within").value !== (params.get("q") ?? "") || !same) {
      $("#within").value = params.get("q") ?? "";
      searchInside($("#within").value);
    }
  } catch (error) {
    if (id !== shown.id) return;
    $("#video-title").textContent = "Video";
    complain(note, error, () => open(params));
  }
}

function fill(entry) {
  shown.duration = entry.duration_seconds || entry.keyframes?.at(-1)?.pts_seconds || 1;
  $("#video-title").textContent = entry.name;
  facts(entry);
  const remove = $("#remove");
  remove.hidden = false;
  remove.onclick = () => page.remove(entry.id, entry.name, () => page.go({ view: "library" }, { replace: true }));
  if (entry.status !== "ok") return;
  timeline.ariaValueMax = shown.duration.toFixed(3);
  $(".unplayable", section).hidden = true;
  Object.assign(player, { hidden: false, ariaLabel: entry.name, poster: entry.poster ?? "", width: entry.width, height: entry.height });
  if (entry.file) player.src = new URL(entry.file, API);
  else unplayable({ message: "The video cannot be played here: the server may not read its folder." });
  drawTimeline(entry);
  drawBoard(entry);
  tables(entry);
  $("#watch").hidden = false;
}

// Starts at a second; plays if the browser allows that without a click.
function start(seconds, play) {
  show(seconds);
  player.currentTime = seconds;
  if (play) player.play().catch(() => {});
}

player.addEventListener("timeupdate", () => { if (!player.seeking && player.readyState > 1) show(player.currentTime); });
player.addEventListener("error", async () => {
  if (!player.hasAttribute("src")) return;
  const { id } = shown;
  const answer = await fetch(player.src, { headers: { ...authorization(), Range: "bytes=0-0" } }).catch(() => null);
  if (id !== shown.id) return;
  if (answer && !answer.ok) unplayable(problem(answer.status, await answer.text()));
  else if (player.src.endsWith("/file")) convert(id, player.currentTime || now);
  else unplayable({ message: "This browser cannot play the video." });
});

// Requests a copy that browsers can play. The server works on it as long as this asks.
async function convert(id, seconds) {
  const path = `videos/${encodeURIComponent(id)}/playable`, wanted = () => id === shown.id && !section.hidden;
  let told = "";
  try {
    while (wanted()) {
      const { state, progress, error } = await api(path, { method: "POST" });
      if (!wanted()) return;
      if (state === "failed") return unplayable({ message: `This browser cannot play the video, and no copy can be made: ${error.message}` });
      if (state === "done") break;
      // In steps of ten: each change is read out by screen readers.
      const message = `This browser cannot play the file. A copy that it can play is being made: ${10 * Math.floor(10 * progress)} %`;
      if (message !== told) unplayable({ message });
      told = message;
      await pause(700);
    }
    if (!wanted()) return;
    $(".unplayable", section).hidden = true;
    player.hidden = false;
    player.src = new URL(`${path}.mp4`, API);
    start(seconds, true);
  } catch (error) {
    if (wanted()) unplayable(error);
  }
}

function unplayable({ message }) {
  player.hidden = true;
  complain($(".unplayable", section), { message, hint: "You can still use the pictures and times below." });
}

// ---- The timeline: a click plays from there, the pointer shows what is there, keys move.

const under = (event) => {
  const box = timeline.getBoundingClientRect();
  return between((event.clientX - box.left) / box.width, 0, 1) * shown.duration;
};
timeline.addEventListener("click", (event) => seek(under(event), true));
timeline.addEventListener("pointermove", async (event) => {
  const seconds = under(event), peek = $(".peek", section), box = timeline.getBoundingClientRect();
  if (event.pointerType === "touch") return;
  const id = shown.id, sheet = await sprite(id).catch(() => null);
  if (!sheet || id !== shown.id || !timeline.matches(":hover")) return;
  sheet.draw($("canvas", peek), seconds);
  $("span", peek).textContent = clock(seconds);
  peek.hidden = false;
  const half = peek.offsetWidth / 2;
  peek.style.left = `${between(event.clientX - box.left, half, box.width - half)}px`;
});
timeline.addEventListener("pointerleave", () => { $(".peek", section).hidden = true; });
timeline.addEventListener("keydown", (event) => {
  const marks = $$("#board .card").map((card) => Number(card.dataset.seconds));
  const to = {
    ArrowRight: now + 1, ArrowUp: now + 1, ArrowLeft: now - 1, ArrowDown: now - 1, Home: 0, End: shown.duration,
    PageDown: marks.find((mark) => mark > now + 0.02), PageUp: marks.findLast((mark) => mark < now - 0.02),
  };
  if (!(event.key in to)) return;
  event.preventDefault();
  event.stopPropagation();
  if (to[event.key] !== undefined) seek(to[event.key], false);
});
$("#within").addEventListener("input", (event) => searchInside(event.target.value));
$("#inside").addEventListener("submit", (event) => event.preventDefault());

export const video = {
  start(lent) { page = lent; },
  show: open,
  leave() { player.pause(); },
  results(hits) { found = hits; },
  // True if it used the key.
  key(key, target) {
    const anchor = { n: $("#around [rel=next]"), p: $("#around [rel=prev]") }[key];
    if (anchor?.hasAttribute("href") && !$("#around").hidden) anchor.click();
    else if (key === "a") $("#looked").click();
    else if (key === " " && !player.hidden && !target.closest("button, a, input, summary, video")) player.paused ? player.play().catch(() => {}) : player.pause();
    else return false;
    return true;
  },
};
