"use strict";
// Everything here is convenience: without it, all claims are listed, and nothing is marked or enlarged.
(() => {
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];

  // ---- claims: filter and sort
  const table = document.querySelector(".claims.all");
  if (table) {
    const body = table.tBodies[0], rows = [...body.rows];
    const form = document.querySelector(".filters"), count = document.querySelector(".filters output");
    const filter = () => {
      const text = form.elements.words.value.trim().toLowerCase(), paper = form.elements.paper.value;
      const verdicts = all("input[name=verdict]:checked", form).map((box) => box.value);
      let left = 0;
      for (const row of rows) {
        row.hidden = !(verdicts.includes(row.dataset.verdict) && (!paper || row.dataset.paper === paper)
          && row.textContent.toLowerCase().includes(text));
        left += row.hidden ? 0 : 1;
      }
      count.value = `${left} of ${rows.length} claims`;
    };
    form.hidden = false;
    form.addEventListener("input", filter);
    form.addEventListener("submit", (event) => event.preventDefault());
    filter();
    all("th", table.tHead).forEach((head, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...head.childNodes);
      head.append(button);
      button.addEventListener("click", () => {
        const descending = head.getAttribute("aria-sort") === "ascending";
        all("th", table.tHead).forEach((other) => other.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", descending ? "descending" : "ascending");
        const key = (row) => row.cells[column].dataset.sort ?? row.cells[column].textContent.trim();
        const order = (a, b) => key(a).localeCompare(key(b), undefined, { numeric: !("sort" in a.cells[column].dataset) })
          || rows.indexOf(a) - rows.indexOf(b);
        const byNumber = (a, b) => Number(key(a)) - Number(key(b));
        const sorted = [...rows].sort("number" in head.dataset ? byNumber : order);
        body.append(...(descending ? sorted.reverse() : sorted));
      });
    });
  }

  // ---- where the reader is
  const links = new Map(all("nav a").map((link) => [link.hash.slice(1), link]));
  const parts = all("section.part, section.overview").filter((part) => links.has(part.id));
  const mark = () => {
    const line = innerHeight / 3;
    const current = parts.filter((part) => part.getBoundingClientRect().top <= line).pop() ?? parts[0];
    for (const part of parts) {
      const link = links.get(part.id);
      if (part !== current) link.removeAttribute("aria-current");
      else if (!link.hasAttribute("aria-current")) {
        link.setAttribute("aria-current", "true");
        const bar = link.closest("nav > ul");
        if (bar.scrollWidth > bar.clientWidth) bar.scrollLeft = link.offsetLeft - bar.clientWidth / 3;
      }
    }
  };
  let waiting = false;
  addEventListener("scroll", () => {
    if (!waiting) { waiting = true; requestAnimationFrame(() => { waiting = false; mark(); }); }
  }, { passive: true });
  if (parts.length) mark();

  // ---- a link into something folded opens it; printing opens all
  const unfold = () => {
    const target = location.hash && document.getElementById(decodeURIComponent(location.hash.slice(1)));
    for (let node = target; node; node = node.parentElement) if (node.tagName === "DETAILS") node.open = true;
    if (target) target.scrollIntoView();
  };
  addEventListener("hashchange", unfold);
  if (location.hash) unfold();
  let folded = [];
  addEventListener("beforeprint", () => { folded = all("details:not([open])"); folded.forEach((d) => { d.open = true; }); });
  addEventListener("afterprint", () => { folded.forEach((d) => { d.open = false; }); });

  // ---- pictures in full size
  const large = document.querySelector("dialog.large");
  const enlarge = (picture) => {
    large.replaceChildren(Object.assign(new Image(), { src: picture.src, alt: picture.alt }));
    large.showModal();
  };
  for (const picture of all(".media img")) {
    picture.tabIndex = 0;
    picture.setAttribute("role", "button");
    picture.addEventListener("click", () => enlarge(picture));
    picture.addEventListener("keydown", (event) => {
      if (event.key === "Enter" || event.key === " ") { event.preventDefault(); enlarge(picture); }
    });
  }
  large.addEventListener("click", () => large.close());
})();
