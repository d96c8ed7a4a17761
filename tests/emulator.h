// Enough of CUDA to run a kernel on the CPU: a CTA's threads are fibers that take turns at the warp's and the CTA's meeting points.
// A meeting that not all threads reach, or that they reach at different operations, aborts.
#include <csetjmp>
#include <cfenv>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>
#include <ucontext.h>

#define __device__
#define __global__
#define __forceinline__ inline
#define __constant__ static
#define __shared__ static
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))

struct float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct uint2 { unsigned x, y; };
struct uint4 { unsigned x, y, z, w; };
struct int4 { int x, y, z, w; };
static float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
static uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
struct Index { int x; };
static Index threadIdx, blockIdx, gridDim;

static int min(int a, int b) { return a < b ? a : b; }
static int max(int a, int b) { return a > b ? a : b; }

// ---- fibers

constexpr int STACK_BYTES = 1 << 17;
struct Copy { void* to; const void* from; };
struct Fiber {
  jmp_buf at;
  ucontext_t start;
  std::unique_ptr<char[]> stack;
  bool done;
  std::vector<std::vector<Copy>> groups;  // of asynchronous copies; the last is not committed yet
};
static std::vector<Fiber> fibers;
static jmp_buf scheduler;
static int current;
static long progress;
static void (*body)();

static void fiber_main() { body(); fibers[current].done = true; progress++; _longjmp(scheduler, 1); }
static void yield() { if (!_setjmp(fibers[current].at)) _longjmp(scheduler, 1); }

struct Meeting { int count = 0, size = 0, operation = 0; long generation = 0; };
static Meeting warps[32], cta;
static uint64_t boxes[32][2][32];
static unsigned fragments[32][2][6][32];

static void meet(Meeting& m, int operation) {
  if (m.count && m.operation != operation) { fprintf(stderr, "threads meet at different operations\n"); abort(); }
  m.operation = operation;
  progress++;
  const long generation = m.generation;
  if (++m.count == m.size) { m.count = 0; m.generation++; return; }
  while (m.generation == generation) yield();
}
template <class T> static const uint64_t* exchange(T x, int operation) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, box = warps[warp].generation % 2;
  uint64_t bits = 0;
  memcpy(&bits, &x, sizeof x);
  boxes[warp][box][lane] = bits;
  meet(warps[warp], operation);
  return boxes[warp][box];
}
template <class T> static T as(uint64_t bits) { T x; memcpy(&x, &bits, sizeof x); return x; }

// ---- dynamic shared memory

constexpr int GUARD_BYTES = 4096;
static std::vector<char> shared_memory;
static char* dynamic_shared;

static void fill_shared(int bytes) {  // what was not written is NaN
  shared_memory.assign(bytes + GUARD_BYTES + 128, (char)0xff);
  dynamic_shared = (char*)(((uintptr_t)shared_memory.data() + 127) / 128 * 128);
}
static void check_guard(int bytes) {
  for (int i = 0; i < GUARD_BYTES; i++)
    if (dynamic_shared[bytes + i] != (char)0xff) { fprintf(stderr, "a write beyond shared memory\n"); abort(); }
}

// Backwards: the CTAs run from the last to the first, and asynchronous copies happen when they are waited for, not when they are issued.
static bool backwards;

template <class K> static void run(K kernel, int grid, int threads, int shared_bytes, bool backwards_) {
  static K the_kernel;
  the_kernel = kernel;
  body = [] { the_kernel(); };
  backwards = backwards_;
  gridDim.x = grid;
  fibers = std::vector<Fiber>(threads);
  for (int i = 0; i < grid; i++) {
    blockIdx.x = backwards ? grid - 1 - i : i;
    fill_shared(shared_bytes);
    cta = {0, threads};
    for (int t = 0; t < threads; t++) {
      warps[t / 32] = {0, 32};
      Fiber& f = fibers[t];
      if (!f.stack) f.stack.reset(new char[STACK_BYTES]);
      f.done = false;
      f.groups.assign(1, {});
      getcontext(&f.start);
      f.start.uc_stack.ss_sp = f.stack.get();
      f.start.uc_stack.ss_size = STACK_BYTES;
      makecontext(&f.start, fiber_main, 0);
    }
    std::vector<bool> started(threads);
    for (int left = threads; left;) {
      const long before = progress;
      left = 0;
      for (volatile int t = 0; t < threads; t = t + 1) {
        if (fibers[t].done) continue;
        current = threadIdx.x = t;
        if (!_setjmp(scheduler)) {
          if (started[t]) _longjmp(fibers[t].at, 1);
          started[t] = true;
          setcontext(&fibers[t].start);
        }
        left += !fibers[t].done;
      }
      if (left && progress == before) { fprintf(stderr, "threads wait for each other\n"); abort(); }
    }
    check_guard(shared_bytes);
  }
}

// ---- intrinsics

static void __syncthreads() { meet(cta, 1); }
static void __syncwarp() { meet(warps[threadIdx.x / 32], 2); }
template <class T> static T __shfl_sync(unsigned, T x, int lane) { return as<T>(exchange(x, 3)[lane & 31]); }
template <class T> static T __shfl_xor_sync(unsigned, T x, int mask) { return as<T>(exchange(x, 4 + 64 * mask)[threadIdx.x % 32 ^ mask]); }
template <class T> static T __shfl_down_sync(unsigned, T x, int n) {
  const int lane = threadIdx.x % 32;
  return as<T>(exchange(x, 5)[lane + n < 32 ? lane + n : lane]);
}
template <class T> static T __shfl_up_sync(unsigned, T x, int n) {
  const int lane = threadIdx.x % 32;
  return as<T>(exchange(x, 8)[lane < n ? lane : lane - n]);
}
static unsigned __ballot_sync(unsigned, bool x) {
  const uint64_t* all = exchange((int)x, 6);
  unsigned bits = 0;
  for (int i = 0; i < 32; i++) bits |= (unsigned)all[i] << i;
  return bits;
}
static unsigned __reduce_or_sync(unsigned, unsigned x) {
  const uint64_t* all = exchange(x, 7);
  unsigned bits = 0;
  for (int i = 0; i < 32; i++) bits |= (unsigned)all[i];
  return bits;
}
static bool __all_sync(unsigned mask, bool x) { return __ballot_sync(mask, x) == ~0u; }
static unsigned __reduce_max_sync(unsigned, unsigned x) {
  const uint64_t* all = exchange(x, 9);
  unsigned most = 0;
  for (int i = 0; i < 32; i++) most = (unsigned)all[i] > most ? (unsigned)all[i] : most;
  return most;
}
static int __reduce_add_sync(unsigned, int x) {
  const uint64_t* all = exchange(x, 10);
  unsigned sum = 0;
  for (int i = 0; i < 32; i++) sum += (unsigned)all[i];
  return (int)sum;
}
static unsigned atomicXor(unsigned* at, unsigned x) { const unsigned old = *at; *at ^= x; return old; }
template <class T> static T atomicAdd(T* at, T x) { const T old = *at; *at += x; return old; }
static unsigned warp_slot() { return backwards ? 0 : blockIdx.x * 5; }  // any will do, the same for all as well
static unsigned atomicInc(unsigned* at, unsigned limit) { const unsigned old = *at; *at = old >= limit ? 0 : old + 1; return old; }
static int atomicMax(int* at, int x) { const int old = *at; *at = max(old, x); return old; }
static void __threadfence() {}
static unsigned __cvta_generic_to_shared(const void* at) { return (unsigned)((const char*)at - dynamic_shared); }
template <class T> static T __ldcg(const T* at) { return *at; }
static int __ffs(unsigned x) { return __builtin_ffs(x); }
static int __popc(unsigned x) { return __builtin_popcount(x); }
static float __uint_as_float(unsigned x) { return as<float>(x); }
static constexpr float __int_as_float(int x) { return __builtin_bit_cast(float, x); }
static unsigned __float_as_uint(float x) { unsigned u; memcpy(&u, &x, 4); return u; }
static float __fdiv_rn(float a, float b) { return a / b; }
static float __fdividef(float a, float b) { return a * (1 / b); }
static float __fmul_rn(float a, float b) { return a * b; }
static float __fsqrt_rn(float a) { return sqrtf(a); }
static float __fadd_ru(float a, float b) {
  const double sum = (double)a + b;  // exact for what the kernels add
  const float f = (float)sum;
  return f < sum ? nextafterf(f, INFINITY) : f;
}
static int __float2int_rn(float x) { return x != x ? 0 : x >= 2147483647.f ? 2147483647 : x <= -2147483648.f ? -2147483647 - 1 : (int)rintf(x); }

// ---- what the kernels write in PTX

static unsigned prmt(unsigned a, unsigned b, unsigned s) {
  const uint64_t bytes = (uint64_t)b << 32 | a;
  unsigned d = 0;
  for (int i = 0; i < 4; i++) {
    unsigned byte = bytes >> 8 * (s >> 4 * i & 7) & 255;
    if (s >> 4 * i & 8) byte = byte & 128 ? 255 : 0;
    d |= byte << 8 * i;
  }
  return d;
}
static float2 half2_to_float2(unsigned h) { return {(float)as<_Float16>(h & 65535), (float)as<_Float16>(h >> 16)}; }
static unsigned short float_to_half(float x) { const _Float16 h = (_Float16)x; unsigned short bits; memcpy(&bits, &h, 2); return bits; }
static unsigned short float_to_bf16(float x) {
  const unsigned u = __float_as_uint(x);
  return x != x ? 0x7fff : (u + 0x7fff + (u >> 16 & 1)) >> 16;
}
static float max_nan(float a, float b) { return a != a ? a : b != b ? b : a < b ? b : a; }
static float half_at(const unsigned char* at) { _Float16 h; memcpy(&h, at, 2); return (float)h; }
static float ex2(float x) {
  const float y = exp2f(x);
  return y < 1.17549435e-38f ? 0 : y;
}

// C[16][8] += A[16][K] B[K][8] of bytes; lane (g, t) has C[g + 8 (i / 2)][2 t + i % 2], and four bytes per register of A's rows g (even
// registers) and g + 8 (odd) and of B's column g, from k = 4 t (the first 16 k) or 16 + 4 t.
template <class B> __attribute__((optimize("O3"))) static int dot16(const unsigned* a, const unsigned* b) {
  const int8_t* x = (const int8_t*)a;
  const B* y = (const B*)b;
  int sum = 0;
  for (int i = 0; i < 16; i++) sum += x[i] * y[i];
  return sum;
}
template <int HALVES, class B = int8_t> static void multiply(int* c, const unsigned (&registers)[3 * HALVES]) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  unsigned (&all)[6][32] = fragments[warp][warps[warp].generation % 2];
  for (int i = 0; i < 3 * HALVES; i++) all[i][lane] = registers[i];
  meet(warps[warp], 10 + HALVES);
  for (int i = 0; i < 4; i++)
    for (int h = 0; h < HALVES; h++) c[i] += dot16<B>(&all[2 * h + i / 2][4 * g], &all[2 * HALVES + h][4 * (2 * t + i % 2)]);
}
static void mma16(int* c, unsigned a0, unsigned a1, unsigned b) { multiply<1>(c, {a0, a1, b}); }
static void mma32(int* c, unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
  multiply<2>(c, {a0, a1, a2, a3, b0, b1});
}
template <class S> static void mma16_first(const S& start, int* c, unsigned a0, unsigned a1, unsigned b) {
  memcpy(c, start.c, 16);
  mma16(c, a0, a1, b);
}
template <class S> static void mma32_first(const S& start, int* c, unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
  memcpy(c, start.c, 16);
  mma32(c, a0, a1, a2, a3, b0, b1);
}

static void mma32_weights(int* c, unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
  multiply<2, uint8_t>(c, {a0, a1, a2, a3, b0, b1});
}
template <class S>
static void mma32_weights_first(const S& start, int* c, unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
  memcpy(c, start.c, 16);
  mma32_weights(c, a0, a1, a2, a3, b0, b1);
}

static unsigned high_half(unsigned m) { return m >> 16 | (m & 0xffff0000u); }

static void copy_async(unsigned to, const void* from) {
  if (backwards) fibers[current].groups.back().push_back({dynamic_shared + to, from});
  else memcpy(dynamic_shared + to, from, 16);
}
static void commit_copies() { fibers[current].groups.emplace_back(); }
static void wait_for_copies(int pending) {  // until so many committed groups are left
  auto& groups = fibers[current].groups;
  while ((int)groups.size() - 1 > pending) {
    for (const Copy& copy : groups.front()) memcpy(copy.to, copy.from, 16);
    groups.erase(groups.begin());
  }
}
