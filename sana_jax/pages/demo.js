
const form = find("#form"), state = find("#state"), bar = find("#bar");
find("h1").textContent = data.checkpoint;
document.title = `${data.checkpoint}, sana_jax`;
find("#devices").textContent = data.devices;
form.num_steps.value = data.num_steps;
form.guidance_scale.value = data.guidance_scale;
for (const side of [form.width, form.height]) {
  Object.assign(side, {value: data.size, min: data.multiple, step: data.multiple});
}
form.count.max = data.most;
// Sana-Sprint evaluates its network once a step: there is no second half to steer away from.
form.negative_prompt.closest("label").hidden = data.is_sprint;

find("#dice").addEventListener("click", () => {
  form.seed.value = crypto.getRandomValues(new Uint32Array(1))[0];
});

// The form as the server takes it. A seed has up to 64 bits, more than a number of JavaScript.
function asked() {
  const number = (field) => field.value === "" ? "null" : String(Number(field.value));
  const seed = form.seed.value.trim();
  const parts = {
    prompt: JSON.stringify(form.prompt.value),
    negative_prompt: JSON.stringify(form.negative_prompt.value),
    seed: /^\d+$/.test(seed) ? seed.replace(/^0+(?=\d)/, "") : JSON.stringify(seed),
    num_steps: number(form.num_steps), guidance_scale: number(form.guidance_scale),
    width: number(form.width), height: number(form.height), count: number(form.count),
  };
  return `{${Object.entries(parts).map(([name, value]) => `"${name}": ${value}`).join(", ")}}`;
}

// Yields the events of an answer, a line of JSON each, as they come.
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const {done, value} = await reader.read();
    if (done) return;
    const lines = (text + value).split("\n");
    text = lines.pop();
    for (const line of lines) yield JSON.parse(line);
  }
}

function show({pictures, command}) {
  const figures = pictures.map(({file, uri, settings}) => make("figure", {},
    make("img", {src: uri, alt: settings.prompt, width: settings.width}),
    make("figcaption", {}, `seed ${settings.seed}  `, make("a", {href: uri, download: file}, "save"))));
  find("#pictures").prepend(make("section", {className: "drawn"},
    make("div", {className: "sheet"}, figures),
    make("details", {}, make("summary", {}, "the same from the shell"), make("code", {}, command))));
}

let drawing = null;
find("#stop").addEventListener("click", () => drawing.abort());
form.addEventListener("submit", async (event) => {
  event.preventDefault();
  drawing = new AbortController();
  find("#draw").disabled = true;
  find("#stop").disabled = false;
  state.className = "";
  bar.hidden = false;
  bar.removeAttribute("value");
  state.textContent = "waiting for another drawing";
  const began = performance.now();
  try {
    const response = await fetch("/draw", {method: "POST", body: asked(), signal: drawing.signal,
      headers: {"Content-Type": "application/json"}});
    if (!response.ok) throw new Error(`the server answers ${response.status}`);
    let result = null;
    for await (const told of events(response)) {
      if (told.error) throw new Error(told.error);
      if (told.turn) state.textContent = "drawing; the first picture of a size and a number compiles";
      if (told.steps) {
        Object.assign(bar, {max: told.steps, value: told.step});
        state.textContent = `step ${told.step} of ${told.steps}`;
      }
      if (told.pictures) result = told;
    }
    if (result === null) throw new Error("the server has gone");
    show(result);
    state.textContent = `drawn in ${((performance.now() - began) / 1000).toFixed(1)} s`;
  } catch (error) {
    state.className = "wrong";
    state.textContent = error.name === "AbortError" ? "stopped" : error.message;
  } finally {
    bar.hidden = find("#stop").disabled = true;
    find("#draw").disabled = false;
  }
});
