"""Widgets on a page without a kernel: the browser runs the module and the state that a notebook has stored."""
import json

VIEW = "application/vnd.jupyter.widget-view+json"
STATE = "application/vnd.jupyter.widget-state+json"
OF_THE_WIDGET = ("layout", "tabbable", "tooltip")  # what JupyterLab needs to place it

# The module gets what anywidget gives it in JupyterLab, without the kernel. It is imported from a blob, since a page that was
# opened as a file may not import files. The picture stays until the module is loaded, and where scripts do not run.
MOUNT = """
<div class="explorer" id="%(id)s"><img alt="A still picture of the explorer" src="data:image/png;base64,%(picture)s"></div>
<script type="module">
const el = document.getElementById("%(id)s"), values = %(values)s, listeners = {};
const model = {
  get: (name) => values[name],
  set(name, value) { values[name] = value; (listeners[`change:${name}`] ?? []).forEach((call) => call()); },
  on(event, call) { (listeners[event] ??= []).push(call); },
  off(event, call) { listeners[event] = (listeners[event] ?? []).filter((other) => other !== call); },
  save_changes() {},
};
const url = URL.createObjectURL(new Blob([%(source)s], { type: "text/javascript" }));
const { default: widget } = await import(url);
widget.render({ model, el });
</script>
"""


def mount_widget(output: dict, states: dict) -> dict:
    "The output with its widget as HTML that runs by itself; other outputs are returned unchanged."
    data = output.get("data", {})
    if VIEW not in data:
        return output
    model_id = data[VIEW]["model_id"]
    model = states[model_id]["state"]
    values = {name: value for name, value in model.items() if name[0] != "_" and name not in OF_THE_WIDGET}
    html = MOUNT % dict(id=f"explorer-{model_id}", picture="".join(data["image/png"]).strip(),
                        values=_script(values), source=_script(model["_esm"]))
    return output | {"data": {"text/html": html, "text/plain": "".join(data.get("text/plain", ""))}}


def _script(value) -> str:
    return json.dumps(value).replace("</", "<\\/")
