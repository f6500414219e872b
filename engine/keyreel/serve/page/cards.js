// Cards of videos and moments: looking through a video without opening it, and the way from one card to the next.

import { $, $$, bar, clock, say, sprite, stamp, still } from "./base.js";

// A card that shows a video at a time; the pointer moves through its thumbnails, and so do the focus and the keys , and .
export function card({ id, name, seconds, picture, href }) {
  const node = stamp("card"), anchor = $(".picture", node), image = $("img", node), canvas = $("canvas", node);
  anchor.href = href;
  if (picture) image.src = picture;
  else image.hidden = true;
  image.addEventListener("error", () => { image.hidden = true; }, { once: true });
  $(".name", node).textContent = name;
  $(".name", node).title = name;
  $(".name", node).href = href;
  node.dataset.id = id;
  node.dataset.seconds = seconds;
  let shown = null, timer = null, wanted = 0;
  // An SVG element has no property `hidden`.
  const reveal = (on) => { for (const part of [canvas, $(".at", node), $(".place", node)]) part.toggleAttribute("hidden", !on); };
  const draw = (sheet, at) => {
    shown = sheet.draw(canvas, at);
    reveal(true);
    $(".at", node).textContent = clock(Math.min(shown * sheet.step, sheet.duration));
    bar($(".place", node), at / sheet.duration);
  };
  const stop = () => {
    clearInterval(timer);
    timer = shown = null;
    wanted += 1;
    reveal(false);
  };
  // Thumbnails may come when the pointer has gone again.
  const load = async () => {
    const mine = (wanted += 1);
    const sheet = await sprite(id).catch(() => null);
    return mine === wanted ? sheet : null;
  };
  anchor.addEventListener("pointermove", async (event) => {
    if (event.pointerType === "touch") return;
    clearInterval(timer);
    const { left, width } = anchor.getBoundingClientRect(), sheet = await load();
    if (sheet) draw(sheet, ((event.clientX - left) / width) * sheet.duration);
  });
  anchor.addEventListener("pointerleave", stop);
  anchor.addEventListener("blur", stop);
  anchor.addEventListener("focus", async () => {
    if (still.matches || !anchor.matches(":focus-visible")) return;
    const sheet = await load();
    if (!sheet || sheet.tiles < 2) return;
    let at = Math.floor(seconds / sheet.step) - 1;
    timer = setInterval(() => draw(sheet, ((at = (at + 1) % sheet.tiles) + 0.001) * sheet.step), 450);
  });
  node.step = async (by) => {
    clearInterval(timer);
    const from = shown ?? null, sheet = await load();
    if (!sheet) return;
    const place = (from ?? Math.floor(seconds / sheet.step)) + by;
    draw(sheet, (Math.min(Math.max(place, 0), sheet.tiles - 1) + 0.001) * sheet.step);
    say(`picture at ${$(".at", node).textContent}`);
  };
  return node;
}

export const cardPictures = () => $$("main > section:not([hidden]) .cards .picture");
// The card that an arrow key leads to from the one with the focus; the first where none has it.
export function neighbour(key) {
  const cards = cardPictures(), from = document.activeElement.closest?.(".card");
  const place = cards.indexOf($(".picture", from ?? document.createElement("i")));
  if (place < 0) return cards[0];
  if (key === "ArrowRight" || key === "ArrowLeft") return cards[place + (key === "ArrowRight" ? 1 : -1)];
  const here = cards[place].getBoundingClientRect(), down = key === "ArrowDown";
  const rows = cards.map((node) => [node, node.getBoundingClientRect()])
    .filter(([, area]) => (down ? area.top > here.top + 8 : area.top < here.top - 8));
  const next = down ? Math.min(...rows.map(([, area]) => area.top)) : Math.max(...rows.map(([, area]) => area.top));
  const row = rows.filter(([, area]) => Math.abs(area.top - next) < 8);
  return row.sort(([, one], [, other]) => Math.abs(one.left - here.left) - Math.abs(other.left - here.left))[0]?.[0];
}
