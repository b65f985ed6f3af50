"use strict";
// One run: its facts, its loss curves, its config and how to run it again. And the two tables.

function runLink(run, text) {
  return element("button", { type: "button", class: "link", "data-run": run, onclick: () => showRun(run) }, text);
}

/** Show a run and bring it into sight. */
function showRun(run) {
  state.run = run;
  saveState();
  drawRun(currentView());
  byId("run").scrollIntoView();
  byId("run").focus({ preventScroll: true });
}

/** The run that was chosen, or the best one of the best method shown. */
function runOf(view) {
  if (state.run !== null && runs.board[state.run] === view.number) return state.run;
  return view.best.length ? view.best[0].runs[0] : null;
}

function facts(run) {
  const status = runs.status[run];
  const base = data.boards[runs.board[run]].base;
  return [
    ["status", status],
    ["train, bits per token", bits(runs.train[run])],
    ["test, bits per token", bits(runs.test[run])],
    ["frozen model, train and test", base ? base.map(bits).join(", ") : MISSING],
    ["trainable parameters", count(runs.params[run])],
    ["learning rate", number(runs.lr[run])],
    ...(runs.gamma[run] === null ? [] : [["γ", number(runs.gamma[run])]]),
    ["seed", String(runs.seed[run])],
    ...(runs.trial[run] === null ? [] : [["trial", String(runs.trial[run])]]),
    ["merged", runs.merged[run]],
    ["training time", seconds(runs.seconds[run])],
    ["peak memory", bytes(runs.memory[run])],
  ];
}

/** Words of a shell: quoted where they hold more than plain characters. */
const quoted = (word) => (/^[\w@%+=:,./-]+$/.test(word) ? word : `'${word.replace(/'/g, "'\\''")}'`);

function commandBlock(title, command) {
  const text = element("pre", { tabindex: 0 }, command);
  const done = element("span", { class: "muted", role: "status" });
  const copy = element("button", { type: "button", onclick: async () => {
    try {
      await navigator.clipboard.writeText(command);
      done.textContent = "copied";
    } catch {
      getSelection().selectAllChildren(text);
      done.textContent = "selected: press Ctrl+C";
    }
  } }, "Copy");
  return [element("p", {}, title, " ", copy, " ", done), text];
}

function drawRun(view) {
  const body = byId("run-body");
  const old = byId("plot-run");
  if (old) Plotly.purge(old);
  const run = runOf(view);
  if (run === null) {
    body.replaceChildren(element("p", { class: "empty" }, "No completed run of the methods shown."));
    return;
  }
  const detail = data.details[run];
  const label = data.methods[runs.method[run]];
  const siblings = view.runs.filter((other) => other !== run &&
    runs.method[other] === runs.method[run] && runs.setting[other] === runs.setting[run]);
  const left = element("div", {},
    element("h3", {}, sign(runs.method[run]), " ", label),
    element("p", { class: "muted" }, runName(run)),
    element("table", {}, element("tbody", {}, ...facts(run).map(([name, value]) =>
      element("tr", {}, element("th", { scope: "row" }, name), element("td", {}, value))))));
  if (siblings.length) {
    const links = siblings.flatMap((other) => [" ", runLink(other, `seed ${runs.seed[other]}`)]);
    left.append(element("p", {}, "The same setting with:", ...links));
  }
  const right = element("div", {});
  body.replaceChildren(element("div", { class: "facts" }, left, right));
  if (!detail) {
    right.append(element("p", { class: "empty" },
      "Curve and config of this run were left out to keep the page small; they are in its folder."));
  } else {
    if (detail.error) right.append(element("p", { class: "notes" }, detail.error));
    right.append(element("div", { class: "plot", id: "plot-run", role: "img" }));
    drawCurves(detail, label);
    const config = detail.config.map(([key, value]) => `${data.keys[key]}: ${data.values[value]}`);
    body.append(element("details", {}, element("summary", {}, "Config"),
      element("pre", { tabindex: 0 }, config.join("\n"))));
  }
  if (runs.in_folder[run]) {
    body.append(...commandBlock("To run it again and compare every number, if it was completed:",
      `peftlab reproduce ${quoted(runName(run))}`));
  } else {
    body.append(element("p", { class: "muted" }, "Read from W&B's record, which has no command."));
  }
  if (detail && detail.command !== null) {
    const what = runs.trial[run] === null ? "It was run by:" : "The sweep that it is a trial of was run by:";
    body.append(...commandBlock(what, data.commands[detail.command]));
  }
}

function drawCurves(detail, label) {
  const plot = byId("plot-run");
  const { curves } = detail;
  if (!curves || !Object.keys(curves).length) {
    plot.replaceWith(element("p", { class: "empty" }, "This run's rows.jsonl is not there or not readable."));
    return;
  }
  const kinds = [
    ["step", "each step, before its update", { mode: "lines", line: { color: themed("--muted"), width: 1 } }],
    ["train", "train split", { mode: "lines+markers", line: { color: BLUE }, marker: { symbol: "circle", size: 9 } }],
    ["test", "test split", { mode: "lines+markers", line: { color: ORANGE, dash: "dash" },
      marker: { symbol: "diamond", size: 9 } }],
  ].filter(([key]) => curves[key]);
  const traces = kinds.map(([key, name, style]) => ({
    type: "scatter", name, x: curves[key][0], y: curves[key][1], ...style,
    hovertemplate: `step %{x}: %{y:.3f}<extra>${name}</extra>`,
  }));
  const more = { showlegend: true, legend: LEGEND, height: 340 };
  Plotly.newPlot(plot, traces, layout(axis("optimizer step"), axis("loss, bits per token"), more), CONFIG);
  plot.setAttribute("aria-label", `Loss curves of ${label}: ${kinds.map(([key, name]) =>
    `${name} from ${bits(curves[key][1][0])} to ${bits(curves[key][1].at(-1))}`).join("; ")}.`);
}

function drawBestTable(view) {
  const head = ["Method", "train", "test", "seeds", "Tie group", "parameters", "% of model", "Merged",
    "time", "memory", "trials"];
  const total = view.board.total_params;
  const rows = view.best.map((best) => {
    const name = element("span", {}, sign(best.method), " ", runLink(best.runs[0], data.methods[best.method]));
    return [name, measure(best.train), measure(best.test), String(best.runs.length), best.ties,
      count(best.params), known(total, (t) => String(Number((100 * best.params / t).toPrecision(3)))), best.merged,
      seconds(best.seconds), bytes(best.memory), String(best.trials)];
  });
  if (view.board.base) {
    const base = ["(frozen model)", ...view.board.base.map(bits), "", "", "0", "0", "", "", "", ""];
    base.attributes = { class: "base" };
    rows.push(base);
  }
  fillTable(byId("best-table"), head, rows);
}

const PAGE_ROWS = 100;
let pageNumber = 0;

function drawAllTable(view) {
  if (!byId("all-runs").open) return;
  const sorted = view.runs.slice().sort((a, b) => (runs.train[a] ?? Infinity) - (runs.train[b] ?? Infinity));
  const nPages = Math.max(1, Math.ceil(sorted.length / PAGE_ROWS));
  pageNumber = Math.min(pageNumber, nPages - 1);
  const from = pageNumber * PAGE_ROWS;
  const head = ["Method", "train", "test", "Status", "parameters", "lr", "γ", "seed", "time", "memory", "Folder"];
  const rows = sorted.slice(from, from + PAGE_ROWS).map((run) => [
    runLink(run, data.methods[runs.method[run]]), bits(runs.train[run]), bits(runs.test[run]),
    runs.status[run], count(runs.params[run]), number(runs.lr[run]),
    runs.gamma[run] === null ? "" : number(runs.gamma[run]), String(runs.seed[run]),
    seconds(runs.seconds[run]), bytes(runs.memory[run]), runName(run),
  ]);
  fillTable(byId("all-table"), head, rows);
  const turn = (by, text, off) => element("button", { type: "button", disabled: off, onclick: () => {
    pageNumber += by;
    drawAllTable(currentView());
  } }, text);
  byId("pager").replaceChildren(
    turn(-1, "Previous", pageNumber === 0), turn(1, "Next", pageNumber === nPages - 1),
    `runs ${Math.min(from + 1, sorted.length)} to ${Math.min(from + PAGE_ROWS, sorted.length)} of ` +
      `${count(sorted.length)}, lowest train loss first`);
}
