// What is wrong with the page as it is shown, as a list of sentences.
const problems = [];
const name = (element) => `<${element.localName} class="${element.getAttribute("class") ?? ""}"> ${element.textContent.trim().slice(0, 40)}`;
for (const details of document.querySelectorAll("details")) details.open = true;

if (document.documentElement.scrollWidth > innerWidth) problems.push(`the page is ${document.documentElement.scrollWidth} px wide`);
if (!document.title) problems.push("the page has no title");
if (document.querySelectorAll("h1").length !== 1) problems.push("the page has not one headline");
for (const entry of performance.getEntriesByType("resource"))
  if (!entry.name.startsWith("data:")) problems.push(`fetched ${entry.name}`);

// Plots: drawn, named, their texts large enough and apart from each other.
for (const svg of document.querySelectorAll("svg")) {
  const label = svg.getAttribute("aria-label");
  const box = svg.getBoundingClientRect();
  if (!label || svg.getAttribute("role") !== "img") problems.push("a plot without a name");
  if (box.width < 200 || box.height < 80) problems.push(`${label}: ${box.width} × ${box.height} px`);
  const shapes = [...svg.querySelectorAll("path, use")].map((shape) => shape.getBoundingClientRect());
  if (shapes.filter((shape) => shape.width + shape.height > 0).length < 3) problems.push(`${label}: nothing is drawn`);
  const scale = box.width / svg.viewBox.baseVal.width;
  const texts = [...svg.querySelectorAll("text")].map((text) => [text, text.getBoundingClientRect()]);
  if (!texts.length) problems.push(`${label}: no text`);
  for (const [text, place] of texts) {
    if (parseFloat(getComputedStyle(text).fontSize) * scale < 8) problems.push(`${label}: "${text.textContent}" is too small`);
    if (place.left < box.left - 2 || place.right > box.right + 2) problems.push(`${label}: "${text.textContent}" is cut`);
    for (const [other, there] of texts) {
      const across = Math.min(place.right, there.right) - Math.max(place.left, there.left);
      const down = Math.min(place.bottom, there.bottom) - Math.max(place.top, there.top);
      if (text !== other && across > 1.5 && down > 3) problems.push(`${label}: "${text.textContent}" lies over "${other.textContent}"`);
    }
  }
}

for (const image of document.images)
  if (!image.alt || !image.naturalWidth || !image.getBoundingClientRect().width) problems.push(`a picture is missing: ${image.alt}`);
for (const video of document.querySelectorAll("video")) {
  const box = video.getBoundingClientRect();
  if (!video.videoWidth || box.width < 50 || box.height < 30) problems.push(`a video is not drawn: ${video.ariaLabel}`);
  if (!video.ariaLabel || video.tabIndex !== 0) problems.push("a video without a name, or out of the keyboard's reach");
}

// Texts: within their boxes unless these scroll, large enough, and with the contrast of WCAG AA.
const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
const paint = (...colours) => {
  canvas.clearRect(0, 0, 1, 1);
  for (const colour of colours) { canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1); }
  return [...canvas.getImageData(0, 0, 1, 1).data];
};
const luminance = (pixel) => pixel.slice(0, 3).map((value) => value / 255)
  .map((value) => (value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4))
  .reduce((sum, value, index) => sum + value * [0.2126, 0.7152, 0.0722][index], 0);
const grounds = (element) => element ? [...grounds(element.parentElement), getComputedStyle(element).backgroundColor] : [];
const contrast = (element, colour) => {
  const ground = grounds(element);
  const [first, second] = [paint(...ground), paint(...ground, colour)].map(luminance);
  return (Math.max(first, second) + 0.05) / (Math.min(first, second) + 0.05);
};
for (const element of document.body.querySelectorAll("*")) {
  const own = [...element.childNodes].some((node) => node.nodeType === Node.TEXT_NODE && node.textContent.trim());
  if (!own || element.closest("script, style, .unseen")) continue;
  const style = getComputedStyle(element);
  const plotted = element.closest("svg");
  if (contrast(element, plotted ? style.fill : style.color) < 4.5) problems.push(`too little contrast: ${name(element)}`);
  if (plotted) continue;
  if (parseFloat(style.fontSize) < 10) problems.push(`too small: ${name(element)}`);
  const clipped = style.overflowX !== "visible";
  if (!clipped && style.display !== "inline" && element.scrollWidth > element.clientWidth + 1) problems.push(`runs over: ${name(element)}`);
}
return [...new Set(problems)].slice(0, 20);
