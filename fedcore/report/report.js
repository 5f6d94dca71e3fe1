"use strict";
// The page is complete without this: it only answers the pointer with exact values.
(() => {
  const tip = document.body.appendChild(Object.assign(document.createElement("div"), {id: "tip"}));
  const show = (event, text) => {
    tip.textContent = text;
    tip.style.display = "block";
    tip.style.left = Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8) + "px";
    tip.style.top = (event.clientY > 60 ? event.clientY - tip.offsetHeight - 10 : event.clientY + 18) + "px";
  };
  const hide = () => { tip.style.display = "none"; };
  const round = value => +value.toPrecision(4);
  const words = {
    seconds: value => round(value) + " s", share: value => round(100 * value) + " %", count: value => round(value) + "",
    number: value => round(value) + "", bytes: value => round(value / 1e6) + " MB",
  };
  const back = (place, low, high, log) => log ? low * (high / low) ** place : low + place * (high - low);

  const answerCurves = root => root.querySelectorAll(".area[data-hover]").forEach(area => {
    const [x0, x1, y0, y1, logX, logY] = area.dataset.hover.split(",").map(Number);
    const lines = [...area.querySelectorAll("path.line")].map(path => ({
      label: path.dataset.label,
      points: path.getAttribute("d").slice(1).split(/[ML]/).map(pair => pair.split(" ").map(Number)),
    }));
    area.addEventListener("pointerleave", hide);
    area.addEventListener("pointermove", event => {
      const box = area.getBoundingClientRect();
      const px = (event.clientX - box.left) / box.width * 1e4, py = (event.clientY - box.top) / box.height * 1e4;
      let best = null;
      for (const line of lines) for (const [x, y] of line.points) {
        const far = Math.abs(x - px) * box.width + Math.abs(y - py) * box.height * 0.4;
        if (!best || far < best.far) best = {far, x, y, label: line.label};
      }
      if (!best) return;
      const x = words[area.dataset.x](back(best.x / 1e4, x0, x1, logX));
      const y = words[area.dataset.y](back(1 - best.y / 1e4, y0, y1, logY));
      show(event, (best.label ? best.label + ": " : "") + y + " at " + x);
    });
  });

  const answerTimelines = root => root.querySelectorAll(".area[data-window]").forEach(area => {
    const source = area.querySelector("script");
    if (!source) return;
    const tasks = JSON.parse(source.textContent), [start, end] = area.dataset.window.split(",").map(Number);
    area.addEventListener("pointerleave", hide);
    area.addEventListener("pointermove", event => {
      const box = area.getBoundingClientRect();
      const at = start + (event.clientX - box.left) / box.width * (end - start);
      const row = Math.floor((event.clientY - box.top) / box.height * area.dataset.rows);
      const task = tasks.find(([r, since, until]) => r === row && since <= at && at <= until);
      if (task) show(event, task[3] + ", " + round(task[1]) + " to " + round(task[2]) + " s: " + task[4]); else hide();
    });
  });

  // A page that changes while it is shown asks again for what is new.
  window.fedcoreAnswerPointer = root => { answerCurves(root); answerTimelines(root); };
  window.fedcoreAnswerPointer(document);
})();
