// What pages have beyond links and forms: times that go on, copying, live lists, keys. Without it everything else works.
"use strict";

const UNITS = [[86400, "d"], [3600, "h"], [60, "min"], [1, "s"]];
const LIVE_EVERY = 2000; // milliseconds
const SECTIONS = { o: "", e: "/events", d: "/destinations", r: "/routes", l: "/dead-letters", s: "/sources", u: "/rules" };

function relative(seconds) {
  const size = Math.abs(seconds);
  if (size < 1) return "now";
  const [unit, name] = UNITS.find(([each]) => size >= each);
  const text = `${Math.floor(size / unit)} ${name}`;
  return seconds > 0 ? `in ${text}` : `${text} ago`;
}

// The page's own clock is the gateway's: that of the machine that shows it may be wrong.
const served = Number(document.documentElement.dataset.now) * 1000;
const began = performance.now();
const now = () => served + performance.now() - began;

function tick() {
  for (const time of document.querySelectorAll("time[data-relative]")) {
    const text = relative((Date.parse(time.dateTime) - now()) / 1000);
    if (time.textContent !== text) time.textContent = text;
  }
}
setInterval(tick, 1000);

function offerCopies(root) {
  if (!navigator.clipboard) return;
  for (const button of root.querySelectorAll("button[data-copy]")) button.hidden = false;
}
offerCopies(document);

document.addEventListener("click", async (event) => {
  const button = event.target.closest("button[data-copy]");
  if (!button) return;
  await navigator.clipboard.writeText(button.dataset.copy);
  const label = button.firstChild;
  label.textContent = "Copied";
  setTimeout(() => { label.textContent = "Copy"; }, 1500);
});

// A live list is the same page again, of which one part is put in the place of the former.
async function refresh(part) {
  if (document.hidden || document.activeElement?.closest(`#${part.id}`) || String(getSelection())) return part;
  const response = await fetch(location.href, { headers: { Accept: "text/html" } });
  if (response.status === 401) location.reload(); // the session has ended: a list that stands still would look live
  if (!response.ok) return part;
  const page = new DOMParser().parseFromString(await response.text(), "text/html");
  const fresh = page.getElementById(part.id);
  if (!fresh) return part;
  part.replaceWith(document.adoptNode(fresh));
  offerCopies(fresh);
  tick();
  return fresh;
}

async function keepLive(part) {
  for (;;) {
    await new Promise((resolve) => setTimeout(resolve, LIVE_EVERY));
    try { part = await refresh(part); } catch { /* the gateway restarts, or is away: the next time, perhaps */ }
  }
}
const live = document.querySelector('[data-live="1"]');
if (live) keepLive(live);

let isGoing = 0;
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.target.closest("input, textarea, select")) {
    if (event.key === "Escape") event.target.blur();
    return;
  }
  const search = document.querySelector("[data-search]");
  if (event.key === "/" && search) {
    event.preventDefault();
    search.focus();
    search.select();
  } else if (event.key === "g") {
    isGoing = event.timeStamp;
    return;
  } else if (event.timeStamp - isGoing < 1000 && event.key in SECTIONS) {
    location.assign(`/ui${SECTIONS[event.key]}`);
  } else if (event.key === "j" || event.key === "k") {
    const rows = [...document.querySelectorAll("a.row")];
    const at = rows.indexOf(document.activeElement);
    const next = rows[event.key === "j" ? at + 1 : Math.max(0, at - 1)];
    if (next) next.focus();
  }
  isGoing = 0;
});
