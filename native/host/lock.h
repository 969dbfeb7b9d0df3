// The library's one mutex, for what is rare: opening the driver, a device's first use, a new plan.
#pragma once

namespace fp8gemm {

// A fork takes the mutex first, so that the child finds it free.
class Lock {
public:
    Lock();
    ~Lock();
    Lock(const Lock&) = delete;
    Lock& operator=(const Lock&) = delete;
};

// How many forks lie between this process and the one that first held the lock.
int forks();

}  // namespace fp8gemm
