"use strict";
// The page works without this script.
(() => {
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];

  // ---- mark the current section in the navigation
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

  // ---- links open the sections that they point into; printing opens all
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
