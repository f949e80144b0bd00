// Runs csrc/monarch.cu on a CPU, unchanged: every CUDA thread is a fiber, and all fibers of a block go on in lockstep from
// one exchange (mma, shuffle, barrier) to the next. The kernel's control flow is the same for all threads of a block
// between exchanges, which is what lockstep needs, and what mma.sync and __syncthreads ask for as well.
// Compile with -DSUBS=.. -DBF16=.. -DSOURCE="..." as a shared library.

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <vector>

#define SHIM
#define DEVICE static inline
#define __global__
#define __launch_bounds__(n)
typedef uint32_t u32;
typedef uint16_t u16;
struct float2 { float x, y; };
struct float4 { float x, y, z, w; };
struct uint4 { u32 x, y, z, w; };
struct Dim { int x, y, z; };
static float2 make_float2(float x, float y) { return {x, y}; }
static uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }
static float __uint_as_float(u32 x) { float f; std::memcpy(&f, &x, 4); return f; }
static u32 __float_as_uint(float x) { u32 u; std::memcpy(&u, &x, 4); return u; }

alignas(16) static unsigned char shared_memory[227 * 1024];
static Dim threadIdx, blockIdx;
static int current, turn[256];
static u32 board[2][256][6];
static ucontext_t scheduler, fibers[256];

// Hand over to the next thread; everyone has arrived here when it returns. Boards alternate, so that a fast thread does
// not overwrite what a slow one has still to read.
static void arrive() {
  turn[current] ^= 1;
  swapcontext(&fibers[current], &scheduler);
}

static float from_half(u16 h) { _Float16 x; std::memcpy(&x, &h, 2); return (float)x; }
static u16 to_half(float f) { _Float16 x = (_Float16)f; u16 h; std::memcpy(&h, &x, 2); return h; }
static u16 to_bfloat(float f) {
  u32 u = __float_as_uint(f);
  return (u16)((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}
static u32 pack_half(float low, float high) { return (u32)to_half(low) | ((u32)to_half(high) << 16); }
static u32 pack_bfloat(float low, float high) { return (u32)to_bfloat(low) | ((u32)to_bfloat(high) << 16); }
static float half_to_float(u16 h) { return from_half(h); }
static void sync_warp() {}
static void sync_block() { arrive(); }

static float shuffle_xor(float x, int mask) {
  int t = turn[current];
  board[t][current][0] = __float_as_uint(x);
  arrive();
  return __uint_as_float(board[t][current ^ mask][0]);
}

static float half_of(u32 pair, int e) { return from_half((u16)(pair >> (16 * e))); }

// mma.m16n8k16, from the layout in the PTX manual.
static void mma(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  int t = turn[current], base = current & ~31, lane = current & 31, g = lane >> 2, q = lane & 3;
  u32 mine[6] = {a0, a1, a2, a3, b0, b1};
  std::memcpy(board[t][current], mine, sizeof mine);
  arrive();
  for (int i = 0; i < 4; ++i) {
    int row_half = i >> 1, n = 2 * q + (i & 1);
    float sum = c[i];
    for (int k = 0; k < 16; ++k) {
      int a_lane = base + g * 4 + (k % 8) / 2, b_lane = base + n * 4 + (k % 8) / 2;
      float a = half_of(board[t][a_lane][row_half + 2 * (k / 8)], k & 1);
      float b = half_of(board[t][b_lane][4 + k / 8], k & 1);
      sum += a * b;
    }
    c[i] = sum;
  }
}

#include SOURCE

static struct {
  const u16* u; u16* y; const uint4* spectrum; const float* gain; const uint4* table;
  int L, D, u_direction, u_b, u_l, u_d;
} args;
static bool done[256];

static void body() {
  monarch(args.u, args.y, args.spectrum, args.gain, args.table, args.L, args.D, args.u_direction, args.u_b, args.u_l,
          args.u_d);
  done[current] = true;
  swapcontext(&fibers[current], &scheduler);
}

extern "C" void run(const u16* u, u16* y, const void* spectrum, const float* gain, const void* table, int B, int L, int D,
                    int u_direction, int u_b, int u_l, int u_d) {
  args = {u, y, (const uint4*)spectrum, gain, (const uint4*)table, L, D, u_direction, u_b, u_l, u_d};
  const size_t stack = 256 * 1024;
  std::vector<char> stacks(stack * THREADS);
  for (blockIdx.z = 0; blockIdx.z < B; ++blockIdx.z)
    for (blockIdx.y = 0; blockIdx.y < 2; ++blockIdx.y)
      for (blockIdx.x = 0; blockIdx.x < (D + CHANNELS - 1) / CHANNELS; ++blockIdx.x) {
        // What a block finds in shared memory is anything: not-a-numbers here.
        std::memset(shared_memory, 0xff, sizeof shared_memory);
        for (int i = 0; i < THREADS; ++i) {
          getcontext(&fibers[i]);
          fibers[i].uc_stack.ss_sp = stacks.data() + stack * i;
          fibers[i].uc_stack.ss_size = stack;
          fibers[i].uc_link = &scheduler;
          makecontext(&fibers[i], body, 0);
          done[i] = false;
          turn[i] = 0;
        }
        for (bool running = true; running;) {
          running = false;
          for (current = 0; current < THREADS; ++current) {
            if (done[current]) continue;
            threadIdx.x = current;
            swapcontext(&scheduler, &fibers[current]);
            running |= !done[current];
          }
        }
      }
}
