"use strict";
// The live block map: keeps the set of removed blocks, and says what it costs. Every number comes from #live-data.
(() => {
  const data = JSON.parse(document.getElementById("live-data").textContent);
  const find = (id) => document.getElementById(`live-${id}`);
  const cells = new Map([...document.querySelectorAll("[data-block]")].map((cell) => [cell.dataset.block, cell]));
  const removable = [...cells.keys()].filter((name) => cells.get(name).getAttribute("aria-disabled") !== "true");
  const removed = new Set();
  const samplers = Object.entries(data.choices?.samplers ?? {});
  const levels = (data.choices?.levels ?? []).map((options) => ({
    members: new Set(options.flat()),
    options: options.map((option) => new Set(option)),
  }));

  // Of layers inside blocks: the block around each. A layer of a block that is removed is gone with it, and not removed.
  const inside = data.inside;
  const layersOf = (block) => Object.keys(inside).filter((name) => inside[name] === block);
  const isGone = (name) => removed.has(name) || removed.has(inside[name]);

  const gone = () => new Set([
    ...removed,
    ...Object.keys(inside).filter(isGone),
    ...samplers.filter(([, blocks]) => blocks.every((name) => removed.has(name))).map(([name]) => name),
  ]);
  const form = find("form"); // only where the model has the neutral form
  const neutral = () => (form?.value === "neutral" ? data.neutral : null);
  const costOf = (metric, without) => {
    const of = (names) => names.reduce((sum, [, cost]) => sum + cost[metric], 0);
    const saves = neutral();
    const all = Object.entries(data.costs);
    if (!saves) return of(all.filter(([name]) => !without.has(name)));
    // A removed block is there and does nothing: it takes along what a config can leave out of it, some only together.
    const parts = Object.entries(saves.parts).filter(([name]) => without.has(name) && !without.has(inside[name]));
    const together = saves.together.filter(([blocks]) => blocks.every((name) => without.has(name)));
    return of(all) - of(parts) - of(together);
  };
  const equal = (one, other) => one.size === other.size && [...one].every((name) => other.has(name));
  const difference = (one, other) =>
    [...one].filter((name) => !other.has(name)).length + [...other].filter((name) => !one.has(name)).length;
  const stageOf = (name) => cells.get(name).dataset.stage;
  const stages = (level) => [...new Set([...level.members].map(stageOf))].join(" and ");
  const chosen = (level) => new Set([...removed].filter((name) => level.members.has(name)));
  const listed = new Set(levels.flatMap((level) => [...level.members]));
  // What no level lists leaves in no native plan that is known: its one option is to stay.
  const others = () => ({ members: new Set([...removed].filter((name) => !listed.has(name))), options: [new Set()] });
  const unbuildable = () => [...levels, others()].filter((level) => !level.options.some((option) => equal(option, chosen(level))));

  // Where blocks have no score, the sum is not known; it is never a sum of some of them.
  const impact = () => {
    const known = [...removed].map((name) => data.impacts[name] ?? null);
    return known.includes(null) ? null : known.reduce((sum, value) => sum + value, 0);
  };

  const amount = (value) => {
    const [unit, size] = [["G", 1e9], ["M", 1e6], ["k", 1e3]].find(([, size]) => Math.abs(value) >= 0.9995 * size) ?? ["", 1];
    return unit ? `${(value / size).toPrecision(3)} ${unit}` : String(Math.round(value));
  };
  const written = {
    params: (value) => value.toLocaleString("en-US"),
    macs: amount,
    paper_macs: amount,
    ms: (value) => `${Number(value.toPrecision(3))} ms`,
  };
  const change = (share) => {
    const percent = Math.round(1000 * (share - 1)) / 10;
    return `${percent < 0 ? "−" : percent > 0 ? "+" : "±"}${Math.abs(percent).toFixed(1)} %`;
  };
  const short = (value) =>
    value === 0 ? "0" : Math.abs(value) >= 0.01 ? String(Number(value.toPrecision(2))) : value.toExponential(1);

  const planText = () => [...cells.keys()].filter((name) => removed.has(name)).map((name) => `-${name}`).join(" ");
  const command = () =>
    `prune-lab prune ${quoted(data.model)} --plan "${planText() || "teacher"}" ${neutral() ? "--form neutral " : ""}--out student`;
  const quoted = (text) => (/^[\w./-]+$/.test(text) ? text : `'${text.replaceAll("'", "'\\''")}'`);

  const show = () => {
    for (const [name, cell] of cells) cell.setAttribute("aria-pressed", String(isGone(name)));
    const without = gone();
    const nothing = new Set();
    for (const row of document.querySelectorAll("[data-metric]")) {
      const metric = row.dataset.metric;
      const [whole, left] = [costOf(metric, nothing), costOf(metric, without)];
      row.cells[2].textContent = written[metric](left);
      row.cells[3].textContent = change(left / whole);
    }
    const sum = impact();
    find("impact").textContent = sum === null ? "not scored" : short(sum);

    const bad = unbuildable();
    const verdict = find("verdict");
    const stuck = neutral() ? [...removed].filter((name) => !(name in data.neutral.parts)) : [];
    find("snap").hidden = !bad.length || neutral() !== null;
    if (!data.choices) verdict.textContent = "Whether it is native is not known: the run is from an older version.";
    else if (!removed.size) verdict.textContent = "Nothing is removed: this is the teacher.";
    else if (stuck.length) verdict.textContent = `Not neutral: ${stuck.join(", ")} cannot stay and do nothing.`;
    else if (neutral()) verdict.textContent =
      "Neutral: a plain diffusers config describes it, with removed blocks that stay and do nothing; residual blocks save nothing.";
    else if (!bad.length) verdict.textContent = "Native: a plain diffusers config describes what is left.";
    else if (!data.choices.complete) verdict.textContent =
      `May not be native: ${bad.map(stages).join("; ")}. prune-lab prune --dry-run tells.`;
    else verdict.textContent =
      `Not native: no plain diffusers config describes what is left of ${bad.map(stages).join("; ")}. ` +
      "It is built with code of its own in its folder.";

    const metric = find("metric").value;
    const most = Number(find("most").value);
    const share = 100 * costOf(metric, without) / costOf(metric, nothing);
    const usable = find("most").value !== "" && most > 0;
    find("within").textContent = !usable ? "Give a budget above zero." :
      share <= most ? `Within the budget: ${share.toFixed(1)} % of ${most} %.` : `Over the budget: ${share.toFixed(1)} % of ${most} %.`;
    find("meter").max = usable ? most : 100;
    find("meter").value = share;
    find("text").textContent = command();
    const named = Object.entries(data.plans).find(([, blocks]) => equal(new Set(blocks), removed));
    find("plan").value = named ? named[0] : "";
  };

  const toggle = (names) => {
    const add = !names.every(isGone);
    for (const name of names) {
      if (!add && removed.delete(inside[name])) for (const other of layersOf(inside[name])) removed.add(other);
      add ? removed.add(name) : removed.delete(name);
    }
    withoutInner();
    show();
  };
  const withoutInner = () => {
    for (const name of removed) if (removed.has(inside[name])) removed.delete(name);
  };
  for (const name of removable) cells.get(name).addEventListener("click", () => toggle([name]));
  for (const label of document.querySelectorAll("[data-stage-button]")) {
    const names = removable.filter((name) => !inside[name] && stageOf(name) === label.dataset.stageButton);
    label.addEventListener("click", () => toggle(names));
  }
  find("plan").addEventListener("change", (event) => {
    if (!event.target.value) return;
    removed.clear();
    for (const name of data.plans[event.target.value]) removed.add(name);
    if (form) form.value = data.forms[event.target.value] === "neutral" ? "neutral" : "";
    show();
  });
  // Each level that cannot be built takes the option nearest to what the reader chose: of equals the one that removes
  // more, then the one with less impact.
  find("snap").addEventListener("click", () => {
    const total = (option) => [...option].reduce((sum, name) => sum + (data.impacts[name] ?? 0), 0);
    for (const level of unbuildable()) {
      const wanted = chosen(level);
      const ordered = [...level.options].sort(
        (one, other) =>
          difference(one, wanted) - difference(other, wanted) || other.size - one.size || total(one) - total(other),
      );
      for (const name of level.members) removed.delete(name);
      for (const name of ordered[0]) removed.add(name);
    }
    withoutInner();
    show();
  });
  find("metric").addEventListener("change", show);
  form?.addEventListener("change", show);
  for (const kind of ["input", "change"]) find("most").addEventListener(kind, show);
  // Arrow keys walk over the blocks in order of execution, so that Tab need not.
  const names = [...cells.keys()];
  for (const [name, cell] of cells) {
    cell.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
      if (!step) return;
      event.preventDefault();
      cells.get(names[(names.indexOf(name) + step + names.length) % names.length]).focus();
    });
  }
  find("copy").addEventListener("click", async () => {
    const range = document.createRange();
    range.selectNodeContents(find("text"));
    const selection = getSelection();
    selection.removeAllRanges();
    selection.addRange(range);
    let copied = false;
    try {
      await navigator.clipboard.writeText(command());
      copied = true;
    } catch {
      copied = document.execCommand("copy"); // a page that was opened from a folder may have no clipboard
    }
    find("copied").textContent = copied ? "Copied." : "Selected: copy it with the keyboard.";
  });
  for (const part of document.querySelectorAll("[data-needs-script]")) part.hidden = false;
  show();
})();
