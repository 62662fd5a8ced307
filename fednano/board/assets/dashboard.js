// Follows the runs: asks for the state, and draws it anew where it has changed. Every text is set as text.
import { barChart, lineChart, svg } from "./charts.js";

const PLANES = ["adapter_up", "adapter_down", "activation_up", "activation_down"];
const EVERY_MS = 1500, PATIENCE_MS = 8000;
const STATUS = { running: "good", complete: "good", interrupted: "warn", silent: "warn", stopped: "bad", waiting: "" };
const at = (id) => document.getElementById(id);
let version = "", shownRun = null;

function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

const percent = (value) => `${(100 * value).toFixed(1)} %`;
const plain = (value) => (Math.abs(value) >= 100 || Number.isInteger(value) ? Math.round(value).toLocaleString("en") : value.toPrecision(3));
function bytes(count) {
  const units = ["B", "kB", "MB", "GB", "TB", "PB"];
  let size = count;
  while (size >= 999.5 && units.length > 1) { size /= 1000; units.shift(); }
  return `${units[0] === "B" ? Math.round(size) : size.toPrecision(3)} ${units[0]}`;
}
function duration(seconds) {
  const whole = Math.max(0, Math.round(seconds)), hours = Math.floor(whole / 3600);
  const two = (value) => String(value).padStart(2, "0");
  return hours ? `${hours}:${two(Math.floor(whole / 60) % 60)}:${two(whole % 60)}` : `${Math.floor(whole / 60)}:${two(whole % 60)}`;
}
const some = (value, write) => (typeof value === "number" ? write(value) : "–");
const words = (text) => text.replaceAll("_", " ");

function pill(status) {
  return element("span", { class: `pill ${STATUS[status] ?? ""}` }, status);
}

function tile(title, value, note = "") {
  return element("div", { class: "tile" }, element("strong", {}, value), element("span", {}, title), note ? element("span", {}, note) : null);
}

function table(caption, heads, rows, none, texts = []) {
  if (!rows.length) return element("p", { class: "none" }, none);
  const kind = (place) => (texts.includes(place) ? { class: "text" } : {});
  const head = element("tr", {}, ...heads.map((title, place) => element("th", { scope: "col", ...kind(place) }, title)));
  const body = rows.map((cells) => element("tr", {}, ...cells.map((cell, place) =>
    place ? element("td", kind(place), cell) : element("th", { scope: "row" }, cell))));
  return element("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": caption },
    element("table", {}, element("caption", {}, caption), element("thead", {}, head), element("tbody", {}, ...body)));
}

function runList(state) {
  at("folder").textContent = state.folder;
  at("runs").replaceChildren(...state.runs.map((run) => {
    const link = element("a", { href: `#${encodeURIComponent(run.id)}` }, run.id,
      element("small", {}, pill(run.status), run.total ? element("span", {}, `round ${run.round}/${run.total}`) : null,
        "federated" in run.scores ? element("span", {}, percent(run.scores.federated)) : null));
    if (state.run && state.run.id === run.id) link.setAttribute("aria-current", "true");
    return element("li", {}, link);
  }));
  const empty = !state.runs.length;
  at("nothing").hidden = !empty && (!state.asked || state.run.id === state.asked);
  at("nothing").textContent = empty
    ? (state.exists ? "There are no runs in this folder yet. Start one: fednano simulate" : "This folder does not exist yet. It appears with the first run: fednano simulate")
    : `There is no run ${state.asked} here any more. The newest one is shown.`;
}

function tiles(run) {
  const made = [];
  const before = run.scores.zero_shot, after = run.scores.federated;
  made.push(tile("Status", run.status));
  made.push(tile("Rounds", run.total ? `${run.round} / ${run.total}` : String(run.round)));
  if (typeof after === "number") made.push(tile(`Score (${run.metric})`, percent(after), typeof before === "number" ? `zero-shot ${percent(before)}` : ""));
  const last = run.rounds[run.rounds.length - 1];
  if (last && typeof last.loss === "number") made.push(tile("Training loss", plain(last.loss)));
  const left = run.total ? run.total - run.round : 0;
  const times = run.rounds.slice(-3).map((row) => row.seconds).filter((value) => typeof value === "number");
  if (run.status === "running" && left > 0 && times.length) {
    made.push(tile("Left, about", duration((left * times.reduce((a, b) => a + b, 0)) / times.length)));
  }
  for (const plane of PLANES) if (plane in run.planes) made.push(tile(`${words(plane)}, so far`, bytes(run.planes[plane])));
  return made;
}

function legend(planes) {
  return element("ul", { class: "legend" }, ...planes.map((plane, place) => element("li", {},
    svg("svg", { viewBox: "0 0 12 12", "aria-hidden": "true" }, svg("rect", { class: `p${place % 4}`, width: 12, height: 12, rx: 3 })), words(plane))));
}

function draw(id, chart, more = null) {
  at(id).replaceChildren(chart ?? element("p", { class: "none" }, "Nothing yet."), ...(chart && more ? [more] : []));
}

function runDetails(run) {
  at("shown").hidden = !run;
  if (!run) return;
  at("name").textContent = run.id;
  const said = [["model", run.model], ["data", run.dataset], ["adapter", run.adapter], ["rule", run.rule]]
    .filter(([, value]) => value).map(([key, value]) => `${key} ${value}`);
  at("setting").replaceChildren(said.join(" · "), ...(run.report ? [" · ", element("a", { href: `runs/${encodeURIComponent(run.id)}/report.html` }, "report")] : []));
  at("problems").replaceChildren(...run.problems.map((text) => element("li", {}, text)));
  at("progress").replaceChildren(...(run.total && run.status === "running"
    ? [element("progress", { max: run.total, value: run.round, "aria-label": "rounds done" })] : []));
  at("tiles").replaceChildren(...tiles(run));
  draw("score", lineChart(run.rounds, { key: "score", format: percent, label: "Score" }));
  draw("loss", lineChart(run.rounds, { key: "loss", low: "low", high: "high", format: plain, label: "Training loss", colour: 1 }));
  const planes = [...PLANES, ...Object.keys(run.planes).filter((plane) => !PLANES.includes(plane))];
  draw("bytes", barChart(run.rounds, { planes, format: bytes, label: "Bytes" }), legend(planes));
  at("jobs").replaceChildren(table("Requests to forget, newest first", ["Job", "Site", "State", "Updated", "Note"],
    run.jobs.map((job) => [job.id, job.site, pill(job.state), job.updated, job.note]), "Nobody has asked this run to forget anything.", [1, 2, 3, 4]));
  at("clients").replaceChildren(table("Clients of the federated phase", ["Client", "Rounds", "Refused", "Samples", "Loss", "Score", "Seconds a round"],
    run.clients.map((each) => [each.name, String(each.rounds), String(each.refused), each.trained.toLocaleString("en"),
      some(each.loss, plain), some(each.accuracy, percent), some(each.seconds, (value) => value.toFixed(1))]), "No client has answered yet."));
  at("rounds").replaceChildren(table("Rounds, newest first", ["Round", "Clients", "Refused", "Loss", "Score", "Seconds", ...planes.map(words)],
    [...run.rounds].reverse().map((row) => [String(row.round), String(row.clients), String(row.refused), some(row.loss, plain), some(row.score, percent),
      some(row.seconds, (value) => value.toFixed(1)), ...planes.map((plane) => some(row.bytes[plane], bytes))]), "No round has ended yet."));
  const told = [...run.events].reverse().map((event) => [event.time, event.level, event.text]);
  const refused = [...run.refused].reverse().map((each) => [`round ${each.round}`, "refused", `${each.client}: ${each.reason}`]);
  at("events").replaceChildren(table("Messages and refused updates, newest first", ["When", "Level", "What"], [...told, ...refused], "None.", [1, 2]));
}

function hostLoad(host) {
  at("host").hidden = !host;
  if (!host) return;
  if (host.error) {
    at("host-load").replaceChildren(element("p", { class: "caution" }, host.error));
    return;
  }
  const named = Object.entries(host.values).map(([name, value]) => tile(words(name), name.endsWith("bytes") ? bytes(value) : plain(value)));
  const refused = Object.entries(host.refused).map(([reason, count]) => tile(`refused: ${words(reason)}`, plain(count)));
  at("host-load").replaceChildren(element("div", { class: "tiles" }, ...named, ...refused));
}

function link(text, kind) {
  if (at("link").textContent !== text) at("link").textContent = text;
  at("link").className = `pill ${kind}`;
}

/** Draw, and leave focus and scrolled tables as they were. */
function keeping(drawing) {
  const focused = document.activeElement?.getAttribute("href");
  const scrolled = new Map([...document.querySelectorAll(".scroll")].map((each) => [each.getAttribute("aria-label"), each.scrollLeft]));
  drawing();
  for (const each of document.querySelectorAll(".scroll")) each.scrollLeft = scrolled.get(each.getAttribute("aria-label")) ?? 0;
  if (focused && document.activeElement === document.body) {
    [...document.querySelectorAll("a")].find((each) => each.getAttribute("href") === focused)?.focus({ preventScroll: true });
  }
}

async function look() {
  const query = new URLSearchParams({ run: decodeURIComponent(location.hash.slice(1)), version });
  try {
    const reply = await fetch(`api/state?${query}`, { signal: AbortSignal.timeout(PATIENCE_MS) });
    if (!reply.ok) throw new Error(String(reply.status));
    const { version: now, state, host } = await reply.json();
    if (state) {
      keeping(() => { runList(state); runDetails(state.run); });
      document.title = state.run ? `${state.run.id} · fednano` : "fednano dashboard";
      shownRun = state.run?.id ?? null;
      version = now;
    }
    hostLoad(host);
    link("live", "good");
  } catch {
    link("the dashboard does not answer; trying again", "bad");
  }
}

const THEMES = ["system", "light", "dark"];
function theme(name) {
  if (name === "system") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = name;
  at("theme").textContent = `Theme: ${name}`;
  try { localStorage.setItem("theme", name); } catch { /* a private window may forbid it */ }
}
function storedTheme() {
  try { return THEMES.includes(localStorage.getItem("theme")) ? localStorage.getItem("theme") : "system"; } catch { return "system"; }
}
document.querySelector(".skip").addEventListener("click", (event) => { event.preventDefault(); at("run").focus(); });
at("theme").addEventListener("click", () => theme(THEMES[(THEMES.indexOf(storedTheme()) + 1) % THEMES.length]));
theme(storedTheme());

let timer = 0;
async function follow() {
  clearTimeout(timer);
  if (!document.hidden) await look();
  clearTimeout(timer);
  timer = setTimeout(follow, EVERY_MS);
}
document.addEventListener("visibilitychange", follow);
window.addEventListener("hashchange", () => { if (decodeURIComponent(location.hash.slice(1)) !== shownRun) follow(); });
follow();
