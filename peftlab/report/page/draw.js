"use strict";
// How figures look: signs of the methods, light and dark, tables beside them.

// Okabe and Ito's palette, which colour-blind readers tell apart; grey for its yellow and black,
// which are lost on a white or on a dark page.
const COLOURS = ["#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9", "#8A8F98"];
const BLUE = COLOURS[0];
const ORANGE = COLOURS[1];
const SIGNS = { // plotly's name of a symbol -> the same in a square of 16
  circle: "M8 2a6 6 0 1 0 .01 0z",
  square: "M3 3h10v10h-10z",
  diamond: "M8 1l7 7-7 7-7-7z",
  "triangle-up": "M8 2l7 12h-14z",
  cross: "M6 1h4v5h5v4h-5v5h-4v-5h-5v-4h5z",
  "triangle-down": "M8 14l7-12h-14z",
  x: "M4 1l4 4 4-4 3 3-4 4 4 4-3 3-4-4-4 4-3-3 4-4-4-4z",
  star: "M8 1l2 5h5l-4 3 2 6-5-4-5 4 2-6-4-3h5z",
};
const SYMBOLS = Object.keys(SIGNS);

/** Colour and sign of a method: one pair each for the first 56, neighbours differ in both. */
function look(method) {
  const colour = method % COLOURS.length;
  const round = Math.floor(method / COLOURS.length);
  return { colour: COLOURS[colour], symbol: SYMBOLS[(colour + round) % SYMBOLS.length] };
}

function sign(method) {
  const { colour, symbol } = look(method);
  const name = "http://www.w3.org/2000/svg";
  const svg = document.createElementNS(name, "svg");
  svg.setAttribute("class", "sign");
  svg.setAttribute("viewBox", "0 0 16 16");
  svg.setAttribute("aria-hidden", "true");
  const path = document.createElementNS(name, "path");
  path.setAttribute("d", SIGNS[symbol]);
  path.setAttribute("fill", colour);
  svg.append(path);
  return svg;
}

const themed = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const narrow = () => window.innerWidth < 600;

/** A text that plotly shows as it is: plotly reads tags in the texts it is given. */
const plain = (text) =>
  String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");

function axis(title, more = {}) {
  return {
    title: { text: title, standoff: 8 }, automargin: true, zeroline: false,
    gridcolor: themed("--grid"), linecolor: themed("--line"), showline: true,
    ticks: "outside", tickcolor: themed("--line"), ...more,
  };
}

/** A logarithmic axis: at most one tick with a label per decade. */
const logAxis = (title, more = {}) => axis(title, { type: "log", dtick: 1, ...more });

function layout(x, y, more = {}) {
  return {
    xaxis: x, yaxis: y, showlegend: false, hovermode: "closest",
    height: 380, margin: { l: 56, r: 18, t: 14, b: 48 },
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: { color: themed("--fg"), size: 12, family: "system-ui, 'DejaVu Sans', sans-serif" },
    hoverlabel: {
      bgcolor: themed("--panel"), bordercolor: themed("--line"),
      font: { color: themed("--fg") }, align: "left",
    },
    modebar: { bgcolor: "rgba(0,0,0,0)", color: themed("--muted"), activecolor: themed("--fg") },
    dragmode: matchMedia("(pointer: coarse)").matches ? false : "zoom",
    ...more,
  };
}

const LEGEND = { orientation: "h", y: 1.02, yanchor: "bottom" }; // above the plot

const CONFIG = {
  responsive: true, displaylogo: false,
  displayModeBar: matchMedia("(hover: hover)").matches ? "hover" : false,
  modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"],
};

// A figure is { place, title, build(view) }; build returns { empty } or { traces, layout, caption,
// head, rows }, the last two being the same numbers as a table. `after` sees the plot drawn.
const figures = {};

function addFigure(id, figure) {
  const plot = element("div", { class: "plot", id: `plot-${id}`, role: "img" });
  const caption = element("p");
  const table = element("table");
  const details = element("details", {}, element("summary", {}, "The numbers of this figure"),
    element("div", { class: "scroll", tabindex: 0, role: "region",
      "aria-label": `Table: ${figure.title}` }, table));
  const empty = element("p", { class: "empty" });
  const whole = element("figure", { id: `figure-${id}` },
    element("figcaption", {}, element("h3", {}, figure.title), caption), empty, plot, details);
  byId(figure.place).append(whole);
  figures[id] = { ...figure, id, plot, caption, table, details, empty };
  details.addEventListener("toggle", () => fillNumbers(figures[id]));
}

function drawFigure(figure, view) {
  const built = figure.build(view);
  const missing = built.empty !== undefined;
  figure.empty.hidden = !missing;
  figure.plot.hidden = figure.details.hidden = missing;
  figure.caption.textContent = missing ? "" : built.caption;
  figure.empty.textContent = missing ? built.empty : "";
  figure.built = missing ? null : built;
  if (missing) {
    Plotly.purge(figure.plot);
    return;
  }
  figure.plot.setAttribute("aria-label",
    `${figure.title}. ${built.caption} The same numbers are in the table below.`);
  Plotly.react(figure.plot, built.traces, built.layout, CONFIG);
  fillNumbers(figure);
  if (figure.after) figure.after(figure);
}

function fillNumbers(figure) {
  if (figure.built && figure.details.open) fillTable(figure.table, figure.built.head, figure.built.rows);
}

const TABLE_ROWS = 500; // of the numbers of a figure; all runs have a table of their own

/** Fill a table; the first cell names its row. isText: of which columns; without, of those whose
 *  heading starts with a capital. */
function fillTable(table, head, rows, isText = head.map((title) => /^[A-Z]/.test(title))) {
  const headings = head.map((title, n) =>
    element("th", { scope: "col", class: isText[n] ? "text" : null }, title));
  const lines = rows.slice(0, TABLE_ROWS).map((row) => element("tr", row.attributes || {},
    ...row.map((cell, n) => (n === 0
      ? element("th", { scope: "row" }, cell)
      : element("td", { class: isText[n] ? "text" : null }, cell)))));
  table.replaceChildren(element("thead", {}, element("tr", {}, ...headings)),
    element("tbody", {}, ...lines));
  if (rows.length > TABLE_ROWS) {
    table.prepend(element("caption", {}, `The first ${TABLE_ROWS} of ${count(rows.length)}.`));
  }
}
