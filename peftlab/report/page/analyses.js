"use strict";
// Answers of `peftlab analyze`: each a table, its notes and figures. Texts are shown as texts.

const LABEL = { wide: 26, narrow: 12 }; // characters of a tick's label
let analysesOf = null; // the board whose analyses are drawn

const isText = (cell) => typeof cell === "string";
const cellText = (cell) => (cell === null ? "-" : isText(cell) ? cell
  : Number.isInteger(cell) ? count(cell) : number(cell));
const columnTexts = (rows, columns) =>
  columns.map((_, n) => rows.some((row) => isText(row[n])));

/** Put the analyses of the board shown on the page, once per board; `draw` draws their figures. */
function drawAnalyses(view) {
  if (analysesOf === view.number) return;
  analysesOf = view.number;
  for (const id of Object.keys(figures).filter((key) => key.startsWith("analysis-"))) {
    Plotly.purge(figures[id].plot);
    delete figures[id];
  }
  const { analyses } = view.board;
  byId("analyses").hidden = !analyses.length;
  byId("analyses-body").replaceChildren(...analyses.map(analysisPart));
  analyses.forEach((analysis, n) => analysis.figures.forEach((figure, m) => {
    addFigure(`analysis-${n}-${m}`, {
      place: `figures-analysis-${n}`, title: figure.title,
      build: () => builtFigure(figure, analysis.figures),
    });
  }));
}

function analysisPart(analysis, n) {
  const title = element("h3", { id: `h-analysis-${n}` }, `${analysis.question}: ${analysis.title}`);
  const table = element("table");
  const head = analysis.columns.map(({ name, unit }) => (unit ? `${name} (${unit})` : name));
  fillTable(table, head, analysis.rows.map((row) => row.map(cellText)),
    columnTexts(analysis.rows, analysis.columns));
  const links = analysis.runs.flatMap((run) => [" ", runLink(run, runs.name[run])]);
  return element("section", { class: "analysis", "aria-labelledby": `h-analysis-${n}` }, title,
    element("p", { class: "muted" }, "Runs:", ...links),
    element("div", { class: "scroll", tabindex: 0, role: "region",
      "aria-labelledby": `h-analysis-${n}` }, table),
    element("ul", { class: "muted" }, ...analysis.notes.map((note) => element("li", {}, note))),
    element("div", { class: "figures two", id: `figures-analysis-${n}` }));
}

/** An axis; the labels of categories are cut, their names stay whole. */
function analysisAxis({ title, type }, values) {
  if (type !== "category") {
    return axis(plain(title), type === "log" ? { type, dtick: 1, tickformat: ",~g" } : { type });
  }
  const most = narrow() ? LABEL.narrow : LABEL.wide;
  const names = unique(values.map(String));
  const cut = (name) => (name.length > most ? `${name.slice(0, most - 1)}…` : name);
  return axis(plain(title), { type, tickmode: "array", tickvals: names.map(plain),
    ticktext: names.map((name) => plain(cut(name))) });
}

/** The range of all maps of one analysis that show the same: one colour, one number. */
function colourRange(name, all) {
  const maps = all.flatMap(({ traces }) => traces)
    .filter((trace) => trace.type === "heatmap" && trace.name === name);
  const cells = maps.flatMap(({ z }) => z.flat()).filter((cell) => cell !== null);
  return { zmin: Math.min(...cells), zmax: Math.max(...cells) };
}

const LEGEND_LINE = 19; // pixels

/** The height of a figure with a legend above: the plot keeps its own however many names there are. */
function heightWith(names) {
  const perLine = narrow() ? 1 : 4;
  return 380 + LEGEND_LINE * Math.max(0, Math.ceil(names / perLine) - 2);
}

function builtFigure(figure, all) {
  const values = (key) => figure.traces.flatMap((trace) => trace[key]);
  const kept = (axisOf, cells) =>
    cells.map((cell) => (axisOf.type === "category" ? plain(cell) : cell));
  // one colour, one name: in all figures of an analysis
  const names = unique(all.flatMap((other) => other.traces.map(({ name }) => name)));
  const traces = figure.traces.map((trace) => {
    const { colour, symbol } = look(names.indexOf(trace.name));
    const shared = { type: trace.type, name: plain(trace.name), x: kept(figure.x, trace.x),
      y: kept(figure.y, trace.y) };
    if (trace.type === "heatmap") {
      const cells = trace.x.length * trace.y.length;
      return { ...shared, z: trace.z, colorscale: "Viridis", hoverongaps: false, xgap: 1, ygap: 1,
        ...colourRange(trace.name, all), texttemplate: cells <= 80 ? "%{z:.2~f}" : "",
        colorbar: { title: { text: plain(trace.name), side: "right" }, thickness: 12 },
        hovertemplate: "%{x}, %{y}<br>%{z:.4~g}<extra></extra>" };
    }
    const looks = trace.type === "bar" ? { marker: { color: colour } }
      : { mode: trace.mode, line: { color: colour }, marker: { color: colour, symbol, size: 8 } };
    return { ...shared, ...looks, hovertemplate: "%{x}: %{y:.4~g}<extra>%{fullData.name}</extra>" };
  });
  const maps = figure.traces.filter((trace) => trace.type === "heatmap");
  const named = !maps.length;
  return {
    traces,
    layout: layout(analysisAxis(figure.x, values("x")), analysisAxis(figure.y, values("y")),
      { showlegend: named, legend: LEGEND, barmode: "group",
        ...(named ? { height: heightWith(figure.traces.length) } : {}) }),
    caption: figure.caption,
    head: maps.length ? [`${figure.y.title || "Row"}`, ...maps[0].x.map(String)]
      : ["Name", figure.x.title || "x", figure.y.title || "y"],
    rows: maps.length
      ? maps[0].z.map((row, n) => [cellText(maps[0].y[n]), ...row.map(cellText)])
      : figure.traces.flatMap((trace) =>
        trace.x.map((x, n) => [trace.name, cellText(x), cellText(trace.y[n] ?? null)])),
  };
}
