// Decode attention on packed pages with int8 tensor cores (mma.sync m16n8k32 s8), one launch.
//
// Tile. All steps of all tasks lie in one row; a step is STEP slots of a (sequence, KV head, block of ROWS query rows) task. A CTA of
// NW warps takes one big chunk of steps (of its rank's: `Claims`) and then small ones by ticket (schedule.cu). The warps take turns at
// the steps of a task, which lie in a ring of NB stages filled by one bulk copy per page, and merge at the end of the task's piece. A
// task that crosses chunks leaves partial results in the workspace; the last CTA to arrive merges them in the order of the chunks, so
// the result does not depend on timing. ROWS = 4 * NT: queries and weights are 16-bit fixed point, 256 * hi + lo.
//
// Layout. Page planes as in docs/page.md; offsets come as macros. Lane (g, t) = (lane / 4, lane % 4). Tokens and channels are the MMA's
// M: the codes are A, decoded once for all rows; the queries are B, a tile of 4 rows with hi and lo in neighbouring columns, so that
// lane (g, t) gets both halves of row t's scores: those of slots 8 (g / 2) + 2 j + g % 2, j = 0..3, of a group of 32. For P V (A the
// V codes, M the channels) the probabilities change places through two shuffles per group: column g wants slots 8 t .. 8 t + 7.
// A level is i + 1/2 with the int8 i = m or ~m, so a product with q is sum q i + 1/2 sum q: one constant per row.
//
// Budget per step of 64 slots, head_dim 128, 4 bits, NT = 1, per warp: 8,448 bytes; 930 instructions: 64 units of 8 codes at 9 (7 on the
// integer pipe, which takes 2 cycles for each), 32 MMA, 35 shared loads, about 11 for each of 8 scores and 3 for each of 16 accumulators.
// Two tiles of rows: 1,120, of which 520 on the integer pipe.
//
// kvturbo.cuda.source puts its tables, common.cuh and shares.cuh before this text.

constexpr int ROWS = 4 * NT;
constexpr int PER_PAIR = 2 * KSTEPS + KTAIL;  // units of the two slots s, s + 2
constexpr int GROUPS = STEP / 32;           // groups of 32 slots per step
constexpr int PAGES = STEP / PAGE;          // pages per step
// 16-slot pages want a stride of 64 modulo 128 bytes: then the V loads of a quarter warp, which spans two pages, meet no bank twice
constexpr int STRIDE = PAGE == 16 ? (PAGE_BYTES + 63) / 128 * 128 + 64 : (PAGE_BYTES + 127) / 128 * 128;
// Pages that end in the middle of a 128-byte line lie in their stages as they do in memory, modulo the line: else each line is asked for twice
// (3 % of the time). Known by head, so it holds where blocks are whole lines. Pages of 16 slots need their stride for the banks.
constexpr int SHIFT = PAGE > 16 ? PAGE_BYTES % 128 : 0;
static_assert(SHIFT == 0 || SHIFT == 64, "a page's end is moved by no more than its stride has room for");
constexpr int STAGE = (PAGES * STRIDE + 127) / 128 * 128;
constexpr int RING = NB * STAGE, LINE = D + 8, RESULTS = NW * ROWS * LINE * 4;
constexpr int QUERIES_AT = ((RING > RESULTS ? RING : RESULTS) + 15) / 16 * 16;
constexpr int OWN = (NB + NW - 1) / NW;     // stages that a warp fills first, at most
constexpr int RESULT = ROWS * (D + 2);      // floats of a partial result: O, then m and l per row
constexpr int PART = (RECENT ? 2 : 1) * RESULT;  // of a piece: that of its pages, then that of the newest tokens
constexpr int E = (D + 31) / 32;            // channels per lane in the row-wise passes
constexpr bool FOLDED = OUTLIERS == 0;     // the query's scale is applied with the exponential
constexpr float Q_MAX = 32639.f;            // 256 * 127 + 127: hi and lo are signed bytes
constexpr float P_MAX = 65535.f;            // of a weight: hi and lo are unsigned bytes
#define NOT_A_NUMBER __int_as_float(0x7fffffff)
constexpr float EMPTY = -3e38f;             // the reference of a row that has seen nothing
constexpr float FAR = 1099511627776.f;      // 2^40: how far a sum may grow above its reference
constexpr float MAGIC = 8388608.f;          // 2^23: adding it leaves an integer in the low mantissa bits
constexpr float MAGIC_ODD = MAGIC + 46336.f;  // 0x4b00 less modulo 2^16: what the other one's exponent adds
__constant__ u32 SHIFT_16 = 65536;          // a factor: the compiler would take a constant's multiplication to the integer pipe

struct Params {
  const void* q;              // [T, kv_heads * GROUP, D]
  const u8* pages;
  const int* block_table;     // [B, table_stride]
  const int* seq_lens;        // [B]
  const int* q_lens;          // [B] or null: 1 each
  const int* seq_starts;      // [B] or null
  const float* sinks;         // [kv_heads * GROUP] or null
  const i64* outlier_channels;  // [kv_heads, OUTLIERS] or null
  const void* recent;         // [slots, kv_heads, 2, RECENT, D] of q's type: raw keys and values of position x at x % RECENT
  const int* recent_slots;    // [B]
  const int* recent_counts;   // [B]: newest tokens of a sequence that are read there and not from pages
  const int* plan;            // see schedule.cu
  float* workspace;           // [2 * chunks, PART]
  u32* counters;              // tickets, arrivals by chunk and warp, then `Claims`: zero between launches
  void* out;                  // [T, kv_heads * GROUP, D]
  float* lse;                 // [T, kv_heads * GROUP]
  u32 block_stride;           // bytes from block to block
  int table_stride, batch, rows, kv_heads, window;
  float scale_log2, soft_cap;
  u32 signs[8];               // bit c set: sigma_c = -1
};

DEV bool elect() {  // one lane of the warp, known to the compiler as such
#if __CUDA_ARCH__ >= 900
  u32 one;
  asm volatile("{.reg .pred p; elect.sync _|p,0xffffffff; selp.b32 %0,1,0,p;}" : "=r"(one));
  return one;
#else
  return (threadIdx.x & 31) == 0;
#endif
}
DEV float ex2(float x) { float y; asm("ex2.approx.ftz.f32 %0,%1;" : "=f"(y) : "f"(x)); return y; }
// tanhf is tanh.approx under fast math, for which PTX promises 2^-11.
DEV float tanh_exact(float x) { return 1.f - __fdividef(2.f, 1.f + ex2(x * 2.88539008f)); }
DEV float rows_max(float x) {  // over the lanes with the same t
  UNROLL for (int h = 4; h < 32; h *= 2) x = max_nan(x, __shfl_xor_sync(~0u, x, h));
  return x;
}
DEV float rows_sum(float x) {
  UNROLL for (int h = 4; h < 32; h *= 2) x += __shfl_xor_sync(~0u, x, h);
  return x;
}
DEV float all_max(float x) {  // over all lanes
  UNROLL for (int h = 16; h; h /= 2) x = max_nan(x, __shfl_xor_sync(~0u, x, h));
  return x;
}
DEV float all_sum(float x) {
  UNROLL for (int h = 16; h; h /= 2) x += __shfl_xor_sync(~0u, x, h);
  return x;
}
DEV void mma32(int* c, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
struct Start { int c[4]; };  // what accumulators start from
DEV void mma32_first(const Start& z, int* c, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {  // c = a b
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%10,%11,%12,%13};"
      : "=r"(c[0]), "=r"(c[1]), "=r"(c[2]), "=r"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1), "r"(z.c[0]), "r"(z.c[1]), "r"(z.c[2]), "r"(z.c[3]));
}
DEV void mma32_weights(int* c, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {  // b: unsigned bytes
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.u8.s32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
DEV void mma32_weights_first(const Start& z, int* c, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.u8.s32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%10,%11,%12,%13};"
      : "=r"(c[0]), "=r"(c[1]), "=r"(c[2]), "=r"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1), "r"(z.c[0]), "r"(z.c[1]), "r"(z.c[2]), "r"(z.c[3]));
}
DEV void mma16_first(const Start& z, int* c, u32 a0, u32 a1, u32 b) {
  asm("mma.sync.aligned.m16n8k16.row.col.s32.s8.s8.s32 {%0,%1,%2,%3},{%4,%5},{%6},{%7,%8,%9,%10};"
      : "=r"(c[0]), "=r"(c[1]), "=r"(c[2]), "=r"(c[3]) : "r"(a0), "r"(a1), "r"(b), "r"(z.c[0]), "r"(z.c[1]), "r"(z.c[2]), "r"(z.c[3]));
}
DEV void mma16(int* c, u32 a0, u32 a1, u32 b) {
  asm("mma.sync.aligned.m16n8k16.row.col.s32.s8.s8.s32 {%0,%1,%2,%3},{%4,%5},{%6},{%0,%1,%2,%3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3]) : "r"(a0), "r"(a1), "r"(b));
}

// ---- sums of products as floats --------------------------------------------------------------------------------------------------------
// Accumulators start from floats whose last place is worth 256 (columns of hi) and 1 (columns of lo). Adding an integer to the bits of such
// a float adds as many of its last places, so hi and lo come out of the tensor cores as floats: 256 hi + lo = (c_hi - BIAS) + c_lo, on the
// floating-point pipe, where conversions would take the integer pipe. It holds for sums below 2^22.

constexpr int HI_START = 0x4f400000, LO_START = 0x4b400000;  // 1.5 * 2^31 and 1.5 * 2^23
constexpr float BIAS = 3221225472.f + 12582912.f;            // their sum
static_assert(D * 127 * 128 < 1 << 22 && STEP * 127 * 255 < 1 << 22, "sums of products fit the mantissa");
DEV float joined(int hi, int lo, float bias) { return (__int_as_float(hi) - bias) + __int_as_float(lo); }

// ---- units -------------------------------------------------------------------------------------------------------------------------

// m >> 16 (the upper half of the result is anything): a multiplication by 1 on the floating-point pipe, exact for nibbles up to 7.
__constant__ u32 HALF_ONES = 0x3c003c00u;  // not known to the compiler, which would make a shift of it
DEV u32 high_half(u32 m) {
  u32 d;
  asm("{.reg .b16 a,b; .reg .b32 t; mov.b32 {a,b},%1; mov.b32 t,{b,b}; fma.rn.f16x2 %0,t,%2,%3;}" : "=r"(d) : "r"(m), "r"(HALF_ONES), "r"(0x80008000u));
  return d;
}

// One lane's units of one octet, decoded one after another; words are loaded when their run begins.
template <int BITS, bool VALUES> struct Units {
  static constexpr int WIDE = BITS == 8 ? 2 * UNITS : BITS == 4 ? UNITS : UNITS / 2;  // words of the wide plane
  static constexpr int FULL = BITS == 3 ? UNITS / 4 : 0;                              // unshared words of the sign plane
  u32 w[WIDE], s[BITS == 3 ? FULL + 1 : 1];
  const u8 *codes, *signs;
  int octet, lane8;
  DEV void at(const u8* page, int octet_, int lane8_) {
    codes = page + (VALUES ? V_CODES : K_CODES);
    signs = page + (VALUES ? V_SIGNS : K_SIGNS);
    octet = octet_; lane8 = lane8_;
  }
  DEV void load_wide(int m) { const int n = run_length(m, WIDE); if (n) load_run(run_at<VALUES, WIDE>(codes, octet, lane8, m, n), n, w + m); }
  DEV void load_signs(int m) {
    const int n = run_length(m, FULL);
    if (m < FULL) { if (n) load_run(run_at<VALUES, FULL>(signs, octet, lane8, m, n), n, s + m); }
    else s[FULL] = *(const u32*)(signs + (OCTETS * 8 * FULL + octet / 2 * 8 + lane8) * 4) >> 2 * (octet & 1);  // shared by two octets
  }
  DEV void unit(int n, const u32* table, u32& b0, u32& b1) {
    if (BITS == 8) {
      load_wide(2 * n);
      b0 = w[2 * n]; b1 = w[2 * n + 1];
    } else if (BITS == 4) {
      load_wide(n);
      const u32 m = w[n] & 0x77777777u, v = w[n] << 4;
      b0 = prmt(table[0], table[1], m) ^ prmt(w[n], w[n], 0xBA98);
      b1 = prmt(table[0], table[1], high_half(m)) ^ prmt(v, v, 0xBA98);
    } else {
      if (n % 2 == 0) load_wide(n / 2);
      u32 m = (w[n / 2] >> 2 * (n % 2)) & 0x33333333u;
      if (BITS == 3) {
        if (n % 4 == 0) load_signs(n / 4);
        const u32 sign = s[n / 4];
        m |= (n % 4 == 0 ? sign << 2 : n % 4 == 1 ? sign << 1 : n % 4 == 2 ? sign : sign >> 1) & 0x44444444u;
      }
      b0 = prmt(table[0], table[1], m);
      b1 = prmt(table[0], table[1], high_half(m));
    }
  }
};

// int8 levels without their 1/2, by code: 4 bits by magnitude (8 bytes), 3 bits all 8 codes, 2 bits all 4.
template <int BITS> DEV void level_table(u32* t) {
  if (BITS == 8) return;
  u32 magnitudes[2] = {0, 0};
  UNROLL for (int i = 0; i < 1 << (BITS - 1); i++) magnitudes[i / 4] |= (u32)(MAGNITUDES[BITS % 8][i] - 0.5f) << i % 4 * 8;
  t[0] = BITS == 2 ? magnitudes[0] | ~magnitudes[0] << 16 : magnitudes[0];
  t[1] = BITS == 2 ? t[0] : BITS == 3 ? ~magnitudes[0] : magnitudes[1];
}
template <int BITS> DEV float level_unit() { return BITS == 8 ? 1.f : (float)(1 / CODEBOOK_T[BITS % 8]); }

DEV float half_at(const u8* at) {
  float f;
  asm("{.reg .f16 h; mov.b16 h,%1; cvt.f32.f16 %0,h;}" : "=f"(f) : "h"(*(const unsigned short*)at));
  return f;
}

// ---- copies ------------------------------------------------------------------------------------------------------------------------

// NB stages for all warps. Step i of the CTA's life lies in stage i % NB, which then is used the (i / NB)th time; the warp that has read
// a step refills its stage with the step NB later, whosever that is. A barrier tells apart only its present phase and the one before,
// so a warp that waits for another's refill first waits for its number in `filled`.
struct Ring {
  static constexpr bool OWNED = NB % NW == 0;  // a warp refills its own stages only
  static_assert(NB > NW, "a warp waits for its next step before it refills the stage of this one");
  u32 bar0, base0;  // shared addresses of the barriers and stages
  u8* base;
  volatile int* filled;
  int stage, use;   // of this warp's next step
  DEV void init(u8* smem, u64* bars, int* filled_) {
    base = smem;
    filled = filled_;
    bar0 = (u32)__cvta_generic_to_shared(bars);
    base0 = (u32)__cvta_generic_to_shared(base);
    if (!OWNED && threadIdx.x < NB) filled[threadIdx.x] = -1;
#if __CUDA_ARCH__ >= 900
    if (threadIdx.x < NB) asm volatile("mbarrier.init.shared::cta.b64 [%0],1;" ::"r"(bar0 + threadIdx.x * 8));
    asm volatile("fence.mbarrier_init.release.cluster;");
    __syncthreads();
#endif
  }
  DEV void align(u8* smem, const u8* pages) {  // for pages that lie as these do
    if (SHIFT == 0) return;
    const u32 shift = __shfl_sync(~0u, (u32)(u64)pages & SHIFT, 0);  // known to the compiler as equal in all lanes
    base = smem + shift;
    base0 = (u32)__cvta_generic_to_shared(smem) + shift;
  }
  DEV void seek(int i) { stage = i % NB; use = i / NB; }
  DEV void advance() { stage += NW; if (stage >= NB) { stage -= NB; use++; } }
  DEV const u8* data() const { return base + stage * STAGE; }
#if __CUDA_ARCH__ >= 900
  // Copies a step's pages for a stage's use number `n`.
  DEV void issue(int into, int n, const u8* pages, u32 block_stride, const u32 (&ids)[PAGES]) const {
    const u32 bar = bar0 + into * 8, to = base0 + into * STAGE;
    if (!elect()) return;
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _,[%0],%1;" ::"r"(bar), "n"(PAGES * PAGE_BYTES) : "memory");
    UNROLL for (int i = 0; i < PAGES; i++)
      asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0],[%1],%2,[%3];"
                   ::"r"(to + i * STRIDE), "l"(pages + (u64)ids[i] * block_stride), "n"(PAGE_BYTES), "r"(bar) : "memory");
    if (!OWNED) filled[into] = n;
  }
  DEV void skip() const {}
  template <int> DEV void wait() const {
    if (!OWNED) while (filled[stage] < use) {}
    asm volatile("{.reg .pred p; W%=: mbarrier.try_wait.parity.shared::cta.b64 p,[%0],%1; @p bra.uni E%=; bra.uni W%=; E%=: }"
                 ::"r"(bar0 + stage * 8), "r"(use & 1) : "memory");
  }
#else
  static_assert(OWNED, "a warp waits for its own copies only");
  DEV void issue(int into, int, const u8* pages, u32 block_stride, const u32 (&ids)[PAGES]) const {
    UNROLL for (int i = 0; i < PAGES; i++) {
      const u8* source = pages + (u64)ids[i] * block_stride;
      for (int at = (threadIdx.x & 31) * 16; at < PAGE_BYTES; at += 512)
        asm volatile("cp.async.cg.shared.global [%0],[%1],16;" ::"r"(base0 + into * STAGE + i * STRIDE + at), "l"(source + at) : "memory");
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
  }
  DEV void skip() const { asm volatile("cp.async.commit_group;" ::: "memory"); }  // one group per step, so that waits can count
  template <int PENDING> DEV void wait() const { asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory"); __syncwarp(); }
#endif
};

// ---- one warp's state ----------------------------------------------------------------------------------------------------------------

struct Task {
  int sequence, head, row0;      // KV head, first row of the row block
  int length, q_len, q_row;      // of the sequence, in pages; its first row in q
  int recent;                    // tokens beyond that length, which are not read from pages
  DEV int position(int query) const { return length + recent - q_len + query; }
};

struct Plan : Shares {  // see schedule.cu
  int total, rows, lead;
  DEV Plan(const Params& p) {
    const int4 x = *(const int4*)p.plan, y = *(const int4*)(p.plan + 4);
    big = x.x; small = x.y; total = x.z; rows = x.w;
    drawn = y.x; lead = y.y; taper = y.z; per_rank = y.w;
    ctas = gridDim.x;
  }
  DEV int stop(int chunk) const { return min(start(chunk + 1), total); }
};

DEV u32 warp_slot() {  // among the warps that a multiprocessor has room for; those that come first have the lowest
  u32 slot;
  asm("mov.u32 %0,%%warpid;" : "=r"(slot));
  return slot;
}

// Which CTA has which chunk, where ranks have shares of different size. CTAs come to multiprocessors in no order to rely on, so each takes a chunk
// of its rank as it begins, or of the next one that has any left. The result does not depend on it.
struct Claims {
  u32* taken;  // by rank, and then the CTAs that have ended; zero between launches
  DEV Claims(const Params& p, const Plan& plan) : taken(p.counters + 1 + plan.chunks() * NW) {}
  DEV int chunk(const Plan& plan) const {
    const int ranks = (plan.ctas + plan.per_rank - 1) / plan.per_rank;
    for (int i = 0, rank = warp_slot() / NW % ranks; i < ranks; i++, rank = (rank + 1) % ranks) {
      const int first = rank * plan.per_rank, place = atomicAdd(taken + rank, 1u);
      if (place < min(plan.per_rank, plan.ctas - first)) return first + place;
    }
    return 0;  // never, unless two launches at once share a schedule's memory
  }
  // Claims were answered before their CTAs came here, and the next launch begins after this one's end.
  DEV void end() const {
    if (threadIdx.x != 0 || atomicInc(taken + MIN_CTAS, gridDim.x - 1) < gridDim.x - 1) return;
    UNROLL for (int rank = 0; rank < MIN_CTAS; rank++) taken[rank] = 0;
  }
};

struct Place {  // of a CTA in its chunks
  int4 r0;      // of the present task: sequence, steps before it, of a task of it, task
  int4 r1;      // the sequence's length in pages, rows of q before it, q_len (and 256 times the tokens beyond that length), start
  int chunk, at, stop, before;  // the next piece's first step, the chunk's end, steps of earlier pieces
  DEV void read_record(const Params& p) { r0 = *(const int4*)(p.plan + 8 + chunk * 8); r1 = *(const int4*)(p.plan + 12 + chunk * 8); }
  DEV int q_len() const { return RECENT ? r1.z & 255 : r1.z; }
  DEV int tasks(const Params& p) const { return p.kv_heads * ((GROUP * q_len() + ROWS - 1) / ROWS); }
  DEV void next_task(const Params& p, const Plan& plan) {
    if (++r0.w, at < r0.y + (r0.z + plan.lead) * tasks(p)) return;
    const int* cum = p.plan + 8 + 8 * plan.chunks();
    const int* q_rows = cum + p.batch + 1;
    int b = r0.x + 1;
    while (at >= cum[b + 1]) b++;  // sequences without tasks
    const int recent = RECENT ? p.recent_counts[b] : 0;
    r1.x = p.seq_lens[b] - recent;
    r1.y = q_rows[b];
    r1.z = q_rows[b + 1] - r1.y | recent << 8;
    r1.w = p.seq_starts ? p.seq_starts[b] : 0;
    r0.x = b;
    r0.y = cum[b];
    r0.z = (cum[b + 1] - cum[b]) / tasks(p) - plan.lead;
    r0.w = 0;
  }
};

// A part of a task that a CTA does at once: steps s0 to s1 of it.
struct Piece {
  Task k;
  int begin, steps;              // where the task's steps lie in the row of all steps
  int s0, s1;
  int start, slot0, pages;       // first position that may be seen, the first step's first slot, pages of the task
  const int* table;              // of the task's first page
  const u8* head_pages;
  DEV Piece(const Params& p, const Place& x, int lead) {
    const int4 r0 = x.r0, r1 = x.r1;
    k.sequence = r0.x;
    k.length = r1.x;
    k.q_row = r1.y;
    k.q_len = x.q_len();
    k.recent = RECENT ? r1.z >> 8 : 0;
    start = min(r1.w, k.length);  // it may lie anywhere beyond the end
    steps = r0.z;
    begin = r0.y + r0.w * (steps + lead) + lead;
    const int blocks = (GROUP * k.q_len + ROWS - 1) / ROWS;
    k.head = blocks == 1 ? r0.w : r0.w / blocks;
    k.row0 = (r0.w - k.head * blocks) * ROWS;
    s0 = max(x.at - begin, 0);
    s1 = min(x.stop - begin, steps);
    const int page0 = max(0, max((k.length + STEP - 1) / STEP, 1) - steps) * PAGES;
    slot0 = page0 * PAGE;
    pages = (k.length + PAGE - 1) / PAGE - page0;
    table = p.block_table + (i64)k.sequence * p.table_stride + page0;
    head_pages = p.pages + (i64)k.head * PAGE_BYTES;
  }
  DEV bool ends_in_newest() const { return s1 == steps && k.recent; }
  DEV void page_ids(int step, u32 (&ids)[PAGES]) const {  // of a step; page 0 where it has none, whose slots are masked
    UNROLL for (int i = 0; i < PAGES; i++) ids[i] = step < s1 && step * PAGES + i < pages ? table[step * PAGES + i] : 0;
  }
  DEV void first_page_ids(int warp, u32 (&ids)[OWN][PAGES]) const { UNROLL for (int i = 0; i < OWN; i++) page_ids(s0 + warp + NW * i, ids[i]); }
  DEV void issue(const Ring& ring, const Params& p, int into, int n, int step, const u32 (&ids)[PAGES]) const {
    if (step < s1) ring.issue(into, n, head_pages, p.block_stride, ids); else ring.skip();
  }
  DEV void issue_first(const Ring& ring, const Params& p, int warp, const u32 (&ids)[OWN][PAGES]) const {
    Ring to = ring;
    UNROLL for (int i = 0; i < OWN; i++) {
      if (warp + NW * i < NB) issue(ring, p, to.stage, to.use, s0 + warp + NW * i, ids[i]);
      to.advance();
    }
  }
};

// What a lane needs at every step, in shared memory rather than in registers or computed again.
struct __align__(16) Lane {
  int from;        // the lane that it gets its first half of weights from; the second comes from from ^ 4
  u32 pick, swap;  // selectors of the bytes that it sends first, and of those it keeps of the even slots
  int lane8;       // of its K words
};

struct Query {                   // of rows t, 4 + t, ...
  u32 b[NT][KSTEPS + KTAIL][2];  // B fragments
  u32 o[NT][2];                  // of the outlier channels
  float scale[NT];               // of a score, in log2 units
  float o_scale[NT];             // of the outlier channels' share
  float bias[NT];                // BIAS - 1/2 sum q
  int hi[NT], lo[NT];            // positions the rows see
  DEV bool sees(int m, int slot) const { return slot <= hi[m] && slot >= lo[m]; }
};

// This lane's slots of group u: octet 4 u + g / 2, slots 2 j + g % 2 of it.
DEV int own_slot(int u, int j, int g) { return u * 32 + (g >> 1) * 8 + 2 * j + (g & 1); }
DEV const u8* own_page(const u8* data, int u, int g) { return data + (4 * u + (g >> 1)) / OCTETS * STRIDE; }
DEV const u8* own_halves(const u8* data, int plane, int u, int g) {  // 4 bytes from j to j + 1
  return own_page(data, u, g) + plane + (4 * u + (g >> 1)) % OCTETS * 16 + (g & 1) * 2;
}

// Scores of slots j = 2 pair, 2 pair + 1; where FOLDED still to be multiplied by the query's scale.
template <int BITS>
DEV void pair_scores(const u8* data, int u, int pair, int g, int lane8, const u32* table, const Start& z, const Query& q,
                     Units<BITS, false>& k, float (&s)[NT][GROUPS][4]) {
  int c[NT][4];
  u32 low[2][KSTEPS][2];
  UNROLL for (int r = 0; r < PER_PAIR; r++) {
    const int n = pair * PER_PAIR + r;
    if (r < 2 * KSTEPS) {
      k.unit(n, table, low[r / KSTEPS][r % KSTEPS][0], low[r / KSTEPS][r % KSTEPS][1]);
      if (r >= KSTEPS) {
        const int i = r % KSTEPS;
        UNROLL for (int m = 0; m < NT; m++)
          if (i) mma32(c[m], low[0][i][0], low[1][i][0], low[0][i][1], low[1][i][1], q.b[m][i][0], q.b[m][i][1]);
          else mma32_first(z, c[m], low[0][i][0], low[1][i][0], low[0][i][1], low[1][i][1], q.b[m][i][0], q.b[m][i][1]);
      }
    } else {
      u32 even, odd;
      k.unit(n, table, even, odd);
      UNROLL for (int m = 0; m < NT; m++) mma16(c[m], even, odd, q.b[m][KSTEPS][0]);
    }
  }
  const u8* scales = own_halves(data, K_SCALE, u, g);
  UNROLL for (int j = 0; j < 2; j++) {
    const float scale = half_at(scales + (2 * pair + j) * 4);
    UNROLL for (int m = 0; m < NT; m++)
      s[m][u][2 * pair + j] = joined(c[m][2 * j], c[m][2 * j + 1], q.bias[m]) * (FOLDED ? scale : scale * q.scale[m]);
  }
#if OUTLIERS
  u32 w[4];
  load_run(run_at<false, OUTLIERS / 4>(own_page(data, u, g) + K_OUTLIERS, (4 * u + (g >> 1)) % OCTETS, lane8,
                                       OUTLIERS == 16 ? 0 : pair * 4, 4), 4, w);
  UNROLL for (int m = 0; m < NT; m++) {
    int x[4];
    if (OUTLIERS == 16) mma16_first(z, x, w[2 * pair], w[2 * pair + 1], q.o[m][0]);
    else mma32_first(z, x, w[0], w[2], w[1], w[3], q.o[m][0], q.o[m][1]);
    UNROLL for (int j = 0; j < 2; j++)
      s[m][u][2 * pair + j] += joined(x[2 * j], x[2 * j + 1], BIAS) * (half_at(own_halves(data, K_OUTLIER_SCALE, u, g) + (2 * pair + j) * 4) * q.o_scale[m]);
  }
#endif
}

template <int BITS> DEV void step_scores(const u8* data, int g, const Lane& own, const u32* table, const Start& z, const Query& q, float (&s)[NT][GROUPS][4]) {
  const int from = own.from, lane8 = own.lane8;
  g = (from & 3) << 1 | from >> 2 & 1;
  UNROLL for (int u = 0; u < GROUPS; u++) {
    Units<BITS, false> k;
    k.at(own_page(data, u, g), (4 * u + (g >> 1)) % OCTETS, lane8);
    UNROLL for (int pair = 0; pair < 2; pair++) pair_scores<BITS>(data, u, pair, g, lane8, table, z, q, k, s);
  }
}

struct Softmax {  // of rows t, 4 + t, ...; channels 8 n + g
  float top[NT], sum[NT], total[NT], acc[NT][UNITS];
};

// Soft cap, masks, and new references for the exponentials where asked; scores become multiples of `factor`.
DEV void prepare_scores(int g, int first_slot, bool masked, bool exact, const Query& q, const Params& p, Softmax& x,
                        float (&s)[NT][GROUPS][4], float (&factor)[NT]) {
  UNROLL for (int m = 0; m < NT; m++) {
    if (p.soft_cap > 0) {
      UNROLL for (int u = 0; u < GROUPS; u++) UNROLL for (int j = 0; j < 4; j++) s[m][u][j] = p.soft_cap * tanh_exact(s[m][u][j] * factor[m] / p.soft_cap);
      factor[m] = 1;
    }
    if (masked)
      UNROLL for (int u = 0; u < GROUPS; u++) UNROLL for (int j = 0; j < 4; j++) if (!q.sees(m, first_slot + own_slot(u, j, g))) s[m][u][j] = -INF;
    if (!exact) continue;
    float top = -INF;
    UNROLL for (int u = 0; u < GROUPS; u++) UNROLL for (int j = 0; j < 4; j++) top = max_nan(top, s[m][u][j]);
    const float next = max_nan(x.top[m], rows_max(top) * factor[m]), keep = ex2(x.top[m] - next);
    x.top[m] = next;
    x.sum[m] *= keep;
    x.total[m] *= keep;
    UNROLL for (int n = 0; n < UNITS; n++) x.acc[m][n] *= keep;
  }
}

// Weights (exponentials times V scales) as fixed point B fragments, and their unit. The references of the exponentials are tops of
// earlier steps; false, with nothing changed but the scores, if one of them turns out to be too far below: then the scores are to be
// computed again and passed with `exact`.
DEV bool weigh(const u8* data, int g, int t, int first_slot, bool masked, bool exact, const Query& q, const Params& p, Softmax& x,
               float (&s)[NT][GROUPS][4], u32 (&b)[NT][GROUPS][2], float* unit, const Lane& own) {
  float factor[NT], sum[NT], total[NT];
  UNROLL for (int m = 0; m < NT; m++) factor[m] = FOLDED ? q.scale[m] : 1.f;
  if (masked || exact || p.soft_cap > 0) prepare_scores(g, first_slot, masked, exact, q, p, x, s, factor);
  bool near = true;
  UNROLL for (int m = 0; m < NT; m++) {
    sum[m] = 0;
    UNROLL for (int u = 0; u < GROUPS; u++) {
      const u8* scales = own_halves(data, V_SCALE, u, g);
      UNROLL for (int j = 0; j < 4; j++) {
        const float e = ex2(fmaf(s[m][u][j], factor[m], -x.top[m]));
        sum[m] += e;
        s[m][u][j] = e * half_at(scales + j * 4);
      }
    }
    near = near && sum[m] <= FAR;
  }
  if (masked)  // not e times the scale: the slot may hold anything
    UNROLL for (int m = 0; m < NT; m++) UNROLL for (int u = 0; u < GROUPS; u++) UNROLL for (int j = 0; j < 4; j++)
      if (!q.sees(m, first_slot + own_slot(u, j, g))) s[m][u][j] = 0;
  const bool usable = exact || __all_sync(~0u, near);
  // Column g of a fragment holds hi (g even) or lo (g odd) of row g / 2. A lane with even g sends hi in the first exchange, one with odd
  // g lo: then every column gets its half of the even slots in one exchange and of the odd slots in the other.
  const Lane at = own;
  UNROLL for (int m = 0; m < NT; m++) {
    float part[GROUPS];
    UNROLL for (int u = 0; u < GROUPS; u++) part[u] = (s[m][u][0] + s[m][u][1]) + (s[m][u][2] + s[m][u][3]);
    total[m] = part[0];
    UNROLL for (int u = 1; u < GROUPS; u++) total[m] += part[u];
    const float most = rows_max(max_nan(total[m], 1e-30f));
    unit[m] = most * (1.f / P_MAX);
    const float r = __fdividef(P_MAX, most);
    UNROLL for (int u = 0; u < GROUPS; u++) {
      u32 y[4];  // the weight is in the low two bytes
      UNROLL for (int j = 0; j < 4; j++) y[j] = __float_as_uint(fmaf(s[m][u][j], r, j % 2 ? MAGIC_ODD : MAGIC));
      const u32 y01 = y[1] * SHIFT_16 + y[0], y23 = y[3] * SHIFT_16 + y[2];
      const u32 a0 = __shfl_sync(~0u, prmt(y01, y23, at.pick), at.from), a1 = __shfl_sync(~0u, prmt(y01, y23, at.pick ^ 0x1111), at.from ^ 4);
      b[m][u][0] = prmt(a0, a1, at.swap);
      b[m][u][1] = prmt(a0, a1, at.swap ^ 0x2222);
    }
  }
  if (usable) UNROLL for (int m = 0; m < NT; m++) { x.sum[m] += sum[m]; x.total[m] += total[m]; }
  return usable;
}

DEV void add_values(const u8* data, int g, int t, const u32* table, const Start& z, const u32 (&b)[NT][GROUPS][2], const float* unit, Softmax& x) {
  Units<V_BITS, true> v[GROUPS];
  UNROLL for (int u = 0; u < GROUPS; u++) v[u].at(data + (4 * u + t) / OCTETS * STRIDE, (4 * u + t) % OCTETS, g);
  UNROLL for (int n0 = 0; n0 < UNITS; n0 += 4) {
    int c[2][NT][4];
    UNROLL for (int u = 0; u < GROUPS; u++) UNROLL for (int i = 0; i < 2; i++) if (n0 + 2 * i < UNITS) {
      u32 even[2], odd[2];
      v[u].unit(n0 + 2 * i, table, even[0], even[1]);
      v[u].unit(n0 + 2 * i + 1, table, odd[0], odd[1]);
      UNROLL for (int m = 0; m < NT; m++)
        if (u) mma32_weights(c[i][m], even[0], odd[0], even[1], odd[1], b[m][u][0], b[m][u][1]);
        else mma32_weights_first(z, c[i][m], even[0], odd[0], even[1], odd[1], b[m][u][0], b[m][u][1]);
    }
    UNROLL for (int i = 0; i < 2; i++) if (n0 + 2 * i < UNITS)
      UNROLL for (int m = 0; m < NT; m++) UNROLL for (int j = 0; j < 2; j++) {
        float& acc = x.acc[m][n0 + 2 * i + j];
        acc = fmaf(joined(c[i][m][2 * j], c[i][m][2 * j + 1], BIAS), unit[m], acc);
      }
  }
}

// ---- tasks ---------------------------------------------------------------------------------------------------------------------------

// What a row's warp leaves in shared memory for all warps: fixed point of the query's channels and of its outlier channels, as bytes in
// the order of the B fragments, and their scales.
struct Queries {
  u32 b[NT][KSTEPS + KTAIL][32][2], o[NT][OUTLIERS ? 32 : 1][2];
  float scale[ROWS], o_scale[ROWS], bias[ROWS];
};
constexpr int RAW_AT = (QUERIES_AT + (int)sizeof(Queries) + 15) / 16 * 16;  // the newest tokens' keys and values in shared memory

DEV float warp_max(float x) {  // of values that are not negative; a NaN wins, as its bits are the largest
  return __uint_as_float(__reduce_max_sync(~0u, __float_as_uint(x)));
}
DEV void put_fixed_point(float x, float r, u32* tile, int row, int lane, int& sum) {  // channel `lane` of a k-step
  const int y = __float2int_rn(x * r), hi = (y + 128) >> 8;
  char* at = (char*)&tile[(row * 8 + lane % 16 / 4) * 2 + lane / 16] + lane % 4;
  at[0] = hi;
  at[32] = y - (hi << 8);
  sum += y;
}

// A warp's rows of a task's queries, on their way from memory.
struct Rows {
  static constexpr int MINE = (ROWS + NW - 1) / NW;
  float x[MINE][E];
#if RECENT
  int ring;
#endif
#if OUTLIERS
  int channel;
  float out[MINE];
#endif
  DEV void fetch(const Params& p, const Task& k, int warp, int lane) {
#if RECENT
    ring = k.recent ? p.recent_slots[k.sequence] : 0;
#endif
#if OUTLIERS
    channel = lane < OUTLIERS ? (int)p.outlier_channels[k.head * OUTLIERS + lane] : -1;
#endif
    UNROLL for (int i = 0; i < MINE; i++) {
      const int R = k.row0 + warp + i * NW, qi = R / GROUP;
      const bool real = qi < k.q_len;
      const i64 at = ((i64)(k.q_row + qi) * p.kv_heads * GROUP + k.head * GROUP + R % GROUP) * D;
      UNROLL for (int e = 0; e < E; e++) x[i][e] = real && 32 * e + lane < D ? load_element<Q_TYPE>(p.q, at + 32 * e + lane) : 0.f;
#if OUTLIERS
      out[i] = real && channel >= 0 ? load_element<Q_TYPE>(p.q, at + channel) : 0.f;
#endif
    }
  }
};

// Rotates and quantises the task's queries, a warp per row.
DEV void put_queries(const Params& p, const Task& k, Rows& rows, Queries& q, float* buf, int warp, int lane) {
  constexpr int MINE = Rows::MINE;
  float (&x)[MINE][E] = rows.x;
#if OUTLIERS
  float (&out)[MINE] = rows.out;
  const int channel = rows.channel;
#endif
  UNROLL for (int i = 0; i < MINE; i++) {
    const int r = warp + i * NW;
    if (r >= ROWS) break;
    int sum = 0;
#if OUTLIERS
    int unused = 0;
    const float o_most = warp_max(fabsf(out[i]));
    if (lane < OUTLIERS) put_fixed_point(out[i], o_most > 0 ? Q_MAX / o_most : 0.f, &q.o[r / 4][0][0], r % 4, lane, unused);
    if (lane == 0) q.o_scale[r] = o_most / Q_MAX * p.scale_log2;
    UNROLL for (int e = 0; e < E; e++) {
      const u32 zero = __reduce_or_sync(~0u, channel >= 0 && channel / 32 == e ? 1u << (channel & 31) : 0u);
      if (zero >> lane & 1) x[i][e] = 0;
    }
#endif
    if (ROTATE && (k.row0 + r) / GROUP < k.q_len) { flip_signs<32, 1>(x[i], p.signs, lane); hadamard<32, 1, false>(x[i], buf, lane); }
    float most = 0;
    UNROLL for (int e = 0; e < E; e++) most = max_nan(most, fabsf(x[i][e]));
    most = warp_max(most);
    const float scale = most > 0 ? Q_MAX / most : 0.f;
    UNROLL for (int e = 0; e < E; e++) if (32 * e + lane < D) put_fixed_point(x[i][e], scale, &q.b[r / 4][e][0][0], r % 4, lane, sum);
    sum = __reduce_add_sync(~0u, sum);
    if (lane == 0) {
      q.scale[r] = max_nan(most / Q_MAX * p.scale_log2 * level_unit<K_BITS>(), 1e-30f);  // a masked score times 0 would be NaN
      q.bias[r] = K_BITS == 8 ? BIAS : BIAS - 0.5f * sum;
    }
  }
}

DEV void make_query(const Params& p, const Task& k, int start, const Queries& shared, int lane, Query& q) {
  UNROLL for (int m = 0; m < NT; m++) {
    const int r = 4 * m + lane % 4, qi = (k.row0 + r) / GROUP;
    UNROLL for (int i = 0; i < KSTEPS + KTAIL; i++) { const uint2 x = *(const uint2*)shared.b[m][i][lane]; q.b[m][i][0] = x.x; q.b[m][i][1] = x.y; }
    if (OUTLIERS) { const uint2 x = *(const uint2*)shared.o[m][OUTLIERS ? lane : 0]; q.o[m][0] = x.x; q.o[m][1] = x.y; }
    q.scale[m] = shared.scale[r];
    q.o_scale[m] = OUTLIERS ? shared.o_scale[r] : 0.f;
    q.bias[m] = shared.bias[r];
    q.hi[m] = qi < k.q_len ? k.position(qi) : -1;
    q.lo[m] = p.window > 0 ? max(start, q.hi[m] - p.window + 1) : start;
    if (RECENT) q.hi[m] = min(q.hi[m], k.length - 1);
  }
}

#if RECENT
// The attention of a task's rows to its sequence's newest tokens, whose raw keys and values lie beside the pages, so that they need not be
// rotated. It is computed where the task's last piece begins, and joined when a row is finished. The keys and values of the sequence and head
// are copied to shared memory before the piece's first pages, since a load behind these would wait for all of them. A warp per row as
// in put_queries; a lane has four neighbouring channels of 128, then a token's score. With 16 tokens of 128 channels 450 instructions per row.
struct Newest {
  static constexpr int QUADS = (D + 127) / 128;
  static constexpr int BYTES = 2 * RECENT * D * (Q_TYPE == 2 ? 4 : 2), BATCH = 8;  // tokens at once; with more the compiler loads so many that it spills
#if __CUDA_ARCH__ >= 900
  static constexpr int BEHIND = 0;    // groups of copies that may be on their way still: pages come by bulk copies
#else
  static constexpr int BEHIND = OWN;  // the pages' groups
#endif
  static DEV void copy(const Params& p, const Task& k, int ring, u8* to) {
    const u8* from = (const u8*)p.recent + ((i64)ring * p.kv_heads + k.head) * BYTES;
    const u32 to0 = (u32)__cvta_generic_to_shared(to);
    for (int at = threadIdx.x * 16; at < BYTES; at += NW * 32 * 16)
      asm volatile("cp.async.cg.shared.global [%0],[%1],16;" ::"r"(to0 + at), "l"(from + at) : "memory");
    asm volatile("cp.async.commit_group;" ::: "memory");
  }
  template <int N> static DEV void halve(float* x, int lane) {  // 2 N numbers per lane to N: a lane with N in its number gets the upper ones
    UNROLL for (int i = 0; i < N; i++) {
      const bool upper = lane & N;
      const float other = __shfl_xor_sync(~0u, upper ? x[i] : x[i + N], N);
      x[i] = (upper ? x[i + N] : x[i]) + other;
    }
    if constexpr (N > 1) halve<N / 2>(x, lane);
  }
  static DEV float sums(float (&x)[BATCH], int lane) {  // over all lanes of BATCH numbers each: number lane % BATCH
    halve<BATCH / 2>(x, lane);
    UNROLL for (int h = BATCH; h < 32; h *= 2) x[0] += __shfl_xor_sync(~0u, x[0], h);
    return x[0];
  }
  // Which tokens a row sees, by place among the raw ones.
  struct Seen {
    int from, to, at;
    DEV Seen(const Params& p, const Task& k, int r) {
      const int newest = k.position((k.row0 + r) / GROUP);
      int first = p.seq_starts ? min(p.seq_starts[k.sequence], newest + 1) : 0;
      if (p.window > 0) first = max(first, newest - p.window + 1);
      from = max(first - k.length, 0);
      to = newest - k.length + 1;
      at = k.length;
    }
    DEV bool operator[](int place) const { const int i = (place - at) & (RECENT - 1); return i >= from && i < to; }
  };
  static DEV void load(const u8* rows, int i, int lane, float (&x)[QUADS][4]) {  // row i; 0 beyond the last channel
    UNROLL for (int e = 0; e < QUADS; e++) {
      UNROLL for (int j = 0; j < 4; j++) x[e][j] = 0;
      if (128 * e + 4 * lane < D) load4<Q_TYPE>(rows, i * D + 128 * e + 4 * lane, x[e]);
    }
  }
  // Of row r, whose elements lie 32 e + lane in x[e], to memory: O, then m and l, as partial results lie.
  static DEV void put_row(const Params& p, const Task& k, int r, const float (&x)[E], const u8* keys, const u8* values, float* part, int lane) {
    const Seen seen(p, k, r);
    float q[QUADS][4], o[QUADS][4], score = 0;
    UNROLL for (int e = 0; e < QUADS; e++) UNROLL for (int j = 0; j < 4; j++) {
      q[e][j] = o[e][j] = 0;
      UNROLL for (int i = 4 * e; i < E && i < 4 * e + 4; i++) {  // channel 128 e + 4 lane + j
        const float y = __shfl_sync(~0u, x[i], lane % 8 * 4 + j);
        q[e][j] = lane / 8 == i % 4 ? y : q[e][j];
      }
    }
#pragma unroll 1
    for (int b = 0; b < RECENT; b += BATCH) {
      float s[BATCH];
      UNROLL for (int i = 0; i < BATCH; i++) {
        float key[QUADS][4];
        load(keys, b + i, lane, key);
        s[i] = 0;  // what a token gives that the row does not see is not looked at
        UNROLL for (int e = 0; e < QUADS; e++) UNROLL for (int j = 0; j < 4; j++) s[i] = fmaf(q[e][j], key[e][j], s[i]);
      }
      const float sum = sums(s, lane);
      if (lane % RECENT / BATCH == b / BATCH) score = sum;
    }
    score = fabsf(score) < INF ? score * p.scale_log2 : NOT_A_NUMBER;  // an infinity would vanish in the soft cap or as a weight of 0
    if (p.soft_cap > 0) score = p.soft_cap * tanh_exact(score / p.soft_cap);
    score = seen[lane & (RECENT - 1)] ? score : -INF;
    const float top = max_nan(all_max(score), EMPTY), weight = ex2(score - top);
    const float sum = all_sum(lane < RECENT ? weight : 0);
    if (lane == 0) { part[ROWS * D + 2 * r] = top; part[ROWS * D + 2 * r + 1] = sum; }
#pragma unroll BATCH
    for (int i = 0; i < RECENT; i++) {
      float value[QUADS][4];
      load(values, i, lane, value);
      const float w = __shfl_sync(~0u, weight, i);
      const bool real = seen[i];  // a weight of 0 would not do for what was never written
      UNROLL for (int e = 0; e < QUADS; e++) UNROLL for (int j = 0; j < 4; j++) o[e][j] = fmaf(w, real ? value[e][j] : 0.f, o[e][j]);
    }
    bool finite = true;
    UNROLL for (int e = 0; e < QUADS; e++) UNROLL for (int j = 0; j < 4; j++) finite = finite && fabsf(o[e][j]) < INF;
    finite = __all_sync(~0u, finite);  // else the row is NaN, as one that sees a NaN scale
    UNROLL for (int e = 0; e < QUADS; e++) {
      UNROLL for (int j = 0; j < 4; j++) o[e][j] = finite ? o[e][j] : NOT_A_NUMBER;
      if (128 * e + 4 * lane < D) store4<2>(part, r * D + 128 * e + 4 * lane, o[e]);
    }
  }
  static DEV void put(const Params& p, const Task& k, const Rows& rows, const u8* raw, float* part, int warp, int lane) {
    asm volatile("cp.async.wait_group %0;" ::"n"(BEHIND) : "memory");
    __syncthreads();
    UNROLL for (int i = 0; i < Rows::MINE; i++) {
      const int r = warp + i * NW;
      if (r >= ROWS) break;
      put_row(p, k, r, rows.x[i], raw, raw + BYTES / 2, part, lane);
    }
  }
  // What a row has from there, when it is finished.
  float x[E], top, sum;
  DEV Newest(bool any, int r, const float* part, int lane) {
    UNROLL for (int e = 0; e < E; e++) x[e] = any && 32 * e + lane < D ? __ldcg(part + r * D + 32 * e + lane) : 0.f;
    top = any ? __ldcg(part + ROWS * D + 2 * r) : EMPTY;
    sum = any ? __ldcg(part + ROWS * D + 2 * r + 1) : 0.f;
  }
};
#else
struct Newest { DEV Newest(bool, int, const float*, int) {} };
#endif

// Newest tokens, sinks, division, un-rotation and the write of a row whose channels lie 32 e + lane in x[e].
DEV void finish_row(const Params& p, const Task& k, int r, const Newest& newest, float top, float sum, float (&x)[E], float* buf, int lane) {
  const int R = k.row0 + r, qi = R / GROUP;
  if (qi >= k.q_len) return;
  const int head = k.head * GROUP + R % GROUP;
  const i64 row = (i64)(k.q_row + qi) * p.kv_heads * GROUP + head;
#if RECENT
  const float both = max_nan(top, newest.top), keep = ex2(top - both);
  float raw_factor = ex2(newest.top - both);
  sum = sum * keep + newest.sum * raw_factor;
  UNROLL for (int e = 0; e < E; e++) x[e] *= keep;
  top = both;
#endif
  if (p.sinks) {
    const float sink = p.sinks[head] * 1.44269504f, next = max_nan(top, sink), f = ex2(top - next);
    sum = sum * f + ex2(sink - next);
    UNROLL for (int e = 0; e < E; e++) x[e] *= f;
#if RECENT
    raw_factor *= f;
#endif
    top = next;
  }
  const float scale = sum == 0 ? 0.f : level_unit<V_BITS>() / sum;
  UNROLL for (int e = 0; e < E; e++) x[e] *= scale;
  if (ROTATE) { hadamard<32, 1, true>(x, buf, lane); flip_signs<32, 1>(x, p.signs, lane); }
#if RECENT
  raw_factor *= sum == 0 ? 0.f : 1 / sum;
  UNROLL for (int e = 0; e < E; e++) x[e] = fmaf(newest.x[e], raw_factor, x[e]);
#endif
  UNROLL for (int e = 0; e < E; e++) if (32 * e + lane < D) store_element<OUT_TYPE>(p.out, row * D + 32 * e + lane, x[e]);
  if (lane == 0) p.lse[row] = sum == 0 ? -INF : (top + log2f(sum)) * 0.69314718f;
}

struct __align__(16) Shared {
  u64 bars[NB];
  int filled[NB];
  Place place;
  float top[NW][ROWS], sum[NW][ROWS], buf[ORDER == 1 ? 1 : NW * D];
  int ticket;
  // Twice, for even and odd lanes: what the compiler knows to be equal in all lanes it copies from a uniform register before each use.
  u32 tables[2][2][2];
  Start start[2];
  Lane lanes[32];
};

DEV u32 arrive(u32* counter) {  // and see what those who arrived before have written
  u32 before;
  asm volatile("atom.add.acq_rel.gpu.global.u32 %0,[%1],1;" : "=r"(before) : "l"(counter) : "memory");
  return before;
}

// Merges the warps' results of a piece from shared memory, in their order: rows of whole tasks are finished, others go to the workspace.
DEV void merge_warps(const Params& p, const Task& k, Shared& sh, const float* rows, float* part, bool whole, int warp, int lane) {
  float* buf = sh.buf + (ORDER == 1 ? 0 : warp * D);
  const int used = min(ROWS, GROUP * k.q_len - k.row0);
  for (int r = warp; r < used; r += NW) {
    const Newest newest(whole && k.recent, r, part + RESULT, lane);
    float top = EMPTY, sum = 0, o[E];
    UNROLL for (int w = 0; w < NW; w++) top = max_nan(top, sh.top[w][r]);
    UNROLL for (int e = 0; e < E; e++) o[e] = 0;
    UNROLL for (int w = 0; w < NW; w++) {
      const float f = ex2(sh.top[w][r] - top);
      sum = fmaf(sh.sum[w][r], f, sum);
      UNROLL for (int e = 0; e < E; e++) if (32 * e + lane < D) o[e] = fmaf(rows[(w * ROWS + r) * LINE + 32 * e + lane], f, o[e]);
    }
    if (whole) { finish_row(p, k, r, newest, top, sum, o, buf, lane); continue; }
    UNROLL for (int e = 0; e < E; e++) if (32 * e + lane < D) part[r * D + 32 * e + lane] = o[e];
    if (lane == 0) { part[ROWS * D + 2 * r] = top; part[ROWS * D + 2 * r + 1] = sum; }
  }
}

// The partial results of a row of a task in n chunks, on their way from memory: the first ones, and all sums of the first 32. They are asked for
// together, since at the end of a launch nobody else works and every trip to memory counts.
struct Partials {
  static constexpr int ROWS_AT_ONCE = Rows::MINE > 1 ? 2 : 1;
  static constexpr int REGISTERS = (MIN_CTAS == 1 ? 64 : ORDER == 1 ? 32 : 16) / ROWS_AT_ONCE;  // Paley matrices want some too
  static constexpr int AT_ONCE = REGISTERS >= 16 * E ? 16 : REGISTERS >= 8 * E ? 8 : REGISTERS >= 4 * E ? 4 : 2;
  const float* base;  // of the first chunk's results
  int n, r;
  float x[AT_ONCE][E];
  float2 weight;      // m and l of result `lane`
  Newest newest;
  DEV Partials(const Params& p, const Task& k, int first, int n_, int r_, int lane)
      : base(p.workspace + (i64)2 * first * PART), n(n_), r(r_), weight(weight_of(lane)), newest(k.recent, r_, at(n_ - 1) + RESULT, lane) {
    load(0, lane);
  }
  DEV const float* at(int i) const { return base + (i64)(2 * i + (i == 0)) * PART; }
  DEV float2 weight_of(int i) const { return i < n ? __ldcg((const float2*)(at(i) + ROWS * D) + r) : float2{EMPTY, 0.f}; }
  DEV void load(int from, int lane) {
    UNROLL for (int i = 0; i < AT_ONCE; i++) UNROLL for (int e = 0; e < E; e++)
      x[i][e] = from + i < n && 32 * e + lane < D ? __ldcg(at(from + i) + r * D + 32 * e + lane) : 0.f;
  }
  DEV void merge(float& top, float& sum, float (&to)[E], int lane) {  // in the order of the chunks
    top = weight.x;
    for (int i = lane + 32; i < n; i += 32) top = max_nan(top, weight_of(i).x);
    top = all_max(top);
    sum = 0;
    UNROLL for (int e = 0; e < E; e++) to[e] = 0;
    float f = 0;
#pragma unroll 1
    for (int i = 0; i < n; i += AT_ONCE) {
      if (i % 32 == 0) {
        if (i) weight = weight_of(i + lane);
        f = i + lane < n ? ex2(weight.x - top) : 0.f;
        sum += all_sum(f * weight.y);
      }
      if (i) load(i, lane);
      UNROLL for (int j = 0; j < AT_ONCE; j++) {
        const float fj = __shfl_sync(~0u, f, i % 32 + j);
        UNROLL for (int e = 0; e < E; e++) to[e] = fmaf(x[j][e], fj, to[e]);
      }
    }
  }
};

// Announces this warp's rows of a piece of a task that lies in `splits` chunks from `first` on; the warp that is the last of the CTAs' to
// do so merges the pieces.
DEV void merge_pieces(const Params& p, const Task& k, Shared& sh, int first, int splits, int warp, int lane) {
  __syncwarp();
  int last = 0;
  if (lane == 0) {
    u32* counter = p.counters + 1 + first * NW + warp;
    last = arrive(counter) == splits - 1;
    if (last) *counter = 0;
  }
  if (!__shfl_sync(~0u, last, 0)) return;
  __syncwarp();
  const int used = min(ROWS, GROUP * k.q_len - k.row0);
  auto finish = [&](Partials& row) {
    float top, sum, o[E];
    row.merge(top, sum, o, lane);
    finish_row(p, k, row.r, row.newest, top, sum, o, sh.buf + (ORDER == 1 ? 0 : warp * D), lane);
  };
#pragma unroll 1
  for (int r = warp; r < used; r += Partials::ROWS_AT_ONCE * NW) {
    Partials row(p, k, first, splits, r, lane);
    if (Partials::ROWS_AT_ONCE == 1 || r + NW >= used) { finish(row); continue; }
    Partials other(p, k, first, splits, r + NW, lane);
    finish(row);
    finish(other);
  }
}

extern "C" __global__ void __launch_bounds__(NW * 32, MIN_CTAS) decode(const __grid_constant__ Params p) {
  extern __shared__ __align__(128) u8 smem[];
  __shared__ Shared sh;
  const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
  const int warp = __shfl_sync(~0u, threadIdx.x >> 5, 0);  // known to the compiler as equal in all lanes, and with it all that steps depend on
  Queries& queries = *(Queries*)(smem + QUERIES_AT);
  float* rows = (float*)smem;  // the warps' results, where their rings were
  const int heads = p.kv_heads * GROUP;
  Place place;
  place.chunk = blockIdx.x;
  place.read_record(p);
  const Plan plan(p);
  if (plan.taper) {
    if (threadIdx.x == 0) sh.ticket = Claims(p, plan).chunk(plan);
    __syncthreads();
    place.chunk = sh.ticket;
    place.read_record(p);
  }
  place.at = plan.start(place.chunk);
  place.stop = plan.stop(place.chunk);
  place.before = 0;
  Ring ring;
  ring.init(smem, sh.bars, sh.filled);
  for (i64 i = (i64)plan.rows * heads * D + blockIdx.x * NW * 32 + threadIdx.x; i < (i64)p.rows * heads * D; i += plan.ctas * NW * 32) {
    store_element<OUT_TYPE>(p.out, i, 0.f);
    if (i % D == 0) p.lse[i / D] = p.sinks ? p.sinks[i / D % heads] : -INF;
  }
  if (place.at >= place.stop) {
    if (plan.taper) Claims(p, plan).end();
    return;
  }
  if (threadIdx.x < 32) sh.lanes[lane] = {t * 8 + (g >> 1) + (g & 1) * 4, g & 1 ? 0x6420u : 0x7531u, g & 1 ? 0x1504u : 0x5140u, (g & 1) * 4 + t};
  if (threadIdx.x == 0) {
    UNROLL for (int i = 0; i < 2; i++) { level_table<K_BITS>(sh.tables[i][0]); level_table<V_BITS>(sh.tables[i][1]); }
    UNROLL for (int i = 0; i < 4; i++) sh.start[0].c[i] = sh.start[1].c[i] = i % 2 ? LO_START : HI_START;
  }
  __syncthreads();
  const Start start = sh.start[lane & 1];
  u32 k_table[2], v_table[2];
  UNROLL for (int i = 0; i < 2; i++) {
    k_table[i] = sh.tables[lane & 1][0][i];
    v_table[i] = K_BITS == V_BITS ? k_table[i] : sh.tables[lane & 1][1][i];
  }
  const int zero = (int)(sh.lanes[lane].pick >> 31);  // in all lanes, which the compiler does not know: it would wait for page ids to make them uniform
  Piece now(p, place, plan.lead);
  u32 ids[OWN][PAGES];
  ring.seek(warp);
  ring.align(smem, now.head_pages);
  now.first_page_ids(warp, ids);
  Rows fetched;
  fetched.fetch(p, now.k, warp, lane);
#if RECENT
  u8* raw = smem + RAW_AT;
  if (now.ends_in_newest()) Newest::copy(p, now.k, fetched.ring, raw);
#endif
  now.issue_first(ring, p, warp, ids);
  bool draws = plan.drawn && now.begin + now.s1 + plan.lead >= place.stop;  // a ticket at the end of its chunk

  for (bool more = true; more;) {
    int step = now.s0 + warp;
    u32 next[PAGES];
    now.page_ids(step + NB + zero, next);
#if RECENT
    // A shuffle makes the condition known to the compiler as equal in all lanes.
    if (__shfl_sync(~0u, now.ends_in_newest(), 0)) Newest::put(p, now.k, fetched, raw, p.workspace + (i64)(2 * place.chunk + (now.s0 == 0)) * PART + RESULT, warp, lane);
#endif
    put_queries(p, now.k, fetched, queries, sh.buf + (ORDER == 1 ? 0 : warp * D), warp, lane);
    if (threadIdx.x == 0) sh.place = place;  // rather than in registers during the steps
    __syncthreads();
    Query q;
    make_query(p, now.k, now.start, queries, lane, q);
    // Steps from `inner` to `outer` are seen by every row whole.
    const int last_row = min(now.k.row0 + ROWS, GROUP * now.k.q_len) - 1;
    const int min_hi = now.k.position(now.k.row0 / GROUP), max_hi = now.k.position(last_row / GROUP);
    const int max_lo = p.window > 0 ? max(now.start, max_hi - p.window + 1) : now.start;
    const int inner = (max_lo - now.slot0 + STEP - 1) / STEP, outer = ((RECENT ? min(min_hi, now.k.length - 1) : min_hi) + 1 - now.slot0) / STEP;
    Softmax x;
    UNROLL for (int m = 0; m < NT; m++) {
      x.top[m] = EMPTY; x.sum[m] = x.total[m] = 0;
      UNROLL for (int n = 0; n < UNITS; n++) x.acc[m][n] = 0;
    }
    float s[NT][GROUPS][4];
    if (step < now.s1) { ring.wait<OWN - 1>(); step_scores<K_BITS>(ring.data(), g, sh.lanes[lane], k_table, start, q, s); }
    for (bool exact = true; step < now.s1;) {
      const u8* data = ring.data();
      Ring ahead = ring;
      ahead.advance();
      u32 b[NT][GROUPS][2];
      float unit[NT];
      const bool done = weigh(data, g, t, now.slot0 + step * STEP, step < inner || step >= outer, exact, q, p, x, s, b, unit, sh.lanes[lane]);
      exact = !done;
      if (done) {
        if (draws && warp == 0 && step + NW >= now.s1 && lane == 0) {
          // In warp 0's last step: early enough for the answer to be there in time, late enough to leave work to others.
          const Plan again(p);
          sh.ticket = atomicInc(p.counters, again.drawn + again.ctas - 1);  // 0 after the last
        }
        add_values(data, g, t, v_table, start, b, unit, x);
        if (step + NW >= now.s1) break;
        __syncwarp();
        now.issue(ring, p, ring.stage, ring.use + 1, step + NB, next);
        now.page_ids(step + NB + NW + zero, next);
        ahead.wait<OWN - 1>();
        data = ahead.data();
      }
      step_scores<K_BITS>(data, g, sh.lanes[lane], k_table, start, q, s);  // of the next step, or of this one again
      if (!done) continue;
      ring = ahead;
      step += NW;
    }

    // The next piece's record is read while the warps' results are merged, and its first pages are copied while pieces are.
    __syncthreads();
    place = sh.place;
    const Plan again(p);
    const Piece done(p, place, again.lead);
    const int first = again.chunk_of(done.begin), splits = again.chunk_of(done.begin + done.steps - 1) - first + 1;
    float* part = p.workspace + (i64)(2 * place.chunk + (done.s0 == 0)) * PART;
    place.before += done.s1 - done.s0;
    place.at = done.begin + done.s1;
    if (place.at + again.lead < place.stop) {
      place.next_task(p, again);
    } else if (more = draws && sh.ticket < again.drawn, more) {
      place.chunk = again.ctas + sh.ticket;
      place.at = again.start(place.chunk);
      place.stop = again.stop(place.chunk);
      place.read_record(p);
    }
    UNROLL for (int m = 0; m < NT; m++) {
      const float sum = rows_sum(x.sum[m]), half = 0.5f * rows_sum(x.total[m]);
      if (g == 0) { sh.top[warp][4 * m + t] = x.top[m]; sh.sum[warp][4 * m + t] = sum; }
      UNROLL for (int n = 0; n < UNITS; n++) rows[(warp * ROWS + 4 * m + t) * LINE + 8 * n + g] = x.acc[m][n] + half;
    }
    if (more) now = Piece(p, place, again.lead);
    __syncthreads();
    if (more) { now.first_page_ids(warp, ids); fetched.fetch(p, now.k, warp, lane); }
    merge_warps(p, done.k, sh, rows, part, splits == 1, warp, lane);
    if (more) {
#if __CUDA_ARCH__ >= 900
      asm volatile("fence.proxy.async.shared::cta;" ::: "memory");  // bulk copies will write where the results lay
#endif
      __syncthreads();
      ring.seek(place.before + warp);
      ring.align(smem, now.head_pages);
#if RECENT
      if (now.ends_in_newest()) Newest::copy(p, now.k, fetched.ring, raw);
#endif
      now.issue_first(ring, p, warp, ids);
      draws = again.drawn && now.begin + now.s1 + again.lead >= place.stop;
    }
    if (splits > 1) merge_pieces(p, done.k, sh, first, splits, warp, lane);
    if (!more && again.taper) Claims(p, again).end();
  }
}
