// Keys in a grid of rows, and the map. htmx loads what comes as one scrolls.
"use strict";

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const inField = event.target.closest("input, select, textarea");
  if (event.key === "/" && !inField) {
    const field = document.querySelector("[data-search]");
    if (field) { event.preventDefault(); field.focus(); field.select(); }
    return;
  }
  const tile = event.target.closest("[data-grid] > a");
  if (!tile) return;
  const tiles = [...tile.parentElement.querySelectorAll(":scope > a")];
  const columns = tiles.filter((each) => each.offsetTop === tiles[0].offsetTop).length;
  const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns }[event.key];
  const next = step && tiles[tiles.indexOf(tile) + step];
  if (next) { event.preventDefault(); next.focus(); }
});

const canvas = document.getElementById("map");
if (canvas) showMap(canvas);

async function showMap(canvas) {
  const status = document.getElementById("map-status");
  let points;
  for (;;) {
    const answer = await fetch(canvas.dataset.points);
    if (!answer.ok) { status.textContent = "The map cannot be shown: a part of the dataset cannot be read."; return; }
    points = await answer.json();
    if (points.rows) break;
    status.textContent = `Reading the embeddings: ${points.done} of ${points.total} parts`;
    await new Promise((done) => setTimeout(done, 500));
  }
  status.textContent = `${points.rows.length.toLocaleString("en")} rows`;
  const view = { scale: 1, x: 0, y: 0 };
  const style = getComputedStyle(document.documentElement);
  const names = ["--series-1", "--series-2", "--series-3", "--series-4", "--series-5", "--series-6", "--bad", "--series-7"];

  const key = document.getElementById("map-key");
  [...points.names, points.label.some((code) => code === 7) ? "other labels" : ""].forEach((name, place) => {
    if (!name) return;
    const entry = document.createElement("span"), mark = document.createElement("i");
    mark.dataset.colour = name === "other labels" && place === points.names.length ? 7 : place;
    entry.append(mark, name);
    key.append(entry);
  });

  function place(index) {
    const side = Math.min(canvas.clientWidth, canvas.clientHeight) - 20;
    return [
      ((points.x[index] / 1000 - 0.5 - view.x) * view.scale) * side + canvas.clientWidth / 2,
      ((0.5 - points.y[index] / 1000 - view.y) * view.scale) * side + canvas.clientHeight / 2,
    ];
  }

  function draw() {
    const ratio = window.devicePixelRatio || 1;
    canvas.width = canvas.clientWidth * ratio;
    canvas.height = canvas.clientHeight * ratio;
    const context = canvas.getContext("2d");
    context.scale(ratio, ratio);
    const colours = names.map((name) => style.getPropertyValue(name).trim());
    const size = Math.min(6, 1.6 + Math.sqrt(view.scale) * (points.rows.length < 3000 ? 1.6 : 0.7));
    for (let index = 0; index < points.rows.length; index++) {
      const [x, y] = place(index);
      if (x < -9 || y < -9 || x > canvas.clientWidth + 9 || y > canvas.clientHeight + 9) continue;
      context.fillStyle = colours[points.label[index]];
      context.fillRect(x - size / 2, y - size / 2, size, size);
    }
  }

  function nearest(x, y) {
    let best = -1, least = 14 * 14;
    for (let index = 0; index < points.rows.length; index++) {
      const [px, py] = place(index);
      const distance = (px - x) ** 2 + (py - y) ** 2;
      if (distance < least) { least = distance; best = index; }
    }
    return best;
  }

  function zoom(factor, x = canvas.clientWidth / 2, y = canvas.clientHeight / 2) {
    const side = Math.min(canvas.clientWidth, canvas.clientHeight) - 20;
    const scale = Math.min(400, Math.max(0.5, view.scale * factor));
    view.x += (x - canvas.clientWidth / 2) / side * (1 / view.scale - 1 / scale);
    view.y += (y - canvas.clientHeight / 2) / side * (1 / view.scale - 1 / scale);
    view.scale = scale;
    draw();
  }

  function move(x, y) {
    const side = Math.min(canvas.clientWidth, canvas.clientHeight) - 20;
    view.x -= x / side / view.scale;
    view.y -= y / side / view.scale;
    draw();
  }

  canvas.addEventListener("wheel", (event) => {
    event.preventDefault();
    zoom(Math.exp(-event.deltaY / 300), event.offsetX, event.offsetY);
  }, { passive: false });
  let from = null, moved = 0;
  canvas.addEventListener("pointerdown", (event) => { from = [event.clientX, event.clientY]; moved = 0; canvas.setPointerCapture(event.pointerId); });
  canvas.addEventListener("pointermove", (event) => {
    if (from) {
      moved += Math.abs(event.clientX - from[0]) + Math.abs(event.clientY - from[1]);
      move(event.clientX - from[0], event.clientY - from[1]);
      from = [event.clientX, event.clientY];
    } else {
      canvas.style.cursor = nearest(event.offsetX, event.offsetY) < 0 ? "grab" : "pointer";
    }
  });
  canvas.addEventListener("pointerup", (event) => {
    from = null;
    const found = moved < 5 ? nearest(event.offsetX, event.offsetY) : -1;
    if (found >= 0) show(points.rows[found]);
  });
  canvas.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: [60, 0], ArrowRight: [-60, 0], ArrowUp: [0, 60], ArrowDown: [0, -60] }[event.key];
    if (step) { event.preventDefault(); move(...step); }
    if (event.key === "+" || event.key === "=") zoom(1.4);
    if (event.key === "-") zoom(1 / 1.4);
    if (event.key === "Enter") {
      const found = nearest(canvas.clientWidth / 2, canvas.clientHeight / 2);
      if (found >= 0) show(points.rows[found]);
    }
  });

  function show(row) {
    const link = document.createElement("a"), picture = document.createElement("img");
    link.href = canvas.dataset.row + row;
    picture.src = canvas.dataset.thumbnail + row;
    picture.alt = "";
    link.append(picture, `row ${row}`);
    document.getElementById("map-point").replaceChildren(link);
  }

  new ResizeObserver(draw).observe(canvas);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  draw();
}
