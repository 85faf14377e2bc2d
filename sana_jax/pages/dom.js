"use strict";
const data = JSON.parse(document.getElementById("data").textContent);

// Makes an element. Properties are set as such, or as attributes of SVG; texts are never read as HTML.
function make(tag, properties = {}, ...children) {
  const drawn = ["svg", "g", "path", "line", "text", "rect"].includes(tag);
  const element = drawn
    ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (drawn || name.includes("-") || name === "for") element.setAttribute(name, value);
    else element[name] = value;
  }
  element.append(...children.flat().filter((child) => child !== null));
  return element;
}

const find = (selector) => document.querySelector(selector);

function table(titles, rows) {
  const cell = (tag) => (content) => content instanceof Element && content.matches("td")
    ? content : make(tag, {}, content);
  return make("div", {className: "scroll"}, make("table", {},
    make("thead", {}, make("tr", {}, titles.map(cell("th")))),
    make("tbody", {}, rows.map((row) => make("tr", {}, row.map(cell("td")))))));
}

// A label with an input; `on` is called with the input, now and at every change.
function control(text, properties, on) {
  const input = make("input", properties);
  const label = make("label", {}, ...(properties.type === "checkbox" ? [input, text] : [text, input]));
  input.addEventListener("input", () => on(input));
  return label;
}
