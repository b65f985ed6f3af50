"use strict";
// Figures 1 to 3: train and test loss against size and against each other, linked.

/** The points of the three figures, one list per method: the same in all three. */
function points(view) {
  const groups = view.methods.filter((m) => view.shown.has(m)).map((method) => {
    if (state.show === "best") {
      return [method, view.best.filter((best) => best.method === method).map((best) => ({
        method, run: best.runs[0], params: best.params, seeds: best.runs.length,
        train: best.train[0], test: best.test[0],
        trainSpread: best.train[1], testSpread: best.test[1],
      }))];
    }
    return [method, view.runs.filter((run) => runs.method[run] === method && runs.train[run] !== null)
      .map((run) => ({
        method, run, params: runs.params[run], seeds: 1, train: runs.train[run],
        test: runs.test[run], trainSpread: null, testSpread: null,
      }))];
  });
  return groups.filter(([, list]) => list.length > 0);
}

/** The Pareto front of points [x, y], both better when lower: their numbers, x ascending. */
function paretoFront(xs, ys) {
  const order = xs.map((_, n) => n).sort((a, b) => xs[a] - xs[b] || ys[a] - ys[b]);
  let lowest = Infinity;
  return order.filter((n) => {
    const better = ys[n] < lowest;
    lowest = Math.min(lowest, ys[n]);
    return better;
  });
}

const NAMES = {
  params: "trainable parameters", train: "train loss, bits per token", test: "test loss, bits per token",
};

function hoverText(point) {
  const { run } = point;
  const lines = [
    `<b>${plain(data.methods[point.method])}</b>`,
    `train ${measure([point.train, point.trainSpread])}, test ${measure([point.test, point.testSpread])}`,
    `${count(point.params)} parameters, lr ${number(runs.lr[run])}` +
      (runs.gamma[run] === null ? "" : `, γ ${number(runs.gamma[run])}`),
    point.seeds > 1 ? `mean of ${point.seeds} seeds` : `seed ${runs.seed[run]}`,
  ];
  return lines.join("<br>");
}

function lossFigure(x, y) {
  return (view) => {
    const groups = points(view);
    if (!groups.length) return { empty: "No completed run of the methods shown." };
    const spread = (list, key) => (key === "params" || state.show === "all" ? undefined : {
      type: "data", array: list.map((p) => p[`${key}Spread`] || 0), thickness: 1, width: 3,
    });
    const traces = groups.map(([method, list]) => {
      const { colour, symbol } = look(method);
      return {
        type: "scatter", mode: "markers", name: plain(data.methods[method]),
        x: list.map((p) => p[x]), y: list.map((p) => p[y]), customdata: list.map((p) => p.run),
        error_x: spread(list, x), error_y: spread(list, y),
        text: list.map(hoverText), hovertemplate: "%{text}<extra></extra>",
        marker: {
          color: colour, symbol, size: state.show === "best" ? 11 : 7,
          line: { color: themed("--bg"), width: state.show === "best" ? 1 : 0.4 },
          opacity: state.show === "best" ? 1 : 0.75,
        },
      };
    });
    const all = groups.flatMap(([, list]) => list);
    const front = paretoFront(all.map((p) => p[x]), all.map((p) => p[y])).map((n) => all[n]);
    traces.push({
      type: "scatter", mode: "lines", name: "Pareto front", hoverinfo: "skip",
      x: front.map((p) => p[x]), y: front.map((p) => p[y]),
      line: { color: themed("--fg"), width: 1.2, shape: "hv", dash: "dot" },
    });
    const base = view.board.base;
    const top = base && (y === "train" ? base[0] : base[1]);
    const outside = all.filter((p) => top && p[y] > 1.05 * top).length;
    const xAxis = x === "params" ? logAxis(NAMES[x]) : axis(NAMES[x]);
    const yAxis = axis(NAMES[y]);
    if (outside && outside < all.length) {
      const lowest = Math.min(...all.map((p) => p[y]));
      yAxis.range = [lowest - 0.09 * (top - lowest), 1.05 * top];
    }
    const lead = front.slice().sort((a, b) => a[y] - b[y])[0];
    const caption = [
      `${some(all.length, state.show === "best" ? "method" : "run")}; lower is better on both axes.`,
      `Lowest: ${data.methods[lead.method]}, ${bits(lead[y])}.`,
      base ? `Frozen model: ${bits(y === "train" ? base[0] : base[1])}.` : "",
      outside ? `${outside} worse than the frozen model lie above the frame.` : "",
    ];
    return {
      traces,
      layout: layout(xAxis, yAxis, { annotations: labels(front, all, x, y) }),
      caption: caption.filter(Boolean).join(" "),
      head: ["Method", NAMES[x], NAMES[y], "On the front"],
      rows: all.slice().sort((a, b) => a[y] - b[y]).map((p) => [
        runLink(p.run, data.methods[p.method]),
        x === "params" ? count(p.params) : bits(p[x]), bits(p[y]), front.includes(p) ? "yes" : "",
      ]),
    };
  };
}

/**
 * Names of the front's points. They stand below it, where by definition no other point is; one that
 * would lie on another is left out. Sizes are in pixels, about.
 */
function labels(front, all, x, y) {
  if (all.length < 2) return [];
  const place = (key) => (key === "params" ? (p) => Math.log10(p.params) : (p) => p[key]);
  const scale = (key, pixels) => {
    const values = all.map(place(key));
    const low = Math.min(...values);
    const span = Math.max(...values) - low || 1;
    return (p) => pixels * (place(key)(p) - low) / span;
  };
  const [across, up] = [scale(x, narrow() ? 220 : 300), scale(y, 270)];
  const placed = [];
  for (const p of front) {
    const text = data.methods[p.method];
    const [at, width] = [across(p), 6 * text.length];
    const anchor = at - width < -30 ? "left" : "right"; // it would begin left of the figure
    const left = anchor === "left" ? at : at - width;
    const box = { left, right: left + width, y: up(p), p, text, anchor };
    const free = placed.every((other) =>
      Math.abs(other.y - box.y) > 13 || other.left > box.right || other.right < box.left);
    if (free) placed.push(box);
  }
  return placed.map(({ p, text, anchor }) => ({
    x: place(x)(p), y: p[y], text: plain(text), showarrow: false, yanchor: "top", yshift: -4,
    xanchor: anchor, xshift: anchor === "left" ? 0 : -4,
    font: { size: 10, color: themed("--muted") },
  }));
}

const LINKED = ["train-params", "test-params", "test-train"];

/** Pointing at a point marks the same one in the other figures; a click shows its run. */
function link(figure) {
  if (figure.linked) return;
  figure.linked = true;
  const others = () => LINKED.filter((id) => id !== figure.id).map((id) => figures[id].plot);
  figure.plot.on("plotly_hover", (event) => {
    const { curveNumber, pointNumber } = event.points[0];
    for (const plot of others()) Plotly.Fx.hover(plot, [{ curveNumber, pointNumber }]);
  });
  figure.plot.on("plotly_unhover", () => others().forEach((plot) => Plotly.Fx.unhover(plot)));
  figure.plot.on("plotly_click", (event) => {
    const run = event.points[0].customdata;
    if (run !== undefined) showRun(run);
  });
}

addFigure("train-params", {
  place: "figures-losses", title: "Train loss and size", build: lossFigure("params", "train"), after: link,
});
addFigure("test-params", {
  place: "figures-losses", title: "Test loss and size", build: lossFigure("params", "test"), after: link,
});
addFigure("test-train", {
  place: "figures-losses", title: "Train and test loss", build: lossFigure("train", "test"), after: link,
});
