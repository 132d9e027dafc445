// The KV pool as a grid: one square per block, in the colour of the request that holds it.

const SIDE = 12; // pixels of a square and the gap behind it
const GAP = 2;
const MOST = 1500; // squares; of a larger pool each square stands for several blocks

const order = new Map(); // request -> how many came before it

/** A hue that stays with the request; requests that follow each other get hues that are far apart. */
export function hue(id) {
  const request = id.split("#")[0];
  if (!order.has(request)) order.set(request, order.size);
  return (order.get(request) * 137.508) % 360;
}

/** What each square shows: the first holder of its blocks, whether one is shared, whether one may be hit again. */
export function squares(view) {
  const each = Math.max(1, Math.ceil(view.num_blocks / MOST));
  const found = Array.from({ length: Math.ceil(view.num_blocks / each) }, () => ({
    holder: null,
    shared: false,
    cached: false,
  }));
  const square = (block) => found[Math.floor((block - 1) / each)];
  const held = new Set();
  for (const { sequence_id: id, block_ids: blocks } of view.sequences) {
    for (const block of blocks) {
      square(block).holder ??= id;
      if (held.has(block)) square(block).shared = true;
      held.add(block);
    }
  }
  for (const block of view.cached_block_ids) square(block).cached = true;
  return found;
}

export function draw(canvas, view) {
  const all = squares(view);
  const perRow = Math.floor(canvas.width / SIDE);
  const rows = Math.ceil(all.length / perRow);
  if (canvas.height !== rows * SIDE) canvas.height = rows * SIDE;
  const context = canvas.getContext("2d");
  const style = getComputedStyle(canvas);
  context.clearRect(0, 0, canvas.width, canvas.height);
  all.forEach(({ holder, shared, cached }, index) => {
    const [x, y] = [(index % perRow) * SIDE, Math.floor(index / perRow) * SIDE];
    context.globalAlpha = holder !== null ? 1 : cached ? 0.45 : 0.12;
    context.fillStyle = holder === null ? style.color : `hsl(${hue(holder)} 65% 52%)`;
    context.fillRect(x, y, SIDE - GAP, SIDE - GAP);
    if (shared) {
      context.globalAlpha = 1;
      context.lineWidth = 2;
      context.strokeStyle = style.color;
      context.strokeRect(x + 1, y + 1, SIDE - GAP - 2, SIDE - GAP - 2);
    }
  });
}
