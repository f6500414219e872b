// Cards of videos and moments: looking through a video without opening it, and the way from one card to the next.

import { $, $$, bar, between, clock, say, sprite, stamp, still } from "./base.js";

// A card that shows a video at a time; the pointer moves through its thumbnails, and so do the focus and the keys , and .
// `region`: the part of the picture that the subject takes, as shares; then the focus alone starts no thumbnails.
export function card({ id, name, seconds, picture, href, label, region = null }) {
  const node = stamp("card"), anchor = $(".picture", node), image = $("img", node), canvas = $("canvas", node);
  Object.assign(anchor, { href, ariaLabel: label });
  if (picture) image.src = picture;
  image.hidden = !picture;
  image.onerror = () => { image.hidden = true; };
  image.onload = () => outline($(".region", node), image, region);
  // The picture is the same link; the keyboard needs only one.
  Object.assign($(".name", node), { textContent: name, title: name, href, tabIndex: -1 });
  let shown = null, timer = null, wanted = 0, entered = 0;
  // An SVG element has no property `hidden`.
  const reveal = (on) => { for (const part of [canvas, $(".at", node), $(".place", node)]) part.toggleAttribute("hidden", !on); };
  const draw = (sheet, at) => {
    shown = sheet.draw(canvas, at);
    reveal(true);
    $(".at", node).textContent = clock(Math.min(shown * sheet.step, sheet.duration));
    bar($(".place", node), at / sheet.duration);
  };
  // The thumbnails, or null if the pointer left before they arrived.
  const load = async () => {
    clearInterval(timer);
    const mine = (wanted += 1), sheet = await sprite(id).catch(() => null);
    return mine === wanted ? sheet : null;
  };
  anchor.onpointerenter = (event) => { entered = event.clientX; };
  anchor.onpointermove = async (event) => {
    if (event.pointerType === "touch") return;
    // Thumbnails replace the frame around a subject only when the pointer moves along the video.
    if (region && shown === null && Math.abs(event.clientX - entered) < 32) return;
    const { left, width } = anchor.getBoundingClientRect(), sheet = await load();
    if (sheet) draw(sheet, ((event.clientX - left) / width) * sheet.duration);
  };
  anchor.onpointerleave = anchor.onblur = () => {
    clearInterval(timer);
    shown = null;
    wanted += 1;
    reveal(false);
  };
  anchor.onfocus = async () => {
    if (region || still.matches || !anchor.matches(":focus-visible")) return;
    const sheet = await load();
    if (!sheet || sheet.tiles < 2) return;
    let at = Math.floor(seconds / sheet.step) - 1;
    timer = setInterval(() => draw(sheet, ((at = (at + 1) % sheet.tiles) + 0.001) * sheet.step), 450);
  };
  node.step = async (by) => {
    const from = shown, sheet = await load();
    if (!sheet) return;
    const place = (from ?? Math.floor(seconds / sheet.step)) + by;
    draw(sheet, (between(place, 0, sheet.tiles - 1) + 0.001) * sheet.step);
    say(`picture at ${$(".at", node).textContent}`);
  };
  return node;
}

function outline(frame, { naturalWidth: width, naturalHeight: height }, region) {
  frame.toggleAttribute("hidden", region === null);
  if (region === null) return;
  const sizes = [width, height, width, height];
  frame.setAttribute("viewBox", `0 0 ${width} ${height}`);
  for (const rect of $$("rect", frame)) ["x", "y", "width", "height"].forEach((name, n) => rect.setAttribute(name, region[n] * sizes[n]));
}

export const cardPictures = () => $$("main > section:not([hidden]) .cards .picture");
// The card that an arrow key leads to from the one with the focus; the first if none has it.
export function neighbour(key) {
  const cards = cardPictures(), place = cards.indexOf(document.activeElement.closest(".card")?.querySelector(".picture"));
  if (place < 0) return cards[0];
  if (key === "ArrowRight" || key === "ArrowLeft") return cards[place + (key === "ArrowRight" ? 1 : -1)];
  const here = cards[place].getBoundingClientRect(), sign = key === "ArrowDown" ? 1 : -1;
  const rows = cards.map((node) => [node, node.getBoundingClientRect()]).filter(([, area]) => sign * (area.top - here.top) > 8);
  const next = Math.min(...rows.map(([, area]) => sign * area.top));
  const row = rows.filter(([, area]) => Math.abs(sign * area.top - next) < 8);
  return row.sort(([, one], [, other]) => Math.abs(one.left - here.left) - Math.abs(other.left - here.left))[0]?.[0];
}
