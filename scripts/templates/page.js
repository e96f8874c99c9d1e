"use strict";
// Search, filters and order of the table of claims; its state stands in the address after '#'.
(() => {
  const table = document.getElementById("claims");
  const form = document.getElementById("controls");
  if (!table || !form) return;
  const body = table.tBodies[0];
  const rows = Array.from(body.rows, (row, index) => ({ row, index, text: row.textContent.toLowerCase() }));
  const heads = Array.from(table.querySelectorAll("th[data-key]"));
  const count = document.getElementById("count");
  const filters = ["verdict", "family", "scale", "paper"];
  const fields = ["q", ...filters];
  let order = { key: "", down: false };

  function value(item, column) {
    const raw = item.row.cells[column].dataset.sort;
    if (raw === undefined || raw === "") return null;
    return Number.isNaN(Number(raw)) ? raw.toLowerCase() : Number(raw);
  }

  function sort() {
    const column = heads.findIndex((head) => head.dataset.key === order.key);
    const sign = order.down ? -1 : 1;
    const keyed = rows.map((item) => [column < 0 ? null : value(item, column), item]);
    keyed.sort(([a, one], [b, two]) => {
      if (a === b) return one.index - two.index;
      if (a === null) return 1; // without a value: last, whichever the direction
      if (b === null) return -1;
      return (a < b ? -1 : 1) * sign || one.index - two.index;
    });
    body.append(...keyed.map(([, item]) => item.row));
    for (const head of heads) {
      if (head.dataset.key === order.key) head.setAttribute("aria-sort", order.down ? "descending" : "ascending");
      else head.removeAttribute("aria-sort");
    }
  }

  function filter() {
    const words = form.elements.q.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const { row, text } of rows) {
      const keep = filters.every((name) => {
        const wanted = form.elements[name].value;
        return !wanted || row.dataset[name] === wanted;
      }) && words.every((word) => text.includes(word));
      row.hidden = !keep;
      shown += keep;
    }
    count.textContent = `${shown} of ${rows.length} claims shown`;
  }

  function remember() {
    const state = new URLSearchParams();
    for (const name of fields) if (form.elements[name].value) state.set(name, form.elements[name].value);
    if (order.key) state.set("sort", (order.down ? "-" : "") + order.key);
    const text = state.toString();
    history.replaceState(null, "", text ? `#${text}` : location.pathname + location.search);
  }

  function restore() {
    const hash = location.hash.slice(1);
    if (hash && !hash.includes("=")) return; // an anchor of the page
    const state = new URLSearchParams(hash);
    for (const name of fields) {
      const field = form.elements[name];
      field.value = state.get(name) || "";
      if (field.selectedIndex === -1) field.value = "";
    }
    const wanted = state.get("sort") || "";
    const key = wanted.replace(/^-/, "");
    order = heads.some((head) => head.dataset.key === key) ? { key, down: wanted.startsWith("-") } : { key: "", down: false };
    sort();
    filter();
  }

  for (const head of heads) {
    head.querySelector("button").addEventListener("click", () => {
      order = { key: head.dataset.key, down: order.key === head.dataset.key && !order.down };
      sort();
      remember();
    });
  }
  for (const event of ["input", "change"]) form.addEventListener(event, () => { filter(); remember(); });
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", (event) => {
    event.preventDefault(); // the browser's own reset comes after this event
    for (const name of fields) form.elements[name].value = "";
    order = { key: "", down: false };
    sort();
    filter();
    remember();
  });
  window.addEventListener("hashchange", restore);
  form.hidden = false;
  restore();
})();
