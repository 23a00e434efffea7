"use strict";
// Asks /status once a second and draws what it says. Times are seconds of the epoch, by the server's clock.

const POLL_MS = 1000, KEPT_S = 30, TTFT_S = 300;
const $ = (id) => document.getElementById(id);
const seen = { slices: [], ttfts: [], last: 0, status: null };

function duration(seconds) {
  if (!(seconds >= 0)) return "–";
  if (seconds < 1) return `${(1000 * seconds).toPrecision(3)} ms`;
  return seconds < 100 ? `${seconds.toPrecision(3)} s` : `${Math.round(seconds)} s`;
}

function percentile(sorted, share) {
  return sorted.length ? sorted[Math.max(0, Math.ceil(share * sorted.length) - 1)] : NaN;
}

function color(name) {
  const at = seen.status.classes.findIndex((one) => one.name === name);
  return getComputedStyle(document.documentElement).getPropertyValue(`--c${Math.max(0, at) % 4}`);
}

// light-dark() is a value of CSS: the browser computes it where it is the color of something.
function drawn(value) {
  const probe = drawn.probe ?? (drawn.probe = document.head.appendChild(document.createElement("i")));
  probe.style.color = value;
  return getComputedStyle(probe).color;
}

function row(cells, swatch) {
  const tr = document.createElement("tr");
  for (const [text, kind] of cells) {
    const td = document.createElement("td");
    if (kind) td.className = kind;
    td.textContent = text;
    tr.append(td);
  }
  if (swatch) {
    const square = document.createElement("span");
    square.className = "swatch";
    square.style.background = swatch;
    tr.cells[0].prepend(square);
  }
  return tr;
}

function tables() {
  const { classes, passes } = seen.status;
  $("classes").replaceChildren(...classes.map((one) => {
    const took = seen.ttfts.filter((t) => t.class === one.name).map((t) => t.seconds).sort((a, b) => a - b);
    const numbers = [one.priority, one.running, one.waiting, one.suspended, took.length];
    const times = [percentile(took, 0.5), percentile(took, 0.99)].map(duration);
    return row([one.name, ...numbers, ...times].map((text) => [text]), color(one.name));
  }));
  const rows = passes.map((one) => row([
    [one.id], [one.class, "text"], [one.suspended ? "suspended" : "running", "text"],
    [`layer ${one.layer}, ${one.stage}`, "text"], [duration(one.seconds)],
    [one.prefills], [one.decodes], [one.tokens],
  ], color(one.class)));
  $("passes").replaceChildren(...(rows.length ? rows : [row([["none", "dim"]])]));
}

// A canvas in CSS pixels, cleared.
function canvas(id) {
  const element = $(id), scale = window.devicePixelRatio || 1;
  const width = element.clientWidth, height = element.clientHeight;
  element.width = width * scale;
  element.height = height * scale;
  const g = element.getContext("2d");
  g.scale(scale, scale);
  g.font = "12px system-ui, sans-serif";
  return { g, width, height };
}

const LEFT = 64, RIGHT = 10, FOOT = 20;

function timeline() {
  const { g, width, height } = canvas("timeline");
  const { classes, layers, time } = seen.status;
  const span = Number($("span").value), dim = drawn("var(--dim)"), line = drawn("var(--line)");
  const x = (at) => LEFT + (width - LEFT - RIGHT) * (1 - (time - at) / span);
  const band = (height - FOOT) / classes.length;
  const y = (index, layer) => (index + 1) * band - 6 - (band - 16) * Math.min(1, layer / layers);
  g.fillStyle = dim;
  for (let back = 0; back <= span; back += span / 5) {
    g.textAlign = back ? "center" : "right";
    g.fillText(back ? `-${back} s` : "now", x(time - back), height - 5);
  }
  classes.forEach((one, index) => {
    g.textAlign = "left";
    g.fillText(one.name, 8, (index + 0.5) * band + 4);
    g.textAlign = "right";
    g.fillText(layers, LEFT - 6, y(index, layers) + 8);
    g.fillText("0", LEFT - 6, y(index, 0));
    g.strokeStyle = line;
    g.strokeRect(LEFT, index * band + 4, width - LEFT - RIGHT, band - 4);
    g.save();
    g.beginPath();
    g.rect(LEFT, index * band, width - LEFT - RIGHT, band);
    g.clip();
    g.strokeStyle = g.fillStyle = drawn(color(one.name));
    const stopped = new Map();
    const waits = (from, to, layer) => {
      g.globalAlpha = 0.45;
      g.setLineDash([3, 3]);
      stroke([x(from), y(index, layer)], [x(to), y(index, layer)]);
      g.setLineDash([]);
      g.globalAlpha = 1;
    };
    const stroke = (from, to) => {
      g.beginPath();
      g.moveTo(...from);
      g.lineTo(...to);
      g.stroke();
    };
    for (const slice of seen.slices) {
      if (slice.class !== one.name) continue;
      const before = stopped.get(slice.id);
      if (before) waits(before.end, slice.start, before.to);
      stopped.delete(slice.id);
      g.lineWidth = 1.5;
      stroke([x(slice.start), y(index, slice.from)], [x(slice.end), y(index, slice.to)]);
      if (slice.suspended) {
        stopped.set(slice.id, slice);
        g.beginPath();
        g.arc(x(slice.end), y(index, slice.to), 3, 0, 2 * Math.PI);
        g.stroke();
      }
    }
    const standing = new Set(seen.status.passes.filter((p) => p.suspended).map((p) => p.id));
    for (const slice of stopped.values()) if (standing.has(slice.id)) waits(slice.end, time, slice.to);
    g.restore();
    g.fillStyle = dim;
  });
}

function dots() {
  const { g, width, height } = canvas("ttfts");
  const { time } = seen.status, dim = drawn("var(--dim)"), line = drawn("var(--line)");
  const all = seen.ttfts.map((one) => Math.max(one.seconds, 1e-4));
  const low = Math.floor(Math.log10(Math.min(0.01, ...all))), high = Math.ceil(Math.log10(Math.max(1, ...all)));
  const x = (at) => LEFT + (width - LEFT - RIGHT) * (1 - (time - at) / TTFT_S);
  const y = (seconds) => height - FOOT - (height - FOOT - 14) * (Math.log10(seconds) - low) / (high - low);
  g.strokeStyle = line;
  g.fillStyle = dim;
  g.textAlign = "right";
  for (let power = low; power <= high; power++) {
    g.fillText(duration(10 ** power), LEFT - 6, y(10 ** power) + 4);
    g.beginPath();
    g.moveTo(LEFT, y(10 ** power));
    g.lineTo(width - RIGHT, y(10 ** power));
    g.stroke();
  }
  for (let minutes = 0; minutes <= 5; minutes++) {
    g.textAlign = minutes ? (minutes === 5 ? "left" : "center") : "right";
    g.fillText(minutes ? `-${minutes} min` : "now", x(time - 60 * minutes), height - 5);
  }
  for (const one of seen.status.classes) {
    g.fillStyle = drawn(color(one.name));
    g.globalAlpha = 0.7;
    for (const dot of seen.ttfts) {
      if (dot.class !== one.name) continue;
      g.beginPath();
      g.arc(x(dot.time), y(Math.max(dot.seconds, 1e-4)), 2.5, 0, 2 * Math.PI);
      g.fill();
    }
    g.globalAlpha = 1;
  }
}

function draw() {
  if (!seen.status) return;
  const { model, policy, kv } = seen.status;
  $("model").textContent = model;
  $("policy").textContent = `policy ${policy}`;
  $("kv").textContent = `${kv.total - kv.free} of ${kv.total} KV blocks in use`;
  tables();
  timeline();
  dots();
}

function take(status) {
  seen.slices = seen.slices.concat(status.slices).filter((one) => one.end > status.time - KEPT_S);
  seen.ttfts = seen.ttfts.concat(status.ttfts).filter((one) => one.time > status.time - TTFT_S);
  seen.last = status.time;
  seen.status = status;
  draw();
}

function say(text, bad) {
  $("state").textContent = text;
  $("state").classList.toggle("bad", bad);
}

async function poll() {
  setTimeout(poll, POLL_MS);
  const key = sessionStorage.getItem("key");
  const headers = key ? { Authorization: `Bearer ${key}` } : {};
  let answer, status;
  try {
    answer = await fetch(`status?after=${seen.last}`, { headers, signal: AbortSignal.timeout(10 * POLL_MS) });
    status = answer.ok && await answer.json();
  } catch {
    say("the server does not answer", true);
    return;
  }
  $("login").hidden = answer.status !== 401;
  if (status && status.time > seen.last) take(status);
  if (status) say("serving", false);
  else say(answer.status === 401 ? "needs a key" : `the engine does not serve (${answer.status})`, true);
}

$("login").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("key", $("key").value);
});
$("span").addEventListener("change", draw);
window.addEventListener("resize", draw);
poll();
