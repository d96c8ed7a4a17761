// What the kernels share: types, conversions, words and units of the page (docs/page.md), code bytes, the rotation.
//
// Not a header: kvturbo.cuda.source puts this text before a kernel's, with the macros of `page_macros` and the tables of `tables`, so
// that NVRTC needs no include path.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

#define UNROLL _Pragma("unroll")
#define DEV __device__ __forceinline__
#define INF __int_as_float(0x7f800000)

constexpr int UNITS = D / 8;          // units of 8 codes per lane and octet
constexpr int KSTEPS = D / 32;        // whole steps of 32 channels
constexpr int KTAIL = D % 32 == 16;   // 16 more channels
constexpr int OCTETS = PAGE / 8;      // octets per page
constexpr int BAND = (PAGE < 32 ? PAGE : 32) / 8;
constexpr int ORDER = D / PALEY_S;    // of the Paley matrix, 1 for powers of two

// ---- conversions ---------------------------------------------------------------------------------------------------------------------

DEV u32 prmt(u32 a, u32 b, u32 s) { u32 d; asm("prmt.b32 %0,%1,%2,%3;" : "=r"(d) : "r"(a), "r"(b), "r"(s)); return d; }
DEV float2 half2_to_float2(u32 h) {
  float2 f;
  asm("{.reg .f16 a,b; mov.b32 {a,b},%2; cvt.f32.f16 %0,a; cvt.f32.f16 %1,b;}" : "=f"(f.x), "=f"(f.y) : "r"(h));
  return f;
}
DEV u16 float_to_half(float x) { u16 h; asm("cvt.rn.f16.f32 %0,%1;" : "=h"(h) : "f"(x)); return h; }
DEV u16 float_to_bf16(float x) { u16 h; asm("cvt.rn.bf16.f32 %0,%1;" : "=h"(h) : "f"(x)); return h; }
DEV float max_nan(float a, float b) { float d; asm("max.NaN.f32 %0,%1,%2;" : "=f"(d) : "f"(a), "f"(b)); return d; }

// TYPE 0: bf16, 1: fp16, 2: fp32.
template <int TYPE> DEV float load_element(const void* p, i64 i) {
  if (TYPE == 2) return ((const float*)p)[i];
  const u16 h = ((const u16*)p)[i];
  return TYPE == 0 ? __uint_as_float((u32)h << 16) : half2_to_float2(h).x;
}
template <int TYPE> DEV void store_element(void* p, i64 i, float x) {
  if (TYPE == 2) ((float*)p)[i] = x;
  else ((u16*)p)[i] = TYPE == 0 ? float_to_bf16(x) : float_to_half(x);
}
// Four consecutive elements, i a multiple of 4.
template <int TYPE> DEV void load4(const void* p, i64 i, float* x) {
  if (TYPE == 2) {
    const float4 f = *(const float4*)((const float*)p + i);
    x[0] = f.x; x[1] = f.y; x[2] = f.z; x[3] = f.w;
    return;
  }
  const uint2 w = *(const uint2*)((const u16*)p + i);
  if (TYPE == 0) {
    x[0] = __uint_as_float(w.x << 16); x[1] = __uint_as_float(w.x & 0xffff0000u);
    x[2] = __uint_as_float(w.y << 16); x[3] = __uint_as_float(w.y & 0xffff0000u);
  } else {
    const float2 a = half2_to_float2(w.x), b = half2_to_float2(w.y);
    x[0] = a.x; x[1] = a.y; x[2] = b.x; x[3] = b.y;
  }
}
template <int TYPE> DEV void store4(void* p, i64 i, const float* x) {
  if (TYPE == 2) { *(float4*)((float*)p + i) = make_float4(x[0], x[1], x[2], x[3]); return; }
  u32 h[4];
  UNROLL for (int j = 0; j < 4; j++) h[j] = TYPE == 0 ? float_to_bf16(x[j]) : float_to_half(x[j]);
  *(uint2*)((u16*)p + i) = make_uint2(h[0] | h[1] << 16, h[2] | h[3] << 16);
}

// ---- words ---------------------------------------------------------------------------------------------------------------------------

// The run of words that word m of M begins, or 0 inside a run: 4, ..., 4, then 2, then 1.
__device__ constexpr int run_length(int m, int M) {
  return m % 4 == 0 && m + 4 <= M ? 4 : m == M / 4 * 4 && M % 4 >= 2 ? 2 : m == M - 1 && M % 2 == 1 ? 1 : 0;
}
__device__ constexpr int run_first(int m, int M) { return m < M / 4 * 4 || M % 4 >= 2 && m < M / 4 * 4 + 2 ? m - m % (m < M / 4 * 4 ? 4 : 2) : M - 1; }
DEV void load_run(const u8* at, int length, u32* w) {
  if (length == 4) { const uint4 x = *(const uint4*)at; w[0] = x.x; w[1] = x.y; w[2] = x.z; w[3] = x.w; }
  else if (length == 2) { const uint2 x = *(const uint2*)at; w[0] = x.x; w[1] = x.y; }
  else if (length == 1) w[0] = *(const u32*)at;
}
// Where the run of `length` words that begins with word m of M lies.
template <bool VALUES, int M> DEV const u8* run_at(const u8* plane, int octet, int lane8, int m, int length) {
  const int word = VALUES ? octet / BAND * BAND * 8 * M + BAND * 8 * m + (lane8 * BAND + octet % BAND) * length
                          : octet * 8 * M + 8 * m + lane8 * length;
  return plane + word * 4;
}
// Where word m of M lies; m == M is the word that two octets share, after all whole words.
template <bool VALUES, int M> DEV u32* word_at(u8* plane, int octet, int lane8, int m) {
  if (m == M) return (u32*)plane + OCTETS * 8 * M + octet / 2 * 8 + lane8;
  const int first = run_first(m, M);
  return (u32*)run_at<VALUES, M>(plane, octet, lane8, first, run_length(first, M)) + (m - first);
}
// Word i of an octet's 8 * M words in the order in which they lie: its lane, and which of the lane's words it is.
template <int M> DEV void lane_and_word(int i, int& lane8, int& m) {
  constexpr int FOURS = M / 4 * 4;
  if (i < 8 * FOURS) { lane8 = i % 32 / 4; m = i / 32 * 4 + i % 4; return; }
  const int rest = i - 8 * FOURS;
  if (M % 4 >= 2 && rest < 16) { lane8 = rest / 2; m = FOURS + rest % 2; return; }
  lane8 = rest % 8; m = M - 1;
}

// ---- units and code bytes --------------------------------------------------------------------------------------------------------------
// A unit's 8 codes as bytes, elements 0-3 in lo, 4-7 in hi. Planes: width 4, the whole 4-bit code; width 2, bits 0 and 1 of a 2- or 3-bit
// code; width 1, bit 2 of a 3-bit code.

// The unit's bits in a word, at place 0; place n is n * WIDTH bits higher.
template <int WIDTH> DEV u32 pack(u32 lo, u32 hi) {
  const u32 nibbles = prmt(lo | lo >> 4, hi | hi >> 4, 0x6420);
  if (WIDTH == 4) return nibbles & 0x77777777u | (lo & 0x08080808u) << 4 | hi & 0x08080808u;
  return WIDTH == 2 ? nibbles & 0x33333333u : nibbles >> 2 & 0x11111111u;
}
template <int WIDTH> DEV void unpack(u32 word, u32& lo, u32& hi) {
  constexpr u32 BYTES = WIDTH == 4 ? 0x07070707u : WIDTH == 2 ? 0x03030303u : 0x01010101u;
  const u32 even = word & BYTES, odd = word >> 4 & BYTES;
  lo = prmt(even, odd, 0x5140);
  hi = prmt(even, odd, 0x7362);
  if (WIDTH == 4) { lo |= word >> 4 & 0x08080808u; hi |= word & 0x08080808u; }
  if (WIDTH == 1) { lo <<= 2; hi <<= 2; }
}

// A key's chunk is 4 consecutive channels of one slot, half of a unit. Row r, chunk q of C channels -> unit, and which half.
template <int C> DEV int key_unit(int r, int q, int& half) {
  constexpr int STEPS = C / 32, PER_PAIR = C / 16;
  const int pair = r / 4, odd = r / 2 % 2;
  const bool whole = q / 8 < STEPS;
  half = whole ? q / 4 % 2 : odd;
  return pair * PER_PAIR + (whole ? odd * STEPS + q / 8 : 2 * STEPS);
}
// The other way, for the keys' own planes: the chunks (row, q) of the halves of a lane's unit.
DEV void key_chunks(int lane8, int unit, int& row_lo, int& q_lo, int& row_hi, int& q_hi) {
  const int rest = unit % (UNITS / 2), row = unit / (UNITS / 2) * 4 + lane8 / 4, t = lane8 % 4;
  if (rest < 2 * KSTEPS) {
    row_lo = row_hi = row + (rest < KSTEPS ? 0 : 2);
    q_lo = rest % (KSTEPS ? KSTEPS : 1) * 8 + t;
    q_hi = q_lo + 4;
  } else {
    row_lo = row;
    row_hi = row + 2;
    q_lo = q_hi = KSTEPS * 8 + t;
  }
}
// The word of a chunk in a plane of width 8.
template <int C> DEV u32* byte_word_at(u8* plane, int octet, int r, int q) {
  int half;
  const int unit = key_unit<C>(r, q, half);
  return word_at<false, C / 4>(plane, octet, r % 2 * 4 + q % 4, 2 * unit + half);
}
// The word of a unit in a plane of width 1 or 2 or 4, and by how much its bits are shifted there.
template <bool VALUES, int WIDTH> DEV u32* unit_at(u8* plane, int octet, int lane8, int unit, int& shift) {
  constexpr int PER_WORD = 4 / WIDTH, FULL = UNITS / PER_WORD;
  const int m = unit / PER_WORD;
  shift = unit % PER_WORD * WIDTH + (UNITS % PER_WORD && m == FULL ? octet % 2 * 2 : 0);
  return word_at<VALUES, FULL>(plane, octet, lane8, m);
}

// ---- the rotation ----------------------------------------------------------------------------------------------------------------------
// L lanes hold a vector in chunks of G channels: lane l has channel G * (l + L * m) + i in x[G * m + i], 0 beyond D.

template <int L, int G> constexpr int PER_LANE = (D / G + L - 1) / L * G;
template <int L, int G> DEV bool has_chunk(int m, int l) { return D % (G * L) == 0 || G * (l + L * m) < D; }

// Bits of chunk l + L * m, in the low bits, of a set of channels (bit c % 32 of word c / 32).
template <int L, int G> DEV u32 chunk_bits(const u32* words, int m, int l) {
  const int first = G * L * m;
  if (G * L <= 32) return words[first / 32] >> (first % 32 + G * l);
  return words[first / 32 + G * l / 32] >> G * l % 32;
}

template <int L, int G> DEV void flip_signs(float (&x)[PER_LANE<L, G>], const u32* signs, int l) {
  UNROLL for (int m = 0; m < PER_LANE<L, G> / G; m++) {
    const u32 minus = has_chunk<L, G>(m, l) ? chunk_bits<L, G>(signs, m, l) : 0;
    UNROLL for (int i = 0; i < G; i++) x[G * m + i] = __uint_as_float(__float_as_uint(x[G * m + i]) ^ minus >> i << 31);
  }
}

__device__ constexpr double square_root(double n) {
  double x = n;
  for (int i = 0; i < 40; i++) x = (x + n / x) / 2;
  return x;
}

// P x or P^T x for the Paley matrix P, over the channels' upper index. buf: the vector's D floats of shared memory.
template <int L, int G, bool TRANSPOSE> DEV void multiply_by_paley(float (&x)[PER_LANE<L, G>], float* buf, int l) {
  constexpr int M = PER_LANE<L, G> / G;
  static_assert(G * L % PALEY_S == 0, "a lane's chunks have one lower index");
  u32 minus[M];
  UNROLL for (int m = 0; m < M; m++) {
    const int c = G * (l + L * m);
    const bool real = has_chunk<L, G>(m, l);
    if (real) UNROLL for (int i = 0; i < G; i++) buf[c + i] = x[G * m + i];
    minus[m] = (TRANSPOSE ? PALEY_COLUMNS : PALEY_ROWS)[real ? c / PALEY_S : 0];
    UNROLL for (int i = 0; i < G; i++) x[G * m + i] = 0;
  }
  __syncwarp();
#pragma unroll 4
  for (int b = 0; b < ORDER; b++) {
    float v[G];
    UNROLL for (int i = 0; i < G; i++) v[i] = buf[b * PALEY_S + G * l % PALEY_S + i];
    UNROLL for (int m = 0; m < M; m++) {
      const float sign = __uint_as_float(0x3f800000u | minus[m] >> b << 31);
      UNROLL for (int i = 0; i < G; i++) x[G * m + i] = fmaf(v[i], sign, x[G * m + i]);
    }
  }
  UNROLL for (int m = 0; m < M; m++) if (!has_chunk<L, G>(m, l)) UNROLL for (int i = 0; i < G; i++) x[G * m + i] = 0;
  __syncwarp();
}

// H x / sqrt(D), or H^T x / sqrt(D). Butterflies in the order 1, 2, 4, ...; buf: D floats of shared memory, unused for powers of two.
template <int L, int G, bool TRANSPOSE> DEV void hadamard(float (&x)[PER_LANE<L, G>], float* buf, int l) {
  constexpr int N = PER_LANE<L, G>;
  UNROLL for (int h = 1; h < PALEY_S; h *= 2) {
    if (h >= G && h < G * L) {
      const float sign = l & h / G ? -1.f : 1.f;
      UNROLL for (int j = 0; j < N; j++) x[j] = fmaf(x[j], sign, __shfl_xor_sync(~0u, x[j], h / G));
      continue;
    }
    const int stride = h < G ? h : h / L;
    UNROLL for (int j = 0; j < N; j++) if (!(j & stride)) {
      const float a = x[j], b = x[j | stride];
      x[j] = a + b;
      x[j | stride] = a - b;
    }
  }
  if constexpr (ORDER > 1) multiply_by_paley<L, G, TRANSPOSE>(x, buf, l);
  UNROLL for (int j = 0; j < N; j++) x[j] *= (float)(1 / square_root(D));
}
