"use strict";
(() => {
  const charts = JSON.parse(document.getElementById("charts").textContent);
  const grids = JSON.parse(document.getElementById("grids").textContent);
  const root = document.documentElement;
  const ROLES = new Set(["accent", "good", "amber", "orange", "bad", "blue", "violet", "muted"]);

  const colour = (role) => getComputedStyle(root).getPropertyValue(`--${role}`).trim();

  // Colours in the figures are names of roles; the theme says what they look like.
  const themed = (node) => {
    if (Array.isArray(node)) return node;
    const copy = {};
    for (const [key, value] of Object.entries(node)) {
      if (key === "color" && ROLES.has(value)) copy[key] = colour(value);
      else copy[key] = value !== null && typeof value === "object" ? themed(value) : value;
    }
    return copy;
  };

  const draw = () => {
    for (const place of document.querySelectorAll("[data-chart]")) {
      const figure = charts[place.dataset.chart];
      const layout = themed(figure.layout);
      Object.assign(layout, {
        paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: {color: colour("text"), size: 12},
        hoverlabel: {bgcolor: colour("card"), font: {color: colour("text")}},
      });
      for (const axis of ["xaxis", "yaxis"]) {
        Object.assign(layout[axis], {gridcolor: colour("grid"), zerolinecolor: colour("grid")});
      }
      Plotly.react(place, figure.data.map(themed), layout, {responsive: true, displayModeBar: false});
    }
  };

  const setTheme = (name) => { root.dataset.theme = name; draw(); };
  const prefersDark = matchMedia("(prefers-color-scheme: dark)");
  prefersDark.addEventListener("change", (event) => setTheme(event.matches ? "dark" : "light"));
  document.getElementById("theme").addEventListener("click", () => {
    setTheme(root.dataset.theme === "dark" ? "light" : "dark");
  });
  setTheme(prefersDark.matches ? "dark" : "light");

  const slider = document.getElementById("slider");
  if (slider) {
    const show = () => {
      const chosen = grids[Number(slider.value)];
      const picture = document.getElementById("grid");
      picture.src = chosen.source;
      picture.alt = `Samples after ${chosen.images} images`;
      document.getElementById("slider-images").value = `${chosen.images} images`;
    };
    slider.addEventListener("input", show);
    let playing = null;
    const play = document.getElementById("play");
    play.addEventListener("click", () => {
      if (playing) {
        clearInterval(playing);
        playing = null;
      } else {
        playing = setInterval(() => {
          slider.value = (Number(slider.value) + 1) % grids.length;
          show();
        }, 500);
      }
      play.textContent = playing ? "\u23F8" : "\u25B6";
    });
  }

  const everything = document.getElementById("all-keys");
  if (everything) {
    everything.addEventListener("change", () => {
      for (const row of document.querySelectorAll("#config .same")) row.hidden = !everything.checked;
    });
  }
})();
