"use strict";

// Text for people: numbers, times, ids. Elements are made by `el`, never from markup, so that nothing
// that came from a peer can become more than text.

const byId = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";

function el(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

function svg(tag, attributes = {}) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

function setFacts(list, facts) {
  const shown = facts.filter(([, value]) => value);
  if (list.dataset.shown === JSON.stringify(shown)) return;
  list.dataset.shown = JSON.stringify(shown);
  list.replaceChildren(
    ...shown.flatMap(([name, value]) => [el("dt", {}, name), el("dd", { title: value }, value)]),
  );
}

const count = (n) => n.toLocaleString("en-US");

function rate(perSecond) {
  if (perSecond === null) return "–";
  if (perSecond === 0) return "0";
  if (perSecond < 10) return perSecond.toFixed(perSecond < 1 ? 2 : 1);
  return count(Math.round(perSecond));
}

function bytes(n) {
  if (n === null) return "–";
  const units = ["B", "kB", "MB", "GB", "TB"];
  let at = 0;
  while (n >= 1000 && at < units.length - 1) { n /= 1000; at += 1; }
  return `${n >= 100 || at === 0 ? Math.round(n) : n.toFixed(1)} ${units[at]}`;
}

/** A latency: 0.42 ms, 12 ms, 1.3 s. */
function latency(seconds) {
  if (seconds === null) return "–";
  const ms = seconds * 1000;
  if (ms < 1) return `${ms.toFixed(2)} ms`;
  if (ms < 10) return `${ms.toFixed(1)} ms`;
  return ms < 1000 ? `${Math.round(ms)} ms` : `${seconds.toFixed(seconds < 10 ? 1 : 0)} s`;
}

/** A span of time by its two largest units: 15 h 12 min. */
function span(seconds) {
  const units = [["d", 86400], ["h", 3600], ["min", 60], ["s", 1]];
  let left = Math.max(0, Math.round(seconds));
  const parts = [];
  for (const [name, size] of units) {
    const n = Math.floor(left / size);
    left -= n * size;
    if (n > 0 || (parts.length === 0 && size === 1)) parts.push(`${n} ${name}`);
    else if (parts.length > 0) break;
  }
  return parts.slice(0, 2).join(" ");
}

function clockTime(at) {
  const moment = new Date(at * 1000);
  const today = new Date().toDateString() === moment.toDateString();
  const time = moment.toLocaleTimeString("en-GB");
  return today ? time : `${moment.toISOString().slice(5, 10)} ${time}`;
}

const shortId = (id) => (id.length > 20 ? `${id.slice(0, 8)}…${id.slice(-6)}` : id);

/** A text with its app-ids cut short. */
const shortened = (text) => text.replace(/[0-9a-f]{40}/g, shortId);

/** A button that shows an app-id and copies it. */
function idButton(id, text = shortId(id)) {
  const button = el("button", { type: "button", class: "id", title: id, "aria-label": `Copy app-id ${id}` }, text);
  button.addEventListener("click", () => copy(id));
  return button;
}

function copy(id) {
  navigator.clipboard.writeText(id).then(
    () => announce(`Copied ${id}`),
    () => announce("The browser does not allow copying here"),
  );
}

function announce(text) {
  setText(byId("announce"), text);
}
