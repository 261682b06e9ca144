"use strict";
(() => {
  const content = JSON.parse(document.getElementById("content").textContent);
  const { components, answers, questions, images, words } = content;
  const COUNT = components.length, WIDTH = answers.length;
  const DIGITS = content.digits;
  const MOST = 12, SHOWN = 5, ENTRANTS = 3, STRONGEST = 10, SATURATED = { own: 0.995, shared: 0.999 }, OPACITY = 0.9;
  const KINDS = {
    head: ["heads", "attention head"], attn: ["attention", "attention"], mlp: ["MLPs", "MLP"], conv: ["convolutions", "convolution"],
    embed: ["embedding", "embedding of the patches"], pool: ["pooling", "pooling"], constant: ["constants", "constant, the same path for every image"],
    source: ["sources", "nonlinear output"], intervention: ["interventions", "what a hook changed"], neuron: ["neurons", "neuron"],
  };
  const state = {
    image: 0, question: 0, answer: 0, chosen: false, component: null, pointed: {}, focused: {}, off: new Set(), how: "zero", theme: "system",
  };

  // --- elements. Whatever comes from outside becomes text, never HTML.

  const $ = (id) => document.getElementById(id);
  function make(tag, options = {}, ...children) {
    const element = document.createElement(tag);
    const { data = {}, on = {}, attributes = {}, ...properties } = options;
    Object.assign(element, properties);
    Object.assign(element.dataset, data);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    for (const [name, listener] of Object.entries(on)) element.addEventListener(name, listener);
    element.append(...children);
    return element;
  }
  /** Text from outside, apart from the direction of what is around it. */
  const told = (text, className = "") => make("bdi", { textContent: text, dir: "auto", className });
  function cut(text, longest = 80) {
    const characters = Array.from(text.slice(0, 4 * longest));
    return characters.length > longest ? characters.slice(0, longest).join("") + "…" : text;
  }
  /** The same within a label, which takes no elements. */
  const brief = (text) => `\u2068${cut(text)}\u2069`;
  function write(element, text) {
    if (element.textContent !== text) element.textContent = text;
  }

  // --- numbers

  const signed = (value, digits = DIGITS) => {
    const text = Math.abs(value).toFixed(digits);
    return Number(text) === 0 ? text : (value < 0 ? "−" : "+") + text;
  };
  const tight = (value) => signed(value).replace(/^([−+]?)0\./, "$1.");
  const plain = (value, digits = DIGITS) => value.toFixed(digits).replace("-", "−");
  const percent = (share, digits = 0) => `${(100 * share).toFixed(digits).replace("-", "−")}\u00a0%`;
  const probably = (share) => (share >= 0.9995 ? ">\u00a099.9\u00a0%" : share < 0.0005 ? "<\u00a00.1\u00a0%" : percent(share, 1));
  const most = (values) => values.reduce((largest, value) => Math.max(largest, Math.abs(value)), 0);

  /** Whole numbers of some bytes, in units of their row's. */
  function unpacked(packed) {
    const text = atob(packed.numbers), size = packed.bytes, width = packed.shape.at(-1);
    const found = new Float64Array(text.length / size), shift = 32 - 8 * size;
    for (let place = 0, at = 0; place < found.length; place++) {
      let whole = 0;
      for (let byte = 0; byte < size; byte++) whole |= text.charCodeAt(at++) << (8 * byte);
      found[place] = ((whole << shift) >> shift) * packed.units[Math.floor(place / width)];
    }
    return found;
  }
  const shared = content.substitute ? unpacked(content.substitute) : null;
  const opened = new Map();
  /** The numbers of an image, unpacked when it is first looked at. */
  function numbers(number = state.image) {
    if (!opened.has(number)) {
      const image = images[number], maps = image.maps;
      opened.set(number, {
        totals: unpacked(image.totals), scores: unpacked(image.scores),
        substitute: image.substitute ? unpacked(image.substitute) : shared,
        maps: unpacked(maps.values), patches: maps.rows * maps.columns, each: maps.values.shape[1],
      });
    }
    return opened.get(number);
  }
  const score = (component, answer) => numbers().scores[component * WIDTH + answer];
  const total = (answer) => numbers().totals[answer];
  /** What is left of an answer: the sum, edited. */
  function now(answer) {
    const { substitute } = numbers();
    let value = total(answer);
    for (const component of state.off) {
      value -= score(component, answer);
      if (state.how === "mean") value += substitute[component * WIDTH + answer];
    }
    return value;
  }
  function probabilities(of) {
    if (content.scale === null) return null;
    const values = within().map((answer) => of(answer) * content.scale), top = Math.max(...values);
    const powers = values.map((value) => Math.exp(value - top)), sum = powers.reduce((one, other) => one + other, 0);
    return new Map(within().map((answer, place) => [answer, powers[place] / sum]));
  }
  function within(number = state.question) {
    const { first, count } = questions[number];
    return Array.from({ length: count }, (_, place) => first + place);
  }
  const questionOf = (answer) => questions.findIndex(({ first, count }) => answer >= first && answer < first + count);
  const best = (of) => within().reduce((one, other) => (of(other) > of(one) ? other : one));

  /** A component's heatmap for an answer; of null, that of all that are on. Null where there is none. */
  function heatmap(component, answer) {
    const { maps } = images[state.image], { maps: values, patches, each } = numbers();
    const place = maps.answers.indexOf(answer);
    if (place < 0) return null;
    const rows = maps.components[place];
    const row = (number) => values.subarray((place * each + number) * patches, (place * each + number + 1) * patches);
    if (component !== null) return rows.includes(component) ? row(rows.indexOf(component)) : null;
    const sum = Float64Array.from(row(each - 1)); // all that have none of their own
    rows.forEach((one, number) => {
      if (!state.off.has(one)) row(number).forEach((value, patch) => { sum[patch] += value; });
    });
    return sum;
  }
  /** Where the scale of a map ends: at nearly the largest, so that one patch does not leave all others pale. */
  function scaleOf(component, answer, map) {
    let values = Array.from(map, Math.abs), share = SATURATED.own;
    if (component !== null && !$("own-scale").checked) {
      const { maps: all, patches, each } = numbers(), place = images[state.image].maps.answers.indexOf(answer);
      values = Array.from(all.subarray(place * each * patches, ((place + 1) * each - 1) * patches), Math.abs);
      share = SATURATED.shared;
    }
    values.sort((one, other) => one - other);
    return Math.max(values[Math.min(values.length - 1, Math.floor(share * values.length))] || 0, 1e-12);
  }

  // --- what is looked at: what is pointed at, else what has the focus, else what was chosen

  const lookedAnswer = () => state.pointed.answer ?? state.focused.answer ?? state.answer;
  const lookedComponent = () => state.pointed.component ?? state.focused.component ?? state.component;

  // --- colours

  const OVER = { mid: [246, 246, 243], forSoft: [242, 180, 151], for: [176, 46, 38], againstSoft: [150, 198, 226], against: [33, 102, 172] };
  let theme = OVER;
  function readTheme() {
    const style = getComputedStyle(document.documentElement);
    const read = (name) => {
      const hex = style.getPropertyValue(name).trim().slice(1);
      return [0, 2, 4].map((at) => parseInt(hex.slice(at, at + 2), 16));
    };
    theme = { mid: read("--mid"), forSoft: read("--for-soft"), for: read("--for"), againstSoft: read("--against-soft"), against: read("--against") };
  }
  /** From −1, against, to 1, for. */
  function colour(share, of = theme) {
    const size = Math.min(1, Math.abs(share)), [soft, strong] = share < 0 ? [of.againstSoft, of.against] : [of.forSoft, of.for];
    const [from, to, part] = size < 0.5 ? [of.mid, soft, 2 * size] : [soft, strong, 2 * size - 1];
    return from.map((value, place) => Math.round(value + (to[place] - value) * part));
  }
  const css = (rgb) => `rgb(${rgb.join(" ")})`;
  function luminance(rgb) {
    const [red, green, blue] = rgb.map((value) => (value / 255 <= 0.04045 ? value / 255 / 12.92 : ((value / 255 + 0.055) / 1.055) ** 2.4));
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue;
  }
  const inkOn = (rgb) => (luminance(rgb) > 0.19 ? "#14161a" : "#ffffff");

  // --- made once

  function kindOf(component) {
    const { kind, layer, head } = component, [, name] = KINDS[kind] || [kind, kind];
    const text = kind === "head" ? `${name} ${head} of layer ${layer}` : layer === null ? name : `${name} of layer ${layer}`;
    return text[0].toUpperCase() + text.slice(1);
  }
  function cell(number) {
    return make("button", { type: "button", className: "cell", tabIndex: -1, data: { component: number } });
  }
  /** A box that switches several components. */
  function box(numbersOf, label) {
    const input = make("input", { type: "checkbox", data: { switches: numbersOf.join(" ") }, attributes: label ? { "aria-label": label } : {} });
    input.addEventListener("change", () => switchTo(numbersOf, input.checked));
    return input;
  }
  const all = (test) => components.flatMap((component, number) => (test(component, number) ? [number] : []));

  function build() {
    document.title = `${content.title} · vitdecomp_lens report`;
    $("title").append(told(content.title));
    const plural = images.length === 1 ? "image" : "images";
    write($("summary"), `${images.length} ${plural}. Every ${content.unit} is the exact sum of what ${COUNT} components write. Point at a component or an answer to see where it comes from; switch components off to see what is left.`);
    buildThumbnails();
    buildQuestions();
    buildGrid();
    buildKinds();
    write($("unit"), content.unit);
    write($("words-about"), words.about);
    for (const [name, value] of content.certificate) $("certificate").append(make("dt", { textContent: name }), make("dd", {}, told(value)));
    for (const note of content.notes) $("notes").append(make("li", { textContent: note }));
    $("how-mean").hidden = !content.hasMean;
    $("probability-column").hidden = content.scale === null;
    const legend = $("legend").getContext("2d");
    for (let x = 0; x <= 200; x++) {
      legend.fillStyle = css(colour(x / 100 - 1, OVER));
      legend.fillRect(x, 0, 1, 1);
    }
  }
  function buildThumbnails() {
    images.forEach((image, number) => {
      const input = make("input", { type: "radio", name: "image", value: String(number), checked: number === 0, attributes: { "aria-label": `Image ${number + 1} of ${images.length}: ${brief(image.name)}` } });
      input.addEventListener("change", () => showImage(number));
      const small = make("img", { src: image.picture, alt: "" });
      $("thumbnails").append(make("label", { title: image.name }, input, small, make("span", { className: "name" }, told(image.name))));
    });
    $("images").hidden = images.length < 2;
  }
  function buildQuestions() {
    questions.forEach((question, number) => {
      const input = make("input", { type: "radio", name: "question", value: String(number), checked: number === 0 });
      input.addEventListener("change", () => { state.question = number; state.answer = best(total); state.chosen = false; update(); });
      $("questions").append(make("label", {}, input, told(question.name || "all")));
    });
    $("questions").hidden = questions.length < 2;
  }
  function buildGrid() {
    const layers = [...new Set(components.filter((one) => one.layer !== null && one.kind !== "constant").map((one) => one.layer))].sort((one, other) => one - other);
    const kinds = ["attn", "conv", "mlp", "pool", "source", "neuron"].filter((kind) => components.some((one) => one.kind === kind && one.layer !== null));
    const heads = Math.max(0, ...components.filter((one) => one.kind === "head").map((one) => one.head + 1));
    const placed = new Set();
    const head = make("tr", {}, make("th", { scope: "col" }, make("span", { className: "hidden", textContent: "Layer" })));
    for (let number = 0; number < heads; number++) head.append(make("th", { scope: "col", textContent: `H${number}` }));
    for (const kind of kinds) head.append(make("th", { scope: "col", textContent: KINDS[kind][1] }));
    head.append(make("th", { scope: "col", className: "sum", textContent: "layer’s sum" }));
    $("grid").tHead.append(head);
    for (const layer of layers) {
      const here = all((one) => one.layer === layer && one.kind !== "constant");
      const row = make("tr", {}, make("th", { scope: "row" }, make("label", {}, box(here, `Switch off layer ${layer}`), make("span", { className: "word", textContent: "Layer " }), String(layer))));
      const put = (test) => {
        const found = here.find((number) => !placed.has(number) && test(components[number]));
        if (found !== undefined) placed.add(found);
        row.append(make("td", {}, ...(found === undefined ? [] : [cell(found)])));
      };
      for (let number = 0; number < heads; number++) put((one) => one.kind === "head" && one.head === number);
      for (const kind of kinds) put((one) => one.kind === kind);
      row.append(make("td", { className: "sum" }, make("span", { className: "number" }), lane({ layer })));
      $("grid").tBodies[0].append(row);
    }
    const first = $("grid").querySelector(".cell");
    if (first) first.tabIndex = 0;
    $("grid-scroll").hidden = !layers.length;
    $("grid").style.minWidth = `${7 + 2.1 * (heads + kinds.length)}rem`; // beyond it, the grid is moved under the eye
    const constants = all((one) => one.kind === "constant");
    const others = all((one, number) => one.kind !== "constant" && !placed.has(number));
    const named = (number) => { const made = cell(number); made.tabIndex = 0; made.dataset.named = ""; return made; };
    $("others").append(...others.map(named));
    if (constants.length) $("others").append(make("details", { id: "constants" }, make("summary", {}), make("div", {}, ...constants.map(named))));
  }
  const lane = (data = {}) => make("span", { className: "lane", data, attributes: { "aria-hidden": "true" } }, make("i"));
  function buildKinds() {
    for (const kind of new Set(components.map((one) => one.kind))) {
      const here = all((one) => one.kind === kind);
      $("kinds").append(make("label", {}, box(here), ` ${(KINDS[kind] || [kind])[0]} (${here.length})`));
    }
  }

  // --- shown anew

  function update() {
    updateAnswers();
    updateLook();
    updateSwitches();
  }
  /** All that follows pointer and focus. */
  function updateLook() {
    updateGrid();
    updateStrongest();
    updateFigure();
    updateCard();
    updateTables();
    for (const row of $("answers").rows) {
      row.classList.toggle("looked", Number(row.dataset.answer) === lookedAnswer());
      row.classList.toggle("kept", Number(row.dataset.answer) === state.answer);
    }
  }

  function visibleAnswers() {
    const here = within(), before = [...here].sort((one, other) => total(other) - total(one));
    if (here.length <= MOST) return before;
    const after = [...here].sort((one, other) => now(other) - now(one)).slice(0, ENTRANTS);
    const kept = new Set([...before.slice(0, SHOWN), ...after, ...images[state.image].maps.answers.filter((one) => here.includes(one)), state.answer]);
    return before.filter((answer) => kept.has(answer));
  }
  function updateAnswers() {
    const body = $("answers"), shown = visibleAnswers(), key = `${state.image} ${shown.join(" ")}`;
    if (body.dataset.key !== key) {
      const active = document.activeElement.closest?.("#answers tr")?.dataset.answer;
      body.dataset.key = key;
      body.replaceChildren(...shown.map(answerRow));
      if (active !== undefined) body.querySelector(`tr[data-answer="${active}"] button`)?.focus();
    }
    const before = probabilities(total), after = probabilities(now), changed = state.off.size > 0;
    const values = shown.flatMap((answer) => [now(answer), total(answer), 0]), low = Math.min(...values), span = Math.max(...values) - low || 1;
    const likeliest = best(now);
    for (const row of body.rows) {
      const answer = Number(row.dataset.answer), value = now(answer), was = total(answer);
      const bar = row.querySelector(".bar");
      bar.style.left = `${(100 * (Math.min(0, value) - low)) / span}%`;
      bar.style.width = `${(100 * Math.abs(value)) / span}%`;
      row.dataset.now = String(value);
      row.dataset.was = String(was);
      const [, amounts, chances] = row.cells;
      write(amounts.querySelector(".was"), changed ? plain(was) : "");
      write(amounts.querySelector(".now"), plain(value));
      chances.hidden = !after;
      if (after) {
        row.dataset.probability = String(after.get(answer));
        write(chances.querySelector(".was"), changed ? probably(before.get(answer)) : "");
        write(chances.querySelector(".now"), probably(after.get(answer)));
      }
      row.classList.toggle("best", answer === likeliest);
    }
    updateSaid(before, after, likeliest);
  }
  function answerRow(answer) {
    const [short, full] = answers[answer];
    const button = make("button", { type: "button", title: full === short && full.length < 40 ? "" : full, data: { answer } }, told(short, "name"), make("span", { className: "track", attributes: { "aria-hidden": "true" } }, make("span", { className: "bar" })));
    button.addEventListener("click", () => { state.answer = answer; state.chosen = true; update(); });
    const pair = () => [make("span", { className: "was number" }), make("span", { className: "now number" })];
    return make("tr", { data: { answer } }, make("td", {}, button), make("td", { className: "right" }, ...pair()), make("td", { className: "right" }, ...pair()));
  }
  function updateSaid(before, after, likeliest) {
    const name = (answer) => told(cut(answers[answer][0])), first = best(total), parts = [];
    if (!state.off.size) parts.push("All components are on. ", after ? "Likeliest: " : "Highest: ", name(first), after ? `, ${probably(before.get(first))}.` : `, ${plain(total(first))}.`);
    else {
      parts.push(`${state.off.size} of ${COUNT} components are off, ${state.how === "mean" ? "the mean" : "zero"} in their place. `, name(state.answer), `: ${plain(total(state.answer))} became ${plain(now(state.answer))}`);
      if (after) parts.push(` (${probably(before.get(state.answer))} became ${probably(after.get(state.answer))})`);
      parts.push(likeliest === first ? `. ${after ? "Likeliest" : "Highest"} is still ` : `. ${after ? "Likeliest" : "Highest"} is now `, name(likeliest), ".");
    }
    const line = make("p", {}, ...parts);
    if ($("said").textContent !== line.textContent) $("said").replaceChildren(...line.childNodes);
  }

  function paint(element, value, largest) {
    const rgb = colour(largest ? value / largest : 0);
    element.style.background = css(rgb);
    element.style.color = inkOn(rgb);
  }
  function paintLane(element, value, largest) {
    const bar = element.firstElementChild, share = largest ? Math.min(1, Math.abs(value) / largest) : 0;
    bar.style.background = css(colour(value < 0 ? -0.85 : 0.85));
    bar.style.width = `${50 * share}%`;
    bar.style.left = value < 0 ? `${50 - 50 * share}%` : "50%";
  }
  function updateGrid() {
    const answer = lookedAnswer(), looked = lookedComponent();
    const values = components.map((_, number) => score(number, answer));
    const largest = most(values.filter((_, number) => components[number].kind !== "constant"));
    for (const element of document.querySelectorAll(".cell")) {
      const number = Number(element.dataset.component), { label } = components[number], off = state.off.has(number);
      paint(element, values[number], largest);
      element.classList.toggle("off", off);
      element.classList.toggle("kept", number === state.component);
      element.classList.toggle("looked", number === looked);
      element.dataset.score = String(values[number]);
      write(element, "named" in element.dataset ? `${label} ${tight(values[number])}` : tight(values[number]));
      element.setAttribute("aria-label", `${brief(label)} ${signed(values[number])}${off ? ", off" : ""}`);
      element.setAttribute("aria-pressed", String(number === state.component));
    }
    const lanes = [...document.querySelectorAll(".grid .lane")];
    const sums = lanes.map((element) => all((one) => one.layer === Number(element.dataset.layer) && one.kind !== "constant").reduce((sum, number) => sum + values[number], 0));
    lanes.forEach((element, place) => {
      paintLane(element, sums[place], most(sums));
      write(element.previousElementSibling, signed(sums[place]));
      element.dataset.sum = String(sums[place]);
    });
    const constants = all((one) => one.kind === "constant");
    if (constants.length) write($("constants").firstElementChild, `${constants.length} constants, together ${signed(constants.reduce((sum, number) => sum + values[number], 0))}`);
    const name = answers[answer][0];
    $("parts-about").replaceChildren("Contributions to ", told(cut(name)), `: they sum to ${plain(total(answer))}. Heads and MLPs by layer; red writes for it, blue against it.`);
    write($("grid-caption"), `What components write for ${brief(name)}, by layer and head`);
  }

  function strongest(answer) {
    const candidates = all((one) => one.kind !== "constant");
    return candidates.sort((one, other) => Math.abs(score(other, answer)) - Math.abs(score(one, answer))).slice(0, STRONGEST);
  }
  const NONE = "Does not vary, or no words were read.";
  function chanceOf(number) {
    const chance = words.chance[components[number].label];
    return `A text drawn at random would come again in ${chance < 0.01 ? "less than 1\u00a0%" : percent(chance)}.`;
  }
  function wordsOf(number) {
    return (words.said[components[number].label] || []).map(([text, share, again]) => ({ text: words.texts[text], share, again }));
  }
  function updateStrongest() {
    const answer = lookedAnswer(), found = strongest(answer), largest = most(found.map((number) => score(number, answer)));
    const body = $("strongest"), key = found.join(" ");
    if (body.dataset.key !== key) {
      body.dataset.key = key;
      body.replaceChildren(...found.map(strongRow));
    }
    found.forEach((number, place) => {
      const row = body.rows[place], value = score(number, answer);
      write(row.querySelector(".number"), signed(value));
      row.querySelector(".number").className = `number ${value < 0 ? "negative" : "positive"}`;
      paintLane(row.querySelector(".lane"), value, largest);
      row.classList.toggle("off", state.off.has(number));
      row.querySelector("input").checked = state.off.has(number);
    });
  }
  function strongRow(number) {
    const { label } = components[number], said = wordsOf(number).slice(0, 3);
    const button = make("button", { type: "button", className: "component", data: { component: number } }, told(label));
    const lines = said.map(({ text, share, again }) => make("div", { className: `word${again < 0.5 ? " shaky" : ""}` }, told(text), make("span", { className: "right", textContent: percent(share) }), make("span", { className: "right", textContent: percent(again) })));
    const saying = said.length ? lines : [make("span", { className: "empty", textContent: words.texts.length ? NONE : "no words" })];
    // Their roles are said, because a narrow page lays the rows out as blocks.
    const cells = [[button], [make("span", { className: "number" }), lane()], saying, [box([number], `Switch off ${brief(label)}`)]];
    return make("tr", { attributes: { role: "row" } }, ...cells.map((inside, place) => make("td", { className: place === 1 ? "right" : "", attributes: { role: "cell" } }, ...inside)));
  }

  function updateFigure() {
    const component = lookedComponent(), answer = lookedAnswer(), map = heatmap(component, answer);
    const value = component === null ? now(answer) : score(component, answer);
    $("shown-component").replaceChildren(component === null ? "All components" : told(components[component].label));
    $("shown-answer").dir = "auto";
    write($("shown-answer"), answers[answer][0]);
    write($("shown-score"), component === null ? plain(value) : signed(value));
    $("shown-score").dataset.value = String(value);
    const held = map ? map.reduce((sum, one) => sum + one, 0) : null;
    write($("shown-split"), split(component, answer, value, held));
    $("frame").classList.toggle("mapped", Boolean(map) && $("show-map").checked);
    const canvas = $("heatmap");
    canvas.dataset.sum = held === null ? "" : String(held);
    const scale = map ? scaleOf(component, answer, map) : 0;
    draw(canvas, map, scale);
    const digits = scale < 0.0995 ? DIGITS + 1 : DIGITS;
    $("legend").closest(".legend").classList.toggle("none", !map);
    write($("legend-low"), map ? signed(-scale, digits) : "");
    write($("legend-high"), map ? signed(scale, digits) : "");
    canvas.setAttribute("aria-label", describe(component, answer, map));
  }
  function split(component, answer, value, held) {
    const { maps } = images[state.image];
    if (held !== null) return `from patches ${signed(held)}, elsewhere ${signed(value - held)}${component === null ? unshown(answer) : ""}`;
    if (!maps.answers.includes(answer)) return "No heatmaps were sent for this answer.";
    if (maps.reading.includes(component)) return "Too weak for a heatmap of its own; the map of all holds it.";
    return "Reads no patch here: from prefix tokens, or from no token.";
  }
  /** Which of those that are off still are in the map of all: they are only known together with others. */
  function unshown(answer) {
    const { maps } = images[state.image], own = maps.components[maps.answers.indexOf(answer)];
    const still = maps.reading.filter((one) => state.off.has(one) && !own.includes(one)).length;
    return still ? `; the map still holds ${still} weak one${still === 1 ? "" : "s"} that ${still === 1 ? "is" : "are"} off` : "";
  }
  function describe(component, answer, map) {
    const what = `${component === null ? "all components" : brief(components[component].label)} for ${brief(answers[answer][0])}`;
    if (!map) return `No heatmap of ${what}.`;
    const { columns } = images[state.image].maps, order = Array.from(map.keys()).sort((one, other) => Math.abs(map[other]) - Math.abs(map[one]));
    const strong = order.slice(0, 3).map((patch) => `row ${Math.floor(patch / columns) + 1}, column ${(patch % columns) + 1}: ${signed(map[patch], DIGITS + 1)}`);
    return `Heatmap of ${what}. Strongest patches: ${strong.join("; ")}.`;
  }
  function draw(canvas, map, scale) {
    const { rows, columns, seen } = images[state.image].maps, { width, height } = images[state.image];
    if (canvas.width !== columns) canvas.width = Math.max(1, columns);
    if (canvas.height !== rows) canvas.height = Math.max(1, rows);
    const [left, top, right, bottom] = seen;
    Object.assign(canvas.style, { left: `${(100 * left) / width}%`, top: `${(100 * top) / height}%`, width: `${(100 * (right - left)) / width}%`, height: `${(100 * (bottom - top)) / height}%` });
    const context = canvas.getContext("2d");
    context.clearRect(0, 0, canvas.width, canvas.height);
    if (!map || !$("show-map").checked || !map.length) return;
    const pixels = context.createImageData(columns, rows);
    map.forEach((value, patch) => {
      const opacity = OPACITY * Math.min(1, (1.5 * Math.abs(value)) / scale);
      pixels.data.set([...colour(value / scale, OVER), Math.round(255 * opacity)], 4 * patch);
    });
    context.putImageData(pixels, 0, 0);
  }

  function updateCard() {
    const number = lookedComponent(), answer = lookedAnswer(), whole = total(answer);
    $("card-switch").hidden = number === null;
    $("card-all").hidden = state.component === null;
    if (number === null) {
      write($("card-name"), "All components");
      write($("card-about"), `${COUNT} components sum to ${plain(whole)}${state.off.size ? `; without those that are off, ${plain(now(answer))}` : ""}. Point at one to see what it writes, where from, and what it says.`);
      $("card-words").replaceChildren();
      return;
    }
    const value = score(number, answer), share = Math.abs(whole) > 1e-9 ? `, ${percent(value / whole)} of ${plain(whole)}` : "";
    $("card-name").replaceChildren(told(components[number].label));
    write($("card-about"), `${kindOf(components[number])}. Writes ${signed(value)}${share}.`);
    $("card-on").checked = state.off.has(number);
    const said = wordsOf(number);
    $("card-words").replaceChildren(...said.map(({ text, share: explains, again }) => make("li", { className: again < 0.5 ? "shaky" : "" }, told(text), make("span", { className: "quiet", textContent: percent(explains) }), make("span", { className: "quiet", textContent: `again ${percent(again)}` }))));
    if (said.length) $("card-words").append(make("li", { className: "chance quiet", textContent: chanceOf(number) }));
    else $("card-words").append(make("li", { className: "quiet", textContent: components[number].kind === "constant" ? "No words: a constant does not vary." : words.texts.length ? NONE : words.about }));
  }

  function updateTables() {
    const answer = lookedAnswer(), component = lookedComponent();
    if ($("all-components").open) {
      const { maps } = images[state.image];
      $("all-components").querySelector("tbody").replaceChildren(...all(() => true).sort((one, other) => score(other, answer) - score(one, answer)).map((number) => {
        const value = score(number, answer), map = heatmap(number, answer), held = map ? map.reduce((sum, one) => sum + one, 0) : maps.reading.includes(number) ? null : 0;
        return make("tr", {}, make("th", { scope: "row" }, told(components[number].label)), ...[signed(value), held === null ? "–" : signed(held), held === null ? "–" : signed(value - held)].map((text) => make("td", { className: "right", textContent: text })), make("td", { textContent: state.off.has(number) ? "off" : "on" }));
      }));
    }
    if ($("all-patches").open) {
      const map = heatmap(component, answer), { rows, columns } = images[state.image].maps, table = $("all-patches").querySelector("table");
      table.tHead.replaceChildren(make("tr", {}, make("td"), ...(map ? Array.from({ length: columns }, (_, place) => make("th", { scope: "col", textContent: String(place + 1) })) : [])));
      table.tBodies[0].replaceChildren(...(map ? Array.from({ length: rows }, (_, row) => make("tr", {}, make("th", { scope: "row", textContent: String(row + 1) }), ...Array.from(map.subarray(row * columns, (row + 1) * columns), (value) => make("td", { textContent: signed(value, DIGITS + 1) })))) : [make("tr", {}, make("td", { textContent: "There is no heatmap of this component for this answer." }))]));
    }
  }

  function updateSwitches() {
    for (const input of document.querySelectorAll("input[data-switches]")) {
      const here = input.dataset.switches.split(" ").map(Number), off = here.filter((number) => state.off.has(number)).length;
      input.checked = off === here.length;
      input.indeterminate = off > 0 && off < here.length;
    }
    $("reset").disabled = !state.off.size;
  }

  // --- what is done

  function switchTo(several, off) {
    for (const number of several) off ? state.off.add(number) : state.off.delete(number);
    update();
  }
  function showImage(number) {
    state.image = number;
    const image = images[number];
    if (!image.maps.answers.includes(state.answer) || !state.chosen) state.answer = best(total);
    $("photograph").src = image.picture;
    $("photograph").alt = `Image ${number + 1}: ${brief(image.name)}`;
    $("frame").classList.toggle("tiny", Math.max(image.width, image.height) <= 96);
    $("frame").style.setProperty("--ratio", String(image.width / image.height));
    write($("patch"), "");
    update();
  }
  function target(element) {
    const component = element?.closest?.("[data-component]")?.dataset.component, answer = element?.closest?.("[data-answer]")?.dataset.answer;
    return { component: component === undefined ? undefined : Number(component), answer: answer === undefined ? undefined : Number(answer) };
  }
  function look(which, element) {
    const found = target(element), before = state[which];
    if (found.component === before.component && found.answer === before.answer) return;
    state[which] = found;
    updateLook();
  }
  function listen() {
    document.addEventListener("pointerover", (event) => look("pointed", event.target));
    document.documentElement.addEventListener("pointerleave", () => look("pointed", null));
    document.addEventListener("focusin", (event) => look("focused", event.target.matches(":focus-visible") ? event.target : null));
    document.addEventListener("focusout", () => look("focused", null));
    document.addEventListener("click", (event) => {
      const button = event.target.closest?.("button[data-component]");
      if (!button) return;
      const number = Number(button.dataset.component);
      state.component = state.component === number ? null : number;
      updateLook();
    });
    document.addEventListener("keydown", (event) => {
      const button = event.target.closest?.("button[data-component]");
      if (event.key === "Escape" && state.component !== null) { state.component = null; updateLook(); }
      if (!button || event.ctrlKey || event.metaKey || event.altKey) return;
      if (event.key === "x") { const number = Number(button.dataset.component); switchTo([number], !state.off.has(number)); }
      else if (event.key.startsWith("Arrow") && button.closest("#grid")) { event.preventDefault(); move(button, event.key); }
    });
    $("card-on").addEventListener("change", (event) => { if (lookedComponent() !== null) switchTo([lookedComponent()], event.target.checked); });
    $("card-all").addEventListener("click", () => { state.component = null; updateLook(); $("answers-heading").focus({ preventScroll: true }); });
    $("reset").addEventListener("click", () => switchTo(all(() => true), false));
    for (const input of $("how").querySelectorAll("input")) input.addEventListener("change", () => { state.how = input.value; update(); });
    for (const id of ["show-map", "own-scale"]) $(id).addEventListener("change", updateFigure);
    for (const id of ["all-components", "all-patches"]) $(id).addEventListener("toggle", updateTables);
    $("heatmap").addEventListener("pointermove", pointPatch);
    $("heatmap").addEventListener("pointerleave", () => write($("patch"), ""));
    $("theme").addEventListener("click", nextTheme);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { readTheme(); updateLook(); });
  }
  /** Along a row or column of the grid, over what is empty. */
  function move(button, key) {
    const here = button.closest("td"), rows = [...$("grid").tBodies[0].rows], down = { ArrowDown: 1, ArrowUp: -1 }[key] || 0, across = { ArrowRight: 1, ArrowLeft: -1 }[key] || 0;
    let row = rows.indexOf(here.parentElement) + down, column = here.cellIndex + across;
    while (rows[row]?.cells[column]) {
      const next = rows[row].cells[column].querySelector(".cell");
      if (next) {
        button.tabIndex = -1;
        next.tabIndex = 0;
        next.focus();
        return;
      }
      row += down;
      column += across;
    }
  }
  function pointPatch(event) {
    const map = heatmap(lookedComponent(), lookedAnswer()), { rows, columns } = images[state.image].maps, area = $("heatmap").getBoundingClientRect();
    const row = Math.floor(((event.clientY - area.top) / area.height) * rows), column = Math.floor(((event.clientX - area.left) / area.width) * columns);
    const value = map?.[row * columns + column];
    write($("patch"), value === undefined || row < 0 || row >= rows || column < 0 || column >= columns ? "" : `patch in row ${row + 1}, column ${column + 1}: ${signed(value, DIGITS + 1)}`);
  }
  function nextTheme() {
    const names = ["system", "light", "dark"];
    state.theme = names[(names.indexOf(state.theme) + 1) % names.length];
    if (state.theme === "system") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = state.theme;
    write($("theme-name"), state.theme);
    readTheme();
    updateLook();
  }

  readTheme();
  build();
  listen();
  $("main").hidden = false;
  state.answer = best(total);
  showImage(0);
})();
