// The page's script: values of curves at the pointer, selection of rows, the browser of images.
// Texts of users become text nodes, never markup.
"use strict";
(() => {
  const read = (id) => {
    const script = document.getElementById(id);
    return script === null ? null : JSON.parse(script.textContent);
  };
  const make = (tag, properties, ...children) => {
    const element = Object.assign(document.createElement(tag), properties);
    element.append(...children);
    return element;
  };
  // Three digits and no exponent: 1320, 13.2, 0.0132.
  const number = (value) => {
    if (value === 0) return "0";
    const magnitude = Math.floor(Math.log10(Math.abs(value)));
    return value.toFixed(Math.min(12, Math.max(0, 2 - magnitude)));
  };
  const percent = (share) => `${(100 * share).toFixed(1)} %`;
  const keyOf = (row) => document.querySelector(`#keys [data-key="${row}"]`).cloneNode(true);

  // ---- curves ----

  const hidden = new Set();
  const charts = [];

  function setUpChart(figure, chart, labels) {
    const plot = figure.querySelector(".plot");
    const slider = figure.querySelector("input[type=range]");
    const output = figure.querySelector("output");
    const epochs = new Set();
    for (const panel of chart.panels) {
      for (const line of panel.lines) line.epochs.forEach((epoch) => epochs.add(epoch));
    }
    const sorted = [...epochs].sort((a, b) => a - b);
    const marks = chart.panels.map(() => {
      const cursor = make("div", { className: "cursor", hidden: true });
      const tip = make("div", { className: "tip", hidden: true });
      plot.append(cursor, tip);
      return { cursor, tip };
    });
    const place = (panel, epoch) => {
      const [low, high] = panel.epochs;
      return panel.left + ((epoch - low) / (high - low)) * (panel.right - panel.left);
    };
    const valuesAt = (panel, epoch) => {
      const values = [];
      for (const line of panel.lines) {
        const at = line.epochs.indexOf(epoch);
        if (at >= 0 && !hidden.has(line.row)) values.push([line.row, line.values[at]]);
      }
      return values.sort((a, b) => b[1] - a[1]);
    };
    const inPercent = (length, whole) => `${(100 * length) / whole}%`;

    function showPanel(panel, { cursor, tip }, epoch) {
      const values = valuesAt(panel, epoch);
      cursor.hidden = tip.hidden = values.length === 0;
      if (values.length === 0) return;
      const x = place(panel, epoch);
      cursor.style.left = inPercent(x, chart.width);
      cursor.style.top = inPercent(panel.top, chart.height);
      cursor.style.height = inPercent(panel.bottom - panel.top, chart.height);
      const rows = values.map(([row, value]) =>
        make("div", {}, keyOf(row), make("span", {}, labels[row]), make("b", {}, number(value))));
      tip.replaceChildren(make("div", { className: "note" }, `epoch ${epoch}`), ...rows);
      // Towards the middle of the chart, where there is room.
      const right = x > chart.width / 2;
      tip.style.left = right ? "auto" : `calc(${inPercent(x, chart.width)} + 10px)`;
      tip.style.right = right ? `calc(${inPercent(chart.width - x, chart.width)} + 10px)` : "auto";
      tip.style.top = inPercent(panel.top, chart.height);
    }

    function describe(epoch) {
      const texts = chart.panels.map((panel) => {
        const values = valuesAt(panel, epoch).map(([row, value]) => `${labels[row]} ${number(value)}`);
        return [panel.title, values.join(", ")].filter(Boolean).join(": ");
      });
      return `epoch ${epoch}: ${texts.filter(Boolean).join("; ")}`;
    }

    function show(index) {
      const epoch = sorted[index];
      slider.value = index;
      output.textContent = `epoch ${epoch}`;
      slider.setAttribute("aria-valuetext", describe(epoch));
      chart.panels.forEach((panel, i) => showPanel(panel, marks[i], epoch));
    }

    function hide() {
      for (const { cursor, tip } of marks) cursor.hidden = tip.hidden = true;
    }

    function pointAt(event) {
      const area = plot.getBoundingClientRect();
      const x = ((event.clientX - area.left) / area.width) * chart.width;
      const y = ((event.clientY - area.top) / area.height) * chart.height;
      const inside = (panel) =>
        x >= panel.left - 8 && x <= panel.right + 8 && y >= panel.top - 8 && y <= panel.bottom + 8;
      const panel = chart.panels.find(inside);
      if (panel === undefined) return hide();
      const distances = sorted.map((epoch) => Math.abs(place(panel, epoch) - x));
      show(distances.indexOf(Math.min(...distances)));
    }

    slider.max = sorted.length - 1;
    slider.value = sorted.length - 1;
    output.textContent = `epoch ${sorted.at(-1)}`;
    slider.setAttribute("aria-valuetext", describe(sorted.at(-1)));
    slider.addEventListener("input", () => show(Number(slider.value)));
    slider.addEventListener("focus", () => show(Number(slider.value)));
    slider.addEventListener("blur", hide);
    plot.addEventListener("pointermove", pointAt);
    plot.addEventListener("pointerdown", pointAt);
    plot.addEventListener("pointerleave", hide);
    figure.querySelector(".epoch").hidden = sorted.length < 2;
    charts.push({ hide });
  }

  function setUpCurves() {
    const data = read("curve-data");
    if (data === null) return;
    for (const chart of data.charts) {
      setUpChart(document.getElementById(`chart-${chart.name}`), chart, data.labels);
    }
    for (const box of document.querySelectorAll("#legend input")) {
      box.addEventListener("change", () => {
        const row = Number(box.value);
        if (box.checked) hidden.delete(row);
        else hidden.add(row);
        for (const mark of document.querySelectorAll(`.plot svg [data-row="${row}"]`)) {
          mark.style.display = box.checked ? "" : "none";
        }
        charts.forEach((chart) => chart.hide());
      });
    }
  }

  // ---- images ----

  function setUpImages() {
    const data = read("image-data");
    if (data === null) return;
    const find = (name) => document.getElementById(`view-${name}`);
    const stageChoices = document.getElementById("stages");
    const chosen = (name) =>
      Number(document.querySelector(`#images-browser input[name=${name}]:checked`).value);
    const state = { image: 0, network: -1, stage: 0 };

    function listStages(network) {
      const choices = network.stages.map((stage, i) => {
        const input = make("input", { type: "radio", name: "stage", value: i, checked: i === state.stage });
        const size = network.sizes[i].join("×");
        return make("label", {}, input, make("span", {}, `${stage} `, make("small", {}, size)));
      });
      stageChoices.replaceChildren(...choices);
    }

    function chooseNetwork(index) {
      const before = data.networks[state.network];
      const last = data.networks[index].stages.length - 1;
      // The stage at the same resolution; at first the last one, which is the most informative.
      state.stage = before?.peers[state.stage][index] ?? last;
      state.network = index;
      listStages(data.networks[index]);
    }

    function verdict(seen) {
      if (!seen.answer) return ["no prediction", ""];
      if (seen.correct === null) return [seen.answer, ""];
      return seen.correct ? [`✓ ${seen.answer}`, ""] : [`✗ ${seen.answer}, wrong`, "worse"];
    }

    function setImage(name, source, alt) {
      const image = find(name);
      image.closest("figure").hidden = !source;
      if (source) Object.assign(image, { src: source, alt });
    }

    function comparison(image) {
      const rows = [];
      data.networks.forEach((network, i) => {
        const seen = image.seen[i];
        const peer = data.networks[state.network].peers[state.stage][i];
        if (seen === null) return;
        const stage = peer === null ? null : seen.stages[peer];
        const [text, tone] = verdict(seen);
        const picture = make("td", {});
        if (stage !== null) {
          const map = make("img", { src: stage.map, alt: "" });
          const below = make("img", { src: find("image").src, alt: "", className: "grey" });
          picture.append(make("div", { className: "view overlay" }, below, map));
        }
        const cell = (value, write) =>
          make("td", {}, value === undefined || value === null ? "–" : write(value));
        const head = make("th", { scope: "row" }, keyOf(network.row), network.label);
        if (stage !== null) head.append(make("span", { className: "sub" }, network.stages[peer]));
        const row = make("tr", {}, head, picture, make("td", { className: tone }, text),
          cell(stage?.inside, percent), cell(stage?.distance, number));
        if (i === state.network) row.setAttribute("aria-current", "true");
        rows.push(row);
      });
      return rows;
    }

    function render() {
      const image = data.images[state.image];
      const network = data.networks[state.network];
      const seen = image.seen[state.network];
      const stage = seen?.stages[state.stage];
      const source = document.querySelector(`#images-browser input[value="${state.image}"][name=image] + img`).src;
      const name = `${network.label} at ${network.stages[state.stage]}`;
      const label = image.label || "unknown class";
      setImage("image", source, `${image.name}, ${label}`);
      setImage("map", stage?.map, `Attention map of ${name}`);
      setImage("below", stage && source, "");
      setImage("over", stage?.map, `Attention map of ${name} over the image`);
      setImage("difference", stage?.difference, `Map of ${name} and the teacher's map: their difference`);
      for (const box of document.querySelectorAll("#images-browser .box")) {
        box.hidden = image.box === null;
        if (image.box === null) continue;
        const [left, top, width, height] = image.box.map((side) => `${side}%`);
        Object.assign(box.style, { left, top, width, height });
      }
      find("class").textContent = label;
      if (stage) find("maximum").textContent = number(stage.maximum);
      if (stage?.difference) {
        find("least").textContent = `−${number(stage.limit)}`;
        find("most").textContent = number(stage.limit);
      }
      find("chance").textContent = image.chance === null ? "" :
        `A uniform map has ${percent(image.chance)} inside the box.`;
      find("rows").replaceChildren(...comparison(image));
      const answer = seen ? verdict(seen)[0] : "not stored";
      find("status").textContent = `${image.name}, ${label}. ${name}: ${answer}`;
    }

    document.getElementById("images-browser").addEventListener("change", (event) => {
      const { name, value } = event.target;
      if (name === "network") chooseNetwork(Number(value));
      else if (name === "image" || name === "stage") state[name] = Number(value);
      render();
    });
    // After a reload, browsers keep the selection.
    state.image = chosen("image");
    chooseNetwork(chosen("network"));
    render();
  }

  setUpCurves();
  setUpImages();
  document.documentElement.classList.add("scripted");
})();
