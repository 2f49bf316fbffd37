// The page's one script. All works without it but for what goes on by itself: parts of the page that the server sends
// again when they have changed, and the plots. A tab has one stream of events, and none while nobody looks at it.
"use strict";

(() => {
  const $ = (selector, within = document) => within.querySelector(selector);
  const $$ = (selector, within = document) => [...within.querySelectorAll(selector)];

  // Parts that change ------------------------------------------------------------------------------------------------

  const AGAIN_MS = 10000; // after which a stream that was refused is asked for again
  const stale = $("#stale");
  let stream = null;
  let timer = 0;

  const say = (text) => {
    stale.textContent = text;
    stale.hidden = !text;
  };

  // Where the focus was, so that it is there again in what takes its place.
  const placeOf = (element) => {
    const names = ["id", "href", "name", "action"].filter((name) => element.getAttribute(name));
    const marks = names.map((name) => `[${name}="${CSS.escape(element.getAttribute(name))}"]`);
    return element.tagName.toLowerCase() + marks.join("");
  };

  const replace = (part, html) => {
    const focused = part.contains(document.activeElement) ? placeOf(document.activeElement) : "";
    part.innerHTML = html; // made by our own templates, which escape everything
    if (focused) $(focused, part)?.focus({ preventScroll: true });
  };

  const close = () => {
    clearTimeout(timer);
    stream?.close();
    stream = null;
  };

  const open = () => {
    const path = document.body.dataset.live;
    if (!path || stream || document.hidden) return;
    stream = new EventSource(path);
    stream.addEventListener("parts", (event) => {
      say("");
      for (const [id, html] of Object.entries(JSON.parse(event.data))) {
        const part = document.getElementById(id);
        if (part) replace(part, html);
      }
      draw();
    });
    stream.addEventListener("stale", (event) => say(`${JSON.parse(event.data).why}: this is as it was.`));
    stream.addEventListener("over", () => {
      close();
      delete document.body.dataset.live;
    });
    stream.addEventListener("gone", () => location.reload());
    stream.addEventListener("error", () => {
      say("Not connected: this is as it was.");
      if (stream?.readyState === EventSource.CLOSED) {
        close();
        timer = setTimeout(open, AGAIN_MS);
      }
    });
  };

  document.addEventListener("visibilitychange", () => (document.hidden ? close() : open()));
  addEventListener("pagehide", close);
  addEventListener("pageshow", open);

  // Plots ------------------------------------------------------------------------------------------------------------

  const plots = new Map(); // name -> { plot, lines, drawn }
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
  const COLOURS = ["one", "two", "four", "three"];

  const lineOf = (name, n, isLast) => {
    const stroke = colour(isLast ? "fail" : COLOURS[n % COLOURS.length]);
    const width = 1.5;
    return { label: name, stroke, width, points: { show: false }, fill: n ? undefined : `${stroke}22`, value: (_, v) => (v === null ? "–" : v.toLocaleString()) };
  };

  // Steps last until the next one begins; so does the last one.
  const dataOf = ({ times, seconds, lines }) => {
    const steps = seconds >= 3600 && times.length > 0;
    const all = steps ? [...times, times.at(-1) + seconds] : times;
    return [all, ...lines.map(({ values }) => (steps ? [...values, values.at(-1)] : values))];
  };

  const make = (place, found) => {
    const axis = { stroke: colour("soft"), grid: { stroke: colour("line"), width: 1 }, ticks: { stroke: colour("line"), width: 1 } };
    const steps = found.seconds >= 3600 ? { paths: uPlot.paths.stepped({ align: 1 }) } : {};
    const lines = found.lines.map((line, n) => ({ ...lineOf(line.name, n, n === found.lines.length - 1), ...steps }));
    const time = { label: "time", value: (_, at) => (at === null ? "–" : new Date(at * 1000).toLocaleTimeString([], { hour: "2-digit", minute: "2-digit" })) };
    const options = {
      width: place.clientWidth, height: 180, series: [time, ...lines],
      axes: [{ ...axis, values: "{HH}:{mm}", space: 60 }, { ...axis, size: 46 }],
      scales: { y: { range: (_, low, high) => [0, Math.max(high * 1.1, 1)] } },
      cursor: { drag: { x: false, y: false } },
    };
    place.replaceChildren();
    return new uPlot(options, dataOf(found), place);
  };

  const draw = () => {
    if (typeof uPlot === "undefined") return;
    for (const source of $$("[data-lines]")) {
      const found = JSON.parse(source.dataset.lines);
      const place = $(`[data-plot="${CSS.escape(found.name)}"]`);
      if (!place) continue;
      const names = found.lines.map((line) => line.name).join("\n");
      const known = plots.get(found.name);
      if (known?.names === names) {
        if (known.json !== source.dataset.lines) known.plot.setData(dataOf(found));
        known.json = source.dataset.lines;
      } else {
        known?.plot.destroy();
        plots.set(found.name, { names, json: source.dataset.lines, plot: make(place, found) });
      }
    }
  };

  const again = () => {
    for (const { plot } of plots.values()) plot.destroy();
    plots.clear();
    draw();
  };
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", again);
  let width = innerWidth;
  addEventListener("resize", () => {
    if (innerWidth !== width) again();
    width = innerWidth;
  });

  // Ticks of a list --------------------------------------------------------------------------------------------------

  const count = (name) => {
    const boxes = $$(`input[type=checkbox][name="${CSS.escape(name)}"]`);
    const ticked = boxes.filter((box) => box.checked).length;
    for (const all of $$(`input[data-all="${CSS.escape(name)}"]`)) {
      all.checked = ticked > 0 && ticked === boxes.length;
      all.indeterminate = ticked > 0 && ticked < boxes.length;
    }
    for (const words of $$(`[data-count="${CSS.escape(name)}"]`)) words.textContent = `the ${ticked} that are ticked`;
  };

  document.addEventListener("change", (event) => {
    const box = event.target;
    if (!(box instanceof HTMLInputElement) || box.type !== "checkbox") return;
    const name = box.dataset.all || box.name;
    if (box.dataset.all) for (const one of $$(`input[type=checkbox][name="${CSS.escape(name)}"]`)) one.checked = box.checked;
    count(name);
  });

  // A form is sent once, however often its button is pressed.
  document.addEventListener("submit", (event) => {
    if (event.target.dataset.sent && event.target.method === "post") event.preventDefault();
    else if (!event.submitter?.hasAttribute("formaction")) event.target.dataset.sent = "yes";
  });
  addEventListener("pageshow", () => $$("form[data-sent]").forEach((form) => delete form.dataset.sent));

  $(".top nav [aria-current]")?.scrollIntoView({ block: "nearest", inline: "center" }); // where the bar is narrow
  draw();
  open();
})();
