// Filters the entries of each part of the page as one types. It reads and hides what is there; all it writes are counts.
"use strict";
{
  const squeeze = (text) => text.normalize("NFKC").toLowerCase().replace(/\s+/g, " ").trim();
  const fields = [];

  for (const part of document.querySelectorAll("[data-search]")) {
    const box = part.querySelector(".search");
    const input = box.querySelector("input");
    const count = box.querySelector("output");
    const entries = Array.from(part.querySelectorAll("[data-entry], [data-entries] > tbody > tr"), (element) => ({
      element,
      texts: Array.from(element.querySelectorAll("[data-text]"), (text) => squeeze(text.textContent)),
    }));
    const groups = Array.from(part.querySelectorAll("[data-group]"), (element) => ({ element, open: element.open }));
    let searching = false;

    const filter = () => {
      const wanted = squeeze(input.value);
      let found = 0;
      for (const { element, texts } of entries) {
        element.hidden = !texts.some((text) => text.includes(wanted));
        found += !element.hidden;
      }
      for (const group of groups) {
        const held = new Set(entries.filter((e) => !e.element.hidden && group.element.contains(e.element)));
        group.element.hidden = held.size === 0;
        if (group.element.tagName !== "DETAILS") continue;
        // What was folded away opens for its matches, and is as it was before once the field is empty again.
        if (wanted && !searching) group.open = group.element.open;
        group.element.open = wanted ? held.size > 0 : group.open;
      }
      searching = wanted !== "";
      part.toggleAttribute("data-searching", searching);
      count.textContent = searching ? `${found} of ${entries.length} match` : "";
    };

    input.addEventListener("input", filter);
    box.hidden = false;
    fields.push({ input, filter });
  }

  // report.html#q=TEXT opens the page with every field filled in.
  const follow = () => {
    const wanted = new URLSearchParams(location.hash.slice(1)).get("q");
    if (wanted === null) return;
    for (const { input, filter } of fields) {
      input.value = wanted;
      filter();
    }
  };
  addEventListener("hashchange", follow);
  follow();
}
