const find = (id) => document.getElementById(id);
const video = document.querySelector("video");
const titles = { rgb: "RGB", flow: "Flow", joint: "RGB and flow added" };
let shown = null;

const say = (text, bad = false) => {
  find("state").textContent = text;
  find("state").className = bad ? "bad" : "";
};
const make = (tag, name, text = "") => {
  const node = document.createElement(tag);
  node.className = name;
  node.textContent = text;  // class names are data: never HTML
  return node;
};
const percent = (value) => `${Math.round(100 * value)}%`;
// Of overlapping clips the one whose middle is nearest.
const clipAt = (time) => {
  const distances = shown.clips.map(([start, end]) => Math.abs((start + end) / 2 - time));
  return distances.indexOf(Math.min(...distances));
};
const seek = (event) => {
  const box = event.currentTarget.getBoundingClientRect();
  video.currentTime = (shown.seconds * (event.clientX - box.left)) / box.width;
};

const row = (seen) => {
  const part = make("div", "seen");
  const line = make("p", "");
  line.append(make("span", "data", seen.class), make("span", "number", percent(seen.probability)));
  const bars = make("div", "bars");
  bars.setAttribute("role", "img");
  bars.setAttribute("aria-label", `${seen.class}: ${seen.over_time.map(percent).join(", ")}`);
  for (const value of seen.over_time) {
    const bar = make("i", "");
    bar.style.height = `${100 * value}%`;
    bar.title = percent(value);
    bars.append(bar);
  }
  bars.addEventListener("click", seek);
  part.append(line, bars);
  return part;
};

const follow = () => {
  if (shown === null) return;
  const index = clipAt(video.currentTime);
  const [start, end] = shown.clips[index];
  const clip = document.querySelector("#times .clip");
  clip.style.left = `${(100 * start) / shown.seconds}%`;
  clip.style.width = `${(100 * (end - start)) / shown.seconds}%`;
  document.querySelector("#times .now").style.left = `${(100 * video.currentTime) / shown.seconds}%`;
  find("place").textContent = `clip ${index + 1} of ${shown.clips.length}: ${start.toFixed(1)} s to ${end.toFixed(1)} s of ${shown.cut ? "the first " : ""}${shown.seconds.toFixed(1)} s`;
  for (const bars of document.querySelectorAll(".bars")) [...bars.children].forEach((bar, at) => bar.classList.toggle("on", at === index));
};

const show = (answer) => {
  shown = answer;
  const preview = answer.preview;
  video.src = `data:video/mp4;base64,${preview.mp4}`;
  document.querySelector("#show figcaption").textContent = `The video and its flow: hue is the direction of motion, full colour ${preview.full_colour_px} px a frame.`;
  find("networks").replaceChildren(
    ...Object.entries(answer.networks).map(([name, classes]) => {
      const column = make("div", "network");
      column.append(make("h3", "", titles[name]), ...classes.map(row));
      return column;
    }),
  );
  find("result").hidden = false;
  follow();
};

const send = async (file) => {
  if (!file) return;
  say(`${file.name}: decoding, computing flow, looking …`);
  try {
    const answer = await fetch("/api/predict?preview=1", { method: "POST", body: file, headers: { "Content-Type": "application/octet-stream" } });
    const values = await answer.json();
    if (!answer.ok) throw new Error(values.error);
    show(values);
    say(`${file.name}: most probably ${Object.values(values.networks).pop()[0].class}`);
  } catch (error) {
    say(`${file.name}: ${error.message}`, true);
  }
};

const drop = find("drop");
find("file").addEventListener("change", (event) => send(event.target.files[0]));
for (const name of ["dragenter", "dragover"]) {
  drop.addEventListener(name, (event) => {
    event.preventDefault();
    drop.classList.add("over");
  });
}
for (const name of ["dragleave", "drop"]) drop.addEventListener(name, () => drop.classList.remove("over"));
drop.addEventListener("drop", (event) => {
  event.preventDefault();
  send(event.dataTransfer.files[0]);
});
find("times").addEventListener("click", seek);
if (matchMedia("(prefers-reduced-motion: reduce)").matches) video.autoplay = false;
const tick = () => {
  follow();
  requestAnimationFrame(tick);
};
requestAnimationFrame(tick);
