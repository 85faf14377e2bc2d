
// A chart of curves by step: {title, curves: [{name, colour, points: [[step, value or null], ...]}]}.
// options.smooth: weight of the past in a moving average, 0 for none; options.log: scale of values.
const WIDTH = 420, HEIGHT = 200, LEFT = 52, BOTTOM = 22, TOP = 8, RIGHT = 8;

function smoothed(points, weight) {
  if (!weight) return points;
  let mean = 0, total = 0;
  return points.map(([step, value]) => {
    if (value === null) return [step, null];
    mean = weight * mean + (1 - weight) * value;
    total = weight * total + (1 - weight);
    return [step, mean / total];
  });
}

const short = (value) => value !== 0 && (Math.abs(value) < 1e-3 || Math.abs(value) >= 1e5)
  ? value.toExponential(2).replace(/\.?0+e/, "e") : String(Number(value.toPrecision(4)));

function ticks(low, high, most) {
  const rough = (high - low) / most, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= rough);
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + 1e-9 * step; i++) found.push(i * step);
  return found;
}

function range(values, fallback) {
  let low = Infinity, high = -Infinity;
  for (const value of values) { low = Math.min(low, value); high = Math.max(high, value); }
  if (low > high) return fallback;
  if (!low && !high) return [0, 1];
  const room = high > low ? 0 : Math.abs(low) / 10;
  return [low - room, high + room];
}

function chart({title, curves}, options) {
  const scale = options.log ? Math.log10 : (value) => value;
  const drawable = (value) => value !== null && (!options.log || value > 0);
  const lines = curves.map((curve) => ({...curve, shown: smoothed(curve.points, options.smooth)}));
  const all = lines.flatMap((line) => line.points);
  const [first, last] = range(all.map(([step]) => step), [0, 1]);
  const [low, high] = range(all.map(([, value]) => value).filter(drawable).map(scale), [0, 1]);
  const x = (step) => LEFT + (step - first) / (last - first) * (WIDTH - LEFT - RIGHT);
  const y = (value) => HEIGHT - BOTTOM - (scale(value) - low) / (high - low) * (HEIGHT - BOTTOM - TOP);

  const svg = make("svg", {viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": title});
  for (const tick of ticks(low, high, 4)) {
    const value = options.log ? 10 ** tick : tick, at = y(value);
    svg.append(make("line", {class: "grid", x1: LEFT, x2: WIDTH - RIGHT, y1: at, y2: at}),
      make("text", {x: LEFT - 6, y: at + 3.5, "text-anchor": "end"}, short(value)));
  }
  for (const step of ticks(first, last, 5)) {
    svg.append(make("text", {x: x(step), y: HEIGHT - 6, "text-anchor": "middle"}, short(step)));
  }
  function path(points, colour, kind) {
    let pen = "M", drawn = "";
    for (const [step, value] of points) {
      if (!drawable(value)) { pen = "M"; continue; }
      drawn += `${pen}${x(step).toFixed(1)} ${y(value).toFixed(1)}`;
      // A point without neighbours is a dot: a line of no length with round ends.
      if (pen === "M") drawn += "h0";
      pen = "L";
    }
    svg.append(make("path", {d: drawn, stroke: colour, class: kind, "stroke-linecap": "round"}));
  }
  for (const line of lines) {
    if (options.smooth) path(line.points, line.colour, "raw");
    path(line.shown, line.colour, "curve");
  }

  const cursor = make("line", {class: "cursor", y1: TOP, y2: HEIGHT - BOTTOM, visibility: "hidden"});
  const tip = make("div", {className: "tip", hidden: true});
  svg.append(cursor);
  svg.addEventListener("mousemove", (event) => {
    const box = svg.getBoundingClientRect();
    const wanted = first + ((event.clientX - box.left) / box.width * WIDTH - LEFT)
      / (WIDTH - LEFT - RIGHT) * (last - first);
    const near = ([step]) => Math.abs(step - wanted);
    const best = all.reduce((one, other) => near(other) < near(one) ? other : one, all[0]);
    if (!best) return;
    cursor.setAttribute("x1", x(best[0]));
    cursor.setAttribute("x2", x(best[0]));
    cursor.setAttribute("visibility", "visible");
    const rows = lines.map((line) => [line, line.points.find(([step]) => step === best[0])])
      .filter(([, point]) => point).map(([line, point]) => make("div", {},
        make("span", {className: "dot", style: `background: ${line.colour}`}),
        ` ${point[1] === null ? "not finite" : short(point[1])}  ${line.name}`));
    tip.replaceChildren(make("b", {}, `step ${best[0]}`), ...rows);
    tip.hidden = false;
  });
  svg.addEventListener("mouseleave", () => {
    tip.hidden = true;
    cursor.setAttribute("visibility", "hidden");
  });
  return make("div", {className: "chart"}, make("h3", {}, title), svg, tip);
}
