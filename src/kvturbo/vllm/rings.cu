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
// - Rejected drafts: tokens from n - m on are stored again, in pages and in the ring. They have taken the places of tokens below
//   next[s] - R, which is why `first` is raised to that.
// - Preemption, and requests that come back: n - m is then another, or the block was written by others, or its tokens are still the same.
// - Rows whose tokens are not stored (slot -1: dummy runs on the null block, padding, captures of graphs) are no rows here.
// A ring that nobody asks for is given away when it has not been used for IDLE steps: sequences may miss steps, as in pipelines.
typedef long long i64;

// Macros (rings.py): MAX_RINGS, THREADS of the CTA, MAX_Q_LEN, the most new tokens of a row that is decoded.
constexpr int IDLE = 16;
constexpr int NOBODY = -0x7fffffff - 1;

struct Params {
  const int *seq_lens, *q_starts, *block_table;  // [batch], [batch + 1], [batch][table_stride]
  const i64* stored;                             // slots of the pages by token, -1: not stored
  int* ring_of_block;                            // [blocks]
  int *owners, *next, *first, *used;             // [rings][2], then [rings]
  int* clock;                                    // steps so far, and tokens of the last one
  int *slots, *counts;                           // [most]: a row's ring or -1, how many of its newest tokens are read from there
  i64* token_slots;                              // [tokens]: ring * size + position % size, -1: not stored in a ring
  int table_stride, batch, most, tokens, rings, size, block;
};

struct Row { int length, before, tokens; };  // with this step's tokens, and without; none if it is no row

__device__ Row row_of(const Params& p, int b) {
  if (b >= p.batch) return {0, 0, 0};
  const int end = p.q_starts[b + 1], tokens = end - p.q_starts[b], length = p.seq_lens[b];
  if (tokens <= 0 || length < tokens || p.stored[end - 1] < 0) return {0, 0, 0};
  return {length, length - tokens, tokens};
}

__device__ int block_of(const Params& p, int b, int position) { return p.block_table[(i64)b * p.table_stride + position / p.block]; }

__device__ int ring_of(const Params& p, int b, const Row& row) {
  if (row.before == 0) return -1;
  const int block = block_of(p, b, row.before - 1), ring = p.ring_of_block[block];
  if (ring < 0 || p.owners[2 * ring] != block && p.owners[2 * ring + 1] != block) return -1;
  return p.next[ring] - MAX_Q_LEN <= row.before && row.before <= p.next[ring] ? ring : -1;
}

// How many threads before this one say yes, and how many do in all.
__device__ int rank_of(bool yes, int* warps, int& sum) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const unsigned votes = __ballot_sync(~0u, yes);
  __syncthreads();  // the sums of the call before have been read
  if (lane == 0) warps[warp] = __popc(votes);
  __syncthreads();
  int rank = __popc(votes & ((1u << lane) - 1));
  sum = 0;
  for (int w = 0; w < THREADS / 32; w++) {
    if (w < warp) rank += warps[w];
    sum += warps[w];
  }
  return rank;
}

extern "C" __global__ void __launch_bounds__(THREADS) rings(const Params p) {
  __shared__ int claims[MAX_RINGS], free_rings[MAX_RINGS], warps[THREADS / 32];
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const int now = p.clock[0] + 1, tokens = p.q_starts[p.batch], written = min(p.tokens, max(tokens, p.clock[1]));
  for (int i = thread; i < written; i += THREADS) p.token_slots[i] = -1;
  for (int i = thread; i < p.most; i += THREADS) { p.slots[i] = -1; p.counts[i] = 0; }
  for (int i = thread; i < p.rings; i += THREADS) claims[i] = NOBODY;
  __syncthreads();

  if (thread == 0) { p.clock[0] = now; p.clock[1] = tokens; }
  for (int b = thread; b < p.batch; b += THREADS) {
    const Row row = row_of(p, b);
    const int ring = row.tokens ? ring_of(p, b, row) : -1;
    if (ring < 0) continue;
    p.slots[b] = ring;
    atomicMax(&claims[ring], ~b);  // the lowest row has it
  }
  __syncthreads();

  for (int b = warp; b < p.batch; b += THREADS / 32) {
    const Row row = row_of(p, b);
    if (!row.tokens) continue;
    for (int i = row.before / p.block + lane; i <= (row.length - 1) / p.block; i += 32)
      p.ring_of_block[p.block_table[(i64)b * p.table_stride + i]] = -1;
  }
  int free_count = 0, asked = 0;
  for (int r0 = 0; r0 < p.rings; r0 += THREADS) {
    const int r = r0 + thread;
    const bool free = r < p.rings && claims[r] == NOBODY && now - p.used[r] > IDLE;
    int sum;
    const int rank = free_count + rank_of(free, warps, sum);
    if (free) free_rings[rank] = r;
    free_count += sum;
  }
  __syncthreads();

  for (int b0 = 0; b0 < p.batch; b0 += THREADS) {
    const int b = b0 + thread;
    const Row row = row_of(p, b);
    int ring = row.tokens ? p.slots[b] : -1, sum;
    const bool kept = ring >= 0 && claims[ring] == ~b, asks = row.tokens && !kept;
    const int rank = asked + rank_of(asks, warps, sum);
    asked += sum;
    if (asks) ring = rank < free_count ? free_rings[rank] : -1;
    if (!row.tokens) continue;
    p.slots[b] = ring;
    if (ring < 0) continue;
    const int first = kept ? min(max(p.first[ring], p.next[ring] - p.size), row.before) : row.before;
    const int newest = block_of(p, b, row.length - 1);
    const int older = block_of(p, b, max(row.before, row.length - 1 - MAX_Q_LEN));  // what is not written here is never asked for again
    p.owners[2 * ring] = newest;
    p.owners[2 * ring + 1] = older;
    p.ring_of_block[newest] = p.ring_of_block[older] = ring;
    p.next[ring] = row.length;
    p.first[ring] = first;
    p.used[ring] = now;
    p.counts[b] = min(p.size, row.length - first);
  }
  __syncthreads();

  for (int b = warp; b < p.batch; b += THREADS / 32) {
    const Row row = row_of(p, b);
    const int ring = row.tokens ? p.slots[b] : -1, position = row.length - 1 - lane;
    if (ring >= 0 && lane < min(p.size, row.tokens)) p.token_slots[p.q_starts[b + 1] - 1 - lane] = (i64)ring * p.size + position % p.size;
  }
}
