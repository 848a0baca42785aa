// Tables that are brought up to date row by row, so that focus and selection stay where they are.

function syncRows(body, items, keyOf, make, update) {
  const focused = document.activeElement;
  const known = new Map([...body.children].map((row) => [row.dataset.key, row]));
  let at = body.firstElementChild;
  for (const item of items) {
    const key = keyOf(item);
    let row = known.get(key);
    known.delete(key);
    if (!row) { row = make(item); row.dataset.key = key; }
    if (row !== at) body.insertBefore(row, at); else at = at.nextElementSibling;
    update(row, item);
  }
  for (const row of known.values()) row.remove();
  if (body.contains(focused) && document.activeElement !== focused) focused.focus();  // its row moved
}

const number = () => el("td", { class: "n" });

function peerRow(peer) {
  const [app, rest] = [peer.name.slice(0, 40), peer.name.slice(40)];
  const name = el("th", { scope: "row" });
  if (peer.name.length < 40) name.append(peer.name);
  else name.append(idButton(app), el("span", { class: "muted mono", title: rest }, rest.length > 14 ? `${rest.slice(0, 14)}…` : rest));
  return el("tr", {}, name, number(), number(), number(), number(), el("td", { class: "cut" }));
}

const peerBefore = new Map();

function peerRates(table, peers, now) {
  const rates = new Map();
  for (const peer of peers) {
    const key = `${table} ${peer.name}`;
    const before = peerBefore.get(key);
    const seconds = before ? now - before.now : 0;
    rates.set(peer.name, seconds > 0 ? Math.max(0, peer.requests - before.requests) / seconds : null);
    peerBefore.set(key, { now, requests: peer.requests });
  }
  return rates;
}

function showPeers(table, peers, now) {
  const rates = peerRates(table, peers, now);
  syncRows(byId(table), peers, (peer) => peer.name, peerRow, (row, peer) => {
    const [, requests, perSecond, errors, open, last] = row.children;
    setText(requests, count(peer.requests));
    setText(perSecond, rate(rates.get(peer.name)));
    setText(errors, count(peer.errors));
    errors.classList.toggle("some", peer.errors > 0);
    setText(open, table === "targets" ? `${peer.active} / ${peer.idle}` : `${peer.active}`);
    const error = peer.last_error;
    setText(last, error ? `${span(now - error.at)} ago: ${error.code}` : "");
    last.title = error ? error.detail : "";
  });
  byId(table).closest(".scroll").hidden = peers.length === 0;
  byId(`${table}-none`).hidden = peers.length > 0;
}

const DENIED = /denied|untrusted|required|rejected|mismatch/;

function incidentRow(one) {
  const app = el("td", {}, one.peer ? idButton(one.peer) : "");
  const request = el("td", {});
  if (one.method) request.append(el("span", { class: "mono path", title: `${one.method} ${one.path}` }, `${one.method} ${one.path}`));
  const reason = el("td", { class: "reason" }, one.detail ?? "");
  if (one.rule) reason.append(` (rule: ${one.rule})`);
  if (one.request_id) reason.title = `request id ${one.request_id}`;
  const when = el("time", { datetime: new Date(one.at * 1000).toISOString() }, clockTime(one.at));
  return el(
    "tr", {}, el("td", {}, when), el("td", {}, one.direction),
    el("td", {}, el("span", { class: DENIED.test(one.code) ? "code denied" : "code" }, one.code)),
    app, request, reason,
  );
}

function showIncidents(incidents) {
  const keys = new Map();
  const keyOf = (one) => {
    const key = `${one.at} ${one.direction} ${one.code} ${one.request_id ?? ""}`;
    return key;
  };
  const unique = incidents.filter((one) => !keys.has(keyOf(one)) && keys.set(keyOf(one), true));
  syncRows(byId("incidents"), unique, keyOf, incidentRow, () => {});
  byId("incidents").closest(".scroll").hidden = incidents.length === 0;
  byId("incidents-none").hidden = incidents.length > 0;
}
