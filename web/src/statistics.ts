// Figures about the tokens of one picture.

export interface TokenStatistics {
  /** Tokens and their counts, most frequent first; equal counts by token. */
  counts: [token: number, n: number][];
  /** Entropy of the colors without their places, in bits per token. */
  entropyBits: number;
  /** Share of pixels that have the color of the pixel to their left. */
  equalToLeft: number;
}

export function statistics(tokens: readonly number[], side: number): TokenStatistics {
  const n = new Map<number, number>();
  let nEqual = 0;
  tokens.forEach((token, pixel) => {
    n.set(token, (n.get(token) ?? 0) + 1);
    if (pixel % side > 0 && tokens[pixel - 1] === token) {
      nEqual++;
    }
  });
  const counts = [...n].sort((a, b) => b[1] - a[1] || a[0] - b[0]);
  let entropyBits = 0;
  for (const [, many] of counts) {
    const share = many / tokens.length;
    entropyBits -= share * Math.log2(share);
  }
  return { counts, entropyBits, equalToLeft: nEqual / (side * (side - 1)) };
}
