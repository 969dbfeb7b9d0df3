// The PTX this project speaks, one named wrapper an instruction (PTX ISA 8.0+, sm_90a). Addresses of shared memory are
// 32-bit; "barrier" is an mbarrier in shared memory, "phase" its parity.
#pragma once

namespace fp8gemm {

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;

#define PTX __device__ __forceinline__

PTX u32 shared_address(const void* p) { return static_cast<u32>(__cvta_generic_to_shared(p)); }

// ---- threads and clusters ------------------------------------------------------------------------------------------
PTX bool elect_one() {                           // true in one lane of a converged warp
    u32 elected;
    asm volatile("{ .reg .pred p; elect.sync _|p, 0xffffffff; selp.u32 %0, 1, 0, p; }" : "=r"(elected));
    return elected;
}
PTX u32 cluster_rank() { u32 r; asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(r)); return r; }
PTX void cluster_arrive() {                      // after fence_barrier_init: nothing else needs to be made visible
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
PTX void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
// The value itself, which the assembler must now keep: it would rather compute it again in each turn of a loop, between
// two wgmmas. Whole warps.
PTX u32 keep(u32 value) { return __shfl_sync(0xffffffff, value, threadIdx.x % 32); }
PTX u32 keep_uniform(u32 value) { return __shfl_sync(0xffffffff, value, 0); }    // the same in all lanes
// The value itself. A branch on it has the code for `true` right behind it; of `x == y` the assembler puts that last.
PTX bool laid_first(bool condition) {
    u32 value = condition;
    asm volatile("" : "+r"(value));
    return value;
}
PTX void named_barrier_sync(int id, int threads) {
    asm volatile("bar.sync %0, %1;" :: "r"(id), "r"(threads) : "memory");
}
PTX void named_barrier_arrive(int id, int threads) {             // counts as a sync, and does not wait
    asm volatile("bar.arrive %0, %1;" :: "r"(id), "r"(threads) : "memory");
}
// Programmatic dependent launch. wait: until the kernels before this one are done and their writes can be seen; launch:
// the next kernel may be set up beside this one.
PTX void dependency_wait() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
PTX void dependents_launch() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
template <int N> PTX void registers_decrease() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" :: "n"(N)); }
template <int N> PTX void registers_increase() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" :: "n"(N)); }

// ---- mbarriers -----------------------------------------------------------------------------------------------------
PTX void barrier_init(u64* barrier, u32 count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(shared_address(barrier)), "r"(count) : "memory");
}
PTX void fence_barrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
PTX void barrier_arrive_expect(u64* barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
                 :: "r"(shared_address(barrier)), "r"(bytes) : "memory");
}
PTX void barrier_arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" :: "r"(barrier) : "memory");
}
// Where the same thing lies in CTA `rank` of the cluster.
PTX u32 remote_address(const void* p, u32 rank) {
    u32 remote;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(shared_address(p)), "r"(rank));
    return remote;
}
// Scope .cta on purpose: it orders reads of our own shared memory, and .release.cluster costs a MEMBAR.GPU each time.
PTX void barrier_arrive_remote(u32 barrier) {
    asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" :: "r"(barrier) : "memory");
}
// Four floats into another CTA's shared memory, 16 bytes that its barrier counts.
PTX void store_async_remote(u32 to, float4 v, u32 barrier) {
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];"
                 :: "r"(to), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w), "r"(barrier) : "memory");
}
PTX bool barrier_try_wait(u64* barrier, u32 phase) {
    u32 done;
    asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                 : "=r"(done) : "r"(shared_address(barrier)), "r"(phase) : "memory");
    return done;
}
PTX bool barrier_test(u64* barrier, u32 phase) {                 // never suspends the thread
    u32 done;
    asm volatile("{ .reg .pred p; mbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                 : "=r"(done) : "r"(shared_address(barrier)), "r"(phase) : "memory");
    return done;
}
PTX void barrier_wait(u64* barrier, u32 phase) {
#ifdef MAX_WAITS                                                 // debug builds: a lost arrival traps, not hangs
    for (int i = 0; i < MAX_WAITS; ++i)
        if (barrier_try_wait(barrier, phase)) return;
    __trap();
#else
    while (!barrier_try_wait(barrier, phase)) {}
#endif
}

PTX void barrier_spin(u64* barrier, u32 phase) {                 // never suspended, the thread goes on sooner
#ifdef MAX_WAITS
    barrier_wait(barrier, phase);
#else
    while (!barrier_test(barrier, phase)) {}
#endif
}

PTX u32 cycles() { u32 r; asm volatile("mov.u32 %0, %%clock;" : "=r"(r)); return r; }

// ---- TMA: boxes of a tensor of four dimensions, by where they begin ------------------------------------------------
PTX void prefetch_map(const TensorMap& map) { asm volatile("prefetch.tensormap [%0];" :: "l"(&map) : "memory"); }
struct BoxStart { int x, y, z, w; };
template <bool kForSeveral>                                      // CTAs of the cluster: to the same place, and for their barriers
PTX void tma_load(void* to, const TensorMap& map, BoxStart at, u64* barrier, u64 policy, u32 ctas) {
    if constexpr (kForSeveral)
        asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
                     ".L2::cache_hint [%0], [%1, {%2, %3, %4, %5}], [%6], %7, %8;"
                     :: "r"(shared_address(to)), "l"(&map), "r"(at.x), "r"(at.y), "r"(at.z), "r"(at.w),
                        "r"(shared_address(barrier)), "h"(static_cast<u16>(ctas)), "l"(policy) : "memory");
    else
        asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
                     " [%0], [%1, {%2, %3, %4, %5}], [%6], %7;"
                     :: "r"(shared_address(to)), "l"(&map), "r"(at.x), "r"(at.y), "r"(at.z), "r"(at.w),
                        "r"(shared_address(barrier)), "l"(policy) : "memory");
}
PTX void tma_prefetch(const TensorMap& map, BoxStart at) {       // into L2
    asm volatile("cp.async.bulk.prefetch.tensor.4d.L2.global [%0, {%1, %2, %3, %4}];"
                 :: "l"(&map), "r"(at.x), "r"(at.y), "r"(at.z), "r"(at.w) : "memory");
}
PTX void bulk_load(void* to, const void* from, u32 bytes, u64* barrier) {        // contiguous, multiples of 16 bytes
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                 :: "r"(shared_address(to)), "l"(from), "r"(bytes), "r"(shared_address(barrier)) : "memory");
}
PTX void tma_store(const TensorMap& map, const void* from, BoxStart at) {
    asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];"
                 :: "l"(&map), "r"(shared_address(from)), "r"(at.x), "r"(at.y), "r"(at.z), "r"(at.w) : "memory");
}
PTX void tma_store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
PTX void tma_store_wait_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }
PTX void tma_store_wait() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }
PTX void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---- plain asynchronous copies -------------------------------------------------------------------------------------
template <int kBytes> PTX void copy_async(u32 to, const void* from, bool valid) {        // writes zeros if not valid
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;"
                 :: "r"(to), "l"(from), "n"(kBytes), "r"(valid ? kBytes : 0) : "memory");
}
PTX void copy_async_arrive(u64* barrier) {                       // arrives when this thread's copies have landed
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" :: "r"(shared_address(barrier)) : "memory");
}

PTX float load_float(const float* from, bool valid) {            // from global memory; 0 if not valid
    float v = 0;
    if (valid) asm volatile("ld.global.f32 %0, [%1];" : "=f"(v) : "l"(from));
    return v;
}
// Float `i` from an address on. Volatile, so that it stays where it stands: before the wgmmas that hide its latency.
PTX float load_shared(u32 address, int i) {
    float v;
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(v) : "r"(address + i * static_cast<u32>(sizeof v)));
    return v;
}
PTX void store_float(float* to, float v) {                       // to shared memory
    asm volatile("st.shared.f32 [%0], %1;" :: "r"(shared_address(to)), "f"(v) : "memory");
}

PTX void store_global(u16* to, u32 two) { asm volatile("st.global.b32 [%0], %1;" :: "l"(to), "r"(two) : "memory"); }
PTX void store_global(u16* to, u16 v) { asm volatile("st.global.b16 [%0], %1;" :: "l"(to), "h"(v) : "memory"); }

// ---- registers -> shared memory ------------------------------------------------------------------------------------
PTX u32 pack_bf16(float low, float high) {
    u32 r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}
PTX u32 transpose_matrix(u32 two) {              // 8 x 8 of 16 bits, lane l with two of row l / 4: transposed
    u32 r;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(r) : "r"(two));
    return r;
}
PTX void store_matrix_x4(u32 address, u32 r0, u32 r1, u32 r2, u32 r3) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};"
                 :: "r"(address), "r"(r0), "r"(r1), "r"(r2), "r"(r3) : "memory");
}

}  // namespace fp8gemm
