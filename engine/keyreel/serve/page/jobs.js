// Adding videos: uploads with their progress, files on the server, and the list of jobs.

import { $, API, Problem, api, askToken, authorization, complain, currentToken, forget, problem, say, stamp } from "./base.js";

const OPEN = ["uploading", "queued", "running"];
const WORDS = { queued: "waiting", running: "indexing" };
const list = $("#list"), note = $("#jobs > .note");
const rows = new Map(); // by id: {node, job}
let page = null; // what page.js lends: link, changed
let sending = Promise.resolve(); // uploads, one after another
let unsent = 0, numbers = 0, timer = null;
let lost = false; // the note says that the list could not be fetched

function draw(job) {
  if (!rows.has(job.id)) {
    const node = stamp("job");
    $("button", node).addEventListener("click", () => cancel([...rows.values()].find((row) => row.node === node).job));
    list.prepend(node);
    rows.set(job.id, { node, job: null });
  }
  const row = rows.get(job.id), { node } = row, before = row.job?.state, progress = $("progress", node), link = $("a", node);
  const open = OPEN.includes(job.state), word = WORDS[job.state] ?? job.state, share = job.progress ?? 0;
  row.job = job;
  node.dataset.state = job.state;
  $(".name", node).textContent = job.name;
  $(".state", node).textContent = word + (open && share > 0 ? `, ${Math.floor(100 * share)} %` : "");
  progress.hidden = $("button", node).hidden = !open;
  if (share > 0) progress.value = share;
  else progress.removeAttribute("value");
  link.hidden = job.state !== "done" || !job.video;
  if (!link.hidden) link.href = page.link({ view: "video", id: job.video });
  progress.ariaLabel = `${job.name}, ${word}`;
  $("button", node).ariaLabel = `Cancel ${job.name}`;
  link.ariaLabel = `Open ${job.name}`;
  complain($(".note", node), job.error ?? null);
  if (before && before !== job.state && !open) {
    say(`${job.name}: ${word}`);
    if (job.state === "done") forget(job.video), page.changed();
  }
  tally();
}

function tally() {
  const open = [...rows.values()].filter(({ job }) => OPEN.includes(job.state)).length, badge = $("nav [data-view=jobs] .badge");
  badge.hidden = open === 0;
  badge.textContent = open;
  badge.ariaLabel = `${open} at work`;
  $("#jobs > .empty").hidden = rows.size > 0;
  return open;
}

// Polls as long as a job is open; never twice at the same time.
async function poll() {
  clearTimeout(timer);
  try {
    const { jobs } = await api("jobs"), there = new Set(jobs.map((job) => job.id));
    for (const [id, { node, job }] of rows) if (!job.file && !there.has(id)) node.remove(), rows.delete(id);
    for (const job of jobs.toReversed()) draw(job); // each new row goes on top
    if (lost) complain(note, null); // the error of a form stays
    lost = false;
  } catch (error) {
    if (!$("#jobs").hidden) complain(note, error, poll), lost = true;
  }
  const open = tally();
  clearTimeout(timer);
  if (open > 0 || !$("#jobs").hidden) timer = setTimeout(poll, open > 0 ? 1000 : 8000);
}

async function cancel(job) {
  if (job.file) {
    job.request?.abort();
    return draw({ ...job, state: "cancelled" });
  }
  await api(`jobs/${encodeURIComponent(job.id)}`, { method: "DELETE" }).catch((error) => complain(note, error));
  poll();
}

// XMLHttpRequest, since fetch does not report the progress of uploads.
function send(job) {
  return new Promise((resolve, reject) => {
    const request = new XMLHttpRequest(), body = new FormData();
    body.append("file", job.file, job.name);
    request.open("POST", new URL("jobs", API));
    for (const [name, value] of Object.entries(authorization())) request.setRequestHeader(name, value);
    request.upload.onprogress = (event) => draw({ ...job, request, progress: event.loaded / event.total });
    request.onload = () => (request.status < 300 ? resolve(JSON.parse(request.responseText)) : reject(problem(request.status, request.responseText)));
    request.onerror = () => reject(new Problem("The upload was interrupted.", { hint: "The server cannot be reached, or refused the file." }));
    request.onabort = () => resolve(null);
    draw({ ...job, request });
    request.send(body);
  });
}

async function submit(job) {
  if (rows.get(job.id).job.state === "cancelled") return;
  const used = currentToken();
  try {
    const accepted = await send(job);
    if (accepted === null) return;
    const { node } = rows.get(job.id);
    rows.delete(job.id);
    // The row of the upload becomes that of the job, unless the list brought the job first.
    if (rows.has(accepted.id)) node.remove();
    else rows.set(accepted.id, { node, job });
    draw(accepted);
    poll();
  } catch (error) {
    if (error.status === 401) return askToken(used).then(() => submit(job), (refused) => draw({ ...job, state: "failed", error: refused }));
    draw({ ...job, state: "failed", error });
  }
}

function upload(files) {
  for (const file of files) {
    const job = { id: `upload-${(numbers += 1)}`, name: file.name, state: "uploading", file };
    draw(job);
    unsent += 1;
    sending = sending.then(() => submit(job)).finally(() => { unsent -= 1; });
  }
}

$("#files").addEventListener("change", (event) => {
  upload(event.target.files);
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
    complain(note, error), lost = false;
    field.focus();
  }
});
addEventListener("beforeunload", (event) => { if (unsent > 0) event.preventDefault(); });

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
