// Counts the bytes of tensors: libtorch's allocators report each allocation and release of a thread to an observer.

#include <c10/core/Allocator.h>
#include <c10/util/ThreadLocalDebugInfo.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <mutex>

namespace {

struct Observer : public c10::MemoryReportingInfoBase {
  std::mutex mutex;
  int64_t current = 0;
  int64_t peak = 0;

  // `size` is negative for a release.
  void reportMemoryUsage(void*, int64_t size, size_t, size_t, c10::Device) override {
    std::lock_guard<std::mutex> lock(mutex);
    current += size;
    peak = std::max(peak, current);
  }
  bool memoryProfilingEnabled() const override { return true; }
};

}  // namespace

// Calls `run(ctx)`, which must not unwind, and sets `peak` to the most bytes that were allocated in it beyond those at
// its start. Null on success, else a malloc'ed message.
extern "C" char* pt_peak_allocation(void* ctx, void (*run)(void* ctx), int64_t* peak) {
  try {
    auto observer = std::make_shared<Observer>();
    c10::DebugInfoGuard guard(c10::DebugInfoKind::PROFILER_STATE, observer);
    run(ctx);
    *peak = observer->peak;
    return nullptr;
  } catch (const std::exception& error) {
    return strdup(error.what());
  }
}
