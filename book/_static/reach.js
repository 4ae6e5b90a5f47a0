// What scrolls sideways can be reached by Tab, so that the arrow keys move it: a picture, a table, an output on a narrow
// screen; also when it was folded at first, or its letters came late.
const mark = (box) => {
  const scrolls = box.scrollWidth > box.clientWidth && !box.querySelector("[tabindex='0'], a");
  scrolls ? box.setAttribute("tabindex", "0") : box.removeAttribute("tabindex");
};
const reach = new ResizeObserver((changes) => changes.forEach(({ target }) => mark(target)));
document.addEventListener("DOMContentLoaded", () => {
  const boxes = document.querySelectorAll("article :is(pre, .picture, table, div.math, .cell_output)");
  boxes.forEach((box) => reach.observe(box));
  document.fonts.ready.then(() => boxes.forEach(mark));
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
