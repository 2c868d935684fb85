"use strict";
// Shows /openapi.json. Whatever it says becomes text: nothing here makes markup of a string.

const METHODS = ["get", "post", "put", "patch", "delete"];

function make(tag, text, parent, name) {
  const element = document.createElement(tag);
  if (text !== undefined && text !== null) element.textContent = text;
  if (name) element.className = name;
  if (parent) parent.append(element);
  return element;
}

// A sentence in which `...` is code.
function prose(text, parent) {
  const paragraph = make("span", null, parent);
  String(text || "").split("`").forEach((part, place) => {
    paragraph.append(place % 2 ? make("code", part) : document.createTextNode(part));
  });
  return paragraph;
}

function follow(api, schema) {
  if (!schema || !schema.$ref) return schema || {};
  return schema.$ref.slice(2).split("/").reduce((part, step) => part[step], api);
}

// What a value may be, in a few words.
function kind(schema) {
  if (schema.$ref) return schema.$ref.split("/").pop();
  if (schema.const !== undefined) return JSON.stringify(schema.const);
  if (schema.enum) return schema.enum.map((one) => JSON.stringify(one)).join(", ");
  if (schema.anyOf) return schema.anyOf.map(kind).join(" or ");
  if (schema.not) return "nothing";
  const types = [].concat(schema.type || "any value");
  let text = types.map((one) => (one === "array" ? "array of " + kind(schema.items || {}) : one)).join(" or ");
  if (schema.format) text += " (" + schema.format + ")";
  const bounds = [["exclusiveMinimum", "above "], ["minimum", "from "], ["maximum", "to "], ["minLength", "from "],
    ["maxLength", "to "], ["minItems", "from "], ["maxItems", "to "], ["pattern", ""], ["default", "default "]];
  const told = bounds.filter(([name]) => schema[name] !== undefined).map(([name, word]) => word + schema[name]);
  return told.length ? text + ", " + told.join(", ") : text;
}

function table(columns, rows, parent) {
  const body = make("table", null, parent);
  const head = make("tr", null, make("thead", null, body));
  columns.forEach((column) => make("th", column, head));
  const lines = make("tbody", null, body);
  rows.forEach((cells) => {
    const line = make("tr", null, lines);
    cells.forEach(([text, code]) => {
      const cell = make("td", null, line);
      if (code) make("code", text, cell); else prose(text, cell);
    });
  });
}

function members(api, schema, parent, before) {
  const top = follow(api, schema);
  const required = new Set(top.required || []);
  const rows = [];
  Object.entries(top.properties || {}).forEach(([name, member]) => {
    rows.push([[before + name, true], [kind(member), false], [required.has(name) ? "yes" : "", false],
      [member.description || "", false]]);
    Object.entries(member.properties || {}).forEach(([inner, part]) => {
      rows.push([[before + name + "." + inner, true], [kind(part), false], ["", false],
        [part.description || "", false]]);
    });
  });
  if (rows.length) table(["member", "form", "always", ""], rows, parent);
}

function body(api, title, content, parent) {
  Object.entries(content || {}).forEach(([media, { schema }]) => {
    const name = schema && schema.$ref ? schema.$ref.split("/").pop() : "";
    make("h4", title + ": " + (name ? name + ", " : "") + media, parent);
    if (schema) members(api, schema, parent, "");
  });
}

function operation(api, path, method, what, contents, parent) {
  const section = make("section", null, parent);
  section.id = what.operationId;
  const link = make("a", method.toUpperCase() + " " + path, contents);
  link.href = "#" + what.operationId;
  const heading = make("h3", null, section);
  make("span", method.toUpperCase(), heading, "method");
  make("code", path, heading);
  prose(what.description, make("p", null, section));
  const needs = (what.security || []).flatMap((one) => Object.keys(one));
  const told = { key: "Needs `X-API-Key: KEY`.", admin: "Needs `Authorization: Bearer TOKEN`." };
  make("p", null, section).append(...needs.map((one) => prose(told[one])));
  if (what.parameters.length) {
    make("h4", "Parameters", section);
    table(["name", "in", "form", ""], what.parameters.map((one) => [[one.name, true], [one.in, false],
      [kind(one.schema), false], [one.description || "", false]]), section);
  }
  if (what.requestBody) body(api, "Body", what.requestBody.content, section);
  const answers = Object.entries(what.responses);
  answers.filter(([status]) => status < "400").forEach(([status, answer]) => {
    if (answer.content) body(api, "Answer " + status, answer.content, section);
    else make("h4", "Answer " + status, section);
  });
  make("h4", "Errors", section);
  table(["status", "codes"], answers.filter(([status]) => status >= "400")
    .map(([status, answer]) => [[status, true], [answer.description, false]]), section);
}

function show(api) {
  document.getElementById("version").textContent = api.info.version;
  const about = document.getElementById("about");
  about.textContent = "";
  prose(api.info.description + " As data: ", about);
  make("a", "/openapi.json", about).href = "/openapi.json";
  const contents = document.getElementById("contents");
  const routes = document.getElementById("routes");
  api.tags.forEach(({ name }) => {
    make("h2", name, contents);
    make("h2", name, routes);
    Object.entries(api.paths).forEach(([path, item]) => METHODS.forEach((method) => {
      const what = item[method];
      if (what && what.tags.includes(name)) operation(api, path, method, what, contents, routes);
    }));
  });
  make("h2", "Schemas", routes);
  Object.entries(api.components.schemas).forEach(([name, schema]) => {
    const section = make("section", null, routes);
    make("h3", name, section);
    members(api, schema, section, "");
  });
  if (location.hash) document.getElementById(location.hash.slice(1))?.scrollIntoView();
}

fetch("/openapi.json").then((answer) => answer.json()).then(show).catch((problem) => {
  document.getElementById("about").textContent = "The description can't be shown: " + problem;
});
