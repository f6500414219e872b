"use strict";
const video = document.querySelector("video");
const timeline = document.querySelector(".timeline");
const head = document.querySelector(".playhead");
const clock = document.querySelector("output");
const cards = [...document.querySelectorAll(".card")];
const marks = cards.map((card) => Number(card.querySelector("[data-seek]").dataset.seek));
const length = Number(timeline.dataset.seconds);
const spans = JSON.parse(timeline.dataset.reel);
let now = 0;

const playsReel = () => video !== null && /\/reel\.(mp4|mkv)$/.test(video.currentSrc) && video.dataset.reelOnly !== undefined;

// Converts a time of the video to the reel's, and back; a time outside all spans goes to the next span.
function toReel(time) {
  let before = 0, found = 0, nearest = Infinity;
  for (const [start, stop] of spans) {
    if (time < stop && start < nearest) [found, nearest] = [before + Math.max(0, time - start), start];
    before += stop - start;
  }
  return nearest < Infinity ? found : before;
}
function fromReel(time) {
  for (const [start, stop] of spans) {
    if (time < stop - start) return start + time;
    time -= stop - start;
  }
  return spans.length ? spans[spans.length - 1][1] : 0;
}
function label(time) {
  const tenths = Math.floor(time * 10 + 0.5), minutes = Math.floor(tenths / 600), hours = Math.floor(minutes / 60);
  const rest = ((tenths % 600) / 10).toFixed(1).padStart(4, "0");
  return hours ? `${hours}:${String(minutes % 60).padStart(2, "0")}:${rest}` : `${minutes}:${rest}`;
}
function show(time) {
  now = Math.min(Math.max(time, 0), length);
  head.setAttribute("x", `${(100 * now) / length}%`);
  clock.textContent = label(now);
  timeline.setAttribute("aria-valuenow", now.toFixed(1));
  timeline.setAttribute("aria-valuetext", label(now));
  const last = marks.findLastIndex((mark) => mark <= now + 0.02);
  cards.forEach((card, place) => card.classList.toggle("now", place === last));
}
function seek(time, play) {
  show(time);
  if (video === null || document.body.classList.contains("no-video")) return;
  video.currentTime = playsReel() ? toReel(now) : now;
  if (!play) return;
  video.scrollIntoView({ block: "nearest" });
  video.play().catch(() => {});
}

document.addEventListener("click", (event) => {
  const target = event.target.closest("[data-seek]");
  if (target !== null) seek(Number(target.dataset.seek), true);
});
timeline.addEventListener("click", (event) => {
  const box = timeline.getBoundingClientRect();
  seek(((event.clientX - box.left) / box.width) * length, true);
});
timeline.addEventListener("keydown", (event) => {
  const to = {
    ArrowRight: now + 1, ArrowUp: now + 1, ArrowLeft: now - 1, ArrowDown: now - 1, Home: 0, End: length,
    PageDown: marks.find((mark) => mark > now + 0.02), PageUp: marks.findLast((mark) => mark < now - 0.02),
  };
  if (!(event.key in to)) return;
  event.preventDefault();
  if (to[event.key] !== undefined) seek(to[event.key], false);
});
if (video !== null) {
  const sources = [...video.querySelectorAll("source")];
  const give_up = () => document.body.classList.add("no-video");
  sources.forEach((source, place) => source.addEventListener("error", () => {
    if (place === sources.length - 1) give_up();
    else video.dataset.reelOnly = "";
  }));
  video.addEventListener("error", give_up);
  if (sources.length === 1 && sources[0].dataset.reel !== undefined) video.dataset.reelOnly = "";
  video.addEventListener("timeupdate", () => show(playsReel() ? fromReel(video.currentTime) : video.currentTime));
}
show(0);
document.documentElement.dataset.ready = String(cards.length);
