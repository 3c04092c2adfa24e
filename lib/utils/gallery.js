// Draws detections above pictures and filters them by score and class. Shared by the gallery and
// the demo page; both give `gallery.start(classes, colours, lines)` and then one item a picture:
// {name, src, width, height, found: [{c: class, s: score, b: [x1, y1, x2, y2], m: [[x, y, ...]],
// k: [[x, y, logit], ...]}]}, coordinates in pixels of the image.
"use strict";
const gallery = (() => {
  const SVG = "http://www.w3.org/2000/svg";
  const state = {score: 0.7, point: 2, hidden: new Set(), masks: true, empty: true};
  const items = [];
  let meta;

  const make = (tag, attributes, parent) => {
    const element = document.createElementNS(SVG, tag);
    for (const name in attributes) element.setAttribute(name, attributes[name]);
    parent.append(element);
    return element;
  };
  const byId = id => document.getElementById(id);
  const shown = item =>
    item.found.filter(d => d.s >= state.score && !state.hidden.has(d.c));

  function drawKeypoints(points, size, parent) {
    const sure = ends => ends.every(i => points[i][2] > state.point);
    const middle = ends => [0, 1].map(axis =>
      ends.reduce((sum, i) => sum + points[i][axis], 0) / ends.length + 0.5);
    const last = {};
    for (const [a, b, colour] of meta.lines) {
      for (const end of [a, b]) if (end.length === 1) last[end[0]] = colour;
      if (!sure(a) || !sure(b)) continue;
      const [x1, y1] = middle(a), [x2, y2] = middle(b);
      make("line", {x1, y1, x2, y2, stroke: colour, "stroke-width": 2.5}, parent);
    }
    points.forEach(([x, y, logit], i) => {
      if (logit <= state.point) return;
      make("circle", {cx: x + 0.5, cy: y + 0.5, r: size, fill: last[i] || "#fff"}, parent);
    });
  }

  function draw(item) {
    const {frame, width, height} = item, found = shown(item);
    frame.querySelectorAll("svg, .tag").forEach(old => old.remove());
    item.stale = false;
    const svg = make("svg", {viewBox: `0 0 ${width} ${height}`}, frame);
    const area = d => (d.b[2] - d.b[0]) * (d.b[3] - d.b[1]);
    // Large ones first, so that nothing is hidden behind a larger object.
    for (const d of [...found].sort((p, q) => area(q) - area(p))) {
      const colour = meta.colours[d.c], [x1, y1, x2, y2] = d.b;
      if (state.masks && d.m.length) {
        const path = d.m.map(p => "M" + p.join(" ") + "Z").join("");
        make("path", {d: path, fill: colour, stroke: colour, "stroke-width": 1.5,
          "fill-opacity": 0.4, "fill-rule": "evenodd"}, svg);
      }
      const box = {x: x1, y: y1, width: x2 - x1 + 1, height: y2 - y1 + 1};
      make("rect", {...box, fill: "none", stroke: colour, "stroke-width": 2}, svg);
      const radius = Math.min(Math.sqrt(area(d)) / 40, Math.max(width, height) / 200);
      if (d.k) drawKeypoints(d.k, radius, svg);
      const tag = document.createElement("span");
      tag.className = "tag";
      tag.textContent = `${meta.classes[d.c]} ${d.s.toFixed(2)}`;
      tag.style.cssText = `left:${100 * x1 / width}%;top:${100 * y1 / height}%;`
        + `background:${colour};color:${meta.text[d.c]}`;
      frame.append(tag);
    }
  }

  // Only what is in sight is drawn: a gallery may have thousands of pictures.
  const watch = new IntersectionObserver(entries => {
    for (const entry of entries) {
      const item = items.find(item => item.frame === entry.target);
      item.inSight = entry.isIntersecting;
      if (item.inSight && item.stale) draw(item);
    }
  }, {rootMargin: "50%"});

  function redraw() {
    let total = 0;
    for (const item of items) {
      const count = shown(item).length;
      total += count;
      item.note.textContent = `${item.name}: ${count} of ${item.found.length}`;
      item.figure.hidden = !state.empty && !count;
      item.stale = true;
      if (item.inSight) draw(item);
    }
    byId("score-value").textContent = state.score.toFixed(2);
    byId("total").textContent = `${total} detections in ${items.length} pictures`;
  }

  function listClasses() {
    const counts = {};
    for (const item of items) for (const d of item.found) counts[d.c] = (counts[d.c] || 0) + 1;
    const box = byId("classes");
    box.replaceChildren();
    for (const c of Object.keys(counts).sort((a, b) => counts[b] - counts[a])) {
      const label = document.createElement("label"), tick = document.createElement("input");
      tick.type = "checkbox";
      tick.checked = !state.hidden.has(+c);
      tick.onchange = () => { state.hidden[tick.checked ? "delete" : "add"](+c); redraw(); };
      const patch = document.createElement("i");
      patch.style.background = meta.colours[c];
      label.append(tick, patch, ` ${meta.classes[c]} (${counts[c]})`);
      box.append(label);
    }
  }

  function add(item, first = false) {
    item.figure = document.createElement("figure");
    item.frame = document.createElement("div");
    item.frame.className = "frame";
    item.note = document.createElement("figcaption");
    const image = document.createElement("img");
    image.src = item.src;
    image.alt = item.name;
    item.frame.append(image);
    item.frame.onclick = () => item.figure.classList.toggle("large");
    item.figure.append(item.frame, item.note);
    item.frame.style.aspectRatio = `${item.width} / ${item.height}`;
    const grid = byId("grid");
    if (first) grid.prepend(item.figure); else grid.append(item.figure);
    items.push(item);
    watch.observe(item.frame);
  }

  function start(given) {
    meta = given;
    const slider = byId("score");
    state.score = +slider.value;
    slider.oninput = () => { state.score = +slider.value; redraw(); };
    for (const name of ["masks", "empty"]) {
      byId(name).onchange = event => { state[name] = event.target.checked; redraw(); };
    }
    const points = byId("point");
    if (points) {
      state.point = +points.value;
      points.oninput = () => { state.point = +points.value; redraw(); };
    }
    for (const [id, hide] of [["all", false], ["none", true]]) {
      byId(id).onclick = () => {
        state.hidden = new Set(hide ? meta.classes.keys() : []);
        listClasses();
        redraw();
      };
    }
  }

  return {start, add, refresh() { listClasses(); redraw(); }};
})();
