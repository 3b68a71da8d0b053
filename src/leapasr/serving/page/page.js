// The page: a recording is sent to this server, and its text, and how that came about, is shown.

const SOURCES = {
  head1: ["decoder", "decoder (head 1)"],
  bonus: ["decoder", "decoder, behind a draft"],
  ctc: ["ctc", "CTC, drafted"],
  jacobi: ["jacobi", "decoder, read ahead"],
  beam: ["beam", "another hypothesis, drafted"],
};

const HOLD_SECONDS = 0.5; // how long a word stays lit behind its end, if no other follows

const part = (id) => document.getElementById(id);
const sourceOf = (name) => SOURCES[name] ?? ["heads", `${name.replace("head", "head ")}, drafted`];

let request = null; // the transcription under way
let recorder = null; // the microphone, while it records
let result = null; // of the last transcription
let timedWords = []; // [{start, end, element}] in order

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

function say(text) {
  part("status").textContent = text;
}

function complain(message) {
  part("error").textContent = message;
  say("");
}

function showProgress(share) {
  const bar = part("progress");
  bar.hidden = share === null;
  if (share === undefined) bar.removeAttribute("value");
  else bar.value = share ?? 0;
}

// --- sending

function transcribe(audio, name) {
  request?.abort();
  result = null;
  timedWords = [];
  part("error").textContent = "";
  part("text").textContent = "";
  part("result").hidden = part("actions").hidden = part("explained").hidden = true;
  part("cancel").hidden = false;
  const player = part("audio");
  if (player.src) URL.revokeObjectURL(player.src);
  player.src = URL.createObjectURL(audio);
  player.hidden = false;

  const form = new FormData();
  form.append("file", audio, name);
  form.append("response_format", "verbose_json");
  form.append("timestamp_granularities[]", "word");
  form.append("timestamp_granularities[]", "segment");
  form.append("include[]", "trace");
  form.append("stream", "true");

  const sent = new XMLHttpRequest(); // which, unlike fetch, tells how much has been uploaded
  request = sent;
  let read = 0;
  const readEvents = () => {
    const events = sent.responseText.slice(read).split("\n\n");
    const rest = events.pop();
    read = sent.responseText.length - rest.length;
    for (const each of events) take(JSON.parse(each.replace(/^data: /, "")));
  };
  sent.open("POST", "v1/audio/transcriptions");
  const key = part("key").value;
  if (key) sent.setRequestHeader("Authorization", `Bearer ${key}`);
  sent.upload.onprogress = (event) => {
    if (event.lengthComputable) showProgress(event.loaded / event.total);
  };
  sent.upload.onload = () => {
    showProgress(undefined);
    say("Transcribing …");
  };
  sent.onprogress = () => {
    if (sent.status === 200) readEvents();
  };
  sent.onload = () => {
    if (sent.status === 200) {
      readEvents();
      if (!result && !part("error").textContent) complain("The server broke off.");
    } else {
      refuse(sent);
    }
    end();
  };
  sent.onerror = () => {
    complain("The server cannot be reached, or broke off.");
    end();
  };
  sent.onabort = () => {
    say("Cancelled.");
    end();
  };
  const end = () => {
    if (request !== sent) return;
    request = null;
    showProgress(null);
    part("cancel").hidden = true;
  };
  say("Uploading …");
  showProgress(0);
  sent.send(form);
}

function refuse(sent) {
  let message = `The server answered ${sent.status}.`;
  try {
    message = JSON.parse(sent.responseText).error.message;
  } catch {
    // an error of something between us and the server: its status has to do
  }
  complain(message);
  if (sent.status === 401) {
    part("key-row").hidden = false;
    part("key").focus();
  }
}

function take(event) {
  if (event.error) {
    complain(event.error.message);
  } else if (event.type === "transcript.text.delta") {
    part("result").hidden = false;
    part("text").append(event.delta);
    showProgress(event.leapasr.end / event.leapasr.duration);
  } else if (event.type === "transcript.text.done") {
    const { type, ...rest } = event;
    result = rest;
    show();
  }
}

// --- showing

function show() {
  const { text, duration, leapasr } = result;
  part("result").hidden = false;
  if (!text) {
    part("text").textContent = "(nothing is said)";
    say(`Done: no speech in ${duration.toFixed(1)} s of audio.`);
    return;
  }
  part("text").replaceChildren(...leapasr.segments.flatMap(showSegment));
  part("actions").hidden = part("explained").hidden = false;
  const { decoder_calls: calls, num_tokens: tokens } = leapasr;
  part("saved").textContent =
    `${calls} decoder calls for ${tokens} tokens, ${tokens - calls} saved: ${(tokens / calls).toFixed(2)} times fewer ` +
    "than one call a token.";
  showSources(leapasr.segments.flatMap((segment) => segment.tokens));
  showLengths(leapasr.accept_lengths);
  say(`Done: ${duration.toFixed(1)} s of audio.`);
}

function showSegment(segment) {
  const shown = [];
  let word = null;
  let step = null;
  for (const token of segment.tokens) {
    if (!token.text) continue;
    if (!word || /^\s/.test(token.text)) {
      word = { start: token.start, end: token.end, element: element("span", { className: "word" }) };
      if (token.start !== null) timedWords.push(word);
      shown.push(" ", word.element);
    }
    if (token.step !== step) word.element.append(element("span", { className: "step", ariaHidden: "true" }));
    step = token.step;
    const [kind, name] = sourceOf(token.source);
    const title = token.rejected ? `${name}, in place of “${token.rejected}”` : name;
    const className = `source source-${kind}`;
    word.element.append(element("span", { className, title }, token.text.trim()));
    word.end = token.end;
  }
  return shown;
}

function showSources(tokens) {
  const counts = new Map();
  for (const { source } of tokens) counts.set(source, (counts.get(source) ?? 0) + 1);
  const rows = [...counts].sort((one, other) => other[1] - one[1]);
  part("sources").tBodies[0].replaceChildren(
    ...rows.map(([source, count]) => {
      const [kind, name] = sourceOf(source);
      const label = element("span", { className: `source source-${kind}` }, name);
      return element("tr", {}, element("th", { scope: "row" }, label), element("td", {}, String(count)));
    }),
  );
}

function showLengths(lengths) {
  const most = Math.max(...Object.values(lengths));
  part("lengths").tBodies[0].replaceChildren(
    ...Object.entries(lengths).map(([length, count]) => {
      const bar = element("meter", { max: most, value: count, ariaHidden: "true" });
      return element("tr", {}, element("th", { scope: "row" }, length), element("td", {}, bar, ` ${count}`));
    }),
  );
}

function light() {
  const now = part("audio").currentTime;
  const last = timedWords.findLast(({ start }) => start <= now);
  const lit = last && now < last.end + HOLD_SECONDS ? last.element : null;
  for (const { element } of timedWords) element.classList.toggle("lit", element === lit);
}

function follow() {
  light();
  if (!part("audio").paused) requestAnimationFrame(follow);
}

function playFrom(event) {
  const clicked = event.target.closest(".word");
  const word = timedWords.find(({ element }) => element === clicked);
  if (!word) return;
  part("audio").currentTime = word.start;
  part("audio").play();
}

// --- recording, and what else people do

async function record() {
  if (recorder) {
    recorder.stop();
    return;
  }
  let stream;
  try {
    stream = await navigator.mediaDevices.getUserMedia({ audio: true });
  } catch (error) {
    complain(`No microphone can be used (${error.message}): choose a file.`);
    return;
  }
  const pieces = [];
  recorder = new MediaRecorder(stream);
  recorder.ondataavailable = (event) => pieces.push(event.data);
  recorder.onstop = () => {
    for (const track of stream.getTracks()) track.stop();
    const type = recorder.mimeType;
    recorder = null;
    part("record").classList.remove("recording");
    part("record").textContent = "Record from the microphone";
    transcribe(new Blob(pieces, { type }), "recording");
  };
  recorder.start();
  part("error").textContent = "";
  part("record").classList.add("recording");
  part("record").textContent = "Stop, and transcribe";
  say("Recording …");
}

function download(format) {
  const { leapasr } = result;
  const content = format === "json" ? `${JSON.stringify(result, null, 2)}\n` : leapasr[format];
  const link = element("a", { href: URL.createObjectURL(new Blob([content])), download: `transcript.${format}` });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

part("record").onclick = record;
part("cancel").onclick = () => request?.abort();
part("file").onchange = ({ target }) => {
  if (target.files.length) transcribe(target.files[0], target.files[0].name);
  target.value = "";
};
part("input").ondragover = (event) => {
  event.preventDefault();
  part("input").classList.add("dropping");
};
part("input").ondragleave = () => part("input").classList.remove("dropping");
part("input").ondrop = (event) => {
  event.preventDefault();
  part("input").classList.remove("dropping");
  if (event.dataTransfer.files.length) transcribe(event.dataTransfer.files[0], event.dataTransfer.files[0].name);
};
part("text").onclick = playFrom;
part("audio").onplay = follow;
part("audio").onseeked = light;
part("copy").onclick = async () => {
  try {
    await navigator.clipboard.writeText(result.text);
    say("Copied.");
  } catch {
    complain("This browser does not let pages copy: select the text.");
  }
};
for (const button of document.querySelectorAll("[data-download]")) button.onclick = () => download(button.dataset.download);
if (!navigator.mediaDevices || !window.MediaRecorder) {
  part("record").disabled = true; // browsers give no microphone to pages that came by plain HTTP from another machine
  part("record").title = "This browser gives no microphone to a page from another machine without HTTPS.";
}

fetch("health")
  .then((answer) => answer.json())
  .then(({ model }) => {
    part("model").textContent = `Model: ${model}.`;
  })
  .catch(() => complain("The server cannot be reached."));
