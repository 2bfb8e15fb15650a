// Replays an answer: what a pass committed later than the slider says is shown as a mask.
function lladaReplay(slider) {
  const box = slider.closest('.turn'), at = +slider.value;
  box.querySelectorAll('.t').forEach(token => token.classList.toggle('m', +token.dataset.s >= at));
  slider.parentElement.querySelector('output').textContent = `pass ${at} of ${slider.max}`;
}
function lladaPlay(button) {
  const slider = button.parentElement.querySelector('input');
  const stop = () => { clearInterval(button.timer); button.timer = 0; button.textContent = 'Play'; };
  if (button.timer) return stop();
  if (+slider.value >= +slider.max) slider.value = 0;
  button.textContent = 'Pause';
  button.timer = setInterval(() => {
    slider.value = +slider.value + 1;
    lladaReplay(slider);
    if (+slider.value >= +slider.max || !button.isConnected) stop();
  }, Math.max(40, Math.min(400, 6000 / slider.max)));
}
