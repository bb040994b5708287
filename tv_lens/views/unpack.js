// The bytes of a text in the digits of Python's base 85, with "," for "<".
function bytes_of(text) {
  const digits = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz!#$%&()*+-;,=>?@^_`{|}~";
  const values = new Uint8Array(128), bytes = new Uint8Array(4 * Math.ceil(text.length / 5)), view = new DataView(bytes.buffer);
  for (let i = 0; i < 85; i++) values[digits.charCodeAt(i)] = i;
  for (let i = 0, at = 0; i < text.length; i += 5, at += 4) {
    let word = 0;
    for (let j = i; j < i + 5; j++) word = 85 * word + (j < text.length ? values[text.charCodeAt(j)] : 84);
    view.setUint32(at, word);
  }
  return bytes;
}
// What `pack` in pages.py has packed: the number of bytes, and the bytes as LZMA with 3 bits of literal context and 2 of
// position. The names are those of the format's specification (Pavlov, LZMA SDK).
function unpacked(text) {
  const bytes = bytes_of(text), view = new DataView(bytes.buffer), out = new Uint8Array(view.getUint32(0));
  let at = 9, code = view.getUint32(5), range = 0xffffffff;
  const chances = n => new Uint16Array(n).fill(1024);
  function normalize() {
    if (range < 0x1000000) {
      range = range * 256;
      code = (code << 8 | bytes[at++]) >>> 0;
    }
  }
  function bit(chance, i) {
    const bound = (range >>> 11) * chance[i], is_one = code >= bound;
    if (is_one) {
      code -= bound;
      range -= bound;
      chance[i] -= chance[i] >>> 5;
    } else {
      range = bound;
      chance[i] += 2048 - chance[i] >>> 5;
    }
    normalize();
    return is_one ? 1 : 0;
  }
  function direct(n) {
    let value = 0;
    for (; n > 0; n--) {
      range >>>= 1;
      const is_one = code >= range;
      if (is_one) code -= range;
      value = 2 * value + (is_one ? 1 : 0);
      normalize();
    }
    return value;
  }
  function tree(chance, from, n) {
    let node = 1;
    for (let i = 0; i < n; i++) node = 2 * node + bit(chance, from + node);
    return node - (1 << n);
  }
  function reverse_tree(chance, from, n) {
    let node = 1, value = 0;
    for (let i = 0; i < n; i++) {
      const one = bit(chance, from + node);
      node = 2 * node + one;
      value |= one << i;
    }
    return value;
  }
  const length_chances = () => ({choice: chances(2), low: chances(32), middle: chances(32), high: chances(256)});
  function length_of(chance, position) {
    if (!bit(chance.choice, 0)) return 2 + tree(chance.low, 8 * position, 3);
    if (!bit(chance.choice, 1)) return 10 + tree(chance.middle, 8 * position, 3);
    return 18 + tree(chance.high, 0, 8);
  }
  const literals = chances(8 * 0x300), is_match = chances(12 * 4), is_rep = chances(12), is_rep0_long = chances(12 * 4);
  const is_rep_g0 = chances(12), is_rep_g1 = chances(12), is_rep_g2 = chances(12);
  const slots = chances(4 * 64), specials = chances(115), aligned = chances(16);
  const match_length = length_chances(), rep_length = length_chances();
  let state = 0, rep0 = 0, rep1 = 0, rep2 = 0, rep3 = 0;
  function distance_of(length) {
    const slot = tree(slots, 64 * Math.min(length - 2, 3), 6);
    if (slot < 4) return slot;
    const n = (slot >>> 1) - 1, base = (2 | slot & 1) << n;
    if (slot < 14) return base + reverse_tree(specials, base - slot, n);
    const high = direct(n - 4);
    return base + 16 * high + reverse_tree(aligned, 0, 4);
  }
  for (let n = 0; n < out.length;) {
    const position = n & 3;
    if (!bit(is_match, 4 * state + position)) {
      const from = 0x300 * (n ? out[n - 1] >>> 5 : 0);
      let symbol = 1;
      if (state >= 7) {
        for (let match = out[n - rep0 - 1], same = true; same && symbol < 0x100; match <<= 1) {
          const expected = match >>> 7 & 1, actual = bit(literals, from + (1 + expected << 8) + symbol);
          symbol = 2 * symbol + actual;
          same = actual === expected;
        }
      }
      while (symbol < 0x100) symbol = 2 * symbol + bit(literals, from + symbol);
      out[n++] = symbol;
      state = state < 4 ? 0 : state < 10 ? state - 3 : state - 6;
      continue;
    }
    let length = 1;
    if (!bit(is_rep, state)) {
      length = length_of(match_length, position);
      [rep3, rep2, rep1, rep0] = [rep2, rep1, rep0, distance_of(length)];
      state = state < 7 ? 7 : 10;
    } else {
      const is_last = !bit(is_rep_g0, state);
      if (is_last && !bit(is_rep0_long, 4 * state + position)) {
        state = state < 7 ? 9 : 11;
      } else {
        if (!is_last) {
          if (!bit(is_rep_g1, state)) [rep1, rep0] = [rep0, rep1];
          else if (!bit(is_rep_g2, state)) [rep2, rep1, rep0] = [rep1, rep0, rep2];
          else [rep3, rep2, rep1, rep0] = [rep2, rep1, rep0, rep3];
        }
        length = length_of(rep_length, position);
        state = state < 7 ? 8 : 11;
      }
    }
    for (const end = Math.min(n + length, out.length); n < end; n++) out[n] = out[n - rep0 - 1];
  }
  return new TextDecoder().decode(out);
}
