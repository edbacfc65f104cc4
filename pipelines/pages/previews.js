for (const video of document.querySelectorAll("video")) {
  const toggle = () => (video.paused ? video.play() : video.pause());
  video.tabIndex = 0;
  video.addEventListener("click", toggle);
  video.addEventListener("keydown", (event) => event.key === "Enter" && toggle());
  if (matchMedia("(prefers-reduced-motion: reduce)").matches) video.autoplay = false;
}
