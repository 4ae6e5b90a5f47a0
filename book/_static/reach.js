// What scrolls sideways can be reached by Tab, so that the arrow keys move it: a picture or a table on a narrow screen.
const reach = new ResizeObserver((boxes) => {
  for (const { target } of boxes) {
    const scrolls = target.scrollWidth > target.clientWidth && !target.querySelector("[tabindex='0'], a");
    scrolls ? target.setAttribute("tabindex", "0") : target.removeAttribute("tabindex");
  }
});
document.addEventListener("DOMContentLoaded", () => {
  for (const box of document.querySelectorAll("article :is(.picture, table, div.math, .cell_output)")) reach.observe(box);
});

// Paper is white: the page is printed in its light colours, whatever the screen shows.
let shown;
const page = document.documentElement.dataset;
addEventListener("beforeprint", () => { shown = page.theme; page.theme = "light"; });
addEventListener("afterprint", () => { page.theme = shown; });

// The theme takes the focus from a button that was pressed: who pressed it by a key goes on from there.
addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (button && event.detail === 0) button.blur = () => {};
  else if (button) delete button.blur;
}, true);
