"use strict";
// A click on a picture plays its moment in the page; Escape or a click beside the player closes it.
const player = document.querySelector("dialog");
const video = player?.querySelector("video");
const note = player?.querySelector(".note");

function stop() {
  video.removeAttribute("src");
  video.load();
}

document.addEventListener("click", (event) => {
  const tile = event.target.closest("[data-play]");
  if (tile !== null) {
    note.hidden = true;
    video.hidden = false;
    player.querySelector("b").textContent = tile.getAttribute("aria-label");
    player.showModal();
    video.src = tile.dataset.play;
    video.play().catch(() => {});
  } else if (event.target === player || event.target.closest("[data-close]") !== null) {
    player.close();
    stop(); // now: the event "close" comes with the next frame
  }
});
player?.addEventListener("close", stop);
video?.addEventListener("error", () => {
  if (!video.hasAttribute("src")) return;
  video.hidden = true;
  note.hidden = false;
});
