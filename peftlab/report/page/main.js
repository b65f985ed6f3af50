"use strict";
// The selectors, and drawing everything when one of them changes.

function saveState() {
  history.replaceState(null, "", hashOf());
}

function fillSelect(select, names, chosen, show = (name) => name) {
  select.replaceChildren(...names.map((name) =>
    element("option", { value: name, selected: name === chosen }, show(name))));
  select.value = chosen;
  select.disabled = names.length < 2;
}

function drawControls(view) {
  fillSelect(byId("model"), modelNames(), state.model);
  fillSelect(byId("data-set"), dataNames(state.model), state.data);
  for (const input of document.querySelectorAll("input[name=show]")) {
    input.checked = input.value === state.show;
  }
  const names = view.board.studies.map((study) => study.name);
  const last = (name) => name.replace(/^.*\//, "");
  const short = unique(names.map(last)).length === names.length ? last : undefined;
  fillSelect(byId("study"), names.length ? names : ["none"], view.study ? view.study.name : "none", short);
  byId("method-count").textContent = `(${view.shown.size} of ${view.methods.length} shown)`;
  const legend = byId("methods").firstElementChild;
  byId("methods").replaceChildren(legend, ...view.methods.map((method) => {
    const label = data.methods[method];
    const box = element("input", { type: "checkbox", value: label, checked: view.shown.has(method),
      onchange: (event) => change(() => {
        if (event.target.checked) state.off.delete(label);
        else state.off.add(label);
      }) });
    return element("label", {}, box, sign(method), label);
  }));
}

function drawTexts(view) {
  const { board } = view;
  byId("title").textContent = `Fine-tuning methods compared: ${board.model} on ${board.data}`;
  document.title = `peftlab report: ${board.model} on ${board.data}`;
  const total = known(board.total_params, (v) => `${count(v)} parameters`);
  const base = board.base
    ? ` Frozen, it reaches ${bits(board.base[0])} bits per token on the train split and ${bits(board.base[1])} on the test split.`
    : "";
  byId("summary").textContent = `${board.model} has ${total}.${base} Lower is better throughout.`;
  byId("notes").replaceChildren(...data.notes.map((note) => element("li", {}, note)));
  byId("explained").replaceChildren(...data.explained.map((line) => element("p", {}, line)));
  byId("board-notes").replaceChildren(...board.notes.map((note) => element("li", {}, note)));
  const left = data.left_out
    ? ` Curves and configs of ${some(data.left_out, "run")} are left out to keep the page small.` : "";
  byId("version").textContent = `Written by peftlab ${data.version} from ${some(runs.board.length, "run")}.${left}`;
}

/** Draw all that follows from the state. */
function draw() {
  const view = currentView();
  drawControls(view);
  drawTexts(view);
  drawBestTable(view);
  drawAnalyses(view);
  for (const figure of Object.values(figures)) drawFigure(figure, view);
  drawRun(view);
  drawAllTable(view);
  byId("status").textContent =
    `Shown: ${view.shown.size} of ${some(view.methods.length, "method")}, ${some(view.runs.length, "run")}.`;
}

/** Change the state, keep the keyboard where it was, and draw. */
function change(act) {
  const { activeElement } = document;
  const back = activeElement && activeElement.type === "checkbox" ? activeElement.value : null;
  act();
  pageNumber = 0;
  saveState();
  draw();
  if (back !== null) document.querySelector(`#methods input[value="${CSS.escape(back)}"]`)?.focus();
}

byId("model").addEventListener("change", (event) => change(() => {
  state.model = event.target.value;
  if (!dataNames(state.model).includes(state.data)) [state.data] = dataNames(state.model);
  state.run = state.study = null;
}));
byId("data-set").addEventListener("change", (event) => change(() => {
  state.data = event.target.value;
  state.run = state.study = null;
}));
for (const input of document.querySelectorAll("input[name=show]")) {
  input.addEventListener("change", (event) => change(() => { state.show = event.target.value; }));
}
byId("study").addEventListener("change", (event) => change(() => { state.study = event.target.value; }));
byId("methods-all").addEventListener("click", () => change(() => state.off.clear()));
byId("methods-none").addEventListener("click", () => change(() => {
  for (const method of currentView().methods) state.off.add(data.methods[method]);
}));
byId("all-runs").addEventListener("toggle", () => drawAllTable(currentView()));
byId("controls").addEventListener("submit", (event) => event.preventDefault());
document.querySelector(".skip").addEventListener("click", (event) => {
  event.preventDefault(); // the hash is the selectors'
  byId("results").focus();
});
window.addEventListener("hashchange", () => { readHash(); draw(); });
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);

if (narrow()) byId("method-panel").open = false;
readHash();
draw();
