// Tokens of the last steps, a bar each: prompts below, sampled tokens on top.

const WIDTH = 4; // pixels of a bar and the gap behind it
const GAP = 1;

/** Heights in pixels, [prompt tokens, sampled tokens] a step, of the last steps that fit; the tallest fills `height`. */
export function bars(steps, most, height) {
  const last = steps.slice(-most);
  const tallest = Math.max(1, ...last.map((step) => step.num_tokens));
  return last.map((step) => {
    const sampled = Math.min(step.num_sampled, step.num_tokens);
    return [step.num_tokens - sampled, sampled].map((tokens) => (tokens * height) / tallest);
  });
}

export function drawSteps(canvas, steps) {
  const context = canvas.getContext("2d");
  const style = getComputedStyle(canvas);
  context.clearRect(0, 0, canvas.width, canvas.height);
  bars(steps, Math.floor(canvas.width / WIDTH), canvas.height).forEach(([prompt, sampled], index) => {
    context.fillStyle = style.color;
    context.globalAlpha = 0.35;
    context.fillRect(index * WIDTH, canvas.height - prompt, WIDTH - GAP, prompt);
    context.fillStyle = style.accentColor;
    context.globalAlpha = 1;
    context.fillRect(index * WIDTH, canvas.height - prompt - sampled, WIDTH - GAP, sampled);
  });
}
