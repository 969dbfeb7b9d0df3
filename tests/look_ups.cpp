// Look-ups in the table of plans, in a process that has forbidden itself every system call but write and exit.
#include <linux/seccomp.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <new>

#include "../native/host/fp8gemm.h"

static long allocations = 0;
void* operator new(size_t size) { return ++allocations, malloc(size); }
void* operator new(size_t size, const std::nothrow_t&) noexcept { return ++allocations, malloc(size); }
void operator delete(void* p) noexcept { free(p); }
void operator delete(void* p, size_t) noexcept { free(p); }

int main() {
    constexpr int kProblems = 2000, kLookUps = 2000000;
    fp8gemm_problem problem{};
    problem.device_type = 2, problem.k = 7168, problem.groups = 1, problem.inputs_by_tma = 1;
    auto key = [&](int i) {
        fp8gemm_key key;
        problem.m = i % 40 * 100, problem.n = 128 * (i / 40 + 1);
        fp8gemm_make_key(&problem, 0, 0, &key);
        return key;
    };
    for (int i = 0; i < kProblems; ++i) {
        fp8gemm_entry entry{};
        entry.key = key(i);
        fp8gemm_put(&entry);
    }
    if (prctl(PR_SET_SECCOMP, SECCOMP_MODE_STRICT)) return 2;    // anything else kills the process from here on
    const long before = allocations;
    long found = 0;
    const auto start = std::chrono::steady_clock::now();         // the vDSO's: no system call
    for (int i = 0; i < kLookUps; ++i) {
        const fp8gemm_key wanted = key(i * 7 % kProblems);
        found += fp8gemm_find(&wanted) != nullptr;
    }
    const std::chrono::duration<double, std::nano> took = std::chrono::steady_clock::now() - start;
    char text[100];
    const int size = snprintf(text, sizeof text, "a key and its look-up: %.0f ns", took.count() / kLookUps);
    const bool right = found == kLookUps && allocations == before && write(1, text, size) == size;
    syscall(SYS_exit, right ? 0 : 1);
}
