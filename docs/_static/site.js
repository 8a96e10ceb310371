// What the theme leaves out: the sidebar shows where one is, its regions have names, wide boxes and tables are within reach.
document.addEventListener("DOMContentLoaded", () => {
  const sidebar = document.querySelector(".sidebar-scroll");
  const here = document.querySelector(".sidebar-tree .current-page");
  if (sidebar && here) sidebar.scrollTop += here.getBoundingClientRect().top - sidebar.getBoundingClientRect().top - sidebar.clientHeight / 3;

  document.querySelector(".sidebar-drawer")?.setAttribute("aria-label", "Pages");
  document.querySelector(".toc-drawer")?.setAttribute("aria-label", "On this page");

  // A long name in a table is broken after a dot, a dash or a low line.
  for (const text of document.querySelectorAll("article td code .pre"))
    if (text.textContent.length > 20) text.innerHTML = text.innerHTML.replace(/([_.\-/])(?=\w)/g, "$1<wbr>");

  for (const table of document.querySelectorAll("article table.docutils")) {
    const names = [...table.querySelectorAll("thead th")].map((cell) => cell.textContent);
    for (const row of table.querySelectorAll("tbody tr"))
      [...row.children].forEach((cell, i) => {
        if (names[i]) cell.setAttribute("data-name", names[i]);
        if (!cell.textContent.trim()) cell.setAttribute("data-empty", "");
      });
  }

  // A keyboard scrolls a box only where it can be focused; a table that is too wide is shown as a list.
  const fit = () => {
    for (const box of document.querySelectorAll("article pre"))
      box.scrollWidth > box.clientWidth + 1 ? box.setAttribute("tabindex", "0") : box.removeAttribute("tabindex");
    for (const formula of document.querySelectorAll("article .formula math")) {
      formula.style.fontSize = "";
      const room = formula.parentElement.clientWidth / formula.getBoundingClientRect().width;
      if (room < 1) formula.style.fontSize = `${Math.max(0.5, 0.98 * room) * 1.1}em`;
    }
    for (const wrapper of document.querySelectorAll("article .table-wrapper")) {
      wrapper.classList.remove("stacked");
      const isCrowded = window.innerWidth < 640 && wrapper.querySelectorAll("thead th").length > 2;
      wrapper.classList.toggle("stacked", isCrowded || wrapper.scrollWidth > wrapper.clientWidth + 1);
    }
  };
  fit();
  window.addEventListener("resize", fit);
  window.addEventListener("load", fit);
});
