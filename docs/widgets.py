"""Widgets on a page without a kernel: the browser runs the module and the state that a notebook has stored.

What a reader moves is kept in the address, as `#vanishing.accuracy=0.5&clip.advantage=1.2`: a link shows it to others.
"""
import json
import re
from functools import cache
from html import escape
from pathlib import Path

EXPLORE = Path(__file__).resolve().parent.parent / "nbs" / "explore" / "index.ipynb"  # holds every explorer once
VIEW = "application/vnd.jupyter.widget-view+json"
STATE = "application/vnd.jupyter.widget-state+json"
OF_THE_WIDGET = ("layout", "tabbable", "tooltip")  # what JupyterLab needs to place it
NEEDS_A_KERNEL = '<p class="needs-kernel">Live in JupyterLab: these controls call Python.</p>'

# The module gets what anywidget gives it in JupyterLab, without the kernel. It is imported from a blob, since a page that was
# opened as a file may not import files. The picture stays until the module is loaded, and where scripts do not run.
MOUNT = """
<div class="explorer" id="%(id)s" data-explorer="%(name)s"><img alt="%(alt)s" src="data:image/png;base64,%(picture)s"></div>
<script type="module">
const el = document.getElementById("%(id)s"), first = %(values)s, values = { ...first }, listeners = {}, moved = new Set();
const name = "%(name)s", isOwn = (key) => key.startsWith(name + ".");
const inAddress = () => new URLSearchParams(location.hash.slice(1));
const same = (a, b) => JSON.stringify(a) === JSON.stringify(b);
let timer;
const writeAddress = () => {
  const others = [...inAddress()].filter(([key]) => key.includes(".") && !isOwn(key));
  const own = [...moved].filter((key) => !same(values[key], first[key]) && JSON.stringify(values[key]).length < 120);
  const hash = new URLSearchParams([...others, ...own.map((key) => [name + "." + key, JSON.stringify(values[key])])]).toString();
  clearTimeout(timer);
  if (hash !== location.hash.slice(1)) history.replaceState(null, "", hash ? "#" + hash : location.pathname + location.search);
};
const model = {
  get: (key) => values[key],
  set(key, value) { values[key] = value; moved.add(key); (listeners["change:" + key] ?? []).forEach((call) => call()); },
  on(event, call) { (listeners[event] ??= []).push(call); },
  off(event, call) { listeners[event] = (listeners[event] ?? []).filter((other) => other !== call); },
  save_changes() { clearTimeout(timer); timer = setTimeout(writeAddress, 200); },
};
const show = (state) => { for (const key of Object.keys(first)) if (!same(values[key], state[key])) model.set(key, state[key]); };
const addressed = () => {
  const state = { ...first };
  for (const [key, text] of inAddress()) {
    const trait = key.slice(name.length + 1);
    try {
      const value = JSON.parse(text);
      const isAlike = typeof value === typeof first[trait] && Array.isArray(value) === Array.isArray(first[trait]);
      if (isOwn(key) && isAlike) state[trait] = value;
    } catch { /* not one of ours */ }
  }
  return state;
};
const reset = () => { show(first); moved.clear(); writeAddress(); };
const url = URL.createObjectURL(new Blob([%(source)s], { type: "text/javascript" }));
const { default: widget } = await import(url);
const place = document.createElement("div"), bar = document.createElement("p"), said = document.createElement("span");
const button = (text, click) =>
  Object.assign(document.createElement("button"), { type: "button", textContent: text, onclick: click });
const copy = async () => {
  writeAddress();
  const late = new Promise((_, refuse) => setTimeout(refuse, 1000)); // a browser may leave the question open
  try { await Promise.race([navigator.clipboard.writeText(location.href), late]); said.textContent = "Copied."; } catch { said.textContent = location.href; }
};
bar.className = "explorer-bar";
bar.style.cssText = "display: flex; flex-wrap: wrap; gap: .3em 1em; margin: .3em 0; font-size: .85em; overflow-wrap: anywhere";
said.setAttribute("role", "status");
bar.append(button("Reset", reset), button("Copy link", copy), said);
for (const one of bar.querySelectorAll("button")) {
  one.style.cssText = "font: inherit; color: inherit; background: none; border: 0; padding: .4em 0; "
    + "text-decoration: underline; cursor: pointer";
}
el.replaceChildren(place, bar);
Object.assign(values, addressed());
try { widget.render({ model, el: place }); } catch { Object.assign(values, first); widget.render({ model, el: place }); }
for (const key of Object.keys(first)) if (!same(values[key], first[key])) moved.add(key);
addEventListener("hashchange", () => { try { show(addressed()); } catch { reset(); } });
if ([...inAddress().keys()][0]?.startsWith(name + ".")) el.scrollIntoView();
</script>
"""


def _name(model: dict) -> str:
    "The name of an explorer: `VanishingExplorer` -> `vanishing`."
    return re.sub("Explorer$", "", model.get("_anywidget_id", "").rpartition(".")[2]).lower() or "explorer"


@cache
def _stored() -> dict[str, tuple[dict, dict, str]]:
    "Name -> output, states and words of every explorer on the page that gathers them."
    notebook = json.loads(EXPLORE.read_text(encoding="utf-8"))
    states = notebook["metadata"]["widgets"][STATE]["state"]
    outputs = [(output, "".join(cell["source"])) for cell in notebook["cells"] for output in cell.get("outputs", ())
               if VIEW in output.get("data", {})]
    return {_name(states[output["data"][VIEW]["model_id"]]["state"]):
            (output, states, re.search(r"^#\| fig-alt: (.+)", source, re.M)[1]) for output, source in outputs}


def stored_explorer(name: str) -> dict:
    "The explorer of this name as HTML, from the page that gathers them; raises `ValueError` for an unknown name."
    if name not in _stored():
        raise ValueError(f"there is no explorer {name!r} in {EXPLORE.name}, only {', '.join(_stored())}")
    return mount_widget(*_stored()[name])


def mount_widget(output: dict, states: dict, words: str = "") -> dict:
    """The output with its widget as HTML that runs by itself; other outputs are returned unchanged.

    `words` say what the still picture shows, which stands there until the module is loaded.
    """
    data = output.get("data", {})
    if VIEW not in data:
        return output
    model_id = data[VIEW]["model_id"]
    model, text = states[model_id]["state"], "".join(data.get("text/plain", ""))
    if "_esm" not in model:  # of ipywidgets: nothing answers without a kernel
        return output | {"data": {"text/html": NEEDS_A_KERNEL, "text/plain": text}}
    values = {name: value for name, value in model.items() if name[0] != "_" and name not in OF_THE_WIDGET}
    name = _name(model)
    html = MOUNT % dict(id=f"explorer-{model_id}", picture="".join(data["image/png"]).strip(), name=name,
                        alt=escape(words or f"Still picture of the explorer “{name}”, as it is before anything is moved"),
                        values=_script(values), source=_script(model["_esm"]))
    return output | {"data": {"text/html": html, "text/plain": text}}


def _script(value) -> str:
    return json.dumps(value).replace("</", "<\\/")
