// What changed between two answers of /status, the last five minutes of it, and small charts.

const KEPT = 150;
const LEAST_SHOWN = 30;

/** The last `KEPT` points; a point is what `difference` gives. */
class History {
  constructor() { this.points = []; }

  add(point) {
    this.points.push(point);
    if (this.points.length > KEPT) this.points.shift();
  }

  /** What happened in the last `seconds`, as one point; null before there is any. */
  last(seconds) {
    const newest = this.points.at(-1);
    if (!newest) return null;
    const recent = this.points.filter((point) => point.at > newest.at - seconds);
    return recent.reduce((sum, point) => addPoints(sum, point));
  }
}

function difference(before, now, beforeAt, nowAt) {
  const minus = (name) => Math.max(0, now[name] - before[name]);
  return {
    at: nowAt,
    seconds: nowAt - beforeAt,
    requests: minus("requests"),
    bytesUp: minus("bytes_up"),
    bytesDown: minus("bytes_down"),
    failed: Math.max(0, failures(now) - failures(before)),
    buckets: now.buckets.map((n, i) => Math.max(0, n - before.buckets[i])),
  };
}

/** Requests that ended in a server's or the mesh's error, or in no answer at all. */
function failures(traffic) {
  return (traffic.classes["5xx"] ?? 0) + (traffic.classes.none ?? 0);
}

function addPoints(one, other) {
  const sum = { at: other.at, buckets: one.buckets.map((n, i) => n + other.buckets[i]) };
  for (const name of ["seconds", "requests", "bytesUp", "bytesDown", "failed"]) {
    sum[name] = one[name] + other[name];
  }
  return sum;
}

/** The duration that `share` of the exchanges kept within, by the histogram; null without any. */
function quantile(bounds, buckets, share) {
  const total = buckets.reduce((sum, n) => sum + n, 0);
  if (!total) return null;
  let rank = total * share;
  for (let i = 0; i < buckets.length; i += 1) {
    if (rank <= buckets[i]) {
      const low = i ? bounds[i - 1] : 0;
      if (i === bounds.length) return low;
      return low + (bounds[i] - low) * (rank / buckets[i]);
    }
    rank -= buckets[i];
  }
  return bounds.at(-1);
}

/** A chart of a few lines over the same time; gaps where a value is null. */
class Chart {
  constructor(classes) {
    this.image = svg("svg", { class: "chart", viewBox: "0 0 150 40", preserveAspectRatio: "none", role: "img" });
    this.image.append(svg("line", { class: "base", x1: 0, x2: 150, y1: 40, y2: 40 }));
    this.area = svg("path", { class: "area" });
    this.image.append(this.area);
    this.lines = classes.map((name) => {
      const line = svg("path", { class: name });
      this.image.append(line);
      return line;
    });
  }

  draw(series, label) {
    const width = Math.max(LEAST_SHOWN, series[0].length) - 1;
    const x = (i) => (((width + 1 - series[0].length + i) / width) * 150).toFixed(1);
    const most = Math.max(...series.flat().filter((value) => value !== null), 1e-9) * 1.08;
    series.forEach((values, i) => {
      let path = "";
      let isOpen = false;
      values.forEach((value, at) => {
        if (value === null) { isOpen = false; return; }
        path += `${isOpen ? "L" : "M"}${x(at)} ${(40 - (value / most) * 39).toFixed(2)}`;
        isOpen = true;
      });
      this.lines[i].setAttribute("d", path);
      const isWhole = path && !values.includes(null);
      if (i === 0) this.area.setAttribute("d", isWhole ? `${path}L150 40L${x(0)} 40Z` : "");
    });
    this.image.setAttribute("aria-label", label);
  }
}
