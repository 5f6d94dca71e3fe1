"use strict";
// Puts what the server sends into its places; the server has drawn and escaped it.
(() => {
  const link = document.getElementById("link");
  const say = (state, words) => { link.className = state; link.textContent = words; };
  const put = (id, html) => {
    const place = document.getElementById(id);
    if (!place) return;
    const moved = [...place.querySelectorAll(".scroll")].map(box => box.scrollLeft);
    place.innerHTML = html;
    place.querySelectorAll(".scroll").forEach((box, index) => { box.scrollLeft = moved[index] || 0; });
    if (id === "title") document.title = place.textContent;
    fedcoreAnswerPointer(place);
  };
  const source = new EventSource("events");
  source.onopen = () => say("live", "connected");
  source.onmessage = event => {
    for (const [id, html] of Object.entries(JSON.parse(event.data))) put(id, html);
    document.documentElement.dataset.news = 1 + Number(document.documentElement.dataset.news || 0);
  };
  source.addEventListener("over", () => { source.close(); say("", "the run is over"); });
  source.onerror = () => say("lost", "no connection to the server; the page shows what was known last");
})();
