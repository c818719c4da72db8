"use strict";

// Names come from the user's files: they are set as text, never as markup.
const drop = document.getElementById("drop");
const input = document.getElementById("file");
const status = document.getElementById("status");
const result = document.getElementById("result");
let newest = 0;

function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

function picture(source, alt, className) {
  const made = element("img", className);
  made.src = source;
  made.alt = alt;
  return made;
}

function say(text, isError) {
  status.textContent = text;
  status.className = isError ? "error" : "";
}

function showNetwork(network) {
  const made = element("article", "network");
  made.append(element("h2", "", network.name), element("p", "note", network.note));
  const classes = element("ol");
  for (const guess of network.predictions) {
    classes.append(element("li", "", `${guess.class} ${(100 * guess.probability).toFixed(1)} %`));
  }
  const stages = element("div", "stages");
  for (const stage of network.stages) {
    const figure = element("figure");
    figure.append(picture(stage.picture, `Attention of ${network.name} at ${stage.layer}`));
    figure.append(element("figcaption", "", `${stage.layer}, ${stage.size}`));
    stages.append(figure);
  }
  made.append(classes, stages);
  return made;
}

function show(views) {
  const networks = element("div", "networks");
  networks.append(...views.networks.map(showNetwork));
  result.replaceChildren(picture(views.image, "The image, as the networks see it", "seen"), networks);
  result.hidden = false;
}

async function look(file) {
  const mine = ++newest;
  say(`${file.name || "image"}: looking …`);
  try {
    const headers = { "Content-Type": "application/octet-stream" };
    const answer = await fetch("look", { method: "POST", headers, body: file });
    const views = await answer.json();
    if (mine !== newest) return; // a later image was dropped meanwhile
    if (!answer.ok) throw new Error(views.error);
    show(views);
    say(file.name || "image");
  } catch (error) {
    if (mine === newest) say(error.message, true);
  }
}

input.addEventListener("change", () => { if (input.files[0]) look(input.files[0]); });
for (const name of ["dragover", "dragleave", "drop"]) {
  document.addEventListener(name, (event) => {
    event.preventDefault();
    drop.classList.toggle("over", name === "dragover");
    if (name === "drop" && event.dataTransfer.files[0]) look(event.dataTransfer.files[0]);
  });
}
document.addEventListener("paste", (event) => {
  if (event.clipboardData.files[0]) look(event.clipboardData.files[0]);
});
