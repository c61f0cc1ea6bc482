'use strict';
// The page of the demo: asks the service, draws what it answers, keeps nothing.
const at = id => document.getElementById(id);
const session = [];
let model = null, shown = null, token = '';

function element(name, text, className) {
  const e = document.createElement(name);
  if (text !== undefined) e.textContent = text;
  if (className) e.className = className;
  return e;
}
function fill(parent, ...children) { parent.replaceChildren(...children); }
const percent = p => p < 0.005 ? 'below 1 %' : p > 0.995 ? 'above 99 %' : Math.round(100 * p) + ' %';
const three = x => x === null || x === undefined ? '–' : x.toFixed(3);
const interval = e => three(e.value) + ' (' + three(e.lower) + ' to ' + three(e.upper) + ')';

// --- Talking to the service ---

async function ask(path, options = {}) {
  const headers = Object.assign({}, options.headers, token ? {Authorization: 'Bearer ' + token} : {});
  let response;
  try { response = await fetch(path, Object.assign({}, options, {headers})); }
  catch { throw new Error('The service cannot be reached. Is it still running?'); }
  if (response.status === 401) { at('ask-token').hidden = false; at('token').focus(); }
  const body = await response.json().catch(() => ({}));
  if (!response.ok) throw new Error(body.detail || 'The service answered with status ' + response.status + '.');
  return body;
}

async function load() {
  try {
    model = await ask('/model');
    at('model').textContent = model.name + ', version ' + model.version + (model.synthetic ? ' — SYNTHETIC: trained on drawn pictures, says nothing about patients' : '');
    if (model.scale.prevalence) at('prevalence-known').textContent = ' (' + Math.round(100 * model.scale.prevalence) + ' of 100)';
    card(model.card);
  } catch (e) { fail(e); }
}

async function send(file) {
  at('error').hidden = true;
  at('status').textContent = 'The picture is being read.';
  const form = new FormData();
  form.append('file', file, 'picture');
  const share = at('prevalence').valueAsNumber;
  const query = share > 0 && share < 100 ? '?prevalence=' + share / 100 : '';
  try {
    const found = await ask('/explain' + query, {method: 'POST', body: form});
    remember(file.name, found, '');
    await show(found);
    at('status').textContent = 'Done.';
  } catch (e) {
    remember(file.name, null, e.message);
    fail(e);
  }
}

function fail(e) {
  at('status').textContent = '';
  at('error').textContent = e.message;
  at('error').hidden = false;
  at('result').hidden = true;
}

// --- The answer in words ---

async function show(found) {
  const unsure = found.abstains;
  at('verdict').textContent = unsure ? 'Not sure: a person has to look' : found.decision === 'PNEUMONIA' ? 'Looks like pneumonia' : 'Does not look like pneumonia';
  at('frequency').textContent = found.frequency;
  const warnings = [found.reason, found.unfamiliar_reason && found.unfamiliar !== false ? found.unfamiliar_reason : null, model && model.synthetic ? 'SYNTHETIC model.' : null];
  at('warning').textContent = warnings.filter(Boolean).join(' ');
  at('warning').hidden = !at('warning').textContent;
  at('warning').classList.toggle('warn', unsure || found.unfamiliar === true);
  const point = found.operating_point;
  at('point').textContent = 'At the operating point ' + point.name + ' (' + point.rule + ') the picture is called ' + found.decision + ': threshold ' + percent(point.threshold) + '.';
  fill(at('promised'), ...Object.entries(point.promised).filter(([, e]) => e).map(([name, e]) => {
    const row = element('tr'), head = element('th', name), got = model && model.tested.find(t => t.point === point.name && t.metric === name);
    head.scope = 'row';
    row.append(head, element('td', interval(e)), element('td', got ? interval(got.got) + (got.kept === false ? ': promise broken' : '') : 'not tested'));
    return row;
  }));
  scale(found);
  facts(found);
  await picture(found);
  at('result').hidden = false;
  at('verdict').focus();
}

// The scale is one of log odds, so that 1 % and 10 % are as far apart as 90 % and 99 %.
const place = p => Math.min(98, Math.max(2, 50 + 50 * Math.log(p / (1 - p)) / Math.log(999)));

function scale(found) {
  const box = at('scale'), here = place(found.probability), limit = found.operating_point.threshold, parts = [element('div', undefined, 'bar')];
  function put(tag, className, x, text) {
    const e = element(tag, text, className + (x < 12 ? ' first' : x > 88 ? ' last' : ''));
    e.style.left = x + '%';
    parts.push(e);
    return e;
  }
  const zone = model && model.scale.unsure, usual = at('prevalence').value === '';
  if (zone && usual) put('div', 'unsure', place(zone[0])).style.width = Math.max(1, place(zone[1]) - place(zone[0])) + '%';
  if (usual) put('div', 'limit', place(limit));
  put('div', 'here', here);
  put('span', 'top', here, 'this picture: ' + percent(found.probability));
  for (const p of [0.01, 0.1, 0.5, 0.9, 0.99]) put('span', 'tick', place(p), Math.round(100 * p) + ' %');
  fill(box, ...parts);
  box.setAttribute('aria-label', 'Probability ' + percent(found.probability) + (usual ? '; the operating point lies at ' + percent(limit) +
    (zone ? '; between ' + percent(zone[0]) + ' and ' + percent(zone[1]) + ' the model is not sure' : '') : ''));
}

function facts(found) {
  const rows = {'Calibrated probability': found.probability.toPrecision(4), 'Network\'s logit': found.logit.toFixed(4), 'Answer of the set': found.verdict,
    'Unlike the training pictures': found.unfamiliar === null ? 'not known: ' + found.unfamiliar_reason : found.unfamiliar ? 'yes' : 'no',
    'Model': found.model.name + ' ' + found.model.version, 'SHA-256 of the model': found.model.sha256, 'SHA-256 of the picture': found.image.sha256,
    'Format': found.image.format + ', ' + found.image.bytes.toLocaleString('en') + ' bytes', 'Time in the service': found.timing_ms.total + ' ms'};
  fill(at('figures'), ...Object.entries(rows).flatMap(([k, v]) => [element('dt', k), element('dd', v)]));
  const p = found.preprocessing;
  at('geometry').textContent = p.size + ' x ' + p.size + ' pixels, ' + (p.geometry === 'squish' ? 'squeezed into a square' : 'its central square');
}

// --- The picture ---

async function decoded(png) {
  const image = new Image();
  image.src = 'data:image/png;base64,' + png;
  await image.decode();
  return image;
}

async function picture(found) {
  const [image, heat] = await Promise.all([found.seen_png, found.heat_png].map(decoded));
  const n = image.width, canvas = document.createElement('canvas');
  canvas.width = n; canvas.height = n;
  const c = canvas.getContext('2d');
  c.drawImage(image, 0, 0);
  shown = {grey: c.getImageData(0, 0, n, n), cells: found.heat, heat, n};
  draw();
}

function draw() {
  if (!shown) return;
  const big = 3, n = shown.n, out = new ImageData(n, n), centre = +at('centre').value, width = +at('width').value, invert = at('invert').checked;
  for (let i = 0; i < n * n; i++) {
    const v = 255 * Math.min(1, Math.max(0, (shown.grey.data[4 * i] - centre) / width + 0.5));
    out.data.fill(invert ? 255 - v : v, 4 * i, 4 * i + 3);
    out.data[4 * i + 3] = 255;
  }
  const small = document.createElement('canvas'), canvas = at('canvas'), c = canvas.getContext('2d');
  small.width = small.height = n;
  small.getContext('2d').putImageData(out, 0, 0);
  canvas.width = canvas.height = n * big;
  c.drawImage(small, 0, 0, n * big, n * big);
  const on = at('heat').checked;
  if (on) {
    c.globalAlpha = at('opacity').value / 100;
    c.drawImage(shown.heat, 0, 0, n * big, n * big);
    c.globalAlpha = 1;
  }
  at('legend').hidden = !on;
  canvas.setAttribute('aria-label', 'The picture as the model sees it' + (on ? ', with the heat map: ' + inWords(shown.cells) : ''));
  canvas.style.width = at('zoom').value + '%';
}

function inWords(heat) {
  const rows = heat.length, columns = heat[0].length;
  let best = [0, 0];
  heat.forEach((row, y) => row.forEach((v, x) => { if (v > heat[best[0]][best[1]]) best = [y, x]; }));
  const part = (i, n, names) => names[Math.min(2, Math.floor(3 * (i + 0.5) / n))];
  return 'most for pneumonia at the ' + part(best[0], rows, ['top', 'middle', 'bottom']) + ', ' + part(best[1], columns, ['left', 'centre', 'right']) + ' of the picture';
}

// --- Session and card ---

function remember(name, found, error) {
  session.push({time: new Date().toISOString().slice(0, 19) + 'Z', file: name, answer: found ? (found.abstains ? 'not sure' : found.decision) : 'error',
    probability: found ? found.probability : '', note: found ? found.reason || '' : error, model: found ? found.model.sha256 : ''});
  fill(at('rows'), ...session.map(h => {
    const row = element('tr');
    row.append(...[h.time.slice(11, 19), h.file, h.answer, h.probability === '' ? '' : percent(h.probability), h.note].map(t => element('td', t)));
    return row;
  }));
  at('history').hidden = false;
}

function csv() {
  const columns = ['time', 'file', 'answer', 'probability', 'note', 'model'];
  const cell = v => '"' + String(v).replace(/^[=+\-@]/, "'$&").replaceAll('"', '""') + '"';
  const text = [columns.join(','), ...session.map(h => columns.map(k => cell(h[k])).join(','))].join('\n') + '\n# Not for clinical use.\n';
  const link = document.createElement('a');
  link.href = URL.createObjectURL(new Blob([text], {type: 'text/csv'}));
  link.download = 'session.csv';
  link.click();
  URL.revokeObjectURL(link.href);
}

const MARKS = /(\*\*[^*]+\*\*|`[^`]+`|\[[^\]]+\]\(https:[^)]+\))/;

function inline(e, text) {                       // Bold, code and links of a line
  text.split(MARKS).forEach((part, i) => {
    if (i % 2 === 0) return e.append(part);
    if (part[0] === '*') return e.append(element('strong', part.slice(2, -2)));
    if (part[0] === '`') return e.append(element('code', part.slice(1, -1)));
    const [label, target] = part.slice(1, -1).split('](');
    const a = element('a', label);
    a.href = target;
    e.append(a);
  });
  return e;
}

function row(line, head) {                       // A line of a table; one without words as its head has none
  const cells = line.split('|').slice(1, -1).map(t => t.trim()), made = element('tr');
  for (const [i, t] of cells.entries()) {
    const e = inline(element(head && t ? 'th' : 'td'), t);
    if (head && t) e.scope = 'col';
    made.append(e);
  }
  return cells.some(Boolean) ? made : '';
}

function card(text) {                            // The little Markdown that a model card uses
  const out = [];
  let list = null, table = null;
  for (const line of text.split('\n')) {
    if (!line.startsWith('- ')) list = null;
    if (!line.startsWith('|')) table = null;
    if (line.startsWith('#')) out.push(element('h3', line.replace(/^#+ /, '')));
    else if (line.startsWith('- ')) { if (!list) out.push(list = element('ul')); list.append(inline(element('li'), line.slice(2))); }
    else if (line.startsWith('|--')) continue;
    else if (line.startsWith('|')) { const head = !table; if (head) out.push(table = element('table')); table.append(row(line, head)); }
    else if (line) out.push(inline(element('p'), line));
  }
  fill(at('card'), ...out);
}

// --- Wiring ---

at('file').addEventListener('change', () => { if (at('file').files[0]) send(at('file').files[0]); at('file').value = ''; });
for (const [event, over] of [['dragover', true], ['dragleave', false], ['drop', false]]) {
  document.addEventListener(event, e => {
    e.preventDefault();
    at('drop').classList.toggle('over', over);
    if (event === 'drop' && e.dataTransfer.files[0]) send(e.dataTransfer.files[0]);
  });
}
for (const id of ['heat', 'opacity', 'centre', 'width', 'zoom', 'invert']) at(id).addEventListener('input', draw);
at('reset').addEventListener('click', () => {
  for (const id of ['heat', 'opacity', 'centre', 'width', 'zoom', 'invert']) { at(id).value = at(id).defaultValue; at(id).checked = false; }
  draw();
});
at('csv').addEventListener('click', csv);
at('ask-token').addEventListener('submit', e => { e.preventDefault(); token = at('token').value.trim(); at('ask-token').hidden = true; at('error').hidden = true; load(); });
if (location.hash.startsWith('#token=')) { token = location.hash.slice(7); window.history.replaceState(null, '', '/'); }
load();
