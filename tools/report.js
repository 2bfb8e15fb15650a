const frames = JSON.parse(document.getElementById('frames').textContent);
const calm = matchMedia('(prefers-reduced-motion: reduce)').matches;
document.querySelectorAll('.play').forEach((box, k) => {
  const tokens = [...box.querySelectorAll('.t')], controls = box.querySelector('.controls');
  const [button, slider, output] = controls.children;
  const last = frames[k].length - 1, final = frames[k][last];
  const wait = Math.max(180, Math.min(650, 9000 / (last + 1)));
  let at = last, timer = 0;
  const show = (step, lit = true) => {
    at = step; slider.value = step; output.textContent = `step ${step} of ${last}`;
    tokens.forEach((token, i) => {
      const piece = frames[k][step][i], mask = piece === '▒';
      const fresh = lit && !mask && step > 0 && frames[k][step - 1][i] === '▒';
      token.classList.toggle('mask', mask);
      token.classList.toggle('new', fresh);
      token.firstChild.textContent = mask ? final[i] : piece;  // unseen, so that nothing moves
    });
  };
  const pause = () => { clearInterval(timer); timer = 0; button.textContent = 'Play'; };
  const tick = () => { if (at < last) show(at + 1); else { pause(); show(last, false); } };
  const play = () => {
    if (at >= last) show(0);
    timer = setInterval(tick, wait); button.textContent = 'Pause';
  };
  const first = new IntersectionObserver(([entry]) => {
    if (entry.isIntersecting) { first.disconnect(); play(); }
  }, {threshold: 0.6});
  button.onclick = () => { first.disconnect(); if (timer) pause(); else play(); };
  slider.oninput = () => { first.disconnect(); pause(); show(+slider.value); };
  controls.hidden = false;
  if (!calm) first.observe(box);
});
