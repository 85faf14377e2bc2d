
const several = data.runs.length > 1;
const text = (value) => typeof value === "string" ? value : JSON.stringify(value);
for (const run of data.runs) {
  for (const picture of run.pictures) {
    picture.settings = {prompt: "", ...run.common, ...picture.settings};
  }
}
find("h1").textContent = document.title = `Gallery: ${data.runs.map((run) => run.name).join(" | ")}`;
find("#notes").append(...data.notes.map((note) => make("li", {}, note)));

// Cards: the pictures of one prompt and seed, one from each run; null where a run has none.
const cards = new Map();
data.runs.forEach((run, side) => {
  const times = {};
  for (const picture of run.pictures) {
    const name = JSON.stringify([picture.settings.prompt, picture.settings.seed]);
    times[name] = (times[name] ?? 0) + 1;
    const key = `${times[name]} ${name}`;
    if (!cards.has(key)) cards.set(key, data.runs.map(() => null));
    cards.get(key)[side] = picture;
  }
});
const all = [...cards.values()];

// The settings in which pictures that stand side by side differ, with the values of each run.
if (several) {
  const distinct = (pictures, name) => [...new Set(pictures.filter((picture) => picture)
    .map((picture) => JSON.stringify(picture.settings[name])))];
  const names = [...new Set(all.flat().flatMap((picture) => Object.keys(picture?.settings ?? {})))];
  const differing = names.filter((name) => all.some((card) => distinct(card, name).length > 1));
  const values = (run, name) => {
    const found = distinct(run.pictures, name).map((value) => value ? text(JSON.parse(value)) : "–");
    return found.slice(0, 5).join(", ") + (found.length > 5 ? ", ..." : "");
  };
  find("#differences").append(make("h2", {}, "Settings that differ between the runs"),
    differing.length ? table(["setting", ...data.runs.map((run) => run.name)], differing.map((name) =>
      [make("td", {className: "key"}, name), ...data.runs.map((run) =>
        make("td", {className: "value"}, values(run, name)))]))
      : make("p", {className: "dim"}, "None, in pictures of the same prompt and seed."));
}

// Filters: a part of the prompt, the seed, and every setting that varies within a run.
const filters = {};
let words = "";
const passes = (picture) => picture !== null && String(picture.settings.prompt).toLowerCase().includes(words)
  && Object.entries(filters).every(([name, value]) => JSON.stringify(picture.settings[name]) === value);

function choice(name) {
  const values = [...new Set(all.flat().filter((picture) => picture)
    .map((picture) => JSON.stringify(picture.settings[name])))];
  if (values.length < 2) return null;
  const select = make("select", {name}, make("option", {value: ""}, "all"),
    values.map((value) => make("option", {value: value ?? "undefined"}, text(JSON.parse(value ?? '"–"')))));
  select.addEventListener("input", () => {
    if (select.selectedIndex) filters[name] = values[select.selectedIndex - 1];
    else delete filters[name];
    show();
  });
  return make("label", {}, name, select);
}
const varying = [...new Set(data.runs.flatMap((run) => run.varying))].filter((name) =>
  !["prompt", "seed"].includes(name));
find("#filters").append(
  control("prompt", {type: "search", name: "prompt", placeholder: "part of it"}, (input) => {
    words = input.value.trim().toLowerCase();
    show();
  }),
  ...["seed", ...varying].map(choice).filter((part) => part),
  control("size", {type: "range", name: "size", min: 96, max: 512, value: several ? 200 : 220},
    (input) => find("#cards").style.setProperty("--side", `${input.value}px`)),
  make("output", {id: "count"}));

const image = (picture, run) => picture === null
  ? make("div", {className: "absent"}, `none in ${run.name}`)
  : picture.uri === null ? make("div", {className: "absent"}, `${picture.file} cannot be shown`)
    : make("img", {src: picture.uri, alt: picture.settings.prompt});

let shown = all;
function show() {
  shown = all.filter((card) => card.some(passes));
  find("#count").textContent = `${shown.length} of ${all.length}`;
  find("#cards").replaceChildren(...shown.map((card, number) => {
    const {settings} = card.find((picture) => picture);
    const pictures = make("div", {className: "pair"}, card.map((picture, i) => image(picture, data.runs[i])));
    const button = make("button", {className: "card"}, pictures,
      make("span", {className: "caption"}, settings.prompt || "(no prompt)"),
      make("span", {className: "dim"}, `seed ${settings.seed}`));
    button.addEventListener("click", () => enlarge(number));
    return button;
  }));
}

// A card enlarged, with all settings; the arrow keys go on to the next one.
const dialog = find("#large");
let open = 0;
function enlarge(number) {
  open = (number + shown.length) % shown.length;
  const card = shown[open], there = card.filter((picture) => picture);
  const names = [...new Set(there.flatMap((picture) => Object.keys(picture.settings)))];
  const value = (picture, name) => picture && name in picture.settings ? text(picture.settings[name]) : "–";
  const close = make("button", {}, "close");
  close.addEventListener("click", () => dialog.close());
  dialog.replaceChildren(close, make("div", {className: "pair"}, card.map((picture, i) => make("figure", {},
    make("figcaption", {}, data.runs[i].name, " ", picture && picture.link
      ? make("a", {href: picture.link, target: "_blank"}, picture.file) : ""),
    image(picture, data.runs[i])))),
  table(["setting", ...data.runs.map((run) => run.name)], names.map((name) => {
    const differs = new Set(there.map((picture) => value(picture, name))).size > 1;
    return [make("td", {className: "key"}, name), ...card.map((picture) =>
      make("td", {className: differs ? "value differs" : "value"}, value(picture, name)))];
  })));
  if (!dialog.open) dialog.showModal();
}
dialog.addEventListener("keydown", (event) => {
  const step = {ArrowLeft: -1, ArrowRight: 1}[event.key];
  if (step) enlarge(open + step);
});
show();
