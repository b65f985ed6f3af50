"use strict";
// What is shown: the state of the selectors, its place in the URL, and what follows from it.

const data = JSON.parse(document.getElementById("data").textContent);
const runs = data.runs;
const state = { model: null, data: null, show: "best", off: new Set(), run: null, study: null };

const byId = (id) => document.getElementById(id);

/** An element with attributes and children; texts become texts, never HTML. */
function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else if (value !== null && value !== false) made.setAttribute(key, value === true ? "" : value);
  }
  made.append(...children);
  return made;
}

/** The folder of a run: the name by which links know it. */
const runName = (run) => `${data.folders[runs.folder[run]]}/${runs.name[run]}`;

const unique = (values) => [...new Set(values)];
const modelNames = () => unique(data.boards.map((board) => board.model));
const dataNames = (model) => data.boards.filter((b) => b.model === model).map((b) => b.data);
const boardNumber = () =>
  data.boards.findIndex((board) => board.model === state.model && board.data === state.data);

/** The methods of a board, in the order of their best losses; those without one come last. */
function methodsOf(number) {
  const board = data.boards[number];
  const ranked = board.best.map((best) => best.method);
  const others = unique(runs.method.filter((_, run) => runs.board[run] === number));
  return unique([...ranked, ...others.sort((a, b) => a - b)]);
}

/** What the selectors leave: the board, the methods and runs that are to be seen. */
function currentView() {
  const number = boardNumber();
  const board = data.boards[number];
  const methods = methodsOf(number);
  const shown = new Set(methods.filter((method) => !state.off.has(data.methods[method])));
  const all = runs.method.map((_, run) => run)
    .filter((run) => runs.board[run] === number && shown.has(runs.method[run]));
  return {
    number, board, methods, shown, runs: all,
    best: board.best.filter((best) => shown.has(best.method)),
    study: board.studies.find((study) => study.name === state.study) || bestStudy(board),
  };
}

/** The study with the lowest train loss; null without studies. */
function bestStudy(board) {
  const lowest = (study) => Math.min(...study.losses.map((loss) => loss ?? Infinity));
  return board.studies.reduce((best, study) =>
    (best === null || lowest(study) < lowest(best) ? study : best), null);
}

function hashOf() {
  const words = new URLSearchParams();
  words.set("model", state.model);
  words.set("data", state.data);
  if (state.show !== "best") words.set("show", state.show);
  for (const label of [...state.off].sort()) words.append("off", label);
  if (state.run !== null) words.set("run", runName(state.run));
  if (state.study !== null) words.set("study", state.study);
  return `#${words}`;
}

/** Take the state from the URL; what it names and is not there falls back to the first there is. */
function readHash() {
  const words = new URLSearchParams(location.hash.slice(1));
  const choose = (wanted, names) => (names.includes(wanted) ? wanted : names[0]);
  state.model = choose(words.get("model"), modelNames());
  state.data = choose(words.get("data"), dataNames(state.model));
  state.show = words.get("show") === "all" ? "all" : "best";
  state.off = new Set(words.getAll("off"));
  const number = boardNumber();
  const wanted = words.get("run");
  const found = wanted === null ? -1
    : runs.board.findIndex((b, run) => b === number && runName(run) === wanted);
  state.run = found < 0 ? null : found;
  state.study = words.get("study");
}

// Formats ----------------------------------------------------------------------------------------

const MISSING = "?";
const known = (value, format) => (value === null || value === undefined ? MISSING : format(value));
const bits = (value) => known(value, (v) => v.toFixed(3));
const measure = ([mean, spread]) =>
  spread === null ? bits(mean) : `${bits(mean)} ± ${bits(spread)}`;
const count = (value) => known(value, (v) => v.toLocaleString("en"));
const some = (n, things) => `${count(n)} ${things}${n === 1 ? "" : "s"}`;
const number = (value) =>
  known(value, (v) => (v !== 0 && (Math.abs(v) < 1e-3 || Math.abs(v) >= 1e5)
    ? v.toExponential(2).replace(/\.?0+e/, "e") : String(Number(v.toPrecision(4)))));
function inUnits(value, units) {
  const [unit, length] = units.find(([, l]) => value >= l) || units[units.length - 1];
  return `${Number((value / length).toPrecision(3))} ${unit}`;
}
const BYTES = [["GiB", 2 ** 30], ["MiB", 2 ** 20], ["KiB", 2 ** 10], ["B", 1]];
const bytes = (value) => known(value, (v) => inUnits(v, BYTES));
function seconds(value) {
  if (value >= 7200) return `${Number((value / 3600).toPrecision(3))} h`;
  if (value >= 120) return `${Number((value / 60).toPrecision(3))} min`;
  return known(value, (v) => `${Number(v.toPrecision(3))} s`);
}
