// Sorting and filtering of the tables. Without this script, the page shows all rows in the order of the suites.
"use strict";

// The cell in a column; null for a cell that spans several columns, such as that of a missing run.
function cellAt(row, column) {
  let start = 0;
  for (const cell of row.cells) {
    if (column < start + cell.colSpan) return cell.colSpan === 1 ? cell : null;
    start += cell.colSpan;
  }
  return null;
}

function key(row, column) {
  const cell = cellAt(row, column);
  if (!cell) return null;
  if ("value" in cell.dataset) return Number(cell.dataset.value);
  return cell.tagName === "TH" || "text" in cell.dataset ? cell.textContent.trim() : null;
}

function compare(a, b) {
  if (typeof a === "number" && typeof b === "number") return a - b;
  return String(a).localeCompare(String(b), "en", { numeric: true });
}

function sort(table, column, descending) {
  const rows = [...table.tBodies[0].rows].map((row) => [key(row, column), row]);
  rows.sort(([a], [b]) => {
    // Rows without a value come last in both orders.
    if (a === null || b === null) return (a === null) - (b === null);
    return descending ? compare(b, a) : compare(a, b);
  });
  table.tBodies[0].append(...rows.map(([, row]) => row));
}

function makeSortable(table) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const descending = head.getAttribute("aria-sort") === "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", descending ? "descending" : "ascending");
      sort(table, column, descending);
    });
  });
}

function filter(form, tables, count) {
  const wanted = [...form.querySelectorAll("select")].filter((select) => select.value);
  const finished = form.querySelector("input[type=checkbox]").checked;
  let shown = 0;
  let all = 0;
  for (const table of tables) {
    for (const row of table.tBodies[0].rows) {
      row.hidden =
        wanted.some((select) => row.dataset[select.name] !== select.value) ||
        (finished && row.dataset.state !== "finished");
      shown += !row.hidden;
      all += 1;
    }
  }
  count.textContent = `${shown} of ${all} rows`;
}

const tables = [...document.querySelectorAll("table[data-sortable]")];
const form = document.querySelector("form");
const count = form.querySelector("output");
tables.forEach(makeSortable);
const update = () => filter(form, tables, count);
form.addEventListener("change", update);
form.addEventListener("reset", () => setTimeout(update));
form.addEventListener("submit", (event) => event.preventDefault());
form.hidden = false;
update();
