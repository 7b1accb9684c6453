"use strict";
const $ = (id) => document.getElementById(id);
const READ_HERE = ["image/png", "image/jpeg", "image/gif", "image/webp", "image/bmp"];
const SIDE_WHEN_SMALLER = 2048;
const MAP = [[0, 0, 4], [87, 16, 110], [188, 55, 84], [249, 142, 9], [252, 255, 164]];
const page = { token: null, models: [], limits: {}, model: null, picture: null, entries: [], chosen: null, maps: null };

// --- Theme -------------------------------------------------------------------------------------------------------
function setTheme(name) {
  document.documentElement.dataset.theme = name;
  $("theme").setAttribute("aria-pressed", String(name === "dark"));
}
function stored(kind, key, value) {
  try {
    const store = window[kind];
    if (value === undefined) return store.getItem(key);
    if (value === null) store.removeItem(key); else store.setItem(key, value);
  } catch { /* a browser may forbid it: then nothing is kept */ }
  return null;
}
const dark = window.matchMedia("(prefers-color-scheme: dark)");
setTheme(stored("localStorage", "theme") || (dark.matches ? "dark" : "light"));
dark.addEventListener("change", () => { if (!stored("localStorage", "theme")) setTheme(dark.matches ? "dark" : "light"); });
$("theme").addEventListener("click", () => {
  const name = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
  stored("localStorage", "theme", name);
  setTheme(name);
});

// --- Requests ----------------------------------------------------------------------------------------------------
class Refused extends Error {
  constructor(status, message) { super(message); this.status = status; }
}
async function send(path, body) {
  const headers = {};
  if (page.token) headers.Authorization = "Bearer " + page.token;
  if (body) headers["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(path, body ? { method: "POST", headers, body: JSON.stringify(body) } : { headers });
  } catch {
    throw new Refused(0, "The server cannot be reached; is it still running?");
  }
  if (response.ok) return response;
  let message = "The server refused this (" + response.status + ").";
  try { message = (await response.json()).error.message; } catch { /* not ours */ }
  throw new Refused(response.status, message);
}
async function stream(path, body, onEvent) {
  const reader = (await send(path, body)).body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "", last = null;
  for (;;) {
    const { done, value } = await reader.read();
    if (done) break;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const event = JSON.parse(part.replace(/^data: /, ""));
      if (event.event === "error") throw new Refused(500, event.error.message);
      last = event;
      onEvent(event);
    }
  }
  if (!last || last.event !== "done") throw new Refused(0, "The answer was cut off; ask once more.");
  return last;
}
function say(error) {
  if (error instanceof Refused && error.status === 401) { askForToken(); return; }
  $("alert").textContent = error.message;
  $("alert").hidden = false;
  if (!(error instanceof Refused)) console.error(error);
}
async function busy(button, work) {
  $("alert").hidden = true;
  if (button.disabled) return;
  button.disabled = true;
  try { await work(); } catch (error) { say(error); } finally { button.disabled = false; }
}
function make(tag, text, className) {
  const element = document.createElement(tag);
  if (text !== undefined) element.textContent = text;
  if (className) element.className = className;
  return element;
}

// --- Start and token ---------------------------------------------------------------------------------------------
function askForToken() {
  page.token = null;
  stored("sessionStorage", "token", null);
  $("work").hidden = true;
  $("bar").hidden = true;
  $("login").hidden = false;
  $("token").focus();
}
$("login").addEventListener("submit", (event) => {
  event.preventDefault();
  page.token = $("token").value.trim();
  $("token").value = "";
  start();
});
function tokenOfAddress() {
  const match = location.hash.match(/^#token=(.+)$/);
  if (match) {
    history.replaceState(null, "", location.pathname);
    return decodeURIComponent(match[1]);
  }
  return stored("sessionStorage", "token");
}
async function start() {
  try {
    const state = await (await send("/api/state")).json();
    if (page.token) stored("sessionStorage", "token", page.token);
    page.models = state.models;
    page.limits = state.limits;
    const names = [...new Set(state.models.map((model) => model.name))];
    $("model").replaceChildren(...names.map((name) => new Option(name)));
    $("login").hidden = true;
    $("work").hidden = false;
    $("bar").hidden = false;
    showBackends();
  } catch (error) {
    if (error instanceof Refused && error.status !== 401) { $("work").hidden = false; }
    say(error);
  }
}
function showBackends() {
  const here = page.models.filter((model) => model.name === $("model").value);
  $("backend").replaceChildren(...here.map((model) => new Option(model.backend, model.id)));
  chooseModel();
}
async function chooseModel() {
  page.model = page.models.find((model) => model.id === $("backend").value);
  page.chosen = null;
  hideMaps();
  try {
    const memory = await (await send("/api/memory?model=" + encodeURIComponent(page.model.id))).json();
    page.entries = memory.entries;
    showMemory();
  } catch (error) { say(error); }
}
$("model").addEventListener("change", showBackends);
$("backend").addEventListener("change", chooseModel);

// --- Picture -----------------------------------------------------------------------------------------------------
function asUrl(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new Refused(0, "The picture cannot be read; choose it again."));
    reader.readAsDataURL(blob);
  });
}
async function smaller(file) {
  let bitmap;
  try { bitmap = await createImageBitmap(file); } catch { throw new Refused(0, "This is not a picture that the browser can show."); }
  const scale = Math.min(1, SIDE_WHEN_SMALLER / Math.max(bitmap.width, bitmap.height));
  const canvas = make("canvas");
  canvas.width = Math.max(1, Math.round(bitmap.width * scale));
  canvas.height = Math.max(1, Math.round(bitmap.height * scale));
  canvas.getContext("2d").drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  return canvas.toDataURL("image/jpeg", 0.92);
}
async function show(file) {
  if (!file) return;
  $("alert").hidden = true;
  try {
    const fits = READ_HERE.includes(file.type) && file.size <= page.limits.picture_bytes;
    const url = fits ? await asUrl(file) : await smaller(file);
    $("image").src = url;
    await $("image").decode();
    page.picture = { url, label: (file.name || "").slice(0, 200) };
    viewPicture();
    $("question").focus();
  } catch (error) {
    say(error instanceof Refused ? error : new Refused(0, "This is not a picture that the browser can show."));
    viewPicture();
  }
}
function viewPicture() {
  const shown = Boolean(page.picture);
  if (shown) $("image").src = page.picture.url;
  hideMaps();
  $("image").hidden = !shown;
  $("empty").hidden = shown;
  $("away").hidden = !shown;
  $("frame").classList.toggle("full", shown);
  $("about").textContent = shown ? "About the picture in view." : "No picture is in view: the memory answers.";
}
for (const id of ["file", "camera"]) {
  $(id).addEventListener("change", (event) => { show(event.target.files[0]); event.target.value = ""; });
}
$("away").addEventListener("click", () => { page.picture = null; viewPicture(); $("file").focus(); });
document.addEventListener("paste", (event) => {
  const file = [...(event.clipboardData?.files || [])].find((each) => each.type.startsWith("image/"));
  if (file) { event.preventDefault(); show(file); }
});
for (const name of ["dragenter", "dragover"]) {
  document.addEventListener(name, (event) => { event.preventDefault(); $("frame").classList.add("over"); });
}
for (const name of ["dragleave", "drop"]) document.addEventListener(name, () => $("frame").classList.remove("over"));
document.addEventListener("drop", (event) => { event.preventDefault(); show(event.dataTransfer.files[0]); });

// --- Conversation ------------------------------------------------------------------------------------------------
function percent(share) { return Math.round(100 * share) + "\u00a0%"; }
function addTurn(question, picture) {
  $("hint").hidden = true;
  const turn = make("div", undefined, "turn");
  if (picture) {
    const image = make("img");
    image.src = picture.url;
    image.alt = picture.label || "picture";
    turn.append(image);
  }
  turn.append(make("p", question, "asked"));
  const answer = make("div", undefined, "answer");
  const said = make("p", "", "said"), how = make("p", "…", "how");
  answer.append(said, how);
  turn.append(answer);
  $("log").append(turn);
  turn.scrollIntoView({ block: "nearest" });
  return { turn, answer, said, how };
}
function explain(parts, value) {
  parts.said.textContent = value.answer;
  parts.said.classList.toggle("declined", value.declined || value.source === "nothing");
  const words = {
    memory: "from the memory",
    picture: value.declined ? "declined: it is not sure enough" : "from the picture",
    nothing: "no fact answers this",
  }[value.source];
  if (value.confidence === null) {
    const unsure = value.source === "picture" && !value.declined ? " · this model gives no confidence" : "";
    parts.how.replaceChildren(make("span", words + unsure));
    return;
  }
  const meter = make("meter");
  meter.value = value.confidence;
  meter.setAttribute("aria-label", "confidence");
  parts.how.replaceChildren(make("span", words + " · confidence " + percent(value.confidence)), meter);
}
$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  busy($("ask-button"), async () => {
    const typed = $("question").value.trim();
    if (!typed && !page.picture) throw new Refused(0, "Ask a question, show a picture, or both.");
    const picture = page.picture, model = page.model;
    const question = typed || (picture ? "what is this?" : "");
    const parts = addTurn(question, picture);
    $("question").value = "";
    hideMaps();
    const body = { model: model.id, question, label: picture ? picture.label : "" };
    if (picture) body.picture = picture.url;
    try {
      const value = await stream("/api/ask", body, (part) => {
        if (part.event === "text") parts.said.textContent += part.text;
      });
      explain(parts, value);
      change(model, value);
      if (value.source === "picture") offerMaps(parts, picture, question, model);
      if (value.entry !== null) choose(value.entry);
    } catch (error) {
      parts.how.textContent = "not answered";
      $("question").value = typed;
      throw error;
    } finally {
      parts.turn.scrollIntoView({ block: "nearest" });
    }
  });
});
$("tell").addEventListener("submit", (event) => {
  event.preventDefault();
  busy($("tell-button"), async () => {
    const model = page.model, picture = page.picture;
    const body = { model: model.id, question: $("tell-question").value, text: $("tell-text").value, label: picture ? picture.label : "" };
    if (picture) body.picture = picture.url;
    const value = await (await send("/api/tell", body)).json();
    change(model, value);
    $("tell-question").value = $("tell-text").value = "";
    if (value.added.length) choose(value.added[0].id);
    $("question").focus();
  });
});

// --- Where each word looked --------------------------------------------------------------------------------------
function offerMaps(parts, picture, question, model) {
  const kinds = [["evidence", "Show what it rests on"]];
  if (model.attention) kinds.push(["attention", "Show attention"]);
  for (const [kind, text] of kinds) {
    const button = make("button", text);
    button.type = "button";
    button.addEventListener("click", () => busy(button, async () => {
      try {
        const body = { model: model.id, question, picture: picture.url };
        const value = await stream("/api/" + kind, body, (part) => {
          if (part.event === "progress") button.textContent = "Looking: " + percent(part.done / part.total);
        });
        if (page.picture !== picture) { page.picture = picture; viewPicture(); }
        showMaps(value, model, kind);
      } finally { button.textContent = text; }
    }));
    parts.answer.append(button, " ");
  }
}
function showMaps(value, model, kind) {
  page.maps = { ...value, model, kind };
  $("words").replaceChildren(...value.maps.map((map, number) => {
    const button = make("button", map.word);
    button.type = "button";
    button.addEventListener("click", () => drawMap(button.getAttribute("aria-pressed") === "true" ? null : number));
    return button;
  }));
  $("words").hidden = false;
  $("words-note").hidden = $("legend").hidden = false;
  $("legend-text").textContent = value.legend;
  drawMap(0);
  $("picture-card").scrollIntoView({ block: "nearest" });
}
function hideMaps() {
  page.maps = null;
  for (const id of ["words", "words-note", "legend", "map"]) $(id).hidden = true;
}
function drawMap(number) {
  [...$("words").children].forEach((button, index) => button.setAttribute("aria-pressed", String(index === number)));
  const map = number === null ? null : page.maps.maps[number];
  $("map").hidden = !map;
  page.drawn = number;
  const note = map && page.maps.kind === "evidence" ? "probability " + map.note + " its most important part" : map && map.note;
  $("words-note").textContent = map ? "“" + map.word + "” rests on what is bright: " + note + "." : "Choose a word.";
  if (!map) return;
  const image = $("image"), canvas = $("map"), ratio = image.naturalWidth / image.naturalHeight;
  const width = Math.min(image.clientWidth, image.clientHeight * ratio), height = width / ratio;
  canvas.style.width = width + "px";
  canvas.style.height = height + "px";
  canvas.width = Math.round(width);
  canvas.height = Math.round(height);
  const pen = canvas.getContext("2d");
  pen.imageSmoothingEnabled = true;
  pen.imageSmoothingQuality = "high";
  // A model that sees a square with white beside the picture has a map of that square.
  const side = Math.max(width, height), [w, h] = page.maps.model.stretch ? [width, height] : [side, side];
  pen.drawImage(cells(map.weights, page.maps.scale), (width - w) / 2, (height - h) / 2, w, h);
}
function cells(weights, scale) {
  const canvas = make("canvas"), rows = weights.length;
  canvas.width = canvas.height = rows;
  const pen = canvas.getContext("2d"), data = pen.createImageData(rows, rows);
  weights.flat().forEach((weight, index) => {
    const at = Math.min(1, weight / scale) * (MAP.length - 1), low = Math.min(MAP.length - 2, Math.floor(at));
    for (let part = 0; part < 3; part++) data.data[4 * index + part] = MAP[low][part] + (at - low) * (MAP[low + 1][part] - MAP[low][part]);
    data.data[4 * index + 3] = 165;
  });
  pen.putImageData(data, 0, 0);
  return canvas;
}
window.addEventListener("resize", () => { if (page.maps && !$("map").hidden) drawMap(page.drawn); });

// --- Memory ------------------------------------------------------------------------------------------------------
function change(model, value) {
  if (page.model.name !== model.name) return;
  page.entries = page.entries.filter((entry) => !value.removed.includes(entry.id)).concat(value.added);
  if (value.removed.includes(page.chosen)) page.chosen = null;
  showMemory(new Set(value.added.map((entry) => entry.id)));
}
function choose(id) { page.chosen = id; showMemory(); }
function fills() {
  // One list of shares for each state of the memory: of the chosen entry, or of all of them together.
  const chosen = page.entries.find((entry) => entry.id === page.chosen);
  const states = 1 + Math.max(0, ...page.entries.map((entry) => entry.memory));
  const all = Array.from({ length: states }, () => new Array(page.model.slots).fill(0));
  for (const entry of chosen ? [chosen] : page.entries) {
    const largest = chosen ? Math.max(...entry.weights.map(Math.abs), 1e-9) : 1;
    entry.weights.forEach((weight, slot) => { all[entry.memory][slot] += Math.abs(weight) / largest; });
  }
  return all.map((state) => state.map((sum) => (chosen ? sum : 1 - Math.exp(-sum / 0.3))));
}
function showMemory(fresh = new Set()) {
  const states = fills(), slots = page.model.slots;
  if ($("slots").children.length !== states.length || $("slots").firstChild?.children.length !== slots) {
    $("slots").replaceChildren(...states.map(() => {
      const grid = make("div", undefined, "slots");
      grid.setAttribute("role", "img");
      grid.append(...Array.from({ length: slots }, () => make("i")));
      return grid;
    }));
  }
  const count = page.entries.length, chosen = page.entries.find((entry) => entry.id === page.chosen);
  states.forEach((state, number) => {
    const grid = $("slots").children[number];
    grid.setAttribute("aria-label", slots + " slots, " + (chosen ? "addressed by one entry" : "filled by " + count + (count === 1 ? " entry" : " entries")));
    state.forEach((share, slot) => grid.children[slot].style.setProperty("--full", Math.round(100 * share) + "%"));
  });
  $("memory-note").textContent = !count
    ? "Empty. What you tell and what is said is written over these " + slots + " slots; it ends with this visit."
    : chosen ? "The slots that “" + chosen.text + "” is written to: the stronger the colour, the more."
      : count + (count === 1 ? " entry" : " entries") + " over " + slots + " slots. Choose one to see where it is.";
  const told = page.entries.filter((entry) => entry.told), said = page.entries.filter((entry) => !entry.told);
  $("facts").replaceChildren(...told.map((entry) => row(entry, fresh)));
  $("turns").replaceChildren(...said.map((entry) => row(entry, fresh)));
  $("facts-title").hidden = !told.length;
  $("turns-box").hidden = !said.length;
  $("turns-title").textContent = "Said (" + said.length + ")";
  $("forget-all").hidden = !count;
}
function row(entry, fresh) {
  const item = make("li"), name = make("button", undefined, "entry"), forget = make("button", "Forget", "quiet");
  if (fresh.has(entry.id)) item.className = "new";
  name.type = forget.type = "button";
  name.append(make("span", entry.question + (entry.about_picture ? " (about a picture)" : "")), entry.text);
  name.setAttribute("aria-pressed", String(entry.id === page.chosen));
  name.addEventListener("click", () => { choose(page.chosen === entry.id ? null : entry.id); focusEntry(entry.id); });
  name.dataset.id = entry.id;
  forget.setAttribute("aria-label", "Forget " + entry.text);
  forget.addEventListener("click", () => busy(forget, async () => {
    const model = page.model;
    change(model, await (await send("/api/forget", { model: model.id, entry: entry.id })).json());
    $("question").focus({ preventScroll: true });
  }));
  item.append(name, forget);
  return item;
}
function focusEntry(id) { document.querySelector('.entry[data-id="' + id + '"]')?.focus(); }
$("forget-all").addEventListener("click", () => busy($("forget-all"), async () => {
  const model = page.model;
  change(model, await (await send("/api/forget", { model: model.id })).json());
}));

page.token = tokenOfAddress();
start();
