// Asks /status every two seconds and shows what it says.

const EVERY = 2000;
const TIMEOUT = 5000;
const WAYS = [
  ["outbound", "Outbound", "this app → other apps"],
  ["inbound", "Inbound", "other apps → this app"],
  ["agent", "Guest agent", "this app → its CVM"],
];

let before = null;
let isPaused = false;
let lastAnswer = null;
const histories = Object.fromEntries(WAYS.map(([way]) => [way, new History()]));
const ways = {};

function makeWay([way, title, note]) {
  const [requests, latencies] = [new Chart(["one"]), new Chart(["one", "two"])];
  const figure = (unit) => {
    const value = el("b", {}, "–");
    return [value, el("div", { class: "figure" }, value, el("span", { class: "muted" }, unit))];
  };
  const [perSecond, perSecondFigure] = figure("requests/s");
  const [p99, p99Figure] = figure("p99");
  p99Figure.append(el("span", { class: "key two" }));
  const notes = el("p", { class: "notes" });
  const card = el(
    "article", { class: "card way", "aria-label": title },
    el("div", { class: "way-head" }, el("h3", {}, title), el("span", { class: "muted" }, note)),
    el("div", { class: "charts" },
      el("div", {}, perSecondFigure, requests.image), el("div", {}, p99Figure, latencies.image)),
    notes,
  );
  byId("traffic").append(card);
  ways[way] = { requests, latencies, perSecond, p99, notes, title };
}

function note(name, value, isBad = false) {
  return el("span", isBad ? { class: "bad" } : {}, `${name} `, el("b", {}, value));
}

function showWay(way, status) {
  const shown = ways[way];
  const traffic = status.traffic[way];
  const history = histories[way].points;
  const minute = histories[way].last(60);
  const bounds = status.bucket_bounds;
  const at = (share) => (minute ? quantile(bounds, minute.buckets, share) : null);
  const per = (name) => (minute ? minute[name] / minute.seconds : null);
  setText(shown.perSecond, rate(histories[way].last(10) ? perSecondOf(histories[way].last(10)) : null));
  setText(shown.p99, latency(at(0.99)));
  shown.requests.draw(
    [history.map(perSecondOf)],
    `${shown.title}: ${rate(per("requests"))} requests a second in the last minute`,
  );
  shown.latencies.draw(
    [history.map((p) => quantile(bounds, p.buckets, 0.5)), history.map((p) => quantile(bounds, p.buckets, 0.99))],
    `${shown.title}: half of the requests within ${latency(at(0.5))}, 99 of 100 within ${latency(at(0.99))}`,
  );
  const median = note("p50", latency(at(0.5)));
  median.append(el("span", { class: "key" }));
  const high = note("p95", latency(at(0.95)));
  const share = minute && minute.requests ? minute.failed / minute.requests : 0;
  shown.notes.replaceChildren(
    median, high,
    note("failed", minute ? `${(share * 100).toFixed(share && share < 0.1 ? 2 : 0)} %` : "–", share > 0),
    note("up", `${bytes(per("bytesUp"))}/s`), note("down", `${bytes(per("bytesDown"))}/s`),
    note("total", count(traffic.requests)),
  );
}

const perSecondOf = (point) => point.requests / point.seconds;

function showIdentity(status) {
  const own = status.identity;
  const button = byId("app-id");
  button.hidden = !own.app_id;
  setText(byId("no-app-id"), own.app_id ? "" : "no certificate yet");
  if (own.app_id && button.dataset.id !== own.app_id) {
    button.dataset.id = own.app_id;
    button.setAttribute("aria-label", `Copy app-id ${own.app_id}`);
    setText(button, own.app_id);
  }
  byId("life").hidden = !own.not_after;
  if (own.not_after) showLife(own, status.now);
  byId("identity-problem").hidden = !own.problem;
  setText(byId("identity-problem"), own.problem ? `Last attempt to renew failed: ${own.problem}` : "");
  setFacts(byId("identity-facts"), [
    ["Source", own.source],
    ["Loaded", own.loaded_at ? `${clockTime(own.loaded_at)}, generation ${own.generation}` : ""],
    ["Fetched", `${count(own.fetched)}${own.failed ? `, ${count(own.failed)} attempts failed` : ""}`],
    ["Instance", own.instance_id],
    ["Compose", own.compose_hash],
    ["OS image", own.os_image_hash],
  ]);
}

function showLife(own, now) {
  const whole = own.not_after - own.loaded_at;
  const share = (at) => Math.min(100, Math.max(0, ((at - own.loaded_at) / whole) * 100));
  byId("life-done").setAttribute("width", share(now));
  byId("life-mark").setAttribute("x", share(own.renew_at));
  const isOver = now >= own.not_after;
  const renews = now < own.renew_at ? `Renews in ${span(own.renew_at - now)}` : "Renewal is due";
  const expires = isOver ? `expired ${span(now - own.not_after)} ago` : `expires in ${span(own.not_after - now)}`;
  setText(byId("renews"), renews);
  setText(byId("expires"), expires);
  byId("life-bar").setAttribute("aria-label", `Certificate: ${renews}, ${expires}`);
}

function showChecks(readiness) {
  const checks = Object.entries(readiness.checks);
  syncRows(byId("checks"), checks, ([name]) => name, ([name]) => el(
    "li", {}, el("span", { class: "mark" }), el("span", {}, name), el("span", { class: "why" }),
  ), (row, [, check]) => {
    row.className = check.ok ? "ok" : "fails";
    setText(row.children[0], check.ok ? "✓" : "✕");
    row.children[0].setAttribute("aria-label", check.ok ? "good" : "failing");
    row.children[0].setAttribute("role", "img");
    setText(row.children[2], shortened(check.reason));
    row.children[2].title = check.reason;
  });
}

function showPolicy(status) {
  const allow = status.settings["inbound.allow"];
  const made = Object.entries(status.decisions).filter(([, n]) => n > 0);
  const decisions = made.map(([name, n]) => `${name} ${count(n)}`);
  setFacts(byId("policy-facts"), [
    ["Callers", allow === "any" ? "any app of this KMS" : allow.split(",").map(shortId).join(", ")],
    ["Rules", status.settings["inbound.rules"]],
    ["Mode", status.settings["inbound.policy_mode"] === "audit" ? "audit: all is let through" : "enforce"],
    ["Decisions", decisions.join(", ") || "none yet"],
    ["Agent", `${status.settings["outbound.agent"]} of its calls offered`],
  ]);
}

function showRoute(status) {
  const { gateway, settings } = status;
  setFacts(byId("gateway-facts"), [
    ["Gateway", gateway.domain ?? "not known yet"],
    ["Found by", gateway.is_configured ? "setting" : "asking the gateway"],
    ["Problem", gateway.problem ?? ""],
    ["Backend", settings["inbound.backend"]],
  ]);
  syncRows(byId("pool"), WAYS, ([way]) => way, ([, title]) => el(
    "tr", {}, el("th", { scope: "row" }, title), number(), number(), number(),
  ), (row, [way]) => {
    const traffic = status.traffic[way];
    setText(row.children[1], way === "agent" ? "" : count(traffic.downstream));
    setText(row.children[2], count(traffic.upstream_active));
    setText(row.children[3], count(traffic.upstream_idle));
  });
}

/** The one line that answers: is my mesh healthy? */
function verdictOf(status) {
  const failing = Object.entries(status.readiness.checks).filter(([, check]) => !check.ok);
  const draining = failing.find(([name]) => name === "draining");
  if (draining) return ["warn", "Stopping", draining[1].reason];
  const missing = failing.filter(([name]) => name !== "backend");
  if (missing.length) return ["bad", "Not ready", missing.map(([name, c]) => `${name}: ${c.reason}`).join("; ")];
  if (failing.length) return ["warn", "Ready, but the backend is not", failing[0][1].reason];
  if (status.identity.problem) return ["warn", "Ready, but renewal fails", status.identity.problem];
  return ["ok", "Healthy", `up ${span(status.now - status.started_at)}${status.workers > 1 ? `, ${status.workers} workers` : ""}`];
}

function showVerdict(state, verdict, reason) {
  document.body.dataset.state = state;
  if (byId("verdict").textContent !== verdict) announce(`${verdict}. ${reason}`);
  setText(byId("verdict"), verdict);
  setText(byId("verdict-reason"), reason);
  byId("verdict-reason").title = reason;
}

function show(status) {
  // A process that began anew counts from nothing.
  const goesOn = before && before.started_at === status.started_at && status.now > before.now;
  for (const [way] of WAYS) {
    if (goesOn) histories[way].add(difference(before.traffic[way], status.traffic[way], before.now, status.now));
    showWay(way, status);
  }
  before = status;
  showVerdict(...verdictOf(status));
  showIdentity(status);
  showChecks(status.readiness);
  showPolicy(status);
  showRoute(status);
  showPeers("targets", status.targets, status.now);
  showPeers("callers", status.callers, status.now);
  showIncidents(status.incidents);
  setText(byId("version"), status.version);
  setFacts(byId("listeners"), Object.entries(status.listeners));
  const app = status.identity.app_id ? shortId(status.identity.app_id) : "no identity";
  document.title = `${byId("verdict").textContent} · ${app} · dstack-mesh`;
  const seconds = histories.outbound.points.length * (EVERY / 1000);
  setText(byId("traffic-span"), `the last ${seconds >= 60 ? `${Math.round(seconds / 60)} min` : `${seconds} s`}`);
}

function showAway(error) {
  const since = lastAnswer ? `since ${clockTime(lastAnswer / 1000)}` : "so far";
  const text = `The mesh has given no answer ${since}. What is shown is what was known then; asking again every ${EVERY / 1000} s.`;
  byId("away").hidden = false;
  setText(byId("away"), text);
  showVerdict("away", "No answer", String(error.message ?? error));
  document.title = "No answer · dstack-mesh";
}

async function ask() {
  const response = await fetch("/status", { cache: "no-store", signal: AbortSignal.timeout(TIMEOUT) });
  if (!response.ok) throw new Error(`/status answered ${response.status}`);
  return response.json();
}

async function round() {
  if (!isPaused && !document.hidden) {
    try {
      const status = await ask();
      lastAnswer = Date.now();
      byId("away").hidden = true;
      show(status);
      setText(byId("updated"), `updated ${new Date().toLocaleTimeString("en-GB")}`);
    } catch (error) {
      showAway(error);
    }
  }
  setTimeout(round, EVERY);
}

byId("pause").addEventListener("click", (click) => {
  isPaused = !isPaused;
  click.currentTarget.setAttribute("aria-pressed", String(isPaused));
});
byId("app-id").addEventListener("click", (click) => copy(click.currentTarget.dataset.id));
WAYS.forEach(makeWay);
round();
