// The plan of splits of one decode step, shared by all layers: how the steps of all tasks are dealt out to a fixed number of CTAs.
//
// Every sequence has kv_heads * ceil(group * q_len / rows) tasks of the same number of steps (step_slots tokens each, from the first
// that some query sees to the last). All tasks' steps lie in one row, which is cut into chunks. One CTA of 1024 threads; no host in
// the loop, so it can be captured once and replayed with other lengths.
//
// Where the work is long and tasks differ, or steps are heavy (their instructions take about as long as their bytes, or longer), CTAs share
// all of it, by rank (shares.cuh); the beginning of a task, its queries and its merge, counts as `lead` steps: before every task's steps
// lie `lead` places of the row in which there is nothing to do. Where tasks are alike and steps light the CTAs have 92 % of it, in whole
// tasks, or in equal parts of one, if that costs little; the rest is cut into up to SMALL_PER_CTA * ctas small chunks that they draw as
// they finish, because they do not finish together. Borders depend on lengths only, never on timing.
//
// plan: [0] big, [1] small, [2] places in all, [3] rows of q in use, [4] drawn, [5] lead, [6] taper, [7] per_rank, [8 ..] a record of 8 ints
// per chunk (first sequence, places before it, steps of one of its tasks, first task, its length in pages, rows of q before it, q_len and
// 256 times its tokens beyond that length, start), then cum: places before each sequence (batch + 1) and rows of q before each sequence
// (batch + 1).
//
// kvturbo.ops.decode.variants puts shares.cuh before this text.
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

constexpr int LEAD = 12, HEAVY_LEAD = 16;      // steps' worth of time; where steps are heavy
constexpr int TAPER = 120, HEAVY_TAPER = 240;  // thousandths of the mean share, from rank to rank
constexpr int TICKET = 8;                      // steps of a small chunk, times min_chunk

struct Params {
  const int *seq_lens, *q_lens, *seq_starts, *recent_counts;  // [batch]; all but the first may be null
  int* plan;
  int batch, window, kv_heads, group, rows, heavy, step, ctas, per_rank, min_chunk;
};

__device__ int recent_of(const Params& p, int b) { return p.recent_counts ? p.recent_counts[b] : 0; }

__device__ int steps_of(const Params& p, int b, int q_len) {
  const int recent = recent_of(p, b), length = p.seq_lens[b] - recent;
  int seen = p.seq_starts ? p.seq_starts[b] : 0;
  if (p.window > 0) seen = max(seen, length + recent - q_len - p.window + 1);
  seen = max(0, min(seen, length - 1));
  return max(1, (length + p.step - 1) / p.step - seen / p.step);
}

__device__ int tasks_of(const Params& p, int q_len) { return p.kv_heads * ((p.group * q_len + p.rows - 1) / p.rows); }

extern "C" __global__ void __launch_bounds__(1024) schedule(const Params p) {
  __shared__ int warps[32], s_longest, s_tasks, s_total;
  const int batch = p.batch, ctas = p.ctas;
  Shares x;
  x.ctas = ctas;
  int* cum = p.plan + 8 + 8 * x.chunks();
  int* q_rows = cum + batch + 1;
  if (threadIdx.x == 0) { cum[0] = q_rows[0] = s_total = s_tasks = 0; s_longest = 1; }
  __syncthreads();
  for (int b = threadIdx.x; b < batch; b += 1024) {
    const int q_len = p.q_lens ? p.q_lens[b] : 1, tasks = tasks_of(p, q_len);
    if (!tasks) continue;
    const int steps = steps_of(p, b, q_len);
    atomicMax(&s_longest, steps);
    atomicAdd(&s_tasks, tasks);
    atomicAdd(&s_total, tasks * steps);
  }
  __syncthreads();
  const int longest = s_longest, tasks = s_tasks, mean = (s_total + ctas - 1) / ctas;
  const bool even = (i64)tasks * longest == s_total;  // all tasks are equally long
  const bool lengthy = mean >= 32 * p.min_chunk && longest <= 8 * mean;
  const int lead = !lengthy ? 0 : p.heavy ? HEAVY_LEAD : even ? 0 : LEAD, total = s_total + tasks * lead;
  x.big = max(mean, min(p.min_chunk, longest));
  x.taper = 0;
  x.small = 1;
  x.per_rank = p.per_rank;
  if (lead) {
    if (x.per_rank < ctas) x.taper = (i64)total * (p.heavy ? HEAVY_TAPER : TAPER) / (1000 * ctas);
    x.big = (total + x.tapered() + ctas - 1) / ctas;
  } else if (lengthy) {
    x.big = mean * 92 / 100;
    if (x.big / longest * longest >= mean * 65 / 100) x.big = x.big / longest * longest;
    x.small = max(TICKET * p.min_chunk, (total - x.start(ctas) + SMALL_PER_CTA * ctas - 1) / (SMALL_PER_CTA * ctas));
  } else if (even) {
    for (int n = longest / x.big; n >= 1 && longest / n * 2 <= x.big * 3; n--)
      if (longest % n == 0) { x.big = longest / n; break; }
  }
  x.drawn = max(0, (total - x.start(ctas) + x.small - 1) / x.small);
  int before = 0, used = 0;
  for (int b0 = 0; b0 < batch; b0 += 1024) {
    const int b = b0 + threadIdx.x, q_len = b < batch ? p.q_lens ? p.q_lens[b] : 1 : 0, n = tasks_of(p, q_len);
    int sum, sum_rows;
    const int upto = scan(n ? n * (steps_of(p, b, q_len) + lead) : 0, warps, sum), rows = scan(q_len, warps, sum_rows);
    if (b < batch) { cum[b + 1] = before + upto; q_rows[b + 1] = used + rows; }
    before += sum;
    used += sum_rows;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    p.plan[0] = x.big; p.plan[1] = x.small; p.plan[2] = total; p.plan[3] = used;
    p.plan[4] = x.drawn; p.plan[5] = lead; p.plan[6] = x.taper; p.plan[7] = x.per_rank;
  }
  for (int c = threadIdx.x; c < x.chunks(); c += 1024) {
    const int at = x.start(c);
    if (at >= total) continue;
    int low = 0, high = batch;  // the last sequence whose first step is not after `at`
    while (high - low > 1) { const int middle = (low + high) / 2; if (cum[middle] <= at) low = middle; else high = middle; }
    const int q_len = q_rows[low + 1] - q_rows[low];
    int* record = p.plan + 8 + 8 * c;
    record[0] = low;
    record[1] = cum[low];
    record[2] = steps_of(p, low, q_len);
    record[3] = (at - cum[low]) / (record[2] + lead);
    const int recent = recent_of(p, low);
    record[4] = p.seq_lens[low] - recent;
    record[5] = q_rows[low];
    record[6] = q_len | recent << 8;
    record[7] = p.seq_starts ? p.seq_starts[low] : 0;
  }
}
