// Quantises new keys and values into their slots: one launch for K and V of a layer. Comes after kvturbo/cuda/common.cuh.
//
// A warp takes a side of one KV head and `span` consecutive tokens. Of 8 tokens (a prefill) it first takes the octet that begins among
// them, if the 8 tokens from there on fill one: 8 vectors at once, 4 lanes each, and whole words are written. The tokens that belong to no
// whole octet, and all tokens if span is 1 (few tokens: latency counts), follow one by one, 32 lanes each: the bits that the token owns are
// put into their words by atomicXor((old ^ new) & mask), which neither reads nor changes what others own, in any order.
//
// A token with a place in a ring of raw keys and values (kvturbo.ops.recent) goes there as well, from the registers that its vector has been
// loaded into. Its place is read together with the vector; without rings that is a test of a pointer and a branch per vector.
//
// The search. Neighbouring thresholds are further apart (factor 1.283 at least) than the smallest and the largest candidate scale (1.273).
// So of an element's thresholds at most one lies between its codes for any two candidates. A table finds the magnitude at the largest scale;
// one comparison per smaller scale tells whether it is the next one. The sums of <y,c> and <c,c> only need differences.
// Codes and sums follow from the same comparisons; they are the reference's unless |y| is within a few roundings of a threshold.
//
// Budget at head_dim 128, 4 bits, per element: about 10 instructions for the rotation, 21 for the search, 4 for the code, 5 for the
// rest; 131,072 vectors (8,192 tokens, 8 heads, K and V) in 25 us at full issue rate, 10 us of memory traffic.

constexpr int WARPS = 4;
constexpr int V_SEARCH = V_BITS != K_BITS;               // the values' table among the keys' and the values'
constexpr int KEY_STRIDE = D / 4 % 8 ? D : D + 16;       // bytes from row to row of key codes: no bank twice
constexpr int PALEY_BYTES = ORDER > 1 ? 8 * D * 4 : 0;
constexpr int WARP_BYTES = PALEY_BYTES > 8 * (D + 16) ? PALEY_BYTES : 8 * (D + 16);

struct Params {
  const void *k, *v;              // [tokens, HKV, D]
  u8* pages;
  const i64* slots;               // [tokens]
  const i64* outlier_channels;    // [HKV, OUTLIERS] or null
  void* recent;                   // rings of raw keys and values of IN_TYPE: [rings, HKV, 2, ring size, D]
  const i64* recent_slots;        // [tokens], ring * ring size + place in it, -1: none; null: no token goes into a ring
  i64 k_token, k_head, v_token, v_head;  // strides in elements
  i64 block_stride;               // bytes from block to block
  int tokens, kv_heads, span;
  int ring_bits;                  // log2 of the ring size
  u32 signs[8];                   // bit c set: sigma_c = -1
};

struct Search {  // of one codebook, z = 2 |y| / (s / T)
  float4 rows[8];  // per magnitude: 1 / (2 * next threshold), magnitude, step to the next magnitude, step to its square
  u8 bins[208];    // per ceil(z): 16 times the magnitude's index
};

__device__ constexpr bool searched(int bits) { return bits == 3 || bits == 4; }
template <int BITS> constexpr int LEVELS = 1 << (BITS - 1);
template <int BITS> DEV float twice_threshold(int i) { return MAGNITUDES[BITS][i] + MAGNITUDES[BITS][i + 1]; }
template <int BITS> __device__ constexpr bool one_crossing() {
  for (int i = 0; i + 2 < LEVELS<BITS>; i++)
    if ((MAGNITUDES[BITS][i + 1] + MAGNITUDES[BITS][i + 2]) * STEPS[0] <= (MAGNITUDES[BITS][i] + MAGNITUDES[BITS][i + 1]) * STEPS[4] * 1.0001f) return false;
  return true;
}
static_assert(one_crossing<3>() && one_crossing<4>(), "an element's code changes at most once over the candidates");

template <int BITS> DEV void fill(Search& s, int thread) {
  for (int n = thread; n < 208; n += WARPS * 32) {
    int index = 0;
    UNROLL for (int i = 0; i + 1 < LEVELS<BITS>; i++) index += n > twice_threshold<BITS>(i);
    s.bins[n] = 16 * index;
  }
  if (thread < 32) UNROLL for (int i = 0; i < LEVELS<BITS>; i++) if (thread == i) {
    const float m = MAGNITUDES[BITS][i], next = i + 1 < LEVELS<BITS> ? MAGNITUDES[BITS][i + 1] : INF;
    s.rows[i] = make_float4(1 / (m + next), m, next - m, next * next - m * m);
  }
}

// ---- a vector to codes and a scale ---------------------------------------------------------------------------------------------------

template <int L> DEV float group_sum(float x) {
  UNROLL for (int h = 1; h < L; h *= 2) x += __shfl_xor_sync(~0u, x, h);
  return x;
}
template <int L> DEV float group_max(float x) {
  UNROLL for (int h = 1; h < L; h *= 2) x = max_nan(x, __shfl_xor_sync(~0u, x, h));
  return x;
}
DEV bool is_finite(float x) { return (__float_as_uint(x) & 0x7f800000u) != 0x7f800000u; }

// At most 65504, 0 below 2^-24; a NaN stays one.
DEV u16 to_half_scale(float s) {
  if (s < 5.9604644775390625e-8f) s = 0;
  return float_to_half(s > 65504.f ? 65504.f : s);
}

// 2 bits: no search. Magnitudes as bytes. Returns <y,c> with c in units of 1 / T.
template <int L> DEV float plain_codes(const float (&y)[PER_LANE<L, 4>], float rms, u32 (&codes)[PER_LANE<L, 4> / 4], int l) {
  float dot = 0;
  const float threshold = twice_threshold<2>(0) / 2 * (rms * (float)(1 / CODEBOOK_T[2]));
  UNROLL for (int m = 0; m < PER_LANE<L, 4> / 4; m++) {
    codes[m] = 0;
    if (has_chunk<L, 4>(m, l)) UNROLL for (int i = 0; i < 4; i++) {
      const float x = fabsf(y[4 * m + i]);
      const bool large = x > threshold;
      dot = fmaf(large ? MAGNITUDES[2][1] : MAGNITUDES[2][0], x, dot);
      if (large) codes[m] |= 1u << 8 * i;
    }
  }
  return group_sum<L>(dot);
}

// The candidate with the largest <y,c>^2 / <c,c>, the first of equals. Returns its <y,c>.
template <int L, int BITS> DEV float searched_codes(const float (&y)[PER_LANE<L, 4>], float rms, u32 (&codes)[PER_LANE<L, 4> / 4], const Search& s, int l) {
  constexpr int N = PER_LANE<L, 4>;
  const float largest = rms * STEPS[4] * (float)(1 / CODEBOOK_T[BITS]), inverse = largest > 0 ? __fdiv_rn(2.f, largest) : 0.f;
  float ratio[N];  // |y| over the next threshold, both at the largest scale: the magnitude is the next one at scales below that
  float dot[5] = {0, 0, 0, 0, 0}, cc[5] = {0, 0, 0, 0, 0};  // of the largest scale in [4], what the others have more in [0 .. 3]
  UNROLL for (int m = 0; m < N / 4; m++) {
    codes[m] = 0;
    if (has_chunk<L, 4>(m, l)) UNROLL for (int i = 0; i < 4; i++) {
      const float z = fabsf(y[4 * m + i]) * inverse;
      const u32 row16 = s.bins[__float_as_uint(__fadd_ru(fminf(z, 203.f), 8388608.f)) & 255];
      const float4 row = *(const float4*)((const u8*)s.rows + row16);
      const float r = ratio[4 * m + i] = z * row.x, more = z * row.z;
      dot[4] = fmaf(row.y, z, dot[4]);
      cc[4] = fmaf(row.y, row.y, cc[4]);
      UNROLL for (int j = 0; j < 4; j++) if (r > STEPS[j] / STEPS[4]) { dot[j] += more; cc[j] += row.w; }
      codes[m] += row16 << 8 * i;
    }
  }
  UNROLL for (int j = 0; j < 5; j++) { dot[j] = group_sum<L>(dot[j]); cc[j] = group_sum<L>(cc[j]); }
  float best = 0, objective = -1, limit = INF;
  UNROLL for (int j = 0; j < 5; j++) {
    const float d = j < 4 ? dot[4] + dot[j] : dot[4], c = j < 4 ? cc[4] + cc[j] : cc[4], o = __fdividef(__fmul_rn(d, d), c);
    if (o > objective) { objective = o; best = d; limit = j < 4 ? STEPS[j] / STEPS[4] : INF; }
  }
  UNROLL for (int m = 0; m < N / 4; m++) {
    codes[m] = codes[m] >> 4 & 0x0f0f0f0fu;
    if (has_chunk<L, 4>(m, l)) UNROLL for (int i = 0; i < 4; i++) if (ratio[4 * m + i] > limit) codes[m] += 1u << 8 * i;
  }
  return inverse > 0 ? __fdiv_rn(best, inverse) : 0.f;
}

// Lloyd-Max codes as bytes, and the fp16 scale.
template <int L, int BITS> DEV u16 encode(const float (&y)[PER_LANE<L, 4>], u32 (&codes)[PER_LANE<L, 4> / 4], const Search& s, int l) {
  constexpr int N = PER_LANE<L, 4>;
  constexpr float T = (float)CODEBOOK_T[BITS];
  float energy = 0;
  UNROLL for (int m = 0; m < N / 4; m++)
    if (has_chunk<L, 4>(m, l)) UNROLL for (int i = 0; i < 4; i++) energy = fmaf(y[4 * m + i], y[4 * m + i], energy);
  energy = group_sum<L>(energy);
  const float rms = __fsqrt_rn(__fdiv_rn(energy, (float)D));
  float dot;
  if constexpr (BITS == 2) dot = plain_codes<L>(y, rms, codes, l);
  else dot = searched_codes<L, BITS>(y, rms, codes, s, l);
  const bool finite = is_finite(energy);
  constexpr u32 SIGN = LEVELS<BITS>;
  UNROLL for (int m = 0; m < N / 4; m++) {
    if (!finite) codes[m] = 0;
    UNROLL for (int i = 0; i < 4; i++) if (y[4 * m + i] < 0) codes[m] |= SIGN << 8 * i;
  }
  const float scale = energy > 0 ? __fdiv_rn(energy, dot) * T : 0.f;
  return to_half_scale(finite ? scale : __int_as_float(0x7fffffff));
}

// y / step, rounded to even. The product with the inverse is within 2e-5 of the quotient; ties need the quotient itself.
DEV int steps_of(float y, float step, float inverse) {
  float q = y * inverse;
  if (fabsf(q - rintf(q)) > 0.499f) q = __fdiv_rn(y, step);
  return max(-127, min(127, __float2int_rn(q)));
}

// Symmetric int8 codes, and the fp16 step.
template <int L, int N> DEV u16 encode_int8(const float (&y)[N], u32 (&codes)[N / 4]) {
  float most = 0;
  UNROLL for (int j = 0; j < N; j++) most = max_nan(most, fabsf(y[j]));
  most = group_max<L>(most);
  const u16 bits = to_half_scale(is_finite(most) ? __fdiv_rn(most, 127.f) : __int_as_float(0x7fffffff));
  const float step = half2_to_float2(bits).x, inverse = __fdividef(1.f, step);
  UNROLL for (int m = 0; m < N / 4; m++) {
    codes[m] = 0;
    UNROLL for (int i = 0; i < 4; i++) if (step > 0) codes[m] |= (u32)(steps_of(y[4 * m + i], step, inverse) & 255) << 8 * i;
  }
  return bits;
}

// ---- where a warp's vectors come from and go to ----------------------------------------------------------------------------------------

struct Place {   // of a vector
  u8* page;      // of its head
  int slot;
  DEV Place(const Params& p, i64 at, int head) : page(p.pages + at / PAGE * p.block_stride + (i64)head * PAGE_BYTES), slot(at % PAGE) {}
  DEV void put_half(int plane, u16 x) const { ((u16*)(page + plane))[slot] = x; }
};

// Outlier channels go to int8 from memory and become zero in y. mask: 8 words of shared memory.
template <int L> DEV void take_outliers(const Params& p, const Place& place, int head, i64 at, float (&y)[PER_LANE<L, 4>], u32* mask, int lane) {
#if OUTLIERS
  constexpr int N = (OUTLIERS / 4 + L - 1) / L * 4;
  const int l = lane % L;
  const i64* channels = p.outlier_channels + head * OUTLIERS;
  const int channel = lane < OUTLIERS ? (int)channels[lane] : -1;
  UNROLL for (int w = 0; w < (D + 31) / 32; w++) {
    const u32 bits = __reduce_or_sync(~0u, channel >= 0 && channel / 32 == w ? 1u << channel % 32 : 0u);
    if (lane == 0) mask[w] = bits;
  }
  __syncwarp();
  UNROLL for (int m = 0; m < PER_LANE<L, 4> / 4; m++) if (has_chunk<L, 4>(m, l)) {
    const u32 out = chunk_bits<L, 4>(mask, m, l);
    UNROLL for (int i = 0; i < 4; i++) if (out >> i & 1) y[4 * m + i] = 0;
  }
  float x[N];
  u32 codes[N / 4];
  UNROLL for (int j = 0; j < N; j++) {
    const int i = 4 * (l + L * (j / 4)) + j % 4;
    x[j] = i < OUTLIERS ? load_element<IN_TYPE>(p.k, at + channels[i]) : 0.f;
  }
  const u16 step = encode_int8<L, N>(x, codes);
  UNROLL for (int m = 0; m < N / 4; m++) {
    const int q = l + L * m;
    if (4 * q < OUTLIERS) *byte_word_at<OUTLIERS>(place.page + K_OUTLIERS, place.slot / 8, place.slot % 8, q) = codes[m];
  }
  if (l == 0) place.put_half(K_OUTLIER_SCALE, step);
  __syncwarp();
#endif
}

template <int TYPE> struct Four { typedef uint2 Raw; };  // elements as they lie in memory
template <> struct Four<2> { typedef float4 Raw; };
typedef Four<IN_TYPE>::Raw Raw;

// Copies a vector to its place in a ring.
template <bool V, int L> DEV void put_recent(const Params& p, int head, int slot, const Raw (&x)[PER_LANE<L, 4> / 4], int l) {
  const int row = ((slot >> p.ring_bits) * p.kv_heads + head) * 2 + V, place = slot & ((1 << p.ring_bits) - 1);
  Raw* to = (Raw*)p.recent + (((i64)row << p.ring_bits) + place) * (D / 4) + l;
  UNROLL for (int m = 0; m < PER_LANE<L, 4> / 4; m++) if (has_chunk<L, 4>(m, l)) to[L * m] = x[m];
}

// Loads, rotates and quantises a vector; writes its scale, and what else has no neighbours.
template <bool V, int L> DEV void make_codes(const Params& p, const Place& place, int head, i64 token, u32 (&codes)[PER_LANE<L, 4> / 4],
                                             const Search* search, u8* memory, int lane) {
  constexpr int N = PER_LANE<L, 4>, BITS = V ? V_BITS : K_BITS;
  const int l = lane % L;
  const i64 at = token * (V ? p.v_token : p.k_token) + head * (V ? p.v_head : p.k_head);
  const int recent = p.recent_slots ? (int)p.recent_slots[token] : -1;  // read with the vector, for the latency
  Raw raw[N / 4];
  float y[N];
  UNROLL for (int m = 0; m < N / 4; m++) if (has_chunk<L, 4>(m, l)) raw[m] = ((const Raw*)(V ? p.v : p.k))[(at >> 2) + l + L * m];
  if (recent >= 0) put_recent<V, L>(p, head, recent, raw, l);
  UNROLL for (int m = 0; m < N / 4; m++) {
    if (has_chunk<L, 4>(m, l)) load4<IN_TYPE>(raw, 4 * m, y + 4 * m);
    else UNROLL for (int i = 0; i < 4; i++) y[4 * m + i] = 0;
  }
  if (!V) take_outliers<L>(p, place, head, at, y, (u32*)memory, lane);
  if (ROTATE) {
    flip_signs<L, 4>(y, p.signs, l);
    hadamard<L, 4, false>(y, (float*)memory + lane / L * D, l);
  }
  u16 scale;
  if constexpr (BITS == 8) scale = encode_int8<L, N>(y, codes);
  else scale = encode<L, BITS>(y, codes, search[V ? V_SEARCH : 0], l);
  if (l == 0) place.put_half(V ? V_SCALE : K_SCALE, scale);
  if (BITS == 8)
    UNROLL for (int m = 0; m < N / 4; m++)
      if (has_chunk<L, 4>(m, l)) *byte_word_at<D>(place.page + K_CODES, place.slot / 8, place.slot % 8, l + L * m) = codes[m];
}

DEV void put_bits(u32* word, u32 old, u32 bits, u32 mask) { atomicXor(word, (old ^ bits) & mask); }

// ---- a whole octet ---------------------------------------------------------------------------------------------------------------------

template <bool V> DEV void octet_unit(const u8* bytes, int lane8, int unit, u32& lo, u32& hi) {
  if (V) {
    const uint2 rows = *(const uint2*)(bytes + (8 * unit + lane8) * 8);
    lo = rows.x;
    hi = rows.y;
  } else {
    int row_lo, q_lo, row_hi, q_hi;
    key_chunks(lane8, unit, row_lo, q_lo, row_hi, q_hi);
    lo = *(const u32*)(bytes + row_lo * KEY_STRIDE + 4 * q_lo);
    hi = *(const u32*)(bytes + row_hi * KEY_STRIDE + 4 * q_hi);
  }
}

template <bool V, int WIDTH> DEV void write_octet(u8* plane, const u8* bytes, int octet, int lane) {
  constexpr int PER_WORD = 4 / WIDTH, FULL = UNITS / PER_WORD, REST = UNITS % PER_WORD;
  UNROLL for (int i0 = 0; i0 < 8 * FULL; i0 += 32) if (i0 + lane < 8 * FULL) {
    int lane8, m;
    lane_and_word<FULL>(i0 + lane, lane8, m);
    u32 word = 0;
    UNROLL for (int n = 0; n < PER_WORD; n++) {
      u32 lo, hi;
      octet_unit<V>(bytes, lane8, PER_WORD * m + n, lo, hi);
      word |= pack<WIDTH>(lo, hi) << n * WIDTH;
    }
    *word_at<V, FULL>(plane, octet, lane8, m) = word;
  }
  if (REST && lane < 8) {  // the half of a word that two octets share
    u32 bits = 0, mask = 0;
    UNROLL for (int n = 0; n < REST; n++) {
      u32 lo, hi;
      octet_unit<V>(bytes, lane, PER_WORD * FULL + n, lo, hi);
      bits |= pack<WIDTH>(lo, hi) << n;
      mask |= 0x11111111u << n;
    }
    u32* word = word_at<V, FULL>(plane, octet, lane, FULL);
    put_bits(word, __ldcg(word), bits << octet % 2 * 2, mask << octet % 2 * 2);
  }
}

// Tokens token .. token + 7 fill the octet that begins at `slot`: row lane / 4 is 4 lanes'.
template <bool V> DEV void store_octet(const Params& p, int head, i64 token, i64 slot, const Search* search, u8* memory, int lane) {
  constexpr int BITS = V ? V_BITS : K_BITS;
  const int row = lane / 4, l = lane % 4;
  const Place place(p, slot + row, head);
  u32 codes[D / 16];
  make_codes<V, 4>(p, place, head, token + row, codes, search, memory, lane);
  if constexpr (BITS < 8) {
    UNROLL for (int m = 0; m < D / 16; m++) {
      const int q = l + 4 * m;
      if (V) UNROLL for (int i = 0; i < 4; i++) memory[(4 * q + i) * 8 + row] = codes[m] >> 8 * i;
      else *(u32*)(memory + row * KEY_STRIDE + 4 * q) = codes[m];
    }
    __syncwarp();
    write_octet<V, BITS == 4 ? 4 : 2>(place.page + (V ? V_CODES : K_CODES), memory, place.slot / 8, lane);
    if (BITS == 3) write_octet<V, 1>(place.page + (V ? V_SIGNS : K_SIGNS), memory, place.slot / 8, lane);
    __syncwarp();
  }
}

// ---- a single token --------------------------------------------------------------------------------------------------------------------

// The bits of one chunk of one slot in a plane: a key's lie in one word, a value's in four.
template <bool V, int WIDTH> struct Owned {
  static constexpr int WORDS = V ? 4 : 1;
  u32 *words[WORDS], old[WORDS];
  int shift, row, half;
  DEV void find(u8* plane, int slot, int q) {
    row = slot % 8;
    half = row / 4;
    const int unit = V ? q / 2 : key_unit<D>(row, q, half);
    UNROLL for (int i = 0; i < WORDS; i++) {
      words[i] = unit_at<V, WIDTH>(plane, slot / 8, V ? q % 2 * 4 + i : row % 2 * 4 + q % 4, unit, shift);
      old[i] = __ldcg(words[i]);
    }
  }
  DEV u32 spread(u32 bytes) const { return (half ? pack<WIDTH>(0, bytes) : pack<WIDTH>(bytes, 0)) << shift; }
  DEV void put(u32 codes) const {
    UNROLL for (int i = 0; i < WORDS; i++) {
      if (V) put_bits(words[i], old[i], spread((codes >> 8 * i & 15) << row % 4 * 8), spread(15u << row % 4 * 8));
      else put_bits(words[i], old[i], spread(codes), spread(0x0f0f0f0fu));
    }
  }
};

template <bool V> DEV void store_token(const Params& p, int head, i64 token, i64 slot, const Search* search, u8* memory, int lane) {
  constexpr int BITS = V ? V_BITS : K_BITS, M = PER_LANE<32, 4> / 4;
  const Place place(p, slot, head);
  u32 codes[M];
  if constexpr (BITS == 8) { make_codes<V, 32>(p, place, head, token, codes, search, memory, lane); return; }
  else {
    Owned<V, BITS == 4 ? 4 : 2> wide[M];
    Owned<V, 1> sign[M];
    UNROLL for (int m = 0; m < M; m++) if (has_chunk<32, 4>(m, lane)) {  // read early, for the latency
      wide[m].find(place.page + (V ? V_CODES : K_CODES), place.slot, lane + 32 * m);
      if (BITS == 3) sign[m].find(place.page + (V ? V_SIGNS : K_SIGNS), place.slot, lane + 32 * m);
    }
    make_codes<V, 32>(p, place, head, token, codes, search, memory, lane);
    UNROLL for (int m = 0; m < M; m++) if (has_chunk<32, 4>(m, lane)) {
      wide[m].put(codes[m]);
      if (BITS == 3) sign[m].put(codes[m]);
    }
  }
}

// ---- a warp's tokens -------------------------------------------------------------------------------------------------------------------

// Which of the 8 tokens in lanes 8 .. 15 are in no whole octet (bits 8 .. 15), and which begins one (its bit, or 0). Lanes 0 .. 23 hold
// the slots of consecutive tokens, -1 where there is none.
DEV u32 split_tokens(i64 slot, int lane, u32& begins) {
  const i64 next = __shfl_down_sync(~0u, slot, 1);
  const u32 joined = __ballot_sync(~0u, lane < 23 && slot >= 0 && next == slot + 1);  // bit: the token is followed by its successor
  const u32 leads = __ballot_sync(~0u, lane < 17 && slot >= 0 && slot % 8 == 0 && (joined >> lane & 127) == 127);
  const int leader = lane - (int)(slot & 7);
  const bool whole = slot >= 0 && leader >= 0 && (leads >> leader & 1) && lane < leader + 8;
  begins = leads & 0xff00u;
  return __ballot_sync(~0u, slot >= 0 && !whole) & 0xff00u;
}

template <bool V> DEV void store_tokens(const Params& p, int head, i64 first, i64 slot, const Search* search, u8* memory, int lane) {
  u32 begins = 0, single = slot >= 0 ? 1u << 8 : 0;
  if (p.span == 8) single = split_tokens(slot, lane, begins);
  else single = __shfl_sync(~0u, single, 8);
  if (begins) {
    const int i = __ffs(begins) - 1;
    store_octet<V>(p, head, first + i - 8, __shfl_sync(~0u, slot, i), search, memory, lane);
  }
  for (; single; single &= single - 1) {
    const int i = __ffs(single) - 1;
    store_token<V>(p, head, first + i - 8, __shfl_sync(~0u, slot, i), search, memory, lane);
  }
}

extern "C" __global__ void __launch_bounds__(WARPS * 32) store(const __grid_constant__ Params p) {
  __shared__ __align__(16) u8 s_memory[WARPS][WARP_BYTES];
  __shared__ __align__(16) Search s_search[1 + V_SEARCH];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int task = blockIdx.x * WARPS + warp;  // [span of tokens][side][head]
  const i64 first = (i64)(task / (2 * p.kv_heads)) * p.span, token = first + lane - 8;
  const bool loads = p.span == 8 ? lane < 24 : lane == 8;
  const i64 slot = loads && token >= 0 && token < p.tokens ? p.slots[token] : -1;
  if (searched(K_BITS)) fill<K_BITS == 3 ? 3 : 4>(s_search[0], threadIdx.x);
  if (searched(V_BITS) && V_BITS != K_BITS) fill<V_BITS == 3 ? 3 : 4>(s_search[V_SEARCH], threadIdx.x);
  __syncthreads();
  if (first >= p.tokens) return;
  const int head = task % p.kv_heads;
  if (task / p.kv_heads % 2) store_tokens<true>(p, head, first, slot, s_search, s_memory[warp], lane);
  else store_tokens<false>(p, head, first, slot, s_search, s_memory[warp], lane);
}
