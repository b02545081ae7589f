"use strict";
// Filters of the answer time-line, kept in the address; and a page of a run under way reads itself again.
(() => {
  const form = document.querySelector(".filters");
  const tasks = [...document.querySelectorAll("details.task")];
  const key = "open " + location.pathname;

  function show() {
    const task = form.elements.task.value, fate = form.elements.fate.value;
    let count = 0;
    for (const part of tasks) {
      let here = 0;
      for (const card of part.querySelectorAll("article")) {
        card.hidden = fate !== "" && !card.classList.contains(fate);
        here += !card.hidden;
      }
      part.hidden = (task !== "" && part.dataset.task !== task) || (here === 0 && (task + fate) !== "");
      if (!part.hidden) count += here;
    }
    document.querySelector(".none").hidden = count > 0;
    form.querySelector("output").textContent = count + (count === 1 ? " question" : " questions");
  }

  function choose() {
    show();
    const chosen = form.elements.task.value + form.elements.fate.value !== "";
    if (chosen) for (const part of tasks) part.open = !part.hidden;
    const state = new URLSearchParams({ task: form.elements.task.value, fate: form.elements.fate.value });
    location.replace("#" + (chosen ? state : "all"));
  }

  if (form) {
    const state = new URLSearchParams(location.hash.slice(1));
    form.elements.task.value = state.get("task") || "";
    if (form.elements.task.selectedIndex < 0) form.elements.task.value = "";
    for (const choice of form.elements.fate) choice.checked = choice.value === (state.get("fate") || "");
    if (!form.elements.fate.value) form.elements.fate[0].checked = true;
    form.hidden = false;
    form.addEventListener("submit", (event) => event.preventDefault());
    form.addEventListener("change", choose);
    if (state.get("task") || state.get("fate")) choose(); else show();
  }

  const every = Number(document.documentElement.dataset.refresh);
  if (!every) return;
  let touched = 0;
  for (const kind of ["scroll", "pointerdown", "keydown"])
    addEventListener(kind, () => { touched = Date.now(); }, { passive: true });
  const opened = sessionStorage.getItem(key);
  if (opened) tasks.forEach((part) => { part.open = opened.split("\n").includes(part.dataset.task); });
  setInterval(() => {
    if (document.hidden || Date.now() - touched < 5000) return;
    sessionStorage.setItem(key, tasks.filter((part) => part.open).map((part) => part.dataset.task).join("\n"));
    location.reload();
  }, 1000 * every);
})();
