"use strict";
// Figures 4 to 7: the boost γ, tuning curves, good learning rates, the five axes, one study.

const LOSS = "train loss, bits per token";
const BANDS = 6; // methods whose bands can be told from each other
const HALF = 2; // bins per decade

/** Mean train loss of each setting over its completed runs: luck with a seed counts less. */
function settingMeans(view) {
  const groups = new Map();
  for (const run of view.runs) {
    if (runs.train[run] === null) continue;
    const key = `${runs.method[run]}/${runs.setting[run]}`;
    if (!groups.has(key)) groups.set(key, { run, losses: [] });
    groups.get(key).losses.push(runs.train[run]);
  }
  return [...groups.values()].map(({ run, losses }) =>
    ({ run, loss: losses.reduce((sum, loss) => sum + loss, 0) / losses.length }));
}

const bin = (value) => Math.floor(Math.log10(value) * HALF + 1e-9);
function binName(n) {
  const edge = (m) => inUnits(10 ** (m / HALF), [["M", 1e6], ["k", 1e3], ["", 1]]).trim();
  return `${edge(n)}–${edge(n + 1)}`;
}
// 3e-4 and 1e-3 of a usual grid are neighbours
const near = (value) => Math.round(Math.log10(value) * HALF);
const nearName = (n) => number(Number((10 ** (n / HALF)).toPrecision(1)));

addFigure("gamma-bars", {
  place: "figures-gamma", title: "Best loss at γ = 1 and above",
  build(view) {
    const means = settingMeans(view).filter(({ run }) => runs.gamma[run] >= 1);
    if (!means.length) return { empty: "No completed run of the methods shown has a boost γ." };
    const lowest = new Map();
    for (const { run, loss } of means) {
      const key = bin(runs.params[run]);
      const pair = lowest.get(key) || [null, null];
      const side = runs.gamma[run] > 1 ? 1 : 0;
      if (pair[side] === null || loss < pair[side]) pair[side] = loss;
      lowest.set(key, pair);
    }
    const bins = [...lowest.keys()].sort((a, b) => a - b);
    const traces = ["γ = 1", "γ > 1"].map((name, side) => ({
      type: "bar", name, x: bins.map(binName), y: bins.map((key) => lowest.get(key)[side]),
      text: bins.map((key) => (lowest.get(key)[side] === null ? "" : bits(lowest.get(key)[side]))),
      textposition: "outside", cliponaxis: false,
      marker: { color: side ? ORANGE : BLUE, pattern: { shape: side ? "/" : "", fillmode: "overlay" } },
      hovertemplate: "%{x} parameters<br>%{y:.3f}<extra>%{fullData.name}</extra>",
    }));
    const more = { showlegend: true, legend: LEGEND, barmode: "group" };
    return {
      traces,
      layout: layout(axis("trainable parameters", { type: "category" }), axis(LOSS), more),
      caption: "The lowest train loss of the methods shown that have a boost γ, per range of trainable " +
        "parameters (half a decade each); a bar is missing where nothing was tried.",
      head: ["Parameters", "γ = 1", "γ > 1"],
      rows: bins.map((key) => [binName(key), ...lowest.get(key).map(bits)]),
    };
  },
});

addFigure("gamma-map", {
  place: "figures-gamma", title: "Learning rate and γ",
  build(view) {
    const means = settingMeans(view).filter(({ run }) => runs.gamma[run] > 0 && runs.lr[run] > 0);
    if (!means.length) return { empty: "No completed run of the methods shown has a boost γ." };
    const range = (values) => {
      const bins = values.map(near);
      const low = Math.min(...bins);
      return Array.from({ length: Math.max(...bins) - low + 1 }, (_, n) => low + n);
    };
    const rates = range(means.map(({ run }) => runs.lr[run]));
    const boosts = range(means.map(({ run }) => runs.gamma[run]));
    const cells = boosts.map(() => rates.map(() => null));
    for (const { run, loss } of means) {
      const row = cells[near(runs.gamma[run]) - boosts[0]];
      const column = near(runs.lr[run]) - rates[0];
      if (row[column] === null || loss < row[column]) row[column] = loss;
    }
    const x = rates.map(nearName);
    const y = boosts.map(nearName);
    return {
      traces: [{
        type: "heatmap", x, y, z: cells, colorscale: "Viridis", reversescale: true, hoverongaps: false,
        xgap: 1, ygap: 1, texttemplate: rates.length * boosts.length <= 80 ? "%{z:.2f}" : "",
        colorbar: { title: { text: "bits per token", side: "right" }, thickness: 12 },
        hovertemplate: "lr %{x}, γ %{y}<br>%{z:.3f} bits per token<extra></extra>",
      }],
      layout: layout(axis("learning rate", { type: "category" }),
        axis("γ", { type: "category" })),
      caption: "The lowest train loss of the methods shown, learning rate and γ rounded to half a " +
        "decade; empty cells were not tried.",
      head: ["γ", ...x.map((name) => `lr ${name}`)],
      rows: y.map((name, n) => [name, ...cells[n].map((z) => (z === null ? "" : bits(z)))]),
    };
  },
});

addFigure("tuning", {
  place: "figures-tuning", title: "Best loss against the number of trials",
  build(view) {
    const curves = view.board.tuning.filter((curve) => view.shown.has(curve.method));
    if (!curves.length) return { empty: "No completed run of the methods shown." };
    const most = Math.max(...curves.map((curve) => curve.trials.at(-1)));
    if (most < 2) return { empty: "Every method shown was tried with one setting only." };
    const banded = curves.length <= BANDS;
    const traces = curves.flatMap((curve) => {
      const { colour, symbol } = look(curve.method);
      const name = plain(data.methods[curve.method]);
      const side = (y, fill) => ({
        type: "scatter", mode: "lines", x: curve.trials, y, line: { width: 0, shape: "hv" },
        fill, fillcolor: `${colour}26`, hoverinfo: "skip",
      });
      const line = {
        type: "scatter", mode: "lines+markers", name, x: curve.trials, y: curve.line,
        line: { color: colour, shape: "hv", width: 2 }, marker: { color: colour, symbol, size: 6 },
        hovertemplate: `<b>${name}</b><br>%{x} trials: %{y:.3f}<br>${plain(curve.line_is)}<extra></extra>`,
      };
      return banded ? [side(curve.high), side(curve.low, "tonexty"), line] : [line];
    });
    const lines = unique(curves.map((curve) => curve.line_is)).join("; or ");
    const bands = unique(curves.map((curve) => curve.band_is)).join("; or ");
    const x = axis("trials", most < 12 ? { dtick: 1 } : { rangemode: "tozero" });
    return {
      traces, layout: layout(x, axis(LOSS)),
      caption: "The best train loss that tuning had reached after so many trials: a method that needs few " +
        `is easy to tune. Line: ${lines}. ` +
        (banded ? `Band: ${bands}.` : `Bands are drawn while at most ${BANDS} methods are shown.`),
      head: ["Method", "trials", "best after 1", "after half", "after all", "Line and band"],
      rows: curves.map((curve) => {
        const last = curve.line.length - 1;
        return [data.methods[curve.method], count(curve.trials[last]), bits(curve.line[0]),
          bits(curve.line[Math.floor(last / 2)]), bits(curve.line[last]), `${curve.line_is}; ${curve.band_is}`];
      }),
    };
  },
});

addFigure("rates", {
  place: "figures-tuning", title: "How wide the good learning rates are",
  build(view) {
    const rates = view.board.rates.filter((rate) => view.shown.has(rate.method))
      .sort((a, b) => a.decades - b.decades);
    if (!rates.length) return { empty: "No method shown was tried at two learning rates." };
    const names = rates.map((rate) => plain(data.methods[rate.method]));
    const bars = (key, width, colours, name) => ({
      type: "scatter", mode: "lines", name, hoverinfo: "skip",
      x: rates.flatMap((rate) => [...rate[key], null]), y: names.flatMap((n) => [n, n, null]),
      line: { color: colours, width },
    });
    const best = {
      type: "scatter", mode: "markers", name: "best", x: rates.map((rate) => rate.best), y: names,
      marker: {
        color: rates.map((rate) => look(rate.method).colour), size: 11,
        symbol: rates.map((rate) => look(rate.method).symbol), line: { color: themed("--bg"), width: 1 },
      },
      text: rates.map((rate) => `good from ${number(rate.good[0])} to ${number(rate.good[1])}, ` +
        `${rate.decades.toFixed(1)} decades<br>best ${number(rate.best)}, ${rate.n_trials} trials`),
      hovertemplate: "<b>%{y}</b><br>%{text}<extra></extra>",
    };
    const share = Math.round(100 * (1 - data.good));
    return {
      traces: [bars("tried", 2, themed("--line"), "tried"), bars("good", 9, themed("--muted"), "good"), best],
      layout: layout(logAxis("learning rate", { exponentformat: "e" }), axis("", { type: "category" }),
        { height: Math.max(220, 90 + 26 * rates.length) }),
      caption: `Thin: learning rates tried. Thick: from the lowest to the highest that brings ${share} % of the ` +
        "best improvement over the frozen model, other settings free; trials that were not made could widen " +
        "it. Sign: the best.",
      head: ["Method", "good from", "to", "decades", "best", "tried from", "to", "trials"],
      rows: rates.slice().reverse().map((rate) => [data.methods[rate.method],
        ...rate.good.map(number), rate.decades.toFixed(2), number(rate.best),
        ...rate.tried.map(number), count(rate.n_trials)]),
    };
  },
});

const AXES = [
  { name: "accuracy", title: "train loss", of: (best) => best.train[0], show: bits },
  { name: "storage", title: "adapter file", of: (best) => best.storage, show: bytes, log: true },
  { name: "memory", title: "peak of training", of: (best) => best.memory, show: bytes, log: true },
  { name: "computation", title: "training time", of: (best) => best.seconds, show: seconds, log: true },
  { name: "inference", title: "kept beside the model", of: (best) => best.kept_bytes, show: bytes, log: true },
];

/** Lines over several scales: each scale is [title, values, texts], values from 0 to 1 or null. */
function parallel(titles, lines, more = {}) {
  const x = titles.map((_, n) => n);
  return {
    traces: lines.map((line) => ({ type: "scatter", x, connectgaps: false, ...line })),
    layout: layout(
      axis("", { tickvals: x, ticktext: titles, showgrid: true, tickangle: 0,
        tickfont: { size: narrow() ? 10 : 12 }, range: [-0.3, titles.length - 0.7] }),
      axis("", { showticklabels: false, showgrid: false, ticks: "", range: [-0.12, 1.12] }),
      { height: 420, margin: { l: 12, r: 18, t: 14, b: 60 }, ...more },
    ),
  };
}

/** Bring values to 0..1; null stays null. */
function scaled(values, log) {
  const there = values.filter((value) => value !== null);
  const change = (value) => (log ? Math.log10(value + 1) : value);
  const low = Math.min(...there.map(change));
  const high = Math.max(...there.map(change));
  return values.map((value) =>
    (value === null ? null : high > low ? (change(value) - low) / (high - low) : 0));
}

/** The lowest and highest value of each scale, written at its ends. */
function ends(columns) {
  return columns.flatMap(({ values, show }, n) => {
    const there = values.filter((value) => value !== null);
    if (!there.length) return [];
    const edges = [[Math.min(...there), 0, "top"], [Math.max(...there), 1, "bottom"]];
    return edges.slice(0, edges[0][0] === edges[1][0] ? 1 : 2).map(([value, y, anchor]) => ({
      x: n, y, yanchor: anchor, yshift: y ? 6 : -6, text: plain(show(value)), showarrow: false,
      font: { size: 11, color: themed("--muted") },
    }));
  });
}

addFigure("axes", {
  place: "figures-axes", title: "Storage, memory, computation, accuracy, inference overhead",
  build(view) {
    if (!view.best.length) return { empty: "No completed run of the methods shown." };
    const columns = AXES.map((one) => {
      const values = view.best.map((best) => one.of(best) ?? null);
      return { ...one, values, heights: scaled(values, one.log) };
    });
    const lines = view.best.map((best, n) => {
      const { colour, symbol } = look(best.method);
      const name = plain(data.methods[best.method]);
      return {
        mode: "lines+markers", name, y: columns.map((column) => column.heights[n]),
        line: { color: colour, width: 1.6 }, marker: { color: colour, symbol, size: 9 },
        text: columns.map((column) => `${column.title}: ${column.show(column.values[n])}`),
        hovertemplate: `<b>${name}</b><br>%{text}<extra></extra>`,
      };
    });
    const titles = columns.map((column) =>
      (narrow() ? column.name : `<b>${column.name}</b><br>${column.title}`));
    return {
      ...parallel(titles, lines, { annotations: ends(columns) }),
      caption: "The best tuned run of each method on five scales, all logarithmic but the loss; lower is better " +
        "on each. Inference overhead is what stays beside the model after merging: nothing where the change " +
        "was written into the weights.",
      head: ["Method", "train loss", "test loss", "adapter file", "peak memory", "training time",
        "FLOPs per step", "kept at inference"],
      rows: view.best.map((best) => [data.methods[best.method], measure(best.train), measure(best.test),
        bytes(best.storage), bytes(best.memory), seconds(best.seconds),
        known(best.flops, (v) => v.toExponential(2)),
        best.kept_bytes === 0 ? "nothing" : bytes(best.kept_bytes)]),
    };
  },
});

const GROUPS = 7; // colours of trials, by rank
const isDark = () => matchMedia("(prefers-color-scheme: dark)").matches;
const VIRIDIS = ["#440154", "#443983", "#31688e", "#21918c", "#35b779", "#90d743", "#fde725"];

addFigure("trials", {
  place: "figures-study", title: "Trials",
  build(view) {
    if (!view.study) return { empty: "No study here varied a setting." };
    const { parameters, losses } = view.study;
    const columns = parameters.map((parameter) => {
      if (parameter.scale !== "category") {
        const values = parameter.values;
        return { title: parameter.name, values, show: number, heights: positions(values, parameter.scale) };
      }
      const names = unique(parameter.values.map(String)).sort();
      const places = parameter.values.map((value) => names.indexOf(String(value)));
      return { title: parameter.name, values: places, show: (n) => names[n], heights: scaled(places, false) };
    });
    columns.push({ title: "train loss", values: losses, show: bits, heights: scaled(losses, false) });
    const order = losses.map((_, n) => n)
      .sort((a, b) => (losses[a] ?? Infinity) - (losses[b] ?? Infinity));
    const rank = new Map(order.map((trial, place) => [trial, place]));
    const palette = isDark() ? VIRIDIS.slice().reverse() : VIRIDIS; // the best stands out
    const lines = palette.map((colour, group) => {
      const own = order.filter((trial) => Math.floor(rank.get(trial) * GROUPS / order.length) === group);
      const best = group === 0;
      return {
        mode: "lines+markers", line: { color: colour, width: best ? 2.5 : 1 },
        marker: { size: best ? 6 : 4, color: colour }, opacity: best ? 1 : 0.6,
        x: own.flatMap(() => [...columns.map((_, n) => n), null]),
        y: own.flatMap((trial) => [...columns.map((column) => column.heights[trial]), null]),
        text: own.flatMap((trial) => [...columns.map((c) =>
          `trial ${trial}, ${plain(c.title)}: ${plain(c.show(c.values[trial]))}`), ""]),
        hovertemplate: "%{text}<extra></extra>",
      };
    }).reverse();
    const titles = columns.map((column) => plain(column.title.replace(/^.*\./, "")));
    return {
      ...parallel(titles, lines, { annotations: ends(columns) }),
      caption: `${losses.length} trials, one line each, through its settings to its train loss. Thick: the best ` +
        "seventh; the fainter, the worse. A line that stops before the loss did not complete.",
      head: ["Trial", ...parameters.map((parameter) => parameter.name), LOSS],
      rows: order.map((trial) => [runLink(view.study.runs[trial], runs.name[view.study.runs[trial]]),
        ...parameters.map((p) => (p.scale === "category" ? String(p.values[trial]) : number(p.values[trial]))),
        losses[trial] === null ? runs.status[view.study.runs[trial]] : bits(losses[trial])]),
    };
  },
});

const positions = (values, scale) =>
  scaled(scale === "log" ? values.map((value) => Math.log10(value)) : values, false);

addFigure("importance", {
  place: "figures-study", title: "Which settings mattered",
  build(view) {
    if (!view.study) return { empty: "No study here varied a setting." };
    const importance = view.study.importance;
    if (importance === null) {
      return { empty: `Fewer than ${data.least_trials} trials have completed: too few to tell what mattered.` };
    }
    const names = Object.keys(importance).sort((a, b) => importance[a] - importance[b]);
    const shares = names.map((name) => importance[name]);
    return {
      traces: [{
        type: "bar", orientation: "h", x: shares, y: names.map(plain), marker: { color: BLUE },
        text: shares.map((share) => `${Math.round(100 * share)} %`), textposition: "auto",
        hovertemplate: "%{y}: %{x:.2f}<extra></extra>",
      }],
      layout: layout(axis("share", { range: [0, 1.02], tickformat: ".0%" }), axis("", { type: "category" }),
        { height: Math.max(220, 110 + 40 * names.length) }),
      caption: "How much each setting decides whether a trial is among the best tenth of the study (PED-ANOVA); " +
        "with few trials this is rough.",
      head: ["Setting", "share"],
      rows: names.slice().reverse().map((name) => [name, `${(100 * importance[name]).toFixed(1)} %`]),
    };
  },
});
