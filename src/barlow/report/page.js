"use strict";

// A readout under each chart: the values nearest to the pointer.
function followCharts(root) {
  for (const figure of root.querySelectorAll("figure.chart")) {
    const data = JSON.parse(figure.querySelector("script").textContent);
    const svg = figure.querySelector("svg");
    const cursor = figure.querySelector(".cursor");
    const output = figure.querySelector("output");
    const [low, high, start, end] = data.axis;
    const nearest = (points, x) =>
      points.reduce((a, b) => (Math.abs(b[0] - x) < Math.abs(a[0] - x) ? b : a));
    const short = (v) => Number(v.toPrecision(4)).toString();
    svg.addEventListener("pointermove", (event) => {
      const box = svg.getBoundingClientRect();
      const across = ((event.clientX - box.left) / box.width) * svg.viewBox.baseVal.width;
      const wanted = low + ((across - start) / (end - start)) * (high - low);
      const found = data.series.map((s) => nearest(s.points, wanted));
      const x = nearest(found, wanted)[0];
      const place = start + ((x - low) / (high - low)) * (end - start);
      cursor.setAttribute("x1", place);
      cursor.setAttribute("x2", place);
      cursor.removeAttribute("hidden");
      const values = data.series.map((s, i) => `${s.name} ${short(found[i][1])}`);
      output.textContent = `${data.x} ${short(x)}: ${values.join(", ")}`;
    });
    svg.addEventListener("pointerleave", () => {
      cursor.setAttribute("hidden", "");
      output.textContent = "";
    });
  }
}

// The map: the image of the point nearest to the pointer, or of the next one by arrow key.
function followMap(root) {
  const map = root.querySelector(".map");
  if (!map) return;
  const data = JSON.parse(map.querySelector("script").textContent);
  const svg = map.querySelector("svg");
  const circles = [...svg.querySelectorAll("circle")];
  const places = circles.map((c) => [c.cx.baseVal.value, c.cy.baseVal.value]);
  const tip = map.querySelector(".tip");
  const picture = tip.querySelector("i");
  const text = tip.querySelector("span");
  const scale = 80 / data.side;
  let on = -1;

  function show(index) {
    if (on >= 0) circles[on].classList.remove("on");
    on = index;
    tip.hidden = index < 0;
    if (index < 0) return;
    circles[index].classList.add("on");
    const column = index % data.columns;
    const row = Math.floor(index / data.columns);
    picture.style.backgroundImage = `url(${map.querySelector("img").src})`;
    picture.style.backgroundSize = `${data.columns * 80}px auto`;
    picture.style.backgroundPosition = `${-column * data.side * scale}px ${-row * data.side * scale}px`;
    text.textContent = data.texts[index];
    const box = svg.getBoundingClientRect();
    const inside = map.getBoundingClientRect();
    const unit = box.width / svg.viewBox.baseVal.width;
    const [x, y] = [places[index][0] * unit, places[index][1] * unit];
    tip.style.left = `${Math.min(x + 14, box.width - tip.offsetWidth - 4)}px`;
    tip.style.top = `${box.top - inside.top + (y > 150 ? y - tip.offsetHeight - 14 : y + 14)}px`;
  }

  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const unit = box.width / svg.viewBox.baseVal.width;
    const x = (event.clientX - box.left) / unit;
    const y = (event.clientY - box.top) / unit;
    let best = -1;
    let least = 30 ** 2;
    places.forEach(([a, b], i) => {
      const distance = (a - x) ** 2 + (b - y) ** 2;
      const dimmed = map.classList.contains("chosen") && !circles[i].classList.contains("kept");
      if (distance < least && !dimmed) [best, least] = [i, distance];
    });
    if (best !== on) show(best);
  });
  svg.addEventListener("pointerleave", () => show(-1));
  svg.addEventListener("blur", () => show(-1));
  svg.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (!step) return;
    event.preventDefault();
    show((Math.max(on, step > 0 ? -1 : 0) + step + circles.length) % circles.length);
  });
  for (const button of map.querySelectorAll(".keys button")) {
    button.addEventListener("click", () => {
      const pressed = button.getAttribute("aria-pressed") !== "true";
      for (const other of map.querySelectorAll(".keys button")) {
        other.setAttribute("aria-pressed", String(other === button && pressed));
      }
      map.classList.toggle("chosen", pressed);
      circles.forEach((c, i) => {
        c.classList.toggle("kept", pressed && data.labels[i] === button.dataset.label);
      });
    });
  }
}

function follow(root) {
  followCharts(root);
  followMap(root);
}

// Served by `barlow watch`: when the page has changed, its content is put in place of the old.
function watch() {
  let tag = document.body.dataset.live;
  setInterval(async () => {
    try {
      const answer = await fetch(location.pathname, { headers: { "If-None-Match": tag } });
      if (answer.status !== 200) return;
      tag = answer.headers.get("ETag");
      const page = new DOMParser().parseFromString(await answer.text(), "text/html");
      const open = [...document.querySelectorAll("details")].map((d) => d.open);
      document.querySelector("main").replaceWith(page.querySelector("main"));
      document.querySelectorAll("details").forEach((d, i) => { d.open = Boolean(open[i]); });
      follow(document);
    } catch {
      // The server is gone: what was seen last stays on the page.
    }
  }, 3000);
}

addEventListener("beforeprint", () => {
  for (const details of document.querySelectorAll("details")) details.open = true;
});
follow(document);
if (document.body.dataset.live) watch();
