#include "lock.h"

#include <pthread.h>

#include <atomic>

namespace fp8gemm {
namespace {

pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
pthread_once_t once = PTHREAD_ONCE_INIT;
std::atomic<int> fork_count{0};

void acquire() { pthread_mutex_lock(&mutex); }
void release() { pthread_mutex_unlock(&mutex); }
void release_in_child() {
    fork_count.fetch_add(1);
    release();
}

}  // namespace

Lock::Lock() {
    pthread_once(&once, [] { pthread_atfork(acquire, release, release_in_child); });
    acquire();
}
Lock::~Lock() { release(); }

int forks() { return fork_count.load(std::memory_order_relaxed); }

}  // namespace fp8gemm
