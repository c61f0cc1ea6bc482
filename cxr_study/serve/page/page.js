'use strict';
// The page of the service: sends an image, shows the answer. Nothing is stored beyond this tab.

const byId = id => document.getElementById(id);
const session = [];  // One entry for each image that was sent
let model = null;  // Answer of /model
let current = null;  // The image on display: {grey, heat, values, size}
let token = '';

function element(name, text, className) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
}

function percent(probability) {
  if (probability < 0.005) return 'below 1 %';
  if (probability > 0.995) return 'above 99 %';
  return Math.round(100 * probability) + ' %';
}

function threeDigits(number) {
  return number === null || number === undefined ? '–' : number.toFixed(3);
}

function withInterval(measured) {
  return `${threeDigits(measured.value)} (${threeDigits(measured.lower)} to ${threeDigits(measured.upper)})`;
}

// --- Requests ---

async function request(path, options = {}) {
  const headers = token ? {Authorization: 'Bearer ' + token} : {};
  let response;
  try {
    response = await fetch(path, {...options, headers});
  } catch {
    throw new Error('The service cannot be reached. Is it still running?');
  }
  if (response.status === 401) {
    byId('ask-token').hidden = false;
    byId('token').focus();
  }
  const body = await response.json().catch(() => ({}));
  if (!response.ok) throw new Error(body.detail || `The service answered with status ${response.status}.`);
  return body;
}

async function loadModel() {
  try {
    model = await request('/model');
  } catch (error) {
    showError(error);
    return;
  }
  const synthetic = model.synthetic ? ' (SYNTHETIC: trained on drawn images; its answers mean nothing for patients)' : '';
  byId('model').textContent = `${model.name}, version ${model.version}${synthetic}`;
  const prevalence = model.scale.prevalence;
  if (prevalence) byId('prevalence-known').textContent = ` (${Math.round(100 * prevalence)} of 100)`;
  showCard(model.card);
}

async function send(file) {
  byId('error').hidden = true;
  byId('status').textContent = 'Analysing the image …';
  const form = new FormData();
  form.append('file', file, 'image');
  const percentage = byId('prevalence').valueAsNumber;
  const query = percentage > 0 && percentage < 100 ? '?prevalence=' + percentage / 100 : '';
  try {
    const answer = await request('/explain' + query, {method: 'POST', body: form});
    remember(file.name, answer, '');
    await showAnswer(answer);
    byId('status').textContent = 'Done.';
  } catch (error) {
    remember(file.name, null, error.message);
    showError(error);
  }
}

function showError(error) {
  byId('status').textContent = '';
  byId('error').textContent = error.message;
  byId('error').hidden = false;
  byId('result').hidden = true;
}

// --- The answer ---

function conclusionOf(answer) {
  if (answer.abstains) return 'Uncertain: a person needs to read this image';
  return answer.decision === 'PNEUMONIA' ? 'Looks like pneumonia' : 'Does not look like pneumonia';
}

async function showAnswer(answer) {
  byId('conclusion').textContent = conclusionOf(answer);
  byId('frequency').textContent = answer.frequency;
  showWarning(answer);
  showScale(answer);
  showPoint(answer);
  showDetails(answer);
  await showImage(answer);
  byId('result').hidden = false;
  byId('conclusion').focus();
}

function showWarning(answer) {
  const sentences = [];
  if (answer.reason) sentences.push(answer.reason);
  if (answer.unfamiliar !== false && answer.unfamiliar_reason) sentences.push(answer.unfamiliar_reason);
  if (model && model.synthetic) sentences.push('The model is SYNTHETIC.');
  byId('warning').textContent = sentences.join(' ');
  byId('warning').hidden = sentences.length === 0;
  byId('warning').classList.toggle('warn', answer.abstains || answer.unfamiliar === true);
}

// The decision depends on the operating point, the verdict does not: the two can name different classes
function pointText(answer) {
  const point = answer.operating_point;
  const decided = `At the operating point ${point.name} (${point.rule}; threshold ${percent(point.threshold)}) ` +
    `the decision is ${answer.decision}.`;
  const isOneClass = ['NORMAL', 'PNEUMONIA'].includes(answer.verdict);
  if (!isOneClass || answer.verdict === answer.decision) return decided;
  return `${decided} Without an operating point the image is compatible with ${answer.verdict} alone.`;
}

function showPoint(answer) {
  const point = answer.operating_point;
  byId('point').textContent = pointText(answer);
  const rows = [];
  for (const [measure, validation] of Object.entries(point.promised)) {
    if (validation) rows.push(measureRow(point.name, measure, validation));
  }
  byId('measures').replaceChildren(...rows);
}

function measureRow(point, measure, validation) {
  const row = element('tr');
  const head = element('th', measure);
  head.scope = 'row';
  const tested = model && model.tested.find(entry => entry.point === point && entry.metric === measure);
  let test = 'not tested';
  if (tested) test = withInterval(tested.got);
  if (tested && tested.kept === false) test += ', below validation';
  row.append(head, element('td', withInterval(validation)), element('td', test));
  return row;
}

// The scale shows log odds: from 1 % to 10 % is as far as from 90 % to 99 %. It ends at 0.1 % and 99.9 %.
function positionOf(probability) {
  const logOdds = Math.log(probability / (1 - probability));
  return Math.min(98, Math.max(2, 50 + 50 * logOdds / Math.log(999)));
}

function mark(tag, className, position, text) {
  const made = element(tag, text, className);
  if (position < 12) made.classList.add('first');
  if (position > 88) made.classList.add('last');
  made.style.left = position + '%';
  return made;
}

function showScale(answer) {
  const threshold = answer.operating_point.threshold;
  // Thresholds hold at the prevalence of the calibration data, so another prevalence hides them
  const usual = byId('prevalence').value === '';
  const range = usual && model ? model.scale.unsure : null;
  const parts = [element('div', undefined, 'bar')];
  let label = 'Probability ' + percent(answer.probability);
  if (range) {
    const [from, to] = range.map(positionOf);
    const zone = mark('div', 'uncertain', from);
    zone.style.width = Math.max(1, to - from) + '%';
    parts.push(zone);
    label += `; uncertain between ${percent(range[0])} and ${percent(range[1])}`;
  }
  if (usual) {
    parts.push(mark('div', 'threshold', positionOf(threshold)));
    label += `; threshold ${percent(threshold)}`;
  }
  const here = positionOf(answer.probability);
  parts.push(mark('div', 'here', here));
  parts.push(mark('span', 'top', here, 'this image: ' + percent(answer.probability)));
  for (const tick of [0.01, 0.1, 0.5, 0.9, 0.99]) {
    parts.push(mark('span', 'tick', positionOf(tick), Math.round(100 * tick) + ' %'));
  }
  byId('scale').replaceChildren(...parts);
  byId('scale').setAttribute('aria-label', label);
  byId('scale-legend').hidden = !usual;
}

const VERDICTS = {
  'either class': 'NORMAL and PNEUMONIA',
  'neither class': 'none',
  'not asked': 'not computed',
};

function unfamiliarText(answer) {
  if (answer.unfamiliar === null) return 'not known. ' + answer.unfamiliar_reason;
  return answer.unfamiliar ? 'yes' : 'no';
}

function showDetails(answer) {
  const image = answer.image;
  const rows = {
    'Calibrated probability': answer.probability.toPrecision(4),
    'Logit of the network': answer.logit.toFixed(4),
    'Decision at the operating point': answer.decision,
    'Classes that the image is compatible with': VERDICTS[answer.verdict] || answer.verdict,
    'Unlike the training images': unfamiliarText(answer),
    'Model': answer.model.name + ' ' + answer.model.version,
    'SHA-256 of the model': answer.model.sha256,
    'SHA-256 of the image': image.sha256,
    'File': `${image.format}, ${image.bytes.toLocaleString('en')} bytes`,
    'Time in the service': answer.timing_ms.total + ' ms',
  };
  const items = [];
  for (const [name, value] of Object.entries(rows)) {
    items.push(element('dt', name), element('dd', value));
  }
  byId('details').replaceChildren(...items);
  const {size, geometry} = answer.preprocessing;
  const shape = geometry === 'squish' ? 'squeezed into a square' : 'its central square';
  byId('geometry').textContent = `${size} x ${size} pixels, ${shape}`;
}

// --- The image ---

async function decodePng(base64) {
  const image = new Image();
  image.src = 'data:image/png;base64,' + base64;
  await image.decode();
  return image;
}

function canvasOf(size) {
  const canvas = document.createElement('canvas');
  canvas.width = size;
  canvas.height = size;
  return canvas;
}

async function showImage(answer) {
  const image = await decodePng(answer.seen_png);
  const heat = await decodePng(answer.heat_png);
  const size = image.width;
  const context = canvasOf(size).getContext('2d');
  context.drawImage(image, 0, 0);
  current = {grey: context.getImageData(0, 0, size, size).data, heat, values: answer.heat, size};
  draw();
}

function windowed(grey, size) {
  const centre = Number(byId('centre').value);
  const width = Number(byId('width').value);
  const inverted = byId('invert').checked;
  const pixels = new ImageData(size, size);
  for (let i = 0; i < 4 * size * size; i += 4) {
    const share = Math.min(1, Math.max(0, (grey[i] - centre) / width + 0.5));
    pixels.data.fill(255 * (inverted ? 1 - share : share), i, i + 3);
    pixels.data[i + 3] = 255;
  }
  const canvas = canvasOf(size);
  canvas.getContext('2d').putImageData(pixels, 0, 0);
  return canvas;
}

const ENLARGED = 3;  // Pixels of the canvas for each pixel of the image

function draw() {
  if (!current) return;
  const canvas = byId('canvas');
  const side = current.size * ENLARGED;
  canvas.width = side;
  canvas.height = side;
  const context = canvas.getContext('2d');
  context.drawImage(windowed(current.grey, current.size), 0, 0, side, side);
  const withHeat = byId('heat').checked;
  let label = 'The image as the model sees it';
  if (withHeat) {
    context.globalAlpha = byId('opacity').value / 100;
    context.drawImage(current.heat, 0, 0, side, side);
    context.globalAlpha = 1;
    label += ', with the heat map. ' + describeHeat(current.values);
  }
  byId('legend').hidden = !withHeat;
  canvas.setAttribute('aria-label', label);
  canvas.style.width = byId('zoom').value + '%';
}

function describeHeat(values) {
  let best = [0, 0];
  values.forEach((row, y) => row.forEach((value, x) => {
    if (value > values[best[0]][best[1]]) best = [y, x];
  }));
  const third = (index, count) => Math.min(2, Math.floor(3 * (index + 0.5) / count));
  const vertical = ['top', 'middle', 'bottom'][third(best[0], values.length)];
  const horizontal = ['left', 'centre', 'right'][third(best[1], values[0].length)];
  return `Strongest evidence for pneumonia: ${vertical}, ${horizontal} of the image`;
}

// --- The table of this session ---

function remember(file, answer, error) {
  const entry = {time: new Date().toISOString().slice(0, 19) + 'Z', file, answer: 'error', probability: '', note: error, model: ''};
  if (answer) {
    entry.answer = answer.abstains ? 'uncertain' : answer.decision;
    entry.probability = answer.probability;
    entry.note = answer.reason || '';
    entry.model = answer.model.sha256;
  }
  session.push(entry);
  byId('rows').replaceChildren(...session.map(sessionRow));
  byId('history').hidden = false;
}

function sessionRow(entry) {
  const row = element('tr');
  const probability = entry.probability === '' ? '' : percent(entry.probability);
  for (const text of [entry.time.slice(11, 19), entry.file, entry.answer, probability, entry.note]) {
    row.append(element('td', text));
  }
  return row;
}

function csvCell(value) {
  const harmless = String(value).replace(/^[=+\-@]/, "'$&");  // A spreadsheet would run a formula
  return '"' + harmless.replaceAll('"', '""') + '"';
}

function saveCsv() {
  const columns = ['time', 'file', 'answer', 'probability', 'note', 'model'];
  const lines = [columns.join(',')];
  for (const entry of session) lines.push(columns.map(column => csvCell(entry[column])).join(','));
  lines.push('# Not for clinical use.', '');
  const link = document.createElement('a');
  link.href = URL.createObjectURL(new Blob([lines.join('\n')], {type: 'text/csv'}));
  link.download = 'session.csv';
  link.click();
  URL.revokeObjectURL(link.href);
}

// --- The model card: headings, paragraphs, lists, tables, bold, code and links of Markdown ---

const MARKS = /(\*\*[^*]+\*\*|`[^`]+`|\[[^\]]+\]\(https:[^)]+\))/;

function marked(text) {
  if (text.startsWith('**')) return element('strong', text.slice(2, -2));
  if (text.startsWith('`')) return element('code', text.slice(1, -1));
  const [label, address] = text.slice(1, -1).split('](');
  const link = element('a', label);
  link.href = address;
  return link;
}

function addInline(parent, line) {
  line.split(MARKS).forEach((part, i) => parent.append(i % 2 ? marked(part) : part));
  return parent;
}

function tableRow(line, isHead) {
  const row = element('tr');
  for (const text of line.split('|').slice(1, -1).map(cell => cell.trim())) {
    const cell = addInline(element(isHead && text ? 'th' : 'td'), text);
    if (isHead && text) cell.scope = 'col';
    row.append(cell);
  }
  return row;
}

function addTableLine(blocks, table, line) {
  const isHead = table === null;
  if (isHead) {
    table = element('table');
    const frame = element('div', undefined, 'scroll');
    frame.tabIndex = 0;  // So that the keyboard can scroll it
    frame.append(table);
    blocks.push(frame);
  }
  const isEmpty = /^[|\s]*$/.test(line);  // Some tables have an empty head
  const isRule = line.startsWith('|--');
  if (!isEmpty && !isRule) table.append(tableRow(line, isHead));
  return table;
}

function addListLine(blocks, list, line) {
  if (list === null) {
    list = element('ul');
    blocks.push(list);
  }
  list.append(addInline(element('li'), line.slice(2)));
  return list;
}

function showCard(text) {
  const blocks = [];
  let list = null;
  let table = null;
  for (const line of text.split('\n')) {
    list = line.startsWith('- ') ? addListLine(blocks, list, line) : null;
    table = line.startsWith('|') ? addTableLine(blocks, table, line) : null;
    if (list || table || !line) continue;
    if (line.startsWith('#')) blocks.push(element('h3', line.replace(/^#+ /, '')));
    else blocks.push(addInline(element('p'), line));
  }
  byId('card').replaceChildren(...blocks);
}

// --- Events ---

const DISPLAY = ['heat', 'opacity', 'centre', 'width', 'zoom', 'invert'];

for (const id of DISPLAY) byId(id).addEventListener('input', draw);

byId('reset').addEventListener('click', () => {
  for (const id of DISPLAY) {
    byId(id).value = byId(id).defaultValue;
    byId(id).checked = false;
  }
  draw();
});

byId('file').addEventListener('change', () => {
  const [file] = byId('file').files;
  if (file) send(file);
  byId('file').value = '';
});

for (const event of ['dragover', 'dragleave', 'drop']) {
  document.addEventListener(event, e => {
    e.preventDefault();
    byId('drop').classList.toggle('over', event === 'dragover');
  });
}

document.addEventListener('drop', e => {
  const [file] = e.dataTransfer.files;
  if (file) send(file);
});

byId('csv').addEventListener('click', saveCsv);

byId('ask-token').addEventListener('submit', e => {
  e.preventDefault();
  token = byId('token').value.trim();
  byId('ask-token').hidden = true;
  byId('error').hidden = true;
  loadModel();
});

// The address that the service prints holds the token; it is removed from the address bar at once
if (location.hash.startsWith('#token=')) {
  token = location.hash.slice('#token='.length);
  window.history.replaceState(null, '', '/');
}
loadModel();
