// Adding videos: uploads with their progress, files on the server, and what becomes of them.

import { $, API, Problem, api, askToken, authorization, complain, currentToken, forget, problem, say, stamp } from "./base.js";

const OPEN = ["uploading", "queued", "running"];
const WORDS = { uploading: "uploading", queued: "waiting", running: "indexing", done: "done", failed: "failed", cancelled: "cancelled" };
const list = $("#list");
const note = $("#jobs > .note");
const rows = new Map(); // by id: {node, job}
const waiting = []; // files that are not sent yet
let page = null; // what page.js lends: link, changed
let sending = null;
let timer = null;
let numbers = 0;

function row(id) {
  if (!rows.has(id)) {
    const node = stamp("job");
    node.dataset.id = id;
    $("button", node).addEventListener("click", () => cancel(node.dataset.id));
    list.prepend(node);
    rows.set(id, { node, job: null });
  }
  return rows.get(id);
}

function draw(job) {
  const entry = row(job.id), { node } = entry, before = entry.job?.state, progress = $("progress", node);
  entry.job = job;
  const name = job.name ?? job.id, share = job.progress ?? 0, open = OPEN.includes(job.state);
  node.dataset.state = job.state;
  $(".name", node).textContent = name;
  $(".state", node).textContent = WORDS[job.state] + (open && share > 0 ? `, ${Math.floor(100 * share)} %` : "");
  progress.hidden = !open;
  progress.setAttribute("aria-label", `${name}, ${WORDS[job.state]}`);
  if (share > 0) progress.value = share;
  else progress.removeAttribute("value");
  $("button", node).hidden = !open;
  $("button", node).setAttribute("aria-label", `Cancel ${name}`);
  const link = $("a", node);
  link.hidden = job.state !== "done" || !job.video;
  if (!link.hidden) link.href = page.link({ view: "video", id: job.video });
  link.setAttribute("aria-label", `Open ${name}`);
  complain($(".note", node), job.error ?? null);
  if (before && before !== job.state && !open) {
    say(`${name}: ${WORDS[job.state]}`);
    if (job.state === "done") forget(job.video), page.changed();
  }
}

function tally() {
  const open = [...rows.values()].filter(({ job }) => OPEN.includes(job.state)).length, badge = $("nav [data-view=jobs] .badge");
  badge.hidden = open === 0;
  badge.textContent = open;
  badge.setAttribute("aria-label", `${open} at work`);
  $("#jobs > .empty").hidden = rows.size > 0;
  return open;
}

// Asks again and again while something is at work; never twice at a time.
async function poll() {
  clearTimeout(timer);
  try {
    const { jobs } = await api("jobs");
    const there = new Set(jobs.map((job) => job.id));
    for (const [id, { node, job }] of rows) if (!job.local && !there.has(id)) node.remove(), rows.delete(id);
    for (const job of jobs.toReversed()) draw(job); // each new row goes on top
    complain(note, null);
  } catch (error) {
    if (!$("#jobs").hidden) complain(note, error, poll);
  }
  const open = tally();
  clearTimeout(timer);
  if (open > 0 || !$("#jobs").hidden) timer = setTimeout(poll, open > 0 ? 1000 : 8000);
}

async function cancel(id) {
  const { job } = rows.get(id);
  if (job.local) {
    job.request?.abort();
    const place = waiting.indexOf(job);
    if (place >= 0) waiting.splice(place, 1);
    draw({ ...job, state: "cancelled" });
    return tally();
  }
  try {
    await api(`jobs/${encodeURIComponent(id)}`, { method: "DELETE" });
  } catch (error) {
    complain(note, error);
  }
  poll();
}

// fetch tells no progress of what it sends, XMLHttpRequest does.
function send(job) {
  return new Promise((resolve, reject) => {
    const request = (job.request = new XMLHttpRequest()), body = new FormData();
    body.append("file", job.file, job.file.name);
    request.open("POST", new URL("jobs", API));
    for (const [name, value] of Object.entries(authorization())) request.setRequestHeader(name, value);
    request.upload.onprogress = (event) => draw({ ...rows.get(job.id).job, progress: event.loaded / event.total });
    request.onload = () => (request.status < 300 ? resolve(JSON.parse(request.responseText)) : reject(problem(request.status, request.responseText)));
    request.onerror = () => reject(new Problem("The upload broke off.", { hint: "The server cannot be reached, or refused the file." }));
    request.onabort = () => resolve(null);
    request.send(body);
  });
}

async function sendAll() {
  while ((sending = waiting.shift())) {
    const job = sending, used = currentToken();
    try {
      const accepted = await send(job);
      if (accepted === null) continue;
      const { node } = rows.get(job.id);
      rows.delete(job.id);
      // The row of the upload becomes that of the job, unless the list brought the job first.
      if (rows.has(accepted.id)) node.remove();
      else rows.set(accepted.id, { node, job }), node.dataset.id = accepted.id;
      draw({ name: job.name, ...accepted });
      poll();
    } catch (error) {
      if (error.status === 401) {
        waiting.unshift(job);
        try { await askToken(used); } catch (refused) { waiting.shift(); draw({ ...job, state: "failed", error: refused }); }
      } else draw({ ...job, state: "failed", error });
    }
    tally();
  }
}
function upload(files) {
  for (const file of files) {
    const job = { id: `upload-${(numbers += 1)}`, local: true, name: file.name, state: "uploading", progress: 0, file };
    draw(job);
    waiting.push(job);
  }
  tally();
  if (sending === null) sendAll();
}

$("#files").addEventListener("change", (event) => {
  upload([...event.target.files]);
  event.target.value = "";
});
$("#path").addEventListener("submit", async (event) => {
  event.preventDefault();
  const field = $("#place");
  try {
    draw(await api("jobs", { method: "POST", body: { path: field.value.trim() } }));
    field.value = "";
    complain(note, null);
    poll();
  } catch (error) {
    complain(note, error);
    field.focus();
  }
});
addEventListener("beforeunload", (event) => { if (sending !== null) event.preventDefault(); });

export const jobs = {
  upload,
  start(lent) {
    page = lent;
    poll();
  },
  show() {
    document.title = "Jobs · keyreel";
    poll();
  },
};
