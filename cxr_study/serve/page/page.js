'use strict';
// The page of the service: sends an image, shows the answer. Nothing is stored beyond this tab.

const byId = id => document.getElementById(id);
const {negative, positive, disease} = document.querySelector('main').dataset;  // Names of the classes; the second in prose
const healthy = unit => negative === 'NORMAL' ? `healthy ${unit}` : `${unit} of ${negative}`;
const session = [];  // One entry for each image that was sent
const waiting = [];  // Files that were chosen and not sent yet
let model = null;  // Answer of /model
let current = null;  // The image on display
let shown = null;  // Its file and its answer
let isSending = false;
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
  showSentence('population', model.population);
  showSentence('failure', failureOf(model));
  showCard(model.card);
}

function showSentence(id, text) {
  byId(id).textContent = text || '';
  byId(id).hidden = !text;
}

function testedValue(point, metric) {
  const row = model && model.tested.find(entry => entry.point === point && entry.metric === metric);
  return row && row.got ? row.got : null;
}

// What the threshold in use does with healthy patients of the test
function failureOf(model) {
  const specificity = testedValue(model.in_use, 'specificity');
  if (!specificity) return '';
  const [wrong, least, most] = [specificity.value, specificity.upper, specificity.lower].map(x => of100(1 - x));
  return `Where it fails: at the threshold in use, it places ${wrong} of 100 ${healthy('patients')} of the test ` +
    `above the threshold (${least} to ${most}).`;
}

function of100(share) {
  return Math.round(100 * share);
}

function query() {
  const percentage = byId('prevalence').valueAsNumber;
  return percentage > 0 && percentage < 100 ? '?prevalence=' + percentage / 100 : '';
}

function formOf(file) {
  const form = new FormData();
  form.append('file', file, 'image');
  return {method: 'POST', body: form};
}

async function send(file) {
  byId('error').hidden = true;
  const more = waiting.length ? ` (${waiting.length} more waiting)` : '';
  byId('status').textContent = `Analysing ${file.name}${more} …`;
  try {
    const answer = await request('/explain' + query(), formOf(file));
    remember(file.name, answer, '');
    shown = {file, answer, isAsked: false};
    await showAnswer(answer);
    byId('status').textContent = 'Done.';
  } catch (error) {
    remember(file.name, null, error.message);
    showError(error, file.name);
  }
}

async function sendAll(files) {
  waiting.push(...files);
  if (isSending) {
    byId('status').textContent += ` Queued: ${[...files].map(file => file.name).join(', ')}.`;
    return;
  }
  isSending = true;
  while (waiting.length) await send(waiting.shift());
  isSending = false;
}

// Another prevalence changes the number of the image on display
async function updatePrevalence() {
  if (!shown || isSending || !byId('prevalence').validity.valid) return;
  const {file} = shown;
  try {
    const answer = await request('/predict' + query(), formOf(file));
    if (!shown || shown.file !== file) return;
    Object.assign(shown.answer, answer);
    showNumber(shown.answer);
    byId('status').textContent = 'The answer follows the new share of ' + disease + '.';
  } catch (error) {
    byId('status').textContent = error.message;
  }
}

function showError(error, name) {
  byId('status').textContent = '';
  byId('error').textContent = name ? `${name}: ${error.message}` : error.message;
  byId('error').hidden = false;
  byId('result').hidden = true;
  shown = null;
}

// --- The answer ---

function inHundred(probability) {
  if (probability < 0.005) return 'fewer than 1 in 100';
  if (probability > 0.995) return 'more than 99 in 100';
  return `${of100(probability)} in 100`;
}

// Thresholds hold at the prevalence of the calibration data
function thresholdText(answer) {
  const {threshold} = answer.operating_point;
  const kind = threshold < 0.5 ? 'screening threshold' : 'threshold';
  return query() ? kind : `${kind} of ${threshold.toPrecision(2)}`;
}

function conclusionOf(answer) {
  if (isWithheld(answer)) return 'No answer: a person needs to read this image';
  const side = answer.decision === positive ? 'Above' : 'Below';
  return `${side} the ${thresholdText(answer)}: ${inHundred(answer.probability)}`;
}

function isWithheld(answer) {
  return (answer.abstains || answer.unfamiliar === true) && !shown.isAsked;
}

function surenessOf(answer) {
  const isAbove = answer.decision === positive;
  if (isAbove && answer.probability < 0.5) {
    return `Most images with this number show no ${disease}. The threshold is low, so that few images of ${disease} are missed.`;
  }
  const sensitivity = testedValue(answer.operating_point.name, 'sensitivity');
  if (!isAbove && sensitivity) {
    return `On the test, ${of100(1 - sensitivity.value)} of 100 images with ${disease} were below the threshold ` +
      `(${of100(1 - sensitivity.upper)} to ${of100(1 - sensitivity.lower)}).`;
  }
  const specificity = testedValue(answer.operating_point.name, 'specificity');
  if (!specificity) return '';
  return `On the test, ${of100(1 - specificity.value)} of 100 ${healthy('images')} were above the threshold too.`;
}

async function showAnswer(answer) {
  byId('name').textContent = shown.file.name;
  showNumber(answer);
  await showImage(answer);
  byId('result').hidden = false;
  byId('conclusion').focus();
}

function showNumber(answer) {
  const withheld = isWithheld(answer);
  byId('conclusion').textContent = conclusionOf(answer);
  byId('frequency').textContent = withheld ? '' : answer.frequency;
  byId('sureness').textContent = withheld ? '' : surenessOf(answer);
  byId('number').hidden = withheld;
  byId('ask').hidden = !withheld;
  for (const id of ['heat-row', 'opacity-row']) byId(id).hidden = withheld;
  if (withheld) byId('heat').checked = false;
  showWarning(answer);
  showScale(answer);
  showPoint(answer);
  showDetails(answer);
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
  const rule = `Operating point ${point.name}: ${point.rule}; threshold ${point.threshold.toPrecision(2)}.`;
  const isOneClass = [negative, positive].includes(answer.verdict);
  if (!isOneClass || answer.verdict === answer.decision) return rule;
  return `${rule} Without a threshold, the image is compatible with ${answer.verdict} alone.`;
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
  'either class': `${negative} and ${positive}`,
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
    'Side of the threshold that counts as': answer.decision,
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
}

// --- The image ---

async function decodeImage(base64, type) {
  const image = new Image();
  image.src = `data:image/${type};base64,${base64}`;
  await image.decode();
  return image;
}

function canvasOf(width, height) {
  const canvas = document.createElement('canvas');
  canvas.width = width;
  canvas.height = height;
  return canvas;
}

function pixelsOf(image) {
  const context = canvasOf(image.width, image.height).getContext('2d');
  context.drawImage(image, 0, 0);
  return context.getImageData(0, 0, image.width, image.height);
}

async function showImage(answer) {
  const whole = await decodeImage(answer.picture_jpeg, 'jpeg');
  const seen = await decodeImage(answer.seen_png, 'png');
  const heat = await decodeImage(answer.heat_png, 'png');
  const {geometry} = answer.preprocessing;
  current = {whole: pixelsOf(whole), seen: pixelsOf(seen), heat, geometry, values: answer.heat};
  draw();
}

// Brightness after window and inversion, for each of the 256 grey levels
function levels() {
  const centre = Number(byId('centre').value);
  const width = Number(byId('width').value);
  const inverted = byId('invert').checked;
  return Uint8ClampedArray.from({length: 256}, (_, grey) => {
    const share = Math.min(1, Math.max(0, (grey - centre) / width + 0.5));
    return 255 * (inverted ? 1 - share : share);
  });
}

function windowed(source) {
  const level = levels();
  const pixels = new ImageData(source.width, source.height);
  for (let i = 0; i < source.data.length; i += 4) {
    const value = level[source.data[i]];
    pixels.data[i] = value;
    pixels.data[i + 1] = value;
    pixels.data[i + 2] = value;
    pixels.data[i + 3] = 255;
  }
  const canvas = canvasOf(source.width, source.height);
  canvas.getContext('2d').putImageData(pixels, 0, 0);
  return canvas;
}

const ENLARGED = 3;  // Pixels of the canvas for each pixel that the model sees

// The central part of width x height that has the proportions of the other two numbers
function centralPart(width, height, otherWidth, otherHeight) {
  const scale = Math.min(width / otherWidth, height / otherHeight);
  const [partWidth, partHeight] = [otherWidth * scale, otherHeight * scale];
  return [(width - partWidth) / 2, (height - partHeight) / 2, partWidth, partHeight];
}

// Draw the heat map, which lies over the square that the model sees, over the whole image
function drawHeat(context, canvas, geometry) {
  const {heat} = current;
  let from = [0, 0, heat.width, heat.height];
  let to = [0, 0, canvas.width, canvas.height];
  if (geometry === 'crop') to = centralPart(canvas.width, canvas.height, 1, 1);
  if (geometry === 'letterbox') from = centralPart(heat.width, heat.height, canvas.width, canvas.height);
  context.drawImage(heat, ...from, ...to);
}

function draw() {
  if (!current) return;
  const canvas = byId('canvas');
  const isSquare = byId('square').checked;
  const source = isSquare ? current.seen : current.whole;
  const scale = isSquare ? ENLARGED : 1;
  canvas.width = source.width * scale;
  canvas.height = source.height * scale;
  const context = canvas.getContext('2d');
  context.drawImage(windowed(source), 0, 0, canvas.width, canvas.height);
  const withHeat = byId('heat').checked;
  const size = `${current.seen.width} x ${current.seen.height} pixels`;
  let label = isSquare ? `What the model sees, ${size}` : 'The image';
  if (withHeat) {
    context.globalAlpha = byId('opacity').value / 100;
    drawHeat(context, canvas, isSquare ? 'squish' : current.geometry);
    context.globalAlpha = 1;
    label += ', with the heat map. ' + describeHeat(current.values);
  }
  byId('shown').textContent = isSquare ? `What the model sees: ${size}.` : `The image. The model sees ${size} of it.`;
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
  return `What raised the number most: ${vertical}, ${horizontal} of the image. This is not a localisation`;
}

// --- The table of this session ---

function remember(file, answer, error) {
  const entry = {time: new Date().toISOString().slice(0, 19) + 'Z', file, answer: 'error', probability: '', note: error, model: ''};
  if (answer) {
    entry.answer = sideOf(answer);
    if (!answer.abstains) entry.probability = answer.probability;
    entry.note = answer.reason || '';
    entry.model = answer.model.sha256;
  }
  session.push(entry);
  byId('rows').replaceChildren(...session.map(sessionRow));
  byId('history').hidden = false;
}

function sideOf(answer) {
  if (answer.abstains) return 'uncertain';
  return answer.decision === positive ? 'above threshold' : 'below threshold';
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
  const harmless = String(value).replace(/^[\s=+\-@]/, "'$&");  // A spreadsheet would run a formula
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

const DISPLAY = ['heat', 'opacity', 'centre', 'width', 'zoom', 'invert', 'square'];

for (const id of DISPLAY) byId(id).addEventListener('input', draw);

byId('reset').addEventListener('click', () => {
  for (const id of DISPLAY) {
    byId(id).value = byId(id).defaultValue;
    byId(id).checked = false;
  }
  draw();
});

byId('file').addEventListener('change', () => {
  sendAll([...byId('file').files]);
  byId('file').value = '';
});

let timer;
byId('prevalence').addEventListener('input', () => {
  clearTimeout(timer);
  timer = setTimeout(updatePrevalence, 150);  // Milliseconds: after the last key
});

byId('ask').addEventListener('click', () => {
  shown.isAsked = true;
  showNumber(shown.answer);
  byId('conclusion').focus();
});

for (const event of ['dragover', 'dragleave', 'drop']) {
  document.addEventListener(event, e => {
    e.preventDefault();
    byId('drop').classList.toggle('over', event === 'dragover');
  });
}

document.addEventListener('drop', e => {
  sendAll([...e.dataTransfer.files]);
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
