// Eight threads on the host library and the stub driver, to be watched by the thread sanitizer: four that call, on two
// devices, two that replace plans, one that lists them, one that changes SM limits and forgets.
#include <dlfcn.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#include "../native/host/fp8gemm.h"

extern "C" int fp8gemm_cpu_gemm(const fp8gemm_operands*, const fp8gemm_problem*, const fp8gemm_cpu_plan*) { return 0; }

namespace {

constexpr int kCalls = 4000, kPlans = 4, kSizes = 8;
fp8gemm_kernel* kernels[2][kPlans];
std::atomic<bool> over{false};
std::atomic<long> found{0}, listed{0};

void require(bool what, const char* text) {
    if (what) return;
    fprintf(stderr, "%s: %s\n", text, fp8gemm_last_error()->message);
    _exit(3);
}

fp8gemm_tensor tensor(uintptr_t at, int device, int bits, int code, int64_t rows, int64_t columns) {
    fp8gemm_tensor t{};
    t.data = reinterpret_cast<void*>(at << 32);
    t.device_type = 2, t.device_id = device, t.dtype_code = code, t.dtype_bits = bits, t.dtype_lanes = 1, t.ndim = 2;
    t.shape[0] = rows, t.shape[1] = columns, t.stride[0] = columns, t.stride[1] = 1;
    return t;
}

// Plan i has L2 policy i and kernel i, whose name the stub compares.
void put(const fp8gemm_key& key, int i) {
    fp8gemm_entry entry{};
    entry.key = key, entry.kernel = kernels[key.device_id][i];
    entry.plan = {128, 128, 4, 1, 1, 1, 1, 1, 0, 0, 1000, 384, 100, 1, static_cast<uint64_t>(i)};
    entry.from_store = 1;
    require(!fp8gemm_put(&entry), "put");
}

fp8gemm_key describe(int device, int size, fp8gemm_operands* o, fp8gemm_problem* p) {
    const int m = 16 * (size + 1), n = 512, k = 1024;
    *o = {};
    o->a = tensor(1, device, 8, 10, m, k), o->sa = tensor(2, device, 32, 2, m, k / 128);
    o->b = tensor(3, device, 8, 10, n, k), o->sb = tensor(4, device, 32, 2, n / 128, k / 128);
    o->d = tensor(5, device, 16, 4, m, n), o->layout.ndim = -1;
    require(!fp8gemm_describe(o, p), "describe");
    fp8gemm_key key;
    fp8gemm_make_key(p, 0, 0, &key);
    return key;
}

void call(int thread) {
    for (int i = 0; i < kCalls; ++i) {
        fp8gemm_operands o;
        fp8gemm_problem p;
        const fp8gemm_key key = describe((thread + i) % 2, i % kSizes, &o, &p);
        const fp8gemm_entry* entry = fp8gemm_find(&key);
        if (!entry) {
            put(key, i % kPlans);
            continue;
        }
        ++found;
        require(!fp8gemm_run(entry, &o, &p, reinterpret_cast<void*>(1)), "run");
    }
}

void replace(int thread) {
    for (int i = 0; !over; ++i) {
        fp8gemm_operands o;
        fp8gemm_problem p;
        put(describe((thread + i) % 2, i / 2 % kSizes, &o, &p), i % kPlans);
    }
}

void list() {
    std::vector<fp8gemm_entry> entries(1000);
    std::vector<uint64_t> calls(1000);
    do {
        const size_t count = fp8gemm_entries(entries.data(), calls.data(), entries.size());
        for (size_t i = 0; i < count; ++i) {
            require(entries[i].kernel == kernels[entries[i].key.device_id][entries[i].plan.b_policy], "a torn entry");
            listed += calls[i];
        }
    } while (!over);
}

void limit() {
    for (int i = 0; !over; ++i) {
        require(!fp8gemm_limit_sms(i % 2, i / 2 % 3 * 50), "limit");
        if (i % 64 == 0) fp8gemm_forget_plans();
    }
}

}  // namespace

int main() {
    for (int device = 0; device < 2; ++device)
        for (int i = 0; i < kPlans; ++i) {
            const char name[] = {'p', 'l', 'a', 'n', static_cast<char>('0' + i), 0};
            require(!fp8gemm_kernel_load(device, "", 0, name, 1000, &kernels[device][i]), "load");
        }
    std::vector<std::thread> callers, others;
    for (int i = 0; i < 4; ++i) callers.emplace_back(call, i);
    for (int i = 0; i < 2; ++i) others.emplace_back(replace, i);
    others.emplace_back(list);
    others.emplace_back(limit);
    for (auto& thread : callers) thread.join();
    over = true;
    for (auto& thread : others) thread.join();
    for (int device = 0; device < 2; ++device)                   // what was forgotten is not listed: put it back
        for (int sms = 0; sms < 3; ++sms)
            for (int size = 0; size < kSizes; ++size) {
                fp8gemm_operands o;
                fp8gemm_problem p;
                require(!fp8gemm_limit_sms(device, sms * 50), "limit");
                put(describe(device, size, &o, &p), 0);
            }
    list();
    void* driver = dlopen("libcuda.so.1", RTLD_NOW);
    const auto& wrong = *static_cast<std::atomic<int>*>(dlsym(driver, "stub_wrong_launches"));
    require(!wrong, "a launch whose kernel is another plan's, or in the wrong context");
    require(found > kCalls && found == listed, "calls and listings do not agree");
}
