// The table of plans: what each problem's calls do, found without a lock, an allocation or a system call.
//
// A chained hash. Slots are only ever added, at the head of their chain. An entry is complete before its pointer is
// published and never changes afterwards; a new one takes its place by a swap. Entries that were replaced stay
// allocated for the life of the process: a call that has just found one needs no reference count, and there are few,
// one for each time that a tuner or a user gives a problem another plan.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <new>

#include "dlpack.h"
#include "driver.h"
#include "error.h"
#include "lock.h"

using namespace fp8gemm;

namespace {

struct Slot {
    fp8gemm_key key;
    Slot* next;                                  // fixed before the slot is published
    std::atomic<const fp8gemm_entry*> entry{nullptr};
    std::atomic<uint64_t> calls{0};              // since the last listing
};

constexpr size_t kChains = 4096;
constexpr size_t kMaxSlots = 1 << 16;            // a process with more problems resolves the rest call by call
std::atomic<Slot*> chains[kChains];
size_t slots = 0;                                // under the lock
std::atomic<int32_t> sm_limits[kMaxDevices];     // 0: none
std::atomic<int> all_batch_invariant{0};

size_t chain_of(const fp8gemm_key& key) {
    static_assert(sizeof key % 8 == 0, "hashed in words");
    uint64_t words[sizeof key / 8], hash = 0;
    memcpy(words, &key, sizeof key);
    for (uint64_t word : words) hash = (hash ^ word) * 0x9E3779B97F4A7C15u, hash ^= hash >> 32;
    return hash % kChains;
}

Slot* find_slot(const fp8gemm_key& key) {
    for (Slot* slot = chains[chain_of(key)].load(std::memory_order_acquire); slot; slot = slot->next)
        if (!memcmp(&slot->key, &key, sizeof key)) return slot;
    return nullptr;
}

bool known_device(int device_id) { return device_id >= 0 && device_id < kMaxDevices; }

}  // namespace

int32_t fp8gemm_bucket(int64_t m) {
    const int64_t step = m <= 8 ? 8 : m <= 128 ? 16 : m <= 1024 ? 64 : 256;
    return static_cast<int32_t>(std::clamp<int64_t>((m + step - 1) / step * step, 0, INT32_MAX));
}

void fp8gemm_make_key(const fp8gemm_problem* p, int64_t expected_m, int batch_invariant, fp8gemm_key* key) {
    *key = {};
    key->kind = p->kind, key->device_type = p->device_type, key->device_id = p->device_id;
    const bool cuda = p->device_type == dlpack::kCUDA;
    key->reference = cuda && (!p->inputs_by_tma || p->k == 0);
    if (key->reference) return;                  // one kernel and no plan, whatever the sizes
    // Callers of DeepGEMM's masked form put 1.2 on top of the mean rows of a group.
    const int64_t rows = p->kind == FP8GEMM_DENSE    ? 0
                         : p->kind == FP8GEMM_MASKED ? std::min<int64_t>(expected_m, INT32_MAX) * 5 / 6
                                                     : expected_m;
    key->m = fp8gemm_bucket(p->m), key->n = p->n, key->k = p->k, key->groups = p->groups;
    key->expected_m = fp8gemm_bucket(std::min<int64_t>(rows, p->m));
    key->batch_invariant = batch_invariant < 0 ? fp8gemm_batch_invariant() : batch_invariant != 0;
    if (!cuda) return;
    key->row_scales = !p->scales_by_bulk;
    key->num_sms = fp8gemm_sm_limit(p->device_id);
}

const fp8gemm_entry* fp8gemm_find(const fp8gemm_key* key) {
    Slot* slot = find_slot(*key);
    const fp8gemm_entry* entry = slot ? slot->entry.load(std::memory_order_acquire) : nullptr;
    if (entry) slot->calls.fetch_add(1, std::memory_order_relaxed);
    return entry;
}

int fp8gemm_put(const fp8gemm_entry* given) {
    auto* entry = new (std::nothrow) fp8gemm_entry(*given);
    if (!entry) return fail(FP8GEMM_ARGUMENT, "", "no host memory");
    Lock lock;
    Slot* slot = find_slot(entry->key);
    if (!slot) {
        slot = slots < kMaxSlots ? new (std::nothrow) Slot{} : nullptr;
        if (!slot) {                             // the table keeps what it has
            delete entry;
            return FP8GEMM_OK;
        }
        auto& chain = chains[chain_of(entry->key)];
        slot->key = entry->key, slot->next = chain.load(std::memory_order_relaxed);
        slot->entry.store(entry, std::memory_order_relaxed);
        chain.store(slot, std::memory_order_release);
        ++slots;
        return FP8GEMM_OK;
    }
    const fp8gemm_entry* before = slot->entry.load(std::memory_order_relaxed);
    if (before && before->from_store && !entry->from_store) delete entry;        // a miss that was slow to choose
    else slot->entry.store(entry, std::memory_order_release);
    return FP8GEMM_OK;
}

size_t fp8gemm_entries(fp8gemm_entry* entries, uint64_t* calls, size_t capacity) {
    size_t count = 0;
    for (auto& chain : chains)
        for (Slot* slot = chain.load(std::memory_order_acquire); slot; slot = slot->next) {
            const fp8gemm_entry* entry = slot->entry.load(std::memory_order_acquire);
            if (!entry) continue;
            if (count < capacity) {
                entries[count] = *entry;
                calls[count] = slot->calls.exchange(0, std::memory_order_relaxed);
            }
            ++count;
        }
    return count;
}

void fp8gemm_forget_plans(void) {
    Lock lock;
    for (auto& chain : chains)
        for (Slot* slot = chain.load(std::memory_order_relaxed); slot; slot = slot->next)
            slot->entry.store(nullptr, std::memory_order_release);
}

void fp8gemm_set_batch_invariant(int on) { all_batch_invariant.store(on != 0, std::memory_order_relaxed); }

int fp8gemm_batch_invariant(void) { return all_batch_invariant.load(std::memory_order_relaxed); }

int fp8gemm_limit_sms(int device_id, int num_sms) {
    if (!known_device(device_id))
        return fail(FP8GEMM_DEVICE, "device", "%d; at most %d devices are supported", device_id, kMaxDevices);
    sm_limits[device_id].store(num_sms, std::memory_order_relaxed);
    return FP8GEMM_OK;
}

int fp8gemm_sm_limit(int device_id) {
    return known_device(device_id) ? sm_limits[device_id].load(std::memory_order_relaxed) : 0;
}
