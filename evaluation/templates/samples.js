"use strict";
(() => {
  const field = (name) => document.getElementById(`samples-${name}`);
  const groups = [...document.querySelectorAll(".group")];
  const number = (text) => (text.trim() === "" ? null : Number(text));
  const words = new Map();
  const textOf = (sample) => {
    if (!words.has(sample)) words.set(sample, sample.textContent.toLowerCase());
    return words.get(sample);
  };
  const value = (sample, key) => (key in sample.dataset ? Number(sample.dataset[key]) : null);
  const within = (found, low, high) => (low === null || (found !== null && found >= low)) && (high === null || (found !== null && found <= high));

  const arrange = () => {
    const group = groups.find((one) => one.id === field("group").value);
    const [key, direction] = field("sort").value.split(" ");
    const text = field("text").value.trim().toLowerCase();
    const verdict = group.dataset.judged ? field("verdict").value : "";
    const [disagreement, low, high] = ["disagreement", "low", "high"].map((name) => number(field(name).value));
    for (const one of groups) one.hidden = one !== group;
    for (const one of document.querySelectorAll(".of-judged")) one.hidden = !group.dataset.judged;
    const samples = [...group.querySelectorAll(".sample")];
    let shown = 0;
    for (const sample of samples) {
      const fits = within(value(sample, "disagreement"), disagreement, null) && within(value(sample, "score"), low, high);
      sample.hidden = !(fits && (!verdict || sample.dataset.verdict === verdict) && (!text || textOf(sample).includes(text)));
      if (!sample.hidden) shown += 1;
    }
    const sign = direction === "up" ? 1 : -1;
    const order = (sample) => { const found = value(sample, key); return found === null ? Infinity : sign * found; };
    samples.sort((a, b) => { const x = order(a), y = order(b); return x === y ? a.dataset.place - b.dataset.place : x - y; });
    group.append(...samples);
    field("count").textContent = `${shown} of ${samples.length} prompts fit; the round has ${group.dataset.total}`;
  };

  for (const name of ["group", "sort", "verdict"]) field(name).addEventListener("change", arrange);
  for (const name of ["text", "disagreement", "low", "high"]) field(name).addEventListener("input", arrange);
  field("controls").hidden = false;
  field("still").hidden = true;
  arrange();
})();
