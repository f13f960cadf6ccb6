"use strict";
// Reads what the server says of the runs, and draws it anew whenever something changed. What is chosen stands in the
// address, so that a page can be kept, shared with oneself, and loaded again.
(() => {
  const $ = (id) => document.getElementById(id);
  const SERIES = 6, SVG = "http://www.w3.org/2000/svg";
  const add = (element, attributes, children) => {
    for (const [name, value] of Object.entries(attributes)) {
      if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
      else if (typeof value === "boolean") element[name] = value;
      else element.setAttribute(name, value);
    }
    element.append(...children);
    return element;
  };
  const make = (tag, attributes = {}, ...children) => add(document.createElement(tag), attributes, children);
  const draw = (tag, attributes = {}, ...children) => add(document.createElementNS(SVG, tag), attributes, children);
  const number = (value) => typeof value === "number" ? value : typeof value === "string" && value.trim() ? Number(value) : NaN;
  const shown = (value) => value === undefined || value === null ? "" : typeof value === "number" ? String(Number(value.toPrecision(5)))
    : typeof value === "string" ? value : JSON.stringify(value);
  const ask = async (path, runs) => {
    const answer = await fetch(`${path}?${new URLSearchParams(runs.map((run) => ["run", run]))}`);
    if (!answer.ok) throw new Error(await answer.text());
    return answer.json();
  };

  // ---- what is chosen
  const start = { words: "", paper: "", scale: "", state: "", columns: "run,state,progress,started,minutes,overrides,measured",
    sort: "started", down: "1", runs: "", metrics: "", log: "", first: "", second: "" };
  const chosen = { ...start, ...Object.fromEntries(new URLSearchParams(location.hash.slice(1))) };
  let fresh = !location.hash;
  const list = (name) => chosen[name] ? chosen[name].split(",") : [];
  const keep = (changes) => {
    Object.assign(chosen, changes);
    const differing = Object.entries(chosen).filter(([name, value]) => value !== start[name]);
    history.replaceState(null, "", `#${new URLSearchParams(differing)}`);
  };
  const toggle = (name, item, on) => keep({ [name]: [...list(name).filter((other) => other !== item), ...(on ? [item] : [])].join(",") });
  // What is drawn anew keeps the reader's place.
  const refilled = (box, ...children) => {
    const key = box.contains(document.activeElement) ? document.activeElement.dataset.key : null;
    box.replaceChildren(...children);
    if (key) box.querySelector(`[data-key="${CSS.escape(key)}"]`)?.focus({ preventScroll: true });
  };

  let all = { fields: [], runs: [] }, curves = [];
  const style = (place) => `series-${place % SERIES} dash-${Math.floor(place / SERIES) % 4}`;
  const short = (run) => run.split("/").slice(2).join("/");

  // ---- the table
  const CONDITION = /^([^=!<>~]+)(!=|<=|>=|=|<|>|~)(.*)$/;
  const meets = (run, word) => {
    const match = CONDITION.exec(word);
    if (!match) return run.name.toLowerCase().includes(word.toLowerCase());
    const [, field, sign, wanted] = match, value = run.values[field];
    if (value === undefined) return sign === "!=" && wanted !== "";
    let left = number(value), right = number(wanted);
    if (sign === "~" || isNaN(left) || isNaN(right)) [left, right] = [shown(value).toLowerCase(), wanted.toLowerCase()];
    return { "=": left === right, "!=": left !== right, "<": left < right, "<=": left <= right, ">": left > right, ">=": left >= right,
      "~": String(left).includes(right) }[sign];
  };
  const compared = (first, second) => {
    const [left, right] = [first, second].map((run) => run.values[chosen.sort]);
    if (left === undefined || right === undefined) return (left === undefined) - (right === undefined);
    const [a, b] = [number(left), number(right)];
    const order = isNaN(a) || isNaN(b) ? shown(left).localeCompare(shown(right)) : a - b;
    return chosen.down ? -order : order;
  };
  const filtered = () => all.runs.filter((run) => ["paper", "scale", "state"].every((f) => !chosen[f] || run.values[f] === chosen[f])
    && chosen.words.split(/\s+/).filter(Boolean).every((word) => meets(run, word))).sort(compared);

  const drawTable = () => {
    // What no run has to say takes no room, unless it was asked for.
    const columns = list("columns").filter((name) => chosen.columns !== start.columns || all.runs.some((run) => name in run.values));
    const picked = list("runs"), rows = filtered();
    const heads = columns.map((name) => make("th", { scope: "col", ...(chosen.sort === name && { "aria-sort": chosen.down ? "descending" : "ascending" }) },
      make("button", { type: "button", "data-key": `sort ${name}`, onclick: () => {
        keep({ sort: name, down: chosen.sort === name && !chosen.down ? "1" : "" });
        drawTable();
      } }, name)));
    refilled($("table").tHead, make("tr", {}, make("th", { scope: "col" }, "show"), ...heads));
    refilled($("table").tBodies[0], ...rows.map((run) => make("tr", { class: picked.includes(run.name) ? "chosen" : "" },
      make("td", {}, make("input", { type: "checkbox", "aria-label": `show ${run.name}`, "data-key": run.name, checked: picked.includes(run.name),
        onchange: (event) => { toggle("runs", run.name, event.target.checked); drawTable(); load(); } })),
      ...columns.map((name) => make("td", { class: name === "run" ? "name" : name === "started" ? name : name === "state" ? `state-${run.values.state}` : "" },
        shown(run.values[name]))))));
    $("count").textContent = `${rows.length} of ${all.runs.length}, ${picked.length} shown below`;
  };
  const drawFilters = () => {
    for (const name of ["paper", "scale", "state"]) {
      const values = [...new Set(all.runs.map((run) => run.values[name]))].sort();
      refilled($("filters").elements[name], make("option", { value: "" }, "all"), ...values.map((value) => make("option", { value }, value)));
      $("filters").elements[name].value = values.includes(chosen[name]) ? chosen[name] : "";
    }
    $("filters").elements.words.value = chosen.words;
    drawColumns();
  };
  const drawColumns = () => {
    const word = $("column-words").value.toLowerCase(), columns = list("columns");
    const fields = all.fields.filter((name) => columns.includes(name) || name.toLowerCase().includes(word));
    refilled($("columns"), ...fields.map((name) => make("label", {}, make("input", { type: "checkbox", "data-key": name,
      checked: columns.includes(name), onchange: (event) => { toggle("columns", name, event.target.checked); drawTable(); } }), ` ${name}`)));
  };

  // ---- the curves: every chart has the same steps from left to right
  const ticks = (low, high) => {
    const rough = (high - low) / 4 || 1, power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].map((f) => f * power).find((s) => s >= rough);
    const found = [];
    for (let at = Math.ceil(low / step) * step; at <= high + step / 1e6; at += step) found.push(Number(at.toPrecision(12)));
    return found;
  };
  const chart = (metric, lines, steps) => {
    const [width, height, left, top, right, bottom] = [560, 260, 56, 26, 10, 26];
    const log = chosen.log && lines.every((line) => line.points.every(([, y]) => y > 0));
    const scaled = (y) => log ? Math.log10(y) : y;
    const values = lines.flatMap((line) => line.points.map(([, y]) => scaled(y)));
    let [low, high] = [Math.min(...values), Math.max(...values)];
    if (high - low <= 1e-9 * Math.max(Math.abs(low), Math.abs(high))) [low, high] = [low - Math.abs(low || 1) / 2, high + Math.abs(high || 1) / 2]; // in the middle
    const [first, last] = steps;
    const x = (step) => left + (step - first) / (last - first || 1) * (width - left - right);
    const y = (value) => top + (high - scaled(value)) / (high - low || 1) * (height - top - bottom);
    const text = (content, attributes) => draw("text", attributes, content);
    const label = (tick) => shown(log ? 10 ** tick : tick);
    const marks = draw("g"), caption = make("figcaption", {}, "Point at the chart, or use the arrow keys, to read it.");
    const at = (step) => {
      const found = lines.map((line) => ({ ...line, point: line.points.reduce((near, p) => Math.abs(p[0] - step) < Math.abs(near[0] - step) ? p : near) }));
      marks.replaceChildren(draw("line", { class: "cursor", x1: x(step), x2: x(step), y1: top, y2: height - bottom }),
        ...found.map((f) => draw("circle", { class: style(f.place), cx: x(f.point[0]), cy: y(f.point[1]), r: 2 })));
      caption.textContent = found.map((f) => `${short(f.run)}: ${shown(f.point[1])} at ${shown(f.point[0])}`).join("; ");
    };
    let cursor = last;
    const told = lines.map((line) => `${line.run} ends at ${shown(line.points.at(-1)[1])}`).join("; ");
    const picture = draw("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", tabindex: 0, "data-key": metric, "aria-label": `${metric} by step; ${told}`,
      onpointermove: (event) => {
        const box = picture.getBoundingClientRect(), place = (event.clientX - box.left) / box.width * width;
        at(cursor = Math.min(last, Math.max(first, first + (place - left) / (width - left - right) * (last - first))));
      },
      onkeydown: (event) => {
        const way = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
        if (!way) return;
        event.preventDefault();
        at(cursor = Math.min(last, Math.max(first, cursor + way * (last - first) / 50)));
      } },
      text(metric + (log ? ", logarithmic" : ""), { class: "heading", x: 4, y: 14 }),
      ...ticks(low, high).flatMap((tick) => {
        const place = top + (high - tick) / (high - low || 1) * (height - top - bottom);
        return [draw("line", { class: "grid", x1: left, x2: width - right, y1: place, y2: place }), text(label(tick), { x: left - 6, y: place + 4, "text-anchor": "end" })];
      }),
      ...ticks(first, last).map((tick) => text(shown(tick), { x: x(tick), y: height - 8, "text-anchor": "middle" })),
      ...lines.map((line) => line.points.length > 1
        ? draw("path", { class: style(line.place), d: `M${line.points.map(([s, v]) => `${x(s).toFixed(1)} ${y(v).toFixed(1)}`).join("L")}` })
        : draw("circle", { class: style(line.place), cx: x(line.points[0][0]), cy: y(line.points[0][1]), r: 2 })),
      marks);
    return make("figure", { class: "chart" }, picture, caption);
  };
  const drawCurves = () => {
    const names = [...new Set(curves.flatMap((run) => Object.keys(run.curves)))];
    const wanted = list("metrics").filter((name) => names.includes(name)), metrics = wanted.length ? wanted : names.slice(0, 4);
    refilled($("metrics"), ...names.map((name) => make("label", {}, make("input", { type: "checkbox", "data-key": name, checked: metrics.includes(name),
      onchange: (event) => { keep({ metrics: metrics.join(",") }); toggle("metrics", name, event.target.checked); drawCurves(); } }), ` ${name}`)));
    const steps = curves.flatMap((run) => metrics.flatMap((name) => (run.curves[name] ?? []).map(([step]) => step)));
    const ends = [Math.min(...steps), Math.max(...steps)];
    refilled($("charts"), ...metrics.map((name) => chart(name, curves.map((run, place) => ({ run: run.run, place, points: run.curves[name] }))
      .filter((line) => line.points), ends)));
    refilled($("legend"), ...curves.map((run, place) => make("li", {},
      draw("svg", { viewBox: "0 0 20 8", width: 20, height: 8, "aria-hidden": "true" }, draw("line", { class: style(place), x1: 0, x2: 20, y1: 4, y2: 4 })),
      [run.run, all.runs.find((other) => other.name === run.run)?.values.overrides].filter(Boolean).join(" "))));
    $("curves-none").hidden = metrics.length > 0;
    $("curves-none").textContent = curves.length ? "These runs have no curves: they train nothing, or have not begun to."
      : "Choose runs in the table: their curves are drawn here, over one axis.";
    $("metrics-box").hidden = $("scales").hidden = !names.length;
  };

  // ---- two configurations, and what was left to look at
  const sheet = (head, rows, kind = "text") => make("div", { class: "scroll sheet", tabindex: 0 }, make("table", { class: kind },
    make("thead", {}, make("tr", {}, ...head.map((name) => make("th", { scope: "col" }, name)))),
    make("tbody", {}, ...rows.map((row) => make("tr", {}, ...row.map((cell) => make("td", {}, shown(cell))))))));
  const drawDifferences = async () => {
    const picked = list("runs"), form = $("pair").elements;
    form.first.value = ""; // a select keeps what it lacks
    for (const [name, place] of [["first", 0], ["second", 1]]) {
      refilled(form[name], ...picked.map((run) => make("option", { value: run }, run)));
      form[name].value = picked.includes(chosen[name]) ? chosen[name] : picked[place] ?? "";
    }
    $("pair").hidden = picked.length < 2;
    if (picked.length < 2 || form.first.value === form.second.value) {
      $("diff").replaceChildren(make("p", { class: "quiet" }, "Choose two runs in the table."));
      return;
    }
    const pair = [form.first.value, form.second.value], told = await ask("/api/diff", pair);
    if (pair[0] !== form.first.value || pair[1] !== form.second.value) return; // answers may overtake each other
    const rows = (counts) => told.config.filter((d) => d[3] === counts).map((d) => d.slice(0, 3)), heads = ["first", "second"];
    $("diff").replaceChildren(make("h3", {}, "Configuration"),
      rows(true).length ? sheet(["field", ...heads], rows(true)) : make("p", {}, "Nothing that changes a result differs."),
      ...(rows(false).length ? [make("details", {}, make("summary", {}, `Where and on what they ran (${rows(false).length})`), sheet(["field", ...heads], rows(false)))] : []),
      make("h3", {}, "Metrics"),
      told.metrics.length ? sheet(["metric", ...heads, "difference"], told.metrics.map(([name, a, b]) => [name, a, b, a === null || b === null ? "" : b - a]))
        : make("p", {}, "None yet."));
  };
  const drawMedia = async () => {
    const asked = chosen.runs, found = await ask("/api/media", list("runs"));
    if (asked !== chosen.runs) return;
    const names = [...new Set(found.flatMap((run) => run.files.map((file) => file.name)))].sort();
    const figure = (run, file) => {
      const where = `/media/${[...run.split("/"), file.name].map(encodeURIComponent).join("/")}?${file.changed}`, what = `${file.name} of ${run}`;
      const content = file.kind === "table" ? sheet(file.head, file.rows)
        : file.kind === "video" ? make("video", { src: where, controls: true, loop: true, muted: true, preload: "metadata", "aria-label": what })
        : make("a", { href: where }, make("img", { src: where, alt: what, loading: "lazy" }));
      return make("figure", {}, content, make("figcaption", {}, run + (file.more ? `; ${file.more} more rows` : "")));
    };
    $("media").replaceChildren(...(names.length ? names.flatMap((name) => [make("h3", {}, name), make("div", { class: "side" },
      ...found.flatMap((run) => run.files.filter((file) => file.name === name).map((file) => figure(run.run, file))))])
      : [make("p", { class: "quiet" }, "The runs that are shown left nothing to look at.")]));
  };

  // ---- loading, once and whenever something changed
  const say = (text) => { $("status").textContent = text; };
  let seen = "";
  const load = async () => {
    try {
      const asked = chosen.runs, found = await ask("/api/curves", list("runs"));
      if (asked !== chosen.runs) return true;
      curves = found;
      drawCurves();
      await drawDifferences();
      const key = JSON.stringify([list("runs"), all.runs.map((run) => run.values.state)]);
      if (key !== seen) { seen = key; await drawMedia(); } // a clip that plays goes on while curves grow
      return true;
    } catch (error) {
      say(error.message);
      return false;
    }
  };
  const refresh = async () => {
    try {
      all = await ask("/api/runs", []);
      if (fresh && !chosen.runs) {
        chosen.sort = "started";
        chosen.runs = [...all.runs].sort(compared).filter((run) => run.curves.length).slice(0, 2).map((run) => run.name).join(",");
      }
      fresh = false; // from here on, no run may be what was chosen
      drawFilters();
      drawTable();
      if (await load()) say(`Live, ${new Date().toLocaleTimeString()}.`);
    } catch (error) {
      say(error.message);
    }
  };
  $("filters").addEventListener("input", (event) => { keep({ [event.target.name]: event.target.value }); drawTable(); });
  $("filters").addEventListener("submit", (event) => event.preventDefault());
  $("none").addEventListener("click", () => { keep({ runs: "" }); drawTable(); load(); });
  $("column-words").addEventListener("input", drawColumns);
  $("scales").elements.log.checked = Boolean(chosen.log);
  $("scales").addEventListener("input", (event) => { keep({ log: event.target.checked ? "1" : "" }); drawCurves(); });
  $("pair").addEventListener("input", (event) => { keep({ [event.target.name]: event.target.value }); drawDifferences(); });

  let busy = false, again = false;
  const changed = async () => {
    if (busy) { again = true; return; }
    busy = true;
    do { again = false; await refresh(); } while (again);
    busy = false;
  };
  const events = new EventSource("/events");
  events.onmessage = changed;
  events.onerror = () => say("Not connected: is assemble serve still running? The page goes on by itself when it is.");
})();
