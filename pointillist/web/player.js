// Two clips in step, frame by frame. `element` and `watch` are given by gr.HTML; the clips by data-spec.
const LIMIT = 400e6; // bytes of decoded frames that are kept

function start() {
  const root = element.querySelector('.player');
  if (!root || !root.dataset.spec || root.dataset.begun === root.dataset.spec) return;
  root.dataset.begun = root.dataset.spec;
  const spec = JSON.parse(decodeURIComponent(root.dataset.spec));
  const find = (selector) => root.querySelector(selector);
  const stage = find('.stage'), slider = find('.frame'), play = find('.play'), said = find('.said');
  const films = [spec.dense, spec.fast].map(open), kept = [new Map(), new Map()];
  let frame = 0, playing = false, mode = 'side', cut = 0.5, gain = 5, busy = false, again = false;
  slider.max = spec.frames - 1;
  slider.value = 0;
  const alive = () => root.isConnected && root.dataset.begun === root.dataset.spec;

  function open(source) {
    const film = document.createElement('video');
    Object.assign(film, {muted: true, playsInline: true, preload: 'auto', src: source});
    return film;
  }

  function ready(film) {
    return new Promise((resolve) => film.readyState >= 2 ? resolve() : film.addEventListener('loadeddata', resolve, {once: true}));
  }

  async function picture(which, number) {
    if (kept[which].has(number)) return kept[which].get(number);
    const film = films[which];
    await ready(film);
    const moment = (number + 0.5) / spec.fps;
    if (Math.abs(film.currentTime - moment) > 1e-4) {
      const sought = new Promise((resolve) => film.addEventListener('seeked', resolve, {once: true}));
      film.currentTime = Math.min(moment, film.duration || moment);
      await sought;
    }
    const found = await createImageBitmap(film);
    if (found.width * found.height * 8 * spec.frames < LIMIT) kept[which].set(number, found);
    return found;
  }

  function canvases(names, width, height) {
    const there = [...stage.querySelectorAll('figcaption')].map((each) => each.textContent).join();
    if (there !== names.join()) {
      stage.replaceChildren(...names.map((name) => {
        const figure = document.createElement('figure'), caption = document.createElement('figcaption');
        caption.textContent = name;
        figure.append(document.createElement('canvas'), caption);
        return figure;
      }));
    }
    return [...stage.querySelectorAll('canvas')].map((canvas) => {
      if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, {width, height});
      return canvas.getContext('2d', {willReadFrequently: mode === 'difference'});
    });
  }

  function pixels(image) {
    const canvas = new OffscreenCanvas(image.width, image.height), context = canvas.getContext('2d');
    context.drawImage(image, 0, 0);
    return context.getImageData(0, 0, image.width, image.height);
  }

  async function draw() {
    if (busy) { again = true; return; }
    busy = true;
    const [dense, fast] = await Promise.all([picture(0, frame), picture(1, frame)]);
    const {width, height} = dense;
    stage.style.setProperty('--aspect', width / height);
    if (mode === 'side') {
      const [left, right] = canvases(['dense', 'accelerated'], width, height);
      left.drawImage(dense, 0, 0);
      right.drawImage(fast, 0, 0);
    } else if (mode === 'slider') {
      const [one] = canvases(['dense  |  accelerated'], width, height), at = Math.round(cut * width);
      one.drawImage(fast, 0, 0);
      if (at > 0) one.drawImage(dense, 0, 0, at, height, 0, 0, at, height);
      one.fillStyle = '#fff';
      one.fillRect(at - 0.5, 0, 1, height);
    } else {
      const [one] = canvases(['difference, amplified'], width, height), a = pixels(dense), b = pixels(fast);
      for (let i = 0; i < a.data.length; i++) if (i % 4 < 3) a.data[i] = gain * Math.abs(a.data[i] - b.data[i]);
      one.putImageData(a, 0, 0);
    }
    const decibels = spec.psnr[frame];
    said.textContent = `frame ${frame + 1}/${spec.frames} · ${decibels >= 100 ? 'identical' : decibels.toFixed(1) + ' dB'}`;
    root.dataset.drawn = `${mode} ${frame}`;
    busy = false;
    if (again) { again = false; draw(); }
  }

  async function run() {
    while (playing && alive()) {
      const begun = performance.now();
      frame = (frame + 1) % spec.frames;
      slider.value = frame;
      await draw();
      await new Promise((resolve) => setTimeout(resolve, Math.max(0, 1000 / spec.fps - (performance.now() - begun))));
    }
  }

  play.onclick = () => { playing = !playing; play.textContent = playing ? '❚❚' : '▶'; run(); };
  slider.oninput = () => { frame = Number(slider.value); draw(); };
  root.querySelectorAll('[data-mode]').forEach((button) => {
    if (button === root) return;
    button.onclick = () => {
      mode = root.dataset.mode = button.dataset.mode;
      root.querySelectorAll('button[data-mode]').forEach((each) => each.classList.toggle('on', each === button));
      draw();
    };
  });
  find('.gain input').oninput = (event) => { gain = Number(event.target.value); find('.gain b').textContent = gain; draw(); };
  const drag = (event) => {
    if (mode !== 'slider' || (event.type === 'pointermove' && !event.buttons)) return;
    const box = stage.querySelector('canvas').getBoundingClientRect();
    cut = Math.min(1, Math.max(0, (event.clientX - box.left) / box.width));
    draw();
  };
  stage.onpointerdown = drag;
  stage.onpointermove = drag;
  draw();
}

start();
watch('value', start);
