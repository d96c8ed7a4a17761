// The plan of splits of one decode step, shared by all layers: how the steps of all tasks are dealt out to a fixed number of CTAs.
//
// Every sequence has kv_heads * ceil(group * q_len / rows) tasks of the same number of steps (step_slots tokens each, from the first
// that some query sees to the last). All tasks' steps lie in one row, which is cut into chunks. One CTA of 1024 threads; no host in
// the loop, so it can be captured once and replayed with other lengths.
//
// Chunk c < ctas is CTA c's own: `big` steps, an even share or, where the work is long, 92 % of one (97 % for more than 8 rows). The rest
// is cut into up to SMALL_PER_CTA * ctas small chunks that the CTAs draw as they finish, because they do not finish together. Where all
// tasks are equally long, chunks are whole tasks or equal parts of one if that costs little. Borders depend on lengths only, never on
// timing.
//
// plan: [0] big, [1] small, [2] steps in all, [3] rows of q in use, [4] where `cum` lies, [8 ..] a record of 8 ints per chunk (first
// sequence, steps before it, steps of one of its tasks, first task, its length in pages, rows of q before it, q_len and 256 times its tokens
// beyond that length, start), then cum: steps before each
// sequence (batch + 1) and rows of q before each sequence (batch + 1).
typedef long long i64;

__device__ int scan(int x, int* warps, int& sum) {  // inclusive, over the CTA
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  for (int h = 1; h < 32; h *= 2) { const int y = __shfl_up_sync(~0u, x, h); if (lane >= h) x += y; }
  if (lane == 31) warps[warp] = x;
  __syncthreads();
  if (warp == 0) {
    int w = warps[lane];
    for (int h = 1; h < 32; h *= 2) { const int y = __shfl_up_sync(~0u, w, h); if (lane >= h) w += y; }
    warps[lane] = w;
  }
  __syncthreads();
  if (warp) x += warps[warp - 1];
  sum = warps[31];
  __syncthreads();
  return x;
}

constexpr int SMALL_PER_CTA = 2;

struct Params {
  const int *seq_lens, *q_lens, *seq_starts, *recent_counts;  // [batch]; all but the first may be null
  int* plan;
  int batch, window, kv_heads, group, rows, step, ctas, min_chunk;
};

__device__ int recent_of(const Params& p, int b) { return p.recent_counts ? p.recent_counts[b] : 0; }

__device__ int steps_of(const Params& p, int b, int q_len) {
  const int recent = recent_of(p, b), length = p.seq_lens[b] - recent;
  int seen = p.seq_starts ? p.seq_starts[b] : 0;
  if (p.window > 0) seen = max(seen, length + recent - q_len - p.window + 1);
  seen = max(0, min(seen, length - 1));
  return max(1, (length + p.step - 1) / p.step - seen / p.step);
}

extern "C" __global__ void __launch_bounds__(1024) schedule(const Params p) {
  __shared__ int warps[32], s_longest, s_tasks;
  const int batch = p.batch, ctas = p.ctas, chunks = (1 + SMALL_PER_CTA) * ctas;
  int* cum = p.plan + 8 + 8 * chunks;
  int* q_rows = cum + batch + 1;
  if (threadIdx.x == 0) { cum[0] = q_rows[0] = 0; s_longest = 1; s_tasks = 0; }
  __syncthreads();
  int total = 0, used = 0;
  for (int b0 = 0; b0 < batch; b0 += 1024) {
    const int b = b0 + threadIdx.x, q_len = b < batch ? p.q_lens ? p.q_lens[b] : 1 : 0;
    const int tasks = p.kv_heads * ((p.group * q_len + p.rows - 1) / p.rows), steps = tasks ? steps_of(p, b, q_len) : 0;
    if (steps) { atomicMax(&s_longest, steps); atomicAdd(&s_tasks, tasks); }
    int sum, sum_rows;
    const int before = scan(tasks * steps, warps, sum), before_rows = scan(q_len, warps, sum_rows);
    if (b < batch) { cum[b + 1] = total + before; q_rows[b + 1] = used + before_rows; }
    total += sum;
    used += sum_rows;
  }
  __syncthreads();
  const int longest = s_longest, least = min(p.min_chunk, longest), mean = (total + ctas - 1) / ctas;
  const bool even = (i64)s_tasks * longest == total;  // all tasks are equally long
  int big = max(mean, least), small = 1;
  if (even)
    for (int n = longest / big; n >= 1 && longest / n * 2 <= big * 3; n--)
      if (longest % n == 0) { big = longest / n; break; }
  if (mean >= 32 * p.min_chunk && longest <= 8 * mean) {
    const bool heavy = p.rows > 8;  // a step of so many rows takes so long that fewer of them need be drawn, in smaller chunks
    big = mean * (heavy ? 97 : 92) / 100;
    if (even && big / longest * longest >= mean * 65 / 100) big = big / longest * longest;
    const int rest = total - big * ctas;
    small = max((heavy ? 4 : 8) * p.min_chunk, (rest + SMALL_PER_CTA * ctas - 1) / (SMALL_PER_CTA * ctas));
  }
  if (threadIdx.x == 0) { p.plan[0] = big; p.plan[1] = small; p.plan[2] = total; p.plan[3] = used; p.plan[4] = 8 + 8 * chunks; }
  for (int c = threadIdx.x; c < chunks; c += 1024) {
    const int at = c < ctas ? c * big : ctas * big + (c - ctas) * small;
    if (at >= total) continue;
    int low = 0, high = batch;  // the last sequence whose first step is not after `at`
    while (high - low > 1) { const int middle = (low + high) / 2; if (cum[middle] <= at) low = middle; else high = middle; }
    const int q_len = q_rows[low + 1] - q_rows[low];
    int* record = p.plan + 8 + 8 * c;
    record[0] = low;
    record[1] = cum[low];
    record[2] = steps_of(p, low, q_len);
    record[3] = (at - cum[low]) / record[2];
    const int recent = recent_of(p, low);
    record[4] = p.seq_lens[low] - recent;
    record[5] = q_rows[low];
    record[6] = q_len | recent << 8;
    record[7] = p.seq_starts ? p.seq_starts[low] : 0;
  }
}
