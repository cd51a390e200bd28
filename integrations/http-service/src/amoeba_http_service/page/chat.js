// A chat with the server that sent this page. Texts become text nodes, never markup.
const NONE = 105; // of the slider: no target
const at = (id) => document.getElementById(id);
const made = (name, text = "", kind = "") => {
  const element = document.createElement(name);
  element.textContent = text;
  if (kind) element.className = kind;
  return element;
};
const milliseconds = (value) => (value == null ? "–" : `${value < 10 ? value.toFixed(1) : Math.round(value)} ms`);

let turns = []; // {role, content}, of questions that were answered
let known = null; // what the server says of "auto"
let fastest = 0; // share of the whole model's time that the smallest shape takes
let running = null; // AbortController of the answer that is being written

function asked(path, options = {}) {
  const headers = { "Content-Type": "application/json" };
  if (at("token").value) headers.Authorization = `Bearer ${at("token").value}`;
  return fetch(path, { ...options, headers });
}

async function meet() {
  try {
    const response = await asked("/v1/models");
    at("locked").hidden = response.status !== 401;
    if (!response.ok) throw new Error((await response.json()).error.message);
    const models = (await response.json()).data.map((each) => each.amoeba);
    known = models[0];
    fastest = Math.max(...["ttft_ms", "tpot_ms"].map((time) => Math.min(...models.map((each) => each[time])) / known[time]));
    at("model").textContent = `${known.of}: ${models.length - 1} shapes, ${known.context ?? "any number of"} positions`;
    at("most").max = known.max_tokens;
  } catch (error) {
    known = null;
    at("model").textContent = error.message;
  }
  explain();
}

function explain() {
  const share = Number(at("target").value);
  let means = "no target: as long as it takes";
  if (share < NONE && known) {
    means = `${share} % of the whole model's time: ${milliseconds((share / 100) * known.tpot_ms)} a token`;
    if (share / 100 < fastest) means += `; no shape is so fast (${Math.ceil(fastest * 100)} %)`;
  } else if (share < NONE) {
    means = `${share} % of the whole model's time`;
  }
  at("means").textContent = means;
  at("target").setAttribute("aria-valuetext", means);
}

function body(question) {
  const share = Number(at("target").value) / 100;
  const common = { model: "auto", stream: true, max_tokens: Number(at("most").value) };
  if (share < NONE / 100) common.slo = { ttft: share, tpot: share, best_effort: at("effort").checked };
  const context = at("context").value;
  if (known && !known.chat) {
    const before = turns.map((turn) => `${turn.content}\n`).join("");
    const front = (context ? `${context}\n` : "") + before;
    return ["/v1/completions", { ...common, prompt: question, context: front }, [{ role: "context", content: front }, { role: "prompt", content: question }]];
  }
  const messages = [...(context ? [{ role: "system", content: context }] : []), ...turns, { role: "user", content: question }];
  return ["/v1/chat/completions", { ...common, messages }, messages];
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (held + value).split("\n\n");
    held = parts.pop();
    for (const part of parts) {
      if (part === "data: [DONE]") return;
      if (part.startsWith("data: ")) yield JSON.parse(part.slice(6));
    }
  }
}

function card() {
  const article = made("article", "", "answer");
  const text = made("p", "", "text running");
  const got = made("dl", "", "got");
  article.append(text, got);
  at("log").append(article);
  return { article, text, got };
}

function tell(got, amoeba) {
  const { shape, in_time, prompt, promised, measured } = amoeba;
  const row = (name, ...values) => {
    got.append(made("dt", name));
    for (const value of values) got.append(made("dd", value, values.length === 1 ? "wide" : ""));
  };
  got.replaceChildren();
  row("shape", shape);
  row("prompt", `${prompt.kept} of ${prompt.tokens} tokens kept`);
  got.append(made("dt"), made("dd", "promised", "head"), made("dd", "measured", "head"));
  row("first token", milliseconds(promised.ttft_ms), milliseconds(measured?.ttft_ms));
  row("each more", milliseconds(promised.tpot_ms), milliseconds(measured?.tpot_ms));
  if (!in_time) {
    got.append(made("dt"), made("dd", "below its target: nothing is so fast now", "wide late"));
  }
}

function shown(messages, prompt) {
  const details = made("details", "", "prompt");
  const count = prompt.tokens - prompt.kept;
  details.append(made("summary", count ? `The prompt, ${count} tokens left out` : "The prompt, nothing left out"));
  details.open = count > 0;
  messages.forEach((message, number) => {
    const line = made("p");
    line.append(made("b", `${message.role}: `));
    const characters = Array.from(message.content); // positions count characters, not halves of pairs
    let from = 0;
    for (const [text, start, end] of prompt.dropped) {
      if (text !== number) continue;
      if (start > from) line.append(characters.slice(from, start).join(""));
      if (end > from) line.append(made("del", characters.slice(Math.max(start, from), end).join("")));
      from = Math.max(from, end);
    }
    line.append(characters.slice(from).join(""));
    details.append(line);
  });
  return details;
}

async function ask(question) {
  const [path, sent, messages] = body(question);
  at("log").append(made("p", question, "question"));
  const { article, text, got } = card();
  running = new AbortController();
  busy(true);
  let amoeba = null;
  try {
    const response = await asked(path, { method: "POST", body: JSON.stringify(sent), signal: running.signal });
    if (response.status === 401) at("locked").hidden = false;
    if (!response.ok) throw new Error((await response.json()).error.message);
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error.message);
      const choice = event.choices[0];
      text.append(choice?.delta?.content ?? choice?.text ?? "");
      if (event.amoeba) tell(got, (amoeba = event.amoeba));
      at("log").scrollTop = at("log").scrollHeight;
    }
    turns.push({ role: "user", content: question }, { role: "assistant", content: text.textContent });
  } catch (error) {
    const stopped = error.name === "AbortError";
    article.append(made("p", stopped ? "stopped" : error.message, stopped ? "quiet" : "error"));
  } finally {
    text.classList.remove("running");
    if (amoeba) article.append(shown(messages, amoeba.prompt));
    at("log").scrollTop = at("log").scrollHeight;
    running = null;
    busy(false);
  }
}

function busy(is) {
  at("send").disabled = is;
  at("stop").disabled = !is;
  at("log").setAttribute("aria-busy", String(is));
}

at("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const question = at("question").value.trim();
  if (!question || running) return;
  at("question").value = "";
  at("question").focus();
  ask(question);
});
at("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    at("ask").requestSubmit();
  }
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") running?.abort();
});
at("stop").addEventListener("click", () => running?.abort());
at("clear").addEventListener("click", () => {
  running?.abort();
  turns = [];
  at("log").replaceChildren();
  at("question").focus();
});
at("target").addEventListener("input", explain);
at("token").addEventListener("change", meet);
at("question").focus();
meet();
