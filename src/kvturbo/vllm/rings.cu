// Which row of a batch has which ring of raw tokens: one CTA, once per step, before the step's tokens are stored. An engine tells its
// attention nothing about requests, only block tables and lengths, so a ring is found again by the block that its newest tokens lie in.
//
// ring_of_block[x] = s, while x is one of owners[s], means: the tokens that lie in block x now are tokens of the sequence that ring s
// was last stored for, at the same positions, up to next[s]; and ring s holds this sequence's tokens first[s] .. next[s] - 1, as far as
// they are among the last R. Why that holds, and why a row of n tokens, m of them new, whose token n - m - 1 lies in x may have the ring
// if next[s] - MAX_Q_LEN <= n - m <= next[s]:
// - Tokens get into blocks in no other way than by rows of a batch (no KV connector, no copies of blocks), and a block that a row writes
//   loses its entry before the row's ring is entered. A block that was freed and not written since still holds what it held.
// - Two sequences have a block in common only if it is full and they are equal up to its end (prefix caching). Both may ask for the ring;
//   what it holds below n - m is the same for both, what it holds from there on is stored anew before it is read. One of them gets it.
//   vLLM lets a row share blocks that another row of the same step writes, whose entries are still of what lay there before. So a row
//   whose past ends with its block looks after entries of written blocks are gone; one that ends within its block, which nobody else
//   has, looks before.
// - Rejected drafts: tokens from n - m on are stored again, in pages and in the ring. They have taken the places of tokens below
//   next[s] - R, which is why `first` is raised to that.
// - Preemption, and requests that come back: n - m is then another, or the block was written by others, or its tokens are still the same.
// - Rows whose tokens are not stored (slot -1: dummy runs on the null block, padding, captures of graphs) are no rows here.
// Rows that ask in vain and rows without a past get, from the first row on, the rings that no row has now, the one that has been unused
// longest first. So with as many rings as running sequences no row is without one; a running sequence that misses steps (a scheduler
// skips it, or pipelines alternate batches) may lose its ring then, to a row that would have none otherwise, unless others have been
// unused for longer. It begins with an empty one later. Where more sequences may run than there are rings, those that have one would
// lose it and ask for another in turn, so there a ring must not have been used for `idle` steps.
typedef long long i64;

// Macros (rings.py): MAX_RINGS, THREADS of the CTA, MAX_Q_LEN, the most new tokens of a row that is decoded.
// Loops are not unrolled: a batch that is decoded goes through each once at most, and code must be fetched.
constexpr int NOBODY = -0x7fffffff - 1;
constexpr unsigned OLDEST = 0x7fffffff / MAX_RINGS - 1;  // ages above it are one

struct Params {
  const int *seq_lens, *q_starts, *block_table;  // [batch], [batch + 1], [batch][table_stride]
  const i64* stored;                             // slots of the pages by token, -1: not stored
  int* ring_of_block;                            // [blocks]
  int *owners, *next, *first, *used;             // [rings][2], then [rings]
  int* clock;                                    // steps so far, and tokens of the last one
  int *slots, *counts;                           // [most]: a row's ring or -1, how many of its newest tokens are read from there
  i64* token_slots;                              // [tokens]: ring * size + position % size, -1: not stored in a ring
  int table_stride, batch, most, tokens, rings, size, idle, block;  // size: a power of two
};

struct Row { int length, before, tokens; };  // with this step's tokens, and without; none if it is no row

__device__ Row row_of(const Params& p, int b) {
  if (b >= p.batch) return {0, 0, 0};
  const int end = p.q_starts[b + 1], tokens = end - p.q_starts[b], length = p.seq_lens[b];
  if (tokens <= 0 || length < tokens || p.stored[end - 1] < 0) return {0, 0, 0};
  return {length, length - tokens, tokens};
}

__device__ int block_of(const Params& p, int b, int position) { return p.block_table[(i64)b * p.table_stride + (unsigned)position / p.block]; }

__device__ int ring_of(const Params& p, int b, const Row& row) {
  if (row.before == 0) return -1;
  const int block = block_of(p, b, row.before - 1), ring = p.ring_of_block[block];
  if (ring < 0 || p.owners[2 * ring] != block && p.owners[2 * ring + 1] != block) return -1;
  return p.next[ring] - MAX_Q_LEN <= row.before && row.before <= p.next[ring] ? ring : -1;
}

__device__ bool ends_within(const Params& p, const Row& row) { return (unsigned)row.before % p.block != 0; }  // a block: its past

// How many threads before this one say yes, and how many do in all.
__device__ int rank_of(bool yes, int* warps, int& sum) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const unsigned votes = __ballot_sync(~0u, yes);
  __syncthreads();  // the sums of the call before have been read
  if (lane == 0) warps[warp] = __popc(votes);
  __syncthreads();
  const int of_warp = lane < THREADS / 32 ? warps[lane] : 0;
  sum = __reduce_add_sync(~0u, of_warp);
  return __popc(votes & ((1u << lane) - 1)) + __reduce_add_sync(~0u, lane < warp ? of_warp : 0);
}

// A block that is written loses its entry.
__device__ void forget(const Params& p, int b, int i) { p.ring_of_block[p.block_table[(i64)b * p.table_stride + i]] = -1; }

// The rings that nobody has: order[0] has been unused longest; of two that have been equally long, the lower one comes first.
__device__ void sort_free(const Params& p, int now, const int* claims, int* ages, int* order) {
#pragma unroll 1
  for (int r = threadIdx.x; r < p.rings; r += THREADS) {
    const unsigned age = (unsigned)now - (unsigned)p.used[r];  // right when the clock overflows, too
    const bool free = claims[r] == NOBODY && age > (unsigned)p.idle;
    ages[r] = free ? (int)(age < OLDEST ? age : OLDEST) * MAX_RINGS + MAX_RINGS - 1 - r : -1;  // no two are equal
  }
  __syncthreads();
#pragma unroll 1
  for (int r = threadIdx.x; r < p.rings; r += THREADS) {
    if (ages[r] < 0) continue;
    int rank = 0;
    for (int other = 0; other < p.rings; other++) rank += ages[other] > ages[r];
    order[rank] = r;
  }
}

// Enters a row as the last that its ring was stored for, and says where its tokens go. Returns how many are read from there.
__device__ int enter(const Params& p, int b, const Row& row, int ring, bool kept, int now) {
  const int first = kept ? min(max(p.first[ring], p.next[ring] - p.size), row.before) : row.before;
  const int newest = block_of(p, b, row.length - 1);
  const int older = block_of(p, b, max(row.before, row.length - 1 - MAX_Q_LEN));  // what is not written here is never asked for again
  p.owners[2 * ring] = newest;
  p.owners[2 * ring + 1] = older;
  p.ring_of_block[newest] = p.ring_of_block[older] = ring;
  p.next[ring] = row.length;
  p.first[ring] = first;
  p.used[ring] = now;
  i64* last = p.token_slots + p.q_starts[b + 1] - 1;
#pragma unroll 1
  for (int i = 0; i < min(p.size, row.tokens); i++) last[-i] = (i64)ring * p.size + (row.length - 1 - i & p.size - 1);
  return min(p.size, row.length - first);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) rings(const Params p) {
  __shared__ int claims[MAX_RINGS], ages[MAX_RINGS], order[MAX_RINGS], warps[THREADS / 32], asked;
  const int thread = threadIdx.x, lane = thread % 32;
  const int now = p.clock[0] + 1, tokens = p.q_starts[p.batch], written = min(p.tokens, max(tokens, p.clock[1]));
#pragma unroll 1
  for (int r = thread; r < MAX_RINGS; r += THREADS) { claims[r] = NOBODY; order[r] = -1; }
  if (thread == 0) asked = 0;
  __syncthreads();

#pragma unroll 1
  for (int b = thread; b < p.batch; b += THREADS) {
    const Row row = row_of(p, b);
    p.slots[b] = row.tokens && ends_within(p, row) ? ring_of(p, b, row) : -1;
  }
#pragma unroll 1
  for (int i = thread; i < written; i += THREADS) p.token_slots[i] = -1;
  if (thread == 0) { p.clock[0] = now; p.clock[1] = tokens; }
  __syncthreads();

#pragma unroll 1
  for (int b0 = 0; b0 < p.batch; b0 += THREADS) {
    const int b = b0 + thread;
    const Row row = row_of(p, b);
    const int first = (unsigned)row.before / p.block, count = row.tokens ? (unsigned)(row.length - 1) / p.block - first + 1 : 0;
#pragma unroll 1
    for (int i = 0; i < min(count, 2); i++) forget(p, b, first + i);
#pragma unroll 1
    for (unsigned left = __ballot_sync(~0u, count > 2); left; left &= left - 1) {  // rows of prompts, a warp each
      const int from = __ffs(left) - 1, start = __shfl_sync(~0u, first, from), blocks = __shfl_sync(~0u, count, from);
#pragma unroll 1
      for (int i = 2 + lane; i < blocks; i += 32) forget(p, b - lane + from, start + i);
    }
  }
  __syncthreads();

#pragma unroll 1
  for (int b = thread; b < p.batch; b += THREADS) {
    const Row row = row_of(p, b);
    if (!row.tokens) continue;
    const int ring = ends_within(p, row) ? p.slots[b] : ring_of(p, b, row);
    p.slots[b] = ring;
    // The lowest row has it. Whoever finds another's claim knows that one of them must ask for another ring.
    if (ring < 0 || atomicMax(&claims[ring], ~b) != NOBODY) atomicMax(&asked, 1);
  }
  __syncthreads();
  if (asked) sort_free(p, now, claims, ages, order);
  __syncthreads();

#pragma unroll 1
  for (int b0 = 0, given = 0; b0 < p.most; b0 += THREADS) {
    const int b = b0 + thread;
    const Row row = row_of(p, b);
    int ring = row.tokens ? p.slots[b] : -1;
    const bool kept = ring >= 0 && claims[ring] == ~b;
    if (asked) {
      int sum;
      const int rank = given + rank_of(row.tokens && !kept, warps, sum);
      given += sum;
      if (!kept) ring = row.tokens && rank < MAX_RINGS ? order[rank] : -1;
    }
    const int count = ring < 0 ? 0 : enter(p, b, row, ring, kept, now);
    if (b < p.most) { p.slots[b] = ring; p.counts[b] = count; }
  }
}
