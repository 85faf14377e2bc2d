
const COLOURS = ["#3b7ddd", "#e5762d", "#2c9d5b", "#c4429a", "#8a63d2", "#b58a00", "#17a2b0", "#d64545"];
const groups = [...new Set(data.runs.map((run) => run.group))];
const colour = (run) => COLOURS[groups.indexOf(run.group) % COLOURS.length];
const dot = (run) => make("span", {className: "dot", style: `background: ${colour(run)}`});
const hidden = new Set();  // names of runs
const visible = () => data.runs.filter((run) => !hidden.has(run.name));
const several = data.runs.length > 1;
const none = (text) => make("p", {className: "dim"}, text);

find("h1").textContent = document.title = `Report: ${several
  ? `${data.runs.length} runs` : data.runs[0].name}`;
find("#notes").append(...data.notes.map((note) => make("li", {}, note)));

// Runs: one row each, with a box that shows or hides its curves and pictures.
{
  const titles = [...new Set(data.runs.flatMap((run) => Object.keys(run.summary)))];
  find("#runs").append(table(["run", ...titles], data.runs.map((run) => [
    make("td", {className: "key"}, control(make("span", {}, dot(run), ` ${run.name}`),
      {type: "checkbox", checked: true}, (box) => {
        if (box.checked) hidden.delete(run.name); else hidden.add(run.name);
        drawCurves();
        showPictures();
      })),
    ...titles.map((title) => make("td", {className: "number"}, run.summary[title] ?? "–")),
  ])));
}

// Curves: a chart for each metric, with a curve for each run that has it.
const SPEED = ["images_per_second", "mfu", "data_wait"];
const TITLES = {images_per_second: "images/s", mfu: "MFU", data_wait: "share of time waiting for data",
  held_out_loss: "held-out loss, mean"};
const isHeldOut = (name) => name.includes("held_out");
const isLoss = (name) => ["loss", "psnr"].includes(name);
const SECTIONS = [
  ["loss", isLoss], ["held-out loss by noise level", isHeldOut],
  ["speed", (name) => SPEED.includes(name)],
  ["more", (name) => !isLoss(name) && !isHeldOut(name) && !SPEED.includes(name)],
];
const options = {smooth: 0, log: false};
const charts = make("div");
let moreIsOpen = false;

function titleOf(name) {
  const level = name.match(/^held_out_loss_([\d.]+)$/);
  return level ? `held-out loss at noise level ${level[1]}` : TITLES[name] ?? name.replaceAll("_", " ");
}

function drawCurves() {
  charts.replaceChildren(...SECTIONS.map(([section, belongs]) => {
    const names = data.metrics.filter(belongs);
    const found = names.map((name) => chart({title: titleOf(name), curves: visible()
      .filter((run) => run.curves[name]).map((run) =>
        ({name: run.name, colour: colour(run), points: run.curves[name]}))}, options));
    if (!found.length) return null;
    const grid = make("div", {className: "charts"}, found);
    if (section !== "more") return grid;
    const more = make("details", {open: moreIsOpen}, make("summary", {},
      `${names.length} more: ${names.map((name) => name.replaceAll("_", " ")).join(", ")}`), grid);
    more.addEventListener("toggle", () => { moreIsOpen = more.open; });
    return more;
  }).filter((part) => part));
}
find("#curves").append(...(data.metrics.length ? [make("div", {className: "controls"},
  control("smoothing", {type: "range", id: "smooth", min: 0, max: 0.99, step: 0.01, value: 0},
    (input) => { options.smooth = Number(input.value); drawCurves(); }),
  control("logarithmic", {type: "checkbox", id: "log"},
    (input) => { options.log = input.checked; drawCurves(); })), charts]
  : [none("No row of metrics yet.")]));
drawCurves();

// Pictures: of each run the newest sheet at the slider's step.
const steps = [...new Set(data.runs.flatMap((run) => Object.values(run.pictures).flat()
  .map(([step]) => step)))].sort((one, other) => one - other);
const sheets = make("div", {className: "sheets"});
const moment = make("output", {id: "moment"});
let position = steps.length - 1;

function showPictures() {
  if (!steps.length) return;
  moment.textContent = `step ${steps[position]}`;
  sheets.replaceChildren(...visible().flatMap((run) =>
    Object.entries(run.pictures).map(([name, found]) => {
      const sheet = found.filter(([step]) => step <= steps[position]).at(-1);
      const caption = make("figcaption", {}, dot(run), ` ${run.name}, ${name}, ${sheet ? `step ${sheet[0]}` : "none yet"}`);
      return make("figure", {}, caption, sheet ? make("img", {src: sheet[1],
        alt: `${name} of ${run.name} at step ${sheet[0]}`}) : "");
    })));
}
if (steps.length) {
  const texts = [...new Set(data.runs.map((run) => JSON.stringify(run.prompts)))].map(JSON.parse);
  find("#pictures").append(make("div", {className: "controls"},
    control("step", {type: "range", id: "step", min: 0, max: steps.length - 1, value: position,
      style: "width: 420px"}, (input) => { position = Number(input.value); showPictures(); }), moment),
  sheets, ...texts.filter((prompts) => prompts.length).map((prompts) => make("details", {},
    make("summary", {}, `${prompts.length} prompts, from left to right and from top to bottom`),
    make("ol", {className: "prompts"}, prompts.map((prompt) => make("li", {}, prompt))))));
  showPictures();
} else find("#pictures").append(none("No pictures: config.loop.images_every decides how often they"
  + " are drawn."));

// Metrics by checkpoint.
{
  const columns = [...new Set(data.runs.flatMap((run) =>
    run.figures.flatMap(([, , figures]) => Object.keys(figures))))];
  const rows = data.runs.flatMap((run) => run.figures.map(([step, kept, figures]) => [
    ...(several ? [make("td", {className: "key"}, run.name)] : []), step === null ? "?" : String(step), kept ? "yes" : "",
    ...columns.map((name) => make("td", {className: "number"},
      name in figures ? short(figures[name]) : ""))]));
  find("#figures").append(rows.length ? table([...(several ? ["run"] : []), "step", "checkpoint",
    ...columns.map((name) => titleOf(name).replace("loss at noise level", "at"))], rows) : none("No checkpoint and no held-out figures yet."));
}

// Config: a row for each key, a column for each run; with several runs at first the differences.
{
  const keys = [...new Set(data.runs.flatMap((run) => Object.keys(run.config)))].sort();
  const differs = (key) => new Set(data.runs.map((run) => run.config[key])).size > 1;
  const body = make("div", {className: "tall"});
  let all = !several, wanted = "";
  function show() {
    const shown = keys.filter((key) => (all || differs(key)) && key.includes(wanted));
    body.replaceChildren(shown.length ? table(["key", ...data.runs.map((run) => run.name)],
      shown.map((key) => [make("td", {className: "key"}, key), ...data.runs.map((run) => make("td",
        {className: several && all && differs(key) ? "value differs" : "value"},
        run.config[key] ?? "–"))]))
      : none(wanted ? "No such key." : "The configs are the same."));
  }
  const without = data.runs.filter((run) => !Object.keys(run.config).length);
  if (without.length) find("#config").append(none("Without a checkpoint, and so without a config: "
    + without.map((run) => run.name).join(", ")));
  if (keys.length) find("#config").append(make("div", {className: "controls"},
    ...(several ? [control("all keys", {type: "checkbox", id: "all"},
      (input) => { all = input.checked; show(); })] : []),
    control("key", {type: "search", id: "key", placeholder: "part of its name"},
      (input) => { wanted = input.value.trim(); show(); })), body);
  show();
}

// Incidents.
{
  const rows = data.runs.flatMap((run) => run.incidents.map(([step, what]) =>
    [...(several ? [run.name] : []), step === null ? "" : String(step), what]));
  find("#incidents").append(rows.length ? table([...(several ? ["run"] : []), "step", "what"], rows)
    : none("None: no restart, no skipped update, no bad record, no damaged file."));
}
