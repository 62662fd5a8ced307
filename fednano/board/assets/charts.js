// Charts as SVG elements. Nothing here makes markup out of text, so that names in a run cannot become elements.

const WIDTH = 420, HEIGHT = 210, LEFT = 58, RIGHT = 10, TOP = 10, BOTTOM = 26;

export function svg(name, attributes = {}, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

function ticks(low, high) {
  const span = high - low || 1;
  const rough = span / 4, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((each) => each * power).find((each) => each >= rough);
  const found = [];
  for (let value = Math.ceil(low / step) * step; value <= high + step * 1e-6; value += step) found.push(value);
  return found;
}

function frame(low, high, rounds, format, label, inset = 0) {
  const last = Math.max(2, ...rounds);
  const x = (round) => LEFT + inset + ((WIDTH - LEFT - RIGHT - 2 * inset) * (round - 1)) / (last - 1);
  const y = (value) => TOP + (HEIGHT - TOP - BOTTOM) * (1 - (value - low) / (high - low || 1));
  const chart = svg("svg", { class: "chart", viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": label });
  for (const value of ticks(low, high)) {
    chart.append(svg("line", { class: "grid", x1: LEFT, x2: WIDTH - RIGHT, y1: y(value), y2: y(value) }));
    chart.append(svg("text", { x: LEFT - 6, y: y(value) + 4, "text-anchor": "end" }, format(value)));
  }
  for (const round of new Set([1, Math.round((1 + last) / 2), last])) {
    chart.append(svg("text", { x: x(round), y: HEIGHT - 6, "text-anchor": round === last && !inset ? "end" : "middle" }, String(round)));
  }
  return { chart, x, y };
}

const known = (value) => typeof value === "number" && Number.isFinite(value);

/** A line of `rows[..][key]` over rounds, with a band between `low` and `high` where rows have them. */
export function lineChart(rows, { key, low, high, format, label, colour = 0, fixed = null }) {
  const points = rows.filter((row) => known(row[key]));
  if (!points.length) return null;
  const values = points.flatMap((row) => [row[key], low && row[low], high && row[high]]).filter(known);
  let [bottom, top] = fixed ?? [Math.min(...values), Math.max(...values)];
  if (bottom === top) [bottom, top] = [bottom - 0.5, top + 0.5];
  const at = points[points.length - 1];
  const { chart, x, y } = frame(bottom, top, rows.map((row) => row.round), format,
    `${label}: ${format(points[0][key])} in round ${points[0].round}, ${format(at[key])} in round ${at.round}`);
  const band = points.filter((row) => low && known(row[low]) && known(row[high]));
  if (band.length > 1) {
    const up = band.map((row) => `${x(row.round)},${y(row[high])}`);
    const down = band.map((row) => `${x(row.round)},${y(row[low])}`).reverse();
    chart.append(svg("polygon", { class: `band p${colour}`, points: [...up, ...down].join(" ") }));
  }
  chart.append(svg("polyline", { class: `line p${colour}`, points: points.map((row) => `${x(row.round)},${y(row[key])}`).join(" ") }));
  for (const row of points.length > 60 ? [at] : points) {
    chart.append(svg("circle", { class: `p${colour}`, cx: x(row.round), cy: y(row[key]), r: 2.6 },
      svg("title", {}, `round ${row.round}: ${format(row[key])}`)));
  }
  return chart;
}

/** Stacked bars: one bar a round, one part a plane. */
export function barChart(rows, { planes, format, label }) {
  const bars = rows.map((row) => ({ round: row.round, parts: planes.map((plane) => row.bytes[plane] ?? 0) }));
  const sums = bars.map((bar) => bar.parts.reduce((sum, part) => sum + part, 0));
  const top = Math.max(0, ...sums);
  if (!top) return null;
  const room = (WIDTH - LEFT - RIGHT) / Math.max(2, ...bars.map((bar) => bar.round)), width = Math.max(1, room * 0.7);
  const { chart, x, y } = frame(0, top, bars.map((bar) => bar.round), format,
    `${label}: ${format(sums[sums.length - 1])} in the last round`, room / 2);
  bars.forEach((bar) => {
    let base = 0;
    bar.parts.forEach((part, place) => {
      if (!part) return;
      chart.append(svg("rect", { class: `p${place % 4}`, "stroke-width": 0, x: x(bar.round) - width / 2, width, y: y(base + part), height: Math.max(0.5, y(base) - y(base + part)) },
        svg("title", {}, `round ${bar.round}, ${planes[place].replace("_", " ")}: ${format(part)}`)));
      base += part;
    });
  });
  return chart;
}
