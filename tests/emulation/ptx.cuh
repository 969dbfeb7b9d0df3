// In place of native/kernels/ptx.cuh where one thread at a time runs on the CPU: waits do nothing, copies are written down.
#pragma once
#include <algorithm>
#include <bit>
#include <cstdio>
#include <cstdlib>
#include <utility>
#include <vector>

#define __device__
#define __global__
#define __forceinline__
#define __grid_constant__
#define __shared__
#define __align__(bytes)
#define __launch_bounds__(...)
#define __cluster_dims__(...)
#define PTX inline

struct Index { unsigned x, y; };                 // as CUDA has it: comparisons with what may be negative go wrong
inline Index threadIdx, blockIdx;
struct float4 { float x, y, z, w; };
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
using std::max;
using std::min;

inline int __shfl_sync(unsigned, int value, int) { return value; }
inline int __shfl_up_sync(unsigned, int value, int) { return value; }
inline int __reduce_add_sync(unsigned, int value) { return value; }
inline unsigned __ballot_sync(unsigned, bool b) { return b; }
inline bool __any_sync(unsigned, bool b) { return b; }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(unsigned x) { return __builtin_ffs(static_cast<int>(x)); }

// A warp of one lane, which tells where its turns end.
inline void __syncwarp();

namespace fp8gemm {

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;

struct TensorMap;
struct Box {                                                     // loaded by TMA; map null: a bulk copy of x bytes
    const void* from;
    const TensorMap* map;
    void* to;
    u64* barrier;
    int x, y, z, w;
    u32 ctas;                                                    // that it arrives at, by their ranks; 0: this one
};
struct Expect { u64* barrier; u32 bytes; size_t boxes; u32 at; };        // and how many boxes were loaded before, when
inline u32 clock_now;                                            // it passes while the kernel looks at it
PTX u32 cycles() { return clock_now += 10; }
inline std::vector<Box> boxes;
inline std::vector<Expect> expects;
inline u32 rank_in_cluster;

struct Copy { const void *to, *from; bool valid; int bytes = 4; };        // to null: the end of a turn
inline std::vector<Copy> copies;

inline std::vector<const float*> loads;                          // load_float returns which one it was, from 1 on
inline std::vector<u32> arrivals;                                // at barriers, by their offset from the first stage's

PTX float load_float(const float* from, bool valid) {
    if (!valid) return 0;
    loads.push_back(from);
    return static_cast<float>(loads.size());
}
PTX void store_float(float* to, float v) {
    copies.push_back({to, v ? loads[static_cast<size_t>(v) - 1] : nullptr, v != 0});
}
PTX float load_shared(u32, int) { return 0; }
PTX void copy_async_arrive(u64* barrier) { copies.push_back({nullptr, barrier, false}); }
PTX bool laid_first(bool condition) { return condition; }
PTX u32 keep(u32 value) { return value; }
PTX u32 keep_uniform(u32 value) { return value; }
// Where the running CTA's shared memory begins; null where nobody asks for addresses.
inline const void* shared_begin;
PTX u32 shared_address(const void* p) {
    return shared_begin ? static_cast<u32>(static_cast<const u8*>(p) - static_cast<const u8*>(shared_begin)) : 0;
}
template <int kBytes> PTX void copy_async(u32 to, const void* from, bool valid) {
    copies.push_back({static_cast<const u8*>(shared_begin) + to, from, valid, kBytes});
}
PTX u32 remote_address(const void* p, u32 rank) {
    if (!shared_begin) return 0;
    return rank << 24 | shared_address(p);
}
PTX bool elect_one() { return true; }
PTX u32 cluster_rank() { return rank_in_cluster; }
PTX void cluster_arrive() {}
// Where the warps of a CTA meet: which named barrier (-1: the cluster's), and how many stages and copies were begun before.
struct Meeting {
    int id;
    size_t begun;
    bool operator==(const Meeting&) const = default;
};
inline std::vector<Meeting> meetings;
PTX void meet(int id) { meetings.push_back({id, expects.size() + copies.size() + loads.size()}); }
PTX void cluster_wait() { meet(-1); }
PTX void named_barrier_sync(int id, int) { meet(id); }
PTX void named_barrier_arrive(int id, int) { meet(id); }
PTX void dependency_wait() {}
PTX void dependents_launch() {}
template <int N> PTX void registers_decrease() {}
template <int N> PTX void registers_increase() {}
inline std::vector<std::pair<const u64*, u32>> inits;            // barriers, and how many arrivals complete a phase of them
PTX void barrier_init(u64* barrier, u32 count) { inits.push_back({barrier, count}); }
PTX void fence_barrier_init() {}
PTX void barrier_arrive_expect(u64* barrier, u32 bytes) { expects.push_back({barrier, bytes, boxes.size(), clock_now}); }
PTX void barrier_arrive(u32 barrier) { arrivals.push_back(barrier); }
inline std::vector<u32> remote_arrivals;                         // by remote addresses
PTX void barrier_arrive_remote(u32 barrier) { remote_arrivals.push_back(barrier); }
struct Sent { u32 to, barrier; float v[4]; };                    // to another CTA, by remote addresses
inline std::vector<Sent> sent;
PTX void store_async_remote(u32 to, float4 v, u32 barrier) { sent.push_back({to, barrier, {v.x, v.y, v.z, v.w}}); }
PTX void store_global(u16* to, u32 two) { to[0] = static_cast<u16>(two), to[1] = static_cast<u16>(two >> 16); }
PTX void store_global(u16* to, u16 v) { *to = v; }
PTX bool barrier_test(u64*, u32) { return false; }
inline std::vector<std::pair<const u64*, u32>> waits;           // barriers and parities
PTX void barrier_wait(u64* barrier, u32 parity) { waits.push_back({barrier, parity}); }
PTX void barrier_spin(u64* barrier, u32 parity) { barrier_wait(barrier, parity); }
PTX void prefetch_map(const TensorMap&) {}
struct BoxStart {
    int x, y, z, w;
    bool operator==(const BoxStart&) const = default;
};
template <bool kForSeveral> PTX void tma_load(void* to, const TensorMap& map, BoxStart at, u64* barrier, u64, u32 ctas) {
    boxes.push_back({nullptr, &map, to, barrier, at.x, at.y, at.z, at.w, kForSeveral ? ctas : 0});
}
inline std::vector<std::pair<const TensorMap*, BoxStart>> prefetches;
PTX void tma_prefetch(const TensorMap& map, BoxStart at) { prefetches.push_back({&map, at}); }
PTX void bulk_load(void* to, const void* from, u32 bytes, u64* barrier) {
    boxes.push_back({from, nullptr, to, barrier, static_cast<int>(bytes), 0, 0, 0, 0});
}
PTX void tma_store(const TensorMap&, const void*, BoxStart) {}
PTX void tma_store_commit() {}
PTX void tma_store_wait_read() {}
PTX void tma_store_wait() {}
PTX void fence_async_proxy() {}
PTX u32 pack_bf16(float low, float high) {       // of numbers that bf16 holds
    return std::bit_cast<u32>(low) >> 16 | (std::bit_cast<u32>(high) & 0xFFFF0000);
}
PTX u32 transpose_matrix(u32 two) { return two; }
PTX void store_matrix_x4(u32, u32, u32, u32, u32) {}

}  // namespace fp8gemm

inline void __syncwarp() { fp8gemm::copies.push_back({nullptr, nullptr, false}); }
