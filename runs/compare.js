// What the page of `foveal compare` does. page.py writes the data; everything below is computed from the runs that
// are shown, so that one that is hidden counts in no mean. Definitions are those of runs/statistics.py.
"use strict";

const $ = id => document.getElementById(id);
const DATA = JSON.parse($("data").textContent);
const RUNS = DATA.runs;
const state = {
  metric: DATA.metric, axis: DATA.axis, by: "chosen", statistic: DATA.statistic, score: DATA.score,
  smoothing: 0, filter: "", hidden: new Set(), labelsOff: new Set(), sort: ["score", DATA.lower ? 1 : -1],
};

// ---- numbers ----

async function unpack(text) {
  const bytes = Uint8Array.from(atob(text), c => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).arrayBuffer();
}

const axes = {}, metrics = {}; // what has been unpacked: an array for each run

async function axisColumns(name) {
  if (!axes[name]) {
    const all = new Float64Array(await unpack(DATA.axes[name]));
    let start = 0;
    axes[name] = RUNS.map(run => all.subarray(start, start += run.rows));
  }
  return axes[name];
}

async function metricColumns(name) {
  if (!metrics[name]) {
    const { counts, data } = DATA.metrics[name], buffer = await unpack(data);
    const total = counts.reduce((a, b) => a + b, 0);
    const steps = new Uint32Array(buffer, 0, total), values = new Float32Array(buffer, 4 * total, total);
    let start = 0;
    metrics[name] = counts.map(count => {
      const rows = new Uint32Array(count);
      for (let i = 0, row = 0; i < count; i++) rows[i] = row += steps[start + i];
      const part = { rows, values: values.subarray(start, start + count) };
      start += count;
      return part;
    });
  }
  return metrics[name];
}

// The recorded values of a run by axis; of two at one place the later one.
function series(index, xs, ys) {
  const { rows, values } = ys[index], pairs = [];
  for (let i = 0; i < rows.length; i++) {
    const x = xs[index][rows[i]];
    if (Number.isFinite(x)) pairs.push([x, values[i]]);
  }
  pairs.sort((a, b) => a[0] - b[0]);
  const last = pairs.filter((pair, i) => i + 1 === pairs.length || pairs[i + 1][0] !== pair[0]);
  return { index, x: last.map(p => p[0]), y: smooth(last.map(p => p[1]), state.smoothing) };
}

// Exponential moving average without the pull of its start.
function smooth(y, weight) {
  let sum = 0, norm = 0;
  return weight ? y.map(v => (sum = weight * sum + v, norm = weight * norm + 1, sum / norm)) : y;
}

function interpolate(x, y, grid) {
  let i = 0;
  return grid.map(at => {
    while (i + 2 < x.length && x[i + 1] < at) i++;
    if (x.length === 1 || at <= x[i]) return y[i];
    return at >= x[i + 1] ? y[i + 1] : y[i] + (y[i + 1] - y[i]) * (at - x[i]) / (x[i + 1] - x[i]);
  });
}

const mean = v => { let s = 0; for (const x of v) s += x; return s / v.length; };
const iqm = v => { const s = Float64Array.from(v).sort(), cut = Math.floor(s.length / 4); return mean(s.subarray(cut, s.length - cut)); };
const middle = v => state.statistic === "iqm" ? iqm(v) : mean(v);

function quantile(sorted, q) {
  const at = q * (sorted.length - 1), low = Math.floor(at), high = Math.ceil(at);
  return sorted[low] + (sorted[high] - sorted[low]) * (at - low);
}
const interval = draws => { const s = Float64Array.from(draws).sort(); return [quantile(s, .025), quantile(s, .975)]; };

// mulberry32: the same page gives the same intervals each time.
function random(seed = 1) {
  return () => {
    seed = seed + 0x6D2B79F5 | 0;
    let t = Math.imul(seed ^ seed >>> 15, 1 | seed);
    t = t + Math.imul(t ^ t >>> 7, 61 | t) ^ t;
    return ((t ^ t >>> 14) >>> 0) / 4294967296;
  };
}
function resamples(n, count, next = random()) {
  return Array.from({ length: count }, () => Int32Array.from({ length: n }, () => Math.floor(next() * n)));
}

function bootstrap(values, statistic = middle, count = 10000) {
  return interval(resamples(values.length, count).map(draw => statistic(Float64Array.from(draw, i => values[i]))));
}

// Over seeds, where all have values; between its own values a seed is a straight line.
function meanCurve(curves) {
  const first = Math.max(...curves.map(c => c.x[0])), last = Math.min(...curves.map(c => c.x[c.x.length - 1]));
  let grid = [...new Set(curves.flatMap(c => c.x))].filter(x => x >= first && x <= last).sort((a, b) => a - b);
  const every = Math.ceil(grid.length / 250); // steps that were recorded, and the last one
  grid = grid.filter((_, i) => i % every === 0 || i + 1 === grid.length);
  const ys = curves.map(c => interpolate(c.x, c.y, grid)), n = curves.length;
  const draws = n > 1 ? resamples(n, 1000) : [], column = new Float64Array(n), drawn = new Float64Array(n);
  const low = [], high = [];
  const y = grid.map((_, at) => {
    for (let i = 0; i < n; i++) column[i] = ys[i][at];
    if (n > 1) {
      const all = new Float64Array(draws.length);
      for (let b = 0; b < all.length; b++) {
        for (let i = 0; i < n; i++) drawn[i] = column[draws[b][i]];
        all[b] = middle(drawn);
      }
      const [l, h] = interval(all);
      low.push(l); high.push(h);
    }
    return middle(column);
  });
  return { x: grid, y, low, high, n };
}

// How likely one of `ours` is better than one of `theirs`, over tasks, and its 95 % interval.
function improvement(ours, theirs, count = 4000) {
  const sign = lowerIsBetter(state.score) ? -1 : 1, next = random();
  const tasks = ours.map((mine, t) => mine.map(a => theirs[t].map(b => (Math.sign(sign * (a - b)) + 1) / 2)));
  const whole = mean(tasks.map(wins => mean(wins.map(mean))));
  const draws = Array.from({ length: count }, () => mean(tasks.map(wins => {
    const columns = wins[0].map(() => Math.floor(next() * wins[0].length));
    let sum = 0;
    for (let i = 0; i < wins.length; i++) {
      const row = wins[Math.floor(next() * wins.length)];
      for (const j of columns) sum += row[j];
    }
    return sum / wins.length / columns.length;
  })));
  return [whole, ...interval(draws)];
}

function lowerIsBetter(score) {
  if (score === DATA.score) return DATA.lower;
  return /(^|[/_ ])(error|squared_error|loss|bpd|nats|fid|nll|perplexity|bits_per_dim)($|[/_ ])/.test(score);
}

function choose(n, k) { let c = 1; for (let i = 1; i <= k; i++) c = c * (n - k + i) / i; return c; }

function number(v, digits = 4) {
  if (v == null || !Number.isFinite(v)) return "–";
  const size = Math.abs(v);
  if (size >= 1e12) return v.toExponential(2);
  return v.toLocaleString("en-US", { maximumFractionDigits: Math.max(0, Math.min(6, digits - 1 - Math.floor(Math.log10(size || 1)))) });
}

// ---- which runs ----

const wild = pattern => new RegExp("^" + pattern.replace(/[.+^${}()|[\]\\]/g, "\\$&").replace(/\*/g, ".*").replace(/\?/g, ".") + "$", "i");

function passes(run, index) {
  return state.filter.split(/\s+/).filter(Boolean).every(term => {
    const [key, ...rest] = term.split("="), known = key === "env" ? "env_id" : key;
    if (rest.length) return known in run.fields ? !rest.join("=") || wild(rest.join("=")).test(run.fields[known]) : false;
    return [run.path, labelOf(index), run.task].join(" ").toLowerCase().includes(term.toLowerCase());
  });
}

const labelOf = index => DATA.groupings[state.by][index];
const allLabels = () => [...new Set(DATA.groupings[state.by])];
const color = label => DATA.colors[allLabels().indexOf(label) % DATA.colors.length];
const filtered = () => RUNS.map((_, i) => i).filter(i => passes(RUNS[i], i));
const shown = () => filtered().filter(i => !state.hidden.has(i) && !state.labelsOff.has(labelOf(i)));

// task -> label -> run numbers, of the runs that are shown
function grouped(indices = shown()) {
  const tasks = new Map();
  for (const task of DATA.tasks) {
    const labels = new Map();
    for (const i of indices) if (RUNS[i].task === task) labels.set(labelOf(i), [...labels.get(labelOf(i)) ?? [], i]);
    if (labels.size) tasks.set(task, labels);
  }
  return tasks;
}

// label -> final scores, the best first
function scoresOf(labels) {
  const sign = lowerIsBetter(state.score) ? 1 : -1;
  const found = [...labels].map(([label, runs]) => [label, runs.map(i => RUNS[i].scores[state.score]).filter(s => s != null)]);
  return new Map(found.filter(([, s]) => s.length).sort((a, b) => sign * (middle(a[1]) - middle(b[1]))));
}

// ---- drawing ----

const escapeHtml = text => String(text).replace(/[&<>"']/g, c => `&#${c.charCodeAt(0)};`);
const css = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const shade = (hex, alpha) => `rgba(${[1, 3, 5].map(i => parseInt(hex.slice(i, i + 2), 16)).join(",")},${alpha})`;
const dot = label => `<span class="dot" style="background:${color(label)}"></span>`;
const short = (text, n = 34) => text.length > n ? text.slice(0, n - 1) + "…" : text;

function layout(more = {}) {
  const axis = { gridcolor: css("--grid"), zerolinecolor: css("--line"), linecolor: css("--line"), automargin: true, title: { standoff: 8 } };
  const { xaxis, yaxis, ...rest } = more;
  return {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { color: css("--ink"), family: getComputedStyle(document.body).fontFamily, size: 13 },
    margin: { l: 56, r: 14, t: 34, b: 44 }, height: 380, showlegend: false, hovermode: "closest",
    hoverlabel: { bgcolor: css("--card"), bordercolor: css("--line"), font: { color: css("--ink") } },
    xaxis: { ...axis, ...xaxis }, yaxis: { ...axis, ...yaxis }, ...rest,
  };
}
const config = { displaylogo: false, responsive: true, displayModeBar: "hover", modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"] };
const heading = text => ({ text: escapeHtml(short(text, 60)), x: 0, xanchor: "left", xref: "paper", y: .985, yanchor: "top", yref: "container", font: { size: 15 } });

function draw(parent, name, traces, look) {
  let div = [...parent.children].find(child => child.dataset.name === name);
  if (!div) {
    div = document.createElement("div");
    div.className = "plot";
    div.dataset.name = name;
    parent.append(div);
  }
  return Plotly.react(div, traces, layout(look), config);
}
function prune(parent, names) {
  for (const child of [...parent.children]) if (!names.includes(child.dataset.name)) { Plotly.purge(child); child.remove(); }
}

async function drawCurves(tasks) {
  const xs = await axisColumns(state.axis), ys = await metricColumns(state.metric), ended = [];
  let crowded = false;
  for (const [task, labels] of tasks) {
    const traces = [];
    crowded = [...labels.values()].flat().length > 30; // only means: lines of single seeds would hide them
    for (const [label, runs] of labels) {
      const curves = runs.map(i => series(i, xs, ys)).filter(c => c.x.length), hue = color(label);
      if (!curves.length) continue;
      const m = meanCurve(curves), line = { color: hue, width: 2.6 };
      if (m.x.length && m.n > 1) {
        traces.push({ x: m.x, y: m.low, mode: "lines", line: { width: 0 }, hoverinfo: "skip" });
        traces.push({ x: m.x, y: m.high, mode: "lines", line: { width: 0 }, fill: "tonexty", fillcolor: shade(hue, .16), hoverinfo: "skip" });
      }
      if (m.n > 1 && !crowded) for (const c of curves) {
        traces.push({ x: c.x, y: c.y, mode: "lines", line: { color: hue, width: 1 }, opacity: .4, name: RUNS[c.index].name, hovertemplate: `${escapeHtml(RUNS[c.index].name)}: %{y:.5~g}<extra></extra>` });
      }
      const text = m.n > 1 ? m.x.map((_, i) => `${number(m.low[i])} to ${number(m.high[i])}, ${m.n} seeds`) : m.x.map(() => "one seed");
      traces.push({ x: m.x, y: m.y, text, mode: m.x.length < 2 ? "markers" : "lines", line, marker: { color: hue, size: 9 }, name: label, meta: "mean", hovertemplate: `<b>${escapeHtml(short(label))}</b><br>%{x:,.6~g}: %{y:.5~g} (%{text})<extra></extra>` });
      const ends = curves.map(c => c.x[c.x.length - 1]), least = Math.min(...ends);
      if (least < .9 * Math.max(...ends)) ended.push(`${label} (${RUNS[curves[ends.indexOf(least)].index].name})`);
    }
    await draw($("curves"), task, traces, { title: heading(task), xaxis: { title: { text: DATA.axis_texts[state.axis] ?? state.axis }, tickformat: "~s", rangemode: "tozero" }, yaxis: { title: { text: state.metric } } });
  }
  prune($("curves"), [...tasks.keys()]);
  $("curves-note").textContent = `Thick: ${state.statistic === "iqm" ? "interquartile mean" : "mean"} over seeds, with its 95 % bootstrap interval${crowded ? "" : "; thin: each seed, at the steps that were recorded"}.`
    + (state.smoothing ? ` Smoothed by ${state.smoothing}: values are not those recorded.` : "")
    + (ended.length ? ` A mean ends where its shortest run does: ${ended.join(", ")}.` : "");
}

function baseline(task) {
  const values = RUNS.filter(run => run.task === task).map(run => run.summary[DATA.baselines[state.score]]).filter(v => v != null);
  return values.length ? mean(values) : null;
}

async function drawScores(tasks) {
  for (const [task, labels] of tasks) {
    const scores = [...scoresOf(labels)].reverse(), names = scores.map(([label]) => short(label)), base = baseline(task);
    const traces = scores.flatMap(([label, values], i) => {
      const m = middle(values), [low, high] = values.length > 1 ? bootstrap(values) : [m, m];
      return [
        { x: values, y: values.map(() => i), mode: "markers", marker: { color: color(label), size: 7, opacity: .35 }, hovertemplate: "a seed: %{x:.5~g}<extra></extra>" },
        { x: [m], y: [i], mode: "markers", meta: "score", name: label, marker: { color: color(label), size: 12, symbol: "diamond", line: { color: css("--card"), width: 1 } },
          error_x: { type: "data", symmetric: false, array: [high - m], arrayminus: [m - low], color: color(label), thickness: 3, width: 7 },
          hovertemplate: `<b>${escapeHtml(short(label))}</b>: ${number(m)} (${number(low)} to ${number(high)})<extra></extra>` },
      ];
    });
    const shapes = base == null ? [] : [{ type: "line", x0: base, x1: base, yref: "paper", y0: 0, y1: 1, line: { color: css("--soft"), dash: "dot", width: 1.5 } }];
    const annotations = shapes.map(() => ({ x: base, yref: "paper", y: 1, yanchor: "bottom", text: "baseline", showarrow: false, font: { size: 12, color: css("--soft") } }));
    await draw($("scores"), task, traces, { title: heading(task), shapes, annotations, height: 120 + 42 * Math.max(2, scores.length), margin: { l: 20, r: 20, t: 46, b: 44 },
      xaxis: { title: { text: state.score } }, yaxis: { tickvals: names.map((_, i) => i), ticktext: names, range: [-.6, names.length - .4], showgrid: false, zeroline: false } });
  }
  prune($("scores"), [...tasks.keys()]);
  $("scores-note").textContent = `${lowerIsBetter(state.score) ? "Lower" : "Higher"} is better. Diamond: ${state.statistic === "iqm" ? "interquartile mean" : "mean"} over seeds with its 95 % bootstrap interval; dots: each seed.`;
}

async function drawImprovement(tasks) {
  const byTask = [...tasks.values()].map(scoresOf), labels = [...new Set(byTask.flatMap(s => [...s.keys()]))];
  const rank = label => mean(byTask.filter(s => s.has(label)).map(s => [...s.keys()].indexOf(label)));
  labels.sort((a, b) => rank(a) - rank(b));
  let pairs = labels.flatMap((a, i) => labels.slice(i + 1).map(b => [a, b]));
  if (labels.length > 5) pairs = pairs.filter(([a]) => a === labels[0]);
  pairs = pairs.map(([a, b]) => [a, b, byTask.filter(s => s.has(a) && s.has(b))]).filter(p => p[2].length);
  $("improvement-card").hidden = !pairs.length;
  if (!pairs.length) return;
  const rows = pairs.reverse().map(([a, b, both]) => [a, b, ...improvement(both.map(s => s.get(a)), both.map(s => s.get(b)))]);
  const names = rows.map(([a, b]) => `${short(a, 26)}  >  ${short(b, 26)}`);
  await draw($("improvement"), "improvement", rows.map(([a, b, p, low, high], i) => ({
    x: [p], y: [i], mode: "markers", marker: { color: color(a), size: 12, symbol: "diamond" }, meta: "improvement", name: `${a} > ${b}`,
    error_x: { type: "data", symmetric: false, array: [high - p], arrayminus: [p - low], color: color(a), thickness: 3, width: 7 },
    hovertemplate: `${number(p)} (${number(low)} to ${number(high)})<extra></extra>`,
  })), { height: 90 + 36 * names.length, margin: { l: 20, r: 20, t: 8, b: 44 }, shapes: [{ type: "line", x0: .5, x1: .5, yref: "paper", y0: 0, y1: 1, line: { color: css("--soft"), dash: "dot", width: 1.5 } }],
    xaxis: { range: [-.02, 1.02], title: { text: "P(a run of the first is better)" } }, yaxis: { tickvals: names.map((_, i) => i), ticktext: names.map(escapeHtml), range: [-.6, names.length - .4], showgrid: false, zeroline: false } });
  $("improvement-note").textContent = "How often a run of the first scores better than one of the second" + (tasks.size > 1 ? ", averaged over tasks" : "") + "; at one half the two are alike. An interval that crosses it tells nothing apart.";
}

async function drawProfile(tasks) {
  const byTask = [...tasks].map(([task, labels]) => [task, scoresOf(labels)]);
  const common = tasks.size < 2 ? [] : [...byTask[0][1].keys()].filter(label => byTask.every(([, s]) => s.has(label)));
  $("profile-card").hidden = !common.length;
  if (!common.length) return;
  const lower = lowerIsBetter(state.score), thresholds = Array.from({ length: 61 }, (_, i) => i / 50 - .1), next = random();
  const scales = byTask.map(([task, scores]) => {
    const all = [...scores.values()].flat(), means = [...scores.values()].map(mean);
    const zero = baseline(task) ?? (lower ? Math.max(...all) : Math.min(...all)), one = lower ? Math.min(...means) : Math.max(...means);
    return v => (v - zero) / (one - zero || 1);
  });
  const traces = common.flatMap(label => {
    const values = byTask.map(([, scores], t) => scores.get(label).map(scales[t]));
    const share = sets => thresholds.map(x => mean(sets.map(set => mean(set.map(v => +(v > x))))));
    const draws = Array.from({ length: 500 }, () => share(values.map(set => set.map(() => set[Math.floor(next() * set.length)]))));
    const bounds = thresholds.map((_, i) => interval(draws.map(d => d[i])));
    const band = common.length > 6 ? [] : [
      { x: thresholds, y: bounds.map(b => b[0]), mode: "lines", line: { width: 0, shape: "hv" }, hoverinfo: "skip" },
      { x: thresholds, y: bounds.map(b => b[1]), mode: "lines", line: { width: 0, shape: "hv" }, fill: "tonexty", fillcolor: shade(color(label), .14), hoverinfo: "skip" },
    ];
    return [
      ...band,
      { x: thresholds, y: share(values), mode: "lines", name: label, line: { color: color(label), width: 2.6, shape: "hv" }, hovertemplate: `<b>${escapeHtml(short(label))}</b>: %{y:.0%} of runs score more than %{x:.2f}<extra></extra>` },
    ];
  });
  await draw($("profile"), "profile", traces, { xaxis: { title: { text: "normalised score" } }, yaxis: { title: { text: "share of runs that score more" }, range: [-.02, 1.02], tickformat: ".0%" }, margin: { l: 60, r: 14, t: 8, b: 44 } });
  $("profile-note").textContent = `Over ${tasks.size} tasks: 0 is a task's baseline (its worst run where there is none), 1 the best mean on it. A line that lies above another is better at every level.`;
}

const SPEEDS = { "speed/env_steps_per_s": "environment steps a second", "speed/images_per_s": "images a second", "speed/updates_per_s": "updates a second", wall_s: "wall time in s", "memory/peak_mb": "peak memory in MB", "memory/gpu_peak_mb": "peak GPU memory in MB" };

async function drawSpeed() {
  const labels = new Map();
  for (const i of shown()) labels.set(labelOf(i), [...labels.get(labelOf(i)) ?? [], i]);
  const keys = Object.keys(SPEEDS).filter(key => shown().some(i => key in RUNS[i].summary));
  for (const key of keys) {
    const rows = [...labels].map(([label, runs]) => [label, runs.map(i => RUNS[i].summary[key]).filter(v => v != null)]).filter(r => r[1].length).reverse();
    const names = rows.map(([label]) => short(label, 24));
    await draw($("speed"), key, [
      { type: "bar", orientation: "h", x: rows.map(r => mean(r[1])), y: names.map((_, i) => i), width: .55, marker: { color: rows.map(r => shade(color(r[0]), .55)) }, hovertemplate: "%{x:,.5~g}<extra></extra>" },
      ...rows.map(([label, values], i) => ({ x: values, y: values.map(() => i), mode: "markers", marker: { color: color(label), size: 6 }, hovertemplate: "%{x:,.5~g}<extra></extra>" })),
    ], { title: heading(SPEEDS[key]), height: 90 + 34 * names.length, margin: { l: 20, r: 20, t: 36, b: 30 }, xaxis: { rangemode: "tozero", tickformat: Math.max(...rows.flatMap(r => r[1])) < 1000 ? "~g" : "~s" }, yaxis: { tickvals: names.map((_, i) => i), ticktext: names.map(escapeHtml), range: [-.6, names.length - .4], showgrid: false, zeroline: false } });
  }
  prune($("speed"), keys);
  $("speed-card").hidden = !keys.length;
}

// Where runs differ in several numeric settings, as those of a sweep do.
async function drawParallel() {
  const runs = shown().filter(i => RUNS[i].scores[state.score] != null);
  const values = key => runs.map(i => Number(RUNS[i].fields[key]));
  const keys = DATA.settings.filter(key => { const v = values(key); return v.every(Number.isFinite) && new Set(v).size > 2; });
  $("parallel-card").hidden = runs.length < 8 || keys.length < 2;
  if ($("parallel-card").hidden) return;
  const scores = runs.map(i => RUNS[i].scores[state.score]);
  const dimensions = keys.map(key => {
    const v = values(key), logarithmic = Math.min(...v) > 0 && Math.max(...v) / Math.min(...v) > 50;
    if (!logarithmic) return { label: key, values: v };
    const low = Math.log10(Math.min(...v)), high = Math.log10(Math.max(...v)), ticks = [low, high];
    for (let e = Math.ceil(low); e <= high; e++) if (Math.min(e - low, high - e) > .1) ticks.push(e);
    return { label: key, values: v.map(Math.log10), tickvals: ticks, ticktext: ticks.map(e => String(Number((10 ** e).toPrecision(2)))) };
  });
  await draw($("parallel"), "parallel", [{ type: "parcoords", line: { color: scores, colorscale: "Viridis", reversescale: lowerIsBetter(state.score), showscale: true }, dimensions: [...dimensions, { label: state.score, values: scores }] }], { margin: { l: 70, r: 40, t: 46, b: 24 } });
}

async function drawImportance() {
  $("importance-card").hidden = !DATA.sweeps.length;
  for (const { group, metric, importance } of DATA.sweeps) {
    const rows = Object.entries(importance).sort((a, b) => a[1] - b[1]);
    await draw($("importance"), group, [{ type: "bar", orientation: "h", x: rows.map(r => r[1]), y: rows.map((_, i) => i), marker: { color: shade(css("--accent"), .7) }, width: .55, hovertemplate: "%{x:.0%}<extra></extra>" }],
      { title: heading(`${group}: ${metric}`), height: 100 + 30 * rows.length, margin: { l: 20, r: 20, t: 36, b: 30 }, xaxis: { tickformat: ".0%", rangemode: "tozero" }, yaxis: { tickvals: rows.map((_, i) => i), ticktext: rows.map(r => escapeHtml(r[0])), range: [-.6, rows.length - .4], showgrid: false, zeroline: false } });
  }
}

// ---- text and tables ----

function verdict(task, labels) {
  const scores = [...scoresOf(labels)];
  if (!scores.length) return `<h2>${escapeHtml(task)}</h2><p>No run that is shown has a score (${escapeHtml(state.score)}).</p>`;
  const [[best, ours], second] = scores, rank = scores.slice(0, 6).map(([label, values]) => {
    const ci = values.length > 1 ? bootstrap(values) : null;
    return `<span>${dot(label)}${escapeHtml(short(label, 48))}</span><span><b>${number(middle(values))}</b>${ci ? ` <span class="soft">${number(ci[0])} to ${number(ci[1])}</span>` : ""} <span class="soft">· ${values.length} seed${values.length > 1 ? "s" : ""}</span></span>`;
  }).join("");
  let line = "";
  if (second) {
    const theirs = second[1], [p, low, high] = improvement([ours], [theirs]);
    const odds = `a run of it beats one of ${escapeHtml(short(second[0], 48))} with probability ${p.toFixed(2)} (${low.toFixed(2)} to ${high.toFixed(2)})`;
    const chance = Math.min(1, 2 / choose(ours.length + theirs.length, ours.length));
    if (Math.min(ours.length, theirs.length) < DATA.few) {
      line = `<p class="few"><b>Ahead, but not sure.</b> ${odds[0].toUpperCase() + odds.slice(1)}; with ${ours.length} and ${theirs.length} seeds even the clearest order comes by chance in ${Math.round(100 * chance)} % of cases. Fewer than ${DATA.few} seeds: train more.</p>`;
    } else if (low > .5) line = `<p><b>Clear:</b> ${odds}.</p>`;
    else line = `<p><b>Not told apart</b> from the second: ${odds}.</p>`;
  } else if (ours.length < DATA.few) line = `<p class="few">Fewer than ${DATA.few} seeds.</p>`;
  return `<div class="soft">${escapeHtml(task)} · ${escapeHtml(state.score)}</div><div class="best">${dot(best)}${escapeHtml(best)}</div><div class="rank">${rank}</div>${scores.length > 6 ? `<p class="soft">and ${scores.length - 6} more</p>` : ""}${line}`;
}

function drawSettings() {
  const labels = new Map();
  for (const i of shown()) labels.set(labelOf(i), [...labels.get(labelOf(i)) ?? [], i]);
  const plain = v => /^-?\d+\.\d{6,}(e-?\d+)?$/.test(v) ? String(Number(Number(v).toPrecision(5))) : v;
  const rows = DATA.settings.map(key => [key, [...labels.values()].map(runs => [...new Set(runs.map(i => plain(RUNS[i].fields[key])))].join(", "))]).filter(([, cells]) => new Set(cells).size > 1);
  $("settings-card").hidden = !rows.length;
  const table = rows => `<table><tr><th>setting</th>${[...labels.keys()].map(l => `<th>${dot(l)}${escapeHtml(short(l))}</th>`).join("")}</tr>${rows.map(([key, cells]) => `<tr><td>${escapeHtml(key)}</td>${cells.map(c => `<td>${escapeHtml(short(c, 60))}</td>`).join("")}</tr>`).join("")}</table>`;
  const shared = rows.filter(([, cells]) => !cells.includes("-")), own = rows.filter(([, cells]) => cells.includes("-"));
  $("settings").innerHTML = (shared.length ? table(shared) : "")
    + (own.length ? `<details${shared.length ? "" : " open"}><summary>${own.length} settings that only some have</summary>${table(own)}</details>` : "");
}

function drawMedia() {
  const runs = shown().filter(i => RUNS[i].media.length), names = [...new Set(runs.flatMap(i => RUNS[i].media.map(m => m.name)))];
  const key = JSON.stringify([runs, state.by]);
  if ($("media").dataset.key === key) return; // a film that plays goes on
  $("media").dataset.key = key;
  $("media-card").hidden = !runs.length;
  $("media").innerHTML = names.map(name => `<div class="media">${runs.flatMap(i => RUNS[i].media.filter(m => m.name === name).map(m => `<figure>${m.kind === "video" ? `<video src="${m.source}" controls loop muted playsinline></video>` : `<img src="${m.source}" alt="${escapeHtml(name)}">`}<figcaption>${dot(labelOf(i))}${escapeHtml(`${labelOf(i)} · ${RUNS[i].task} · ${name}`)}</figcaption></figure>`)).join("")}</div>`).join("");
}

const COLUMNS = [
  ["run", i => RUNS[i].name], ["line", i => labelOf(i)], ["task", i => RUNS[i].task], ["seed", i => Number(RUNS[i].fields.seed), 1], ["state", i => RUNS[i].state],
  ["score", i => RUNS[i].scores[state.score], 1], ["steps", i => lastStep(i), 1], ["per s", i => RUNS[i].summary["speed/env_steps_per_s"] ?? RUNS[i].summary["speed/images_per_s"] ?? RUNS[i].summary["speed/updates_per_s"], 1],
  ["wall s", i => RUNS[i].summary.wall_s, 1], ["MB", i => RUNS[i].summary["memory/peak_mb"], 1],
];
const lastStep = i => { const x = axes[state.axis]?.[i]; return x ? x.reduce((a, b) => b > a ? b : a, -Infinity) : null; };

function drawRuns() {
  const [by, direction] = state.sort, value = COLUMNS.find(c => c[0] === by)[1], rows = filtered();
  const order = (a, b) => { const x = value(a), y = value(b); if (x == null || y == null) return (x == null) - (y == null); return direction * (typeof x === "number" ? x - y : String(x).localeCompare(String(y), "en", { numeric: true })); };
  rows.sort(order);
  const head = COLUMNS.map(([name, , n]) => `<th class="${n ? "number" : ""}" aria-sort="${name === by ? direction > 0 ? "ascending" : "descending" : "none"}"><button data-sort="${name}">${name}${name === by ? direction > 0 ? " ↑" : " ↓" : ""}</button></th>`).join("");
  $("runs").innerHTML = `<table><thead><tr><th></th>${head}</tr></thead><tbody>${rows.map(i => {
    const off = state.hidden.has(i) || state.labelsOff.has(labelOf(i));
    return `<tr class="${off ? "out" : ""}"><td><input type="checkbox" data-run="${i}" aria-label="show" ${off ? "" : "checked"}></td>${COLUMNS.map(([name, f, n]) => `<td class="${n ? "number" : name === "run" || name === "line" ? "name" : ""}"${name === "run" ? ` title="${escapeHtml(RUNS[i].path)}"` : ""}>${name === "line" ? dot(labelOf(i)) : ""}${n ? number(f(i)) : escapeHtml(f(i))}</td>`).join("")}</tr>`;
  }).join("")}</tbody></table>`;
}

function drawChips() {
  $("chips").innerHTML = allLabels().map(label => `<button class="chip" data-label="${escapeHtml(label)}" aria-pressed="${!state.labelsOff.has(label)}" title="${escapeHtml(label)}">${dot(label)}${escapeHtml(short(label, 60))}</button>`).join("");
}

// ---- together ----

let drawing = Promise.resolve();
function render() { // one after another: a metric may still be unpacking
  drawing = drawing.then(async () => {
    const tasks = grouped(), count = shown().length;
    $("about").textContent = `${count === RUNS.length ? count : `${count} of ${RUNS.length}`} run${RUNS.length > 1 ? "s" : ""} on ${[...tasks.keys()].join(", ") || "nothing"} · foveal ${DATA.version}, ${DATA.made}`;
    $("verdicts").innerHTML = [...tasks].map(([task, labels]) => `<div class="card">${verdict(task, labels)}</div>`).join("");
    drawChips();
    await drawCurves(tasks);
    await drawScores(tasks);
    await drawImprovement(tasks);
    await drawProfile(tasks);
    await drawSpeed();
    await drawParallel();
    await drawImportance();
    drawSettings();
    drawMedia();
    drawRuns();
    document.body.dataset.drawn = String(Number(document.body.dataset.drawn ?? 0) + 1);
  }).catch(error => { $("about").textContent = `This page failed: ${error.message}`; throw error; });
  return drawing;
}

function fill(id, values, text = v => v) {
  $(id).innerHTML = values.map(v => `<option value="${escapeHtml(v)}">${escapeHtml(text(v))}</option>`).join("");
  $(id).value = state[id];
  $(id).onchange = () => { state[id] = $(id).value; if (id === "by") state.labelsOff.clear(); if (id === "score") state.sort = ["score", lowerIsBetter(state.score) ? 1 : -1]; render(); };
}

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  $("theme").textContent = theme === "dark" ? "Light" : "Dark";
}

async function start() {
  const script = document.createElement("script");
  script.textContent = new TextDecoder().decode(await unpack($("plotly").textContent));
  document.head.append(script);
  fill("metric", Object.keys(DATA.metrics));
  fill("axis", Object.keys(DATA.axes), axis => DATA.axis_texts[axis] ?? axis);
  fill("by", Object.keys(DATA.groupings), by => by === "chosen" ? "as chosen" : by);
  fill("score", DATA.scores);
  fill("statistic", ["mean", "iqm"], s => s === "iqm" ? "IQM" : s);
  let waiting;
  const soon = () => { clearTimeout(waiting); waiting = setTimeout(render, 120); };
  $("smoothing").oninput = () => { state.smoothing = Number($("smoothing").value); soon(); };
  $("filter").oninput = () => { state.filter = $("filter").value; soon(); };
  $("theme").onclick = () => { setTheme(document.documentElement.dataset.theme === "dark" ? "light" : "dark"); render(); };
  const toggle = (set, value) => { set.has(value) ? set.delete(value) : set.add(value); render(); };
  $("chips").onclick = event => { const chip = event.target.closest("[data-label]"); if (chip) toggle(state.labelsOff, chip.dataset.label); };
  $("runs").onclick = event => {
    const sort = event.target.dataset.sort, run = event.target.dataset.run;
    if (sort) { state.sort = [sort, state.sort[0] === sort ? -state.sort[1] : 1]; drawRuns(); }
    if (run) {
      const label = labelOf(Number(run));
      if (!state.labelsOff.has(label)) return toggle(state.hidden, Number(run));
      state.labelsOff.delete(label); // its line was off: only this run comes back
      RUNS.forEach((_, i) => { if (labelOf(i) === label) i === Number(run) ? state.hidden.delete(i) : state.hidden.add(i); });
      render();
    }
  };
  const out = [...DATA.damaged.map(([path, reason]) => `Skipped, damaged: ${path}: ${reason}`), ...DATA.left_out.map(line => `Not in this page: ${line}`)];
  $("footer").innerHTML = `<p>Intervals are 95 % percentile bootstraps over seeds; IQM, probability of improvement and profiles as in Agarwal et al. 2021 (arXiv:2108.13264).</p>${out.map(line => `<p>${escapeHtml(line)}</p>`).join("")}`;
  await render();
}

setTheme(matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
if (typeof DecompressionStream === "undefined") $("about").textContent = "This page needs a browser of 2023 or newer (DecompressionStream).";
else start();
