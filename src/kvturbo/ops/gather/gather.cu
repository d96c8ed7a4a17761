// Dequantises positions start .. stop - 1 of the rows of a block table: one launch for K and V. Comes after kvturbo/cuda/common.cuh.
//
// A warp takes an octet of a side of one KV head. Its words are read in the order in which they lie and become code bytes in shared memory;
// then 4 lanes have a vector, look its levels up, rotate it back and write it. Bound by memory: 16-bit copies are four times the codes.

constexpr int WARPS = 4;
constexpr int KEY_STRIDE = D / 4 % 8 ? D : D + 16;       // bytes from row to row of key codes: no bank twice
constexpr int PALEY_BYTES = ORDER > 1 ? 8 * D * 4 : 0;
constexpr int WARP_BYTES = PALEY_BYTES > 8 * (D + 16) ? PALEY_BYTES : 8 * (D + 16);
constexpr int N = D / 4;                                  // channels per lane

struct Params {
  const u8* pages;
  const int* block_table;         // [batch, table_stride]
  const i64* outlier_channels;    // [HKV, OUTLIERS] or null
  void *k, *v;                    // [batch, tokens, HKV, D]
  i64 k_strides[3], v_strides[3];  // of sequence, token and head, in elements
  i64 block_stride;               // bytes from block to block
  int table_stride, batch, kv_heads, start, stop, octets;
  u32 signs[8];                   // bit c set: sigma_c = -1
};

// The levels of a codebook by code, times T.
template <int BITS> DEV void fill(float* levels, int thread) {
  UNROLL for (int i = 0; i < 1 << (BITS - 1); i++) {
    if (thread == i) levels[i] = MAGNITUDES[BITS][i];
    if (thread == (1 << (BITS - 1)) + i) levels[(1 << (BITS - 1)) + i] = -MAGNITUDES[BITS][i];
  }
}

// The codes of a lane's unit as bytes, elements 0-3 and 4-7.
template <bool V, int BITS> DEV void read_unit(const u8* page, int octet, int lane8, int unit, u32& lo, u32& hi) {
  int shift;
  const u32* word = unit_at<V, BITS == 4 ? 4 : 2>((u8*)page + (V ? V_CODES : K_CODES), octet, lane8, unit, shift);
  unpack<BITS == 4 ? 4 : 2>(*word >> shift, lo, hi);
  if (BITS == 3) {
    u32 sign_lo, sign_hi;
    const u32* signs = unit_at<V, 1>((u8*)page + (V ? V_SIGNS : K_SIGNS), octet, lane8, unit, shift);
    unpack<1>(*signs >> shift, sign_lo, sign_hi);
    lo |= sign_lo;
    hi |= sign_hi;
  }
}

// An octet's units to shared memory: of keys row after row, of values channel after channel.
template <bool V, int BITS> DEV void read_octet(const u8* page, int octet, u8* bytes, int lane) {
  UNROLL for (int i0 = 0; i0 < D; i0 += 32) if (i0 + lane < D) {
    int lane8, unit;
    u32 lo, hi;
    lane_and_word<UNITS>(i0 + lane, lane8, unit);
    read_unit<V, BITS>(page, octet, lane8, unit, lo, hi);
    if (V) *(uint2*)(bytes + (8 * unit + lane8) * 8) = make_uint2(lo, hi);
    else {
      int row_lo, q_lo, row_hi, q_hi;
      key_chunks(lane8, unit, row_lo, q_lo, row_hi, q_hi);
      *(u32*)(bytes + row_lo * KEY_STRIDE + 4 * q_lo) = lo;
      *(u32*)(bytes + row_hi * KEY_STRIDE + 4 * q_hi) = hi;
    }
  }
}

DEV float half_at(const u8* page, int plane, int slot) { return half2_to_float2(((const u16*)(page + plane))[slot]).x; }
DEV float int8_at(u32 word, int i) { return (float)(signed char)(word >> 8 * i & 255); }

// The vector of one slot of the octet, as far as a lane has it: channels 4 * (l + 4 * m) + i.
template <bool V> DEV void read_vector(const u8* page, int octet, const float* levels, u8* memory, int lane, float (&x)[N]) {
  constexpr int BITS = V ? V_BITS : K_BITS;
  const int row = lane / 4, l = lane % 4;
  const float scale = half_at(page, V ? V_SCALE : K_SCALE, octet * 8 + row);
  if constexpr (BITS == 8) {
    UNROLL for (int m = 0; m < N / 4; m++) {
      const u32 word = *byte_word_at<D>((u8*)page + K_CODES, octet, row, l + 4 * m);
      UNROLL for (int i = 0; i < 4; i++) x[4 * m + i] = __fmul_rn(int8_at(word, i), scale);
    }
  } else {
    const float unit = scale * (float)(1 / CODEBOOK_T[BITS]);
    read_octet<V, BITS>(page, octet, memory, lane);
    __syncwarp();
    UNROLL for (int m = 0; m < N / 4; m++) {
      const int q = l + 4 * m;
      const u32 word = V ? 0 : *(const u32*)(memory + row * KEY_STRIDE + 4 * q);
      UNROLL for (int i = 0; i < 4; i++)
        x[4 * m + i] = __fmul_rn(levels[V ? memory[(4 * q + i) * 8 + row] : word >> 8 * i & 255], unit);
    }
    __syncwarp();
  }
}

// The int8 of the outlier channels, over what is there.
DEV void write_outliers(const Params& p, const u8* page, int octet, int head, i64 at, bool seen, int lane) {
#if OUTLIERS
  const int row = lane / 4, l = lane % 4;
  const float step = half_at(page, K_OUTLIER_SCALE, octet * 8 + row);
  __syncwarp();
  UNROLL for (int q = 0; q < OUTLIERS / 4; q += 4) {
    const u32 word = *byte_word_at<OUTLIERS>((u8*)page + K_OUTLIERS, octet, row, q + l);
    UNROLL for (int i = 0; i < 4; i++)
      if (seen) store_element<OUT_TYPE>(p.k, at + p.outlier_channels[head * OUTLIERS + 4 * (q + l) + i], int8_at(word, i) * step);
  }
#endif
}

template <bool V> DEV void gather_octet(const Params& p, int sequence, int first, int head, const float* levels, u8* memory, int lane) {
  const int position = first + lane / 4, l = lane % 4;
  const u8* page = p.pages + p.block_table[(i64)sequence * p.table_stride + first / PAGE] * p.block_stride + (i64)head * PAGE_BYTES;
  float x[N];
  read_vector<V>(page, first % PAGE / 8, levels, memory, lane, x);
  if (UNROTATE) {
    hadamard<4, 4, true>(x, (float*)memory + lane / 4 * D, l);
    flip_signs<4, 4>(x, p.signs, l);
  }
  const i64* strides = V ? p.v_strides : p.k_strides;
  const i64 at = sequence * strides[0] + (position - p.start) * strides[1] + head * strides[2];
  const bool seen = position >= p.start && position < p.stop;
  if (seen) UNROLL for (int m = 0; m < N / 4; m++) store4<OUT_TYPE>(V ? p.v : p.k, at + 4 * (l + 4 * m), x + 4 * m);
  if (!V) write_outliers(p, page, first % PAGE / 8, head, at, seen, lane);
}

extern "C" __global__ void __launch_bounds__(WARPS * 32) gather(const __grid_constant__ Params p) {
  __shared__ __align__(16) u8 s_memory[WARPS][WARP_BYTES];
  __shared__ float s_levels[2][16];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (K_BITS < 8) fill<K_BITS < 8 ? K_BITS : 4>(s_levels[0], threadIdx.x);
  fill<V_BITS>(s_levels[1], threadIdx.x);
  __syncthreads();
  i64 task = (i64)blockIdx.x * WARPS + warp;  // [sequence][head][side][octet]: octets of a band lie together
  const int first = (p.start / 8 + (int)(task % p.octets)) * 8;
  task /= p.octets;
  const int side = task % 2, head = task / 2 % p.kv_heads;
  const i64 sequence = task / 2 / p.kv_heads;
  if (sequence >= p.batch) return;
  if (side) gather_octet<true>(p, sequence, first, head, s_levels[1], s_memory[warp], lane);
  else gather_octet<false>(p, sequence, first, head, s_levels[0], s_memory[warp], lane);
}
