"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const root = document.documentElement;
  const plots = new Map();
  const logarithmic = new Set();
  const HEIGHT = 250;

  const colour = (name) => getComputedStyle(root).getPropertyValue(name).trim();
  const seriesColour = (series) => colour(series.kind === "lost" ? "--red" : `--c${series.colour % 6}`);

  const format = (value) => {
    if (value === null || value === undefined) return "–";
    const size = Math.abs(value);
    return size !== 0 && (size < 1e-3 || size >= 1e6) ? value.toExponential(2) : String(Number(value.toPrecision(4)));
  };

  // Rollbacks are shaded over the steps they took back; injected faults get a line of their own, and
  // so do structural changes, with labels at the foot of the chart.
  function drawMarks(plot) {
    const { ctx, bbox } = plot;
    const ratio = devicePixelRatio;
    const at = (step) => plot.valToPos(step, "x", true);
    ctx.save();
    ctx.beginPath();
    ctx.rect(bbox.left, bbox.top, bbox.width, bbox.height);
    ctx.clip();
    ctx.font = `${11 * ratio}px system-ui, sans-serif`;
    ctx.textAlign = "left";
    const growth = data.marks.filter((mark) => mark.kind === "seed");
    drawGrowth(plot, growth, at);
    data.marks.filter((mark) => mark.kind !== "seed").forEach((mark, index) => {
      const rollback = mark.kind === "rollback";
      const x = at(rollback ? mark.from : mark.at);
      if (rollback) {
        ctx.fillStyle = colour("--red-wash");
        ctx.fillRect(at(mark.to), bbox.top, Math.max(x - at(mark.to), 2 * ratio), bbox.height);
      }
      ctx.strokeStyle = ctx.fillStyle = colour(rollback ? "--red" : "--amber");
      ctx.lineWidth = ratio;
      ctx.setLineDash(rollback ? [] : [4 * ratio, 4 * ratio]);
      ctx.beginPath();
      ctx.moveTo(x, bbox.top);
      ctx.lineTo(x, bbox.top + bbox.height);
      ctx.stroke();
      const width = ctx.measureText(mark.label).width;
      const right = x + width + 8 * ratio > bbox.left + bbox.width || !rollback;
      const left = right ? x - width - 5 * ratio : x + 5 * ratio;
      ctx.fillText(mark.label, left, bbox.top + (14 + 13 * (index % 3)) * ratio);
    });
    ctx.restore();
  }

  // A label that would cover the one before in its row is left out; its line stays.
  function drawGrowth(plot, marks, at) {
    const { ctx, bbox } = plot;
    const ratio = devicePixelRatio;
    const ends = [-Infinity, -Infinity, -Infinity];
    ctx.strokeStyle = ctx.fillStyle = colour("--green");
    ctx.lineWidth = ratio;
    ctx.setLineDash([2 * ratio, 3 * ratio]);
    marks.forEach((mark) => {
      const x = at(mark.at);
      ctx.beginPath();
      ctx.moveTo(x, bbox.top);
      ctx.lineTo(x, bbox.top + bbox.height);
      ctx.stroke();
      const width = ctx.measureText(mark.label).width;
      const left = x + width + 8 * ratio > bbox.left + bbox.width ? x - width - 4 * ratio : x + 4 * ratio;
      const row = ends.findIndex((end) => left > end);
      if (row < 0) return;
      ends[row] = left + width + 4 * ratio;
      ctx.fillText(mark.label, left, bbox.top + bbox.height - (6 + 13 * row) * ratio);
    });
    ctx.setLineDash([]);
  }

  // Ends of a confidence interval, joined at each point: a band needs two of them.
  function drawIntervals(plot, chart) {
    const { ctx, bbox } = plot;
    const ratio = devicePixelRatio;
    ctx.save();
    ctx.beginPath();
    ctx.rect(bbox.left, bbox.top, bbox.width, bbox.height);
    ctx.clip();
    ctx.lineWidth = 1.5 * ratio;
    chart.series.forEach((series, index) => {
      if (series.kind !== "high" || !plot.series[index + 1].show) return;
      ctx.strokeStyle = seriesColour(series);
      series.values.forEach((high, point) => {
        const low = chart.series[index + 1].values[point];
        if (high === null || low === null) return;
        const x = plot.valToPos(chart.x[point], "x", true);
        ctx.beginPath();
        ctx.moveTo(x, plot.valToPos(high, "y", true));
        ctx.lineTo(x, plot.valToPos(low, "y", true));
        ctx.stroke();
      });
    });
    ctx.strokeStyle = colour("--soft");
    ctx.lineWidth = ratio;
    const zero = plot.valToPos(0, "y", true);
    ctx.beginPath();
    ctx.moveTo(bbox.left, zero);
    ctx.lineTo(bbox.left + bbox.width, zero);
    ctx.stroke();
    ctx.restore();
  }

  const isEdge = (series) => series.kind === "high" || series.kind === "low";
  const bands = (chart) => chart.series.flatMap((series, index) =>
    (series.kind === "high" ? [{ series: [index + 1, index + 2], fill: `${seriesColour(series)}26` }] : []));

  function seriesOptions(series) {
    const stroke = seriesColour(series);
    const options = {
      label: series.kind === "faint" ? `${series.label}, each step` : series.label,
      stroke, width: 2, spanGaps: false, points: { show: series.kind === "points", size: 6 },
      value: (_, value) => format(value),
    };
    if (series.kind === "faint") { options.stroke = `${stroke}55`; options.width = 1; options.class = "unlisted"; }
    if (series.kind === "stepped") options.paths = uPlot.paths.stepped({ align: 1 });
    if (isEdge(series)) { options.width = 0; options.class = "unlisted"; options.points = { show: false }; }
    if (series.kind === "lost") { options.dash = [5, 4]; options.width = 1.5; options.class = "lost"; }
    return options;
  }

  const isPowerOfTen = (value) => Math.abs(Math.log10(value) - Math.round(Math.log10(value))) < 1e-9;
  const powersOfTen = (_, splits) => splits.map((value) => (isPowerOfTen(value) ? value : null));

  function axis(log, extra) {
    const line = { stroke: colour("--line"), width: 1, ...(log ? { filter: powersOfTen } : {}) };
    return { stroke: colour("--soft"), font: "12px system-ui, sans-serif", grid: line, ticks: line, ...extra };
  }

  function options(chart, width) {
    const log = logarithmic.has(chart.key);
    const draw = chart.series.some(isEdge) ? [(plot) => drawIntervals(plot, chart), drawMarks] : [drawMarks];
    return {
      width, height: HEIGHT,
      cursor: { sync: { key: "steps" }, drag: { x: true, y: false } },
      scales: { x: { time: false }, y: { distr: log ? 3 : 1 } },
      axes: [axis(false, {}), axis(log, { size: 62, values: (_, ticks) => ticks.map((tick) => (tick === null ? "" : format(tick))) })],
      series: [{ label: "step" }, ...chart.series.map(seriesOptions)],
      bands: bands(chart),
      hooks: { draw },
    };
  }

  // A logarithmic axis has no place for zero and below: such points become gaps.
  const columns = (chart) => [
    chart.x,
    ...chart.series.map((series) =>
      logarithmic.has(chart.key) ? series.values.map((value) => (value > 0 ? value : null)) : series.values),
  ];

  function draw(chart) {
    const host = document.getElementById(`chart-${chart.key}`);
    const previous = plots.get(chart.key);
    if (previous) previous.destroy();
    plots.set(chart.key, new uPlot(options(chart, host.clientWidth), columns(chart), host));
  }

  const drawAll = () => data.charts.forEach(draw);

  function useTheme(theme) {
    root.dataset.theme = theme;
    drawAll();
  }

  document.getElementById("theme").addEventListener("click", () =>
    useTheme(root.dataset.theme === "dark" ? "light" : "dark"));
  document.querySelectorAll("button[data-log]").forEach((button) =>
    button.addEventListener("click", () => {
      const key = button.dataset.log;
      const on = !logarithmic.has(key);
      if (on) logarithmic.add(key); else logarithmic.delete(key);
      button.setAttribute("aria-pressed", String(on));
      draw(data.charts.find((chart) => chart.key === key));
    }));
  document.getElementById("routine").addEventListener("change", (event) =>
    document.querySelector("table.events").classList.toggle("all", event.target.checked));

  let pending = 0;
  new ResizeObserver(() => {
    cancelAnimationFrame(pending);
    pending = requestAnimationFrame(() => data.charts.forEach((chart) => {
      const width = document.getElementById(`chart-${chart.key}`).clientWidth;
      const plot = plots.get(chart.key);
      if (plot && plot.width !== width) plot.setSize({ width, height: HEIGHT });
    }));
  }).observe(document.querySelector(".charts"));

  document.querySelectorAll("button[data-log]").forEach((button) => {
    logarithmic.add(button.dataset.log);
    button.setAttribute("aria-pressed", "true");
  });
  useTheme(matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
  document.body.dataset.ready = "true";
})();
